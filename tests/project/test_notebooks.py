"""The notebooks run from top to bottom, here and in Colab, and are committed as they were run."""

import os
import re
import subprocess
import sys
import venv

import pytest
from harness import PATIENCE, ROOT, not_there

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY = "https://github.com/jaxbptt/jaxbptt"
COLAB = "https://colab.research.google.com/github/jaxbptt/jaxbptt/blob/main/notebooks"
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def nbformat():
    return pytest.importorskip("nbformat")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


# ----------------------------------------------------------------------- they run


@pytest.mark.slow
@each_notebook
def test_it_runs_headless(path, nbformat, tmp_path, monkeypatch):
    kernelspec = pytest.importorskip("ipykernel.kernelspec")
    # A kernel of this interpreter, whatever "python3" means to the user's own Jupyter.
    kernelspec.install(kernel_name="under_test", prefix=str(tmp_path))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    execute(notebook, path.parent, monkeypatch)
    assert pictures(notebook) >= 1


def execute(notebook, folder, monkeypatch):
    """Runs all cells in this folder, by the kernel `under_test`."""
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("JAXBPTT_SMALL", "1")  # fewer steps and seeds, where a notebook is long
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    client = nbclient.NotebookClient(
        notebook,
        timeout=PATIENCE,  # of one cell
        startup_timeout=PATIENCE,
        iopub_timeout=PATIENCE,  # for a cell's output to come after its end
        kernel_name="under_test",
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()


def pictures(notebook):
    return sum(
        "image/png" in output.get("data", {})
        for cell in code_cells(notebook)
        for output in cell.outputs
    )


@pytest.mark.slow
def test_alone_in_a_folder_it_installs_the_library_and_runs(nbformat, tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    pytest.importorskip("pip")

    def pip(python, *arguments):
        command = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
        subprocess.run(list(map(str, command)), check=True, timeout=PATIENCE)

    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    # Of what a machine of Colab has, as much as the notebook takes from there.
    fresh = tmp_path / "fresh"
    venv.create(fresh, with_pip=True)
    python = fresh / "bin" / "python"
    pip(python, "install", "jax", "matplotlib", "ipykernel")
    kernel = [python, "-m", "ipykernel", "install", "--prefix", tmp_path, "--name", "under_test"]
    monkeypatch.delenv("PYTHONPATH", raising=False)
    subprocess.run(kernel, check=True, capture_output=True)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    monkeypatch.setenv("JAXBPTT_INSTALL", f"jaxbptt[demo] @ {wheel.as_uri()}")

    folder = tmp_path / "empty"
    folder.mkdir()
    notebook = nbformat.read(ROOT / "notebooks" / "08_hypergradients.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("print(jaxbptt.__file__)"))
    execute(notebook, folder, monkeypatch)
    assert pictures(notebook) >= 1
    assert notebook.cells[-1].outputs[0].text.startswith(str(fresh))


# ------------------------------------------------------------------ how they begin


@each_notebook
def test_it_has_a_badge_that_opens_it_in_colab(path, nbformat):
    head = nbformat.read(path, as_version=4).cells[0]
    assert head.cell_type == "markdown"
    assert f"({COLAB}/{path.name})" in head.source


@pytest.fixture(scope="module")
def beginning(nbformat):
    """The first code cell, which is the same in all."""
    (cell,) = {code_cells(nbformat.read(path, as_version=4))[0].source for path in NOTEBOOKS}
    return cell


def test_the_first_cell_is_short_and_installs_from_the_repository(beginning):
    assert len(beginning.splitlines()) < 10
    assert re.search(r"^ +%pip install", beginning, re.MULTILINE)
    assert f'"jaxbptt[demo] @ git+{REPOSITORY}"' in beginning


@pytest.mark.parametrize("there", ["nothing", "a clone, not installed", "the library"])
def test_the_first_cell_installs_only_where_the_library_is_missing(there, beginning, tmp_path):
    if there.startswith("a clone"):
        (tmp_path / "jaxbptt" / "jaxbptt").mkdir(parents=True)
        (tmp_path / "jaxbptt" / "jaxbptt" / "__init__.py").touch()
    program = re.sub(r"%pip install .*", "print('installs', source)", beginning)
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],  # -S: nothing that is installed here is found
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT) if there == "the library" else "", "JAXBPTT_INSTALL": "a.whl"},
    )
    assert done.stdout == ("" if there == "the library" else "installs a.whl\n")


@each_notebook
def test_what_it_fetches_from_the_repository_is_there(path):
    source = path.with_suffix(".py").read_text(encoding="utf-8")
    for name in re.findall(
        r"https://raw\.githubusercontent\.com/jaxbptt/jaxbptt/main/([\w/.]+)", source
    ):
        assert (ROOT / name).is_file()


# ------------------------------------------------------------- they are committed so


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
