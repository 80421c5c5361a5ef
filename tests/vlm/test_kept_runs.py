"""vlm/kept_runs.py: rows of finished runs are read again, if they are of the same flags and it is asked for."""

import pytest

from utils.run import UserError
from vlm import kept_runs

FLAGS = {"steps": 3, "kinds": ["a", "b"]}


def test_a_row_is_made_once_and_read_afterwards(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"accuracy": len(made) / 2}

    assert kept_runs.row(tmp_path, FLAGS, make, True) == {"accuracy": 0.5}
    assert kept_runs.row(tmp_path, FLAGS, make, True) == {"accuracy": 0.5} and len(made) == 1
    # not asked for: made again, and kept
    assert kept_runs.row(tmp_path, FLAGS, make, False) == {"accuracy": 1.0}
    assert kept_runs.row(tmp_path, FLAGS, make, True) == {"accuracy": 1.0} and len(made) == 2


def test_a_row_of_other_flags_is_refused(tmp_path):
    kept_runs.row(tmp_path, FLAGS, dict, False)
    with pytest.raises(UserError, match="other flags: leave out --reuse"):
        kept_runs.row(tmp_path, FLAGS | {"steps": 4}, dict, True)
