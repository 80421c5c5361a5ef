"""Methods compared on one task, under one budget of steps: accuracy, memory, time, size of the
checkpoint.

Each method runs as a process of its own, by the command that its page shows, so that memory is its
own and the table can be had line by line. Learning rates are those of the scripts, each chosen on
the validation texts.

    python finetune/compare.py                                     # all methods, one after another
    python finetune/compare.py --resume                            # after a break: keep what is finished
    python finetune/compare.py --only lora prefix --steps 50
    python finetune/compare.py --model meta-llama/Llama-2-7b-hf    # larger, for a GPU
"""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from finetune import classification_metrics, sentiment, sentiment_data
from utils import figures, run

# Rows of llama2_hard_prompt.py
ASKED = {"zero-shot": "yours, 0 examples", "4 examples": "yours, 4 examples"}
METHODS = {  # name: script and flags
    "full": "llama2_full.py",
    "head only": "llama2_full.py --part head --lr 1e-3",
    "lora": "llama2_lora.py",
    "rslora": "llama2_lora.py --variant rslora --lr 1e-3",
    "dora": "llama2_lora.py --variant dora",
    "lora+": "llama2_lora.py --plus 16 --lr 5e-4",
    "ia3": "llama2_lora.py --variant ia3 --targets k_proj v_proj down_proj --lr 1e-2",
    "prompt": "llama2_prompt.py",
    "p-tuning, lstm": "llama2_ptune.py",
    "p-tuning, mlp": "llama2_ptune.py --encoder mlp",
    "prefix": "llama2_prefix.py",
    "p-tuning v2": "llama2_ptune_v2.py",
    "lora on 32 bits": "llama2_qlora.py --bits 32",
    "lora on 8 bits": "llama2_qlora.py --bits 8",
    "qlora, 4 bits": "llama2_qlora.py --bits 4",
}
COLUMNS = {  # of the table: what metrics.json calls it
    "trained": "trained",
    "tensors, MiB": "tensor_MiB",
    "process, MiB": "process_MiB",
    "CPU s a step": "seconds_per_step",
    "file, MiB": "checkpoint_MiB",
}


@dataclass(frozen=True)
class Config(sentiment_data.Task):
    """Run the methods of this chapter on one task and write the table and the plot."""

    only: tuple[str, ...] = ()  # names of methods; none: all
    steps: int = 100  # training steps of each
    batch: int = 16  # texts per step
    model: str = "smollm2"  # smollm2, a local folder, or a hub id such as meta-llama/Llama-2-7b-hf
    resume: bool = False  # keep the results of methods that finished with the same command
    seed: int = 0  # same seed, same numbers
    device: str = "auto"  # cpu, cuda, ...
    out: str = "outputs/compare"  # where the results go


def command(cfg, flags, folder):
    """The command line of a script, with what it shares with the others in this comparison."""
    script, *own = flags.split()
    # the task, the model and the seed
    same = ["--data", cfg.data, "--threshold", cfg.threshold]
    same += ["--pattern", cfg.pattern, "--words", *cfg.words]
    same += ["--split", cfg.split, "--texts", cfg.texts, "--model", cfg.model, "--seed", cfg.seed]
    same += ["--device", cfg.device, "--out", folder]
    # the budget of what is trained
    if script != "llama2_hard_prompt.py":
        same += ["--steps", cfg.steps, "--batch", cfg.batch]
    return [sys.executable, str(Path(__file__).with_name(script)), *own, *map(str, same)]


def measure(cfg, name, flags, folder):
    """Run a script in a process of its own -> its metrics."""
    place = folder / name.replace(", ", "_").replace(" ", "_")
    words = command(cfg, flags, place)
    done = place / "metrics.json"
    # a result of the very same command is kept
    if cfg.resume and done.is_file():
        metrics = json.loads(done.read_text("utf-8"))
        if metrics["command"] == shlex.join(["python", *words[1:]]):
            return metrics
    print(f"== {name}: {flags}", flush=True)
    ran = subprocess.run(words)
    well = ran.returncode == 0
    run.check(well, f"{name} failed; go on with --resume: what ran before it is kept in {folder}")
    return json.loads(done.read_text("utf-8"))


def written(x):
    """A cell of the table: a count, a number of three digits, or nothing."""
    if x is None:
        return ""
    if isinstance(x, int):
        return f"{x:,}"
    return f"{x:.3g}" if x < 100 else f"{x:.0f}"


def table(rows):
    """{method: metrics} -> lines of Markdown."""
    lines = [
        "| method | accuracy | macro F1 | generated | " + " | ".join(COLUMNS) + " |",
        "|---" * 9 + "|",
    ]
    for name, m in rows.items():
        first = f"{m['accuracy']:.3f} ({m['low']:.3f} to {m['high']:.3f})"
        first += f" | {m['macro_f1']:.3f} ({m['f1_low']:.3f} to {m['f1_high']:.3f})"
        last = [written(m.get(c)) for c in ("generated", *COLUMNS.values())]
        lines.append(f"| {name} | {first} | {' | '.join(last)} |")
    return lines


def plot(path, rows):
    """What each method reaches, and what it costs, side by side; methods that train nothing are
    drawn as lines.
    """
    import matplotlib.pyplot as plt

    trained = {name: m for name, m in rows.items() if m.get("trained")}
    figure, axes = plt.subplots(1, 4, figsize=(11, 0.3 * len(trained) + 1.4), sharey=True)
    places = range(len(trained))
    # accuracy with its interval
    for i, m in enumerate(trained.values()):
        error = [[m["accuracy"] - m["low"]], [m["high"] - m["accuracy"]]]
        axes[0].errorbar(m["accuracy"], i, xerr=error, fmt="o", capsize=2, color="steelblue")
    # methods that train nothing, as lines
    untrained = {name: m for name, m in rows.items() if name not in trained}
    for k, (name, m) in enumerate(untrained.items()):
        style = ("-", "--", ":", "-.")[k % 4]
        axes[0].axvline(m["accuracy"], color="black", linewidth=1, linestyle=style, label=name)
    axes[0].legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    # costs, one panel each
    costs = {
        "trained weights": "trained",
        "CPU seconds a step": "seconds_per_step",
        "tensors, MiB": "tensor_MiB",
    }
    for axis, (label, column) in zip(axes[1:], costs.items()):
        axis.barh(places, [m[column] for m in trained.values()], color="lightsteelblue")
        axis.set(xlabel=label, xscale="log" if column == "trained" else "linear")
    axes[0].set(xlabel="accuracy, 95 % interval")
    axes[0].set_yticks(places, list(trained), fontsize=8)
    axes[0].invert_yaxis()
    figure.tight_layout()
    return figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Run, collect, write table.md and compare.png."""
    run.check(min(cfg.steps, cfg.batch) > 0, "--steps and --batch must be above 0")
    unknown = [name for name in cfg.only if name not in METHODS]
    run.check(not unknown, f"--only {unknown}: there are {', '.join(METHODS)}")
    folder = run.output(cfg.out, replace(cfg, resume=False))
    # two classifiers without a language model
    parts = sentiment_data.load(cfg)
    texts, truth = zip(*parts["scored"])
    rows = {"majority": classification_metrics.scores(truth, sentiment.majority(parts))}
    if len(cfg.words) == 2:
        rows["VADER"] = classification_metrics.scores(truth, sentiment.vader(texts))
    # hard prompts, which train nothing
    asked = measure(cfg, "in words", "llama2_hard_prompt.py --shots 0 4", folder)
    for name, key in ASKED.items():
        rows[name] = asked[key] | {"generated": asked[f"{key}, generated"]["accuracy"]}
    # every method in a process of its own
    for name in cfg.only or METHODS:
        m = measure(cfg, name, METHODS[name], folder)
        counted = {k: m[k] for k in COLUMNS.values()}
        rows[name] = m["likelihood"] | {"generated": m["generated"]["accuracy"]} | counted
    lines = "\n".join(table(rows))
    (folder / "table.md").write_text(lines + "\n", "utf-8")
    plot(folder / "compare.png", rows)
    print(lines)
    return run.report(folder, rows)


if __name__ == "__main__":
    run.cli(main, Config)
