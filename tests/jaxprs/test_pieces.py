"""Long programs in pieces: the same values, and no function of the compiler's that is long."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core

import jaxbptt
from jaxbptt._jaxprs.evaluate import Program, bind, evaluate, values_of
from jaxbptt._jaxprs.pieces import hold, in_pieces

WIDTH, LENGTH = 3, 4
XS = jnp.asarray(np.random.default_rng(0).normal(size=(LENGTH, WIDTH)))
PARAMS = {"scale": jnp.linspace(0.5, 1.0, WIDTH), "bias": jnp.linspace(-0.1, 0.1, WIDTH)}


def long_step(equations):
    """A step of about so many elementwise equations."""

    def step(params, c, x):
        c = c + x
        for _ in range(equations // 10):
            a = jnp.tanh(c * params["scale"])
            b = a * params["bias"] + 0.1
            c = 0.3 * c + a * jnp.sin(b) - b * 0.5 + lax.logistic(a - b)
        return c, jnp.sum(c)

    return step


STEP = long_step(450)


def loss(scan, params, xs=XS, step=STEP):
    return jnp.sum(scan(lambda c, x: step(params, c, x), jnp.zeros(WIDTH), xs)[1] ** 2)


def full(*args):
    return jaxbptt.scan(*args, window=None)


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile().as_text()


def longest_function(text):
    """Lines of the longest function that the compiler fused."""
    functions = re.split(r"\n(?=%|ENTRY)", text)
    return max(f.count("\n") for f in functions if f.startswith("%fused"))


def test_values_are_the_same_to_the_last_bit():
    def program(a, b, n, flag, key):
        for i in range(120):
            a, b = b * 0.7 + jnp.sin(a), jnp.where(flag, a, b) - 0.1 * n.astype(a.dtype)
            n = n + jnp.int32(a[0] > 0)
            flag = flag ^ (n % 3 == 0)
            key = jax.random.fold_in(key, i) if i % 50 == 0 else key
        return a, b, n, flag, key

    args = (XS[0], XS[1], jnp.int32(1), jnp.array([True, False, True]), jax.random.key(0))
    closed = jax.make_jaxpr(program)(*args)
    assert len(in_pieces(closed.eqns, closed.jaxpr.invars)) > 3
    got = jax.jit(lambda *args: Program.of(closed)(*args))(*args)
    want = core.jaxpr_as_fun(closed)(*args)
    for v, w in zip(got[:4], want[:4], strict=True):
        np.testing.assert_allclose(v, w, rtol=1e-13)
    assert got[4] == want[4]


def test_what_later_pieces_read_is_held_once():
    small, large = jnp.ones(3), jnp.ones(2**17)

    def program(weight, x, big):
        constant = jnp.cos(weight)  # the same in all iterations
        early, huge = jnp.sin(x), jnp.sin(big)
        for _ in range(250):
            x = jnp.sin(x) * constant
        for _ in range(250):
            x = jnp.cos(x) * early
        return x + huge[:3] + constant

    closed = jax.make_jaxpr(program)(small, small, large)
    _, x, big = closed.jaxpr.invars
    pieces = in_pieces(closed.eqns, [x, big])
    assert [eqn for piece in pieces for eqn in piece.eqns] == closed.eqns
    held = [v for piece in pieces for v in piece.held]
    assert len(set(held)) == len(held)
    constant, early, huge = (eqn.outvars[0] for eqn in closed.eqns[:3])
    assert early in held
    assert constant not in held  # or it would be made in each iteration
    assert huge not in held  # too large to hand on
    # Of each piece x, and of the first one what is read far behind it.
    assert [len(piece.held) for piece in pieces] == [2, *[1] * (len(pieces) - 2), 0]


def test_a_short_program_stays_in_one_piece():
    closed = jax.make_jaxpr(lambda x: STEP(PARAMS, x, x))(XS[0])
    (piece,) = in_pieces(closed.eqns[:290], closed.jaxpr.invars)
    assert piece.held == []


def layers(count, between):
    """A program of products with so many elementwise equations between each two."""

    def run(x):
        w = jnp.ones((3, 3))
        for _ in range(count):
            x = x @ w
            for _ in range(between // 2):
                x = jnp.sin(x) * 0.5
        return x

    return jax.make_jaxpr(run)(XS[0])


@pytest.mark.parametrize(
    ("count", "between", "several"), [(40, 20, False), (2, 400, True), (80, 20, True)]
)
def test_where_products_lie_between_only_a_very_long_program_has_pieces(count, between, several):
    closed = layers(count, between)
    assert (len(in_pieces(closed.eqns, closed.jaxpr.invars)) > 1) == several


def test_evaluating_in_pieces_needs_no_trace():
    closed = jax.make_jaxpr(lambda x: STEP(PARAMS, x, x))(XS[0])
    env = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env[closed.jaxpr.invars[0]] = XS[0]
    evaluate(closed.eqns, env, bind, closed.jaxpr.invars)
    want = core.jaxpr_as_fun(closed)(XS[0])
    np.testing.assert_allclose(values_of(closed.jaxpr.outvars, env)[0], want[0], rtol=1e-13)


def recorded(params):
    rec = jaxbptt.record(STEP, window=3)

    def one(tape, x):
        (y, tape), grads = jax.value_and_grad(lambda p: rec(p, tape, x)[::-1], has_aux=True)(params)
        return tape, (y, grads)

    return lax.scan(one, rec.init(params, jnp.zeros(WIDTH), XS[0]), XS)[1]


@pytest.mark.compiled
@pytest.mark.parametrize("function", [jax.grad(lambda p: loss(full, p)), recorded])
def test_no_function_of_a_long_step_is_long(function):
    text = compiled(function, PARAMS)
    assert "conditional(" in text
    assert longest_function(text) < 550
    assert longest_function(compiled(jax.grad(lambda p: loss(lax.scan, p)), PARAMS)) > 1000


def test_gradients_of_a_long_step_are_those_of_lax_scan():
    got = jax.jit(jax.grad(lambda p: loss(full, p)))(PARAMS)
    want = jax.jit(jax.grad(lambda p: loss(lax.scan, p)))(PARAMS)
    jax.tree.map(lambda v, w: np.testing.assert_allclose(v, w, rtol=1e-12), got, want)

    def last(params):
        carry = jnp.zeros(WIDTH)
        for s, x in enumerate(XS):
            carry = lax.stop_gradient(carry) if s == 1 else carry
            carry, y = STEP(params, carry, x)
        return y

    got = jax.jit(recorded)(PARAMS)[1]
    want = jax.jit(jax.grad(last))(PARAMS)
    jax.tree.map(lambda v, w: np.testing.assert_allclose(v[-1], w, rtol=1e-12), got, want)


@pytest.mark.compiled
def test_a_batch_of_runs_has_pieces_too():
    batch = jnp.stack([XS, -XS])
    grad = jax.vmap(jax.grad(lambda p, xs: loss(full, p, xs)), (None, 0))
    text = compiled(grad, PARAMS, batch)
    assert "conditional(" in text
    assert longest_function(text) < 550
    want = jax.vmap(jax.grad(lambda p, xs: loss(lax.scan, p, xs)), (None, 0))(PARAMS, batch)
    got = jax.jit(grad)(PARAMS, batch)
    jax.tree.map(lambda v, w: np.testing.assert_allclose(v, w, rtol=1e-12), got, want)


@pytest.mark.compiled
def test_a_second_derivative_goes_through_pieces(monkeypatch):
    monkeypatch.setattr("jaxbptt._jaxprs.pieces._LENGTH", 10)
    monkeypatch.setattr("jaxbptt._jaxprs.pieces._SHORT", 15)

    def curvature(scan):
        def inner(params):
            grads = jax.grad(lambda p: loss(scan, p, step=long_step(30)))(params)
            return sum(map(jnp.sum, jax.tree.leaves(grads)))

        return jax.grad(inner)

    assert "conditional(" in compiled(curvature(full), PARAMS)
    got, want = (jax.jit(curvature(scan))(PARAMS) for scan in (full, lax.scan))
    jax.tree.map(lambda v, w: np.testing.assert_allclose(v, w, rtol=1e-10), got, want)


@pytest.mark.parametrize("dtype", [bool, "uint8", "int32", "bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("jitted", [True, False])
def test_what_is_held_stays_as_it_is(dtype, jitted):
    values = [jnp.array([0, 1, 5]).astype(dtype), jnp.array(np.nan).astype(dtype)]
    got = (jax.jit(hold) if jitted else hold)(values)
    for v, w in zip(got, values, strict=True):
        assert v.dtype == w.dtype
        assert v.tobytes() == w.tobytes()
    assert hold([]) == []
    batch = jnp.zeros((0, 2), dtype)
    assert jax.vmap(lambda v: hold([v])[0])(batch).shape == (0, 2)
