"""finetune/llama2_prefix.py: what is read is what is said. Its equality with PEFT is in test_llama2_prompt.py."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from finetune import llama2_prefix, llama2_prompt, sentiment, task_setup
from tests.finetune.test_sentiment import Letters
from tests.llamas import learned_positions, tiny
from utils import run


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "opt-350m"])
def test_a_prefix_read_from_words_says_what_the_words_say(kind):
    """Few-shot examples and deep prompts begin like this: keys and values of a text are the text."""
    model, words, text = (
        tiny() if kind == "llama" else learned_positions(kind),
        [7, 8, 9, 10],
        [[5, 6, 7], [11, 12]],
    )
    kept = llama2_prefix.read(model, torch.tensor(words))
    assert kept.shape == (4, 64 if kind == "llama" else 128)
    ids, mask = sentiment.pad(text, 1), sentiment.pad([[True] * 3, [True] * 2], False)
    got = llama2_prefix.network(model, lambda: kept)(ids, mask)[mask]
    plain = sentiment.network(model)
    rows = [
        plain(torch.tensor([words + t]), torch.ones(1, 4 + len(t), dtype=torch.bool))[0, 4:]
        for t in text
    ]
    torch.testing.assert_close(got, torch.cat(rows), atol=1e-5, rtol=1e-4)


def test_a_start_from_text_begins_as_that_text_and_can_move():
    kept = llama2_prefix.read(tiny(), torch.tensor([7, 8, 9]))
    prefix = llama2_prefix.PrefixEncoder(3, *llama2_prefix.sizes(tiny()), hidden=12, start=kept)
    assert torch.equal(prefix(), kept) and "start" not in prefix.state_dict()
    prefix().sum().backward()
    assert prefix.transform[2].weight.grad.abs().sum() > 0


def test_a_model_that_forgets_what_is_far_away_is_refused():
    config = MistralConfig(
        vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    with pytest.raises(run.UserError, match="mistral keep DynamicSlidingWindowLayer"):
        llama2_prefix.sizes(MistralForCausalLM(config))


def test_a_prefix_begins_as_the_words_of_start_and_as_nothing_without_them():
    bench = task_setup.Bench(None, torch.device("cpu"), Letters(), tiny(), {})
    start = llama2_prefix.beginning(bench, llama2_prefix.Config(start="abc", tokens=5))
    words = llama2_prompt.first_words(Letters(), "abc", 5, 0)
    assert torch.equal(start, llama2_prefix.read(tiny(), words)) and start.shape == (5, 64)
    assert llama2_prefix.beginning(bench, llama2_prefix.Config(start="")) is None


def test_the_words_of_start_reach_the_encoder(monkeypatch):
    """Before the first step the prefix that is trained is what the model remembers of --start."""
    bench = task_setup.Bench(None, torch.device("cpu"), Letters(), tiny(), {})
    seen = []
    monkeypatch.setattr(task_setup, "start", lambda *about, **more: bench)
    monkeypatch.setattr(
        llama2_prompt,
        "experiment",
        lambda cfg, bench, prefix, *about, **more: seen.append(prefix()),
    )
    monkeypatch.setattr(run, "report", lambda *about, **more: {})
    cfg = llama2_prefix.Config(start="abc", tokens=5)
    llama2_prefix.main(cfg)
    assert torch.equal(seen[0], llama2_prefix.beginning(bench, cfg))


def test_a_prefix_counts_as_positions():
    many = torch.zeros(1, 125, dtype=torch.long)
    kept = llama2_prefix.read(tiny(), torch.tensor([7, 8, 9, 10]))
    with pytest.raises(run.UserError, match="129 positions, this model has 128"):
        llama2_prefix.network(tiny(), lambda: kept)(many, many == 0)
