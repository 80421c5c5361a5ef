"""deploy/export_int8.py: dynamic int8 breaks a model with outliers, a choice mends it, blocks have kernels."""

import numpy as np
import onnx
import pytest
import torch

from deploy import export_int8, export_onnx, export_step
from deploy.export_step import DecodeStep, OnnxStep
from tests import llamas
from tests.deploy.test_decode import talker
from utils.run import UserError


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


@pytest.fixture(scope="module")
def step(outliers):
    return outliers[0]


@pytest.fixture(scope="module")
def path(outliers):
    return outliers[1]


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


def test_score_is_cross_entropy_of_the_next_tokens():
    ids = torch.randint(3, 120, (3, 9))
    model = talker()
    nats, tokens = export_int8.score(DecodeStep(model).logits, ids)
    with torch.no_grad():
        theirs = model(ids, labels=ids)
    assert nats == pytest.approx(float(theirs.loss), rel=1e-5)
    assert torch.equal(tokens, theirs.logits[:, :-1].argmax(-1))
    assert export_int8.perplexity(nats) == pytest.approx(float(theirs.loss.exp()), rel=1e-5)


def test_blocks_of_eight_bits_are_close_and_of_four_are_not(tmp_path):
    step = DecodeStep(talker())
    path = tmp_path / "step.onnx"
    export_onnx.write(export_step.export_step(step), path, *step.names())
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


def test_bad_numbers_of_blocks_are_one_line(path, tmp_path):
    for bits, block, says in ((3, 32, "kernels for 4 and 8"), (8, 24, "16, 32, 64"), (8, 8, "16")):
        with pytest.raises(UserError, match=says):
            export_int8.write_blocks(path, tmp_path / "x.onnx", bits, block)
