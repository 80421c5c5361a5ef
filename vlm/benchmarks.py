"""Vision-language benchmarks on a LLaVA: POPE, VQA v2, OK-VQA, TextVQA, A-OKVQA, ScienceQA, COCO
captions, zero-shot.

A benchmark is four things: files in a published format (benchmark_files.py), a prompt, a way to
answer, and a rule that scores (benchmark_scores.py, caption_metrics.py). Questions are answered one at
a time by greedy decoding; where there are choices, the most likely one after the question is taken, too. The
answers are written in the format which the benchmark's own evaluation or server takes.

Shapes: prompt (1,T,E), log p of C choices (1,C).

    python vlm/evaluate.py --benchmark pope                              # photos of fruit, POPE's questions
    python vlm/evaluate.py --benchmark vqav2 --data VQA --split val2014 --model llava-hf/llava-1.5-7b-hf
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from utils import data, run
from utils.run import check
from vlm import (
    benchmark_files,
    benchmark_samples,
    benchmark_scores,
    caption_java,
    caption_metrics,
    fruit_photos,
    generation,
    llava,
    prompted_answers,
    prompts,
)
from vlm import benchmark_results as results
from vlm.ptb_tokenizer import ptb_tokenize

CLASS_PROMPT = "What is in this image?"
# Longest answers
ANSWER_TOKENS = 12
CAPTION_TOKENS = 30


@dataclass(frozen=True)
class Benchmark:
    read: Callable  # folder, split -> rows
    score: Callable  # answered rows -> metrics
    results: Callable  # answered rows -> what its evaluation takes
    file: str  # name of that file
    is_scored: Callable = lambda row: row["answers"] is not None  # test splits have no answers
    sample: Any = None  # folder, count, seed: writes one of the book's own data


def score_pope(rows):
    return benchmark_scores.pope([r["said"] for r in rows], [r["label"] for r in rows])


def score_vqa(rows):
    return benchmark_scores.vqa(rows, [r["said"] for r in rows])


def score_aokvqa(rows):
    chosen = [r["chosen"] for r in rows]
    return benchmark_scores.aokvqa(rows, chosen, [r["said"] for r in rows])


def score_scienceqa(rows):
    return benchmark_scores.science_qa(rows, [r["chosen"] for r in rows])


def score_captions(rows):
    """BLEU, ROUGE-L, CIDEr over the tokens of the COCO evaluation; METEOR and SPICE where Java is at hand."""
    said = [ptb_tokenize(r["said"]) for r in rows]
    people = [[ptb_tokenize(text) for text in r["answers"]] for r in rows]
    return caption_metrics.scores(said, people) | caption_java.java_scores(said, people)


def score_classes(rows):
    """Zero-shot classification by likelihood: top-1 and top-5 accuracy."""
    log_p = torch.tensor([r["log_p"] for r in rows])
    truth = torch.tensor([r["right"] for r in rows])
    return {f"top-{k}": benchmark_scores.top_k(log_p, truth, k) for k in (1, 5)}


def has_truth(row):
    return row["right"] is not None


def always(row):
    return True


VQA = (score_vqa, results.vqa)
BENCHMARKS = {
    "pope": Benchmark(
        benchmark_files.read_pope, score_pope, results.pope, "pope_answers.jsonl", always,
        benchmark_samples.write_pope,
    ),
    "vqav2": Benchmark(
        benchmark_files.read_vqa, *VQA, "vqa_results.json", sample=benchmark_samples.write_vqa
    ),
    "okvqa": Benchmark(benchmark_files.read_vqa, *VQA, "okvqa_results.json"),
    "textvqa": Benchmark(benchmark_files.read_textvqa, *VQA, "textvqa_results.json"),
    "aokvqa": Benchmark(
        benchmark_files.read_aokvqa, score_aokvqa, results.aokvqa, "aokvqa_predictions.json"
    ),
    "scienceqa": Benchmark(
        benchmark_files.read_scienceqa, score_scienceqa, results.scienceqa, "scienceqa_results.json", has_truth,
    ),
    "coco": Benchmark(
        benchmark_files.read_captions, score_captions, results.captions, "captions_results.json"
    ),
    "folders": Benchmark(
        benchmark_files.read_folders, score_classes, results.classes, "classes.json", has_truth,
        benchmark_samples.write_folders,
    ),
}  # fmt: skip


def prompt_of(name, row, prompt="", suffix=""):
    """The prompt of a row: the benchmark's question; of captions and classes, `prompt`; the suffix
    on a new line."""
    if name == "folders":
        text = prompt or CLASS_PROMPT
    elif name == "coco":
        text = prompt or row["question"]
    else:
        # ScienceQA's hint is text that belongs to the question
        text = f"{row.get('hint') or ''}\n{row['question']}".strip()
    return f"{text}\n{suffix}" if suffix else text


@torch.no_grad()
def embed(tokenizer, model, question, tokens):
    """Embeddings of a prompt (1,T,E): image tokens (1,M,E) and the question, or the question alone."""
    if tokens is not None:
        return prompted_answers.embed_prompt(tokenizer, model, question, tokens)
    ids, _ = prompts.chat(tokenizer, [(question, None)], 0)
    return model.embed(torch.tensor([ids], device=next(model.language.parameters()).device))


@torch.no_grad()
def answer(name, tokenizer, model, rows, prompt="", suffix="", max_new_tokens=ANSWER_TOKENS):
    """Rows -> rows with "said", the generated answer, and with choices "chosen" by likelihood and
    "log_p" of each."""
    on = next(model.language.parameters()).device

    @lru_cache(maxsize=16)
    def image_tokens(path):
        """Several questions in a row are about the same picture."""
        return generation.photo_embeddings(model, data.read_image(path, 0))

    done = []
    for row in run.bar(rows, len(rows), name=name):
        question = prompt_of(name, row, prompt, suffix)
        with run.autocast(on):
            tokens = None if row["image"] is None else image_tokens(row["image"])
            embeds = embed(tokenizer, model, question, tokens)
            found = {}
            # zero-shot classification is by likelihood alone
            if name != "folders":
                said = prompted_answers.generate_answers(tokenizer, model, embeds, max_new_tokens)
                found["said"] = said[0]
            if row["choices"]:
                log_p = prompted_answers.rank_answers(
                    tokenizer, model, embeds, row["choices"], question
                )[0]
                found |= {"chosen": int(log_p.argmax()), "log_p": log_p.tolist()}
        done.append(row | found)
    return done


def splits_of(cfg, folder):
    """-> folder with the data, splits: what the flags say, or files of the book's own data, written now."""
    benchmark = BENCHMARKS[cfg.benchmark]
    if cfg.data:
        return cfg.data, [cfg.split]
    own = ", ".join(name for name, one in BENCHMARKS.items() if one.sample)
    check(
        benchmark.sample, f"--data: name the folder of {cfg.benchmark}; without it there are {own}"
    )
    made = folder / "data"
    made.mkdir(exist_ok=True)
    splits = benchmark.sample(made, cfg.judged, cfg.seed)
    check(cfg.split in ("", *splits), f"--split is one of {', '.join(splits)}")
    return made, [cfg.split] if cfg.split else splits


def main(cfg) -> dict:
    """`python vlm/evaluate.py --benchmark`: read, answer, score, write the file of results."""
    known = ", ".join(BENCHMARKS)
    check(cfg.benchmark in BENCHMARKS, f"--benchmark is one of {known}")
    check(cfg.judged >= 0, "--judged must be 0 or more")
    benchmark = BENCHMARKS[cfg.benchmark]
    folder = run.output(cfg.out, cfg)
    place, splits = splits_of(cfg, folder)
    parts = {split: benchmark.read(place, split) for split in splits}
    tokenizer, model = llava.load(cfg.model, run.device(cfg.device))
    run.seed(cfg.seed)
    # "What fruit is this?" is for photos of fruit
    prompt = "" if cfg.data and cfg.prompt == fruit_photos.QUESTION else cfg.prompt
    metrics = {}
    for split, rows in parts.items():
        # the first so many of a random order, in the order of the file
        if cfg.data and cfg.judged:
            order = torch.randperm(len(rows))[: cfg.judged]
            rows = [rows[i] for i in sorted(order.tolist())]
        tokens = CAPTION_TOKENS if cfg.benchmark == "coco" else ANSWER_TOKENS
        done = answer(cfg.benchmark, tokenizer, model, rows, prompt, cfg.suffix, tokens)
        name = "_".join(part for part in (split, benchmark.file) if part)
        results.write(folder / name, benchmark.results(done))
        found = {"questions": len(done)}
        if all(benchmark.is_scored(row) for row in done):
            found |= benchmark.score(done)
        metrics[split or cfg.benchmark] = found
    return run.report(folder, metrics)
