"""A folder of the reader's own pictures in the place of digits: what is read, trained, drawn and compared."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from models import ddim, ddpm, dit, flow, latent_figures, own_images, quality, reflow, vae
from tests.models.test_ddpm import one_line
from utils import checkpoint, data, figures
from utils.run import UserError

UNET = dict(steps=2, batch=4, channels=(8, 16), layers=1, samples=10)
SMALL = {
    ddpm: UNET,
    flow: UNET | {"sampling_steps": (1, 2)},
    dit: dict(steps=2, batch=4, patch=8, samples=10),
    vae: dict(steps=2, batch=4, channels=(4, 8), hidden=16, latents=(2, 3), samples=64),
}


@pytest.fixture
def folder(tmp_path):
    """Six pictures of one colour each, of several sizes, one in a sub-folder, one transparent; and a text."""
    sizes = [(32, 32), (50, 40), (40, 50), (8, 8), (100, 100), (33, 31)]
    place = tmp_path / "pictures"
    (place / "more").mkdir(parents=True)
    for number, size in enumerate(sizes):
        name = f"more/{number}.png" if number == 5 else f"{number}.png"
        Image.new("RGB", size, (40 * number, 0, 255)).save(place / name)
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(place / "clear.png")
    (place / "notes.txt").write_text("no picture")
    return place


def test_training_set_is_digits_or_the_pictures_of_the_folder(folder):
    images, labels = own_images.training_set(ddpm.Config())
    digits, names = data.mnist("train")
    assert torch.equal(images, digits) and torch.equal(labels, names)
    images, labels = own_images.training_set(ddpm.Config(data=str(folder), batch=7), no_class=10)
    assert images.shape == (7, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.tolist() == [10] * 7
    assert images[:5, 0, 0, 0].tolist() == [0, 40, 80, 120, 160]
    assert (images[5] == 255).all() and images[6, 0, 0, 0] == 200  # what is clear is white


def test_distance_of_a_pixel():
    images = torch.stack([torch.full((3, 4, 4), value) for value in (-1.0, 0.0, 1.0)])
    samples = torch.stack([torch.full((3, 4, 4), value) for value in (0.7, -0.9)])
    found = own_images.distances(samples, images)
    torch.testing.assert_close(found, torch.tensor([[1.7, 0.7, 0.3], [0.1, 0.9, 1.9]]))
    assert own_images.distances(images[:1], images[2:]).item() == pytest.approx(2)


def test_score_tells_copies_from_new_pictures(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "rows", lambda path, rows: drawn.update({path.name: rows}))
    images = torch.randint(256, (30, 3, 8, 8), dtype=torch.uint8)
    copies = own_images.score(tmp_path, images, data.to_float(images[[4, 9]]))
    assert copies["nearest_training"] < 1e-3 and copies["training_images"] == 30
    assert torch.equal(drawn["nearest.png"]["nearest"], data.to_float(images[[4, 9]]))
    others = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8)
    new = own_images.score(tmp_path, images, data.to_float(others))
    # as far from them as they are from each other
    assert new["between_training"] == copies["between_training"]
    assert new["nearest_training"] == pytest.approx(new["between_training"], rel=0.1)


@pytest.mark.parametrize("script", [ddpm, flow, dit])
def test_scripts_train_on_a_folder(script, folder, tmp_path, monkeypatch):
    """Three channels of 32 x 32, without classes and without the scores of digits; the weights know it."""
    monkeypatch.setattr(ddpm, "sample", slow_sampler)
    trained = []
    note_training(script, monkeypatch, trained)
    monkeypatch.setattr(flow, "sample", asked_for_no_class(flow.sample))
    monkeypatch.setattr(ddim, "sample", asked_for_no_class(ddim.sample))
    monkeypatch.setitem(dit.SIZES, "tiny", (1, 32, 2))
    scored = note_scores(monkeypatch)
    out = tmp_path / "out"
    metrics = script.main(script.Config(data=str(folder), out=str(out), **SMALL[script]))
    text = json.dumps(metrics)
    assert "nearest_training" in text and "recognised" not in text
    assert (out / "nearest.png").stat().st_size > 0
    assert all(x.shape[1:] == (3, 32, 32) for x in trained) and len(trained) > 0
    assert all(images.shape == (7, 3, 32, 32) for images, _ in scored)
    assert all(samples.shape == (10, 3, 32, 32) for _, samples in scored)
    model = script.load(out / "model.safetensors")[0]
    assert next(model.parameters()).shape[1] in (12, 3 * 8 * 8)  # folded pixels, or a patch
    assert np.array(Image.open(out / "samples.png")).ndim == 3


def note_scores(monkeypatch):
    """Note pictures and samples that are compared -> [(pictures, samples), ...]."""
    scored = []
    score = own_images.score

    def noted(folder, images, samples):
        scored.append((images, samples))
        return score(folder, images, samples)

    monkeypatch.setattr(own_images, "score", noted)
    return scored


def test_vae_trains_on_a_folder(folder, tmp_path, monkeypatch):
    """Three channels of 32 x 32; measured on the pictures trained on; no classifier, no figure of classes."""
    drawn, measured = [], []
    real, measure = vae.draw, vae.measure
    monkeypatch.setattr(vae, "draw", lambda *about: drawn.append(about) or real(*about))
    monkeypatch.setattr(vae, "measure", lambda model, x: measured.append(x) or measure(model, x))
    monkeypatch.setattr(quality, "scorer", lambda device: pytest.fail("scored as digits"))
    scored = note_scores(monkeypatch)
    maps = []
    panels = figures.panels
    monkeypatch.setattr(
        figures, "panels", lambda path, rows, **kw: maps.append(rows) or panels(path, rows, **kw)
    )
    out = tmp_path / "out"
    metrics = vae.main(vae.Config(data=str(folder), out=str(out), **SMALL[vae]))
    names = ["2-d", "3-d", "no noise", "no KL"]
    assert all(f"{name}: elbo" in metrics for name in names)
    assert "nearest_training" in metrics and "recognised" not in json.dumps(metrics)
    images = own_images.training_set(vae.Config(data=str(folder), batch=4))[0]
    assert all(torch.equal(x, data.to_float(images)) for x in measured) and len(measured) == 4
    # the last of --latents is compared with the pictures
    samples = drawn[0][5]
    assert torch.equal(scored[0][0], images) and torch.equal(scored[0][1], samples["3-d"])
    assert samples["3-d"].shape == (64, 3, 32, 32)
    # both maps are of such pictures, before the training, too
    assert [x.shape[1:] for x in maps[0][0].values()] == [(3, 32, 32)] * 2
    files = {path.name for path in out.glob("*.png")}
    shown = {"samples.png", "nearest.png", "map.png", "reconstructions.png", "interpolation.png"}
    assert files == shown | {"loss.png", "kl.png", "reconstruction.png"}
    loaded = vae.load(out / "model.safetensors")
    assert all(model.image == (3, 32, 32) for model in loaded.values())
    torch.manual_seed(0)
    again = vae.sample(loaded["3-d"], 2)
    torch.manual_seed(0)
    assert torch.equal(again, vae.sample(drawn[0][3]["3-d"], 2))


def test_pairs_to_interpolate_between():
    images, labels = torch.arange(40.0).view(40, 1, 1, 1), torch.arange(40) % 10
    digits = latent_figures.pairs(images, labels)
    # the second of each digit
    assert {name: (float(a), float(b)) for name, (a, b) in digits.items()} == {
        "3 to 8": (13, 18), "4 to 9": (14, 19), "0 to 6": (10, 16), "1 to 7": (11, 17),
    }  # fmt: skip
    own = latent_figures.pairs(images, None)
    assert {name: (float(a), float(b)) for name, (a, b) in own.items()} == {
        "1 to 2": (0, 1), "3 to 4": (2, 3), "5 to 6": (4, 5), "7 to 8": (6, 7),
    }  # fmt: skip
    assert list(latent_figures.pairs(images[:3], None)) == ["1 to 2"]


def test_vae_of_another_shape_reads_no_digits():
    model = vae.VAE(3, (4, 8), 16, (3, 32, 32))
    mu, _ = model.encode(torch.zeros(2, 3, 32, 32))
    assert model.decode(mu).shape == (2, 3, 32, 32)
    with pytest.raises(UserError, match=r"\(B, 3, 32, 32\)"):
        model.encode(torch.zeros(2, 1, 28, 28))


def test_patch_must_divide_own_pictures(folder, tmp_path, monkeypatch, capsys):
    args = ["--data", str(folder), "--batch", "4", "--patch", "7", "--out", str(tmp_path / "x")]
    assert "does not divide 32 pixels; use 2, 4, 8 or 16" in one_line(
        dit, args, monkeypatch, capsys
    )
    with pytest.raises(UserError, match="divide 28 pixels; use 2, 4, 7 or 14"):
        dit.check_network("tiny", 8)


def slow_sampler(model, schedule, shape, predict):
    """In the place of a thousand network calls; one is made, so that the shape must fit."""
    xt = torch.randn(shape)
    model(xt, torch.zeros(len(xt)))
    yield from (xt for _ in range(schedule.steps + 1))


def asked_for_no_class(sample):
    """A sampler, if its network is asked for no class."""

    def checked(network, *about):
        assert (network.keywords["y"] == flow.NO_CLASS).all()
        yield from sample(network, *about)

    return checked


def note_training(script, monkeypatch, trained):
    """Note the images that the loss is asked about."""
    script_of_loss = flow if script is flow else ddpm  # whose loss dit.py takes, too
    real = script_of_loss.loss

    def loss(model, *about):
        trained.append(about[1])  # ddpm, dit: of (schedule, x0, ...); flow: of (x0, x1, t)
        if script is not ddpm:
            assert (model.keywords["y"] == flow.NO_CLASS).all()
        return real(model, *about)

    monkeypatch.setattr(script_of_loss, "loss", loss)


def test_ddim_refuses_weights_of_colour_pictures(tmp_path):
    model = ddpm.build((8, 16), 1, in_channels=3)
    meta = {"channels": [8, 16], "layers": 1, "in_channels": 3, "schedule": "cosine"}
    path = checkpoint.write(tmp_path / "w.safetensors", model.state_dict(), meta | {"predict": "v"})
    with pytest.raises(UserError, match="in colour"):
        ddim.main(ddim.Config(weights=str(path), out=str(tmp_path / "out")))


def test_reflow_refuses_weights_of_colour_pictures(tmp_path):
    model = flow.build((8, 16), 1, in_channels=3)
    meta = {"channels": [8, 16], "layers": 1, "in_channels": 3}
    path = checkpoint.write(tmp_path / "w.safetensors", model.state_dict(), meta)
    with pytest.raises(UserError, match="in colour"):
        reflow.main(reflow.Config(weights=str(path), out=str(tmp_path / "out")))


@pytest.mark.parametrize("script", [ddpm, flow, dit, vae])
@pytest.mark.parametrize(
    "args, word",
    [
        (["--data", "nowhere"], "not a folder"),
        (["--data", "EMPTY"], "no images"),
        (["--data", "FOLDER", "--batch", "8"], "--batch 7 or less"),
    ],
)
def test_bad_input(script, args, word, folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    names = {"FOLDER": str(folder), "EMPTY": str(tmp_path / "empty")}
    args = [names.get(arg, arg) for arg in args]
    assert word in one_line(script, [*args, "--out", str(tmp_path / "x")], monkeypatch, capsys)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("script", [ddpm, flow, dit])  # those with shipped weights
def test_shipped_weights_are_no_start_for_own_pictures(
    script, folder, tmp_path, monkeypatch, capsys
):
    args = f"--data {folder} --batch 4 --pretrained --out {tmp_path / 'x'}".split()
    assert "--pretrained" in one_line(script, args, monkeypatch, capsys)
    assert not (tmp_path / "x").exists()
