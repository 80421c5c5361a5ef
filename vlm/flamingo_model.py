"""The network of Flamingo: resampler and gated cross-attention layers around a frozen language model.

Alayrac et al. 2022, arXiv:2204.14198, Fig. 3. vlm/flamingo.py trains it; vlm/open_flamingo.py loads
OpenFlamingo's weights into it; vlm/flamingo_adapters.py puts LoRA into it.

Shapes: features (B,J,N,D) of J photos in a text, latents (B,J,M,V), M each; text (B,T), its states
(B,T,E).
"""

from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import nn

from utils import checkpoint, run
from utils.run import check
from vlm import connector
from vlm.gated_cross_attention import GatedCrossAttention, media_mask, visible
from vlm.prompts import IMAGE

# What parameters are called in files that were written before they had the names of today
OLD_NAMES = {
    "words": "new_embeddings.weight",
    "new_embeddings": "new_embeddings.weight",
    "resampler.inlet.weight": "resampler.input_proj.weight",
    "resampler.inlet.bias": "resampler.input_proj.bias",
}


class Flamingo(nn.Module):
    """A frozen language model, a resampler, and gated layers before every `every`-th layer of it.
    Fig. 3.

    new_ids: of <image> and <|endofchunk|>. Their two embeddings, for reading and for writing, are
    all of the vocabulary that is trained; with tokens_in_table they are rows of the language
    model's tables, and frozen like these.
    first: the first layer with a gated layer before it; depth, heads, head_dim, mlp_ratio: of the
    resampler, cross_heads, head_dim, hidden: of the gated layers. activation: "squared_relu" (in the
    resampler ReLU), or OpenFlamingo's "gelu" in both.
    """

    new_ids: torch.Tensor

    def __init__(
        self,
        language,
        new_ids,
        dim_in=1280,
        every=6,
        latents=16,
        latent_width=192,
        first=0,
        depth=1,
        heads=6,
        cross_heads=4,
        head_dim=32,
        mlp_ratio=2,
        hidden=64,
        activation="squared_relu",
        tokens_in_table=False,
    ):
        super().__init__()
        # the language model stays frozen
        self.language = language.requires_grad_(False)
        layers = decoder_layers(language)
        width = language.config.get_text_config().hidden_size
        count = len(layers)
        check(0 < every <= count, f"--every {every}: the language model has {count} layers")
        # new: perceiver resampler, photos to latents
        self.latents = latents
        self.resampler = connector.PerceiverResampler(
            dim_in,
            latent_width,
            depth,
            latents,
            heads=heads,
            kv_heads=heads,
            head_dim=head_dim,
            mlp_ratio=mlp_ratio,
            use_rmsnorm_swiglu=False,
        )
        if activation == "gelu":
            use_gelu(self.resampler)
        # new: a gated cross-attention layer before every `every`-th layer
        self.cross_layer_ids = range(first, count, every)
        self.cross = nn.ModuleList(
            GatedCrossAttention(
                width, latent_width, cross_heads, head_dim, hidden, activation=activation
            )
            for _ in self.cross_layer_ids
        )
        # new: two token embeddings, which begin as random words of the table
        self.register_buffer("new_ids", torch.tensor(new_ids), persistent=False)
        self.new_embeddings = None
        if not tokens_in_table:
            table = language.get_input_embeddings().weight.float()
            drawn = torch.randn(len(new_ids), width)
            rows = table.mean(0) + table.std() * drawn
            self.new_embeddings = nn.Embedding.from_pretrained(rows, freeze=False)
        # latents and mask, while the language model reads; its layers call the new ones through hooks
        self.visual_context = None
        for i, layer_id in enumerate(self.cross_layer_ids):
            hook = partial(self.cross_attention_hook, i)
            layers[layer_id].register_forward_pre_hook(hook, with_kwargs=True)

    def cross_attention_hook(self, i, layer, args, kwargs):
        """Before a layer of the language model: what enters it goes through the i-th gated
        cross-attention layer first, whatever module stands there by then."""
        if self.visual_context is None:
            return None
        # gated cross-attention in fp32, beside a language model in bf16
        latents, mask = self.visual_context
        states = args[0]
        seen = self.cross[i](states.float(), latents, mask).to(states.dtype)
        return (seen, *args[1:]), kwargs

    def resample(self, features):
        """Perceiver resampler: features (B,J,N,D) -> latents (B,J,M,V). Sec. 2.1, Fig. 5."""
        latents = self.resampler(features.flatten(0, 1))  # (B*J,N,D) -> (B*J,M,V)
        return rearrange(latents, "(b j) m v -> b j m v", b=len(features))

    def embed(self, ids):
        """(B,T) -> (B,T,E): the embeddings of the language model, but for those of the new
        tokens."""
        # new tokens as rows of the table: nothing to be replaced
        table = self.language.get_input_embeddings()
        if self.new_embeddings is None:
            return table(ids)
        # else word 0 is looked up in their places, and overwritten by their own embedding
        is_new = ids[..., None] == self.new_ids  # (B,T,2)
        text = table(ids.where(~is_new.any(-1), 0))
        new = (is_new.float() @ self.new_embeddings.weight).to(text.dtype)
        return torch.where(is_new.any(-1, keepdim=True), new, text)

    def states(self, ids, latents=None, before=0, cache=None):
        """Last hidden states of text with photos: (B,T), (B,J,M,V) -> (B,T,E).

        before: photos that stand before this text, in what the cache remembers. Raises UserError for
        more tokens <image> than photos: the last of them would see nothing, without a word.
        """
        if latents is not None:
            # cross-attention mask: which latents each token sees
            counts = media_mask(ids, self.new_ids[0], before)
            photos, per_photo = latents.shape[1:3]
            most = int(counts.max())
            check(most <= photos, f"a text has {most} words {IMAGE}, but {photos} photos")
            mask = visible(counts, photos, per_photo)
            self.visual_context = (latents.flatten(1, 2), mask)
        # the language model reads; its hooks find the visual context
        try:
            out = self.language.base_model(
                inputs_embeds=self.embed(ids), cache=cache, use_cache=cache is not None
            )
        finally:
            self.visual_context = None
        return out.last_hidden_state

    def head(self, states):
        """(...,E) -> logits (...,words): those of the new tokens by their own embeddings."""
        # all words by the frozen head, the two new ones by their own embeddings
        logits = self.language.get_output_embeddings()(states)
        if self.new_embeddings is None:
            return logits
        new = (states.float() @ self.new_embeddings.weight.T).to(logits.dtype)
        return logits.index_copy(-1, self.new_ids, new)

    def forward(self, ids, latents=None, before=0, cache=None):
        return self.head(self.states(ids, latents, before, cache))

    def gates(self):
        """tanh(alpha) of (attention, mlp) by layer: (2, layers)."""
        alphas = []
        layer: Any
        # both gates of each layer: zero at the beginning, where the layer adds nothing
        for layer in self.cross:
            alphas.append(torch.cat([layer.gate_attention.alpha, layer.gate_mlp.alpha]))
        return torch.stack(alphas, 1).detach().tanh()

    def trainable_parameters(self):
        """All that is trained, by name."""
        return {k: p for k, p in self.named_parameters() if p.requires_grad}


def decoder_layers(language):
    """The layers of any causal language model of transformers."""
    count = language.config.get_text_config().num_hidden_layers
    return next(m for m in language.modules() if isinstance(m, nn.ModuleList) and len(m) == count)


def use_gelu(resampler):
    """GELU instead of ReLU in the feed-forward networks of a perceiver resampler, in place."""
    for layer in resampler.layers:
        layer.mlp[1] = nn.GELU()


def name_of_today(name):
    """What a parameter of an older file is called today."""
    if name.endswith((".gate_attention", ".gate_mlp")):
        return f"{name}.alpha"
    return OLD_NAMES.get(name, name)


def written_here(path):
    """Is it a file of weights that this project wrote? (OpenFlamingo's have no hash in their header.)"""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return "sha256" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load(path, language, new_ids, on="cpu"):
    """Weights written by this script, in front of the same language model -> Flamingo, frozen."""
    # weights under their names of today
    tensors, meta = checkpoint.read(path)
    tensors = {name_of_today(name): tensor for name, tensor in tensors.items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        # the network that the file describes; its trained parts must be those of the file
        model = Flamingo(language, new_ids, **meta).to(on)
        parts = model.trainable_parameters()
        if {name: p.shape for name, p in parts.items()} != shapes:
            raise KeyError(path)
    except (TypeError, KeyError):
        raise run.UserError(
            f"{path} belongs to another language model or script: leave out --pretrained"
        ) from None
    with torch.no_grad():
        for name, p in parts.items():
            p.copy_(tensors[name])
    return model.eval().requires_grad_(False)
