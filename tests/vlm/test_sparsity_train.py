"""vlm/sparsity_train.py: mosaics as files, runs that differ in their plug-ins alone, what is judged."""

import json
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from tests.vlm.test_sparsity_study import fruit as fruit_fixture  # noqa: F401
from utils import data
from utils.run import UserError
from vlm import conversations, fruit_photos, sparsity_train
from vlm.sparsity_study import question

FOUND = {"losses": [2.0] * 12, "train_cpu_seconds": 120.0, "final_loss": 0.5}


@pytest.fixture
def fruit(fruit_fixture):  # noqa: F811
    """Twelve photos of one colour each."""
    images = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(12, 3, 224, 224) * 20
    return SimpleNamespace(**vars(fruit_fixture), images=images)


def test_a_mosaic_has_its_photos_row_by_row(fruit):
    picture = sparsity_train.mosaic(fruit.images[[1, 2, 3, 4]])
    assert picture.shape == (3, 448, 448)
    corners = [int(picture[0, y, x]) for y in (0, 447) for x in (0, 447)]
    assert corners == [20, 40, 60, 80]
    assert int((picture == 40).sum()) == 3 * 224 * 224


def test_files_ask_about_a_kind_that_is_in_the_picture(fruit, tmp_path):
    random = np.random.default_rng(0)
    about = (fruit, torch.arange(12), 10, random)
    groups, kinds = sparsity_train.write_mosaics(tmp_path / "m", *about)
    rows = json.loads((tmp_path / "m/chat.json").read_text())
    conversations.validate(rows, tmp_path / "m")
    for number, one in enumerate(rows):
        picture = data.read_image(tmp_path / "m" / one["image"], 0)
        shown = {int(v) // 20 for v in picture[0, ::447, ::447].flatten()}
        assert int(kinds[number]) in {int(fruit.fine[i]) for i in shown}
        asked, answer = (turn["value"] for turn in one["conversations"])
        assert question(int(groups[number])) in asked
        assert answer == fruit_photos.NAMES[fruit.fine_names[int(kinds[number])]]


def test_runs_differ_in_their_plugins_alone(fruit, tmp_path, monkeypatch):
    runs = []
    judged = []

    def judge(path, folder, fruit, groups, kinds):
        judged.append((path, folder.name, len(kinds)))
        return 0.5, 9, 0.3

    split = torch.arange(12)[::2], torch.arange(12)
    monkeypatch.setattr(sparsity_train.train, "main", lambda cfg: runs.append(cfg) or FOUND)
    monkeypatch.setattr(sparsity_train, "judge", judge)
    monkeypatch.setattr(sparsity_train.data, "groceries", lambda side: fruit)
    monkeypatch.setattr(sparsity_train.fruit_photos, "split", lambda fruit: split)
    drawn = []
    original = sparsity_train.draw_mosaics
    monkeypatch.setattr(
        sparsity_train,
        "draw_mosaics",
        lambda fruit, among, *more: drawn.append(among) or original(fruit, torch.arange(12), *more),
    )
    flags = {"pictures": 3, "judged": 4, "steps": 7, "batch": 2}
    cfg = sparsity_train.Config(**flags, out=str(tmp_path / "out"))
    found = sparsity_train.main(cfg)
    # training photos to learn from, held-out ones to be judged by
    assert drawn[0] is split[0] and drawn[1] is split[1]
    plugins = [one.model.sparsity_plugins for one in runs]
    assert plugins == list(sparsity_train.RUNS.values())
    same = [sparsity_train.changed(r, sparsity_plugins=(), out="") for r in runs]
    assert all(one == same[0] for one in same)
    assert same[0].train.steps == 7 and same[0].train.batch_size == 2
    assert same[0].model.img_size == 448 and same[0].data.views == 1
    assert same[0].data.data_path == (str(tmp_path / "out/learn/chat.json"),)
    # each is judged by its own weights, on the other pictures
    assert [str(path.parent) for path, _, _ in judged] == [one.out for one in runs]
    assert {(folder, n) for _, folder, n in judged} == {("judged", 4)}
    row = found["prompt 9"]
    assert row["accuracy"] == 0.5 and row["tokens"] == 9 and row["standard error"] == 0.25
    assert row["CPU min of training"] == 2 and row["loss"] == 0.5
    assert (tmp_path / "out/runs.png").is_file() and not plt.get_fignums()


def test_the_likeliest_kind_of_the_group_is_the_answer(fruit, tmp_path, monkeypatch):
    """A stand-in that always finds the second kind of a group likeliest."""
    for number in range(3):
        sparsity_train.Image.new("RGB", (448, 448)).save(tmp_path / f"{number:04}.png")
    language = torch.nn.Linear(1, 1)
    model = SimpleNamespace(language=language, count_of=lambda size: 9 if size == (448, 448) else 0)
    asked = []

    def rank(tokenizer, model, embeds, names, prompt):
        asked.append((names, prompt))
        return torch.tensor([[-2.0, -1.0] + [-3.0] * (len(names) - 2)])

    monkeypatch.setattr(sparsity_train.llava, "load", lambda path: ("tokenizer", model))
    monkeypatch.setattr(
        sparsity_train.generation, "photo_embeddings", lambda model, picture: picture
    )
    monkeypatch.setattr(sparsity_train.prompted_answers, "embed_prompt", lambda *about: about[-1])
    monkeypatch.setattr(sparsity_train.prompted_answers, "rank_answers", rank)
    groups, kinds = torch.tensor([0, 0, 1]), torch.tensor([1, 0, 4])
    accuracy, tokens, seconds = sparsity_train.judge("w", tmp_path, fruit, groups, kinds)
    assert accuracy == pytest.approx(2 / 3) and tokens == 9 and seconds >= 0
    names = [fruit_photos.NAMES[fruit.fine_names[k]] for k in (0, 1, 2)]
    assert asked[0] == (names, question(0)) and asked[2][1] == question(1)


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"steps": 0}, "above 0"),
        ({"judged": 0}, "above 0"),
        ({"only": ("all",)}, "the runs are all 49"),
    ],
)
def test_bad_flags(flags, says, tmp_path):
    with pytest.raises(UserError, match=says):
        sparsity_train.main(sparsity_train.Config(**flags, out=str(tmp_path)))
