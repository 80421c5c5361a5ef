"""Published data sets as chat.json and a folder of pictures: what `vlm/train.py --data` reads.

Records are read from parquet files (`parquet`) or lines of JSON (`json_lines`), a function for each
format makes (turns, picture) of a record, and `write` makes the folder, whole or not at all. No
record is held longer than it is looked at. What the data sets hold: vlm/datasets.md.

    from vlm import dataset_formats as formats
    shards = sorted(Path("the_cauldron/chartqa").glob("*.parquet"))
    formats.write("chartqa", map(formats.cauldron, formats.parquet(shards)))
    python vlm/train.py --data chartqa/chat.json --image_folder chartqa/pictures

A picture is bytes of a file, or the name of a file in a folder that is there already, or None for
text alone. What has several pictures, or no answer, is left out and counted.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from utils import run
from utils.run import UserError, check
from utils.text import printable, read_text
from vlm import conversations
from vlm.prompts import IMAGE

# How LLaVA-1.5 asks for an answer of a benchmark. Liu et al. 2023, arXiv:2310.03744, Sec. 3.2
SHORT_ANSWER = "Answer the question using a single word or phrase."
# The first bytes of a file, and the ending of its name
KINDS = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"GIF8": ".gif"}


def parquet(paths: Iterable[str | Path], rows: int = 64) -> Iterator[dict[str, Any]]:
    """Records of parquet files, `rows` of them in memory at a time. Raises UserError for a file
    that is missing or damaged."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    for path in paths:
        try:
            # some rows at a time: a file of pictures may be larger than the memory
            for batch in ParquetFile(path).iter_batches(rows):
                yield from batch.to_pylist()
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            line = printable(str(error).partition("\n")[0])
            raise UserError(f"{printable(path)} is no readable parquet file: {line}") from None


def json_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """Records of a file with a JSON object in each line. Raises UserError, which names the line."""
    name = printable(path)
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield json_object(line, f"{name}, line {number}")
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from None


def json_object(line: bytes, where: str) -> dict[str, Any]:
    """A line of JSON in UTF-8. Raises UserError if it is none, or another thing than an object."""
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise UserError(f"{where}: no JSON in UTF-8") from None
    check(isinstance(found, dict), f"{where}: no JSON object")
    return found


def json_list(path: str | Path) -> list[dict[str, Any]]:
    """Records of a JSON file that is one list of them, such as LLaVA's. Raises UserError."""
    name = printable(path)
    try:
        found = json.loads(read_text(path, conversations.MEGABYTES))
    except (ValueError, RecursionError):
        raise UserError(f"{name} is no readable JSON file") from None
    objects = isinstance(found, list) and all(isinstance(one, dict) for one in found)
    check(objects, f"{name} holds no list of objects")
    return found


def without_marker(text: Any) -> str:
    """A text without <image>, which `conversations.row` puts where it belongs."""
    return str(text or "").replace(IMAGE, "").strip()


def content(image: Any) -> Any:
    """A picture as `write` takes it: its bytes, the name of its file, or None for no picture.

    Raises TypeError for a picture whose bytes are not there: its text would be about nothing.
    """
    if isinstance(image, dict) and isinstance(image["bytes"], bytes):
        return image["bytes"]
    if image is None or isinstance(image, str):
        return image
    raise TypeError("a picture without bytes")


def cauldron(record):
    """{"images": [{"bytes"}, ...], "texts": [{"user", "assistant"}, ...]} of The Cauldron.
    Laurencon et al. 2024, arXiv:2405.02246, Sec. 4.1."""
    # a turn is a question and its answer
    turns = [(turn["user"], turn["assistant"]) for turn in record["texts"]]
    images = [content(image) for image in record["images"]]
    # several pictures: the trainer has one a conversation
    return (turns, images[0]) if len(images) == 1 else None


def llava(record):
    """{"conversations": [{"from", "value"}, ...], "image"} of LLaVA, ShareGPT4V, ALLaVA, LLaVA-NeXT:
    the image is the name of a file, or {"bytes"}, or missing.

    Turns before the first question are left out: some texts of ShareGPT begin with an answer. None
    if questions and answers do not alternate.
    """
    # speakers in order; from the first question on they must alternate
    said = record["conversations"]
    who = [turn["from"] for turn in said]
    first = who.index("human") if "human" in who else len(who)
    alternate = ["human", "gpt"] * len(who)
    if who[first:] != alternate[: len(who) - first]:
        return None
    turns = conversations.turns_of({"conversations": said[first:]})
    return turns, content(record.get("image"))


def caption(question, text="caption", image="image"):
    """-> a function for records of a picture and a caption: what is asked, and their keys."""

    def convert(record):
        return [(question, record[text])], content(record[image])

    return convert


def vqa(question="question", answer="answer", image="image"):
    """-> a function for records of a picture, a question and an answer, or a list of answers of
    which the most frequent counts: their keys."""

    def convert(record):
        # ten people answered VQAv2's questions: the most frequent answer counts
        answers = record[answer]
        if isinstance(answers, list):
            answers = max(answers, key=answers.count) if answers else ""
        asked = f"{record[question]}\n{SHORT_ANSWER}" if record[question] else ""
        return [(asked, answers)], content(record[image])

    return convert


def picture_name(data):
    """By what is in it and its kind, so that a picture of many questions is one file: 9f86d0818.jpg."""
    # its kind by its first bytes, whatever the record says
    kinds = [ending for start, ending in KINDS.items() if data.startswith(start)]
    return hashlib.sha256(data).hexdigest()[:24] + (kinds[0] if kinds else ".bin")


def write(folder: str | Path, found: Iterable[Any]) -> dict[str, int]:
    """(turns, picture) of records -> FOLDER/chat.json, and FOLDER/pictures if any came as bytes.

    Returns how many rows and pictures were written, and how many records left out. Raises UserError
    if the folder is there already, a record has not the keys of its format, or nothing is left;
    then nothing is written.
    """
    folder = Path(folder)
    check(not folder.exists(), f"{folder} is there already: choose another place")
    # written under another name: a folder is whole or not there
    ready = folder.with_name(f".{folder.name}-{run.os.getpid()}")
    try:
        counts = write_into(ready, found)
        check(counts["rows"], "no record has a question, an answer and at most one picture")
        ready.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {printable(folder)}: {error.strerror}") from None
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        kind = type(error).__name__
        raise UserError(f"a record is not of this format: {kind} {printable(error)}") from None
    finally:
        shutil.rmtree(ready, ignore_errors=True)
    return counts


def write_into(folder, found):
    """The rows and pictures into a folder that is made for them -> their numbers."""
    folder.mkdir(parents=True)
    pictures = folder / "pictures"
    rows = []
    counts = {"rows": 0, "pictures": 0, "left out": 0}
    for number, one in enumerate(found):
        turns, picture = one if one else ([], None)
        # both sides of a turn say something
        cleaned = [(without_marker(ask), without_marker(answer)) for ask, answer in turns]
        turns = [(ask, answer) for ask, answer in cleaned if ask and answer]
        if not turns:
            counts["left out"] += 1
            continue
        # a picture of many questions is one file, named by its content
        if isinstance(picture, bytes):
            path = pictures / picture_name(picture)
            if not path.exists():
                pictures.mkdir(exist_ok=True)
                path.write_bytes(picture)
                counts["pictures"] += 1
            picture = path.name
        rows.append(conversations.row(f"{number:08}", picture, turns))
    counts["rows"] = len(rows)
    run.write_json(folder / "chat.json", rows)
    return counts
