"""vlm/tile_resampler.py inside a LLaVA: learned, saved and read back, asked; tokens and FLOPs counted everywhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.vlm.test_train_flops import counted
from tests.vlm.test_train_tiles import (
    SIZES,
    first_batch,
    lesson,  # noqa: F401  (a fixture)
    losses,
    own,  # noqa: F401  (a fixture)
)
from utils import checkpoint
from utils.run import UserError
from vlm import anyres, chat, generation, llava, train_flops
from vlm import train as teach
from vlm.flags import PerceiverConfig
from vlm.train_config import changed

GRIDS = anyres.candidates(28, 4)


@pytest.fixture(scope="module")
def flags(own):  # noqa: F811
    """Flags of a run with tiles, whose pictures have five tokens each."""
    perceiver = PerceiverConfig(depth=1, n_latents=5, n_heads=2, n_query_groups=2, head_dim=4)
    about = {"connector": "tile_perceiver", "perceiver": perceiver}
    return changed(own, **about, out=f"{own.out}/tile_perceiver")


def test_every_picture_has_k_places_and_gradients_reach_queries_and_codes(flags):
    model, batch, features = first_batch(changed(flags, train_type="projector"))
    assert model.newline is None and model.grids == GRIDS
    pictures = len(batch["sizes"])
    assert len(features) == sum(anyres.count_tiles(s, 28, GRIDS) for s in SIZES) > 2 * pictures
    places = batch["ids"] == model.image_id
    assert sorted(set(places.sum(1).tolist())) == [0, 5] and int(places.sum()) == 5 * pictures
    assert (batch["labels"][places] == -100).all()
    assert {model.count_of(size) for size in SIZES} == {5} and model.count == 5
    teach.Learner(model)(batch, features).backward()
    for name in ("latents", "crops", "scale"):
        assert getattr(model.connector, name).grad.abs().max() > 0
    # rows without a picture: gradients of zero, and none is missing
    model.zero_grad()
    alone = {k: x[~places.any(1)] for k, x in batch.items() if k != "sizes"}
    teach.Learner(model)(alone, None).backward()
    found = [p.grad for p in model.connector.parameters()]
    assert all(g is not None and not g.any() for g in found)


@pytest.mark.parametrize("train_type", ["use_lora", "none"])
def test_packed_and_lazy_runs_have_the_losses_of_rows_in_memory(flags, train_type, parity):
    cfg = changed(flags, train_type=train_type, lr=1e-4, lr_pretrained=1e-4)
    plain = losses(cfg, f"plain-{train_type}")
    for name, more in {"packing": {"packing": True}, "lazy": {"lazy": True}}.items():
        about = (f"vlm.train, tile_perceiver, {name}, {train_type}", "padded rows in memory")
        parity("Connector", *about, losses(cfg, f"{name}-{train_type}", **more), plain, 1e-4)


def test_what_was_trained_is_read_back_answers_and_chats(flags):
    cfg = changed(flags, out=f"{flags.out}/saved", save_model=True)
    teach.main(cfg)
    written, meta = checkpoint.read(f"{cfg.out}/model.safetensors")
    assert meta["connector"] == "tile_perceiver" and meta["perceiver"]["n_latents"] == 5
    assert "newline" not in written
    tokenizer, model = llava.load(f"{cfg.out}/model.safetensors")
    _, whole = llava.load(f"{cfg.out}/model")
    assert torch.equal(model.connector.crops, written["connector.crops"])
    assert whole.newline is None and whole.grids == model.grids == GRIDS
    photos = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((30, 90), (50, 37))]
    seen = [generation.photo_embeddings(model, photo) for photo in photos]
    assert [x.shape for x in seen] == [(1, 5, 32)] * 2
    other = generation.photo_embeddings(whole, photos[0])
    torch.testing.assert_close(other.float(), seen[0], atol=0.05, rtol=0.05)
    # whole only, if asked so: other tokens, as many
    alone = generation.photo_embeddings(model, photos[0], tiles=1)
    assert alone.shape == (1, 5, 32) and (alone - seen[0]).abs().max() > 0.001
    # a conversation about two pictures
    talk = chat.Conversation(tokenizer, model, 3)
    for photo in photos:
        talk.add(photo)
    assert isinstance("".join(talk.ask("What is it?")), str)
    ids, embeddings, _ = talk.prompt("And?")
    assert ids.count(model.image_id) == 10 and torch.equal(embeddings[1], seen[1][0])
    # as a model of transformers, with the processor that was saved
    theirs_: Any = AutoModelForImageTextToText.from_pretrained(f"{cfg.out}/model")
    processor: Any = AutoProcessor.from_pretrained(f"{cfg.out}/model")
    assert processor.count_of((30, 90)) == 5
    images = [Image.fromarray(photo.permute(1, 2, 0).numpy()) for photo in photos]
    found = processor(images=images, text="<image> and <image>: what?", return_tensors="pt")
    assert int((found["input_ids"] == model.image_id).sum()) == 10
    tokens = theirs_.get_image_features(found["pixel_values"], found["image_sizes"])
    ours = torch.cat([generation.photo_embeddings(whole, photo) for photo in photos], 1)
    # pictures are resized by PIL there
    assert torch.corrcoef(torch.stack([ours.flatten(), tokens.flatten()]).float())[0, 1] > 0.99
    assert theirs_.generate(**found, max_new_tokens=2).shape[1] == found["input_ids"].shape[1] + 2


def test_flops_of_a_step_are_those_that_torch_counts(flags, parity):
    """A picture at a time: padding of others is no part of the formula."""
    cfg = changed(flags, train_type="projector", batch_size=1, steps=7)
    _, model, source = teach.prepare(cfg, torch.device("cpu"))
    seen = []
    for ((batch, features),) in source.batches(cfg, 0):
        if features is None or len(features) in seen:
            continue
        seen.append(len(features))
        throughput = train_flops.Throughput(model, cfg)
        throughput.add(batch, features)
        about = (f"train_flops, tile_perceiver, {len(features)} crops", "FlopCounterMode")
        parity("FLOPs", *about, throughput.flops, counted(model, batch, features), atol=0)
    assert len(seen) > 1


def test_a_built_folder_counts_k_tokens(flags, tmp_path):
    from vlm.build import Config as BuildConfig
    from vlm.build import main as build_main

    build_main(BuildConfig(flags.model, out=str(tmp_path)))
    _, model = llava.load(tmp_path / "model")
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "model")
    assert model.count_of((30, 90)) == processor.count_of((30, 90)) == 5
    assert json.loads((tmp_path / "model/config.json").read_text())["connector"] == "tile_perceiver"


@pytest.mark.parametrize(
    "more, says",
    [
        ({"sparsity_plugins": ("pool2",)}, "leave out --sparsity_plugins"),
        ({"sparsity_plugins": ("prompt2",)}, "leave out prompt2"),
        ({"select": "all"}, "17 tokens are no square"),
        ({"tiles": 1}, "--tiles 1"),
    ],
)
def test_bad_flags_are_one_line(flags, more, says):
    cfg = changed(flags, out=f"{flags.out}/bad", **more)
    with pytest.raises(UserError, match=says):
        teach.main(cfg)
    assert not Path(cfg.out).exists()
