"""KV caches: logits and tokens are those without a cache; int8 within half a step; what a window sees; costs."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, GPT2Config, LlamaConfig

from deploy import cache_costs, cache_quality, caches, kv_cache
from deploy.caches import GrowingCache, Int8Cache, NoCache, StaticCache, WindowCache
from deploy.llama import Llama, attention, rotary_angles, rotate
from tests import llamas
from utils.run import UserError

N = 40  # tokens of the texts
PIECES = [5, 1, 1, 13, 1, 9, 10]  # in which they are read
EXACT = {
    "GrowingCache": lambda llama: GrowingCache(llama),
    "StaticCache": lambda llama: StaticCache(llama, N, batch=2),
    "WindowCache, all of it in the window": lambda llama: WindowCache(llama, 4, N - 4),
}
ALL = EXACT | {
    "Int8Cache": lambda llama: Int8Cache(llama, N, batch=2),
    "WindowCache": lambda llama: WindowCache(llama, 3, 7),
    "WindowCache, no sinks": lambda llama: WindowCache(llama, 0, 7),
}


@pytest.fixture(scope="module")
def model():
    tied = llamas.tiny(layers=3, bias=True)
    # an output layer of its own and large weights: greedy tokens that are not all the same
    config = LlamaConfig(**tied.config.to_dict() | {"tie_word_embeddings": False})
    model = type(tied)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def llama(model):
    return Llama(model)


@pytest.fixture
def ids():
    return torch.randint(2, 120, (2, N))


def in_pieces(llama, ids, cache, pieces):
    parts = [llama(x, cache.positions(x.shape[1]), cache) for x in ids.split(pieces, dim=1)]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", EXACT)
def test_logits_of_a_prompt_in_pieces_are_those_without_a_cache(name, model, llama, ids, parity):
    cache = EXACT[name](llama)
    mine = in_pieces(llama, ids, cache, PIECES)
    with torch.no_grad():
        theirs = model(ids).logits
    assert cache.seen == N
    where = f"caches.{name}, prompt in pieces"
    parity("KV cache", where, "transformers.LlamaForCausalLM", mine, theirs, 1e-5)


@pytest.mark.parametrize("name", ALL)
def test_pieces_give_what_one_pass_gives(name, llama, ids):
    whole = ALL[name](llama)
    expected = in_pieces(llama, ids, whole, [N])
    cache = ALL[name](llama)
    torch.testing.assert_close(in_pieces(llama, ids, cache, PIECES), expected, atol=1e-5, rtol=1e-5)
    assert whole.bytes() == cache.bytes()


@pytest.mark.parametrize("name", ["NoCache", *EXACT])
def test_greedy_tokens_are_those_of_generate(name, model, llama, ids, parity):
    prompt = ids[:, :24]
    cache = NoCache(llama) if name == "NoCache" else EXACT[name](llama)
    mine = kv_cache.generate(llama, prompt, 16, cache)
    theirs = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=16,
        min_new_tokens=16,
        eos_token_id=None,
    )[:, 24:]
    assert len(set(mine.flatten().tolist())) > 8
    ours = f"kv_cache.generate, {name}"
    parity("KV cache", ours, "transformers.LlamaForCausalLM.generate", mine, theirs, 0)


def test_a_batch_gives_what_each_prompt_gives_alone(llama, ids):
    together = kv_cache.generate(llama, ids[:, :20], 8, StaticCache(llama, N, batch=2))
    for row in range(2):
        alone = kv_cache.generate(llama, ids[row : row + 1, :20], 8, StaticCache(llama, N))
        assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize("chunk", [1, 7, 20, 50])
def test_a_prefill_in_chunks_gives_the_same_tokens(llama, ids, chunk):
    whole = kv_cache.generate(llama, ids[:, :20], 8, GrowingCache(llama))
    cache = GrowingCache(llama)
    assert torch.equal(kv_cache.generate(llama, ids[:, :20], 8, cache, chunk), whole)
    assert cache.seen == 27


def test_each_token_is_read_once_and_without_a_cache_again_and_again(llama, ids):
    lengths = []
    hook = llama.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    kv_cache.generate(llama, ids[:, :6], 4, GrowingCache(llama))
    assert lengths == [6, 1, 1, 1]
    lengths.clear()
    kv_cache.generate(llama, ids[:, :6], 4, GrowingCache(llama), chunk=4)
    assert lengths == [4, 2, 1, 1, 1]
    lengths.clear()
    kv_cache.generate(llama, ids[:, :6], 4, NoCache(llama))
    assert lengths == [6, 7, 8, 9]
    hook.remove()


def test_keys_and_values_are_those_of_the_dynamic_cache(model, llama, ids, parity):
    cache = GrowingCache(llama)
    in_pieces(llama, ids, cache, PIECES)
    with torch.no_grad():
        theirs = model(ids, past_key_values=DynamicCache(config=model.config)).past_key_values
    layers = [(x.keys, x.values) for x in theirs.layers]
    mine = [(k, v) for k, v in zip(cache.keys, cache.values)]
    parity("KV cache", "caches.GrowingCache, keys", "transformers.DynamicCache", mine, layers, 1e-5)
    # and they have the bytes that the formula says
    held = sum(x.numel() * x.element_size() for layer in layers for x in layer)
    assert cache.bytes() == held == 2 * N * cache_costs.kv_bytes_per_token(model.config, 4)


def test_a_full_cache_says_so_and_keeps_what_it_holds(llama, ids):
    for cache in (StaticCache(llama, 10, batch=2), Int8Cache(llama, 10, batch=2)):
        in_pieces(llama, ids[:, :10], cache, 5)
        held = [x.clone() for x in cache.tensors()]
        with pytest.raises(UserError, match="full: 10 \\+ 1 tokens, it holds 10; make it longer"):
            in_pieces(llama, ids[:, 10:11], cache, 1)
        assert all(map(torch.equal, held, cache.tensors()))


def test_int8_is_off_by_half_a_step_at_most_and_reaches_it():
    x = torch.randn(500, 64) * torch.logspace(-6, 6, 500)[:, None]
    codes, scale = caches.quantise_int8(x)
    error = (caches.dequantise_int8(codes, scale) - x).abs() / scale
    assert error.max() <= 0.5 + 1e-4
    assert error.max() > 0.49
    # the largest number has the largest code, whatever its sign
    assert (codes.int().abs().amax(1) == 127).all() and codes.dtype == torch.int8
    # zeros stay zeros, and nothing is divided by zero
    codes, scale = caches.quantise_int8(torch.zeros(2, 8))
    assert not codes.any() and (scale > 0).all()


def test_int8_is_that_of_torch(parity):
    x = torch.randn(64, 32)
    codes, scale = caches.quantise_int8(x)
    zeros = torch.zeros(64, dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(x, scale[:, 0], zeros, 0, -127, 127)
    mine = caches.dequantise_int8(codes, scale)
    ours = "caches.quantise_int8, dequantise_int8"
    parity("KV cache", ours, "torch.fake_quantize_per_channel_affine", mine, theirs, 1e-6)


def test_the_int8_cache_attends_to_dequantised_keys_and_values(llama):
    q = torch.randn(2, 4, N, 8)
    k, v = torch.randn(2, 2, 2, N, 8)
    cache = Int8Cache(llama, N, batch=2)
    seen = []
    at = 0
    for count in PIECES:
        part = slice(at, at + count)
        for layer in range(3):
            found = cache.attend(layer, q[:, :, part], k[:, :, part], 2 * v[:, :, part])
        seen.append(found)
        at += count
    k = caches.dequantise_int8(*caches.quantise_int8(k))
    v = caches.dequantise_int8(*caches.quantise_int8(2 * v))
    expected = attention(q, k, v, is_causal=True)
    torch.testing.assert_close(torch.cat(seen, 2), expected, atol=1e-5, rtol=1e-5)
    # a byte a number, and 4 for each head
    number = 1 + 4 / 8
    assert cache.bytes() == 2 * N * cache_costs.kv_bytes_per_token(llama.config, number)


@pytest.mark.parametrize("sinks, window", [(0, 6), (1, 6), (4, 5), (3, 1), (4, 100)])
@pytest.mark.parametrize("pieces", [[1] * N, PIECES, [N]])
def test_a_window_is_attention_at_positions_in_the_cache(llama, sinks, window, pieces, parity):
    """Keys that are kept unrotated, those in the cache counted from 0, as the paper has it."""
    q = torch.randn(2, 4, N, 8)
    k, v = torch.randn(2, 2, 2, N, 8)
    cache = WindowCache(llama, sinks, window)
    seen = []
    for places in torch.arange(N).split(pieces):
        cos, sin = rotary_angles(cache.positions(len(places)), llama.inv_freq)
        new = [rotate(x[:, :, places], cos, sin) for x in (q, k)]
        for layer in range(3):
            found = cache.attend(layer, *new, v[:, :, places])
        seen.append(found)
        assert cache.keys[0].shape[2] == min(int(places[-1]) + 1, sinks + window)
    expected = []
    for t in range(N):
        kept = [j for j in range(t + 1) if j < sinks or j > t - window]
        cos, sin = rotary_angles(torch.arange(len(kept))[None], llama.inv_freq)
        query = rotate(q[:, :, t : t + 1], cos[:, :, -1:], sin[:, :, -1:])
        about = {"enable_gqa": True}
        keys = rotate(k[:, :, kept], cos, sin)
        expected.append(F.scaled_dot_product_attention(query, keys, v[:, :, kept], **about))
    parity(
        "KV cache",
        "caches.WindowCache.attend",
        "F.scaled_dot_product_attention, keys kept unrotated",
        torch.cat(seen, 2),
        torch.cat(expected, 2),
        1e-5,
    )


def test_of_one_layer_a_window_sees_a_text_of_sinks_and_window(parity):
    """One layer: the logits of transformers for the kept tokens alone. More layers: keys above
    remember what was dropped.
    """
    text = torch.randint(2, 120, (1, N))
    kept = [0, 1, 2, *range(N - 7, N)]
    for layers in (1, 3):
        model = llamas.tiny(layers=layers)
        llama = Llama(model)
        cache = WindowCache(llama, 3, 7)
        mine = in_pieces(llama, text, cache, 1)[:, -1]
        with torch.no_grad():
            theirs = model(text[:, kept]).logits[:, -1]
        if layers == 1:
            ours = "caches.WindowCache, one layer"
            other = "transformers.LlamaForCausalLM, kept tokens alone"
            parity("KV cache", ours, other, mine, theirs, 1e-5)
        else:
            assert (mine - theirs).abs().max() > 1e-3


def test_a_window_that_makes_no_sense(llama):
    with pytest.raises(UserError, match="a window of 0 tokens: a token sees itself"):
        WindowCache(llama, 4, 0)
    with pytest.raises(UserError, match="-1 attention sinks: 0 or more"):
        WindowCache(llama, -1, 4)


def test_prompts_that_make_no_sense(llama, ids):
    with pytest.raises(UserError, match="the prompt has no tokens"):
        kv_cache.generate(llama, ids[:, :0], 4, GrowingCache(llama))
    with pytest.raises(UserError, match="a prompt in chunks needs a cache"):
        kv_cache.generate(llama, ids, 4, NoCache(llama), chunk=4)


@pytest.mark.parametrize("new, held", [(20, 0), (1, 20), (6, 20)])
def test_flops_are_those_that_torch_counts(model, llama, ids, new, held, parity):
    cache = GrowingCache(llama)
    if held:
        in_pieces(llama, ids[:1, :held], cache, held)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        kv_cache.read(llama, ids[:1, held : held + new], cache)
    mine = cache_costs.forward_flops(model.config, new, held)
    ours = "cache_costs.forward_flops"
    parity("KV cache", ours, "FlopCounterMode", mine, counter.get_total_flops(), 0)


def test_bytes_of_a_token_of_known_models():
    two = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    # Llama-2-7B: half a MiB in bf16; Llama-3-8B: a quarter of it
    assert cache_costs.kv_bytes_per_token(LlamaConfig(**two)) == 2**19
    grouped = LlamaConfig(**two, num_key_value_heads=8)
    assert cache_costs.kv_bytes_per_token(grouped) == 2**17
    # GPT-2: other names, as many heads of keys as of queries
    assert cache_costs.kv_bytes_per_token(GPT2Config()) == 2 * 12 * 768 * 2


def test_weights_that_a_token_reads():
    """Tied: the table is read as output layer. Not tied: it is a second matrix, of which a row is read."""
    tied = llamas.tiny()
    read = cache_costs.weight_bytes(Llama(tied))
    assert read == 4 * sum(p.numel() for p in tied.parameters())
    config = LlamaConfig(**tied.config.to_dict() | {"tie_word_embeddings": False})
    apart = Llama(type(tied)(config))
    assert cache_costs.weight_bytes(apart) == read
    assert cache_costs.weight_bytes(apart.half()) == read / 2


def test_rates_of_the_machine():
    """A row of a matrix that fits into the caches of the processor is read no slower than one out of memory."""
    large = cache_costs.bandwidth()
    assert 1e9 < large < 1e12
    assert cache_costs.gemm_rate() > large / 4  # one FLOP a number, and more


def test_predictions_are_read_through_the_cache(llama, ids):
    """log p and argmax of each next token, whatever the chunk."""
    text = ids[:1]
    log_p, top = cache_quality.predictions(llama, text, StaticCache(llama, N), chunk=7)
    logits = in_pieces(llama, text, GrowingCache(llama), N)[0, :-1]
    expected = -F.cross_entropy(logits, text[0, 1:], reduction="none")
    torch.testing.assert_close(log_p, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(top, logits.argmax(-1))


def test_quality_of_known_numbers():
    half = torch.full((4,), 0.5).log()
    found = (torch.cat([torch.tensor([-9.0]), half]), torch.tensor([1, 2, 3, 4, 5]))
    full = (found[0], torch.tensor([0, 2, 3, 4, 9]))
    row = cache_quality.quality(found, full, start=1)
    assert row["perplexity"] == pytest.approx(2)
    assert row["same argmax token, %"] == 75


def test_the_clock_counts_each_token(model, ids):
    seconds = kv_cache.timed_transformers(model, ids[:1], 5)
    assert len(seconds) == 5 and min(seconds) > 0
    assert len(kv_cache.timed(iter([1, 2, 3]))) == 3
    assert kv_cache.median([3, 1, 2]) == 2


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kv_cache")
    llamas.folder(folder / "model")
    cfg = kv_cache.Config(
        model=str(folder / "model"), prompt=30, max_new_tokens=4, uncached=2, rounds=2, contexts=(8, 40),
        sinks=2, window=14, text=100, out=str(folder / "out"),
    )  # fmt: skip
    return kv_cache.main(cfg), folder / "out"


def test_every_table_and_file_is_there(result):
    rows, folder = result
    kinds = ("transformers", "no cache", "growing", "static", "int8", "window")
    assert all(rows[kind]["a token, ms"] > 0 for kind in kinds)
    assert rows["no cache"].keys() == rows["transformers"].keys()
    assert {f"{kind}, {n} tokens" for kind in kinds[2:] for n in (8, 40)} <= rows.keys()
    assert rows["log p, full cache"]["same argmax token, %"] == 100
    assert (folder / "metrics.json").is_file() and (folder / "kv_cache.png").stat().st_size > 5000


def test_bytes_are_those_that_were_predicted(result):
    rows, _ = result
    found = [row for name, row in rows.items() if name.endswith(" tokens")]
    assert len(found) == 8
    for row in found:
        assert row["MB held"] == row["MB predicted"]
    assert rows["window, 40 tokens"]["MB held"] < rows["growing, 40 tokens"]["MB held"] / 2


@pytest.mark.parametrize(
    "flags, line",
    [
        ({"rounds": 0}, "start at 1"),
        ({"max_new_tokens": 1}, "new tokens at 2"),
        ({"uncached": 1}, "new tokens at 2"),
        ({"text": 20, "prompt": 20}, "--text must be longer"),
        ({"contexts": (8, 999)}, "999 tokens, but the model has 128 positions"),
        ({"window": 0}, "a window of 0 tokens"),
    ],
)
def test_flags_that_make_no_sense(flags, line, tmp_path):
    llamas.folder(tmp_path / "model")
    small = {"prompt": 8, "max_new_tokens": 2, "uncached": 2, "contexts": (8,), "text": 30}
    about = {"model": str(tmp_path / "model"), "out": str(tmp_path / "out")}
    with pytest.raises(UserError, match=line):
        kv_cache.main(kv_cache.Config(**small | about | flags))
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_without_sinks_a_window_fails_once_the_first_tokens_leave():
    """SmolLM2-135M: with four of them the text stays as probable as it was."""
    tokenizer, model = kv_cache.decode.load("smollm2", "cpu")
    llama = Llama(model.float())
    ids = cache_quality.long_text(tokenizer, 200)
    found = {}
    for sinks in (0, 4):
        log_p, _ = cache_quality.predictions(llama, ids, WindowCache(llama, sinks, 64 - sinks))
        found[sinks] = (log_p[:60].mean(), log_p[64:].mean())
    torch.testing.assert_close(found[0][0], found[4][0], atol=1e-3, rtol=0)
    assert found[4][1] > found[4][0] - 0.5
    assert found[0][1] < found[4][1] - 1
