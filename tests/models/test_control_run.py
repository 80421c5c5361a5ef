"""What models/control.py trains on, keeps, draws and measures; bad input."""

import pytest
import torch
from PIL import Image

from models import autoencoder, control, control_score, controlnet, edges
from tests.models.test_ddpm import one_line, same
from utils import checkpoint, data, figures


class Fake:
    """Follows the edges that it is given, or draws the true picture of its prompt without any."""

    def __init__(self):
        self.asked = []

    def network(self, wanted, scale):
        return wanted, scale

    def draw(self, painter, network, prompts, noise, cfg):
        wanted, scale = network
        self.asked.append((wanted, scale, list(prompts), noise, cfg.guidance_scale))
        plain = torch.ones(len(prompts), 3, 64, 64)
        return torch.where(wanted > 0, -1.0, plain) if scale else plain


def squares(count):
    """Pictures of squares in different places, uint8 (N, 3, 64, 64)."""
    images = torch.full((count, 3, 64, 64), 255, dtype=torch.uint8)
    for i in range(count):
        images[i, :, 5 * i + 4 : 5 * i + 24, 8:40] = 0
    return images


def test_each_way_is_judged_by_the_edges_it_was_given(monkeypatch):
    fake = Fake()
    monkeypatch.setattr(control_score, "draw", fake.draw)
    features = torch.nn.functional.one_hot(torch.arange(3), 4).float()
    monkeypatch.setattr(control_score, "picture_features", lambda images: features)
    images, captions = squares(6), list("abcdef")
    pick = torch.tensor([4, 0, 2])
    noise = torch.randn(3, 4, 16, 16)
    cfg = control.Config(control_scale=0.8)
    args = (None, fake.network, images, captions, pick, noise, cfg)
    metrics, rows, titles = control_score.evaluate(*args)
    own = edges.canny(data.to_float(images[pick]))
    (first, scale, prompts, eps, _), (second, *_), (third, *_), *_ = fake.asked
    assert scale == 0 and prompts == ["e", "a", "c"] == titles and eps is noise
    assert [call[1] for call in fake.asked] == [0.0, 0.8, 0.8, 0.0, 0.8]
    # the last two without a prompt, so without guidance
    assert [call[2] for call in fake.asked] == [prompts] * 3 + [[""] * 3] * 2
    assert [call[4] for call in fake.asked] == [3.0] * 3 + [1.0] * 2
    assert torch.equal(fake.asked[4][0], own.float())
    assert torch.equal(first, own.float()) and torch.equal(second, own.float())
    assert torch.equal(third, own.roll(1, 0).float())
    # a plain picture has no edges; one that follows its lines has those asked for
    assert metrics["without control"]["edge_f1"] == 0
    assert metrics["no prompt, without control"]["edge_f1"] == 0
    assert metrics["own edges"]["edge_f1"] > 0.9 < metrics["other edges"]["edge_f1"]
    chance = float(edges.f1(own.roll(1, 0), own).mean())
    assert metrics["chance_edge_f1"] == pytest.approx(chance) and chance < 0.7
    assert metrics["own edges"]["similarity"] == 1
    assert torch.equal(rows["edges of another"], control_score.lines(own.roll(1, 0)))
    assert torch.equal(rows["its edges"], control_score.lines(own))
    assert set(control_score.lines(own).unique().tolist()) == {-1, 1}


def test_draw_asks_the_painter_with_another_network():
    class Painter:
        def __init__(self):
            self.model = "before"

        def draw(self, *args):
            return (self.model, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(control_score, "replace", lambda painter, model: under(painter, model))

        def under(painter, model):
            painter.model = model
            return painter

        cfg = control.Config(guidance_scale=2.5, sampling_steps=7)
        found = control_score.draw(Painter(), "after", ["x"], "noise", cfg)
    assert found == ("after", ["x"], "noise", 2.5, 7)


@pytest.fixture
def run_main(monkeypatch):
    """Runs main with an untrained control and two emoji of each kind; notes what was asked."""
    noted = {}
    images, captions, _ = data.emoji(64)
    held_out = autoencoder.split(captions)
    some = [i for i, h in enumerate(held_out) if h][:3] + [
        i for i, h in enumerate(held_out) if not h
    ][:4]
    few = images[some], [captions[i] for i in some], []
    monkeypatch.setattr(data, "emoji", lambda size: few)
    noted["emoji"] = few

    def train(unet, net, optimizer, schedule, *learn):
        noted["train"] = (unet, net, optimizer, learn)
        with torch.no_grad():
            net.conv_in.bias += 1
        yield 0.5

    def evaluate(painter, network, images, captions, pick, noise, cfg):
        noted["evaluate"] = network(torch.zeros(1, 1, 64, 64), 0.3), pick, noise
        return {"own edges": {"edge_f1": 0.5}}, {"true": torch.zeros(2, 3, 8, 8)}, ["x"]

    def controlled(unet, net, wanted, scale):
        noted["network"] = net
        return "network", wanted, scale

    def draw(painter, network, prompts, noise, cfg):
        noted["draw"] = network, prompts, noise
        return torch.zeros(8, 3, 64, 64)

    monkeypatch.setattr(control, "train", train)
    monkeypatch.setattr(control, "evaluate", evaluate)
    monkeypatch.setattr(control, "controlled", controlled)
    monkeypatch.setattr(control, "draw", draw)
    monkeypatch.setattr(figures, "rows", lambda path, rows, titles=(): noted.update(rows=rows))
    return noted


def test_main_trains_on_what_is_not_held_out_and_keeps_it(run_main, tmp_path):
    out = str(tmp_path / "a")
    metrics = control.main(control.Config(steps=1, out=out))
    images, captions, _ = run_main["emoji"]
    unet, net, optimizer, (latents, edge_maps, words, mask, empty, cfg) = run_main["train"]
    assert len(latents) == len(edge_maps) == len(words) == len(mask) == 4
    assert torch.equal(edge_maps, edges.canny(data.to_float(images[3:])))
    again = autoencoder.load(autoencoder.WEIGHTS)
    expected = autoencoder.encode_all(again[0], images[3:]) * again[1]
    torch.testing.assert_close(latents, expected, atol=0.05, rtol=0.05)
    assert int(empty[1].sum()) == 2 and cfg.steps == 1
    assert not any(p.requires_grad for p in unet.parameters())
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in net.parameters()}
    # held-out emoji are measured, with the trained control
    _, pick, noise = run_main["evaluate"]
    assert sorted(pick.tolist()) == [0, 1, 2] and noise.shape == (3, 4, 16, 16)
    assert run_main["network"] is net and run_main["evaluate"][0][2] == 0.3
    assert metrics["final_loss"] == 0.5 and metrics["parameters"] == 2769328
    path = tmp_path / "a" / "model.safetensors"
    assert same(checkpoint.read(path)[0], net.state_dict())

    # the same file draws a prompt along the edges of a picture, and trains nothing
    del run_main["train"]
    Image.new("RGB", (90, 60), "red").save(tmp_path / "a.png")
    flags = dict(weights=str(path), prompt="sun", image=str(tmp_path / "a.png"))
    metrics = control.main(control.Config(**flags, control_scale=0.7, out=str(tmp_path / "b")))
    assert "train" not in run_main and same(run_main["network"].state_dict(), net.state_dict())
    (_, wanted, scale), prompts, noise = run_main["draw"]
    given = data.to_float(data.read_image(flags["image"], 64))[None]
    assert torch.equal(wanted, edges.canny(given).float()) and scale == 0.7
    assert prompts == ["sun"] * 8 and len(noise) == 8 and not torch.equal(noise[0], noise[1])
    assert torch.equal(run_main["rows"]["given"][:1], given) and "edge_f1" in metrics


@pytest.mark.parametrize(
    "args, word",
    [
        (["--steps", "0"], "--steps"),
        (["--count", "0"], "--count"),
        (["--sampling-steps", "1001"], "--sampling-steps"),
        (["--lr", "inf"], "--lr"),
        (["--drop-text", "2"], "--drop-text"),
        (["--control-scale", "nan"], "--control-scale"),
        (["--guidance", "-1"], "--guidance-scale"),
        (["--prompt", "sun"], "--image"),
        (["--image", "a.png"], "--prompt"),
        (["--image", "nowhere.png", "--prompt", "sun"], "nowhere.png"),
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--weights", "other.safetensors"], "another network"),
    ],
)
def test_bad_input(args, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint.write("other.safetensors", {"x": torch.zeros(1)}, {})
    assert word in one_line(control, [*args, "--out", "x"], monkeypatch, capsys)
    assert not (tmp_path / "x").exists()


def test_remembered_widths_are_those_of_the_unet():
    from models import stable_diffuser

    unet = stable_diffuser.build((64, 128), 4)
    assert controlnet.remembered_widths(unet) == [64, 64, 64, 128]
