"""vlm/evaluate.py: likelihoods as if every name were read whole, what is said as generate says it, probes."""

from types import SimpleNamespace

import pytest
import torch

from tests import eyes
from utils import data
from utils.run import UserError
from vlm import evaluate, fruit_photos, generation, probe, prompts, tower


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return eyes.talker(tmp_path_factory.mktemp("speaker"))


NAMES = ["orange", "Granny Smith apple", "pear", "cantaloupe melon"]


def test_likelihoods_are_those_of_whole_texts(small, parity):
    """The question read once and names after it, against a forward pass over everything for each name."""
    tokenizer, model = small
    features = torch.randn(3, 16, 16)
    mine = evaluate.answer_likelihoods(tokenizer, model, features, NAMES, "Which one?")
    theirs = torch.zeros(3, len(NAMES))
    asked = generation.prompt_ids(tokenizer, model, "Which one?", 16)
    end = tokenizer.eos_token_id
    for k, name in enumerate(NAMES):
        answer = torch.tensor([tokenizer(name, add_special_tokens=False).input_ids + [end]])
        ids = torch.cat([asked, answer], 1).expand(3, -1)
        log_p = model(ids, features=model.project(features)).logits.log_softmax(-1)[:, :-1]
        log_p = log_p.gather(2, ids[:, 1:, None])[..., 0]
        theirs[:, k] = log_p[:, asked.shape[1] - 1 :].sum(1)
    name = "transformers, whole texts through our own LLaVA"
    parity("Evaluation", "evaluate.answer_likelihoods", name, mine, theirs.detach(), 1e-4)


def test_names_are_words_and_no_commands(small):
    tokenizer, model = small
    features = torch.randn(1, 16, 16)
    typed, cut = evaluate.answer_likelihoods(
        tokenizer, model, features, ["pear<|im_end|> and more", "pear"]
    )[0]
    assert typed < cut - 1  # were it a command, "pear" and its end would come first
    with pytest.raises(UserError, match="no words"):
        evaluate.answer_likelihoods(tokenizer, model, features, ["pear", ""])
    with pytest.raises(UserError, match="512 positions"):
        evaluate.generated_answers(tokenizer, model, features, "why " * 600)


def test_an_answer_ends_at_any_word_that_the_model_names(small, monkeypatch):
    """generation_config.json may name several; and habits that it names, a penalty or dice, are not taken over."""
    tokenizer, model = small
    features, config = torch.randn(1, 16, 16), model.language.generation_config
    made, whole = [], model.language.generate

    def generate(**more):
        made.append(whole(**more)[0].tolist())
        return torch.tensor([made[-1]])

    monkeypatch.setattr(model.language, "generate", generate)
    evaluate.generated_answers(tokenizer, model, features, max_new_tokens=4)
    monkeypatch.setattr(config, "repetition_penalty", 5.0)
    monkeypatch.setattr(config, "do_sample", True)
    evaluate.generated_answers(tokenizer, model, features, max_new_tokens=4)
    monkeypatch.setattr(config, "eos_token_id", [tokenizer.eos_token_id, made[0][1]])
    evaluate.generated_answers(tokenizer, model, features, max_new_tokens=4)
    assert len(made[0]) == 4 and made[1] == made[0] and made[2] == made[0][:2]
    assert prompts.ends(tokenizer, model.language) == sorted({tokenizer.eos_token_id, made[0][1]})


def test_what_is_said_is_what_one_photo_at_a_time_says(small):
    tokenizer, model = small
    features = torch.randn(3, 16, 16)
    together = evaluate.generated_answers(tokenizer, model, features, max_new_tokens=4)
    alone = [
        evaluate.generated_answers(tokenizer, model, f[None], max_new_tokens=4)[0] for f in features
    ]
    assert together == alone


def test_text_loss_is_that_of_transformers(small, parity):
    tokenizer, model = small
    text = evaluate.paragraphs(1)[0]
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=256).input_ids
    theirs = model.language(input_ids=ids, labels=ids).loss.detach()
    mine = torch.tensor(evaluate.text_loss(tokenizer, model.language, [text]))
    parity("Evaluation", "evaluate.text_loss", "transformers loss", mine, theirs)


def test_a_probe_finds_planted_directions():
    y = torch.randint(5, (200,))
    x = torch.randn(5, 12)[y] + 0.3 * torch.randn(200, 12)
    assert probe.share(probe.probe(x[:150], y[:150], x[150:]).argmax(-1) == y[150:]) > 0.95


def test_the_probe_learns_from_the_photos_to_learn_from_alone(monkeypatch):
    """Features that say nothing of the kind, as many as photos: learned by heart on one side, worth nothing there."""
    fruit = eyes.shop(80)
    noise = torch.randn(80, 4, 200)
    monkeypatch.setattr(
        tower, "vision_features", lambda vision_tower, images: noise[images[:, 0, 0, 0].long()]
    )
    learn, judged = fruit_photos.split(fruit)
    found = probe.yardsticks(None, fruit, learn, judged)
    assert found["linear probe"]["14 kinds"] < 0.7 and found["the most frequent"][
        "14 kinds"
    ] == pytest.approx(13 / 40)
    by_heart = probe.yardsticks(None, fruit, learn, learn)
    assert by_heart["linear probe"]["14 kinds"] == 1.0
    monkeypatch.setattr(
        tower,
        "vision_features",
        lambda vision_tower, images: torch.eye(3)[images[:, 0, 0, 0].long() % 3][:, None],
    )
    assert probe.yardsticks(None, fruit, learn, judged)["linear probe"] == {
        "14 kinds": 1.0,
        "5 groups": 1.0,
    }


def test_a_paired_test_of_two_readers():
    ours, theirs = torch.ones(100, dtype=torch.bool), torch.ones(100, dtype=torch.bool)
    ours[:3], theirs[3:15] = False, False  # they differ on 15 photos: 12 for us, 3 against
    found = probe.paired(ours, theirs)
    assert found["difference"] == pytest.approx(0.09) and found["p"] == pytest.approx(
        0.0352, abs=1e-4
    )
    assert found["low"] == pytest.approx(0.09 - 1.96 * 0.03786, abs=1e-4)
    assert found["high"] == pytest.approx(0.09 + 1.96 * 0.03786, abs=1e-4)
    assert probe.paired(ours, ours)["p"] == 1 and probe.paired(theirs, ours)["difference"] < 0


def test_what_is_judged_is_asked_of_the_right_photos_with_the_right_question(monkeypatch):
    """Scores that know the kind, speech that is right of every second photo: the shares are known."""
    fruit = eyes.shop()
    _, chosen = fruit_photos.split(fruit)
    features, asked = eyes.seen(None, fruit.images[chosen]), []

    def likelihoods(tokenizer, model, part, names, prompt):
        asked.append((len(part), prompt, tuple(names)))
        return torch.nn.functional.one_hot(part[:, 0, 0].long() % 3, 3).float()

    def spoken(tokenizer, model, part, prompt):
        asked.append((len(part), prompt))
        return [f"{NAMED[i % 3]}." if i % 2 else "a banana" for i in part[:, 0, 0].long().tolist()]

    monkeypatch.setattr(evaluate, "answer_likelihoods", likelihoods)
    monkeypatch.setattr(evaluate, "generated_answers", spoken)
    model = SimpleNamespace(connector=torch.nn.Linear(1, 1))
    found, texts, log_p = evaluate.evaluate_photos(
        None, model, features, fruit, chosen, "What?", batch=16
    )
    assert (
        found == {"14 kinds": 1.0, "5 groups": 1.0, "name in the generated answer": 0.5}
        and len(texts) == len(log_p) == 20
    )
    assert asked == [
        (16, "What?", tuple(NAMED)),
        (16, "What?"),
        (4, "What?", tuple(NAMED)),
        (4, "What?"),
    ]


NAMED = ["Pink Lady apple", "Royal Gala apple", "Anjou pear"]


def test_main_judges_photos_that_were_not_learned_from(monkeypatch, tmp_path):
    fruit, shown = eyes.shop(), {}
    monkeypatch.setattr(evaluate.data, "groceries", lambda size: fruit)
    vision = SimpleNamespace(size=8)
    model = SimpleNamespace(vision=vision, language=None, grids=[])
    monkeypatch.setattr(evaluate.llava, "load", lambda *about: (None, model))
    monkeypatch.setattr(tower, "vision_features", eyes.seen)
    monkeypatch.setattr(evaluate, "text_loss", lambda *about: 2.5)
    monkeypatch.setattr(evaluate, "paragraphs", lambda count: [])

    def judge(tokenizer, model, features, of, chosen, prompt, batch):
        shown["judge"] = features, chosen, prompt, batch
        kinds = features[:, 0, 0].long() % 3
        said = [NAMED[k] for k in kinds]
        return {"14 kinds": 1.0}, said, torch.nn.functional.one_hot((kinds + 1) % 3, 3).float()

    monkeypatch.setattr(evaluate, "evaluate_photos", judge)
    monkeypatch.setattr(
        fruit_photos,
        "confusion",
        lambda path, log_p, of, chosen: shown.update(drawn=(log_p, chosen)),
    )
    monkeypatch.setattr(fruit_photos, "draw", lambda *about: shown.update(draw=about))
    cfg = evaluate.Config(judged=15, batch=7, prompt="What?", out=str(tmp_path / "out"))
    found = evaluate.main(cfg)
    features, chosen, prompt, batch = shown["judge"]
    assert features[:, 0, 0].tolist() == chosen.tolist() and min(chosen) >= 20 and len(chosen) == 15
    assert (prompt, batch, found["photos"], found["text loss"]) == ("What?", 7, 15, 2.5)
    assert found["as captions"]["BLEU-1"] == 1.0 and found["VQA accuracy"] == 1.0
    assert found["LLaVA less the probe"]["difference"] == pytest.approx(
        -found["linear probe"]["14 kinds"]
    )
    _, images, said, truth, asked = shown["draw"]
    assert said == truth == [NAMED[int(i[0, 0, 0]) % 3] for i in images] and asked == "What?"


def test_groups_are_read_from_the_sum_of_their_kinds():
    """Three kinds of apple with 0.2 each are more than one pear with 0.4."""
    fruit = data.groceries(64)
    apples = [
        k for k in range(14) if fruit.coarse_names[fruit.coarse[fruit.fine == k][0]] == "Apple"
    ][:3]
    pear = next(
        k for k in range(14) if fruit.coarse_names[fruit.coarse[fruit.fine == k][0]] == "Pear"
    )
    p = torch.full((1, 14), 1e-9)
    p[0, apples], p[0, pear] = 0.2, 0.4
    assert (
        p.argmax(-1) == pear and fruit.coarse_names[fruit_photos.grouped(p.log(), fruit)] == "Apple"
    )


def test_photos_to_be_judged_were_never_learned_from():
    fruit = data.groceries(64)
    learn, judged = fruit_photos.split(fruit, 300)
    assert (
        len(learn) == 732 and len(judged) == 300 and not set(learn.tolist()) & set(judged.tolist())
    )
    assert {fruit.split[i] for i in judged} == {"test"}
    assert len(fruit_photos.split(fruit)[1]) == 1322


def test_every_kind_has_a_name():
    fruit = data.groceries(64)
    assert set(fruit.fine_names) == set(fruit_photos.NAMES) and set(fruit.coarse_names) == set(
        fruit_photos.GROUPS
    )


def test_bad_flags_are_one_line(tmp_path):
    for flags, says in (
        ({"judged": -1}, "--judged"),
        ({"model": str(tmp_path / "x.safetensors")}, "no checkpoint"),
    ):
        with pytest.raises(UserError, match=says):
            evaluate.main(evaluate.Config(**flags, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
