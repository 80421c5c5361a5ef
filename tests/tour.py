"""Guided tour of the files: every module with its number of lines and the first sentence of its docstring.

python tests/tour.py            # print the tables
python tests/tour.py --write    # write them into docs/TOUR.md
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = (
    "utils",
    "models",
    "finetune",
    "training",
    "rag",
    "papers",
    "deploy",
    "vlm",
    "vlm/serve",
    "tests",
)
PAGE = ROOT / "docs" / "TOUR.md"
MARK = "<!-- files -->"


def sentence(path: Path) -> str:
    """First sentence of a module's docstring, on one line."""
    text = " ".join(
        (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split("\n\n")[0].split()
    )
    return re.split(r"(?<=[.?!]) (?=[A-Z(])", text)[0].rstrip(".")


def rows() -> list[tuple[str, int, str]]:
    """(path, lines, what it is), folder by folder."""
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*.py")):
            if path.stem != "__init__" and not path.stem.startswith("test_"):
                lines = len(path.read_text("utf-8").splitlines())
                found.append((f"{folder}/{path.name}", lines, sentence(path)))
    return found


def table() -> str:
    """A heading and a table for each folder."""
    parts = []
    for folder in FOLDERS:
        mine = [row for row in rows() if row[0].rpartition("/")[0] == folder]
        parts.append(
            f"## {folder}/, {sum(n for _, n, _ in mine)} lines\n\n| file | lines | what it holds |\n|---|---|---|"
        )
        parts[-1] += "".join(
            f"\n| [{p.rpartition('/')[2]}](../{p}) | {n} | {what} |" for p, n, what in mine
        )
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        head = PAGE.read_text("utf-8").split(MARK)[0] if PAGE.is_file() else ""
        PAGE.write_text(f"{head}{MARK}\n\n{table()}", "utf-8")
    else:
        print(table())
