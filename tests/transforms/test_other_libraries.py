"""Cells of dm-haiku and equinox as steps, against the unrolled graph."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import oracles
import pytest
from harness import draw, first, grid, moving_only, one_row
from jax import lax
from oracles import again, check, check_cotangents, drifting, moving, random_like, reach, refill

import jaxbptt

# What the library promises of any step is held elsewhere; these are steps of others.
pytestmark = pytest.mark.exhaustive

WINDOW, LENGTH = 3, 4
B, D, H = 3, 6, 8


@pytest.fixture(autouse=True)
def settings():
    with jax.numpy_dtype_promotion("standard"):  # haiku's dropout multiplies by a bool
        yield


class Case(NamedTuple):
    step: Any
    params: Any
    carry: Any


def filled(tree, seed):
    return refill(tree, [draw(seed + i, *v.shape) for i, v in enumerate(moving(tree))])


def held(name, case, xs, how):
    label = f"{name} | {how}"
    return hold_scan(case, xs, label) if how == "scan" else hold_recorder(case, xs, how, label)


def hold_recorder(case, xs, weights, label):
    # For parameters that change, "current" is defined by residuals and not by a graph.
    thetas = [case.params] * LENGTH if weights == "current" else drifting(case.params, LENGTH)
    run = oracles.Run(case.step, thetas, case.carry, xs, LENGTH)
    carries, ys = run.trajectory
    ct_y, ct_carry = random_like(ys[0], 1), random_like(carries[0], 2)
    rec = jaxbptt.record(case.step, window=WINDOW, weights=weights)

    @jax.jit
    def go(params, carry, thetas, xs):
        def one(tape, row):
            theta, x = row
            tape, y = rec(theta, tape, x)
            ct = rec.pullback(theta, tape, one_row(ct_y), ct_carry)
            return tape, (tape.carry, y, moving_only(ct))

        return lax.scan(one, rec.init(params, carry, first(xs)), (thetas, xs))[1]

    found = oracles.unstack(go(case.params, case.carry, oracles.stack(thetas), xs), LENGTH)
    for t in range(1, LENGTH + 1):
        carry, y, ct = found[t - 1]
        check(label, (carry, y), (carries[t - 1], ys[t - 1]), 1e-12)
        if weights == "replayed":
            of_window = again(run, thetas, t, WINDOW)
            want = of_window.unrolled(of_window.length, 1, [ct_y], ct_carry)
        else:
            want = run.unrolled(t, reach(t, WINDOW), [ct_y], ct_carry)
        check_cotangents(label, ct, want, 1e-12)


def hold_scan(case, xs, label):
    run = oracles.Run(case.step, case.params, case.carry, xs, LENGTH)
    carries, ys = run.trajectory
    cts = random_like((carries[0], oracles.stack(ys)), 1)

    def total(params):
        f = functools.partial(case.step, refill(case.params, params))
        out = jaxbptt.scan(f, case.carry, xs, window=WINDOW)
        return sum(jnp.sum(a * b) for a, b in zip(moving(cts), moving(out), strict=True))

    want = run.whole(WINDOW, 1, oracles.unstack(cts[1], LENGTH), cts[0])
    check(label, jax.jit(jax.grad(total))(moving(case.params)), want.params, 1e-12)


HOWS = ["stored", "current", "replayed", "scan"]


def cells_each_way(always):
    """All ways to a gradient: of each name those in the default tier."""
    cases = itertools.product(always, HOWS)
    chosen = [(name, how) for name, hows in always.items() for how in hows]
    return pytest.mark.parametrize(("name", "how"), grid(cases, always=chosen))


# --------------------------------------------------------------------------- dm-haiku


def haiku_cell(name):
    """Haiku puts x before the state, and the output before the new state."""
    hk = pytest.importorskip("haiku")
    core = getattr(hk, name)
    net = hk.without_apply_rng(hk.transform(lambda x, carry: core(H)(x, carry)))
    start = hk.without_apply_rng(hk.transform(lambda: core(H).initial_state(B)))
    carry = jax.eval_shape(start.apply, {})

    def step(params, carry, x):
        y, carry = net.apply(params, x, carry)
        return carry, y

    params = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((B, D)), carry)
    return Case(step, filled(params, 1), filled(carry, 50))


@cells_each_way({"VanillaRNN": ["scan"], "GRU": ["current"], "LSTM": ["stored"]})
def test_a_haiku_core(name, how):
    held(f"haiku {name}", haiku_cell(name), draw(99, LENGTH, B, D), how)


@pytest.mark.parametrize("how", grid(HOWS, always=["replayed"]))
def test_a_haiku_model_with_dropout_and_state(how):
    """With `transform_with_state`: its state and the key of the next step are in the carry."""
    hk = pytest.importorskip("haiku")

    def model(x, carry):
        y, carry = hk.DeepRNN([hk.GRU(H), jnp.tanh, hk.LSTM(7)])(x, carry)
        mean = hk.get_state("mean", y.shape[1:], y.dtype, init=jnp.zeros)
        hk.set_state("mean", 0.8 * mean + 0.2 * y.mean(0))
        return hk.dropout(hk.next_rng_key(), 0.4, y - mean[None]), carry

    net = hk.transform_with_state(model)

    def step(params, carry, x):
        carry, state, key = carry
        key, now = jax.random.split(key)
        (y, carry), state = net.apply(params, state, now, x, carry)
        return (carry, state, key), y

    cores = draw(50, B, H), hk.LSTMState(draw(51, B, 7), draw(52, B, 7))
    params, state = jax.jit(net.init)(jax.random.key(0), jnp.zeros((B, D)), cores)
    carry = cores, state, jax.random.key(3)
    held("haiku with state", Case(step, filled(params, 1), carry), draw(99, LENGTH, B, D), how)


# --------------------------------------------------------------------------- equinox


@cells_each_way({"GRUCell": ["replayed"], "LSTMCell": ["scan"]})
def test_an_equinox_cell(name, how):
    """A cell is a pytree of arrays alone, so it is params; `vmap` gives it its batch."""
    eqx = pytest.importorskip("equinox")
    cell = jax.eval_shape(lambda: getattr(eqx.nn, name)(D, H, key=jax.random.key(0)))

    def step(cell, carry, x):
        carry = jax.vmap(cell)(x, carry)
        return carry, carry[0] if name == "LSTMCell" else carry

    carry = (draw(50, B, H), draw(51, B, H)) if name == "LSTMCell" else draw(50, B, H)
    held(f"equinox {name}", Case(step, filled(cell, 1), carry), draw(99, LENGTH, B, D), how)


def equinox_model(eqx):
    class Model(eqx.Module):
        cell: eqx.nn.GRUCell
        head: eqx.nn.MLP  # its activation function is a leaf, though no array

        def __call__(self, carry, x):
            carry = self.cell(x, carry)
            return carry, self.head(carry)

    keys = jax.random.split(jax.random.key(0))
    return Model(eqx.nn.GRUCell(D, H, key=keys[0]), eqx.nn.MLP(H, 2, 5, 1, jnp.tanh, key=keys[1]))


# By default its gradient inside the loop, in the next test.
@pytest.mark.exhaustive
@pytest.mark.parametrize("how", HOWS)
def test_an_equinox_module_that_is_partitioned(how):
    eqx = pytest.importorskip("equinox")
    params, static = eqx.partition(equinox_model(eqx), eqx.is_inexact_array)

    def step(params, carry, x):
        return jax.vmap(eqx.combine(params, static))(carry, x)

    case = Case(step, filled(params, 1), draw(50, B, H))
    held("equinox partitioned", case, draw(99, LENGTH, B, D), how)


def test_equinox_own_gradient_inside_the_loop():
    eqx = pytest.importorskip("equinox")
    model = equinox_model(eqx)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    rec = jaxbptt.record(lambda p, c, x: jax.vmap(eqx.combine(p, static))(c, x), window=WINDOW)
    xs, tape = draw(99, LENGTH, B, D), None

    @eqx.filter_jit
    @functools.partial(eqx.filter_value_and_grad, has_aux=True)
    def grad(model, tape, x):
        tape, y = rec(eqx.filter(model, eqx.is_inexact_array), tape, x)
        return jnp.sum(y), tape

    tape = rec.init(params, jnp.zeros((B, H)), xs[0])
    run = oracles.Run(rec.step, params, jnp.zeros((B, H)), xs, LENGTH)
    for t in range(1, LENGTH + 1):
        (_, tape), grads = grad(model, tape, xs[t - 1])
        want = run.unrolled(t, reach(t, WINDOW), [jnp.ones((B, 2))])
        check("equinox, filter_grad", eqx.filter(grads, eqx.is_array), want.params, 1e-12)


def test_an_equinox_module_with_a_function_among_its_leaves_is_refused_with_a_remedy():
    eqx = pytest.importorskip("equinox")
    model = equinox_model(eqx)
    rec = jaxbptt.record(lambda model, c, x: jax.vmap(model)(c, x), window=WINDOW)
    with pytest.raises(
        ValueError, match=r"params\.head\.activation must be an array .* close over"
    ):
        rec.init(model, jnp.zeros((B, H)), jnp.zeros((B, D)))
