"""A folder of the reader's own pictures in the place of digits: what is read, trained, drawn and compared."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from models import ddim, ddpm, flow, own_images, reflow
from tests.models.test_ddpm import one_line
from utils import checkpoint, data, figures
from utils.run import UserError

SMALL = dict(steps=2, batch=4, channels=(8, 16), layers=1, samples=10)


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


@pytest.mark.parametrize("script", [ddpm, flow])
def test_scripts_train_on_a_folder(script, folder, tmp_path, monkeypatch):
    """Three channels of 32 x 32, without classes and without the scores of digits; the weights know it."""
    monkeypatch.setattr(ddpm, "sample", slow_sampler)
    trained = []
    note_training(script, monkeypatch, trained)
    monkeypatch.setattr(flow, "sample", asked_for_no_class(flow.sample))
    more = {"sampling_steps": (1, 2)} if script is flow else {}
    out = tmp_path / "out"
    metrics = script.main(script.Config(data=str(folder), out=str(out), **SMALL, **more))
    text = json.dumps(metrics)
    assert "nearest_training" in text and "recognised" not in text
    assert (out / "nearest.png").stat().st_size > 0
    assert all(x.shape[1:] == (3, 32, 32) for x in trained) and len(trained) > 0
    model = script.load(out / "model.safetensors")[0]
    assert model.in_channels == 3
    assert np.array(Image.open(out / "samples.png")).ndim == 3


def slow_sampler(model, schedule, shape, predict):
    """In the place of a thousand network calls; one is made, so that the shape must fit."""
    xt = torch.randn(shape)
    model(xt, torch.zeros(len(xt)))
    yield from (xt for _ in range(schedule.steps + 1))


def asked_for_no_class(sample):
    """The sampler of flow.py, if its network is asked once, for no class."""

    def checked(network, *about):
        assert (network.keywords["y"] == flow.NO_CLASS).all()
        yield from sample(network, *about)

    return checked


def note_training(script, monkeypatch, trained):
    """Note the images that the loss is asked about."""
    real = script.loss

    def loss(model, *about):
        trained.append(about[1])  # ddpm: of (schedule, x0, ...); flow: of (x0, x1, t)
        if script is flow:
            assert (model.keywords["y"] == flow.NO_CLASS).all()
        return real(model, *about)

    monkeypatch.setattr(script, "loss", loss)


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


@pytest.mark.parametrize("script", [ddpm, flow])
@pytest.mark.parametrize(
    "args, word",
    [
        (["--data", "nowhere"], "not a folder"),
        (["--data", "EMPTY"], "no images"),
        (["--data", "FOLDER", "--batch", "8"], "--batch 7 or less"),
        (["--data", "FOLDER", "--batch", "4", "--pretrained"], "--pretrained"),
    ],
)
def test_bad_input(script, args, word, folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    names = {"FOLDER": str(folder), "EMPTY": str(tmp_path / "empty")}
    args = [names.get(arg, arg) for arg in args]
    assert word in one_line(script, [*args, "--out", str(tmp_path / "x")], monkeypatch, capsys)
    assert not (tmp_path / "x").exists()
