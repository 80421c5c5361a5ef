"""Prompt-based classification, the task of this chapter: sentiment of texts; prompts, verbalisers,
likelihood, scores.

A language model answers by going on: "Tweet: LMAO, AMAZING!\\nSentiment:" -> " positive". To train
it, show it the prompt and the answer, and count the loss on the answer alone. To ask it, compare
how likely it finds each answer. Every method of this chapter learns these labels and is scored by
the functions below.

Texts and ratings, in sentiment_data.py: Hutto & Gilbert 2014, "VADER", ICWSM: 20 people rated each
text from -4 to 4.
Shapes: B texts a batch, L tokens, V words of the vocabulary, K answers. A network here is any
function (ids (B, L), mask (B, L), last) -> logits of the `last` positions at the end (B, last, V),
True in the mask where there is a token. Padding is on the left, so that all answers end together,
and the head, a fifth of a small model, is asked only where an answer stands.

    python finetune/sentiment.py                          # the data, and what two simple methods score on it
    python finetune/sentiment.py --data films
    python finetune/sentiment.py --data my_texts.csv      # columns text and label
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from finetune.classification_metrics import scores
from finetune.sentiment_data import SETS, Task, load
from utils import data, figures, run
from utils.text import plain

IGNORE = -100  # the label of a token that is not supervised
# Longer texts are cut, the question is not; a tweet has 28 with its question, and 71 at most
MAX_TOKENS = 64


@dataclass(frozen=True)
class Config(Task):
    """Describe the data and score two methods that read no language model."""

    seed: int = 0  # same seed, same numbers
    out: str = "outputs/sentiment"  # where the results go


def prompt(tokenizer, task, text):
    """The question about a text, as a string; the text is cut to MAX_TOKENS, the question never."""
    text = plain(text, tokenizer)  # a control token that a stranger wrote is letters, no command
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) > MAX_TOKENS:
        text = tokenizer.decode(ids[:MAX_TOKENS])
    return task.pattern.replace("{text}", text)


def answers(tokenizer, task):
    """Verbaliser: the tokens of each answer behind a question; a word alone may differ."""
    end = task.pattern.split("{text}")[-1] or "."
    before = tokenizer(end)["input_ids"]
    whole = [tokenizer(end + word)["input_ids"] for word in task.words]
    # the question must keep its tokens when an answer follows
    for ids in whole:
        run.check(
            ids[: len(before)] == before and len(ids) > len(before),
            "--pattern and --words: a blank at the end of the pattern belongs to the words, "
            "and none is empty",
        )
    return [ids[len(before) :] for ids in whole]


def encode(tokenizer, question, answer):
    """-> ids, labels (lists); only the answer and the end token are supervised."""
    # question, answer, end; only the last two are supervised
    before = tokenizer(question)["input_ids"]
    after = answer + [tokenizer.eos_token_id]
    return before + after, [IGNORE] * len(before) + after


def last_positions(ids, last):
    """The `last` positions, all if it is 0; a slice would make the head four times slower."""
    return torch.arange(-(last or ids.shape[1]), 0, device=ids.device)


def check_positions(model, positions):
    """Raises UserError if the model has been trained for fewer positions than are needed."""
    most = getattr(model.config, "max_position_embeddings", None) or positions
    run.check(
        positions <= most,
        f"a question can have {positions} positions, this model has {most}: shorten --pattern "
        "or what stands before it (--shots, --tokens)",
    )


def network(model):
    """A causal language model of transformers as a network of this chapter.

    Padding is masked. Positions count the tokens that are there: a Llama sees distances alone and
    would not mind, a model with learned positions would, and so would soft words that stand before
    the padding.
    """

    def forward(ids, mask, last=0):
        check_positions(model, ids.shape[1])
        position = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=position,
            use_cache=False,
            logits_to_keep=last_positions(ids, last),
        ).logits

    return forward


def pad(rows, fill):
    """Left padding: [[...], ...] -> (B, L); all rows end together, and go on from there."""
    length = max(map(len, rows))
    return torch.tensor([[fill] * (length - len(row)) + row for row in rows])


def batch(tokenizer, task, pairs):
    """[(text, label)] -> ids, mask, labels, each (B, L). Padding is masked and not learned."""
    words = answers(tokenizer, task)
    # one row for each text
    ids = []
    labels = []
    for text, label in pairs:
        row, supervised = encode(tokenizer, prompt(tokenizer, task, text), words[label])
        ids.append(row)
        labels.append(supervised)
    # padded with the end token, which is masked and has no label
    mask = pad([[True] * len(row) for row in ids], False)
    return pad(ids, tokenizer.eos_token_id), mask, pad(labels, IGNORE)


def batches(rows, size, fill):
    """Rows of token numbers, those of equal length together -> (their places, ids, mask), `size`
    rows at a time.
    """
    # neighbours in length need little padding
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for k in range(0, len(order), size):
        pick = order[k : k + size]
        ids = pad([rows[i] for i in pick], fill)
        mask = pad([[True] * len(rows[i]) for i in pick], False)
        yield pick, ids, mask


@torch.no_grad()
def likelihood(network, tokenizer, questions, answers, device, size=32):
    """log p(answer | question): questions (N strings), answers (K lists of tokens) -> (N, K).

    An answer of several tokens is a product: log p(a1 | question) + log p(a2 | question, a1) + ...
    """
    scores = torch.zeros(len(questions), len(answers))
    # one pass serves all answers that differ in their last token alone
    for stem in dict.fromkeys(tuple(a[:-1]) for a in answers):
        rows = [tokenizer(q)["input_ids"] + list(stem) for q in questions]
        for pick, ids, mask in batches(rows, size, tokenizer.eos_token_id):
            with run.autocast(device):
                logits = network(ids.to(device), mask.to(device), len(stem) + 1)
            logp = logits.float().log_softmax(-1).cpu()  # (B, tokens of the answer, V)
            # the log probability of each such answer, token by token
            for k, a in enumerate(answers):
                if tuple(a[:-1]) == stem:
                    scores[pick, k] = sum(logp[:, j, token] for j, token in enumerate(a))
    return scores


@torch.no_grad()
def generate(network, tokenizer, questions, device, tokens=4, size=32):
    """What the network writes after each question, greedily, up to the end token: [str]."""
    texts = [""] * len(questions)
    end = tokenizer.eos_token_id
    rows = [tokenizer(q)["input_ids"] for q in questions]
    for pick, ids, mask in batches(rows, size, end):
        ids = ids.to(device)
        mask = mask.to(device)
        # greedy: the likeliest token, and the mask is longer by one
        start = ids.shape[1]
        for _ in range(tokens):
            with run.autocast(device):
                new = network(ids, mask, 1)[:, -1:].argmax(-1)
            ids = torch.cat([ids, new], 1)
            mask = torch.cat([mask, torch.ones_like(new, dtype=torch.bool)], 1)
        # text up to the end token
        for i, row in zip(pick, ids[:, start:].tolist()):
            texts[i] = tokenizer.decode(row[: row.index(end)] if end in row else row)
    return texts


def parse_labels(texts, words):
    """Generated texts -> label numbers: the answer at the beginning, -1 if it is none of them."""
    beginnings = [word.strip().lower() for word in words]
    # the longest first: "not good" before "not"
    longest = sorted(range(len(words)), key=lambda i: -len(words[i].strip()))
    labels = []
    for text in texts:
        start = text.strip().lower()
        found = [i for i in longest if start.startswith(beginnings[i])]
        labels.append(found[0] if found else -1)
    return labels


def evaluate(network, tokenizer, task, pairs, device):
    """Scores of a network, by likelihood and by what it writes -> {"likelihood", "generated"}."""
    questions = [prompt(tokenizer, task, text) for text, _ in pairs]
    truth = [label for _, label in pairs]
    words = answers(tokenizer, task)
    # the likelier answer
    log_p = likelihood(network, tokenizer, questions, words, device)
    likely = log_p.argmax(-1).tolist()
    # the answer with which the generated text begins
    longest = max(map(len, words))
    texts = generate(network, tokenizer, questions, device, longest)
    written = parse_labels(texts, task.words)
    return {"likelihood": scores(truth, likely), "generated": scores(truth, written)}


def majority(parts):
    """Majority-class baseline: the most frequent training label for every scored text."""
    counts = Counter(label for _, label in parts["train"])
    ((label, _),) = counts.most_common(1)
    return [label] * len(parts["scored"])


def vader(texts):
    """VADER's own rules and word list: 1 where it hears more good than bad. Hutto & Gilbert 2014."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    rules = SentimentIntensityAnalyzer()
    return [int(rules.polarity_scores(text)["compound"] >= 0) for text in texts]


def draw_ratings(path, kind, threshold):
    """Histogram of the ratings of one of SETS: negative, left out, positive."""
    import matplotlib.pyplot as plt

    ratings = np.array([rating for _, rating in data.tweets(SETS[kind])])
    groups = (
        ("negative", "tab:red", ratings < -threshold),
        ("left out", "lightgrey", abs(ratings) <= threshold),
        ("positive", "tab:green", ratings > threshold),
    )
    bins = np.arange(-4, 4.01, 0.25)
    figure, axis = plt.subplots(figsize=(5.2, 2.8))
    for name, colour, chosen in groups:
        axis.hist(ratings[chosen], bins=bins, color=colour, label=f"{name}: {chosen.sum()}")
    axis.set(xlabel="mean rating by 20 people", ylabel="texts")
    axis.legend(frameon=False)
    figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Print the data, draw the ratings, score the majority and VADER."""
    run.seed(cfg.seed)
    parts = load(cfg)
    folder = run.output(cfg.out, cfg)
    metrics = {name: len(pairs) for name, pairs in parts.items()}
    # two classifiers without a language model
    texts, truth = zip(*parts["scored"])
    metrics["positive_share"] = float(np.mean(truth))
    metrics["majority"] = scores(truth, majority(parts))
    if len(cfg.words) == 2:
        metrics["vader"] = scores(truth, vader(texts))
    # ratings, and the first texts
    if cfg.data in SETS:
        draw_ratings(folder / "ratings.png", cfg.data, cfg.threshold)
    for text, label in parts["scored"][:6]:
        print(f"{cfg.words[label]:>12}  {text[:90]}")
    return run.report(folder, metrics, then="python finetune/llama2_hard_prompt.py")


if __name__ == "__main__":
    run.cli(main, Config)
