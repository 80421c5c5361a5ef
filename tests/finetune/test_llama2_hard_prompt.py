"""finetune/llama2_hard_prompt.py: examples, calibration, and a beginning that is read once."""

import numpy as np
import pytest
import torch

from finetune import llama2_hard_prompt, sentiment, sentiment_data, task_setup
from tests.finetune.test_sentiment import Letters
from tests.llamas import tiny
from utils import run


def test_examples_show_labels_in_turn():
    pairs = [("a", 0), ("b", 0), ("c", 1), ("d", 1)]
    shown = llama2_hard_prompt.examples(pairs, 4, ("x", "y"))
    assert [y for _, y in shown] == [0, 1, 0, 1] and len(set(shown)) == 4
    with pytest.raises(run.UserError, match="--shots 5"):
        llama2_hard_prompt.examples(pairs, 5, ("x", "y"))
    task = sentiment_data.Task(pattern="q {text}:", words=(" x", " y"))
    text = llama2_hard_prompt.shown(Letters(), task, shown[:2])
    assert text == f"q {shown[0][0]}: x\n\nq {shown[1][0]}: y\n\n"


def test_what_is_read_once_counts_as_if_it_stood_before_each_question():
    model, tokenizer, few = tiny(), Letters(), "abc"
    got = llama2_hard_prompt.after(model, tokenizer, few)(
        torch.tensor([[5, 6]]), torch.ones(1, 2, dtype=torch.bool)
    )
    whole = torch.tensor([tokenizer(few)["input_ids"] + [5, 6]])
    plain = sentiment.network(model)(whole, torch.ones_like(whole, dtype=torch.bool), 2)
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-4)


def test_calibration_takes_the_habit_away():
    scores, empty = torch.tensor([[-1.0, -0.5], [-1.0, 2.0]]), torch.tensor([[-1.0, 0.0]])
    assert llama2_hard_prompt.calibrated(scores, empty).argmax(-1).tolist() == [0, 1]


def test_examples_come_from_training_and_calibration_from_an_empty_text(monkeypatch, tmp_path):
    """What is asked, of which network, and which scores are reported: all with stand-ins."""
    parts = {
        "train": [(f"train {i}", i % 2) for i in range(8)],
        "scored": [("a", 0), ("b", 1), ("c", 1)],
    }
    bench = task_setup.Bench(tmp_path, torch.device("cpu"), Letters(), tiny(), parts)
    read, asked = [], []

    def likelihood(network, tokenizer, questions, answers, device):
        asked.append(questions)
        leaning = torch.tensor([[0.0, 1.0]])  # it would rather say the second
        truth = (
            torch.tensor([[0.5, -0.5], [-0.5, 0.5], [-0.5, 0.5]])
            if len(questions) == 3
            else torch.zeros(1, 2)
        )
        return truth[: len(questions)] + 1.5 * leaning

    monkeypatch.setattr(task_setup, "start", lambda cfg: bench)
    monkeypatch.setattr(
        llama2_hard_prompt, "after", lambda model, tokenizer, text: read.append(text)
    )
    monkeypatch.setattr(sentiment, "likelihood", likelihood)
    monkeypatch.setattr(
        sentiment, "generate", lambda network, tokenizer, questions, *rest: [" no way"] * 3
    )
    cfg = llama2_hard_prompt.Config(pattern="say {text}:", words=(" no", " yes"), shots=(0, 4))
    found = llama2_hard_prompt.main(cfg)
    assert asked[:2] == [["say a:", "say b:", "say c:"], ["say N/A:"]]
    assert (
        read[0] == read[2] == ""
        and read[1].count("say train ") == 4
        and read[1].count(": no\n\n") == 2
    )
    assert found["yours, 0 examples"]["accuracy"] == pytest.approx(2 / 3)
    assert found["yours, 4 examples, calibrated"]["accuracy"] == 1.0
    assert found["yours, 0 examples, generated"]["accuracy"] == pytest.approx(1 / 3)
    assert np.isclose(found["majority"]["accuracy"], 1 / 3)
    assert len([q for q in asked if len(q) == 3]) == 5  # the first wording twice, three others once
