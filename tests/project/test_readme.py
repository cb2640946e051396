"""The README holds: its code runs, and its commands are those that CI runs."""

import ast
import inspect
import re
import tomllib

import pytest
from harness import ROOT, run_python

import jaxbptt

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"
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


def file_of(link):
    """The file of this repository that an absolute link shows, None if it is of another."""
    for pattern in (
        r"https://github\.com/jaxbptt/jaxbptt/blob/main/(.+)",
        r"https://raw\.githubusercontent\.com/jaxbptt/jaxbptt/main/(.+)",
    ):
        if found := re.fullmatch(pattern, link):
            return ROOT / found[1]
    workflow = r"https://github\.com/jaxbptt/jaxbptt/actions/workflows/(\w+\.yml)(/badge\.svg)?"
    if found := re.fullmatch(workflow, link):
        return ROOT / ".github" / "workflows" / found[1]
    if link == "https://jaxbptt.github.io/jaxbptt/":
        return DOCS / "index.md"
    if found := re.fullmatch(r"https://jaxbptt\.github\.io/jaxbptt/(.+)/", link):
        page = DOCS / found[1]
        return page / "index.md" if page.is_dir() else page.with_suffix(".md")
    return None


def test_every_link_is_absolute_since_the_readme_is_shown_elsewhere_too():
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert links
    assert all(link.startswith("https://") for link in links)


def test_the_files_that_the_readme_names_exist():
    named = [file for link in re.findall(r"\]\(([^)]+)\)", TEXT) if (file := file_of(link))]
    assert len(named) > 15
    assert not [file for file in named if not file.exists()]
    ours = [link for link in re.findall(r"https://[^)}\s]*", TEXT) if "jaxbptt" in link]
    elsewhere = {link for link in ours if not file_of(link)}
    assert elsewhere == {
        "https://github.com/jaxbptt/jaxbptt",
        "https://img.shields.io/pypi/v/jaxbptt",
        "https://pypi.org/project/jaxbptt/",
    }


def test_the_addresses_of_the_project_are_the_same_everywhere():
    home, site = "https://github.com/jaxbptt/jaxbptt", "https://jaxbptt.github.io/jaxbptt/"
    contents = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert f"repo_url: {home}\n" in contents
    assert f"site_url: {site}\n" in contents
    assert f'repository-code: "{home}"' in (ROOT / "CITATION.cff").read_text("utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["urls"] == {
        "Homepage": home,
        "Documentation": site,
        "Repository": home,
        "Changelog": f"{home}/blob/main/CHANGELOG.md",
        "Issues": f"{home}/issues",
    }


def test_the_readme_is_short():
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"\]\([^)]*\)", "]", re.sub(r"^\|.*$", "", prose, flags=re.MULTILINE))
    assert len(prose.split()) < 750


def test_the_readme_names_the_extras_and_the_defaults_that_there_are():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (line,) = re.findall(r"^- \*\*Extras\*\*: (.*)$", TEXT, re.MULTILINE)
    extras = project["optional-dependencies"].keys()
    assert set(re.findall(r"`(\w+)`", line)) == extras - {
        "notebooks",
        "docs",
        "bench",
        "examples",
        "test",
        "dev",
    }
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", TEXT, re.MULTILINE)
    of_all = [jaxbptt.record, jaxbptt.learner, jaxbptt.scan]
    for name, default in rows:
        taken = [inspect.signature(f).parameters.get(name) for f in of_all]
        assert {p.default for p in taken if p} == {ast.literal_eval(default)}
    assert {name for name, _ in rows} == {"every", "weights", "pace", "remat"}


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
    assert f"version = {{{cited[1]}}}" in TEXT
