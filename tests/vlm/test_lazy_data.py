"""vlm/lazy_data.py: the batches of a run whose rows and pictures are read while it trains."""

import json
import tarfile
from pathlib import Path

import pytest
import torch

from tests import eyes, llamas
from utils.run import UserError
from vlm import conversations, data, evaluate, prompts
from vlm import train as teach
from vlm.train_config import Config, changed, check_flags


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    """Eight photos of fruit, two rows of words, a tiny CLIP and a tiny language model -> flags of a run."""
    folder = tmp_path_factory.mktemp("lazy")
    (folder / "pictures").mkdir()
    rows = data.fruit("train")[::90][:8]
    for one in rows:
        (folder / "pictures" / one["image"]).write_bytes(
            (data.photos() / one["image"]).read_bytes()
        )
    for i in range(2):
        turn = ("What is red and grows?", "an apple")
        rows.append(conversations.row(f"text-{i}", None, [turn]))
    (folder / "chat.json").write_text(json.dumps(rows))
    (folder / "chat.jsonl").write_text("\n".join(json.dumps(one) for one in rows))
    eyes.folder(folder / "eye")
    return changed(
        Config(),
        vision_name_or_path=str(folder / "eye"),
        text_name_or_path=llamas.folder(folder / "speaker"),
        connector="pool2",
        data_path=(str(folder / "chat.json"),),
        image_folder=str(folder / "pictures"),
        template="chatml",
        lazy=True,
        precision="fp32",
        text_share=0.0,
        views=1,
        batch_size=2,
        steps=4,
        warmup_steps=0,
        train_type="projector",
        out=str(folder / "out"),
    )


def rows_of(cfg):
    """What the file of rows holds."""
    return json.loads(Path(cfg.data.paths[0]).read_text())


def read(cfg, start=0):
    """All parts of all steps: ids and images."""
    _, _, source = teach.prepare(cfg, torch.device("cpu"))
    found = []
    for parts in source.batches(cfg, start):
        found.append([(batch["ids"], images) for batch, images in parts])
    return found, source


def same(mine, theirs):
    """The same batches?"""
    if len(mine) != len(theirs):
        return False
    for one, other in zip(mine, theirs):
        for (ids, images), (others, more) in zip(one, other, strict=True):
            alike = images is None if more is None else torch.equal(images, more)
            if not torch.equal(ids, others) or not alike:
                return False
    return True


def losses(cfg):
    return teach.main(cfg)["losses"]


def test_lazy_data_trains_as_data_in_memory(lesson, parity):
    """One view: nothing is drawn, and the order of rows is the same."""
    lazy = losses(changed(lesson, out=lesson.out + "/lazy"))
    memory = losses(changed(lesson, lazy=False, out=lesson.out + "/memory"))
    parity("LLaVA, data", "vlm.lazy_data.Lazy, losses", "data in memory", lazy, memory, 1e-4)


@pytest.mark.long
def test_a_run_goes_on_bit_for_bit_with_workers_on(lesson):
    more = {"dataloader_num_workers": 2, "views": 3, "lr_scheduler_type": "constant"}
    whole = losses(
        changed(lesson, out=lesson.out + "/whole", **more | {"dataloader_num_workers": 0})
    )
    cfg = changed(lesson, out=lesson.out + "/pieces", save_steps=1, **more)
    losses(changed(cfg, steps=2))
    assert losses(changed(cfg, resume=True)) == whole


def test_batches_from_a_step_are_those_of_a_run_that_goes_on(lesson):
    cfg = changed(lesson, views=3, gradient_accumulation_steps=2)
    whole, _ = read(cfg)
    rest, _ = read(cfg, start=2)
    assert len(whole) == 4 and same(rest, whole[2:]) and not same(whole[:2], whole[2:])


def test_views_are_drawn_by_place(lesson):
    """Of three views several are seen, the same ones again."""
    cfg = changed(lesson, views=3, steps=12)
    found, source = read(cfg)
    assert same(found, read(cfg)[0])
    features = source.load.features
    drawn = set()
    for parts in found:
        for _, images in parts:
            for image in images if images is not None else []:
                for view in range(3):
                    if any(torch.equal(features[view, i].float(), image) for i in range(8)):
                        drawn.add(view)
    assert drawn == {0, 1, 2}


def test_json_lines_and_shards_give_the_rows_of_a_chat_json(lesson, tmp_path):
    plain, _ = read(lesson)
    lines = lesson.data.paths[0].replace(".json", ".jsonl")
    assert same(read(changed(lesson, data_path=(lines,)))[0], plain)
    # a shard with pictures, and their rows beside them
    rows = rows_of(lesson)[:8]
    with tarfile.open(tmp_path / "one.tar", "w") as archive:
        for i, one in enumerate(rows):
            file = tmp_path / f"{i:04}.json"
            file.write_text(json.dumps({k: v for k, v in one.items() if k != "image"}))
            archive.add(f"{lesson.data.image_folder}/{one['image']}", f"{i:04}.jpg")
            archive.add(file, f"{i:04}.json")
    shards = changed(lesson, data_path=(str(tmp_path / "one.tar"),), image_folder="")
    found, source = read(shards)
    assert len(source) == 8 and len(found) == 4
    assert all(images.shape[1:] == (16, 16) for parts in found for _, images in parts)


def test_a_broken_picture_is_replaced_and_counted(lesson, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rows = rows_of(lesson)
    for one in rows[:8]:
        content = Path(lesson.data.image_folder, one["image"]).read_bytes()
        (pictures / one["image"]).write_bytes(content)
    (pictures / rows[0]["image"]).write_bytes(b"no picture")
    (pictures / rows[1]["image"]).unlink()
    cfg = changed(lesson, image_folder=str(pictures), steps=5)
    found, source = read(cfg)
    assert source.counts()["broken pictures"] == 2
    assert all(
        images.abs().sum((1, 2)).all()
        for parts in found
        for _, images in parts
        if images is not None
    )
    assert same(found, read(cfg)[0])


def test_long_conversations_lose_turns_or_another_stands_in(lesson, tmp_path):
    rows = rows_of(lesson)[:6]
    talk = [("What?", "a pear"), ("Tell more", "very " * 200)]
    rows.append(conversations.row("long", rows[0]["image"], talk))
    rows.append(conversations.row("endless", rows[1]["image"], talk[1:]))
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    cfg = changed(lesson, data_path=(str(tmp_path / "chat.json"),), packing=False)
    found, source = read(cfg)
    counts = source.counts()
    assert counts["conversations shortened"] >= 1 and counts["conversations left out"] == 1
    assert max(ids.shape[1] for parts in found for ids, _ in parts) <= 128


def test_weights_say_how_often_a_file_is_drawn(lesson, tmp_path):
    rows = rows_of(lesson)
    (tmp_path / "a.json").write_text(json.dumps(rows[:4]))
    (tmp_path / "b.json").write_text(json.dumps(rows[8:]))
    paths = (str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    cfg = changed(lesson, data_path=paths, weights=(1.0, 4.0), steps=60)
    found, _ = read(cfg)
    with_pictures = sum(0 if images is None else len(images) for p in found for _, images in p)
    assert 10 <= with_pictures <= 40  # of 120; 24 are expected
    with pytest.raises(UserError, match="--weights"):
        read(changed(cfg, weights=(1.0,)))


def test_ranks_read_different_samples(lesson, monkeypatch):
    whole = {}
    for rank in range(2):
        monkeypatch.setattr(teach.ranks, "rank_and_world_size", lambda rank=rank: (rank, 2))
        whole[rank], _ = read(changed(lesson, batch_size=5, steps=1, packing=False))
    first, second = ([images for parts in whole[r] for _, images in parts] for r in range(2))
    seen = [image for images in (*first, *second) if images is not None for image in images]
    assert len(seen) == 8  # every photo once an epoch
    assert len({image.sum().item() for image in seen}) == 8


def test_pages_of_text_are_other_than_those_of_the_text_loss(lesson):
    cfg = changed(lesson, text_share=0.5)
    tokenizer, _, source = teach.prepare(cfg, torch.device("cpu"))
    assert len(source) == 20
    pages = [tokenizer.decode(source.samples[i]["ids"])[:60] for i in range(10, 20)]
    judged = evaluate.paragraphs(40)
    assert not any(page.startswith(text) for text in pages for page in judged)
    assert source.samples[12]["labels"][5] != prompts.IGNORE


def test_a_learning_tower_gets_pixels(lesson):
    found, source = read(changed(lesson, train_type="none", steps=1))
    (_, images), *_ = found[0]
    vision_tower = source.model.vision
    photo = source.load(source.rows[0]["image"], None)
    assert images.shape[1:] == (3, 28, 28) and images.dtype == torch.float32
    assert images.min() >= vision_tower.pixels(torch.zeros_like(photo)[None]).min()
    assert images.max() < 10


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"data_path": ()}, "go with --data"),
        ({"dataloader_num_workers": -1}, "--dataloader_num_workers"),
        ({"dataloader_prefetch_factor": 0}, "--dataloader_prefetch_factor"),
    ],
)
def test_bad_flags(lesson, flags, says):
    cfg = changed(lesson, **{"image_folder": ""} | flags)
    with pytest.raises(UserError, match=says):
        check_flags(cfg)


def test_addresses_need_a_flag(lesson, tmp_path):
    rows = rows_of(lesson)[:2]
    rows[0]["image"] = "http://127.0.0.1:9/a.jpg"
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    cfg = changed(lesson, data_path=(str(tmp_path / "chat.json"),))
    with pytest.raises(UserError, match="--download"):
        read(cfg)


def test_what_asks_for_lazy_data():
    def lazy(**flags):
        return changed(Config(), **flags).data.is_lazy

    assert not lazy() and not lazy(data_path=("a.json",))
    assert lazy(data_path=("a.jsonl",)) and lazy(data_path=("a.json", "b.json"))
    assert lazy(data_path=("a.json",), dataloader_num_workers=1)
    assert lazy(lazy=True)
