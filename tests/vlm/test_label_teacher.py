"""vlm/label_teacher.py: likelihoods of class names against evaluate.py's, in batches, with tiles; rows."""

import pytest
import torch

from tests import eyes
from tests.vlm.test_label_files import photo
from utils import data
from vlm import evaluate, label_files, label_teacher, llava

NAMES = ["a fog", "the sun", "rain and wind"]
PROMPTS = ("What?", "How is the weather?")


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    tokenizer, model = eyes.talker(tmp_path_factory.mktemp("talker"))
    with torch.no_grad():
        for parameter in model.connector.parameters():
            parameter.mul_(20)
    return tokenizer, model.requires_grad_(False)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for n in range(5):
        photo(folder / f"{n}.png", n, (40, 28))
    return label_files.read_folder(folder, tuple(NAMES))[0]


def test_likelihoods_are_those_of_answer_ranking(talker, photos, parity):
    tokenizer, model = talker
    paths = [p.path for p in photos]
    found = label_teacher.likelihoods(tokenizer, model, paths, PROMPTS, NAMES)
    assert found.shape == (2, 5, 3)
    images = torch.stack([data.read_image(path, model.vision.size) for path in paths])
    features = model.vision(model.vision.pixels(images))
    with torch.autocast("cpu", torch.bfloat16):
        theirs = [
            evaluate.answer_likelihoods(tokenizer, model, features, NAMES, p) for p in PROMPTS
        ]
    name = "evaluate.answer_likelihoods"
    parity("Pseudo-labels", "label_teacher.likelihoods", name, found, torch.stack(theirs), 1e-4)
    # they hang on the photo and on the prompt
    assert found.std(1).min() > 1e-3 and (found[0] - found[1]).abs().min() > 1e-4


def test_a_row_for_each_photo_in_batches(talker, photos, monkeypatch):
    monkeypatch.setattr(llava, "load", lambda *about: talker)
    rows = []
    label_teacher.label("m", photos, PROMPTS, NAMES, rows.append, batch=2)
    assert [row["photo"] for row in rows] == [p.name for p in photos]
    assert [row["sha256"] for row in rows] == [label_files.digest(p.path) for p in photos]
    found = torch.tensor([row["log_p"] for row in rows]).transpose(0, 1)
    paths = [p.path for p in photos]
    tokenizer, model = talker
    expected = label_teacher.likelihoods(tokenizer, model, paths, PROMPTS, NAMES)
    assert torch.allclose(found, expected, atol=0.05)


def test_photos_with_tiles_one_by_one(talker, photos, monkeypatch):
    tokenizer, model = talker
    paths = [p.path for p in photos[:3]]
    whole = label_teacher.photo_tokens(model, paths)
    assert len(whole) == 1 and len(whole[0]) == 3
    seen = []
    width = model.language.config.hidden_size

    def embeddings(model, picture):
        seen.append(picture.shape)
        return torch.zeros(1, 4 + len(seen), width)

    monkeypatch.setattr(label_teacher.generation, "photo_embeddings", embeddings)
    monkeypatch.setattr(model, "grids", [(28, 56)])
    parts = label_teacher.photo_tokens(model, paths)
    assert [part.shape[1] for part in parts] == [5, 6, 7] and seen[0] == (3, 28, 40)
    # sequences of other lengths are ranked one after the other
    found = label_teacher.likelihoods(tokenizer, model, paths, PROMPTS, NAMES)
    assert found.shape == (2, 3, 3)


def test_a_teacher_is_known_by_its_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"one")
    first = label_teacher.settings_of(path)
    path.write_bytes(b"two")
    assert label_teacher.settings_of(path)["sha256"] != first["sha256"]
    assert first["model"] == "model.safetensors"
    assert label_teacher.settings_of("hub/id") == {"model": "hub/id"}
