"""The README holds: its code runs, its commands are those that CI runs, its file list is true."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxbptt

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = "pip install -e '.[demo]' && python -m jaxbptt"
TEST = "pip install -e '.[test]' && python -m pytest"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_the_code_runs_in_order_as_a_reader_would_run_it(tmp_path):
    pytest.importorskip("optax")
    # In a process of its own: this one has settings that a reader hasn't.
    program = tmp_path / "readme.py"
    program.write_text("\n".join(blocks("python")), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, last = map(float, re.findall(r"loss ([\d.]+) at first, ([\d.]+) in", done.stdout)[0])
    assert last < first / 4, "the example doesn't learn any more"
    stored, current = map(float, re.findall(r": ([\d.]+) KiB", done.stdout))
    assert current < stored


def test_the_two_commands_are_there_and_each_is_a_block_of_its_own():
    assert [block.strip() for block in blocks("sh")] == [DEMO, TEST]


def test_ci_takes_the_test_command_from_the_readme():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in script
    assert "python -m pytest'" not in script.replace(TEST, ""), "retyped: take it from the README"
    pattern = re.search(r"grep -m1 '(.*)' README\.md", script)[1]
    found = [line for line in TEXT.splitlines() if re.search(pattern, line)]
    assert found[0] == TEST


def test_the_file_table_names_every_module_and_says_its_first_line():
    listed = dict(re.findall(r"^\| `(\w+\.py)` \| (.*) \|$", TEXT, re.MULTILINE))
    first_lines = {
        path.name: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines()[0]
        for path in (ROOT / "jaxbptt").glob("*.py")
    }
    assert listed == first_lines


def test_the_files_that_the_readme_names_exist():
    named = set(re.findall(r"`([\w/]+\.(?:ipynb|md))`", TEXT))
    assert named
    assert all((ROOT / name).exists() for name in named)


def test_the_citation_is_of_this_version():
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert cited[1] == jaxbptt.__version__
