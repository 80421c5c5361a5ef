"""vlm/train_trainer.py: transformers' Trainer makes the steps of vlm/train.py."""

from pathlib import Path

import pytest

from tests.vlm.test_lazy_data import lesson  # noqa: F401  (a fixture)
from utils import checkpoint
from utils.run import UserError
from vlm import train, train_trainer
from vlm.config import FSDPConfig
from vlm.train_config import changed


def weights(cfg):
    return checkpoint.read(Path(cfg.out) / "model.safetensors")[0]


@pytest.mark.parametrize("kind", ["projector", "use_lora"])
def test_trainer_makes_the_steps_of_train(lesson, parity, kind):  # noqa: F811
    """Two rates, warm-up, clipping, a batch of words alone."""
    flags = {"train_type": kind, "lr": 0.01, "lr_pretrained": 0.003, "steps": 5, "warmup_steps": 2}
    ours = changed(lesson, out=f"{lesson.out}/ours-{kind}", **flags)
    theirs = changed(ours, out=f"{lesson.out}/trainer-{kind}")
    mine = train.main(ours)["losses"]
    other = train_trainer.main(theirs)["losses"]
    name = f"vlm.train, {kind}"
    parity("LLaVA, engines", name, "transformers.Trainer, losses", mine, other, 1e-4)
    parity(
        "LLaVA, engines",
        name,
        "transformers.Trainer, weights",
        weights(ours),
        weights(theirs),
        1e-4,
    )


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"engine": "ddp"}, "engines of its own"),
        ({"fsdp": FSDPConfig(True)}, "engines of its own"),
        ({"gradient_accumulation_steps": 2}, "one part a step"),
        ({"save_steps": 1}, "no checkpoints here"),
    ],
)
def test_flags_that_trainer_does_not_take(lesson, tmp_path, flags, says):  # noqa: F811
    with pytest.raises(UserError, match=says):
        train_trainer.main(changed(lesson, out=str(tmp_path / "new"), **flags))
    assert not (tmp_path / "new").exists()
