"""The README holds: its code runs, and its commands are those that CI runs."""

import re

import pytest
from harness import ROOT, run_python

import jaxbptt

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
    done = run_python(program, cwd=tmp_path)
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


def test_the_files_that_the_readme_names_exist():
    named = set(re.findall(r"`([\w/]+\.(?:ipynb|md))`|\]\((?!http)([^)#]+)\)", TEXT))
    assert len(named) > 10
    assert all((ROOT / (code or link)).exists() for code, link in named)


def test_every_notebook_is_named_in_the_readme_and_on_its_page():
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"(notebooks/{path.name})" in TEXT
        assert f"| `{path.stem}` |" in page


def test_the_badges_say_what_the_project_says():
    badges = dict(re.findall(r"^!\[.*\]\(.*/badge/(\w+)-(.*)-\w+\)$", TEXT, re.MULTILINE))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert badges.pop("Python") == f"{pythons[0]}_to_{pythons[-1]}"
    oldest = re.search(r'"jax>=([\d.]+?)(?:\.0)?"', project)[1]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert badges.pop("JAX") == "_to_".join(
        re.search(r"^- JAX (\S+) to (\S+),", changes, re.M).groups()
    )
    assert f"- JAX {oldest} to" in changes
    assert badges.pop("mypy") == "strict"
    assert "strict = true" in project[project.index("[tool.mypy]") :]
    assert badges.pop("license").replace("--", "-") == re.search(r'license = "(.*)"', project)[1]
    assert not badges


def test_the_citation_is_of_this_version():
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert cited[1] == jaxbptt.__version__
