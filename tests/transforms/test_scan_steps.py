"""`scan` over a zoo of steps and over random ones, each group against a graph of its own."""

import jax
import numpy as np
import oracles
import pytest
from harness import grid, pulled
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import check, random_like
from programs import fixed_profile, several, steps
from zoo import ZOO

LENGTH = 7
RELATIONS = [(1, 1), (3, 1), (3, 3), (5, 2), (6, 4), (2, 3), (4, 9), (None, 1)]


def held_against_each_group(label, step, params, carry, xs, length, allowed, **how):
    run = oracles.Run(step, [params] * length, carry, xs, length)
    carries, ys = run.trajectory
    ct_ys, ct_carry = [random_like(y, s) for s, y in enumerate(ys)], random_like(carries[-1], 50)
    want = run.whole(how["window"], how.get("every", 1), ct_ys, ct_carry)
    got, outs = pulled(step, params, carry, xs, length, ct_ys, ct_carry, **how)
    for name in ("params", "carry", "xs"):
        check(f"scan, {label}, {name}", getattr(got, name), getattr(want, name), allowed)
    check(f"scan, {label}, values", outs, (carries[-1], oracles.stack(ys)), allowed)


# All relations in turn, one for each step; and more where many chains, or steps that no chain
# reaches, are what could go wrong: rules that divide by zero, sums in half precision, scatters.
IN_TURN = {name: RELATIONS[i % len(RELATIONS)] for i, name in enumerate(sorted(ZOO))}
DELICATE = {
    ("bfloat16", 3, 1),
    ("inverse_vjp", 3, 1),
    ("log_division", 2, 3),
    ("log_division", 5, 2),
    ("tokens", 2, 3),
    ("tokens", 5, 2),
    ("tokens", 1, 2),
}


def in_default_tier(case):
    name, *relation = case
    return IN_TURN[name] == tuple(relation) or case in DELICATE


@pytest.mark.parametrize(
    ("name", "window", "every"),
    grid(
        [
            (name, *relation)
            for name in sorted(ZOO)
            for i, relation in enumerate(RELATIONS)
            if name in ("lstm", "nested_dict") or i % 3 == 0 or in_default_tier((name, *relation))
        ]
        + [("tokens", 1, 2)],
        always=in_default_tier,
    ),
)
def test_every_step_of_the_zoo(name, window, every):
    case = ZOO[name](np.float64)
    xs = case.xs(LENGTH)
    # A product in bfloat16 has its error, whatever the dtype of the weights around it.
    inside = [np.zeros((), jax.numpy.bfloat16)] if name == "bfloat16" else []
    allowed = oracles.tolerance(case.params, case.carry, xs, inside)
    label = "zoo, bfloat16" if inside else "zoo"
    how = {"window": window, "every": every}
    held_against_each_group(label, case.step, case.params, case.carry, xs, LENGTH, allowed, **how)


DRAWN = {
    "made": steps(),
    "window": st.none() | st.integers(1, 7),
    "every": st.integers(1, 5),
    "length": st.integers(1, 6),
}


def held_at_random(made, window, every, length):
    step, params, carry, x = made
    xs = several(x, length)
    allowed = 100 * oracles.tolerance(params, carry, xs)  # random programs may cancel
    label = f"random, float{64 if allowed < 1e-9 else 32}"
    how = {"window": window, "every": every}
    held_against_each_group(label, step, params, carry, xs, length, allowed, **how)


@settings(fixed_profile, max_examples=3)
@given(**DRAWN)
def test_random_steps(made, window, every, length):
    held_at_random(made, window, every, length)


@pytest.mark.exhaustive
@fixed_profile
@given(**DRAWN)
def test_many_random_steps(made, window, every, length):
    held_at_random(made, window, every, length)
