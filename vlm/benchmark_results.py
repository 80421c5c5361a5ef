"""Files of results of vision-language benchmarks, as their own evaluations and servers take them.

One function a benchmark: answered rows of benchmarks.py -> the content of its file.
"""

import json

from utils import run


def vqa(rows):
    return [{"question_id": r["id"], "answer": r["said"]} for r in rows]


def pope(rows):
    return [{"question": r["question"], "answer": r["said"]} for r in rows]


def aokvqa(rows):
    found = {}
    for r in rows:
        found[r["id"]] = {"multiple_choice": r["choices"][r["chosen"]], "direct_answer": r["said"]}
    return found


def scienceqa(rows):
    chosen = {r["id"]: r["chosen"] for r in rows}
    return {"results": chosen, "outputs": {r["id"]: r["said"] for r in rows}}


def captions(rows):
    return [{"image_id": r["id"], "caption": r["said"]} for r in rows]


def classes(rows):
    return {r["id"]: r["choices"][r["chosen"]] for r in rows}


def write(path, content):
    """The file of results: JSON, or one object a line."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(one) + "\n" for one in content), "utf-8")
    else:
        run.write_json(path, content)
