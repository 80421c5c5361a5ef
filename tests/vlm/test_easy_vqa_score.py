"""vlm/easy_vqa_score.py: questions one at a time, as if each were alone; baselines from the training split alone."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from tests import eyes
from tests.conftest import ROOT
from utils.run import UserError
from vlm import conversations, evaluate, generation, prompts
from vlm import easy_vqa_baselines as baselines
from vlm import easy_vqa_data as easy
from vlm import easy_vqa_score as score


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return eyes.talker(tmp_path_factory.mktemp("speaker"))


@pytest.fixture(scope="module")
def listed():
    return easy.questions("test")


def asked(*texts):
    return [easy.Question(i, text, "yes", "yes/no") for i, text in enumerate(texts)]


TEXTS = ("is there a circle?", "what color is the shape?", "is no teal shape present?")


def test_batched_questions_score_as_each_alone(small, parity):
    """Prompts of several lengths in batches, against our other path: a question and a picture at a time."""
    tokenizer, model = small
    questions = asked(*TEXTS, *TEXTS[::-1])
    features = torch.randn(6, 16, 16)
    mine, said = score.ask_all(tokenizer, model, questions, features, batch=2)
    theirs = []
    generated = []
    with torch.autocast("cpu", torch.bfloat16):
        for question, seen in zip(questions, features):
            about = (tokenizer, model, seen[None])
            theirs.append(evaluate.answer_likelihoods(*about, easy.ANSWERS, question.text)[0])
            generated += evaluate.generated_answers(*about, question.text, score.LONGEST)
    name = "evaluate.answer_likelihoods, a question at a time"
    parity("Evaluation", "easy_vqa_score.ask_all", name, mine, torch.stack(theirs), 0.15)
    assert said == generated
    # another picture, another score: none is mixed up
    assert (mine[0] - mine[5]).abs().max() > 0.01 or (mine[1] - mine[4]).abs().max() > 0.01


def test_one_length_in_fp32_is_exact(small, parity):
    tokenizer, model = small
    features = torch.randn(3, 16, 16)
    ids = generation.prompt_ids(tokenizer, model, TEXTS[0], model.count)
    mine, said = score.ask(tokenizer, model, ids.expand(3, -1), features)
    theirs = evaluate.answer_likelihoods(tokenizer, model, features, easy.ANSWERS, TEXTS[0])
    name = "evaluate.answer_likelihoods"
    parity("Evaluation", "easy_vqa_score.ask", name, mine, theirs, 1e-4)
    assert said == evaluate.generated_answers(tokenizer, model, features, TEXTS[0], score.LONGEST)


def test_greedy_stops_at_the_end_of_each_answer():
    """A chain of words 0 -> 1 -> 2 ...; 3 ends an answer."""

    def next_logits(ids):
        return torch.eye(8)[(ids + 1) % 8]

    first = torch.eye(8)[[0, 2, 3, 4]]
    found = score.greedy(first, next_logits, [3], longest=4)
    assert found == [[0, 1, 2], [2], [], [4, 5, 6, 7]]


def test_an_answer_has_its_end(small):
    tokenizer, _ = small
    answers = score.answer_ids(tokenizer)
    assert len(answers) == 13 and len({tuple(ids) for ids in answers}) == 13
    for ids, text in zip(answers, easy.ANSWERS):
        assert tokenizer.decode(ids[:-1]) == text
        assert ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_answers_are_ranked_as_the_template_writes_them(small):
    """A space before the answer is part of its first token, as it was in training."""
    tokenizer = copy.deepcopy(small[0])
    prompts.use_template(tokenizer, str(ROOT / "vlm/configs/short.jinja"))
    answers = score.answer_ids(tokenizer)
    for ids, text in zip(answers, easy.ANSWERS):
        row = conversations.row("x", "0000.png", [("what color is the shape?", text)])
        labels = conversations.sample(tokenizer, row, 1)["labels"]
        assert ids == [i for i in labels if i != prompts.IGNORE]
        assert tokenizer.decode(ids[:-1]) == f" {text}"


def test_the_interval_is_wilsons(parity):
    for accuracy, n in ((0.5, 10), (0.95, 1000), (1.0, 40), (0.0, 7)):
        theirs = stats.binomtest(round(accuracy * n), n).proportion_ci(method="wilson")
        mine = torch.tensor(score.wilson(accuracy, n, stats.norm.ppf(0.975)))
        name = 'scipy binomtest, "wilson"'
        theirs = torch.tensor([theirs.low, theirs.high], dtype=torch.float32)
        parity("Evaluation", "easy_vqa_score.wilson", name, mine, theirs, 1e-6)


def test_accuracies_by_kind_count_pictures_as_trials(listed):
    some = [question for question in listed if question.image < 10]
    # right about colours, wrong about all else
    predicted = [q.answer if q.kind == "colour" else "blue" for q in some]
    found = score.accuracies(predicted, some)
    assert found["colour"] == 1 and found["shape"] == found["negated yes/no"] == 0
    assert found["accuracy"] == pytest.approx(np.mean([q.kind == "colour" for q in some]))
    assert (found["low"], found["high"]) == score.wilson(found["accuracy"], 10)
    with pytest.raises(ValueError):
        score.accuracies(predicted[:-1], some)


def test_a_sample_keeps_the_proportions(listed):
    chosen = score.stratified(listed, 1000)
    assert len(chosen) == len(set(chosen)) == 1000
    for kind in easy.KINDS:
        expected = 1000 * np.mean([q.kind == kind for q in listed])
        assert abs(sum(q.kind == kind for q in chosen) - expected) < 1
    assert chosen == score.stratified(listed, 1000) != score.stratified(listed, 1000, 1)
    assert score.stratified(listed, 0) == listed == score.stratified(listed, 10**6)
    for count in (1, 2, 3, 5, 7):
        assert len(score.stratified(listed, count)) == count


def test_baselines_learn_from_training_answers_alone(listed):
    train = easy.questions("train")
    only = baselines.question_only(train, listed)
    found = score.accuracies(only, listed)
    majority = score.accuracies(baselines.majority_class(train, listed), listed)
    # by hand: "yes" is the most frequent, and right of 3611 of 9673
    assert majority["accuracy"] == pytest.approx(3611 / 9673)
    # without the picture: most colours that are asked about are not there, so "no" is a good guess
    assert found["accuracy"] == pytest.approx(0.6700, abs=1e-4)
    assert found["yes/no"] > 0.8 and found["colour"] < 0.18 and found["shape"] < 0.42
    # planted: words that say the answer, in training only
    plant = [easy.Question(0, "is there a circle?", "no", "yes/no")] * 3
    plant += [easy.Question(0, "is there a circle?", "yes", "yes/no")] * 2
    plant += [easy.Question(0, "what shape is present?", "circle", "shape")] * 4
    assert baselines.question_only(plant, asked("is there a circle?", "never asked")) == [
        "no", "circle",
    ]  # fmt: skip


def test_the_probe_tells_planted_scenes_and_never_sees_test_answers(monkeypatch):
    """Pictures whose features are their scene: the rule answers all; of shuffled ones hardly any."""
    splits = {split: easy.questions(split) for split in ("train", "test")}
    scenes = {split: baselines.known_scenes(found) for split, found in splits.items()}
    looked = []

    def pooled(tower, split, images):
        looked.append(split)
        x = torch.zeros(len(images), 1, 11)
        for row, i in enumerate(images):
            colour, shape = scenes[split].get(i, easy.SCENES[0])
            x[row, 0, easy.COLOURS.index(colour)] = 1
            x[row, 0, 8 + easy.SHAPES.index(shape)] = 1
        return x

    monkeypatch.setattr(baselines, "picture_features", pooled)
    known = [q for q in splits["test"] if q.image in scenes["test"] and q.image < 200]
    found = baselines.probe_answers(None, splits["train"], known, 300)
    assert score.accuracies(found, known)["accuracy"] == 1
    assert looked == ["train", "test"]
    # what is asked for is not what is learned from: test answers are no input
    blind = [q._replace(answer="yes", kind="yes/no") for q in known]
    assert baselines.probe_answers(None, splits["train"], blind, 300) == found


def test_the_command_asks_the_test_split_one_question_at_a_time(tmp_path, small, monkeypatch):
    """A model that knows the scene of a test picture is right everywhere: wiring from picture to score."""
    tokenizer, model = small
    scenes = baselines.known_scenes(easy.questions("test"))
    prompts_seen = []

    def pooled(tower, split, images):
        assert split == "test" or images == range(300)
        return torch.tensor([[[float(i)]] for i in images]).repeat(1, 1, 3)

    def ask(tokenizer, model, ids, features):
        """Reads the number of the picture out of the features, the question out of the prompt."""
        log_p = torch.zeros(len(ids), 13)
        said = []
        for row, (words, seen) in enumerate(zip(ids, features)):
            text = tokenizer.decode(words)
            prompts_seen.append(text)
            question = text.rpartition("\n<|im_start|>assistant")[0].rpartition("<|im_end|>")[0]
            question = question.rpartition("\n")[2]
            scene = scenes.get(int(seen[0, 0]), easy.SCENES[0])
            answer = easy.answer_for(question, scene)
            log_p[row, easy.ANSWERS.index(answer)] = 1
            said.append(f"The {answer}." if row == 0 else answer)
        return log_p, said

    monkeypatch.setattr(baselines, "picture_features", pooled)
    monkeypatch.setattr(score, "ask", ask)
    monkeypatch.setattr(score.llava, "load", lambda name, on: (tokenizer, model))
    out = tmp_path / "out"
    cfg = score.Config(model="x", count=120, batch=7, probe_images=300, out=str(out))
    metrics = score.main(cfg)
    # wrong are only pictures whose scene is not known
    assert metrics["LLaVA, ranked"]["accuracy"] > 0.93 > metrics["question only"]["accuracy"]
    assert metrics["LLaVA, generated"]["accuracy"] == metrics["LLaVA, ranked"]["accuracy"]
    assert len(prompts_seen) == 120
    # what the words give away was counted in the training split
    chosen = score.stratified(easy.questions("test"), 120)
    blind = baselines.question_only(easy.questions("train"), chosen)
    written = json.loads((out / "answers.json").read_text())
    assert [one["question only"] for one in written] == blind
    for text in prompts_seen:
        assert text.count("<|im_start|>user") == 1 and text.endswith("assistant\n")
        assert text.count("<image>") == model.count
    assert [one["text"] for one in written] == [question.text for question in chosen]
    # the model alone: the same scores, and no probe
    monkeypatch.delattr(baselines, "probe_answers")
    alone = score.main(replace(cfg, baselines=False, out=str(tmp_path / "alone")))
    assert alone.keys() - {"threads"} == {
        "questions",
        "pictures",
        "LLaVA, ranked",
        "LLaVA, generated",
    }
    assert alone["LLaVA, ranked"] == metrics["LLaVA, ranked"]
    # some kinds of questions only
    few = replace(cfg, baselines=False, kinds=("shape",), count=20, out=str(tmp_path / "few"))
    assert score.main(few)["questions"] == 20
    written = json.loads((tmp_path / "few/answers.json").read_text())
    assert {one["kind"] for one in written} == {"shape"}


def test_bad_flags_are_one_line(tmp_path):
    for flags in ({"count": -1}, {"batch": 0}, {"probe_images": 0}):
        with pytest.raises(UserError, match="must be"):
            score.main(score.Config(out=str(tmp_path), **flags))
    with pytest.raises(UserError, match="leaves nothing to score"):
        score.main(score.Config(baselines=False, out=str(tmp_path)))
    for kinds in ((), ("shape", "size")):
        with pytest.raises(UserError, match="--kinds: one or more of colour, shape, yes/no, neg"):
            score.main(score.Config(kinds=kinds, out=str(tmp_path)))
    with pytest.raises(UserError):
        score.main(score.Config(model=str(tmp_path / "no.safetensors"), out=str(tmp_path)))
