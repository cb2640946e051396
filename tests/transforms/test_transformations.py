"""A recorder under JAX's transformations: vmap, shard_map, checkpoint, grad of grad, donation."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from harness import drawer, grid, online, sgd
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxbptt

WINDOW, T = 3, 5
draw = drawer()


PARAMS = {"w": draw(4, 4), "u": draw(3, 4)}
H, XS = draw(2, 4), draw(T, 2, 3)


def step(params, h, x):
    h = jnp.tanh(h @ params["w"] + x @ params["u"])
    return h, jnp.mean(jnp.sin(h))


def descend(recorder, params, tape, xs, rate=0.3):
    """SGD at every step: (parameters, tape), (losses, gradients)."""

    return lax.scan(sgd(recorder, rate), (params, tape), xs)


@functools.partial(jax.jit, static_argnums=0)
def recorded(recorder):
    """The tape after a run."""
    tape = recorder.init(PARAMS, H, XS[0])
    return lax.scan(lambda tape, x: recorder(PARAMS, tape, x), tape, XS)[0]


# ---------------------------------------------------------------------- vmap

SEEDS = 3
ENSEMBLE = jax.tree.map(lambda v: np.stack([v, 0.5 * v, -v]), jax.device_get(PARAMS))
CARRIES = np.stack([H, 2 * H, 0 * H])


def members(tree):
    return oracles.unstack(jax.device_get(tree), SEEDS)


@pytest.mark.parametrize(
    ("weights", "every"), grid([("stored", 2), ("current", 1)], always=[("stored", 2)])
)
def test_vmap_over_tapes(weights, every):
    recorder = jaxbptt.record(step, window=WINDOW, every=every, weights=weights)

    def grad(params, tape, x):
        def loss_fn(params):
            new_tape, y = recorder(params, tape, x)
            return y, new_tape

        ct, tape = jax.grad(loss_fn, has_aux=True)(params)
        return tape, ct

    pull = functools.partial(recorder.pullback, ct_ys=np.ones(2))

    @jax.jit
    def of_all(ensemble, carries):
        tapes = jax.vmap(recorder.init, in_axes=(0, 0, None))(ensemble, carries, XS[0])
        batched = jax.vmap(grad, in_axes=(0, 0, None))
        tapes, cts = lax.scan(lambda tapes, x: batched(ensemble, tapes, x), tapes, XS)
        return jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), cts), jax.vmap(pull)(ensemble, tapes)

    @jax.jit
    def of_one(params, carry):
        tape = recorder.init(params, carry, XS[0])
        tape, cts = lax.scan(lambda tape, x: grad(params, tape, x), tape, XS)
        return cts, pull(params, tape)

    got = of_all(ENSEMBLE, CARRIES)
    want = [of_one(*args) for args in zip(members(ENSEMBLE), CARRIES, strict=True)]
    oracles.check("vmap over tapes", got[0], oracles.stack([cts for cts, _ in want]), 1e-12)
    oracles.check("vmap of pullback", got[1], oracles.stack([ct for _, ct in want]), 1e-12)


def test_vmap_of_a_whole_run():
    recorder = jaxbptt.record(step, window=WINDOW)

    def run(params, carry, xs, rate):
        return descend(recorder, params, recorder.init(params, carry, xs[0]), xs, rate)

    rates, drives = np.array([0.1, 0.5, 1.0]), np.stack([XS, -XS, 0.5 * XS])
    got = jax.jit(jax.vmap(run))(ENSEMBLE, CARRIES, drives, rates)
    single = jax.jit(run)
    want = [single(*args) for args in zip(members(ENSEMBLE), CARRIES, drives, rates, strict=True)]
    oracles.check("vmap of a run", got, oracles.stack(want), 1e-12)


@pytest.mark.exhaustive
def test_vmap_over_inputs_with_one_set_of_parameters():
    # The ordinary batch, made by vmap instead of by a leading axis of the step.
    recorder = jaxbptt.record(step, window=WINDOW)
    per_row = functools.partial(jax.tree.map, lambda v: v[:, None])

    def of_rows(params, batch, x):
        tapes, y = jax.vmap(recorder, in_axes=(None, 0, 0))(params, batch, per_row(x))
        return y.mean(), tapes

    def at_once(params, tape, x):
        tape, y = recorder(params, tape, x)
        return y, tape

    @functools.partial(jax.jit, static_argnums=0)
    def grads(loss_fn, tape):
        def one(tape, x):
            ct, tape = jax.grad(loss_fn, has_aux=True)(PARAMS, tape, x)
            return tape, ct

        return lax.scan(one, tape, XS)[1]

    init = functools.partial(recorder.init, PARAMS)
    batch = jax.jit(jax.vmap(init))(per_row(H), per_row(XS[0]))
    got, want = grads(of_rows, batch), grads(at_once, init(H, XS[0]))
    oracles.check("vmap over inputs", got, want, 1e-12)


# ----------------------------------------------------------------- shard_map

needs_eight = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight devices (the CPU has them under conftest.py)"
)
BATCH = 16


def sharded(function, in_specs, out_specs):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True)
    )


def collective_step(params, h, x):
    """Centres its state over the whole batch: a collective inside the step."""
    h = jnp.tanh(h @ params["w"] + x @ params["u"])
    h = h - lax.pmean(jnp.mean(h, axis=0, keepdims=True), "data")
    return h, lax.pmean(jnp.mean(jnp.sin(h)), "data")


def centred_step(params, h, x):
    h = jnp.tanh(h @ params["w"] + x @ params["u"])
    h = h - jnp.mean(h, axis=0, keepdims=True)
    return h, jnp.mean(jnp.sin(h))


def local_step(params, h, x):
    h, y = step(params, h, x)
    return h, lax.pmean(y, "data")


COLLECTIVES = {"loss": (local_step, step), "inside": (collective_step, centred_step)}


@needs_eight
@pytest.mark.parametrize(
    ("collective", "weights", "every"),
    grid(
        [
            ("loss", "stored", 1),
            ("loss", "current", 2),
            ("inside", "stored", 2),
            ("inside", "current", 1),
        ],
        always=[("inside", "stored", 2)],
    ),
)
def test_shard_map_with_the_loop_inside(collective, weights, every):
    on_devices, on_one = COLLECTIVES[collective]
    h, xs = draw(BATCH, 4), draw(T, BATCH, 3)

    def run(step):
        recorder = jaxbptt.record(step, window=WINDOW, every=every, weights=weights)

        def whole(params, h, xs):
            tape = recorder.init(params, h, xs[0])
            (params, tape), out = descend(recorder, params, tape, xs)
            return params, tape.carry, out

        return whole

    specs = (P(), P("data"), P(None, "data"))
    got = sharded(run(on_devices), specs, (P(), P("data"), P()))(PARAMS, h, xs)
    want = jax.jit(run(on_one))(PARAMS, h, xs)
    oracles.check("shard_map", got, want, 1e-12)


@needs_eight
@pytest.mark.exhaustive
def test_shard_map_of_a_pullback():
    h, xs = draw(BATCH, 4), draw(T, BATCH, 3)
    recorder = jaxbptt.record(lambda p, h, x: (step(p, h, x)[0],) * 2, window=WINDOW)
    cts, lam = draw(2, BATCH, 4), draw(BATCH, 4)

    def run(params, h, xs, cts, lam):
        tape = recorder.init(params, h, xs[0])
        tape = lax.scan(lambda t, x: recorder(params, t, x), tape, xs)[0]
        return recorder.pullback(params, tape, cts, lam)

    def summed(*args):
        ct = run(*args)
        # The parameters are replicated, so their cotangent may have been summed already.
        vary = [frozenset(getattr(jax.typeof(v), "vma", ())) for v in jax.tree.leaves(ct.params)]
        params = [
            lax.psum(v, "data") if a else v
            for v, a in zip(jax.tree.leaves(ct.params), vary, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(ct.params), params), ct.carry, ct.xs

    rows = P(None, "data")
    specs = (P(), P("data"), rows, rows, P("data"))
    got = sharded(summed, specs, (P(), P("data"), rows))(PARAMS, h, xs, cts, lam)
    want = jax.jit(run)(PARAMS, h, xs, cts, lam)
    oracles.check("pullback in shard_map", got, tuple(want), 1e-12)


@needs_eight
@pytest.mark.exhaustive
def test_a_tape_goes_in_and_out_of_shard_map():
    h, xs = draw(BATCH, 4), draw(T, BATCH, 3)
    recorder = jaxbptt.record(step, window=WINDOW, weights="current")
    shapes = jax.eval_shape(recorder.init, PARAMS, h, xs[0])
    tape = recorder.init(PARAMS, h, xs[0])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def spec(leaf):
        axes = ["data" if n == BATCH else None for n in leaf.shape]
        return jax.sharding.NamedSharding(mesh, P(*axes))

    # jit partitions the loop by itself when the tape is laid over the devices.
    placed = jax.device_put(tape, jax.tree.map(spec, shapes))
    xs_placed = jax.device_put(xs, jax.sharding.NamedSharding(mesh, P(None, "data")))
    run = jax.jit(functools.partial(descend, recorder))
    (params, out), _ = run(PARAMS, placed, xs_placed)
    (want, want_out), _ = run(PARAMS, tape, xs)
    oracles.check("a sharded tape under jit", (params, out), (want, want_out), 1e-12)
    assert len(out.carry.sharding.device_set) == 8


# --------------------------------------------------------- checkpoint and jit


def test_checkpoint_around_a_call():
    recorder = jaxbptt.record(step, window=WINDOW)
    tape = recorded(recorder)

    def loss_fn(params, call):
        new_tape, y = call(params, tape, XS[0])
        return y + jnp.sum(new_tape.carry**2), new_tape

    @jax.jit
    def all_ways(params):
        ways = (
            recorder,
            jax.checkpoint(recorder),
            jax.checkpoint(recorder, policy=jax.checkpoint_policies.dots_saveable),
            jax.jit(jax.checkpoint(recorder)),
        )
        return [jax.grad(loss_fn, has_aux=True)(params, call) for call in ways]

    (want, want_tape), *others = all_ways(PARAMS)
    for got, tape_out in others:
        oracles.check("checkpoint around a call", got, want, 1e-12)
        oracles.check("checkpoint around a call, tape", tape_out, want_tape, 1e-12)


def test_jit_in_scan_in_jit():
    recorder = jaxbptt.record(step, window=WINDOW)
    call = jax.jit(recorder)

    class Jitted:
        def __call__(self, *args):
            return call(*args)

    tape = recorder.init(PARAMS, H, XS[0])
    got = jax.jit(lambda p, t: descend(Jitted(), p, t, XS))(PARAMS, tape)
    params, want = PARAMS, []
    one = jax.jit(functools.partial(descend, recorder))
    for x in np.asarray(XS):  # each step by itself
        (params, tape), out = one(params, tape, x[None])
        want.append(out)
    want = jax.tree.map(lambda *rows: np.concatenate(rows), *want)
    oracles.check("jit in scan in jit", got, ((params, tape), want), 1e-12)


def test_the_gradient_goes_on_into_what_is_around_the_call():
    # An encoder in front and a readout behind: both get the present step's share.
    recorder = jaxbptt.record(lambda p, h, x: (step(p, h, x)[0],) * 2, window=1)
    tape = recorder.init(PARAMS, H, XS[0])
    outer = {"encode": draw(3, 3), "read": draw(4, 2), "cell": PARAMS}

    def loss(outer, call):
        h = call(outer["cell"], jnp.sin(XS[0] @ outer["encode"]))
        return jnp.sum((h @ outer["read"]) ** 2)

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    got = grad(outer, lambda p, x: recorder(p, tape, x)[1])
    want = grad(outer, lambda p, x: step(p, H, x)[0])
    oracles.check("encoder and readout", got, want, 1e-12)


# -------------------------------------------------------------- second order


def stored_gradient(thetas, params, x, h, xs):
    """The truncated gradient of y + Σc² as a function of `params`, by hand.

    The older steps are constants: closures at their own parameters.
    """
    pulls = []
    for theta, older in zip(thetas, xs, strict=True):
        (h, _), pull = jax.vjp(step, theta, h, older)
        pulls.append(pull)
    (new, _), pull = jax.vjp(step, params, h, x)
    total, lam, _ = pull((2 * new, jnp.ones(())))
    for pull in reversed(pulls[-(WINDOW - 1) :]):
        part, lam, _ = pull((lam, jnp.zeros(())))
        total = jax.tree.map(jnp.add, total, part)
    return total


def hand_cell(params, h, x):
    return jnp.tanh(h @ params["w"] + x @ params["u"])


def current_gradient(thetas, params, x, h, xs):
    """The same with the recorded activations and `params` for the matrices of all steps."""
    carries = [h]
    for theta, older in zip(thetas, xs, strict=True):
        carries.append(hand_cell(theta, carries[-1], older))
    carries.append(hand_cell(params, carries[-1], x))
    inputs = [*xs, x]
    new = carries[-1]
    lam = 2 * new + jnp.cos(new) / new.size
    total = {"w": jnp.zeros((4, 4)), "u": jnp.zeros((3, 4))}
    for s in range(len(inputs) - 1, len(inputs) - 1 - WINDOW, -1):
        z = lam * (1 - carries[s + 1] ** 2)
        total["w"] += carries[s].T @ z
        total["u"] += inputs[s].T @ z
        lam = z @ params["w"].T
    return total


REFERENCES = {"stored": stored_gradient, "current": current_gradient}


class SecondOrder(NamedTuple):
    """What is made of a truncated gradient as a function of the parameters.

    Attributes:
        gradient: itself.
        of_size: the gradient of the sum of its squares.
        along: its value and its derivative along a direction.
    """

    gradient: Any
    of_size: Any
    along: Any


DIRECTION = {"w": draw(4, 4), "u": draw(3, 4)}


def second_order_of(gradient):
    def size(params):
        return sum(jnp.sum(v**2) for v in jax.tree.leaves(gradient(params)))

    @jax.jit
    def all_of_it(params):
        along = jax.jvp(gradient, (params,), (DIRECTION,))
        return SecondOrder(along[0], jax.grad(size)(params), along)

    return all_of_it(PARAMS)


def truncated_gradients(weights):
    """The truncated gradient by the library and by hand, functions of the parameters."""
    thetas = oracles.drifting(PARAMS, 3)
    recorder = jaxbptt.record(step, window=WINDOW, weights=weights)

    @jax.jit
    def run(thetas):
        tape = recorder.init(PARAMS, H, XS[0])
        rows = thetas, XS[:3]
        return lax.scan(lambda tape, row: recorder(row[0], tape, row[1]), tape, rows)[0]

    tape = run(oracles.stack(thetas))

    def loss(params):
        new_tape, y = recorder(params, tape, XS[3])
        return y + jnp.sum(new_tape.carry**2)

    reference = REFERENCES[weights]
    return jax.grad(loss), lambda params: reference(thetas, params, XS[3], H, XS[:3])


@functools.cache
def second_order(weights):
    """(by the library, by hand), compiled once for the tests below."""
    return [jax.device_get(second_order_of(g)) for g in truncated_gradients(weights)]


with_each_weights = pytest.mark.parametrize("weights", ["stored", "current"])


@with_each_weights
def test_first_order_agrees_with_the_hand_written_gradient(weights):
    # Or the references of the tests below would show nothing.
    got, want = second_order(weights)
    oracles.check("first order", got.gradient, want.gradient, 1e-12)


@with_each_weights
def test_grad_of_grad(weights):
    got, want = second_order(weights)
    oracles.check("grad of grad", got.of_size, want.of_size, 1e-12)


@with_each_weights
def test_jvp_of_grad(weights):
    got, want = second_order(weights)
    oracles.check("jvp of grad", got.along, want.along, 1e-12)


@pytest.mark.parametrize("weights", grid(["stored", "current"], always=["current"]))
def test_jacfwd_of_jacrev_is_jacrev_of_jacrev_and_not_symmetric(weights):
    gradient, by_hand = truncated_gradients(weights)
    got, other = jax.jit(lambda p: (jax.jacfwd(gradient)(p), jax.jacrev(gradient)(p)))(PARAMS)
    oracles.check("jacfwd of jacrev", got, jax.jit(jax.jacfwd(by_hand))(PARAMS), 1e-12)
    oracles.check("jacrev of jacrev", other, got, 1e-12)
    block = np.asarray(got["w"]["w"]).reshape(16, 16)
    assert np.max(np.abs(block - block.T)) > 1e-3


@pytest.mark.parametrize("weights", grid(["stored", "current"], always=["stored"]))
def test_jvp_of_grad_finds_the_slope_of_the_gradient(weights):
    gradient, eps = jax.jit(truncated_gradients(weights)[0]), 1e-5

    def moved(sign):
        params, direction = jax.device_get((PARAMS, DIRECTION))
        there = jax.tree.map(lambda p, d: p + sign * eps * d, params, direction)
        return jax.device_get(gradient(there))

    slope = jax.tree.map(lambda a, b: (a - b) / (2 * eps), moved(1), moved(-1))
    got = second_order(weights)[0].along[1]
    oracles.check("jvp of grad, finite differences", got, slope, 1e-7)  # ε² and 1e-16/ε


def test_grad_of_a_pullback():
    # The pullback of a constant tape, as a function of its cotangents, is linear.
    recorder = jaxbptt.record(step, window=WINDOW)
    tape = recorded(recorder)

    def size(cts, lam):
        ct = recorder.pullback(PARAMS, tape, cts, lam)
        return sum(jnp.sum(v**2) for v in jax.tree.leaves(ct))

    cts, lam = draw(2), draw(2, 4)
    value, slope = jax.jit(jax.value_and_grad(size, argnums=(0, 1)))(cts, lam)
    along = sum(np.sum(a * b) for a, b in zip(slope, (cts, lam), strict=True))
    oracles.check("grad of a pullback", along, 2 * np.asarray(value), 1e-12)  # Euler, degree 2


def test_forward_mode_through_a_call_is_refused_by_jax():
    recorder = jaxbptt.record(step, window=WINDOW)
    tape = recorded(recorder)
    with pytest.raises(
        TypeError,
        match=r"forward-mode autodiff \(jvp\)",
    ):
        jax.jvp(lambda p: recorder(p, tape, XS[0])[1], (PARAMS,), (DIRECTION,))


# ------------------------------------------------------------------ donation


def big_recorder():
    """A ring of 100 MB: 50 slots of two float32[512, 512]."""
    recorder = jaxbptt.record(lambda p, c, x: (jnp.tanh(p * c) + x, None), window=50)
    params = jnp.float32(0.5)
    carry = jnp.ones((512, 512), jnp.float32)
    return recorder, params, recorder.init(params, carry, jnp.float32(0.1))


@pytest.mark.compiled
def test_a_donated_ring_is_updated_in_place():
    recorder, params, tape = big_recorder()
    assert tape.nbytes >= 100e6

    @functools.partial(jax.jit, donate_argnums=1)
    def update(params, tape, x):
        def loss_fn(params):
            new_tape, _ = recorder(params, tape, x)
            return new_tape.carry.mean(), new_tape

        ct, tape = jax.grad(loss_fn, has_aux=True)(params)
        return params - ct, tape

    def rings(tape):
        return [v for v in jax.tree.leaves(tape) if v.shape[:1] == (50,) and v.nbytes > 1e6]

    x = jnp.float32(0.1)
    before = rings(tape)
    where = sorted(v.unsafe_buffer_pointer() for v in before)
    for _ in range(3):
        params, tape = update(params, tape, x)
    assert sorted(v.unsafe_buffer_pointer() for v in rings(tape)) == where
    assert all(v.is_deleted() for v in before)
    compiled = update.lower(params, tape, x).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= tape.nbytes
    assert memory.temp_size_in_bytes < tape.nbytes / 4


def test_a_tape_from_init_can_be_donated_and_the_callers_carry_survives():
    recorder = jaxbptt.record(step, window=WINDOW)
    carry = H + 0
    tape = recorder.init(PARAMS, carry, XS[0])
    jax.jit(recorder, donate_argnums=1)(PARAMS, tape, XS[0])
    assert jax.tree.leaves(tape)[0].is_deleted()
    np.testing.assert_array_equal(carry, H)
    np.testing.assert_array_equal(PARAMS["w"] + 0, PARAMS["w"])


def test_a_cleared_tape_can_be_donated():
    recorder = jaxbptt.record(step, window=WINDOW)
    tape = recorder.clear(recorded(recorder))
    tape, _ = jax.jit(recorder, donate_argnums=1)(PARAMS, tape, XS[0])
    assert int(tape.length) == 1


# ---------------------------------------------------------------------- flax


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["GRUCell", "LSTMCell"])
def test_flax_cells(name):
    linen = pytest.importorskip("flax.linen", reason="needs flax")
    cell = getattr(linen, name)(features=4, param_dtype=jnp.float64)
    carry = cell.initialize_carry(jax.random.key(0), (2, 3))
    carry = jax.tree.map(lambda v: v.astype(jnp.float64), carry)
    params = cell.init(jax.random.key(1), carry, XS[0])
    recorder = jaxbptt.record(cell.apply, window=WINDOW)  # its signature is a step's already
    ct_y = draw(2, 4)
    reference = oracles.Run(cell.apply, params, carry, XS, T)
    found = online(recorder, reference, [ct_y] * T)
    for t, (got, _) in enumerate(found.grads, start=1):
        want = reference.unrolled(t, oracles.reach(t, WINDOW), [ct_y])
        oracles.check(f"flax {name}", got, want.params, 1e-12)


@pytest.mark.parametrize("way", ["scan", "scan, no window", "record", "replayed", "pace"])
def test_no_tracer_outlives_its_trace(way):
    """What the derivative's rules close over is kept with the program: it may hold no array."""

    def loss(a):
        if way.startswith("scan"):
            window = None if way == "scan, no window" else 2
            return jaxbptt.scan(
                lambda c, x: (jnp.tanh(c + a * x), c), a, XS[:, 0, 0], window=window
            )[0]
        weights = "replayed" if way == "replayed" else "current"
        how = {"weights": weights, "pace": 1 if way == "pace" else None}
        rec = jaxbptt.record(lambda w, c, x: (jnp.tanh(w * c + a),) * 2, window=2, **how)
        return rec(a, rec.init(a, a, a), a)[1]

    want = jax.value_and_grad(loss)(0.3)
    with jax.checking_leaks():
        got = jax.jit(jax.value_and_grad(loss))(0.3)
        # Where nobody differentiates the rules are only looked at.
        forward = jax.jit(loss)(0.3), jax.vmap(loss)(jnp.array([0.3]))[0]
    np.testing.assert_allclose(got, want, rtol=1e-13)
    np.testing.assert_allclose(forward, want[0], rtol=1e-13)
