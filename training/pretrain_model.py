"""The small Llama of the pretraining: weights, AdamW, loss of each token, sampling.

Touvron et al. 2023, arXiv:2302.13971; sections are that paper's. B pieces, T tokens a piece, V
tokens in the vocabulary.
"""

import torch
import torch.nn.functional as F

from utils import run


def llama(cfg):
    """A Llama with new weights, drawn by the seed: ids (B, T) -> logits (B, T, V). Sec. 2.2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    # The seed draws the weights; heads of 64, an MLP of 8/3 of the width, rounded to 64
    run.seed(cfg.seed)
    config = LlamaConfig(
        hidden_size=cfg.width,
        intermediate_size=64 * round(cfg.width / 24),
        vocab_size=cfg.vocabulary,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.width // 64,
        bos_token_id=0,
        eos_token_id=0,
        max_position_embeddings=cfg.length,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


def adamw(model, cfg):
    """AdamW, Sec. 2.3, with weight decay of matrices only.

    Decay shortens. A gain of a norm has nothing to say but its size: it is left alone.
    """
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() < 2]
    # Two groups of parameters, one of which decays
    groups = [
        {"params": matrices, "weight_decay": cfg.decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, cfg.lr, betas=(0.9, 0.95))


def losses(model, pieces):
    """-log p(token | those before it in its piece), in nats: (B, T + 1) -> (B, T)."""
    logits = model(input_ids=pieces[:, :-1], use_cache=False).logits
    logits = logits.flatten(0, 1).float()  # (B T, V)
    # Position j predicts token j + 1
    value = F.cross_entropy(logits, pieces[:, 1:].flatten(), reduction="none")
    return value.view(len(pieces), -1)


@torch.no_grad()
def sample(model, tokenizer, cfg, on, length=100, temperature=0.8):
    """The prompt and `length` tokens that the model draws one by one, each from the T before it."""
    random = torch.Generator().manual_seed(cfg.seed)
    ids = [0, *tokenizer.encode(cfg.prompt).ids]
    # One token at a time, each read with those before it
    for _ in range(length):
        context = torch.tensor([ids[-cfg.length :]], device=on)
        logits = model(input_ids=context, use_cache=False).logits[0, -1]
        # A low temperature sharpens
        p = (logits.float().cpu() / temperature).softmax(-1)
        ids.append(torch.multinomial(p, 1, generator=random).item())
    return tokenizer.decode(ids)
