"""vlm/export_unet.py: samplers draw with a file what they draw with the network."""

import pytest
import torch

from deploy import export_onnx
from models import ddim, ddpm, prompt_alignment
from models.digit_unet import build
from tests import eyes
from utils import checkpoint
from vlm import export_tower, export_unet


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A tiny U-Net of random weights, as ddpm.py writes it."""
    torch.manual_seed(2)
    model = eyes.shake(build((8, 32), 1))
    meta = {"channels": [8, 32], "layers": 1, "schedule": "cosine", "predict": "v"}
    path = tmp_path_factory.mktemp("unet") / "model.safetensors"
    return checkpoint.write(path, model.state_dict(), meta)


@pytest.fixture(scope="module")
def drawn(weights, tmp_path_factory):
    """-> Denoiser, rows and pictures of a comparison, the path of the file."""
    torch.manual_seed(4)
    denoiser = export_unet.digits(2, 4, weights)
    path = tmp_path_factory.mktemp("drawn") / "digits.onnx"
    return denoiser, *export_unet.compare(denoiser, path, (1, 3), 2), path


def test_the_file_is_the_unet_for_any_number_of_pictures(drawn, parity):
    denoiser, _, _, path = drawn
    network = export_onnx.OnnxModule(path)
    for batch in (1, 2, 5):
        args = denoiser.args(batch)
        assert [len(x) for x in args] == [batch] * 2
        with torch.no_grad():
            theirs = denoiser.model(*args)
        about = f"export_unet, digits, batch {batch}"
        parity("Export", about, "unet.UNet, which is diffusers'", network(*args), theirs, 1e-5)


def test_a_sampler_draws_the_same_with_the_file(drawn, weights, parity):
    denoiser, rows, pictures, path = drawn
    assert list(rows) == ["batch 1", "batch 3"] and list(pictures) == ["eager", "onnxruntime"]
    assert all(0 < row["largest difference"] < 1e-5 for row in rows.values())
    about = ("ddim.sample with onnxruntime", "ddim.sample with torch")
    parity("Export", *about, pictures["onnxruntime"], pictures["eager"], 1e-3)
    # the file has drawn, for its rounding is another one
    assert not torch.equal(pictures["onnxruntime"], pictures["eager"])
    assert pictures["eager"].shape == (2, 1, 28, 28) and pictures["eager"].abs().max() == 1
    # it asks the network that it is given, once a step, for all pictures
    asked = []

    def network(xt, t):
        asked.append((len(xt), int(t[0])))
        return denoiser.model(xt, t)

    assert torch.equal(denoiser.draw(network), pictures["eager"])
    steps = ddim.timesteps(ddpm.Schedule(kind="cosine"), 4).tolist()
    assert asked == [(2, t) for t in steps]
    # from the same noise, predicting v as the weights say
    torch.manual_seed(4)
    model, schedule, predict = ddpm.load(weights)
    noise = torch.randn(2, 1, 28, 28)
    wanted = ddim.last(ddim.sample(model, schedule, noise, 4, "v"))
    assert predict == "v" and torch.equal(pictures["eager"], wanted)


def test_rows_are_milliseconds_a_picture(drawn, monkeypatch):
    denoiser, _, _, path = drawn
    monkeypatch.setattr(export_onnx, "write_batched", lambda *about: path)
    monkeypatch.setattr(
        export_unet, "measure", lambda ways, rounds: {"eager": {"ms": 8.0}, "onnx": {"ms": 2.0}}
    )
    rows, _ = export_unet.compare(denoiser, path, (4,), 1)
    row = rows["batch 4"]
    assert row["eager, ms a picture"] == 2.0 and row["onnxruntime, ms a picture"] == 0.5
    assert row["times as quick"] == 4.0


@pytest.mark.long
def test_the_unet_of_text_to_image_draws_its_prompts_from_the_file(tmp_path, monkeypatch):
    """With guidance: both halves of the batch go through the file."""
    shown = {}
    monkeypatch.setattr(
        export_unet.figures, "rows", lambda path, named, titles: shown.update(named, titles=titles)
    )
    cfg = export_tower.Config(
        what="emoji", samples=2, sampling_steps=10, batches=(2,), rounds=1, out=str(tmp_path)
    )
    found = export_tower.main(cfg)
    assert 0 < found["pictures, largest difference"] < 1e-3
    assert found["batch 2"]["largest difference"] < 1e-4
    assert (tmp_path / "emoji.onnx").stat().st_size == 1e6 * found["MB"]
    assert shown.pop("titles") == ("red apple", "blue heart")
    for pictures in shown.values():
        assert [prompt_alignment.hue(x) for x in pictures] == ["red", "blue"]
