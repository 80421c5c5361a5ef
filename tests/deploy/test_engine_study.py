"""deploy/engine_study.py: all ways give the same answers; static batches are cut to what was asked for."""

import pytest
import torch

from deploy import engine_study
from tests.deploy.test_decode import talker
from tests.deploy.test_engine import prompts_of
from utils.run import UserError


@pytest.fixture(scope="module")
def model():
    return talker()


@pytest.mark.long
def test_the_study_finds_equal_answers(tmp_path):
    cfg = engine_study.Config(
        requests=3, max_new_tokens=5, rounds=1, batch=2, held_out=1, out=str(tmp_path / "a")
    )
    found = engine_study.main(cfg)
    for way in ("static batches", "transformers, continuous", "engine"):
        assert found[way]["answers as alone"] == 3
        assert found[way]["new tokens a CPU second"] > 0
    # rounding to int8 moves the perplexity a little
    fp32, int8 = found["perplexity"]["fp32"], found["perplexity"]["int8"]
    assert 5 < fp32 < 50 and 0 < abs(int8 / fp32 - 1) < 0.2
    with pytest.raises(UserError, match="at least 1"):
        engine_study.main(engine_study.Config(rounds=0, out=str(tmp_path / "b")))
    assert not (tmp_path / "b").exists()


def test_static_batches_are_cut_to_the_length_that_was_asked_for(model, parity):
    prompts = prompts_of(11, 5)
    lengths = [2, 7, 3, 4, 1]
    mine = engine_study.static_batches(model, prompts, lengths, 2)
    theirs = engine_study.alone(model, prompts, lengths)
    assert [len(answer) for answer in mine] == lengths
    name = "engine_study.static_batches"
    parity(
        "Engine",
        name,
        "each prompt alone",
        torch.tensor(sum(mine, [])),
        torch.tensor(sum(theirs, [])),
        0,
    )
