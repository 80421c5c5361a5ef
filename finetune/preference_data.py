"""Preference pairs: two continuations of the beginning of a tweet, written by the model itself and
ranked by a reward that anyone can check.

The reward is VADER's compound score of the continuation alone, -1 to 1 (Hutto & Gilbert 2014,
ICWSM): a rule of a few hundred lines, so nobody has to guess what a judge meant. Pairs of the
model's own samples are on-policy: the reference model is the one that wrote them. Beginnings are
those of real tweets, dealt to training, validation and test by the hash of sentiment_data.py.

Shapes: B rows a batch, L tokens. A row is a prompt and a completion; padding is on the left, so
that all rows end together and generation goes on from there.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch

from finetune import sentiment, sentiment_data
from utils import assets, data, pretrained, run
from utils.text import plain

BEGINNING = 5  # words of a tweet that are given
SHORTEST = 9  # words that a tweet must have, so that something is left to write
PATTERN = "<|im_start|>user\nContinue this tweet: {text}<|im_end|>\n<|im_start|>assistant\n{text}"


class Answers(NamedTuple):
    """What the model wrote to one prompt."""

    prompt: str
    rest: str  # what the author of the tweet went on with
    completions: list  # tuples of tokens, the end token with them
    rewards: list  # of each completion


class Pair(NamedTuple):
    """Two completions of one prompt."""

    prompt: str
    chosen: tuple  # tokens of the completion with the higher reward
    rejected: tuple
    margin: float  # how much higher that reward is


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn, for pairs and for scores alike."""

    samples: int = 4  # completions of each prompt
    min_new_tokens: int = 4  # none ends before
    max_new_tokens: int = 24  # a longer one is cut
    temperature: float = 0.8  # of sampling


@dataclass(frozen=True)
class Training(Sampling):
    """The flags that all who learn from pairs share, after those of sampling."""

    model: str = "smollm2"  # smollm2, a local folder, or a hub id
    prompts: int = 200  # beginnings of tweets that pairs are made from
    least: float = 0.3  # pairs differ by at least so much reward
    held_out: int = 128  # beginnings of other tweets, for all scores
    split: Literal["test", "valid"] = "test"  # whose they are; settings are chosen on valid
    steps: int = 40  # training steps
    batch: int = 4  # pairs a step
    lr: float = 1e-3  # peak learning rate
    rank: int = 8  # r of LoRA; alpha is twice that
    dropout: float = 0.0  # dropout rate of an update's inputs in training
    resume: bool = False  # go on from the last checkpoint in --out, bit for bit
    save_every: int = 0  # steps between checkpoints; 0: none are written
    seed: int = 0  # same seed, same numbers
    device: str = "auto"  # cpu, cuda, ...


def beginnings(part):
    """The first words of the tweets of a part (train, valid, test), and what its author went on with
    -> [(beginning, rest)].
    """
    found = {}
    for text, _ in data.tweets():
        words = text.split()
        if len(words) >= SHORTEST:
            beginning = " ".join(words[:BEGINNING])
            rest = " " + " ".join(words[BEGINNING:])
            found.setdefault(beginning, {})[sentiment_data.part(text)] = rest
    # a beginning that tweets of two parts share is in neither
    rows = {text: rests[part] for text, rests in found.items() if set(rests) == {part}}
    # in the order of the hash, which is no order of the data set
    return sorted(rows.items(), key=lambda row: sentiment_data.hash_fraction(row[0] + row[1]))


def prompt(tokenizer, beginning):
    """The question to the assistant, whose answer begins with the beginning."""
    return PATTERN.replace("{text}", plain(beginning, tokenizer))


def choose(logits, temperature, generator):
    """One token from each row of logits (B, V) -> (B,): the place where the cumulative probability
    passes a uniform number.
    """
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)
    passed = torch.rand(len(logits), 1, generator=generator).to(logits.device)
    # a sum of 49,152 rounded numbers need not end at 1
    place = torch.searchsorted(cumulative, passed * cumulative[:, -1:])
    return place.squeeze(-1).clamp(max=logits.shape[1] - 1)


@torch.no_grad()
def sample(model, tokenizer, prompts, sampling, seed, size=32):
    """Completions of each prompt -> [[tuple of tokens] * samples], up to and with the end token if
    there is one.

    A prompt is read once for all its completions. The same seed gives the same completions of the
    same list.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [tokenizer(text)["input_ids"] for text in prompts]
    end = tokenizer.eos_token_id
    n = sampling.samples
    written = [[] for _ in rows]
    for pick, ids, mask in sentiment.batches(rows, size, end):
        # read the prompts; then as many copies of what is remembered of each as it has completions
        mask = mask.to(model.device).long()
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        about = {"use_cache": True, "logits_to_keep": 1}
        output = model(ids.to(model.device), attention_mask=mask, position_ids=position, **about)
        output.cache.batch_repeat_interleave(n)
        logits = output.logits[:, -1].repeat_interleave(n, 0)
        mask = mask.repeat_interleave(n, 0)
        position = position[:, -1:].repeat_interleave(n, 0)
        # write, token by token
        new = []
        for i in range(sampling.max_new_tokens):
            if i < sampling.min_new_tokens:
                logits[:, end] = -torch.inf
            token = choose(logits, sampling.temperature, generator)
            new.append(token)
            mask = torch.cat([mask, torch.ones_like(token)[:, None]], 1)
            position = position + 1
            about |= {"attention_mask": mask, "position_ids": position, "cache": output.cache}
            output = model(token[:, None], **about)
            logits = output.logits[:, -1]
        # what stands behind an end token is nothing
        for j, row in enumerate(torch.stack(new, 1).tolist()):
            stop = row.index(end) + 1 if end in row else len(row)
            written[pick[j // n]].append(tuple(row[:stop]))
    return written


def rewards(tokenizer, completions):
    """VADER's compound score of each completion, -1 to 1; special tokens are left out."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    rules = SentimentIntensityAnalyzer()
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in completions]
    return [rules.polarity_scores(text)["compound"] for text in texts]


def answer(model, tokenizer, rows, sampling, seed):
    """Write and rate completions: rows [(beginning, rest)] -> [Answers]."""
    prompts = [prompt(tokenizer, beginning) for beginning, _ in rows]
    written = sample(model, tokenizer, prompts, sampling, seed)
    return [
        Answers(text, rest, completions, rewards(tokenizer, completions))
        for text, (_, rest), completions in zip(prompts, rows, written)
    ]


def rank(answers, least):
    """Best against worst: [Answers] -> [Pair]; prompts whose rewards differ by less than `least` are
    left out.
    """
    pairs = []
    for text, _, completions, scores in answers:
        best = max(range(len(scores)), key=scores.__getitem__)
        worst = min(range(len(scores)), key=scores.__getitem__)
        margin = scores[best] - scores[worst]
        if margin >= least and best != worst:
            pairs.append(Pair(text, completions[best], completions[worst], margin))
    return pairs


def cached_answers(name, model, tokenizer, part, count, sampling, seed):
    """`answer` for the first `count` beginnings of a part, kept beside the asset if the model is the
    asset's -> [Answers].
    """

    def make():
        return {}, answer(model, tokenizer, beginnings(part)[:count], sampling, seed)

    if name != "smollm2":
        return make()[1]
    # the number of threads decides in which order numbers are added up, and so what is sampled
    arguments = (part, count, sampling, seed, torch.get_num_threads())
    key = json.dumps([repr(arguments), PATTERN, BEGINNING, SHORTEST])
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    _, rows = data.cached(assets.fetch("smollm2") / f"answers-{digest}.safetensors", make)
    return [Answers(p, rest, [tuple(c) for c in written], r) for p, rest, written, r in rows]


def check_flags(cfg):
    """Raises UserError for flags that make no sense."""
    least = min(cfg.prompts, cfg.held_out, cfg.steps, cfg.batch)
    run.check(least > 0, "--prompts, --held-out, --steps and --batch start at 1")
    run.check(cfg.lr > 0, "--lr must be above 0")
    run.check(cfg.samples > 1, "--samples must be 2 or more: a pair has two sides")
    few = 0 < cfg.min_new_tokens <= cfg.max_new_tokens
    run.check(few, "--min-new-tokens must be 1 or more, and --max-new-tokens not less")
    run.check(cfg.temperature > 0 and cfg.least > 0, "--temperature and --least must be above 0")


def load(cfg, device):
    """-> tokenizer, model, pairs to learn from, answers to the held-out prompts."""
    smollm2 = cfg.model == "smollm2"
    load_model = pretrained.smollm2 if smollm2 else partial(pretrained.language_model, cfg.model)
    tokenizer, model = load_model(device)
    sampling = Sampling(cfg.samples, cfg.min_new_tokens, cfg.max_new_tokens, cfg.temperature)
    about = (cfg.model, model, tokenizer)
    written = cached_answers(*about, "train", cfg.prompts, sampling, cfg.seed)
    pairs = rank(written, cfg.least)
    enough = f"--prompts {cfg.prompts} gave {len(pairs)} pairs, and a batch has {cfg.batch}"
    run.check(len(pairs) >= cfg.batch, f"{enough}: more prompts, or a smaller --least")
    held_out = cached_answers(*about, cfg.split, cfg.held_out, sampling, cfg.seed + 1)
    return tokenizer, model, pairs, held_out
