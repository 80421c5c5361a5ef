"""Visual question answering data: files of VQA v2 and A-OKVQA, and one of fruit in A-OKVQA's format.

Goyal et al. 2017, arXiv:1612.00837 (VQA v2, open answers); Schwenk et al. 2022, arXiv:2206.01718
(A-OKVQA, four choices and open answers). A-OKVQA's images carry the numbers of COCO's; any name is
taken here, too.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from utils import data, run
from utils.run import UserError, check
from utils.text import clean, printable, read_text
from vlm import fruit_photos, prompts

# Letters of a question, a choice or an answer: a page of text is no question about a picture
LONGEST = 2000


def write_fruit(folder, count, seed=0):
    """A file in A-OKVQA's format of held-out photos, the right kind among three others -> its
    path."""
    photos = data.groceries(348)
    random = np.random.default_rng([seed, 6])
    _, chosen = fruit_photos.split(photos, count, seed)
    rows = []
    for i in chosen.tolist():
        # three other names, in a random order with the right one
        name = fruit_photos.name_of(photos, i)
        others = [n for n in fruit_photos.NAMES.values() if n != name]
        others = random.choice(others, 3, replace=False).tolist()
        choices = random.permutation([name, *others]).tolist()
        rows.append({
            "question_id": f"fruit-{i:04}", "image": f"{i:04}.jpg", "question": fruit_photos.QUESTION,
            "choices": choices, "correct_choice_idx": choices.index(name), "direct_answers": [name] * 10,
        })  # fmt: skip
        # the photo as a file
        image = Image.fromarray(photos.images[i].permute(1, 2, 0).numpy())
        image.save(folder / rows[-1]["image"], quality=95)
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
    """-> [{"image", "question", "choices", "right", "answers"}] of a file of A-OKVQA or VQA v2,
    whatever is known.

    Raises UserError for another format, VQA v2 without its annotations, a question without answers,
    a lost picture.
    """
    found = parse(path)
    # VQA v2: an object; A-OKVQA: a list
    if isinstance(found, dict):
        check(
            isinstance(found.get("questions"), list),
            f"{path} has no list 'questions': it is not of VQA v2",
        )
        check(annotations, f"{path} is of VQA v2: name the file of its answers by --annotations")
        found = join_annotations(found["questions"], parse(annotations), path, annotations)
    else:
        check(not annotations, f"{path} is not of VQA v2: --annotations goes with that only")
    # each row by itself, whatever the format was
    check(isinstance(found, list) and found, f"{path} holds no list of questions")
    return [parse_row(one, number, images) for number, one in enumerate(found)]


def join_annotations(questions, listed, path, annotations):
    """Questions of VQA v2, each with the answers that people gave to it, by question_id."""
    whole = isinstance(listed, dict) and isinstance(listed.get("annotations"), list)
    check(whole, f"{annotations} holds no answers")
    # answers by question_id, then each with its question
    try:
        answers = {}
        for one in listed["annotations"]:
            answers[one["question_id"]] = [x["answer"] for x in one["answers"]]
        both = [q | {"direct_answers": answers.get(q["question_id"])} for q in questions]
        ids = {q["question_id"] for q in questions}
    except (TypeError, KeyError) as error:
        raise UserError(f"{annotations} or {path} lacks {printable(error)}") from None
    # ids once on either side, else a question would get another one's answers
    once = len(answers) == len(listed["annotations"]) and len(ids) == len(questions)
    check(once, f"{annotations} or {path} has a question_id twice")
    return both


def is_number(x):
    """An integer of JSON, and no true or false, which Python takes for 1 and 0."""
    return isinstance(x, int) and not isinstance(x, bool)


def is_text(x):
    return isinstance(x, str) and bool(x.strip()) and len(x) <= LONGEST


def parse_row(one, number, images=""):
    """A row of A-OKVQA, checked -> what is used of it. Raises UserError."""
    at = f"question {number}"
    # question
    check(
        isinstance(one, dict) and isinstance(one.get("question"), str),
        f"{at} has no text 'question'",
    )
    question = one["question"]
    check(
        is_text(question) and prompts.IMAGE not in question,
        f"{at}: 'question' is no text of 1 to {LONGEST} letters",
    )
    # choices, and people's answers
    choices = one.get("choices")
    right = one.get("correct_choice_idx")
    answers = one.get("direct_answers")
    for name, several in (("choices", choices), ("direct_answers", answers)):
        check(several is None or isinstance(several, list), f"{at}: '{name}' is no list")
    check(choices or answers, f"{at} has neither 'choices' nor answers")
    in_range = choices is None or (is_number(right) and right in range(len(choices)))
    check(
        in_range,
        f"{at}: 'correct_choice_idx' is {printable(right)}, of {len(choices or [])} choices",
    )
    check(
        all(is_text(x) for x in [*(choices or []), *(answers or [])]),
        f"{at}: choices and answers are texts that are not empty, of at most {LONGEST} letters",
    )
    check(answers is None or len(answers) > 1, f"{at}: answers of two people or more are needed")
    return {
        "image": find_image(one, at, images),
        "question": clean(question).strip(),
        "right": right,
        "choices": None if choices is None else [clean(c) for c in choices],
        "answers": None if answers is None else [clean(a) for a in answers],
    }


def find_image(one, at, images):
    """Where the picture of a row is: by its name, or as COCO numbers them, of 2017 or 2014."""
    # a name, or COCO's number as its releases of 2017 and 2014 write it
    number = one.get("image_id")
    names = [one["image"]] if isinstance(one.get("image"), str) else []
    if is_number(number) and 0 <= number < 10**12:
        names.append(f"{number:012}.jpg")
        names += [f"COCO_{part}2014_{number:012}.jpg" for part in ("val", "train")]
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
