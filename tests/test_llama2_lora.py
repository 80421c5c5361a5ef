"""finetune/llama2_lora.py: every variant equals PEFT, both ways through the files, and merging changes nothing."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finetune import llama2_lora, sentiment
from tests.conftest import gradients
from tests.llamas import batch, tiny
from utils import run

VARIANTS = ("lora", "rslora", "dora", "ia3")
TARGETS = ("q_proj", "v_proj", "down_proj")


def config(variant, **kw):
    return llama2_lora.Config(variant=variant, rank=3, alpha=7.0, targets=TARGETS, **kw)


def ours(variant):
    """A tiny Llama with adapters that have moved away from where they start."""
    model, cfg = tiny(), config(variant)
    llama2_lora.inject(model, cfg.targets, cfg.rank, cfg.alpha, cfg.dropout, cfg.variant)
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
    llama2_lora.save(model, tmp_path / "ours", cfg)
    theirs = PeftModel.from_pretrained(tiny(), tmp_path / "ours", is_trainable=True).eval()
    ids, mask = batch()
    mine, other = (sentiment.network(m)(ids, mask)[mask] for m in (model, theirs))
    parity("LoRA", f"LoRALinear, {variant}" if variant != "ia3" else "IA3Linear", f"peft {variant}", mine, other)
    key = lambda n: n.replace("base_model.model.", "").replace(".default", "").replace(".weight", "")  # noqa: E731
    a = {key(n).replace("magnitude", "lora_magnitude_vector"): g for n, g in gradients(model, mine).items()}
    b = {key(n): g for n, g in gradients(theirs, other).items()}
    b = {n: g.reshape(a[n].shape) for n, g in b.items()}
    parity("LoRA", f"{variant}, gradients", f"peft {variant}", a, b, atol=1e-4)

    theirs.save_pretrained(tmp_path / "theirs")
    again = tiny()
    llama2_lora.load(again, tmp_path / "theirs")
    torch.testing.assert_close(sentiment.network(again)(ids, mask), sentiment.network(model)(ids, mask))


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_0_is_the_base_model_and_peft_starts_there_too(variant):
    ids, mask = batch()
    base, model, cfg = sentiment.network(tiny())(ids, mask), tiny(), config(variant)
    llama2_lora.inject(model, cfg.targets, cfg.rank, cfg.alpha, variant=variant)
    torch.testing.assert_close(sentiment.network(model)(ids, mask), base)
    theirs = llama2_lora.through_peft(tiny(), cfg)
    count = lambda m: sum(p.numel() for p in m.parameters() if p.requires_grad)  # noqa: E731
    assert count(model) == count(theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_equals_unmerged(variant):
    model, _ = ours(variant)
    ids, mask = batch()
    before = sentiment.network(model)(ids, mask)
    merged = llama2_lora.merge(model)
    assert merged is model and not llama2_lora.names(model)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    torch.testing.assert_close(sentiment.network(model)(ids, mask), before, atol=1e-5, rtol=1e-4)


def test_rank_and_number_of_what_is_trained():
    model, cfg = ours("lora")
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    assert torch.linalg.matrix_rank(layer.update()) == cfg.rank
    shapes = {"q_proj": (32, 32), "v_proj": (32, 16), "down_proj": (48, 32)}  # in, out
    by_hand = 2 * sum(cfg.rank * (i + o) for i, o in shapes.values())  # two layers
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == by_hand


def test_modules_trained_whole_move_and_a_wrong_name_is_refused():
    model, cfg = tiny(), config("lora")
    llama2_lora.inject(model, cfg.targets, cfg.rank, cfg.alpha, also=("model.norm",))
    assert model.model.norm.weight.requires_grad and not model.model.layers[0].input_layernorm.weight.requires_grad
    with pytest.raises(run.UserError, match="--also norm"):
        llama2_lora.inject(tiny(), cfg.targets, cfg.rank, cfg.alpha, also=("norm",))


def test_weights_that_are_shared_are_refused():
    """A head that is the embedding, too: adapted or trained alone, it would take the embedding along."""
    for change in ({"also": ("lm_head",)}, {"targets": ("lm_head",)}):
        cfg = config("lora", **change) if "also" in change else llama2_lora.Config(**change)
        with pytest.raises(run.UserError, match="one and the same weight"):
            llama2_lora.inject(tiny(), cfg.targets, cfg.rank, cfg.alpha, also=cfg.also)


def test_flags_that_cannot_be_meant_are_refused():
    for change, message in (({"rank": 0}, "--rank"), ({"dropout": 2.0}, "--dropout"), ({"plus": -1.0}, "--plus")):
        with pytest.raises(run.UserError, match=message):
            llama2_lora.allow(tiny(), llama2_lora.Config(**change))


def test_only_adapters_move_and_lora_plus_moves_b_faster():
    model, cfg = ours("lora")
    assert all(("lora_" in n) == p.requires_grad for n, p in model.named_parameters())
    slow, fast = llama2_lora.groups(model, plus=16)
    assert fast["times"] == 16 * slow["times"] == 16 and len(fast["params"]) == len(slow["params"]) == 6


def test_targets_by_ending_or_expression_and_nothing_outside():
    model = nn.ModuleDict({"vision": nn.ModuleDict({"q_proj": nn.Linear(4, 4)}), "language": tiny()})
    everywhere = llama2_lora.find(model, ("q_proj",))
    assert len(everywhere) == 3
    with pytest.raises(run.UserError, match=r"outside of language: vision\.q_proj"):
        llama2_lora.find(model, ("q_proj",), within="language")
    inside = llama2_lora.find(model, (r"language\..*\.1\..*[qk]_proj",), within="language")
    assert inside == [f"language.model.layers.1.self_attn.{x}_proj" for x in "qk"]
    with pytest.raises(run.UserError, match=r"names no linear layer.*self_attn\.q_proj"):
        llama2_lora.find(model, ("roj",))  # the end of a word is not the end of a name
    with pytest.raises(run.UserError, match="not a regular expression"):
        llama2_lora.find(model, ("q_proj(",))


def test_extra_trained_modules_are_in_the_file_and_a_missing_one_fails(tmp_path):
    model, cfg = ours("lora")
    llama2_lora.save(model, tmp_path, cfg, also=["model.norm"])
    again = tiny()
    with torch.no_grad():
        again.model.norm.weight.fill_(5)
    llama2_lora.load(again, tmp_path)
    assert torch.equal(again.model.norm.weight, model.model.norm.weight)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop("base_model.model.model.norm.weight")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(run.UserError, match=r"missing.*model\.norm"):
        llama2_lora.load(tiny(), tmp_path)


def test_files_say_what_they_are(tmp_path):
    model, cfg = ours("dora")
    llama2_lora.save(model, tmp_path, cfg, base="smollm2")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["use_dora"] and written["r"] == 3 and written["base_model_name_or_path"] == "smollm2"
    written["peft_type"] = "PREFIX_TUNING"
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    with pytest.raises(run.UserError, match="PREFIX_TUNING"):
        llama2_lora.load(tiny(), tmp_path)
    with pytest.raises(run.UserError, match="no adapter in"):
        llama2_lora.load(tiny(), tmp_path / "nowhere")
    for wrong, message in ((b"{}", "of kind None"), (b"[]", "of kind None"), (b"\xff", "no adapter in"),
                           (b'{"peft_type": "LORA"}', "lacks")):  # fmt: skip
        (tmp_path / "adapter_config.json").write_bytes(wrong)
        with pytest.raises(run.UserError, match=message):
            llama2_lora.load(tiny(), tmp_path)


def test_tree_draws_equal_layers_once():
    model, _ = ours("lora")
    lines = llama2_lora.tree(model).splitlines()
    assert len(lines) == 3 and all("2 x" in line for line in lines) and "layers.*.self_attn.q_proj" in lines[0]


def test_changes_are_zero_at_the_start_and_then_those_of_the_merged_weights():
    model, cfg = tiny(), config("lora")
    llama2_lora.inject(model, cfg.targets, cfg.rank, cfg.alpha)
    assert llama2_lora.changes(model) == {t: [0.0, 0.0] for t in ("q_proj", "v_proj", "down_proj")}
    model, _ = ours("lora")
    got = llama2_lora.changes(model)["q_proj"][1]
    before = tiny().model.layers[1].self_attn.q_proj.weight
    after = llama2_lora.merge(model).model.layers[1].self_attn.q_proj.weight
    assert got == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)


def test_dropout_hides_inputs_of_the_correction_only():
    model, _ = ours("lora")
    frozen = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 1.0
    ids, mask = batch()
    base = sentiment.network(tiny())(ids, mask)
    torch.testing.assert_close(sentiment.network(model.train())(ids, mask), base)
    assert not torch.allclose(sentiment.network(frozen)(ids, mask), base)
