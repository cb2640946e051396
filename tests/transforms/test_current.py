"""weights="current": nothing that is independent of carry and x is on the ring."""

import functools
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from harness import grid
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jaxbptt

# Batch, input, state, layers and steps: all different, so that a shape tells what it is.
B, D, H, L, WINDOW = 3, 5, 7, 2, 11
POLICIES = jax.checkpoint_policies
BF16 = jnp.bfloat16


class Cell(NamedTuple):
    step: Any
    params: Any
    carry: Any


draw = functools.partial(harness.draw, scale=0.4)


def slot_shapes(recorder, params, carry, x):
    """Shapes of what one step leaves on the ring."""
    tape = jax.eval_shape(recorder.init, params, carry, x)
    ring = [v for v in jax.tree.leaves(tape) if v.shape[:1] == (recorder.window,)]
    assert sum(v.size * v.dtype.itemsize for v in ring) == tape.nbytes
    return [v.shape[1:] for v in ring]


# ------------------------------------------------------ figures of three cells


def squares(h, params):
    return jnp.sum((h @ params["wy"]) ** 2)


def tanh_rnn(params, h, x):
    h = jnp.tanh(x @ params["wx"] + h @ params["wh"] + params["b"][None])
    return h, squares(h, params)


def fused_gru(params, h, x):
    ur, uz, un = jnp.split(x @ params["wx"] + params["b"][None], 3, axis=1)
    wr, wz, wn = jnp.split(params["wh"], 3, axis=1)
    r, z = jax.nn.sigmoid(ur + h @ wr), jax.nn.sigmoid(uz + h @ wz)
    h = (1 - z) * jnp.tanh(un + (r * h) @ wn) + z * h
    return h, squares(h, params)


def lstm(params, carry, x):
    h, c = carry
    gates = x @ params["wx"] + h @ params["wh"] + params["b"][None]
    i, f, g, o = jnp.split(gates, 4, axis=1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), squares(h, params)


@pytest.mark.parametrize(
    ("step", "blocks", "states", "stored", "current"),
    [
        (tanh_rnn, 1, 1, 328.5, 68.5),
        (fused_gru, 3, 1, 904.5, 132.5),
        (lstm, 4, 2, 1256.5, 228.5),
    ],
    ids=["tanh RNN", "fused GRU", "LSTM"],
)
def test_kibibytes_per_step(step, blocks, states, stored, current):
    """Batch 32, 256 units, 32 inputs without a gradient, a readout of 4, float32.

    The derivatives that `jax.vjp` keeps beside a sigmoid's or a tanh's value are not there.
    """

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    params = {
        "wx": array(32, blocks * 256),
        "wh": array(256, blocks * 256),
        "b": array(blocks * 256),
        "wy": array(256, 4),
    }
    carry = array(32, 256) if states == 1 else (array(32, 256),) * states

    def kibibytes(weights):
        recorder = jaxbptt.record(
            lambda p, c, x: step(p, c, lax.stop_gradient(x)), window=20, weights=weights
        )
        return jax.eval_shape(recorder.init, params, carry, array(32, 32)).nbytes / 20 / 1024

    assert (kibibytes("stored"), kibibytes("current")) == (stored, current)


# -------------------------------------------------- decided by what depends on what


CELLS = {}


def cell(make):
    CELLS[make.__name__] = make
    return make


def weights_of(seed=1):
    return {"wx": draw(seed, D, H), "wh": draw(seed + 1, H, H), "b": draw(seed + 2, H)}


def rnn(params, h, x):
    return jnp.tanh(x @ params["wx"] + h @ params["wh"] + params["b"][None])


def with_y(h):
    return h, jnp.sin(h).sum()


STATE = draw(8, B, H)


@cell
def verbatim():
    return Cell(lambda p, h, x: with_y(rnn(p, h, x)), weights_of(), STATE)


@cell
def slices_of_a_fused_cell():
    params = {"wx": draw(1, D, 3 * H), "wh": draw(2, H, 3 * H), "b": draw(3, 3 * H)}
    return Cell(fused_gru, params | {"wy": draw(4, H, 4)}, STATE)


def bf16_rnn(params, h, x):
    half = jax.tree.map(lambda v: v.astype(BF16), params)
    return rnn(half, h.astype(BF16), x.astype(BF16)).astype(h.dtype)


@cell
def casts_to_bfloat16():
    return Cell(lambda p, h, x: with_y(bf16_rnn(p, h, x)), weights_of(), STATE)


def normalised(w):
    return w / jnp.linalg.norm(w, axis=0, keepdims=True)


def normalised_step(params, h, x):
    return with_y(rnn(params | {"wh": normalised(params["wh"])}, h, x))


@cell
def normalised_weights():
    return Cell(normalised_step, weights_of(), STATE)


@cell
def through_jit():
    half = jax.jit(lambda p: jax.tree.map(lambda v: v.astype(BF16), p))
    inner = jax.jit(bf16_rnn)

    @jax.jit
    def step(params, h, x):
        h = inner(params, h, x)
        return with_y(rnn(half(params), h.astype(BF16), x.astype(BF16)).astype(h.dtype))

    return Cell(step, weights_of(), STATE)


@cell
def through_vmap():
    def step(params, h, x):
        return with_y(jax.vmap(lambda h, x: bf16_rnn(params, h[None], x[None])[0])(h, x))

    return Cell(step, weights_of(), STATE)


@cell
def checkpoint():
    return Cell(jax.checkpoint(normalised_step), weights_of(), STATE)


@cell
def checkpoint_that_saves_dots():
    @functools.partial(jax.checkpoint, policy=POLICIES.dots_saveable)
    def step(params, h, x):
        product = params["wh"] @ params["wh"].T  # a dot of parameters alone
        return with_y(rnn(params | {"wh": product}, h, x))

    return Cell(step, weights_of(), STATE)


@cell
def checkpoint_that_saves_a_name():
    @functools.partial(jax.checkpoint, policy=POLICIES.save_only_these_names("unit"))
    def step(params, h, x):
        unit = checkpoint_name(normalised(params["wh"]), "unit")
        return with_y(rnn(params | {"wh": unit}, h, x))

    return Cell(step, weights_of(), STATE)


@cell
def checkpoint_off_the_gradient_path():
    @jax.checkpoint
    def both(params, h, x):
        return normalised(params["wh"]), rnn(params, h, x)

    def step(params, h, x):
        unit, ahead = both(*lax.stop_gradient((params, h, x)))
        return with_y(rnn(params | {"wh": unit}, h + ahead, x))

    return Cell(step, weights_of(), STATE)


def layer(h, pair):
    params, below = pair
    return bf16_rnn(params, below, h), bf16_rnn(params, below, h)


STACKED = {"wx": draw(1, L, H, H), "wh": draw(2, L, H, H), "b": draw(3, L, H)}


@cell
def scan_over_stacked_layers():
    # The casts are inside the body of the scan.
    def step(params, carry, x):
        top, carry = lax.scan(layer, x @ params["wx"], (params["layers"], carry))
        return carry, top.sum()

    return Cell(step, {"wx": draw(7, D, H), "layers": STACKED}, draw(8, L, B, H))


@cell
def scan_under_checkpoint_under_jit():
    @jax.jit
    def step(params, carry, x):
        saved = jax.checkpoint(layer, policy=POLICIES.dots_saveable)
        top, carry = lax.scan(saved, x @ params["wx"], (params["layers"], carry))
        return carry, top.sum()

    return Cell(step, {"wx": draw(7, D, H), "layers": STACKED}, draw(8, L, B, H))


@cell
def scan_that_carries_a_product_of_parameters():
    # Power iteration beside the activations: one carry is known and one is not.
    def step(params, h, x):
        def trip(state, _):
            v, h = state
            v = v @ params["wh"] / jnp.linalg.norm(v @ params["wh"])
            return (v, jnp.tanh(h * v[None] + x @ params["wx"])), None

        (v, h), _ = lax.scan(trip, (params["b"], h), None, length=2)
        return with_y(h @ params["wh"] / v.sum())

    return Cell(step, weights_of(), STATE)


@cell
def cond_on_the_parameters():
    def step(params, h, x):
        wh = lax.cond(
            params["b"][0] > 0,
            lambda w: normalised(w),
            lambda w: w.astype(BF16).astype(w.dtype),
            params["wh"],
        )
        return with_y(rnn(params | {"wh": wh}, h, x))

    return Cell(step, weights_of(), STATE)


@cell
def activations_in_a_cond_on_the_parameters():
    def step(params, h, x):
        return with_y(
            lax.cond(
                params["b"][0] > 0,
                lambda: bf16_rnn(params, h, x),
                lambda: rnn(params | {"wh": normalised(params["wh"])}, h, x),
            )
        )

    return Cell(step, weights_of(), STATE)


@jax.custom_vjp
def quantised(w):
    return jnp.round(8 * w) / 8


quantised.defvjp(
    lambda w: (quantised(w), jnp.abs(w) < 1), lambda inside, ct: (jnp.where(inside, ct, 0.0),)
)


@cell
def straight_through_quantiser():
    def step(params, h, x):
        return with_y(rnn(jax.tree.map(quantised, params), h, x))

    return Cell(step, weights_of(), STATE)


@cell
def positive_weights():
    def step(params, h, x):
        return with_y(rnn(params | {"wh": jax.nn.softplus(jax.nn.relu(params["wh"]))}, h, x))

    return Cell(step, weights_of(), STATE)


@cell
def a_loop_over_the_parameters():
    def step(params, h, x):
        frozen = lax.stop_gradient(params["wh"])
        size = lax.while_loop(lambda s: s < jnp.abs(frozen).sum(), lambda s: 2 * s, 1.0)
        return with_y(rnn(params | {"wh": params["wh"] / size}, h, x))

    return Cell(step, weights_of(), STATE)


@cell
def a_mask_from_a_key_in_the_parameters():
    def step(params, h, x):
        mask = jax.random.bernoulli(params["key"], 0.5, (H, H))
        return with_y(rnn(params["rnn"] | {"wh": jnp.where(mask, params["rnn"]["wh"], 0)}, h, x))

    return Cell(step, {"rnn": weights_of(), "key": jax.random.key(1)}, STATE)


@cell
def closed_over_and_cast():
    frozen, table = draw(1, H, H), np.eye(H)

    def step(params, h, x):
        half = frozen.astype(BF16) @ table.astype(BF16)
        h = (h.astype(BF16) @ half).astype(h.dtype)
        return with_y(rnn(params, h, x))

    return Cell(step, weights_of(), STATE)


def inputs(length):
    return draw(9, length, B, D)


@pytest.mark.parametrize("name", CELLS)
def test_nothing_without_a_batch_axis_is_on_the_ring(name):
    step, params, carry = CELLS[name]()

    def without_batch(weights):
        recorder = jaxbptt.record(step, window=WINDOW, weights=weights)
        return [s for s in slot_shapes(recorder, params, carry, inputs(1)[0]) if B not in s]

    assert without_batch("current") == []
    assert without_batch("stored") != []


# That the ring holds no parameters is looked at in shapes above, of all cells; here in values.
SAMPLE = [
    "slices_of_a_fused_cell",
    "checkpoint_that_saves_a_name",
    "scan_that_carries_a_product_of_parameters",
    "activations_in_a_cond_on_the_parameters",
    "a_loop_over_the_parameters",
    "a_mask_from_a_key_in_the_parameters",
    "closed_over_and_cast",
]


@pytest.mark.parametrize("name", grid(["slices_of_a_fused_cell", *list(CELLS)[5:]], always=SAMPLE))
def test_every_leaf_of_the_ring_depends_on_carry_or_x(name):
    """Two steps with the same parameters and another carry and x: no slot is the same."""
    step, params, carry = CELLS[name]()
    recorder = jaxbptt.record(step, window=WINDOW, weights="current")
    call = jax.jit(recorder)
    tape = jax.jit(recorder.init)(params, carry, inputs(1)[0])
    empty = [np.asarray(v) for v in jax.tree.leaves(tape) if v.shape[:1] == (WINDOW,)]
    for x in inputs(2):
        tape, _ = call(params, tape, x)
        tape = tape.replace(
            carry=jax.tree.map(lambda v: jnp.asarray(-0.7 * np.asarray(v) + 0.1), tape.carry)
        )
    ring = [np.asarray(v) for v in jax.tree.leaves(tape) if v.shape[:1] == (WINDOW,)]
    pairs = []
    for leaf, was in zip(ring, empty, strict=True):
        # Wherever the library writes its slots: those that were written are no longer zeros.
        # A slot may stay zero, in a branch that isn't taken; what is kept of parameters doesn't.
        pairs.append([slot for slot, old in zip(leaf, was, strict=True) if np.any(slot != old)])
    pairs = [slots for slots in pairs if len(slots) == 2]
    assert pairs
    assert not [one.shape for one, other in pairs if np.array_equal(one, other)]


# ------------------------------------------------------- whose parameters


def tanh_pullback(wh, hs, xs, lam, ct_y):
    """Backward pass by hand of y = Σ sin(h): recorded states hs, the matrix wh handed in."""
    ct = {"wx": 0.0, "wh": 0.0, "b": 0.0}
    lam = lam + ct_y * np.cos(hs[-1])
    for s in range(len(xs) - 1, -1, -1):
        z = lam * (1 - hs[s + 1] ** 2)
        ct["wx"] += xs[s].T @ z
        ct["wh"] += hs[s].T @ z
        ct["b"] += z.sum(0)
        lam = z @ wh.T
    return ct, lam


def recorded(step, thetas, xs, weights):
    recorder = jaxbptt.record(step, window=3, weights=weights)
    tape, carries = jax.jit(recorder.init)(thetas[0], STATE, xs[0]), [STATE]
    call = jax.jit(recorder)
    for theta, x in zip(thetas, xs, strict=True):
        tape, _ = call(theta, tape, x)
        carries.append(tape.carry)
    return recorder, tape, [np.asarray(c) for c in carries]


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_pullback_takes_the_callers_parameters(jit):
    xs, new = inputs(4), weights_of(30)
    thetas = oracles.drifting(weights_of(), 4)
    recorder, tape, hs = recorded(CELLS["verbatim"]().step, thetas, xs, "current")
    lam = draw(10, B, H)
    pull = jax.jit(recorder.pullback) if jit else recorder.pullback
    got = pull(new, tape, jnp.ones(1), lam)
    want, last = tanh_pullback(np.asarray(new["wh"]), hs[1:], np.asarray(xs[1:]), lam, 1.0)
    oracles.check("current, by hand", (got.params, got.carry), (want, last), 1e-12)


def test_pullback_derives_from_the_callers_parameters():
    xs, new = inputs(4), weights_of(30)
    thetas = oracles.drifting(weights_of(), 4)
    recorder, tape, hs = recorded(normalised_step, thetas, xs, "current")
    got = jax.jit(recorder.pullback)(new, tape, np.ones(1))
    unit = jax.jit(normalised)(new["wh"])
    want, last = tanh_pullback(np.asarray(unit), hs[1:], np.asarray(xs[1:]), 0.0, 1.0)
    back = jax.jit(lambda w, ct: jax.vjp(normalised, w)[1](ct)[0])
    want["wh"] = back(new["wh"], want["wh"])
    oracles.check("current, derived", (got.params, got.carry), (want, last), 1e-12)


def test_the_loop_takes_the_parameters_of_the_present_step():
    xs, thetas = inputs(4), oracles.drifting(weights_of(), 4)
    step = CELLS["verbatim"]().step
    recorder, tape, hs = recorded(step, thetas[:3], xs[:3], "current")
    got = jax.jit(jax.grad(lambda p, tape: recorder(p, tape, xs[3])[1]))(thetas[3], tape)
    hs.append(np.asarray(jax.jit(step)(thetas[3], hs[-1], xs[3])[0]))
    want, _ = tanh_pullback(np.asarray(thetas[3]["wh"]), hs[1:], np.asarray(xs[1:]), 0.0, 1.0)
    oracles.check("current, in the loop", got, want, 1e-12)


def test_stored_ignores_the_values_of_the_callers_parameters():
    xs, thetas = inputs(4), oracles.drifting(weights_of(), 4)
    recorder, tape, _ = recorded(CELLS["verbatim"]().step, thetas, xs, "stored")
    pull = jax.jit(recorder.pullback)
    same, got = (pull(theta, tape, np.ones(1)) for theta in (thetas[-1], weights_of(30)))
    oracles.check("stored, other parameters", got.params, same.params, 0.0)
    current, other, _ = recorded(CELLS["verbatim"]().step, thetas, xs, "current")
    moved = jax.jit(current.pullback)(thetas[-1], other, np.ones(1))
    assert oracles.relative_error(moved.params, same.params) > 1e-3


def test_what_was_made_with_parameters_is_not_made_again_with_others():
    """(a sin h)² needs sin h and a sin h; the second is cheaply made of the first, with a."""

    def step(a, h, x):
        s = jnp.sin(h + x)
        return s, (a * s) ** 2

    rec = jaxbptt.record(step, window=1, weights="current")
    tape, _ = rec(3.0, rec.init(3.0, 0.5, 0.0), 0.2)
    s = np.sin(0.7)
    got = rec.pullback(7.0, tape, jnp.ones(1)).params
    np.testing.assert_allclose(got, 2 * (3.0 * s) * s, rtol=1e-14)
