"""Drafters of speculative decoding: prompt lookup, a smaller model, the first layers of the model itself.

Prompt lookup: Saxena 2023 (https://github.com/apoorvumang/prompt-lookup-decoding); a draft model: Leviathan et al.
2022, arXiv:2211.17192; early exit: Zhang et al. 2023, arXiv:2309.08168 (self-speculative decoding).

Shapes: G tokens of a draft, V tokens in the vocabulary.
"""

import copy

import torch
import torch.nn.functional as F

from deploy.caches import StaticCache
from utils.run import check


class PromptLookup:
    """What followed the last tokens where they stood before: no model at all.

    longest, shortest: tokens of the runs that are looked for. A longer one is surer; what followed a single
    token is hardly ever right.
    """

    def __init__(self, vocabulary, longest=3, shortest=2):
        check(0 < shortest <= longest, "runs to look for: 0 < shortest <= longest")
        self.vocabulary = vocabulary
        self.longest = longest
        self.shortest = shortest

    def find(self, tokens, count):
        """Up to `count` tokens that followed the latest earlier place of the last tokens."""
        for size in range(min(self.longest, len(tokens) - 1), self.shortest - 1, -1):
            run = tokens[-size:]
            # the latest place first, before the run itself
            for start in range(len(tokens) - size - 1, -1, -1):
                if tokens[start : start + size] == run:
                    return tokens[start + size : start + size + count]
        return []

    def propose(self, tokens, count, temperature=0.0):
        """-> ids, distributions (G,V): all of it on the token that was found."""
        draft = self.find(tokens, count) if count > 0 else []
        q = F.one_hot(torch.tensor(draft, dtype=torch.long), self.vocabulary).float()
        return draft, q


class DraftModel:
    """A smaller model with the same vocabulary, and a cache of its own."""

    def __init__(self, llama, length=None, generator=None):
        self.llama = llama
        self.cache = StaticCache(llama, length or llama.config.max_position_embeddings)
        self.read: list[int] = []
        self.generator = generator

    @torch.no_grad()
    def propose(self, tokens, count, temperature=0.0):
        """-> ids, distributions (G,V) that they were drawn from."""
        # what it read of an earlier draft, and is not in the text, is forgotten
        same = 0
        while same < min(len(self.read), len(tokens) - 1) and self.read[same] == tokens[same]:
            same += 1
        self.cache.seen = same
        self.read = self.read[:same]
        draft = []
        rows = []
        new = tokens[same:]
        for _ in range(count):
            positions = self.cache.positions(len(new))
            keep = torch.tensor([-1])
            logits = self.llama(torch.tensor([new]), positions, self.cache, keep)[0, 0].float()
            self.read += new
            # greedy, or a draw
            if temperature:
                q = (logits / temperature).softmax(-1)
                token = int(torch.multinomial(q, 1, generator=self.generator))
            else:
                q = F.one_hot(logits.argmax(), len(logits)).float()
                token = int(logits.argmax())
            draft.append(token)
            rows.append(q)
            new = [token]
        empty = torch.empty(0, self.llama.config.vocab_size)
        return draft, torch.stack(rows) if rows else empty


class EarlyExit(DraftModel):
    """The first layers of the model itself, then its norm and head: no further weights."""

    def __init__(self, llama, layers, length=None, generator=None):
        first = copy.copy(llama)
        # the modules are shared, the list of layers is not
        first._modules = dict(llama._modules)
        first.layers = llama.layers[:layers]
        super().__init__(first, length, generator)
