"""Low-bit inference on a CPU: int4 products for decoding, int8 products for prefill, compared with bf16 and float32.

A new token multiplies every weight once, so it costs what reading the weights costs: fewer bits, fewer bytes,
less time. A prompt multiplies each weight with all of its tokens, so it costs arithmetic: there the quickest
product wins, whatever the weights weigh (roofline: Williams et al. 2009, doi:10.1145/1498765.1498785). SmolLM2
comes in 4-bit codes (low_bit_gguf.py); they go straight into the packed int4 product of torch
(low_bit_layers.py), in decoder layers with few operations (low_bit_fused.py). int8 is that of int8_linear.py
(LLM.int8(): Dettmers et al. 2022, arXiv:2208.07339, without outlier columns).

Shapes: B sequences of T tokens, V tokens in the vocabulary.

    python deploy/low_bit.py                                     # the tables and the figure
    python deploy/low_bit.py --prompt 32 --max-new-tokens 64     # a short prompt, a longer answer
    python deploy/low_bit.py --model outputs/llama2_lora/merged  # any Llama: codes are made of its weights
    python deploy/low_bit.py --llama-cpp PYTHON                  # beside llama.cpp (llama_cpp_times.py)
"""

import contextlib
import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from deploy import cache_costs, cache_quality, decode, llama_cpp_times, perplexity
from deploy.caches import StaticCache
from deploy.int8_linear import int8_layers
from deploy.kv_cache import median, read, stream, timed
from deploy.llama import Llama
from deploy.low_bit_fused import fused
from deploy.low_bit_layers import FEW, int4_layers, int4_smollm2
from utils import figures, pretrained, run
from utils.run import check


@dataclass(frozen=True)
class Config:
    """Compare weights of 32, 16, 8 and 4 bits: bytes, milliseconds, perplexity."""

    model: str = "smollm2"  # or a local folder, or a hub id of a Llama
    prompt: int = 256  # tokens of the prompt, from a page of a manual
    max_new_tokens: int = 17  # tokens that are generated in each round
    rounds: int = 3  # each way once a round, in turn
    # rows of the products that are measured alone: tokens of a pass
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    held_out: int = 8  # pieces of held-out text for the perplexity
    length: int = 128  # tokens of a piece
    llama_cpp: str = ""  # a Python that has llama-cpp-python: the same file by it, in turn
    seed: int = 0
    out: str = "outputs/low_bit"


def variants(model, name):
    """{"fp32": model ...}: the same weights in five ways."""
    full = copy.deepcopy(model).float()
    found = {"fp32": full, "bf16": copy.deepcopy(model).bfloat16()}
    found["int8"] = int8_layers(copy.deepcopy(full))
    # SmolLM2 lies there in 4-bit codes; other models are rounded to such codes
    in_int4 = int4_smollm2 if name == "smollm2" else int4_layers
    found["int4"] = in_int4(copy.deepcopy(model))
    found["int4 + int8"] = in_int4(copy.deepcopy(model), prefill_int8=True)
    return found


def size(module, without=()):
    """Bytes of all parameters and buffers of a module, each once, but those with one of these words in their names."""
    found = 0
    for name, x in [*module.named_parameters(), *module.named_buffers()]:
        if not any(word in name for word in without):
            found += x.numel() * x.element_size()
    return found


def bytes_read(llama):
    """Bytes that a token reads: layers, norm and head; of layers that are there twice the int4 ones, and of the
    table of embeddings a row, which does not count."""
    return sum(size(part, (".int8.",)) for part in (llama.layers, llama.norm, llama.head))


def compare_speed(llamas, ids, cfg, llama_cpp=None):
    """{name: {"prefill, ms", "a token, ms"}}: all of them once a round, in turn; the quickest prefill, the
    median token. llama_cpp: a function of llama_cpp_times.py."""
    seconds = {name: [] for name in llamas}
    for _ in range(cfg.rounds):
        if llama_cpp:
            found = llama_cpp(ids[0].tolist(), cfg.max_new_tokens)
            seconds.setdefault("llama.cpp", []).append(found["seconds"])
        for name, llama in llamas.items():
            cache = StaticCache(llama, ids.shape[1] + cfg.max_new_tokens)
            seconds[name].append(timed(stream(llama, ids, cfg.max_new_tokens, cache)))
    rows = {}
    for name, rounds in seconds.items():
        later = [x for times in rounds for x in times[1:]]
        rows[name] = {
            "prefill, ms": 1000 * min(times[0] for times in rounds),
            "a token, ms": 1000 * median(later),
        }
    return rows


@torch.no_grad()
def products_seconds(llama, rows):
    """CPU seconds of all linear layers of the decoder for so many rows, with nothing between them."""
    wide = torch.ones(rows, llama.config.hidden_size, dtype=llama.embed.weight.dtype)

    def products():
        for layer in llama.layers:
            layer.q(wide)
            layer.k(wide)
            heads = layer.v(wide)
            layer.o(heads.new_ones(rows, layer.o.in_features))
            layer.gate(wide)
            layer.down(layer.up(wide))

    return cache_costs.fastest(products)


def compare_rows(llamas, counts):
    """{"fp32": {"1 rows, ms": ...}}: the linear layers alone, by tokens of a pass."""
    found = {}
    for name, llama in llamas.items():
        times = {n: products_seconds(llama, n) for n in counts}
        found[name] = {f"{n} rows, ms": 1000 * seconds for n, seconds in times.items()}
    return found


@torch.no_grad()
def perplexity_decoded(llama, ids):
    """Perplexity of the second half of each piece (B,T): the first half is read at once, the second token by
    token, as an answer is written."""
    half = ids.shape[1] // 2
    summed = 0.0
    # as many sequences at once as still count as few rows
    for part in ids.split(FEW):
        cache = StaticCache(llama, ids.shape[1], len(part))
        logits = read(llama, part[:, :half], cache)
        for t in range(half, ids.shape[1]):
            summed += float(F.cross_entropy(logits.float(), part[:, t], reduction="sum"))
            logits = read(llama, part[:, t : t + 1], cache)
    return float(torch.tensor(summed / ids[:, half:].numel()).exp())


def draw(path, alone, layer_bytes, flops, bandwidth):
    """Left: milliseconds by tokens of a pass. Right: the roofline, FLOP/s against FLOPs a byte of weights.

    alone: {"int4": {"8 rows, ms": ...}}; flops: of a token, two for each weight.
    """
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    intensities = []
    highest = 0.0
    for name, times in alone.items():
        counts = [int(key.split()[0]) for key in times]
        milliseconds = list(times.values())
        left.plot(counts, milliseconds, marker="o", markersize=3, label=name)
        # the weights are read once for all tokens
        intensity = [n * flops / layer_bytes[name] for n in counts]
        rates = [n * flops / ms / 1e6 for n, ms in zip(counts, milliseconds)]
        right.plot(intensity, rates, marker="o", markersize=3, label=name)
        intensities += intensity
        highest = max(highest, *rates)
    # the memory roof, up to the quickest product
    gigabytes = bandwidth / 1e9
    start = min(intensities)
    roof = [start, max(start, highest / gigabytes)]
    label = f"memory, {gigabytes:.0f} GB/s"
    right.plot(roof, [x * gigabytes for x in roof], "k--", label=label)
    left.set(xlabel="tokens of a pass", ylabel="linear layers, ms")
    right.set(xlabel="FLOPs a byte of weights", ylabel="GFLOP/s")
    for axis in (left, right):
        axis.set(xscale="log", yscale="log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
    right.legend(frameon=False, fontsize=8, loc="lower right")
    figures.close(figure, path)


def check_flags(cfg):
    """Raises UserError for flags that make no sense."""
    numbers = (cfg.prompt, cfg.max_new_tokens - 1, cfg.rounds, cfg.held_out, *cfg.rows)
    check(min(numbers) > 0, "tokens, rows, rounds ... start at 1, new tokens at 2")
    check(len(cfg.rows) > 0, "--rows needs a number")
    check(cfg.length > 1, "--length must be at least 2")
    own = not cfg.llama_cpp or cfg.model == "smollm2"
    check(own, "--llama-cpp reads the file of smollm2: leave out --model")
    if cfg.llama_cpp:
        llama_cpp_times.smollm2(cfg.llama_cpp)  # is there such a Python?


def main(cfg: Config) -> dict:
    """The same weights in five ways, measured in turn; writes the tables and the figure."""
    check_flags(cfg)
    run.seed(cfg.seed)
    torch.set_num_threads(1)  # CPU time of several threads is no latency
    tokenizer, model = decode.load(cfg.model, "cpu")
    most = pretrained.positions(model)
    longest = max(cfg.prompt + cfg.max_new_tokens, cfg.length)
    check(longest <= most, f"{longest} tokens, but the model has {most} positions: ask for less")
    ids = cache_quality.long_text(tokenizer, cfg.prompt)
    _, held_out = perplexity.texts_of(tokenizer, 1, cfg.held_out, cfg.length)
    models = variants(model, cfg.model)
    plain = {name: Llama(made) for name, made in models.items()}
    folder = run.output(cfg.out, cfg)
    # linear layers alone, by tokens of a pass
    alone = compare_rows({name: plain[name] for name in list(plain)[:4]}, cfg.rows)
    # bytes, and the perplexity of text that is read at once, and token by token
    table = {}
    for name, llama in plain.items():
        table[name] = {
            "MB held": size(llama) / 1e6,
            "MB read a token": bytes_read(llama) / 1e6,
            "perplexity": perplexity.perplexity(models[name], held_out),
            "perplexity, decoded": perplexity_decoded(llama, held_out),
        }
    # speed, with the layers of llama.py and with fused ones
    llamas = plain | {f"{name}, fused": fused(made) for name, made in models.items()}
    with contextlib.ExitStack() as stack:
        beside = None
        if cfg.llama_cpp:
            beside = stack.enter_context(llama_cpp_times.started(cfg.llama_cpp, longest))
        speeds = compare_speed(llamas, ids, cfg, beside)
    for name, row in speeds.items():
        table.setdefault(name, {}).update(row)
    # what the machine reads at most, and how far from there the layers are
    bandwidth = cache_costs.bandwidth()
    flops = cache_costs.forward_flops(plain["fp32"].config, 1, 0, logits=0)
    draw(folder / "low_bit.png", alone, {n: size(plain[n].layers) for n in alone}, flops, bandwidth)
    metrics = table | {f"{name}, layers alone": times for name, times in alone.items()}
    metrics["machine"] = {"one row (GEMV), GB/s": bandwidth / 1e9}
    return run.report(folder, metrics, then=f"open {folder}/low_bit.png")


if __name__ == "__main__":
    run.cli(main, Config)
