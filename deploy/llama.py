"""The forward pass of a Llama, written out: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Touvron et al. 2023, arXiv:2302.13971, Sec. 2.2; grouped-query attention: Ainslie et al. 2023,
arXiv:2305.13245; rotary positions: Su et al. 2021, arXiv:2104.09864, Eq. 34. What is remembered of
earlier tokens, and who sees whom, is not its business: a cache stores keys and values and attends
(kv_cache.py, paged_cache.py). The linear layers are those of the transformers model, whatever they
are: plain, merged from LoRA, quantised.

Shapes: B sequences of T new tokens, E width, H heads of D numbers, K heads of keys and values, V
tokens in the vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from utils.run import check

# Model types with these equations; Qwen2 has biases in its projections, Mistral no other sizes
FAMILIES = ("llama", "mistral", "qwen2")


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps), times a weight for each channel: (...,E) -> (...,E). Zhang &
    Sennrich 2019, arXiv:1910.07467, Eq. 4. In float32, whatever the type of x."""
    x32 = x.float()
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * (x32 * scale).to(x.dtype)


def rotary_angles(positions, inv_freq, scaling=1.0):
    """cos and sin of position x frequency: (B,T) -> (B,1,T,D) each, float32."""
    angles = positions[:, None, :, None].float() * inv_freq
    # both halves of a head are turned by the same angles
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos() * scaling, angles.sin() * scaling


def rotate(x, cos, sin):
    """Rotary position embedding: numbers i and i + D/2 of a head are a point that is turned.
    (B,H,T,D) -> (B,H,T,D). Su et al. 2021, Eq. 34."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


def attention(q, k, v, mask=None, is_causal=False):
    """softmax(q k^T / sqrt(D)) v. Queries (B,H,T,D), keys and values (B,K,S,D) -> (B,H,T,D). Each
    head of keys and values serves H / K heads of queries. Ainslie et al. 2023, Sec. 2.2.

    mask: True where a query sees a key, (T,S) or (B,1,T,S).
    """
    about: dict[str, Any] = {"attn_mask": mask, "is_causal": is_causal}
    return F.scaled_dot_product_attention(
        q, k, v, enable_gqa=bool(q.shape[1] != k.shape[1]), **about
    )


class Layer(nn.Module):
    """One decoder layer, with the modules of a layer of transformers."""

    def __init__(self, layer, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.q = layer.self_attn.q_proj
        self.k = layer.self_attn.k_proj
        self.v = layer.self_attn.v_proj
        self.o = layer.self_attn.o_proj
        self.gate = layer.mlp.gate_proj
        self.up = layer.mlp.up_proj
        self.down = layer.mlp.down_proj
        self.norm_attention = layer.input_layernorm
        self.norm_mlp = layer.post_attention_layernorm

    def heads(self, x):
        """(B,T,H D) -> (B,H,T,D)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x, cos, sin, cache, number):
        # queries, keys and values of the new tokens, turned by their positions
        h = rms_norm(x, self.norm_attention.weight, self.norm_attention.variance_epsilon)
        q = rotate(self.heads(self.q(h)), cos, sin)
        k = rotate(self.heads(self.k(h)), cos, sin)
        v = self.heads(self.v(h))
        # attention over all that the cache holds
        seen = cache.attend(number, q, k, v)
        x = x + self.o(seen.transpose(1, 2).flatten(2))
        # SwiGLU: Shazeer 2020, arXiv:2002.05202, Eq. 6
        h = rms_norm(x, self.norm_mlp.weight, self.norm_mlp.variance_epsilon)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """The modules of a Llama of transformers, and a forward pass of our own; weights are shared.

    Raises UserError for a model with other equations.
    """

    def __init__(self, model):
        super().__init__()
        config = model.config
        kind = config.model_type
        check(
            kind in FAMILIES,
            f"a model of type {kind}: this forward pass is that of {', '.join(FAMILIES)}",
        )
        check(config.hidden_act == "silu", f"activation {config.hidden_act}: SwiGLU has silu")
        window = getattr(config, "sliding_window", None)
        whole = window is None or window >= config.max_position_embeddings
        check(whole, f"attention to the last {window} tokens alone: these caches attend to all")
        self.config = config
        self.head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        self.embed = model.get_input_embeddings()
        self.layers = nn.ModuleList(Layer(layer, self.head_dim) for layer in model.model.layers)
        self.norm = model.model.norm
        self.head = model.get_output_embeddings()
        # angles of position 1, stretched as the configuration says (rope_parameters)
        self.inv_freq: torch.Tensor
        self.register_buffer("inv_freq", model.model.rotary_emb.inv_freq, persistent=False)
        self.scaling = model.model.rotary_emb.attention_scaling

    @torch.no_grad()
    def forward(self, x, positions, cache, keep=None):
        """Ids (B,T) or embeddings (B,T,E) of new tokens, their positions (B,T) -> logits (B,T,V).

        cache: attend(layer, q (B,H,T,D), k, v (B,K,T,D)) -> (B,H,T,D), keys and values are kept there.
        keep: indices of the tokens whose logits are wanted; None: all.
        """
        states = self.embed(x) if x.dim() == 2 else x
        cos, sin = rotary_angles(positions, self.inv_freq, self.scaling)
        for number, layer in enumerate(self.layers):
            states = layer(states, cos, sin, cache, number)
        if keep is not None:
            states = states[:, keep]
        states = rms_norm(states, self.norm.weight, self.norm.variance_epsilon)
        return self.head(states)
