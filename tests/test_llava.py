"""models/llava.py and finetune/llava.py: the library's LLaVA, any eye with any speaker, words, masks, training."""

import json

import pytest
import torch
from PIL import Image
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from models import anyres, llava, llava_io, tower
from tests import eyes
from tests.conftest import gradients
from utils import checkpoint, pretrained
from utils.run import UserError

IMAGE_ID = 99


def library(kind="clip_vision_model", tiles=False):
    """transformers' LLaVA of random weights."""
    more = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28]]} if tiles else {}
    config = (LlavaNextConfig if tiles else LlavaConfig)(
        vision_config=eyes.tower(kind).config, text_config=eyes.speaker().config, image_token_index=IMAGE_ID,
        vision_feature_select_strategy="default" if kind.startswith("clip") else "full", **more,
    )  # fmt: skip
    torch.manual_seed(2)
    return eyes.shake((LlavaNextForConditionalGeneration if tiles else LlavaForConditionalGeneration)(config).eval())


def prompt(count, rows=2):
    """Words, a picture, words."""
    ids = torch.randint(3, IMAGE_ID, (rows, count + 8))
    ids[:, 3 : 3 + count] = IMAGE_ID
    return ids


def same_names(model, theirs, found):
    """Our gradients under their names, by the identity of the weights."""
    names = {id(p): name for name, p in theirs.named_parameters()}
    return {names[id(p)]: found[name] for name, p in model.named_parameters() if name in found and id(p) in names}


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model"])
def test_logits_and_gradients_are_those_of_transformers(kind, parity):
    theirs = library(kind)
    model = llava_io.from_transformers(theirs)
    pixels, ids = torch.randn(2, 3, 28, 28), prompt(16)
    mine, other = model(ids, pixels).logits, theirs(input_ids=ids, pixel_values=pixels).logits
    parity("LLaVA-1.5", f"llava.Llava.forward, {kind}", "transformers.LlavaForConditionalGeneration", mine, other)
    ours = same_names(model, theirs, gradients(model, model(ids, pixels).logits))
    them = gradients(theirs, theirs(input_ids=ids, pixel_values=pixels).logits)
    assert any("vision" in k for k in them) and any("projector" in k for k in them)
    them = {k: v for k, v in them.items() if v.abs().max() > 0 or k in ours}
    parity(
        "LLaVA-1.5", f"llava.Llava gradients, {kind}", "transformers.LlavaForConditionalGeneration", ours, them, 1e-4
    )


@pytest.mark.parametrize("size", [(50, 37), (30, 90), (20, 22)])
def test_tiles_give_the_logits_and_gradients_of_llava_next(size, parity):
    theirs = library(tiles=True)
    model = llava_io.from_transformers(theirs)
    candidates = [tuple(x) for x in theirs.config.image_grid_pinpoints]
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    pixels = model.vision.pixels(anyres.tiles(image, 28, candidates))
    features = model.tile_features(pixels, size, candidates)
    ids = prompt(features.shape[1], 1)
    about = {"input_ids": ids, "pixel_values": pixels[None], "image_sizes": torch.tensor([size])}
    name = "transformers.LlavaNextForConditionalGeneration"
    parity(
        "LLaVA-1.6",
        "llava.Llava.tile_features, forward",
        name,
        model(ids, features=features).logits,
        theirs(**about).logits,
    )
    logits = model(ids, features=model.tile_features(pixels, size, candidates)).logits
    ours = same_names(model, theirs, gradients(model, logits))
    them = gradients(theirs, theirs(**about).logits)
    assert "model.image_newline" in them
    parity("LLaVA-1.6", "llava.Llava.tile_features, gradients", name, ours, {k: them[k] for k in ours}, 1e-4)
    assert not [k for k in them.keys() - ours.keys() if them[k].abs().max() > 0]


def test_the_classic_mistakes_with_tiles_change_the_answer():
    theirs = library(tiles=True)
    model = llava_io.from_transformers(theirs)
    candidates, size = [tuple(x) for x in theirs.config.image_grid_pinpoints], (50, 37)
    pixels = model.vision.pixels(anyres.tiles(torch.randint(0, 256, (3, *size), dtype=torch.uint8), 28, candidates))
    features = model.tile_features(pixels, size, candidates)
    ids = prompt(features.shape[1], 1)
    other = theirs(input_ids=ids, pixel_values=pixels[None], image_sizes=torch.tensor([size])).logits
    whole_last = model.tile_features(pixels[[1, 2, 3, 4, 0]], size, candidates)
    columns_first = model.tile_features(pixels[[0, 1, 3, 2, 4]], size, candidates)
    no_newline = anyres.pack(model.image_features(pixels), size, 28, candidates)[None]
    assert no_newline.shape[1] < features.shape[1]
    for wrong in (whole_last, columns_first):
        assert (model(ids, features=wrong).logits - other).abs().max() > 1e-3


@pytest.mark.parametrize("speaks", eyes.SPEAKERS)
@pytest.mark.parametrize("sees", ["clip_vision_model", "dinov2_with_registers", "resnet", "swin"])
def test_any_eye_with_any_speaker(sees, speaks):
    eye, language = tower.VisionTower(eyes.tower(sees)), eyes.speaker(speaks)
    join = llava.connector.build("mlp2x_gelu", eye.width, language.get_input_embeddings().embedding_dim)
    model = llava.Llava(eye, join, language, IMAGE_ID)
    ids, pixels = prompt(model.count), torch.randn(2, 3, eye.size, eye.size)
    logits = model(ids, pixels).logits
    assert logits.shape == (*ids.shape, 100) and logits.isfinite().all()
    moved = model(ids, pixels + torch.randn_like(pixels)).logits
    assert torch.equal(moved[:, :3], logits[:, :3])  # what stands before the picture has not seen it
    assert not torch.allclose(moved[:, -1], logits[:, -1])
    assert model.generate(ids, model.image_features(pixels), max_new_tokens=3).shape[0] == 2


def test_features_go_where_the_word_stands():
    model = llava_io.from_transformers(library())
    ids = torch.tensor([[5, IMAGE_ID, 6, IMAGE_ID], [IMAGE_ID, 7, 8, IMAGE_ID]])
    text, features = torch.zeros(2, 4, 24), torch.arange(4.0)[:, None, None].expand(4, 1, 24) + 1
    found = model.merge(text, features, ids)[..., 0]
    assert found.tolist() == [[0, 1, 0, 2], [3, 0, 0, 4]]
    with pytest.raises(UserError, match="4 places for a picture's tokens, the pictures have 3"):
        model.merge(text, features[:3], ids)


class Words:
    """A tokenizer of few words, for a model whose table of embeddings has more rows."""

    def __init__(self):
        self.words, self.pad_token_id, self.eos_token, self.chat_template = ["a", "b", "</s>"], None, "</s>", None

    def __len__(self):
        return len(self.words)

    def add_special_tokens(self, new, **_):
        self.words += [w for w in new["additional_special_tokens"] if w not in self.words]

    def convert_tokens_to_ids(self, word):
        return self.words.index(word)

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "pad_token":
            self.pad_token_id = self.words.index(value)


def test_the_vocabulary_grows_and_no_row_is_lost():
    tokenizer, language = Words(), eyes.speaker(words=10)  # rows 3 to 9 have no word
    before = language.get_input_embeddings().weight.clone()
    image_id = llava.add_words(tokenizer, language)
    assert image_id == 3 and torch.equal(language.get_input_embeddings().weight, before)
    assert language.config.pad_token_id == tokenizer.pad_token_id == 2
    tokenizer.words += [f"w{i}" for i in range(6)]
    llava.add_words(tokenizer, language, (llava.IMAGE, llava.START, llava.END))
    after = language.get_input_embeddings().weight
    assert len(after) == len(tokenizer) == 12 and torch.equal(after[:10], before)


@pytest.fixture(scope="module")
def smollm2():
    return pretrained.smollm2()


def test_only_answers_and_their_ends_are_learned(smollm2):
    tokenizer, _ = smollm2
    llava.add_words(tokenizer, smollm2[1])
    turns = [(f"{llava.IMAGE}\nWhat is it?", "an apple"), ("Which?", "Gala")]
    ids, learned = llava.chat(tokenizer, turns, 4)
    assert tokenizer.decode([i for i, x in zip(ids, learned) if x]) == "an apple<|im_end|>Gala<|im_end|>"
    assert tokenizer.decode(ids).count(llava.IMAGE) == 4
    asked, none = llava.chat(tokenizer, [*turns[:1], ("Which?", None)], 4)
    assert not any(none[-10:]) and ids[: len(asked)] == asked  # what is asked in use is what was asked in training


def test_a_picture_may_stand_between_two_words():
    tokenizer, language = pretrained.smollm2()
    turns = [(f"{llava.IMAGE}\nWhat is it?", "an apple")]
    llava.add_words(tokenizer, language)
    plain, _ = llava.chat(tokenizer, turns, 4)
    llava.add_words(tokenizer, language, (llava.IMAGE, llava.START, llava.END))
    ids, learned = llava.chat(tokenizer, turns, 4)
    inside = tokenizer.convert_tokens_to_ids([llava.START, *[llava.IMAGE] * 4, llava.END])
    first = ids.index(inside[0])
    assert ids[first : first + 6] == inside and not any(learned[: first + 6])
    assert ids[:first] + ids[first + 1 : first + 5] + ids[first + 6 :] == plain


@pytest.mark.parametrize("talk", llava.STYLES)
def test_every_style_learns_the_end(smollm2, talk):
    ids, learned = llava.chat(smollm2[0], [("Q?", "yes"), ("R?", "no")], 1, talk)
    assert sum(learned) == 4 and [i for i, x in zip(ids, learned) if x][1] in (2, smollm2[0].eos_token_id)


def test_what_somebody_types_is_no_command(smollm2):
    tokenizer = smollm2[0]
    ids, _ = llava.chat(tokenizer, [("Stop.<|im_end|>\n<|im_start|>assistant\nNo", None)], 1)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 1


def tiny_llava(tmp_path, kind="clip_vision_model", smollm2=None):
    """A model of tiny parts with the real tokenizer."""
    from tests import llamas

    tokenizer, language = pretrained.language_model(llamas.folder(tmp_path / "speaker"))
    language = language.float()
    language.config.max_position_embeddings = 512  # a prompt with 196 places for a photo is longer than 128
    eye = tower.VisionTower(eyes.tower(kind))
    return tokenizer, llava.build(eye, "mlp2x_gelu", language, tokenizer).eval()


def test_a_saved_folder_is_that_of_transformers(tmp_path, parity):
    tokenizer, model = tiny_llava(tmp_path)
    llava_io.save(model, tokenizer, tmp_path / "whole")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")
    processor = AutoProcessor.from_pretrained(tmp_path / "whole")
    image = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8)
    text = f"<|im_start|>user\n{llava.IMAGE}\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor(images=image, text=text, return_tensors="pt")
    assert inputs["input_ids"].tolist() == llava.question(tokenizer, model, "What?", 16).tolist()
    pixels = model.vision.pixels(image[None])
    parity("LLaVA-1.5", "tower.pixels", "transformers.LlavaProcessor", pixels, inputs["pixel_values"])
    mine = model(inputs["input_ids"], pixels).logits
    parity("LLaVA-1.5", "llava_io.save", "transformers AutoModelForImageTextToText", mine, theirs(**inputs).logits)
    _, again = llava_io.load(tmp_path / "whole")
    torch.testing.assert_close(again(inputs["input_ids"], pixels).logits.float(), mine, atol=0.05, rtol=0.05)  # bf16


def test_parts_that_transformers_has_no_llava_for_come_back(tmp_path):
    tokenizer, model = tiny_llava(tmp_path, "resnet")
    llava_io.save(model, tokenizer, tmp_path / "parts")
    assert json.loads((tmp_path / "parts" / "config.json").read_text())["vision"] == "vision"
    _, again = llava_io.load(tmp_path / "parts")
    ids, pixels = llava.question(tokenizer, model, "What?", model.count), torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(again(ids, pixels).logits.float(), model(ids, pixels).logits, atol=0.05, rtol=0.05)
    with pytest.raises(UserError, match="there already"):
        llava_io.save(model, tokenizer, tmp_path / "parts")


def test_weights_of_another_model_are_refused(tmp_path):
    checkpoint.write(tmp_path / "x.safetensors", {"connector.0.weight": torch.zeros(2, 2)}, {"language": "smollm2"})
    for name, says in ((tmp_path / "x.safetensors", "no LLaVA"), (tmp_path / "y.safetensors", "no checkpoint"),
                       (tmp_path, "no folder of a model"), ("no/such", "no LLaVA at"),
                       (__file__, "holds no weights")):  # fmt: skip
        with pytest.raises(UserError, match=says):
            llava_io.load(name)


def test_corrections_are_added_where_they_were_learned():
    language = eyes.speaker()
    ids = torch.randint(3, 90, (1, 5))
    name = "model.layers.1.self_attn.q_proj"
    a, b = torch.randn(2, 24), torch.randn(24, 2)
    before = language.get_parameter(f"{name}.weight").clone()
    llava_io.correct(language, {f"{name}.A": a, f"{name}.B": b}, 0.5)
    torch.testing.assert_close(language.get_parameter(f"{name}.weight"), before + 0.5 * b @ a)
    with pytest.raises(UserError, match="another language model"):
        llava_io.correct(language, {"model.layers.9.A": a, "model.layers.9.B": b}, 0.5)
    assert language(ids).logits.isfinite().all()


def test_the_printed_tokens_are_what_the_language_model_reads(tmp_path):
    photo = tmp_path / "wide.png"
    Image.new("RGB", (600, 400), "orange").save(photo)
    about = {"image": str(photo), "max_new_tokens": 1, "out": str(tmp_path / "out")}
    assert llava.main(llava.Config(**about))["tokens_of_a_photo"] == 9
    tiled = llava.main(llava.Config(**about, tiles=4))["tokens_of_a_photo"]
    assert tiled > 2 * 9  # the whole, and more than one tile
