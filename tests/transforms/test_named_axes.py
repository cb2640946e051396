"""Collectives over a vmapped axis inside a step, with the gradient taken outside of the `vmap`.

The reference is the step unrolled in Python inside the same `vmap`, each output through the last
`window` steps of its own.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import draw, grid
from jax import lax
from jax.extend import core

import jaxbptt

LENGTH, BATCH = 5, 4
XS = draw(0, BATCH, LENGTH, 3)
NESTED = hasattr(core, "set_current_trace")  # from JAX 0.10 on a map in a map as well
W = {"w": draw(1, 3, 3), "b": draw(2, 3)}


def normalised(w, c, x, axis="batch"):
    a = c @ w["w"] + w["b"] * x
    return jnp.tanh(a - lax.pmean(a, axis))


def shifted(w, c, x):
    around = [(i, (i + 1) % BATCH) for i in range(BATCH)]
    return jnp.sin(lax.ppermute(c, "batch", around) @ w["w"] + x)


def gathered(w, c, x):
    every = lax.all_gather(c @ w["w"], "batch")
    return jnp.tanh(every.sum(0) * 0.3 + every[lax.axis_index("batch")] + x)


def of_the_weights(w, c, x):
    mean = lax.pmean(w["w"].sum(), "batch") / lax.psum(1, "batch")
    return jnp.tanh(c * mean + w["b"] * x)


def in_a_loop(w, c, x):
    return lax.scan(lambda c, _: (normalised(w, c, x), None), c, None, 2)[0]


def in_a_branch(w, c, x):
    return lax.cond(w["b"][0] > 0, normalised, of_the_weights, w, c, x)


def over_two(w, c, x):
    return normalised(w, c, x, ("batch", "copies"))


STEPS = {
    "mean": normalised,
    "permutation": shifted,
    "gather": gathered,
    "weights": of_the_weights,
    "loop": in_a_loop,
    "branch": in_a_branch,
}
if NESTED:
    STEPS["two axes"] = over_two


def step_of(name):
    def step(w, c, x):
        c = STEPS[name](w, c, x)
        return c, jnp.sum(c**2)

    return step


def unrolled(name, window, every, w, xs):
    """The sum of y over the groups, the carry detached where the group's reach begins."""
    states = [jnp.full(3, 0.1)]
    for x in xs:
        states.append(step_of(name)(w, states[-1], x)[0])
    total = 0.0
    for first in range(0, LENGTH, every):
        end = min(first + every, LENGTH)
        start = max(first - max(window - every, 0), end - window, 0)
        c = lax.stop_gradient(states[start])
        for s in range(start, end):
            c, y = step_of(name)(w, c, xs[s])
            total += y if s >= first else 0.0
    return total


def scanned(name, window, every, w, xs):
    step = functools.partial(step_of(name), w)
    return jnp.sum(jaxbptt.scan(step, jnp.full(3, 0.1), xs, window=window, every=every)[1])


def recorded(name, weights, window, every, w, xs):
    rec = jaxbptt.record(step_of(name), window=window, weights=weights, every=every)
    tape, total = rec.init(w, jnp.full(3, 0.1), xs[0]), 0.0
    for x in xs:
        tape, y = rec(w, tape, x)
        total += y
    return total


def outside(run, w, *, jit="no"):
    """The gradient of the mapped function, jitted inside of the maps or all of it or not at all."""
    inner = jax.jit(run) if jit == "inside" else run
    xs = XS
    if NESTED:
        inner, xs = jax.vmap(inner, (None, 0), axis_name="copies"), jnp.stack([XS, 0.5 * XS], 1)
    mapped = jax.vmap(inner, (None, 0), axis_name="batch")
    gradient = jax.grad(lambda w: jnp.sum(mapped(w, xs)))
    return jax.jit(gradient)(w) if jit == "all" else gradient(w)


def assert_same(got, want, rtol=1e-11):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-13), got, want)


WINDOWS = [(None, 1), (LENGTH, 1), (2, 1), (3, 2), (2, 3)]


@pytest.mark.parametrize(
    ("name", "window", "every", "jit"),
    grid(
        [(name, *how, jit) for name in STEPS for how in WINDOWS for jit in ("no", "inside", "all")],
        always=lambda case: (
            case[1:] in [(None, 1, "no"), (3, 2, "inside")] or case[::3] == ("mean", "all")
        ),
    ),
)
def test_scan(name, window, every, jit):
    want = outside(functools.partial(unrolled, name, window or LENGTH, every), W, jit="all")
    if window is None:
        want = outside(functools.partial(unrolled, name, LENGTH, LENGTH), W, jit="all")
    assert_same(outside(functools.partial(scanned, name, window, every), W, jit=jit), want)


@pytest.mark.parametrize(
    ("name", "weights", "every", "jit"),
    grid(
        [
            (name, weights, every, jit)
            for name in STEPS
            for weights in ("stored", "current", "replayed")
            for every in (1, 2)
            for jit in ("no", "inside", "all")
        ],
        always=lambda case: case[0] == "mean" and case[2:] in [(1, "inside"), (2, "all")],
    ),
)
def test_record(name, weights, every, jit):
    want = outside(functools.partial(unrolled_whole_groups, name, 3, every), W, jit="all")
    assert_same(outside(functools.partial(recorded, name, weights, 3, every), W, jit=jit), want)


def unrolled_whole_groups(name, window, every, w, xs):
    """A recorder's group has no gradient before it is whole."""
    return unrolled_upto(name, window, every, w, xs, LENGTH // every * every)


def unrolled_upto(name, window, every, w, xs, length):
    states = [jnp.full(3, 0.1)]
    for x in xs:
        states.append(step_of(name)(w, states[-1], x)[0])
    total = 0.0
    for first in range(0, length, every):
        end = first + every
        start = max(end - max(window, every), 0)
        c = lax.stop_gradient(states[start])
        for s in range(start, end):
            c, y = step_of(name)(w, c, xs[s])
            total += y if s >= first else 0.0
    return total


def test_second_order_goes_through_as_well():
    def curvature(run):
        return jax.grad(lambda w: sum(jnp.sum(v**2) for v in jax.tree.leaves(outside(run, w))))(W)

    want = curvature(functools.partial(unrolled, "mean", LENGTH, LENGTH))
    assert_same(curvature(functools.partial(scanned, "mean", None, 1)), want, 1e-9)


def test_one_that_is_not_mapped_is_counted_once_for_each_row():
    """What a collective makes is the same in all rows, where no loop makes it look different."""
    step = lambda w, c, x: (lax.psum(w * c, "batch"),) * 2  # noqa: E731
    rec = jaxbptt.record(step, window=3)

    def run(c, w):
        tape, total = rec.init(w, c, None), 0.0
        for _ in range(3):
            tape, y = rec(w, tape, None)
            total += y
        return total

    cs = jnp.array([0.1, -0.3, 0.7])

    def unmapped(w):  # c becomes the sum in every row, after which a sum is three times it
        ys = w * jnp.sum(cs) * jnp.array([1, 3 * w, 9 * w**2])
        return 3 * jnp.sum(ys)

    mapped = lambda w: jnp.sum(jax.vmap(run, (0, None), axis_name="batch")(cs, w))  # noqa: E731
    np.testing.assert_allclose(mapped(0.4), unmapped(0.4), rtol=1e-12)
    np.testing.assert_allclose(jax.grad(mapped)(0.4), jax.grad(unmapped)(0.4), rtol=1e-12)


@pytest.mark.skipif(NESTED, reason="this version of JAX has a way")
def test_a_map_in_a_map_is_refused_in_a_sentence():
    def loss(w):
        run = functools.partial(scanned, "mean", None, 1)
        mapped = jax.vmap(jax.vmap(run, (None, 0)), (None, 0), axis_name="batch")
        return jnp.sum(mapped(w, XS[:, None]))

    with pytest.raises(NameError, match=r"jax\.grad must stand inside of the vmap .* 'batch'"):
        jax.grad(loss)(W)
