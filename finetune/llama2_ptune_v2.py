"""P-tuning v2: deep prompts, a prefix in every layer, learned directly. Liu et al. 2021,
arXiv:2110.07602.

Deep prompts as in prefix tuning, without the network that writes them: the paper finds that it
helps on some tasks and hurts on others, and that depth is what counts. Fewer numbers to train, and
one thing less to choose. Where do they begin? Random keys and values are words that mean nothing,
and many steps go by until they stop disturbing. So they begin as those of a real sentence.

Shapes: P prefix positions, N layers, H heads of keys and values with d numbers each.
Differences from the paper: answers are words of the model, not classes of a new head; the start is
not random.

    python finetune/llama2_ptune_v2.py
    python finetune/llama2_ptune_v2.py --start ""         # from random numbers
    python finetune/llama2_ptune_v2.py --backend peft
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from finetune import llama2_full, llama2_prefix, llama2_prompt, task_setup
from utils import run


@dataclass(frozen=True)
class Config(task_setup.Training):
    """Learn keys and values, each by itself, before a frozen language model, and score it."""

    lr: float = 1e-2  # peak learning rate
    tokens: int = 20  # P, prefix positions
    # the keys and values begin as those of this text; "": as random numbers
    start: str = llama2_prompt.START
    backend: Literal["ours", "peft"] = "ours"  # who adds the prefix
    out: str = "outputs/llama2_ptune_v2"  # where the results go


class DeepPrompt(nn.Module):
    """Keys and values of P positions in every layer, each a free number: () -> (P, N 2 H d)."""

    def __init__(self, tokens, layers, heads, size, start=None):
        super().__init__()
        # standard normal, as in PEFT, or keys and values of a text
        self.embedding = nn.Embedding(tokens, layers * 2 * heads * size)
        if start is not None:
            self.embedding.weight.data.copy_(start)

    def forward(self):
        return self.embedding.weight


def main(cfg: Config) -> dict:
    """Train the prefix, score; write it in PEFT's layout."""
    run.check(cfg.tokens > 0, "--tokens must be at least 1")
    bench = task_setup.start(cfg, llama2_prefix.sizes, before=cfg.tokens)
    # where it begins: keys and values of the text, or random ones
    start = llama2_prefix.beginning(bench, cfg)
    # by PEFT, or by the class above
    if cfg.backend == "peft":
        model = llama2_prefix.through_peft(bench.model, cfg, projection=False)
        if start is not None:
            model.prompt_encoder["default"].embedding.weight.data.copy_(start)
        metrics = llama2_full.by_peft(cfg, bench, model, llama2_prompt.peft_network(model))
    else:
        layers, heads, size = llama2_prefix.sizes(bench.model)
        prefix = DeepPrompt(cfg.tokens, layers, heads, size, start)
        # what PEFT's file says besides
        extra = {
            "prefix_projection": False,
            "token_dim": heads * size,
            "num_attention_heads": heads,
        }
        forward = llama2_prefix.network(bench.model, prefix)
        metrics = llama2_prompt.experiment(cfg, bench, prefix, forward, "PREFIX_TUNING", **extra)
    return run.report(bench.folder, metrics, then="python finetune/llama2_qlora.py")


if __name__ == "__main__":
    run.cli(main, Config)
