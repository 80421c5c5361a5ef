"""Text of the pretraining: pages to learn and held out, a BPE tokenizer, batches of pieces."""

import hashlib
from pathlib import Path

import numpy as np
import torch

from utils import data

END = "<|end|>"  # stands before every page, token number 0


def split(pages):
    """[(path, text)] -> texts to learn, texts held out: one page in 32, by a hash of its path."""
    learn = []
    held = []
    for path, text in pages:
        number = int(hashlib.sha256(path.encode()).hexdigest(), 16)
        part = held if number % 32 == 0 else learn
        part.append(text)
    return learn, held


def learn_tokens(texts, size):
    """Byte-pair encoding: join the most frequent pair of neighbours until there are `size` tokens.

    It begins with the 256 bytes, so that every text can be written. Sec. 2.1; Sennrich et al. 2015,
    arXiv:1508.07909.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    # Words of GPT-2, as bytes
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # All 256 bytes are tokens from the start; then merges
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer, texts):
    """Texts -> (n,) token numbers, the end token before each."""
    ids = []
    for encoding in tokenizer.encode_batch(texts):
        ids += [0, *encoding.ids]
    return torch.tensor(ids, dtype=torch.int32)


def tokens(cfg):
    """-> {"learn": (n,), "held": (m,)} token numbers, (the tokenizer, the bytes held out).

    Made once, then read.
    """
    from tokenizers import Tokenizer

    def make():
        learn, held = split(data.docs())
        # Tokens are learned on the pages to learn only
        tokenizer = learn_tokens(learn, cfg.vocabulary)
        ids = {"learn": encode(tokenizer, learn), "held": encode(tokenizer, held)}
        size = sum(len(text.encode()) for text in held)
        return ids, [tokenizer.to_str(), size]

    path = Path(cfg.out) / f"tokens_{cfg.vocabulary}.safetensors"
    ids, (tokenizer, size) = data.cached(path, make)
    return ids, (Tokenizer.from_str(tokenizer), size)


def draw(ids, cfg, i):
    """The batch of step i, whatever the number of ranks: (n,) -> (B, T + 1) token numbers.

    Of each piece the first T are read, and the last T are what follows them.
    """
    # The seed and the step decide, so that any rank can draw the whole batch
    starts = np.random.default_rng([cfg.seed, i]).integers(len(ids) - cfg.length, size=cfg.batch)
    return torch.stack([ids[s : s + cfg.length + 1] for s in starts]).long()


def as_transformers(tokenizer):
    """The tokenizer as transformers saves and loads it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)
