"""Gated cross-attention: text attends to the photo before it, behind zero-initialised tanh gates.

Alayrac et al. 2022, arXiv:2204.14198, Fig. 4 and Sec. 2.3. The layer stands between two layers of a
frozen language model (vlm/flamingo.py puts it there). At zero the gates change nothing.

Shapes: text ids (B,T), its states (B,T,E); latents (B,J*M,V) of J photos in a text, M each.
"""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn


def squared_relu(x):
    """max(x, 0)^2, of any shape. So et al. 2021, arXiv:2109.08668."""
    return x.relu().square()


ACTIVATIONS = {"squared_relu": squared_relu, "gelu": F.gelu}


def media_mask(ids, image_id, before=0):
    """Visual context of each token, the last photo before it: ids (B,T) -> counts (B,T), j for the
    j-th, 0 for none.

    Sec. 2.3. The token <image> itself already sees its photo; before: photos read earlier.
    """
    return before + (ids == image_id).cumsum(1)


def visible(counts, photos, latents):
    """Cross-attention mask: counts (B,T) -> (B,T,J*M), true at the M latents of the one photo that
    a token sees."""
    mask = counts[..., None] == torch.arange(1, photos + 1, device=counts.device)
    return repeat(mask, "b t j -> b t (j m)", m=latents)


class TanhGate(nn.Module):
    """Zero-initialised tanh gate: tanh(alpha) x, of any shape. Fig. 4.

    A module of its own, so that PEFT's modules_to_save can name it.
    """

    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.alpha.tanh() * x


class GatedCrossAttention(nn.Module):
    """States (B,T,E), latents (B,J*M,V), mask (B,T,J*M) -> states (B,T,E): both gates at zero
    change nothing. Fig. 4.

    use_rmsnorm_swiglu: RMSNorm and SwiGLU, as Idefics has it; else LayerNorm and `activation`:
    "squared_relu" is the paper's, "gelu" OpenFlamingo's.
    """

    def __init__(
        self,
        width,
        latent_width,
        heads=4,
        head_dim=32,
        hidden=64,
        use_rmsnorm_swiglu=False,
        activation="squared_relu",
    ):
        super().__init__()
        self.heads = heads
        self.activation = ACTIVATIONS[activation]
        norm = partial(nn.RMSNorm, eps=1e-6) if use_rmsnorm_swiglu else nn.LayerNorm
        self.norm_attention = norm(width)
        self.norm_mlp = norm(width)
        # cross-attention: queries of the text, keys and values of the latents
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(latent_width, heads * head_dim, bias=False)
        self.v_proj = nn.Linear(latent_width, heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)
        # large norm: the states that it is added to are of size 3 to 30
        nn.init.normal_(self.o_proj.weight, std=0.4)
        # feed-forward network
        self.gate_proj = nn.Linear(width, hidden, bias=False) if use_rmsnorm_swiglu else None
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        # zero-initialised tanh gates: the paper's alpha
        self.gate_attention = TanhGate()
        self.gate_mlp = TanhGate()

    def attention_weights(self, x, latents, mask):
        """Cross-attention weights (B,heads,T,J*M): rows add up to one, or to zero where nothing can
        be seen."""
        q = rearrange(self.q_proj(self.norm_attention(x)), "b t (h d) -> b h t d", h=self.heads)
        k = rearrange(self.k_proj(latents), "b n (h d) -> b h n d", h=self.heads)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).float()  # (B,heads,T,J*M)
        mask = mask[:, None]  # the same for all heads
        # softmax over nothing would be uniform: multiplied by the mask it is zero
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) * mask

    def attend(self, x, latents, mask):
        """Cross-attention: text (B,T,E) gives the queries, latents of photos (B,J*M,V) the keys and
        values."""
        v = rearrange(self.v_proj(latents), "b n (h d) -> b h n d", h=self.heads)
        weights = self.attention_weights(x, latents, mask).to(v.dtype)
        return self.o_proj(rearrange(weights @ v, "b h t d -> b t (h d)"))

    def mlp(self, x):
        """Feed-forward network: squared ReLU or GELU, or SwiGLU."""
        up = self.up_proj(x)
        if self.gate_proj is None:
            hidden = self.activation(up)
        else:
            hidden = F.silu(self.gate_proj(x)) * up
        return self.down_proj(hidden)

    def forward(self, x, latents, mask):
        # gated cross-attention, then a gated feed-forward network: Fig. 4
        x = x + self.gate_attention(self.attend(x, latents, mask))
        return x + self.gate_mlp(self.mlp(self.norm_mlp(x)))
