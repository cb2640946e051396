"""Large arrays that a step closes over, and large parts of a carry that move by themselves.

The oracle is `jax.grad` of the unrolled window, which shares no code with the library.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxbptt

WINDOW, LENGTH = 4, 7


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


ENCODER = 0.05 * draw(0, 200, 60)  # 96 kB
PARAMS = {"in": 0.3 * draw(1, 60, 5), "back": 0.3 * draw(2, 5, 5)}
XS = draw(3, LENGTH, 2, 200)
CARRY = jnp.zeros((2, 5))


def step_with(encoder):
    def step(params, h, x):
        h = jnp.tanh(jnp.tanh(x @ encoder) @ params["in"] + h @ params["back"])
        return h, h

    return step


def run(rec, params, tape, xs):
    for x in xs:
        tape, _ = rec(params, tape, x)
    return tape


def through_window(step, params, xs, carry=CARRY, window=WINDOW):
    """The sum of the last output, with the older carry detached."""
    for s, x in enumerate(xs):
        if s == len(xs) - window:
            carry = lax.stop_gradient(carry)
        carry, y = step(params, carry, x)
    return jnp.sum(y)


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("weights", ["stored", "current", "replayed"])
@pytest.mark.parametrize("jitted", [True, False])
def test_gradients_beside_a_frozen_encoder_are_those_of_the_window(weights, jitted):
    rec = jaxbptt.record(step_with(ENCODER), window=WINDOW, weights=weights)

    def last(params, xs):
        tape = run(rec, params, rec.init(params, CARRY, xs[0]), xs)
        return rec.pullback(params, tape, jnp.ones((1, 2, 5)))

    ct = (jax.jit(last) if jitted else last)(PARAMS, XS)
    exact = jax.grad(lambda p, xs: through_window(step_with(ENCODER), p, xs), (0, 1))(PARAMS, XS)
    jax.tree.map(lambda v, w: np.testing.assert_allclose(v, w, rtol=1e-12), ct.params, exact[0])
    np.testing.assert_allclose(ct.xs, exact[1][-WINDOW:], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("weights", ["stored", "current"])
@pytest.mark.parametrize("pace", [None, 2])
@pytest.mark.parametrize("encoder", [ENCODER, np.asarray(ENCODER)], ids=["of JAX", "of NumPy"])
def test_a_frozen_encoder_is_not_on_the_ring(weights, pace, encoder):
    rec = jaxbptt.record(step_with(encoder), window=WINDOW, weights=weights, pace=pace)
    tape = jax.eval_shape(rec.init, PARAMS, CARRY, XS[0])
    slots = WINDOW if pace is None else 3 * 2
    # The features and two values of each h; parameters, but neither the encoder nor x.
    features, h = 2 * 60 * 8, 2 * 5 * 8
    parameters = nbytes(PARAMS) if weights == "stored" else 0
    assert tape.nbytes <= slots * (features + 2 * h + parameters)


def test_a_stopped_input_spares_the_weights_that_lead_to_it():
    def step(params, h, x):
        return step_with(ENCODER)(params, h, lax.stop_gradient(x))

    rec = jaxbptt.record(step, window=WINDOW)
    tape = jax.eval_shape(rec.init, PARAMS, CARRY, XS[0])
    assert tape.nbytes == WINDOW * (2 * 60 * 8 + 2 * 2 * 5 * 8 + PARAMS["back"].nbytes)


def test_what_a_step_without_parameters_closes_over_are_its_parameters():
    def loss(encoder, tape):
        rec = jaxbptt.record(
            lambda none, h, x: step_with(encoder)(PARAMS, h, x), window=WINDOW, weights="stored"
        )
        tape = rec.init(None, CARRY, XS[0]) if tape is None else tape
        tape, y = rec(None, tape, XS[0])
        return jnp.sum(y), tape

    _, tape = loss(ENCODER, None)
    # Both steps have the same input.
    got, _ = jax.jit(jax.grad(loss, has_aux=True))(ENCODER, tape)
    assert tape.nbytes > WINDOW * ENCODER.nbytes
    exact = jax.grad(lambda e: through_window(step_with(e), PARAMS, XS[jnp.array([0, 0])]))(ENCODER)
    np.testing.assert_allclose(got, exact, rtol=1e-12, atol=1e-15)


def made_inside(encoder):
    rec = jaxbptt.record(step_with(encoder), window=WINDOW)
    tape = run(rec, PARAMS, rec.init(PARAMS, CARRY, XS[0]), XS[:-1])
    return jnp.sum(rec(PARAMS, tape, XS[-1])[1])


def made_outside_and_empty(encoder):
    first = jaxbptt.record(step_with(ENCODER), window=WINDOW)
    tape = first.init(PARAMS, CARRY, XS[0])
    rec = jaxbptt.record(step_with(encoder), window=WINDOW)
    tape = run(rec, PARAMS, tape, XS[:-1])
    return jnp.sum(rec(PARAMS, tape, XS[-1])[1])


@pytest.mark.parametrize("loss", [made_inside, made_outside_and_empty])
def test_an_encoder_that_is_differentiated_when_the_tape_is_made_gets_its_gradient(loss):
    exact = jax.grad(lambda encoder: through_window(step_with(encoder), PARAMS, XS))(ENCODER)
    np.testing.assert_allclose(jax.grad(loss)(ENCODER), exact, rtol=1e-12, atol=1e-15)


def scalar_step(encoder):
    def step(params, h, x):
        h, y = step_with(encoder)(params, h, x)
        return h, jnp.sum(y)

    return step


@pytest.mark.parametrize("weights", ["stored", "current"])
@pytest.mark.parametrize("pace", [None, 2])
def test_a_gradient_by_what_was_a_constant_is_refused(weights, pace):
    how = {"window": WINDOW, "weights": weights, "pace": pace}
    tape = jaxbptt.record(scalar_step(ENCODER), **how).init(PARAMS, CARRY, XS[0])

    @jax.jit  # so that the tape is not known to be empty
    def loss(encoder, tape):
        return jaxbptt.record(scalar_step(encoder), **how)(PARAMS, tape, XS[0])[1]

    # "current" takes the values of now for all steps, so that it refuses the gradient alone.
    why = "is traced now" if weights == "stored" else "is differentiated by now"
    with pytest.raises(
        ValueError, match=rf"float64\[200,60\] \(number . of.*constant.*{why}.*params"
    ):
        jax.grad(loss)(ENCODER, tape)


@pytest.mark.parametrize("change", ["traced", "other values", "written in place"])
def test_a_constant_that_changes_is_refused_where_the_tape_holds_no_copies(change):
    held = [np.array(ENCODER)]
    rec = jaxbptt.record(lambda p, h, x: step_with(held[0])(p, h, x), window=WINDOW)
    tape = run(rec, PARAMS, rec.init(PARAMS, CARRY, XS[0]), XS[:2])

    def again(encoder, tape):
        held[0] = encoder
        return rec(PARAMS, tape, XS[2])

    if change == "traced":
        again = jax.jit(again)
    other = held[0] if change == "written in place" else 2 * ENCODER
    held[0][3, 5] += 1.0
    with pytest.raises(ValueError, match=r'closes over float64\[200,60\].*weights="current"'):
        again(other, tape)


def test_the_same_values_in_another_array_are_the_same_constant():
    tape = jaxbptt.record(step_with(ENCODER), window=WINDOW).init(PARAMS, CARRY, XS[0])
    tape = run(jaxbptt.record(step_with(ENCODER), window=WINDOW), PARAMS, tape, XS[:3])
    rec = jaxbptt.record(step_with(jnp.array(np.asarray(ENCODER))), window=WINDOW)
    tape = run(rec, PARAMS, tape, XS[3:])
    exact = jax.grad(lambda params: through_window(step_with(ENCODER), params, XS))(PARAMS)
    got = rec.pullback(PARAMS, tape, jnp.ones((1, 2, 5))).params
    jax.tree.map(lambda v, w: np.testing.assert_allclose(v, w, rtol=1e-12), got, exact)


def test_current_takes_the_values_of_now():
    first = jaxbptt.record(step_with(ENCODER), window=WINDOW, weights="current")
    tape = run(first, PARAMS, first.init(PARAMS, CARRY, XS[0]), XS)

    @jax.jit
    def x_cotangents(encoder, tape):
        rec = jaxbptt.record(step_with(encoder), window=WINDOW, weights="current")
        return rec.pullback(PARAMS, tape, jnp.ones((1, 2, 5))).xs

    # Features are as recorded; the way from them to x is the new encoder's.
    np.testing.assert_allclose(x_cotangents(2 * ENCODER, tape), 2 * x_cotangents(ENCODER, tape))


def test_what_is_small_may_change_and_is_differentiated():
    def step_of(scale):
        return lambda params, h, x: (jnp.tanh(params * h + scale * x),) * 2

    first = jaxbptt.record(step_of(jnp.float64(0.5)), window=WINDOW)
    tape, _ = first(0.7, first.init(0.7, 0.0, 1.0), 1.0)
    gradient = jax.jit(jax.grad(lambda s, t: jaxbptt.record(step_of(s), window=4)(0.7, t, 1.0)[1]))

    def exact(scale):
        return jnp.tanh(0.7 * jnp.tanh(scale * 1.0) + scale * 1.0)

    np.testing.assert_allclose(gradient(0.5, tape), jax.grad(exact)(0.5), rtol=1e-12)


# ------------------------------------------------------------ what moves by itself


def with_world(size, stop=lambda v: v, driven=False):
    """A cell beside a simulator of its own, which it looks at."""

    def step(params, carry, x):
        h, world = carry
        world = stop(world)
        for _ in range(3):
            world = world + 0.1 * jnp.sin(world) * jnp.cos(world)
        world = world + params["back"][0, 0] if driven else world
        h = jnp.tanh(world[:5] + x[:5] + h @ params["back"])
        return (h, world), h

    return step, (jnp.zeros(5), jnp.linspace(0.0, 1.0, size))


@pytest.mark.parametrize("weights", ["stored", "current", "replayed"])
def test_a_large_simulator_that_nothing_drives_is_not_recorded(weights):
    step, carry = with_world(20_000)
    rec = jaxbptt.record(step, window=WINDOW, weights=weights)
    tape = run(rec, PARAMS, rec.init(PARAMS, carry, XS[0, 0]), XS[:, 0])
    if weights != "replayed":
        assert tape.nbytes < 8 * 1024
    ct = rec.pullback(PARAMS, tape, jnp.ones((1, 5)))
    assert ct.carry[1].dtype == jax.dtypes.float0

    def exact(params, xs):
        return through_window(step, params, xs, carry)

    of_params, of_xs = jax.grad(exact, (0, 1))(PARAMS, XS[:, 0])
    np.testing.assert_allclose(ct.params["back"], of_params["back"], rtol=1e-12)
    np.testing.assert_allclose(ct.xs, of_xs[-WINDOW:], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("size", "driven"), [(20, False), (20_000, True)])
def test_a_simulator_that_is_small_or_driven_has_its_cotangent(size, driven):
    step, carry = with_world(size, driven=driven)
    rec = jaxbptt.record(step, window=WINDOW)
    tape = run(rec, PARAMS, rec.init(PARAMS, carry, XS[0, 0]), XS[:WINDOW, 0])
    ct = rec.pullback(PARAMS, tape, jnp.ones((1, 5)))
    exact = jax.grad(lambda carry: through_window(step, PARAMS, XS[:WINDOW, 0], carry, 9))(carry)
    jax.tree.map(lambda v, w: np.testing.assert_allclose(v, w, rtol=1e-12), ct.carry, exact)


def test_a_loss_of_the_simulator_flows_nowhere():
    step, carry = with_world(20_000)
    rec = jaxbptt.record(step, window=WINDOW)
    tape = run(rec, PARAMS, rec.init(PARAMS, carry, XS[0, 0]), XS[:2, 0])
    got = jax.grad(lambda params: jnp.sum(rec(params, tape, XS[2, 0])[0].carry[1]))(PARAMS)
    assert not any(leaf.any() for leaf in jax.tree.leaves(got))
