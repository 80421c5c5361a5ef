"""finetune/bench.py: the two models hold the same corrections, both learn, and the ratio is that of the times."""

import pytest
import torch

from finetune import bench, llama2_full, llama2_lora
from tests.llamas import folder
from utils import run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("tiny") / "model")


def test_both_train_the_same_number_of_weights_and_move(model):
    cfg = bench.Config(model=model)
    models = bench.pair(cfg, llama2_lora.Config(), bf16=False)
    ours, theirs = (sum(p.numel() for p in llama2_full.trainable_parameters(m)) for m in models)
    assert ours == theirs > 0
    ids = torch.randint(2, 100, (2, 8))
    labels = torch.where(torch.arange(8) < 6, -100, ids)
    for m in models:
        before = [p.clone() for p in llama2_full.trainable_parameters(m)]
        bench.training_step(m, (ids, torch.ones_like(ids, dtype=torch.bool), labels), bf16=False)()
        assert any(
            not torch.equal(a, b) for a, b in zip(before, llama2_full.trainable_parameters(m))
        )


def test_command(model, tmp_path):
    threads = torch.get_num_threads()
    metrics = bench.main(
        bench.Config(
            model=model, rounds=1, batch=2, length=8, variants=("lora",), out=str(tmp_path)
        )
    )
    torch.set_num_threads(threads)
    assert metrics.keys() == {"lora, fp32 step", "lora, bf16 step"}
    for step in metrics.values():
        assert step["times_faster"] == pytest.approx(step["their_ms"] / step["ms"])


def test_bad_input():
    with pytest.raises(run.UserError, match="--rounds"):
        bench.main(bench.Config(rounds=0))
