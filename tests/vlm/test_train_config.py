"""vlm/train_config.py: flags, aliases, a file of nested sections, numbers of steps."""

import json
import re
import sys
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro

from utils import run
from utils.run import UserError, same_flags
from vlm import config, engines, metric_loggers, trainable
from vlm.config_file import with_file
from vlm.train_config import Config, changed, check_flags, engine_name, with_steps

# As a common tutorial writes it, from behind `deepspeed --include=localhost:0 vlm/train.py`
LINE = """--per_device_train_batch_size 2 --learning_rate 1e-5 --learning_rate_pretraining_components 0
 --weight_decay 0 --gradient_accumulation_steps 1 --lr_scheduler_type cosine --num_warmup_steps 100 --seed 1234
 --local_rank -1 --gradient_checkpointing --zero_stage 2 --precision bf16 --work_dir ../work_dir"""

YAML = """
model:
  connector: perceiver
  perceiver: {n_latents: 5}
train:
  lr: 0.002
  betas: [0.8, 0.95]
  train_type: freeze_vision
data: {views: 2, packing: false}
lora: {r: 16, target_modules: [q_proj]}
fsdp: {enable: true, transformer_cls: [LlamaDecoderLayer]}
wandb: {project: mine, entity: null}
out: there
"""


def parse(*words):
    return tyro.cli(Config, args=with_file(list(words)))


def test_the_line_of_a_common_tutorial():
    found = parse(*LINE.split())
    check_flags(found)
    train = found.train
    assert (train.batch_size, train.lr, train.lr_pretrained, train.seed) == (2, 1e-5, 0, 1234)
    assert (train.warmup_steps, train.gradient_checkpointing) == (100, True)
    assert (found.deepspeed.stage, found.out, train.precision) == (2, "../work_dir", "bf16")
    assert engine_name(found) == "deepspeed"


def test_every_section_is_filled_by_a_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    found = parse("--config", str(path), "--lora_rank", "4", "--views", "3")
    assert found.model.connector == "perceiver" and found.model.perceiver.n_latents == 5
    assert (found.train.lr, found.train.betas) == (0.002, (0.8, 0.95))
    assert found.train.train_type == "freeze_vision"
    # flags win, by whatever name
    assert (found.data.views, found.data.packing) == (3, False)
    assert (found.lora.r, found.lora.target_modules) == (4, ("q_proj",))
    assert found.fsdp == config.FSDPConfig(True, ("LlamaDecoderLayer",))
    assert found.wandb.project == "mine" and found.out == "there"
    assert engine_name(found) == "fsdp"


def test_an_unknown_key_of_a_section_is_refused_by_name(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("train: {learning_rat: 3}")
    with pytest.raises(SystemExit) as stopped:
        parse("--config", str(tmp_path / "run.yaml"))
    assert stopped.value.code == 2 and "--learning_rat" in capsys.readouterr().err


def test_names_of_lora_are_those_of_peft():
    from peft import LoraConfig

    theirs = {f.name for f in fields(LoraConfig)}
    assert {f.name for f in fields(config.LoraConfig)} <= theirs
    assert config.LoraConfig(r=4).alpha == 8 and config.LoraConfig(r=4, lora_alpha=3).alpha == 3


def test_a_change_finds_its_section():
    cfg = changed(Config(), lr=3.0, views=7, r=2, connector="linear", out="x")
    assert (cfg.train.lr, cfg.data.views, cfg.lora.r, cfg.out) == (3.0, 7, 2, "x")
    assert cfg.model.connector == "linear" and Config().model.connector == "pool3"
    with pytest.raises(TypeError, match="no section has lrr"):
        changed(Config(), lrr=3.0)


def test_epochs_are_steps_of_all_ranks():
    cfg = changed(Config(), epochs=3, batch_size=4, gradient_accumulation_steps=2)
    assert with_steps(cfg, 100, 1).train.steps == 38  # 300 samples, 8 a step
    assert with_steps(cfg, 100, 2).train.steps == 19
    assert with_steps(changed(cfg, epochs=0), 100, 2).train.steps == 120


def test_a_warm_up_ratio_is_of_all_steps():
    cfg = changed(Config(), warmup_ratio=0.03, steps=200)
    assert with_steps(cfg, 100, 1).train.warmup_steps == 6
    assert with_steps(changed(cfg, warmup_ratio=0.0), 100, 1).train.warmup_steps == 12


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_lowest_rate_is_where_the_schedule_ends(schedule):
    cfg = changed(
        Config(), lr=0.1, min_lr=0.02, steps=1000, warmup_steps=0, lr_scheduler_type=schedule
    )
    rates = [0.1 * trainable.lr_multipliers(cfg.train, step)[0] for step in (0, 500, 999)]
    assert rates == pytest.approx([0.1, 0.06, 0.02], abs=1e-4)


def test_betas_reach_adamw():
    parameter = torch.nn.Parameter(torch.zeros(1))
    cfg = changed(Config(), betas=(0.5, 0.6), weight_decay=0.1)
    made = engines.adamw([{"params": [parameter]}], cfg)
    assert made.defaults["betas"] == (0.5, 0.6) and made.defaults["weight_decay"] == 0.1


def test_a_resumed_run_may_not_learn_otherwise():
    before = json.loads(json.dumps(asdict(changed(Config(), r=4))))
    same_flags(changed(Config(), r=4, out="elsewhere", steps=7), before, "here")
    with pytest.raises(UserError, match="--r 4"):
        same_flags(changed(Config(), r=8), before, "here")
    with pytest.raises(UserError, match="--stage -1"):
        same_flags(changed(Config(), r=4, deepspeed=config.DeepSpeedConfig(2)), before, "here")


def test_wandb_is_told_project_and_entity(monkeypatch, tmp_path):
    told = {}
    seen = []

    def init(**about):
        told.update(about)
        return SimpleNamespace(log=lambda values, step: seen.append((values, step)))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    cfg = changed(Config(), wandb=config.WandbConfig(True, "mine", "us"))
    (log,) = metric_loggers.metric_loggers(cfg, tmp_path)
    log(3, 0.5)
    assert (told["project"], told["entity"], told["mode"]) == ("mine", "us", "offline")
    assert seen == [({"loss": 0.5}, 3)]


@pytest.mark.parametrize(
    "text, says",
    [
        ("train: {steps: many}", "steps: .*invalid literal for int.*'many'"),
        ("steps: 2.5", "steps: .*'2.5'"),
        ("lora: {r: x}", "lora.r: .*'x'"),
        ("precision: fp8", "precision: invalid choice 'fp8'.*'bf16', 'fp32', 'fp16'"),
        ("packing: 1", "packing: true or false is expected, not 1"),
        ("betas: [0.9]", "betas: .*2 values"),
        ("learning_rate: [1]\nlora_rank: many", "lora_rank: .*'many'"),
    ],
)
def test_a_value_of_a_file_is_checked_even_if_a_flag_wins(
    tmp_path, monkeypatch, capsys, text, says
):
    """One line with the key's name, and exit code 2; a good file is none of its business."""
    path = tmp_path / "run.yaml"
    flags = ["--steps", "3", "--lora.r", "4", "--precision", "fp32", "--packing"]
    flags += ["--betas", "0.9", "0.99"]
    path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(path), *flags])
    with pytest.raises(SystemExit) as stop:
        run.cli(lambda cfg: cfg, Config, expand=with_file)
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == ""
    assert said.err.count("\n") == 1
    assert re.search(f"error: {re.escape(str(path))}: {says}", said.err), said.err
    path.write_text("steps: 7\nlora: {r: 3}")
    cfg = run.cli(lambda cfg: cfg, Config, expand=with_file)
    assert cfg.train.steps == 3 and cfg.lora.r == 4


def test_an_unknown_key_is_left_to_the_command_line(tmp_path, monkeypatch, capsys):
    """Its message names flags like it."""
    path = tmp_path / "run.yaml"
    path.write_text("train: {grad_clipp: 1}\nsteps: 2")
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(path)])
    with pytest.raises(SystemExit):
        run.cli(lambda cfg: cfg, Config, expand=with_file)
    said = capsys.readouterr().err
    assert "--grad_clipp" in said or "--grad-clipp" in said
    assert "error:" not in said


def test_data_sources_of_the_page(tmp_path):
    """The file of data_loading.md is what its comments say."""
    page = Path(config.__file__).with_name("data_loading.md").read_text("utf-8")
    (tmp_path / "run.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    cfg = parse("--config", str(tmp_path / "run.yaml"))
    flags = "--data captions.jsonl chat.json --weights 1 2 --image_folder pictures"
    more = "--dataloader_num_workers 4 --steps 500 --batch_size 8"
    assert cfg == parse(*flags.split(), *more.split())
    assert cfg.data.is_lazy and cfg.data.weights == (1.0, 2.0)
