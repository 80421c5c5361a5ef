"""Mutation testing: break one line at a time in a copy of the tree, run the tests that guard it, expect a failure.

The mutants of a chapter are listed in tests/mutants/CHAPTER.toml, each as

    [[mutant]]
    name = "ddpm: raw weights sampled instead of EMA"
    kind = "wiring"                      # or "equation"
    file = "models/ddpm.py"
    before = "sample(ema, "              # occurs once in the file
    after = "sample(model, "
    tests = "tests/models/test_ddpm.py -k ema"  # arguments of pytest

    python tests/mutate.py models                  # killed or survived, a line each; exit code 1 if one survived
    python tests/mutate.py models --only "ddpm"    # those whose name holds the words
    python tests/mutate.py --table                 # counts per chapter and kind, nothing is run
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, it finds its own folder there

from tests import warm  # noqa: E402

LISTS = Path(__file__).parent / "mutants"
KINDS = ("equation", "wiring")


def mutants(chapter: str) -> list[dict]:
    """The list of one chapter, in the file's order."""
    return tomllib.loads((LISTS / f"{chapter}.toml").read_text("utf-8"))["mutant"]


def broken(mutant: dict, root: Path = ROOT) -> str:
    """Text of the file with the mutant in it. Raises ValueError if `before` does not occur exactly once."""
    text = (root / mutant["file"]).read_text("utf-8")
    found = text.count(mutant["before"])
    if found != 1:
        raise ValueError(f"{mutant['name']}: its line occurs {found} times in {mutant['file']}")
    return text.replace(mutant["before"], mutant["after"])


def copy_tree(target: Path) -> None:
    """What git knows, as it lies in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in listed.stdout.splitlines():
        source = ROOT / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)


PYTEST = """
import sys
import pytest
sys.dont_write_bytecode = True
if __name__ == "__main__":  # ranks that a test starts import this file, too
    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def run_tests(tree: Path, arguments: str) -> int:
    """pytest's exit code: 0 all passed, 1 one failed, anything else says that nothing was tested.

    In a fork of a process that has the libraries, and no chapter: a fork imports those of its tree, first on the path.
    """
    (tree / "run_pytest.py").write_text(PYTEST, "utf-8")
    words = [str(tree / "run_pytest.py"), *shlex.split(arguments)]
    code = warm.run(words, cwd=tree, env={"PYTHONPATH": str(tree)}, network=True).returncode
    return 1 if code == -9 else code  # a test that never ends has noticed


def verdict(mutant: dict, tree: Path) -> str:
    """Apply it in `tree`, run its tests, put the file back -> "killed", "SURVIVED" or what went wrong."""
    path = tree / mutant["file"]
    whole = path.read_text("utf-8")
    path.write_text(broken(mutant, tree), "utf-8")
    code = run_tests(tree, mutant["tests"])
    path.write_text(whole, "utf-8")
    return {0: "SURVIVED", 1: "killed"}.get(code, f"not run (pytest ended with {code})")


def judge(part: list[dict]) -> list[tuple[dict, str]]:
    """The mutants of one process, in a copy of the tree of its own -> verdicts, printed as they come.

    A selection of tests that fails without a mutant proves nothing, so each is run unbroken first.
    """
    found, unbroken = [], {}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        for mutant in part:
            tests = mutant["tests"]
            if tests not in unbroken:
                unbroken[tests] = run_tests(tree, tests)
            whole = unbroken[tests] == 0
            result = verdict(mutant, tree) if whole else f"not run: fails without a mutant: {tests}"
            print(f"{result:10} {mutant['kind']:9} {mutant['name']}", flush=True)
            found.append((mutant, result))
    warm.stop()
    return found


def run_all(listed: list[dict], jobs: int) -> Counter:
    """Every mutant, `jobs` processes side by side; those with the same tests stay together."""
    listed = sorted(listed, key=lambda m: m["tests"])
    size = -(-len(listed) // jobs)
    parts = [listed[i * size : (i + 1) * size] for i in range(jobs)]
    with ProcessPoolExecutor(jobs) as pool:
        return Counter(
            (result, mutant["kind"]) for part in pool.map(judge, parts) for mutant, result in part
        )


def table() -> str:
    """A row per chapter: how many mutants of each kind."""
    lines = ["| chapter | equation | wiring | together |", "|---|---|---|---|"]
    total: Counter = Counter()
    for path in sorted(LISTS.glob("*.toml")):
        kinds = Counter(m["kind"] for m in mutants(path.stem))
        total += kinds
        lines.append(
            f"| {path.stem} | {kinds['equation']} | {kinds['wiring']} | {sum(kinds.values())} |"
        )
    lines.append(f"| all | {total['equation']} | {total['wiring']} | {sum(total.values())} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="break one line at a time; a test must fail")
    parser.add_argument("chapters", nargs="*", help="none: all of them")
    parser.add_argument("--only", default="", help="mutants whose name holds these words")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="count them, run nothing")
    args = parser.parse_args()
    if args.table:
        print(table())
        return 0
    known = sorted(path.stem for path in LISTS.glob("*.toml"))
    unknown = set(args.chapters) - set(known)
    if unknown:
        parser.error(
            f"no list of mutants for {', '.join(sorted(unknown))}; there are {', '.join(known)}"
        )
    listed = [m for c in args.chapters or known for m in mutants(c) if args.only in m["name"]]
    counts = run_all(listed, args.jobs)
    killed = sum(n for (result, _), n in counts.items() if result == "killed")
    print(f"{killed} of {len(listed)} killed")
    return int(killed < len(listed))


if __name__ == "__main__":
    sys.exit(main())
