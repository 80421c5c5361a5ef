"""training/accelerate_train.py: it learns what the plain loop learns, on one rank and two, and resumes bit for bit."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.llamas import folder
from tests.training.test_llama2_clm_sft_lora_with_zero import ROWS, Engine, economical, give, linear
from training import accelerate_train, faq, ranks, sft
from utils import pretrained, run

TIME = timedelta(seconds=60)  # a deadlock ends here


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    settings = {
        "steps": 4,
        "batch": 2,
        "length": 64,
        "lr": 1e-2,
        "precision": "fp32",
        "save_every": 2,
    }
    return accelerate_train.Config(model=folder(out / "tiny"), out=str(out), **settings)


def jobs(cfg):
    """On every rank: a run, the same one killed on its way and resumed, and what cannot be resumed."""
    economical()
    n, real, found, calls = dist.get_world_size(), sft.loss, {}, []

    def go(name, **kw):
        found[name] = accelerate_train.worker(replace(cfg, out=f"{cfg.out}/{name} {n}", **kw))

    def dies(*args):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    go("whole")
    sft.loss = dies
    with suppress(KeyboardInterrupt):
        go("killed")
    sft.loss = real
    go("killed", resume=True)
    if n == 1:
        go("parts", accumulation=2)
    if dist.get_rank() == 0:
        shutil.copytree(f"{cfg.out}/killed {n}", f"{cfg.out}/damaged {n}")
        path = Path(cfg.out, f"damaged {n}", "checkpoints", "step4", "optimizer.bin")
        path.write_bytes(path.read_bytes()[:-1])
    dist.barrier()
    for name, kw in (("damaged", {}), ("killed", {"lr": 1.0}), ("nothing", {})):
        with suppress(run.UserError):
            try:
                go(name, resume=True, **kw)
            except run.UserError as error:
                found[f"{name}, {len(kw)}"] = str(error)
    return found


@pytest.fixture(scope="module")
def found(cfg):
    """{number of ranks: [what each did]}"""
    return {n: ranks.launch(jobs, cfg, n, TIME) for n in (1, 2)}


@pytest.fixture(scope="module")
def plain(cfg):
    """The same training by hand, with the parts given -> function of the number of parts to losses and adapter."""
    dist.init_process_group("gloo", f"file://{cfg.out}/meet", rank=0, world_size=1)
    tokenizer, model = sft.prepare(cfg)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    learn, _ = faq.conversations(tokenizer, cfg.length)

    def loop(parts):
        moving = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, p in moving.items():
                p.copy_(start[name])
        optimizer, losses = torch.optim.AdamW(moving.values(), weight_decay=0.0), []
        for step in range(cfg.steps):
            optimizer.param_groups[0]["lr"] = linear(cfg, step)
            texts, tokens = faq.draw(
                learn, replace(cfg, accumulation=parts), step, tokenizer.eos_token_id
            )
            value = sum(sft.loss(model, *part) for part in texts) / tokens
            value.backward()
            torch.nn.utils.clip_grad_norm_(moving.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(value.item())
        return torch.tensor(losses), {
            n.replace(".default", ""): p.detach().clone() for n, p in moving.items()
        }

    yield loop
    dist.destroy_process_group()


def adapter(cfg, name):
    return load_file(f"{cfg.out}/{name}/adapter/adapter_model.safetensors")


@pytest.mark.long
@pytest.mark.parametrize("n, name, parts", [(1, "whole", 1), (2, "whole", 2), (1, "parts", 2)])
def test_it_learns_what_the_plain_loop_learns(n, name, parts, cfg, found, plain, parity):
    """Two ranks, or one rank with two parts, are the plain loop with two parts."""
    losses, weights = plain(parts)
    what = f"{n} rank{'s' * (n > 1)}{', 2 parts' * (name == 'parts')}"
    parity(
        "Fine-tuning with accelerate",
        f"losses, {what}",
        "plain loop",
        torch.tensor(found[n][0][name]["losses"]),
        losses,
    )
    parity(
        "Fine-tuning with accelerate",
        f"weights, {what}",
        "plain loop",
        adapter(cfg, f"{name} {n}"),
        weights,
        atol=1e-4,
    )
    assert losses[-1] < losses[0] - 0.01
    assert all(r[name]["losses"] == found[n][0][name]["losses"] for r in found[n])


@pytest.mark.long
@pytest.mark.parametrize("n", (1, 2))
def test_resume_is_bit_exact(n, cfg, found):
    for r in found[n]:
        assert all(r["whole"][key] == r["killed"][key] for key in ("losses", "before", "after"))
    a, b = (Path(cfg.out, f"{name} {n}", "checkpoints", "step4") for name in ("whole", "killed"))
    for file in ("model.safetensors", "rank0.safetensors", f"rank{n - 1}.safetensors"):
        x, y = load_file(a / file), load_file(b / file)
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    x, y = (torch.load(f / "optimizer.bin", weights_only=True)["state"] for f in (a, b))
    assert x.keys() == y.keys() and all(torch.equal(x[i][k], y[i][k]) for i in x for k in x[i])


@pytest.mark.long
@pytest.mark.parametrize("n", (1, 2))
def test_what_cannot_be_resumed_says_why(n, found):
    for r in found[n]:
        assert "optimizer.bin is damaged" in r["damaged, 0"]
        assert "--lr 0.01" in r["killed, 1"] and "no checkpoint in" in r["nothing, 0"]


@pytest.mark.long
def test_the_adapter_loads_in_plain_peft(cfg, found):
    from peft import PeftModel

    tokenizer, base = pretrained.language_model(cfg.model)
    model = PeftModel.from_pretrained(base.float(), f"{cfg.out}/whole 2/adapter").eval()
    _, rows = faq.conversations(tokenizer, cfg.length)
    with torch.no_grad():
        total = sum(
            sft.loss(model, *faq.pad([row], tokenizer.eos_token_id)).item() for row in rows[:4]
        )
    score = total / sum(faq.count_supervised(labels) for _, labels in rows[:4])
    assert score == pytest.approx(found[2][0]["whole"]["after"], rel=1e-5)
    assert score < found[2][0]["whole"]["before"] - 0.01


@pytest.mark.long
def test_torchrun_and_python_agree_to_the_last_bit(cfg, found):
    words = [
        Path(sys.executable).parent / "torchrun",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(29600 + os.getpid() % 300),
    ]
    words += ["training/accelerate_train.py", "--model", cfg.model, "--out", f"{cfg.out}/torchrun"]
    words += "--steps 4 --batch 2 --length 64 --lr 1e-2 --precision fp32".split()
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        json.loads(Path(cfg.out, "torchrun", "losses.json").read_text())
        == found[2][0]["whole"]["losses"]
    )
    files = {p.name for p in Path(cfg.out, "torchrun").iterdir()}
    assert files >= {"adapter", "config.json", "loss.png", "losses.json", "metrics.json"}
    names: dict = {}
    exec(
        "\n".join(done.stdout.split("use it:\n")[1].splitlines()[:3]), names
    )  # the printed lines load adapter, base and tokenizer
    assert (
        names["tokenizer"].chat_template
        and names["model"].peft_config["default"].r == cfg.lora_rank
    )


class Accelerator(Engine):
    """With the interface of accelerate's."""

    sync_gradients = True

    @contextmanager
    def accumulate(self, _):
        self.sync_gradients = (self.seen + 1) % self.parts == 0
        yield

    def parameters(self):
        return "parameters"

    def clip_grad_norm_(self, what, most):
        self.clipped.append((self.seen, what, most))

    def zero_grad(self):
        pass


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_is_the_mean_over_all_tokens_and_clipped_once(parts, monkeypatch):
    cfg = accelerate_train.Config(batch=2, accumulation=parts, steps=40, lr=1.0)
    total, sides = 0.0, [Accelerator(parts, 2) for _ in range(2)]
    for rank, side in enumerate(sides):
        give(monkeypatch, 2, rank)
        total += next(accelerate_train.train(side, side, side, ROWS, cfg, 1))
    _, tokens = faq.draw(ROWS, cfg, 0, 1)
    give(monkeypatch, 1, 0)
    texts, _ = faq.draw(ROWS, replace(cfg, accumulation=2 * parts), 0, 1)
    right = sum(float(sft.loss(None, *part)) for part in texts) / tokens
    assert total == pytest.approx(right) and sum(side.gradient for side in sides) == pytest.approx(
        right
    )
    for side in sides:
        assert side.clipped == [(parts, "parameters", 1.0)] and side.rates[0] == linear(cfg, 0)


@pytest.mark.long
def test_other_ranks_are_refused(cfg, found):
    with pytest.raises(run.UserError, match="was written by 2 ranks, here are 1"):
        sft.last_checkpoint(replace(cfg, out=f"{cfg.out}/whole 2"))


@pytest.mark.parametrize("flags", [{"batch": 0}, {"accumulation": 0}, {"lr": -1.0}, {"length": 1}])
def test_wrong_flags(flags, tmp_path):
    with pytest.raises(run.UserError, match="must be above"):
        accelerate_train.main(replace(accelerate_train.Config(out=str(tmp_path / "new")), **flags))
    assert not (tmp_path / "new").exists()
