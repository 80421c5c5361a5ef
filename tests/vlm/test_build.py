"""vlm/build.py: an untrained model in one folder; its processor; sizes from configurations alone."""

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessorPil

from tests import eyes, llamas
from utils import data, pretrained
from utils.run import UserError
from vlm import build, config, llava, llava_io, llava_transformers, step_memory, tower
from vlm.step_model import Step


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny CLIP with its image processor, and a tiny Llama with the real tokenizer."""
    root = tmp_path_factory.mktemp("parts")
    eyes.tower().save_pretrained(root / "vision")
    CLIPImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.3, 0.4],
    ).save_pretrained(root / "vision")
    return str(root / "vision"), str(llamas.folder(root / "text"))


@pytest.fixture(scope="module")
def built(folders):
    torch.manual_seed(0)
    flags = config.model_flags(*folders, connector="mlp2x_gelu")
    return build.build(flags)


def picture(side=28):
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_parts_come_with_their_weights(built, folders):
    model, made = built
    weights = eyes.tower().state_dict()
    for name, x in model.vision.network.state_dict().items():
        assert torch.equal(x, weights[name].to(x.dtype))
    assert not any(p.is_meta for p in model.parameters())
    assert made.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id
    assert model.config.text_config.vocab_size > model.config.image_token_id


def test_the_folder_needs_no_names(built, tmp_path):
    model, made = built
    pretrained.save(model, made, tmp_path / "model")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    processor_again = AutoProcessor.from_pretrained(tmp_path / "model")
    one = made(picture(), "<image>\nWhat?", return_tensors="pt")
    two = processor_again(picture(), "<image>\nWhat?", return_tensors="pt")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    with torch.no_grad():
        assert torch.equal(model(**one).logits, again(**two).logits)
    assert again.generate(**two, max_new_tokens=2).shape[1] == one["input_ids"].shape[1] + 2


def test_llava_reads_the_folder(built, tmp_path):
    """Tokenizer, parts and pixels are those of the model, so `python vlm/llava.py --model FOLDER` asks it."""
    model, made = built
    pretrained.save(model, made, tmp_path / "model")
    tokenizer, parts = llava_io.load(tmp_path / "model")
    inputs = made(picture(), "<image>\nWhat?", return_tensors="pt")
    assert tokenizer.convert_tokens_to_ids("<image>") == parts.image_id
    asked = llava.assemble(parts)
    pixels = asked.vision.pixels(data.square(picture(), 28)[None])
    torch.testing.assert_close(pixels, inputs["pixel_values"], atol=1e-5, rtol=0)
    with torch.no_grad():
        ours = asked(inputs["input_ids"], pixels=inputs["pixel_values"])
        assert torch.equal(getattr(ours, "logits", ours), model(**inputs).logits)


def test_a_damaged_folder_is_one_line(built, tmp_path):
    pretrained.save(*built, tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or only half there"):
        llava_io.load(tmp_path / "model")
    tensors = dict(built[0].state_dict())
    tensors.pop("connector.0.weight")
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path, {"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights"):
        llava_io.load(tmp_path / "model")


def test_a_picture_is_as_many_tokens_as_the_connector_makes(built):
    model, made = built
    found = made([picture(), picture()], "<image> or <image>?", return_tensors="pt")
    places = found["input_ids"] == model.config.image_token_id
    assert places.sum() == 2 * model.image_tokens and model.image_tokens == 16
    assert found["pixel_values"].shape == (2, 3, 28, 28)


@pytest.mark.parametrize("prompt, pictures", [("no place", 1), ("<image>", 0), ("<image>", 2)])
def test_places_and_pictures_must_agree(built, prompt, pictures):
    with pytest.raises(UserError, match="<image> in the text"):
        built[1]([picture()] * pictures, prompt)


def test_the_image_processor_does_what_the_tower_does(folders):
    """Of a square picture; another one is resized before it is cropped, not after."""
    vision = tower.load(folders[0])
    pixels = data.square(picture(40), 28)
    theirs = llava_transformers.image_processor(vision)([picture(40)], return_tensors="pt")[
        "pixel_values"
    ]
    torch.testing.assert_close(theirs, vision.pixels(pixels[None]), atol=1e-5, rtol=0)


def test_efficientnet_is_shown_pictures_as_it_was_trained():
    vision = tower.load("efficientnet")
    pixels = data.square(picture(224), 224)
    theirs = llava_transformers.image_processor(vision)([picture(224)], return_tensors="pt")[
        "pixel_values"
    ]
    torch.testing.assert_close(theirs, vision.pixels(pixels[None]), atol=1e-5, rtol=0)


def test_rotary_frequencies_stay_in_fp32(built):
    model, _ = built
    buffers = dict(model.language.named_buffers())
    assert all(x.dtype == torch.float32 for name, x in buffers.items() if "inv_freq" in name)
    assert any("inv_freq" in name for name in buffers)


def test_sizes_of_llava_are_those_of_the_paper():
    """LLaVA-1.5-7B: 303.5 M, 21.0 M and 6738 M numbers, 576 tokens a picture."""
    flags = config.model_flags("clip-vit-large-patch14-336", "llama2-7b", "mlp2x_gelu")
    found = build.sizes(flags)
    assert found["parameters"] == {
        "vision": 303_507_456,
        "connector": 1024 * 4096 + 4096 + 4096 * 4096 + 4096,
        "language": 6_738_415_616,
    }
    assert found["image tokens"] == 576
    total = sum(found["parameters"].values())
    assert found["GB"]["answer (bf16)"] == 2 * total
    assert found["GB"]["train everything"] == 16 * total
    # by hand: of 32 layers, four matrices 4096 x 4096 and three 4096 x 11008
    lora = 32 * 8 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    frozen = found["parameters"]["vision"] + found["parameters"]["language"]
    trained = found["parameters"]["connector"] + lora
    assert found["GB"]["LoRA, rank 8"] == 2 * frozen + 16 * trained


def test_sizes_are_those_of_the_model_that_is_built(built, folders):
    counted = build.sizes(config.model_flags(*folders, connector="mlp2x_gelu"))["parameters"]
    model, _ = built
    assert counted["vision"] == build.parameters(model.vision)
    assert counted["connector"] == build.parameters(model.connector)
    # the word <image> grew the vocabulary
    rows = model.config.text_config.vocab_size - 49152
    assert counted["language"] + rows * 32 == build.parameters(model.language)


def test_main_writes_a_model_and_overwrites_none(folders, tmp_path):
    flags = config.ModelFlags(*folders, connector="linear")
    cfg = build.Config(model=flags, out=str(tmp_path))
    assert build.main(cfg)["image tokens"] == 16
    assert (tmp_path / "model/model.safetensors").is_file()
    with pytest.raises(UserError, match="is there already"):
        build.main(cfg)


def test_a_folder_is_whole_or_not_there(built, tmp_path, monkeypatch):
    model, made = built

    def full(folder):
        raise OSError("no space left on device")

    monkeypatch.setattr(made, "save_pretrained", full)
    with pytest.raises(UserError, match="no space left"):
        pretrained.save(model, made, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "vision, text, connector, words",
    [
        ("gone", "smollm2", "linear", "no vision encoder at 'gone'"),
        ("efficientnet", "gone", "linear", "gone"),
        ("efficientnet", "smollm2", "conv", "there is no connector 'conv'"),
        ("efficientnet", "smollm2", "identity", "identity"),
    ],
)
def test_bad_names(vision, text, connector, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=words):
        build.sizes(config.model_flags(vision, text, connector))


def dry(folders, tmp_path, *flags):
    """The flags of a dry run of tiny parts."""
    names = ["--vision", folders[0], "--language", folders[1], "--connector", "mlp2x_gelu"]
    return tyro.cli(
        build.Config, args=[*names, "--dry_run", "--out", str(tmp_path / "out"), *flags]
    )


def test_a_dry_run_predicts_the_peak_of_a_step(folders, tmp_path, capsys):
    """The number that step_memory.predict gives, which test_step_cost.py holds against the profiler."""
    flags = ["--batch", "2", "--images", "3", "--text_tokens", "7", "--checkpointing"]
    metrics = build.main(dry(folders, tmp_path, *flags, "--zero", "3", "--world_size", "4"))
    said = capsys.readouterr().out
    assert "training step of 2 x (48 image + 7 text) tokens" in said
    shape = {"batch": 2, "images": 3, "text_tokens": 7, "checkpointing": True}
    shape |= {"zero": 3, "world_size": 4}
    parts = build.configurations(config.model_flags(*folders, connector="mlp2x_gelu"))
    ways = {"use_lora": ("use_lora", False), "qlora": ("use_lora", True), "none": ("none", False)}
    for name, (train_type, quantize) in ways.items():
        row = step_memory.predict(parts, Step(train_type, quantize, **shape))
        assert metrics[f"{name}, peak GB of a step"] == row["peak"] / 1e9
        assert f"{row['peak'] / 1e9:14.3f}" in said
    assert not (tmp_path / "out/model").exists()


def test_a_dry_run_shares_and_recomputes(folders, tmp_path):
    """Fewer bytes with checkpointing, and with ZeRO-3 on more devices; more with tiles; none without --only names."""

    def peak(*flags):
        found = build.main(dry(folders, tmp_path, "--only", "none", *flags))
        return found["none, peak GB of a step"]

    tiles = peak("--images", "5", "--batch", "4")
    assert peak("--images", "5", "--batch", "4", "--checkpointing") < tiles
    assert tiles > 1.2 * peak("--batch", "4")
    assert peak("--zero", "3", "--world_size", "8") < peak("--zero", "3", "--world_size", "2")
    assert not any("peak" in name for name in build.main(dry(folders, tmp_path, "--only")))


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--only", "lora"), "--only lora: there are projector"),
        (("--batch", "0"), "above 0"),
        (("--zero", "4"), "stage of ZeRO"),
        (("--world_size", "0"), "above 0"),
    ],
)
def test_bad_flags_of_a_dry_run(folders, tmp_path, flags, says):
    with pytest.raises(UserError, match=says):
        build.main(dry(folders, tmp_path, *flags))
    assert not (tmp_path / "out").exists()
