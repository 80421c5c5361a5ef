"""What a lossy KV cache loses: log p of a long text by position, with int8, a window, and attention sinks.

A full cache, int8 codes, the last tokens alone (window attention) and the last tokens with the
first ones (attention sinks) read the same page; each predicts every next token. Xiao et al. 2023,
arXiv:2309.17453, Fig. 3: a window without the first tokens fails as soon as they leave it.
"""

import torch

from deploy.caches import Int8Cache, StaticCache, WindowCache
from utils import data, figures
from utils.run import check


def long_text(tokenizer, tokens):
    """The first page of the manuals that has so many tokens, its first ones: ids (1,tokens)."""
    found = []
    for _, page in data.docs():
        # a token has hardly less than two letters
        if len(found) < tokens <= len(page) / 2:
            found = tokenizer(page)["input_ids"]
    check(len(found) >= tokens, f"no page has {tokens} tokens: lower --text")
    return torch.tensor([found[:tokens]])


def predictions(llama, ids, cache, chunk=256):
    """A text (1,N) read through a cache, in chunks -> log p of each next token (N-1,), and the
    argmax token at each place (N-1,).
    """
    log_p = []
    top = []
    for piece, following in zip(ids[:, :-1].split(chunk, 1), ids[:, 1:].split(chunk, 1)):
        logits = llama(piece, cache.positions(piece.shape[1]), cache)
        log_p.append(logits.log_softmax(-1).gather(-1, following[..., None])[0, :, 0])
        top.append(logits.argmax(-1)[0])
    return torch.cat(log_p), torch.cat(top)


def quality(found, full, start):
    """Perplexity and agreement of the argmax token with the full cache, from place `start` on."""
    log_p, top = found
    same = top[start:] == full[1][start:]
    return {
        "perplexity": float((-log_p[start:].mean()).exp()),
        "same argmax token, %": 100 * float(same.float().mean()),
    }


def draw(path, log_p, size, width=64):
    """log p of the next token by position, means of `width` tokens; a line where tokens leave the window."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 3.6))
    # whole runs of tokens; a text shorter than one is a run
    width = min(width, *map(len, log_p.values()))
    for i, (name, values) in enumerate(log_p.items()):
        runs = values[: len(values) // width * width].view(-1, width)
        places = (torch.arange(len(runs)) + 0.5) * width
        # the first curve is broad: others lie upon it
        broad = {"linewidth": 5, "alpha": 0.3} if i == 0 else {"linewidth": 1, "marker": "."}
        axis.plot(places, runs.mean(1), label=name, **broad)
    axis.axvline(size, color="grey", linestyle=":", linewidth=1)
    low, high = axis.get_ylim()
    axis.set_ylim(low - 0.1 * (high - low), high)
    axis.text(size, low - 0.08 * (high - low), " the window is full: first tokens leave")
    axis.set(xlabel="position in the text", ylabel="log p of the next token, nats")
    axis.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    axis.grid(alpha=0.3)
    figures.close(figure, path)


def compare_quality(llama, ids, cfg, path):
    """{"log p, int8": {"perplexity", "same argmax token, %"}} of each cache, from the place on where
    the window is full; draws log p by position.
    """
    length = ids.shape[1]
    size = cfg.sinks + cfg.window
    # without sinks, as many tokens are held
    caches = {
        "full cache": StaticCache(llama, length),
        "int8": Int8Cache(llama, length),
        f"window, {cfg.sinks} sinks": WindowCache(llama, cfg.sinks, cfg.window),
        "window, no sinks": WindowCache(llama, 0, size),
    }
    found = {name: predictions(llama, ids, cache) for name, cache in caches.items()}
    draw(path, {name: log_p for name, (log_p, _) in found.items()}, size)
    start = min(size, length - 2)
    full = found["full cache"]
    return {f"log p, {name}": quality(some, full, start) for name, some in found.items()}
