"""deploy/low_bit_gguf.py: codes as the gguf package writes and reads them, and those of SmolLM2's own file."""

from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from deploy import low_bit_gguf
from deploy.low_bit_gguf import (
    dequantise_q4_1,
    dequantise_q8_0,
    q4_1,
    q8_0,
    read_q4_1,
    read_q8_0,
    read_smollm2,
    unpermute,
)
from utils import assets, pretrained
from utils.run import UserError


@pytest.fixture(scope="module")
def model():
    return pretrained.smollm2()[1]


@pytest.fixture(scope="module")
def found(model):
    return read_smollm2(model.config)


@pytest.fixture
def weight():
    """With a block of equal weights, a row of zeros, and halves that are rounded."""
    weight = torch.randn(9, 96)
    weight[2, 32:64] = 0.5
    weight[3] = 0
    weight[4, :32] = torch.arange(32) - 15.5
    weight[4, 0] = 127
    return weight


def test_codes_are_those_that_the_gguf_package_writes(weight, parity):
    raw = torch.from_numpy(gguf.quants.quantize(weight.numpy(), Kind.Q4_1))
    parity("Low-bit", "low_bit_gguf.q4_1", "gguf.quants.quantize", q4_1(weight), read_q4_1(raw), 0)
    raw = torch.from_numpy(gguf.quants.quantize(weight.numpy(), Kind.Q8_0))
    parity("Low-bit", "low_bit_gguf.q8_0", "gguf.quants.quantize", q8_0(weight), read_q8_0(raw), 0)
    assert q4_1(weight.bfloat16())[1].dtype == torch.float32


def test_weights_are_those_that_the_gguf_package_reads(weight, parity):
    raw = gguf.quants.quantize(weight.numpy(), Kind.Q4_1)
    theirs = torch.from_numpy(gguf.quants.dequantize(raw, Kind.Q4_1))
    mine = dequantise_q4_1(*read_q4_1(torch.from_numpy(raw)))
    parity("Low-bit", "low_bit_gguf.dequantise_q4_1", "gguf.quants.dequantize", mine, theirs, 0)
    raw = gguf.quants.quantize(weight.numpy(), Kind.Q8_0)
    theirs = torch.from_numpy(gguf.quants.dequantize(raw, Kind.Q8_0))
    mine = dequantise_q8_0(*read_q8_0(torch.from_numpy(raw)))
    parity("Low-bit", "low_bit_gguf.dequantise_q8_0", "gguf.quants.dequantize", mine, theirs, 0)


def test_a_block_by_hand():
    """Scale 2, minimum -1; byte i of the codes holds code i below and code 15 - i above."""
    numbers = np.array([2, -1], dtype=np.float16).tobytes()
    nibbles = bytes(i | (15 - i) << 4 for i in range(16))
    raw = torch.tensor([list(numbers + nibbles)], dtype=torch.uint8)
    codes, scale, minimum = read_q4_1(raw)
    assert codes[0].tolist() == [*range(16), *range(15, -1, -1)]
    assert scale.tolist() == [[2]] and minimum.tolist() == [[-1]]
    assert dequantise_q4_1(codes, scale, minimum)[0, :3].tolist() == [-1, 1, 3]


@pytest.mark.parametrize("heads, rows", [(9, 576), (3, 192)])
def test_rows_come_in_the_order_of_transformers(heads, rows, parity):
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    weight = torch.randn(rows, 5)
    processor = LlamaTensorProcessor({})
    theirs = torch.from_numpy(processor._reverse_permute_weights(weight.numpy(), heads, heads))
    name = "LlamaTensorProcessor._reverse_permute_weights"
    parity("Low-bit", "low_bit_gguf.unpermute", name, unpermute(weight, heads), theirs, 0)


def test_every_matrix_of_the_file_is_found_under_its_name(model, found):
    """What transformers made of the same file, rounded to bf16."""
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert found.keys() == linears and len(linears) == 30 * 7 + 1
    for name, parts in found.items():
        dequantise = dequantise_q4_1 if len(parts) == 3 else dequantise_q8_0
        weight = model.get_submodule(name).weight
        assert torch.equal(dequantise(*parts).bfloat16(), weight), name


def test_the_file_is_read_as_the_gguf_package_reads_it(found, parity):
    reader = gguf.GGUFReader(assets.fetch("smollm2") / low_bit_gguf.FILE)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    pairs = {"blk.7.ffn_down": "model.layers.7.mlp.down_proj"}
    pairs |= {"blk.29.attn_v": "model.layers.29.self_attn.v_proj"}
    mine = [dequantise_q4_1(*found[name]) for name in pairs.values()]
    theirs = []
    for name in pairs:
        tensor = tensors[f"{name}.weight"]
        theirs.append(torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
    name = "gguf.quants.dequantize, SmolLM2"
    parity("Low-bit", "low_bit_gguf.read_smollm2", name, mine, theirs, 0)


def test_with_a_zero_point_in_the_middle_the_weights_are_the_same_floats(found):
    """(c - 8) d + (m + 8 d) = c d + m, with no rounding for the numbers of this file."""
    codes, scale, minimum = found["model.layers.3.mlp.up_proj"]
    zero = minimum + 8 * scale
    shifted = (codes.unflatten(1, (-1, 32)).float() - 8) * scale[:, :, None] + zero[:, :, None]
    assert torch.equal(shifted.flatten(1), dequantise_q4_1(codes, scale, minimum))


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.0.attn_q.weight"])
def test_a_file_of_another_kind_is_refused(name, model, monkeypatch):
    tensor = SimpleNamespace(name=name, tensor_type=Kind.Q6_K, data=np.zeros((2, 2), np.uint8))
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: SimpleNamespace(tensors=[tensor]))
    with pytest.raises(UserError, match=f"{name} is Q6_K"):
        read_smollm2(model.config)
