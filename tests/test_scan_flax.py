"""flax modules called inside `scan`: linen applied to closed-over variables, nnx closed over."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from test_scan import draw, worst

import jaxbptt

CELLS = [nn.SimpleCell, nn.GRUCell, nn.MGUCell, nn.LSTMCell, nn.OptimizedLSTMCell]


def chunked(window, f, init, xs):
    """Truncation by hand: chunks of `window` steps with a detached carry between them."""
    parts = []
    for start in range(0, xs.shape[0], window):
        init, ys = lax.scan(f, init, xs[start : start + window])
        init = lax.stop_gradient(init)
        parts.append(ys)
    return init, jnp.concatenate(parts)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.__name__)
def test_a_linen_cell_gives_what_it_gives_by_hand(cell):
    module = cell(4, param_dtype=float)
    xs = draw(0, 7, 2, 3)
    init = module.initialize_carry(jax.random.key(0), xs[0].shape)
    variables = module.init(jax.random.key(1), init, xs[0])

    def loss(scan, variables):
        return jnp.sum(scan(lambda c, x: module.apply(variables, c, x), init, xs)[1] ** 2)

    for ours, theirs in (
        (functools.partial(jaxbptt.scan, window=None), lax.scan),
        (
            functools.partial(jaxbptt.scan, window=3, every=3),
            functools.partial(chunked, 3),
        ),
    ):
        got, want = (jax.grad(functools.partial(loss, scan))(variables) for scan in (ours, theirs))
        assert worst(got, want) < 1e-12


def test_an_nnx_module_that_is_closed_over():
    model = nnx.GRUCell(3, 4, param_dtype=float, rngs=nnx.Rngs(0))
    xs, init = draw(0, 7, 2, 3), draw(1, 2, 4)

    def loss(scan, model):
        return jnp.sum(scan(lambda c, x: model(c, x), init, xs)[1] ** 2)

    for how, theirs in (
        ({"window": None}, lax.scan),
        ({"window": 3, "every": 3}, functools.partial(chunked, 3)),
    ):
        ours = functools.partial(jaxbptt.scan, **how)
        got, want = (nnx.grad(functools.partial(loss, scan))(model) for scan in (ours, theirs))
        leaves = [nnx.to_pure_dict(state) for state in (got, want)]
        assert worst(*leaves) < 1e-12
        assert all(np.any(leaf) for leaf in jax.tree.leaves(leaves[0]))


def test_an_nnx_module_as_a_linen_like_function():
    graph, state = nnx.split(nnx.LSTMCell(3, 4, param_dtype=float, rngs=nnx.Rngs(0)))
    xs, init = draw(0, 6, 2, 3), (draw(1, 2, 4), draw(2, 2, 4))

    def loss(scan, state):
        return jnp.sum(scan(lambda c, x: nnx.merge(graph, state)(c, x), init, xs)[1] ** 2)

    ours = functools.partial(jaxbptt.scan, window=None)
    got, want = (jax.grad(functools.partial(loss, scan))(state) for scan in (ours, lax.scan))
    assert worst(got, want) < 1e-12
