"""KV caches: what a decoder remembers of the tokens that it has read, in five ways.

Keys and values of a token do not change when others follow: they are computed once and kept. No
cache; one that grows by concatenation; a pre-allocated (static) one; int8 quantisation, symmetric,
with a scale for each token and head (absmax: Dettmers et al. 2022, arXiv:2208.07339, Sec. 2); a
sliding window with attention sinks (StreamingLLM: Xiao et al. 2023, arXiv:2309.17453, Sec. 3.2).

Each knows how many tokens were read (`seen`), the positions of the next ones and its bytes. All
sequences of a batch are equally long; different lengths are the business of paged_cache.py.

Shapes: B sequences of T new tokens, H heads of D numbers, K heads of keys and values, S tokens that
are held.
"""

from typing import Any

import torch

from deploy.absmax import dequantise_int8, quantise_int8
from deploy.llama import attention, rotary_angles, rotate
from utils.run import check


def causal_mask(held, new, device=None):
    """Which of held + new keys each new query sees: all that came before, and itself. (T,S+T), True: seen."""
    return torch.ones(new, held + new, dtype=torch.bool, device=device).tril(diagonal=held)


class NoCache:
    """Nothing is kept: every token needs a pass over the whole text."""

    def __init__(self, llama):
        self.layers = len(llama.layers)
        self.device = llama.inv_freq.device
        self.seen = 0

    def positions(self, count):
        """Positions of the next tokens, (1,count): the same for all of a batch."""
        return torch.arange(self.seen, self.seen + count, device=self.device)[None]

    def store(self, layer, k, v):
        """Keep keys and values of new tokens (B,K,T,D) -> those of all tokens so far (B,K,S+T,D)."""
        return k, v

    def attend(self, layer, q, k, v):
        """Queries (B,H,T,D), keys and values (B,K,T,D) of new tokens -> (B,H,T,D)."""
        keys, values = self.store(layer, k, v)
        new = q.shape[2]
        held = keys.shape[2] - new
        # one query sees all there is; the first ones of a text are causal among themselves
        mask = None
        if held > 0 and new > 1:
            mask = causal_mask(held, new, q.device)
        seen = attention(q, keys, values, mask, is_causal=held == 0 and new > 1)
        self.advance(layer, new)
        return seen

    def advance(self, layer, new):
        """Tokens count as read once the last layer has stored them; here, never."""

    def tensors(self):
        """All that is held."""
        return []

    def bytes(self):
        """Bytes of all that is held."""
        return sum(x.numel() * x.element_size() for x in self.tensors())


class GrowingCache(NoCache):
    """Keys and values grow by concatenation: each token copies all that is held. The DynamicCache of
    transformers.
    """

    def __init__(self, llama):
        super().__init__(llama)
        self.keys: list[Any] = [None] * self.layers
        self.values: list[Any] = [None] * self.layers

    def store(self, layer, k, v):
        if self.keys[layer] is not None:
            k = torch.cat([self.keys[layer], k], dim=2)
            v = torch.cat([self.values[layer], v], dim=2)
        self.keys[layer] = k
        self.values[layer] = v
        return k, v

    def advance(self, layer, new):
        if layer == self.layers - 1:
            self.seen += new

    def tensors(self):
        return [x for x in (*self.keys, *self.values) if x is not None]


class StaticCache(GrowingCache):
    """Memory for `length` tokens is taken at the beginning, new tokens are written into it.

    Raises UserError when it is full.
    """

    def __init__(self, llama, length, batch=1):
        super().__init__(llama)
        self.length = length
        kv_heads = llama.config.num_key_value_heads
        self.allocate((batch, kv_heads, length, llama.head_dim), llama.embed.weight)

    def allocate(self, shape, like):
        """A tensor (B,K,length,D) of keys and one of values for each layer."""
        self.keys = [like.new_zeros(shape) for _ in range(self.layers)]
        self.values = [like.new_zeros(shape) for _ in range(self.layers)]

    def place(self, new):
        """The slots of new tokens; raises UserError if there are not as many."""
        end = self.seen + new
        check(
            end <= self.length,
            f"the cache is full: {self.seen} + {new} tokens, it holds {self.length}; make it longer",
        )
        return slice(self.seen, end)

    def store(self, layer, k, v):
        place = self.place(k.shape[2])
        self.keys[layer][:, :, place] = k
        self.values[layer][:, :, place] = v
        return self.keys[layer][:, :, : place.stop], self.values[layer][:, :, : place.stop]


class Int8Cache(StaticCache):
    """A static cache of int8 codes, symmetric, with a float32 scale for each token and head. Keys and
    values are dequantised when they are read, those of the new tokens too.
    """

    def allocate(self, shape, like):
        codes = like.new_zeros(shape, dtype=torch.int8)
        scales = like.new_zeros((*shape[:-1], 1), dtype=torch.float32)
        self.keys = [codes.clone() for _ in range(self.layers)]
        self.values = [codes.clone() for _ in range(self.layers)]
        self.key_scales = [scales.clone() for _ in range(self.layers)]
        self.value_scales = [scales.clone() for _ in range(self.layers)]

    def store(self, layer, k, v):
        place = self.place(k.shape[2])
        read = []
        held = [(self.keys, self.key_scales, k), (self.values, self.value_scales, v)]
        for codes, scales, x in held:
            # write the new tokens
            new_codes, new_scales = quantise_int8(x)
            codes[layer][:, :, place] = new_codes
            scales[layer][:, :, place] = new_scales
            # read all of them
            all_codes = codes[layer][:, :, : place.stop]
            all_scales = scales[layer][:, :, : place.stop]
            read.append(dequantise_int8(all_codes, all_scales, x.dtype))
        return read

    def tensors(self):
        return [*self.keys, *self.values, *self.key_scales, *self.value_scales]


class WindowCache(GrowingCache):
    """Attention sinks: the first `sinks` tokens and the last `window` tokens are kept, the token
    itself is the last of them. Xiao et al. 2023, Sec. 3.2.

    Positions are those inside the cache: seen from token t, what lies between sinks and window is
    not there. Rotary attention depends on differences of positions alone, so the sinks get a query
    that is rotated back by the number of dropped tokens, the window one that is not.
    """

    def __init__(self, llama, sinks, window):
        super().__init__(llama)
        check(sinks >= 0, f"{sinks} attention sinks: 0 or more are kept")
        check(window >= 1, f"a window of {window} tokens: a token sees itself, so 1 or more")
        self.sinks = sinks
        self.window = window
        self.inv_freq = llama.inv_freq
        self.planned: Any = None

    def held(self):
        """Places in the text of the tokens that are held: (S,), the sinks first."""
        first = torch.arange(min(self.sinks, self.seen))
        last = torch.arange(max(len(first), self.seen - self.window), self.seen)
        return torch.cat([first, last])

    def store(self, layer, k, v):
        keys, values = super().store(layer, k, v)
        # keep the first and the last ones; the copy sets the others free
        sinks = min(self.sinks, keys.shape[2])
        last = max(sinks, keys.shape[2] - self.window)
        if last > sinks:
            self.keys[layer] = torch.cat([keys[:, :, :sinks], keys[:, :, last:]], dim=2)
            self.values[layer] = torch.cat([values[:, :, :sinks], values[:, :, last:]], dim=2)
        return keys, values

    def plan(self, new):
        """What is the same in all layers: mask (T,S+T), number of sinks among the keys, and cos and sin
        (1,1,T,D) that rotate queries back to their positions inside the cache.
        """
        places = torch.cat([self.held(), new])
        # a token sees the sinks, and the window that ends with it
        sink = places < self.sinks
        near = places > new[:, None] - self.window
        mask = (places <= new[:, None]) & (sink | near)
        # with token t there are t + 1; those that do not fit are dropped
        dropped = (new + 1 - self.sinks - self.window).clamp(min=0)
        cos, sin = rotary_angles(-dropped[None].to(self.device), self.inv_freq)
        return mask.to(self.device), int(sink.sum()), cos, sin

    def attend(self, layer, q, k, v):
        count = q.shape[2]
        if layer == 0:
            self.planned = self.plan(torch.arange(self.seen, self.seen + count))
        mask, sinks, cos, sin = self.planned
        keys, values = self.store(layer, k, v)
        # scores with the sinks, and with all others
        near = grouped(q, keys[:, :, sinks:])
        far = grouped(rotate(q, cos, sin), keys[:, :, :sinks])
        scores = torch.cat([far, near], dim=-1) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~mask, -torch.inf)
        # softmax in float32; each head of values serves H / K heads of queries
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        seen = weights.flatten(2, 3) @ values
        self.advance(layer, count)
        return seen.unflatten(2, (-1, count)).flatten(1, 2)


def grouped(q, keys):
    """Scores of grouped-query attention: (B,H,T,D) and (B,K,S,D) -> (B,K,H/K,T,S)."""
    kv_heads = keys.shape[1]
    # all queries that one head of keys serves, in one product
    together = q.unflatten(1, (kv_heads, -1)).flatten(2, 3)
    return (together @ keys.transpose(2, 3)).unflatten(2, (-1, q.shape[2]))
