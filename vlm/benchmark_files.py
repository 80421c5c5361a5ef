"""Vision-language benchmarks in the folders in which they are published: one reader each.

A reader takes a folder and a split, and returns rows: {"id", "image" (a path, or None), "question",
"choices", "right", "answers"} and what the score needs besides. VQA v2, OK-VQA, TextVQA, A-OKVQA, POPE,
ScienceQA, COCO captions, and a folder of images with one sub-folder a class (ImageNet's layout).
Raises UserError: one line that names the file and the row (benchmark_rows.py).
"""

import re
from pathlib import Path
from typing import Any

from utils.run import check
from utils.text import clean, printable
from vlm.benchmark_rows import (
    check_ids,
    coco_names,
    find_file,
    find_image,
    id_of,
    json_lines,
    listed,
    row,
    text_of,
    texts_of,
)
from vlm.vqa_data import is_number, is_text, parse

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
CAPTION_PROMPT = "Describe the image in one sentence."


def read_annotations(folder, questions):
    """Answers of ten people and the two types of each question, by question_id; {} if there is no
    such file."""
    part = re.search(r"(train|val|test)\d*", questions.name)
    pattern = f"*mscoco_{part[0] if part else ''}*annotations.json"
    found = sorted({*Path(folder).glob(pattern), *questions.parent.glob(pattern)})
    if not found:
        return {}
    people = {}
    for n, one in enumerate(listed(parse(found[0]), "annotations", found[0].name)):
        at = f"{found[0].name}, annotation {n}"
        given: Any = one.get("answers") if isinstance(one, dict) else None
        check(isinstance(given, list), f"{at} has no list 'answers'")
        said = [x.get("answer") if isinstance(x, dict) else None for x in given]
        people[id_of(one, at)] = {
            "answers": texts_of({"answers": said}, "answers", at, 2),
            "answer_type": str(one.get("answer_type") or ""),
            "question_type": str(one.get("question_type") or ""),
        }
    return people


def read_vqa(folder, split=""):
    """VQA v2 and OK-VQA: questions, and their annotations, if these are there (test splits have none)."""
    path = find_file(folder, "*OpenEnded_mscoco_*questions.json", split)
    asked = listed(parse(path), "questions", path.name)
    people = read_annotations(folder, path)
    rows = []
    for n, one in enumerate(asked):
        at = f"{path.name}, question {n}"
        question = text_of(one, "question", at)
        name = id_of(one, at)
        check(not people or name in people, f"{at} has no annotation")
        image = find_image(folder, coco_names(one.get("image_id"), at), at)
        rows.append(row(name, image, question, **people.get(name, {})))
    return check_ids(rows, path.name)


def read_textvqa(folder, split=""):
    """TextVQA: one file has questions and answers; its validation images are in train_images."""
    path = find_file(folder, "TextVQA_*.json", split)
    rows = []
    for n, one in enumerate(listed(parse(path), "data", path.name)):
        at = f"{path.name}, question {n}"
        question = text_of(one, "question", at)
        image = find_image(folder, [f"{text_of(one, 'image_id', at)}.jpg"], at)
        more = {"answers": texts_of(one, "answers", at, 2)} if one.get("answers") else {}
        rows.append(row(id_of(one, at), image, question, **more))
    return check_ids(rows, path.name)


def read_aokvqa(folder, split=""):
    """A-OKVQA: four choices and ten direct answers a question."""
    path = find_file(folder, "aokvqa_v*.json", split)
    content = parse(path)
    check(isinstance(content, list), f"{path.name} is no list of questions")
    rows = []
    for n, one in enumerate(content):
        at = f"{path.name}, question {n}"
        question = text_of(one, "question", at)
        choices = texts_of(one, "choices", at, 2)
        image = find_image(folder, coco_names(one.get("image_id"), at), at)
        more = {}
        # a test split has neither
        if one.get("direct_answers"):
            right = one.get("correct_choice_idx")
            inside = is_number(right) and 0 <= right < len(choices)
            check(inside, f"{at}: 'correct_choice_idx' is {printable(right)}")
            more = {"answers": texts_of(one, "direct_answers", at, 2), "right": right}
        more["difficult"] = one.get("difficult_direct_answer") is True
        rows.append(row(id_of(one, at), image, question, choices=choices, **more))
    return check_ids(rows, path.name)


def read_pope(folder, split=""):
    """POPE: one JSON object a line, {"question_id", "image", "text", "label"}; a file for each way
    of sampling."""
    path = find_file(folder, "*_pope_*.json", split)
    rows = []
    for n, one in enumerate(json_lines(path)):
        at = f"{path.name}, row {n}"
        question = text_of(one, "text", at)
        label = one.get("label")
        check(label in ("yes", "no"), f"{at}: 'label' is neither yes nor no")
        image = find_image(folder, [text_of(one, "image", at)], at)
        rows.append(row(id_of(one, at), image, question, label=label))
    return check_ids(rows, path.name)


def read_scienceqa(folder, split=""):
    """ScienceQA: problems.json, of which pid_splits.json lists the split (test, if none is named)."""
    split = split or "test"
    path = find_file(folder, "problems.json")
    problems = parse(path)
    check(isinstance(problems, dict), f"{path.name} is no object of problems")
    ids = listed(parse(find_file(folder, "pid_splits.json")), split, "pid_splits.json")
    rows = []
    for name in ids:
        at = f"{path.name}, problem {printable(name)}"
        one: Any = problems.get(name) if isinstance(name, str) else None
        check(isinstance(one, dict), f"{at} is not there")
        question = text_of(one, "question", at)
        choices = texts_of(one, "choices", at, 2)
        right = one.get("answer")
        inside = is_number(right) and 0 <= right < len(choices)
        check(inside, f"{at}: 'answer' is {printable(right)}")
        grade: Any = re.fullmatch(r"grade(\d{1,2})", str(one.get("grade")))
        check(grade is not None, f"{at}: 'grade' is no grade1 to grade12")
        # its image lies in a folder of its own
        image = None
        if one.get("image"):
            check(name.isalnum(), f"{at}: no name of a folder")
            image = find_image(Path(folder) / "images" / split / name, [str(one["image"])], at)
        hint = one.get("hint") if is_text(one.get("hint")) else ""
        more = {"subject": one.get("subject"), "grade": int(grade[1]), "hint": clean(hint)}
        rows.append(row(name, image, question, choices=choices, right=right, **more))
    return check_ids(rows, path.name)


def read_captions(folder, split=""):
    """COCO captions: some five of each image. An image of the list without a caption is left out."""
    path = find_file(folder, "captions_*.json", split)
    content = parse(path)
    said = {}
    for n, one in enumerate(listed(content, "annotations", path.name)):
        at = f"{path.name}, annotation {n}"
        said.setdefault(id_of(one, at, "image_id"), []).append(text_of(one, "caption", at))
    rows = []
    for n, one in enumerate(listed(content, "images", path.name)):
        at = f"{path.name}, image {n}"
        number = id_of(one, at, "id")
        if number in said:
            image = find_image(folder, [text_of(one, "file_name", at)], at)
            rows.append(row(number, image, CAPTION_PROMPT, answers=said[number]))
    return check_ids(rows, path.name)


def read_folders(folder, split=""):
    """A folder with one sub-folder a class, as ImageNet's: the class is one of the choices.

    classes.json, {folder: name}, gives the names; without it they are the folders', _ for a space.
    """
    root = Path(folder) / split
    check(root.is_dir(), f"there is no folder {printable(root)}; see --data and --split")
    classes = sorted(p for p in root.iterdir() if p.is_dir())
    check(len(classes) > 1, f"{printable(root)} needs a folder for each of two classes or more")
    names = parse(root / "classes.json") if (root / "classes.json").is_file() else {}
    check(isinstance(names, dict), "classes.json is no object {folder: name}")
    choices = [names.get(p.name, p.name.replace("_", " ")) for p in classes]
    check(all(is_text(x) for x in choices), "a name in classes.json is no text")
    check(len(set(choices)) == len(choices), "two classes have the same name")
    rows = []
    for right, place in enumerate(classes):
        for path in sorted(p for p in place.iterdir() if p.suffix.lower() in IMAGES):
            name = f"{place.name}/{path.name}"
            rows.append(row(name, path, "", choices=choices, right=right))
    return check_ids(rows, printable(root))
