"""The script for a GPU runs to its end on whatever there is, and finds everything exact."""

import json
import re
import sys
from pathlib import Path

import pytest
from harness import run_python

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_script_for_a_gpu(tmp_path):
    done = run_python(ROOT / "benchmarks" / "gpu.py", tmp_path, "--quick", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    torch = "torch" in sys.modules or any(Path(p, "torch").is_dir() for p in sys.path if p)
    failed = [row for row in rows if "failed" in row and (torch or "PyTorch" not in row["table"])]
    assert not failed
    errors = [row["error"] for row in rows if row["table"] == "exact"]
    assert len(errors) >= 6
    assert max(errors) < 5e-6
    tables = {row["table"].split(",")[0] for row in rows}
    assert tables >= {"a whole sequence of 100 steps", "an update", "against the window"}
    assert "| stored, every 1 |" in (tmp_path / "GPU.md").read_text()


@pytest.mark.slow
def test_the_script_that_asks_for_windows(tmp_path):
    pytest.importorskip("optax")
    done = run_python(ROOT / "benchmarks" / "advice.py", "--quick", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (said,) = re.findall(r"^\| copy-2 \| - \| (\d+) \| ", done.stdout, re.MULTILINE)
    assert 2 <= int(said) <= 6  # it needs 3
