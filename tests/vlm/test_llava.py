"""vlm/llava.py and vlm/train.py: the library's LLaVA, any vision tower and language model, masks, training."""

import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from tests import eyes, fuzz, llamas
from tests.conftest import gradients
from utils import checkpoint, pretrained
from utils.run import UserError
from vlm import (
    anyres,
    connector,
    fruit_photos,
    generation,
    llava,
    llava_io,
    llava_parts,
    llava_transformers,
    prompts,
    tower,
)

IMAGE_ID = 99


def library(kind="clip_vision_model", tiles=False):
    """transformers' LLaVA of random weights."""
    more = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28]]} if tiles else {}
    config = (LlavaNextConfig if tiles else LlavaConfig)(
        vision_config=eyes.tower(kind).config, text_config=eyes.speaker().config, image_token_index=IMAGE_ID,
        vision_feature_select_strategy="default" if kind.startswith("clip") else "full", **more,
    )  # fmt: skip
    torch.manual_seed(2)
    return eyes.shake(
        (LlavaNextForConditionalGeneration if tiles else LlavaForConditionalGeneration)(
            config
        ).eval()
    )


def prompt(count, rows=2):
    """Words, a picture, words."""
    ids = torch.randint(3, IMAGE_ID, (rows, count + 8))
    ids[:, 3 : 3 + count] = IMAGE_ID
    return ids


def same_names(model, theirs, found):
    """Our gradients under their names, by the identity of the weights."""
    names = {id(p): name for name, p in theirs.named_parameters()}
    return {
        names[id(p)]: found[name]
        for name, p in model.named_parameters()
        if name in found and id(p) in names
    }


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model"])
def test_logits_and_gradients_are_those_of_transformers(kind, parity):
    theirs = library(kind)
    model = llava.assemble(llava_transformers.from_transformers(theirs))
    pixels, ids = torch.randn(2, 3, 28, 28), prompt(16)
    mine, other = model(ids, pixels).logits, theirs(input_ids=ids, pixel_values=pixels).logits
    parity(
        "LLaVA-1.5",
        f"llava.Llava.forward, {kind}",
        "transformers.LlavaForConditionalGeneration",
        mine,
        other,
    )
    ours = same_names(model, theirs, gradients(model, model(ids, pixels).logits))
    them = gradients(theirs, theirs(input_ids=ids, pixel_values=pixels).logits)
    assert any("vision" in k for k in them) and any("projector" in k for k in them)
    them = {k: v for k, v in them.items() if v.abs().max() > 0 or k in ours}
    parity(
        "LLaVA-1.5",
        f"llava.Llava gradients, {kind}",
        "transformers.LlavaForConditionalGeneration",
        ours,
        them,
        1e-4,
    )


@pytest.mark.parametrize("size", [(50, 37), (30, 90), (20, 22)])
def test_tiles_give_the_logits_and_gradients_of_llava_next(size, parity):
    theirs = library(tiles=True)
    model = llava.assemble(llava_transformers.from_transformers(theirs))
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
    parity(
        "LLaVA-1.6",
        "llava.Llava.tile_features, gradients",
        name,
        ours,
        {k: them[k] for k in ours},
        1e-4,
    )
    assert not [k for k in them.keys() - ours.keys() if them[k].abs().max() > 0]


def test_the_classic_mistakes_with_tiles_change_the_answer():
    theirs = library(tiles=True)
    model = llava.assemble(llava_transformers.from_transformers(theirs))
    candidates, size = [tuple(x) for x in theirs.config.image_grid_pinpoints], (50, 37)
    pixels = model.vision.pixels(
        anyres.tiles(torch.randint(0, 256, (3, *size), dtype=torch.uint8), 28, candidates)
    )
    features = model.tile_features(pixels, size, candidates)
    ids = prompt(features.shape[1], 1)
    other = theirs(
        input_ids=ids, pixel_values=pixels[None], image_sizes=torch.tensor([size])
    ).logits
    whole_last = model.tile_features(pixels[[1, 2, 3, 4, 0]], size, candidates)
    columns_first = model.tile_features(pixels[[0, 1, 3, 2, 4]], size, candidates)
    no_newline = anyres.pack(model.image_features(pixels), size, 28, candidates)[None]
    assert no_newline.shape[1] < features.shape[1]
    for wrong in (whole_last, columns_first):
        assert (model(ids, features=wrong).logits - other).abs().max() > 1e-3


@pytest.mark.parametrize("speaks", eyes.SPEAKERS)
@pytest.mark.parametrize("sees", ["clip_vision_model", "dinov2_with_registers", "resnet", "swin"])
def test_any_eye_with_any_speaker(sees, speaks):
    vision_tower, language = tower.VisionTower(eyes.tower(sees)), eyes.speaker(speaks)
    join = llava.connector.build(
        "mlp2x_gelu", vision_tower.width, language.get_input_embeddings().embedding_dim
    )
    model = llava.Llava(vision_tower, join, language, IMAGE_ID)
    ids, pixels = prompt(model.count), torch.randn(2, 3, vision_tower.size, vision_tower.size)
    logits = model(ids, pixels).logits
    assert logits.shape == (*ids.shape, 100) and logits.isfinite().all()
    moved = model(ids, pixels + torch.randn_like(pixels)).logits
    # What stands before the picture has not seen it
    assert torch.equal(moved[:, :3], logits[:, :3])
    assert not torch.allclose(moved[:, -1], logits[:, -1])
    assert model.generate(ids, model.image_features(pixels), max_new_tokens=3).shape[0] == 2


def test_features_go_where_the_word_stands():
    ids = torch.tensor([[5, IMAGE_ID, 6, IMAGE_ID], [IMAGE_ID, 7, 8, IMAGE_ID]])
    text, features = torch.zeros(2, 4, 24), torch.arange(4.0)[:, None, None].expand(4, 1, 24) + 1
    found = llava.merge(text, features, ids == IMAGE_ID)[..., 0]
    assert found.tolist() == [[0, 1, 0, 2], [3, 0, 0, 4]]
    with pytest.raises(UserError, match="4 places for a picture's tokens, the pictures have 3"):
        llava.merge(text, features[:3], ids == IMAGE_ID)


class Words:
    """A tokenizer of few words, for a model whose table of embeddings has more rows."""

    def __init__(self):
        self.words, self.pad_token_id, self.eos_token, self.chat_template = (
            ["a", "b", "</s>"],
            None,
            "</s>",
            None,
        )

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
    image_id = prompts.add_words(tokenizer, language)
    assert image_id == 3 and torch.equal(language.get_input_embeddings().weight, before)
    assert language.config.pad_token_id == tokenizer.pad_token_id == 2
    tokenizer.words += [f"w{i}" for i in range(6)]
    prompts.add_words(tokenizer, language, (prompts.IMAGE, prompts.START, prompts.END))
    after = language.get_input_embeddings().weight
    assert len(after) == len(tokenizer) == 12 and torch.equal(after[:10], before)


def test_a_photo_is_squeezed_and_normalised_as_transformers_does_it(tiny, monkeypatch):
    """From any photo to the vectors that are read: the whole of it, antialiased, by the tower's own mean and spread."""
    from transformers import CLIPImageProcessorPil

    _, model = tiny
    monkeypatch.setattr(model.vision, "mean", (0.1, 0.2, 0.3))
    monkeypatch.setattr(model.vision, "std", (0.5, 0.25, 0.2))
    photo = torch.randint(64, 192, (3, 60, 90), dtype=torch.uint8)
    about = {
        "image_mean": model.vision.mean,
        "image_std": model.vision.std,
        "do_center_crop": False,
    }
    processor = CLIPImageProcessorPil(size={"height": 28, "width": 28}, **about)
    pixels = processor(
        images=photo.numpy(), return_tensors="pt", input_data_format="channels_first"
    )["pixel_values"]
    torch.testing.assert_close(
        generation.photo_embeddings(model, photo),
        model.image_features(pixels),
        atol=0.02,
        rtol=0.02,
    )
    wrong = model.image_features((pixels * 0.5).clamp(-1, 1))
    assert (generation.photo_embeddings(model, photo) - wrong).abs().max() > 0.05


def test_tiles_are_those_of_the_models_own_grids(tiny, monkeypatch):
    _, model = tiny
    photo, asked = torch.randint(0, 256, (3, 30, 120), dtype=torch.uint8), []
    monkeypatch.setattr(
        llava.anyres,
        "tiles",
        lambda image, side, sizes: asked.append(sizes) or image[None, :, :28, :28],
    )
    monkeypatch.setattr(model, "tile_features", lambda pixels, size, sizes: (size, sizes))
    assert generation.photo_embeddings(model, photo, 4) == ((30, 120), anyres.candidates(28, 4))
    monkeypatch.setattr(model, "grids", [(28, 56), (56, 56), (28, 112), (84, 84)])
    assert (
        generation.photo_embeddings(model, photo, 4)[1]
        == asked[-1]
        == [(28, 56), (56, 56), (28, 112)]
    )
    assert generation.photo_embeddings(model, photo, 2)[1] == [(28, 56)]


def test_a_perceiver_with_tiles_is_refused():
    vision_tower, language = tower.VisionTower(eyes.tower()), eyes.speaker()
    # Sixteen latents look like a grid of four
    join = llava.connector.build("perceiver", 16, 24, latents=16)
    model = llava.Llava(vision_tower, join, language, IMAGE_ID)
    with pytest.raises(UserError, match="perceiver's latents have none"):
        generation.photo_embeddings(model, torch.randint(0, 256, (3, 50, 37), dtype=torch.uint8), 4)


def test_an_answer_and_how_likely_the_model_finds_it(tiny):
    tokenizer, model = tiny
    photo = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    said, p = generation.answer_and_probability(tokenizer, model, photo, "What?", 3)
    ids, seen = (
        generation.prompt_ids(tokenizer, model, "What?", 16),
        generation.photo_embeddings(model, photo),
    )
    product = 1.0
    for _ in range(3):
        step = model(ids, features=seen).logits[0, -1].softmax(-1)
        product *= float(step.max())
        ids = torch.cat([ids, step.argmax()[None, None]], 1)
    assert p == pytest.approx(product, rel=1e-3) and said == tokenizer.decode(ids[0, -3:]).strip()
    assert generation.answer(tokenizer, model, photo, "What?", 3) == said


def test_questions_too_long_to_wait_for_are_refused_at_once(tiny):
    tokenizer, model = tiny
    photo = torch.zeros(3, 28, 28, dtype=torch.uint8)
    with pytest.raises(UserError, match="512 positions"):
        generation.answer(tokenizer, model, photo, "why " * 6000)
    with pytest.raises(UserError, match="--max-prompt is 100: shorten"):
        generation.answer(tokenizer, model, photo, "why " * 200, max_prompt=100)
    with pytest.raises(UserError, match="<image> is put before it"):
        generation.prompt_ids(tokenizer, model, f"{prompts.IMAGE} and this?", 16)


def test_features_that_are_asked_for_by_name_are_those_of_the_right_photos(
    tiny, monkeypatch, tmp_path
):
    """main: what is said of photo i stands beside what photo i is, and how sure the model is of it."""
    fruit, shown = eyes.shop(), []
    monkeypatch.setattr(llava.data, "groceries", lambda size: fruit)
    monkeypatch.setattr(llava, "load", lambda *about: tiny)
    monkeypatch.setattr(fruit_photos, "draw", lambda *about: shown.append(about))
    monkeypatch.setattr(
        generation,
        "answer_and_probability",
        lambda t, m, photo, *about: (f"photo {int(photo[0, 0, 0])} {about}", 0.25),
    )
    cfg = llava.Config(
        prompt="Which?", samples=5, max_new_tokens=9, max_prompt=77, out=str(tmp_path / "out")
    )
    found = llava.main(cfg)
    ((_, photos, answers, truths, asked),) = shown
    numbers = [int(photo[0, 0, 0]) for photo in photos]
    assert len(set(numbers)) == 5 and min(numbers) >= 20 and asked == "Which?"
    assert answers == [f"photo {i} ('Which?', 9, 0, None, 77)" for i in numbers]
    assert truths == [["Pink Lady apple", "Royal Gala apple", "Anjou pear"][i % 3] for i in numbers]
    assert {i % 3 for i in numbers[:3]} == {0, 1, 2}  # one of each kind first
    assert found == {"prompt": "Which?", "tokens_of_a_photo": 16, "p of the answer": 0.25}


def test_damaged_photos_are_one_line_or_a_photo_of_the_right_shape(
    tiny, monkeypatch, tmp_path, capsys
):
    """500 damaged files through the script, of a fixed seed: what reaches the model is a picture, or nothing does."""
    shown = []
    monkeypatch.setattr(llava, "load", lambda *about: tiny)
    monkeypatch.setattr(fruit_photos, "draw", lambda *about: None)
    monkeypatch.setattr(generation, "text_streamer", lambda tokenizer: None)
    monkeypatch.setattr(generation, "photo_embeddings", lambda *about: torch.zeros(1, 16, 32))
    monkeypatch.setattr(
        generation,
        "answer_and_probability",
        lambda t, m, photo, *more: shown.append(photo) or ("x", 1.0),
    )
    whole = tmp_path / "photo"
    # tiles: the photo as it is
    about = {"image": (str(whole),), "tiles": 4, "out": str(tmp_path / "out")}
    seen = 0
    for kind in ("JPEG", "PNG"):
        Image.fromarray(torch.randint(0, 256, (12, 20, 3), dtype=torch.uint8).numpy()).save(
            whole, kind
        )
        for bad in fuzz.damaged(whole.read_bytes(), 250):
            whole.write_bytes(bad)
            shown.clear()
            read = fuzz.reads_or_refuses(lambda: llava.main(llava.Config(**about)))
            assert len(shown) == (read is not None)
            for photo in shown:
                assert photo.dtype == torch.uint8 and photo.dim() == 3 and photo.shape[0] == 3
            seen += len(shown)
        whole.unlink()
    assert 0 < seen < 500


ASKED = {
    "projector_hidden_act": "relu", "vision_feature_layer": [-2, -1], "mm_projector_type": "linear",
    "use_image_newline_parameter": False,
}  # fmt: skip


@pytest.mark.parametrize("key", ASKED)
def test_a_setting_that_is_not_done_is_refused_by_its_name(key):
    theirs = library()
    setattr(theirs.config, key, ASKED[key])
    with pytest.raises(UserError, match=key):
        llava_transformers.from_transformers(theirs, "x")


@pytest.mark.parametrize(
    "kind", ["internvl", "gemma3", "paligemma", "mistral3", "vipllava", "llava_onevision"]
)
def test_models_that_only_look_like_llava_are_refused_before_their_weights_are_read(kind, tmp_path):
    from transformers import CONFIG_MAPPING

    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"is a {kind}: only llava, llava_next"):
        llava.load(tmp_path)


def test_half_downloaded_or_missing_weights_are_one_line(whole, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(whole, tmp_path / "half")
    weights = folder / "model.safetensors"
    tensors = load_file(whole / "model.safetensors")  # mapped: not of the file that is cut
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(UserError, match="no LLaVA at") as found:
        llava.load(folder)
    assert "\n" not in str(found.value)
    lost = next(k for k in tensors if "projector" in k)
    save_file({k: v for k, v in tensors.items() if k != lost}, weights, {"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights"):
        llava.load(folder)


def settings(folder):
    """What `load` reads of a folder before anything dear: settings that are ours, or transformers' that are known."""
    about = llava_io.read_config(folder)
    if about.get("model_type") == "llava-of-parts":
        return about
    return llava_transformers.transformers_config(folder)


@pytest.mark.parametrize("ours", [True, False])
def test_damaged_configurations_are_read_right_or_refused(ours, whole, tmp_path):
    """500 damaged config.json: one line, or a configuration that says what the file says."""
    if ours:
        good = {
            "model_type": "llava-of-parts",
            "vision": "efficientnet",
            "connector": "pool3",
            "layer": -2,
        }
        good["select"] = "patch"
        data = json.dumps(good).encode()
    else:
        data = (whole / "config.json").read_bytes()
        good = json.loads(data)
    read = 0
    for bad in [
        *fuzz.damaged(data, 250),
        *(json.dumps(b).encode() for b in fuzz.retyped(good, 250)),
    ]:
        (tmp_path / "config.json").write_bytes(bad)
        found = fuzz.reads_or_refuses(lambda: settings(tmp_path))
        if found is None:
            continue
        read += 1
        about = json.loads(bad.decode("utf-8-sig"))
        found = found if ours else found.to_dict()
        for key in (
            "model_type",
            "vision_feature_layer",
            "projector_hidden_act",
            "connector",
            "layer",
            "select",
        ):
            assert key not in about or found.get(key) == about[key], key
    assert read > 0


def test_weights_that_no_part_has_are_refused(speaker, tmp_path):
    """load_state_dict(strict=False) takes what fits and says nothing about the rest."""
    meta = {
        "vision": "efficientnet",
        "language": speaker,
        "connector": "pool3",
        "layer": -2,
        "select": "patch",
    }
    join = llava.connector.build("pool3", 1280, 32).state_dict()
    tensors = {f"connector.{k}": v for k, v in join.items()}
    checkpoint.write(tmp_path / "x.safetensors", tensors, meta | {"scale": 2.0})
    model = llava.load(tmp_path / "x.safetensors")[1]
    assert torch.equal(model.connector.mlp[0].weight, join["mlp.0.weight"])
    checkpoint.write(
        tmp_path / "x.safetensors",
        tensors | {"vision.network.nothing": torch.zeros(1)},
        meta | {"scale": 2.0},
    )
    with pytest.raises(UserError, match="its vision model lacks: .*network.nothing"):
        llava_io.restore(tmp_path / "x.safetensors")


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """A folder of a tiny Llama with the real tokenizer."""
    return llamas.folder(tmp_path_factory.mktemp("speaker"))


@pytest.fixture(scope="module")
def tiny(speaker):
    """A model of tiny parts with the real tokenizer."""
    tokenizer, language = pretrained.language_model(speaker)
    language = language.float()
    # a prompt with 196 places for a photo is longer than 128
    language.config.max_position_embeddings = 512
    vision_tower = tower.VisionTower(eyes.tower())
    return tokenizer, llava.build(vision_tower, "mlp2x_gelu", language, tokenizer).eval()


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A folder of transformers' own kind."""
    folder = tmp_path_factory.mktemp("saved") / "whole"
    llava_io.save(tiny[1], tiny[0], folder)
    return folder


def test_a_saved_folder_is_that_of_transformers(tiny, whole, parity):
    tokenizer, model = tiny
    from transformers import AutoModelForImageTextToText, AutoProcessor

    theirs = AutoModelForImageTextToText.from_pretrained(whole)
    processor = AutoProcessor.from_pretrained(whole)
    image = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8)
    # the chat template is saved with the tokenizer
    asked = [{"role": "user", "content": f"{prompts.IMAGE}\nWhat?"}]
    text = processor.tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=False
    )
    inputs = processor(images=image, text=text, return_tensors="pt")
    assert (
        inputs["input_ids"].tolist()
        == generation.prompt_ids(tokenizer, model, "What?", 16).tolist()
    )
    pixels = model.vision.pixels(image[None])
    parity(
        "LLaVA-1.5", "tower.pixels", "transformers.LlavaProcessor", pixels, inputs["pixel_values"]
    )
    mine = model(inputs["input_ids"], pixels).logits
    parity(
        "LLaVA-1.5",
        "llava_io.save",
        "transformers AutoModelForImageTextToText",
        mine,
        theirs(**inputs).logits,
    )
    _, again = llava.load(whole)
    # bf16
    torch.testing.assert_close(
        again(inputs["input_ids"], pixels).logits.float(), mine, atol=0.05, rtol=0.05
    )


def test_parts_that_transformers_has_no_llava_for_come_back(tiny, tmp_path):
    tokenizer, language = tiny[0], tiny[1].language
    vision_tower = tower.VisionTower(eyes.tower("resnet"))
    model = llava.build(vision_tower, "mlp2x_gelu", language, tokenizer).eval()
    llava_io.save(model, tokenizer, tmp_path / "parts")
    about = json.loads((tmp_path / "parts" / "config.json").read_text())
    assert about["model_type"] == "vlm_action" and about["connector"] == "mlp2x_gelu"
    _, again = llava.load(tmp_path / "parts")
    ids, pixels = (
        generation.prompt_ids(tokenizer, model, "What?", model.count),
        torch.randn(1, 3, 224, 224),
    )
    torch.testing.assert_close(
        again(ids, pixels).logits.float(), model(ids, pixels).logits, atol=0.05, rtol=0.05
    )
    with pytest.raises(UserError, match="there already"):
        llava_io.save(model, tokenizer, tmp_path / "parts")


def test_a_folder_of_parts_an_older_format_is_still_read(tiny, tmp_path):
    """config.json, language/, connector.safetensors, as they were written before modeling.py."""
    tokenizer, language = tiny[0], tiny[1].language
    language.save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    join = connector.build("pool2", 1280, 32)
    checkpoint.write(tmp_path / "connector.safetensors", join.state_dict())
    about = {"model_type": "llava-of-parts", "vision": "efficientnet", "connector": "pool2"}
    about |= {"layer": -2, "select": "patch"}
    (tmp_path / "config.json").write_text(json.dumps(about))
    _, model = llava.load(tmp_path)
    assert model.count == 4 and torch.equal(model.connector.mlp[0].weight, join.mlp[0].weight)
    checkpoint.write(tmp_path / "connector.safetensors", {"nothing": torch.zeros(1)})
    with pytest.raises(UserError, match="is not a pool2"):
        llava.load(tmp_path)


def test_weights_of_another_model_are_refused(tmp_path):
    checkpoint.write(
        tmp_path / "x.safetensors",
        {"connector.0.weight": torch.zeros(2, 2)},
        {"language": "smollm2"},
    )
    for name, says in ((tmp_path / "x.safetensors", "no LLaVA"), (tmp_path / "y.safetensors", "no checkpoint"),
                       (tmp_path, "no folder of a model"), ("no/such", "no LLaVA at"),
                       (__file__, "holds no weights")):  # fmt: skip
        with pytest.raises(UserError, match=says):
            llava.load(name)


def test_corrections_are_added_where_they_were_learned():
    language = eyes.speaker()
    ids = torch.randint(3, 90, (1, 5))
    name = "model.layers.1.self_attn.q_proj"
    a, b = torch.randn(2, 24), torch.randn(24, 2)
    before = language.get_parameter(f"{name}.weight").clone()
    llava_parts.merge_lora(language, {f"{name}.A": a, f"{name}.B": b}, 0.5)
    torch.testing.assert_close(language.get_parameter(f"{name}.weight"), before + 0.5 * b @ a)
    with pytest.raises(UserError, match="another language model"):
        llava_parts.merge_lora(language, {"model.layers.9.A": a, "model.layers.9.B": b}, 0.5)
    assert language(ids).logits.isfinite().all()


def test_the_printed_tokens_are_what_the_language_model_reads(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(llava, "load", lambda *about: tiny)
    photo = tmp_path / "wide.png"
    Image.new("RGB", (600, 400), "orange").save(photo)
    about = {"image": (str(photo),), "max_new_tokens": 1, "out": str(tmp_path / "out")}
    assert llava.main(llava.Config(**about))["tokens_of_a_photo"] == 16
    tiled = llava.main(llava.Config(**about, tiles=4))["tokens_of_a_photo"]
    assert tiled > 2 * 16  # the whole, and more than one tile
