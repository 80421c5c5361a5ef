"""The book's own held-out data in the layout of published benchmarks: POPE, VQA v2, folders of classes.

They take the place of COCO's pictures, which are in no package. POPE (Li et al. 2023,
arXiv:2305.10355) asks about objects that are in the image and about as many that are not; those are
drawn in three ways: at random, from the most frequent ones, and from those that go with what is there
(adversarial). Here the objects are kinds of fruit, and adversarial ones are of the same group.
"""

import json
import shutil

import numpy as np

from utils import data, run
from utils.run import check
from vlm import data as instruction_data
from vlm import easy_vqa_data, fruit_photos

SAMPLINGS = ("random", "popular", "adversarial")
# Kinds that a group of one kind is taken for
CITRUS = ("Orange", "Satsumas")


def copy_photos(folder, numbers):
    """Photos of the groceries, by their numbers, into a folder -> their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i:04}.jpg" for i in numbers]
    for name in names:
        shutil.copyfile(instruction_data.photos() / name, folder / name)
    return names


def similar(fruit, kind):
    """Kinds (indices) of the group of a kind, without it; of oranges and satsumas, each other."""
    group = fruit.coarse[fruit.fine == kind][0]
    same = {int(k) for k in fruit.fine[fruit.coarse == group]}
    if len(same) == 1:
        same = {fruit.fine_names.index(name) for name in CITRUS}
    return sorted(same - {int(kind)})


def absent(sampling, fruit, kind, frequent, random):
    """A kind (index) that is not in a photo of `kind`; frequent: all kinds, the most frequent first."""
    others = [k for k in range(len(fruit.fine_names)) if k != kind]
    if sampling == "adversarial":
        others = similar(fruit, kind)
    if sampling == "popular":
        others = [k for k in frequent if k != kind][:3]
    return int(random.choice(others))


def asks_for(fruit, kind):
    """POPE's question about a kind of fruit."""
    name = fruit_photos.NAMES[fruit.fine_names[kind]]
    return f"Is there {instruction_data.some(name)} in the image?"


def write_pope(folder, count, seed=0):
    """POPE's three files about held-out photos of fruit, each with some `count` questions -> names of the files' ways.

    Half of the questions of a file are about what is there. The photos and these are the same in all files.
    """
    fruit = data.groceries(64)
    train, chosen = fruit_photos.split(fruit, -(-count // 2), seed)
    names = copy_photos(folder / "photos", chosen.tolist())
    frequent = fruit.fine[train].bincount(minlength=len(fruit.fine_names))
    frequent = frequent.argsort(descending=True).tolist()
    for n, sampling in enumerate(SAMPLINGS):
        random = np.random.default_rng([seed, 11, n])
        lines = []
        for i, name in zip(chosen.tolist(), names):
            kind = int(fruit.fine[i])
            asked = {"yes": kind, "no": absent(sampling, fruit, kind, frequent, random)}
            for label, k in asked.items():
                text = asks_for(fruit, k)
                row = {"question_id": len(lines), "image": name, "text": text, "label": label}
                lines.append(json.dumps(row))
        (folder / f"fruit_pope_{sampling}.json").write_text("\n".join(lines) + "\n")
    return SAMPLINGS


def write_vqa(folder, count, seed=0):
    """Test questions of easy-VQA in VQA v2's two files, ten people with the one right answer -> [split]."""
    listed = easy_vqa_data.questions("test")
    order = np.random.default_rng([seed, 8]).permutation(len(listed))[: count or None]
    listed = [listed[i] for i in sorted(order.tolist())]
    images = folder / "test2019"
    images.mkdir(parents=True, exist_ok=True)
    asked = []
    people = []
    for n, question in enumerate(listed):
        # COCO's naming, and its type of file
        path = images / f"{question.image:012}.jpg"
        if not path.exists():
            save_jpeg(easy_vqa_data.picture("test", question.image), path)
        ids = {"question_id": n, "image_id": question.image}
        asked.append(ids | {"question": question.text})
        kind = "yes/no" if question.answer in ("yes", "no") else "other"
        answers = [{"answer": question.answer, "answer_id": i + 1} for i in range(10)]
        about = {"answer_type": kind, "question_type": question.kind}
        people.append(ids | about | {"answers": answers})
    stem = "v2_OpenEnded_mscoco_test2019_questions.json"
    run.write_json(folder / stem, {"questions": asked})
    run.write_json(folder / "v2_mscoco_test2019_annotations.json", {"annotations": people})
    return ("test2019",)


def save_jpeg(source, path):
    """A picture as JPEG, with as little loss as there is."""
    from PIL import Image

    with Image.open(source) as image:
        image.convert("RGB").save(path, quality=100, subsampling=0)


def write_folders(folder, count, seed=0):
    """Held-out photos of fruit, a folder for each of the 14 kinds -> [split]."""
    fruit = data.groceries(64)
    _, chosen = fruit_photos.split(fruit, count, seed)
    check(len(chosen) > 0, "no photos")
    for kind, short in enumerate(fruit.fine_names):
        of_kind = [i for i in chosen.tolist() if int(fruit.fine[i]) == kind]
        copy_photos(folder / "test" / short, of_kind)
    names = {short: fruit_photos.NAMES[short] for short in fruit.fine_names}
    run.write_json(folder / "test" / "classes.json", names)
    return ("test",)
