"""Reach: a call goes as far back as it is told, as if the window were that long."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from harness import draw, grid, worst
from jax import lax

import jaxbptt

LENGTH, WINDOW = 45, 40
W = {"w": draw(0, 3, 3), "u": draw(1, 2, 3), "v": draw(2, 3, 2)}
XS, H = draw(3, LENGTH, 2, 2), draw(4, 2, 3)


def step(p, h, x):
    h = jnp.tanh(h @ p["w"] + x @ p["u"])
    return h, jnp.sum((h @ p["v"]) ** 2)


@functools.cache
def reference():
    return oracles.Run(step, W, H, XS, LENGTH)


@functools.cache
def recorded(length, weights="stored", every=1, window=WINDOW):
    """A tape after so many steps."""
    rec = jaxbptt.record(step, window=window, weights=weights, every=every)

    @jax.jit
    def run(xs):
        return lax.scan(lambda tape, x: rec(W, tape, x), rec.init(W, H, xs[0]), xs)[0]

    return rec, run(XS[:length])


@functools.cache
def pulled(weights, every, length):
    """A compiled pullback of a whole group for any reach."""
    rec, tape = recorded(length, weights, every)
    return jax.jit(lambda reach: rec.pullback(W, tape, jnp.ones(every), reach=reach))


CASES = itertools.product(["stored", "current", "replayed"], [1, 3], [5, LENGTH])


@pytest.mark.parametrize(
    ("weights", "every", "length"),
    grid(CASES, [("stored", 1, LENGTH), ("current", 3, LENGTH), ("replayed", 1, 5)]),
)
def test_any_reach_is_a_window_of_that_length(weights, every, length):
    go, (rec, tape) = pulled(weights, every, length), recorded(length, weights, every)
    for reach in (1, 2, 3, 7, 16, 17, 33, WINDOW):
        oldest = oracles.reach(length, reach, every, every)
        cts = [np.ones(())] * every
        if reach < every:  # the earlier outputs of a group are without a gradient
            cts = cts[-reach:]
        want = reference().unrolled(length, oldest, cts)
        got = go(reach)
        oracles.check_cotangents(f"reach, {weights}", got, want, 1e-12)
        if reach in (2, 17):
            assert worst(got, rec.pullback(W, tape, jnp.ones(every), reach=reach)) <= 1e-12
    assert worst(go(10**6), go(WINDOW)) == worst(go(-3), go(1)) == 0.0


@pytest.mark.parametrize("every", [1, 3])
def test_the_reach_of_a_call_inside_a_loop(every):
    rec = jaxbptt.record(step, window=WINDOW, every=every)
    reaches = np.random.default_rng(0).integers(1, WINDOW + 5, LENGTH)

    def one(tape, row):
        x, reach = row
        grads, tape = jax.grad(lambda p: rec(p, tape, x, reach=reach)[::-1], has_aux=True)(W)
        return tape, grads

    got = jax.jit(lambda tape: lax.scan(one, tape, (XS, reaches))[1])(rec.init(W, H, XS[0]))
    for t in range(every, LENGTH + 1, 7 * every):
        reach = min(int(reaches[t - 1]), WINDOW)
        cts = [np.ones(())] * min(every, reach)
        want = reference().unrolled(t, oracles.reach(t, reach, every, every), cts)
        mine = [v[t - 1] for v in jax.tree.leaves(got)]
        oracles.check("reach, in a loop", mine, want.params, 1e-12)


def test_a_window_for_each_part_is_cut_by_the_reach_too():
    def two(p, c, x):
        a, b = c
        a, b = jnp.tanh(a @ p["w"] + b), jnp.tanh(b @ p["w"] + x @ p["u"])
        return (a, b), jnp.sum(a**2)

    rec = jaxbptt.record(two, window=(4, 9))

    @jax.jit
    def run(xs):
        return lax.scan(lambda tape, x: rec(W, tape, x), rec.init(W, (H, H), xs[0]), xs)[0]

    tape, run_ = run(XS[:15]), oracles.Run(two, W, (H, H), XS[:15], 15)
    go = jax.jit(lambda reach: rec.pullback(W, tape, jnp.ones(1), reach=reach))
    for reach in (2, 4, 6, 9):
        oldest = [15 - min(part, reach) + 1 for part in (4, 9)]
        want = run_.unrolled(15, oldest, [np.ones(())])
        for got in (go(reach), rec.pullback(W, tape, jnp.ones(1), reach=reach)):
            oracles.check("reach, parts", got.params, want.params, 1e-12)


def test_the_time_follows_the_reach():
    """Counted in trips: the loop looks at the reach, and the program is one for all."""
    seen = []

    @jax.custom_vjp
    def noted(v):
        return v

    def pull(_, ct):
        jax.debug.callback(lambda: seen.append(1))
        return (ct,)

    noted.defvjp(lambda v: (v, None), pull)
    rec = jaxbptt.record(lambda w, c, x: (noted(w * c + x), w * c), window=200)

    @jax.jit
    def run(xs):
        return lax.scan(lambda tape, x: rec(0.5, tape, x), rec.init(0.5, 0.0, 0.0), xs)[0]

    tape = run(jnp.ones(200))
    cts = jnp.ones(1), jnp.ones(())
    go = jax.jit(lambda reach: rec.pullback(0.5, tape, *cts, reach=reach).params)
    for reach in (1, 20, 200):
        seen.clear()
        go(reach).block_until_ready()
        jax.effects_barrier()
        assert len(seen) == reach


def test_under_vmap_each_run_has_its_own_reach():
    rec, tape = recorded(LENGTH)
    go = jax.jit(jax.vmap(lambda reach: rec.pullback(W, tape, jnp.ones(1), reach=reach).params))
    reaches = jnp.array([1, 33, 7])
    for i, one in enumerate(reaches.tolist()):
        want = rec.pullback(W, tape, jnp.ones(1), reach=one).params
        assert worst(jax.tree.map(lambda v, i=i: v[i], go(reaches)), want) <= 1e-12


def test_half_precision_is_summed_in_float32():
    low = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (W, H, XS))
    rec = jaxbptt.record(step, window=WINDOW)

    @jax.jit
    def run(params, h, xs):
        tape = lax.scan(lambda tape, x: rec(params, tape, x), rec.init(params, h, xs[0]), xs)[0]
        one = jnp.ones(1, jnp.bfloat16)
        reaches = WINDOW, jnp.int32(WINDOW)
        return [rec.pullback(params, tape, one, reach=r).params for r in reaches]

    whole, in_blocks = run(*low)
    assert worst(whole, in_blocks) <= 1e-2


# ------------------------------------------------------------ drawn


MEANS = [(1, 2.0, 1), (1, 5.0, 1), (3, 3.0, 3), (3, 2.0, 1), (3, 2.0, 2)]


@pytest.mark.parametrize(("every", "mean", "rows"), grid(MEANS, MEANS[::2]))
def test_all_reaches_by_their_probability_give_the_windows_gradient(every, mean, rows):
    """The mean over the number of lags, each with its probability, worked out and not drawn."""
    window, keep = 9, 1 - 1 / mean
    rec, tape = recorded(20, "stored", every, window)
    exact = rec.pullback(W, tape, jnp.ones(rows)).params
    lags = np.arange(1, window + 1)
    probability = np.append(keep ** (lags[:-1] - 1) * (1 - keep), keep ** (window - 1))
    np.testing.assert_allclose(probability.sum(), 1.0, rtol=1e-12)
    drawn = jaxbptt.random_reach(jax.random.key(0), mean)

    def with_lags(n):
        """A draw in whose place this number of lags stands."""
        from jaxbptt._windows import Reach

        return Reach(n, 1 - 1 / drawn.mean)

    from jaxbptt._transforms.record import closure_for
    from jaxbptt._transforms.tape import x_struct
    from jaxbptt._transforms.window_vjp import Wanted, given_window, pull_window

    def gradient(n):
        closure, same = closure_for(rec, W, tape, x_struct(tape))
        given = given_window(closure, same, W, jnp.ones(rows), None, with_lags(n))
        return pull_window(closure, *given, Wanted(closed_over=False, xs=False)).weights

    each = jax.jit(jax.vmap(gradient))(jnp.asarray(lags, jnp.int32))
    mean_of_all = [np.tensordot(probability, v, 1) for v in each]
    oracles.check("random reach", mean_of_all, jax.tree.leaves(exact), 1e-12)


def test_how_far_a_drawn_reach_goes():
    from jaxbptt._windows import Reach

    keys = jax.random.split(jax.random.key(1), 40_000)
    draws = jax.vmap(lambda key: Reach.of(jaxbptt.random_reach(key, 4.0), 50).lags)(keys)
    counts = np.bincount(np.asarray(draws), minlength=51)[1:] / len(keys)
    expected = 0.75 ** np.arange(50) * 0.25
    np.testing.assert_allclose(counts[:8], expected[:8], atol=4 * np.sqrt(0.25 / len(keys)))
    assert abs(float(jnp.mean(draws)) - 4.0) < 0.1


def test_a_drawn_reach_in_a_call():
    rec, tape = recorded(LENGTH)

    @jax.jit
    def gradients(keys):
        def gradient(key):
            reach = jaxbptt.random_reach(key, mean=6.0)
            return jax.grad(lambda p: rec(p, tape, XS[0], reach=reach)[1])(W)["u"]

        return jnp.mean(jax.vmap(gradient)(keys), 0)

    got = gradients(jax.random.split(jax.random.key(2), 4000))
    want = jax.grad(lambda p: rec(p, tape, XS[0])[1])(W)["u"]
    assert worst(got, want) < 0.1


# ------------------------------------------------------------ refused


@pytest.mark.parametrize("reach", [1.5, "far", jnp.ones(2, jnp.int32), jnp.float32(2.0), True])
def test_what_is_no_reach(reach):
    rec, tape = recorded(5)
    with pytest.raises(ValueError, match="reach must be an int, an integer scalar or a"):
        rec(W, tape, XS[0], reach=reach)


def test_a_mean_that_is_no_number_above_one():
    with pytest.raises(ValueError, match="mean must be a number above 1"):
        jaxbptt.random_reach(jax.random.key(0), 1.0)


def test_a_traced_reach_can_not_be_differentiated_again():
    rec, tape = recorded(5)

    def squared(w, reach):
        grads = jax.grad(lambda w: rec({**W, "w": w}, tape, XS[0], reach=reach)[1])(w)
        return jnp.sum(grads**2)

    with pytest.raises(ValueError, match="reach must be a Python int where the gradient is"):
        jax.jit(jax.grad(squared))(W["w"], 3)
    assert np.all(np.isfinite(jax.grad(lambda w: squared(w, 3))(W["w"])))


def test_a_pace_has_no_reach():
    rec = jaxbptt.record(step, window=5, pace=2)
    with pytest.raises(ValueError, match="must have no pace for reach"):
        rec(W, rec.init(W, H, XS[0]), XS[0], reach=2)
