"""The house keeps its promises: scripts have notebook, test and README row; nothing unsafe is in it."""

import ast
import importlib
import json
import re
import shlex
import subprocess

import pytest

from tests import mutate, tour
from tests.conftest import ROOT
from tests.test_pages import tiny_flags

CHAPTERS = ["models", "finetune", "training", "rag", "papers", "deploy", "vlm"]
SCRIPTS = [
    p
    for chapter in CHAPTERS
    for p in sorted((ROOT / chapter).glob("*.py"))
    if "__main__" in p.read_text()
]
MEASURE = {"bench", "compare", "app", "poison", "mae_claims", "answer_study"}  # or show
MEASURE |= {
    "connector_probe",
    "constrained",
    "data",
    "decode_study",
    "demo",
    "distill",
    "dpo_study",
    "draft_study",
    "easy_vqa_curriculum",
    "easy_vqa_data",
    "easy_vqa_score",
    "edit_study",
    "encoders",
    "engine_study",
    "evaluate",
    "export_compile",
    "export_tower",
    "flamingo_lora",
    "flamingo_train",
    "gpu_bench",
    "hallucination",
    "kumaraswamy",
    "load",
    "loader_study",
    "near_duplicates",
    "pseudo_label_study",
    "questions",
    "reflow",
    "roofline",
    "sparsity_easy_vqa",
    "sparsity_study",
    "sparsity_train",
    "step_cost",
    "strategies",
    "tile_resampler_study",
    "tiles_study",
    "train_trainer",
    "trainer_speed",
    "two_encoders",
}
TOPICS = [p for p in SCRIPTS if not {p.stem, f"{p.parent.name}/{p.stem}"} & MEASURE]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*/*.ipynb"))
SOURCES = [
    p for folder in (*CHAPTERS, "utils", "tests") for p in sorted((ROOT / folder).rglob("*.py"))
]


def code_cells(path):
    cells = json.loads(path.read_text())["cells"]
    return [c for c in cells if c["cell_type"] == "code" and "".join(c["source"]).strip()]


@pytest.mark.parametrize("script", TOPICS, ids=lambda p: p.stem)
def test_every_topic_has_its_page_notebook_test_and_row(script):
    chapter, name = script.parent.name, script.stem
    for path in (
        f"notebooks/{chapter}/{name}.ipynb",
        f"tests/{chapter}/test_{name}.py",
        f"{chapter}/{name}.md",
    ):
        only = "; a script that only measures or shows stands in MEASURE of tests/test_repo.py"
        assert (ROOT / path).is_file(), f"there is no {path}{only}"
    row = re.search(
        rf"^\|.*{name}\.md.*{name}\.py.*{name}\.ipynb",
        (script.parent / "README.md").read_text("utf-8"),
        re.M,
    )
    assert row, (
        f"{chapter}/README.md has no row with {name}.md, {name}.py, {name}.ipynb in this order"
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_every_script_has_a_row_in_its_chapter_and_tiny_flags(script):
    name = f"{script.parent.name}/{script.name}"
    row = re.search(rf"^\|.*\]\({script.name}\)", (script.parent / "README.md").read_text(), re.M)
    assert row, f"{script.parent.name}/README.md has no row that links to {script.name}"
    assert name in tiny_flags(), f"tests/tiny_flags.toml has no line for {name}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_shows_the_module_and_does_not_write_it_again(path):
    module = importlib.import_module(f"{path.parent.name}.{path.stem}")
    own = {n for n, x in vars(module).items() if getattr(x, "__module__", None) == module.__name__}
    cells = ["".join(c["source"]) for c in code_cells(path)]
    plain = "\n".join(
        line
        for cell in cells
        for line in cell.splitlines()
        if not line.lstrip().startswith(("%", "!"))
    )
    tree = ast.parse(plain)
    made = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    assert not made & own, f"{path.name} defines {made & own} again"
    assert re.search(rf"import .*\b{path.stem}\b", plain), "it does not import its module"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_was_run_and_its_figures_are_small(path):
    outputs = [o for c in code_cells(path) for o in c["outputs"]]
    how = f"python tests/notebooks.py {path.stem}"
    assert all(c["execution_count"] for c in code_cells(path)), f"not run: {how}"
    assert not [o for o in outputs if o["output_type"] == "error"]
    pictures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert pictures, f"it shows no figure: {how}"
    assert max(map(len, pictures)) * 3 / 4 < 300_000, f"a figure is larger than 300 KB: {how}"
    assert path.stat().st_size < 1_000_000
    assert "Exercises" in "".join(json.loads(path.read_text())["cells"][-1]["source"])


def test_nothing_unsafe_or_unwanted():
    unsafe = ("weights_only=False", "import pickle", "trust_remote_code", "allow_dangerous")
    # Weights & Biases: offline, and only if it is asked for
    loggers = {"vlm/flags.py", "vlm/train_config.py", "vlm/metric_loggers.py"}
    loggers |= {"vlm/test_train.py", "vlm/test_train_config.py"}
    for path in SOURCES:
        chosen = () if "/".join(path.parts[-2:]) in loggers else ("wandb",)
        for bad in (*unsafe, "import torchvision", *chosen) if path.name != "test_repo.py" else ():
            assert bad not in path.read_text(), f"{path}: {bad}"
    needs = [
        line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()
    ]
    assert not [x for x in needs if x.startswith("torchvision")]
    assert needs[-1] == "-e ." and "torch==2.13.0" in needs


def imported(path):
    """Modules of this project that a file imports, wherever in it: "vlm.llava", "utils.run"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {
                name if (ROOT / f"{name.replace('.', '/')}.py").is_file() else node.module
                for name in inner
            }
    return {name for name in found if (ROOT / f"{name.replace('.', '/')}.py").is_file()}


MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts): imported(p)
    for p in SOURCES
    if p.relative_to(ROOT).parts[0] != "tests"
}


def may_import(home):
    """A house of three floors: utils at the bottom, six chapters beside each other, vlm on top."""
    if home == "utils":
        return {"utils"}
    return {"utils", *CHAPTERS} if home == "vlm" else {"utils", home}


@pytest.mark.parametrize("module", MODULES)
def test_no_import_goes_up_or_sideways(module):
    home = module.split(".")[0]
    wrong = {name for name in MODULES[module] if name.split(".")[0] not in may_import(home)}
    assert not wrong, f"{module} imports {wrong}"


def test_no_circle_of_imports():
    """Not even through an import inside a function: leaves are taken away until nothing is left."""
    left = dict(MODULES)
    while leaves := [name for name, needs in left.items() if not needs & left.keys() - {name}]:
        for name in leaves:
            del left[name]
    assert not left, f"in a circle, or on the way to one: {sorted(left)}"


def test_shipped_weights_are_small_and_have_their_record():
    weights = sorted(ROOT.glob("*/weights/*.safetensors"))
    assert {p.stem for p in weights} >= {
        "quality",
        "ddpm",
        "autoencoder",
        "stable_diffuser",
        "dit",
        "mae",
    }
    assert (
        max(p.stat().st_size for p in weights) <= 10e6
        and sum(p.stat().st_size for p in weights) <= 35e6
    )
    for p in weights:
        record = json.loads(p.with_suffix(".json").read_text())
        assert {"config", "metrics"} <= record.keys()
        assert (
            record["metrics"]["train_seconds"] > 0
            and record["metrics"]["machine"]
            and record["metrics"]["command"]
        )
        assert p.with_name(f"{p.stem}_loss.png").is_file()


def test_make_installs_once(tmp_path):
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())

    def plan():
        dry = ["make", "-n", "demo"]
        return subprocess.run(dry, cwd=tmp_path, capture_output=True, text=True).stdout

    assert "pip install" in plan() and "utils.demo" in plan()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "ready").touch()
    assert "pip install" not in plan() and "utils.demo" in plan()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests/mutants").glob("*.toml")), ids=lambda p: p.stem
)
def test_every_mutant_still_has_its_line(path):
    """A list of mutants whose lines are gone breaks nothing and proves nothing."""
    listed = mutate.mutants(path.stem)
    assert len({m["name"] for m in listed}) == len(listed)
    for mutant in listed:
        assert mutant["kind"] in mutate.KINDS
        assert mutate.broken(mutant) != (ROOT / mutant["file"]).read_text("utf-8")
        named = [
            word.split("::")[0]
            for word in shlex.split(mutant["tests"])
            if word.startswith("tests/")
        ]
        assert named and all((ROOT / name).is_file() for name in named), mutant["tests"]


def test_the_table_of_mutants_is_that_of_the_lists():
    written = mutate.table() in (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert written, "the table of mutants is behind: python tests/mutate.py --table prints it"


def test_the_tour_names_every_file():
    """What a file holds is its docstring; its length may have changed by a quarter since then."""
    listed = re.findall(
        r"^\| \[.*?\]\(\.\./(.*?)\) \| (\d+) \| (.*) \|$", tour.PAGE.read_text("utf-8"), re.M
    )
    rows = tour.rows()
    behind = {(path, what) for path, _, what in listed} ^ {(path, what) for path, _, what in rows}
    assert not behind, f"docs/TOUR.md is behind: python tests/tour.py --write: {behind}"
    for (path, lines, _), (_, now, _) in zip(listed, rows):
        assert abs(int(lines) - now) <= now / 4, (
            f"{path} had {lines} lines and has {now}: python tests/tour.py --write"
        )
