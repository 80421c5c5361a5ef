"""finetune/llama2_prefix.py: what is read is what is said. Its equality with PEFT is in test_llama2_prompt.py."""

import torch

from finetune import llama2_prefix, sentiment
from tests.llamas import tiny


def test_a_prefix_read_from_words_says_what_the_words_say():
    """Few-shot examples and deep prompts begin like this: keys and values of a text are the text."""
    model, words, text = tiny(), [7, 8, 9, 10], [[5, 6, 7], [11, 12]]
    kept = llama2_prefix.read(model, torch.tensor(words))
    assert kept.shape == (4, 64)
    ids, mask = sentiment.pad(text, 1), sentiment.pad([[True] * 3, [True] * 2], False)
    got = llama2_prefix.network(model, lambda: kept)(ids, mask)[mask]
    plain = sentiment.network(model)
    rows = [plain(torch.tensor([words + t]), torch.ones(1, 4 + len(t), dtype=torch.bool))[0, 4:] for t in text]
    torch.testing.assert_close(got, torch.cat(rows), atol=1e-5, rtol=1e-4)


def test_a_start_from_text_begins_as_that_text_and_can_move():
    kept = llama2_prefix.read(tiny(), torch.tensor([7, 8, 9]))
    prefix = llama2_prefix.PrefixEncoder(3, *llama2_prefix.sizes(tiny()), hidden=12, start=kept)
    assert torch.equal(prefix(), kept) and "start" not in prefix.state_dict()
    prefix().sum().backward()
    assert prefix.transform[2].weight.grad.abs().sum() > 0
