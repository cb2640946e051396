"""What is run elsewhere is what `.ci/run` runs here, with the same tools."""

import re

import pytest
from harness import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def stages():
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    return re.search(r'^stages="(.*)"$', script, re.MULTILINE)[1].split()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_stages_that_there_are(path):
    text = path.read_text("utf-8")
    written = re.findall(r"\.ci/run ([\w ]+)$|stages: ([\w ]+?) *\}", text, re.MULTILINE)
    named = {word for pair in written for word in "".join(pair).split()}
    assert named
    assert named <= set(stages())


def test_each_stage_is_run_by_some_workflow():
    text = "".join(path.read_text("utf-8") for path in WORKFLOWS)
    assert not [name for name in stages() if not re.search(rf"\b{name}\b", text)]


def test_every_python_that_is_said_to_work_is_tried():
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    text = (ROOT / ".github" / "workflows" / "tests.yml").read_text("utf-8")
    tried = re.findall(r'python: "(.*?)", stages: readme', text)
    assert sorted(tried) == sorted(pythons)


def test_the_hooks_have_the_linter_of_the_project():
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    hooks = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    pins = re.findall(r"ruff==[\d.*]+", hooks)
    assert pins
    assert set(pins) == set(re.findall(r"ruff==[\d.*]+", project))
