"""A learner with a pace, and one whose updates have a reach: against recorders and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import draw, worst
from jax import lax

import jaxbptt

W = {"w": draw(0, 3, 3), "u": draw(1, 2, 3)}
XS, H, RATE = draw(3, 14, 2, 2), draw(4, 2, 3), 0.05


def step(p, h, x):
    h = jnp.tanh(h @ p["w"] + x @ p["u"])
    return h, h


def loss(y, x):
    return jnp.sum((y[:, :2] - x) ** 2)


class Sgd:
    """The plainest optimiser, without optax."""

    @staticmethod
    def init(params):
        return ()

    @staticmethod
    def update(grads, state, params=None):
        return jax.tree.map(lambda g: -RATE * g, grads), state


def trained(learner, **how):
    def update(state, x):
        return learner.update(state, x, **how)

    state = learner.init(W, H, XS[0])
    state, metrics = jax.jit(lambda state: lax.scan(update, state, XS))(state)
    return state, metrics


@pytest.mark.parametrize(("window", "pace"), [(5, 1), (6, 3), (7, 3)])
def test_a_learner_with_a_pace_is_a_loop_over_advance(window, pace):
    learner = jaxbptt.learner(step, loss, Sgd, window=window, pace=pace)
    state, metrics = trained(learner)
    rec = jaxbptt.record(step, window=window, pace=pace)

    def one(state, x):
        params, tape = state
        tape, value, grads = rec.advance(params, tape, x, lambda y: loss(y, x))
        return (jax.tree.map(lambda p, g: p - RATE * g, params, grads), tape), value

    (params, _), values = jax.jit(lambda s: lax.scan(one, s, XS))((W, rec.init(W, H, XS[0])))
    assert worst(state.params, params) <= 1e-12
    np.testing.assert_allclose(metrics.loss, values, rtol=1e-12)
    assert bool(jnp.all(metrics.updated))


def test_the_pace_of_the_window_is_the_window():
    paced = trained(jaxbptt.learner(step, loss, Sgd, window=6, pace=6))[0]
    plain = trained(jaxbptt.learner(step, loss, Sgd, window=6))[0]
    assert worst(paced.params, plain.params) <= 1e-12


@pytest.mark.parametrize("traced", [False, True])
def test_an_update_with_a_reach_is_one_with_that_window(traced):
    reach = jnp.int32(3) if traced else 3
    far = trained(jaxbptt.learner(step, loss, Sgd, window=9), reach=reach)[0]
    near = trained(jaxbptt.learner(step, loss, Sgd, window=3))[0]
    assert worst(far.params, near.params) <= 1e-12


def test_groups_have_a_reach_too():
    far = trained(jaxbptt.learner(step, loss, Sgd, window=9, every=2), reach=4)[0]
    near = trained(jaxbptt.learner(step, loss, Sgd, window=4, every=2))[0]
    assert worst(far.params, near.params) <= 1e-12


def test_what_is_not_finite_leaves_no_trace_of_its_chains():
    learner = jaxbptt.learner(step, loss, Sgd, window=5, pace=2, on_nonfinite="clear")
    update = jax.jit(learner.update)
    state = learner.init(W, H, XS[0])
    for x in XS[:4]:
        state, _ = update(state, x)
    broken, metrics = update(state, jnp.full((2, 2), jnp.nan))
    assert not bool(metrics.updated)
    fresh = state._replace(tape=learner.recorder.clear(state.tape))
    for x in XS[4:8]:
        broken, _ = update(broken, x)
        fresh, _ = update(fresh, x)
    assert worst(broken.params, fresh.params) == 0.0


def test_a_loss_of_the_parameters_adds_its_own_gradient():
    def decayed(y, x, params):
        return loss(y, x) + 0.1 * jnp.sum(params["w"] ** 2)

    learner = jaxbptt.learner(step, decayed, Sgd, window=5, pace=5)
    plain = jaxbptt.learner(step, decayed, Sgd, window=5)
    assert worst(trained(learner)[0].params, trained(plain)[0].params) <= 1e-12


def test_what_a_pace_does_not_go_with():
    learner = jaxbptt.learner(step, loss, Sgd, window=5, pace=2)
    state = learner.init(W, H, XS[0])
    for how in ({"reach": 2}, {"ends": True}):
        with pytest.raises(ValueError, match=f"must have no pace for {next(iter(how))}"):
            learner.update(state, XS[0], **how)
    with pytest.raises(ValueError, match="every must be 1 with a pace"):
        jaxbptt.learner(step, loss, Sgd, window=5, pace=2, every=2)
    other, state = learner.with_window(state, 1)
    assert (other.recorder.pace, other.recorder.window) == (1, 1)
    assert functools.reduce(lambda s, x: other.update(s, x)[0], XS[:2], state).step == 2
