"""The lines of Python that say in the docstrings what `record` and `scan` compute are true."""

import functools
import inspect
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import draw, grid
from jax import lax

import jaxbptt

W, XS, CARRY = draw(0, 4, 4), draw(1, 7, 2, 4), draw(2, 2, 4)


def step(w, c, x):
    c = jnp.tanh(c @ w + x)
    return c, jnp.sum(c**2)


def shown(function, **names):
    """What the lines in a docstring define."""
    text = inspect.getdoc(function)
    lines = re.search(r"^    def .*?(?=^\S)", text, re.MULTILINE | re.DOTALL)[0]
    scope = {"jax": jax, "jnp": jnp, **names}
    exec(textwrap.dedent(lines), scope)
    return scope


@pytest.mark.parametrize("window", grid([1, 3, 7, 9], [3]))
def test_record_computes_what_its_docstring_shows(window):
    last_y = shown(jaxbptt.record, step=step, window=window)["last_y"]
    rec = jaxbptt.record(step, window=window)

    def one(tape, x):
        grad, tape = jax.grad(lambda w: rec(w, tape, x)[::-1], has_aux=True)(W)
        return tape, grad

    got = jax.jit(lambda tape: lax.scan(one, tape, XS)[1])(rec.init(W, CARRY, XS[0]))
    want = jax.jit(lambda: [jax.grad(last_y)(W, CARRY, XS[: t + 1]) for t in range(len(XS))])()
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("window", "every"), grid([(1, 1), (3, 1), (3, 2), (2, 3), (4, 4), (7, 7)], [(3, 2), (2, 3)])
)
def test_scan_computes_what_its_docstring_shows(window, every):
    unrolled = functools.partial(shown(jaxbptt.scan)["scan"], window=window, every=every)
    ours = functools.partial(jaxbptt.scan, window=window, every=every)
    weights = jnp.arange(1.0, 8.0)

    def loss(scan, w, init, xs):
        carry, ys = scan(functools.partial(step, w), init, xs)
        return jnp.sum(carry**3) + jnp.sum(weights * ys)

    def run(scan):
        differentiate = jax.value_and_grad(functools.partial(loss, scan), (0, 1, 2))
        return jax.jit(differentiate)(W, CARRY, XS)

    (value, got), (expected, want) = run(ours), run(unrolled)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)
