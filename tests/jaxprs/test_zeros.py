"""What is left of a pullback when some of its cotangents are zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core
from jaxprs import inner

import jaxbptt
from jaxbptt._jaxprs.evaluate import ZERO
from jaxbptt._jaxprs.zeros import remaining

BATCH, HIDDEN, WORDS, WINDOW = 3, 4, 37, 6
HEAD = np.random.default_rng(0).normal(size=(HIDDEN, WORDS))
TARGETS = np.array([5, 0, 36])


def picked(logits):
    """Of each row the target's."""
    return jnp.take_along_axis(logits, TARGETS[:, None], axis=1)[:, 0]


def label_smoothed(logits):
    logs = jax.nn.log_softmax(logits)
    return -0.9 * picked(logs) - 0.1 * jnp.mean(logs, axis=1)


def hinge(logits):
    wrong = jnp.arange(WORDS)[None] != TARGETS[:, None]
    margin = jnp.where(wrong, 1.0 + logits - picked(logits)[:, None], 0.0)
    return jnp.sum(jnp.maximum(margin, 0.0), axis=1)


LOSSES = {
    "cross entropy": lambda logits: jax.nn.logsumexp(logits, axis=1) - picked(logits),
    "one-hot": lambda v: -jnp.sum(jax.nn.log_softmax(v) * jax.nn.one_hot(TARGETS, WORDS), 1),
    "label smoothing": label_smoothed,
    "hinge": hinge,
    "indexed": lambda logits: jax.nn.softmax(logits)[jnp.arange(BATCH), TARGETS],
    "the largest": lambda logits: jnp.max(logits, axis=1),
    "the three largest": lambda logits: jnp.sum(lax.top_k(logits, 3)[0], axis=1),
    "sorted": lambda logits: jnp.sort(logits, axis=1)[:, WORDS // 2],
    "cumulated": lambda logits: jnp.cumsum(jax.nn.softmax(logits), axis=1)[:, 3],
    "clipped": lambda logits: jnp.sum(jnp.clip(logits, -1.0, 1.0), axis=1),
    "of segments": lambda v: jax.ops.segment_sum(v.T, jnp.arange(WORDS) // 5, 8).T,
    "in place": lambda v: v.at[:, 2].set(0.0).at[:, 3].add(1.0),
    "a dynamic slice": lambda v: lax.dynamic_slice(v, (0, TARGETS[0]), (BATCH, 2)),
    "rolled and padded": lambda v: jnp.pad(jnp.roll(v, 2, axis=1), ((0, 0), (1, 3))),
    "of windows": lambda v: lax.reduce_window(v, 0.0, lax.add, (1, 3), (1, 2), "VALID"),
    "pooled": lambda v: lax.reduce_window(v, -jnp.inf, lax.max, (1, 3), (1, 3), "VALID"),
    "its spectrum": lambda v: jnp.abs(jnp.fft.fft(v)) ** 2,
    "standard deviation": lambda v: jnp.std(v, axis=1),
    "another layer": lambda v: jax.nn.gelu(v) @ HEAD.T,
    "in a jit": jax.jit(label_smoothed),
    "in a checkpoint": jax.checkpoint(label_smoothed),
}


H = np.random.default_rng(1).normal(size=(BATCH, HIDDEN))


def pullback(name, h, head):
    """The pullback of a loss of a head's logits, as a program, and the loss."""
    y, pull = jax.vjp(lambda h, head: LOSSES[name](h @ head), h, head)
    return jax.make_jaxpr(pull)(y), y


@pytest.mark.parametrize("name", LOSSES)
def test_of_a_loss_without_its_cotangent_nothing_is_left(name):
    left = []

    def trace(h, head):
        left.extend(remaining(pullback(name, h, head)[0], [ZERO]))

    jax.eval_shape(trace, H, HEAD)
    assert len(left) == 2
    assert all(v is ZERO for v in left)


@pytest.mark.parametrize("name", LOSSES)
def test_with_its_cotangent_it_is_what_it_was(name):
    @jax.jit
    def both(h, head):
        closed, y = pullback(name, h, head)
        return list(remaining(closed, [y])), core.jaxpr_as_fun(closed)(y)

    for got, expected in zip(*both(H, HEAD), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_what_is_not_of_a_cotangent_stays_as_it_is():
    """Zero times infinity is no number, whoever began the array of zeros."""

    def linear(a, b):
        begun = jnp.zeros(3) * jnp.array([1.0, jnp.inf, 2.0])
        return begun + a, begun.at[jnp.array([0])].add(b), begun - b[0]

    a, b = jnp.arange(3.0), jnp.ones(1)
    closed = jax.make_jaxpr(linear)(a, b)
    for given in ([a, b], [ZERO, b], [a, ZERO], [ZERO, ZERO]):
        arrays = [jnp.zeros_like(v) if g is ZERO else g for g, v in zip(given, (a, b), strict=True)]
        for got, expected in zip(remaining(closed, given), linear(*arrays), strict=True):
            np.testing.assert_array_equal(np.zeros(3) if got is ZERO else got, expected)


@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False)])
def test_a_selection_of_which_one_side_is_zero(given):
    p, sides = np.array([True, False, True]), (np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0]))
    closed = jax.make_jaxpr(lambda p, a, b: jnp.where(p, a, b))(p, *sides)
    values = [v if there else ZERO for v, there in zip(sides, given, strict=True)]
    (got,) = remaining(closed, [p, *values])
    a, b = (np.zeros(3) if v is ZERO else v for v in values)
    if any(given):
        np.testing.assert_array_equal(got, np.where(p, a, b))
    else:
        assert got is ZERO


def test_an_output_of_zeros_is_an_array():
    closed = jax.make_jaxpr(lambda a: (jnp.zeros(3), a + jnp.zeros(3)))(jnp.ones(3))
    first, second = remaining(closed, [jnp.ones(3)])
    np.testing.assert_array_equal(first, jnp.zeros(3))
    np.testing.assert_array_equal(second, jnp.ones(3))


@pytest.mark.parametrize("name", LOSSES)
def test_the_loop_over_the_older_lags_has_nothing_of_the_head(name):
    def step(params, carry, x):
        carry = jnp.tanh(carry @ params["w"] + x)
        return carry, jnp.sum(LOSSES[name](carry @ params["head"]))

    rec = jaxbptt.record(step, window=WINDOW)
    params = {"w": np.ones((HIDDEN, HIDDEN)), "head": HEAD}
    x = np.ones((BATCH, HIDDEN))
    tape = jax.eval_shape(rec.init, params, np.zeros((BATCH, HIDDEN)), x)
    grad = jax.grad(lambda p, tape: rec(p, tape, x)[1])
    loops = loops_of(jax.make_jaxpr(grad)(params, tape).jaxpr)
    older = [body for length, body in loops if length == WINDOW - 1]
    assert older
    heavy = ("dot_general", "exp", "mul", "scatter-add", "select_n")
    for eqn in (e for body in older for e in body.eqns if e.primitive.name in heavy):
        assert not any(WORDS in v.aval.shape for v in (*eqn.invars, *eqn.outvars))


def loops_of(jaxpr):
    """The length and the body of each scan in a program."""
    found = []
    for eqn in jaxpr.eqns:
        for body in inner(eqn):
            found += loops_of(body)
            if eqn.primitive.name == "scan":
                found.append((eqn.params["length"], body))
    return found
