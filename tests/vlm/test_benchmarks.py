"""vlm/benchmarks.py: every layout is read, answered, scored and written; prompts, choices, images."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tests import eyes
from tests.vlm import benchmark_folders as folders
from utils.run import UserError
from vlm import benchmarks, evaluate, prompted_answers, prompts


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return eyes.talker(tmp_path_factory.mktemp("speaker"))


@pytest.fixture
def loaded(small, monkeypatch):
    monkeypatch.setattr(benchmarks.llava, "load", lambda *about: small)


def config(tmp_path, **more):
    return evaluate.Config(out=str(tmp_path / "out"), device="cpu", **more)


SPLITS = {"pope": "random", "scienceqa": "test", "folders": "val"}


@pytest.mark.parametrize("name", folders.ALL)
def test_every_benchmark_is_answered_and_written(name, tmp_path, loaded):
    folders.ALL[name](tmp_path / "data")
    cfg = config(
        tmp_path, benchmark=name, data=str(tmp_path / "data"), split=SPLITS.get(name, ""), judged=3
    )
    metrics = evaluate.main(cfg)
    (found,) = [value for key, value in metrics.items() if key in (name, SPLITS.get(name))]
    assert found["questions"] == 3 and len(found) > 1
    part = SPLITS.get(name)
    file = benchmarks.BENCHMARKS[name].file
    text = (tmp_path / "out" / (f"{part}_{file}" if part else file)).read_text()
    if name == "pope":
        lines = [json.loads(line) for line in text.splitlines()]
        assert [set(line) for line in lines] == [{"question", "answer"}] * 3
        return
    content = json.loads(text)
    if name in ("vqav2", "okvqa", "textvqa"):
        assert [set(one) for one in content] == [{"question_id", "answer"}] * 3
    if name == "coco":
        assert [one["image_id"] for one in content] == [0, 1, 2]
        assert {"BLEU-4", "CIDEr", "ROUGE-L"} <= set(found)
    if name == "aokvqa":
        assert all(
            one["multiple_choice"] in ("cat", "dog", "cow", "owl") for one in content.values()
        )
        assert all(isinstance(one["direct_answer"], str) for one in content.values())
    if name == "scienceqa":
        assert set(content) == {"results", "outputs"} and set(content["results"].values()) <= {
            0,
            1,
            2,
        }
    if name == "folders":
        assert set(content.values()) <= {"great white shark", "hen", "n03"}


def test_a_split_without_answers_has_results_and_no_score(tmp_path, loaded):
    folders.vqa(tmp_path / "data")
    (tmp_path / "data" / "v2_mscoco_val2014_annotations.json").unlink()
    cfg = config(tmp_path, benchmark="vqav2", data=str(tmp_path / "data"), judged=2)
    assert evaluate.main(cfg)["vqav2"] == {"questions": 2}
    assert len(json.loads((tmp_path / "out" / "vqa_results.json").read_text())) == 2


@pytest.fixture
def asked(monkeypatch):
    """What the model was asked: questions, image tokens, and answers by number."""
    seen = SimpleNamespace(questions=[], tokens=[])

    def embed(tokenizer, model, question, tokens):
        seen.questions.append(question)
        seen.tokens.append(tokens)
        return torch.zeros(1, 2, 24)

    monkeypatch.setattr(benchmarks, "embed", embed)
    said = iter(range(100))
    monkeypatch.setattr(
        prompted_answers, "generate_answers", lambda *about: [f"answer {next(said)}"]
    )
    return seen


def test_questions_of_rows_go_with_their_images_and_answers(small, asked, tmp_path, monkeypatch):
    colours = {"red": 0, "lime": 1, "blue": 2}
    for name in colours:
        Image.new("RGB", (28, 28), name).save(tmp_path / f"{name}.png")
    monkeypatch.setattr(
        benchmarks.generation, "photo_embeddings",
        lambda model, image: torch.full((1, 1, 24), float(image[:, 0, 0].argmax())),
    )  # fmt: skip
    rows = []
    for name in ("red", "lime", "red", "blue"):
        path = tmp_path / f"{name}.png"
        rows.append({"id": name, "image": path, "question": f"Is it {name}?", "choices": None})
    tokenizer, model = small
    done = benchmarks.answer("pope", tokenizer, model, rows, suffix="Answer yes or no.")
    assert asked.questions == [f"Is it {row['id']}?\nAnswer yes or no." for row in rows]
    assert [int(t[0, 0, 0]) for t in asked.tokens] == [0, 1, 0, 2]
    assert [row["said"] for row in done] == [f"answer {n}" for n in range(4)]
    assert [row["id"] for row in done] == [row["id"] for row in rows]


def test_the_likeliest_choice_is_taken(small, asked, monkeypatch):
    ranked = []

    def rank(tokenizer, model, embeds, choices, question):
        ranked.append((choices, question))
        return torch.tensor([[-3.0, -1, -2]])

    monkeypatch.setattr(prompted_answers, "rank_answers", rank)
    row = {
        "id": 1,
        "image": None,
        "question": "Which?",
        "choices": ["a", "b", "c"],
        "hint": "Look.",
    }
    tokenizer, model = small
    (done,) = benchmarks.answer("scienceqa", tokenizer, model, [row])
    assert done["chosen"] == 1 and done["log_p"] == [-3, -1, -2]
    assert ranked == [(["a", "b", "c"], "Look.\nWhich?")] and asked.tokens == [None]


def test_prompts_of_captions_and_classes_may_be_others():
    row = {"question": "Q?"}
    assert benchmarks.prompt_of("coco", row) == "Q?"
    assert benchmarks.prompt_of("coco", row, "Tell me.") == "Tell me."
    assert benchmarks.prompt_of("folders", row) == benchmarks.CLASS_PROMPT
    assert benchmarks.prompt_of("vqav2", row, "Tell me.", "Short.") == "Q?\nShort."


def test_a_question_without_an_image_is_text_alone(small):
    tokenizer, model = small
    ids, _ = prompts.chat(tokenizer, [("Which?", None)], 0)
    expected = model.language.get_input_embeddings()(torch.tensor([ids]))
    assert torch.equal(benchmarks.embed(tokenizer, model, "Which?", None), expected)
    assert model.image_id not in ids


def test_zero_shot_is_scored_over_the_classes():
    rows = [
        {"log_p": [-1.0, -2, -3, -4, -5, -6], "right": 0},
        {"log_p": [-1.0, -2, -3, -4, -5, -6], "right": 4},
        {"log_p": [-1.0, -2, -3, -4, -5, -6], "right": 5},
    ]
    assert benchmarks.score_classes(rows) == pytest.approx({"top-1": 1 / 3, "top-5": 2 / 3})


def test_captions_are_tokenized_as_coco_does(monkeypatch):
    seen = []
    monkeypatch.setattr(benchmarks.caption_metrics, "scores", lambda *both: seen.extend(both) or {})
    monkeypatch.setattr(
        benchmarks.caption_java, "java_scores", lambda *both: {"METEOR": both == tuple(seen)}
    )
    found = benchmarks.score_captions(
        [{"said": "It's a T-shirt.", "answers": ["A shirt!", "Red."]}]
    )
    assert seen == [[["it", "'s", "a", "t-shirt"]], [[["a", "shirt"], ["red"]]]]
    assert found == {"METEOR": True}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"benchmark": "mmlu"}, "--benchmark is one of pope"),
        ({"benchmark": "coco"}, "--data: name the folder of coco"),
        ({"benchmark": "pope", "split": "x"}, "--split is one of random, popular, adversarial"),
        ({"benchmark": "pope", "judged": -1}, "--judged must be 0 or more"),
        ({"data": "x"}, "go with --benchmark"),
    ],
)
def test_flags_are_checked(flags, said, tmp_path, loaded):
    with pytest.raises(UserError, match=said):
        evaluate.main(config(tmp_path, **flags))


def test_the_books_own_pope_is_asked_in_three_ways(tmp_path, loaded):
    metrics = evaluate.main(config(tmp_path, benchmark="pope", judged=2))
    assert set(metrics) >= {"random", "popular", "adversarial"}
    assert metrics["popular"]["questions"] == 2
