"""Random steps, windows, groups and lengths against the unrolled graph."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from oracles import check, check_cotangents, moving, random_like, reach
from programs import fixed_profile, several, steps

import jaxbptt


@fixed_profile
@given(
    made=steps(),
    window=st.integers(1, 6),
    every=st.integers(1, 4),
    rows=st.integers(1, 6),
    length=st.integers(3, 6),
    weights=st.sampled_from(["stored", "current"]),
)
def test_random_steps_agree_with_the_unrolled_graph(made, window, every, rows, length, weights):
    step, params, carry, x = made
    rows, xs = min(rows, window), several(x, length)
    thetas = oracles.drifting(params, length, size=0.3)
    thetas = thetas if weights == "stored" else [params] * length
    run = oracles.Run(step, thetas, carry, xs, length)
    carries, ys = run.trajectory
    ct_ys = [random_like(y, s) for s, y in enumerate(ys)]
    ct_carries = [random_like(c, 50 + s) for s, c in enumerate(carries)]
    ct_rows = ([random_like(ys[0], 99)] * rows + ct_ys)[-rows:]
    record = functools.partial(jaxbptt.record, step, window=window, weights=weights)
    alone, grouped = record(), record(every=every)

    @jax.jit
    def go(thetas, carry, xs, ct_ys, ct_carries):
        def both(tapes, given):
            theta, x, ct_y, ct_carry = given

            def loss(values):
                new, y = alone(oracles.refill(theta, values), tapes[0], x)
                pairs = zip(ct_y + ct_carry, moving((y, new.carry)), strict=True)
                return sum((jnp.sum(a * b).astype(jnp.float64) for a, b in pairs), 0.0), new

            grads, new = jax.grad(loss, has_aux=True)(moving(theta))
            return (new, grouped(theta, tapes[1], x)[0]), grads

        first = jax.tree.map(lambda v: v[0], (thetas, xs))
        tapes = tuple(rec.init(first[0], carry, first[1]) for rec in (alone, grouped))
        tapes, grads = lax.scan(both, tapes, (thetas, xs, ct_ys, ct_carries), length=length)
        return grads, tapes[1]

    @jax.jit
    def pull(params, tape):
        together = jax.tree.map(join, *ct_rows)
        return grouped.pullback(params, tape, together, ct_carries[-1])

    grads, tape = go(
        oracles.stack(run.thetas),
        carry,
        xs,
        oracles.stack([moving(ct) for ct in ct_ys]),
        oracles.stack([moving(ct) for ct in ct_carries]),
    )
    allowed = 100 * oracles.tolerance(params, carry, xs)  # random programs may cancel
    label = f"random steps, float{64 if allowed < 1e-9 else 32}"
    for t in range(1, length + 1):
        want = run.unrolled(t, reach(t, window), [ct_ys[t - 1]], ct_carries[t - 1])
        check(f"{label}, in the loop", [leaf[t - 1] for leaf in grads], want.params, allowed)
    want = run.unrolled(length, reach(length, window, every, rows), ct_rows, ct_carries[-1])
    got = pull(run.thetas[-1], tape)
    check_cotangents(f"{label}, pullback", got, want, allowed)


def join(*leaves):
    """Cotangents of several steps with an axis in front; float0 stays with NumPy."""
    return (np if leaves[0].dtype == jax.dtypes.float0 else jnp).stack(leaves)
