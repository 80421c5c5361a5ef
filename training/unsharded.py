"""The unsharded model: what tensor and pipeline parallelism are compared with.

A language model on one process, real text for it, and the relative error by which losses and
gradients are compared.
"""

import torch

from utils import data, pretrained, run


def load(name):
    """-> tokenizer and language model: smollm2, of a local folder, or of a hub id."""
    if name == "smollm2":
        return pretrained.smollm2()
    return pretrained.language_model(name)


def token_batch(tokenizer, rows, length):
    """Real text as ids (rows, length). Raises UserError if there is too little text."""
    # One text out of as many pages of the manuals as there are rows, cut into rows of one length.
    text = "\n\n".join(page for _, page in data.docs()[:rows])
    ids = torch.tensor(tokenizer(text)["input_ids"])[: rows * length]
    run.check(len(ids) == rows * length, "there is not so much text: lower --length")
    return ids.view(rows, length)


def relative_error(ours, theirs):
    """The largest difference, as a fraction of the largest number; of dicts and lists, the worst."""
    if isinstance(ours, dict):
        return max(relative_error(x, theirs[name]) for name, x in ours.items())
    if isinstance(ours, list):
        return max(relative_error(x, y) for x, y in zip(ours, theirs, strict=True))
    # Of a DTensor, the shard of this rank.
    if hasattr(theirs, "to_local"):
        theirs = theirs.to_local()
    return float((ours - theirs).abs().max() / theirs.abs().max())
