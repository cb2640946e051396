"""The documentation's pictures say what is so."""

import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


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
