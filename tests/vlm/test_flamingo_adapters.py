"""vlm/flamingo_adapters.py: LoRA in both halves of a Flamingo is PEFT's: files, logits, gradients, what learns."""

import json
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune import lora_inject
from tests import eyes
from tests.conftest import gradients
from utils.run import UserError
from vlm import few_shot, flamingo, flamingo_adapters, flamingo_model

IMAGE, END = 98, 99
LORA = {
    "rank": 2, "lora_alpha": 3.0, "lora_dropout": 0.0, "bias": "none", "modules_to_save": (),
    "targets": ("q_proj", "v_proj"), "lora_in": "both",
}  # fmt: skip
WHOLE = ("resampler", "gate_attention", "new_embeddings")


def options(**more):
    return SimpleNamespace(**(LORA | more))


def model(kind="llama"):
    torch.manual_seed(3)
    made = flamingo_model.Flamingo(
        eyes.speaker(kind), [IMAGE, END], dim_in=16, every=1, latents=3, latent_width=12
    )
    return eyes.shake(made.eval(), 0.2)


def text():
    return torch.tensor(
        [[1, 7, IMAGE, 8, END, IMAGE, 9, 10, END], [1, IMAGE, 11, 12, END, 13, IMAGE, 14, END]]
    )


def features():
    return torch.randn(2, 2, 4, 16, generator=torch.Generator().manual_seed(1))


def moved(made):
    """All that learns moved, as training would."""
    with torch.no_grad():
        for p in made.trainable_parameters().values():
            p.add_(0.3 * torch.randn_like(p))
    return made


def adapted(kind="llama", **more):
    made, cfg = model(kind), options(**more)
    flamingo_adapters.add_lora(made, cfg)
    return moved(made), cfg


def run(made):
    return made(text(), made.resample(features()))


def our_name(name):
    """PEFT's name of a parameter -> ours."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
    for half in "AB":
        name = name.replace(f".lora_{half}.default.weight", f".lora_{half}")
    return name.replace(".base_layer.", ".base.")


def through_peft(folder, kind="llama", trainable=True):
    from peft import PeftModel

    return PeftModel.from_pretrained(model(kind), folder, is_trainable=trainable).eval()


CASES = [
    ("llama", {}),
    ("llama", {"modules_to_save": WHOLE}),
    ("llama", {"lora_in": "gated", "targets": ("up_proj", "o_proj")}),
    ("llama", {"lora_in": "language", "modules_to_save": ("cross", "resampler")}),
    ("llama", {"lora_in": "gated", "modules_to_save": ("embed_tokens", "lm_head")}),
    ("qwen2", {"bias": "lora_only", "modules_to_save": WHOLE}),
    ("opt", {"bias": "lora_only", "lora_dropout": 0.3}),
    ("opt", {"bias": "all"}),
    ("opt", {"bias": "all", "modules_to_save": WHOLE}),
]


@pytest.mark.parametrize(("kind", "more"), CASES)
def test_lora_in_both_halves_is_that_of_peft(parity, tmp_path, kind, more):
    ours, cfg = adapted(kind, **more)
    flamingo_adapters.save(ours, tmp_path, cfg)
    theirs = through_peft(tmp_path, kind)
    name = "peft PeftModel.from_pretrained, over our Flamingo"
    parity("Flamingo", "flamingo_adapters.save", name, run(ours), run(theirs))
    mine, them = gradients(ours, run(ours)), gradients(theirs, run(theirs))
    them = {our_name(key): gradient for key, gradient in them.items()}
    assert len(mine) >= 8
    parity("Flamingo", "flamingo_adapters.save, gradients", name, mine, them, 1e-4)
    # what learns is the same; and a folder that PEFT wrote loads here
    learns = {our_name(key) for key, p in theirs.named_parameters() if p.requires_grad}
    assert learns == ours.trainable_parameters().keys()
    theirs.save_pretrained(tmp_path / "theirs")
    again = model(kind)
    flamingo_adapters.load(again, tmp_path / "theirs")
    assert torch.equal(run(again), run(ours))
    assert again.trainable_parameters().keys() == learns


def test_peft_alone_adapts_what_our_flags_name(tmp_path):
    """The same options by PEFT from the start: the same parameters, and the base model at step 0."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2, lora_alpha=3.0, bias="all", modules_to_save=list(WHOLE), target_modules=r"(language|cross)\..*(q|v)_proj"
    )  # fmt: skip
    theirs = get_peft_model(model("opt"), config).eval()
    ours = model("opt")
    flamingo_adapters.add_lora(ours, options(bias="all", modules_to_save=WHOLE))
    learns = {our_name(key) for key, p in theirs.named_parameters() if p.requires_grad}
    assert learns == ours.trainable_parameters().keys()
    plain = run(model("opt"))
    torch.testing.assert_close(run(ours), plain, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(run(theirs), plain, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("more", "count"),
    [
        ({"lora_in": "gated"}, 4),
        ({"lora_in": "language"}, 4),
        ({"lora_in": "both"}, 8),
        ({"lora_in": "both", "targets": ("q_proj", "down_proj")}, 8),
        ({"lora_in": "language", "targets": (r"model\.layers\.1\..*proj",)}, 7),
    ],
)
def test_targets_are_found_in_the_part_that_is_asked_for(more, count):
    names = flamingo_adapters.add_lora(made := model(), options(**more))
    assert sorted(names) == sorted(lora_inject.names(made)) and len(names) == count
    parts = {name.split(".")[0] for name in names}
    assert parts == {"gated": {"cross"}, "language": {"language"}}.get(
        more["lora_in"], {"cross", "language"}
    )


def test_the_written_configuration_holds_the_flags(tmp_path):
    ours, cfg = adapted("opt", bias="lora_only", lora_dropout=0.25, modules_to_save=WHOLE)
    flamingo_adapters.save(ours, tmp_path, cfg)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    wanted = {
        "r": 2,
        "lora_alpha": 3.0,
        "lora_dropout": 0.25,
        "bias": "lora_only",
        "task_type": None,
    }
    assert wanted.items() <= written.items()
    assert sorted(written["modules_to_save"]) == [
        "cross.0.gate_attention", "cross.1.gate_attention", "new_embeddings", "resampler"
    ]  # fmt: skip


def test_dropout_is_on_in_lora_alone_and_off_until_it_is_asked_for():
    ours, _ = adapted("gpt2", lora_in="gated", lora_dropout=0.5)
    names = lora_inject.names(ours)
    assert {m.p for m in ours.cross.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}
    still = run(ours)
    assert torch.equal(run(ours), still)  # a model in evaluation stays so
    flamingo_adapters.dropout_on(ours)
    assert not torch.allclose(run(ours), still, atol=1e-3)
    on = {name for name, m in ours.named_modules() if m.training}
    assert on == {f"{name}.dropout" for name in names}
    assert torch.equal(run(ours.eval()), still)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_removing_lora_brings_the_model_from_before_back(bias):
    ours, before = model("opt"), run(model("opt"))
    flamingo_adapters.add_lora(ours, options(bias=bias, modules_to_save=WHOLE))
    kept = flamingo_adapters.trained_whole(ours)
    assert not [name for name in kept if ".lora_" in name] and "resampler.latents" in kept
    moved(ours)
    assert not torch.allclose(run(ours), before, atol=1e-2)
    flamingo_adapters.remove_lora(ours, kept)
    assert torch.equal(run(ours), before) and not lora_inject.names(ours)
    assert ours.state_dict().keys() == model("opt").state_dict().keys()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"rank": 0}, "--rank and --lora_alpha must be above 0"),
        ({"lora_alpha": 0.0}, "--lora_alpha must be above 0"),
        ({"lora_dropout": 1.0}, "--lora_dropout 0 or more, below 1"),
        ({"targets": ("c_attn",)}, "--targets c_attn names no linear layer"),
        ({"targets": ("lm_head",)}, "--targets lm_head names no linear layer"),  # not in the gated layers
        ({"targets": ("fc1",), "lora_in": "gated"}, "names no linear layer"),
        ({"modules_to_save": ("gate",)}, "--modules_to_save gate: there is no such module"),
        ({"modules_to_save": ("cross",)}, r"--modules_to_save cross.0 holds \['cross.0.q_proj'\]"),
        ({"modules_to_save": ("cross.0.q_proj",)}, "cross.0.q_proj holds"),
        ({"modules_to_save": ("resampler", "resampler.norm")}, "resampler holds"),
        ({"modules_to_save": ("language.model.layers.0",), "lora_in": "gated"}, "a gated layer hangs on it"),
    ],
)  # fmt: skip
def test_flags_that_do_not_fit_are_refused_and_nothing_is_changed(more, says):
    made = model()
    names = list(made.state_dict())
    with pytest.raises(UserError, match=says) as error:
        flamingo_adapters.add_lora(made, options(**more))
    assert "\n" not in str(error.value)
    assert list(made.state_dict()) == names and made.trainable_parameters()


def test_a_tied_embedding_is_refused():
    with pytest.raises(UserError, match="one and the same weight"):
        flamingo_adapters.check_lora(
            model("opt"), options(modules_to_save=("embed_tokens",), lora_in="gated")
        )


def test_an_adapter_of_another_flamingo_is_refused(tmp_path):
    ours, cfg = adapted()
    flamingo_adapters.save(ours, tmp_path, cfg)
    torch.manual_seed(3)
    other = flamingo_model.Flamingo(
        eyes.speaker(), [IMAGE, END], dim_in=16, every=2, latents=3, latent_width=12
    )
    with pytest.raises(UserError, match="without a place"):
        flamingo_adapters.load(other, tmp_path)


def test_lora_learns_at_its_own_rate_and_what_is_whole_at_that_of_layers(monkeypatch):
    groups, clipped = [], []

    class Watched(torch.optim.AdamW):
        def __init__(self, given, lr):
            groups.extend(given)
            super().__init__(given, lr)

    monkeypatch.setattr(few_shot.torch.optim, "AdamW", Watched)
    monkeypatch.setattr(
        few_shot.nn.utils, "clip_grad_norm_", lambda parameters, most: clipped.extend(parameters)
    )
    made, _ = adapted(modules_to_save=WHOLE)
    cfg = SimpleNamespace(steps=1, batch=4, longest=2, lr=0.25, lora_lr=0.5, seed=0)
    chunks = [[IMAGE, 20, END], [IMAGE, 21, END]]
    kinds = torch.arange(8) % 2
    list(few_shot.train(made, torch.randn(8, 4, 16), kinds, 1, chunks, cfg, torch.device("cpu")))
    rest, gates, lora = groups
    learns = made.trainable_parameters()
    tops = {0.25: rest, 2.5: gates, 0.5: lora}
    assert {top: group["top"] for top, group in tops.items()} == {top: top for top in tops}
    names = {id(p): name for name, p in made.named_parameters()}
    assert {names[id(p)] for p in lora["params"]} == {n for n in learns if ".lora_" in n}
    assert {names[id(p)] for p in rest["params"]} == {
        n for n in learns if n.startswith(("resampler.", "new_embeddings."))
    }
    assert all(".gate_" in names[id(p)] for p in gates["params"])
    assert {id(p) for p in clipped} >= {id(p) for p in learns.values()}


def test_keys_of_a_tutorial_that_peft_refuses():
    """`lora_target_modules` and task_type "VL": the page quotes both lines and names the right keys."""
    from peft import LoraConfig, get_peft_model

    shared: Any = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none"}
    with pytest.raises(TypeError) as first:
        wrong: Any = {"lora_target_modules": ["q_proj", "v_proj"]}
        LoraConfig(**wrong, **shared)
    with pytest.raises(ValueError) as second:
        LoraConfig(target_modules=["q_proj", "v_proj"], task_type="VL", **shared)
    page = (flamingo.WEIGHTS.parent.parent / "flamingo_lora.md").read_text("utf-8")
    for error in (first, second):
        assert str(error.value) in page
    # the right keys
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = LoraConfig(target_modules=["q_proj", "v_proj"], task_type=None, **shared)
    made = get_peft_model(model(), right)
    assert [name for name, _ in made.named_parameters() if "lora_A" in name]
