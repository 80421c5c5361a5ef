"""vlm/export_tower.py: a file that sees as the tower does, int8 with a scale for each channel, the same answers."""

import json
import math
from collections import Counter

import onnx
import pytest
import torch
import torch.nn.functional as F

from deploy import export_onnx
from tests import eyes
from utils import data
from utils.run import UserError
from vlm import export_tower, fruit_photos, generation, llava, token_sparsity, tower

INT8 = ["dynamic int8", "static int8 per tensor", "static int8 per channel"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP -> VisionTower, the files of it."""
    vision_tower = tower.VisionTower(eyes.shake(eyes.tower()).requires_grad_(False))
    torch.manual_seed(5)
    pixels = torch.randn(8, 3, 28, 28)
    return vision_tower, export_tower.write_formats(
        vision_tower, tmp_path_factory.mktemp("clip"), pixels
    )


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_file_is_the_tower_for_any_number_of_pictures(clip, parity, batch):
    vision_tower, paths = clip
    pixels = torch.randn(batch, 3, 28, 28)
    mine = export_tower.OnnxTower(paths["onnx, fp32"], vision_tower)(pixels)
    states = vision_tower.network(pixel_values=pixels, output_hidden_states=True).hidden_states
    about = f"export_tower.OnnxTower, batch {batch}"
    parity("Export", about, "transformers.CLIPVisionModel", mine, states[-2][:, 1:], 1e-5)


def test_each_format_is_a_file_of_its_own(clip):
    vision_tower, paths = clip
    pixels = torch.randn(2, 3, 28, 28)
    wanted = vision_tower(pixels)
    found = {}
    for name, path in paths.items():
        found[name] = export_tower.OnnxTower(path, vision_tower)(pixels)
    assert len({x.sum().item() for x in found.values()}) == 4
    for x in found.values():
        assert F.cosine_similarity(x, wanted, dim=-1).min() > 0.9
    assert list(paths) == ["onnx, fp32", *INT8]
    # scales of the first matrix: one, or one for each output channel
    counts = []
    for name in INT8[1:]:
        graph = onnx.load(paths[name]).graph
        counts.append(max(math.prod(x.dims) for x in graph.initializer if "scale" in x.name))
    assert counts[0] == 1 < counts[1]


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A tiny LLaVA, and its own tower as a file."""
    folder = tmp_path_factory.mktemp("llava")
    tokenizer, model = eyes.talker(folder / "language")
    pixels = torch.randn(2, 3, 28, 28)
    names = (["pixels"], ["features"])
    path = export_onnx.write_batched(model.vision, (pixels,), folder / "tower.onnx", *names)
    return tokenizer, model, export_tower.OnnxTower(path, model.vision)


def test_a_whole_llava_answers_the_same_through_the_file(talker):
    tokenizer, model, seen = talker
    own = model.vision
    photos = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8)
    wanted = [generation.answer(tokenizer, model, photo, fruit_photos.QUESTION) for photo in photos]
    asked = []
    hook = seen.register_forward_hook(lambda module, args, output: asked.append(args[0].shape))
    found = export_tower.answers(tokenizer, model, seen, photos)
    hook.remove()
    assert found == wanted and len(set(wanted)) > 1
    assert asked == [(1, 3, 28, 28)] * 3
    assert model.vision is own


def test_the_tower_of_the_model_comes_back_after_an_error(talker):
    _, model, seen = talker
    own = model.vision
    with pytest.raises(ZeroDivisionError), export_tower.looking_through(model, seen):
        assert model.vision is seen
        raise ZeroDivisionError
    assert model.vision is own


@pytest.mark.parametrize("name", ["pool2", "concat4", "mlp2x_gelu"])
def test_a_trace_follows_tower_and_connector(talker, name):
    """The size of a grid is a tensor in a trace, and round() takes none."""
    _, model, _ = talker
    own = model.connector
    model.connector = llava.connector.build(name, model.vision.width, 24)
    pixels = torch.randn(2, 3, 28, 28)
    try:
        with export_onnx.quiet(), torch.no_grad():
            traced = torch.jit.trace_module(model, {"image_features": pixels}, check_trace=False)
            for batch in (1, 3):
                pixels = torch.randn(batch, 3, 28, 28)
                mine = traced.image_features(pixels)
                torch.testing.assert_close(mine, model.image_features(pixels))
    finally:
        model.connector = own


def test_a_frozen_trace_is_the_tower(clip):
    vision_tower, _ = clip
    traced = export_tower.trace(vision_tower, torch.randn(1, 3, 28, 28))
    pixels = torch.randn(3, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(traced(pixels), vision_tower(pixels), atol=1e-5, rtol=1e-5)
    # weights are constants now
    assert not list(traced.parameters())


def test_similarity_of_known_vectors():
    eager = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    found = export_tower.similarity(torch.tensor([[[6.0, 8.0], [0.0, 2.0]]]), eager)
    assert found == {"largest difference": 4.0, "cosine": 0.5, "least cosine": 0.0}


def test_an_answer_is_right_if_it_is_the_name():
    assert export_tower.right(["Orange.", "a pear", "pear tree"], ["orange", "pear", "pear"]) == 2


def test_times_are_those_of_a_picture(monkeypatch):
    shapes = []

    def measure(ways, rounds):
        for way in ways.values():
            way()
        return {name: {"ms": 12.0 if name == "eager" else 3.0} for name in ways}

    monkeypatch.setattr(export_tower, "measure", measure)
    ways = dict.fromkeys(("eager", "onnx"), lambda x: shapes.append(tuple(x.shape)))
    rows = export_tower.times(ways, 28, (1, 4), 2)
    assert shapes == [(1, 3, 28, 28)] * 2 + [(4, 3, 28, 28)] * 2
    assert rows["onnx"] == {
        "ms a picture, batch 1": 3.0, "of eager, batch 1": 0.25,
        "ms a picture, batch 4": 0.75, "of eager, batch 4": 0.25,
    }  # fmt: skip


def test_a_run_compares_all_towers(talker, monkeypatch, tmp_path):
    tokenizer, model, _ = talker
    fruit = eyes.shop(size=28)
    calibrated = []
    write = export_tower.write_formats

    def write_formats(vision_tower, folder, pixels):
        calibrated.append(pixels)
        return write(vision_tower, folder, pixels)

    monkeypatch.setattr(llava, "load", lambda *_: (tokenizer, model))
    monkeypatch.setattr(data, "groceries", lambda size: fruit)
    monkeypatch.setattr(export_tower, "write_formats", write_formats)
    say = export_tower.answers

    def answers(tokenizer, model, vision_tower, photos):
        told = getattr(vision_tower, "path", "")
        if "dynamic" in str(told):
            return [fruit_photos.name_of(fruit, int(photo[0, 0, 0])) for photo in photos]
        return say(tokenizer, model, vision_tower, photos)

    monkeypatch.setattr(export_tower, "answers", answers)
    about = {"judged": 3, "calibration": 5, "batches": (1, 2), "rounds": 1, "out": str(tmp_path)}
    found = export_tower.main(export_tower.Config(**about))
    assert list(found)[:6] == ["eager", "onnx, fp32", *INT8, "jit.trace, frozen"]
    # one tower says what is true, the others what the model says
    assert found["dynamic int8"]["answers as eager"] == 0 < found["dynamic int8"]["right"] == 3
    assert found["eager"]["right"] == 0
    for name in ("eager", "onnx, fp32"):
        assert found[name]["answers as eager"] == found["photos"] == 3
        assert found[name]["least cosine"] == pytest.approx(1, abs=1e-5)
    assert found["onnx, fp32"]["largest difference"] < 1e-4
    assert found["static int8 per channel"]["largest difference"] > 1e-3
    assert found["dynamic int8"]["MB"] < found["onnx, fp32"]["MB"]
    # ranges are measured on training photos, whose pixels say their number here
    (pixels,) = calibrated
    first, last = model.vision.pixels(fruit.images[[0, 19]])[:, 0, 0, 0]
    assert len(pixels) == 5 and pixels[:, 0].min() >= first - 1e-4
    assert pixels[:, 0].max() <= last + 1e-4
    assert {"answers.png", "tower.onnx"} <= {p.name for p in tmp_path.iterdir()}
    assert json.loads((tmp_path / "metrics.json").read_text())["photos"] == 3


@pytest.mark.long
def test_the_efficientnet_of_the_book(tmp_path, parity):
    """Features in fp32 are equal; in int8 a scale for each channel keeps them, one for all does not."""
    vision_tower = tower.load("efficientnet")
    fruit = data.groceries(224)
    learn, chosen = fruit_photos.split(fruit, 8)
    pixels = vision_tower.pixels(fruit.images[chosen])
    calibration = vision_tower.pixels(fruit.images[learn[:: len(learn) // 16]])
    paths = export_tower.write_formats(vision_tower, tmp_path, calibration)
    maps = vision_tower.network.network.extract_features(pixels)
    theirs = F.layer_norm(maps.flatten(2).transpose(1, 2), (1280,))
    found = {}
    for name, path in paths.items():
        found[name] = export_tower.encode(export_tower.OnnxTower(path, vision_tower), pixels)
    about = ("export_tower.OnnxTower, EfficientNet", "efficientnet_lite_pytorch")
    parity("Export", *about, found["onnx, fp32"], theirs, 2e-4)
    # batch norms are in the weights
    ops = Counter(node.op_type for node in onnx.load(paths["onnx, fp32"]).graph.node)
    assert (ops["Conv"], ops["Clip"], ops["Add"], ops["BatchNormalization"]) == (49, 33, 9, 0)
    traced = export_tower.trace(vision_tower, pixels[:1])
    torch.testing.assert_close(traced(pixels), theirs, atol=2e-4, rtol=1e-5)
    cosine = {name: export_tower.similarity(x, theirs)["cosine"] for name, x in found.items()}
    assert cosine["static int8 per channel"] > 0.97
    assert cosine["static int8 per tensor"] < 0.9 > cosine["dynamic int8"]


def test_no_square_is_one_line():
    with pytest.raises(UserError, match="48 tokens are no square grid"):
        token_sparsity.grid(torch.zeros(1, 48, 2))


def test_bad_flags_are_one_line(tmp_path):
    for flags in ({"judged": 0}, {"batches": ()}, {"batches": (0,)}, {"sampling_steps": 1001}):
        name = next(iter(flags)).replace("_", "-")
        with pytest.raises(UserError, match=f"--{name}"):
            export_tower.main(export_tower.Config(**flags, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
