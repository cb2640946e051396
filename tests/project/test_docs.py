"""The documentation holds: its code runs, and its picture says what is so."""

import ast
import importlib
import inspect
import re
import sys
import textwrap

import jax
import pytest
from harness import ROOT, not_there, run_python

import jaxbptt

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
API = sorted(DOCS.glob("api/*.md"))
EXAMPLES = sorted(DOCS.glob("examples/*.md"))  # their code is that of files: test_examples.py
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


# ------------------------------------------------------------------ the API's pages

ENTRIES = re.findall(
    r"^::: jaxbptt\.(\S+)$", "".join(p.read_text("utf-8") for p in API), re.MULTILINE
)


def public_objects():
    """What jaxbptt exports, and the methods of its classes."""
    for name in jaxbptt.__all__:
        exported = getattr(jaxbptt, name)
        yield name, exported
        if inspect.isclass(exported):
            own = vars(exported).items()
            yield from (
                (f"{name}.{attribute}", value)
                for attribute, value in own
                if inspect.isfunction(value)
                and (not attribute.startswith("_") or attribute == "__call__")
            )


def annotated(thing):
    """The names in the annotations of a function, or of the attributes that a class tells of."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    if isinstance(definition, ast.ClassDef):
        fields = [node for node in definition.body if isinstance(node, ast.AnnAssign)]
        said = re.findall(r"^ +(\w+): ", inspect.getdoc(thing) or "", re.MULTILINE)
        hints = [node.annotation for node in fields if ast.unparse(node.target) in said]
    else:
        args = definition.args
        every = [*args.posonlyargs, *args.args, *args.kwonlyargs]
        hints = [definition.returns, *(arg.annotation for arg in every)]
    nodes = [node for hint in hints if hint is not None for node in ast.walk(hint)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.value for node in nodes if isinstance(node, ast.Constant)}


def test_every_public_name_has_one_entry_on_the_api_pages():
    assert len(ENTRIES) == len(set(ENTRIES))
    assert set(jaxbptt.__all__) <= set(ENTRIES)
    linked = re.findall(r"`(\w+)`", (DOCS / "api" / "index.md").read_text("utf-8"))
    functions = [n for n in jaxbptt.__all__ if inspect.isfunction(getattr(jaxbptt, n))]
    assert set(functions) <= set(linked)


def test_every_type_that_a_public_name_takes_or_gives_has_an_entry():
    last = {entry.rpartition(".")[2] for entry in ENTRIES}
    for name, thing in public_objects():
        if inspect.isfunction(thing) or inspect.isclass(thing):
            defined = vars(sys.modules[thing.__module__])
            types = {word for word in annotated(thing) if word in defined and word[:1] != "_"}
            ours = {
                word
                for word in types
                if word == "PyTree"
                or str(getattr(defined[word], "__module__", "")).startswith("jaxbptt.")
            }
            assert ours <= last, name


def test_a_docstring_is_laid_out_as_the_site_reads_it():
    for name, thing in public_objects():
        if not (inspect.isfunction(thing) or inspect.isclass(thing)):
            continue
        text = inspect.getdoc(thing) or ""
        assert "Example:" not in text, f"{name}: a section is called Examples"
        # What stands before a colon there is shown as a type.
        first = re.search(r"^Returns:\n(.*)$", text, re.MULTILINE)
        assert first is None or not re.search(r":(\s|$)", first[1]), name


def test_the_site_says_which_version_it_is_of():
    site = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert f"copyright: jaxbptt {jaxbptt.__version__}," in site


def test_every_page_is_in_the_contents_of_the_site():
    nav = (ROOT / "mkdocs.yml").read_text("utf-8").split("\nnav:\n")[1]
    assert sorted(re.findall(r"[\w/]+\.md", nav)) == sorted(
        str(page.relative_to(DOCS)) for page in (*PAGES, *API, *EXAMPLES)
    )


def test_no_line_of_code_is_wider_than_the_column_of_the_site():
    for page in PAGES:
        code = re.findall(r"^```\w*\n(.*?)^```$", page.read_text("utf-8"), re.M | re.DOTALL)
        assert not [line for block in code for line in block.splitlines() if len(line) > 101], page


def test_the_table_of_the_notebooks_lists_all_of_them():
    text = (DOCS / "notebooks.md").read_text("utf-8")
    rows = re.findall(r"^\| \[.+\]\(\.\./notebooks/(.*?)\) \|", text, re.MULTILINE)
    assert rows == sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))


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


@pytest.mark.parametrize("name", [pytest.param("by_lag", marks=pytest.mark.slow), "edges", "idea"])
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
