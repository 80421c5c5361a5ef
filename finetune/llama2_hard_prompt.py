"""Hard prompts: zero-shot and few-shot prompting, calibration. Schick & Schuetze 2020,
arXiv:2001.07676.

A pattern turns a text into a question, a verbalizer says which word means which label, and the more
likely word wins: no training at all. How much depends on the wording is the lesson. Two cures are
known. Examples in the prompt (Brown et al. 2020, arXiv:2005.14165), and calibration (Zhao et al.
2021, arXiv:2102.09690): ask about an empty text first, and take away what the model would have said
anyway.

Examples are the same before every text, so the model reads them once, and what it keeps of them,
keys and values, is put before each question: llama2_prefix.py learns such keys and values instead
of reading them.

Shapes: N texts, K answers.
Differences from the papers: one pattern at a time, no ensemble; calibration by one empty text,
"N/A".

    python finetune/llama2_hard_prompt.py
    python finetune/llama2_hard_prompt.py --pattern "{text} It was" --words " terrible" " great"
    python finetune/llama2_hard_prompt.py --model meta-llama/Llama-2-7b-hf --shots 0 4 16      # larger, for a GPU
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from finetune import llama2_prefix, sentiment, sentiment_data, task_setup
from finetune.classification_metrics import scores
from utils import figures, run


@dataclass(frozen=True)
class Config(sentiment_data.Task):
    """Score a language model on patterns, few-shot examples and calibration; nothing is trained."""

    model: str = "smollm2"  # smollm2, a local folder, or a hub id such as meta-llama/Llama-2-7b-hf
    shots: tuple[int, ...] = (0, 4)  # numbers of examples in the prompt
    seed: int = 0  # same seed, same examples
    device: str = "auto"  # cpu, cuda, ...
    out: str = "outputs/llama2_hard_prompt"  # where the results go


def wordings(cfg):
    """{name: (pattern, words)}: that of the flags, and three others, for two labels."""
    own = {"yours": (cfg.pattern, cfg.words)}
    if len(cfg.words) > 2:
        return own
    return own | {
        "it was": ("{text} It was", (" terrible", " great")),
        "question": (
            "{text}\nQuestion: Is this negative or positive?\nAnswer:",
            (" negative", " positive"),
        ),
        "smiley": ("{text}", (" :(", " :)")),
    }


def examples(pairs, count, words, seed=0):
    """`count` texts to show, the labels in turn, so equally often: [(text, label)]."""
    # shuffled, and sorted by label
    order = np.random.default_rng(seed).permutation(len(pairs))
    kinds = [[] for _ in words]
    for i in order:
        _, label = pairs[i]
        kinds[label].append(pairs[i])
    # of each label as many as the others
    fewest = min(map(len, kinds))
    enough = count <= fewest * len(words)
    run.check(enough, f"--shots {count}: there are {fewest} training texts of a label")
    return [kinds[i % len(words)][i // len(words)] for i in range(count)]


def shown(tokenizer, task, pairs):
    """Few-shot examples, solved questions as one string, to stand before each question."""
    solved = ""
    for text, label in pairs:
        solved += sentiment.prompt(tokenizer, task, text) + task.words[label] + "\n\n"
    return solved


def after(model, tokenizer, text):
    """The model when it has read a text, as a network of this chapter; it reads it once."""
    if not text:
        return sentiment.network(model)
    kept = llama2_prefix.read(model, torch.tensor(tokenizer(text)["input_ids"]))
    return llama2_prefix.network(model, lambda: kept)


def calibrated(log_p, empty):
    """log p(answer | question) - log p(answer | empty question): (N, K), (1, K) -> (N, K). Zhao et
    al. 2021, Sec. 5.
    """
    return log_p - empty


def main(cfg: Config) -> dict:
    """Ask every wording zero-shot, the first few-shot, too; each with and without calibration."""
    possible = cfg.shots and min(cfg.shots) >= 0
    run.check(possible, "--shots takes one or more numbers, none of them negative")
    bench = task_setup.start(cfg)
    tokenizer = bench.tokenizer
    parts = bench.parts
    metrics = {}
    texts, truth = zip(*parts["scored"])
    for name, (pattern, words) in wordings(cfg).items():
        # the question in these words
        task = replace(cfg, pattern=pattern, words=words)
        questions = [sentiment.prompt(tokenizer, task, text) for text in texts]
        for shots in cfg.shots if name == "yours" else (0,):
            # few-shot: the model reads the examples once
            few = shown(tokenizer, task, examples(parts["train"], shots, words, cfg.seed))
            ask = after(bench.model, tokenizer, few), tokenizer
            # the likelier answer, with and without calibration by an empty text
            answers = sentiment.answers(tokenizer, task)
            log_p = sentiment.likelihood(*ask, questions, answers, bench.device)
            nothing = [pattern.replace("{text}", "N/A")]
            empty = sentiment.likelihood(*ask, nothing, answers, bench.device)
            for label, x in (("", log_p), (", calibrated", calibrated(log_p, empty))):
                likely = x.argmax(-1).tolist()
                metrics[f"{name}, {shots} examples{label}"] = scores(truth, likely)
            # the generated answer
            if name == "yours":
                longest = max(map(len, answers))
                written = sentiment.generate(*ask, questions, bench.device, longest)
                predicted = sentiment.parse_labels(written, words)
                metrics[f"{name}, {shots} examples, generated"] = scores(truth, predicted)
    # two classifiers without a language model
    metrics["majority"] = scores(truth, sentiment.majority(parts))
    if len(cfg.words) == 2:
        metrics["vader"] = scores(truth, sentiment.vader(texts))
    bars = {name: (m["accuracy"], m["low"], m["high"]) for name, m in metrics.items()}
    figures.bars(bench.folder / "wordings.png", bars)
    return run.report(bench.folder, metrics, then="python finetune/llama2_full.py")


if __name__ == "__main__":
    run.cli(main, Config)
