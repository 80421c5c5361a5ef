"""Image tokens chosen by the prompt inside a LLaVA: `prompt<K>` of `--sparsity-plugins`, behind the connector.

Top-k by cosine (sparsity.py) needs the words of the prompt, which stand in the text that the image tokens are merged
into; so the choice is made there, of tokens that the language model could read. In training its scores have Gumbel
noise: a sample of k tokens without replacement (Gumbel-top-k: Kool et al. 2019, arXiv:1903.06059), and a
straight-through factor of value 1 carries gradients to the query (Bengio et al. 2013, arXiv:1308.3432).
`coarse<S>` before it keeps means over an S x S grid besides: two resolutions, S^2 + K tokens, known beforehand.

Shapes: P pictures, N tokens of the language model's width E each, words (P,T,E), mask (P,T), K tokens kept.
"""

import torch
from torch import nn

from utils.run import check
from vlm.prompts import IGNORE
from vlm.sparsity import Query, cosine
from vlm.token_sparsity import pool, take


def gumbel(like):
    """Gumbel(0, 1) noise of the shape of a tensor."""
    noise = torch.rand_like(like).clamp(1e-6, 1 - 1e-6)
    return -(-noise.log()).log()


class PromptSparsity(nn.Module):
    """The K tokens that a prompt asks for: (P,N,E) -> (P,K,E), or (P,S^2+K,E) with means over a grid.

    A prompt without words has a learned null query.
    """

    def __init__(self, keep, width, coarse=0):
        super().__init__()
        self.keep = keep
        self.coarse = coarse
        self.query = Query(width, width)
        self.norm = nn.LayerNorm(width)
        self.scale = nn.Parameter(torch.tensor(10.0))

    def count(self, n):
        """How many tokens come out of n. Raises UserError if some would have to be added."""
        check(self.keep <= n, f"sparsity plug-in prompt{self.keep} keeps {self.keep} of {n} tokens")
        return self.coarse**2 + self.keep

    def forward(self, tokens, words, mask):
        self.count(tokens.shape[1])
        # query of the prompt, logits of the tokens, in the precision of the weights
        dtype = self.scale.dtype
        query = self.query(words.to(dtype), mask.to(dtype))
        logits = self.scale * cosine(self.norm(tokens.to(dtype)), query)
        # a sample in training, else the best ones; in the order of their places
        scores = logits + gumbel(logits) if self.training else logits
        indices = scores.topk(self.keep, dim=1).indices.sort(dim=1).values
        # straight-through: 1 in value, with the gradient of the gate
        p = torch.sigmoid(logits)
        factor = 1 + (p - p.detach())
        kept = take(tokens * factor[..., None].to(tokens), indices)
        if not self.coarse:
            return kept
        return torch.cat([pool(tokens, self.coarse), kept], dim=1)


def split(plugins):
    """Names of plug-ins -> those before the connector, and (coarse, keep) of those behind it; keep 0: none.

    Raises UserError for coarse<S> without prompt<K>, and for anything behind them.
    """
    behind = [name for name in plugins if name.startswith(("prompt", "coarse"))]
    before = list(plugins[: len(plugins) - len(behind)])
    numbers = {"coarse": 0, "prompt": 0}
    for name in behind:
        number = name[6:]
        ok = number.isdecimal() and number[0] != "0" and not numbers[name[:6]]
        check(ok, f"sparsity plug-in {name}: prompt<K> and coarse<S> have a number, and come once")
        numbers[name[:6]] = int(number)
    last = [*before, *behind] == list(plugins) and (not behind or behind[-1].startswith("prompt"))
    check(last, "sparsity plug-ins that read the prompt come last: coarse<S>, then prompt<K>")
    return before, (numbers["coarse"], numbers["prompt"])


def reads_prompt(connector):
    """Whether its image tokens depend on the text that they stand in."""
    return hasattr(connector, "by_prompt")


def places_for(model, image_tokens):
    """Words <image> for each picture of image tokens (P,N,E): all N, or as many as a prompt keeps."""
    return model.count if reads_prompt(model.connector) else image_tokens.shape[1]


def check_not_read(model, where):
    """Raises UserError for a model whose image tokens depend on the question, where they are kept for all of them."""
    one = (
        f"the image tokens of this model depend on the question, and {where} keeps them for several"
    )
    check(not reads_prompt(model.connector), f"{one}: ask with --image and --prompt")


def prompts_of(ids, mask=None, labels=None, segments=None):
    """Which conversation's prompt a token belongs to, (B,T): 0 for padding and for what is to be learned.

    segments (B,T): the numbers of packed conversations, 0 for padding; None: one a row.
    """
    found = torch.ones_like(ids) if segments is None else segments.clone()
    # a mask of positions; those of packed rows have more dimensions, and padding in segments
    if mask is not None and mask.shape == ids.shape:
        found = found * mask.bool()
    if labels is not None:
        found = found * (labels == IGNORE)
    return found


def choose(connector, image_tokens, places, words, prompt_of=None):
    """Image tokens (P,N,E) of pictures in the order of their places <image> (B,T) -> those that stay, (P,M,E).

    words (B,T,E); prompt_of (B,T) as `prompts_of` gives it, so that a query is made of the picture's own prompt and
    never of the answer; None: all words of the row. A connector that reads no prompt keeps all. Raises UserError if
    the places are no whole pictures.
    """
    if not reads_prompt(connector):
        return image_tokens
    # row and first place of each picture
    size = connector.by_prompt.count(image_tokens.shape[1])
    at = places.nonzero()
    check(
        len(at) == size * len(image_tokens),
        f"the text has {len(at)} places for a picture's tokens, {len(image_tokens)} pictures fill {size} each",
    )
    rows, columns = at[::size].unbind(1)
    # words of the same conversation, without the places themselves
    if prompt_of is None:
        prompt_of = torch.ones_like(places, dtype=torch.long)
    own = prompt_of[rows] == prompt_of[rows, columns][:, None]
    return connector.by_prompt(image_tokens, words[rows], own & ~places[rows])
