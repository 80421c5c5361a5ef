"""Every notebook runs from top to bottom without an error: `make notebooks`. The files themselves are not changed."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*/*.ipynb")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_notebook(path):
    here = {"metadata": {"path": str(path.parent)}}  # the folder that Jupyter starts in
    NotebookClient(nbformat.read(path, as_version=4), timeout=600, kernel_name="python3", resources=here).execute()
