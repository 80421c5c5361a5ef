"""Memory: formulas against the thing itself, the step on fake tensors against the profiler."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests import fuzz
from tests.conftest import ROOT
from training import config_checks, formulas, memory, memory_fit, memory_model, presets
from training.memory import Config
from training.tracker import Tracker
from utils.run import UserError

TINY = str(ROOT / "training/configs/llama_tiny.json")
SMALL = dict(
    model_type="llama", vocab_size=1000, hidden_size=64, intermediate_size=176, num_hidden_layers=3,
    num_attention_heads=8, num_key_value_heads=4,
)  # fmt: skip


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    return Config(str(path), batch=2, seq_len=32)


def llama_like(name):
    config = presets.configuration(name)
    shape = (
        config.vocab_size,
        config.hidden_size,
        config.num_hidden_layers,
        config.intermediate_size,
    )
    return config, shape


@pytest.mark.parametrize(
    "name, published",
    [
        ("smollm2-135m", 134515008), ("llama2-7b", 6738415616), ("llama2-13b", 13015864320),
        ("llama2-70b", 68976648192), ("llama3-8b", 8030261248), ("qwen2.5-7b", 7615616512),
    ],
)  # fmt: skip
def test_parameters_by_formula_are_those_of_the_model(name, published):
    config, shape = llama_like(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    heads = dict(heads=config.num_attention_heads, kv_heads=config.num_key_value_heads)
    ours = formulas.parameters(
        *shape, **heads, tied=config.tie_word_embeddings, bias=name.startswith("qwen")
    )
    assert ours == sum(p.numel() for p in model.parameters()) == published


def test_the_form_with_two_matrices_is_wrong():
    _, shape = llama_like("llama2-7b")
    assert formulas.two_matrices(*shape) / 1e9 == pytest.approx(5.30, abs=0.005)


def test_accounts_add_up():
    assert {name: sum(parts.values()) for name, parts in formulas.ACCOUNTS.items()} == {
        "fp32": 16, "mixed, ZeRO": 16, "mixed, fp32 gradients": 18, "mixed, two gradients": 20,
        "bf16, fp32 moments": 12, "mixed, 8-bit moments": 10, "bf16": 8, "moments alone": 8,
    }  # fmt: skip


def test_the_plain_formula_gives_the_known_sizes():
    config, shape = llama_like("llama2-7b")
    assert formulas.plain_activations(*shape, 32, 12, 64) / 1e9 == pytest.approx(2.9, abs=0.05)
    assert formulas.plain_activations(*shape, 32, 128, 512) / 1e9 == pytest.approx(307, abs=0.5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_saves(parity, attention, dtype, checkpointing):
    """Every storage that a hook on saved tensors meets, but those of weights and constants."""
    AttentionInterface.register("fused", sdpa_attention_forward)
    config = LlamaConfig(**{k: v for k, v in SMALL.items() if k != "model_type"})
    config._attn_implementation = "fused" if attention == "sdpa" else attention
    model = LlamaForCausalLM(config).train()
    for p in model.parameters():
        p.data = p.data.to(dtype)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    own = {x.untyped_storage()._cdata for x in [*model.parameters(), *model.buffers()]}
    seen = {}

    def pack(x):
        if x.dim() and x.untyped_storage()._cdata not in own:
            seen[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    B, S = 2, 16
    ids = torch.randint(0, 1000, (B, S))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        F.cross_entropy(
            model(input_ids=ids, use_cache=False).logits.float().flatten(0, 1), ids.flatten()
        )
    e = 4 if dtype == torch.float32 else 2
    ours = formulas.activations(1000, 64, 3, 176, 8, 4, B, S, e, attention, checkpointing)
    found = sum(storage.nbytes() for storage in seen.values())
    # The rotary table is kept as well, but by the function to call again and not by autograd
    if checkpointing:
        found += ours["rotary"]
    assert sum(ours.values()) == found
    kind = f"{attention}, {'fp32' if e == 4 else 'bf16'}{', checkpointed' if checkpointing else ''}"
    parity(
        "Memory",
        f"formulas.activations, {kind}",
        "saved_tensors_hooks",
        sum(ours.values()),
        found,
        atol=0,
    )


@pytest.mark.parametrize(
    "stage, offload",
    [(2, "none"), (2, "optimizer"), (3, "none"), (3, "optimizer"), (3, "parameters")],
)
def test_deepspeed_says_the_same(parity, stage, offload):
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    total, big, n = 6738415616, 131072000, 8
    if stage == 2:
        _, theirs = estimate_zero2_model_states_mem_needs(total, n, 1, offload != "none")
    else:
        flags = dict(cpu_offload=offload != "none", cpu_offload_params=offload == "parameters")
        _, theirs, _ = estimate_zero3_model_states_mem_needs(total, big, n, 1, **flags)
    ours = formulas.deepspeed_estimate(total, big, stage, n, offload)
    parity(
        "Memory",
        f"deepspeed_estimate, stage {stage}, offload {offload}",
        "deepspeed",
        ours,
        theirs,
        atol=0,
    )


LORA = dict(precision="bf16", method="lora")
CASES = {
    "full fp32": dict(precision="fp32"),
    "full bf16": dict(precision="bf16"),
    "full bf16-mixed": {},
    "full autocast": dict(precision="autocast"),
    "full bf16, eager": dict(precision="bf16", attention="eager"),
    "full bf16, checkpointed": dict(precision="bf16", checkpointing=True),
    "lora bf16": dict(precision="bf16", method="lora"),
    "qlora bf16, checkpointed": dict(precision="bf16", method="qlora", checkpointing=True),
    "full, ZeRO-1 of 4": dict(zero=1, world_size=4),
    "full, ZeRO-2 of 4": dict(zero=2, world_size=4),
    "full, ZeRO-3 of 4": dict(zero=3, world_size=4),
    "lora, ZeRO-3 of 4, checkpointed": dict(
        zero=3, world_size=4, method="lora", checkpointing=True
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_peak_on_fake_tensors_is_the_measured_peak(small, case):
    """To the byte, but for Python numbers: an operator makes tensors of 4 or 8 bytes of them, where nobody looks."""
    cfg = replace(small, **CASES[case])
    assert abs(memory.exact(cfg)["peak"] - memory.measured(cfg)) <= 32


def test_a_real_model_in_its_real_size():
    cfg = Config("smollm2-135m", method="lora", precision="bf16", batch=2, seq_len=64)
    found = memory.exact(cfg)
    assert found["parameters"] == 134515008 and found["peak"] == memory.measured(cfg)


def test_the_parts_are_those_of_the_paper(small):
    found = memory.exact(replace(small, zero=3, world_size=4))
    part = found["parameters"] / 4
    for name, bytes_each in (("weights", 2), ("gradients", 2), ("optimizer", 12)):
        assert found[name] == pytest.approx(bytes_each * part, rel=0.01)
    assert sum(found["at_peak"].values()) == found["peak"]
    plain = memory.exact(small)
    assert (plain["weights"], plain["optimizer"]) == pytest.approx(
        [2 * 4 * part, 12 * 4 * part], rel=0.01
    )


def test_textbook_and_exact_agree_where_they_speak_of_the_same(small):
    for flags in (
        {},
        dict(zero=2, world_size=4),
        dict(precision="fp32"),
        LORA,
        LORA | {"method": "qlora"},
    ):
        cfg = replace(small, **flags)
        found = memory.exact(cfg)
        book = memory.textbook(cfg, found)
        for name in ("weights", "gradients", "optimizer"):
            assert book[name] == pytest.approx(found[name], rel=0.02), (flags, name)
    cfg = replace(small, precision="bf16")
    found = memory.exact(cfg)
    assert memory.textbook(cfg, found)["activations"] == pytest.approx(
        found["activations"], rel=0.02
    )


def test_offload_and_checkpointing_take_away_what_they_should(small):
    here = memory.exact(replace(small, zero=3, world_size=4))
    away = memory.exact(replace(small, zero=3, world_size=4, offload="optimizer"))
    far = memory.exact(replace(small, zero=3, world_size=4, offload="parameters"))
    assert away["optimizer"] == 0 and far["peak"] < away["peak"] < here["peak"]
    again = memory.exact(replace(small, checkpointing=True))
    assert again["activations"] < 0.5 * memory.exact(small)["activations"]


def test_lora_leaves_the_vision_tower_alone():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "llava", vision_config=VISION, text_config=SMALL, image_token_index=999
    )
    with FakeTensorMode():
        model = memory_model.build(Config(method="lora"), config)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("language_model" in name and "lora" in name for name in trained)


def test_tracker_counts_a_storage_once_and_until_it_is_gone():
    with Tracker() as tracker:
        x = torch.zeros(100)  # 400 bytes
        y = x.view(10, 10)[2:]
        del x
        z = y + 1  # 320
        del y
        z.untyped_storage().resize_(0)
        z.untyped_storage().resize_(320)
    assert tracker.peak() == 720 and tracker.curve().tolist() == [400, 720, 320, 0, 320]


def test_largest_finds_the_edge():
    for budget in (10, 99, 100, 12345):
        for peak in (lambda x: 7 + 3 * x, lambda x: max(50, x * x)):
            x, _ = memory_fit.largest(peak, budget)
            assert (x == 0 or peak(x) <= budget) and peak(x + 1) > budget


def test_fit_answers_with_what_fits(small):
    cfg = replace(small, fit="batch", budget=0.02)
    found = memory.main(cfg)
    peak = lambda b: memory.exact(replace(cfg, batch=b))["peak"]  # noqa: E731
    assert peak(found["largest"]) <= 0.02e9 < peak(found["largest"] + 1)


def test_json_is_one_object_in_bytes(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    line = ["training/memory.py", "--model", str(path), "--json"]
    done = subprocess.run([sys.executable, *line], cwd=ROOT, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert {
        "parameters",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "peak",
    } <= found.keys()
    assert found["parameters"] == formulas.parameters(1000, 64, 3, 176, 8, 4)


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(model="llama9"), "do you mean llama3-8b"),
        (dict(batch=0), "--batch"),
        (dict(model=TINY, fit="batch", budget=0.001), "not even --batch 1"),
        (dict(fit="batch", budget=float("inf")), "--budget"),
        (dict(zero=1, precision="bf16"), "bf16-mixed"),
        (dict(offload="optimizer"), "--zero"),
        (dict(zero=2, offload="parameters"), "--zero 3"),
        (dict(model="llava-1.5-7b"), "576 tokens"),
        (dict(zero=1, offload="optimizer", measure=True), "--measure"),
    ],
)
def test_bad_input(flags, said):
    with pytest.raises(UserError, match=said):
        memory.main(Config(**flags))


def test_measuring_more_than_there_is_room_for_is_refused(small, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**6))
    with pytest.raises(UserError, match="--measure needs"):
        memory.main(replace(small, measure=True))


VISION = dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=64, image_size=28, patch_size=14,
              num_hidden_layers=2, num_attention_heads=2, projection_dim=16)  # fmt: skip


def write(tmp_path, values):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values), "utf-8")
    return Config(str(path), batch=1, seq_len=16)


@pytest.mark.parametrize("select, places", [("default", 4), ("full", 5)])
def test_a_picture_takes_the_places_that_its_tower_gives(select, places, tmp_path):
    values = {
        "model_type": "llava",
        "vision_config": VISION,
        "text_config": SMALL,
        "image_token_index": 999,
    }
    cfg = write(tmp_path, values | {"vision_feature_select_strategy": select})
    assert presets.image_tokens(presets.configuration(cfg.model)) == places
    assert abs(memory.exact(cfg)["peak"] - memory.measured(cfg)) <= 32
    with pytest.raises(UserError, match=f"a picture takes {places} tokens"):
        memory.check_flags(replace(cfg, seq_len=places))


@pytest.mark.parametrize(
    "kind", ["idefics3", "smolvlm", "llava_next", "internvl", "siglip", "gpt2", "opt", "idefics2"]
)
def test_other_kinds_of_models_are_refused_in_one_line(kind, tmp_path):
    with pytest.raises(UserError) as error:
        memory.check_flags(write(tmp_path, {"model_type": kind}))
    assert kind in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 250


def test_an_unknown_name_is_one_line_and_no_request(capfd, monkeypatch):
    monkeypatch.setattr(
        "transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("the hub was asked")
    )
    with pytest.raises(
        UserError, match="nonsense-7b is no preset, no folder and no hub id OWNER/NAME; presets are"
    ):
        memory.main(Config("nonsense-7b"))
    with pytest.raises(UserError, match="do you mean llama2-7b?"):
        memory.main(Config("llama2-7B"))
    assert capfd.readouterr() == ("", "")


def test_retries_of_the_hub_are_not_told(capfd, monkeypatch):
    def no_network(*_, **__):
        import logging

        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise OSError("no connection\nsecond line")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", no_network)
    with pytest.raises(UserError, match="--model owner/nonsense-7b: no connection second line"):
        memory.main(Config("owner/nonsense-7b"))
    assert capfd.readouterr() == ("", "")


def refused_or_as_written(path):
    """The configuration is refused, or its sizes are those in the file: none is transformers' own default."""
    cfg = Config(str(path), seq_len=8)
    memory.check_flags(cfg)
    config, written = presets.configuration(cfg.model), json.loads(path.read_text("utf-8-sig"))
    for key in config_checks.SIZES:
        assert getattr(config, key) == written[key]
    assert config.num_key_value_heads == written.get(
        "num_key_value_heads", config.num_attention_heads
    )
    return config


@pytest.mark.parametrize("way", ["damaged", "retyped"])
def test_damaged_configurations(way, tmp_path):
    path, values = (
        tmp_path / "config.json",
        SMALL | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
    )
    whole, read, built = json.dumps(values), 0, 0
    bad = fuzz.damaged(whole.encode(), 250) if way == "damaged" else fuzz.retyped(values, 250)
    for content in bad:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        config = fuzz.reads_or_refuses(lambda: refused_or_as_written(path))
        if config is not None:
            read += 1
            if read % 3 == 0 and config.num_hidden_layers < 10:  # what was read can be weighed
                assert memory.exact(Config(str(path), seq_len=8))["peak"] > 0
                built += 1
    assert 0 < read < 100 and built


def test_another_tower_is_refused(tmp_path):
    vision = {"model_type": "siglip_vision_model"}
    with pytest.raises(UserError, match="sees by a siglip_vision_model, not by CLIP"):
        memory.check_flags(
            write(tmp_path, {"model_type": "llava", "vision_config": vision, "text_config": SMALL})
        )


def test_a_key_that_is_nearly_right_or_missing_is_named(tmp_path):
    for values, said in (
        (SMALL | {"num_key_value_head": 2}, "perhaps you mean 'num_key_value_heads'"),
        (
            {k: v for k, v in SMALL.items() if k != "intermediate_size"},
            "intermediate_size is missing",
        ),
        (SMALL | {"num_key_value_heads": 3}, "8 heads cannot share 3"),
        (SMALL | {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000; 1 to 500"),
        (SMALL | {"hidden_act": "silly"}, "no known hidden_act: silly"),
    ):
        with pytest.raises(UserError, match=said):
            memory.check_flags(write(tmp_path, values))


def test_a_broken_configuration_is_one_line(tmp_path):
    bad = {"model_type": "llama", "hidden_size": 65, "num_attention_heads": 4}
    for text in (
        "{",
        '{"model_type": "nothing"}',
        "[]",
        '{"model_type": "bert"}',
        '{"model_type": "gpt2"}',
        json.dumps(bad),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError):
            memory.main(Config(str(tmp_path / "config.json")))
