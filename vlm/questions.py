"""Visual question answering: multiple choice by likelihood, direct answers, on files of VQA v2 and A-OKVQA.

Goyal et al. 2017, arXiv:1612.00837 (VQA v2, open answers); Schwenk et al. 2022, arXiv:2206.01718
(A-OKVQA, four choices and open answers). A choice is found by likelihood: the most probable of the
four after the question. An open answer is the generated one, against those of ten people
(answer_metrics.py). Files are read by vqa_data.py; without one, held-out photos of fruit are
written in A-OKVQA's format first.

A model with tiles (LLaVA-1.6) sees each picture with them.

Shapes: image tokens of a picture (1,M,E), scores (C,) of the C choices of a question.

    python vlm/questions.py                                                   # 100 questions about fruit: 2 CPU min
    python vlm/questions.py --file aokvqa_v1p0_val.json --images coco/val2017
    python vlm/questions.py --file v2_questions.json --annotations v2_annotations.json --images coco/val2014
"""

from dataclasses import dataclass

import numpy as np
import torch

from utils import data, run
from utils.run import check
from utils.text import plain
from vlm import answer_metrics, evaluate, generation, llava, tower, vqa_data


@dataclass(frozen=True)
class Config:
    """Let a LLaVA answer a file of questions."""

    file: str = ""  # questions of A-OKVQA or VQA v2; empty: made of photos of fruit
    annotations: str = ""  # the people's answers, which VQA v2 keeps in a file of their own
    images: str = ""  # folder of the pictures
    model: str = str(llava.WEIGHTS)  # weights, or a folder or hub id
    count: int = 100  # questions, drawn at random; 0: all
    # choose by the mean log-likelihood of a choice's tokens, not by their sum
    per_token: bool = False
    seed: int = 0
    device: str = "auto"
    out: str = "outputs/questions"


def choose(tokenizer, model, embeds, question, choices, per_token=False):
    """Multiple choice by likelihood -> the index of the most probable choice, after the prompt's
    embeddings (1,T,E)."""
    log_p = evaluate.rank_answers(tokenizer, model, embeds, choices, question)[0].tolist()
    # tokens of each choice, for a mean that does not favour short ones
    lengths = []
    for choice in choices:
        ids = tokenizer(plain(choice, tokenizer), add_special_tokens=False).input_ids
        lengths.append(len(ids) + 1)  # and the end
    return answer_metrics.likeliest(log_p, lengths if per_token else None)


@torch.no_grad()
def image_tokens(model, rows):
    """Image tokens of the picture of each row, one after the other: (1,M,E), with tiles if the model
    was trained with them. Raises UserError for a picture that cannot be read."""
    on = next(model.language.parameters()).device
    if model.grids:
        for one in rows:
            picture = data.read_image(one["image"], 0)
            with run.autocast(on):
                tokens = generation.photo_embeddings(model, picture)
            yield tokens
        return
    # vision features of all of them, kept for the next time
    images = torch.stack([data.read_image(one["image"], model.vision.size) for one in rows])
    for features in tower.vision_features(model.vision, images):
        with run.autocast(on):
            tokens = model.project(features[None].float().to(on))
        yield tokens


def answer(tokenizer, model, rows, seen, per_token=False):
    """Rows, and image tokens of the picture of each (1,M,E) -> rows with the generated answer, the
    choice by likelihood, and the choice that the answer names."""
    on = next(model.language.parameters()).device
    done = []
    # one picture at a time: questions and choices differ in length
    for one, tokens in run.bar(zip(rows, seen), len(rows), name="questions"):
        question = one["question"]
        choices = one["choices"]
        with run.autocast(on):
            embeds = evaluate.embed_prompt(tokenizer, model, question, tokens)
            text = evaluate.generate_answers(tokenizer, model, embeds)[0]
            found = {"said": text}
            if choices:
                found["chosen"] = choose(tokenizer, model, embeds, question, choices, per_token)
                found["matched"] = answer_metrics.match_choice(text, choices)
        done.append(one | found)
    return done


def is_right(row, how):
    """Is the choice that was found the right one? By its words: a file may give the same choice
    twice."""
    # by its words, for two choices may be the same
    found = row[how]
    return found is not None and row["choices"][found] == row["choices"][row["right"]]


def score(done):
    """Answered rows -> accuracies: of choices, and of generated answers, by both data sets'
    rules."""
    metrics = {"questions": len(done)}
    # multiple choice
    several = [r for r in done if r["choices"]]
    if several:
        chosen = [is_right(r, "chosen") for r in several]
        named = [is_right(r, "matched") for r in several]
        metrics["chosen by likelihood"] = float(np.mean(chosen))
        metrics["named in the generated answer"] = float(np.mean(named))
        metrics["chance"] = float(np.mean([1 / len(r["choices"]) for r in several]))
    # open answers
    free = [r for r in done if r["answers"]]
    if free:
        soft = [answer_metrics.vqa_accuracy(r["said"], r["answers"]) for r in free]
        direct = [answer_metrics.direct_answer_accuracy(r["said"], r["answers"]) for r in free]
        metrics["VQA accuracy"] = float(np.mean(soft))
        metrics["A-OKVQA direct answer"] = float(np.mean(direct))
    return metrics


def main(cfg: Config) -> dict:
    """Read or make the questions, answer them, score the answers."""
    check(cfg.count >= 0, "--count must be 0 or more")
    check(
        cfg.file or not (cfg.annotations or cfg.images), "--annotations and --images go with --file"
    )
    rows = vqa_data.read(cfg.file, cfg.annotations, cfg.images) if cfg.file else []
    tokenizer, model = llava.load(cfg.model, run.device(cfg.device))
    run.seed(cfg.seed)
    # questions: some of the file, or those about fruit
    pick = np.random.default_rng(cfg.seed).permutation(len(rows))[: cfg.count or None]
    rows = [rows[i] for i in sorted(pick.tolist())]
    folder = run.output(cfg.out, cfg)
    if not cfg.file:
        made = folder / "pictures"
        made.mkdir(exist_ok=True)
        rows = vqa_data.read(vqa_data.write_fruit(made, cfg.count, cfg.seed), images=made)
    # answers
    done = answer(tokenizer, model, rows, image_tokens(model, rows), cfg.per_token)
    run.write_json(folder / "answers.json", [r | {"image": str(r["image"])} for r in done])
    # some of them to look at
    for r in done[:5]:
        people = ", ".join(sorted(set(r["answers"] or [])))
        print(f"{r['question']} said: {r['said']}; people: {people}")
    then = 'python vlm/llava.py --image PHOTO --prompt "What fruit is this?"'
    return run.report(folder, score(done), then)


if __name__ == "__main__":
    run.cli(main, Config)
