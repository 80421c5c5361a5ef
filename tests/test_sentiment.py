"""finetune/sentiment.py: labels on the answer alone, scores as by hand, padding on the right side, no leak."""

import numpy as np
import pytest
import torch

from finetune import llama2_full, sentiment
from tests.llamas import tiny
from utils import pretrained, run


class Letters:
    """A tokenizer of single letters: a = 2, b = 3 ...; 1 ends a text."""

    eos_token_id = 1

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(c) - 95 if c.isalpha() else 100 + ord(c) % 16 for c in text.lower()]}

    def decode(self, ids):
        return "".join(chr(i + 95) for i in ids)


TASK = sentiment.Task(pattern="x{text}y", words=("no", "yes"))
CPU = torch.device("cpu")


def letters(text):
    return Letters()(text)["input_ids"]


def test_the_answer_is_learned_and_nothing_else():
    ids, mask, labels = sentiment.batch(Letters(), TASK, [("a", 0), ("abc", 1)])
    assert ids[1].tolist() == letters("xabcyyes") + [1]
    assert labels[1].tolist() == [-100] * 5 + letters("yes") + [1]  # the end token is learned, too
    assert labels[0].tolist() == [-100] * 6 + letters("no") + [1]  # neither padding nor prompt
    assert mask[0].tolist() == [False] * 3 + [True] * 6 and mask[1].all()


def test_loss_counts_answers_only():
    """Against the sum by hand over the labelled tokens; other logits may be what they want."""
    logits = torch.randn(2, 9, 120)
    ids, mask, labels = sentiment.batch(Letters(), TASK, [("a", 0), ("abc", 1)])
    by_hand = []
    for row, want in zip(logits, labels):
        by_hand += [-row[i].log_softmax(-1)[want[i + 1]] for i in range(8) if want[i + 1] >= 0]
    assert len(by_hand) == 3 + 4
    network = lambda ids, mask, last: logits[:, -last:]  # noqa: E731
    loss = llama2_full.loss(network, ids, mask, labels)
    torch.testing.assert_close(loss, torch.stack(by_hand).mean())
    logits[0, :5] = 9  # padding and prompt
    logits[1, :4] = 9  # prompt
    assert llama2_full.loss(network, ids, mask, labels) == loss
    unmasked = torch.where(mask, ids, -100)  # the usual mistake: the prompt is learned, too
    unmasked[:, 0] = -100  # nothing stands before it
    assert llama2_full.loss(network, ids, mask, unmasked) != loss


def test_a_model_that_never_saw_the_end_token_does_not_stop():
    """The same tiny model, trained with the end token in its labels and without."""
    ended = {}
    for end in (True, False):
        model = tiny().train()
        network, optimizer = sentiment.network(model), torch.optim.AdamW(model.parameters(), 5e-3)
        ids, mask, labels = sentiment.batch(Letters(), TASK, [("a", 0), ("abc", 1)])
        labels = labels if end else torch.where(ids == 1, -100, labels)
        for _ in range(150):
            optimizer.zero_grad()
            llama2_full.loss(network, ids, mask, labels).backward()
            optimizer.step()
        written = sentiment.generate(network, Letters(), ["xay", "xabcy"], CPU, tokens=8)
        ended[end] = [len(w) for w in written]
        assert [w[:2] for w in written] == ["no", "ye"]
    assert ended[True] == [2, 3] and min(ended[False]) > 3


def test_long_texts_are_cut_and_questions_are_not():
    long = "ab" * sentiment.MAX_TOKENS
    assert sentiment.prompt(Letters(), TASK, long) == "x" + long[: sentiment.MAX_TOKENS] + "y"


def right(rows, fill):
    return torch.tensor([row + [fill] * (max(map(len, rows)) - len(row)) for row in rows])


def test_padding_on_the_left_moves_nothing_and_on_the_right_breaks_generation():
    model, rows = tiny(), [[5, 6, 7, 8, 9], [10, 11]]
    network, out = sentiment.network(model), {}
    there = [[True] * 5, [True] * 2]
    for pad in (sentiment.pad, right):
        ids, mask = pad(rows, 1), pad(there, False)
        out[pad] = network(ids, mask)
        alone = torch.cat([network(torch.tensor([r]), torch.ones(1, len(r), dtype=torch.bool))[0] for r in rows])
        torch.testing.assert_close(out[pad][mask], alone, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(network(ids, mask, 2), out[pad][:, -2:])
    last = alone[-1]
    torch.testing.assert_close(out[sentiment.pad][1, -1], last, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(out[right][1, -1], last, atol=1e-2)  # the usual mistake


def test_generate_equals_transformers(parity):
    model, tokenizer = tiny(), Letters()
    questions = ["abcde", "fg", "hij"]
    ours = sentiment.generate(sentiment.network(model), tokenizer, questions, CPU, tokens=5, size=2)
    for question, text in zip(questions, ours):
        ids = torch.tensor([letters(question)])
        with torch.autocast("cpu", torch.bfloat16):
            long = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=1)[0, ids.shape[1] :].tolist()
        theirs = tokenizer.decode(long[: long.index(1)] if 1 in long else long)
        codes = [torch.tensor([ord(c) for c in x] or [0]) for x in (text, theirs)]
        parity("Sentiment", "sentiment.generate", "transformers generate", *codes)


def test_likelihood_is_the_sum_over_the_answer_s_tokens():
    model, tokenizer, words = tiny(), Letters(), ("no", "yes", "yet", "ye")
    network = sentiment.network(model)
    got = sentiment.likelihood(network, tokenizer, ["abcd", "ef"], [letters(w) for w in words], CPU)
    for i, q in enumerate(["abcd", "ef"]):
        for k, w in enumerate(words):
            ids = torch.tensor([letters(q + w)])
            with torch.autocast("cpu", torch.bfloat16):
                logp = network(ids, torch.ones_like(ids, dtype=torch.bool))[0].float().log_softmax(-1)
            want = sum(float(logp[j - 1, ids[0, j]]) for j in range(len(q), len(q) + len(w)))
            assert got[i, k] == pytest.approx(want, abs=0.03)  # bf16, other padding


class Spaced(Letters):
    """Marks the start of a text, as the tokenizer of Llama 2 does: a word alone has a token more."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [0] * add_special_tokens + [99] + super().__call__(text)["input_ids"]}


def test_answers_are_tokens_as_they_stand_behind_a_question():
    assert sentiment.answers(Spaced(), TASK) == [letters("no"), letters("yes")]
    assert sentiment.answers(Spaced(), sentiment.Task(pattern="{text}", words=("no", "b"))) == [
        letters("no"),
        letters("b"),
    ]


def test_a_blank_at_the_end_of_the_pattern_is_refused():
    """It belongs to the word behind it, and would leave an answer without a token."""
    tokenizer, _ = pretrained.smollm2()
    with pytest.raises(run.UserError, match="a blank at the end"):
        sentiment.answers(tokenizer, sentiment.Task(pattern="{text}\nSentiment: ", words=("negative", "positive")))
    with pytest.raises(run.UserError, match="none is empty"):
        sentiment.answers(tokenizer, sentiment.Task(words=("", " positive")))


def test_splits_are_fixed_and_copies_stay_together():
    assert sentiment.part("LOL so happy! http://a.b/c") == sentiment.part("@you lol SO happy")
    parts = sentiment.load(sentiment.Task())
    assert {k: len(v) for k, v in parts.items()} == {"train": 2357, "valid": 333, "test": 672, "scored": 672}
    letters = [{sentiment.share(t) for t, _ in parts[k]} for k in ("train", "valid", "test")]
    assert not letters[0] & letters[1] and not letters[0] & letters[2] and not letters[1] & letters[2]
    assert sentiment.share("Привет!") == sentiment.share("привет") != sentiment.share("мир плохо")
    few = sentiment.load(sentiment.Task(split="valid", texts=7))
    assert few["scored"] == parts["valid"][:7]
    for name in ("products", "films"):
        assert min(map(len, sentiment.load(sentiment.Task(data=name)).values())) > 250


def test_scores_against_a_case_by_hand():
    truth, said = [0, 0, 0, 1], [0, 0, 1, 1]
    assert sentiment.accuracy(truth, said) == 0.75
    assert sentiment.macro_f1(truth, said) == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert sentiment.macro_f1([0, 1], [-1, 1]) == pytest.approx(0.5)  # no answer is a wrong answer
    rng = np.random.default_rng(0)
    truth = rng.integers(2, size=400)
    said = np.where(rng.random(400) < 0.8, truth, 1 - truth)
    low, high = sentiment.interval(truth, said)
    by_hand = 1.96 * np.sqrt(0.8 * 0.2 / 400)
    assert high - low == pytest.approx(2 * by_hand, rel=0.15) and low < sentiment.accuracy(truth, said) < high


def test_macro_f1_is_that_of_torchmetrics(parity):
    from torchmetrics.functional.classification import multiclass_f1_score

    truth, said = torch.randint(3, (200,)), torch.randint(3, (200,))
    theirs = multiclass_f1_score(said, truth, 3, average="macro")
    ours = sentiment.macro_f1(truth, said)
    parity("Sentiment", "sentiment.macro_f1", "torchmetrics multiclass_f1_score", ours, theirs)


def test_generated_answers_are_named():
    words = (" negative", " positive")
    assert sentiment.named([" Positive", "negative.", "  :)", "", "pos"], words) == [1, 0, -1, -1, -1]
    assert sentiment.named([" 10", " 1"], (" 1", " 10")) == [1, 0]


def test_own_data(tmp_path):
    rows = [f"text number {i},{'good' if i % 3 else 'bad'}" for i in range(90)]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *rows]))
    task = sentiment.Task(data=str(tmp_path / "a.csv"), words=(" bad", " good"))
    parts = sentiment.load(task)
    assert sum(len(parts[k]) for k in ("train", "valid", "test")) == 90 and {y for _, y in parts["train"]} == {0, 1}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data": "nowhere.csv"}, "no data at nowhere.csv"),
        ({"data": "README.md"}, "must be a .csv or .jsonl"),
        ({"pattern": "no place"}, "--pattern"),
        ({"words": (" a", " a")}, "--words"),
        ({"words": (" a", " b", " c")}, "--words must be two"),
        ({"texts": -1}, "--texts"),
        ({"threshold": 4.5}, "too few texts"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(run.UserError, match=message):
        sentiment.load(sentiment.Task(**change))


def test_bad_files(tmp_path):
    path = tmp_path / "a.csv"
    for content, message in (("text,label\nx,odd\n", "label 'odd'"), ("a,b\n1,2\n", "columns text and label"),
                             ("text,label\nx,no\n", "too few")):  # fmt: skip
        path.write_text(content)
        with pytest.raises(run.UserError, match=message):
            sentiment.load(sentiment.Task(data=str(path), words=("no", "yes")))
