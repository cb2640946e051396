"""weights="replayed": the window run again under the caller's parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import lax
from oracles import check, check_cotangents, drifting, moving, random_like, reach, refill
from zoo import ZOO

import jaxbptt

LENGTH = 6
# Keys, integers, casts, calls, loops, rules of the user's own, and nothing at all.
CASES = (
    "bfloat16 checkpoint closed_over complex_recurrence fused_gru integer_leaves lstm "
    "nested_dict no_params no_y spike_vjp stacked_layers tokens typed_key weight_norm".split()
)


def again(run, thetas, t, window, every=1, rows=1, params=None):
    """The steps from the oldest carry on the ring to t, all with the parameters of step t."""
    first = max(1, t - window + 1)
    carry = run.carry if first == 1 else run.trajectory[0][first - 2]
    xs = oracles.stack(run.xs[first - 1 : t])
    theta = thetas[t - 1] if params is None else params
    return oracles.Run(run.step, [theta] * (t - first + 1), carry, xs, t - first + 1)


@pytest.mark.parametrize("name", CASES)
def test_at_every_step(name):
    case = ZOO[name](np.float64)
    xs, window = case.xs(LENGTH), 3
    thetas = drifting(case.params, LENGTH)
    run = oracles.Run(case.step, thetas, case.carry, xs, LENGTH)
    carries, ys = run.trajectory
    ct_y, ct_carry = random_like(ys[0], 1), random_like(carries[0], 2)
    rec = jaxbptt.record(case.step, window=window, weights="replayed")
    rows = jax.tree.map(
        lambda v: (np if v.dtype == jax.dtypes.float0 else jnp).asarray(v)[None], ct_y
    )

    @jax.jit
    def one(theta, tape, x):
        def loss(values):
            new, y = rec(refill(theta, values), tape, x)
            pairs = zip(moving((ct_y, ct_carry)), moving((y, new.carry)), strict=True)
            return sum((jnp.sum(jnp.real(a * b)).astype(float) for a, b in pairs), 0.0), (new, y)

        grads, (new, y) = jax.grad(loss, has_aux=True)(moving(theta))
        return new, y, grads, rec.pullback(theta, new, rows, ct_carry)

    # A product in bfloat16 has its error, whatever the dtype of the weights around it.
    inside = [jnp.zeros((), jnp.bfloat16)] if name == "bfloat16" else []
    allowed = oracles.tolerance(case.params, case.carry, xs, inside)
    tape = rec.init(case.params, case.carry, case.x())
    for t in range(1, LENGTH + 1):
        tape, y, grads, ct = one(thetas[t - 1], tape, run.xs[t - 1])
        check("replayed, values", (y, tape.carry), (ys[t - 1], carries[t - 1]), allowed)
        window_run = again(run, thetas, t, window)
        want = window_run.unrolled(window_run.length, 1, [ct_y], ct_carry)
        check("replayed, in the loop", grads, want.params, allowed)
        check_cotangents("replayed, pullback", ct, want, allowed)


@pytest.mark.parametrize(("window", "every"), [(4, 2), (3, 3), (2, 4), (5, 3)])
def test_in_groups(window, every):
    case = ZOO["lstm"](np.float64)

    def step(p, c, x):
        c, y = case.step(p, c, x)
        return c, jnp.sum(y**2)

    xs, thetas = case.xs(8), drifting(case.params, 8)
    run = oracles.Run(step, thetas, case.carry, xs, 8)
    rec = jaxbptt.record(step, window=window, every=every, weights="replayed")

    @jax.jit
    def one(theta, tape, x):
        return jax.grad(lambda p: rec(p, tape, x)[::-1], has_aux=True)(theta)

    pull = jax.jit(rec.pullback)
    tape = rec.init(case.params, case.carry, case.x())
    for t in range(1, 9):
        grad, tape = one(thetas[t - 1], tape, run.xs[t - 1])
        for m in range(1, min(t, window) + 1):
            part = again(run, thetas, t, window)
            oldest = max(1, part.length - (t - reach(t, window, every, m)))
            want = part.unrolled(part.length, oldest, [jnp.ones(())] * m)
            ct = pull(thetas[t - 1], tape, jnp.ones(m))
            check_cotangents("replayed, m outputs", ct, want, 1e-12)
            if t % every == 0 and m == min(every, window):
                check("replayed, in groups", grad, want.params, 1e-12)


def test_at_fixed_parameters_the_three_agree():
    case = ZOO["lstm"](np.float64)
    tapes, cts = {}, {}
    for weights in ("stored", "current", "replayed"):
        rec = jaxbptt.record(case.step, window=4, weights=weights)
        tape = rec.init(case.params, case.carry, case.x())
        run = functools.partial(rec, case.params)
        tape, ys = lax.scan(lambda tape, x, run=run: run(tape, x), tape, case.xs(7))
        tapes[weights] = tape
        cts[weights] = rec.pullback(case.params, tape, jnp.ones_like(ys[-1:]))
    for weights in ("current", "replayed"):
        check("the three agree", cts[weights], cts["stored"], 1e-14)
    assert tapes["replayed"].nbytes < tapes["current"].nbytes < tapes["stored"].nbytes


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
    tape = rec.init(params, carry, xs[0])
    for theta, x in zip(thetas, xs, strict=True):
        tape, _ = rec(theta, tape, x)
    part = again(run, thetas, 6, 4)
    want = part.unrolled(4, [3, 1], [jnp.ones(())])
    check_cotangents("replayed, parts", rec.pullback(thetas[-1], tape, jnp.ones(1)), want, 1e-12)


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

    np.testing.assert_allclose(jax.grad(gradient)(0.8), jax.grad(unrolled)(0.8), rtol=1e-13)
