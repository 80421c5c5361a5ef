"""A pipeline stage: consecutive layers of a Llama on one rank, and the execution of a schedule on
it.

Between stages travel activations in one direction and their gradients in the other, one micro-batch
at a time. Shapes: p stages, one a rank; m micro-batches of B/m texts; L tokens, D width, V words.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class Stage(nn.Module):
    """Consecutive layers of a Llama; the first stage has the embedding, the last norm and head.

    ids (B, L) or states (B, L, D) -> states, or logits (B, L, V). The weights are the model's own,
    not copies.
    """

    def __init__(self, model, stage, stages):
        super().__init__()
        self.first = stage == 0
        self.last = stage == stages - 1
        # Layers are dealt as evenly as their number allows.
        layers = model.model.layers
        begin = round(stage * len(layers) / stages)
        end = round((stage + 1) * len(layers) / stages)
        self.layers = layers[begin:end]
        # The two ends have more.
        self.embedding = model.get_input_embeddings() if self.first else None
        self.norm = model.model.norm if self.last else None
        self.head = model.lm_head if self.last else None
        self.rotary = model.model.rotary_emb
        self.width = model.config.hidden_size

    def empty_states(self, ids):
        """A tensor to receive the states of (B, L) ids into: (B, L, D)."""
        dtype = next(self.parameters()).dtype
        return torch.empty(*ids.shape, self.width, dtype=dtype, device=ids.device)

    def forward(self, x):
        if self.embedding is not None:
            x = self.embedding(x)
        # The attention of these layers is causal by itself: no mask, only positions.
        position = self.rotary(x, torch.arange(x.shape[1], device=x.device)[None])
        for layer in self.layers:
            x = layer(x, position_embeddings=position)
        if self.norm is None or self.head is None:
            return x
        return self.head(self.norm(x))


def loss(logits, labels):
    """Mean of -log p(label): logits (B, L, V), labels (B, L) -> ()."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


class Channel:
    """Point-to-point messages in one direction, in order.

    step: 1 to the next rank, -1 to the one before.
    The other direction has a process group of its own and does not wait for these.
    """

    def __init__(self, step):
        self.group = dist.new_group()
        self.step = step
        self.under_way = []

    def send(self, x):
        x = x.detach().contiguous()
        # Asynchronous: two neighbours that both wait for their receivers would wait for ever.
        work = dist.isend(x, dist.get_rank() + self.step, group=self.group)
        self.under_way.append((work, x))

    def receive(self, empty):
        dist.recv(empty, dist.get_rank() - self.step, group=self.group)
        return empty

    def finish(self):
        for work, _ in self.under_way:
            work.wait()
        self.under_way = []


def execute(actions, module, ids, labels, channels, timeline):
    """Run a stage's schedule -> the loss, 0 on all but the last stage.

    ids, labels: lists of (B/m, L). Gradients end up in the weights of the stage: those of the mean
    over the whole batch.
    """
    activations, gradients = channels
    in_flight = {}  # in-flight micro-batches: {number: input and output of this stage}
    value = 0.0
    for kind, i in actions:
        if kind == "forward":
            # Input: ids, or activations from the stage before.
            if module.first:
                x = ids[i]
            else:
                states = module.empty_states(ids[i])
                x = activations.receive(states).requires_grad_()
            # Output: activations for the stage behind, or the micro-batch's part of the loss.
            with timeline.record(kind, i):
                y = module(x)
                if module.last:
                    y = loss(y, labels[i]) / len(ids)
            in_flight[i] = (x, y)
            if module.last:
                value += y.item()
            else:
                activations.send(y)
        else:
            # The gradient of the output, from the stage behind.
            x, y = in_flight.pop(i)
            grad = None if module.last else gradients.receive(torch.empty_like(y))
            with timeline.record(kind, i):
                y.backward(grad)
            # The gradient of the input, to the stage before.
            if not module.first:
                gradients.send(x.grad)
    # What was sent last may still be under way.
    for channel in channels:
        channel.finish()
    return value


def reduce_tied_gradients(module, group):
    """Tied embeddings: the first stage has the embedding, the last the head; add up their
    gradients.

    group: of these two stages.
    """
    if module.first:
        weight = module.embedding.weight
    elif module.last:
        weight = module.head.weight
    else:
        return
    dist.all_reduce(weight.grad, group=group)
