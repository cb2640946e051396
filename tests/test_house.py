"""Rules of the house that a reader relies on: floors, sizes, public JAX only, messages checked."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "jaxbptt").glob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path):
    """Dotted names of everything a file imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def imported_at_once(path):
    """The same without what is imported by a function when it is called, or for types only."""
    names = set()
    for node in parse(path).body:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@each_module
def test_a_module_imports_only_from_those_above_it_in_the_readme(path):
    order = re.findall(r"^\| `(\w+)\.py` \|", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    own = {name.split(".")[1] for name in imported(path) if name.startswith("jaxbptt.")}
    below = [name for name in own & set(order) if order.index(name) >= order.index(path.stem)]
    assert not below


@each_module
def test_only_public_jax_is_imported(path):
    assert not [name for name in imported(path) if "._src" in name or "jaxlib" in name]


@each_module
def test_no_file_is_over_250_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 250


def test_only_the_core_is_needed_to_import_the_package():
    shown = re.search(
        r"^dependencies = \[(.*)\]$", (ROOT / "pyproject.toml").read_text("utf-8"), re.M
    )
    core = {re.match(r"\w+", name)[0] for name in re.findall(r'"(.*?)"', shown[1])}
    assert core == {"jax", "numpy"}
    others = {"flax", "matplotlib", "optax", "orbax", "tqdm"}
    for path in MODULES:
        if "demo" not in path.stem and path.stem != "__main__":
            assert not others & {name.split(".")[0] for name in imported_at_once(path)}, path.name


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_an_expected_error_is_expected_with_its_message(path):
    calls = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
    raises = [call for call in calls if ast.unparse(call.func) in ("pytest.raises", "pytest.warns")]
    assert all(any(key.arg == "match" for key in call.keywords) for call in raises)


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_no_test_is_skipped_or_expected_to_fail_for_good(path):
    names = {ast.unparse(node) for node in ast.walk(parse(path)) if isinstance(node, ast.Attribute)}
    assert not names & {"pytest.mark.skip", "pytest.mark.xfail", "pytest.xfail"}
