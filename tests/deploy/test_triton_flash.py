"""deploy/triton_flash.py, triton_flash_backward.py: FlashAttention-2 against torch and transformers, interpreted."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from deploy import triton_flash
from deploy.triton_flash import flash_attention
from tests.conftest import gradients
from utils.run import UserError

# B, H, K, T, S, D, causal: tiles that are not full, grouped-query heads, fewer queries than keys, many tiles
CASES = {
    "one tile": (2, 2, 2, 20, 20, 64, False),
    "causal": (1, 2, 2, 150, 150, 64, True),
    "grouped-query": (2, 6, 2, 70, 70, 64, True),
    "last queries": (1, 2, 1, 140, 200, 64, True),
    "one query": (2, 2, 1, 1, 90, 64, True),
    "more queries than keys": (1, 2, 2, 140, 45, 64, False),
    "heads of 128": (1, 2, 1, 140, 140, 128, True),
}


def inputs(B, H, K, T, S, D, dtype=torch.float32):
    shapes = [(B, H, T, D), (B, K, S, D), (B, K, S, D), (B, H, T, D)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def reference(q, k, v, causal, scale=None):
    """torch's attention in float64; the last query sees all keys."""
    T, S = q.shape[2], k.shape[2]
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T) if causal else None
    wide = [x.double() for x in (q, k, v)]
    return F.scaled_dot_product_attention(*wide, mask, scale=scale, enable_gqa=True)


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_torch(name, parity):
    *shape, causal = CASES[name]
    q, k, v, weight = inputs(*shape)
    mine = flash_attention(q, k, v, causal)
    theirs = reference(q, k, v, causal)
    about = f"torch scaled_dot_product_attention, {name}"
    parity("Triton attention", "triton_flash.flash_attention", about, mine, theirs)
    ours = torch.autograd.grad(mine, (q, k, v), weight)
    wanted = torch.autograd.grad(theirs, (q, k, v), weight.double())
    parity("Triton attention", "triton_flash.flash_attention, gradients", about, ours, wanted)


def test_logsumexp_is_saved_and_no_scores(parity):
    """What is kept for the backward pass: q, k, v, out, and one number a row."""
    q, k, v, _ = inputs(1, 4, 2, 150, 150, 64)
    out = flash_attention(q, k, v, is_causal=True, scale=0.3)
    kept = out.grad_fn.saved_tensors
    assert [x.shape for x in kept] == [q.shape, k.shape, v.shape, q.shape, q.shape[:3]]
    s = 0.3 * q @ k.repeat_interleave(2, 1).transpose(2, 3)
    hidden = torch.ones(150, 150, dtype=torch.bool).triu(1)
    wanted = s.masked_fill(hidden, -float("inf")).logsumexp(-1)
    parity(
        "Triton attention", "triton_flash.flash_forward, lse", "torch logsumexp", kept[4], wanted
    )
    torch.testing.assert_close(out, reference(q, k, v, True, 0.3).float())


def test_large_scores_do_not_overflow():
    """exp(300) is no number of float32; the largest score comes last, so that all sums are corrected."""
    q, k, v, weight = inputs(1, 1, 1, 40, 200, 64)
    with torch.no_grad():
        q.mul_(30)
        k.mul_(torch.linspace(0.1, 1, 200)[:, None])
    found = flash_attention(q, k, v)
    wanted = reference(q, k, v, False)
    assert (q @ k.transpose(2, 3)).max() / 8 > 100
    torch.testing.assert_close(found, wanted.float(), atol=1e-4, rtol=1e-4)
    mine = torch.autograd.grad(found, (q, k, v), weight)
    theirs = torch.autograd.grad(wanted, (q, k, v), weight.double())
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_tiles_beyond_the_diagonal_are_not_read():
    """What is not a number there would make a sum of none: 0 x nan is nan."""
    q, k, v, weight = inputs(1, 1, 1, 256, 256, 64)
    with torch.no_grad():
        v[:, :, 128:] = float("nan")
    out = flash_attention(q, k, v, is_causal=True)
    (dq,) = torch.autograd.grad(out, q, weight)
    for rows in (out, dq):
        assert rows[:, :, :128].isfinite().all() and rows[:, :, 128:].isnan().all()


def test_queries_before_the_diagonal_are_not_read():
    q, k, v, weight = inputs(1, 1, 1, 256, 256, 64)
    with torch.no_grad():
        weight[:, :, :128] = float("nan")
    out = flash_attention(q, k, v, is_causal=True)
    for gradient in torch.autograd.grad(out, (k, v), weight):
        assert gradient[:, :, 128:].isfinite().all() and gradient[:, :, :128].isnan().all()


def test_bf16_in_and_out_and_nearly_as_exact_as_torch():
    q, k, v, weight = inputs(1, 4, 2, 140, 140, 64, torch.bfloat16)
    exact = reference(q, k, v, True)
    mine = flash_attention(q, k, v, is_causal=True)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    wanted = torch.autograd.grad(exact, (q, k, v), weight.double(), retain_graph=True)
    ours = torch.autograd.grad(mine, (q, k, v), weight)
    others = torch.autograd.grad(theirs, (q, k, v), weight)
    for a, b, c in zip((mine, *ours), (theirs, *others), (exact, *wanted)):
        assert a.dtype == torch.bfloat16
        # the interpreter cuts bits off where a GPU rounds: twice the error
        assert (a - c).abs().max() <= 2.5 * (b - c).abs().max()


def test_heads_that_do_not_lie_together():
    """A model hands in (B,T,H,D) with two axes swapped, and a gradient of that kind."""
    B, H, T, D = 2, 3, 40, 64
    q, k, v, weight = (torch.randn(B, T, H, D, requires_grad=True) for _ in range(4))
    turned = [x.transpose(1, 2) for x in (q, k, v, weight)]
    mine = flash_attention(*turned[:3], is_causal=True)
    theirs = reference(*turned[:3], True)
    torch.testing.assert_close(mine, theirs.float())
    ours = torch.autograd.grad(mine, (q, k, v), turned[3])
    wanted = torch.autograd.grad(theirs, (q, k, v), turned[3].double())
    for a, b in zip(ours, wanted):
        torch.testing.assert_close(a, b)


@pytest.fixture(scope="module")
def llamas():
    """A small Llama with heads of 64, with the attention of torch and with the kernels."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=64, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=None, bos_token_id=None, pad_token_id=0,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    triton_flash.register()
    ours = copy.deepcopy(model)
    ours.set_attn_implementation("triton")
    return model, ours


def test_a_model_of_transformers_learns_with_these_kernels(llamas, parity):
    model, ours = llamas
    ids = torch.randint(1, 60, (2, 45))
    names = "triton_flash.register", "transformers LlamaForCausalLM, sdpa"
    mine = ours(ids, labels=ids)
    theirs = model(ids, labels=ids)
    parity("Triton attention", *names, mine.logits, theirs.logits)
    ours, theirs = gradients(ours, mine.loss), gradients(model, theirs.loss)
    parity("Triton attention", f"{names[0]}, gradients", names[1], ours, theirs)


def test_generation_with_a_cache_is_that_of_torch(llamas):
    """One query against all keys in the cache at each step."""
    model, ours = llamas
    ids = torch.randint(1, 60, (2, 12))
    about = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert ours.generate(ids, **about).equal(model.generate(ids, **about))


def test_what_the_kernels_do_not_know_is_refused(llamas):
    _, ours = llamas
    padding = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with pytest.raises(UserError, match="padded prompts: these kernels take"):
        ours(torch.ones(2, 3, dtype=torch.long), attention_mask=padding)
    q, k, v, _ = inputs(1, 2, 2, 8, 8, 64)
    for name, says in (("sliding_window", "a sliding window"), ("dropout", "no dropout")):
        with pytest.raises(UserError, match=says):
            triton_flash.transformers_attention(None, q, k, v, None, **{name: 4})
    wrong = {
        "heads of 32 numbers: these kernels know": (q[..., :32], k[..., :32], v[..., :32]),
        "3 heads of queries are no multiple of 2": (torch.zeros(1, 3, 8, 64), k, v),
        "8 queries are more than 5 keys": (q, k[:, :, :5], v[:, :, :5]),
        "need one shape": (q, k, v[:, :, :5]),
        "needs a query and a key": (q[:, :, :0], k, v),
        "need one type": (q, k, v.half()),
    }
    for says, tensors in wrong.items():
        with pytest.raises(UserError, match=says):
            flash_attention(*tensors, is_causal=True)
