"""MMDiT against cross-attention, the script: what is trained, kept, judged, compared; bad flags."""

import copy
import json

import pytest
import torch

from models import flow, mmdit
from tests.models.test_ddpm import OneWeight, command, followed, one_line, same
from utils import checkpoint, figures

TINY = dict(steps=2, batch=4, depth=2, width=16, heads=2, sampling_steps=2, judged=12)


def tagged(n=8):
    """Latents, words and masks that carry their number."""
    number = torch.arange(n, dtype=torch.float32)
    latents = number.view(-1, 1, 1, 1).expand(n, 2, 4, 4).clone()
    words = number.view(-1, 1, 1).expand(n, 3, 5).clone()
    return mmdit.Captioned(latents, words, torch.ones(n, 3, dtype=torch.bool))


EMPTY = (torch.full((1, 3, 5), -1.0), torch.tensor([[True, False, False]]))


def test_training_by_hand(monkeypatch):
    """Rate, zeroed gradients, clipping and EMA of every step; noise is zero here, so the velocity is the latents, 1."""
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: torch.zeros(*shape))
    learn = tagged()
    learn.latents.fill_(1.0)
    cfg = mmdit.Config(steps=7, batch=4, lr=40.0, ema=0.25)
    followed(lambda *parts: mmdit.train(*parts, learn, EMPTY, cfg), 1.0, cfg, 0.25)


def test_training_keeps_captions_with_their_latents_and_drops_some(monkeypatch):
    asked = []

    class Listening(OneWeight):
        def forward(self, xt, t, words, mask):
            asked.append((xt[:, 0, 0, 0], t, words[:, 0, 0], mask.sum(1)))
            return super().forward(xt)

    # all that is seen is the picture
    monkeypatch.setattr(flow, "interpolate", lambda x0, x1, t: x1)
    model = Listening()
    ema = copy.deepcopy(model).requires_grad_(False)
    cfg = mmdit.Config(steps=300, batch=4, drop_text=0.3)
    list(mmdit.train(model, ema, torch.optim.SGD(model.parameters()), tagged(), EMPTY, cfg))
    pictures, times, words, length = (torch.cat(x) for x in zip(*asked))
    dropped = words == -1
    assert torch.equal(words[~dropped], pictures[~dropped])
    assert (length[dropped] == 1).all() and (length[~dropped] == 3).all()
    assert dropped.float().mean() == pytest.approx(0.3, abs=0.05)
    assert (times < 250).float().mean() == pytest.approx(0.136, abs=0.04)  # logit-normal
    assert len(set(pictures.tolist())) == 8


def test_losses_are_of_each_picture_with_its_caption_and_the_same_noises():
    held = tagged(5)

    class Knows(OneWeight):
        """Answers with the number that the words carry: x1, where the velocity is x1 - x0."""

        def forward(self, xt, t, words, mask):
            return words[:, :1, :1, None].expand_as(xt)

    found = mmdit.losses(Knows(), held, times=4, batch=2)
    assert torch.equal(found, mmdit.losses(Knows(), held, times=4, batch=2))
    # what is left is the noise, of variance one
    assert found.shape == (5,) and found.mean() == pytest.approx(1, abs=0.15)

    class Zero(OneWeight):
        def forward(self, xt, t, words, mask):
            return torch.zeros_like(xt)

    plain = mmdit.losses(Zero(), held, times=50)
    expected = 1 + torch.arange(5.0) ** 2
    torch.testing.assert_close(plain, expected, atol=0.5, rtol=0.1)


def test_losses_at_equally_spaced_times():
    times = []

    class Listening(OneWeight):
        def forward(self, xt, t, words, mask):
            times.extend(t.tolist())
            return torch.zeros_like(xt)

    mmdit.losses(Listening(), tagged(2), times=4)
    assert sorted(set(times)) == [125, 375, 625, 875]


def test_the_two_networks_cost_nearly_the_same():
    costs = {}
    for name in ("mmdit", "cross"):
        model = mmdit.build(name, 4, 16, 6, 128, 4)
        costs[name] = mmdit.forward_gflops(model, 4, 16)
    assert costs["mmdit"] == pytest.approx(costs["cross"], rel=0.04)
    # 6 blocks: 12 D^2 for 64 + 16 tokens each and 12 D^2 for the condition, times two, and attention
    linear = 2 * 6 * (12 * 80 + 12) * 128**2
    attention = 2 * 2 * 6 * 80 * 80 * 128
    assert costs["mmdit"] * 1e9 == pytest.approx(linear + attention, rel=0.02)


@pytest.fixture
def spied(monkeypatch):
    """What main gives to the training, the losses and the figure."""
    noted = {"train": [], "losses": [], "painted": []}
    train = mmdit.train
    draw = mmdit.Painter.draw

    def spied_train(model, ema, optimizer, learn, empty, cfg):
        begin = copy.deepcopy(model.state_dict())
        state = torch.get_rng_state()
        yield from train(model, ema, optimizer, learn, empty, cfg)
        noted["train"].append((begin, state, ema.state_dict(), model.state_dict(), len(learn)))

    def spied_losses(model, held):
        noted["losses"].append((model.state_dict(), len(held)))
        return torch.tensor([1.0, 2.0, 6.0]) * len(noted["losses"])

    def spied_draw(self, model, captions, noise):
        noted["painted"].append((copy.deepcopy(model.state_dict()), list(captions), noise))
        return draw(self, model, captions, noise)

    monkeypatch.setattr(mmdit, "train", spied_train)
    monkeypatch.setattr(mmdit, "losses", spied_losses)
    monkeypatch.setattr(mmdit.Painter, "draw", spied_draw)
    monkeypatch.setattr(figures, "rows", lambda path, rows: noted.update(rows=rows))
    return noted


@pytest.mark.long
def test_main_trains_both_alike_and_judges_the_ema(spied, tmp_path):
    cfg = mmdit.Config(prompt="red heart", out=str(tmp_path), **TINY)
    metrics = mmdit.main(cfg)
    (_, first, ema_a, raw_a, learned), (_, second, ema_b, _, _) = spied["train"]
    # nine tenths are learned from, a tenth is judged, nothing in both
    assert learned + spied["losses"][0][1] == 1913
    for name, ema in (("mmdit", ema_a), ("cross", ema_b)):
        written, meta = checkpoint.read(tmp_path / f"{name}.safetensors")
        assert same(written, ema) and meta["network"] == name
        again = mmdit.build(**meta)
        again.load_state_dict(written)
    assert not same(ema_a, raw_a)
    assert same(spied["losses"][0][0], ema_a) and same(spied["losses"][1][0], ema_b)
    assert len(spied["painted"]) == 6
    for number, (weights, _, noise) in enumerate(spied["painted"]):
        assert same(weights, ema_a if number < 3 else ema_b)
        # both draw from noises that do not depend on the network's number of weights
        assert noise.shape[1:] == (4, 16, 16)
    seen, held = spied["painted"][0][1], spied["painted"][1][1]
    assert not set(seen) & set(held) and spied["painted"][2][1][-1] == "red heart"
    assert metrics["mmdit"]["held_out_loss"] == 3 and metrics["cross"]["held_out_loss"] == 6
    # of -1, -2, -6
    assert metrics["difference"] == -3
    assert metrics["difference_error"] == pytest.approx(torch.tensor([1.0, 2, 6]).std() / 3**0.5)
    assert len(spied["rows"]) == 8


@pytest.mark.long
def test_command(tmp_path):
    flags = "--steps 2 --batch 4 --depth 1 --width 16 --heads 2 --sampling-steps 1 --judged 12"
    done = command(*flags.split(), "--out", str(tmp_path), script="mmdit")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pictures.png").stat().st_size > 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {"mmdit", "cross", "difference"} <= metrics.keys()


@pytest.mark.parametrize(
    "args, word",
    [
        (["--steps", "0"], "--steps"),
        (["--width", "30", "--heads", "4"], "--width"),
        (["--width", "36", "--heads", "5"], "--width"),
        (["--lr", "inf"], "--lr"),
        (["--ema", "1"], "--ema"),
        (["--drop-text", "2"], "--drop-text"),
        (["--guidance-scale", "nan"], "--guidance-scale"),
        (["--judged", "3"], "--judged"),
        (["--networks", "mmdit", "mmdit"], "--networks"),
        (["--networks", "unet"], "networks"),
        (["--batch", "5000"], "--batch"),
        (["--prompt", "word " * 30], "tokens"),
    ],
)
def test_bad_input(args, word, tmp_path, monkeypatch, capsys):
    assert word in one_line(mmdit, [*args, "--out", str(tmp_path / "x")], monkeypatch, capsys)
    assert not list(tmp_path.rglob("*.safetensors"))
