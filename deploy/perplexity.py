"""Perplexity of a causal language model on held-out text, and the text that calibrates instead.

Pages of three manuals are split whole, by a hash of their paths: what calibrates a quantiser is
never what it is judged on. Held-out pages are those that pretraining in this book holds out, too.

Shapes: B pieces of T tokens.
"""

import hashlib

import torch
import torch.nn.functional as F

from utils import data
from utils.run import check


def split(pages):
    """[(path, text)] -> texts for calibration, held-out texts: one page in 32, by a hash."""
    calibration = []
    held_out = []
    for path, text in pages:
        number = int(hashlib.sha256(path.encode()).hexdigest(), 16)
        part = held_out if number % 32 == 0 else calibration
        part.append(text)
    return calibration, held_out


def pieces(tokenizer, texts, count, length):
    """`count` pieces of `length` tokens, few from each text: (B, T) int64.

    Raises UserError if the texts are too short for so many.
    """
    # Texts in a random order that is always the same, until there are enough
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    most = max(4, 4 * count // max(len(texts), 1))
    found = []
    for i in order.tolist():
        if len(found) >= count:
            break
        ids = tokenizer(texts[i], add_special_tokens=False, verbose=False)["input_ids"]
        starts = range(0, len(ids) - length + 1, length)
        found += [ids[start : start + length] for start in starts[:most]]
    enough = len(found) >= count
    check(enough, f"the manuals have {len(found)} pieces of {length} tokens, not {count}")
    return torch.tensor(found[:count])


def texts_of(tokenizer, calibration, held_out, length):
    """-> pieces for calibration (calibration, T), held-out pieces (held_out, T)."""
    to_calibrate, to_judge = split(data.docs())
    first = pieces(tokenizer, to_calibrate, calibration, length)
    return first, pieces(tokenizer, to_judge, held_out, length)


@torch.no_grad()
def perplexity(model, ids, batch=8):
    """exp of the mean of -log p over all tokens but the first of each piece; ids (B, T) -> float."""
    summed = 0.0
    for part in ids.split(batch):
        logits = model(input_ids=part.to(model.device)).logits[:, :-1].float()
        targets = part[:, 1:].to(logits.device)
        summed += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
    counted = ids[:, 1:].numel()
    return float(torch.tensor(summed / counted).exp())
