"""The documentation holds: its code runs, and its picture says what is so."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
EXTRAS = {"flax": "flax", "optax": "optax", "orbax": "orbax.checkpoint", "matplotlib": "matplotlib"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_in_order_as_a_reader_would_run_it(page, tmp_path):
    blocks = re.findall(
        r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    program = tmp_path / "page.py"
    program.write_text("\n".join(blocks), encoding="utf-8")
    for name, package in EXTRAS.items():
        if any(name in block for block in blocks):
            pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, "-W", "error", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ
        | {
            "PYTHONPATH": str(DOCS.parent),
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        },
        timeout=180,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def edges(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(DOCS)
    yield __import__("edges")
    del sys.modules["edges"]


def test_the_edges_that_carry_gradient_are_those_that_the_windows_say(edges):
    within = {("ff", 0), ("ff", 1), *(("ss", lag) for lag in range(5))}  # 3 and 6 nodes
    assert edges.live_edges(edges.two_recorders) == within | {("sf", 0)}
    across = {("sf", 0), ("sf", 1), ("sf", 2), ("fs", 0), ("fs", 1)}
    assert edges.live_edges(edges.one_recorder) == within | across


def test_the_picture_can_be_drawn(edges, tmp_path, monkeypatch):
    monkeypatch.setattr(edges, "__file__", str(tmp_path / "edges.py"))
    edges.main()
    assert (tmp_path / "edges.png").stat().st_size > 10_000
    assert (DOCS / "edges.png").exists()
