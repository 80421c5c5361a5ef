"""finetune/llama2_lora.py: every variant equals PEFT, both ways through the files, and merging changes nothing."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finetune import (
    adapters,
    llama2_full,
    llama2_lora,
    lora_inject,
    lora_layers,
    peft_io,
    sentiment,
    task_setup,
)
from tests import fuzz
from tests.conftest import gradients
from tests.llamas import batch, tiny
from utils import run

VARIANTS = ("lora", "rslora", "dora", "ia3")
TARGETS = ("q_proj", "v_proj", "down_proj")


def config(variant, **kw):
    return llama2_lora.Config(variant=variant, rank=3, alpha=7.0, targets=TARGETS, **kw)


def ours(variant, bias=False):
    """A tiny Llama with adapters that have moved away from where they start."""
    model, cfg = tiny(bias=bias), config(variant)
    lora_inject.inject(model, cfg.targets, cfg.rank, cfg.alpha, cfg.dropout, cfg.variant)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model, cfg


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_peft_and_its_files_are_ours(variant, tmp_path, parity):
    """Written by us, loaded by PEFT: the same logits, the same gradients; and back."""
    from peft import PeftModel

    model, cfg = ours(variant)
    peft_io.save(model, tmp_path / "ours", cfg)
    theirs = PeftModel.from_pretrained(tiny(), tmp_path / "ours", is_trainable=True).eval()
    ids, mask = batch()
    mine, other = (sentiment.network(m)(ids, mask)[mask] for m in (model, theirs))
    layer = "IA3Linear" if variant == "ia3" else lora_layers.LORA_LAYERS[variant].__name__
    parity("LoRA", layer, f"peft {variant}", mine, other)

    def key(name):
        return name.replace("base_model.model.", "").replace(".default", "").replace(".weight", "")

    a = {
        key(n).replace("magnitude", "lora_magnitude_vector"): g
        for n, g in gradients(model, mine).items()
    }
    b = {key(n): g for n, g in gradients(theirs, other).items()}
    b = {n: g.reshape(a[n].shape) for n, g in b.items()}
    parity("LoRA", f"{variant}, gradients", f"peft {variant}", a, b, atol=1e-4)

    theirs.save_pretrained(tmp_path / "theirs")
    again = tiny()
    peft_io.load(again, tmp_path / "theirs")
    torch.testing.assert_close(
        sentiment.network(again)(ids, mask), sentiment.network(model)(ids, mask)
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_0_is_the_base_model_and_peft_starts_there_too(variant):
    ids, mask = batch()
    base, model, cfg = sentiment.network(tiny())(ids, mask), tiny(), config(variant)
    lora_inject.inject(model, cfg.targets, cfg.rank, cfg.alpha, variant=variant)
    torch.testing.assert_close(sentiment.network(model)(ids, mask), base)
    theirs = llama2_lora.through_peft(tiny(), cfg)
    count = lambda m: sum(p.numel() for p in m.parameters() if p.requires_grad)  # noqa: E731
    assert count(model) == count(theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_with_a_bias_equal_peft(variant, tmp_path):
    """DoRA scales the product and not the bias, IA3 both."""
    from peft import PeftModel

    model, cfg = ours(variant, bias=True)
    peft_io.save(model, tmp_path, cfg)
    theirs = PeftModel.from_pretrained(tiny(bias=True), tmp_path).eval()
    ids, mask = batch()
    mine, other = (sentiment.network(m)(ids, mask)[mask] for m in (model, theirs))
    torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_dropout_comes_before_a_as_in_peft(variant, tmp_path):
    """In training, with the same random numbers: the same inputs are hidden, not entries of A x."""
    from peft import PeftModel

    model, cfg = tiny(), config(variant, dropout=0.5)
    lora_inject.inject(model, cfg.targets, cfg.rank, cfg.alpha, cfg.dropout, cfg.variant)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    peft_io.save(model, tmp_path, cfg)
    theirs = PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True)
    ids, mask = batch()
    out = []
    for m in (model, theirs):
        torch.manual_seed(3)
        out.append(sentiment.network(m.train())(ids, mask)[mask])
    torch.testing.assert_close(*out, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(sentiment.network(model.eval())(ids, mask)[mask], out[0], atol=0.1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_equals_unmerged(variant, bias):
    model, _ = ours(variant, bias)
    ids, mask = batch()
    before = sentiment.network(model)(ids, mask)
    merged = lora_inject.merge(model)
    assert merged is model and not lora_inject.names(model)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    torch.testing.assert_close(sentiment.network(model)(ids, mask), before, atol=1e-5, rtol=1e-4)


def test_rank_and_number_of_what_is_trained():
    model, cfg = ours("lora")
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    assert torch.linalg.matrix_rank(layer.delta_weight()) == cfg.rank
    shapes = {"q_proj": (32, 32), "v_proj": (32, 16), "down_proj": (48, 32)}  # in, out
    by_hand = 2 * sum(cfg.rank * (i + o) for i, o in shapes.values())  # two layers
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == by_hand


def test_modules_trained_whole_move_and_a_wrong_name_is_refused():
    model, cfg = tiny(), config("lora")
    lora_inject.inject(model, cfg.targets, cfg.rank, cfg.alpha, also=("model.norm",))
    assert (
        model.model.norm.weight.requires_grad
        and not model.model.layers[0].input_layernorm.weight.requires_grad
    )
    with pytest.raises(run.UserError, match="--also norm"):
        lora_inject.inject(tiny(), cfg.targets, cfg.rank, cfg.alpha, also=("norm",))


def test_weights_that_are_shared_are_refused():
    """A head that is the embedding, too: adapted or trained alone, it would take the embedding along."""
    for change in ({"also": ("lm_head",)}, {"targets": ("lm_head",)}):
        cfg = config("lora", **change) if "also" in change else llama2_lora.Config(**change)
        with pytest.raises(run.UserError, match="one and the same weight"):
            lora_inject.inject(tiny(), cfg.targets, cfg.rank, cfg.alpha, also=cfg.also)


def test_flags_that_cannot_be_meant_are_refused():
    for change, message in (
        ({"rank": 0}, "--rank"),
        ({"dropout": 2.0}, "--dropout"),
        ({"plus": -1.0}, "--plus"),
    ):
        with pytest.raises(run.UserError, match=message):
            llama2_lora.allow(tiny(), llama2_lora.Config(**change))


def test_only_adapters_move_and_lora_plus_moves_b_faster():
    model, cfg = ours("lora")
    assert all(("lora_" in n) == p.requires_grad for n, p in model.named_parameters())
    slow, fast = llama2_lora.lora_plus_groups(model, ratio=16)
    assert fast["times"] == 16 * slow["times"] == 16
    named = dict(model.named_parameters())
    for group, end in ((slow, "lora_A"), (fast, "lora_B")):
        assert [id(p) for p in group["params"]] == [
            id(p) for n, p in named.items() if n.endswith(end)
        ]


def test_targets_by_ending_or_expression_and_nothing_outside():
    model = nn.ModuleDict(
        {"vision": nn.ModuleDict({"q_proj": nn.Linear(4, 4)}), "language": tiny()}
    )
    everywhere = lora_inject.find(model, ("q_proj",))
    assert len(everywhere) == 3
    with pytest.raises(run.UserError, match=r"outside of language: vision\.q_proj"):
        lora_inject.find(model, ("q_proj",), within="language")
    inside = lora_inject.find(model, (r"language\..*\.1\..*[qk]_proj",), within="language")
    assert inside == [f"language.model.layers.1.self_attn.{x}_proj" for x in "qk"]
    with pytest.raises(run.UserError, match=r"names no linear layer.*self_attn\.q_proj"):
        lora_inject.find(model, ("roj",))  # the end of a word is not the end of a name
    with pytest.raises(run.UserError, match="not a regular expression"):
        lora_inject.find(model, ("q_proj(",))


def test_extra_trained_modules_are_in_the_file_and_a_missing_one_fails(tmp_path):
    model, cfg = ours("lora")
    peft_io.save(model, tmp_path, cfg, also=["model.norm"])
    again = tiny()
    with torch.no_grad():
        again.model.norm.weight.fill_(5)
    peft_io.load(again, tmp_path)
    assert torch.equal(again.model.norm.weight, model.model.norm.weight)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop("base_model.model.model.norm.weight")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(run.UserError, match=r"missing.*model\.norm"):
        peft_io.load(tiny(), tmp_path)


def test_files_say_what_they_are(tmp_path):
    model, cfg = ours("dora")
    peft_io.save(model, tmp_path, cfg, base="smollm2")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (
        written["use_dora"]
        and written["r"] == 3
        and written["base_model_name_or_path"] == "smollm2"
    )
    written["peft_type"] = "PREFIX_TUNING"
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    with pytest.raises(run.UserError, match="PREFIX_TUNING"):
        peft_io.load(tiny(), tmp_path)
    with pytest.raises(run.UserError, match="no adapter in"):
        peft_io.load(tiny(), tmp_path / "nowhere")
    for wrong, message in ((b"{}", "of kind None"), (b"[]", "of kind None"), (b"\xff", "not UTF-8"),
                           (b'{"peft_type": "LORA"}', "lacks r, lora_alpha, target_modules")):  # fmt: skip
        (tmp_path / "adapter_config.json").write_bytes(wrong)
        with pytest.raises(run.UserError, match=message):
            peft_io.load(tiny(), tmp_path)


def test_tree_draws_equal_layers_once():
    model, _ = ours("lora")
    lines = llama2_lora.tree(model).splitlines()
    assert (
        len(lines) == 3
        and all("2 x" in line for line in lines)
        and "layers.*.self_attn.q_proj" in lines[0]
    )


def test_changes_are_zero_at_the_start_and_then_those_of_the_merged_weights():
    model, cfg = tiny(), config("lora")
    lora_inject.inject(model, cfg.targets, cfg.rank, cfg.alpha)
    assert llama2_lora.changes(model) == {t: [0.0, 0.0] for t in ("q_proj", "v_proj", "down_proj")}
    model, _ = ours("lora")
    got = llama2_lora.changes(model)["q_proj"][1]
    before = tiny().model.layers[1].self_attn.q_proj.weight
    after = lora_inject.merge(model).model.layers[1].self_attn.q_proj.weight
    assert got == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)


def test_dropout_hides_inputs_of_the_low_rank_update_only():
    model, _ = ours("lora")
    frozen = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 1.0
    ids, mask = batch()
    base = sentiment.network(tiny())(ids, mask)
    torch.testing.assert_close(sentiment.network(model.train())(ids, mask), base)
    assert not torch.allclose(sentiment.network(frozen)(ids, mask), base)


REFUSED = {
    "init_lora_weights": ("pissa", "olora", "pissa_niter_4", "loftq", "corda", 1),
    "bias": ("some", "boft_only"),
    "rank_pattern": ({"q_proj": 4},),
    "alpha_pattern": ({"q_proj": 4},),
    "layers_to_transform": ([0],),
    "layers_pattern": (["layers"],),
    "fan_in_fan_out": (True,),
    "exclude_modules": (["v_proj"],),
    "layer_replication": ([[0, 2]],),
    "trainable_token_indices": ([3],),
    "target_parameters": (["w"],),
    "lora_bias": (True,),
    "use_rslora": (True,),  # together with use_dora
    "a_key_of_next_year": (1,),
}


@pytest.mark.parametrize("key", REFUSED)
def test_settings_that_are_not_known_are_refused_by_name(key, tmp_path):
    model, cfg = ours("dora")
    peft_io.save(model, tmp_path, cfg)
    path = tmp_path / "adapter_config.json"
    written = json.loads(path.read_text())
    for value in REFUSED[key]:
        path.write_text(json.dumps(written | {key: value}))
        with pytest.raises(run.UserError, match=f"{key}.*does not know") as error:
            peft_io.load(tiny(), tmp_path)
        assert "\n" not in str(error.value)


def test_all_settings_that_peft_writes_by_default_are_known(tmp_path):
    from peft import LoraConfig, get_peft_model

    made = get_peft_model(
        tiny(),
        LoraConfig(target_modules=["q_proj"], init_lora_weights="gaussian", lora_dropout=0.1),
    )
    made.save_pretrained(tmp_path)
    assert peft_io.load(tiny(), tmp_path) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


def test_a_list_holds_ends_and_a_string_never_takes_for_ever(tmp_path):
    """PEFT takes entries of a list as names, a string as an expression, here one that backtracks for years."""
    model, cfg = tiny(), config("lora")
    cfg = replace(cfg, targets=("q_proj",))
    lora_inject.inject(model, cfg.targets, cfg.rank, cfg.alpha)
    peft_io.save(model, tmp_path, cfg)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "adapter_model.safetensors")  # as PEFT would: no hash
    path = tmp_path / "adapter_config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"target_modules": "(.*)*(.*)*(.*)*q_pro[^k]"}))
    assert peft_io.load(tiny(), tmp_path) == lora_inject.names(model)
    for targets, message in (
        (["q_proj", "v_proj"], "missing"),
        ([".*q_proj"], "no linear layer"),
        (7, "list of names"),
    ):
        path.write_text(json.dumps(written | {"target_modules": targets}))
        with pytest.raises(run.UserError, match=message):
            peft_io.load(tiny(), tmp_path)


def test_another_shape_damage_and_what_is_no_number_are_refused(tmp_path):
    model, cfg = ours("lora")
    peft_io.save(model, tmp_path, cfg)
    path, key = (
        tmp_path / "adapter_model.safetensors",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    )
    tensors, whole = load_file(path), path.read_bytes()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 4]) + whole[-2:])
    with pytest.raises(run.UserError, match="is damaged"):
        peft_io.load(tiny(), tmp_path)
    for wrong, message in (
        (tensors[key].T.contiguous(), "has the shape"),
        (tensors[key] / 0, "finite numbers"),
    ):
        save_file(tensors | {key: wrong}, path)
        with pytest.raises(run.UserError, match=message):
            peft_io.load(tiny(), tmp_path)
    path.write_bytes(whole)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(written | {"lora_alpha": 8.0}))
    with pytest.raises(run.UserError, match="not as it was written: lora_alpha"):
        peft_io.load(tiny(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(written | {"base_model_name_or_path": "elsewhere"})
    )
    peft_io.load(tiny(), tmp_path)


def test_500_damaged_adapters_are_refused_or_read_right(tmp_path):
    """Bits of the weights, bytes and types of the settings: what is read is what was written, or an error is."""
    model = tiny(layers=1)
    cfg = replace(config("lora"), rank=1, targets=("q_proj",))
    lora_inject.inject(model, cfg.targets, cfg.rank, cfg.alpha)
    nn.init.normal_(model.model.layers[0].self_attn.q_proj.lora_B)
    peft_io.save(model, tmp_path, cfg)
    settings, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    good, bytes_of, stored = (
        json.loads(settings.read_text()),
        weights.read_bytes(),
        settings.read_bytes(),
    )
    text = batch()
    expected, blank, read = sentiment.network(model)(*text), tiny(layers=1), 0
    cases = [(weights, bad) for bad in fuzz.damaged(bytes_of, 200)]
    cases += [(settings, bad) for bad in fuzz.damaged(stored, 150)]
    cases += [(settings, json.dumps(bad).encode()) for bad in fuzz.retyped(good, 150)]
    for path, bad in cases:
        settings.write_bytes(stored)
        weights.write_bytes(bytes_of)
        path.write_bytes(bad)
        if fuzz.reads_or_refuses(lambda: adapters.read(tmp_path, ("LORA", "IA3"))) is None:
            continue
        again = copy.deepcopy(blank)
        if fuzz.reads_or_refuses(lambda: peft_io.load(again, tmp_path)):  # noqa: B023
            read += 1
            assert torch.equal(sentiment.network(again)(*text), expected)
    assert 0 < read < 200


class Recorded(Exception):
    pass


def recorded(monkeypatch, tmp_path, script, **flags):
    """Run the main of a script up to its training -> (model, groups, network) as the training would get them."""
    found = {}

    def experiment(cfg, bench, network, model, groups=None):
        found.update(model=model, groups=groups, network=network)
        raise Recorded

    bench = task_setup.Bench(tmp_path, torch.device("cpu"), None, tiny(), {})
    monkeypatch.setattr(task_setup, "start", lambda cfg, *allow, **kw: bench)
    monkeypatch.setattr(llama2_full, "experiment", experiment)
    with pytest.raises(Recorded):
        script.main(script.Config(**flags))
    return found


@pytest.mark.parametrize("backend", ["ours", "peft"])
def test_every_flag_reaches_the_adapters(backend, monkeypatch, tmp_path):
    flags = {
        "rank": 3,
        "alpha": 7.0,
        "dropout": 0.25,
        "targets": ("k_proj",),
        "also": ("model.norm",),
        "plus": 5.0,
    }
    found = recorded(monkeypatch, tmp_path, llama2_lora, variant="rslora", backend=backend, **flags)
    layers = [m for m in found["model"].modules() if hasattr(m, "lora_A")]
    assert len(layers) == 2
    if backend == "ours":
        assert {(m.scale, m.dropout.p, len(m.lora_A)) for m in layers} == {(7 / 3**0.5, 0.25, 3)}
    else:
        assert {
            (m.scaling["default"], m.lora_dropout["default"].p, m.r["default"]) for m in layers
        } == {(7 / 3**0.5, 0.25, 3)}
        base = found["model"].peft_config["default"].base_model_name_or_path
        assert base == adapters.base_of(found["model"])
    trained = {n for n, p in found["model"].named_parameters() if p.requires_grad}
    assert (
        len(trained) == 5
        and sum("norm" in n for n in trained) == 1
        and sum("k_proj" in n for n in trained) == 4
    )
    slow, fast = found["groups"]
    assert (slow["times"], fast["times"], len(slow["params"]), len(fast["params"])) == (1, 5, 3, 2)
    with pytest.raises(run.UserError, match="outside of elsewhere"):
        llama2_lora.allow(tiny(), llama2_lora.Config(within="elsewhere"))


def test_dora_starts_at_the_length_of_rows_and_rslora_divides_by_the_root():
    base = nn.Linear(6, 4)
    layer = lora_layers.DoRALinear(base, 4, 8.0)
    torch.testing.assert_close(layer.magnitude, base.weight.detach().norm(dim=1))
    assert (layer.scale, lora_layers.RsLoRALinear(base, 4, 8.0).scale) == (2, 4)


def test_the_base_is_named_by_the_folder_it_came_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny()
    model.save_pretrained("here")
    model.config._name_or_path = "here"
    assert adapters.base_of(model) == str(Path("here").resolve())
    model.config._name_or_path = "meta-llama/Llama-2-7b-hf"
    assert adapters.base_of(model) == "meta-llama/Llama-2-7b-hf"
