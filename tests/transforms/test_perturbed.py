"""What has no derivative, beside the path of the gradient: run as `lax.scan` runs it.

The reference is the same step with what that part gives read from a table, and the chain rule
written out over the steps, group by group.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import draw, grid
from jax import lax
from jaxpr_reading import primitives

import jaxbptt

LENGTH, W = 7, 0.6
XS = draw(0, LENGTH)
TABLE = jnp.array([1.5, 1.2])


def settle(v):
    """A solver whose number of trips is known only when it runs."""
    return lax.while_loop(lambda v: jnp.abs(v) > 0.3, lambda v: 0.5 * v, v)


def called_back(v):
    return jax.pure_callback(lambda v: np.asarray(0.5 * v), jax.ShapeDtypeStruct((), v.dtype), v)


@jax.custom_vjp
def scaled(v):
    return v * jnp.sum(TABLE)  # a rule that reads an array can't be differentiated by it


scaled.defvjp(lambda v: (scaled(v), None), lambda _, ct: (ct * 2.7,))

# From w, (h, s) and x to (h, s), y; s is a simulator's state that never meets w.
STEPS = {
    "a solver in the carry": lambda w, h, s, x: (jnp.tanh(w * h + s), settle(s + x)),
    "a solver of x": lambda w, h, s, x: (jnp.tanh(w * h + settle(x)), s),
    "a solver of what is closed over": lambda w, h, s, x: (jnp.tanh(w * h + settle(TABLE[0])), s),
    "a callback in the carry": lambda w, h, s, x: (jnp.tanh(w * h + s), called_back(s + x)),
    "a rule that reads a table": lambda w, h, s, x: (jnp.tanh(scaled(w * h) + x), s + x),
}


def step_of(name, w):
    def step(carry, x):
        h, s = STEPS[name](w, *carry, x)
        return (h, s), h + 0.1 * s

    return step


@functools.cache
def derivatives(name):
    """Of each step, those of its h by w and by the h before."""
    states = [(jnp.float64(0.1), jnp.float64(1.0))]
    for x in XS:
        states.append(step_of(name, W)(states[-1], x)[0])

    def new_h(w, h, i):
        return STEPS[name](w, h, states[i][1], XS[i])[0]

    return [[float(jax.grad(new_h, n)(W, states[i][0], i)) for i in range(LENGTH)] for n in (0, 1)]


def truncated(name, window, every):
    """dΣy/dw by the recurrence of λ, group by group."""
    by_w, by_h = derivatives(name)
    total = 0.0
    for first in range(0, LENGTH, every):
        end = min(first + every, LENGTH)
        reach = max(first - max(window - every, 0), end - window, 0)
        lam = 0.0
        for i in reversed(range(reach, end)):
            lam += i >= first  # dy/dh is 1
            total += lam * by_w[i]
            lam *= by_h[i]
    return total


WINDOWS = [(1, 1), (3, 1), (3, 2), (2, 3), (LENGTH, LENGTH)]


@pytest.mark.parametrize(("window", "every"), grid(WINDOWS, [(3, 1), (3, 2)]))
@pytest.mark.parametrize("name", STEPS)
def test_scan_differentiates_what_is_perturbed_alone(name, window, every):
    def loss(w, scan):
        return jnp.sum(scan(step_of(name, w), (0.1, 1.0), XS)[1])

    ours = functools.partial(jaxbptt.scan, window=window, every=every)
    value, gradient = jax.jit(jax.value_and_grad(lambda w: loss(w, ours)))(W)
    np.testing.assert_allclose(value, loss(W, lax.scan), rtol=1e-12)
    np.testing.assert_allclose(gradient, truncated(name, window, every), rtol=1e-12)
    whole = functools.partial(jaxbptt.scan, window=None)
    expected = jax.grad(lambda w: loss(w, lax.scan))(W)
    np.testing.assert_allclose(jax.grad(lambda w: loss(w, whole))(W), expected, rtol=1e-12)


def test_a_forward_run_traces_no_derivative():
    def step(c, x):
        return settle(c + x), called_back(c)

    want = lax.scan(step, jnp.float64(0.3), XS)
    got = jaxbptt.scan(step, jnp.float64(0.3), XS, window=3)
    np.testing.assert_array_equal(got[1], want[1])


def test_an_output_that_nobody_asks_for_is_not_pulled_back():
    heavy = draw(1, 5, 5)

    def loss(w, scan):
        def step(c, x):
            c = jnp.tanh(w * c + x)
            return c, (c, jnp.tanh(c @ heavy))

        return jnp.sum(scan(step, jnp.zeros(5), draw(2, LENGTH, 5))[1][0])

    for how in (
        {"window": None},
        {"window": 3},
        {"window": 3, "every": 2},
        {"window": 2, "every": 3},
    ):
        ours = functools.partial(jaxbptt.scan, **how)
        closed = jax.make_jaxpr(jax.grad(lambda w, scan=ours: loss(w, scan)))(W)
        assert primitives(closed.jaxpr)["dot_general"] == 1  # the forward one
    assert jax.grad(lambda w: loss(w, functools.partial(jaxbptt.scan, window=None)))(W) != 0


def test_a_loss_that_does_not_depend_on_the_run_costs_nothing():
    def loss(w):
        ys = jaxbptt.scan(step_of("a solver of x", w), (0.1, 1.0), XS, window=3)[1]
        return 3.0 + 0 * jnp.sum(lax.stop_gradient(ys))

    assert jax.grad(loss)(W) == 0.0
    assert primitives(jax.make_jaxpr(jax.grad(loss))(W).jaxpr)["scan"] == 1


# ------------------------------------------------------------------ record


def recorded(name):
    def step(w, carry, x):
        return step_of(name, w)(carry, x)

    return step


def at_step(name, end, window):
    """dy/dw of one step, through the last `window` steps."""
    by_w, by_h = derivatives(name)
    total, lam = 0.0, 1.0
    for i in range(end, max(end - window, -1), -1):
        total += lam * by_w[i]
        lam *= by_h[i]
    return total


@pytest.mark.parametrize("weights", grid(["stored", "current", "replayed"], ["stored"]))
@pytest.mark.parametrize("name", STEPS)
def test_record_follows_what_a_path_reaches(name, weights):
    rec = jaxbptt.record(recorded(name), window=3, weights=weights)
    tape = rec.init(W, (0.1, 1.0), XS[0])

    @jax.jit
    def run(tape):
        def one(tape, x):
            grad, tape = jax.grad(lambda w: rec(w, tape, x)[::-1], has_aux=True)(W)
            return tape, (grad, rec.pullback(W, tape, jnp.ones(1)).params)

        return lax.scan(one, tape, XS)[1]

    expected = [at_step(name, end, 3) for end in range(LENGTH)]
    for gradients in run(tape):
        np.testing.assert_allclose(gradients, expected, rtol=1e-12)


def test_what_has_no_derivative_gets_none_and_the_rest_does():
    rec = jaxbptt.record(recorded("a solver in the carry"), window=3)
    tape = rec.init(W, (0.1, 1.0), XS[0])
    for x in XS:
        tape, _ = rec(W, tape, x)
    ct = rec.pullback(W, tape, jnp.ones(1))
    assert ct.carry[0] != 0
    assert ct.carry[1].dtype == ct.xs.dtype == jax.dtypes.float0

    def step(w, carry, x):
        h, s = recorded("a solver of x")(w, carry, x["number of trips"])[0]
        return (h + x["drive"], s), h

    x = {"number of trips": XS[0], "drive": XS[1]}
    rec = jaxbptt.record(step, window=3)
    tape, _ = rec(W, rec.init(W, (0.1, 1.0), x), x)
    ct = rec.pullback(W, tape, jnp.zeros(1), (jnp.ones(()), jnp.ones(())))
    assert ct.xs["drive"].tolist() == [0.0, 0.0, 1.0]
    assert ct.xs["number of trips"].dtype == jax.dtypes.float0


def test_a_derivative_that_is_not_there_is_refused_where_it_is_asked_for():
    rec = jaxbptt.record(recorded("a solver of x"), window=3)
    tape = rec.init(W, (0.1, 1.0), XS[0])
    with pytest.raises(ValueError, match=r"none with respect to a leaf of x \(number 0\): a loop"):
        jax.grad(lambda x: rec(W, tape, x)[1])(XS[0])
    with pytest.raises(ValueError, match="while_loop"):
        jaxbptt.record(lambda w, c, x: (settle(w * c), c), window=3).init(W, 0.1, XS[0])


def test_a_number_that_moves_by_itself_still_has_its_cotangent():
    rec = jaxbptt.record(lambda w, c, x: ((c[0] * w, 0.5 * c[1]), c[0] * c[1]), window=3)
    tape = rec.init(W, (1.0, 1.0), None)
    for _ in range(3):
        tape, _ = rec(W, tape, None)
    ct = rec.pullback(W, tape, jnp.ones(1))
    np.testing.assert_allclose(ct.carry, [W**2 * 0.25, W**2 * 0.25], rtol=1e-12)
