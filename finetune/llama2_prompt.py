"""Prompt tuning: a soft prompt, learned embeddings before every text. Lester et al. 2021,
arXiv:2104.08691.

A prompt in words can only say what words say. But the model reads vectors, and a vector may lie
anywhere between the words. So put P vectors before the text and learn them by gradient descent. The
model itself stays as it is: one copy of it serves a hundred tasks, in the same batch if you like.

Shapes: P soft words, D width of an embedding; B, L, V as in sentiment.py.
Differences from the paper: a causal model instead of T5; soft words start as the embeddings of a
real sentence (the paper finds that this matters for small models, Fig. 3b).

    python finetune/llama2_prompt.py
    python finetune/llama2_prompt.py --start ""           # from random words of the vocabulary
    python finetune/llama2_prompt.py --backend peft
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from finetune import adapters, llama2_full, sentiment, task_setup
from utils import run
from utils.text import clean, printable

START = "Does this tweet sound negative or positive? Answer with one word, negative or positive."


@dataclass(frozen=True)
class Config(task_setup.Training):
    """Learn a soft prompt before a frozen language model and score it."""

    lr: float = 3e-2  # peak learning rate
    tokens: int = 10  # P, soft words
    # the soft words begin as the words of this text, again and again; "": as random words
    start: str = START
    backend: Literal["ours", "peft"] = "ours"  # who adds the soft words
    out: str = "outputs/llama2_prompt"  # where the results go


def first_words(tokenizer, text, count, vocabulary):
    """`count` token ids to start from: the text, again and again; random ones if it is empty."""
    ids = tokenizer(clean(text), add_special_tokens=False)["input_ids"]
    if not ids:
        return torch.randint(vocabulary, (count,))
    return torch.tensor((ids * (count // len(ids) + 1))[:count])


class SoftPrompt(nn.Module):
    """P vectors that start as the embeddings of real words: () -> (P, D)."""

    def __init__(self, embedding, words):
        super().__init__()
        self.embedding = nn.Parameter(embedding.weight[words].detach().float().clone())

    def forward(self):
        return self.embedding


def network(model, soft):
    """The model with soft() (P, D) before every text, as a function (ids (B, L), mask (B, L)) ->
    logits (B, L, V).
    """

    def forward(ids, mask, last=0):
        prompt = soft()
        sentiment.check_positions(model, len(prompt) + ids.shape[1])
        # the soft words, then the embeddings of the text: (B, P + L, D)
        words = model.get_input_embeddings()(ids)  # (B, L, D)
        x = torch.cat([prompt.to(words.dtype).expand(len(ids), -1, -1), words], dim=1)
        # attention sees them; padding is masked and has no position
        seen = torch.cat([mask.new_ones(len(ids), len(prompt)), mask], dim=1)
        position = (seen.long().cumsum(-1) - 1).clamp(min=0)
        return model(
            inputs_embeds=x,
            attention_mask=seen.long(),
            position_ids=position,
            use_cache=False,
            logits_to_keep=sentiment.last_positions(ids, last),  # none of what follows a soft word
        ).logits

    return forward


def save(folder, kind, prompt, model, **extra):
    """Write a learned prompt as PEFT writes it. kind: PROMPT_TUNING, P_TUNING or PREFIX_TUNING;
    prompt (P, numbers).
    """
    size = model.config
    config = {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "num_virtual_tokens": len(prompt),
        "token_dim": size.hidden_size,
        "num_layers": size.num_hidden_layers,
        "num_attention_heads": size.num_attention_heads,
        "num_transformer_submodules": 1,
    }
    config |= extra
    adapters.write(folder, config, {"prompt_embeddings": prompt.float()})


def load(folder, kind):
    """A prompt written by `save` or by PEFT: (P, numbers). Raises UserError for another kind."""
    config, tensors = adapters.read(folder, (kind,))
    where = printable(folder)
    found = printable(sorted(tensors))
    alone = tensors.keys() == {"prompt_embeddings"}
    run.check(alone, f"{where} lacks prompt_embeddings; it has {found}")
    prompt = tensors["prompt_embeddings"]
    count = config["num_virtual_tokens"]
    shape = tuple(prompt.shape)
    fits = prompt.dim() == 2 and len(prompt) == count
    run.check(
        fits, f"{where} has prompt_embeddings of shape {shape} for {count} num_virtual_tokens"
    )
    return prompt


def peft_network(model):
    """A PEFT model with a learned prompt or prefix, as a network of this chapter.

    PEFT counts padding as positions: where texts differ in length, soft words are a little farther
    away than ours.
    """

    def forward(ids, mask, last=0):
        return model(
            input_ids=ids,
            attention_mask=mask.long(),
            logits_to_keep=sentiment.last_positions(ids, last),
        ).logits

    return forward


def experiment(cfg, bench, soft, forward, kind, **extra):
    """Train the module `soft` before the frozen model, score, save what soft() gives -> metrics."""
    # the model is frozen, the soft prompt is trained
    bench.model.requires_grad_(False)
    whole = nn.ModuleDict({"model": bench.model, "soft": soft.to(bench.device)})
    metrics = llama2_full.experiment(cfg, bench, forward, whole)
    # as it was asked: an LSTM may round otherwise when it keeps what gradients need
    with torch.no_grad():
        prompt = soft()
    # what is kept is the prompt alone
    base = adapters.base_of(bench.model)
    save(bench.folder / "adapter", kind, prompt, bench.model, base_model_name_or_path=base, **extra)
    print(adapters.usage(bench.folder / "adapter", base))
    return metrics | {"checkpoint_MiB": llama2_full.size(bench.folder / "adapter")}


def through_peft(model, tokenizer, cfg):
    """The same soft words by the PEFT library -> its model; the start is ours, number by number
    (see the tests).
    """
    from peft import PromptTuningConfig, get_peft_model

    words = first_words(tokenizer, cfg.start, cfg.tokens, model.config.vocab_size)
    start = model.get_input_embeddings().weight[words].detach().float()
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=cfg.tokens)
    made: Any = get_peft_model(model, config)
    with torch.no_grad():
        made.prompt_encoder["default"].embedding.weight.copy_(start)
    return made


@torch.no_grad()
def nearest(prompt, embeddings):
    """The word of the vocabulary with the largest cosine to each soft word: (P, D), (V, D) -> (P,)."""
    a = F.normalize(prompt.float(), dim=-1)
    b = F.normalize(embeddings.float(), dim=-1)
    cosine = a @ b.T
    return cosine.argmax(-1)


def main(cfg: Config) -> dict:
    """Start from words, train, score; write the prompt in PEFT's layout and the words nearest to
    what was learned.
    """
    run.check(cfg.tokens > 0, "--tokens must be at least 1")
    bench = task_setup.start(cfg, before=cfg.tokens)
    # by PEFT
    if cfg.backend == "peft":
        model = through_peft(bench.model, bench.tokenizer, cfg)
        metrics = llama2_full.by_peft(cfg, bench, model, peft_network(model))
        return run.report(bench.folder, metrics, then="python finetune/llama2_ptune.py")
    # by the classes above: soft words that start as real ones
    embedding = bench.model.get_input_embeddings()
    words = first_words(bench.tokenizer, cfg.start, cfg.tokens, len(embedding.weight))
    soft = SoftPrompt(embedding, words)
    metrics = experiment(cfg, bench, soft, network(bench.model, soft), "PROMPT_TUNING")
    # what they are nearest to after training
    nearest_words = nearest(soft(), embedding.weight).tolist()
    print("nearest words:", *(repr(bench.tokenizer.decode([i])) for i in nearest_words))
    return run.report(bench.folder, metrics, then="python finetune/llama2_ptune.py")


if __name__ == "__main__":
    run.cli(main, Config)
