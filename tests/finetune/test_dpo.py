"""finetune/dpo.py: what is masked, what the reference is, who is chosen; the step equals TRL's; the run resumes."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from finetune import completion_logps, dpo, llama2_full, lora_inject, sentiment
from finetune.preference_data import Pair
from tests.conftest import gradients
from tests.llamas import folder, tiny, tokenizer
from tests.preferences import PAIRS, direct, fake, policy
from utils import run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("tiny") / "model")


def test_the_sum_is_over_the_completion_alone():
    """No prompt, no padding; the end token counts."""
    model, _ = policy()
    batch = completion_logps.pairs_to_batch(tokenizer(), PAIRS)
    found = dpo.logps(model, *batch)
    rows = [(p.prompt, p.chosen) for p in PAIRS] + [(p.prompt, p.rejected) for p in PAIRS]
    alone = torch.stack([direct(model, *row) for row in rows])
    torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-5)
    # another prompt of as many tokens changes the condition, not what is counted
    assert batch[2].sum(-1).tolist() == [len(tokens) for _, tokens in rows]


def test_the_sequence_is_shifted_by_one():
    """Logits that are certain of the next token give log p = 0; those of the token itself do not."""
    ids = torch.tensor([[3, 1, 4, 2]])
    completion = torch.tensor([[False, False, True, True]])
    certain = torch.full((1, 4, 6), -50.0)
    certain[0, torch.arange(3), ids[0, 1:]] = 50.0
    assert float(completion_logps.sequence_logps(certain, ids, completion)) == 0.0
    assert float(completion_logps.sequence_logps(certain.roll(1, 1), ids, completion)) < -50


def test_the_reference_is_the_untouched_model():
    """Adapters off, dropout off, no gradient; afterwards all of it is back, after an error, too."""
    model, base = policy(dropout=0.5)
    model.train()
    # a weight that is trained besides the adapters
    model.model.norm.weight.requires_grad_(True)
    batch = completion_logps.pairs_to_batch(tokenizer(), PAIRS)
    adapted = {name: model.get_submodule(name) for name in lora_inject.names(model)}
    with dpo.reference(model) as frozen:
        assert not lora_inject.names(frozen) and not frozen.training
        found = dpo.logps(frozen, *batch)
    assert not found.requires_grad
    assert torch.equal(found, dpo.logps(base, *batch).detach())
    with pytest.raises(KeyError), dpo.reference(model):
        raise KeyError
    assert model.training and all(model.get_submodule(n) is m for n, m in adapted.items())
    assert dpo.logps(model, *batch).requires_grad


def history():
    return {"loss": [], "chosen": [], "rejected": [], "accuracy": []}


@pytest.mark.parametrize("kind", ["sigmoid", "simpo"])
def test_the_objective_is_the_loss_of_policy_and_reference(kind):
    model, base = policy()
    cfg = dpo.Config(kind=kind, beta=0.3, gamma=0.2)
    seen = history()
    found = dpo.objective(model, cfg, seen, *completion_logps.pairs_to_batch(tokenizer(), PAIRS))
    # from log-probabilities of each row alone
    sides = {}
    for name, network in {"policy": model, "reference": base}.items():
        for side in ("chosen", "rejected"):
            rows = [direct(network, p.prompt, getattr(p, side)) for p in PAIRS]
            sides[f"{name} {side}"] = torch.stack(rows)
    tokens = [torch.tensor([len(getattr(p, s)) for p in PAIRS]) for s in ("chosen", "rejected")]
    each = dpo.loss(*sides.values(), beta=0.3, kind=kind, tokens=tokens, gamma=0.2)
    torch.testing.assert_close(found, each.mean(), atol=1e-4, rtol=1e-4)
    # what is watched
    won = sides["policy chosen"] - sides["reference chosen"]
    lost = sides["policy rejected"] - sides["reference rejected"]
    assert seen["chosen"][0] == pytest.approx(float(won.mean()), abs=1e-4)
    assert seen["rejected"][0] == pytest.approx(float(lost.mean()), abs=1e-4)
    assert seen["accuracy"][0] == pytest.approx(float((won > lost).float().mean()))


def test_a_step_equals_one_of_trl(tmp_path, parity):
    """DPOTrainer with PEFT's adapters: its batches, its reference with adapters off, its loss, its gradients."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    texts = {"prompt": [], "chosen": [], "rejected": []}
    for p in PAIRS:
        for side in ("chosen", "rejected"):
            texts[side].append(tokenizer().decode(getattr(p, side), skip_special_tokens=True))
        texts["prompt"].append(p.prompt)
    about = DPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=3, beta=0.3, use_cpu=True, bf16=False,
        report_to=[], gradient_checkpointing=False, disable_dropout=True, dataloader_pin_memory=False,
    )  # fmt: skip
    lora = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    words = len(tokenizer())
    data = Dataset.from_dict(texts)
    made = {"args": about, "train_dataset": data, "processing_class": tokenizer()}
    trainer = DPOTrainer(tiny(vocabulary=words), peft_config=lora, **made)

    def key(name):
        return name.replace("base_model.model.", "").replace(".default", "").replace(".weight", "")

    # our adapters are theirs
    model, _ = policy()
    ours = dict(model.named_parameters())
    for name, p in trainer.model.named_parameters():
        if "lora_" in name:
            p.data.copy_(ours[key(name)].data)
    inputs = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, inputs)
    # the rows that TRL has made, in its order, as pairs of ours
    rows = []
    for ids, counted in zip(inputs["input_ids"].tolist(), inputs["completion_mask"].bool()):
        first = int(counted.int().argmax())
        rows.append((tokenizer().decode(ids[:first]), tuple(torch.tensor(ids)[counted].tolist())))
    assert len({len(row[1]) for row in rows}) > 1 and all(row[1][-1] == 2 for row in rows)
    pairs = [Pair(a[0], a[1], b[1], 1.0) for a, b in zip(rows[:3], rows[3:])]
    batch = completion_logps.pairs_to_batch(tokenizer(), pairs)
    mine = dpo.objective(model, dpo.Config(beta=0.3), history(), *batch)
    parity("DPO", "dpo.objective", "trl DPOTrainer.compute_loss", mine, theirs)
    a = gradients(model, mine)
    b = {key(name): g for name, g in gradients(trainer.model, theirs).items()}
    parity("DPO", "dpo.objective, gradients", "trl DPOTrainer.compute_loss", a, b, atol=1e-5)


def config(place, out, **kw):
    about = {"prompts": 20, "held_out": 6, "steps": 3, "batch": 4, "max_new_tokens": 6}
    return dpo.Config(model=place, out=str(out), device="cpu", **about | kw)


def test_a_run_writes_what_it_promises_and_learns_its_pairs(place, tmp_path, monkeypatch):
    fake(monkeypatch)
    metrics = dpo.main(config(place, tmp_path, steps=30, lr=5e-2, beta=1.0))
    names = {path.name for path in tmp_path.iterdir()}
    assert {"rewards.png", "loss.png", "history.json", "texts.json", "metrics.json"} <= names
    seen = json.loads((tmp_path / "history.json").read_text())
    # the first batch: the policy is the reference, and its loss is log 2
    assert seen["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert seen["chosen"][0] == seen["rejected"][0] == 0.0
    assert sum(seen["loss"][-4:]) / 4 < 0.5 and sum(seen["accuracy"][-4:]) / 4 > 0.8
    assert metrics["win rate"]["low"] <= metrics["win rate"]["mean"] and len(seen["loss"]) == 30
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_resume_is_bit_exact(place, tmp_path, monkeypatch):
    fake(monkeypatch)
    about = {"steps": 4, "save_every": 2, "dropout": 0.1}
    whole = dpo.main(config(place, tmp_path / "whole", **about))
    cfg = config(place, tmp_path / "broken", **about)
    real, calls = llama2_full.step, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama2_full, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            dpo.main(cfg)
    again = dpo.main(replace(cfg, resume=True))
    assert again["final_loss"] == whole["final_loss"]
    files = [
        tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "broken")
    ]
    a, b = map(load_file, files)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (tmp_path / "whole/history.json").read_text() == (
        tmp_path / "broken/history.json"
    ).read_text()


def test_every_pair_is_drawn_once_before_any_is_again(monkeypatch):
    cfg = dpo.Config(batch=3, seed=1)
    monkeypatch.setattr(completion_logps, "pairs_to_batch", lambda tokenizer, pairs: pairs)
    pairs = list(range(10))
    first = [x for i in range(3) for x in dpo.draw(None, pairs, cfg, i)]
    assert len(set(first)) == 9
    assert [x for i in range(3, 6) for x in dpo.draw(None, pairs, cfg, i)] != first
    assert dpo.draw(None, pairs, replace(cfg, seed=2), 0) != first[:3]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"batch": 0}, "start at 1"),
        ({"beta": 0.0}, "above 0"),
        ({"smoothing": 0.5}, "below 0.5"),
        ({"samples": 1}, "two sides"),
        ({"min_new_tokens": 9}, "not less"),
        ({"least": 0.0}, "--least"),
        ({"prompts": 2, "batch": 9}, "gave . pairs, and a batch has 9"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(
    change, says, place, tmp_path, monkeypatch
):
    fake(monkeypatch)
    out = tmp_path / "out"
    with pytest.raises(run.UserError, match=says):
        dpo.main(config(place, out, **change))
    assert not out.exists()


def test_padding_is_on_the_left_and_masked():
    ids, mask, completion = completion_logps.pairs_to_batch(tokenizer(), PAIRS)
    assert mask[:, -1].all() and not mask.all()
    assert (completion & ~mask).sum() == 0
    assert sentiment.IGNORE not in ids.tolist()
