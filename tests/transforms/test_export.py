"""Programs exported with symbolic dimensions, and residuals that are offloaded to the host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import draw, grid
from jax import export, lax
from jax.ad_checkpoint import checkpoint_name

import jaxbptt

W = draw(0, 3, 3)
KEY = jax.random.key(0)


@jax.custom_vjp
def clipped(v):
    return v


clipped.defvjp(lambda v: (v, None), lambda _, ct: (jnp.clip(ct, -0.5, 0.5),))


def step(w, c, x):
    c = jnp.tanh(c @ w + x)
    return c, c


def clipping_step(w, c, x):
    c = jnp.tanh(clipped(c @ w) + x)
    return c, c


def numbers(length, batch):
    return W, draw(1, batch, 3), draw(2, length, batch, 3)


def exported(function, length, batch):
    shapes = (3, 3), (batch, 3), (length, batch, 3)
    structs = (jax.ShapeDtypeStruct(shape, jnp.float64) for shape in shapes)
    return export.export(jax.jit(function))(*structs).call


def unrolled(window, every, of_y=lambda y: y):
    """The gradients of the sum of y² through the groups' own steps, written out."""

    def loss(w, c, xs):
        states, length = [c], len(xs)
        for x in xs:
            states.append(step(w, states[-1], x)[0])
        total = 0.0
        for first in range(0, length, every):
            end = min(first + every, length)
            start = max(first - max(window - every, 0), end - window, 0)
            c = states[start] if start == 0 else lax.stop_gradient(states[start])
            for s in range(start, end):
                c, y = step(w, c, xs[s])
                total += jnp.sum(of_y(y) ** 2) if s >= first else 0.0
        return total

    return jax.grad(loss, argnums=(0, 1, 2))


HOWS = [(None, 1), (2, 1), (3, 2), (2, 3), (4, 4), (9, 1)]


@pytest.mark.parametrize("symbolic", ["batch", "length", "both"])
@pytest.mark.parametrize(("window", "every"), grid(HOWS, [(None, 1), (3, 2), (9, 1)]))
def test_a_scan_is_exported_for_every_size(symbolic, window, every):
    def loss(w, c, xs):
        run = functools.partial(jaxbptt.scan, window=window, every=every)
        return jnp.sum(run(functools.partial(step, w), c, xs)[1] ** 2)

    b, n = export.symbolic_shape("b, n")
    dims = {"batch": (5, b), "length": (n, 2), "both": (n, b)}[symbolic]
    call = exported(jax.grad(loss, argnums=(0, 1, 2)), *dims)
    for length in (5,) if symbolic == "batch" else (1, 5):
        args = numbers(length, 2)
        want = unrolled(window or length, every if window else length)(*args)
        for got, one in zip(call(*args), want, strict=True):
            np.testing.assert_allclose(got, one, rtol=1e-10, atol=1e-13)


def test_a_random_window_is_exported_for_every_length():
    def loss(w, c, xs):
        window = jaxbptt.random_window(KEY, 3)
        return jnp.sum(jaxbptt.scan(functools.partial(step, w), c, xs, window=window)[1])

    (n,) = export.symbolic_shape("n")
    with pytest.raises(ValueError, match=r"^the length .* must be a number .* random window"):
        exported(jax.grad(loss), n, 2)


def test_chains_by_themselves_need_a_number_of_steps():
    def loss(w, c, xs):
        return jnp.sum(jaxbptt.scan(functools.partial(clipping_step, w), c, xs, window=2)[1])

    (n,) = export.symbolic_shape("n")
    with pytest.raises(
        ValueError, match=r"^the length .* must be a number .* each group of outputs"
    ):
        exported(jax.grad(loss), n, 2)


@pytest.mark.parametrize("weights", ["stored", "current", "replayed"])
def test_a_recorder_is_exported_for_every_batch(weights):
    def run(w, c, xs):
        rec = jaxbptt.record(step, window=3, weights=weights)

        def one(tape, x):
            def loss(w):
                new, y = rec(w, tape, x)
                return jnp.sum(y**2), new

            grad, tape = jax.grad(loss, has_aux=True)(w)
            return tape, grad

        return jnp.sum(lax.scan(one, rec.init(w, c, xs[0]), xs)[1], 0)

    b, n = export.symbolic_shape("b, n")
    args = numbers(5, 2)
    want = unrolled(3, 1)(*args)[0]
    np.testing.assert_allclose(exported(run, n, b)(*args), want, rtol=1e-10)


# ------------------------------------------------------------------ offloading


def offloading():
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["state"],
        offload_src="device",
        offload_dst="pinned_host",
    )

    def named(w, c, x):
        c = checkpoint_name(step(w, c, x)[0], "state")
        return c, jnp.sin(c)

    return jax.checkpoint(named, policy=policy)


@pytest.mark.parametrize(("window", "every"), HOWS)
def test_a_scan_offloads_as_the_policy_says(window, every):
    def loss(w, c, xs):
        run = functools.partial(jaxbptt.scan, window=window, every=every)
        return jnp.sum(run(functools.partial(offloading(), w), c, xs)[1] ** 2)

    args = numbers(5, 2)
    want = unrolled(window or 5, every if window else 5, jnp.sin)(*args)
    got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*args)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


@pytest.mark.parametrize("weights", ["stored", "current", "replayed"])
def test_a_recorder_offloads_as_the_policy_says(weights):
    rec = jaxbptt.record(offloading(), window=3, weights=weights)

    @jax.jit
    def run(w, c, xs):
        def one(tape, x):
            def loss(w):
                new, y = rec(w, tape, x)
                return jnp.sum(y**2), new

            grad, tape = jax.grad(loss, has_aux=True)(w)
            return tape, grad

        tape, grads = lax.scan(one, rec.init(w, c, xs[0]), xs)
        return jnp.sum(grads, 0), tape

    args = numbers(5, 2)
    got, tape = run(*args)
    np.testing.assert_allclose(got, unrolled(3, 1, jnp.sin)(*args)[0], rtol=1e-10)
    if weights != "replayed" and hasattr(jax, "memory"):
        assert jax.memory.Space.Host in [jax.typeof(v).memory_space for v in tape._ring]
