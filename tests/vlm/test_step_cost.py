"""Memory of a vision-language step: predicted on fake tensors against the profiler; formulas; the table of both."""

import json
from typing import Any

import pytest
import tyro

from tests.vlm.test_flops import made
from utils.run import UserError
from vlm import flops, step_cost, step_memory
from vlm.config import VLMConfig
from vlm.step_model import Step

STEPS = {
    "connector only": Step("projector"),
    "LoRA": Step("use_lora"),
    "QLoRA": Step("use_lora", quantize=True),
    "language model": Step("freeze_vision"),
    "everything": Step("none"),
    "5 tiles, connector only": Step("projector", images=5, batch=2),
    "tiles of LLaVA-1.6, LoRA": Step("use_lora", picture=(90, 40)),
    "tiles of LLaVA-1.6, cached": Step("projector", picture=(90, 40), cached=True),
    "cached features": Step("use_lora", cached=True),
    "ZeRO-1 of 4": Step("none", zero=1, world_size=4),
    "ZeRO-2 of 4": Step("freeze_vision", zero=2, world_size=4),
    "ZeRO-3 of 4": Step("use_lora", zero=3, world_size=4),
    "ZeRO-3 of 4, everything": Step("none", zero=3, world_size=4),
}


@pytest.fixture(scope="module")
def predicted():
    """{name: what the trace says}."""
    return {name: step_memory.predict(configuration(name), step) for name, step in STEPS.items()}


def configuration(name):
    return made(tiles=4) if name.startswith("tiles") else made()


@pytest.mark.parametrize("name", STEPS)
def test_peak_is_that_of_the_profiler(parity, predicted, name):
    """The same step with numbers: what is missing are Python numbers that an operator makes tensors of."""
    peak = predicted[name]["peak"]
    real = step_memory.measured(configuration(name), STEPS[name])
    parity("Memory", f"step_memory.predict, {name}", "profiler", peak, real, atol=100)


@pytest.mark.parametrize("train_type", flops.TRAIN_TYPES)
def test_checkpointing_of_plain_attention_is_that_of_the_profiler(parity, monkeypatch, train_type):
    """The fused kernel's backward pass has memory of its own, which only the profiler sees: here it is left out."""
    build = step_memory.build
    monkeypatch.setattr(step_memory, "build", lambda *of: build(*of, attention="eager"))
    step = Step(train_type, checkpointing=True)
    peak = step_memory.predict(made(), step)["peak"]
    real = step_memory.measured(made(), step)
    plain = step_memory.predict(made(), Step(train_type))["peak"]
    kind = f"step_memory.predict, {train_type}, checkpointing"
    parity("Memory", kind, "profiler", peak, real, atol=100)
    assert peak < plain


def test_fused_attention_hides_some_memory_of_its_own():
    step = Step("freeze_vision", checkpointing=True)
    missing = step_memory.measured(made(), step) - step_memory.predict(made(), step)["peak"]
    assert 0 < missing < 50_000


@pytest.mark.parametrize("name", STEPS)
def test_model_states_by_formula(predicted, name):
    """Optimizer states and gradients to the byte, but for what the encoder has and nobody reads."""
    found = predicted[name]
    step = STEPS[name]
    book = step_memory.model_states(found["parameters"], step.zero, step.world_size)
    if step.train_type == "none" and not step.zero:
        # the last layer and the last norm get no gradient
        assert found["gradients"] < book["gradients"]
        return
    assert found["optimizer"] == pytest.approx(book["optimizer"], rel=1e-3)
    if step.zero != 1:
        assert found["gradients"] == pytest.approx(book["gradients"], rel=1e-3)
    # buffers (positions, rotary frequencies) and padding come on top
    assert book["weights"] <= found["weights"] <= book["weights"] + 13_000


def test_known_answers_of_model_states():
    """100 frozen numbers, 10 that learn, 64 in 4 bits."""
    counted = {"x": {"frozen": 100, "trained": 10, "4 bits": 64}}
    one = step_memory.model_states(counted)
    assert one == {"weights": 200 + 40 + 36, "gradients": 40, "optimizer": 80}
    shares = [step_memory.model_states(counted, zero, 4) for zero in (1, 2, 3)]
    assert [x["optimizer"] for x in shares] == [30, 30, 30]
    assert [x["gradients"] for x in shares] == [20, 5, 5]
    assert [x["weights"] for x in shares] == [256, 256, 64]


def test_order_of_the_ways_to_train(predicted):
    """Peaks rise with what learns; tiles cost activations; 4 bits save weights only."""
    peak = {name: found["peak"] for name, found in predicted.items()}
    assert peak["connector only"] < peak["LoRA"] < peak["language model"] < peak["everything"]
    assert predicted["QLoRA"]["weights"] < predicted["LoRA"]["weights"]
    assert predicted["QLoRA"]["activations"] == predicted["LoRA"]["activations"]
    assert predicted["cached features"]["weights"] < predicted["LoRA"]["weights"]
    tiles = predicted["5 tiles, connector only"]
    assert tiles["activations"] > 2.8 * predicted["connector only"]["activations"]
    parts = tiles["at_peak"]
    assert sum(parts.values()) == tiles["peak"]
    assert tiles["inputs"] == 10 * 3 * 28 * 28 * 4 + 2 * 2 * (5 * 16 + 128) * 8


@pytest.mark.parametrize(
    "step, line",
    [
        (Step("lora"), "--train_type is one of"),
        (Step("projector", quantize=True), "4 bits are for"),
        (Step("none", cached=True), "no cached features"),
        (Step(batch=0), "above 0"),
        (Step(images=-1), "0 or more"),
        (Step(zero=4), "stage of ZeRO"),
    ],
)
def test_steps_that_make_no_sense(step, line):
    with pytest.raises(UserError, match=line):
        step_memory.predict(made(), step)


@pytest.fixture
def cfg(tmp_path):
    """Of the command: a tiny encoder and language model in folders."""
    parts: Any = made()
    parts.vision_config.save_pretrained(tmp_path / "vision")
    parts.text_config.save_pretrained(tmp_path / "language")

    def parse(*flags):
        names = ["--vision", str(tmp_path / "vision"), "--language", str(tmp_path / "language")]
        names += ["--connector", "mlp2x_gelu", "--out", str(tmp_path / "out")]
        return tyro.cli(step_cost.Config, args=[*names, *flags])

    return parse


def test_table_of_the_command(cfg, predicted, capsys, tmp_path):
    found = step_cost.main(
        cfg("--only", "projector", "qlora", "--tflops", "1", "--seconds", "0.001")
    )
    rows = json.loads((tmp_path / "out/rows.json").read_text())
    assert rows["projector"]["peak"] == predicted["connector only"]["peak"]
    assert rows["qlora"]["peak"] == predicted["QLoRA"]["peak"]
    parts = flops.step(made(), "projector")
    assert rows["projector"]["flops"] == flops.total(parts)
    assert found["projector, MFU"] == pytest.approx(flops.total(parts) / 1e9)
    assert found["projector, seconds at least"] == pytest.approx(flops.total(parts) / 1e12)
    said = capsys.readouterr().out
    assert "TFLOPs" in said and f"{rows['qlora']['peak'] / 1e9:14.3f}" in said


def test_mfu_leaves_out_what_is_computed_again(cfg):
    flags = ("--only", "freeze_vision", "--tflops", "1", "--seconds", "0.001")
    plain = step_cost.main(cfg(*flags))
    again = step_cost.main(cfg(*flags, "--checkpointing"))
    assert again["freeze_vision, MFU"] == plain["freeze_vision, MFU"]
    assert again["freeze_vision, TFLOPs"] > plain["freeze_vision, TFLOPs"]


@pytest.mark.parametrize(
    "flags, line",
    [
        (("--only", "all"), "--only all: there are"),
        (("--seconds", "1"), "needs the peak"),
        (("--tflops", "-1"), "0 or more"),
        (("--only", "projector", "--batch", "0"), "above 0"),
        (("--picture", "0", "5"), "--picture"),
    ],
)
def test_bad_flags_are_one_line(cfg, flags, line, tmp_path):
    with pytest.raises(UserError, match=line):
        step_cost.main(cfg(*flags))
    assert not (tmp_path / "out").exists()


def test_efficientnet_has_memory_but_no_formula():
    config = VLMConfig(connector="pool3", text_config=made().text_config, image_token_id=99)
    assert step_memory.predict(config, Step())["peak"] > 0
    with pytest.raises(UserError, match="no formula for EfficientNet"):
        flops.step(config, "projector")
