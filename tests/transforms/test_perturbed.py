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


def truncated(name, window, every):
    """dΣy/dw by the recurrence of λ, group by group, from derivatives of one step by h and by w."""
    states = [(jnp.float64(0.1), jnp.float64(1.0))]
    for x in XS:
        states.append(step_of(name, W)(states[-1], x)[0])

    def new_h(w, h, i):
        return STEPS[name](w, h, states[i][1], XS[i])[0]

    by_w, by_h = (
        [float(jax.grad(new_h, n)(W, states[i][0], i)) for i in range(LENGTH)] for n in (0, 1)
    )
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
