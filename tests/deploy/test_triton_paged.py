"""deploy/triton_paged.py: attention over block tables, interpreted, against the paged cache and the engine."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deploy import triton_paged
from deploy.engine import Engine
from deploy.llama import Llama, attention
from deploy.paged_cache import PagedCache, Part
from deploy.triton_attention_builds import paged_build
from deploy.triton_builds import compiled
from deploy.triton_paged import TritonPagedCache, paged_attention
from utils.run import UserError

# H, K, D, tokens of a block, tokens of each sequence, parts
CASES = {
    "blocks of 8": (6, 2, 64, 8, (1, 70, 300), None),
    "blocks of 16, heads of 128": (4, 4, 128, 16, (130, 64, 65), None),
    "blocks of 5": (9, 3, 64, 5, (64, 3), None),
    "seventeen queries a head": (17, 1, 64, 8, (33, 80), None),
    "parts without tokens": (4, 2, 64, 16, (200, 3), 5),
    "a part for 512 tokens": (2, 1, 64, 16, (1100, 40), None),
}


def stored(H, K, D, size, lengths, dtype=torch.float32):
    """Queries, blocks of random keys and values, shuffled block tables and lengths."""
    B, W = len(lengths), -(-max(lengths) // size)
    N = B * W + 3
    q = torch.randn(B, H, D, dtype=dtype)
    keys, values = torch.randn(2, N, size, K, D, dtype=dtype)
    tables = torch.randperm(N)[: B * W].view(B, W)
    return q, keys, values, tables, torch.tensor(lengths)


def gathered(q, keys, values, tables, lengths, scale=1.0):
    """The attention of the paged cache: blocks are gathered, tokens past the end are masked."""
    size = keys.shape[1]
    mask = torch.arange(tables.shape[1] * size) < lengths[:, None, None, None]
    k, v = (x[tables].flatten(1, 2).transpose(1, 2) for x in (keys, values))
    return attention(scale * q[:, :, None], k, v, mask)[:, :, 0]


@pytest.mark.parametrize("name", CASES)
def test_attention_is_that_of_the_gathered_blocks(name, parity):
    *about, parts = CASES[name]
    everything = stored(*about)
    mine = paged_attention(*everything, parts=parts)
    names = "triton_paged.paged_attention", f"own llama.attention, gathered blocks, {name}"
    parity("Triton attention", *names, mine, gathered(*everything))


def test_a_long_sequence_is_split_and_a_short_one_is_not(monkeypatch):
    grids = []

    class Watched:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    kernel = triton_paged.paged_part
    monkeypatch.setattr(triton_paged, "paged_part", Watched())
    for length in (512, 513):
        paged_attention(*stored(2, 2, 64, 1, (length, 5)))
    assert grids == [(2, 2, 1), (2, 2, 2)]


def test_blocks_of_others_and_past_the_end_are_not_read():
    """What is not a number there would make a sum of none."""
    q, keys, values, tables, lengths = stored(4, 2, 64, 8, (70, 13))
    wanted = paged_attention(q, keys, values, tables, lengths)
    mine = torch.zeros(len(keys), 8, dtype=torch.bool)
    for table, length in zip(tables, lengths):
        for i in range(int(length)):
            mine[table[i // 8], i % 8] = True
    keys[~mine] = float("nan")
    values[~mine] = float("nan")
    assert paged_attention(q, keys, values, tables, lengths).equal(wanted)


def test_scale_and_bf16():
    everything = stored(6, 2, 64, 8, (90, 40))
    mine = paged_attention(*everything, scale=0.25)
    torch.testing.assert_close(mine, gathered(*everything, scale=0.25 * 8))
    half = [x.bfloat16() if x.is_floating_point() else x for x in everything]
    mine = paged_attention(*half)
    assert mine.dtype == torch.bfloat16
    exact = gathered(*(x.double() if x.is_floating_point() else x for x in half))
    torch.testing.assert_close(mine.double(), exact, atol=0, rtol=2**-7)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=48, intermediate_size=48, num_hidden_layers=2, head_dim=64, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_a_step_of_the_cache_with_new_tokens_and_chunks(model, parity):
    """Two sequences with one new token, and a chunk of a prompt between them."""
    llama = Llama(model)
    caches = [kind(llama, blocks=12, size=4) for kind in (TritonPagedCache, PagedCache)]
    parts = [Part([3, 7, 1], 9, 1), Part([2, 5], 3, 4), Part([8], 0, 1)]
    keys, values = torch.randn(2, *caches[0].keys.shape)
    q = torch.randn(1, 6, 6, 64)
    k, v = torch.randn(2, 1, 2, 6, 64)
    found = []
    for cache in caches:
        cache.keys.copy_(keys)
        cache.values.copy_(values)
        cache.begin(parts)
        found.append(cache.attend(1, q, k, v))
    names = "triton_paged.TritonPagedCache.attend", "own PagedCache.attend"
    parity("Triton attention", *names, *found)


def test_answers_of_the_engine_are_those_without_the_kernel(model, parity, monkeypatch):
    """Shared beginnings, blocks that are copied, chunks of prompts: the cache alone is another."""
    calls = []

    def counted(*about):
        calls.append(len(about[0]))
        return paged_attention(*about)

    monkeypatch.setattr(triton_paged, "paged_attention", counted)
    prompts = [[5] * 9 + [i] for i in range(6)] + [list(range(1, 40))]
    found = {}
    for kind in (TritonPagedCache, PagedCache):
        engine = Engine(model, blocks=60, block_size=4, max_batch=4, max_tokens=16, cache=kind)
        found[kind] = engine.generate(prompts, 8)
    # at most two layers a step, and nothing for the engine without
    assert 4 in calls and len(calls) <= 2 * engine.steps
    names = "triton_paged.TritonPagedCache, tokens of the engine", "own PagedCache"
    mine, theirs = (torch.tensor(found[kind]) for kind in (TritonPagedCache, PagedCache))
    parity("Triton attention", *names, mine, theirs, 0)


def test_no_registers_are_spilled():
    """Blocks of 8 and 16 tokens, heads of 64 and 128, on an A100 and an H100."""
    for D, size, arch in ((64, 8, 80), (128, 16, 90)):
        built = paged_build(D, 4, 4, size)
        ((found,),) = (by_arch.values() for by_arch in compiled([built], [arch]).values())
        assert found["spills"] == 0 and found["mma"] > 0


def test_shapes_that_do_not_fit_are_refused():
    q, keys, values, tables, lengths = stored(4, 2, 64, 8, (20, 13))
    wrong = {
        "differ in shape": (q[..., :32], keys, values, tables, lengths),
        "a power of two, 16 or more": (*(x[..., :48] for x in (q, keys, values)), tables, lengths),
        "3 heads of queries are no multiple of 2": (q[:, :3], keys, values, tables, lengths),
        "2 queries need as many": (q, keys, values, tables[:1], lengths),
    }
    for says, everything in wrong.items():
        with pytest.raises(UserError, match=says):
            paged_attention(*everything)
