"""The notebooks run from top to bottom, and what is committed has been run."""

import os
import pathlib
import subprocess
import sys

import pytest
from conftest import COMPILE_SOON

nbformat = pytest.importorskip("nbformat")
NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "colab").glob("*.ipynb"))
# Executes a notebook of its own in a process of its own; argument: the notebook.
RUN = """
import pathlib, sys
import nbclient, nbformat
path = pathlib.Path(sys.argv[1])
notebook = nbformat.read(path, 4)
nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(path.parent)}}).execute()
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_and_link(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert f"colab/{path.name})" in notebook.cells[0].source, "no link that opens it in Colab"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.execution_count, f"not run: {cell.source[:60]}"
            assert all(output.output_type != "error" for output in cell.outputs)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, tmp_path):
    small = "tiny" in path.stem  # its programs take longer to compile than to run
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": COMPILE_SOON if small else "", "LRJAX_QUICK": "1",
        "IPYTHONDIR": str(tmp_path),
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(path)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
