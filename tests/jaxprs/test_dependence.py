"""Which outputs have a derivative: at least those of which JAX finds one, and not much more."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxbptt._jaxprs.dependence import reached, with_carry


@jax.custom_vjp
def ruled(v):
    return jnp.sin(v)


ruled.defvjp(lambda v: (ruled(v), v), lambda v, ct: (ct * jnp.cos(v),))


def as_int(v):
    return lax.convert_element_type(v, jnp.int32)


def as_float(v):
    return lax.convert_element_type(v, jnp.float64)


def in_a_loop(a, b):
    def body(carry, x):
        u, v, w = carry  # v meets a in the second trip only, by way of u
        return (u * a, v + u, w * b), w

    (u, v, w), ws = lax.scan(body, (1.0, 1.0, 1.0), None, length=3)
    return u, v, w, ws


def while_beside(a, b):
    def body(state):
        i, u, v = state
        return i + 1, u * 0.9, v + b

    _, u, v = lax.while_loop(lambda state: state[0] < 3, body, (0, a, b))
    return u, v


def branches(a, b):
    return lax.cond(b > 0, lambda a, b: (a, b), lambda a, b: (2 * b, b), a, b)


# A function of a and b, and which of its outputs have a derivative with respect to a.
CASES = {
    "arithmetic": (lambda a, b: (a * b, b + 1, 2 * a), [True, False, True]),
    "stopped": (lambda a, b: (lax.stop_gradient(a) * b, a + lax.stop_gradient(a)), [False, True]),
    "flat": (lambda a, b: (jnp.floor(a), jnp.round(a) + b, jnp.sign(a), jnp.ceil(a)), [False] * 4),
    "through integers": (lambda a, b: (as_float(as_int(a)), a > b), [False, False]),
    "in a call": (jax.jit(lambda a, b: (jax.jit(jnp.sin)(b), jnp.cos(a))), [False, True]),
    "in a checkpoint": (jax.checkpoint(lambda a, b: (b, jnp.sin(a))), [False, True]),
    "a rule": (lambda a, b: (ruled(a), ruled(b)), [True, False]),
    "in a loop": (in_a_loop, [True, True, False, False]),
    "in a while loop": (while_beside, [True, False]),
    "in branches": (branches, [True, False]),
    "the output is an input": (lambda a, b: (a, b, 1.0), [True, False, False]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_derivative_reaches(name):
    function, expected = CASES[name]
    jaxpr = jax.make_jaxpr(function)(0.5, 0.25).jaxpr
    assert reached(jaxpr, [True, False]) == expected
    assert reached(jaxpr, [False, False]) == [False] * len(expected)


@pytest.mark.parametrize("name", [name for name in CASES if name != "in a while loop"])
def test_nothing_is_missed_that_jax_finds(name):
    function, expected = CASES[name]
    for i, found in enumerate(expected):
        if jnp.issubdtype(jnp.asarray(function(0.5, 0.25)[i]).dtype, jnp.inexact):
            gradient = jax.grad(lambda a, i=i: jnp.sum(function(a, 0.25)[i]))(0.5)
            assert found or not gradient


def test_a_carry_is_followed_as_far_as_it_goes():
    def body(w, first, second, third, apart, x):
        return first * w, second + first, third + second, apart * x, third

    closed = jax.make_jaxpr(body)(*(jnp.float32(v) for v in range(6)))
    flags = with_carry(closed.jaxpr, [True] + [False] * 5, slice(1, 5))
    assert flags == [True, True, True, True, False, False]
    assert reached(closed.jaxpr, flags) == [True, True, True, False, True]
    flags = with_carry(closed.jaxpr, [False] * 5 + [True], slice(1, 5))
    assert flags == [False, False, False, False, True, True]


def test_what_goes_through_a_reference_counts_as_reached():
    if not hasattr(jax, "new_ref"):
        pytest.skip("this JAX has no references")

    def function(a, b):
        ref = jax.new_ref(jnp.zeros(()))
        ref[...] = a
        return ref[...] * b, b

    jaxpr = jax.make_jaxpr(function)(0.5, 0.25).jaxpr
    assert reached(jaxpr, [True, False]) == [True, True]
    assert reached(jaxpr, [False, False]) == [False, False]


def test_a_program_of_many_equations_is_read_once():
    def function(a, b):
        for _ in range(500):
            a = jnp.sin(a)
        return a, b

    jaxpr = jax.make_jaxpr(function)(0.5, 0.25).jaxpr
    assert reached(jaxpr, [True, False]) == [True, False]
