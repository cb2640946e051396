"""The notebooks run from top to bottom, and are committed as they were run."""

import os

import pytest
from harness import PATIENCE, ROOT, not_there

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def nbformat():
    return pytest.importorskip("nbformat")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.slow
@each_notebook
def test_it_runs_headless(path, nbformat, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    kernelspec = pytest.importorskip("ipykernel.kernelspec")
    # A kernel of this interpreter, whatever "python3" means to the user's own Jupyter.
    kernelspec.install(kernel_name="under_test", prefix=str(tmp_path))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("JAXBPTT_SMALL", "1")  # fewer steps and seeds, where a notebook is long
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=PATIENCE,  # of one cell
        startup_timeout=PATIENCE,
        iopub_timeout=PATIENCE,  # for a cell's output to come after its end
        kernel_name="under_test",
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    assert pictures(notebook) >= 1


def pictures(notebook):
    return sum(
        "image/png" in output.get("data", {})
        for cell in code_cells(notebook)
        for output in cell.outputs
    )


@each_notebook
def test_it_is_committed_with_its_outputs_in_order(path, nbformat):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    kinds = {output.output_type for cell in code_cells(notebook) for output in cell.outputs}
    assert "error" not in kinds
    assert pictures(notebook) >= 1


@each_notebook
def test_it_says_what_its_source_says(path, nbformat):
    jupytext = pytest.importorskip("jupytext")
    source = jupytext.read(path.with_suffix(".py"))
    notebook = nbformat.read(path, as_version=4)
    assert [(c.cell_type, c.source) for c in notebook.cells] == [
        (c.cell_type, c.source) for c in source.cells
    ]


@each_notebook
def test_its_source_takes_what_there_is(path):
    assert not not_there(path.with_suffix(".py").read_text(encoding="utf-8"))
