"""finetune/llama2_hard_prompt.py: examples, calibration, and a beginning that is read once."""

import pytest
import torch

from finetune import llama2_hard_prompt, sentiment
from tests.llamas import tiny
from tests.test_sentiment import Letters
from utils import run


def test_examples_show_labels_in_turn():
    pairs = [("a", 0), ("b", 0), ("c", 1), ("d", 1)]
    shown = llama2_hard_prompt.examples(pairs, 4, ("x", "y"))
    assert [y for _, y in shown] == [0, 1, 0, 1] and len(set(shown)) == 4
    with pytest.raises(run.UserError, match="--shots 5"):
        llama2_hard_prompt.examples(pairs, 5, ("x", "y"))
    task = sentiment.Task(pattern="q {text}:", words=(" x", " y"))
    text = llama2_hard_prompt.shown(Letters(), task, shown[:2])
    assert text == f"q {shown[0][0]}: x\n\nq {shown[1][0]}: y\n\n"


def test_what_is_read_once_counts_as_if_it_stood_before_each_question():
    model, tokenizer, few = tiny(), Letters(), "abc"
    got = llama2_hard_prompt.after(model, tokenizer, few)(torch.tensor([[5, 6]]), torch.ones(1, 2, dtype=torch.bool))
    whole = torch.tensor([tokenizer(few)["input_ids"] + [5, 6]])
    plain = sentiment.network(model)(whole, torch.ones_like(whole, dtype=torch.bool), 2)
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-4)


def test_calibration_takes_the_habit_away():
    scores, empty = torch.tensor([[-1.0, -0.5], [-1.0, 2.0]]), torch.tensor([[-1.0, 0.0]])
    assert llama2_hard_prompt.calibrated(scores, empty).argmax(-1).tolist() == [0, 1]
