"""models/evaluate_vlm.py: likelihoods as if every name were read whole, what is said as generate says it, probes."""

import pytest
import torch

from models import evaluate_vlm, llava, llava_io, tower
from tests import eyes, llamas
from utils import data, pretrained
from utils.run import UserError


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    tokenizer, language = pretrained.language_model(llamas.folder(tmp_path_factory.mktemp("speaker")))
    torch.manual_seed(0)
    eye = tower.VisionTower(eyes.tower())
    model = llava.build(eye, "mlp2x_gelu", eyes.shake(language.float(), 0.2), tokenizer).eval()
    return tokenizer, model


NAMES = ["orange", "Granny Smith apple", "pear", "cantaloupe melon"]


def test_likelihoods_are_those_of_whole_texts(small, parity):
    """The question read once and names after it, against a forward pass over everything for each name."""
    tokenizer, model = small
    features = torch.randn(3, 16, 16)
    mine = evaluate_vlm.likelihoods(tokenizer, model, features, NAMES)
    theirs = torch.zeros(3, len(NAMES))
    asked = llava.question(tokenizer, model, evaluate_vlm.QUESTION, 16)
    end = evaluate_vlm.ending(tokenizer)[-1]
    for k, name in enumerate(NAMES):
        answer = torch.tensor([tokenizer(name, add_special_tokens=False).input_ids + [end]])
        ids = torch.cat([asked, answer], 1).expand(3, -1)
        log_p = model(ids, features=model.project(features)).logits.log_softmax(-1)[:, :-1]
        log_p = log_p.gather(2, ids[:, 1:, None])[..., 0]
        theirs[:, k] = log_p[:, asked.shape[1] - 1 :].sum(1)
    parity("Evaluation", "evaluate_vlm.likelihoods", "transformers, whole texts", mine, theirs.detach(), 1e-4)


def test_what_is_said_is_what_one_photo_at_a_time_says(small):
    tokenizer, model = small
    features = torch.randn(3, 16, 16)
    together = evaluate_vlm.spoken(tokenizer, model, features, max_new_tokens=4)
    alone = [evaluate_vlm.spoken(tokenizer, model, f[None], max_new_tokens=4)[0] for f in features]
    assert together == alone


def test_text_loss_is_that_of_transformers(small, parity):
    tokenizer, model = small
    text = evaluate_vlm.paragraphs(1)[0]
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=256).input_ids
    theirs = model.language(input_ids=ids, labels=ids).loss.detach()
    mine = torch.tensor(evaluate_vlm.text_loss(tokenizer, model.language, [text]))
    parity("Evaluation", "evaluate_vlm.text_loss", "transformers loss", mine, theirs)


def test_a_probe_finds_planted_directions():
    y = torch.randint(5, (200,))
    x = torch.randn(5, 12)[y] + 0.3 * torch.randn(200, 12)
    assert evaluate_vlm.share(evaluate_vlm.probe(x[:150], y[:150], x[150:]).argmax(-1) == y[150:]) > 0.95


def test_groups_are_read_from_the_sum_of_their_kinds():
    """Three kinds of apple with 0.2 each are more than one pear with 0.4."""
    fruit = data.groceries(64)
    apples = [k for k in range(14) if fruit.coarse_names[fruit.coarse[fruit.fine == k][0]] == "Apple"][:3]
    pear = next(k for k in range(14) if fruit.coarse_names[fruit.coarse[fruit.fine == k][0]] == "Pear")
    p = torch.full((1, 14), 1e-9)
    p[0, apples], p[0, pear] = 0.2, 0.4
    assert p.argmax(-1) == pear and fruit.coarse_names[evaluate_vlm.grouped(p.log(), fruit)] == "Apple"


def test_photos_to_be_judged_were_never_learned_from():
    fruit = data.groceries(64)
    learn, judged = evaluate_vlm.split(fruit, 300)
    assert len(learn) == 732 and len(judged) == 300 and not set(learn.tolist()) & set(judged.tolist())
    assert {fruit.split[i] for i in judged} == {"test"}
    assert len(evaluate_vlm.split(fruit)[1]) == 1322


def test_every_kind_has_a_name():
    fruit = data.groceries(64)
    assert set(fruit.fine_names) == set(llava.NAMES) and set(fruit.coarse_names) == set(llava.GROUPS)


def test_bad_flags_are_one_line(tmp_path):
    for flags, says in (({"judged": -1}, "--judged"), ({"model": str(tmp_path / "x.safetensors")}, "no checkpoint")):
        with pytest.raises(UserError, match=says):
            evaluate_vlm.main(evaluate_vlm.Config(**flags, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists() and llava_io
