"""P-tuning: a soft prompt written by a prompt encoder (LSTM or MLP). Liu et al. 2021,
arXiv:2103.10385.

Soft words that are learned one by one know nothing of each other, and the paper finds them slow to
leave the place where they start. So let an LSTM (or an MLP) write them: one step then moves all of
them, together. After training its output is kept, and the network thrown away; what runs is a soft
prompt as in llama2_prompt.py.

Shapes: P soft words, D width of an embedding, H hidden width.
Differences from the paper: soft words stand before the text only, not between its parts; no anchor
words.

    python finetune/llama2_ptune.py
    python finetune/llama2_ptune.py --encoder mlp
    python finetune/llama2_ptune.py --backend peft
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from finetune import llama2_full, llama2_prompt, task_setup
from utils import run


@dataclass(frozen=True)
class Config(task_setup.Training):
    """Learn a network that writes a soft prompt before a frozen language model, and score it."""

    lr: float = 3e-3  # peak learning rate
    tokens: int = 10  # P, soft words
    encoder: Literal["lstm", "mlp"] = "lstm"  # who writes them
    hidden: int = 256  # H, its width
    backend: Literal["ours", "peft"] = "ours"  # who adds the soft words
    out: str = "outputs/llama2_ptune"  # where the results go


class PromptEncoder(nn.Module):
    """P free vectors and the network that turns them into a soft prompt: () -> (P, D). Eq. 4; named
    as in PEFT.
    """

    def __init__(self, tokens, width, hidden, encoder="lstm"):
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.lstm_head = None
        # an LSTM in both directions and a small MLP, or a larger MLP alone
        if encoder == "lstm":
            self.lstm_head = nn.LSTM(
                width, hidden, num_layers=2, bidirectional=True, batch_first=True
            )
            layers = [nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width)]
        else:
            layers = [
                nn.Linear(width, hidden),
                nn.ReLU(),
                nn.Linear(hidden, hidden),
                nn.ReLU(),
                nn.Linear(hidden, width),
            ]
        self.mlp_head = nn.Sequential(*layers)

    def forward(self):
        # the free vectors are read as a sequence
        x = self.embedding.weight[None]  # (1, P, D)
        if self.lstm_head is not None:
            x, _ = self.lstm_head(x)
        return self.mlp_head(x)[0]


def through_peft(model, cfg):
    """The same encoder by the PEFT library -> its model."""
    from peft import PromptEncoderConfig, get_peft_model

    kind = {"lstm": "LSTM", "mlp": "MLP"}[cfg.encoder]
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=cfg.tokens,
        encoder_hidden_size=cfg.hidden,
        encoder_reparameterization_type=kind,
        encoder_num_layers=2,
        encoder_dropout=0.0,
    )
    return get_peft_model(model, config)


def main(cfg: Config) -> dict:
    """Train the encoder, score; write the prompt that it ends with in PEFT's layout."""
    run.check(min(cfg.tokens, cfg.hidden) > 0, "--tokens and --hidden must be at least 1")
    bench = task_setup.start(cfg, before=cfg.tokens)
    # by PEFT, or by the class above
    if cfg.backend == "peft":
        model = through_peft(bench.model, cfg)
        metrics = llama2_full.by_peft(cfg, bench, model, llama2_prompt.peft_network(model))
    else:
        width = bench.model.get_input_embeddings().embedding_dim
        soft = PromptEncoder(cfg.tokens, width, cfg.hidden, cfg.encoder)
        forward = llama2_prompt.network(bench.model, soft)
        # what PEFT's file says besides
        extra = {
            "encoder_hidden_size": cfg.hidden,
            "encoder_reparameterization_type": cfg.encoder.upper(),
        }
        metrics = llama2_prompt.experiment(cfg, bench, soft, forward, "P_TUNING", **extra)
    return run.report(bench.folder, metrics, then="python finetune/llama2_prefix.py")


if __name__ == "__main__":
    run.cli(main, Config)
