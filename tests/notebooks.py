"""Every notebook runs from top to bottom without an error: `make notebooks` leaves the files as they are.

As a script it keeps what they print and draw:

    python tests/notebooks.py            # all of them
    python tests/notebooks.py ddpm       # only this one; models/ddpm says the same
"""

import base64
import io
import os
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.provisioning import LocalProvisioner
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

FOLDER = Path(__file__).parent.parent / "notebooks"
PATHS = sorted(FOLDER.glob("*/*.ipynb"))


class Forked(LocalProvisioner):
    """Starts a kernel as a fork of the warm helper, which spares it the imports."""

    async def launch_kernel(self, cmd, **settings):
        from tests import warm  # not there when this file is run as a script

        self.process = warm.Kernel(cmd[cmd.index("-f") + 1], settings["cwd"])
        self.pid = self.process.pid
        return self.connection_info

    async def wait(self):
        return self.process.wait()


def run(path, forked=False):
    """The executed notebook; raises CellExecutionError at the first cell that fails."""
    here = {"metadata": {"path": str(path.parent)}}  # the folder that Jupyter starts in
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress"  # a bar drawn with letters is fine
    client = NotebookClient(
        nbformat.read(path, as_version=4), timeout=600, kernel_name="python3", resources=here
    )
    if forked:
        client.km = client.create_kernel_manager()
        client.km.provisioner = Forked(
            kernel_id="forked", kernel_spec=client.km.kernel_spec, parent=client.km
        )
    return client.execute()


def shrink(notebook):
    """Figures in 256 colours, so that the file stays small; wipe times, versions and bars: noise in every diff."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                full = Image.open(
                    io.BytesIO(base64.b64decode(output["data"]["image/png"]))
                ).convert("RGB")
                full.quantize(256, dither=Image.Dither.NONE).save(
                    small := io.BytesIO(), "png", optimize=True
                )
                output["data"]["image/png"] = base64.b64encode(small.getvalue()).decode()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
    }


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_notebook(path):
    run(path, forked=True)


@pytest.mark.parametrize("code", ["1 / 0", "import socket; raise SystemExit(3)"])
def test_a_cell_that_fails_is_noticed(code, tmp_path):
    cells = [nbformat.v4.new_code_cell(x) for x in ("a = 1", code)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "wrong.ipynb")
    with pytest.raises(CellExecutionError):
        run(tmp_path / "wrong.ipynb", forked=True)


if __name__ == "__main__":
    for path in PATHS:
        if len(sys.argv) == 1 or {path.stem, f"{path.parent.name}/{path.stem}"} & set(sys.argv[1:]):
            notebook = run(path)
            shrink(notebook)
            nbformat.write(notebook, path)
            print(path.relative_to(FOLDER))
