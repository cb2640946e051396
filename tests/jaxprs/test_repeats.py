"""What a step computes twice is computed, recorded and summed once; nothing else is merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core

import jaxbptt
from jaxbptt._compat import scan_counts
from jaxbptt._jaxprs.evaluate import without_repeats

X = np.array([0.3, -0.7, 1.9], np.float32)


def counted(f, *args):
    """The equations of a program before and after, which gives the same numbers to the last bit."""
    closed = jax.make_jaxpr(f)(*args)
    made = without_repeats(closed)
    want, got = (core.jaxpr_as_fun(each)(*args) for each in (closed, made))
    for one, other in zip(want, got, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(np.signbit(one), np.signbit(other))
    return len(closed.jaxpr.eqns), len(made.jaxpr.eqns)


def test_what_repeats_a_repeated_value_is_merged_too():
    # sin and exp of it, twice each, and their sum.
    assert counted(lambda v: jnp.exp(jnp.sin(v)) + jnp.exp(jnp.sin(v)), X) == (5, 3)


def test_an_output_may_be_a_repeated_value():
    assert counted(lambda v: (jnp.sin(v), jnp.sin(v)), X) == (2, 1)


@pytest.mark.parametrize(
    ("name", "program"),
    {
        "other parameters": lambda v: (jnp.sum(v), lax.cumsum(v), lax.cumsum(v, reverse=True)),
        "other dtypes": lambda v: tuple(v.astype(t) for t in (jnp.float16, jnp.int32, jnp.int8)),
        "other literals": lambda v: (v * 2.0, v * 3.0),
        "signs of a literal zero": lambda v: (v * 0.0, v * -0.0),
        "the order of operands": lambda v: (v - 2.0, 2.0 - v),
    }.items(),
)
def test_only_what_is_the_same_is_merged(name, program):
    before, after = counted(program, X)
    assert before == after > 1, name


def test_no_side_effect_is_merged():
    def program(v):
        jax.debug.print("{}", v)
        jax.debug.print("{}", v)
        return v

    jaxpr = jax.make_jaxpr(program)(X)
    assert len(without_repeats(jaxpr).jaxpr.eqns) == len(jaxpr.jaxpr.eqns) == 2


def written_twice(params, carry, x):
    turned = carry * jnp.cos(params) - x * jnp.sin(params)
    carry = jnp.tanh(turned * jnp.tanh(x) + carry * jnp.cos(params) * jnp.tanh(x))
    return carry, jnp.sum(carry)


def written_once(params, carry, x):
    cosine, squashed = jnp.cos(params), jnp.tanh(x)
    turned = carry * cosine - x * jnp.sin(params)
    carry = jnp.tanh(turned * squashed + carry * cosine * squashed)
    return carry, jnp.sum(carry)


@pytest.mark.parametrize("weights", ["stored", "current"])
def test_the_tape_is_that_of_the_step_written_once(weights):
    tapes = [
        jax.eval_shape(jaxbptt.record(step, window=4, weights=weights).init, X[0], X, X)
        for step in (written_twice, written_once)
    ]
    assert tapes[0].nbytes == tapes[1].nbytes


def test_the_gradient_is_that_of_a_plain_scan():
    xs = np.linspace(-1.0, 1.0, 12).astype(np.float64).reshape(4, 3)

    def loss(params, scan):
        return jnp.sum(scan(lambda c, x: written_twice(params, c, x), jnp.ones(3), xs)[1])

    want = jax.grad(loss)(0.4, lax.scan)
    got = jax.grad(loss)(0.4, lambda *args: jaxbptt.scan(*args, window=None))
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_a_value_of_parameters_has_one_sum_however_often_it_is_written():
    def sums(step):
        def loss(params, xs):
            return jnp.sum(jaxbptt.scan(lambda c, x: step(params, c, x), X[0], xs, window=None)[1])

        eqns = jax.make_jaxpr(jax.grad(loss))(X[0], X).jaxpr.eqns
        return [scan_counts(eqn)[1] for eqn in eqns if eqn.primitive.name == "scan"]

    assert sums(written_twice) == sums(written_once) != []
