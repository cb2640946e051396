"""Parts of the carry, and outputs, that a step sets to a constant, in all their forms."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from harness import grid
from jax import lax

import jaxbptt

XS = jnp.linspace(-1, 1, 5)
CONSTANTS = {
    "a bool": False,
    "an int": 7,
    "a float": 1.0,
    "a complex number": 2j,
    "a NumPy bool": np.True_,
    "a NumPy float32": np.float32(3),
    "a NumPy bfloat16": ml_dtypes.bfloat16(2),
    "a NumPy array": np.array(2, np.int16),
    "a bool array": jnp.array(True),
    "an int array": jnp.int32(3),
    "a vector": jnp.zeros(3),
    "a key": jax.random.key(3),
}


def step_with(constant):
    def step(w, c, x):
        h = jnp.tanh(w * c["h"] + x)
        return {"h": h, "constant": constant}, (h, constant)

    return step


def expected(w, t, window):
    """dy/dw of step t by the chain rule in numbers."""
    states = [0.3]
    for x in XS:
        states.append(float(np.tanh(w * states[-1] + x)))
    total, lam = 0.0, 1.0
    for s in range(t, max(t - window, -1), -1):
        slope = lam * (1 - states[s + 1] ** 2)
        total, lam = total + slope * states[s], slope * w
    return total


@pytest.mark.parametrize(
    ("weights", "name"),
    grid(
        [(weights, name) for weights in ("stored", "current", "replayed") for name in CONSTANTS],
        always=lambda case: case[0] == "stored" or case[1] == "a bool",
    ),
)
def test_a_constant_in_the_carry_and_in_y(weights, name):
    constant = CONSTANTS[name]
    carry = {"h": 0.3, "constant": jnp.asarray(constant)}
    rec = jaxbptt.record(step_with(constant), window=2, weights=weights, has_aux=True)
    tape = rec.init(0.7, carry, XS[0])

    def gradient(w, tape, x):
        (_, (tape, aux)), grad = jax.value_and_grad(call, has_aux=True)(w, tape, x)
        return tape, aux, grad

    def call(w, tape, x):
        tape, (y, aux) = rec(w, tape, x)
        return y, (tape, aux)

    for run in (gradient, jax.jit(gradient)):  # as it is a constant stays what it was
        made = tape
        for t, x in enumerate(XS[:3]):
            made, aux, grad = run(0.7, made, x)
            np.testing.assert_allclose(grad, expected(0.7, t, 2), rtol=1e-12)
            pulled = rec.pullback(0.7, made, jnp.ones(1)).params
            np.testing.assert_allclose(pulled, grad, rtol=1e-12)
        for array in (aux, made.carry["constant"]):
            assert isinstance(array, jax.Array)
            assert (array.shape, array.dtype) == (jnp.shape(constant), jnp.asarray(constant).dtype)
            assert jnp.all(array == carry["constant"])


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_in_a_scan(name):
    constant = CONSTANTS[name]
    carry = {"h": 0.3, "constant": jnp.asarray(constant)}

    def loss(w, scan):
        last, (hs, constants) = scan(lambda c, x: step_with(constant)(w, c, x), carry, XS)
        return jnp.sum(hs), (last["constant"], constants)

    _, want = jax.grad(loss, has_aux=True)(0.7, lax.scan)
    for window in (None, 2):
        got, aux = jax.grad(loss, has_aux=True)(
            0.7, lambda *args, window=window: jaxbptt.scan(*args, window=window)
        )
        np.testing.assert_allclose(
            got, sum(expected(0.7, t, window or 5) for t in range(5)), rtol=1e-12
        )
        for a, b in zip(aux, want, strict=True):
            assert jax.typeof(a) == jax.typeof(b)
            assert jnp.all(a == b)
