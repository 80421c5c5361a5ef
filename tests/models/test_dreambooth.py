"""DreamBooth: what is shown under which prompt, what learns, what is measured from which noises; bad flags."""

import json

import pytest
import torch
from PIL import Image

from models import ddpm, dreambooth, mascot, stable_diffuser
from models.text_encoder import TextEncoder
from models.unet import UNet
from models.unet_lora import add_lora, lora_state
from tests.models.test_ddpm import command, one_line, same
from utils import checkpoint, data, figures

TINY = dict(steps=2, batch=2, prior=3, rank=2, sampling_steps=2, judged=6)


def test_five_poses_of_one_thing():
    images = mascot.pictures()
    assert images.shape == (5, 3, 64, 64) and images.dtype == torch.uint8
    # green, white and orange in each; no two alike; nothing cut off
    for image in images:
        for colour in (mascot.BODY, mascot.HORN, (255, 255, 255)):
            difference = (image.int() - torch.tensor(colour).view(3, 1, 1)).abs().amax(0)
            assert (difference < 12).sum() > 10, colour
        assert (image[:, :, [0, -1]] == 255).all() and (image[:, -1] == 255).all()
    apart = torch.cdist(images.flatten(1).float(), images.flatten(1).float())
    assert (apart + 1e9 * torch.eye(5)).min() > 1000


class Number(torch.nn.Module):
    """Answers with one weight for prompts of 1, with another one for prompts of 2."""

    def __init__(self):
        super().__init__()
        self.thing = torch.nn.Parameter(torch.tensor(0.0))
        self.category = torch.nn.Parameter(torch.tensor(0.0))
        self.seen = []

    def forward(self, xt, t, words, mask):
        self.seen.append((float(words[0, 0, 0]), xt, t, mask))
        weight = self.thing if words[0, 0, 0] == 1 else self.category
        return weight.expand_as(xt)


def parts(n=4, shape=(2, 4, 4)):
    """Latents and text of a thing, all 1, and of a class, all 2."""
    mask = torch.ones(1, 3, dtype=torch.bool)
    return [(torch.full((n, *shape), v), (torch.full((1, 3, 5), v), mask)) for v in (1.0, 2.0)]


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_loss_is_that_of_the_thing_and_weighted_that_of_the_class(weight):
    schedule = ddpm.Schedule(kind="cosine")
    thing, category = parts()
    new = dreambooth.batch_of(3, schedule, *thing)
    old = dreambooth.batch_of(5, schedule, *category)
    model = Number()
    value = dreambooth.loss(model, schedule, new, old, weight)
    expected = stable_diffuser.loss(model, schedule, *new)
    expected = expected + weight * stable_diffuser.loss(model, schedule, *old)
    torch.testing.assert_close(value, expected)
    value.backward()
    assert model.thing.grad is not None and (model.category.grad is not None) == (weight > 0)


def test_a_batch_has_random_pictures_times_and_noises_and_one_caption():
    latents = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 2, 4, 4)
    text = (torch.randn(1, 3, 5), torch.tensor([[True, True, False]]))
    schedule = ddpm.Schedule()
    z0, words, mask, t, eps = dreambooth.batch_of(200, schedule, latents, text)
    assert set(z0[:, 0, 0, 0].tolist()) == set(range(6))
    assert words.shape == (200, 3, 5) and (words == text[0]).all() and (mask == text[1]).all()
    assert t.min() < 50 and t.max() > 950
    assert eps.std() == pytest.approx(1, abs=0.05) and not torch.equal(eps[0], eps[1])


def test_training_shows_both_under_their_own_prompts():
    """v of a constant picture c at time t is -sqrt(1 - alpha_bar) c plus noise: both weights go below zero."""
    schedule = ddpm.Schedule(kind="cosine")
    model = Number()
    cfg = dreambooth.Config(steps=60, batch=4, lr=0.02)
    thing, category = parts()
    losses = list(dreambooth.train(model, schedule, thing, category, cfg, 1.0))
    assert len(losses) == 60 and {number for number, *_ in model.seen} == {1.0, 2.0}
    assert len(model.seen) == 120
    assert model.category < model.thing < -0.3
    alone = Number()
    list(dreambooth.train(alone, schedule, thing, category, cfg, 0.0))
    assert alone.thing < -0.3 and alone.category == 0 and {n for n, *_ in alone.seen} == {1.0}


def test_only_lora_learns():
    schedule = ddpm.Schedule(kind="cosine")
    torch.manual_seed(0)
    model = UNet(4, (16, 32), layers=1, attention=(True, True), context_dim=5, head_dim=16)
    add_lora(model, 2, 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cfg = dreambooth.Config(steps=3, batch=2)
    thing, category = parts(shape=(4, 8, 8))
    list(dreambooth.train(model, schedule, thing, category, cfg, 1.0))
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == set(lora_state(model))


def test_measures():
    a = torch.tensor([[1.0, 0], [0, 1]])
    b = torch.tensor([[0.0, 1], [0, 1]])
    assert dreambooth.similarity(a, b).tolist() == [0, 1]
    assert dreambooth.similarity(a, a[:1]).tolist() == [1, 0]
    features = {"thing": a, "category": b, "others": a}
    before = {"thing": b, "category": b, "others": b}
    row = dreambooth.measure(features, before, a[:1])
    error = pytest.approx(0.5)  # of 0 and 1: sqrt(1 / 2), over sqrt(2)
    assert row == {
        "thing_similarity": 0.5,
        "thing_similarity_error": error,
        "category_similarity": 0,
        "category_similarity_error": 0,
        "category_unchanged": 1,
        "category_unchanged_error": 0,
        "others_unchanged": 0.5,
        "others_unchanged_error": error,
    }


def test_pictures_of_each_prompt_are_drawn_from_the_same_noises():
    asked = []

    class Painter:
        def draw(self, prompts, noise, guidance_scale, n):
            asked.append((list(prompts), noise, guidance_scale, n))
            return noise

    cfg = dreambooth.Config(thing="a b", category="b", guidance_scale=2.0, sampling_steps=7)
    noise = torch.randn(8, 4, 2, 2)
    drawn = dreambooth.draw_all(Painter(), noise, cfg)
    assert list(drawn) == ["thing", "category", "others"]
    prompts, noises, scales, steps = zip(*asked)
    assert prompts[0] == ["a b"] * 8 and prompts[1] == ["b"] * 8
    assert prompts[2] == [*dreambooth.OTHERS, *dreambooth.OTHERS[:2]]
    assert all(torch.equal(x, noise) for x in noises) and set(scales) == {2.0} and set(steps) == {7}


@pytest.mark.long
def test_main_judges_the_trained_and_keeps_the_lora(tmp_path, monkeypatch):
    painted = []
    draw = stable_diffuser.Painter.draw

    def spied_draw(self, prompts, noise, *flags):
        lora = lora_state(self.model)
        painted.append(({k: v.clone() for k, v in lora.items()}, list(prompts), noise))
        return draw(self, prompts, noise, *flags)

    rows = {}
    shown = []
    train = dreambooth.train

    def spied_train(model, schedule, thing, category, cfg, weight):
        shown.append((thing, category, weight))
        yield from train(model, schedule, thing, category, cfg, weight)

    monkeypatch.setattr(dreambooth, "train", spied_train)
    monkeypatch.setattr(stable_diffuser.Painter, "draw", spied_draw)
    monkeypatch.setattr(figures, "rows", lambda path, named: rows.update(named))
    metrics = dreambooth.main(dreambooth.Config(out=str(tmp_path), **TINY))
    # five pictures of the thing and three of the prior, each under its own prompt
    words, mask = TextEncoder()(["zwx alien", "alien"])
    assert [weight for *_, weight in shown] == [1, 0]
    for (latents, thing), (prior, category), _ in shown:
        assert len(latents) == 5 and len(prior) == 3
        assert torch.equal(thing[0], words[:1]) and torch.equal(thing[1], mask[:1])
        assert torch.equal(category[0], words[1:]) and torch.equal(category[1], mask[1:])
    # the prior, three of before, three of each run
    assert len(painted) == 10 and painted[0][1] == ["alien"] * 3
    assert not any(lora for lora, *_ in painted[:4])
    noise = painted[1][2]
    assert all(torch.equal(x, noise) for *_, x in painted[1:])
    for weight, first in (("1", 4), ("0", 7)):
        kept, meta = checkpoint.read(tmp_path / f"lora_{weight}.safetensors")
        assert kept and same(kept, painted[first][0]) and meta == {"rank": 2, "thing": "zwx alien"}
        assert any(v.any() for k, v in kept.items() if k.endswith("lora_B"))
    assert metrics["before"]["category_unchanged"] == pytest.approx(1, abs=1e-5)
    assert metrics["prior 1"]["category_unchanged"] < 1
    assert list(rows)[:4] == ["given", "before: thing", "before: category", "before: others"]
    assert torch.equal(rows["given"], data.to_float(mascot.pictures()))


@pytest.mark.long
def test_command_with_a_folder(tmp_path):
    (tmp_path / "mug").mkdir()
    for number in range(3):
        Image.new("RGB", (80, 60), (90 * number, 10, 200)).save(tmp_path / "mug" / f"{number}.png")
    flags = "--steps 1 --batch 1 --prior 1 --rank 1 --sampling-steps 1 --judged 6 --thing zwx-mug"
    more = ["--category", "mug", "--data", str(tmp_path / "mug"), "--out", str(tmp_path / "out")]
    done = command(*flags.split(), *more, script="dreambooth")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert {"before", "prior 1", "prior 0"} <= metrics.keys()


@pytest.mark.parametrize(
    "args, word",
    [
        (["--steps", "0"], "--steps"),
        (["--rank", "0"], "--rank"),
        (["--lr", "0"], "--lr"),
        (["--prior-weights", "-1"], "--prior-weights"),
        (["--prior-weights", "1", "1"], "twice"),
        (["--guidance-scale", "inf"], "--guidance-scale"),
        (["--judged", "5"], "--judged"),
        (["--thing", " "], "blank"),
        (["--thing", "alien"], "--thing"),
        (["--thing", "word " * 30], "tokens"),
        (["--data", "nowhere"], "not a folder"),
    ],
)
def test_bad_input(args, word, tmp_path, monkeypatch, capsys):
    assert word in one_line(dreambooth, [*args, "--out", str(tmp_path / "x")], monkeypatch, capsys)
    assert not (tmp_path / "x").exists()
