"""vlm/train.py with tiles: LLaVA-1.6 is trained as transformers trains it, in memory and lazy, packed and padded."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaNextForConditionalGeneration,
)

from tests import eyes
from utils import checkpoint
from utils.run import UserError
from vlm import anyres, conversations, generation, llava, llava_io, llava_parts, prompts
from vlm import train as teach
from vlm.train_config import Config, changed

GRIDS = [(28, 56), (56, 28), (56, 56), (84, 28)]
# Sizes of five pictures: each grid is chosen, one of them twice
SIZES = [(50, 37), (30, 90), (20, 22), (100, 30), (60, 60)]
NAME = "transformers.LlavaNextForConditionalGeneration"


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    """A tiny LLaVA-1.6 as a folder of transformers, five pictures, two rows of words -> flags of a run."""
    folder = tmp_path_factory.mktemp("tiles")
    torch.manual_seed(7)
    tokenizer, model = eyes.talker(folder / "speaker")
    model.newline = nn.Parameter(torch.randn(32))
    model.grids = GRIDS
    llava_io.save(model, tokenizer, folder / "model")
    random = np.random.default_rng(0)
    rows = []
    for number, size in enumerate(SIZES):
        pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        turns = [(f"What is it, {number}?", "a pear " * (1 + number % 2)), ("Is it?", "yes")]
        rows.append(conversations.row(f"{number}", f"{number}.png", turns))
    rows.insert(1, conversations.row("text", None, [("What is red?", "an apple")]))
    rows.append(conversations.row("more text", None, [("What is green?", "a melon")]))
    (folder / "chat.json").write_text(json.dumps(rows))
    return changed(
        Config(),
        ckpt_path=str(folder / "model"),
        data_path=(str(folder / "chat.json"),),
        precision="fp32",
        text_share=0.0,
        batch_size=7,
        steps=2,
        warmup_steps=0,
        packing=False,
        out=str(folder / "out"),
    )


def first_batch(cfg):
    """Model, the batch of the first step and its features or pixels."""
    _, model, source = teach.prepare(cfg, torch.device("cpu"))
    ((batch, seen),) = next(iter(source.batches(cfg, 0)))
    return model, batch, seen


def stacked(pixels, sizes):
    """Tiles one after the other -> (P, most, 3,S,S), filled up with zeros, as transformers wants them."""
    counts = [anyres.count_tiles(size, 28, GRIDS) for size in sizes]
    parts = pixels.split(counts)
    return nn.utils.rnn.pad_sequence(list(parts), batch_first=True)


def reference(folder):
    """transformers' LLaVA-1.6 of a folder, its weights in bf16 as ours, in fp32."""
    read = LlavaNextForConditionalGeneration.from_pretrained
    return read(folder, dtype=torch.bfloat16).float()


def test_loss_and_gradients_are_those_of_llava_next(lesson, parity):
    """Pictures of five sizes and rows of words in one batch, read by our data, learned by every part."""
    cfg = changed(lesson, train_type="none")
    model, batch, pixels = first_batch(cfg)
    theirs = reference(cfg.train.ckpt_path)
    count = int((batch["labels"][:, 1:] != prompts.IGNORE).sum())
    mine = teach.Learner(model)(batch, pixels) / count
    other = theirs(
        input_ids=batch["ids"],
        attention_mask=batch["mask"],
        pixel_values=stacked(pixels, batch["sizes"].tolist()),
        image_sizes=batch["sizes"],
        labels=batch["labels"],
    ).loss
    parity("LLaVA-1.6, training", "train.Learner / tokens", f"{NAME} loss", mine, other)
    mine.backward()
    other.backward()
    pairs = {
        "newline": (model.newline, theirs.model.image_newline),
        "connector, first": (model.connector[0].weight, theirs.model.multi_modal_projector.linear_1.weight),
        "connector, second": (model.connector[2].bias, theirs.model.multi_modal_projector.linear_2.bias),
    }  # fmt: skip
    for name, p in model.language.model.named_parameters():
        pairs[name] = (p, theirs.model.language_model.get_parameter(name))
    tower = getattr(theirs.model.vision_tower, "vision_model", theirs.model.vision_tower)
    for name, p in model.vision.network.named_parameters():
        if p.grad is not None:
            pairs[name] = (p, tower.get_parameter(name))
    ours = {name: p.grad for name, (p, _) in pairs.items()}
    them = {name: p.grad for name, (_, p) in pairs.items()}
    assert len(ours) > 40 and all(x.abs().max() > 0 for x in ours.values() if x is not None)
    parity("LLaVA-1.6, training", "train.Learner gradients", f"{NAME} gradients", ours, them)


def losses(cfg, name, **flags):
    return teach.main(changed(cfg, out=f"{cfg.out}/{name}", **flags))["losses"]


@pytest.mark.parametrize("train_type", ["use_lora", "none"])
def test_packed_and_lazy_runs_have_the_losses_of_rows_in_memory(lesson, train_type, parity):
    """Cached features of a frozen tower, pixels of one that learns; tokens of each picture follow its size."""
    cfg = changed(lesson, train_type=train_type, lr=1e-4, lr_pretrained=1e-4)
    plain = losses(cfg, f"plain-{train_type}")
    for name, flags in {"packing": {"packing": True}, "lazy": {"lazy": True}}.items():
        found = losses(cfg, f"{name}-{train_type}", **flags)
        about = (f"vlm.train with tiles, {name}, {train_type}", "padded rows in memory")
        parity("LLaVA-1.6, training", *about, found, plain, 1e-4)


def test_image_tokens_are_as_many_as_the_processor_writes(lesson):
    """Of every picture, by its size: the place of <image> in a prompt of transformers."""
    tokenizer, model = llava.load(lesson.train.ckpt_path)
    processor = AutoProcessor.from_pretrained(lesson.train.ckpt_path)
    for height, width in SIZES:
        image = Image.new("RGB", (width, height))
        ids = processor(images=image, text="<image>", return_tensors="pt")["input_ids"]
        assert model.count_of((height, width)) == int((ids == model.image_id).sum())


def test_words_alone_give_newline_and_connector_gradients_of_zero(lesson):
    model, batch, _ = first_batch(lesson)
    alone = ~(batch["ids"] == model.image_id).any(1)
    words = {name: x[alone] for name, x in batch.items() if name != "sizes"}
    assert len(words["ids"]) == 2
    teach.Learner(model)(words, None).backward()
    assert not model.newline.grad.any() and not model.connector[0].weight.grad.any()


@pytest.fixture(scope="module")
def trained(lesson):
    """A run of three steps at a high rate, its whole model as a folder beside its file."""
    cfg = changed(lesson, out=f"{lesson.out}/trained", steps=3, lr=0.05, save_model=True)
    teach.main(cfg)
    return f"{lesson.out}/trained"


def test_what_was_trained_is_read_back(lesson, trained):
    """File and folder: newline, connector and adapters of the run; the same answer about a picture."""
    written = checkpoint.read(f"{trained}/model.safetensors")[0]
    _, before = llava.load(lesson.train.ckpt_path)
    tokenizer, model = llava.load(f"{trained}/model.safetensors")
    assert torch.equal(model.newline, written["newline"])
    assert (model.newline - before.newline).abs().max() > 0.01
    other_tokenizer, whole = llava.load(f"{trained}/model")
    torch.testing.assert_close(whole.newline.float(), model.newline, rtol=0.01, atol=0.01)
    photo = torch.randint(0, 256, (3, 30, 90), dtype=torch.uint8)
    seen = generation.photo_embeddings(model, photo)
    assert seen.shape[1] == model.count_of((30, 90)) > 2 * model.count
    answer = generation.answer_and_probability(tokenizer, model, photo, "What is it?", 6)
    other = generation.answer_and_probability(other_tokenizer, whole, photo, "What is it?", 6)
    assert answer[0] == other[0] and answer[1] == pytest.approx(other[1], rel=0.1)


def test_the_written_folder_is_one_of_transformers(trained, parity):
    """Equal logits for a picture and a question, from its own processor's ids and pixels."""
    _, model = llava.load(f"{trained}/model")
    theirs = reference(f"{trained}/model")
    processor = AutoProcessor.from_pretrained(f"{trained}/model")
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 37, 3), dtype=np.uint8))
    found = processor(images=image, text="<image> What is it?", return_tensors="pt")
    pixels = found["pixel_values"][0]
    tokens = llava_parts.tile_tokens(model.float(), model.vision(pixels), [(50, 37)], GRIDS)
    mine = model(found["input_ids"], features=tokens).logits
    parity(
        "LLaVA-1.6, training", "a saved folder, logits", NAME, mine, theirs(**found).logits, 1e-4
    )


# models of our own, with the flag --tiles


@pytest.fixture(scope="module")
def own(lesson, tmp_path_factory):
    """A tiny CLIP and a tiny language model of 512 positions, joined anew -> flags of a run with tiles."""
    folder = tmp_path_factory.mktemp("own")
    tokenizer, model = eyes.talker(folder / "first")
    model.language.save_pretrained(folder / "speaker")
    tokenizer.save_pretrained(folder / "speaker")
    return changed(
        lesson,
        ckpt_path="",
        vision_name_or_path=eyes.folder(folder / "eye"),
        text_name_or_path=str(folder / "speaker"),
        connector="pool2",
        tiles=4,
        lr=0.05,
        out=str(folder / "out"),
    )


def test_a_model_of_our_own_learns_with_tiles_and_is_read_back(own):
    """A connector that transformers' LLaVA has not: file and folder give equal image tokens."""
    cfg = changed(own, out=f"{own.out}/pool", save_model=True)
    assert len(teach.main(cfg)["losses"]) == 2
    _, model = llava.load(f"{cfg.out}/model.safetensors")
    assert model.grids == anyres.candidates(28, 4)
    _, whole = llava.load(f"{cfg.out}/model")
    assert whole.grids == model.grids
    photo = torch.randint(0, 256, (3, 30, 90), dtype=torch.uint8)
    mine = generation.photo_embeddings(model, photo)
    g = 2
    assert (
        mine.shape[1]
        == anyres.count_tokens((30, 90), 28, g, model.grids)
        == model.count_of((30, 90))
    )
    other = generation.photo_embeddings(whole, photo)
    torch.testing.assert_close(other.float(), mine, atol=0.05, rtol=0.05)
    # as a model of transformers, two pictures of different sizes
    theirs: Any = AutoModelForImageTextToText.from_pretrained(f"{cfg.out}/model")
    processor = AutoProcessor.from_pretrained(f"{cfg.out}/model")
    random = np.random.default_rng(1)
    pixels = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((30, 90), (50, 37))]
    images = [Image.fromarray(x) for x in pixels]
    found = processor(images=images, text="<image> and <image>: what?", return_tensors="pt")
    photos = [torch.from_numpy(x).permute(2, 0, 1) for x in pixels]
    seen = torch.cat([generation.photo_embeddings(whole, photo) for photo in photos], 1)
    ids = found["input_ids"]
    assert int((ids == whole.image_id).sum()) == seen.shape[1]
    ours = whole(ids, features=seen).logits.float()
    logits = theirs(**found).logits.float()
    # the pictures are resized by PIL there
    assert torch.corrcoef(torch.stack([ours.flatten(), logits.flatten()]))[0, 1] > 0.999
    made = theirs.generate(**found, max_new_tokens=3)
    assert made.shape == (1, ids.shape[1] + 3)


def test_a_model_of_our_own_that_llava_next_can_hold_becomes_one(own):
    """CLIP, mlp2x_gelu and chosen grids; saved after building, before any training, too."""
    more = {"tiles": 0, "image_grid_pinpoints": tuple(GRIDS), "connector": "mlp2x_gelu"}
    cfg = changed(own, out=f"{own.out}/mlp", save_model=True, **more)
    teach.main(cfg)
    config = json.loads((Path(cfg.out) / "model/config.json").read_text())
    assert config["model_type"] == "llava_next"
    assert config["image_grid_pinpoints"] == [list(size) for size in GRIDS]
    _, model = llava.load(f"{cfg.out}/model.safetensors")
    assert model.grids == GRIDS


def test_a_second_stage_goes_on_with_the_newline_of_the_first(own):
    first = changed(own, out=f"{own.out}/first", train_type="projector")
    teach.main(first)
    usual = Config().model
    second = changed(
        replace(first, model=usual), ckpt_path=f"{first.out}/model.safetensors",
        out=f"{own.out}/second", lr=1e-30, lr_pretrained=1e-30,
    )  # fmt: skip
    teach.main(second)
    written, meta = checkpoint.read(f"{second.out}/model.safetensors")
    assert torch.equal(
        written["newline"], checkpoint.read(f"{first.out}/model.safetensors")[0]["newline"]
    )
    assert "base" not in meta and meta["tiles"] == [4, []]


def test_a_built_folder_has_tiles(own, tmp_path):
    from vlm.build import Config as BuildConfig
    from vlm.build import main as build_main

    build_main(BuildConfig(own.model, out=str(tmp_path)))
    _, model = llava.load(tmp_path / "model")
    assert model.grids == anyres.candidates(28, 4) and model.newline.abs().max() > 0
    assert AutoProcessor.from_pretrained(tmp_path / "model").count_of((30, 90)) == model.count_of(
        (30, 90)
    )


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"tiles": 1}, "--tiles 1"),
        ({"image_grid_pinpoints": ((28, 56),)}, "one of them"),
        ({"tiles": 0, "image_grid_pinpoints": ((28, 50),)}, "multiples of the encoder's 28"),
        ({"connector": "perceiver"}, "perceiver's latents have none"),
        ({"connector": "mlp2x_gelu", "select": "all"}, "17 tokens are no square"),
        ({"data_path": ()}, "name --data"),
    ],
)  # fmt: skip
def test_bad_flags_are_one_line(own, flags, says):
    cfg = changed(own, out=f"{own.out}/bad", **flags)
    with pytest.raises(UserError, match=says):
        teach.main(cfg)
    assert not Path(cfg.out).exists()
