"""Steps with many kinds of parts beside the gradient's path, against the step unrolled in Python.

Each carry has floats that gradients flow through, floats that pass a loop without a derivative,
a counter and a key.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import draw, grid
from jax import lax

import jaxbptt

LENGTH = 6
XS = draw(0, LENGTH, 3)
W = {"w": draw(1, 3, 3), "b": draw(2, 3)}
CARRY = {"h": draw(3, 3), "s": jnp.ones(3), "n": jnp.int32(0), "key": jax.random.key(1)}


def settle(v):
    return lax.while_loop(lambda v: jnp.abs(v).sum() > 0.3, lambda v: 0.5 * v, v)


@jax.custom_jvp
def sine(v):
    return jnp.sin(v)


sine.defjvp(lambda p, t: (sine(*p), 1.7 * jnp.cos(p[0]) * t[0]))


@jax.custom_vjp
def gated(v, gate):
    return v * gate


gated.defvjp(lambda v, g: (v * g, g), lambda g, ct: (1.3 * ct * g, None))


def inner_scan(w, c, x):
    one = lambda h, i: (jnp.tanh(h @ w["w"] + w["b"] * i), h.sum())  # noqa: E731
    h, sums = lax.scan(one, c["h"], jnp.arange(3.0))
    key, _ = jax.random.split(c["key"])
    return {"h": h + x, "s": settle(c["s"] + x), "n": c["n"] + 1, "key": key}, sums


def inner_loop(w, c, x):
    s = settle(c["s"] + x)
    h = lax.fori_loop(0, 3, lambda i, v: jnp.tanh(v @ w["w"]), c["h"])
    return {**c, "h": h + s, "s": s, "n": c["n"] * 2}, (h, s)


def branches(w, c, x):
    even = lambda h: jnp.tanh(h @ w["w"])  # noqa: E731
    h = lax.cond(c["n"] % 2 == 0, even, lambda h: jnp.sin(h * w["b"]), c["h"])
    s = lax.cond(x[0] > 0, settle, lambda s: s, c["s"])
    return {**c, "h": h, "n": c["n"] + 1, "s": s}, h


def rule_forwards(w, c, x):
    h = sine(c["h"] @ w["w"]) + x
    return {**c, "h": h, "s": sine(settle(c["s"]))}, h * c["s"]


def rule_backwards(w, c, x):
    h = gated(jnp.tanh(c["h"] @ w["w"]), settle(x))
    return {**c, "h": h + x}, h


def random(w, c, x):
    key, own = jax.random.split(c["key"])
    h = jnp.tanh(c["h"] @ w["w"] + jax.random.normal(own, (3,)))
    return {**c, "h": h, "key": key, "s": c["s"] + lax.stop_gradient(h)}, h * settle(c["s"])


def by_index(w, c, x):
    h = jnp.sort(c["h"] @ w["w"]) + x
    order = jnp.argsort(h)
    return {**c, "h": jnp.tanh(h[order]), "n": order[0].astype(jnp.int32)}, h[c["n"] % 3]


def checkpointed(w, c, x):
    run = jax.checkpoint(lambda w, h: jnp.tanh(h @ w["w"] + w["b"] * settle(x)))
    h = run(w, c["h"])
    return {**c, "h": h, "s": c["s"] + x}, h


STEPS = [
    inner_scan,
    inner_loop,
    branches,
    rule_forwards,
    rule_backwards,
    random,
    by_index,
    checkpointed,
]
HOWS = [(None, 1), (2, 1), (3, 2)]


def total(y):
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(y))


@functools.cache
def unrolled(step, window, every):
    def loss(w):
        states, sum_ = [CARRY], 0.0
        for x in XS:
            states.append(step(w, states[-1], x)[0])
        for first in range(0, LENGTH, every):
            end = min(first + every, LENGTH)
            start = max(first - max(window - every, 0), end - window, 0)
            c = jax.tree.map(lax.stop_gradient, states[start])
            for s in range(start, end):
                c, y = step(w, c, XS[s])
                sum_ += total(y) if s >= first else 0.0
        return sum_

    return jax.jit(jax.grad(loss))(W)


def assert_same(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13), got, want)


@pytest.mark.parametrize(("window", "every"), grid(HOWS, [(None, 1), (3, 2)]))
@pytest.mark.parametrize("step", STEPS)
def test_a_scan(step, window, every):
    run = functools.partial(jaxbptt.scan, window=window, every=every)
    got = jax.jit(jax.grad(lambda w: total(run(functools.partial(step, w), CARRY, XS)[1])))(W)
    assert_same(got, unrolled(step, window or LENGTH, every if window else LENGTH))


@pytest.mark.parametrize(
    ("step", "weights"),
    grid(
        [(step, weights) for step in STEPS for weights in ("stored", "current", "replayed")],
        always=lambda case: case[1] == "current",
    ),
)
def test_a_recorder(step, weights):
    def with_loss(w, c, x):
        c, y = step(w, c, x)
        return c, (total(y), y)

    rec = jaxbptt.record(with_loss, window=3, every=2, weights=weights, has_aux=True)

    def one(tape, x):
        def loss(w):
            new, (y, _) = rec(w, tape, x)
            return y, new

        grads, tape = jax.grad(loss, has_aux=True)(W)
        return tape, grads

    grads = jax.jit(lambda: lax.scan(one, rec.init(W, CARRY, XS[0]), XS)[1])()
    assert_same(jax.tree.map(lambda v: v.sum(0), grads), unrolled(step, 3, 2))


@pytest.mark.parametrize("step", [inner_scan, branches, by_index])
def test_a_batch_of_gradients(step):
    run = functools.partial(jaxbptt.scan, window=3, every=2)
    gradient = jax.grad(lambda w: total(run(functools.partial(step, w), CARRY, XS)[1]))
    got = jax.jit(jax.vmap(gradient))(jax.tree.map(lambda v: jnp.stack([0.5 * v, v]), W))
    assert_same(jax.tree.map(lambda v: v[1], got), unrolled(step, 3, 2))
