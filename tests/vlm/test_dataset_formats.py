"""vlm/dataset_formats.py: records of published data sets become a chat.json that the trainer reads."""

import io
import json
from functools import partial

import pytest
from PIL import Image
from pyarrow import Table, parquet

from tests import fuzz
from tests.conftest import ROOT
from utils.run import UserError
from vlm import conversations
from vlm import dataset_formats as formats


def encoded(colour, kind="PNG"):
    """Bytes of a small picture."""
    data = io.BytesIO()
    Image.new("RGB", (6, 4), (colour, 9, 99)).save(data, kind)
    return data.getvalue()


RED, BLUE = encoded(255), encoded(1, "JPEG")
CAULDRON = [
    {
        "images": [{"bytes": RED, "path": None}],
        "texts": [
            {"user": "What is it?", "assistant": "Red.", "source": "x"},
            {"user": "And how\n<image>large?", "assistant": "Six by four.", "source": "x"},
        ],
    },
    {"images": [{"bytes": RED}, {"bytes": BLUE}], "texts": [{"user": "Differ?", "assistant": "Yes."}]},
    {"images": [{"bytes": BLUE, "path": "b"}], "texts": [{"user": "What?", "assistant": "Blue."}]},
]  # fmt: skip


def say(*turns):
    """Turns as LLaVA writes them."""
    return [{"from": who, "value": value} for who, value in turns]


def read(folder):
    """The rows as the trainer reads them, checked against their pictures."""
    return conversations.read(folder / "chat.json", folder / "pictures")


def test_the_cauldron_in_parquet_becomes_chat_json(tmp_path):
    parquet.write_table(Table.from_pylist(CAULDRON), tmp_path / "0.parquet")
    parquet.write_table(Table.from_pylist(CAULDRON[:1]), tmp_path / "1.parquet")
    shards = sorted(tmp_path.glob("*.parquet"))
    counts = formats.write(tmp_path / "out", map(formats.cauldron, formats.parquet(shards, rows=2)))
    # the third record has two pictures; the red one is asked about twice, and is one file
    assert counts == {"rows": 3, "pictures": 2, "left out": 1}
    rows = read(tmp_path / "out")
    assert conversations.turns_of(rows[0]) == [
        ("<image>\nWhat is it?", "Red."),
        ("And how\nlarge?", "Six by four."),
    ]
    assert rows[0]["image"] == rows[2]["image"] and rows[0]["image"].endswith(".png")
    assert rows[1]["image"].endswith(".jpg")
    pictures = tmp_path / "out" / "pictures"
    assert (pictures / rows[0]["image"]).read_bytes() == RED
    assert (pictures / rows[1]["image"]).read_bytes() == BLUE
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.parquet", "1.parquet", "out"]


def test_llavas_rows_are_mended_and_their_pictures_stay_where_they_are(tmp_path):
    records = [
        {"id": "a", "image": "coco/a.jpg", "conversations": say(("human", "Who?\n<image>"), ("gpt", "He."))},
        {"id": "b", "conversations": say(("gpt", "Hello"), ("human", "Sum?"), ("gpt", "Two."))},
        {"id": "c", "conversations": say(("human", "One"), ("human", "Two"), ("gpt", "Three"))},
        {"id": "d", "conversations": say(("human", "No answer"))},
        {"id": "e", "image": None, "conversations": say(("human", "Q"), ("gpt", "A"), ("human", "and?"))},
        {"id": "f", "conversations": say(("gpt", "alone"))},
    ]  # fmt: skip
    (tmp_path / "mix.json").write_text(json.dumps(records))
    found = formats.json_list(tmp_path / "mix.json")
    assert formats.write(tmp_path / "out", map(formats.llava, found)) == {
        "rows": 3,
        "pictures": 0,
        "left out": 3,
    }
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "a.jpg").write_bytes(BLUE)
    rows = conversations.read(tmp_path / "out" / "chat.json", tmp_path)
    assert [conversations.turns_of(row) for row in rows] == [
        [("<image>\nWho?", "He.")],
        [("Sum?", "Two.")],
        [("Q", "A")],
    ]
    assert [row.get("image") for row in rows] == ["coco/a.jpg", None, None]


def test_llava_next_carries_its_pictures(tmp_path):
    turns = say(("human", "<image>\nWhat?"), ("gpt", "Red."))
    records = [
        {"id": "1", "conversations": turns, "image": {"bytes": RED, "path": "x"}, "data_source": "s"},
        {"id": "2", "conversations": say(("human", "Hi"), ("gpt", "Ho")), "image": None, "data_source": "s"},
    ]  # fmt: skip
    parquet.write_table(Table.from_pylist(records), tmp_path / "0.parquet")
    found = formats.parquet([tmp_path / "0.parquet"])
    counts = formats.write(tmp_path / "out", map(formats.llava, found))
    assert counts == {"rows": 2, "pictures": 1, "left out": 0}
    rows = read(tmp_path / "out")
    assert rows[0]["conversations"] == turns and "image" not in rows[1]


def test_captions_and_questions_have_keys_of_their_own(tmp_path):
    path = tmp_path / "train.jsonl"
    lines = [{"text": "A palm.", "name": "palm.jpg"}, {"text": "", "name": "empty.jpg"}]
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n", "utf-8")
    convert = formats.caption("Describe the photo.", text="text", image="name")
    counts = formats.write(tmp_path / "captions", map(convert, formats.json_lines(path)))
    assert counts == {"rows": 1, "pictures": 0, "left out": 1}
    [row] = json.loads((tmp_path / "captions" / "chat.json").read_text())
    assert row["image"] == "palm.jpg" and row["conversations"][1]["value"] == "A palm."
    # the most frequent of ten answers, and the question as LLaVA-1.5 asks it
    answers = ["dakota", "nous"] + ["dakota digital"] * 2
    convert = formats.vqa("query", "label", "image")
    record = {"query": "Which brand?", "label": answers, "image": {"bytes": RED}}
    turns, picture = convert(record)
    short = "Answer the question using a single word or phrase."
    assert turns == [(f"Which brand?\n{short}", "dakota digital")] and picture == RED
    none = [convert(record | {"label": []}), convert(record | {"query": ""})]
    counts = formats.write(tmp_path / "vqa", [convert(record | {"label": "one"}), *none])
    assert counts == {"rows": 1, "pictures": 1, "left out": 2}


@pytest.mark.parametrize(
    "records, says",
    [
        ([{"images": []}], "not of this format: KeyError 'texts'"),
        ([{"texts": [], "images": [{"bytes": None, "path": "x"}]}], "a picture without bytes"),
        ([{"texts": [], "images": [7]}], "a picture without bytes"),
        ([], "no record has a question"),
        ([{"texts": [], "images": []}], "no record has a question"),
    ],
)
def test_records_of_another_format_are_one_line_and_nothing_is_written(tmp_path, records, says):
    with pytest.raises(UserError, match=says):
        formats.write(tmp_path / "out", map(formats.cauldron, records))
    assert not list(tmp_path.iterdir())


def test_a_record_that_breaks_later_leaves_nothing_either(tmp_path):
    with pytest.raises(UserError, match="KeyError"):
        formats.write(tmp_path / "out", map(formats.cauldron, [*CAULDRON, {}]))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        formats.write(tmp_path / "out", map(formats.cauldron, CAULDRON))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_files_that_are_not_what_they_should_be_are_one_line(tmp_path):
    path = tmp_path / "x"
    for reader in (formats.json_lines, formats.json_list, lambda p: formats.parquet([p])):
        with pytest.raises(UserError, match="x"):
            list(reader(path))  # missing
        path.write_bytes(b"\xff\xfe nonsense")
        with pytest.raises(UserError, match="x"):
            list(reader(path))
        path.unlink()
    path.write_text('{"a": 1}\n[1]\n')
    with pytest.raises(UserError, match="line 2: no JSON object"):
        list(formats.json_lines(path))
    path.write_text('{"a": 1}')
    with pytest.raises(UserError, match="no list of objects"):
        formats.json_list(path)


def test_damaged_files_are_read_or_refused(tmp_path):
    """500 damaged inputs, fixed seed: parquet, lines of JSON, and records of wrong types."""
    parquet.write_table(Table.from_pylist(CAULDRON), tmp_path / "good.parquet")
    lines = "\n".join(json.dumps({"caption": f"c{i}", "image": f"{i}.jpg"}) for i in range(9))
    path, out, outcomes = tmp_path / "bad", tmp_path / "out", []

    def outcome(make):
        counts = fuzz.reads_or_refuses(lambda: formats.write(out, make()))
        outcomes.append(counts is not None)
        if counts is not None:
            rows = json.loads((out / "chat.json").read_text("utf-8"))
            assert len(rows) == counts["rows"] > 0
            for row in rows:
                made = conversations.tidy(row)
                assert all(turn["value"].strip() for turn in made["conversations"])
                assert isinstance(row.get("image", ""), str)
            formats.shutil.rmtree(out)
        assert not list(tmp_path.glob(".out*"))

    for bad in fuzz.damaged((tmp_path / "good.parquet").read_bytes(), 200, seed=4):
        path.write_bytes(bad)
        outcome(lambda: map(formats.cauldron, formats.parquet([path])))
    for bad in fuzz.damaged(lines.encode(), 150, seed=5):
        path.write_bytes(bad)
        outcome(lambda: map(formats.caption("What?"), formats.json_lines(path)))
    for bad in fuzz.retyped(CAULDRON, 150, seed=6):
        records = bad if isinstance(bad, list) else [bad]
        outcome(partial(map, formats.cauldron, records))
    assert len(outcomes) == 500 and 50 < sum(outcomes) < 450


def test_the_page_shows_how_much_room_features_take():
    """595 000 and 665 000 pictures at 336 px: 576 places of 1024 numbers in 2 bytes each."""
    page = (ROOT / "vlm" / "datasets.md").read_text("utf-8")
    one = (336 // 14) ** 2 * 1024 * 2
    assert one == 1_179_648
    for count, said in (
        (595_000, "0.702 TB"),
        (665_000, "0.784 TB"),
        (595_000 * 4, "2.808 TB"),
        (665_000 * 4, "3.138 TB"),
    ):
        assert f"{count * one / 1e12:.3f} TB" == said and said in page
    for count, raw, pooled in ((595_000, "0.202 TB", "11.0 GB"), (665_000, "0.225 TB", "12.3 GB")):
        assert f"{count * 3 * 336**2 / 1e12:.3f} TB" == raw and raw in page
        # nine places of a pooling connector
        assert f"{count * 9 * 1024 * 2 / 1e9:.1f} GB" == pooled and pooled in page
    assert 32e9 // one == 27_126 and "27 000 pictures" in page
