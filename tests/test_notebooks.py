"""Every notebook runs from top to bottom in a clean kernel, and is stored with the output of such a run."""

import re
from pathlib import Path

import pytest

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def images(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_notebooks_are_there():
    assert "rlhf_walkthrough.ipynb" in [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_from_top_to_bottom(path):
    notebook = nbformat.read(path, 4)
    stored = images(notebook)
    kernel = dict(timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    nbclient.NotebookClient(notebook, **kernel).execute()
    assert images(notebook) == stored > 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_whole_and_clean(path):
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.source.strip() for cell in notebook.cells)
    text = "\n".join([cell.source for cell in notebook.cells] + [str(cell.get("outputs", "")) for cell in code])
    assert not re.search(r"/(tmp|home|root|work|Users)/", text)
