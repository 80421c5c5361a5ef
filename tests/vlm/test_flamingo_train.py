"""vlm/flamingo_train.py: both losses of a step, learning rates, what learns, the whole script, shipped weights."""

import numpy as np
import pytest
import torch

from tests import eyes, llamas
from tests.vlm.flamingo_classes import END, IMAGE, START, Letters, everything
from utils import checkpoint, pretrained, run
from utils.run import UserError
from vlm import few_shot, flamingo_data, flamingo_episodes, flamingo_judge, flamingo_train, tower
from vlm.flamingo_data import PictureSet
from vlm.flamingo_model import Flamingo

ON = torch.device("cpu")


def flamingo():
    torch.manual_seed(2)
    return Flamingo(eyes.speaker(), [IMAGE, END], dim_in=16, every=1, latents=3, latent_width=12)


def steps_of(monkeypatch, **flags):
    """Train a tiny Flamingo -> model, what the loss was shown, learning rates, gradients that were clipped, losses."""
    shown, rates, clipped = [], [], []

    class Watched(torch.optim.AdamW):
        def step(self, *about):
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(*about)

    def clip(parameters, most):
        clipped.append(({id(p): p.grad.clone() for p in parameters}, most))

    whole = few_shot.loss

    def loss(made, ids, supervised, features):
        shown.append((ids, supervised, features))
        return whole(made, ids, supervised, features)

    monkeypatch.setattr(flamingo_train.torch.optim, "AdamW", Watched)
    monkeypatch.setattr(flamingo_train.nn.utils, "clip_grad_norm_", clip)
    monkeypatch.setattr(few_shot, "loss", loss)
    made = flamingo()
    features = torch.arange(3000.0)[:, None, None].expand(-1, 6, 16) / 3000
    pictures = PictureSet(features, everything())
    cfg = flamingo_train.Config(**{"steps": 4, "chains": 3, "captions": 8, "length": 5} | flags)
    chunks = flamingo_episodes.Chunks(Letters())
    stage = flamingo_train.train(made, pictures, chunks, START, np.arange(40, 80), cfg, ON)
    return made, shown, rates, clipped, list(stage)


def test_a_step_has_an_episode_batch_and_a_caption_batch_whose_gradients_add_up(monkeypatch):
    made, shown, _, clipped, losses = steps_of(monkeypatch, steps=1)
    (episodes, captions), (gradients, most) = shown, clipped[0]
    assert len(losses) == 1 and len(losses[0]) == 2 and most == 1.0
    assert episodes[2].shape[:3] == (3, 5, 3) and captions[2].shape[0] * captions[2].shape[1] == 8
    # half of the six places
    assert captions[2].shape[2] == 3
    again = flamingo()
    for ids, supervised, features in (episodes, captions):
        with run.autocast(ON):
            few_shot.loss(again, ids, supervised, features).backward()
    names = dict(made.named_parameters())
    assert {id(p) for p in made.trainable_parameters().values()} == gradients.keys()
    for name, p in again.trainable_parameters().items():
        torch.testing.assert_close(gradients[id(names[name])], p.grad, atol=1e-5, rtol=1e-3)


def test_chains_see_the_pictures_that_they_name(monkeypatch):
    ids = torch.tensor([[START, IMAGE, 50, END, IMAGE, 51, END]])
    photos = torch.tensor([[5, 700]])
    drawn = []

    def episode_batch(random, chunks, start_id, classes, words, count, length, ways):
        drawn.append((count, length, ways))
        return ids, (ids >= 50) & (ids < IMAGE), photos

    monkeypatch.setattr(flamingo_episodes, "episode_batch", episode_batch)
    _, shown, *_ = steps_of(monkeypatch, captions=0, ways=3)
    assert drawn == [(3, 5, 3)] * 4
    for read, supervised, features in shown:
        assert torch.equal((features[:, :, 0, 0] * 3000).round().long(), photos)
        assert torch.equal(read, ids) and supervised.sum() == 2


def test_without_captions_there_are_episodes_only(monkeypatch):
    _, shown, _, _, losses = steps_of(monkeypatch, captions=0)
    assert len(shown) == len(losses) == 4 and all(len(values) == 1 for values in losses)


def test_rates_rise_and_fall_and_gates_learn_five_times_as_fast(monkeypatch):
    made, _, rates, _, _ = steps_of(monkeypatch, lr=1e-2)
    rest, gates = zip(*rates)
    wanted = [1e-2 * (step + 1) / 20 * (1 + np.cos(np.pi * step / 4)) / 2 for step in range(4)]
    assert rest == pytest.approx(wanted) and gates == pytest.approx([5 * r for r in rest])
    assert made.gates().abs().min() > 0  # all gates are open now


def test_the_language_model_stays_frozen(monkeypatch):
    before = {k: p.clone() for k, p in eyes.speaker().named_parameters()}
    made = steps_of(monkeypatch)[0]
    assert all(torch.equal(p, before[k]) for k, p in made.language.named_parameters())


def test_bad_flags_are_refused_before_anything_is_written(tmp_path):
    for flags, says in (
        ({"steps": 0}, "above 0"), ({"lr": 0}, "above 0"), ({"contrastive_steps": -1}, "0 or more"),
        ({"captions": 3}, "--captions"), ({"ways": 1}, "--ways"), ({"ways": 8}, "--ways"),
        ({"length": 4}, "more than --ways"), ({"views": 2}, "--views"), ({"emoji": 5}, "--emoji"),
        ({"photos": 2}, "--photos"), ({"pretrained": True, "weights": "x"}, "one of them at a time"),
        ({"pretrained": True, "every": 3}, "--every 3: the weights have 6"),
        ({"pretrained": True, "latents": 4}, "--latents 4: the weights have 16"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            flamingo_train.main(flamingo_train.Config(**{"out": str(tmp_path / "out")} | flags))
    assert not (tmp_path / "out").exists()


class Eye:
    """In the place of a vision tower: `features` looks for it."""

    width = 16
    size = 224


def features(vision_tower, images, key=None):
    """In the place of `tower.vision_features`: the mean of each picture."""
    images = images() if key else images
    return images.float().mean((1, 2, 3))[:, None, None].expand(-1, 4, 16).bfloat16()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The script with a tiny language model before the real tokenizer, and means for vision features."""
    folder = llamas.folder(tmp_path / "speaker")
    monkeypatch.setattr(
        flamingo_train.pretrained, "smollm2", lambda on: pretrained.language_model(folder, on)
    )
    monkeypatch.setattr(flamingo_train.tower, "load", lambda *about, **more: Eye())
    monkeypatch.setattr(flamingo_data.tower, "vision_features", features)
    few = {
        "contrastive_steps": 2,
        "contrastive_batch": 8,
        "steps": 3,
        "chains": 2,
        "length": 5,
        "captions": 4,
    }
    return few | {"emoji": 40, "photos": 4, "trials": 4, "every": 1, "out": str(tmp_path / "out")}


def test_the_whole_script_runs_and_its_weights_are_judged(tiny, tmp_path, monkeypatch):
    judged = []
    real = flamingo_judge.shots_table

    def table(model, *about):
        judged.append({k: p.detach().clone() for k, p in model.trainable_parameters().items()})
        assert not model.training
        return real(model, *about)

    monkeypatch.setattr(flamingo_judge, "shots_table", table)
    found = flamingo_train.main(flamingo_train.Config(**tiny))
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert written >= {"loss.png", "shots.png", "model.safetensors", "metrics.json"}
    assert {
        "contrastive loss",
        "loss of episodes",
        "loss of captions",
        "train_seconds",
    } <= found.keys()
    assert 0 <= found["fruit, nonsense, 4 examples"]["accuracy"] <= 1
    assert {
        "7 kinds, 4 examples, RICES",
        "shapes, the color is",
        "emoji, the color is",
    } <= found.keys()
    tensors, meta = checkpoint.read(tmp_path / "out" / "model.safetensors")
    assert meta == {"dim_in": 16, "every": 1, "latents": 16}
    assert all(torch.equal(judged[0][name], tensor) for name, tensor in tensors.items())
    # both stages moved it: the first gate in the first, later ones in the second
    assert all(tensors[f"cross.{i}.gate_attention.alpha"].abs() > 0 for i in range(2))
    # a second run goes on from these weights, without the first stage
    monkeypatch.setattr(flamingo_train.flamingo_contrastive, "train", None)
    weights = str(tmp_path / "out" / "model.safetensors")
    more = {"contrastive_steps": 0, "captions": 0, "steps": 1, "lr": 1e-6, "weights": weights}
    without = flamingo_train.main(flamingo_train.Config(**tiny | more))
    assert "contrastive loss" not in without and "loss of captions" not in without
    changes = [float((judged[1][name] - tensor).abs().max()) for name, tensor in tensors.items()]
    assert 0 < max(changes) < 1e-5


@pytest.mark.long
def test_shipped_weights_learn_names_from_examples_of_classes_never_trained_on():
    """Four examples against none, and two controls that take away what they tell."""
    tokenizer, language = pretrained.smollm2()
    new_ids = few_shot.add_words(tokenizer, language)
    model = flamingo_train.load(flamingo_train.WEIGHTS, language, new_ids, ON)
    start_id = few_shot.start_token(tokenizer)
    chunks = flamingo_episodes.Chunks(tokenizer)
    words = flamingo_episodes.nonsense_names(tokenizer, heldout=True)
    assert not set(words) & set(flamingo_episodes.nonsense_names(tokenizer))
    part = flamingo_data.emoji_classes(tower.load("efficientnet"), 3, True)
    heldout = flamingo_data.together(part)
    about = (model, chunks, start_id, heldout.features, heldout.of("emoji"), words, 2)
    lows, highs = {}, {}
    for name, each, control in (
        ("none", 0, ""), ("four", 2, ""), ("shuffled", 2, "shuffled names"), ("other", 2, "other pictures"),
    ):  # fmt: skip
        right = flamingo_episodes.evaluate(*about, each, ON, 50, control=control)
        found = flamingo_episodes.interval(right)
        lows[name], highs[name] = found["low"], found["high"]
    assert lows["four"] > max(highs["none"], highs["shuffled"], highs["other"])
