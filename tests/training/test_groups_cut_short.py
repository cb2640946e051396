"""Groups that end before they have `every` steps: by a flag of the data, and by a flush."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import zoo
from harness import F64, grid
from jax import lax
from training_loops import DECAY, RATE, Optimizer, avals, forward, momentum, wave

import jaxbptt

T = 11
FLAGS = np.isin(np.arange(1, T + 1), [2, 3, 8, 10])  # groups of 2, 1, up to 5, 2 and 1 steps


def groups(every, flags, flushed=()):
    """The last step of each group, from 1, and how many it has; what is left over is left out."""
    size = 0
    for t, flag in enumerate(flags, 1):
        size += 1
        if flag or size == every or t in flushed:
            yield t, size
            size = 0


def by_hand(case, window, every, ends):
    """The parameters after each group, by the unrolled graph of parameters of each step's own."""
    step, theta, carry, cts, thetas = forward(case.step, wave), case.params, case.carry, [], []
    speed = [np.zeros(v.shape) for v in oracles.moving(theta)]
    xs, found, ends = oracles.unstack(case.xs(T), T), {}, dict(ends)
    for t in range(1, T + 1):
        thetas.append(theta)
        carry, _, ct = step(theta, carry, xs[t - 1])
        cts.append(ct)
        if t in ends:
            padded = thetas + [theta] * (T - t)
            run = oracles.Run(case.step, padded, case.carry, case.xs(T), T)
            windows = window if isinstance(window, list) else [window] * len(oracles.moving(carry))
            oldest = [oracles.reach(t, w, every, ends[t]) for w in windows]
            got = run.unrolled(t, oldest, cts[-min(ends[t], max(windows)) :]).params
            speed = [DECAY * m + np.conj(g) for m, g in zip(speed, got, strict=True)]
            pairs = zip(oracles.moving(theta), speed, strict=True)
            theta = oracles.refill(theta, [np.asarray(p) - RATE * m for p, m in pairs])
        found[t] = theta
    return found


def run_with_flags(learner, case, flags):
    @jax.jit
    def go(params, carry, xs, flags):
        def one(state, given):
            x, flag = given
            state, metrics = learner.update(state, x, ends=flag)
            return state, (state.params, metrics.updated)

        state = learner.init(params, carry, case.x())
        return lax.scan(one, state, (xs, flags))

    return go(case.params, case.carry, case.xs(T), jnp.asarray(flags))


PACES = [(1, 2), (3, 5), (6, 4), (2, 5), (20, 3), (5, 5), (4, 3), (3, 20)]


@pytest.mark.parametrize(("window", "every"), grid(PACES, always=[(6, 4), (2, 5), (3, 20), (5, 5)]))
def test_the_data_end_a_group(window, every):
    case = zoo.ZOO["tanh_rnn"](F64)
    learner = jaxbptt.learner(case.step, wave, momentum(), window=window, every=every)
    _, (params, updated) = run_with_flags(learner, case, FLAGS)
    ends = list(groups(every, FLAGS))
    want = by_hand(case, window, every, ends)
    assert np.flatnonzero(updated).tolist() == [t - 1 for t, _ in ends]
    for t, theta in enumerate(oracles.unstack(params, T), 1):
        oracles.check("learner, groups cut short", theta, want[t], 1e-11)


def test_the_data_end_a_group_with_a_window_for_each_part():
    """The shorter part is cut in the midst of what a full group would reach."""
    case = zoo.ZOO["namedtuple"](F64)
    for windows in ([3, 7], [7, 2], [4, 6]):
        learner = jaxbptt.learner(case.step, wave, momentum(), window=zoo.Pair(*windows), every=4)
        _, (params, _) = run_with_flags(learner, case, FLAGS)
        want = by_hand(case, windows, 4, groups(4, FLAGS))
        for t, theta in enumerate(oracles.unstack(params, T), 1):
            oracles.check("learner, parts of groups cut short", theta, want[t], 1e-11)


def watching():
    """Moves nothing; its state is the last gradient."""
    return Optimizer(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
    )


@pytest.mark.parametrize("weights", ["current", "replayed"])
def test_at_fixed_parameters_it_is_the_same_for_all_weights(weights):
    case = zoo.ZOO["tanh_rnn"](F64)
    learner = jaxbptt.learner(case.step, wave, watching(), window=6, every=4, weights=weights)
    state, _ = run_with_flags(learner, case, [*FLAGS[:10].tolist(), True])
    run = oracles.Run(case.step, case.params, case.carry, case.xs(T), T)
    cts = [forward(case.step, wave)(case.params, run.trajectory[0][9], run.xs[10])[2]]
    want = run.unrolled(T, oracles.reach(T, 6, 4, 1), cts).params
    oracles.check("learner, a group of one", state.opt_state, want, 1e-11)


@pytest.mark.parametrize(("window", "every", "reach"), [(5, 2, 3), (6, 4, 5), (4, 3, 1)])
def test_a_reach_that_is_known_when_it_runs_is_that_of_an_int(window, every, reach):
    learner = jaxbptt.learner(
        lambda w, c, x: (w * c + x,) * 2, lambda y, x: y, momentum(), window=window, every=every
    )

    def trained(reach):
        state = learner.init(jnp.float64(0.5), jnp.float64(1.0), jnp.float64(0.0))
        found = []
        for x, end in zip((1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0), (0, 0, 0, 0, 1, 1, 0), strict=True):
            state, _ = learner.update(state, x, ends=jnp.array(bool(end)), reach=reach)
            found.append(state.params)
        return found

    np.testing.assert_allclose(trained(jnp.int32(reach)), trained(reach), rtol=1e-13)


def test_flags_that_never_hold_change_nothing():
    case = zoo.ZOO["typed_key"](F64)
    for every in (1, 3):
        learner = jaxbptt.learner(case.step, wave, momentum(), window=4, every=every)
        state, _ = run_with_flags(learner, case, np.zeros(T, bool))
        plain = learner.init(case.params, case.carry, case.x())
        want, _ = jax.jit(lambda s, xs, f=learner: lax.scan(f.update, s, xs))(plain, case.xs(T))
        oracles.check("no flags", oracles.moving(state), oracles.moving(want), 1e-14)
        assert avals(state) == avals(want)
    state, (_, updated) = run_with_flags(learner, case, np.ones(T, bool))
    assert updated.all()


# --------------------------------------------------------------------- flush


@pytest.mark.parametrize(
    ("window", "every"), grid(itertools.product([2, 6], [4, 5]), always=[(6, 4), (2, 5)])
)
def test_a_flush_is_the_end_of_a_group(window, every):
    case = zoo.ZOO["tanh_rnn"](F64)
    learner = jaxbptt.learner(case.step, wave, momentum(), window=window, every=every)
    flushed, found, flush = (3, 10), [], jax.jit(learner.flush)
    state, update = learner.init(case.params, case.carry, case.x()), jax.jit(learner.update)
    for t, x in enumerate(oracles.unstack(case.xs(T), T), 1):
        state, _ = update(state, x)
        if t in flushed:
            before = avals(state)
            state = flush(state)
            assert avals(state) == before
            assert int(state.step) == t
        found.append(state.params)
    want = by_hand(case, window, every, groups(every, [False] * T, flushed))
    for t, theta in enumerate(found, 1):
        oracles.check("learner, flushed", theta, want[t], 1e-11)


def test_two_sequences_of_nine_steps_lose_no_loss():
    """With groups of four the ninth loss of each would never give a gradient."""
    case = zoo.ZOO["tanh_rnn"](F64)
    summing = Optimizer(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda g, s, params=None: (jax.tree.map(jnp.zeros_like, g), jax.tree.map(jnp.add, s, g)),
    )
    learner = jaxbptt.learner(case.step, wave, summing, window=4, every=4)
    scanned = jax.jit(lambda s, xs: lax.scan(learner.update, s, xs)[0])
    state = learner.init(case.params, case.carry, case.x())
    for _ in range(2):
        state = learner.clear(learner.flush(scanned(state, case.xs(9))), case.carry)

    def loss(params):
        def body(carry, x):
            carry, y = case.step(params, carry, x)
            return carry, wave(y, x)

        return jaxbptt.scan(body, case.carry, case.xs(9), window=4, every=4)[1].sum()

    want = jax.tree.map(lambda g: 2 * g, jax.grad(loss)(case.params))
    oracles.check("learner, nine and nine", state.opt_state, oracles.moving(want), 1e-11)


def test_a_flush_without_pending_losses_changes_nothing():
    case = zoo.ZOO["tanh_rnn"](F64)
    for every, steps in ((1, 3), (3, 0), (3, 3)):
        learner = jaxbptt.learner(case.step, wave, momentum(), window=4, every=every)
        state = learner.init(case.params, case.carry, case.x())
        for x in oracles.unstack(case.xs(T), T)[:steps]:
            state, _ = jax.jit(learner.update)(state, x)
        oracles.check("nothing to flush", learner.flush(state), state, 0.0)


def test_a_flush_gives_the_optimizer_the_loss_of_what_it_flushes():
    def update(grads, state, params=None, *, value):
        return jax.tree.map(jnp.zeros_like, grads), (state[0] + 1, value)

    case = zoo.ZOO["tanh_rnn"](F64)
    counting = Optimizer(lambda params: (jnp.int32(0), jnp.float64(0)), update)
    learner = jaxbptt.learner(case.step, wave, counting, window=2, every=5)
    state = learner.init(case.params, case.carry, case.x())
    state, metrics = jax.jit(lambda s, xs: lax.scan(learner.update, s, xs))(state, case.xs(7))
    count, value = learner.flush(state).opt_state
    assert count == 2
    np.testing.assert_allclose(value, metrics.loss[-2:].sum(), rtol=1e-13)


def test_a_flush_of_a_gradient_that_is_not_finite_is_dropped():
    case = zoo.ZOO["tanh_rnn"](F64)

    def steep(y, x):
        return jnp.sum(jnp.sqrt(jnp.abs(y * 0)))  # 0, with a gradient of NaN

    learner = jaxbptt.learner(case.step, steep, momentum(), window=3, every=4, on_nonfinite="clear")
    state = learner.init(case.params, case.carry, case.x())
    state, _ = jax.jit(learner.update)(state, case.x())
    new = learner.flush(state)
    oracles.check("dropped", new[:2], state[:2], 0.0)
    assert int(state.tape.length) == 1
    assert int(new.tape.length) == 0


@pytest.mark.parametrize(
    ("ends", "came"),
    [
        (1, "1"),
        (np.zeros(2, bool), r"an array bool\[2\]"),
        ((), "a tuple of length 0"),
        (0.5, "0.5"),
    ],
)
def test_a_flag_is_a_bool_scalar(ends, came):
    case = zoo.ZOO["tanh_rnn"](F64)
    learner = jaxbptt.learner(case.step, wave, momentum(), window=3, every=4)
    state = learner.init(case.params, case.carry, case.x())
    with pytest.raises(ValueError, match=f"ends must be a bool scalar.* but got {came}. All"):
        learner.update(state, case.x(), ends=ends)
