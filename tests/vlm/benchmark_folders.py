"""Benchmarks of a few made-up rows in the folders in which they are published, for the tests."""

import json

from PIL import Image


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 24), "red").save(path)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")


def vqa(folder, prefix="v2_", count=12):
    """VQA v2 (and, without the prefix, OK-VQA): two files, which list the questions in different orders."""
    asked = []
    people = []
    for n in range(count):
        picture(folder / "val2014" / f"COCO_val2014_{n:012}.jpg")
        ids = {"question_id": 100 + n, "image_id": n}
        asked.append(ids | {"question": f"What is number {n}?"})
        answers = [{"answer": f"cat {n}", "answer_id": i + 1} for i in range(10)]
        kind = {"answer_type": ("yes/no", "number", "other")[n % 3], "question_type": "what is"}
        people.append(ids | kind | {"answers": answers})
    stem = f"{prefix}OpenEnded_mscoco_val2014_questions.json"
    write(folder / stem, {"questions": asked})
    notes = f"{prefix}mscoco_val2014_annotations.json"
    write(folder / notes, {"annotations": people[::-1]})
    return folder


def textvqa(folder, count=3):
    rows = []
    for n in range(count):
        picture(folder / "train_images" / f"abc{n}.jpg")
        rows.append({
            "question": "what does it say?", "image_id": f"abc{n}", "question_id": n, "answers": [f"stop {n}"] * 10,
        })  # fmt: skip
    write(folder / "TextVQA_0.5.1_val.json", {"data": rows})
    return folder


def aokvqa(folder, count=4):
    rows = []
    for n in range(count):
        picture(folder / "val2017" / f"{n:012}.jpg")
        rows.append({
            "question_id": f"q{n}", "image_id": n, "question": "What is it?", "choices": ["cat", "dog", "cow", "owl"],
            "correct_choice_idx": n % 4, "direct_answers": ["dog"] * 6 + ["puppy"] * 4,
            "difficult_direct_answer": n == 0,
        })  # fmt: skip
    write(folder / "aokvqa_v1p0_val.json", rows)
    return folder


def pope(folder, count=4, sampling="random"):
    rows = []
    for n in range(count):
        picture(folder / "val2014" / f"COCO_val2014_{n:012}.jpg")
        rows.append({
            "question_id": n, "image": f"COCO_val2014_{n:012}.jpg", "text": f"Is there a thing {n} in the image?",
            "label": ("yes", "no")[n % 2],
        })  # fmt: skip
    write(folder / f"coco_pope_{sampling}.json", "\n".join(map(json.dumps, rows)) + "\n")
    return folder


def scienceqa(folder):
    """Two questions with a picture, one with a hint, one with neither; one of another split."""
    problems = {}
    subjects = ("natural science", "social science", "language science", "natural science")
    for n, subject in enumerate(subjects, 1):
        image = "image.png" if n in (1, 4) else None
        problems[str(n)] = {
            "question": f"Which is {n}?", "choices": ["a", "b", "c"], "answer": n % 3,
            "hint": "Look." if n == 2 else "", "image": image, "subject": subject, "grade": f"grade{3 * n}",
            "split": "test",
        }  # fmt: skip
        if image:
            picture(folder / "images/test" / str(n) / image)
    problems["9"] = problems["3"] | {"split": "train"}
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", {"train": ["9"], "test": ["1", "2", "3", "4"]})
    return folder


def captions(folder, count=3):
    images = []
    said = []
    for n in range(count):
        picture(folder / "val2014" / f"COCO_val2014_{n:012}.jpg")
        images.append({"id": n, "file_name": f"COCO_val2014_{n:012}.jpg"})
        said += [
            {"image_id": n, "id": 10 * n + k, "caption": f"A cat no. {n}, {k} times."}
            for k in range(5)
        ]
    # an image that nobody described
    images.append({"id": 99, "file_name": "lost.jpg"})
    write(folder / "annotations/captions_val2014.json", {"images": images, "annotations": said})
    return folder


def classes(folder):
    for name in ("n01", "n02", "n03"):
        for n in range(2):
            picture(folder / "val" / name / f"{n}.JPEG")
    write(folder / "val" / "classes.json", {"n01": "great white shark", "n02": "hen"})
    return folder


ALL = {
    "pope": pope, "vqav2": vqa, "okvqa": lambda folder: vqa(folder, ""), "textvqa": textvqa, "aokvqa": aokvqa,
    "scienceqa": scienceqa, "coco": captions, "folders": classes,
}  # fmt: skip
