"""deploy/decode_study.py: what is decoded, who is scored on what, what is written."""

import json
import math

import pytest
import torch

from deploy import decode, decode_study
from tests import llamas
from utils import pretrained
from utils.run import UserError


@pytest.fixture
def pages(monkeypatch):
    """A manual of six paragraphs, instead of three manuals."""
    numbers = "one two three four five six".split()
    text = "\n\n".join(f"Number {n} is a paragraph of a manual that goes on. " * 8 for n in numbers)
    monkeypatch.setattr(decode_study.data, "docs", lambda: [("manual.txt", text)])


def test_the_prompt_is_decoded_first_and_people_are_scored_on_what_they_wrote(
    pages, tmp_path, monkeypatch
):
    """The first row is the prompt of --prompt, the others the passages; people are scored on their own words."""
    name, asked = llamas.folder(tmp_path / "model"), []
    whole = decode.score

    def score(model, tokens, eos, **prompt):
        asked.append((tokens, eos, prompt))
        return whole(model, tokens, eos, **prompt)

    monkeypatch.setattr(decode, "score", score)
    cfg = decode_study.Config(
        prompt="A b c", model=name, max_new_tokens=5, passages=2, beams=2, out=str(tmp_path / "out")
    )
    decode_study.main(cfg)
    tokenizer, _ = pretrained.language_model(name)
    beginnings, theirs = decode_study.passages(tokenizer, 2, 5)
    for tokens, eos, prompt in asked[:-1]:
        assert tokens.shape == (3, 5) and eos == [1, 2]  # the tokenizer's and the model's
        rows = [
            row[mask > 0].tolist()
            for row, mask in zip(prompt["input_ids"], prompt["attention_mask"])
        ]
        assert rows == [tokenizer("A b c")["input_ids"], *beginnings]
    tokens, eos, prompt = asked[-1]
    assert (
        torch.equal(tokens, theirs) and eos is None and prompt["input_ids"].tolist() == beginnings
    )


def test_main_writes_what_it_promises(pages, tmp_path):
    name = llamas.folder(tmp_path / "model")
    cfg = decode_study.Config(
        model=name, max_new_tokens=5, passages=2, beams=2, chat=True, out=str(tmp_path / "out")
    )
    found = decode_study.main(cfg)
    assert (
        list(found)[:2] == ["greedy", "2 beams"]
        and list(found)[-1] == "people"
        and len(found) == 11
    )
    assert found["2 beams"]["a token"] <= 0 and found["people"]["tokens"] == 5
    assert math.isclose(found["people"]["log p"], 5 * found["people"]["a token"], rel_tol=1e-5)
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert files == {"config.json", "metrics.json", "texts.json", "decode.png"}
    assert json.loads((tmp_path / "out/texts.json").read_text("utf-8")).keys() == found.keys() - {
        "people"
    }


@pytest.mark.parametrize("flags", [{"passages": 0}, {"passages": 10**6}, {"beams": 0}])
def test_bad_flags_are_refused_before_anything_is_written(pages, tmp_path, flags):
    name = llamas.folder(tmp_path / "model")
    with pytest.raises(UserError):
        decode_study.main(decode_study.Config(**flags, model=name, out=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()
