"""A loss that takes params: its own gradient by them adds to the update."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import zoo
from harness import F64, grid
from training_loops import RATE, Optimizer, momentum, scanned, wave

import jaxbptt

T = 8


def decay(params):
    return 0.05 * sum(jnp.sum(jnp.abs(v) ** 2) for v in oracles.moving(params))


def decaying(y, x, params):
    return wave(y, x) + decay(params)


def plain_sgd():
    return momentum(decay=0.0)


@pytest.mark.parametrize(
    ("name", "window", "every"),
    grid(
        [("tanh_rnn", 4, 1), ("tanh_rnn", 5, 3), ("tanh_rnn", 2, 4), ("complex_recurrence", 3, 2)],
        always=[("tanh_rnn", 4, 1), ("tanh_rnn", 2, 4), ("complex_recurrence", 3, 2)],
    ),
)
def test_weight_decay_in_the_loss_is_weight_decay_by_hand(name, window, every):
    """All losses of a group count, those too whose outputs the window doesn't reach."""
    case = zoo.ZOO[name](F64)

    def update(grads, state, params):
        return jax.tree.map(lambda g, p: -RATE * (g + every * 0.1 * p), grads, params), state

    by_hand = Optimizer(lambda params: (), update)
    ours = jaxbptt.learner(case.step, decaying, plain_sgd(), window=window, every=every)
    plain = jaxbptt.learner(case.step, wave, by_hand, window=window, every=every)
    found, wanted = (
        scanned(each)(each.init(case.params, case.carry, case.x()), case.xs(T))
        for each in (ours, plain)
    )
    oracles.check("loss of params", found[0].params, wanted[0].params, 1e-11)
    assert float(found[1].loss[0]) == pytest.approx(float(wanted[1].loss[0] + decay(case.params)))


def test_a_group_that_is_cut_short_has_as_many_losses():
    case = zoo.ZOO["tanh_rnn"](F64)
    learner = jaxbptt.learner(
        case.step, lambda y, x, params: decay(params), plain_sgd(), window=3, every=4
    )
    state, _ = scanned(learner)(learner.init(case.params, case.carry, case.x()), case.xs(6))
    state = learner.flush(state)
    want = jax.tree.map(lambda p: p * (1 - RATE * 4 * 0.1) * (1 - RATE * 2 * 0.1), case.params)
    oracles.check("loss of params, flushed", state.params, want, 1e-12)


def test_integers_among_the_params():
    case = zoo.ZOO["integer_leaves"](F64)
    learner = jaxbptt.learner(case.step, decaying, plain_sgd(), window=3, every=2)
    state, _ = scanned(learner)(learner.init(case.params, case.carry, case.x()), case.xs(4))
    assert jax.tree.structure(state.params) == jax.tree.structure(case.params)


def test_half_precision_is_added_up_in_single():
    """One step's share of the gradient, 1/512, would be lost on a sum of 1 in bfloat16."""
    learner = jaxbptt.learner(
        lambda w, c, x: (c, None),
        lambda y, x, w: jnp.float32(x) * w.astype(jnp.float32),
        Optimizer(lambda w: w, lambda g, s, w: (jnp.zeros_like(g), g)),
        window=1,
        every=65,
    )
    start = learner.init(jnp.ones((), jnp.bfloat16), jnp.float32(0), jnp.float32(0))
    xs = jnp.array([1.0] + [1 / 512] * 64, jnp.float32)
    assert float(scanned(learner)(start, xs)[0].opt_state) == 1.125


def test_evaluate_gives_the_loss_its_params():
    case = zoo.ZOO["tanh_rnn"](F64)
    learner = jaxbptt.learner(case.step, decaying, plain_sgd(), window=3)
    state = learner.init(case.params, case.carry, case.x())
    _, metrics = learner.evaluate(state, case.xs(3))
    _, trained = scanned(learner)(state, case.xs(3))
    np.testing.assert_allclose(metrics.loss[0], trained.loss[0], rtol=1e-13)


# ---------------------------------------------------------------- which it is


class Of:
    def __init__(self, extra):
        self.extra = extra

    def __call__(self, y, x, params):
        return wave(y, x) + self.extra * decay(params)

    def method(self, y, x, params):
        return self(y, x, params)


def scaled(factor, y, x, params):
    return factor * decaying(y, x, params)


def wrapped(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


def with_default(y, x, params=None):
    assert params is None
    return wave(y, x)


def of_any(*args):
    assert len(args) == 2
    return wave(*args)


@pytest.mark.parametrize(
    ("loss", "takes"),
    [
        (decaying, True),
        (wave, False),
        (Of(1.0), True),
        (Of(1.0).method, True),
        (functools.partial(scaled, 1.0), True),
        (functools.partial(with_default, params=None), False),
        (jax.jit(decaying), True),
        (wrapped(decaying), True),
        (wrapped(wave), False),
        (with_default, False),
        (of_any, False),
    ],
)
def test_a_loss_gets_params_if_it_can_not_do_without(loss, takes):
    case = zoo.ZOO["tanh_rnn"](F64)
    learner = jaxbptt.learner(case.step, loss, plain_sgd(), window=3)
    _, metrics = learner.evaluate(learner.init(case.params, case.carry, case.x()), case.xs(1))
    y = case.step(case.params, case.carry, case.x())[1]
    want = wave(y, None) + (decay(case.params) if takes else 0.0)
    np.testing.assert_allclose(metrics.loss[0], want, rtol=1e-12)


@pytest.mark.parametrize(
    ("loss", "arguments"),
    [
        (lambda y: 0.0, r"<lambda> are \(y\)"),
        (lambda y, x, params, more: 0.0, r"<lambda> are \(y, x, params, more\)"),
        (lambda y, x, *, params: 0.0, r"<lambda> are \(y, x, \*, params\)"),
        (lambda: 0.0, r"<lambda> are \(\)"),
        (functools.partial(scaled, factor=1.0), r"a partial are \(\*, factor=1.0, y, x, params\)"),
    ],
)
def test_a_loss_of_other_arguments(loss, arguments):
    with pytest.raises(
        ValueError, match=rf"^loss must be callable as .* but the arguments of {arguments}\. Bind"
    ):
        jaxbptt.learner(lambda w, c, x: (c, c), loss, plain_sgd(), window=3)
