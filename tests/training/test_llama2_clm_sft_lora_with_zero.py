"""training/llama2_clm_sft_lora_with_zero.py: every stage and every launcher learn the same; checkpoints survive."""

import copy
import functools
import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tests.conftest import ROOT
from tests.llamas import folder
from training import faq, ranks, sft, zero_config
from training import llama2_clm_sft_lora_with_zero as script
from training.lr_schedule import learning_rate
from utils import checkpoint, pretrained, run

TIME = timedelta(seconds=60)  # a deadlock ends here
IDS = torch.arange(2, 34).reshape(2, 16)
# What two ranks do, one after the other; the first two are counted: what is left of others would count
RUNS = {
    "stage 2": {"zero_stage": 2, "tensorboard": True},
    "stage 3": {"zero_stage": 3, "save_every": 2},
    "stage 1": {"zero_stage": 1},
    "stage 0": {"zero_stage": 0},
    "stage 0, bf16": {"zero_stage": 0, "precision": "bf16"},
    "stage 2, bf16": {"zero_stage": 2, "precision": "bf16"},
    "offload, checkpointing": {"zero_stage": 3, "offload": "parameters", "checkpointing": True},
    "full": {"zero_stage": 3, "method": "full"},
}


def linear(cfg, step):
    """The schedule of both scripts, with a warm-up of a tenth."""
    return learning_rate(step, cfg.steps, cfg.lr, warmup=cfg.steps // 10, decay="linear")


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    settings = {"steps": 4, "batch": 2, "length": 64, "lr": 1e-2, "precision": "fp32"}
    return script.Config(model=folder(out / "tiny"), out=str(out), **settings)


def economical():
    """In a process of its own: tokenizer, model and texts of all runs are read once; four held-out texts are enough."""
    read, conversations, texts = functools.cache(pretrained.language_model), faq.conversations, {}

    def language_model(name):
        tokenizer, model = read(name)
        return tokenizer, copy.deepcopy(model)

    def few(tokenizer, length):
        if length not in texts:
            texts[length] = conversations(tokenizer, length)
        learn, held_out = texts[length]
        return learn, held_out[:4]

    pretrained.language_model, faq.conversations = language_model, few


def jobs(cfg):
    """On every rank: the runs, with logits of what each trained; one is killed, resumed, damaged, and resumed again."""
    economical()
    real_loss, real_whole, found, calls, digests = sft.loss, script.trained_weights, {}, [], {}

    def go(name, **kw):
        def whole(engine):
            logits = engine(input_ids=IDS, use_cache=False).logits.detach()
            if dist.get_rank() == 0:
                save_file({"logits": logits.clone()}, f"{cfg.out}/{name}/logits.safetensors")
            states = getattr(engine.optimizer, "optimizer", engine.optimizer).state.items()
            kept = {
                f"{i} {k}": x
                for i, (p, state) in enumerate(states)
                for k, x in {"weight": p.detach(), **state}.items()
            }
            digests[name] = checkpoint.digest({k: x.contiguous() for k, x in kept.items()}, "")
            return real_whole(engine)

        script.trained_weights = whole
        found[name] = script.worker(replace(cfg, out=f"{cfg.out}/{name}", **kw)) | {
            "optimizer": digests[name]
        }

    def dies(*args):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 4:
            raise KeyboardInterrupt
        return real_loss(*args)

    for name, kw in RUNS.items():
        go(name, **kw)
    sft.loss = dies
    with suppress(KeyboardInterrupt):
        go("killed", **RUNS["stage 3"])
    sft.loss = real_loss
    go("killed", **RUNS["stage 3"], resume=True)
    if dist.get_rank() == 0:
        shutil.copytree(f"{cfg.out}/killed", f"{cfg.out}/damaged")
        path = next(Path(cfg.out).glob("damaged/checkpoints/step4/*optim_states.pt"))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    dist.barrier()
    for name, kw in (
        ("damaged", {}),
        ("killed", {"lr": 1.0}),
        ("killed", {"zero_stage": 2}),
        ("nothing", {}),
    ):
        try:
            go(name, **RUNS["stage 3"] | kw, resume=True)
        except run.UserError as error:
            found[f"{name} {kw}"] = str(error)
    return found


@pytest.fixture(scope="module")
def two(cfg):
    return ranks.launch(jobs, cfg, 2, TIME)


@pytest.fixture(scope="module")
def plain(cfg):
    """The same training, without DeepSpeed: torch's AdamW, one process, two parts -> losses, adapter, score before."""
    dist.init_process_group("gloo", f"file://{cfg.out}/meet", rank=0, world_size=1)
    cfg = replace(cfg, accumulation=2)
    tokenizer, model = sft.prepare(cfg)
    learn, held_out = faq.conversations(tokenizer, cfg.length)
    before = sft.score(model, held_out[:4], cfg.batch, tokenizer.eos_token_id)
    moving = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, losses = torch.optim.AdamW(moving.values(), weight_decay=0.0), []
    for step in range(cfg.steps):
        optimizer.param_groups[0]["lr"] = linear(cfg, step)
        parts, tokens = faq.draw(learn, cfg, step, tokenizer.eos_token_id)
        value = sum(sft.loss(model, *part) for part in parts) / tokens
        value.backward()
        torch.nn.utils.clip_grad_norm_(moving.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    dist.destroy_process_group()
    return (
        torch.tensor(losses),
        {n.replace(".default", ""): p.detach() for n, p in moving.items()},
        before,
    )


def adapter(cfg, name):
    return load_file(f"{cfg.out}/{name}/adapter/adapter_model.safetensors")


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in RUNS if name != "full" and "bf16" not in name])
def test_every_stage_learns_what_plain_torch_learns(name, cfg, two, plain, parity):
    losses, weights, before = plain
    parity(
        "Fine-tuning with ZeRO",
        f"plain loop, losses, {name}",
        "deepspeed",
        losses,
        torch.tensor(two[0][name]["losses"]),
    )
    parity(
        "Fine-tuning with ZeRO",
        f"plain loop, weights, {name}",
        "deepspeed",
        weights,
        adapter(cfg, name),
        atol=1e-4,
    )
    assert two[0][name]["losses"] == two[1][name]["losses"] and losses[-1] < losses[0] - 0.01
    assert two[0][name]["before"] == pytest.approx(before, rel=1e-5)


@pytest.mark.long
def test_stage_0_in_bf16_counts_its_steps_as_the_others_do(two):
    """DeepSpeed begins it with a step of zeros; left in AdamW's count, it makes the first steps a quarter shorter."""
    assert two[0]["stage 0, bf16"]["losses"] == pytest.approx(
        two[0]["stage 2, bf16"]["losses"], abs=2e-4
    )


@pytest.mark.long
def test_adapter_and_model_load_without_deepspeed(cfg, two):
    from peft import PeftModel

    base = lambda: pretrained.language_model(cfg.model)[1].float()  # noqa: E731
    load = {
        "stage 2": lambda folder: PeftModel.from_pretrained(base(), f"{folder}/adapter"),
        "stage 3": lambda folder: PeftModel.from_pretrained(base(), f"{folder}/adapter"),
        "full": lambda folder: LlamaForCausalLM.from_pretrained(
            f"{folder}/model", dtype=torch.float32
        ),
    }
    before = base()(input_ids=IDS).logits
    for name in load:
        logits = load_file(f"{cfg.out}/{name}/logits.safetensors")["logits"]
        mine = load[name](f"{cfg.out}/{name}").eval()(input_ids=IDS).logits
        torch.testing.assert_close(mine, logits, atol=1e-5, rtol=1e-5)
        assert (before - logits).abs().max() > 0.05


@pytest.mark.long
def test_resume_is_bit_exact(cfg, two):
    """Weights, optimizer, random state, next texts, losses and scores are the same to the last bit."""
    for r in two:
        for key in ("losses", "before", "after", "optimizer"):
            assert r["stage 3"][key] == r["killed"][key] != r["full"][key] or key == "before"
    a, b = (Path(cfg.out, name, "checkpoints", "step4") for name in ("stage 3", "killed"))
    for rank in range(2):
        [x], [y] = (checkpoint.read(f / f"rank{rank}.safetensors")[0].values() for f in (a, b))
        assert torch.equal(x, y)  # the random state
    x, y = adapter(cfg, "stage 3"), adapter(cfg, "killed")
    assert all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.long
def test_what_cannot_be_resumed_says_why(two):
    for r in two:
        assert "optim_states.pt is damaged" in r["damaged {}"]
        assert "--lr 0.01" in r["killed {'lr': 1.0}"]
        assert "--zero_stage 3" in r["killed {'zero_stage': 2}"]
        assert "no checkpoint in" in r["nothing {}"]


@pytest.mark.long
def test_who_holds_what(cfg, two):
    """LoRA: stage 3 halves what lies still, and at its fullest moment holds more than stage 2 ever does."""
    held = {name: two[0][name]["held"] for name in ("stage 2", "stage 3")}
    _, model = pretrained.language_model(cfg.model)
    base, small = (
        4 * sum(p.numel() for p in model.parameters()) / 2**20,
        4 * two[0]["stage 2"]["trained"] / 2**20,
    )
    assert held["stage 2"]["weights"] == pytest.approx(base + small, rel=0.01)
    assert held["stage 2"]["gathered"] == held["stage 2"]["weights"]
    assert held["stage 3"]["weights"] == pytest.approx(base / 2, rel=0.05)
    assert held["stage 3"]["gathered"] > 1.4 * held["stage 2"]["gathered"]
    for name in held:  # weights and two moments in fp32, of half of what moves
        assert held[name]["optimizer"] == pytest.approx(3 * small / 2, rel=0.05)
    full = two[0]["full"]["held"]
    assert full["optimizer"] == pytest.approx(3 * base / 2, rel=0.05)


@pytest.mark.long
def test_the_board_shows_the_losses(cfg, two):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(f"{cfg.out}/stage 2/tensorboard")
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [
        (i + 1, pytest.approx(value)) for i, value in enumerate(two[0]["stage 2"]["losses"])
    ]


def test_the_loss_is_transformers_own(cfg, parity):
    """Their mean over the tokens to learn, times their number, and its gradient."""
    tokenizer, model = sft.prepare(cfg)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    rows, _ = faq.conversations(tokenizer, cfg.length)
    ids, mask, labels = faq.pad(rows[:3], tokenizer.eos_token_id)
    mine = sft.loss(model, ids, mask, labels)
    theirs = model(input_ids=ids, attention_mask=mask, labels=labels).loss * sum(
        faq.count_supervised(r[1]) for r in rows[:3]
    )
    moving = [p for p in model.parameters() if p.requires_grad]
    a, b = (list(torch.autograd.grad(x, moving)) for x in (mine, theirs))
    parity("Fine-tuning with ZeRO", "loss", "transformers", mine / 100, theirs / 100)
    parity("Fine-tuning with ZeRO", "loss, gradients", "transformers", a, b, atol=1e-4)


# The ways of starting it.


@pytest.mark.long
def test_deepspeed_torchrun_and_python_learn_the_same(cfg, two):
    """One rank with two parts learns what two ranks do; the ways of starting two ranks agree to the last bit."""
    here, port = Path(sys.executable).parent, 29300 + os.getpid() % 300
    starts = {
        "one": [here / "deepspeed", "--master_port", str(port), "--num_gpus", "1"],
        "two": [here / "deepspeed", "--master_port", str(port + 1), "--num_gpus", "2"],
        "torchrun": [here / "torchrun", "--master_port", str(port + 2), "--nproc_per_node", "2"],
    }
    flags = "--steps 4 --batch 2 --length 64 --lr 1e-2 --precision fp32".split() + [
        "--model",
        cfg.model,
    ]
    env, running = os.environ | {"PYTHONPATH": str(ROOT)}, {}
    for name, command in starts.items():
        more = ["--accumulation", "2"] if name == "one" else []
        words = [
            *command,
            "training/llama2_clm_sft_lora_with_zero.py",
            *flags,
            *more,
            "--out",
            f"{cfg.out}/{name}",
        ]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running[name] = subprocess.Popen(words, cwd=ROOT, env=env, **pipe)
    for name, process in running.items():
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, err[-2000:]
        losses = json.loads(Path(cfg.out, name, "losses.json").read_text())
        if name == "one":
            assert losses == pytest.approx(two[0]["stage 2"]["losses"], rel=1e-6)
        else:
            assert losses == two[0]["stage 2"]["losses"]
        assert "ZeRO-2: 4 texts a step" in out and "written to" in out
        names: dict = {}
        exec(
            "\n".join(out.split("use it:\n")[1].splitlines()[:3]), names
        )  # the printed lines load adapter, base and tokenizer
        logits = load_file(f"{cfg.out}/stage 2/logits.safetensors")["logits"]
        for weight, p in names["model"].named_parameters():
            if "lora" not in weight:
                p.data = p.data.bfloat16().float()  # as the run has read them
        torch.testing.assert_close(
            names["model"].float()(input_ids=IDS).logits, logits, atol=1e-4, rtol=1e-4
        )
        assert names["tokenizer"].chat_template
        files = {p.name for p in Path(cfg.out, name).iterdir()}
        assert files >= {"adapter", "config.json", "held.png", "losses.json", "metrics.json"}


# Bad input.


@pytest.mark.parametrize(
    "content, said",
    [
        (
            {"zero_optimisation": {"stage": 2}},
            "no 'zero_optimisation', perhaps you mean 'zero_optimization'",
        ),
        ({"gradient_acumulation_steps": 2}, "perhaps you mean 'gradient_accumulation_steps'"),
        (
            {"zero_optimization": {"stage": 2, "reduce_buket_size": 9}},
            "perhaps you mean 'reduce_bucket_size'",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"pin_memry": True}}},
            "perhaps you mean 'pin_memory'",
        ),
        ({"activation_checkpointing": {"profil": True}}, "perhaps you mean 'profile'"),
        ({"zero_optimization": {"stage": 7}}, "stage: Input should be"),
        ({"zero_optimization": True}, "zero_optimization is {...}"),
        ({"train_micro_batch_size_per_gpu": 5}, "is 5, by the flags 4"),
        ({"bf16": {"enabled": False}}, "enabled is False, by the flags True"),
        ({"fp16": {"enabled": True}}, "leave out 'fp16'"),
        ({"optimizer": {"type": "AdamW"}}, "leave out 'optimizer'"),
        ("{", "no readable JSON"),
        ([], "no JSON object"),
    ],
)
def test_a_wrong_configuration_is_named(content, said, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(run.UserError) as error:
        zero_config.read(script.Config(config=str(path)))
    assert (
        said in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
    )


def test_our_own_configurations_are_read_and_filled():
    for stage in (0, 1, 2, 3):
        config = zero_config.read(script.Config(zero_stage=stage, accumulation=3))
        assert (
            config["zero_optimization"]["stage"] == stage
            and config["gradient_accumulation_steps"] == 3
        )
    zero = zero_config.read(script.Config(zero_stage=3, offload="optimizer"))["zero_optimization"]
    assert (zero["offload_optimizer"]["device"], zero["offload_param"]["device"]) == ("cpu", "none")
    assert not any(
        "auto" in json.dumps(zero_config.read(script.Config(zero_stage=s))) for s in (0, 1, 2, 3)
    )
    assert sorted(p.name for p in zero_config.CONFIGS.glob("zero*.json")) == [
        "zero0.json", "zero1.json", "zero2.json", "zero2_offload.json", "zero3.json", "zero3_offload.json",
    ]  # fmt: skip


@pytest.mark.long
def test_the_adapter_on_the_disk_names_its_base(cfg, two):
    base = json.loads(Path(cfg.out, "stage 2", "adapter", "adapter_config.json").read_text("utf-8"))
    assert base["base_model_name_or_path"] == str(Path(cfg.model).resolve())


def test_an_adapter_names_a_base_that_loads_from_any_folder(cfg, monkeypatch):
    """A relative --model is written as a whole path."""
    monkeypatch.chdir(Path(cfg.model).parent)
    _, model = sft.prepare(replace(cfg, model="tiny"))
    assert model.peft_config["default"].base_model_name_or_path == str(Path(cfg.model).resolve())
    for method, library in (("lora", "peft"), ("full", "transformers")):
        assert sft.usage(replace(cfg, method=method)).startswith(f"from {library} import Auto")


def test_the_learning_rate_is_the_library_s(parity):
    from transformers import get_linear_schedule_with_warmup

    cfg = script.Config(steps=40, lr=1.0)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 4, 40)
    theirs = []
    for _ in range(40):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    ours = [linear(cfg, step) for step in range(40)]
    assert ours[4:] == pytest.approx(theirs[4:])
    # Ours does not waste the first step on zero
    assert ours[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


class Engine:
    """Notes what it is given; divides as DeepSpeed's engine and accelerate do, by parts and by ranks."""

    def __init__(self, parts, ranks):
        self.num_processes, self.divisor = ranks, parts * ranks
        self.optimizer = self.model = self
        self.param_groups, self.rates, self.seen, self.gradient = [{}], [], 0, 0.0
        self.parts, self.clipped = parts, []

    def backward(self, value):
        self.seen += 1
        self.gradient += float(value) / self.divisor

    def step(self):
        self.rates.append(self.param_groups[0]["lr"])


def give(monkeypatch, n, rank):
    """As if this were one of n ranks. A text's loss is its length squared: no two means are alike."""
    monkeypatch.setattr(ranks, "rank_and_world_size", lambda: (rank, n))
    monkeypatch.setattr(sft, "add", lambda *values: list(values))
    monkeypatch.setattr(sft, "loss", lambda _, ids, mask, labels: (mask.sum(1) ** 2.0).sum())


ROWS = [([3] * k, [faq.IGNORE] + [3] * (k - 1)) for k in range(2, 22)]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_is_the_mean_over_all_tokens(parts, monkeypatch):
    """What two engines are left with together: the sum of losses, by the tokens of all; the rates are ours."""
    cfg = script.Config(batch=2, accumulation=parts, steps=40, lr=1.0)
    total, engines = 0.0, [Engine(parts, 2) for _ in range(2)]
    for rank, engine in enumerate(engines):
        give(monkeypatch, 2, rank)
        total += next(script.train(engine, ROWS, cfg, 1))
    _, tokens = faq.draw(ROWS, cfg, 0, 1)
    give(monkeypatch, 1, 0)
    texts, _ = faq.draw(ROWS, replace(cfg, accumulation=2 * parts), 0, 1)
    right = sum(float(sft.loss(None, *part)) for part in texts) / tokens
    assert total == pytest.approx(right) and sum(e.gradient for e in engines) == pytest.approx(
        right
    )
    assert engines[0].rates == [linear(cfg, 0)] * parts and engines[0].seen == parts


def test_held_out_texts_are_scored_once(monkeypatch):
    model = torch.nn.Linear(1, 1)
    sums: list = []
    for n in (1, 2, 3):
        sums.clear()
        for rank in range(n):
            give(monkeypatch, n, rank)
            monkeypatch.setattr(sft, "add", lambda *values: sums.append(values) or (1.0, 1.0))
            sft.score(model, ROWS, 3, 1)
        totals = [sum(x) for x in zip(*sums)]
        assert totals == [
            sum(len(ids) ** 2 for ids, _ in ROWS),
            sum(len(ids) - 1 for ids, _ in ROWS),
        ]
    assert model.training


def test_more_positions_than_the_model_knows_are_refused(cfg):
    with pytest.raises(run.UserError, match="--length 129: --model knows 128 positions"):
        sft.prepare(replace(cfg, length=129))


def test_a_configuration_in_another_encoding_is_one_line(tmp_path):
    path = tmp_path / "config.json"
    # a byte order mark is none of our business
    path.write_bytes(b'\xef\xbb\xbf{"gradient_clipping": 1.0}')
    assert zero_config.read(script.Config(config=str(path)))["gradient_clipping"] == 1.0
    path.write_bytes('{"größe": 1}'.encode("latin-1"))
    with pytest.raises(run.UserError, match="is not UTF-8"):
        zero_config.read(script.Config(config=str(path)))


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"precision": "fp16"}, "fp16 is refused"),
        ({"batch": 0}, "must be above 0"),
        ({"lr": 0.0}, "must be above 0"),
    ],
)
def test_wrong_flags(flags, said, tmp_path):
    with pytest.raises(run.UserError, match=said):
        script.main(replace(script.Config(out=str(tmp_path / "new")), **flags))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "flags", [{"zero_stage": 1, "offload": "optimizer"}, {"offload": "parameters"}]
)
def test_offload_needs_its_stage(flags):
    with pytest.raises(run.UserError, match="--zero-stage"):
        zero_config.read(replace(script.Config(), **flags))
