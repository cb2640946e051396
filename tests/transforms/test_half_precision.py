"""Sums over lags and steps of half precisions: in float32, rounded once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxbptt

V, H, B, T = 30, 8, 16, 100
rng = np.random.default_rng(0)
PARAMS = {
    "embedding": rng.normal(size=(V, H)) * 0.3,
    "recurrent": np.eye(H) * 0.9,
    "bias": rng.normal(size=H) * 0.1,
    "scale": np.asarray(1.1),
    "head": rng.normal(size=(H, 1)) * 0.3,
}
# One token in two is the same: its gradient is a sum over half of the batch at every step.
TOKENS = jnp.asarray(
    rng.choice(V, size=(T, B), p=np.r_[0.5, np.full(V - 1, 0.5 / (V - 1))]), jnp.int32
)


def step(p, c, x):
    c = jnp.tanh(p["embedding"][x] + c @ p["recurrent"] + p["bias"][None]) * p["scale"]
    return c, c @ p["head"]


def cast_inside(p, c, x):
    """Master weights in float32, computed with in the type of the carry."""
    return step(jax.tree.map(lambda v: v.astype(c.dtype), p), c, x)


def of_type(dtype):
    return jax.tree.map(lambda v: jnp.asarray(v, dtype), PARAMS), jnp.zeros((B, H), dtype)


def by_scan(scan, step, params, carry):
    def loss(p):
        ys = scan(lambda c, x: step(p, c, x), carry, TOKENS)[1]
        return jnp.sum(ys.astype(jnp.float32))

    return jax.jit(jax.grad(loss))(params)


def by_record(weights, step, params, carry):
    rec = jaxbptt.record(step, window=T, weights=weights)

    @jax.jit
    def go(p):
        tape, ys = lax.scan(lambda tape, x: rec(p, tape, x), rec.init(p, carry, TOKENS[0]), TOKENS)
        return rec.pullback(p, tape, jnp.ones_like(ys)).params

    return go(params)


def errors(got, want):
    return {
        name: float(np.linalg.norm(np.asarray(g, float) - want[name]) / np.linalg.norm(want[name]))
        for name, g in got.items()
    }


@functools.cache
def exact():
    """In float64: what rounding is measured against."""
    want = by_scan(lax.scan, step, *of_type(jnp.float64))
    return {name: np.asarray(v) for name, v in want.items()}


@functools.cache
def of_lax(dtype):
    return errors(by_scan(lax.scan, step, *of_type(dtype)), exact())


WAYS = {
    "scan, all steps": functools.partial(by_scan, functools.partial(jaxbptt.scan, window=None)),
    "scan, one chunk": functools.partial(
        by_scan, functools.partial(jaxbptt.scan, window=T, every=T)
    ),
    "record, stored": functools.partial(by_record, "stored"),
    "record, current": functools.partial(by_record, "current"),
    "record, replayed": functools.partial(by_record, "replayed"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_at_least_as_exact_as_lax_scan(way, dtype):
    """Each parameter is summed another way: scattered, contracted, reduced, added up."""
    found = errors(WAYS[way](step, *of_type(dtype)), exact())
    for name, error in found.items():
        # The forward pass rounds too, by chance one way or the other: a factor of two for that.
        assert error <= max(2 * of_lax(dtype)[name], float(jnp.finfo(dtype).eps)), name


@pytest.mark.parametrize("way", WAYS)
def test_master_weights_in_float32_get_a_sum_in_float32(way):
    params, _ = of_type(jnp.float32)
    carry = jnp.zeros((B, H), jnp.bfloat16)
    found = errors(WAYS[way](cast_inside, params, carry), exact())
    reference = errors(by_scan(lax.scan, cast_inside, params, carry), exact())
    for name, error in found.items():
        assert error <= max(2 * reference[name], float(jnp.finfo(jnp.bfloat16).eps)), name


def test_a_sliding_window_too():
    """Against the same window in float64: 100 chains of 20 steps each."""
    ours = functools.partial(jaxbptt.scan, window=20)
    want = by_scan(ours, step, *of_type(jnp.float64))
    want = {name: np.asarray(v) for name, v in want.items()}
    found = errors(by_scan(ours, step, *of_type(jnp.bfloat16)), want)
    assert max(found.values()) < 0.02, found


def test_what_a_step_rounds_on_the_way_to_a_weight_is_rounded_at_each_step():
    """`reduce_precision` in the step: its pullback is of each step, not of the sum."""

    def loss(scan, w):
        def f(c, x):
            c = jnp.tanh(lax.reduce_precision(w, 8, 7) * c + x)
            return c, c

        return scan(f, jnp.asarray(0.3), jnp.linspace(0.1, 1, 7))[1].sum()

    ours = functools.partial(jaxbptt.scan, window=None)
    got, want = (jax.grad(functools.partial(loss, scan))(0.5) for scan in (ours, lax.scan))
    assert got == want
