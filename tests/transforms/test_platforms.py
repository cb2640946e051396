"""`lax.platform_dependent` inside a step: what is for another platform is never compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import grid
from jax import lax

import jaxbptt

XS = jnp.linspace(-1, 1, 5)
W, H = 0.7, 0.3


@jax.custom_jvp
def not_here(v):
    """An operation that no platform has: a program with it in is not even compiled."""
    name, kind = "an_operation_of_another_platform", jax.ShapeDtypeStruct((), v.dtype)
    return jax.ffi.ffi_call(name, kind, vmap_method="sequential")(v)


not_here.defjvp(lambda v, t: (not_here(*v), not_here(*v) * t[0]))


def elsewhere(cpu, *operands):
    return lax.platform_dependent(
        *operands, tpu=lambda *vs: not_here(sum(vs)), default=lambda *vs: cpu(*vs)
    )


def for_each(w, c, x):
    """Which branches see a weight alone, as well as an activation, and of two platforms."""
    return lax.platform_dependent(
        w,
        c,
        tpu=lambda w, c: not_here(w) * c,
        cuda=lambda w, c: not_here(w * c),
        rocm=lambda w, c: not_here(w) + c,
        cpu=lambda w, c: jnp.sin(w) * c,
    )


# From w, c and x to a number; and the derivatives of it by w and by c.
STEPS = {
    "of the weight": (
        lambda w, c, x: elsewhere(jnp.sin, w) * c,
        lambda w, c: (np.cos(w) * c, np.sin(w)),
    ),
    "of the carry": (
        lambda w, c, x: w * elsewhere(jnp.sin, c),
        lambda w, c: (np.sin(c), w * np.cos(c)),
    ),
    "of both": (
        lambda w, c, x: elsewhere(lambda w, c: c * jnp.sin(w), w, c),
        lambda w, c: (np.cos(w) * c, np.sin(w)),
    ),
    "for each platform": (for_each, lambda w, c: (np.cos(w) * c, np.sin(w))),
    "in a branch": (
        lambda w, c, x: lax.cond(x > 5, lambda: w + c, lambda: for_each(w, c, x)),
        lambda w, c: (np.cos(w) * c, np.sin(w)),
    ),
    "in a loop": (
        lambda w, c, x: lax.scan(lambda c, _: (for_each(w, c, x), None), c, None, 2)[0],
        lambda w, c: (2 * np.sin(w) * np.cos(w) * c, np.sin(w) ** 2),
    ),
}


def step_of(name):
    def step(w, c, x):
        c = STEPS[name][0](w, c, x) + x
        return c, c

    return step


def expected(name, window):
    """d(sum of y)/dw, each y through its last `window` steps."""
    states = [H]
    for x in XS:
        states.append(step_of("of the weight")(W, states[-1], x)[0])
    if name == "of the carry":
        states = [H]
        for x in XS:
            states.append(W * np.sin(states[-1]) + x)
    if name == "in a loop":
        states = [H]
        for x in XS:
            states.append(np.sin(W) ** 2 * states[-1] + x)
    total = 0.0
    for t in range(len(XS)):
        lam = 1.0
        for s in range(t, max(t - window, -1), -1):
            by_w, by_c = STEPS[name][1](W, states[s])
            total, lam = total + lam * by_w, lam * by_c
    return float(total)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("name", STEPS)
def test_a_scan_compiles_the_branch_of_its_platform_alone(name, window):
    ours = functools.partial(jaxbptt.scan, window=window)

    def loss(w):
        return jnp.sum(ours(functools.partial(step_of(name), w), H, XS)[1])

    for run in (jax.grad(loss), jax.jit(jax.grad(loss))):
        np.testing.assert_allclose(run(W), expected(name, window or 9), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "weights"),
    grid(
        [(name, weights) for name in STEPS for weights in ("stored", "current", "replayed")],
        always=lambda case: case[1] == "current" or case[0] == "of both",
    ),
)
def test_a_recorder_compiles_the_branch_of_its_platform_alone(name, weights):
    rec = jaxbptt.record(step_of(name), window=2, weights=weights)

    def one(tape, x):
        grad, tape = jax.grad(lambda w: rec(w, tape, x)[::-1], has_aux=True)(W)
        return tape, grad

    tape = rec.init(W, H, XS[0])
    grads = jax.jit(lambda tape: lax.scan(one, tape, XS)[1])(tape)
    np.testing.assert_allclose(jnp.sum(grads), expected(name, 2), rtol=1e-12)
    first = jax.vmap(lambda w: jax.grad(lambda w: rec(w, tape, XS[0])[1])(w))(jnp.full(3, W))
    np.testing.assert_allclose(first, STEPS[name][1](W, H)[0], rtol=1e-12)
