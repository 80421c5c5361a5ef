"""Drafters of speculative decoding: prompt lookup, n-grams, a smaller model, the first layers of the model itself.

Prompt lookup: Saxena 2023 (https://github.com/apoorvumang/prompt-lookup-decoding); a draft model: Leviathan et al.
2022, arXiv:2211.17192; its head with the frequent tokens alone: Zhao et al. 2025, arXiv:2502.14856; early exit: Zhang
et al. 2023, arXiv:2309.08168 (self-speculative decoding).

Shapes: G tokens of a draft, V tokens in the vocabulary, R of them in the head of a draft model.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from deploy.caches import StaticCache
from deploy.few_rows import linear, use_few_rows
from deploy.llama import Llama
from utils import pretrained
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


class ReducedHead(nn.Module):
    """A head for some tokens: the logits of all others are minus infinity, so that a softmax gives them 0."""

    def __init__(self, weight, tokens):
        """weight (V,E) of the whole head, tokens (R,)."""
        super().__init__()
        self.vocabulary = len(weight)
        self.tokens = tokens
        self.weight = weight[tokens].contiguous()

    def forward(self, states):
        """(...,E) -> (...,V)."""
        logits = states.new_full((*states.shape[:-1], self.vocabulary), -torch.inf)
        logits[..., self.tokens] = linear(states, self.weight)
        return logits


def load_draft(folder, llama):
    """The draft model in a folder of transformers, for a model with the same vocabulary -> a Llama in its type.

    Raises UserError if there is none, or its vocabulary is another one.
    """
    return draft_llama(pretrained.language_model(folder)[1], llama, folder)


def draft_llama(model, llama, name="the draft model"):
    """A model of transformers as the draft model of `llama`, in its type. `draft_vocabulary` in its config, if it is
    there: the tokens that it can say. Raises UserError for another vocabulary; name: for that line.
    """
    known = llama.config.vocab_size
    same = model.config.vocab_size == known
    check(same, f"{name}: {model.config.vocab_size} tokens in its vocabulary, not {known}")
    draft = use_few_rows(Llama(model.to(llama.embed.weight.dtype)))
    tokens = getattr(model.config, "draft_vocabulary", None)
    if tokens is not None:
        whole = isinstance(tokens, list) and all(type(t) is int and 0 <= t < known for t in tokens)
        check(whole and tokens, f"{name}: draft_vocabulary must be ids from 0 to {known - 1}")
        draft.head = ReducedHead(draft.head.weight, torch.tensor(tokens))
    return draft


class NGram:
    """What followed the last two tokens most often in given texts; if nothing did, the last one. No network."""

    def __init__(self, texts, vocabulary, generator=None):
        """texts: lists of ids."""
        self.vocabulary = vocabulary
        self.generator = generator
        self.tables = {}
        for context in (2, 1):
            # each run of context + 1 tokens as one number, and how often it is there
            codes = [self.codes(torch.tensor(text), context) for text in texts]
            self.tables[context] = torch.cat(codes).unique(return_counts=True)

    def codes(self, ids, context):
        """Ids (N,) -> numbers of all runs of context + 1 tokens, (N - context,)."""
        size = max(0, len(ids) - context)
        code = torch.zeros(size, dtype=torch.long)
        for place in range(context + 1):
            code = code * self.vocabulary + ids[place : place + size]
        return code

    def distribution(self, tokens):
        """Relative frequencies of what followed the longest context that is known: (V,); else all tokens alike."""
        for context, (codes, counts) in self.tables.items():
            if len(tokens) < context:
                continue
            code = self.codes(torch.tensor([*tokens[-context:], 0]), context)
            first, last = torch.searchsorted(codes, torch.cat([code, code + self.vocabulary]))
            if last > first:
                q = torch.zeros(self.vocabulary)
                q[codes[first:last] % self.vocabulary] = counts[first:last].float()
                return q / q.sum()
        return torch.full((self.vocabulary,), 1 / self.vocabulary)

    def propose(self, tokens, count, temperature=0.0):
        """-> ids, distributions (G,V); draws are those of temperature 1, whatever the temperature."""
        text = list(tokens)
        rows = []
        for _ in range(count):
            q = self.distribution(text)
            if temperature:
                text.append(int(torch.multinomial(q, 1, generator=self.generator)))
            else:
                text.append(int(q.argmax()))
                q = F.one_hot(q.argmax(), self.vocabulary).float()
            rows.append(q)
        draft = text[len(tokens) :]
        return draft, torch.stack(rows) if rows else torch.empty(0, self.vocabulary)
