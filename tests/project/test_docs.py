"""The documentation holds: its code runs, and its picture says what is so."""

import importlib
import re
import sys

import jax
import pytest
from harness import ROOT, not_there, run_python

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
EXTRAS = {"flax": "flax", "optax": "optax", "orbax": "orbax.checkpoint", "matplotlib": "matplotlib"}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks_of(page):
    return re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@each_page
def test_the_code_of_a_page_runs_in_order_as_a_reader_would_run_it(page, tmp_path):
    blocks = blocks_of(page)
    program = tmp_path / "page.py"
    program.write_text("\n".join(blocks), encoding="utf-8")
    for name, package in EXTRAS.items():
        if any(name in block for block in blocks):
            pytest.importorskip(package)
    done = run_python(program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@each_page
def test_the_code_of_a_page_takes_what_there_is(page):
    assert not not_there("\n".join(blocks_of(page)))


@pytest.fixture
def edges(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(DOCS)
    yield __import__("edges")
    del sys.modules["edges"]


@pytest.mark.slow
def test_the_edges_that_carry_gradient_are_those_that_the_windows_say(edges):
    within = {("ff", 0), ("ff", 1), *(("ss", lag) for lag in range(5))}  # 3 and 6 nodes
    assert edges.live_edges(jax.jit(edges.two_recorders)) == within | {("sf", 0)}
    across = {("sf", 0), ("sf", 1), ("sf", 2), ("fs", 0), ("fs", 1)}
    assert edges.live_edges(jax.jit(edges.one_recorder)) == within | across


@pytest.mark.parametrize("name", ["edges", "idea"])
def test_the_picture_can_be_drawn(name, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(DOCS)
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "__file__", str(tmp_path / f"{name}.py"))
    # Which edges are live is held above; to find out costs most of the time.
    monkeypatch.setattr(script, "live_edges", lambda _: {("ff", 0), ("ss", 3)}, raising=False)
    script.main()
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert (DOCS / f"{name}.png").exists()
    del sys.modules[name]
