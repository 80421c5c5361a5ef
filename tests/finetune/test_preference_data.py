"""finetune/preference_data.py and preference_scores.py: what is sampled, rated, paired and scored."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from finetune import dpo, preference_data, preference_scores
from finetune.preference_data import Answers, Sampling
from tests.llamas import folder, tiny, tokenizer
from tests.preferences import PAIRS, direct, policy
from utils import pretrained

PROMPTS = ["I hope you", "Also, thank goodness for walkthroughs of", "Hooray for new"]


def model():
    made = tiny(vocabulary=len(tokenizer()))
    torch.nn.init.normal_(made.lm_head.weight, std=0.3)
    return made


@pytest.mark.parametrize("least", [1, 5])
def test_sampling_near_temperature_0_equals_greedy_generate(least, parity):
    """Prompts of different lengths, padded on the left, each read once for two completions."""
    made = model()
    sampling = Sampling(2, least, 8, temperature=1e-5)
    found = preference_data.sample(made, tokenizer(), PROMPTS, sampling, seed=0)
    for text, (first, second) in zip(PROMPTS, found):
        ids = tokenizer()(text, return_tensors="pt")["input_ids"]
        about = {"do_sample": False, "min_new_tokens": least, "max_new_tokens": 8}
        ends = {"eos_token_id": 2, "pad_token_id": 2}
        theirs = made.generate(ids, **about, **ends)[:, ids.shape[1] :]
        assert first == second
        name = "transformers generate"
        parity("DPO", "preference_data.sample", name, torch.tensor([first]), theirs, atol=0)


def test_completions_end_at_the_end_token_and_not_before_the_least():
    """A model that nearly always wants to end."""
    made = model()

    class Ends(torch.nn.Module):
        def forward(self, states):
            logits = torch.zeros(*states.shape[:-1], len(tokenizer()))
            logits[..., 2] = 20.0
            return logits

    made.lm_head = Ends()
    found = preference_data.sample(made, tokenizer(), PROMPTS, Sampling(3, 2, 6), seed=0)
    rows = [row for rows in found for row in rows]
    assert len(rows) == 9 and all(len(row) == 3 and row[-1] == 2 for row in rows)
    assert all(2 not in row[:2] for row in rows)
    # none ends: cut, without an end token
    found = preference_data.sample(made, tokenizer(), PROMPTS, Sampling(1, 6, 6), seed=0)
    assert all(len(row) == 6 and 2 not in row for (row,) in found)


def test_the_seed_decides_and_completions_of_a_prompt_differ():
    made = model()
    first = preference_data.sample(made, tokenizer(), PROMPTS, Sampling(3), seed=5)
    assert first == preference_data.sample(made, tokenizer(), PROMPTS, Sampling(3), seed=5)
    assert first != preference_data.sample(made, tokenizer(), PROMPTS, Sampling(3), seed=6)
    assert all(len(set(rows)) == 3 for rows in first)


def test_tokens_are_drawn_by_their_probability():
    logits = torch.tensor([0.5, 0.0, 0.3, 0.2]).log().expand(20_000, 4)
    drawn = preference_data.choose(logits, 1.0, torch.Generator().manual_seed(0))
    rates = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(rates, torch.tensor([0.5, 0.0, 0.3, 0.2]), atol=0.015, rtol=0)
    # half the temperature squares the odds
    drawn = preference_data.choose(logits, 0.5, torch.Generator().manual_seed(0))
    rates = torch.bincount(drawn, minlength=4) / 20_000
    square = torch.tensor([0.25, 0.0, 0.09, 0.04]) / 0.38
    torch.testing.assert_close(rates, square, atol=0.015, rtol=0)


def test_the_reward_is_that_of_the_continuation_without_its_end():
    good = tuple(tokenizer()(" what a wonderful day!")["input_ids"])
    bad = tuple(tokenizer()(" what a terrible day!")["input_ids"])
    scores = preference_data.rewards(tokenizer(), [good, bad, (*good, 2)])
    assert scores[0] > 0.5 and scores[1] < -0.3 and scores[2] == scores[0]


def test_best_against_worst_and_no_pair_of_equals():
    answers = [
        Answers("a", "", [(1,), (2,), (3,)], [0.1, 0.9, -0.2]),
        Answers("b", "", [(1,), (2,), (3,)], [0.1, 0.1, 0.1]),
        Answers("c", "", [(1,), (2,), (3,)], [0.0, 0.2, 0.1]),
    ]
    (pair,) = preference_data.rank(answers, 0.3)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("a", (2,), (3,))
    assert pair.margin == pytest.approx(1.1)
    assert len(preference_data.rank(answers, 0.1)) == 2


def test_no_beginning_is_in_two_parts():
    parts = {part: preference_data.beginnings(part) for part in ("train", "valid", "test")}
    texts = {part: {text for text, _ in rows} for part, rows in parts.items()}
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["valid"]
    assert all(len(text.split()) == 5 for text in texts["test"])
    assert all(rest.startswith(" ") and len(rest.split()) >= 4 for _, rest in parts["test"])


def test_answers_are_kept_for_the_same_flags_alone(tmp_path, monkeypatch):
    calls = []

    def answer(model, tokenizer, rows, sampling, seed):
        calls.append(seed)
        return [Answers("a\nb", " c", [(1, 2), (3,)], [0.5, -0.5])]

    monkeypatch.setattr(preference_data, "answer", answer)
    monkeypatch.setattr(preference_data.assets, "fetch", lambda name: tmp_path)
    about = ("smollm2", None, None, "train", 2)
    first = preference_data.cached_answers(*about, Sampling(), 0)
    assert preference_data.cached_answers(*about, Sampling(), 0) == first and calls == [0]
    assert first == [Answers("a\nb", " c", [(1, 2), (3,)], [0.5, -0.5])]
    preference_data.cached_answers(*about, Sampling(), 1)
    preference_data.cached_answers(*about, replace(Sampling(), temperature=1.0), 0)
    assert calls == [0, 1, 0]
    # another model's are never kept
    preference_data.cached_answers("elsewhere", *about[1:], Sampling(), 0)
    assert calls == [0, 1, 0, 0] and len(list(tmp_path.iterdir())) == 3


def test_pairs_are_of_training_prompts_and_scores_of_held_out_ones(tmp_path, monkeypatch):
    asked = []

    def answers(name, model, tokenizer, part, count, sampling, seed):
        asked.append((part, count, sampling, seed))
        return [Answers(part, "", [(1,), (2,)], [1.0, 0.0])] * count

    monkeypatch.setattr(preference_data, "cached_answers", answers)
    monkeypatch.setattr(pretrained, "smollm2", lambda device: (None, None))
    cfg = dpo.Config(prompts=7, held_out=3, split="valid", seed=4, samples=5, temperature=0.5)
    _, _, pairs, held_out = preference_data.load(cfg, torch.device("cpu"))
    sampling = Sampling(5, 4, 24, 0.5)
    assert asked == [("train", 7, sampling, 4), ("valid", 3, sampling, 5)]
    assert {pair.prompt for pair in pairs} == {"train"} and held_out[0].prompt == "valid"


def test_wins_ties_and_their_interval():
    won = preference_scores.wins([1.0, 0.2, 0.3], [0.5, 0.2, 0.9])
    assert won.tolist() == [1.0, 0.5, 0.0]
    found = preference_scores.mean_interval(np.tile([1.0, 0.0, 1.0, 1.0], 25))
    assert found["mean"] == 0.75 and 0.64 < found["low"] < 0.70 and 0.80 < found["high"] < 0.86


def test_distinct_counts_pairs_of_neighbours():
    assert preference_scores.distinct([(1, 2, 3), (1, 2)]) == pytest.approx(2 / 3)
    assert preference_scores.distinct([(1,)]) == 0.0


def test_scores_of_a_policy_that_is_the_reference_and_of_one_that_is_not(tmp_path, monkeypatch):
    made, base = policy()
    answers = [
        Answers(p.prompt, " and on it goes", [p.chosen, p.rejected], [0.9, 0.1]) for p in PAIRS
    ]
    drawn = [[(5, 6, 7, 2)], [(8, 9)], [(5, 6, 2)]]
    seen = []

    def sample(model, tokenizer, prompts, sampling, seed):
        seen.append((model, sampling.samples, seed))
        return drawn

    monkeypatch.setattr(preference_data, "sample", sample)
    monkeypatch.setattr(preference_data, "rewards", lambda tokenizer, rows: [1.0, 0.9, 0.3])
    cfg = dpo.Config(seed=7)
    found = preference_scores.evaluate(made, tokenizer(), answers, cfg)
    # the policy writes, once, with another seed; a win, a tie, a loss
    assert seen == [(made, 1, 9)]
    assert found["win rate"]["mean"] == 0.5 and found["win rate"]["ties"] == pytest.approx(1 / 3)
    # nobody ended the second text: a tie
    equal = found["win rate at equal length"]
    assert (equal["mean"], equal["prompts"]) == (0.5, 1)
    assert found["reward"] == {"before": pytest.approx(0.9), "after": pytest.approx(2.2 / 3)}
    assert found["tokens"] == {"before": pytest.approx(10 / 3), "after": pytest.approx(3.0)}
    # from log-probabilities of each row alone
    rows = list(zip([p.prompt for p in PAIRS], [rows[0] for rows in drawn]))
    ratio = [float(direct(made, *row) - direct(base, *row)) for row in rows]
    assert found["log-ratio of own samples"] == pytest.approx(np.mean(ratio), abs=1e-4)
    rest = tokenizer()(" and on it goes", add_special_tokens=False)["input_ids"]
    for name, network in {"before": base, "after": made}.items():
        nll = -sum(float(direct(network, p.prompt, rest)) for p in PAIRS) / (3 * len(rest))
        assert found["text loss"][name] == pytest.approx(nll, abs=1e-4)
        # a number in metrics.json, not a text
        assert isinstance(found["log p(chosen)"][name], float)
        chosen = np.mean([float(direct(network, p.prompt, p.chosen)) for p in PAIRS])
        assert found["log p(chosen)"][name] == pytest.approx(chosen, abs=1e-3)
    ratios = []
    for p in PAIRS:
        won = direct(made, p.prompt, p.chosen) - direct(base, p.prompt, p.chosen)
        ratios.append(won > direct(made, p.prompt, p.rejected) - direct(base, p.prompt, p.rejected))
    assert found["pair accuracy"]["mean"] == pytest.approx(np.mean(ratios))


def test_a_real_model_writes_and_is_rated(tmp_path):
    """The path from a folder to answers, once without anything replaced."""
    tokens, made = pretrained.language_model(folder(tmp_path / "model"))
    rows = preference_data.beginnings("test")[:2]
    found = preference_data.answer(made, tokens, rows, Sampling(2, 1, 3), seed=0)
    assert [len(row.completions) for row in found] == [2, 2] and found[0].rest == rows[0][1]
    assert found[0].prompt.endswith(rows[0][0]) and found[0].prompt.count(rows[0][0]) == 2
    assert isinstance(found[0].rewards[0], float)
