"""finetune/compare.py: one budget for all, a table that says what was measured, and every method's name is a script."""

import importlib
import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

from finetune import compare
from tests.conftest import ROOT
from tests.llamas import folder
from utils import run

ROW = {
    "accuracy": 0.9,
    "low": 0.85,
    "high": 0.94,
    "macro_f1": 0.88,
    "f1_low": 0.82,
    "f1_high": 0.93,
}
COST = {"trained": 1234567, "tensor_MiB": 812.4, "process_MiB": 2100.2, "seconds_per_step": 1.234}
COST |= {"checkpoint_MiB": 3.5}


def test_table_has_a_line_for_each_method_and_blanks_for_what_does_not_train():
    lines = compare.table({"majority": ROW, "lora": ROW | {"generated": 0.91} | COST})
    assert (
        lines[0].count("|")
        == lines[1].count("|")
        == lines[2].count("|")
        == lines[3].count("|")
        == 10
    )
    assert (
        lines[2]
        == "| majority | 0.900 (0.850 to 0.940) | 0.880 (0.820 to 0.930) |  |  |  |  |  |  |"
    )
    assert lines[3].endswith("| 0.91 | 1,234,567 | 812 | 2100 | 1.23 | 3.5 |")


def test_every_script_is_asked_for_the_same(tmp_path):
    cfg = compare.Config(steps=7, batch=3, texts=5, split="valid", words=(" no", " yes"))
    cfg = replace(cfg, seed=3, threshold=0.25, model="there")
    for flags in compare.METHODS.values():
        words = compare.command(cfg, flags, tmp_path)
        assert (ROOT / "finetune" / flags.split()[0]).is_file()
        for flag, value in (("--steps", "7"), ("--batch", "3"), ("--texts", "5"), ("--split", "valid"),
                            ("--seed", "3"), ("--threshold", "0.25"), ("--model", "there")):  # fmt: skip
            assert words[words.index(flag) + 1] == value
        assert words[2 : 2 + len(flags.split()) - 1] == flags.split()[1:]  # the method's own
        assert words[words.index("--words") + 1 :][:2] == [" no", " yes"]


def in_this_process(words):
    """What a script does with its command line, without a process of its own."""
    script = importlib.import_module(f"finetune.{Path(words[1]).stem}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words[1:])
        script.main(tyro.cli(script.Config, args=words[2:]))
    return subprocess.CompletedProcess(words, 0)


def test_command(tmp_path, monkeypatch):
    """The table's rows are what the scripts measured."""
    monkeypatch.setattr(subprocess, "run", in_this_process)
    model = folder(tmp_path / "model")
    rows = [
        json.dumps({"text": f"river stone {i}", "label": ("negative", "positive")[i % 2]})
        for i in range(100)
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows))
    place = {"model": model, "data": str(tmp_path / "texts.jsonl"), "out": str(tmp_path / "o")}
    metrics = compare.main(compare.Config(only=("lora",), steps=2, batch=2, texts=6, **place))
    assert list(metrics) == ["majority", "VADER", "zero-shot", "4 examples", "lora"]
    own = {
        n: json.loads((tmp_path / "o" / n / "metrics.json").read_text())
        for n in ("lora", "in_words")
    }
    for column, key in (
        ("accuracy", "accuracy"),
        ("macro_f1", "macro_f1"),
        ("low", "low"),
        ("f1_high", "f1_high"),
    ):
        assert metrics["lora"][column] == own["lora"]["likelihood"][key]
        assert metrics["4 examples"][column] == own["in_words"]["yours, 4 examples"][key]
    assert metrics["lora"]["generated"] == own["lora"]["generated"]["accuracy"]
    assert (
        metrics["zero-shot"]["generated"]
        == own["in_words"]["yours, 0 examples, generated"]["accuracy"]
    )
    assert all(metrics["lora"][c] == own["lora"][c] for c in compare.COLUMNS.values())
    assert {"table.md", "compare.png", "config.json", "metrics.json", "lora", "in_words"} <= {
        p.name for p in (tmp_path / "o").iterdir()
    }


def test_rows_of_no_and_of_four_examples_are_not_exchanged(tmp_path, monkeypatch):
    asked = {f"yours, {n} examples": ROW | {"accuracy": n / 10} for n in (0, 4)}
    asked |= {f"yours, {n} examples, generated": ROW | {"accuracy": n / 10 + 0.5} for n in (0, 4)}
    trained = {"likelihood": ROW, "generated": ROW} | COST
    monkeypatch.setattr(
        compare, "measure", lambda cfg, name, *rest: asked if name == "in words" else trained
    )
    found = compare.main(compare.Config(only=("lora",), out=str(tmp_path / "o")))
    for name, value in (("zero-shot", 0.0), ("4 examples", 0.4)):
        assert found[name]["accuracy"] == value and found[name]["generated"] == value + 0.5


def test_resume_keeps_what_ran_with_the_same_command_and_nothing_else(tmp_path, monkeypatch):
    calls = []

    def ran(words):
        calls.append(words)
        place = tmp_path / "lora"
        place.mkdir(exist_ok=True)
        (place / "metrics.json").write_text(
            json.dumps({"command": shlex.join(["python", *words[1:]])})
        )
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", ran)
    flags = compare.METHODS["lora"]
    for cfg in (
        compare.Config(),
        compare.Config(resume=True),
        compare.Config(resume=True, steps=5),
        compare.Config(),
    ):
        compare.measure(cfg, "lora", flags, tmp_path)
    assert len(calls) == 3  # all but the second


def test_bad_input(tmp_path):
    with pytest.raises(run.UserError, match="--only"):
        compare.main(compare.Config(only=("lara",), out=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()
