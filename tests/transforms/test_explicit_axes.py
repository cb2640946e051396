"""Meshes whose axes are of type Explicit, where a sharding is part of an array's type."""

import functools
import itertools

import jax
import jax.numpy as jnp
import oracles
import pytest
from harness import drawer, grid, sgd
from jax import lax
from jax.sharding import PartitionSpec as P
from meshes import entered, laid, mesh_of

import jaxbptt

BATCH, INPUTS, HIDDEN, T = 8, 3, 16, 12
draw = drawer()


PARAMS = {"wx": draw(INPUTS, HIDDEN), "wh": draw(HIDDEN, HIDDEN) / 2, "b": draw(HIDDEN)}
CARRY = {"h": draw(BATCH, HIDDEN), "slow": draw(BATCH, HIDDEN)}
ARGS = PARAMS, CARRY, draw(T, BATCH, INPUTS)

OVER_DATA = {"wx": P(), "wh": P(), "b": P()}, P("data"), P(None, "data")
COLUMNS = {"wx": P(None, "model"), "wh": P(None, "model"), "b": P("model")}
OVER_BOTH = COLUMNS, P("data", "model"), P(None, "data")


def step(params, carry, x):
    h = jnp.tanh(x @ params["wx"] + carry["h"] @ params["wh"] + params["b"][None])
    slow = 0.9 * carry["slow"] + 0.1 * h
    return {"h": h, "slow": slow}, h + slow


def pulled(params, carry, xs, **settings):
    rec = jaxbptt.record(step, **settings)
    tape = rec.init(params, carry, xs[0])
    tape, ys = lax.scan(lambda tape, x: rec(params, tape, x), tape, xs)
    ct = rec.pullback(params, tape, 0.3 * ys[-2:], carry)
    return ct.params, ct.carry, ct.xs


def by_lag(params, carry, xs):
    rec = jaxbptt.record(step, window=4)
    tape = rec.init(params, carry, xs[0])
    tape, ys = lax.scan(lambda tape, x: rec(params, tape, x), tape, xs)
    lags = jaxbptt.gradient_by_lag(rec, params, tape, ys[-1:])
    return lags.params, lags.carry


def online(params, carry, xs, **settings):
    rec = jaxbptt.record(step, window=4, **settings)
    update = sgd(rec, 0.05, lambda y: jnp.mean(y**2))
    (params, _), found = lax.scan(update, (params, rec.init(params, carry, xs[0])), xs)
    return params, found[0]


def learned(params, carry, xs, **settings):
    optax = pytest.importorskip("optax")
    learner = jaxbptt.learner(step, lambda y, x: jnp.mean(y**2), optax.adam(1e-2), **settings)
    state, metrics = lax.scan(learner.update, learner.init(params, carry, xs[0]), xs)
    return state.params, metrics.loss


def scanned(params, carry, xs, **settings):
    def loss_fn(params, carry, xs):
        _, ys = jaxbptt.scan(lambda c, x: step(params, c, x), carry, xs, **settings)
        return jnp.mean(ys**2)

    return jax.grad(loss_fn, argnums=(0, 1, 2))(params, carry, xs)


def reset(params, carry, xs):
    rec = jaxbptt.record(jaxbptt.with_resets(step, carry), window=4)
    rows = lambda x: (x, x[:, 0] > 0)  # noqa: E731
    tape = rec.init(params, carry, rows(xs[0]))
    tape, ys = lax.scan(lambda tape, x: rec(params, tape, rows(x)), tape, xs)
    return rec.pullback(params, tape, ys[-1:]).params


PARTS = {"h": 2, "slow": 5}
CASES = {
    "stored": (online, {"weights": "stored"}),
    "current": (online, {"weights": "current"}),
    "replayed": (online, {"weights": "replayed"}),
    "pullback": (pulled, {"window": 4}),
    "parts": (pulled, {"window": PARTS}),
    "by lag": (by_lag, {}),
    "learner": (learned, {"window": 4, "every": 3, "weights": "current"}),
    "learner that clears": (learned, {"window": 4, "on_nonfinite": "clear"}),
    "sliding": (scanned, {"window": 4}),
    "chunks": (scanned, {"window": 4, "every": 4}),
    "overlapping": (scanned, {"window": 6, "every": 2}),
    "whole": (scanned, {"window": None}),
    "scan with parts": (scanned, {"window": PARTS}),
    "random": (scanned, {"window": jaxbptt.random_window(jax.random.key(0), 4)}),
    "resets": (reset, {}),
}


def mesh():
    return mesh_of("Explicit", data=4, model=2)


def jitted(case):
    function, settings = CASES[case]
    return jax.jit(functools.partial(function, **settings))


@functools.cache
def on_one_device(case):
    return jax.device_get(jitted(case)(*ARGS))


LAYOUTS = {"data": OVER_DATA, "both": OVER_BOTH}


@pytest.mark.parametrize(
    ("case", "layout"),
    grid(
        itertools.product(CASES, LAYOUTS),
        always=[
            *((case, "both") for case in ("stored", "replayed", "parts", "learner", "sliding")),
            *((case, "both") for case in ("overlapping", "resets")),
            *((case, "data") for case in ("current", "by lag")),
        ],
    ),
)
def test_it_gives_what_one_device_gives(case, layout):
    with entered(mesh()):
        args = laid(mesh(), LAYOUTS[layout], ARGS)
        got = jitted(case)(*args)
    oracles.check("explicit axes", jax.device_get(got), on_one_device(case), 1e-12)
    if case in {"stored", "learner", "sliding"}:  # params, and their gradients, where params are
        for new, old in zip(*map(jax.tree.leaves, (got[0], args[0])), strict=True):
            assert new.sharding.is_equivalent_to(old.sharding, old.ndim)


def test_the_ring_lies_where_the_residuals_do():
    with entered(mesh()):
        params, carry, xs = laid(mesh(), OVER_BOTH, ARGS)
        rec = jaxbptt.record(step, window=4)
        tape = rec.init(params, carry, xs[0])
        assert sum(leaf.sharding.is_fully_replicated for leaf in tape._ring) == 0
        tape, _ = jax.jit(rec, donate_argnums=1)(params, tape, xs[0])
        assert tape.carry["h"].sharding.spec == P("data", "model")


def layers(params, carry, x):
    """Many small arrays that lie in different ways, and the outputs as they lie."""
    made = [jnp.tanh(params * h) + jnp.sum(x) for h in carry]
    return made, sum(jnp.mean(h**2) for h in made)


def test_small_residuals_lie_in_one_array_only_where_they_lie_alike():
    params, xs = draw(), draw(T, 3)
    carry = [draw(BATCH, HIDDEN) for _ in range(20)]
    update = sgd(rec := jaxbptt.record(layers, window=4), 0.05)

    def run(params, carry, xs):
        return lax.scan(update, (params, rec.init(params, carry, xs[0])), xs)[1]

    with entered(mesh()):
        # Every other one over the mesh's rows, the others over its columns.
        specs = [P("data"), P(None, "model")] * 10
        args = laid(mesh(), (P(), specs, P()), (params, carry, xs))
        tape = rec.init(*args[:2], args[2][0])
        ring = {leaf.sharding.spec for leaf in tape._ring if leaf.shape[1:] == (8, BATCH, HIDDEN)}
        assert {tuple(spec)[2:] for spec in ring} >= {("data", None), (None, "model")}
        got = jax.device_get(jax.jit(run)(*args))
    oracles.check("explicit axes", got, jax.device_get(run(params, carry, xs)), 1e-12)


@pytest.mark.parametrize("weights", ["stored", "current", "replayed"])
def test_a_parameter_that_lies_on_no_mesh(weights):
    """As JAX itself takes it: for the same on all devices."""
    carry, xs = [draw(BATCH, HIDDEN), draw(BATCH, HIDDEN)], draw(T, 3)
    rec = jaxbptt.record(layers, window=4, weights=weights)

    def run(carry, xs):
        params = jnp.float64(0.5)
        first = params, rec.init(params, carry, xs[0])
        return lax.scan(sgd(rec, 0.05), first, xs)[1]

    with entered(mesh()):
        args = laid(mesh(), ([P("data"), P(None, "model")], P()), (carry, xs))
        got = jax.device_get(jax.jit(run)(*args))
    oracles.check("off the mesh", got, jax.device_get(run(carry, xs)), 1e-12)


def test_a_tape_that_lies_elsewhere_is_said():
    with entered(mesh()):
        params, carry, xs = laid(mesh(), OVER_DATA, ARGS)
        rec = jaxbptt.record(step, window=4)
        tape = rec.init(params, carry, jnp.zeros((BATCH, INPUTS)))
        with pytest.raises(
            ValueError,
            match=r"was of sharding .* then and is of .* Call init with",
        ):
            rec(params, tape, xs[0])


@pytest.mark.skipif(not hasattr(P, "partitions"), reason="this version of JAX has no reduced axes")
@pytest.mark.parametrize("case", ["stored", "current", "replayed", "whole", "sliding", "layers"])
def test_weights_may_be_reduced_and_their_gradients_unreduced(case):
    w, c, xs = draw(4, 4), draw(BATCH, 4), draw(5, BATCH, 4)
    layers = draw(5, 4, 4)

    def run(w, c, xs, layers, spec):
        def step(w, c, x):
            c = jnp.tanh(jnp.dot(c, w, out_sharding=spec) + x)
            return c, c

        if case in ("whole", "sliding"):
            window = None if case == "whole" else 2
            ys = jaxbptt.scan(functools.partial(step, w), c, xs, window=window)[1]
            return jnp.sum(ys**2)
        if case == "layers":

            def by_layer(c, w):  # whose second product needs no state, and could go before the loop
                return step(w, c, jnp.dot(xs[0], w, out_sharding=spec))

            return jnp.sum(jaxbptt.scan(by_layer, c, layers, window=2)[0] ** 2)
        rec = jaxbptt.record(step, window=2, weights=case)
        tape, total = rec.init(w, c, xs[0]), 0.0
        for t in range(3):
            tape, y = rec(w, tape, xs[t])
            total += jnp.sum(y**2)
        return total

    of = 3 if case == "layers" else 0
    want = jax.grad(functools.partial(run, spec=None), of)(w, c, xs, layers)
    with entered(mesh_of("Explicit", data=2)):
        there = [P(reduced={"data"}), P("data"), P(None, "data"), P(reduced={"data"})]
        args = [jax.device_put(v, spec) for v, spec in zip((w, c, xs, layers), there, strict=True)]
        got = jax.jit(jax.grad(functools.partial(run, spec=P("data")), of))(*args)
        assert jax.typeof(got).sharding.spec.unreduced == {"data"}
        total = jax.device_get(jax.sharding.reshard(got, P()))
    oracles.check("reduced weights", total, want, 1e-12)


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="this version of JAX has another form")
def test_auto_axes_inside_a_step():
    def loss(w, scan):
        model = jax.sharding.auto_axes(lambda c: jnp.sin(w * c), out_sharding=P())
        return scan(lambda c, _: (model(c), None), 2.0, None, 3)[0]

    def plain(w):
        return jnp.sin(w * jnp.sin(w * jnp.sin(w * 2.0)))

    with entered(mesh()):
        whole = functools.partial(jaxbptt.scan, window=None)
        got = jax.jit(jax.grad(lambda w: loss(w, whole)))(1.5)
        said = r"^step must keep to the Explicit axes .* Put auto_axes around"
        with pytest.raises(ValueError, match=said):
            jax.jit(jax.grad(lambda w: loss(w, functools.partial(jaxbptt.scan, window=2))))(1.5)
        model = jax.sharding.auto_axes(lambda w, c: jnp.sin(w * c), out_sharding=P())
        with pytest.raises(ValueError, match=said):
            jaxbptt.record(lambda w, c, x: (model(w, c),) * 2, window=2).init(1.5, 2.0, None)
        around = jax.sharding.auto_axes(
            lambda w: jaxbptt.scan(lambda c, _: (jnp.sin(w * c), None), 2.0, None, 3, window=5)[0],
            out_sharding=P(),
        )
        outside = jax.jit(jax.grad(around))(1.5)
    for one in (got, outside):
        oracles.check("auto_axes", jax.device_get(one), jax.grad(plain)(1.5), 1e-12)


def recorded_on_the_mesh():
    """A recorder, and what it gave after a few steps over both axes: params, tape and y."""
    rec = jaxbptt.record(step, window=4)
    params, carry, xs = laid(mesh(), OVER_BOTH, ARGS)
    tape = rec.init(params, carry, xs[0])
    tape, ys = jax.jit(lambda tape: lax.scan(lambda t, x: rec(params, t, x), tape, xs[:6]))(tape)
    return rec, params, tape, ys[-1:]


def test_a_tape_goes_on_off_the_mesh():
    with entered(mesh()):
        rec, *recorded = recorded_on_the_mesh()
        want = jax.jit(rec.pullback)(*recorded)
    params, tape, ct_ys = jax.tree.map(jnp.asarray, jax.device_get(recorded))
    got = jax.jit(rec.pullback)(params, tape, ct_ys)
    for group in ("params", "carry", "xs"):
        off, on = getattr(got, group), jax.device_get(getattr(want, group))
        oracles.check("off the mesh", off, on, 1e-12)
    tape, _ = jax.jit(rec)(params, tape, ARGS[2][6])
    assert int(tape.length) == 4


@pytest.mark.exhaustive
def test_a_checkpoint_of_a_mesh_is_restored_off_it(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    with entered(mesh()):
        rec, params, tape, ct_ys = recorded_on_the_mesh()
        want = jax.device_get(jax.jit(rec.pullback)(params, tape, ct_ys).params)
        with jaxbptt.checkpoints(tmp_path / "saved", rec) as store:
            store.save(6, (params, tape))
    like = PARAMS, rec.init(PARAMS, CARRY, ARGS[2][0])
    (params, tape), _ = jaxbptt.checkpoints(tmp_path / "saved", rec).restore(like)
    got = jax.jit(rec.pullback)(params, tape, jax.device_get(ct_ys)).params
    oracles.check("restored off the mesh", got, want, 1e-12)
