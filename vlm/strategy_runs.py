"""Runs of the strategies that vlm/strategies.py compares: a command of vlm/train.py for each, and what it measured.

Liu et al. 2023, arXiv:2304.08485, Sec. 4.2 train the connector, then it and the language model; the others are what
later work tried. A run has a process of its own, so that its memory is its own.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from utils.run import check

STRATEGIES = {  # name: what vision, connector and language model do; rate of what is pretrained, flags
    "projector": ("frozen, trained, frozen", 1e-3, ["--train_type", "projector"]),
    "lora": ("frozen, trained, LoRA on q v", 1e-3, ["--lora_targets", "q_proj", "v_proj"]),
    "lora-all": ("frozen, trained, LoRA on all", 1e-3, ["--train_type", "use_lora"]),
    "random-connector": (
        "frozen, frozen, LoRA on all",
        1e-3,
        ["--train_type", "lora_frozen_projector"],
    ),
    # a third of the steps
    "two-stages": ("frozen, trained, LoRA on all in the last two thirds", 1e-3, ["--align_steps"]),
    "language": ("frozen, trained, trained", 5e-5, ["--train_type", "freeze_vision"]),
    "everything": ("trained, trained, trained", 5e-5, ["--train_type", "none"]),
}
# Rate of new parts, the connector
LR = 1e-3
# Rows and pictures that easy_vqa_curriculum.py wrote
EASY_VQA = Path("outputs/easy_vqa_curriculum")
# Kinds of questions of easy-VQA that need no comparison (vlm/easy_vqa.md)
OPEN = ("colour", "shape")


def data_flags(cfg):
    """Flags of the data set: its rows, and how they are read."""
    flags = ["--text_share", str(cfg.text_share), "--packing" if cfg.packing else "--no-packing"]
    # a picture is one token, and not the first one (vlm/easy_vqa.md)
    template = Path(__file__).parent / "configs" / "short.jinja"
    flags += ["--connector", "pool1", "--template", str(template)]
    if cfg.data == "fruit":
        return [*flags, "--views", str(cfg.views)]
    return [
        *flags,
        "--views",
        "1",
        "--data_path",
        str(EASY_VQA / "open.json"),
        "--image_folder",
        str(EASY_VQA / "pictures"),
    ]


def command(name, cfg, folder, steps, factor, seed, judged):
    """A run of a strategy: so many steps, both learning rates times a factor, a seed."""
    _, lr_pretrained, flags = STRATEGIES[name]
    # flags of the strategy
    flags = list(flags)
    if flags[-1] == "--align_steps":
        flags.append(str(steps // 3))
    # the same for all strategies
    every = {
        "max_steps": steps,
        "learning_rate": LR * factor,
        "learning_rate_pretraining_components": lr_pretrained * factor,
        "per_device_train_batch_size": cfg.batch,
        "judged": judged,
        "num_warmup_steps": max(1, steps // 10),
        "seed": seed,
        "out": folder,
    }
    flags += data_flags(cfg)
    for flag, value in every.items():
        flags += [f"--{flag}", str(value)]
    return [sys.executable, str(Path(__file__).with_name("train.py")), *flags]


def score_command(cfg, folder):
    """Score what a run has learned on easy-VQA's test questions; of fruit the run does it itself."""
    script = Path(__file__).with_name("easy_vqa_score.py")
    flags = {"model": folder / "model.safetensors", "count": cfg.judged, "out": folder / "score"}
    words = [f"--{flag}={value}" for flag, value in flags.items()]
    return [sys.executable, str(script), *words, "--kinds", *OPEN, "--no-baselines"]


def read_metrics(words, folder, name):
    """Run a command that writes metrics.json -> it. One that ran already, word for word, is not repeated: a study
    of hours goes on where it was stopped. Raises UserError if the command fails."""
    path = folder / "metrics.json"
    command = shlex.join(["python", *words[1:]])
    if path.is_file():
        found = json.loads(path.read_text("utf-8"))
        if found.get("command") == command:
            return found
    done = subprocess.run(words, stdout=subprocess.DEVNULL)
    check(done.returncode == 0, f"the run of {name} failed")
    return json.loads(path.read_text("utf-8"))


def measure(name, cfg, folder, steps, factor=1.0, seed=None, judged=14):
    """Metrics of a run in a process of its own. Raises UserError if it fails."""
    seed = cfg.seed if seed is None else seed
    return read_metrics(command(name, cfg, folder, steps, factor, seed, judged), folder, name)


def judge(name, cfg, folder, steps, factor, seed):
    """Metrics of a run that counts, with its scores: {"scores": {name: accuracy}}, the main one first."""
    metrics = measure(name, cfg, folder, steps, factor, seed, cfg.judged)
    if cfg.data == "fruit":
        scores = dict(metrics["LLaVA"]) | {"text loss": metrics["text loss"]["after"]}
    else:
        found = read_metrics(score_command(cfg, folder), folder / "score", name)
        scores = {"open questions": found["LLaVA, ranked"]["accuracy"]}
        scores |= {kind: found["LLaVA, ranked"][kind] for kind in OPEN}
    return metrics | {"scores": scores}


def seconds_a_step(metrics, steps):
    """CPU seconds of training, by steps."""
    return metrics["train_cpu_seconds"] / steps
