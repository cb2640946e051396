"""What a gradient through `scan` costs: memory, and where the products are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import draw, grid, worst
from jax import lax
from jaxpr_reading import arrays, inner, products

import jaxbptt
from jaxbptt._compat import scan_counts
from jaxbptt._transforms import scan_backward as _reverse
from jaxbptt._transforms import scan_forward as _forward

full = functools.partial(jaxbptt.scan, window=None)


def lstm(p, carry, x):
    h, c = carry
    gates = x @ p["wx"] + h @ p["wh"] + p["b"][None]
    i, f, g, o = jnp.split(gates, 4, axis=1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h


def gru(p, carry, x):
    (h,) = carry
    rx, zx, nx = jnp.split(x @ p["wx"] + p["b"][None], 3, axis=1)
    rh, zh, nh = jnp.split(h @ p["wh"], 3, axis=1)
    r, z = jax.nn.sigmoid(rx + rh), jax.nn.sigmoid(zx + zh)
    h = (1 - z) * jnp.tanh(nx + r * nh) + z * h
    return (h,), h


def tanh_rnn(p, carry, x):
    h = jnp.tanh(x @ p["wx"] + carry[0] @ p["wh"] + p["b"][None])
    return (h,), h


def with_head(cell):
    def step(p, carry, x):
        carry, h = cell(p, carry, x)
        scores = jax.nn.log_softmax(h @ p["head"])
        return carry, -jnp.take_along_axis(scores, p["words"], -1).mean()

    return step


def problem(cell, batch, inputs, hidden, length, words=0, dtype=jnp.float32):
    gates, leaves = {"lstm": (4, 2), "gru": (3, 1), "tanh_rnn": (1, 1)}[cell.__name__]
    p = {
        "wx": draw(0, inputs, gates * hidden, dtype=dtype),
        "wh": draw(1, hidden, gates * hidden, dtype=dtype),
        "b": draw(2, gates * hidden, dtype=dtype),
    }
    if words:
        p["head"] = draw(3, hidden, words, dtype=dtype)
    init = (draw(4, batch, hidden, dtype=dtype),) * leaves
    return p, init, draw(5, length, batch, inputs, dtype=dtype)


def loss(scan, step, p, init, xs):
    p = p | {"words": jnp.arange(xs.shape[1], dtype=jnp.int32)[:, None]}
    return jnp.mean(scan(lambda c, x: step(p, c, x), init, xs)[1] ** 2)


MEMORY = [
    (lstm, (1, 128, 256, 50)),
    (lstm, (32, 64, 64, 100)),
    (lstm, (32, 128, 256, 50)),
    (gru, (1, 128, 256, 50)),
    (gru, (32, 64, 64, 100)),
    (gru, (8, 128, 256, 50)),
    (tanh_rnn, (32, 32, 64, 200)),
]


@pytest.mark.compiled
@pytest.mark.parametrize(("cell", "shape"), grid(MEMORY, always=[MEMORY[2], MEMORY[3]]))
def test_takes_at_most_a_quarter_more_memory_than_lax_scan(cell, shape):
    def temporaries(scan):
        args = problem(cell, *shape)
        grad = jax.jit(jax.grad(functools.partial(loss, scan, cell), (0, 1)))
        return grad.lower(*args).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(full) <= 1.25 * temporaries(lax.scan)


def products_of(step, args, window=None):
    scan = functools.partial(jaxbptt.scan, window=window)
    grad = jax.grad(functools.partial(loss, scan, step), (0, 1, 2))
    return list(products(jax.make_jaxpr(grad)(*args).jaxpr))


@pytest.mark.parametrize("window", [None, 5])
def test_weights_are_contracted_outside_the_loop(window):
    found = products_of(lstm, problem(lstm, 32, 128, 256, 50), window)
    made_in_loop = {np.prod(shape) for shape, in_loop in found if in_loop}
    assert sorted(np.prod(shape) for shape, in_loop in found if not in_loop) == [
        128 * 1024,
        256 * 1024,
    ]
    assert max(made_in_loop) < 128 * 1024 * (1 if window is None else 5)


def test_at_a_small_batch_inputs_and_head_are_projected_for_many_steps_at_once():
    args = problem(lstm, 2, 16, 32, 50, words=100)
    found = products_of(with_head(lstm), args)
    assert [shape for shape, _ in found if shape[0] == 2] == [(2, 128), (2, 32)]  # by wh, and back
    many = problem(lstm, 64, 16, 32, 50, words=100)
    in_loop = [shape for shape, inside in products_of(with_head(lstm), many) if inside]
    assert (64, 100) in in_loop  # a large batch keeps the matrix busy as it is


def test_side_effects_stay_in_the_loop(capsys):
    def f(c, x):
        jax.debug.print("at {}", x)
        c = jnp.tanh(c @ jnp.ones((2, 2)) + x)
        return c, c.sum()

    jax.grad(lambda c: full(f, c, jnp.arange(3.0))[1].sum())(jnp.ones((1, 2)))
    jax.effects_barrier()
    assert capsys.readouterr().out.split() == "at 0.0 at 1.0 at 2.0".split()


BLOCKS = [
    (2, None, 1, False),
    (2, 4, 1, True),
    (2, 2, 3, False),
    (20, 4, 4, True),
    (20, 4, 1, False),
]
OF_ITS_OWN = None  # a size that the library chooses


@pytest.mark.parametrize(
    ("batch", "window", "every", "reverse", "size"),
    grid(
        [(*case, size) for case in BLOCKS for size in (3, OF_ITS_OWN)],
        always=lambda case: case[-1] == 3,  # two steps are left over
    ),
)
def test_blocks_of_steps_change_nothing(monkeypatch, batch, window, every, reverse, size):
    scan = functools.partial(jaxbptt.scan, window=window, every=every, reverse=reverse)
    args = problem(gru, batch, 3, 5, 11, words=30, dtype=jnp.float64)

    def grads(size):
        with monkeypatch.context() as patch:
            for module in (_forward, _reverse) if size else ():
                patch.setattr(module, "block_size", lambda *_, **__: size)
            grad = jax.value_and_grad(functools.partial(loss, scan, with_head(gru)), (0, 1, 2))
            return jax.jit(grad)(*args)

    assert worst(grads(size), grads(11)) < 1e-13


def test_what_is_recorded_twice_is_stacked_once():
    """x is held by xs already; of s and s (1 - s) only s is stacked."""

    def run(w, xs):
        return full(lambda c, x: (jax.nn.sigmoid(w * c) * x, None), xs[0], xs)[0].sum()

    closed = jax.make_jaxpr(jax.grad(run))(0.3, draw(0, 9, 4))
    forward = next(eqn for eqn in closed.jaxpr.eqns if eqn.primitive.name == "scan")
    shapes = [v.aval.shape for v in forward.outvars]
    assert shapes == [(4,), (9, 4), (9, 4)]  # the last carry; c and s of each step


def made_by_loops(jaxpr):
    """The shapes of what the loops of a program give."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("scan", "while"):
            yield from (v.aval.shape for v in eqn.outvars)
        for body in inner(eqn):
            yield from made_by_loops(body)


def test_inputs_are_not_stacked_again_block_by_block(monkeypatch):
    """x is a residual, and xs hold it; beside it there is c, of another shape."""
    monkeypatch.setattr(_forward, "block_size", lambda *_, **__: 3)
    init, xs = draw(0, 3, 5), draw(1, 9, 1, 5)

    def run(init, xs):
        return full(lambda c, x: (jnp.sin(c * x), None), init, xs)[0]

    closed = jax.make_jaxpr(lambda *args: jax.vjp(run, *args))(init, xs)
    made = set(made_by_loops(closed.jaxpr))
    assert (3, 3, 3, 5) in made  # blocks, steps, and c
    assert not [shape for shape in made if shape[-2:] == (1, 5)]


@pytest.mark.parametrize("window", [None, 4])
def test_no_array_of_steps_times_a_parameter(window):
    """An embedding's scatter, a convolution and a broadcast scale, through jit and checkpoint."""
    p = {"table": draw(0, 50, 6), "kernel": draw(1, 6, 6, 3), "scale": draw(2, 1, 6, 1)}
    words = jnp.arange(9 * 2, dtype=jnp.int32).reshape(9, 2)

    @jax.jit
    @jax.checkpoint
    def inner(p, c, x):
        c = lax.conv_general_dilated(c, p["kernel"], (1,), "SAME")
        return jnp.tanh(c * p["scale"] + p["table"][x][:, :, None])

    def run(scan, p, **how):
        def f(c, x):
            c = inner(p, c, x)
            return c, c

        return jnp.sum(scan(f, draw(3, 2, 6, 5), words, **how)[1] ** 2)

    grad = jax.grad(functools.partial(run, jaxbptt.scan, window=window))
    shapes = set(arrays(jax.make_jaxpr(grad)(p).jaxpr))
    for leaf in p.values():
        assert not [s for s in shapes if s[:1] == (9,) and s[-leaf.ndim :] == leaf.shape]
    if window is None:
        want = jax.jit(jax.grad(functools.partial(run, lax.scan)))(p)
        assert worst(jax.jit(grad)(p), want) < 1e-12


def test_a_parameter_that_a_step_uses_often_has_one_sum():
    def run(w):
        step = lambda c, _: (jnp.sin(w * jnp.sin(w * jnp.sin(w * c))), None)  # noqa: E731
        return full(step, jnp.ones(3), length=5)[0].sum()

    closed = jax.make_jaxpr(jax.grad(run))(jnp.ones(3))
    *_, backward = (eqn for eqn in closed.jaxpr.eqns if eqn.primitive.name == "scan")
    assert scan_counts(backward)[1] == 2  # λ, and the sum


@pytest.mark.parametrize("size", [5, 12])
def test_outer_products_of_few_numbers_are_summed_in_the_loop(size):
    def run(w, xs):
        return full(lambda c, x: (jnp.tanh(w @ c + x), None), xs[0], xs)[0].sum()

    found = products(jax.make_jaxpr(jax.grad(run))(jnp.eye(size), draw(0, 9, size)).jaxpr)
    assert [inside for shape, inside in found if shape == (size, size)] == [size == 5]
