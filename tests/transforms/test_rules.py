"""Derivative rules that make something of nothing: they run where there is a cotangent alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxbptt

W = jnp.array([[0.9, 0.3], [-0.4, 0.8]])
XS = jnp.linspace(-0.5, 0.6, 12).reshape(6, 2)
CARRY = jnp.full(2, 0.1)


@jax.custom_vjp
def of_length_one(v):
    return v


of_length_one.defvjp(lambda v: (v, None), lambda _, ct: (ct / jnp.linalg.norm(ct),))


@jax.custom_vjp
def with_more(v):
    return v


with_more.defvjp(lambda v: (v, None), lambda _, ct: (ct + 0.1,))


def step_with(rule, head):
    def step(w, c, x):
        h = jnp.tanh(w @ c + x)
        return h, rule(w @ h if head else 2 * h)

    return step


def by_hand(step, w, end, window):
    """The sum of the output of step `end`, with the carry detached a window before it."""
    c = CARRY
    for s in range(end + 1):
        c = lax.stop_gradient(c) if s == end + 1 - window else c
        c, y = step(w, c, XS[s])
    return jnp.sum(y)


@pytest.mark.parametrize("rule", [of_length_one, with_more])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("window", [1, 3, 6])
def test_a_rule_on_the_output_runs_at_the_output_alone(rule, head, window):
    step = step_with(rule, head)
    each = [jax.grad(lambda w, end=end: by_hand(step, w, end, window))(W) for end in range(len(XS))]

    def scanned(w):
        return jnp.sum(jaxbptt.scan(lambda c, x: step(w, c, x), CARRY, XS, window=window)[1])

    np.testing.assert_allclose(jax.grad(scanned)(W), sum(each), rtol=1e-12)
    for weights in ("stored", "current", "replayed"):
        rec = jaxbptt.record(step, window=window, weights=weights)
        tape = rec.init(W, CARRY, XS[0])
        for x, want in zip(XS, each, strict=True):
            tape, _ = rec(W, tape, x)
            got = rec.pullback(W, tape, jnp.ones((1, 2))).params
            np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("pace", [1, 2])
def test_a_rule_on_the_output_runs_once_under_a_pace(pace):
    step, window = step_with(of_length_one, False), 4
    rec = jaxbptt.record(step, window=window, pace=pace)
    tape, total = rec.init(W, CARRY, XS[0]), 0.0
    for x in XS:
        tape, _, grads = rec.advance(W, tape, x, jnp.sum)
        total += grads
    assert jnp.isfinite(total).all()


def test_what_a_rule_on_a_weight_fills_in_counts_once_for_each_step():
    @jax.custom_vjp
    def filled(w):
        return w

    def back(_, ct):
        return (ct.at[jnp.array([0, 7])].get(mode="fill", fill_value=1.0),)

    filled.defvjp(lambda w: (w, None), back)

    def step(w, c, x):
        c = jnp.tanh(filled(w) * c + x)
        return c, c

    def loss(scan, w):
        return jnp.sum(scan(lambda c, x: step(w, c, x), CARRY, XS)[1])

    w = jnp.array([0.9, 0.8])
    want = jax.grad(lambda w: loss(lax.scan, w))(w)
    assert want[1] == len(XS)
    got = jax.grad(lambda w: loss(lambda *a: jaxbptt.scan(*a, window=None), w))(w)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    rec = jaxbptt.record(step, window=len(XS), every=len(XS))
    tape = rec.init(w, CARRY, XS[0])
    for x in XS:
        tape, _ = rec(w, tape, x)
    got = rec.pullback(w, tape, jnp.ones((len(XS), 2))).params
    np.testing.assert_allclose(got, want, rtol=1e-12)
