"""Rules of the house that a reader relies on: floors, public JAX only, messages checked, tiers."""

import ast
import functools
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "jaxbptt"
MODULES = sorted(LIBRARY.glob("**/*.py"))
TESTS = sorted((ROOT / "tests").glob("**/*.py"))
# In the order in which they build on one another; those side by side don't know each other.
WINGS = [
    *[{name} for name in "_version _compat _serialization _types _errors".split()],
    *[{name} for name in "_signatures _arrays _windows".split()],
    *[{name} for name in "_jaxprs _closure _transforms".split()],
    {"_training", "_inspection"},
    *[{name} for name in "_checkpoints __init__ _demo __main__".split()],
]
each_test_file = pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
each_module = pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: str(path.relative_to(LIBRARY))
)


@functools.cache
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


def wing_of(module):
    return next(i for i, names in enumerate(WINGS) if module in names)


@each_module
def test_a_module_imports_only_from_its_own_wing_and_those_before_it(path):
    own = path.relative_to(LIBRARY).with_suffix("").parts[0]
    used = {name.split(".")[1] for name in imported(path) if name.startswith("jaxbptt.")}
    used = {name if (LIBRARY / name).exists() or name[0] == "_" else "__init__" for name in used}
    assert not [name for name in used - {own} if wing_of(name) >= wing_of(own)]


@pytest.mark.parametrize("path", sorted((LIBRARY / "_demo").glob("*.py")), ids=lambda p: p.name)
def test_the_main_job_is_built_on_public_names_alone(path):
    nodes = list(ast.walk(parse(LIBRARY / "__init__.py")))
    (exported,) = (
        ast.literal_eval(node.value)
        for node in nodes
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    ours = {name for name in imported(path) if name.split(".")[0] == "jaxbptt"}
    assert not [
        name for name in ours if name != "jaxbptt" and not name.startswith("jaxbptt._demo.")
    ]
    used = {
        node.attr
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "jaxbptt"
    }
    assert used <= set(exported)
    # Nor what is private in the objects that these names give.
    private = {node.attr for node in ast.walk(parse(path)) if isinstance(node, ast.Attribute)}
    own = {node.name for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef)}
    assert not [name for name in private - own if name.startswith("_") and name != "_replace"]


def test_no_module_needs_itself():
    of_name = {
        ".".join(("jaxbptt", *path.relative_to(LIBRARY).parts))[:-3]: path for path in MODULES
    }
    uses = {
        name: {other for other in of_name if any(i.startswith(other + ".") for i in imported(path))}
        for name, path in of_name.items()
    }
    for name in uses:
        found, left = set(), uses[name]
        while left:
            found |= left
            left = {each for other in left for each in uses[other]} - found
        assert name not in found


def test_no_folder_is_crowded():
    folders = [LIBRARY, *(path for path in LIBRARY.iterdir() if path.is_dir())]
    files = [[p for p in folder.glob("*.py") if p.stem != "__init__"] for folder in folders]
    assert all(len(each) <= 12 for each in files)


def test_the_tour_names_every_module_and_says_its_first_line():
    tour = (ROOT / "docs" / "inside.md").read_text("utf-8")
    listed = dict(re.findall(r"^\| `([\w/]+\.py)` \| (.*) \|$", tour, re.MULTILINE))
    first_lines = {
        str(path.relative_to(LIBRARY)): ast.get_docstring(parse(path)).splitlines()[0]
        for path in MODULES
        if path.name != "__init__.py"
    }
    assert listed == first_lines


@each_module
def test_only_public_jax_is_imported(path):
    assert not [name for name in imported(path) if "._src" in name or "jaxlib" in name]


def test_only_the_core_is_needed_to_import_the_package():
    shown = re.search(
        r"^dependencies = \[(.*)\]$", (ROOT / "pyproject.toml").read_text("utf-8"), re.M
    )
    core = {re.match(r"\w+", name)[0] for name in re.findall(r'"(.*?)"', shown[1])}
    assert core == {"jax", "numpy"}
    others = {"flax", "matplotlib", "optax", "orbax", "tqdm"}
    for path in MODULES:
        if path.parent.name != "_demo":
            assert not others & {name.split(".")[0] for name in imported_at_once(path)}, path.name


@each_test_file
def test_an_expected_error_is_expected_with_its_message(path):
    calls = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
    raises = [call for call in calls if ast.unparse(call.func) in ("pytest.raises", "pytest.warns")]
    assert all(any(key.arg == "match" for key in call.keywords) for call in raises)


@each_test_file
def test_no_test_is_skipped_or_expected_to_fail_for_good(path):
    names = {ast.unparse(node) for node in ast.walk(parse(path)) if isinstance(node, ast.Attribute)}
    assert not names & {"pytest.mark.skip", "pytest.mark.xfail", "pytest.xfail"}


@each_test_file
def test_what_tests_share_is_in_no_test_file(path):
    test_files = {other.stem for other in TESTS if other.stem.startswith("test_")}
    assert not [name for name in imported(path) if test_files & set(name.split("."))]


# ------------------------------------------------ tests that look at a program

READERS = {"as_text", "memory_analysis", "cost_analysis"}


class Looks(NamedTuple):
    """Of a function: all that it names, whether it compiles, whether it reads a program."""

    names: set
    compiles: bool
    reads: bool


@functools.cache
def functions_of(path):
    """The functions of a file by name, in whatever they stand."""
    nodes = [node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef)]
    return {node.name: looks(node) for node in nodes}


def looks(function):
    nodes = list(ast.walk(function))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    arguments = {node.arg for node in nodes if isinstance(node, ast.arg)}  # fixtures among them
    calls = [node.func for node in nodes if isinstance(node, ast.Call)]
    compiles = [
        call
        for call in calls
        if isinstance(call, ast.Attribute)
        and call.attr == "compile"
        and ast.unparse(call.value) != "re"
    ]
    return Looks(names | attributes | arguments, bool(compiles), bool(attributes & READERS))


def looks_at_a_program(name, functions):
    """Whether a function compiles and reads a program: itself, or by all that it names."""
    found, left = set(), {name}
    while left:
        found |= left
        left = {n for each in left for n in functions[each].names & functions.keys()} - found
    found = [functions[each] for each in found]
    return any(each.compiles for each in found) and any(each.reads for each in found)


def marked(node, assigned):
    """Whether a decorator or a module's mark says `compiled`, or names what does."""
    return any(
        "mark.compiled" in ast.unparse(assigned.get(ast.unparse(part), part))
        for part in ast.walk(node)
        if isinstance(part, ast.expr)
    )


@pytest.mark.parametrize(
    "path", [path for path in TESTS if path.stem.startswith("test_")], ids=lambda path: path.name
)
def test_what_looks_at_a_compiled_program_has_all_passes(path):
    helpers = [other for other in TESTS if not other.stem.startswith("test_")]
    shared = {name: of for other in helpers for name, of in functions_of(other).items()}
    functions = shared | functions_of(path)
    assigned = {
        ast.unparse(target): node.value
        for node in parse(path).body
        if isinstance(node, ast.Assign)
        for target in node.targets
    }
    if "pytestmark" in assigned and marked(assigned["pytestmark"], assigned):
        return
    unmarked = [
        node.name
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and not any(marked(each, assigned) for each in node.decorator_list)
    ]
    assert not [name for name in unmarked if looks_at_a_program(name, functions)]
