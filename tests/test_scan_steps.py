"""`scan` over a zoo of steps and over random ones, each group against a graph of its own."""

import jax
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import check, moving, random_like, refill
from programs import fixed_profile, several, steps
from zoo import ZOO

import jaxbptt

LENGTH = 7
RELATIONS = [(1, 1), (3, 1), (3, 3), (5, 2), (6, 4), (2, 3), (4, 9), (None, 1)]


def pulled(step, params, carry, xs, length, ct_ys, ct_carry, **how):
    """Cotangents of the parameters that f closes over, of init and of xs, and the outputs."""

    def run(thetas, init, inputs):
        now, rows = refill(carry, init), refill(xs, inputs)
        closed_over = refill(params, thetas)
        last, ys = jaxbptt.scan(
            lambda c, x: step(closed_over, c, x), now, rows, length=length, **how
        )
        return (moving(last), moving(ys)), (last, ys)

    @jax.jit
    def go(thetas, init, inputs, cts):
        _, pull, outs = jax.vjp(run, thetas, init, inputs, has_aux=True)
        return pull(cts), outs

    cts = moving(ct_carry), [np.stack(vs) for vs in zip(*map(moving, ct_ys), strict=True)]
    got, outs = go(moving(params), moving(carry), moving(xs), cts)
    return oracles.Expected(*got), outs


def held_against_each_group(label, step, params, carry, xs, length, allowed, **how):
    run = oracles.Run(step, [params] * length, carry, xs, length)
    carries, ys = run.trajectory
    ct_ys, ct_carry = [random_like(y, s) for s, y in enumerate(ys)], random_like(carries[-1], 50)
    want = run.whole(how["window"], how.get("every", 1), ct_ys, ct_carry)
    got, outs = pulled(step, params, carry, xs, length, ct_ys, ct_carry, **how)
    for name in ("params", "carry", "xs"):
        check(f"scan, {label}, {name}", getattr(got, name), getattr(want, name), allowed)
    check(f"scan, {label}, values", outs, (carries[-1], oracles.stack(ys)), allowed)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_step_of_the_zoo(name):
    case = ZOO[name](np.float64)
    xs = case.xs(LENGTH)
    # A product in bfloat16 has its error, whatever the dtype of the weights around it.
    inside = [np.zeros((), jax.numpy.bfloat16)] if name == "bfloat16" else []
    allowed = oracles.tolerance(case.params, case.carry, xs, inside)
    for window, every in RELATIONS[:: 1 if name in ("lstm", "nested_dict") else 3]:
        how = {"window": window, "every": every}
        label = "zoo, bfloat16" if inside else "zoo"
        held_against_each_group(
            label, case.step, case.params, case.carry, xs, LENGTH, allowed, **how
        )


@fixed_profile
@given(
    made=steps(),
    window=st.none() | st.integers(1, 7),
    every=st.integers(1, 5),
    length=st.integers(1, 6),
)
def test_random_steps(made, window, every, length):
    step, params, carry, x = made
    xs = several(x, length)
    allowed = 100 * oracles.tolerance(params, carry, xs)  # random programs may cancel
    label = f"random, float{64 if allowed < 1e-9 else 32}"
    held_against_each_group(
        label, step, params, carry, xs, length, allowed, window=window, every=every
    )
