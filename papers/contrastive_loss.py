"""Symmetric contrastive loss (InfoNCE) of CLIP, and its gradients for batches larger than the memory.

Radford et al. 2021, arXiv:2103.00020, Fig. 3; gradient caching is Gao et al. 2021, arXiv:2101.06983.

Shapes: B pairs of a batch, E numbers of the shared space.
"""

from typing import Any

import torch
import torch.nn.functional as F


def clip_loss(z, t, scale):
    """Symmetric InfoNCE of unit vectors of pictures and of their texts (B,E): both directions averaged. Fig. 3."""
    logits = scale * t @ z.T  # row: a text among all pictures
    labels = torch.arange(len(z), device=z.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def random_state():
    """State of the random numbers, of the CPU and of a GPU."""
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return torch.get_rng_state(), gpu


def set_random_state(state):
    cpu, gpu = state
    torch.set_rng_state(cpu)
    if gpu is not None:
        torch.cuda.set_rng_state(gpu)


def cached_backward(encoders, inputs, scale, chunk):
    """Gradients of the loss of a whole batch, with `chunk` pairs in memory at once: -> the loss. Gao et al., Sec. 3.2.

    The loss needs the vectors of all pairs, its gradient with respect to a vector nothing more; and from there on each
    pair goes its own way.
    """
    parts = [x.split(chunk) for x in inputs]
    states = []
    vectors = []
    # first pass: all vectors, without gradients
    with torch.no_grad():
        for encode, pieces in zip(encoders, parts):
            states.append([])
            vectors.append([])
            for piece in pieces:
                states[-1].append(random_state())  # what is dropped now must be dropped again
                vectors[-1].append(encode(piece))
    # the loss of the whole batch, and its gradient with respect to every vector
    z, t = (torch.cat(v).requires_grad_() for v in vectors)
    loss = clip_loss(z, t, scale)
    loss.backward()
    gradients: Any = (z.grad, t.grad)
    # second pass: piece by piece through the towers, each vector with its cached gradient
    after = random_state()
    for encode, pieces, before, whole in zip(encoders, parts, states, gradients):
        for piece, state, gradient in zip(pieces, before, whole.split(chunk)):
            set_random_state(state)
            (encode(piece) * gradient).sum().backward()
    set_random_state(after)
    return loss.detach()
