"""The study of editing: which prompt, flags and pictures are behind each number."""

import pytest
import torch

from models import edit, edit_study, stable_diffuser
from tests.models.test_stable_diffuser import ours, words_of
from utils import data

CAPTIONS = ["a", "b", "c", "d"]


@pytest.fixture
def asked(monkeypatch):
    """Calls of edit.edit, which draws what the prompt names as a plain grey; features are one-hot in that grey."""
    calls = []

    def fake(painter, images, prompts, noise, cfg, mask=None):
        calls.append((images, prompts, noise, cfg, mask, torch.rand(1)))
        drawn = torch.zeros(len(images), 3, 64, 64)
        for i, prompt in enumerate(prompts):
            drawn[i] = CAPTIONS.index(prompt) / 4 if prompt and cfg.strength > 0 else -1
        # what is not redrawn is off by a tenth
        return drawn if mask is None else torch.where(mask, drawn, data.to_float(images) + 0.1)

    def features(images):
        found = torch.zeros(len(images), 16)
        for i, image in enumerate(images):
            grey = float(image[0, 0, 63])
            found[i, round(4 * grey) if grey >= 0 else 5] = 1
        return found

    monkeypatch.setattr(edit, "edit", fake)
    monkeypatch.setattr(edit_study, "picture_features", features)
    return calls


def parts():
    unet, coder = ours()
    painter = stable_diffuser.Painter(unet, coder, 0.5, words_of, None)  # pyright: ignore
    images = torch.full((4, 3, 64, 64), 0, dtype=torch.uint8)
    # as many others stand between that the ten nearest are not all
    features = torch.cat([torch.eye(4, 16), torch.eye(16)[5:10].repeat(6, 1)])
    return painter, images, CAPTIONS, features, torch.randn(2, 4, 8, 8)


def test_strengths_ask_for_the_next_emoji(asked):
    painter, images, captions, features, noise = parts()
    cfg = edit_study.Config(count=2, strengths=(0.0, 0.5), sampling_steps=7)
    pick = torch.tensor([2, 0])
    args = (painter, images, captions, pick, features, noise, cfg)
    scores, pictures = edit_study.strengths(*args)
    assert [c[1] for c in asked] == [["a", "c"]] * 2 and asked[0][2] is noise
    assert [(c[3].strength, c[3].sampling_steps) for c in asked] == [(0.0, 7), (0.5, 7)]
    assert all(c[4] is None for c in asked)
    assert scores[0.0]["pixel_error"] == 0
    assert scores[0.5]["pixel_error"] == pytest.approx((1 + 1.5) / 2 * 127.5)
    assert scores[0.5]["prompt_top10"] == 1 and pictures.keys() == {0.0, 0.5}


def test_halves_compare_ways_from_the_same_noise(asked):
    painter, images, captions, features, noise = parts()
    images = images + 128
    cfg = edit_study.Config(count=2, sampling_steps=7, seed=3)
    pick = torch.tensor([1, 3])
    args = (painter, images, captions, pick, features, noise, cfg)
    scores, pictures = edit_study.halves(*args)
    assert len(asked) == len(edit_study.WAYS)
    for (resamples, eta, named), call in zip(edit_study.WAYS.values(), asked):
        flags = call[3]
        assert (flags.resamples, flags.eta, flags.sampling_steps) == (resamples, eta, 7)
        assert call[1] == (["b", "d"] if named else ["", ""])
        assert flags.guidance_scale == (3.0 if named else 1.0)
        assert torch.equal(call[4], edit.part_mask("right").expand(2, -1, -1, -1))
        # the same random numbers for all
        assert torch.equal(call[5], asked[0][5]) and call[2] is noise
    assert scores["no resampling"]["kept_error"] == pytest.approx(12.75, abs=0.01)
    assert scores["given"]["kept_error"] == 0 and scores["given"]["seam"] == 0
    assert scores["no resampling"]["top1"] == 1 and scores["no prompt"]["top1"] == 0
    less = scores["given"]["seam"] - scores["no resampling"]["seam"]
    assert scores["given"]["seam_minus_no_resampling"] == pytest.approx(less) and less < 0
    assert scores["no resampling"]["standard_error"] == 0 < scores["given"]["standard_error"]
    assert (pictures["right half white"][..., 32:] == 1).all()
