"""`with_window`: another window in mid-training, as a learner made for it would go on."""

import jax
import oracles
import pytest
import zoo
from harness import F64
from training_loops import avals, momentum, scanned, wave

import jaxbptt

CASE = zoo.ZOO["tanh_rnn"](F64)


def made(**options):
    return jaxbptt.learner(CASE.step, wave, momentum(), **options)


@pytest.mark.parametrize(
    ("before", "after", "given"),
    [
        ({"window": 3}, {"window": 6}, {}),
        ({"window": 6, "every": 4}, {"window": 2, "every": 4}, {}),
        ({"window": 3, "every": 2}, {"window": 5, "every": 1}, {"every": 1}),
    ],
)
def test_all_but_the_recorded_steps_goes_on(before, after, given):
    first = made(**before)
    state, _ = scanned(first)(first.init(CASE.params, CASE.carry, CASE.x()), CASE.xs(7))
    second, new = first.with_window(state, after["window"], **given)
    assert (second.recorder.window, second.recorder.every) == (
        after["window"],
        after.get("every", 1),
    )
    want = second.init(state.params, state.tape.carry, CASE.x())
    want = want._replace(opt_state=state.opt_state, step=state.step)
    assert avals(new) == avals(want)
    oracles.check("another window", new, want, 0.0)
    oracles.check(
        "another window", scanned(second)(new, CASE.xs(9)), scanned(second)(want, CASE.xs(9)), 0.0
    )


def test_it_can_be_compiled():
    first = made(window=3, every=4)
    state, _ = scanned(first)(first.init(CASE.params, CASE.carry, CASE.x()), CASE.xs(3))
    got = jax.jit(lambda s: first.with_window(s, 5)[1])(state)
    oracles.check("another window, compiled", got, first.with_window(state, 5)[1], 0.0)


def test_faults():
    learner = made(window=3)
    state = learner.init(CASE.params, CASE.carry, CASE.x())
    with pytest.raises(ValueError, match="window must be an int of at least 1"):
        learner.with_window(state, 0)
    with pytest.raises(ValueError, match="state must be the LearnerState"):
        learner.with_window(state.tape, 5)
