"""deploy/low_bit.py: bytes, perplexity at once and decoded, products alone; the study from flags to figure."""

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F

from deploy import low_bit, perplexity
from deploy.llama import Llama
from deploy.low_bit_gguf import read_smollm2
from deploy.low_bit_layers import Int4Linear, int4_layers, int4_smollm2
from tests import llamas
from tests.deploy.test_low_bit_layers import tiny
from utils import pretrained
from utils.run import UserError


def test_bytes_are_those_of_the_format():
    """Half a byte a weight and 4 for each 32; of the head twice as many; int8 twins are held and not read."""
    weights = 2 * (128 * 128 * 2 + 2 * 64 * 128 + 3 * 128 * 192)
    norms = 4 * 5 * 128
    head = 128 * 128 * (1 + 2 * 4 / 32)  # 120 rows, in blocks of 64
    llama = Llama(int4_layers(tiny()))
    read = weights * (1 / 2 + 4 / 32) + norms + head
    assert low_bit.bytes_read(llama) == read
    table = 120 * (128 + 2 * 128 / 32)
    angles = 4 * len(llama.inv_freq)
    assert low_bit.size(llama) == read + table + angles
    both = Llama(int4_layers(tiny(), prefill_int8=True))
    assert low_bit.bytes_read(both) == read
    rows = 2 * (128 * 2 + 2 * 64 + 2 * 192 + 128)
    assert low_bit.size(both) - low_bit.size(llama) == weights + 4 * rows
    # a tied table is read as head; a float32 number has four bytes
    full = Llama(tiny())
    assert low_bit.bytes_read(full) == 4 * (weights + 120 * 128) + norms
    assert low_bit.size(full) == low_bit.bytes_read(full) + angles


def test_decoded_perplexity_is_that_of_the_second_half(monkeypatch, parity):
    model = tiny()
    ids = torch.randint(3, 120, (5, 12))
    monkeypatch.setattr(low_bit, "FEW", 2)  # in three parts
    logits = model(ids).logits[:, 5:-1]
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 6:].flatten())
    mine = torch.tensor(low_bit.perplexity_decoded(Llama(model), ids))
    parity("Low-bit", "low_bit.perplexity_decoded", "LlamaForCausalLM", mine, loss.exp(), 1e-3)


def test_products_are_measured_with_every_layer_and_so_many_rows(monkeypatch):
    llama = Llama(tiny())
    seen = []
    for layer in llama.layers:
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            hook = lambda module, args, name=name: seen.append((name, args[0].shape[0]))  # noqa: E731
            getattr(layer, name).register_forward_pre_hook(hook)
    monkeypatch.setattr(low_bit.cache_costs, "fastest", lambda action: action() or 1.0)
    assert low_bit.compare_rows({"fp32": llama}, (1, 5))["fp32"] == {
        "1 rows, ms": 1000,
        "5 rows, ms": 1000,
    }
    assert len(seen) == 2 * 2 * 7 and {n for n, _ in seen[:7]} == set("qkvo") | {
        "gate",
        "up",
        "down",
    }
    assert [rows for _, rows in seen] == [1] * 14 + [5] * 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with the real tokenizer."""
    path = tmp_path_factory.mktemp("tiny")
    tokenizer = llamas.tokenizer()
    tiny(vocabulary=len(tokenizer)).to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def config(folder, path, **more):
    small = {"prompt": 8, "max_new_tokens": 3, "rounds": 1, "rows": (1, 4), "held_out": 2}
    return low_bit.Config(model=folder, length=16, out=str(path / "out"), **small | more)


def test_the_study_measures_five_ways(folder, tmp_path, monkeypatch):
    def once(action):
        action()
        return 1e-3

    monkeypatch.setattr(low_bit.cache_costs, "fastest", once)
    found = low_bit.main(config(folder, tmp_path))
    names = ["fp32", "bf16", "int8", "int4", "int4 + int8"]
    for name in names:
        assert found[name]["prefill, ms"] > 0 and found[f"{name}, fused"]["a token, ms"] > 0
        assert abs(found[name]["perplexity"] / found["fp32"]["perplexity"] - 1) < 0.1
        assert (
            abs(found[name]["perplexity, decoded"] / found["fp32"]["perplexity, decoded"] - 1) < 0.1
        )
    # each from its own model
    assert len({found[name]["perplexity"] for name in names}) == 5
    assert len({found[name]["perplexity, decoded"] for name in names}) == 5
    held = [found[name]["MB held"] for name in names]
    assert held[0] == pytest.approx(2 * held[1], rel=1e-3) and held[3] < held[4] < held[0]
    assert found["int4, layers alone"] == {"1 rows, ms": 1, "4 rows, ms": 1}
    assert (tmp_path / "out/low_bit.png").is_file() and not plt.get_fignums()


def test_smollm2_keeps_the_codes_of_its_file(monkeypatch):
    """Other models are rounded to codes of their own."""
    made = []
    for name in ("int4_smollm2", "int4_layers"):
        call = lambda model, prefill_int8=False, name=name: made.append((name, prefill_int8))  # noqa: E731
        monkeypatch.setattr(low_bit, name, call)
    low_bit.variants(tiny(), "smollm2")
    low_bit.variants(tiny(), "a/folder")
    assert made == [(n, both) for n in ("int4_smollm2", "int4_layers") for both in (False, True)]


@pytest.mark.long
def test_int4_of_smollm2_predicts_as_bf16_does():
    tokenizer, model = pretrained.smollm2()
    _, held_out = perplexity.texts_of(tokenizer, 1, 2, 128)
    before = perplexity.perplexity(model, held_out)
    table = model.model.embed_tokens.weight.clone()
    int4_smollm2(model)
    assert abs(perplexity.perplexity(model, held_out) / before - 1) < 0.03
    # scales as they are in the file, which weights in bf16 no longer know
    assert type(model.model.layers[0].mlp.up_proj) is Int4Linear
    _, scale = read_smollm2(model.config)["lm_head"]
    assert torch.equal(model.get_input_embeddings().scale.float(), scale)
    ids = torch.tensor([5, 49000])
    assert torch.equal(model.get_input_embeddings()(ids).bfloat16(), table[ids])


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"prompt": 0}, "start at 1"),
        ({"max_new_tokens": 1}, "new tokens at 2"),
        ({"rows": ()}, "--rows"),
        ({"rows": (1, 0)}, "start at 1"),
        ({"rounds": 0}, "start at 1"),
        ({"held_out": 0}, "start at 1"),
        ({"length": 1}, "--length"),
        ({"length": 300}, "300 tokens, but the model has 128"),
        ({"prompt": 127}, "130 tokens, but the model has 128"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(flags, says, folder, tmp_path):
    about = {"model": folder, "out": str(tmp_path / "out"), "prompt": 8, "max_new_tokens": 3}
    with pytest.raises(UserError, match=says):
        low_bit.main(low_bit.Config(**about | {"length": 16} | flags))
    assert not (tmp_path / "out").exists()
