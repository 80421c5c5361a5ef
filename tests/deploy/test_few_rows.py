"""deploy/few_rows.py: the same products in another order, and only where it is quicker."""

import pytest
import torch
import torch.nn.functional as F

from deploy import few_rows, kv_cache
from deploy.caches import GrowingCache
from deploy.llama import Llama
from tests import llamas
from tests.deploy.test_decode import talker


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_few_rows_are_those_of_linear(rows, bias, parity):
    torch.manual_seed(rows)
    x = torch.randn(1, rows, 24)
    weight = torch.randn(40, 24)
    added = torch.randn(40) if bias else None
    mine = few_rows.few_rows_linear(x, weight, added)
    assert mine.is_contiguous()
    name = f"few_rows.few_rows_linear, {rows} rows{', bias' if bias else ''}"
    parity("KV cache", name, "torch.nn.functional.linear", mine, F.linear(x, weight, added))


def test_rows_that_do_not_lie_one_after_the_other():
    """What comes from a product the other way round, a piece of a longer text, a batch."""
    torch.manual_seed(0)
    weight = torch.randn(7, 24)
    for x in (torch.randn(24, 3).T, torch.randn(6, 24)[::2], torch.randn(2, 2, 24).transpose(0, 1)):
        torch.testing.assert_close(few_rows.linear(x, weight), F.linear(x, weight))


def test_only_few_rows_in_float32_go_the_other_way_round(monkeypatch):
    seen = []

    def note(x, weight, bias=None):
        seen.append((x.dtype, x.shape[-2]))
        return F.linear(x, weight, bias)

    monkeypatch.setattr(few_rows, "few_rows_linear", note)
    weight = torch.randn(7, 24)
    for rows in (1, 4, 5, 64):
        few_rows.linear(torch.randn(1, rows, 24), weight)
        few_rows.linear(torch.randn(1, rows, 24).bfloat16(), weight.bfloat16())
    # five rows in two sequences
    few_rows.linear(torch.randn(5, 1, 24), weight)
    assert seen == [(torch.float32, 1), (torch.float32, 4)]


@pytest.mark.parametrize("bias", [False, True])
def test_a_llama_with_few_rows_says_the_same(bias, parity):
    """All linear layers are exchanged, those of the transformers model are not, and weights are shared."""
    model = llamas.tiny(bias=bias) if bias else talker()
    plain = Llama(model)
    quick = few_rows.use_few_rows(Llama(model))
    kinds = [type(m) for m in quick.modules()]
    assert kinds.count(few_rows.FewRowsLinear) == 7 * len(model.model.layers) + 1
    assert torch.nn.Linear not in kinds
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert quick.head.weight is model.lm_head.weight
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    mine = kv_cache.generate(quick, ids, 20, GrowingCache(quick))
    theirs = kv_cache.generate(plain, ids, 20, GrowingCache(plain))
    name = f"few_rows.use_few_rows{', biases' if bias else ''}, greedy tokens"
    parity("KV cache", name, "llama.Llama", mine, theirs, 0)


def test_other_layers_stay_as_they_are():
    """Quantised layers have products of their own."""

    class Quantised(torch.nn.Linear):
        pass

    llama = Llama(talker())
    kept = Quantised(32, 32)
    llama.layers[0].q = kept
    few_rows.use_few_rows(llama)
    assert llama.layers[0].q is kept
    assert type(llama.layers[0].k) is few_rows.FewRowsLinear
