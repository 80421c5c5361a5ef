"""rag/multimodal_rag.py: both ways to learn the space are the libraries', and it finds what is planted."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from langchain_core.retrievers import BaseRetriever
from PIL import Image
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from rag import image_data, multimodal_scores, scores
from rag import image_projection as projection
from rag import multimodal_rag as mm
from tests.conftest import ROOT
from utils import data
from utils.run import UserError

TINY = {"emoji": 200, "photos": 60, "steps": 20}


def pairs(n=24, d=6, seed=0):
    """Unit vectors of n pictures and n texts."""
    rng = torch.Generator().manual_seed(seed)
    return (F.normalize(torch.randn(n, d, generator=rng), dim=-1) for _ in range(2))


def planted(n=300, d=20, e=8):
    """Features (n,d), and unit texts (n,e) that are a linear map of them: a space to be found."""
    x = torch.randn(n, d)
    return x, F.normalize(x @ torch.randn(d, e) + 0.5, dim=-1)


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    return mm.build_retriever(mm.Config(**TINY, k=10, out=str(tmp_path_factory.mktemp("mm"))))


def test_ridge_is_least_squares_of_torch_and_numpy(parity):
    """A penalty is the same as more equations: sqrt(weight) W = 0 below x W = y."""
    x, y = 3 + torch.randn(40, 12), torch.randn(40, 5)
    W, b = projection.ridge(x, y, 2.5)
    left = torch.cat([(x - x.mean(0)).double(), 2.5**0.5 * torch.eye(12).double()])
    right = torch.cat([(y - y.mean(0)).double(), torch.zeros(12, 5).double()])
    theirs = torch.linalg.lstsq(left, right).solution
    parity("Multimodal RAG", "image_projection.ridge", "torch.linalg.lstsq", W, theirs, atol=1e-6)
    theirs = torch.from_numpy(np.linalg.lstsq(left.numpy(), right.numpy(), rcond=None)[0])
    parity("Multimodal RAG", "image_projection.ridge", "numpy.linalg.lstsq", W, theirs, atol=1e-6)
    torch.testing.assert_close(b, y.mean(0) - x.mean(0) @ W)


def test_at_the_ridge_solution_the_gradient_is_zero():
    x, y = torch.randn(30, 50) + 1, torch.randn(30, 4)  # fewer pictures than features
    W, b = (p.double().requires_grad_() for p in projection.ridge(x, y, 3.0))
    ((x.double() @ W + b - y).square().sum() + 3 * W.square().sum()).backward()
    assert W.grad.abs().max() < 1e-4 and b.grad.abs().max() < 1e-4


def test_ridge_finds_a_planted_map():
    x, true = torch.randn(200, 10), torch.randn(10, 4)
    W, b = projection.ridge(x, x @ true + 7, 1e-6)
    torch.testing.assert_close(W, true, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(b, torch.full((4,), 7.0), atol=1e-4, rtol=1e-4)


def test_info_nce_is_clip_s_loss_and_gradient(parity):
    ours, theirs = ([v.requires_grad_() for v in pairs()] for _ in range(2))
    a = projection.info_nce(*ours, 0.07)
    b = image_text_contrastive_loss(theirs[1] @ theirs[0].T / 0.07)
    a.backward()
    b.backward()
    name = "transformers clip image_text_contrastive_loss"
    mine, them = ({"loss": x, "z": v[0].grad, "t": v[1].grad} for x, v in ((a, ours), (b, theirs)))
    parity("Multimodal RAG", "image_projection.info_nce", name, mine, them, atol=1e-5)


def test_equal_captions_are_no_negatives():
    """Two pictures of one caption cannot be told apart: CLIP's loss stops at log 2, ours goes on to 0."""
    t = torch.eye(4)[[0, 0, 1, 1]]
    assert float(projection.info_nce(t, t, 0.01)) == pytest.approx(np.log(2), abs=1e-4)
    assert float(projection.info_nce(t, t, 0.01, same=t @ t.T > 0.9999)) == pytest.approx(
        0, abs=1e-4
    )
    z, t = pairs()
    assert projection.info_nce(z, t, 0.1, same=t @ t.T > 0.9999) == projection.info_nce(z, t, 0.1)


def test_knowing_nothing_costs_log_b():
    z = torch.ones(32, 4) / 2
    assert float(projection.info_nce(z, z, 0.05)) == pytest.approx(np.log(32), rel=1e-5)


@pytest.mark.parametrize("how", ["ridge", "infonce", "both"])
def test_every_way_learns_a_planted_space(how):
    x, t = planted()
    space = projection.fit(
        x[:200], t[:200], mm.Config(steps=200, batch=100, lr=1e-2, ridge=1.0), how
    )
    ranks = multimodal_scores.retrieval_ranks(projection.project(space, x[200:]), t[200:])
    assert scores.hit(ranks, 1).mean() > 0.5  # chance: 0.01
    torch.testing.assert_close(projection.project(space, x).norm(dim=-1), torch.ones(300))


def test_the_loss_falls():
    x, t = planted()
    W, b = 0.01 * torch.randn(20, 8), torch.zeros(8)
    losses = list(projection.train(W, b, x, t, mm.Config(steps=60, batch=100, lr=1e-2)))
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_the_same_seed_gives_the_same_space():
    x, t = planted()
    a, b, c = (projection.fit(x, t, mm.Config(steps=5, batch=50, seed=s)).W for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_retrieval_ranks_count_who_is_nearer():
    t = torch.eye(3)
    assert multimodal_scores.retrieval_ranks(t, t).tolist() == [1, 1, 1]
    assert multimodal_scores.retrieval_ranks(t[[1, 0, 2]], t).tolist() == [2, 2, 1]
    # For the first text the third picture is best
    z = torch.tensor([[0.1, 0.9], [0.5, 0.5], [0.9, 0.1]])
    assert multimodal_scores.retrieval_ranks(
        z, torch.tensor([[1.0, 0], [0, 1], [1, 0]])
    ).tolist() == [3, 2, 1]


def test_near_duplicates_are_left_out_by_image_and_by_name():
    x, t = torch.randn(8, 30), F.normalize(torch.randn(8, 30), dim=-1)
    test = torch.tensor([True, True] + [False] * 6)
    x[2] = x[0] + 0.01 * torch.randn(30)  # looks like a test picture
    t[3] = F.normalize(t[1] + 0.01 * torch.randn(30), dim=-1)  # is called like one
    x[5] = x[4]  # twins on the same side do no harm
    assert (
        multimodal_scores.without_near_duplicates(x, t, test, 0.9).tolist()
        == [False] * 4 + [True] * 4
    )


def test_the_split_does_not_depend_on_how_many_there_are():
    few, many = image_data.emoji(50, "cpu"), data.emoji(72)
    assert len(set(few.sources)) == 50 and set(few.captions) <= set(many[1])
    assert 3 <= int(few.test.sum()) <= 20
    i = many[1].index(few.captions[7])
    assert torch.equal(few.thumbs[7], many[0][i]) and few.sources[7] == f"emoji/{many[2][i]}.png"


def test_documents_carry_source_id_and_score_best_first(retriever):
    found = retriever.invoke("a photo of an apple")
    assert isinstance(retriever, BaseRetriever) and len(found) == 10
    marks = [d.metadata["score"] for d in found]
    assert marks == sorted(marks, reverse=True) and -1 <= marks[-1] <= marks[0] <= 1
    assert all(d.metadata["id"] == d.metadata["source"] for d in found)
    assert len({d.metadata["id"] for d in found}) == 10


def test_only_held_out_images_are_found(retriever):
    p = retriever.images
    assert p.test.all() and retriever.index.ntotal == len(p.captions)
    assert all(s.startswith(("emoji/", "groceries/test/")) for s in p.sources)


def test_the_retriever_ranks_as_the_formula_does(retriever):
    """Through text encoder, index and documents the same places come out as from one product of matrices."""
    p, z = (
        retriever.images,
        torch.from_numpy(retriever.index.reconstruct_n(0, retriever.index.ntotal)),
    )
    t = retriever.encode(p.captions)
    asked = [i for i, c in enumerate(p.coarse) if c == ""][:20]
    questions = [SimpleNamespace(text=p.captions[i], gold=p.sources[i]) for i in asked]
    ranks, _, _ = scores.measure(retriever, questions)
    expected = multimodal_scores.retrieval_ranks(z, t)[asked]
    assert np.array_equal(ranks, np.where(expected <= 10, expected, 0))


def test_words_find_fruit(retriever):
    """Far above chance from 20 training photos: a third of the photos are apples, none of the emoji."""
    found = retriever.invoke("a photo of an apple")
    assert sum("apple" in d.page_content for d in found) >= 5


def test_a_folder_of_ones_own(tmp_path):
    images, captions, _ = data.emoji(72)
    for name in ("red apple", "crying face", "flag: japan"):
        Image.fromarray(images[captions.index(name)].permute(1, 2, 0).numpy()).save(
            tmp_path / f"{name[-5:]}_1.png"
        )
    retriever = mm.build_retriever(mm.Config(**TINY, images=str(tmp_path)))
    found = retriever.invoke("a crying face")
    assert len(found) == 3 and sorted(d.page_content for d in found) == [
        " face 1",
        "apple 1",
        "japan 1",
    ]
    for d in found:  # name and picture belong together
        thumb, n = Image.open(d.metadata["source"]), d.metadata["n"]
        shown = (
            retriever.images.thumbs[n].permute(1, 2, 0).float()
            - torch.from_numpy(np.array(thumb)).float()
        )
        assert shown.abs().mean() < 8


def test_right_cards_have_a_frame():
    thumb = torch.zeros(3, 72, 72, dtype=torch.uint8)
    plain, right = mm.result_card(thumb, 0.5), mm.result_card(thumb, 0.5, True)
    assert plain.shape == right.shape == (3, 90, 78)
    assert (plain[:, 0, 0] == 1).all() and right[0, 0, 0] < 0
    assert torch.equal(plain[:, 78:], right[:, 78:]) and torch.equal(
        plain[:, 3:75, 3:75], right[:, 3:75, 3:75]
    )


def command(*flags):
    line = [sys.executable, "rag/multimodal_rag.py", *flags]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


def test_the_command_writes_what_it_promises(tmp_path):
    done = command("--emoji", "200", "--photos", "60", "--steps", "2", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for way in (
        "chance",
        "ridge",
        "infonce",
        "both",
        "both, near-duplicates removed",
        "both, random subset",
    ):
        row = metrics[f"emoji, {way}"]
        assert 0 <= row["hit@1"] <= row["hit@5"] <= row["hit@10"] <= 1
    assert metrics["emoji, ridge"]["hit@10"] > metrics["emoji, chance"]["hit@10"]
    assert 0 <= metrics["photos, trained on emoji and photos"]["5 coarse classes, P@10"] <= 1
    assert (
        (tmp_path / "found.png").is_file()
        and "[1] 0." in done.stdout
        and "(groceries/test/" in done.stdout
    )


def test_a_broken_picture_is_one_line(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    done = command("--images", str(tmp_path / "in"), "--query", "x", "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and "broken.png is not a readable image" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, said", [
    ({"images": "nowhere", "query": "x"}, "nowhere is not a folder"),
    ({"images": "utils"}, "ask one with --query"),
    ({"images": "utils", "query": "x"}, "no images in utils"),
    ({"k": 0}, "--k"), ({"steps": 0}, "--steps"), ({"batch": 1}, "--batch"), ({"ridge": 0.0}, "--ridge"),
    ({"temperature": 0.0}, "--temperature"), ({"emoji": 9}, "--emoji"), ({"photos": 3000}, "--photos"),
    ({"twin": -1.0}, "--twin"), ({"lr": float("inf")}, "the loss is nan"),
])  # fmt: skip
def test_bad_flags_are_one_line(flags, said, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=said):
        mm.main(mm.Config(**{**TINY, "out": str(tmp_path), **flags}))
    assert not (tmp_path / "metrics.json").exists()


def test_the_cache_knows_features_of_other_weights_and_pictures(tmp_path, monkeypatch):
    """A network trained on, or other pictures of the same shape: their features are made, not found."""
    weights = {"w": torch.ones(1)}
    made = []
    monkeypatch.setattr(image_data.assets, "cache", lambda: tmp_path)
    monkeypatch.setattr(
        image_data.pretrained,
        "efficientnet",
        lambda device: SimpleNamespace(state_dict=lambda: weights),
    )

    def look(network, part, batch):
        made.append(len(part))
        return part.float().mean((1, 2, 3))[:, None] * weights["w"]

    monkeypatch.setattr(image_data.pretrained, "efficientnet_features", look)
    images = torch.full((3, 3, 8, 8), 5, dtype=torch.uint8)
    for _ in range(2):
        assert image_data.image_features(images, "cpu").tolist() == [[5.0]] * 3
    assert made == [3]
    weights["w"] = torch.full((1,), 2.0)
    assert image_data.image_features(images, "cpu").tolist() == [[10.0]] * 3
    assert image_data.image_features(images + 1, "cpu").tolist() == [[12.0]] * 3 and made == [
        3,
        3,
        3,
    ]
