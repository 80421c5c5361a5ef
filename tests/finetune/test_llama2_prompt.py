"""Prompt tuning, p-tuning 1 and 2, prefix tuning: each equals PEFT, forward, gradient and files."""

import json
from dataclasses import replace

import pytest
import torch

from finetune import (
    llama2_full,
    llama2_prefix,
    llama2_prompt,
    llama2_ptune,
    llama2_ptune_v2,
    sentiment,
    task_setup,
)
from tests import fuzz
from tests.conftest import gradients
from tests.finetune.test_sentiment import Letters, right
from tests.llamas import batch, learned_positions, tiny
from utils import run

P = 5


def moved(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


def prompt():
    model = tiny()
    soft = moved(llama2_prompt.SoftPrompt(model.get_input_embeddings(), torch.arange(P)))
    return model, soft, llama2_prompt.network(model, soft)


def ptune(encoder):
    model = tiny()
    soft = moved(llama2_ptune.PromptEncoder(P, 32, 12, encoder))
    return model, soft, llama2_prompt.network(model, soft)


def prefix():
    model = tiny()
    soft = moved(llama2_prefix.PrefixEncoder(P, *llama2_prefix.sizes(model), hidden=12))
    return model, soft, llama2_prefix.network(model, soft)


def ptune_v2():
    model = tiny()
    soft = llama2_ptune_v2.DeepPrompt(P, *llama2_prefix.sizes(model))
    return model, soft, llama2_prefix.network(model, soft)


def same_in_peft(name):
    """-> (PEFT's model, its network) for a method of ours."""
    cfg = llama2_ptune.Config(tokens=P, hidden=12)
    if name == "prompt":
        from peft import PromptTuningConfig, get_peft_model

        model = get_peft_model(
            tiny(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
        )
    elif name.startswith("ptune "):
        model = llama2_ptune.through_peft(tiny(), replace(cfg, encoder=name.split()[1]))
    else:
        model = llama2_prefix.through_peft(tiny(), cfg, projection=name == "prefix")
        return model, llama2_prompt.peft_network(model)
    return model, llama2_prompt.peft_network(model)


METHODS = {
    "prompt": prompt, "ptune lstm": lambda: ptune("lstm"), "ptune mlp": lambda: ptune("mlp"),
    "prefix": prefix, "deep": ptune_v2,
}  # fmt: skip
KINDS = {"prompt": "PROMPT_TUNING", "ptune lstm": "P_TUNING", "ptune mlp": "P_TUNING"}


@pytest.mark.parametrize("name", METHODS)
def test_equals_peft(name, parity):
    """The same weights: the same logits, the same gradients."""
    _, soft, network = METHODS[name]()
    theirs, their_network = same_in_peft(name)
    encoder = theirs.prompt_encoder["default"]
    state = soft.state_dict()
    encoder.load_state_dict({"embedding.weight": state["embedding"]} if name == "prompt" else state)
    ids, mask = batch()
    mine, other = network(ids, mask)[mask], their_network(ids, mask)[mask]
    parity("Soft prompts", f"{name}, logits", "peft", mine, other)
    a, b = gradients(soft, mine), gradients(encoder, other)
    b = {k.removesuffix(".weight") if name == "prompt" else k: v for k, v in b.items()}
    parity("Soft prompts", f"{name}, gradients", "peft", a, b, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_files_are_peft_s(name, tmp_path):
    """Written by us and loaded by PEFT; written by PEFT and loaded by us."""
    from peft import PeftModel

    model, soft, network = METHODS[name]()
    kind, extra = KINDS.get(name, "PREFIX_TUNING"), {}
    if name.startswith("ptune"):
        extra = {
            "encoder_hidden_size": 12,
            "encoder_reparameterization_type": name.split()[-1].upper(),
        }
    if name in ("prefix", "deep"):
        _, heads, size = llama2_prefix.sizes(model)
        extra = {
            "token_dim": heads * size,
            "num_attention_heads": heads,
            "prefix_projection": False,
        }
    llama2_prompt.save(tmp_path / "ours", kind, soft(), model, **extra)
    theirs = PeftModel.from_pretrained(tiny(), tmp_path / "ours").eval()
    ids, mask = batch()
    their_network = llama2_prompt.peft_network(theirs)
    torch.testing.assert_close(
        their_network(ids, mask)[mask], network(ids, mask)[mask], atol=1e-5, rtol=1e-4
    )

    fresh, fresh_network = same_in_peft(name)
    fresh.eval().save_pretrained(tmp_path / "theirs")
    numbers = llama2_prompt.load(tmp_path / "theirs", kind)
    again = (llama2_prompt if name in KINDS else llama2_prefix).network(tiny(), lambda: numbers)
    torch.testing.assert_close(
        again(ids, mask)[mask], fresh_network(ids, mask)[mask], atol=1e-5, rtol=1e-4
    )
    with pytest.raises(run.UserError, match="not LORA"):
        llama2_prompt.load(tmp_path / "theirs", "LORA")


@pytest.mark.parametrize("name", METHODS)
def test_padding_on_either_side_says_the_same(name):
    """Generation pads on the left: soft words stay next to the text, whatever lies between."""
    _, _, network = METHODS[name]()
    rows = [[5, 6, 7, 8, 9], [10, 11]]
    out = []
    there = [[True] * 5, [True] * 2]
    for pad in (sentiment.pad, right):
        ids, mask = pad(rows, 1), pad(there, False)
        out.append(network(ids, mask)[mask])
        torch.testing.assert_close(network(ids, mask, 3), network(ids, mask)[:, -3:])
    torch.testing.assert_close(*out, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_but_the_prompt_gets_a_gradient_and_its_size_is_known(name):
    model, soft, network = METHODS[name]()
    model.requires_grad_(False)
    ids, mask = batch()
    network(ids, mask).sum().backward()
    assert all(p.grad is None for p in model.parameters()) and all(
        p.grad is not None for p in soft.parameters()
    )
    lstm = sum(4 * 12 * (i + 12 + 2) for i in (32, 32, 24, 24))  # two layers, two directions
    by_hand = {
        "prompt": P * 32,
        "ptune lstm": P * 32 + lstm + (24 * 24 + 24) + (24 * 32 + 32),
        "ptune mlp": P * 32 + (32 * 12 + 12) + (12 * 12 + 12) + (12 * 32 + 32),
        "prefix": P * 16 + (16 * 12 + 12) + (12 * 64 + 64),  # 2 layers x 2 x 16 numbers a position
        "deep": P * 64,
    }
    assert sum(p.numel() for p in soft.parameters()) == by_hand[name]


def test_soft_words_start_as_words():
    class Tokenizer:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": [int(x) for x in text.split()]}

    assert llama2_prompt.first_words(Tokenizer(), "7 8 9", 5, 120).tolist() == [7, 8, 9, 7, 8]
    assert llama2_prompt.first_words(Tokenizer(), "", 5, 120).max() < 120
    embedding = tiny().get_input_embeddings()
    soft = llama2_prompt.SoftPrompt(embedding, torch.tensor([7, 8]))
    assert torch.equal(soft(), embedding.weight[[7, 8]])
    assert llama2_prompt.nearest(soft(), embedding.weight).tolist() == [7, 8]


@pytest.mark.parametrize("kind", ["gpt2", "opt", "opt-350m"])
def test_soft_words_that_are_words_say_what_words_say_in_models_with_learned_positions(kind):
    model, words, text = learned_positions(kind), [7, 8, 9, 10], [[5, 6, 7], [11, 12]]
    soft = llama2_prompt.SoftPrompt(model.get_input_embeddings(), torch.tensor(words))
    ids, mask = sentiment.pad(text, 1), sentiment.pad([[True] * 3, [True] * 2], False)
    got = llama2_prompt.network(model, soft)(ids, mask, 3)[mask]
    plain = sentiment.network(model)
    rows = [
        plain(torch.tensor([words + t]), torch.ones(1, 4 + len(t), dtype=torch.bool))[0, 4:]
        for t in text
    ]
    torch.testing.assert_close(got, torch.cat(rows), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(plain(ids, mask)[mask], torch.cat(rows), atol=1e-2)
    many = torch.zeros(1, 61, dtype=torch.long)
    with pytest.raises(run.UserError, match="65 positions, this model has 64"):
        llama2_prompt.network(model, soft)(many, many == 0)


SCRIPTS = {
    "prompt": llama2_prompt,
    "ptune": llama2_ptune,
    "prefix": llama2_prefix,
    "deep": llama2_ptune_v2,
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_saved_is_what_was_trained_in_the_end_and_names_its_base(
    name, monkeypatch, tmp_path, capsys
):
    """Training is replaced by noise on what moves: the file holds the prompt after it, the encoder is gone."""
    script, found = SCRIPTS[name], {}
    # Words half as wide as layers
    model = learned_positions("opt-350m") if name == "ptune" else tiny()
    model.config._name_or_path = str(tmp_path)

    def experiment(cfg, bench, network, whole, groups=None):
        moving = {n for n, p in whole.named_parameters() if p.requires_grad}
        assert moving and all(n.startswith("soft.") for n in moving)
        with torch.no_grad():
            for p in llama2_full.trainable_parameters(whole):
                p.add_(0.1 * torch.randn_like(p))
            found["logits"] = network(*text)
        return {}

    text = batch()
    bench = task_setup.Bench(tmp_path, torch.device("cpu"), Letters(), model, {})
    monkeypatch.setattr(
        task_setup, "start", lambda cfg, *allow, before=0: found.update(before=before) or bench
    )
    monkeypatch.setattr(llama2_full, "experiment", experiment)
    script.main(script.Config(tokens=P, **({"hidden": 12} if name in ("ptune", "prefix") else {})))
    kind = {"prompt": "PROMPT_TUNING", "ptune": "P_TUNING"}.get(name, "PREFIX_TUNING")
    prompt = llama2_prompt.load(tmp_path / "adapter", kind)
    assert len(prompt) == P == found["before"]
    network = (llama2_prefix if kind == "PREFIX_TUNING" else llama2_prompt).network(
        model, lambda: prompt
    )
    torch.testing.assert_close(network(*text), found["logits"], atol=1e-5, rtol=1e-4)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path.resolve())
    assert str(tmp_path / "adapter") in capsys.readouterr().out


def test_settings_of_a_prompt_that_are_not_known_are_refused_by_name(tmp_path):
    model, soft, _ = prompt()
    llama2_prompt.save(tmp_path, "PROMPT_TUNING", soft(), model)
    path = tmp_path / "adapter_config.json"
    written = json.loads(path.read_text())
    for change in (
        {"num_transformer_submodules": 2},
        {"modules_to_save": ["lm_head"]},
        {"new_key": 1},
    ):
        path.write_text(json.dumps(written | change))
        with pytest.raises(run.UserError, match=f"{next(iter(change))}.*does not know"):
            llama2_prompt.load(tmp_path, "PROMPT_TUNING")
    weights = tmp_path / "adapter_model.safetensors"
    from safetensors.torch import save_file

    # No hash, as PEFT writes it
    save_file({"prompt_embeddings": soft().detach()[:3].clone()}, weights)
    path.write_text(json.dumps(written))
    with pytest.raises(run.UserError, match=r"shape \(3, 32\) for 5 num_virtual_tokens"):
        llama2_prompt.load(tmp_path, "PROMPT_TUNING")


def test_500_damaged_prompts_are_refused_or_read_right(tmp_path):
    model, soft, _ = prompt()
    llama2_prompt.save(tmp_path, "PROMPT_TUNING", soft(), model)
    settings, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    good, whole, stored, read = (
        json.loads(settings.read_text()),
        weights.read_bytes(),
        settings.read_bytes(),
        0,
    )
    cases = [(weights, bad) for bad in fuzz.damaged(whole, 200)]
    cases += [(settings, bad) for bad in fuzz.damaged(stored, 150)]
    cases += [(settings, json.dumps(bad).encode()) for bad in fuzz.retyped(good, 150)]
    for path, bad in cases:
        settings.write_bytes(stored)
        weights.write_bytes(whole)
        path.write_bytes(bad)
        got = fuzz.reads_or_refuses(lambda: llama2_prompt.load(tmp_path, "PROMPT_TUNING"))
        if got is not None:
            read += 1
            assert torch.equal(got, soft())
    assert 0 < read < 200
