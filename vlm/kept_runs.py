"""Rows of finished runs, kept beside their weights: a study that was stopped goes on with the run that is missing."""

import json

from utils import run
from utils.run import check


def row(folder, flags, make, reuse):
    """The row of one run: of an earlier call if `reuse` and there is one, else `make()`, which is kept in
    folder/row.json.

    flags: what else would have given another row, as JSON has it. Raises UserError for a row of other flags.
    """
    path = folder / "row.json"
    if reuse and path.is_file():
        kept = json.loads(path.read_text("utf-8"))
        line = f"{path} was made with other flags: leave out --reuse, or choose another --out"
        check(kept["flags"] == flags, line)
        return kept["row"]
    found = make()
    folder.mkdir(parents=True, exist_ok=True)
    run.write_json(path, {"flags": flags, "row": found})
    return found
