"""rag/compare.py: every script of the chapter has its row."""

import json

import pytest

from rag import compare
from tests.conftest import ROOT
from utils.run import UserError


def test_every_retriever_has_a_row():
    scripts = {script.__name__.split(".")[1] for script, _ in compare.variants(compare.Config()).values()}
    named = {p.stem for p in (ROOT / "rag").glob("*.py") if "def build_retriever" in p.read_text()}
    assert named - scripts == {"multimodal_rag", "app"}  # one finds pictures, one shows the others


def test_command(tmp_path):
    metrics = compare.main(compare.Config(distractors=0, limit=10, only="turns", out=str(tmp_path)))
    assert metrics["questions"] == 10 and {"raw", "merged by turns"} <= metrics.keys()
    assert json.loads((tmp_path / "metrics.json").read_text())["best"] in ("raw", "merged by turns")
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len(lines) == 4 and all(line.count("|") == 10 for line in lines) and (tmp_path / "compare.png").is_file()


def test_bad_input():
    with pytest.raises(UserError, match="--limit"):
        compare.main(compare.Config(limit=0))
