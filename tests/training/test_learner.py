"""The learner against loops written by hand: the gradient of the unrolled graph, SGD in NumPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import zoo
from harness import F64, first, grid
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxpr_reading import inner, rings_made_anew
from training_loops import (
    DECAY,
    RATE,
    Optimizer,
    all_states,
    avals,
    forward,
    momentum,
    scanned,
    steps,
    wave,
)

import jaxbptt

T = 11


# -------------------------------------------------------------------- by hand


class Unrolled:
    """Whose parameters: those of each step's own time. The run as one graph."""

    def __init__(self, case):
        self.case = case

    def gradient(self, thetas, carries, end, oldest, cts):
        padded = thetas + [thetas[-1]] * (T - len(thetas))
        run = oracles.Run(self.case.step, padded, self.case.carry, self.case.xs(T), T)
        return run.unrolled(end, oldest, cts).params


class Replayed(Unrolled):
    """The window run again from its oldest carry, under the newest parameters."""

    def gradient(self, thetas, carries, end, oldest, cts):
        # Rolled, not cut: steps without a cotangent do no harm, and it compiles once.
        xs = jax.tree.map(lambda v: np.roll(v, 1 - oldest, 0), self.case.xs(T))
        run = oracles.Run(self.case.step, [thetas[-1]] * T, carries[oldest - 1], xs, T)
        return run.unrolled(end - oldest + 1, 1, cts).params


class Current(Unrolled):
    """Recorded activations of the zoo's tanh RNN, and the newest parameters in the products."""

    def gradient(self, thetas, carries, end, oldest, cts):
        theta, xs = jax.tree.map(np.asarray, (thetas[-1], self.case.xs(T)))
        h = [np.asarray(c) for c in carries]
        total = {name: np.zeros(leaf.shape) for name, leaf in theta.items()}
        lam = np.zeros(h[0].shape)
        for s in range(end, oldest - 1, -1):
            if end - s < len(cts):
                ct = np.asarray(cts[len(cts) - 1 - (end - s)][0])
                total["wy"] += h[s].T @ ct
                lam = lam + ct @ theta["wy"].T
            z = lam * (1 - h[s] ** 2)
            total["wx"] += xs[s - 1].T @ z
            total["wh"] += h[s - 1].T @ z
            total["b"] += z.sum(0)
            lam = z @ theta["wh"].T
        return [total[name] for name in sorted(total)]


ORACLES = {"stored": Unrolled, "replayed": Replayed, "current": Current}


def by_hand(case, loss, window, every, weights):
    """Parameters, loss and whether there was an update, after each of T steps."""
    oracle, step = ORACLES[weights](case), forward(case.step, loss)
    theta, carries, cts, found = case.params, [case.carry], [], []
    thetas, speed = [], [np.zeros(v.shape) for v in oracles.moving(case.params)]
    for t, x in enumerate(oracles.unstack(case.xs(T), T), 1):
        thetas.append(theta)
        carry, value, ct = step(theta, carries[-1], x)
        carries.append(carry)
        cts.append(ct)
        if t % every == 0:
            rows = min(every, window)
            oldest = oracles.reach(t, window, every, rows)
            got = oracle.gradient(thetas, carries, t, oldest, cts[-rows:])
            # Downhill is along the conjugate of what JAX calls a gradient.
            speed = [DECAY * m + np.conj(g) for m, g in zip(speed, got, strict=True)]
            pairs = zip(oracles.moving(theta), speed, strict=True)
            theta = oracles.refill(theta, [np.asarray(p) - RATE * m for p, m in pairs])
        found.append((theta, value, t % every == 0))
    return found


def check_run(label, case, loss, window, every, weights, **options):
    learner = jaxbptt.learner(
        case.step, loss, momentum(), window=window, every=every, weights=weights, **options
    )
    state, params, metrics = all_states(learner, case, case.xs(T))
    want = by_hand(case, loss, window, every, weights)
    for t in range(T):
        theta, value, updated = want[t]
        oracles.check(f"learner, {label}", params[t], theta, 1e-11)
        oracles.check(f"learner, {label}, loss", metrics[t].loss, value, 1e-11)
        assert bool(metrics[t].updated) == updated
    assert int(state.step) == T
    return state, metrics


PACES = [(1, 1), (3, 1), (20, 1), (5, 2), (3, 3), (20, 3), (2, 5)]
# Each pace, and with each kind of weights one of every=1, and windows of both sides of a group.
CHOSEN = {
    "stored": [(1, 1), (3, 3), (20, 3)],
    "replayed": [(20, 1), (5, 2), (2, 5)],
    "current": [(3, 1), (5, 2), (2, 5)],
}


@pytest.mark.parametrize(
    ("weights", "window", "every"),
    grid(
        [(weights, *pace) for weights in ORACLES for pace in PACES],
        always=lambda case: case[1:] in CHOSEN[case[0]],
    ),
)
def test_parameters_at_every_step(window, every, weights):
    """The window shorter than a group, as long, longer, and longer than the run."""
    case = zoo.ZOO["tanh_rnn"](F64)
    check_run(weights, case, wave, window, every, weights)


STEPS = """
    nested_dict integer_y none_leaves typed_key integer_leaves complex_recurrence
    spike_vjp no_y no_params
""".split()


# What the learner has to do with: leaves it can't train, cotangents it can't make, none at all.
TELLING = ["complex_recurrence", "integer_leaves", "integer_y", "no_params", "no_y"]


@pytest.mark.parametrize("name", grid(STEPS, always=TELLING))
def test_steps_of_the_zoo(name):
    check_run(name, zoo.ZOO[name](F64), wave, 4, 3, "stored")


def test_a_window_for_each_part():
    case = zoo.ZOO["namedtuple"](F64)
    window = zoo.Pair(h=2, trace=4)
    learner = jaxbptt.learner(case.step, wave, momentum(), window=window, every=3)
    _, params, metrics = all_states(learner, case, case.xs(T))
    run = oracles.Run(case.step, case.params, case.carry, case.xs(T), T)
    step = forward(case.step, wave)
    befores = [case.carry, *run.trajectory[0][:2]]
    cts = [step(case.params, h, x)[2] for h, x in zip(befores, run.xs[:3], strict=True)]
    want = run.unrolled(3, [oracles.reach(3, w, 3, 3) for w in (2, 4)], cts).params
    before = map(np.asarray, jax.tree.leaves(case.params))
    moved = [p - RATE * g for p, g in zip(before, want, strict=True)]
    oracles.check("learner, parts", params[2], moved, 1e-12)
    assert bool(metrics[2].updated)


def test_aux_goes_along():
    case = zoo.ZOO["nested_dict"](F64)

    def loss(y, x):
        return wave(y, x), {"largest": jnp.max(y["new"]), "none": None, "x": x}

    learner = jaxbptt.learner(case.step, loss, momentum(), window=3, every=2)
    state = learner.init(case.params, case.carry, case.x())
    state, metrics = scanned(learner)(state, case.xs(T))
    alone = jaxbptt.learner(case.step, wave, momentum(), window=3, every=2)
    want, plain = scanned(alone)(alone.init(case.params, case.carry, case.x()), case.xs(T))
    np.testing.assert_array_equal(metrics.loss, plain.loss)
    oracles.check("with aux", state.params, want.params, 0.0)
    np.testing.assert_array_equal(metrics.aux["x"], case.xs(T))
    assert metrics.aux["largest"].shape == (T,)
    assert plain.aux is None


def test_the_loss_of_a_group_goes_to_optimizers_that_take_it():
    """Theirs is the sum that the gradient belongs to; the others get nothing they don't know."""

    def update(grads, state, params=None, *, value, **extra):
        assert not extra
        return jax.tree.map(jnp.zeros_like, grads), (state[0] + 1, value)

    case = zoo.ZOO["tanh_rnn"](F64)
    recording = Optimizer(lambda params: (jnp.int32(0), jnp.float64(0)), update)
    for every in (1, 3):
        learner = jaxbptt.learner(case.step, wave, recording, window=2, every=every)
        state = learner.init(case.params, case.carry, case.x())
        state, metrics = scanned(learner)(state, case.xs(6))
        count, value = state.opt_state
        assert count == 6 // every
        np.testing.assert_allclose(value, metrics.loss[-every:].sum(), rtol=1e-13)


# -------------------------------------------------------------- a pure function

CASE = zoo.ZOO["tanh_rnn"](F64)
PLAIN = momentum()


def started(**options):
    options = {"window": 3} | options
    learner = jaxbptt.learner(CASE.step, wave, options.pop("optimizer", PLAIN), **options)
    return learner, learner.init(CASE.params, CASE.carry, CASE.x())


@functools.cache
def compiled_update(learner):
    """One for all learners that are equal."""
    return jax.jit(learner.update)


@pytest.mark.parametrize("on_nonfinite", ["pass", "clear"])
@pytest.mark.parametrize("every", [1, 3])
def test_the_type_of_the_state_is_a_fixpoint(every, on_nonfinite):
    weak = Optimizer(lambda params: 0.0, lambda grads, state, params: (grads, 0.0))
    for optimizer in (momentum(), weak):
        learner, state = started(every=every, on_nonfinite=on_nonfinite, optimizer=optimizer)
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
        jaxpr, new = jax.make_jaxpr(learner.update, return_shape=True)(state, CASE.x())
        assert jax.tree.structure(new[0]) == jax.tree.structure(state)
        assert jaxpr.out_avals[: len(avals(state))] == avals(state)


def test_python_numbers_and_numpy_make_a_state():
    learner = jaxbptt.learner(
        lambda w, c, x: (w * c + x, w * c + x), lambda y, x: (y - 2) ** 2, momentum(0.01), window=4
    )
    state = learner.init(0.3, 0.0, np.float64(0))
    state, _ = scanned(learner)(state._replace(params=np.float64(0.1)), np.ones(100))
    assert float(state.params) == pytest.approx(0.5, abs=1e-3)


def keeping():
    """Its state is the parameters themselves."""
    plain = momentum()
    return Optimizer(lambda p: (p, plain.init(p)), lambda g, s, p=None: (g, (p, s[1])))


@pytest.mark.parametrize("every", [1, 3])
def test_the_state_can_be_donated_and_what_it_was_made_of_survives(every):
    params, carry = jax.tree.map(jnp.copy, (CASE.params, CASE.carry))
    learner = jaxbptt.learner(CASE.step, wave, keeping(), window=3, every=every)
    state = learner.init(params, carry, CASE.x())
    update = jax.jit(learner.update, donate_argnums=0)
    for x in CASE.xs(4):
        before = state
        state, _ = update(state, x)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.tape))
    fresh = jax.tree.map(jnp.copy, carry)
    state, _ = update(learner.clear(state, fresh), CASE.x())
    oracles.check("survivors", (params, carry, fresh), (CASE.params, CASE.carry, CASE.carry), 0.0)


def test_init_allocates_nothing_under_eval_shape():
    learner, state = started(every=2)
    args = jax.eval_shape(lambda: (CASE.params, CASE.carry, CASE.x()))
    shapes = jax.eval_shape(learner.init, *args)
    assert shapes.tape.nbytes == state.tape.nbytes > 0
    assert [v.shape for v in jax.tree.leaves(shapes)] == [v.shape for v in jax.tree.leaves(state)]
    struct = learner.init(CASE.params, CASE.carry, jax.eval_shape(lambda: CASE.x()))
    assert avals(struct) == avals(state)


def test_traced_once():
    traces = []

    def step(params, carry, x):
        traces.append(1)
        return CASE.step(params, carry, x)

    def make():
        return jaxbptt.learner(step, wave, plain, window=3, every=2)

    plain = momentum()
    assert make() == make()
    assert hash(make()) == hash(make())
    update = jax.jit(lambda learner, state, x: learner.update(state, x), static_argnums=0)
    state = make().init(CASE.params, CASE.carry, CASE.x())
    state, _ = update(make(), state, CASE.x())
    seen = len(traces)
    for _ in range(4):
        state, _ = update(make(), state, CASE.x())
    assert len(traces) == seen


@pytest.mark.exhaustive
def test_an_update_that_is_not_compiled():
    """Each of its many operations is compiled alone; nothing else is told by it."""
    learner, state = started(every=2)
    compiled = state
    for x in CASE.xs(4):
        state, metrics = learner.update(state, x)
        compiled, want = compiled_update(learner)(compiled, x)
        oracles.check("update, not compiled", (state, metrics), (compiled, want), 1e-13)
        assert avals(state) == avals(compiled)


def test_steps_are_counted_beyond_31_bits_and_around_32():
    learner, state = started(every=2)
    for done in (2**31 - 1, 2**32 - 1):
        state, _ = compiled_update(learner)(state._replace(step=jnp.uint32(done)), CASE.x())
        assert state.step == (done + 1) % 2**32


# ------------------------------------------------------------------------ vmap


def test_vmap_of_a_whole_run_keeps_the_branch():
    rates = np.array([0.05, 0.1, 0.3])

    def run(rate):
        learner = jaxbptt.learner(CASE.step, wave, momentum(rate), window=3, every=4)
        state = learner.init(CASE.params, CASE.carry, CASE.x())
        state, metrics = lax.scan(learner.update, state, CASE.xs(T))
        return state.params, metrics

    got, alone = jax.jit(jax.vmap(run))(rates), jax.jit(run)
    oracles.check("vmap", got, oracles.stack([alone(rate) for rate in rates]), 1e-12)
    inside, outside = dots(jax.make_jaxpr(jax.vmap(run))(rates).jaxpr)
    assert inside > 0
    assert outside == 3  # x wx, h wh and h wy


needs_eight = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight devices (the CPU has them under conftest.py)"
)


@needs_eight
@pytest.mark.parametrize(
    ("weights", "every"),
    grid(
        [("stored", 1), ("current", 3), ("replayed", 1)],
        always=[("current", 3)],
    ),
)
def test_shard_map(weights, every):
    h, xs = zoo.normal(1, F64, 16, zoo.H), zoo.normal(2, F64, T, 16, zoo.D)

    def loss_on_devices(y, x):
        return lax.pmean(wave(y, x), "data")

    def run(loss):
        def whole(params, h, xs):
            learner = jaxbptt.learner(
                CASE.step, loss, momentum(), window=3, every=every, weights=weights
            )
            state = learner.init(params, h, xs[0])
            state, metrics = lax.scan(learner.update, state, xs)
            return state.params, state.tape.carry, metrics

        return whole

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (P(), P("data"), P(None, "data")), (P(), P("data"), P())
    mapped = jax.shard_map(run(loss_on_devices), mesh=mesh, in_specs=specs[0], out_specs=specs[1])
    got = jax.jit(mapped)(CASE.params, h, xs)
    oracles.check("learner, shard_map", got, jax.jit(run(wave))(CASE.params, h, xs), 1e-12)


# ------------------------------------------------------------------------ cost


def dots(jaxpr, inside=False):
    """How many products there are inside branches, and outside."""
    found = [0, 0]
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found[0 if inside else 1] += 1
        for body in inner(eqn):
            branch = inside or eqn.primitive.name == "cond"
            found = [a + b for a, b in zip(found, dots(body, branch), strict=True)]
    return found


@pytest.mark.parametrize("on_nonfinite", ["pass", "clear"])
def test_between_updates_there_are_the_products_of_a_forward_step(on_nonfinite):
    learner, state = started(every=4, on_nonfinite=on_nonfinite)
    inside, outside = dots(jax.make_jaxpr(learner.update)(state, CASE.x()).jaxpr)
    assert outside == 3
    assert inside >= 5


# --------------------------------------------------------------- hypergradients


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("weights", "every"), grid([("stored", 1), ("current", 2)], always=[("current", 2)])
)
def test_hypergradients(weights, every):
    """Of the loss after updates, by what the optimiser, the loss and the start hold."""

    def after(rate, scale, bias):
        learner = jaxbptt.learner(
            CASE.step,
            lambda y, x: scale * wave(y, x),
            momentum(rate),
            window=5,
            every=every,
            weights=weights,
        )
        params = CASE.params | {"b": CASE.params["b"] + bias}
        state = learner.init(params, CASE.carry, CASE.x())
        return lax.scan(learner.update, state, CASE.xs(4))[1].loss[-1]

    at, eps = (0.2, 1.3, 0.0), 1e-5
    reverse, value = jax.jit(jax.grad(after, (0, 1, 2)))(*at), jax.jit(after)
    for i, moved in enumerate(np.eye(3) * eps):
        slope = (value(*(at + moved)) - value(*(at - moved))) / (2 * eps)
        oracles.check("hypergradients, reverse", reverse[i], slope, 1e-7)  # ε² and 1e-16/ε
    forward = jax.jit(jax.jacfwd(after, (0, 1, 2)))(*at)
    oracles.check("hypergradients, forward", forward, reverse, 1e-12)


# ------------------------------------------------------------ clear and evaluate


def as_if_begun(learner, state, carry):
    """The state of a run that begins here, with the parameters and the optimiser there are."""
    fresh = learner.init(state.params, carry, CASE.x())
    return fresh._replace(opt_state=state.opt_state, step=state.step)


@pytest.mark.parametrize("every", [1, 3])
def test_clear_begins_anew(every):
    learner, state = started(every=every)
    state, _ = scanned(learner)(state, CASE.xs(5))  # in the middle of a group
    clear = jax.jit(lambda state, carry: (learner.clear(state), learner.clear(state, carry)))
    other = np.asarray(2 * CASE.carry)
    for cleared, carry in zip(clear(state, other), (state.tape.carry, other), strict=True):
        jax.tree.map(np.testing.assert_array_equal, cleared, as_if_begun(learner, state, carry))


def test_evaluate_records_nothing():
    learner, state = started(every=3)
    state, _ = scanned(learner)(state, CASE.xs(5))
    evaluate, step = jax.jit(learner.evaluate), forward(CASE.step, wave)
    for carry in (None, 2 * CASE.carry):
        want, losses = state.tape.carry if carry is None else carry, []
        for x in CASE.xs(T):
            want, value, _ = step(state.params, want, x)
            losses.append(value)
        got, metrics = evaluate(state, CASE.xs(T), carry)
        oracles.check("evaluate", (got, metrics.loss), (want, np.stack(losses)), 1e-13)
        assert not metrics.updated.any()
        assert metrics.aux is None
    shapes = {
        v.aval.shape for v in jax.make_jaxpr(learner.evaluate)(state, CASE.xs(T)).eqns[-1].outvars
    }
    assert shapes == {CASE.carry.shape, (T,)}


@pytest.mark.parametrize(
    ("xs", "came"),
    [
        (1.0, r"xs: float64\[\]"),
        (
            {"a": np.ones(3), "b": np.ones(2)},
            r"xs\['a'\]: float64\[3\]\n  \* xs\['b'\]: float64\[2\]",
        ),
        ({"a": np.ones(3), "b": 1.0}, r"xs\['a'\]: float64\[3\]\n  \* xs\['b'\]: float64\[\]"),
        (None, "xs: no leaves"),
        ((), "xs: no leaves"),
    ],
)
def test_evaluate_takes_inputs_of_several_steps(xs, came):
    learner, state = started()
    said = rf"xs must be inputs of several steps, .* but got\n  \* {came}\nStack the inputs"
    with pytest.raises(ValueError, match=said):
        learner.evaluate(state, xs)


def test_evaluate_takes_a_carry_like_the_one_on_the_tape():
    learner, state = started()
    with pytest.raises(ValueError, match="carry must have the containers and dtypes of the carry"):
        learner.evaluate(state, CASE.xs(2), {"h": CASE.carry})
    with pytest.raises(ValueError, match=r"e\.g\. with h\.astype\(jnp\.float64\)"):
        learner.evaluate(state, CASE.xs(2), CASE.carry.astype(jnp.float32))
    wider = jnp.concatenate([CASE.carry, CASE.carry])  # another batch is no fault
    xs = jnp.concatenate([CASE.xs(2), CASE.xs(2)], 1)
    assert learner.evaluate(state, xs, wider)[0].shape == wider.shape


# ------------------------------------------------------------------- not finite


TROUBLE = ["x", "carry", "loss", "gradient"]


def with_trouble(kind, at):
    """Inputs, and what at one step is not finite: the input itself, or what is made of it."""
    xs = np.array(CASE.xs(T))
    marks = {other: np.arange(T) == at if other == kind else np.zeros(T, bool) for other in TROUBLE}
    if kind == "x":  # so are y and the carry, for good
        xs[at, 0, 0] = np.nan
    return xs, marks


def flagged(params, carry, x):
    carry, y = CASE.step(params, carry, x[0])
    return carry + jnp.where(x[1]["carry"], jnp.inf, 0.0), y


def troubled(y, x):
    # The root is finite at 0, and its derivative is not.
    root = jnp.sqrt(jnp.where(x[1]["gradient"], 0.0 * y[0, 0], 1.0))
    return wave(y, x) + jnp.where(x[1]["loss"], jnp.inf, 0.0) + root


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("kind", TROUBLE)
def test_what_is_not_finite_leaves_no_trace(kind, every):
    at = 5 if kind == "gradient" else 4  # a group's gradient is made at its end
    xs = oracles.unstack(with_trouble(kind, at), T)
    learner = jaxbptt.learner(flagged, troubled, PLAIN, window=3, every=every, on_nonfinite="clear")
    update = compiled_update(learner)
    state = learner.init(CASE.params, CASE.carry, xs[0])
    before, _ = steps(update, state, xs[:at])
    after, metrics = update(before, xs[at])
    assert bool(np.isfinite(metrics.loss)) == (kind in ("carry", "gradient"))
    assert not metrics.updated
    oracles.check("dropped", after[:2], before[:2], 0.0)
    oracles.check("dropped", after.tape.carry, before.tape.carry, 0.0)
    assert int(after.step) == at + 1
    assert int(after.tape.length) == 0
    fresh = learner.init(before.params, before.tape.carry, xs[0])
    want = steps(update, fresh._replace(opt_state=before.opt_state), xs[at + 1 :])
    got = steps(update, after, xs[at + 1 :])
    oracles.check("after the trouble", (got[0][:2], got[1]), (want[0][:2], want[1]), 0.0)
    assert np.isfinite(got[1].loss).all()
    assert got[1].updated.sum() == (T - at - 1) // every


@pytest.mark.parametrize("weights", ["stored", "current", "replayed"])
def test_a_nan_in_a_slot_that_is_not_read_is_not_contracted(weights):
    """Of one row the operands are small, so that weights are contracted after the loop."""

    def step(params, h, x):
        h = jnp.tanh(x @ params["wx"] + h @ params["wh"])
        return h, h

    key = jax.random.key(3)
    params = {"wx": jax.random.normal(key, (5, 6), F64), "wh": jnp.eye(6, dtype=F64)}
    how = {"window": 4, "weights": weights, "on_nonfinite": "clear"}
    learner = jaxbptt.learner(step, lambda y, x: jnp.mean(y**2), PLAIN, **how)
    xs = jax.random.normal(key, (7, 1, 5), F64).at[2, 0, 0].set(jnp.nan)
    state = learner.init(params, jnp.zeros((1, 6), F64), xs[0])
    update = compiled_update(learner)
    after, _ = steps(update, state, list(xs[:3]))
    fresh = learner.init(after.params, after.tape.carry, xs[0])
    want = steps(update, fresh._replace(opt_state=after.opt_state), list(xs[3:]))
    got = steps(update, after, list(xs[3:]))
    assert np.isfinite(got[0].params["wx"]).all()
    oracles.check("after a NaN", (got[0][:2], got[1]), (want[0][:2], want[1]), 0.0)


def test_a_passed_nan_stays():
    """So that the test above shows something."""
    xs = with_trouble("x", 4)
    learner = jaxbptt.learner(flagged, troubled, PLAIN, window=3)
    state = learner.init(CASE.params, CASE.carry, first(xs))
    state, metrics = scanned(learner)(state, xs)
    assert np.isnan(metrics.loss[4:]).all()
    assert np.isnan(state.params["wh"]).all()


def test_clear_changes_nothing_where_all_is_finite():
    """With a key in the carry, which is neither finite nor not."""
    check_run("clear", zoo.ZOO["typed_key"](F64), wave, 3, 2, "stored", on_nonfinite="clear")


# ---------------------------------------------------------------------- faults


def make(loss=wave, optimizer=None, **options):
    return jaxbptt.learner(CASE.step, loss, optimizer or momentum(), **{"window": 3} | options)


@pytest.mark.parametrize(
    ("returned", "came"),
    [
        (lambda y: y, r"an array float64\[2,5\]"),
        (lambda y: (y.sum(), y, 1), "a tuple of length 3"),
        (lambda y: (y, y.sum()), r"an array float64\[2,5\]"),
        (lambda y: y.sum().astype(int), r"an array int64\[\]"),
        (lambda y: lax.complex(y.sum(), y.sum()), r"an array complex128\[\]"),
        (lambda y: None, "None"),
        (lambda y: {"loss": y.sum()}, "a dict"),
        (lambda y: "small", "'small'"),
    ],
)
def test_a_loss_that_is_none(returned, came):
    learner = make(lambda y, x: returned(y))
    with pytest.raises(TypeError, match=f"as the scalar it returned {came}. Reduce it"):
        learner.init(CASE.params, CASE.carry, CASE.x())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": 0.5}, "loss must be a function loss.y, x. -> scalar.* but got 0.5"),
        ({"optimizer": momentum}, "but got a function. Call it, with its learning rate"),
        ({"optimizer": 1e-3}, r"optimizer must be an optax.GradientTransformation.* got 0.001"),
        ({"on_nonfinite": "skip"}, "on_nonfinite must be 'pass' or 'clear', but got 'skip'"),
        ({"window": 0}, "window must be an int of at least 1"),
        ({"every": 0}, "every must be an int of at least 1"),
        ({"weights": "old"}, "weights must be 'stored', 'current' or 'replayed'"),
    ],
)
def test_options(options, said):
    with pytest.raises(ValueError, match=said):
        make(**options)


def test_a_state_that_was_computed_with():
    learner, state = started(every=3)
    mean = jax.tree.map(lambda v: v / 2, state)
    with pytest.raises(ValueError, match=r"state.step must be an integer.* but got .* float32"):
        learner.update(mean, CASE.x())
    with pytest.raises(ValueError, match="tape must have leaves of the types that it was made"):
        learner.update(mean._replace(step=state.step), CASE.x())
    half = jax.tree.map(lambda v: v.astype(jnp.float32), state.pending)
    said = r"state\.pending must be of the type that init made.*\n.*ct_ys.*float64.*float32"
    for call in (lambda s: learner.update(s, CASE.x()), learner.flush):
        with pytest.raises(ValueError, match=said):
            call(state._replace(pending=half))
    with pytest.raises(ValueError, match=r"state\.pending must be of the type that init made"):
        learner.update(state._replace(pending=None), CASE.x())


def test_it_prints_on_one_line():
    learner, state = started(every=2, weights="current")
    functions = f"{CASE.step.__name__}, wave"
    options = "window=3, every=2, weights='current'"
    assert repr(learner) == f"Learner({functions}, {options}, on_nonfinite='pass')"
    assert f"tape=Tape({options}, carry=float64[2,4], ring " in repr(state)


def test_another_state():
    learner, state = started()
    for call in (
        lambda: learner.update(state.tape, CASE.x()),
        lambda: learner.clear(state.params),
        lambda: learner.evaluate(None, CASE.xs(2)),
        lambda: learner.run((state,), []),
    ):
        with pytest.raises(ValueError, match="state must be the LearnerState that init or the"):
            call()
    with pytest.raises(ValueError, match="tape must be from a recorder with window=5"):
        make(window=5).update(state, CASE.x())
    with pytest.raises(ValueError, match=r"carry must be of the type of the carry on the tape"):
        learner.clear(state, CASE.carry[0])
    with pytest.raises(ValueError, match=r"x must be of the type that the tape was made for"):
        learner.update(state, CASE.x()[0])
    fewer = {k: v for k, v in CASE.params.items() if k != "b"}
    with pytest.raises(ValueError, match=r"params\['b'\]: float64\[4\] expected, nothing got"):
        learner.update(state._replace(params=fewer), CASE.x())


@pytest.mark.parametrize(
    ("update", "said"),
    [
        (lambda g, s, p: (g, [*s, s[0]]), "must return a state of the type it was given"),
        (lambda g, s, p: (g, [s[0].astype(jnp.float32)]), r"opt_state\[0\]: float64.* in, float32"),
        (lambda g, s, p: (g["b"], s), "must return a change for each parameter"),
        (
            lambda g, s, p: (g | {"b": g["b"][0]}, s),
            r"changes\['b'\]: float64\[4\] expected, float64\[\] got",
        ),
    ],
)
def test_an_optimizer_that_returns_something_else(update, said):
    learner, state = started(optimizer=Optimizer(lambda p: [jnp.zeros(())], update))
    with pytest.raises(TypeError, match=said):
        jax.eval_shape(learner.update, state, CASE.x())


def test_changes_of_another_dtype_are_added_as_optax_adds_them():
    wide = Optimizer(
        lambda p: (), lambda g, s, p: (jax.tree.map(lambda v: v.astype(jnp.float32), g), s)
    )
    learner, state = started(optimizer=wide)
    new, _ = jax.jit(learner.update)(state, CASE.x())
    assert avals(new.params) == avals(state.params)


def test_traced_arguments_of_the_loop_stay_out_of_the_options():
    with pytest.raises(ValueError, match="window must be a Python int known"):
        jax.jit(lambda n: make(window=n).init(CASE.params, CASE.carry, CASE.x()))(3)


# ------------------------------------------------------------- compiled copies

WINDOW = 13  # no other axis has this length


def ring_of(tape):
    return [v.shape for v in jax.tree.leaves(tape) if v.shape[:1] == (WINDOW,)]


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("weights", "every", "on_nonfinite"),
    grid(
        itertools.product(["stored", "current"], [1, 4], ["pass", "clear"]),
        always=[("stored", 4, "clear"), ("current", 1, "pass")],
    ),
)
def test_a_loop_of_updates_copies_no_ring(weights, every, on_nonfinite):
    how = {"weights": weights, "every": every, "on_nonfinite": on_nonfinite}
    learner = jaxbptt.learner(CASE.step, wave, PLAIN, window=WINDOW, **how)
    state = jax.eval_shape(learner.init, CASE.params, CASE.carry, CASE.x())
    loop = jax.jit(lambda s, xs: lax.scan(learner.update, s, xs), donate_argnums=0)
    compiled = loop.lower(state, CASE.xs(29)).compile()
    assert len(ring_of(state.tape)) >= 2
    assert rings_made_anew(compiled, ring_of(state.tape)) == []
