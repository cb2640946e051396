"""`scan` in the place of `lax.scan` inside of packages: their loops, whole and cut."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import oracles
import pytest
from harness import draw, worst
from jax import lax
from oracles import moving, random_like, refill

import jaxbptt

LENGTH, B, D, H = 5, 2, 3, 4
XS = draw(0, LENGTH, B, D)


@contextlib.contextmanager
def every_scan(**how):
    plain = lax.scan
    jax.lax.scan = functools.partial(jaxbptt.scan, **how)
    try:
        yield
    finally:
        jax.lax.scan = plain


@pytest.fixture(autouse=True)
def settings():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def filled(tree, seed=1):
    return refill(tree, [draw(seed + i, *v.shape) for i, v in enumerate(moving(tree))])


def haiku_unrolled():
    """A core's parameters, its loop, and one step of it."""
    hk = pytest.importorskip("haiku")

    def loop(xs):
        core = hk.LSTM(H)
        return hk.dynamic_unroll(core, xs, core.initial_state(B))[0]

    net = hk.without_apply_rng(hk.transform(loop))
    cell = hk.without_apply_rng(hk.transform(lambda x, carry: hk.LSTM(H)(x, carry)))
    params = filled(jax.eval_shape(net.init, jax.random.key(0), XS))
    carry = hk.LSTMState(jnp.zeros((B, H)), jnp.zeros((B, H)))
    return params, net.apply, lambda p, c, x: cell.apply(p, x, c)[::-1], carry


def flax_rnn():
    nn = pytest.importorskip("flax.linen")
    cell = nn.GRUCell(H, param_dtype=float)
    net = nn.RNN(cell, time_major=True)
    params = filled(jax.eval_shape(net.init, jax.random.key(0), XS))
    of_cell = lambda p: {"params": p["params"]["cell"]}  # noqa: E731
    return params, net.apply, lambda p, c, x: cell.apply(of_cell(p), c, x), jnp.zeros((B, H))


def nnx_rnn():
    nnx = pytest.importorskip("flax.nnx")
    cell = nnx.SimpleCell(D, H, rngs=nnx.Rngs(0), dtype=float, param_dtype=float)
    graph, params, rest = nnx.split(nnx.RNN(cell, time_major=True), nnx.Param, ...)

    def loop(p, xs):
        return nnx.merge(graph, p, rest, copy=True)(xs)

    def step(p, c, x):
        return nnx.merge(graph, p, rest).cell(c, x)

    return filled(params), loop, step, jnp.zeros((B, H))


PACKAGES = {"haiku": haiku_unrolled, "flax": flax_rnn, "nnx": nnx_rnn}


@pytest.mark.parametrize("package", list(PACKAGES))
def test_a_loop_of_a_package_is_differentiated_as_it_was_or_cut(package):
    params, loop, step, carry = PACKAGES[package]()
    run = oracles.Run(step, params, carry, XS, LENGTH)
    ys = run.trajectory[1]
    cts = [random_like(y, s) for s, y in enumerate(ys)]

    def loss(p):
        ys = loop(p, XS)
        return jnp.sum(ys * jnp.stack(cts)), ys

    def gradient():
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (_, plain_ys), plain = gradient()
    with every_scan(window=None):
        (_, same_ys), same = gradient()
    with every_scan(window=2):
        (_, cut_ys), cut = gradient()
    (_, _), again = gradient()
    assert worst(plain_ys, jnp.stack(ys)) < 1e-13  # the step is what the package's loop runs
    assert worst([same_ys, cut_ys], [plain_ys, plain_ys]) < 1e-13
    assert worst(moving(same), moving(plain)) < 1e-12
    assert worst(moving(again), moving(plain)) < 1e-14
    assert worst(moving(cut), moving(plain)) > 1e-3
    nothing = jax.tree.map(jnp.zeros_like, run.trajectory[0][-1])
    error = worst(moving(cut), run.whole(2, 1, cts, nothing).params)
    # The loop of nnx carries the module, and so its weights: they are cut as the state is.
    assert error > 0.1 if package == "nnx" else error < 1e-12
