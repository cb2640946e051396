"""Random steps, windows, groups and lengths against the unrolled graph."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from harness import first, grid, moving_only, weigh
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from jax import lax
from oracles import check, check_cotangents, moving, random_like, reach
from programs import fixed_profile, several, steps

import jaxbptt


# The first example of any seed is the smallest: no inputs, no outputs, one step back.
@pytest.mark.parametrize(
    ("weights", "number", "examples"),
    grid(
        [("stored", 1, 3), ("current", 2, 3), ("stored", 3, 13), ("current", 4, 12)],
        always=[("stored", 1, 3), ("current", 2, 3)],
    ),
)
def test_random_steps_agree_with_the_unrolled_graph(weights, number, examples):
    @seed(number)
    @settings(fixed_profile, max_examples=examples)
    @given(
        made=steps(),
        window=st.integers(1, 6),
        every=st.integers(1, 4),
        rows=st.integers(1, 6),
        length=st.integers(3, 6),
    )
    def hold(made, window, every, rows, length):
        hold_against_the_unrolled_graph(weights, *made, window, every, min(rows, window), length)

    hold()


def hold_against_the_unrolled_graph(weights, step, params, carry, x, window, every, rows, length):
    xs = several(x, length)
    thetas = oracles.drifting(params, length, size=0.3)
    thetas = thetas if weights == "stored" else [params] * length
    run = oracles.Run(step, thetas, carry, xs, length)
    carries, ys = run.trajectory
    ct_ys = [random_like(y, s) for s, y in enumerate(ys)]
    ct_carries = [random_like(c, 50 + s) for s, c in enumerate(carries)]
    ct_rows = ([random_like(ys[0], 99)] * rows + ct_ys)[-rows:]
    record = functools.partial(jaxbptt.record, step, window=window, weights=weights)
    alone, grouped = record(), record(every=every)
    newest = ct_carries[-1]

    @jax.jit
    def go(stacked, carry, ct_ys, ct_carries, last):
        def both(tapes, given):
            (theta, x), ct_y, ct_carry = given

            def loss(values):
                new, y = alone(oracles.refill(theta, values), tapes[0], x)
                return weigh(ct_y + ct_carry, (y, new.carry)), new

            grads, new = jax.grad(loss, has_aux=True)(moving(theta))
            return (new, grouped(theta, tapes[1], x)[0]), grads

        theta, x = first(stacked)
        tapes = tuple(rec.init(theta, carry, x) for rec in (alone, grouped))
        tapes, grads = lax.scan(both, tapes, (stacked, ct_ys, ct_carries), length=length)
        together = jax.tree.map(join, *ct_rows)
        return grads, moving_only(grouped.pullback(last, tapes[1], together, newest))

    cts = [oracles.by_step([moving(ct) for ct in each]) for each in (ct_ys, ct_carries)]
    grads, got = go(run.stacked, carry, *cts, run.thetas[-1])
    grads = [np.asarray(leaf) for leaf in grads]
    allowed = 100 * oracles.tolerance(params, carry, xs)  # random programs may cancel
    label = f"random steps, float{64 if allowed < 1e-9 else 32}"
    for t in range(1, length + 1):
        want = run.unrolled(t, reach(t, window), [ct_ys[t - 1]], ct_carries[t - 1])
        check(f"{label}, in the loop", [leaf[t - 1] for leaf in grads], want.params, allowed)
    want = run.unrolled(length, reach(length, window, every, rows), ct_rows, ct_carries[-1])
    check_cotangents(f"{label}, pullback", got, want, allowed)


def join(*leaves):
    """Cotangents of several steps with an axis in front; float0 stays with NumPy."""
    return (np if leaves[0].dtype == jax.dtypes.float0 else jnp).stack(leaves)
