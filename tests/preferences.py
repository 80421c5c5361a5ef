"""Pairs, a tiny policy and answers that no model wrote, for the tests of preference learning."""

import torch

from finetune import lora_inject, preference_data
from finetune.preference_data import Answers, Pair
from tests.llamas import tiny, tokenizer

PAIRS = [
    Pair("I hope you", (220, 330, 2), (440, 550, 660, 2), 0.5),
    Pair("Also, thank goodness for walkthroughs of", (77, 88, 99, 111), (123, 2), 0.9),
    Pair("Hooray", (500, 600, 2), (700, 2), 0.4),
]


def policy(dropout=0.0):
    """A tiny Llama with the real vocabulary and adapters that have moved; and the same without any."""
    words = len(tokenizer())
    model = tiny(vocabulary=words)
    lora_inject.inject(model, ("q_proj", "v_proj"), 3, 6.0, dropout)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model, tiny(vocabulary=words)


@torch.no_grad()
def direct(model, prompt, completion):
    """log p(completion | prompt) of one row alone, token by token, nothing padded."""
    before = tokenizer()(prompt)["input_ids"]
    ids = torch.tensor([before + list(completion)])
    log_p = model(ids).logits[0].log_softmax(-1)
    return sum(log_p[len(before) + j - 1, token] for j, token in enumerate(completion))


def fake(monkeypatch):
    """Answers without a model that can write: the reward is how many tokens are even."""

    def answers(name, model, tokenizer, part, count, sampling, seed):
        draw = torch.Generator().manual_seed(seed)
        made = []
        for i in range(count):
            written = torch.randint(10, 90, (sampling.samples, 6), generator=draw).tolist()
            rewards = [sum(t % 2 == 0 for t in row) / 6 for row in written]
            made.append(Answers(f"{part} {i} goes\non", " and on", written, rewards))
        return made

    def rewards(tokenizer, completions):
        return [sum(t % 2 == 0 for t in row) / max(1, len(row)) for row in completions]

    monkeypatch.setattr(preference_data, "cached_answers", answers)
    monkeypatch.setattr(preference_data, "rewards", rewards)
