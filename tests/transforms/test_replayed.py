"""weights="replayed": the window run again under the caller's parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from harness import first, grid, online
from jax import lax
from oracles import again, check, check_cotangents, drifting, random_like, reach
from zoo import ZOO

import jaxbptt

LENGTH = 6
# Keys, integers, casts, calls, loops, rules of the user's own, and nothing at all.
CASES = (
    "bfloat16 checkpoint closed_over complex_recurrence fused_gru integer_leaves lstm "
    "nested_dict no_params no_y spike_vjp stacked_layers tokens typed_key weight_norm".split()
)


# One of each kind; the gradient of what is closed over has a test below.
SAMPLE = "checkpoint integer_leaves no_params spike_vjp stacked_layers typed_key"


@pytest.mark.parametrize("name", grid(CASES, always=SAMPLE.split()))
def test_at_every_step(name):
    case = ZOO[name](np.float64)
    xs, window = case.xs(LENGTH), 3
    thetas = drifting(case.params, LENGTH)
    run = oracles.Run(case.step, thetas, case.carry, xs, LENGTH)
    carries, ys = run.trajectory
    ct_y, ct_carry = random_like(ys[0], 1), random_like(carries[0], 2)
    rec = jaxbptt.record(case.step, window=window, weights="replayed")
    found = online(rec, run, [ct_y] * LENGTH, [ct_carry] * LENGTH)
    # A product in bfloat16 has its error, whatever the dtype of the weights around it.
    inside = [jnp.zeros((), jnp.bfloat16)] if name == "bfloat16" else []
    allowed = oracles.tolerance(case.params, case.carry, xs, inside)
    for t, (grads, ct, *values) in enumerate(zip(*found, strict=True), 1):
        check("replayed, values", values, (ys[t - 1], carries[t - 1]), allowed)
        window_run = again(run, thetas, t, window)
        want = window_run.unrolled(window_run.length, 1, [ct_y], ct_carry)
        check("replayed, in the loop", grads[0], want.params, allowed)
        check("replayed, in the loop, x", grads[1], [leaf[-1] for leaf in want.xs], allowed)
        check_cotangents("replayed, pullback", ct, want, allowed)


@pytest.mark.parametrize(
    ("window", "every"), grid([(4, 2), (3, 3), (2, 4), (5, 3)], always=[(4, 2), (2, 4)])
)
def test_in_groups(window, every):
    case = ZOO["lstm"](np.float64)

    def step(p, c, x):
        c, y = case.step(p, c, x)
        return c, jnp.sum(y**2)

    xs, thetas = case.xs(8), drifting(case.params, 8)
    run = oracles.Run(step, thetas, case.carry, xs, 8)
    rec = jaxbptt.record(step, window=window, every=every, weights="replayed")

    def one(tape, row):
        theta, x = row
        grad, tape = jax.grad(lambda p: rec(p, tape, x)[::-1], has_aux=True)(theta)
        return tape, (grad, [rec.pullback(theta, tape, jnp.ones(m)) for m in range(1, window + 1)])

    @jax.jit
    def go(stacked, carry):
        thetas, xs = stacked
        tape = rec.init(first(thetas), carry, first(xs))
        return lax.scan(one, tape, stacked)[1]

    found = oracles.unstack(go(run.stacked, run.carry), 8)
    for t, (grad, pulled) in enumerate(found, 1):
        part = again(run, thetas, t, window)
        for m in range(1, min(t, window) + 1):
            oldest = max(1, part.length - (t - reach(t, window, every, m)))
            want = part.unrolled(part.length, oldest, [np.ones(())] * m)
            check_cotangents("replayed, m outputs", pulled[m - 1], want, 1e-12)
            if t % every == 0 and m == min(every, window):
                check("replayed, in groups", grad, want.params, 1e-12)


def test_at_fixed_parameters_the_three_agree():
    case = ZOO["lstm"](np.float64)
    tapes, cts = {}, {}
    for weights in ("stored", "current", "replayed"):
        rec = jaxbptt.record(case.step, window=4, weights=weights)

        @jax.jit
        def go(params, carry, xs, rec=rec):
            tape = rec.init(params, carry, first(xs))
            tape, ys = lax.scan(functools.partial(rec, params), tape, xs)
            return tape, rec.pullback(params, tape, jnp.ones_like(ys[-1:]))

        tapes[weights], cts[weights] = go(case.params, case.carry, case.xs(7))
    for weights in ("current", "replayed"):
        check("the three agree", cts[weights], cts["stored"], 1e-14)
    assert tapes["replayed"].nbytes < tapes["current"].nbytes < tapes["stored"].nbytes


@pytest.mark.parametrize("window", [1, 2, 4, 9])
@pytest.mark.parametrize("put_in_at", [[2], [5], [1, 2, 4], [0], range(6)])
def test_a_carry_that_was_put_in_is_where_the_run_goes_on(window, put_in_at):
    """λ flows from it to the step before, "as if that step had returned it"."""
    xs = jnp.linspace(-0.5, 0.7, 7)

    def step(w, c, x):
        c = jnp.tanh(w * c + x)
        return c, c**2

    def by_hand(w, n):
        c = 0.3
        for s, x in enumerate(xs[:n]):
            c = lax.stop_gradient(c) if s == n - window else c
            # The value is that which was put in, the derivative that of what was there.
            c = c + lax.stop_gradient(0.1 * s - c) if s in put_in_at else c
            c, y = step(w, c, x)
        return y

    for weights in ("stored", "current", "replayed"):
        rec = jaxbptt.record(step, window=window, weights=weights)
        tape = rec.init(0.8, 0.3, 0.0)
        for s, x in enumerate(xs):
            tape = tape.replace(carry=jnp.float64(0.1 * s)) if s in put_in_at else tape
            tape, _ = rec(0.8, tape, x)
            for lags in (None, jnp.int32(window)):
                got = rec.pullback(0.8, tape, jnp.ones(1), reach=lags).params
                np.testing.assert_allclose(got, jax.grad(by_hand)(0.8, s + 1), rtol=1e-12)


@pytest.mark.parametrize("put_in_at", [None, 1, 2, 3])
def test_a_carry_that_was_put_in_counts_once(put_in_at):
    """A turn of the ring later its slot holds a step whose carry the step before has made."""
    xs = jnp.linspace(-0.5, 0.7, 7)
    rec = jaxbptt.record(lambda w, c, x: (jnp.tanh(w * c + x),) * 2, window=3, weights="replayed")
    tape, c, carries = rec.init(0.8, 0.3, 0.0), 0.3, []
    for s, x in enumerate(xs):
        if s == put_in_at:
            c = 0.1
            tape = tape.replace(carry=jnp.float64(c))
        carries.append(c)
        tape, c = rec(0.8, tape, x)

    # Under other parameters than those that it was recorded with.
    def again(w):
        c = carries[-3]
        for x in xs[-3:]:
            c = jnp.tanh(w * c + x)
        return c

    got = rec.pullback(0.4, tape, jnp.ones(1)).params
    np.testing.assert_allclose(got, jax.grad(again)(0.4), rtol=1e-12)


def test_the_ring_holds_carries_and_inputs_only():
    case = ZOO["lstm"](np.float64)
    rec = jaxbptt.record(case.step, window=5, weights="replayed")
    tape = rec.init(case.params, case.carry, case.x())
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((case.carry, case.x())))
    assert tape.nbytes == 5 * held


def test_a_window_for_each_part():
    def step(p, c, x):
        a, b = jnp.tanh(p["a"] * c["a"] + c["b"] + x), jnp.tanh(p["b"] * c["b"] + 0.5 * c["a"])
        return {"a": a, "b": b}, a * b

    params, carry = {"a": 0.7, "b": -1.1}, {"a": jnp.asarray(0.3), "b": jnp.asarray(0.2)}
    params, xs = jax.tree.map(jnp.asarray, params), jnp.linspace(0.0, 2.0, 6)
    thetas = drifting(params, 6)
    run = oracles.Run(step, thetas, carry, xs, 6)
    rec = jaxbptt.record(step, window={"a": 2, "b": 4}, weights="replayed")

    @jax.jit
    def go(stacked):
        tape = rec.init(params, carry, xs[0])
        tape, _ = lax.scan(lambda tape, row: rec(row[0], tape, row[1]), tape, stacked)
        return rec.pullback(thetas[-1], tape, jnp.ones(1))

    part = again(run, thetas, 6, 4)
    want = part.unrolled(4, [3, 1], [np.ones(())])
    check_cotangents("replayed, parts", go(run.stacked), want, 1e-12)


def test_closed_over_arrays_get_their_gradient_from_the_replayed_window():
    def gradient(w):
        def step(p, c, x):
            c = jnp.tanh(w * c + p * x)
            return c, c**2

        rec = jaxbptt.record(step, window=3, weights="replayed")
        tape = rec.init(0.5, jnp.asarray(0.1), 0.0)
        for x in (0.3, -0.2, 0.7, 0.4):
            tape, y = rec(0.5, tape, x)
        return y

    def unrolled(w):
        c = jnp.asarray(0.1)
        for i, x in enumerate((0.3, -0.2, 0.7, 0.4)):
            c = jnp.tanh((lax.stop_gradient(w) if i == 0 else w) * c + 0.5 * x)
            c = lax.stop_gradient(c) if i == 0 else c
        return c**2

    got, want = jax.jit(lambda w: (jax.grad(gradient)(w), jax.grad(unrolled)(w)))(0.8)
    np.testing.assert_allclose(got, want, rtol=1e-13)
