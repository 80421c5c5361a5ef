"""vlm/train_flops.py: FLOPs of training steps are those that PyTorch counts; real tokens; MFU of a run."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.vlm.test_lazy_data import lesson  # noqa: F401  (a fixture)
from vlm import train, train_flops
from vlm.train_config import changed
from vlm.train_data import count_supervised

KINDS = ["projector", "use_lora", "lora_frozen_projector", "freeze_vision", "none"]


@pytest.fixture(scope="module", params=KINDS)
def made(request, lesson):  # noqa: F811
    """-> flags, model and data of each kind of training; eager attention, whose products PyTorch counts."""
    cfg = changed(lesson, lazy=False, train_type=request.param, batch_size=4, r=3)
    _, model, source = train.prepare(cfg, torch.device("cpu"))
    model.vision.network.set_attn_implementation("eager")
    return cfg, model, source


def counted(model, batch, features):
    """FLOPs of forward and backward pass as PyTorch counts them."""
    learner = train.Learner(model)
    with FlopCounterMode(display=False) as counter:
        learner(batch, features).backward()
    return counter.get_total_flops()


def places(batch):
    """Rows as samples: padding and scores across samples are computed, too."""
    rows, length = batch["ids"].shape
    return [length] * rows


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_flops_are_those_that_torch_counts(made, parity, packing):
    cfg, model, source = made
    cfg = changed(cfg, packing=packing, steps=2)
    for ((batch, features),) in source.batches(cfg, 0):
        pictures = [1] * len(features)
        supervised = count_supervised(batch)
        ours = train_flops.step_flops(model, cfg, places(batch), supervised, pictures)
        theirs = counted(model, batch, features)
        kind = f"train_flops.step_flops, {cfg.train.train_type}"
        parity("FLOPs", kind, "FlopCounterMode", ours, theirs, atol=0)
        # what real tokens need is less: no padding, no scores across samples
        lengths = train_flops.sample_lengths(batch)
        assert train_flops.step_flops(model, cfg, lengths, supervised, pictures) < ours


def test_real_tokens_of_one_sample_need_what_is_computed(made):
    cfg, model, source = made
    cfg = changed(cfg, packing=False, batch_size=1, steps=8)
    with_picture = [
        (batch, features) for ((batch, features),) in source.batches(cfg, 0) if features is not None
    ]
    batch, features = with_picture[0]
    throughput = train_flops.Throughput(model, cfg)
    throughput.add(batch, features)
    assert throughput.flops == counted(model, batch, features)
    assert throughput.tokens == batch["ids"].numel()


@pytest.mark.parametrize("packing", [True, False])
def test_lengths_are_those_of_the_samples(made, packing):
    cfg, model, source = made
    cfg = changed(cfg, packing=packing, batch_size=len(source), steps=1)
    (((batch, _),),) = source.batches(cfg, 0)
    lengths = sorted(len(s["ids"]) for s in source.samples)
    assert sorted(train_flops.sample_lengths(batch)) == lengths


def test_a_part_without_pictures_has_no_vision(made):
    cfg, model, source = made
    text = [s for s in source.samples if not s["images"]]
    assert len(text) == 2
    alone = train_flops.step_flops(model, cfg, [len(text[0]["ids"])], 3, [])
    assert alone == train_flops.language_flops(model, 3, [len(text[0]["ids"])], 3)
    pictures = train_flops.step_flops(model, cfg, [len(text[0]["ids"])], 3, [1, 1]) - alone
    assert pictures == train_flops.vision_flops(model, cfg, [1, 1]) > 0


def test_a_run_reports_tokens_a_second_and_mfu(lesson, monkeypatch, capsys):  # noqa: F811
    """Resumed, too: only the steps that were made count."""
    monkeypatch.setattr(train_flops, "peak_flops", lambda on, dtype: 1e9)
    cfg = changed(lesson, out=lesson.out + "/mfu", save_steps=2, packing=False)
    seen = []
    add = train_flops.Throughput.add

    def record(self, *part):
        add(self, *part)
        # this part by itself
        one = train_flops.Throughput(self.model, self.cfg)
        add(one, *part)
        seen.append((one.tokens, one.flops))

    monkeypatch.setattr(train_flops.Throughput, "add", record)
    for flags in ({"steps": 2}, {"steps": 5, "resume": True}):
        seen.clear()
        found = train.main(changed(cfg, lr_scheduler_type="constant", **flags))
        assert len(seen) == (3 if "resume" in flags else 2)
        seconds = found["train_seconds"]
        tokens, flops = map(sum, zip(*seen, strict=True))
        assert found["tokens_a_second"] == pytest.approx(tokens / seconds)
        assert found["mfu"] == pytest.approx(flops / (seconds * 1e9))
    printed = capsys.readouterr().out
    assert "tokens_a_second" in printed and "mfu" in printed
    metrics = json.loads((Path(cfg.out) / "metrics.json").read_text())
    assert metrics["mfu"] == found["mfu"]


def test_a_model_without_a_formula_has_tokens_only(made):
    cfg, model, source = made
    cfg = changed(cfg, connector="unknown", packing=False, steps=1)
    throughput = train_flops.Throughput(model, cfg)
    list(throughput.watch(source.batches(cfg, 0)))
    assert throughput.flops is None and throughput.tokens > 0
    on = torch.device("cpu")
    found = train_flops.throughput_metrics(throughput.tokens, 0, 2.0, on, "fp32")
    assert found == {"tokens_a_second": throughput.tokens / 2}
    gone_on = train_flops.Throughput(model, changed(cfg, ckpt_path="there"))
    assert gone_on.flops is None


def test_efficientnet_learns_without_a_formula_of_its_flops(lesson, tmp_path):  # noqa: F811
    """`--train_type none` with the tower of the book, a network without a config: tokens only, and no mfu."""
    about = {"vision_name_or_path": "efficientnet", "lazy": False, "connector": "pool1"}
    cfg = changed(lesson, **about, train_type="none", steps=1, out=str(tmp_path / "out"))
    found = train.main(cfg)
    assert found["tokens_a_second"] > 0 and "mfu" not in found
    # frozen, its features are cached, and the connector has a formula
    cfg = changed(cfg, train_type="use_lora", out=str(tmp_path / "frozen"))
    assert train.main(cfg)["mfu"] > 0
