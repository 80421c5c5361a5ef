"""models/tower.py: every kind of encoder gives tokens, the right layer, positions of another size as transformers'."""

import pytest
import torch

from models import tower
from tests import eyes
from utils.run import UserError

LEADS = {"clip_vision_model": 1, "siglip_vision_model": 0, "vit": 1, "deit": 2, "dinov2": 1, "dinov2_with_registers": 4}


@pytest.mark.parametrize("kind", eyes.TOWERS)
def test_any_encoder_gives_tokens(kind):
    eye = tower.VisionTower(eyes.tower(kind))
    seen = eye(torch.randn(2, 3, eye.size, eye.size))
    assert seen.shape == (2, eye.count, eye.width) and seen.isfinite().all()
    assert eye.lead == LEADS.get(kind, 0)
    if kind in LEADS:
        assert eye.count == 16


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
    assert torch.equal(tokens[0, 1], maps[0, :, 0, 1]) and torch.equal(tokens[0, side], maps[0, :, 1, 0])


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model", "vit", "deit"])
@pytest.mark.parametrize("size", [14, 42])
def test_positions_of_another_size_are_those_of_transformers(kind, size, parity):
    network, x = eyes.shake(eyes.tower(kind)), torch.randn(2, 3, size, size)
    theirs = network(pixel_values=x, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-2]
    eye = tower.VisionTower(network, select="all", size=size)
    parity("Vision tower", "tower.interpolate", f"transformers {kind} interpolate_pos_encoding", eye(x), theirs)
    assert eye.size == size


def test_efficientnet_is_49_tokens_of_even_loudness():
    eye = tower.load("efficientnet")
    assert (eye.count, eye.width, eye.size) == (49, 1280, 224)
    seen = eye(eye.pixels(torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)))
    torch.testing.assert_close(seen.mean(-1), torch.zeros(1, 49), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.var(-1, correction=0), torch.ones(1, 49), atol=1e-2, rtol=0)


def test_what_was_said_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("VLM_ACTION_CACHE", str(tmp_path))
    eye, images = tower.VisionTower(eyes.tower()), torch.randint(0, 256, (6, 3, 28, 28), dtype=torch.uint8)
    first = tower.said(eye, images)
    monkeypatch.setattr(eye, "tokens", None)  # it cannot look again
    assert torch.equal(tower.said(eye, images), first)
    with pytest.raises(TypeError):
        tower.said(eye, images.flip(0))


@pytest.mark.parametrize(
    "made, says",
    [
        (lambda: tower.VisionTower(eyes.tower(), 9), "--layer 9"),
        (lambda: tower.VisionTower(eyes.tower(), select="some"), "--select"),
        (lambda: tower.VisionTower(eyes.tower(), size=30), "multiple of the patch"),
        (lambda: tower.VisionTower(eyes.tower("resnet"), size=64), "multiple of the patch"),
        (lambda: tower.load("efficientnet", size=300), "224"),
        (lambda: tower.load("no/such-encoder"), "no vision encoder"),
    ],
)
def test_bad_input_is_one_line(made, says):
    with pytest.raises(UserError, match=says) as found:
        made()
    assert "\n" not in str(found.value)
