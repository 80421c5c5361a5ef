"""vlm/tower.py: every kind of encoder gives tokens, the right layer, positions of another size as transformers'."""

import pytest
import torch

from tests import eyes
from utils.run import UserError
from vlm import tower

LEADS = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "vit": 1,
    "deit": 2,
    "dinov2": 1,
    "dinov2_with_registers": 4,
}


@pytest.mark.parametrize("kind", eyes.TOWERS)
def test_any_encoder_gives_tokens(kind):
    vision_tower = tower.VisionTower(eyes.tower(kind))
    seen = vision_tower(torch.randn(2, 3, vision_tower.size, vision_tower.size))
    assert seen.shape == (2, vision_tower.count, vision_tower.width) and seen.isfinite().all()
    assert vision_tower.lead == LEADS.get(kind, 0)
    if kind in LEADS:
        assert vision_tower.count == 16


@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_the_layer_that_was_asked_for_without_the_class_token(layer):
    network, x = eyes.tower(), torch.randn(2, 3, 28, 28)
    states = network(pixel_values=x, output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(tower.VisionTower(network, layer)(x), states[:, 1:])
    torch.testing.assert_close(tower.VisionTower(network, layer, "all")(x), states)


def test_maps_become_tokens_row_by_row():
    network, x = eyes.tower("resnet"), torch.randn(1, 3, 224, 224)
    maps = network(pixel_values=x, output_hidden_states=True).hidden_states[-1]
    tokens = tower.VisionTower(network, -1)(x)
    side = maps.shape[-1]
    assert torch.equal(tokens[0, 1], maps[0, :, 0, 1]) and torch.equal(
        tokens[0, side], maps[0, :, 1, 0]
    )


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model", "vit", "deit"])
@pytest.mark.parametrize("size", [14, 42])
def test_positions_of_another_size_are_those_of_transformers(kind, size, parity):
    network, x = eyes.shake(eyes.tower(kind)), torch.randn(2, 3, size, size)
    theirs = network(
        pixel_values=x, output_hidden_states=True, interpolate_pos_encoding=True
    ).hidden_states[-2]
    vision_tower = tower.VisionTower(network, select="all", size=size)
    parity(
        "Vision tower",
        "tower.interpolate",
        f"transformers {kind} interpolate_pos_encoding",
        vision_tower(x),
        theirs,
    )
    assert vision_tower.size == size


def test_efficientnet_is_49_tokens_of_even_loudness():
    vision_tower = tower.load("efficientnet")
    assert (vision_tower.count, vision_tower.width, vision_tower.size) == (49, 1280, 224)
    seen = vision_tower(
        vision_tower.pixels(torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8))
    )
    torch.testing.assert_close(seen.mean(-1), torch.zeros(1, 49), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.var(-1, correction=0), torch.ones(1, 49), atol=1e-2, rtol=0)


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A tower, six pictures, and how often the tower looked, with a cache of its own."""
    monkeypatch.setenv("VLM_ACTION_CACHE", str(tmp_path))
    looked = []
    vision_tower, images = (
        tower.VisionTower(eyes.tower()),
        torch.randint(0, 256, (6, 3, 28, 28), dtype=torch.uint8),
    )
    vision_tower.register_forward_pre_hook(lambda module, pixels: looked.append(len(pixels[0])))
    return vision_tower, images, looked


def test_what_was_said_is_kept(kept):
    vision_tower, images, looked = kept
    first = tower.vision_features(vision_tower, images)
    assert (
        looked == [4, 2]
        and torch.equal(tower.vision_features(vision_tower, images), first)
        and looked == [4, 2]
    )
    torch.testing.assert_close(
        first.float(), vision_tower(vision_tower.pixels(images)), atol=0.05, rtol=0.05
    )  # bf16
    assert not torch.equal(tower.vision_features(vision_tower, images.flip(0)), first)
    assert (
        tower.vision_features(
            vision_tower, images[:, :, None].flatten(0, 2)[:, None].expand(-1, 3, -1, -1)
        ).shape[0]
        == 18
    )


CHANGES = {
    "weights": lambda vision_tower: vision_tower.network.encoder.layers[0].mlp.fc1.weight.mul_(1.5),
    "a buffer": lambda vision_tower: vision_tower.network.register_buffer("more", torch.ones(1)),
    "layer": lambda vision_tower: setattr(vision_tower, "layer", -1),
    "mean": lambda vision_tower: setattr(vision_tower, "mean", (0.5, 0.5, 0.5)),
    "std": lambda vision_tower: setattr(vision_tower, "std", (0.5, 0.5, 0.5)),
    "configuration": lambda vision_tower: setattr(
        vision_tower.network.config, "layer_norm_eps", 0.1
    ),
    "version of the code": lambda vision_tower: setattr(tower, "VERSION", tower.VERSION + 1),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_tower_changed_in_place_looks_again(kept, what, monkeypatch):
    """The cache is keyed by all that the features depend on: a retrained tower keeps its name, not its answers."""
    vision_tower, images, looked = kept
    monkeypatch.setattr(tower, "VERSION", tower.VERSION)
    first = tower.vision_features(vision_tower, images)
    with torch.no_grad():
        CHANGES[what](vision_tower)
    again = tower.vision_features(vision_tower, images)
    assert looked == [4, 2, 4, 2]
    assert torch.equal(again, first) == (
        what in ("a buffer", "configuration", "version of the code")
    )


def test_a_damaged_file_of_features_is_made_again(kept, tmp_path):
    vision_tower, images, looked = kept
    first = tower.vision_features(vision_tower, images)
    (file,) = (tmp_path / "features").iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    assert torch.equal(tower.vision_features(vision_tower, images), first) and looked == [
        4,
        2,
        4,
        2,
    ]


def test_pictures_with_a_key_are_made_the_first_time_only(kept):
    vision_tower, images, looked = kept
    made = []

    def look():
        made.append(1)
        return images

    first = tower.vision_features(vision_tower, look, ("photos", 1))
    assert (
        torch.equal(tower.vision_features(vision_tower, look, ("photos", 1)), first)
        and len(made) == 1
    )
    tower.vision_features(vision_tower, look, ("photos", 2))
    assert len(made) == 2


def test_pixels_are_normalised_by_channel():
    vision_tower = tower.VisionTower(eyes.tower())
    vision_tower.mean, vision_tower.std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.2)
    # 51 / 255 = 0.2
    found = vision_tower.pixels(torch.full((1, 3, 2, 2), 51, dtype=torch.uint8))[0, :, 0, 0]
    torch.testing.assert_close(found, torch.tensor([0.2, 0.0, -0.5]))


def test_a_folder_names_its_own_normalisation(tmp_path):
    from transformers import CLIPImageProcessorPil

    eyes.tower().save_pretrained(tmp_path)
    CLIPImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(
        tmp_path
    )
    vision_tower = tower.load(str(tmp_path), -1)
    assert (vision_tower.mean, vision_tower.std, vision_tower.layer) == (
        (0.1, 0.2, 0.3),
        (0.4, 0.5, 0.6),
        -1,
    )
    assert not vision_tower.network.training and not any(
        p.requires_grad for p in vision_tower.parameters()
    )
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])  # half downloaded
    with pytest.raises(UserError, match="no vision encoder") as found:
        tower.load(str(tmp_path))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "made, says",
    [
        (lambda: tower.VisionTower(eyes.tower(), 9), "--layer 9"),
        (lambda: tower.VisionTower(eyes.tower(), select="some"), "--select"),
        (lambda: tower.VisionTower(eyes.tower(), size=30), "multiple of the patch"),
        (lambda: tower.VisionTower(eyes.tower("resnet"), size=64), "multiple of the patch"),
        (lambda: tower.VisionTower(eyes.tower(), [-2, -1]), "one layer"),
        (lambda: tower.load("efficientnet", size=300), "multiple of 32"),
        (lambda: tower.load("efficientnet", layer=-1), "--layer -1: of EfficientNet the last maps"),
        (lambda: tower.load("no/such-encoder"), "no vision encoder"),
    ],
)
def test_bad_input_is_one_line(made, says):
    with pytest.raises(UserError, match=says) as found:
        made()
    assert "\n" not in str(found.value)
