"""deploy/export*.py: the exported step is the model for any sizes, and quantised files lose what they say."""

import json
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch

from deploy import export, export_figure, export_onnx, export_step, kv_cache
from deploy.caches import GrowingCache
from deploy.export_step import DecodeStep, OnnxStep
from deploy.llama import Llama, attention
from tests import llamas
from tests.deploy.test_decode import talker
from utils.run import UserError

SIZES = [(1, 0), (1, 1), (1, 9), (2, 1), (7, 0), (6, 5)]


@pytest.fixture(scope="module")
def model():
    return talker()


@pytest.fixture(scope="module")
def step(model):
    return DecodeStep(model)


@pytest.fixture(scope="module")
def program(step):
    return export_step.export_step(step)


@pytest.fixture(scope="module")
def path(program, step, tmp_path_factory):
    target = tmp_path_factory.mktemp("onnx") / "step.onnx"
    return export_onnx.write(program, target, *step.names())


@pytest.fixture(scope="module")
def exported(path, step):
    return OnnxStep(path, step)


def read(model, ids, past):
    """The first `past` tokens of a text by transformers -> their cache as the step takes it, logits of the others."""
    with torch.no_grad():
        cache = model(ids[:, :past], use_cache=True).past_key_values if past else None
        held = [x for layer in cache.layers for x in (layer.keys, layer.values)] if cache else None
        return held, model(ids).logits[:, past:]


@pytest.mark.parametrize(("tokens", "past"), SIZES)
def test_the_step_is_the_model_at_any_number_of_new_and_past_tokens(
    model, step, program, exported, parity, tokens, past
):
    ids = torch.randint(3, 120, (1, past + tokens))
    held, theirs = read(model, ids, past)
    held = held or step.empty(0)
    ways = {"DecodeStep": step, "torch.export": program.module(), "onnxruntime": exported}
    for name, way in ways.items():
        with torch.no_grad():
            mine, present = way(ids[:, past:], list(held))
        about = f"export_step, {name}, {tokens} after {past}"
        parity("Export", about, "transformers.LlamaForCausalLM", mine, theirs, 1e-4)
        # what comes back is what was given, and the new tokens behind it
        whole, _ = read(model, ids, past + tokens)
        for x, old, all_of_it in zip(present, held, whole):
            assert torch.equal(x[:, :, :past], old)
            torch.testing.assert_close(x, all_of_it, atol=1e-5, rtol=1e-4)


def test_the_bounds_of_new_and_past_tokens_begin_at_one_and_zero(program):
    """The program runs below its bounds, too; who compiles it need not bear that."""
    lowest = {int(bounds.lower) for bounds in program.range_constraints.values()}
    assert lowest == {0, 1}


def test_greedy_tokens_are_those_of_generate(model, exported, parity):
    ids = torch.randint(3, 120, (1, 6))
    mine = export_step.generate(exported, ids, 20)
    llama = Llama(model)
    cached = kv_cache.generate(llama, ids, 20, GrowingCache(llama))
    assert torch.equal(mine, cached)
    about = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 2}
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), **about)[:, 6:]
    parity(
        "Export", "export_step.generate of onnxruntime", "transformers generate", mine, theirs, 0
    )


def test_names_are_those_of_the_hub(step, exported):
    inputs, outputs = step.names()
    assert inputs[:3] == ["input_ids", "past_key_values.0.key", "past_key_values.0.value"]
    assert outputs[:3] == ["logits", "present.0.key", "present.0.value"]
    assert [x.name for x in exported.session.get_inputs()] == inputs
    assert [x.name for x in exported.session.get_outputs()] == outputs
    # one size of new tokens, one of past ones, everywhere
    sizes = {str(x.shape[2]) for x in exported.session.get_inputs()[1:]}
    assert len(sizes) == 1 and sizes != {str(exported.session.get_inputs()[0].shape[1])}


def test_logits_of_a_text_are_those_of_a_pass_without_past(step, exported):
    ids = torch.randint(3, 120, (1, 8))
    torch.testing.assert_close(exported.logits(ids), step.logits(ids), atol=1e-4, rtol=1e-4)
    slow = export.one_at_a_time(exported)(ids)
    torch.testing.assert_close(slow, step.logits(ids), atol=1e-4, rtol=1e-4)


def test_a_branch_on_a_size_is_refused(model, monkeypatch):
    """What the caches of kv_cache.py do in Python: is_causal if nothing is held."""

    class Branching(export_step.PastCache):
        def attend(self, layer, q, k, v):
            held = self.past[0].shape[2]
            self.present += [k, v]
            return attention(q, k, v, is_causal=held == 0 and q.shape[2] > 1)

    monkeypatch.setattr(export_step, "PastCache", Branching)
    with pytest.raises(UserError, match=r"torch.export cannot follow this module: .*bool"):
        export_step.export_step(DecodeStep(model))


def test_only_the_first_layers(model):
    ids = torch.randint(3, 120, (1, 5))
    mine = DecodeStep(model, 1).logits(ids)
    short = talker()
    short.model.layers = short.model.layers[:1]
    theirs = short(ids).logits
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    # the model itself has all of them, and its own head
    assert len(model.model.layers) == 2
    with pytest.raises(UserError, match="--layers 3: the model has 2"):
        DecodeStep(model, 3)


def test_times_take_the_least_of_all_rounds(step):
    lengths = []

    class Slow(SimpleNamespace):
        def __call__(self, ids, past):
            lengths.append((ids.shape, past[0].shape[2]))
            sum(range(self.work))

    ways = {"slow": Slow(work=200_000, empty=step.empty), "quick": Slow(work=1, empty=step.empty)}
    found = export.times(ways, 6, 3)
    assert lengths == [((1, 1), 6)] * 6
    assert found["slow"] > found["quick"]


def test_common_counts_to_the_first_difference():
    assert export.common(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 5, 4]])) == 2
    assert export.common(torch.tensor([[1, 2]]), torch.tensor([[1, 2]])) == 2


def test_files_that_are_none(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x01not a graph")
    with pytest.raises(UserError, match="onnxruntime cannot read"):
        export_onnx.session(tmp_path / "bad.onnx")
    with pytest.raises(UserError, match="no ONNX file at"):
        export_onnx.session(tmp_path / "none.onnx")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run of the script on a tiny model -> its folder, its metrics."""
    place = tmp_path_factory.mktemp("run")
    name = llamas.folder(place / "model")
    flags = {"calibration": 1, "held_out": 2, "length": 16, "prompts": 1, "max_new_tokens": 3}
    flags |= {"past": 4, "rounds": 2, "out": str(place / "out")}
    return place / "out", export.main(export.Config(model=name, **flags))


def test_a_run_compares_all_formats_and_keeps_one(ran):
    folder, metrics = ran
    rows = {name: row for name, row in metrics.items() if isinstance(row, dict) and "MB" in row}
    assert list(rows) == list(export_figure.LABELS)
    assert rows["eager"]["of eager"] == 1
    for name in ("eager", "onnx, fp32"):
        assert rows[name]["argmax as eager, %"] == 100
        assert rows[name]["greedy tokens as eager"] == metrics["greedy tokens"] == 3
    fp32 = rows["onnx, fp32"]
    assert fp32["perplexity"] == pytest.approx(rows["eager"]["perplexity"], rel=1e-4)
    assert 0 < fp32["largest difference of logits"] < 1e-4
    assert rows["step_4bit"]["MB"] < rows["step_8bit"]["MB"] < 0.7 * rows["onnx, fp32"]["MB"]
    assert "perplexity, one token a pass" in rows["int8_chosen"]
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "export.png",
        "metrics.json",
        "step_8bit.onnx",
    ]
    assert json.loads((folder / "metrics.json").read_text())["greedy tokens"] == 3


def test_the_figure_has_a_bar_for_each_kind_and_a_point_for_each_format(ran):
    _, metrics = ran
    rows = {name: metrics[name] for name in export_figure.LABELS}
    lost = {"q": 0.001, "down": 0.4, "head": -0.1}
    figure = export_figure.draw(lost, 0.1, rows)
    left, right = figure.axes
    widths = [bar.get_width() for bar in left.patches]
    colours = [bar.get_facecolor() for bar in left.patches]
    points = [tuple(x.get_offsets()[0]) for x in right.collections]
    plt.close(figure)
    assert widths == [0.001, 0.4, 1e-4]
    assert colours[0] == colours[2] != colours[1]
    assert points == [(row["ms a token"], row["perplexity"]) for row in rows.values()]


def test_bad_flags_are_one_line(tmp_path):
    for flags in ({"rounds": 0}, {"length": 1}, {"past": -1}, {"layers": 99}):
        with pytest.raises(UserError, match=f"--{next(iter(flags))}"):
            export.main(export.Config(**flags, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
