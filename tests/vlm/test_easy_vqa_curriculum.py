"""vlm/easy_vqa_curriculum.py: stages, rows in words, files, configurations, the attention sink."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import tyro

from tests.conftest import ROOT
from utils.run import UserError
from vlm import conversations, llava_parts, prompts, train_config
from vlm import easy_vqa_curriculum as curriculum
from vlm import easy_vqa_data as easy
from vlm.config_file import with_file

CONFIGS = [ROOT / f"vlm/configs/easy_vqa_{i}.yaml" for i in (1, 2, 3)]


@pytest.fixture(scope="module")
def made():
    return curriculum.stages(images=400)


@pytest.fixture(scope="module")
def scenes():
    turns = {}
    for question in easy.questions("train"):
        turns.setdefault(question.image, []).append((question.text, question.answer))
    return {image: easy.scenes_of(asked) for image, asked in turns.items()}


def question_of(row):
    """What is asked, without the picture or the words in its place -> question, answer."""
    ((text, answer),) = conversations.turns_of(row)
    return text.rpartition("\n")[2], answer


def test_captions_are_the_scenes_that_the_training_answers_settle(made, scenes):
    assert made["captions"]
    for row in made["captions"]:
        ((asked, answer),) = conversations.turns_of(row)
        (scene,) = scenes[int(row["image"][:4])]
        assert asked == f"{prompts.IMAGE}\n" and answer == " ".join(scene)
    settled = [i for i, found in scenes.items() if i < 400 and len(found) == 1]
    assert len(made["captions"]) == len(settled)
    names = {row["image"] for rows in made.values() for row in rows if "image" in row}
    assert names <= {f"{i:04}.png" for i in range(400)}


def test_negation_comes_last(made):
    kinds = {}
    for stage in ("plain", "all"):
        asked = [question_of(row) for row in made[stage]]
        kinds[stage] = Counter(easy.kind_of(*turn) for turn in asked if turn[0])
    assert set(kinds["plain"]) == {"yes/no"}
    assert set(kinds["all"]) == set(easy.KINDS)


def test_pictures_and_words_are_asked_and_answers_are_balanced(made, scenes):
    for stage in ("plain", "all"):
        for row in made[stage]:
            text, answer = question_of(row)
            if text and "image" in row:
                assert all(
                    easy.answer_for(text, s) == answer for s in scenes[int(row["image"][:4])]
                )
        shown = [row for row in made[stage] if "image" in row]
        answers = Counter(question_of(row)[1] for row in shown)
        assert answers["yes"] == answers["no"] > 0


def test_words_stand_where_the_picture_stands(made):
    for stage in ("plain", "all"):
        told = [row for row in made[stage] if "image" not in row]
        assert told and prompts.IMAGE not in json.dumps(told)
        negated = 0
        for row in told:
            ((text, answer),) = conversations.turns_of(row)
            words, question = text.split("\n")
            negated += easy.is_negated(question)
            assert answer == easy.answer_for(question, tuple(words.split()))
            assert easy.kind_of(question, answer).endswith("yes/no")
        assert (negated > 0) == (stage == "all")
        ids = [row["id"] for row in made[stage]]
        assert len(set(ids)) == len(ids)


def test_open_questions_ask_for_a_colour_or_a_shape(made, scenes):
    listed = [q for q in easy.questions("train") if q.image < 400 and q.kind in ("colour", "shape")]
    settled = [q for q in listed if len(scenes[q.image]) == 1]
    found = [(int(row["image"][:4]), *question_of(row)) for row in made["open"]]
    assert found == [(q.image, q.text, q.answer) for q in settled]


def test_all_stages_have_the_same_pictures(made):
    """So that their vision features are computed once."""
    stages = [made[stage] for stage in ("captions", "plain", "all")]
    names = [{row["image"] for row in rows if "image" in row} for rows in stages]
    assert names[0] == names[1] == names[2]


def test_the_share_in_words_is_that_of_the_yes_no_questions():
    counts = []
    for share in (0.0, 0.5, 1.0):
        rows = curriculum.stages(images=100, share=share)["all"]
        counts.append(sum("image" not in row for row in rows))
    assert counts[0] == 0 and counts[1] == round(counts[2] / 2)
    for flags in ((-1, 0.5), (0, 1.5), (0, -0.1)):
        with pytest.raises(UserError, match="must be"):
            curriculum.stages(*flags)
    first, again = curriculum.stages(50, seed=1), curriculum.stages(50, seed=1)
    assert first == again != curriculum.stages(50, seed=2)


def test_the_command_writes_files_that_the_trainer_reads(tmp_path):
    cfg = curriculum.Config(images=12, out=str(tmp_path / "out"))
    metrics = curriculum.main(cfg)
    for stage in ("captions", "plain", "all", "open"):
        rows = conversations.read(tmp_path / f"out/{stage}.json", tmp_path / "out/pictures")
        assert len(rows) == metrics[stage]["rows"]


def test_each_stage_goes_on_from_the_one_before():
    found = []
    for path in CONFIGS:
        cfg = tyro.cli(train_config.Config, args=with_file(["--config", str(path)]))
        train_config.check_flags(cfg)
        found.append(cfg)
        data = cfg.data
        assert data.views == 1 and data.text_share == 0 and not data.packing
        assert (ROOT / data.template).is_file()
    folder = Path(curriculum.Config().out)
    names = ["captions", "plain", "all"]
    assert [cfg.data.paths for cfg in found] == [[str(folder / f"{name}.json")] for name in names]
    assert found[0].model.connector == "pool1" and not found[0].train.ckpt_path
    for before, after in zip(found, found[1:]):
        assert after.train.ckpt_path == f"{before.out}/model.safetensors"


def test_the_first_token_is_the_attention_sink():
    """Its states are tens of times as large as all others, whatever it is: a picture there would be lost.

    So the template begins with bos. Xiao et al. 2023, arXiv:2309.17453.
    """
    tokenizer, language = llava_parts.language_model("smollm2", torch.device("cpu"))
    largest = []
    for words in ("red circle", "<|im_start|>red circle"):
        ids = tokenizer(words, add_special_tokens=False, return_tensors="pt").input_ids
        states = language(input_ids=ids, output_hidden_states=True).hidden_states
        size = torch.stack([x[0].float().pow(2).mean(-1).sqrt() for x in states])
        largest.append(size.amax(0).tolist())
    (red_first, circle), (bos, red, _) = largest
    assert min(red_first, bos) > 20 * max(circle, red)
    # in the template of the curriculum the picture stands second
    prompts.use_template(tokenizer, str(ROOT / "vlm/configs/short.jinja"))
    row = conversations.row("x", "0000.png", [("is there a circle?", "no")])
    made = conversations.sample(tokenizer, row, 1)
    words = tokenizer.convert_ids_to_tokens(made["ids"])
    assert words[0] == "<|im_start|>" and "".join(words[1:4]) == prompts.IMAGE
    learned = [i for i in made["labels"] if i != prompts.IGNORE]
    assert tokenizer.decode(learned) == " no<|im_end|>"


@torch.no_grad()
def test_the_language_model_cannot_compare_words():
    """Before training: told a scene in words, "yes" is no more probable where it is right. Area under the ROC curve."""
    tokenizer, language = llava_parts.language_model("smollm2", torch.device("cpu"))
    rows = curriculum.stages(images=150, share=1.0)["plain"]
    told = [row for row in rows if "image" not in row][:60]
    asked = "{}\n{}<|im_end|>\n<|im_start|>assistant\n"
    yes, no = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("yes", "no"))
    margins = {"yes": [], "no": []}
    for row in told:
        ((text, answer),) = conversations.turns_of(row)
        prompt = "<|im_start|>user\n" + asked.format(*text.split("\n"))
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        logits = language(input_ids=ids, logits_to_keep=1).logits[0, -1].float()
        margins[answer].append(float(logits[yes] - logits[no]))
    right, wrong = torch.tensor(margins["yes"]), torch.tensor(margins["no"])
    area = (right[:, None] > wrong).float().mean()
    assert min(len(right), len(wrong)) > 20 and 0.3 < area < 0.7
