"""Programs with other packages: their gradients, what they learn, and their pages."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import ROOT, not_there, run_python
from jax import lax

import jaxbptt

SCRIPTS = ROOT / "examples"
PAGES = ROOT / "docs" / "examples"
# What each needs, how many steps are enough to see it learn, and how far: its last numbers over
# its first ones, or, where they should grow, what the last ones should be.
PACKAGES = {
    "equinox_lm": ["equinox", "optax"],
    "gymnasium_cartpole": ["gymnasium", "flax", "optax"],
    "gymnax_memory": ["gymnax", "flax", "optax"],
    "jaxley_fit": ["jaxley", "optax"],
    "nnx_lm": ["flax", "optax"],
    "spiking": ["spyx", "flax", "optax"],
}
FALLS = {"equinox_lm": (600, 0.8), "nnx_lm": (1500, 0.8), "jaxley_fit": (6000, 0.5)}
FALLS |= {"spiking": (2000, 0.5)}
GROWS = {"gymnasium_cartpole": (2400, 35), "gymnax_memory": (4500, 0.8)}
each = pytest.mark.parametrize("name", list(PACKAGES))


@pytest.fixture
def example(name):
    """The module, in the numbers and with the warnings that its package has."""
    for package in PACKAGES[name]:
        pytest.importorskip(package)
    jax.config.update("jax_enable_x64", False)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield __import__(name)
    for module in (name, "compare"):
        sys.modules.pop(module, None)
    jax.config.update("jax_enable_x64", True)


def squares(y, x):
    return jnp.sum(y**2)


def program(name, module):
    """(step, loss, params, carry, xs) of an example."""
    if name.endswith("_lm"):
        return module.start()[0], module.loss, *module.start()[1:], *module.text(12)
    if name == "spiking":
        return module.start()[0], module.loss, *module.start()[1:], *module.stream(40)
    if name == "jaxley_fit":
        return module.step, module.loss, module.FIRST, module.STATES, *module.recording(12)
    inputs = {"gymnax_memory": 3, "gymnasium_cartpole": 2}[name]
    seen = np.random.default_rng(0).normal(size=(12, module.ENVS, inputs)).astype(np.float32)
    nnx = pytest.importorskip("flax.nnx")
    h = jnp.zeros((module.ENVS, module.HIDDEN))
    first = np.zeros((12, module.ENVS), bool)
    first[9, ::2] = True
    return module.agent, squares, module.Network(nnx.Rngs(0)), h, (seen, first)


def leaves(tree):
    return [np.asarray(v) for v in jax.tree.leaves(tree) if v.dtype == jnp.float32]


def apart(got, want):
    """The largest difference in a leaf, over the leaf's largest entry."""
    pairs = list(zip(leaves(got), leaves(want), strict=True))
    least = 1e-4 * max(abs(b).max() for _, b in pairs)  # a leaf of zeros has no scale of its own
    return max(abs(a - b).max() / max(abs(b).max(), least) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@each
def test_its_gradient_is_that_of_the_unrolled_window(example, name):
    step, loss, params, carry, xs = program(name, example)
    steps = len(jax.tree.leaves(xs)[0])
    last = jax.tree.map(lambda v: v[-1], xs)

    @jax.jit
    def recorded(params):
        rec = jaxbptt.record(step, window=6, weights="current")
        start = rec.init(params, carry, last)
        tape, ys = lax.scan(lambda tape, x: rec(params, tape, x), start, xs)
        ct = jax.grad(loss)(ys[-1], last)
        return rec.pullback(params, tape, ct[None]).params

    def unrolled(window):
        begin = steps - window
        old, new = (jax.tree.map(lambda v, i=i: jnp.split(v, [begin])[i], xs) for i in (0, 1))

        def of(params):
            middle, _ = lax.scan(lambda c, x: step(fixed, c, x), carry, old)
            _, ys = lax.scan(lambda c, x: step(params, c, x), middle, new)
            return loss(ys[-1], last)

        fixed = params
        return jax.jit(jax.grad(of))(params)

    got = recorded(params)
    assert apart(got, unrolled(6)) < 1e-4
    assert apart(got, unrolled(1)) > 1e-3  # there is something to reach back to


@pytest.mark.slow
@each
def test_it_learns(name):
    for package in PACKAGES[name]:
        pytest.importorskip(package)
    steps, bound = (FALLS | GROWS)[name]
    # The packages' own warnings are not ours; and all of XLA's passes, as it trains for a while.
    options = "-W", "ignore", SCRIPTS / f"{name}.py", "--steps", str(steps)
    done = run_python(*options, cwd=ROOT, JAX_DISABLE_MOST_OPTIMIZATIONS=None)
    assert done.returncode == 0, done.stderr
    means = np.array(re.findall(r"^ +\d+ steps: .* (-?[\d.]+)$", done.stdout, re.M), float)
    assert len(means) == 10
    if name in FALLS:
        assert means[-2:].mean() < bound * means[:2].mean()
    else:
        assert means[-2:].mean() > bound > means[:2].mean()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["nnx_lm"])
def test_what_it_is_compared_with_learns_the_same(example, name):
    xs = example.text(60)
    ours = jax.jit(lambda xs: example.train(xs, every=20))(*xs)
    theirs = jax.jit(lambda xs: example.today(xs, new=20))(*xs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)


# ------------------------------------------------------------ the files and their pages


@each
def test_it_is_short_and_takes_what_there_is(name):
    text = (SCRIPTS / f"{name}.py").read_text("utf-8")
    assert len(text.splitlines()) <= 120
    assert not not_there(text)
    assert not re.search(r"jaxbptt\._|from jaxbptt", text)


def test_all_examples_are_tested():
    others = {"compare", "policy"}
    assert {path.stem for path in SCRIPTS.glob("*.py")} == {*PACKAGES, *others}


@each
def test_its_page_shows_its_code_and_the_gallery_has_it(name):
    page = (PAGES / f"{name}.md").read_text("utf-8")
    lines = [line.strip() for line in (SCRIPTS / f"{name}.py").read_text("utf-8").splitlines()]
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    assert blocks
    for block in blocks:
        shown = [line.strip() for line in block.splitlines()]
        places = range(len(lines) - len(shown) + 1)
        assert any(lines[i : i + len(shown)] == shown for i in places), block
    assert f"blob/main/examples/{name}.py" in page
    assert f"({name}.md)" in (PAGES / "index.md").read_text("utf-8")
