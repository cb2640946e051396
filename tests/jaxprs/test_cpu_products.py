"""The chain's products with few rows: the same numbers, and written for a CPU where it is one."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbptt
from jaxbptt._jaxprs.cpu_products import bind_product


def across(left, right):
    return jnp.einsum("bm,km->bk", left, right)


def operands(rows, weight=(64, 256), dtype=jnp.float32):
    rng = np.random.default_rng(rows)
    left, right = rng.normal(size=(rows, weight[1])), rng.normal(size=weight)
    return jnp.asarray(left, dtype), jnp.asarray(right, dtype)


def rewritten(left, right, function=across):
    (eqn,) = jax.make_jaxpr(function)(left, right).jaxpr.eqns
    return lambda a, b: bind_product(eqn, [a, b])[0]


def has_barrier(left, right, function=across):
    lowered = jax.jit(rewritten(left, right, function)).lower(left, right)
    return "optimization_barrier" in lowered.as_text()


@pytest.mark.parametrize("rows", [4, 8, 16])
def test_the_numbers_are_those_of_the_product(rows):
    left, right = operands(rows)
    want = np.asarray(left, np.float64) @ np.asarray(right, np.float64).T
    got = jax.jit(rewritten(left, right))(left, right)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_only_products_that_gain_are_rewritten():
    on_cpu = jax.default_backend() == "cpu"
    assert has_barrier(*operands(8)) == on_cpu
    assert not has_barrier(*operands(1))  # a matrix and a vector
    assert not has_barrier(*operands(32))
    assert not has_barrier(*operands(8, (32, 64)))  # a small weight
    assert not has_barrier(*operands(8, dtype=jnp.bfloat16))
    left, right = operands(8)
    assert not has_barrier(left, right.T, jnp.dot)  # nothing is read across


def test_another_platform_gets_the_plain_product():
    left, right = operands(8)
    exported = jax.export.export(jax.jit(rewritten(left, right)), platforms=["cuda"])(left, right)
    assert "optimization_barrier" not in exported.mlir_module()


def test_it_goes_through_transformations():
    left, right = operands(8)
    function = rewritten(left, right)
    lefts, rights = np.stack([left, 2 * left]), np.stack([right, right + 1])
    np.testing.assert_allclose(
        jax.jit(jax.vmap(function))(lefts, rights),
        jax.jit(jax.vmap(across))(lefts, rights),
        rtol=1e-4,
        atol=1e-4,
    )
    squares = [lambda a, b, f=f: jnp.sum(f(a, b) ** 2) for f in (function, across)]
    ours, theirs = (jax.jit(jax.grad(f, argnums=(0, 1)))(left, right) for f in squares)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2), ours, theirs)


def test_a_window_of_such_products():
    """Against `jax.grad` of the unrolled run, all of which is in the window."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(128, 128)) / 12, jnp.float32)
    xs = jnp.asarray(rng.normal(size=(5, 8, 128)), jnp.float32)

    def step(w, c, x):
        c = jnp.tanh(c @ w + x)
        return c, jnp.sum(c**2)

    def unrolled(w):
        c = jnp.zeros_like(xs[0])
        for x in xs:
            c, y = step(w, c, x)
        return y

    rec = jaxbptt.record(step, window=5, weights="current")
    tape = jax.jit(rec.init)(w, np.zeros_like(xs[0]), xs[0])
    tape, _ = jax.jit(lambda tape: jax.lax.scan(lambda t, x: rec(w, t, x), tape, xs))(tape)
    pull = jax.jit(lambda tape: rec.pullback(w, tape, np.ones(1, np.float32)).params)
    np.testing.assert_allclose(pull(tape), jax.jit(jax.grad(unrolled))(w), rtol=1e-4, atol=1e-4)
    if jax.default_backend() == "cpu":
        assert "optimization_barrier" in pull.lower(tape).as_text()
