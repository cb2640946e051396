"""A recorder under JAX's transformations: vmap, shard_map, checkpoint, grad of grad, donation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxbptt

WINDOW, T = 3, 5
rng = np.random.default_rng(0)


def draw(*shape, dtype=jnp.float64):
    return jnp.asarray(0.5 * rng.normal(size=shape), dtype)


PARAMS = {"w": draw(4, 4), "u": draw(3, 4)}
H, XS = draw(2, 4), draw(T, 2, 3)


def step(params, h, x):
    h = jnp.tanh(h @ params["w"] + x @ params["u"])
    return h, jnp.mean(jnp.sin(h))


def online(recorder, params, tape, xs, rate=0.3):
    """SGD at every step: (parameters, tape), (losses, gradients)."""

    def one(state, x):
        params, tape = state

        def loss_fn(params):
            new_tape, y = recorder(params, tape, x)
            return y, new_tape

        (value, tape), ct = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return (jax.tree.map(lambda p, g: p - rate * g, params, ct), tape), (value, ct)

    return lax.scan(one, (params, tape), xs)


def recorded(recorder, steps=T, params=PARAMS):
    tape, call = recorder.init(params, H, XS[0]), jax.jit(recorder)
    for x in XS[:steps]:
        tape, _ = call(params, tape, x)
    return tape


# ---------------------------------------------------------------------- vmap

SEEDS = 3
ENSEMBLE = jax.tree.map(lambda v: jnp.stack([v, 0.5 * v, -v]), PARAMS)
CARRIES = jnp.stack([H, 2 * H, 0 * H])


def members(tree):
    return oracles.unstack(tree, SEEDS)


@pytest.mark.parametrize(("weights", "every"), [("stored", 2), ("current", 1)])
def test_vmap_over_tapes(weights, every):
    recorder = jaxbptt.record(step, window=WINDOW, every=every, weights=weights)
    tapes = jax.vmap(recorder.init, in_axes=(0, 0, None))(ENSEMBLE, CARRIES, XS[0])

    def grad(params, tape, x):
        def loss_fn(params):
            new_tape, y = recorder(params, tape, x)
            return y, new_tape

        return jax.grad(loss_fn, has_aux=True)(params)

    batched, single = jax.jit(jax.vmap(grad, in_axes=(0, 0, None))), jax.jit(grad)
    alone = [recorder.init(p, c, XS[0]) for p, c in zip(members(ENSEMBLE), CARRIES, strict=True)]
    for x in XS:
        got, tapes = batched(ENSEMBLE, tapes, x)
        pairs = [single(p, t, x) for p, t in zip(members(ENSEMBLE), alone, strict=True)]
        alone = [tape for _, tape in pairs]
        oracles.check("vmap over tapes", got, oracles.stack([ct for ct, _ in pairs]), 1e-12)
    pull = functools.partial(recorder.pullback, ct_ys=jnp.ones(2))
    got, pull = jax.jit(jax.vmap(pull))(ENSEMBLE, tapes), jax.jit(pull)
    want = [pull(p, t) for p, t in zip(members(ENSEMBLE), alone, strict=True)]
    oracles.check("vmap of pullback", got, oracles.stack(want), 1e-12)


def test_vmap_of_a_whole_run():
    recorder = jaxbptt.record(step, window=WINDOW)

    def run(params, carry, xs, rate):
        return online(recorder, params, recorder.init(params, carry, xs[0]), xs, rate)

    rates, drives = jnp.array([0.1, 0.5, 1.0]), jnp.stack([XS, -XS, 0.5 * XS])
    got = jax.jit(jax.vmap(run))(ENSEMBLE, CARRIES, drives, rates)
    single = jax.jit(run)
    want = [single(*args) for args in zip(members(ENSEMBLE), CARRIES, drives, rates, strict=True)]
    oracles.check("vmap of a run", got, oracles.stack(want), 1e-12)


def test_vmap_over_inputs_with_one_set_of_parameters():
    # The ordinary batch, made by vmap instead of by a leading axis of the step.
    recorder = jaxbptt.record(step, window=WINDOW)
    per_row = functools.partial(jax.tree.map, lambda v: v[:, None])
    batch = jax.vmap(recorder.init, in_axes=(None, 0, 0))(PARAMS, per_row(H), per_row(XS[0]))
    whole = recorder.init(PARAMS, H, XS[0])

    def of_rows(params, batch, x):
        tapes, y = jax.vmap(recorder, in_axes=(None, 0, 0))(params, batch, per_row(x))
        return y.mean(), tapes

    by_rows = jax.jit(jax.grad(of_rows, has_aux=True))
    at_once = jax.jit(jax.grad(lambda p, t, x: recorder(p, t, x)[::-1], has_aux=True))
    for x in XS:
        got, batch = by_rows(PARAMS, batch, x)
        want, whole = at_once(PARAMS, whole, x)
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


@needs_eight
@pytest.mark.parametrize(
    ("on_devices", "on_one", "weights", "every"),
    [
        (local_step, step, "stored", 1),
        (local_step, step, "current", 2),
        (collective_step, centred_step, "stored", 2),
        (collective_step, centred_step, "current", 1),
    ],
    ids=["loss, stored", "loss, current", "inside, stored", "inside, current"],
)
def test_shard_map_with_the_loop_inside(on_devices, on_one, weights, every):
    h, xs = draw(BATCH, 4), draw(T, BATCH, 3)

    def run(step):
        recorder = jaxbptt.record(step, window=WINDOW, every=every, weights=weights)

        def whole(params, h, xs):
            tape = recorder.init(params, h, xs[0])
            (params, tape), out = online(recorder, params, tape, xs)
            return params, tape.carry, out

        return whole

    specs = (P(), P("data"), P(None, "data"))
    got = sharded(run(on_devices), specs, (P(), P("data"), P()))(PARAMS, h, xs)
    want = jax.jit(run(on_one))(PARAMS, h, xs)
    oracles.check("shard_map", got, want, 1e-12)


@needs_eight
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
    run = jax.jit(functools.partial(online, recorder))
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

    want, want_tape = jax.grad(loss_fn, has_aux=True)(PARAMS, recorder)
    for call in (
        jax.checkpoint(recorder),
        jax.checkpoint(recorder, policy=jax.checkpoint_policies.dots_saveable),
        jax.jit(jax.checkpoint(recorder)),
    ):
        got, tape_out = jax.grad(loss_fn, has_aux=True)(PARAMS, call)
        oracles.check("checkpoint around a call", got, want, 1e-12)
        oracles.check("checkpoint around a call, tape", tape_out, want_tape, 1e-12)


def test_jit_in_scan_in_jit():
    recorder = jaxbptt.record(step, window=WINDOW)
    call = jax.jit(recorder)

    class Jitted:
        def __call__(self, *args):
            return call(*args)

    tape = recorder.init(PARAMS, H, XS[0])
    got = jax.jit(lambda p, t: online(Jitted(), p, t, XS))(PARAMS, tape)
    params, want = PARAMS, []
    for x in XS:  # no jit, no scan
        (params, tape), out = online(recorder, params, tape, x[None])
        want.append(jax.tree.map(lambda v: v[0], out))
    oracles.check("jit in scan in jit", got, ((params, tape), oracles.stack(want)), 1e-12)


def test_the_gradient_goes_on_into_what_is_around_the_call():
    # An encoder in front and a readout behind: both get the present step's share.
    recorder = jaxbptt.record(lambda p, h, x: (step(p, h, x)[0],) * 2, window=1)
    tape = recorder.init(PARAMS, H, XS[0])
    outer = {"encode": draw(3, 3), "read": draw(4, 2), "cell": PARAMS}

    def loss(outer, call):
        h = call(outer["cell"], jnp.sin(XS[0] @ outer["encode"]))
        return jnp.sum((h @ outer["read"]) ** 2)

    got = jax.grad(loss)(outer, lambda p, x: recorder(p, tape, x)[1])
    want = jax.grad(loss)(outer, lambda p, x: step(p, H, x)[0])
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


@pytest.fixture(params=["stored", "current"])
def second_order(request):
    """(the truncated gradient by the library, the same by hand), functions of the parameters."""
    thetas = oracles.drifting(PARAMS, 3)
    recorder = jaxbptt.record(step, window=WINDOW, weights=request.param)
    tape, call = recorder.init(PARAMS, H, XS[0]), jax.jit(recorder)
    for theta, x in zip(thetas, XS[:3], strict=True):
        tape, _ = call(theta, tape, x)

    def loss(params):
        new_tape, y = recorder(params, tape, XS[3])
        return y + jnp.sum(new_tape.carry**2)

    reference = REFERENCES[request.param]
    return jax.grad(loss), lambda params: reference(thetas, params, XS[3], H, XS[:3])


DIRECTION = {"w": draw(4, 4), "u": draw(3, 4)}


def test_first_order_agrees_with_the_hand_written_gradient(second_order):
    # Or the references of the tests below would show nothing.
    got, want = second_order
    oracles.check("first order", got(PARAMS), want(PARAMS), 1e-12)


def test_grad_of_grad(second_order):
    def size(gradient):
        return lambda params: sum(jnp.sum(v**2) for v in jax.tree.leaves(gradient(params)))

    got, want = (jax.jit(jax.grad(size(g)))(PARAMS) for g in second_order)
    oracles.check("grad of grad", got, want, 1e-12)


def test_jvp_of_grad(second_order):
    got, want = (
        jax.jit(lambda p, g=g: jax.jvp(g, (p,), (DIRECTION,)))(PARAMS) for g in second_order
    )
    oracles.check("jvp of grad", got, want, 1e-12)


def test_jacfwd_of_jacrev_is_jacrev_of_jacrev_and_not_symmetric(second_order):
    gradient, by_hand = second_order
    got, other = jax.jit(lambda p: (jax.jacfwd(gradient)(p), jax.jacrev(gradient)(p)))(PARAMS)
    oracles.check("jacfwd of jacrev", got, jax.jit(jax.jacfwd(by_hand))(PARAMS), 1e-12)
    oracles.check("jacrev of jacrev", other, got, 1e-12)
    block = np.asarray(got["w"]["w"]).reshape(16, 16)
    assert np.max(np.abs(block - block.T)) > 1e-3


def test_jvp_of_grad_finds_the_slope_of_the_gradient(second_order):
    gradient, eps = jax.jit(second_order[0]), 1e-5

    def moved(sign):
        return gradient(jax.tree.map(lambda p, d: p + sign * eps * d, PARAMS, DIRECTION))

    slope = jax.tree.map(lambda a, b: (a - b) / (2 * eps), moved(1), moved(-1))
    got = jax.jvp(gradient, (PARAMS,), (DIRECTION,))[1]
    oracles.check("jvp of grad, finite differences", got, slope, 1e-7)  # ε² and 1e-16/ε


def test_grad_of_a_pullback():
    # The pullback of a constant tape, as a function of its cotangents, is linear.
    recorder = jaxbptt.record(step, window=WINDOW)
    tape = recorded(recorder)

    def size(cts, lam):
        ct = recorder.pullback(PARAMS, tape, cts, lam)
        return sum(jnp.sum(v**2) for v in jax.tree.leaves(ct))

    cts, lam = draw(2), draw(2, 4)
    slope = jax.jit(jax.grad(size, argnums=(0, 1)))(cts, lam)
    along = sum(jnp.sum(a * b) for a, b in zip(slope, (cts, lam), strict=True))
    oracles.check("grad of a pullback", along, 2 * size(cts, lam), 1e-12)  # Euler, degree 2


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


@pytest.mark.parametrize("name", ["GRUCell", "LSTMCell"])
def test_flax_cells(name):
    linen = pytest.importorskip("flax.linen", reason="needs flax")
    cell = getattr(linen, name)(features=4, param_dtype=jnp.float64)
    carry = cell.initialize_carry(jax.random.key(0), (2, 3))
    carry = jax.tree.map(lambda v: v.astype(jnp.float64), carry)
    params = cell.init(jax.random.key(1), carry, XS[0])
    recorder = jaxbptt.record(cell.apply, window=WINDOW)  # its signature is a step's already
    ct_y = draw(2, 4)

    def loss_fn(params, tape, x):
        new_tape, y = recorder(params, tape, x)
        return jnp.sum(ct_y * y), new_tape

    grad = jax.jit(jax.grad(loss_fn, has_aux=True))
    reference = oracles.Run(cell.apply, params, carry, XS, T)
    tape = recorder.init(params, carry, XS[0])
    for t in range(1, T + 1):
        got, tape = grad(params, tape, XS[t - 1])
        want = reference.unrolled(t, oracles.reach(t, WINDOW), [ct_y])
        oracles.check(f"flax {name}", got, want.params, 1e-12)
