"""A decode step as a pure function: ids and past keys and values in, logits and present keys and values out.

A graph has no memory, so the KV cache becomes inputs and outputs, as in the ONNX files of the Hugging
Face hub (`past_key_values.0.key`, `present.0.key`). One graph serves prefill (many tokens, nothing past)
and decode (one token, many past), if it has no branch on either number: the mask is always there.

Shapes: B = 1 sequence of T new tokens after S past ones, L layers, K heads of keys and values of D
numbers, V tokens in the vocabulary.
"""

import torch
from torch import nn

from deploy.caches import causal_mask
from deploy.export_onnx import export, run_session, session
from deploy.llama import Llama, attention
from utils.run import check


class PastCache:
    """Keys and values of one pass: the past ones are given, the present ones are taken out again.

    past: [key 0, value 0, key 1, ...], 2 L tensors (B,K,S,D).
    """

    def __init__(self, past):
        self.past = past
        self.present = []

    def attend(self, layer, q, k, v):
        """Queries (B,H,T,D), keys and values (B,K,T,D) of new tokens -> (B,H,T,D)."""
        keys = torch.cat([self.past[2 * layer], k], dim=2)
        values = torch.cat([self.past[2 * layer + 1], v], dim=2)
        self.present += [keys, values]
        # always a mask: `if T > 1` would be a branch on a size that is not known yet
        new = q.shape[2]
        mask = causal_mask(keys.shape[2] - new, new, q.device)
        return attention(q, keys, values, mask)


class DecodeStep(nn.Module):
    """A Llama of transformers -> a module (ids, past) -> (logits, present) without a state.

    The tied head gets a weight of its own. In a graph it would be the embeddings behind a Transpose, and
    no quantiser looks through that: the largest matrix would stay float32. layers: only the first so
    many; 0: all.
    """

    def __init__(self, model, layers=0):
        super().__init__()
        self.llama = Llama(model)
        count = len(self.llama.layers)
        check(0 <= layers <= count, f"--layers {layers}: the model has {count}")
        self.llama.layers = self.llama.layers[: layers or count]
        # a head of its own, with the same numbers
        tied = self.llama.head
        self.llama.head = nn.Linear(tied.in_features, tied.out_features, tied.bias is not None)
        self.llama.head.load_state_dict(tied.state_dict())
        self.eval().requires_grad_(False)

    def forward(self, ids, past):
        """ids (1,T), past 2 L x (1,K,S,D) -> logits (1,T,V), present 2 L x (1,K,S+T,D)."""
        cache = PastCache(past)
        start = past[0].shape[2]
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
        logits = self.llama(ids, positions, cache)
        return logits, cache.present

    def logits(self, ids):
        """All logits (1,T,V) of a text (1,T)."""
        return self(ids, self.empty(0))[0]

    def empty(self, length=0):
        """Past of `length` random tokens; 0: what a text begins with."""
        shape = (1, self.llama.config.num_key_value_heads, length, self.llama.head_dim)
        return [torch.randn(shape) for _ in range(2 * len(self.llama.layers))]

    def names(self):
        """Names of inputs and outputs, in their order."""
        inputs = ["input_ids"]
        outputs = ["logits"]
        for layer in range(len(self.llama.layers)):
            for kind in ("key", "value"):
                inputs.append(f"past_key_values.{layer}.{kind}")
                outputs.append(f"present.{layer}.{kind}")
        return inputs, outputs


def export_step(step):
    """DecodeStep -> ExportedProgram, for any numbers of new and past tokens.

    With Dim.DYNAMIC sizes would begin at 2, for torch.export takes 0 and 1 for constants: no decode, no
    prefill. These bounds say that 1 new token and 0 past ones are sizes like others.
    """
    tokens = torch.export.Dim("tokens", min=1)
    past = torch.export.Dim("past", min=0)
    # sizes that are neither 0 nor 1, and not equal: else they would be one symbol
    args = (torch.ones(1, 3, dtype=torch.long), step.empty(5))
    dynamic = ({1: tokens}, [{2: past}] * len(args[1]))
    return export(step, args, dynamic)


class OnnxStep:
    """The same function out of a file: (ids, past) -> (logits, present), run by onnxruntime."""

    def __init__(self, path, step, threads=1):
        self.session = session(path, threads)
        self.inputs, self.outputs = step.names()
        self.empty = step.empty

    def __call__(self, ids, past):
        logits, *present = run_session(self.session, dict(zip(self.inputs, [ids, *past])))
        return logits, present

    def logits(self, ids):
        """All logits (1,T,V) of a text (1,T)."""
        fed = dict(zip(self.inputs, [ids, *self.empty(0)]))
        return run_session(self.session, fed, ["logits"])[0]


@torch.no_grad()
def generate(step, ids, max_new_tokens):
    """Greedy decoding with a function (ids, past) -> (logits, present): a prompt (1,N) -> new tokens (1,T)."""
    check(ids.shape[1] > 0, "the prompt has no tokens")
    unread = ids
    past = step.empty(0)
    found = []
    for _ in range(max_new_tokens):
        # the prompt at once, then each new token, and the cache comes back longer
        logits, past = step(unread, past)
        unread = logits[:, -1].argmax(-1, keepdim=True)
        found.append(unread)
    return torch.cat(found, dim=1)
