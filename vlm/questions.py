"""Visual question answering: files of VQA v2 and A-OKVQA, multiple choice and direct answers.

Goyal et al. 2017, arXiv:1612.00837 (VQA v2, open answers); Schwenk et al. 2022, arXiv:2206.01718 (A-OKVQA, four choices
and open answers). A choice is found by likelihood: the most probable of the four after the question. An open answer is
what the model says, against what ten people said (captions.py). Without a file: the photos of fruit that no training
saw, written in A-OKVQA's format first.

Shapes: scores (C,) of the C choices of a question.
Difference from the papers' tables: A-OKVQA's images carry the numbers of COCO's; any name is taken here, too.

    python vlm/questions.py                                                   # 100 questions about fruit: 2 CPU min
    python vlm/questions.py --file aokvqa_v1p0_val.json --images coco/val2017
    python vlm/questions.py --file v2_questions.json --annotations v2_annotations.json --images coco/val2014
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils import data, run
from utils.run import UserError, check
from utils.text import clean, plain, printable, read_text
from vlm import captions, evaluate, fruit_photos, llava, prompts, tower

# Letters of a question, a choice or an answer: a page of text is no question about a picture
LONGEST = 2000


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


def fruit(folder, count, seed=0):
    """A data set in A-OKVQA's format of photos that no training saw, the right kind among three others -> its file."""
    photos, random, rows = data.groceries(348), np.random.default_rng([seed, 6]), []
    _, chosen = fruit_photos.split(photos, count, seed)
    for i in chosen.tolist():
        name = fruit_photos.name_of(photos, i)
        others = random.choice(
            [n for n in fruit_photos.NAMES.values() if n != name], 3, replace=False
        ).tolist()
        choices = random.permutation([name, *others]).tolist()
        rows.append({
            "question_id": f"fruit-{i:04}", "image": f"{i:04}.jpg", "question": fruit_photos.QUESTION,
            "choices": choices, "correct_choice_idx": choices.index(name), "direct_answers": [name] * 10,
        })  # fmt: skip
        Image.fromarray(photos.images[i].permute(1, 2, 0).numpy()).save(
            folder / rows[-1]["image"], quality=95
        )
    run.write_json(folder / "questions.json", rows)
    return folder / "questions.json"


def parse(path):
    """The content of a JSON file. Raises UserError."""
    text = read_text(path, limit_mb=1024)  # the answers of VQA v2's training set are 300 MB
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{printable(path)} is no readable JSON file: {printable(error)}") from None


def read(path, annotations="", images=""):
    """-> [{"image", "question", "choices", "right", "answers"}] of a file of A-OKVQA or VQA v2, whatever is known.

    Raises UserError for another format, VQA v2 without its annotations, a question without answers, a lost picture.
    """
    found = parse(path)
    if isinstance(found, dict):
        check(
            isinstance(found.get("questions"), list),
            f"{path} has no list 'questions': it is not of VQA v2",
        )
        check(annotations, f"{path} is of VQA v2: name the file of its answers by --annotations")
        found = joined(found["questions"], parse(annotations), path, annotations)
    else:
        check(not annotations, f"{path} is not of VQA v2: --annotations goes with that only")
    check(isinstance(found, list) and found, f"{path} holds no list of questions")
    return [known(one, number, images) for number, one in enumerate(found)]


def joined(questions, listed, path, annotations):
    """Questions of VQA v2, each with the answers that people gave to it, by question_id."""
    whole = isinstance(listed, dict) and isinstance(listed.get("annotations"), list)
    check(whole, f"{annotations} holds no answers")
    try:
        said = {
            a["question_id"]: [x["answer"] for x in a["answers"]] for a in listed["annotations"]
        }
        both = [q | {"direct_answers": said.get(q["question_id"])} for q in questions]
        ids = {q["question_id"] for q in questions}
    except (TypeError, KeyError) as error:
        raise UserError(f"{annotations} or {path} lacks {printable(error)}") from None
    once = len(said) == len(listed["annotations"]) and len(ids) == len(questions)
    check(once, f"{annotations} or {path} has a question_id twice")
    return both


def is_number(x):
    """An integer of JSON, and no true or false, which Python takes for 1 and 0."""
    return isinstance(x, int) and not isinstance(x, bool)


def is_text(x):
    return isinstance(x, str) and bool(x.strip()) and len(x) <= LONGEST


def known(one, number, images=""):
    """A row of A-OKVQA, checked -> what is used of it."""
    at = f"question {number}"
    check(
        isinstance(one, dict) and isinstance(one.get("question"), str),
        f"{at} has no text 'question'",
    )
    question = one["question"]
    check(
        is_text(question) and prompts.IMAGE not in question,
        f"{at}: 'question' is no text of 1 to {LONGEST} letters",
    )
    choices, right, answers = (
        one.get(k) for k in ("choices", "correct_choice_idx", "direct_answers")
    )
    for name, several in (("choices", choices), ("direct_answers", answers)):
        check(several is None or isinstance(several, list), f"{at}: '{name}' is no list")
    check(choices or answers, f"{at} has neither 'choices' nor answers")
    fine = choices is None or (is_number(right) and right in range(len(choices)))
    check(
        fine, f"{at}: 'correct_choice_idx' is {printable(right)}, of {len(choices or [])} choices"
    )
    texts = [*(choices or []), *(answers or [])]
    fine = all(is_text(x) for x in texts)
    check(
        fine,
        f"{at}: choices and answers are texts that are not empty, of at most {LONGEST} letters",
    )
    check(answers is None or len(answers) > 1, f"{at}: answers of two people or more are needed")
    return {
        "image": picture(one, at, images), "question": clean(question).strip(), "right": right,
        "choices": None if choices is None else [clean(c) for c in choices],
        "answers": None if answers is None else [clean(a) for a in answers],
    }  # fmt: skip


def picture(one, at, images):
    """Where the picture of a row is: by its name, or as COCO numbers them, of 2017 or 2014."""
    number = one.get("image_id")
    names = [one["image"]] if isinstance(one.get("image"), str) else []
    if is_number(number) and 0 <= number < 10**12:
        names += [
            f"{number:012}.jpg",
            *(f"COCO_{part}2014_{number:012}.jpg" for part in ("val", "train")),
        ]
    there = [Path(images) / name for name in names if is_file(Path(images) / name)]
    listed = printable(", ".join(names) or "no name")
    check(
        there,
        f"{at}: there is none of {listed} in {printable(images or 'this folder')}; see --images",
    )
    return there[0]


def is_file(path):
    """Also for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def choose(tokenizer, model, features, question, choices, per_token=False):
    """The index of the most probable choice: features (1,N,D)."""
    log_p = evaluate.answer_likelihoods(tokenizer, model, features, choices, question)[0].tolist()
    lengths = [
        len(tokenizer(plain(c, tokenizer), add_special_tokens=False).input_ids) + 1 for c in choices
    ]  # and the end
    return captions.likeliest(log_p, lengths if per_token else None)


def answer(tokenizer, model, rows, features, per_token=False):
    """Rows and what the tower said of their pictures (B,N,D) -> rows with what was chosen, and what was said."""
    on, done = next(model.language.parameters()).device, []
    for one, seen in run.bar(zip(rows, features[:, None].float()), len(rows), name="questions"):
        with run.autocast(on):
            said = evaluate.generated_answers(tokenizer, model, seen.to(on), one["question"])[0]
            mine = {"said": said}
            if one["choices"]:
                mine["chosen"] = choose(
                    tokenizer, model, seen.to(on), one["question"], one["choices"], per_token
                )
                mine["matched"] = captions.match_choice(said, one["choices"])
        done.append(one | mine)
    return done


def is_right(row, how):
    """Is the choice that was found the right one? By its words: a file may give the same choice twice."""
    found = row[how]
    return found is not None and row["choices"][found] == row["choices"][row["right"]]


def score(done):
    """Answered rows -> accuracies: of choices, and of what was said, by both data sets' rules."""
    several, free = [r for r in done if r["choices"]], [r for r in done if r["answers"]]
    metrics = {"questions": len(done)}
    if several:
        metrics["chosen by likelihood"] = float(np.mean([is_right(r, "chosen") for r in several]))
        metrics["named in what was said"] = float(
            np.mean([is_right(r, "matched") for r in several])
        )
        metrics["chance"] = float(np.mean([1 / len(r["choices"]) for r in several]))
    if free:
        metrics["VQA accuracy"] = float(
            np.mean([captions.vqa_accuracy(r["said"], r["answers"]) for r in free])
        )
        direct = [captions.direct_answer_accuracy(r["said"], r["answers"]) for r in free]
        metrics["A-OKVQA direct answer"] = float(np.mean(direct))
    return metrics


def main(cfg: Config) -> dict:
    """Read or make the questions, answer them, score the answers."""
    check(cfg.count >= 0, "--count must be 0 or more")
    check(
        cfg.file or not (cfg.annotations or cfg.images), "--annotations and --images go with --file"
    )
    rows = read(cfg.file, cfg.annotations, cfg.images) if cfg.file else []
    tokenizer, model = llava.load(cfg.model, run.device(cfg.device))
    run.seed(cfg.seed)
    pick = np.random.default_rng(cfg.seed).permutation(len(rows))[: cfg.count or None]
    rows = [rows[i] for i in sorted(pick.tolist())]
    folder = run.output(cfg.out, cfg)
    if not cfg.file:
        (folder / "pictures").mkdir(exist_ok=True)
        rows = read(fruit(folder / "pictures", cfg.count, cfg.seed), images=folder / "pictures")
    pictures = torch.stack([data.read_image(r["image"], model.vision.size) for r in rows])
    done = answer(
        tokenizer, model, rows, tower.vision_features(model.vision, pictures), cfg.per_token
    )
    run.write_json(folder / "answers.json", [r | {"image": str(r["image"])} for r in done])
    for r in done[:5]:
        print(
            f"{r['question']} said: {r['said']}; people: {', '.join(sorted(set(r['answers'] or [])))}"
        )
    return run.report(
        folder, score(done), 'python vlm/llava.py --image PHOTO --prompt "What fruit is this?"'
    )


if __name__ == "__main__":
    run.cli(main, Config)
