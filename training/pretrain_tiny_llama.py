"""Pretraining of a tiny Llama: bits per byte beside n-gram baselines, FLOPs, model FLOPs utilisation.

A language model gives each next token a probability; -log2 of it is what an ideal coder would spend on it, in bits.
Bits per byte do not depend on how a text is cut into tokens, so that a Llama can be compared with n-grams of bytes
(Kneser & Ney 1995, ICASSP; interpolated as in Chen & Goodman 1999, Computer Speech & Language 13). The model is that of
Touvron et al. 2023, arXiv:2302.13971, made small; sections are that paper's. The run is made as large ones are.

Shapes: B pieces of text a step, of all ranks together; T tokens a piece, V tokens in the vocabulary, D width, L layers.
Differences from the paper: some million tokens instead of 10^12; the embedding is the last layer too; weight decay on
matrices only; the learning rate ends at zero and not at a tenth.

    python training/pretrain_tiny_llama.py
    python training/pretrain_tiny_llama.py --resume --steps 20000             # goes on from the last checkpoint
    python training/pretrain_tiny_llama.py --vocabulary 257                   # a token is a byte
    torchrun --nproc_per_node 2 training/pretrain_tiny_llama.py               # any number of ranks, also with --resume
"""

import hashlib
import math
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from training import ranks
from utils import checkpoint, data, figures, pretrained, run

END = "<|end|>"  # stands before every page, token number 0


@dataclass(frozen=True)
class Config:
    """Train a small Llama from nothing on three manuals; bits per byte of pages held out, against n-grams."""

    steps: int = 4500  # training steps
    batch: int = 8  # pieces of text per step, of all ranks together
    length: int = 64  # tokens of a piece
    # tokens, found by byte-pair encoding; 257: every byte is one, and the end
    vocabulary: int = 4096
    width: int = 128  # of the model, a multiple of 64
    layers: int = 2  # of the model
    # peak learning rate: up in a line over a twentieth of the steps, then a cosine to zero
    lr: float = 8e-3
    decay: float = 0.1  # weight decay, of matrices only
    order: int = 6  # bytes that the longest n-gram looks back, at most 7
    # what the samples begin with; no space at its end, which would be a rare token
    prompt: str = "How do I"
    bf16: bool = True  # matrix products in bf16, weights in fp32; else all in fp32
    # go on from the last checkpoint in --out, bit for bit; the number of ranks may change
    resume: bool = False
    save_every: int = 500  # steps between checkpoints; 0: one at the end
    seed: int = 0  # same seed, same numbers
    out: str = "outputs/pretrain_tiny_llama"  # where the results go


# The text: pages to learn, pages held out, and the tokens that they are cut into


def split(pages):
    """Pages [(path, text)] -> texts to learn, texts held out: one page in 32, by a hash of its path."""
    held = [int(hashlib.sha256(path.encode()).hexdigest(), 16) % 32 == 0 for path, _ in pages]
    return [t for (_, t), h in zip(pages, held) if not h], [
        t for (_, t), h in zip(pages, held) if h
    ]


def learn_tokens(texts, size):
    """Byte-pair encoding: join the most frequent pair of neighbours until there are `size` tokens.

    It begins with the 256 bytes, so that every text can be written. Sec. 2.1; Sennrich et al. 2015, arXiv:1508.07909.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokens(cfg):
    """-> {"learn": (n,), "held": (m,)} token numbers, (the tokenizer, the bytes held out). Made once, then read."""
    from tokenizers import Tokenizer

    def make():
        texts = dict(zip(("learn", "held"), split(data.docs())))
        tokenizer = learn_tokens(texts["learn"], cfg.vocabulary)
        ids = {
            k: [i for e in tokenizer.encode_batch(v) for i in (0, *e.ids)] for k, v in texts.items()
        }
        size = sum(len(t.encode()) for t in texts["held"])
        return {k: torch.tensor(v, dtype=torch.int32) for k, v in ids.items()}, [
            tokenizer.to_str(),
            size,
        ]

    ids, (tokenizer, size) = data.cached(
        Path(cfg.out) / f"tokens_{cfg.vocabulary}.safetensors", make
    )
    return ids, (Tokenizer.from_str(tokenizer), size)


def draw(ids, cfg, i):
    """The pieces of step i, whatever the number of ranks: (n,) -> (B, T + 1), for what is read and what follows it."""
    starts = np.random.default_rng([cfg.seed, i]).integers(len(ids) - cfg.length, size=cfg.batch)
    return torch.stack([ids[s : s + cfg.length + 1] for s in starts]).long()


# The yardstick: n-grams of bytes

MASKS = [np.uint64(256 ** (k + 1) - 1) for k in range(8)]  # the last k + 1 bytes of a number


class NGrams:
    """p(byte | the k bytes before it) for every k up to `order`; interpolated Kneser-Ney.

    A gram is a byte and those before it, as one number: the byte itself is its lowest eight bits.
    """

    def __init__(self, texts, order):
        self.order, grams = order, windows(texts, order)
        # How often each gram is in the text
        self.seen = [table(grams & MASKS[k]) for k in range(order + 1)]
        # how many different bytes it was seen after: what counts once the longer gram has failed
        self.after = [table(self.seen[k + 1][0] & MASKS[k]) for k in range(order)]

    def probability(self, grams, order):
        """p of the last byte of each gram (n,), given the `order` bytes before it."""
        p = np.full(len(grams), 1 / 256)
        for k in range(order + 1):
            known, count, contexts, total, kinds, discount = (
                self.seen[k] if k == order else self.after[k]
            )
            gram = grams & MASKS[k]
            context = gram >> np.uint64(8)
            mass = find(contexts, total, context)
            # What is taken from every gram ...
            own = np.maximum(find(known, count, gram) - discount, 0)
            lower = discount * find(contexts, kinds, context)  # ... is given to the order below
            p = np.where(mass > 0, (own + lower * p) / np.maximum(mass, 1), p)
        return p

    def bits(self, texts, order):
        """Bits per byte of texts."""
        return float(-np.log2(self.probability(windows(texts, self.order), order)).mean())


def windows(texts, order):
    """The gram of every byte: (bytes,)."""
    # Zeros stand before every page, and nowhere else
    text = b"".join(bytes(order) + t.encode() for t in texts)
    x = np.frombuffer(text, np.uint8).astype(np.uint64)
    grams = np.bitwise_or.reduce(
        [x[order - j : len(x) - j] << np.uint64(8 * j) for j in range(order + 1)]
    )
    return grams[x[order:] != 0]


def table(grams):
    """Grams and how often each is there; contexts, how often and with how many next bytes each is there; discount."""
    known, count = np.unique(grams, return_counts=True)
    contexts, first, kinds = np.unique(known >> np.uint64(8), return_index=True, return_counts=True)
    once, twice = (count == 1).sum(), (count == 2).sum()
    return (
        known,
        count,
        contexts,
        np.add.reduceat(count, first),
        kinds,
        once / max(1, once + 2 * twice),
    )


def find(keys, values, wanted):
    """The value of each wanted key; 0 if it is not among the keys, which are sorted."""
    i = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[i] == wanted, values[i], 0)


# The model, and what a step of it costs


def llama(cfg):
    """A Llama with new weights, drawn by the seed: ids (B, T) -> logits (B, T, V). Sec. 2.2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    run.seed(cfg.seed)
    sizes = {
        "hidden_size": cfg.width,
        "intermediate_size": 64 * round(cfg.width / 24),
        "vocab_size": cfg.vocabulary,
    }
    sizes |= {"num_hidden_layers": cfg.layers, "num_attention_heads": cfg.width // 64}
    ends = {
        "bos_token_id": 0,
        "eos_token_id": 0,
        "max_position_embeddings": cfg.length,
        "tie_word_embeddings": True,
    }
    config = LlamaConfig(**sizes, **ends)
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


def forward_flops(config, rows, length):
    """Of all matrix products of a forward pass; multiply and add are two."""
    c, d = config, config.hidden_size
    # q o, k v, the MLP
    layer = 2 * d**2 + 2 * d * c.num_key_value_heads * c.head_dim + 3 * d * c.intermediate_size
    # Queries with keys, weights with values: those that the mask hides are computed, too
    layer += 2 * d * length
    token = 2 * (c.num_hidden_layers * layer + d * c.vocab_size)
    return rows * length * token


def flops_per_token(model, length):
    """Forward and backward, 6 N + 12 L D T: two products backward for each one forward. N: weights of the matrices."""
    # The embedding is here as the last layer
    n = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    return 6 * n + 12 * model.config.num_hidden_layers * model.config.hidden_size * length


def counted_flops(model, pieces):
    """Forward and backward as PyTorch counts them: every product that it really makes."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        losses(model, pieces).sum().backward()
    model.zero_grad()
    return counter.get_total_flops()


def peak_flops(on, dtype):
    """FLOPs a second of the fastest of ten products of two large matrices: what this machine can do at best."""
    n = 8192 if on.type == "cuda" else 1024
    a, seconds = torch.randn(n, n, device=on).to(dtype), []
    for _ in range(10):
        then = time.perf_counter()
        (a @ a)[0, 0].item()  # a number that is read is there
        seconds.append(time.perf_counter() - then)
    return 2 * n**3 / min(seconds)


# Training


def learning_rate(cfg, i):
    warm = max(1, cfg.steps // 20)
    down = (i - warm) / max(1, cfg.steps - warm)
    return cfg.lr * ((i + 1) / warm if i < warm else (1 + math.cos(math.pi * down)) / 2)


def adamw(model, cfg):
    """Sec. 2.3. Weight decay shortens matrices. A gain of a norm has nothing to say but its size: it is left alone."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": cfg.decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, cfg.lr, betas=(0.9, 0.95))


def losses(model, pieces):
    """-log p(token | those before it in its piece), in nats: (B, T + 1) -> (B, T)."""
    logits = model(input_ids=pieces[:, :-1], use_cache=False).logits.flatten(0, 1).float()
    return F.cross_entropy(logits, pieces[:, 1:].flatten(), reduction="none").view(len(pieces), -1)


def here():
    """-> (this rank, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average(tensors):
    """The mean of each tensor over all ranks, in place. They travel as one vector: many small messages are slow."""
    _, n = here()
    if n > 1:
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat)
        for x, mean in zip(tensors, flat.div_(n).split([x.numel() for x in tensors])):
            x.copy_(mean.view_as(x))


def train(model, optimizer, ids, cfg, on, start=0):
    """Steps `start` to cfg.steps; yields the loss of each, over the pieces of all ranks."""
    rank, n = here()
    weights = list(model.parameters())
    for i in range(start, cfg.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, i)
        # Equal shares, so that the mean of means is the mean
        pieces = draw(ids, cfg, i).chunk(n)[rank].to(on)
        with run.autocast(on) if cfg.bf16 else nullcontext():
            value = losses(model, pieces).mean()
        value.backward()
        average([value.detach(), *(p.grad for p in weights)])
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield value.item()


@torch.no_grad()
def bits_per_byte(model, ids, size, cfg, on):
    """Of the pages held out: ids (m,), which stand for `size` bytes.

    Pieces overlap by half, and of each but the first only the later half counts: what is judged has been led up to.
    """
    rank, n = here()
    half = cfg.length // 2
    ids = torch.cat([ids.long(), ids.new_zeros(2 * cfg.length).long()])
    # None of zeros alone
    pieces = ids.unfold(0, cfg.length + 1, half)[: -(-(len(ids) - 2 * cfg.length - 1) // half)]
    total = torch.zeros((), dtype=torch.float64, device=on)
    for first in range(64 * rank, len(pieces), 64 * n):
        part = pieces[first : first + 64]
        # The end token stands for no byte; n-grams do not have to foresee it either
        counts = part[:, 1:] != 0
        counts[1 if first == 0 else 0 :, : cfg.length - half] = False
        with run.autocast(on) if cfg.bf16 else nullcontext():
            total += losses(model, part.to(on)).double()[counts.to(on)].sum()
    average([total])
    return n * total.item() / math.log(2) / size


@torch.no_grad()
def sample(model, tokenizer, cfg, on, length=100, temperature=0.8):
    """The prompt and `length` tokens that the model draws one by one, each from the T before it."""
    ids, random = [0, *tokenizer.encode(cfg.prompt).ids], torch.Generator().manual_seed(cfg.seed)
    for _ in range(length):
        logits = model(
            input_ids=torch.tensor([ids[-cfg.length :]], device=on), use_cache=False
        ).logits[0, -1]
        ids.append(
            torch.multinomial(
                (logits.float().cpu() / temperature).softmax(-1), 1, generator=random
            ).item()
        )
    return tokenizer.decode(ids)


def worker(cfg):
    """What every rank does -> what it found. All of them read the state, the first one writes it."""
    (rank, n), folder = here(), Path(cfg.out)
    on = ranks.device() if dist.is_initialized() else run.device()
    ids, (tokenizer, size) = tokens(cfg)
    model = llama(cfg).to(on)
    found = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "before": sample(model, tokenizer, cfg, on),
    }
    found["flops_per_token"] = flops_per_token(model, cfg.length)
    found["counted"] = counted_flops(model, draw(ids["learn"], cfg, 0)[:1].to(on)) / cfg.length
    peak = torch.tensor(peak_flops(on, torch.bfloat16 if cfg.bf16 else torch.float32), device=on)
    average([peak])
    if on.type == "cuda":
        # On a CPU, with pieces as short as ours, it is no faster
        model.set_attn_implementation("sdpa")
    parts, done = {"model": model, "optimizer": adamw(model, cfg)}, {}
    if cfg.resume:
        done = checkpoint.load_state(folder / "state.safetensors", cfg, **parts)
    kept = {k: done.get(k, []) for k in ("losses", "seconds", "scores")}

    def save():
        if rank == 0:
            checkpoint.save_state(folder / "state.safetensors", **parts, **kept, config=asdict(cfg))

    start = len(kept["losses"])
    steps, then = (
        train(model, parts["optimizer"], ids["learn"], cfg, on, start),
        time.perf_counter(),
    )
    for i, value in enumerate(
        run.progress(steps, cfg.steps, start, cfg.save_every, save), start + 1
    ):
        kept["seconds"].append(time.perf_counter() - then)
        kept["losses"].append(value)
        # After a 32nd of the run, a 16th, ... and all of it
        if i in {cfg.steps >> k for k in range(6)}:
            kept["scores"].append([i, bits_per_byte(model, ids["held"], size, cfg, on)])
        then = time.perf_counter()
    save()
    if rank == 0:
        pretrained.save(model, as_transformers(tokenizer), folder / "model")
    found["after"], found["bytes_per_token"] = (
        sample(model, tokenizer, cfg, on),
        size / int((ids["held"] != 0).sum()),
    )
    return (
        found
        | kept
        | {
            "peak": n * peak.item(),
            "speed": cfg.batch * cfg.length / float(np.median(kept["seconds"])),
        }
    )


def as_transformers(tokenizer):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def draw_curve(path, found, ngrams, cfg):
    """Bits per byte over tokens and over seconds of training; a line for each n-gram."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.2, 4.6))
    million = cfg.batch * cfg.length / 1e6
    axis.plot(
        [i * million for i, _ in found["scores"]], [bits for _, bits in found["scores"]], "o-"
    )
    for name, value in ngrams.items():
        axis.axhline(value, color="gray", linestyle="--", linewidth=0.8)
        axis.annotate(
            name, (1.01, value), xycoords=("axes fraction", "data"), fontsize=7, va="center"
        )
    axis.set(
        xscale="log", yscale="log", xlabel="million tokens", ylabel="bits per byte, pages held out"
    )
    rate = found["speed"] / 1e6
    above = axis.secondary_xaxis("top", functions=(lambda x: x / rate, lambda x: x * rate))
    above.set_xlabel("seconds of training, at the median pace")
    for scale in (axis.xaxis, axis.yaxis, above.xaxis):
        scale.set_major_formatter("{x:g}")
    axis.set_yticks([1.5, 2, 3, 4, 5], minor=False)
    axis.yaxis.set_minor_formatter("")
    axis.grid(alpha=0.3)
    return figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Train on one process, or on those that torchrun started; then count n-grams, draw and write."""
    n = int(os.environ.get("WORLD_SIZE", 1))
    run.check(
        min(cfg.steps, cfg.batch, cfg.layers) > 0,
        "--steps, --batch and --layers must be at least 1",
    )
    run.check(cfg.lr > 0 and cfg.decay >= 0, "--lr must be above 0, --decay at least 0")
    run.check(cfg.length > 1, "--length must be at least 2")
    run.check(
        cfg.width > 0 and cfg.width % 64 == 0,
        "--width must be a multiple of 64, the size of a head",
    )
    run.check(
        cfg.vocabulary > 256, "--vocabulary must be at least 257: all bytes, and the end of a page"
    )
    run.check(0 <= cfg.order <= 7, "--order must be from 0 to 7: a gram is one number of 64 bits")
    run.check(
        cfg.batch % n == 0, f"--batch {cfg.batch} cannot be dealt out in equal shares to {n} ranks"
    )
    if os.environ.get("RANK", "0") == "0":
        run.output(cfg.out, cfg)
        tokens(cfg)
    found = ranks.launch(worker, cfg, n) if "RANK" in os.environ else [worker(cfg)]
    if found is None:
        return {}
    folder, one, clock = Path(cfg.out), found[0], run.Clock()
    learn, held = split(data.docs())
    yardstick = NGrams(learn, cfg.order)
    ngrams = {f"n-gram, {k} bytes back": yardstick.bits(held, k) for k in range(cfg.order + 1)}
    draw_curve(folder / "bits.png", one, ngrams, cfg)
    story = f"-- before\n{one['before']}\n-- after {cfg.steps} steps\n{one['after']}\n"
    (folder / "samples.txt").write_text(story, "utf-8")
    print(story)
    bits, rate = one["scores"][-1][1], one["flops_per_token"] * one["speed"]
    metrics = {
        "parameters": one["parameters"], "tokens": len(one["losses"]) * cfg.batch * cfg.length,
        "bytes_per_token": one["bytes_per_token"], "final_loss": float(np.mean(one["losses"][-100:])),
        "bits_per_byte": bits, "uniform": 8.0, **ngrams, "ngrams_beaten": sum(bits < x for x in ngrams.values()),
        "train_seconds": sum(one["seconds"]), "ngram_seconds": clock(), "ranks": n, "tokens_per_second": one["speed"],
        "flops_per_token": one["flops_per_token"], "counted_by_torch": one["counted"],
        "difference": one["flops_per_token"] / one["counted"] - 1, "GFLOPs_per_second": rate / 1e9,
        "matmul_GFLOPs_per_second": one["peak"] / 1e9, "utilisation": rate / one["peak"],
    }  # fmt: skip
    return run.report(
        folder, metrics, then=f"open {folder}/bits.png; then --resume with more --steps"
    )


if __name__ == "__main__":
    run.cli(main, Config)
