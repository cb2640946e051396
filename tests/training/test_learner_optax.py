"""The learner with optax: the same transformations on the gradient of the unrolled graph."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import zoo
from harness import F64, grid
from jax import lax
from optax import contrib
from training_loops import Optimizer, all_states, avals, forward, steps, wave

import jaxbptt

T = 11
CASE = zoo.ZOO["tanh_rnn"](F64)
WARM = optax.warmup_cosine_decay_schedule(0.01, 0.2, 2, 6)


def frozen(params):
    return {name: "still" if name == "wx" else "moving" for name in params}


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "adam": optax.adam(0.05),
    "schedule": optax.adam(WARM),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(WARM, weight_decay=0.1)),
    "lamb": optax.lamb(0.05, weight_decay=0.1),
    "masked": optax.chain(
        optax.masked(
            optax.add_decayed_weights(0.3), {"wx": True, "wh": True, "b": False, "wy": False}
        ),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
    ),
    "frozen": optax.multi_transform(
        {"still": optax.set_to_zero(), "moving": optax.rmsprop(0.02)}, frozen
    ),
    "apply_if_finite": optax.apply_if_finite(optax.adam(WARM), 3),
    "MultiSteps": optax.MultiSteps(optax.adam(0.05), 2).gradient_transformation(),
    "hyperparams": optax.inject_hyperparams(optax.sgd)(WARM),
    "ema": optax.chain(optax.ema(0.9), optax.sgd(0.1)),
    "noise": optax.chain(optax.add_noise(0.01, 0.5, 0), optax.sgd(0.1)),
    "plateau": optax.chain(optax.sgd(0.1), contrib.reduce_on_plateau(patience=1, cooldown=0)),
    "polyak": optax.polyak_sgd(0.1),
    "schedule_free": contrib.schedule_free_adamw(0.05),
    "adafactor": optax.adafactor(0.05, min_dim_size_to_factor=2),
}


def by_hand(optimizer, window, every):
    """Parameters after each of T steps."""

    @jax.jit
    def update(grads, state, theta, total):
        full = optax.with_extra_args_support(optimizer)
        changes, state = full.update(grads, state, theta, value=total)
        return optax.apply_updates(theta, changes), state

    step = forward(CASE.step, wave)
    theta, carry, thetas, found = CASE.params, CASE.carry, [], []
    cts, total = [], 0.0
    with jax.numpy_dtype_promotion("standard"):
        state = jax.jit(optimizer.init)(theta)
    for t, x in enumerate(CASE.xs(T), 1):
        thetas.append(theta)
        carry, value, ct = step(theta, carry, x)
        cts.append(ct)
        total += np.asarray(value)
        if t % every == 0:
            rows = min(every, window)
            padded = thetas + [theta] * (T - t)
            run = oracles.Run(CASE.step, padded, CASE.carry, CASE.xs(T), T)
            oldest = oracles.reach(t, window, every, rows)
            grads = oracles.refill(theta, run.unrolled(t, oldest, cts[-rows:]).params)
            with jax.numpy_dtype_promotion("standard"):
                theta, state = update(grads, state, theta, total)
            total = 0.0
        found.append(theta)
    return found, state


RUNS = [(name, 5, 3) for name in OPTIMIZERS] + [("clipped", 4, 1), ("plateau", 4, 1)]
# Of each kind one: with a schedule and the parameters, with parts of them, with a key in its
# state, with branches, with the loss, summed over a group and of one step.
CHOSEN = ["MultiSteps", "clipped", "frozen", "masked", "noise", "polyak"]


@pytest.mark.parametrize(
    ("name", "window", "every"),
    grid(RUNS, always=[(name, 5, 3) for name in CHOSEN] + [("plateau", 4, 1)]),
)
def test_parameters_at_every_step(name, window, every):
    optimizer = OPTIMIZERS[name]
    learner = jaxbptt.learner(CASE.step, wave, optimizer, window=window, every=every)
    state, got, _ = all_states(learner, CASE, CASE.xs(T))
    want, opt_state = by_hand(optimizer, window, every)
    for params, theta in zip(got, want, strict=True):
        oracles.check("learner, optax", params, theta, 1e-9)  # adam divides by small numbers
    oracles.check("learner, optax state", state.opt_state, opt_state, 1e-9)
    before = jax.tree.map(np.asarray, CASE.params)
    moved = {k: bool((np.asarray(v) != before[k]).any()) for k, v in got[-1].items()}
    assert moved == {k: not (name == "frozen" and k == "wx") for k in moved}


def test_schedules_count_the_optimizers_steps():
    learner = jaxbptt.learner(CASE.step, wave, OPTIMIZERS["hyperparams"], window=5, every=4)
    state, _, _ = all_states(learner, CASE, CASE.xs(T))
    assert int(state.opt_state.count) == T // 4 == 2
    rate = jax.jit(WARM)(1)
    np.testing.assert_allclose(state.opt_state.hyperparams["learning_rate"], rate)


OF_CONTRIB = {
    "dog": contrib.dog(0.1),  # keeps the parameters it began with
    "cocob": contrib.cocob(),
    "schedule_free": contrib.schedule_free_sgd(0.1),
    "momo": contrib.momo(),
    "mechanize": contrib.mechanize(optax.adam(0.1)),
    "chain": optax.chain(optax.zero_nans(), optax.adaptive_grad_clip(0.1), optax.adabelief(WARM)),
}


@pytest.mark.parametrize("name", grid(OF_CONTRIB, always=["dog", "momo"]))
def test_states_can_be_donated_and_keep_their_type(name):
    case = zoo.ZOO["tanh_rnn"](jnp.bfloat16)
    learner = jaxbptt.learner(case.step, wave32, OF_CONTRIB[name], window=3)
    state = learner.init(case.params, case.carry, case.x())
    update, kinds = jax.jit(learner.update, donate_argnums=0), avals(state)
    for x in case.xs(3):
        state, metrics = update(state, x)
        assert avals(state) == kinds
    assert np.isfinite(metrics.loss)


def wave32(y, x):
    del x
    return jnp.mean(jnp.sin(y.astype(jnp.float32)))


def test_integers_in_the_parameters_are_not_the_optimizers():
    case = zoo.ZOO["integer_leaves"](F64)
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.05))
    learner = jaxbptt.learner(case.step, wave, optimizer, window=3)
    state, _, metrics = all_states(learner, case, case.xs(T))
    assert int(state.params["period"]) == int(case.params["period"])
    assert float(metrics[-1].loss) < float(metrics[0].loss) - 0.1


def test_complex_parameters_go_downhill():
    case = zoo.ZOO["complex_recurrence"](F64)
    learner = jaxbptt.learner(
        case.step, lambda y, x: jnp.mean((y - 1) ** 2), optax.adam(0.05), window=5
    )
    _, _, metrics = all_states(learner, case, np.ones_like(case.xs(64)))
    assert float(metrics[-1].loss) < 0.05 * float(metrics[0].loss)


@pytest.mark.exhaustive
def test_a_learning_rate_can_be_set_in_the_state():
    optimizer = optax.inject_hyperparams(optax.sgd)(0.1)
    learner = jaxbptt.learner(CASE.step, wave, optimizer, window=3)
    state = learner.init(CASE.params, CASE.carry, CASE.x())

    def after(rate):
        params = state.opt_state.hyperparams | {"learning_rate": rate}
        started = state._replace(opt_state=state.opt_state._replace(hyperparams=params))
        return lax.scan(learner.update, started, CASE.xs(4))[1].loss[-1]

    value, eps = jax.jit(after), 1e-5
    slope = (value(0.1 + eps) - value(0.1 - eps)) / (2 * eps)
    oracles.check("hypergradient in the state", jax.jit(jax.grad(after))(0.1), slope, 1e-7)


def test_a_nan_skipped_and_cleared_by_hand():
    """`apply_if_finite` keeps the parameters; `clear` takes the NaN out of the window."""
    xs = np.array(CASE.xs(T))
    xs[5, 0, 0] = np.nan
    optimizer = optax.apply_if_finite(optax.adam(0.05), 5)
    learner = jaxbptt.learner(CASE.step, wave, optimizer, window=3, every=2)

    @jax.jit
    def update(state, x):
        new, metrics = learner.update(state, x)
        return lax.cond(
            jnp.isfinite(metrics.loss), lambda: new, lambda: learner.clear(new, CASE.carry)
        ), metrics

    before, _ = steps(update, learner.init(CASE.params, CASE.carry, CASE.x()), xs[:5])
    after, metrics = update(before, xs[5])
    assert np.isnan(metrics.loss)
    oracles.check("parameters kept", after.params, before.params, 0.0)
    assert int(after.opt_state.total_notfinite) == 1
    begun = learner.init(after.params, CASE.carry, CASE.x())
    begun = begun._replace(opt_state=after.opt_state, step=after.step)
    got, want = steps(update, after, xs[6:]), steps(update, begun, xs[6:])
    oracles.check("as a run that began there", got, want, 0.0)
    assert np.isfinite(got[1].loss).all()
    assert got[1].updated.sum() == 2


def test_called_without_its_learning_rate():
    with pytest.raises(ValueError, match=r"but got a function. Call it, .* optax.adam\(1e-3\)"):
        jaxbptt.learner(CASE.step, wave, optax.adam, window=3)


def test_an_optimizer_that_takes_the_loss_by_name():
    """As `optax.contrib.reduce_on_plateau` does; others take any keyword, or none."""

    def update(grads, state, params=None, *, value):
        return jax.tree.map(lambda g: 0 * g, grads), state + value

    by_name = Optimizer(lambda params: jnp.zeros(()), update)
    learner = jaxbptt.learner(
        lambda w, c, x: (w * c + x,) * 2, lambda y, x: y**2, by_name, window=2
    )
    state = learner.init(jnp.asarray(0.5), jnp.asarray(0.1), jnp.asarray(0.0))
    state, metrics = jax.jit(lambda s: lax.scan(learner.update, s, jnp.linspace(0.1, 1, 5)))(state)
    np.testing.assert_allclose(state.opt_state, np.sum(metrics.loss), rtol=1e-12)
