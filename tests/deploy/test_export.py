"""deploy/export*.py: the exported step is the model for any sizes, and quantised files lose what they say."""

import json
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import onnx
import pytest
import torch

from deploy import export, export_figure, export_int8, export_onnx, export_step, kv_cache
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


def test_a_tied_head_would_hide_behind_a_transpose(tmp_path):
    """The weight of the head is no input of its product then, and quantisers leave it."""
    # large enough that the exporter does not fold the Transpose away
    tied = llamas.tiny(vocabulary=16384)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    step = DecodeStep(tied, 1)
    assert torch.equal(step.llama.head.weight, tied.lm_head.weight)
    good = export_onnx.write(export_step.export_step(step), tmp_path / "good.onnx", *step.names())
    assert list(export_int8.kinds_of_nodes(onnx.load(good).graph).values())[-1] == "head"
    step.llama.head = tied.lm_head
    bad = export_onnx.write(export_step.export_step(step), tmp_path / "bad.onnx", *step.names())
    with pytest.raises(UserError, match="7 products with weights: not those of a decoder"):
        export_int8.kinds_of_nodes(onnx.load(bad).graph)


def test_kinds_of_nodes_name_the_layers_whose_weights_they_have(path, step):
    graph = onnx.load(path).graph
    weights = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    inputs = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    modules = export_int8.linear_layers(step)
    seen = dict.fromkeys(modules, 0)
    for node, kind in export_int8.kinds_of_nodes(graph).items():
        layer = modules[kind][seen[kind]]
        assert np.array_equal(weights[inputs[node]], layer.weight.numpy().T), node
        seen[kind] += 1
    assert seen == {kind: len(layers) for kind, layers in modules.items()}


@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_dynamic_quantisation_is_that_of_onnx(parity, tmp_path, shift):
    """Also where all numbers have one sign: the range holds 0."""
    make, kinds = onnx.helper, onnx.TensorProto
    nodes = [
        make.make_node("DynamicQuantizeLinear", ["x"], ["c", "s", "z"]),
        make.make_node("DequantizeLinear", ["c", "s", "z"], ["y"]),
    ]
    x_info = make.make_tensor_value_info("x", kinds.FLOAT, [None, None])
    y_info = make.make_tensor_value_info("y", kinds.FLOAT, [None, None])
    graph = make.make_graph(nodes, "rounding", [x_info], [y_info])
    about = {"opset_imports": [make.make_opsetid("", 18)], "ir_version": 10}
    onnx.save(make.make_model(graph, **about), tmp_path / "rounding.onnx")
    x = torch.randn(40, 50) + shift
    (theirs,) = export_onnx.run_session(export_onnx.session(tmp_path / "rounding.onnx"), {"x": x})
    mine = export_int8.dynamic_quantise(x)
    parity("Export", f"export_int8.dynamic_quantise, mean {shift:g}", "onnx", mine, theirs, 1e-6)
    assert mine.unique().numel() <= 256
    # one number a hundred times larger, and the others are rounded to little or nothing
    x[0, 0] = 100 * x.abs().max()
    off = (export_int8.dynamic_quantise(x) - x).abs()
    assert off.max() > 20 * (mine - (x.where(x < 100, mine))).abs().median()
    assert torch.equal(export_int8.dynamic_quantise(torch.zeros(3)), torch.zeros(3))


@pytest.fixture(scope="module")
def outliers(tmp_path_factory):
    """The same function with outliers in the input of each `down`: some channels of `up` times 300, and the columns of
    `down` that read them through 300 -> (step, path of its file, ids to choose, ids to judge)."""
    made = talker()
    for layer in made.model.layers:
        layer.mlp.up_proj.weight.data[:2] *= 300
        layer.mlp.down_proj.weight.data[:, :2] /= 300
    step = DecodeStep(made)
    target = tmp_path_factory.mktemp("outliers") / "step.onnx"
    export_onnx.write(export_step.export_step(step), target, *step.names())
    torch.manual_seed(3)
    # texts that the model itself would write: there it has opinions
    texts = [export_step.generate(step, torch.randint(3, 120, (1, 2)), 40) for _ in range(6)]
    texts = torch.cat(texts)
    return step, target, texts[:3], texts[3:]


def agreement(file, step, ids):
    """Fraction of argmax tokens as eager."""
    _, mine = export_int8.score(OnnxStep(file, step).logits, ids)
    _, eager = export_int8.score(step.logits, ids)
    return float((mine == eager).float().mean())


def test_the_default_of_dynamic_int8_breaks_the_model_and_a_choice_mends_it(outliers, tmp_path):
    step, source, to_choose, held_out = outliers
    lost = export_int8.sensitivity(step, to_choose)
    assert max(lost, key=lost.get) == "down"
    others = [nats for kind, nats in lost.items() if kind != "down"]
    assert lost["down"] > 3 * max(others)
    chosen = [kind for kind in lost if kind != "down"]
    broken = export_int8.write_dynamic(source, tmp_path / "default.onnx")
    mended = export_int8.write_chosen(source, tmp_path / "chosen.onnx", chosen)
    assert agreement(source, step, held_out) == 1
    assert agreement(broken, step, held_out) < 0.8
    assert agreement(mended, step, held_out) > agreement(broken, step, held_out) + 0.1
    # two products stay as they are, the others are in integers
    ops = [node.op_type for node in onnx.load(mended).graph.node]
    assert ops.count("MatMulInteger") == 13
    left = export_int8.kinds_of_nodes(onnx.load(source).graph)
    names = {node.name for node in onnx.load(mended).graph.node if node.op_type == "MatMul"}
    assert {left[name] for name in names if name in left} == {"down"}


def test_sensitivity_leaves_the_step_as_it_was(step):
    ids = torch.randint(3, 120, (2, 9))
    before = step.logits(ids[:1])
    lost = export_int8.sensitivity(step, ids)
    assert list(lost) == ["q", "k", "v", "o", "gate", "up", "down", "head"]
    assert torch.equal(step.logits(ids[:1]), before)
    with export_int8.quantised_inputs([step.llama.head]):
        assert not torch.equal(step.logits(ids[:1]), before)


def test_score_is_cross_entropy_of_the_next_tokens(step, model):
    ids = torch.randint(3, 120, (3, 9))
    nats, tokens = export_int8.score(step.logits, ids)
    with torch.no_grad():
        theirs = model(ids, labels=ids)
    assert nats == pytest.approx(float(theirs.loss), rel=1e-5)
    assert torch.equal(tokens, theirs.logits[:, :-1].argmax(-1))
    assert export_int8.perplexity(nats) == pytest.approx(float(theirs.loss.exp()), rel=1e-5)


def test_blocks_of_eight_bits_are_close_and_of_four_are_not(path, step, tmp_path):
    ids = torch.randint(3, 120, (1, 9))
    full = step.logits(ids)
    off = {}
    for bits in (8, 4):
        file = export_int8.write_blocks(path, tmp_path / f"{bits}.onnx", bits, 16)
        off[bits] = float((OnnxStep(file, step).logits(ids) - full).abs().mean() / full.std())
        nodes = [n for n in onnx.load(file).graph.node if n.op_type == "MatMulNBits"]
        assert len(nodes) == 15
        for node in nodes:
            about = {x.name: x.i for x in node.attribute}
            assert (about["bits"], about["block_size"], about["accuracy_level"]) == (bits, 16, 4)
    assert off[8] < 0.1 < off[4]


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


def test_files_that_are_none_and_bad_numbers(path, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x01not a graph")
    with pytest.raises(UserError, match="onnxruntime cannot read"):
        export_onnx.session(tmp_path / "bad.onnx")
    with pytest.raises(UserError, match="no ONNX file at"):
        export_onnx.session(tmp_path / "none.onnx")
    for bits, block, says in ((3, 32, "kernels for 4 and 8"), (8, 24, "16, 32, 64"), (8, 8, "16")):
        with pytest.raises(UserError, match=says):
            export_int8.write_blocks(path, tmp_path / "x.onnx", bits, block)


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
