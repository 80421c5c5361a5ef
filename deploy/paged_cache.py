"""Paged KV cache: keys and values in blocks of a fixed size, a block table for each sequence.

Kwon et al. 2023, arXiv:2309.06180 (PagedAttention), Sec. 4. Memory is cut into blocks of `size` tokens,
and a sequence holds a list of them, its block table, so that it grows without being moved and nothing is
reserved for what it may never say. A full block is found again by a hash of its tokens and of all before
it, so that sequences with the same beginning share it (prefix sharing, Sec. 4.4); a block that another
sequence holds, too, is copied before it is written to (copy on write).

Shapes: N blocks of `size` tokens, L layers, K heads of keys and values of D numbers, H heads of queries,
T new tokens of all sequences of a step, one after the other.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import torch

from deploy.llama import attention
from utils.run import check


class BlockPool:
    """Which blocks are free, how many sequences hold each, and what full ones hold.

    A block that nobody holds keeps its content until it is needed: the least recently used goes first.
    """

    def __init__(self, blocks, size):
        check(blocks > 0 and size > 0, "a paged cache needs at least one block of one token")
        self.size = size
        self.holders = [0] * blocks
        # free list, the least recently used first
        self.free = OrderedDict.fromkeys(range(blocks))
        # full blocks by the key of all tokens up to their end
        self.by_key: dict[bytes, int] = {}
        self.key_of: dict[int, bytes] = {}

    def take(self):
        """A free block for one sequence -> its number. What it held is forgotten."""
        block, _ = self.free.popitem(last=False)
        old = self.key_of.pop(block, None)
        if old is not None:
            del self.by_key[old]
        self.holders[block] = 1
        return block

    def share(self, block):
        """One more sequence holds this block."""
        self.free.pop(block, None)
        self.holders[block] += 1

    def release(self, block):
        """One sequence less holds it; it is free as soon as nobody does."""
        self.holders[block] -= 1
        if self.holders[block] == 0:
            self.free[block] = None

    def remember(self, block, key):
        """A full block is found by `key` from now on, unless another one with this content is."""
        if key not in self.by_key and block not in self.key_of:
            self.by_key[key] = block
            self.key_of[block] = key

    def forget(self):
        """No block is found by its key any more: after a step that failed, what they hold is unknown."""
        self.by_key.clear()
        self.key_of.clear()


def next_key(before, names):
    """Key of a full block, which stands for all tokens up to its end.

    before: key of the block before it; names: one for each token, an id or the name of what an image token
    shows. A hash without collisions that one could make: a wrong block would be somebody else's text.
    """
    return hashlib.sha256(before + repr(names).encode()).digest()


@dataclass
class Part:
    """The new tokens of one sequence in a step."""

    table: list[int]  # its blocks
    past: int  # tokens that are in the cache already
    new: int  # tokens that this step adds


class PagedCache:
    """Keys and values of all sequences, (L,N,size,K,D); `attend` works on the parts of a step."""

    def __init__(self, llama, blocks, size):
        config = llama.config
        heads = config.num_key_value_heads
        weight = next(llama.parameters())
        shape = (config.num_hidden_layers, blocks, size, heads, llama.head_dim)
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.size = size

    def copy(self, source, target):
        """Copy on write: the content of a block to another one, in all layers."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]

    def begin(self, parts):
        """Before a forward pass: where the new tokens of each part go, and what each of them sees."""
        on = self.keys.device
        # a slot for each token: block x size + place in the block
        slots = []
        for part in parts:
            for i in range(part.past, part.past + part.new):
                slots.append(part.table[i // self.size] * self.size + i % self.size)
        self.slots = torch.tensor(slots, device=on)
        # those with one new token attend together, those with several by themselves
        self.groups = []
        single = []
        row = 0
        for part in parts:
            if part.new == 1:
                single.append((row, part))
            else:
                rows = torch.arange(row, row + part.new, device=on)
                self.groups.append(self.group(rows[None], [part]))
            row += part.new
        if single:
            rows = torch.tensor([[row] for row, _ in single], device=on)
            self.groups.append(self.group(rows, [part for _, part in single]))

    def group(self, rows, parts):
        """Sequences that attend together: B of them, T new tokens each -> rows of their tokens (B,T), block
        tables (B,n), mask (B,1,T,S): True where a token sees a key. Shorter tables are padded."""
        on = self.keys.device
        widest = max(len(part.table) for part in parts)
        tables = [part.table + [0] * (widest - len(part.table)) for part in parts]
        past = torch.tensor([part.past for part in parts], device=on)
        # places of keys, and of new tokens: a token sees itself and what is before it
        keys = torch.arange(widest * self.size, device=on)
        queries = past[:, None] + torch.arange(rows.shape[1], device=on)
        mask = keys <= queries[:, None, :, None]
        return rows, torch.tensor(tables, device=on), mask

    def attend(self, layer, q, k, v):
        """Store keys and values of the new tokens, attend over the blocks of each sequence.

        q (1,H,T,D), k and v (1,K,T,D) -> (1,H,T,D).
        """
        keys = self.keys[layer]
        values = self.values[layer]
        keys.flatten(0, 1)[self.slots] = k[0].transpose(0, 1)
        values.flatten(0, 1)[self.slots] = v[0].transpose(0, 1)
        seen = torch.empty_like(q)
        for rows, tables, mask in self.groups:
            # (H,B,T,D) -> (B,H,T,D)
            queries = q[0][:, rows].transpose(0, 1)
            found = self.attend_group(queries, keys, values, tables, mask)
            seen[0][:, rows] = found.transpose(0, 1)
        return seen

    def attend_group(self, q, keys, values, tables, mask):
        """Queries (B,H,T,D) of sequences with these block tables -> (B,H,T,D); their blocks are gathered."""
        return attention(q, self.read(keys, tables), self.read(values, tables), mask)

    def read(self, stored, tables):
        """Blocks (N,size,K,D) and block tables (B,n) -> (B,K,n size,D)."""
        return stored[tables].flatten(1, 2).transpose(1, 2)
