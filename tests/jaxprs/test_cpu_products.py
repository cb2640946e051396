"""The chain's products with few rows: the same numbers, and written for a CPU where it is one."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbptt
from jaxbptt._jaxprs.cpu_products import bind_product, with_turned_weights


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


def in_a_loop(left, right, trips=20, known=True, function=across):
    """A function of both that runs the product as a loop over so many trips does."""
    (eqn,) = jax.make_jaxpr(function)(left, right).jaxpr.eqns

    def run(left, right):
        env = {eqn.invars[1]: right} if known else {}
        return with_turned_weights([eqn], env, trips)(eqn, [left, right])[0]

    return run


def turns(left, right, **how):
    text = jax.jit(in_a_loop(left, right, **how)).lower(left, right).as_text()
    return "optimization_barrier" in text


@pytest.mark.parametrize("rows", [17, 32, 60])
def test_with_more_rows_a_loop_turns_the_weight(rows):
    left, right = operands(rows)
    assert turns(left, right) == (jax.default_backend() == "cpu")
    want = np.asarray(left, np.float64) @ np.asarray(right, np.float64).T
    got = jax.jit(in_a_loop(left, right))(left, right)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_only_weights_that_gain_are_turned():
    left, right = operands(32)
    assert not turns(left, right, trips=15)
    assert not turns(left, right, known=False)  # it may be another at each trip
    assert not turns(left, right.T, function=jnp.dot)
    assert not turns(*operands(129, (256, 256)))
    assert not turns(*operands(32, (32, 64)))
    assert not turns(*operands(32, dtype=jnp.bfloat16))
    exported = jax.export.export(jax.jit(in_a_loop(left, right)), platforms=["cuda"])
    assert "optimization_barrier" not in exported(left, right).mlir_module()


def test_a_turned_weight_goes_through_transformations():
    left, right = operands(32)
    squares = [lambda a, b, f=f: jnp.sum(f(a, b) ** 2) for f in (in_a_loop(left, right), across)]
    for transform in (jax.grad, lambda f: jax.hessian(f, argnums=0)):
        ours, theirs = (jax.jit(transform(f))(left[:, :1] * left, right) for f in squares)
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(("rows", "window"), [(8, 5), (32, 16)])
def test_a_window_of_such_products(rows, window):
    """Against `jax.grad` of the unrolled run, all of which is in the window."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(128, 128)) / 12, jnp.float32)
    xs = jnp.asarray(rng.normal(size=(window, rows, 128)), jnp.float32)

    def step(w, c, x):
        c = jnp.tanh(c @ w + x)
        return c, jnp.sum(c**2)

    def unrolled(w):
        c = jnp.zeros_like(xs[0])
        for x in xs:
            c, y = step(w, c, x)
        return y

    rec = jaxbptt.record(step, window=window, weights="current")
    tape = jax.jit(rec.init)(w, np.zeros_like(xs[0]), xs[0])
    tape, _ = jax.jit(lambda tape: jax.lax.scan(lambda t, x: rec(w, t, x), tape, xs))(tape)
    pull = jax.jit(lambda tape: rec.pullback(w, tape, np.ones(1, np.float32)).params)
    np.testing.assert_allclose(pull(tape), jax.jit(jax.grad(unrolled))(w), rtol=1e-4, atol=1e-4)
    if jax.default_backend() == "cpu":
        assert "optimization_barrier" in pull.lower(tape).as_text()
