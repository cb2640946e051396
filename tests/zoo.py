"""A zoo of steps: small, with sizes that differ, each made for a dtype.

`ZOO[name](dtype)` gives a `Case`. It doesn't know the library.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

B, D, H, Y, V = 2, 3, 4, 5, 6  # batch, input, state, output, vocabulary


class Case(NamedTuple):
    """One inhabitant.

    Attributes:
        step: `step(params, carry, x) -> (carry, y)`.
        params: parameters of the dtype asked for.
        carry: a carry to start from, not zero.
        xs: from a length T to inputs, leaves (T, ...).
    """

    step: Callable
    params: Any
    carry: Any
    xs: Callable[[int], Any]

    def x(self) -> Any:
        """One input."""
        return jax.tree.map(lambda leaf: leaf[0], self.xs(1))


ZOO: dict[str, Callable[[Any], Case]] = {}


def _inhabitant(make):
    ZOO[make.__name__] = functools.cache(make)
    return make


def normal(seed: int, dtype: Any, *shape: int, scale: float = 0.5) -> jax.Array:
    """Normal numbers, the same in every dtype but for rounding."""
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), dtype)


def _inputs(dtype, *shape, seed=99, scale=1.0):
    def xs(length):
        whole = normal(seed, dtype, 64, *shape, scale=scale)  # a longer run starts the same
        return whole[:length]

    return xs


def _rnn(params, h, x):
    return jnp.tanh(x @ params["wx"] + h @ params["wh"] + params["b"][None])


def _rnn_params(dtype):
    return {
        "wx": normal(1, dtype, D, H),
        "wh": normal(2, dtype, H, H),
        "b": normal(3, dtype, H),
    }


def _h(dtype, seed=4):
    return normal(seed, dtype, B, H)


# -------------------------------------------------------------------- cells


@_inhabitant
def tanh_rnn(dtype):
    """A tanh RNN with a readout."""

    def step(params, h, x):
        h = _rnn(params, h, x)
        return h, h @ params["wy"]

    return Case(step, {**_rnn_params(dtype), "wy": normal(5, dtype, H, Y)}, _h(dtype), _xs(dtype))


def _xs(dtype):
    return _inputs(dtype, B, D)


@_inhabitant
def fused_gru(dtype):
    """A GRU whose weights are slices of one (D+H, 3H) matrix."""

    def step(params, h, x):
        wx, wh = params["w"][:D], params["w"][D:]
        rx, zx, nx = jnp.split(x @ wx + params["b"][None], 3, axis=1)
        rh, zh, nh = jnp.split(h @ wh, 3, axis=1)
        r, z = jax.nn.sigmoid(rx + rh), jax.nn.sigmoid(zx + zh)
        h = (1 - z) * jnp.tanh(nx + r * nh) + z * h
        return h, h

    params = {"w": normal(1, dtype, D + H, 3 * H), "b": normal(2, dtype, 3 * H)}
    return Case(step, params, _h(dtype), _xs(dtype))


@_inhabitant
def lstm(dtype):
    """An LSTM with the carry (h, c)."""

    def step(params, carry, x):
        h, c = carry
        gates = jnp.concatenate([x, h], axis=1) @ params["w"] + params["b"][None]
        i, f, g, o = jnp.split(gates, 4, axis=1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h @ params["wy"]

    params = {
        "w": normal(1, dtype, D + H, 4 * H),
        "b": normal(2, dtype, 4 * H),
        "wy": normal(3, dtype, H, Y),
    }
    return Case(step, params, (_h(dtype), _h(dtype, 5)), _xs(dtype))


@_inhabitant
def linear(dtype):
    """c = a c + b x + d in each unit, y = c: the bias shows a ring read before it is written."""

    def step(params, c, x):
        c = params["a"][None] * c + x @ params["b"] + params["d"][None]
        return c, c

    params = {
        "a": jnp.asarray([0.9, -0.7, 0.5, 1.1], dtype),
        "b": normal(1, dtype, D, H),
        "d": normal(2, dtype, H),
    }
    return Case(step, params, _h(dtype), _xs(dtype))


@_inhabitant
def weight_norm(dtype):
    """A recurrent matrix g V / |V|: what is kept of it depends on the parameters alone."""

    def step(params, h, x):
        w = params["g"][None] * params["v"] / jnp.linalg.norm(params["v"], axis=0, keepdims=True)
        h = jnp.tanh(x @ params["wx"] + h @ w)
        return h, h

    params = {
        "v": normal(1, dtype, H, H),
        "g": normal(2, dtype, H) + 1,
        "wx": normal(3, dtype, D, H),
    }
    return Case(step, params, _h(dtype), _xs(dtype))


@_inhabitant
def bfloat16(dtype):
    """Parameters of the dtype, cast to bfloat16 for the products."""

    def step(params, h, x):
        w = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        h = _rnn(w, h.astype(jnp.bfloat16), x.astype(jnp.bfloat16))
        return h.astype(dtype), (h @ w["wy"]).astype(dtype)

    params = {**_rnn_params(dtype), "wy": normal(5, dtype, H, Y)}
    return Case(step, params, _h(dtype), _xs(dtype))


@_inhabitant
def complex_recurrence(dtype):
    """A diagonal complex linear recurrence; x and y are real."""
    kind = jnp.complex128 if dtype == jnp.float64 else jnp.complex64

    def step(params, h, x):
        lam = jnp.exp(lax.complex(-jnp.exp(params["nu"]), params["theta"]))
        h = lam[None] * h + x.astype(kind) @ params["b"]
        return h, jnp.real(h @ params["c"])

    def matrix(seed, *shape):
        return lax.complex(normal(seed, dtype, *shape), normal(seed + 1, dtype, *shape))

    params = {
        "nu": normal(1, dtype, H),
        "theta": normal(2, dtype, H),
        "b": matrix(3, D, H),
        "c": matrix(5, H, Y),
    }
    return Case(step, params, matrix(7, B, H), _xs(dtype))


# -------------------------------------------------------------------- trees


@_inhabitant
def nested_dict(dtype):
    """A carry {"fast": [a, b], "slow": ...} whose parts meet."""

    def step(params, carry, x):
        fast, slow = carry["fast"], carry["slow"]
        new = jnp.tanh(x @ params["wx"] + fast[0] @ params["wh"] + slow)
        slow = 0.9 * slow + 0.1 * new * fast[1]
        return {"fast": [new, jnp.sin(fast[0])], "slow": slow}, {"new": new, "slow": (slow,)}

    carry = {"fast": [_h(dtype), _h(dtype, 5)], "slow": _h(dtype, 6)}
    params = {"wx": normal(1, dtype, D, H), "wh": normal(2, dtype, H, H)}
    return Case(step, params, carry, _xs(dtype))


class Pair(NamedTuple):
    """A carry of two leaves."""

    h: Any
    trace: Any


@_inhabitant
def namedtuple(dtype):
    """A NamedTuple carry and tuples for params and x."""

    def step(params, carry, x):
        wx, (wh,) = params
        h = jnp.tanh(x[0] @ wx + carry.h @ wh + x[1])
        return Pair(h, 0.5 * carry.trace + h), (h, carry.trace)

    params = (normal(1, dtype, D, H), (normal(2, dtype, H, H),))

    def xs(length):
        return _inputs(dtype, B, D)(length), _inputs(dtype, B, H, seed=98)(length)

    return Case(step, params, Pair(_h(dtype), _h(dtype, 5)), xs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """A carry of two leaves and a static name."""

    h: Any
    norm: Any
    name: str = dataclasses.field(metadata={"static": True}, default="state")


@_inhabitant
def dataclass(dtype):
    """A registered dataclass for a carry, with a scalar leaf."""

    def step(params, carry, x):
        h = _rnn(params, carry.h, x) / (1 + carry.norm**2)
        return State(h, 0.5 * carry.norm + jnp.mean(h**2)), carry.norm

    return Case(step, _rnn_params(dtype), State(_h(dtype), jnp.asarray(0.3, dtype)), _xs(dtype))


@_inhabitant
def integer_leaves(dtype):
    """Integers and booleans in params, carry and x."""

    def step(params, carry, x):
        gate = jnp.where(carry["odd"], 0.5, 1.0).astype(dtype)
        h = gate * _rnn(params["rnn"], carry["h"], x["u"])
        h = h * jnp.cos(carry["t"].astype(dtype) / params["period"].astype(dtype))
        h = h + x["k"].astype(dtype)[:, None] * 0.1
        return {"h": h, "t": carry["t"] + 1, "odd": ~carry["odd"]}, h

    params = {"rnn": _rnn_params(dtype), "period": jnp.asarray(3, jnp.int32)}
    carry = {"h": _h(dtype), "t": jnp.asarray(0, jnp.int32), "odd": jnp.asarray(False)}

    def xs(length):
        return {"u": _inputs(dtype, B, D)(length), "k": _tokens(length)}

    return Case(step, params, carry, xs)


@_inhabitant
def none_leaves(dtype):
    """None in params, carry, x and y."""

    def step(params, carry, x):
        h = jnp.tanh(x["u"] @ params["wx"] + carry["h"] * params["wh"][None])
        return {"h": h, "nothing": None}, {"h": h, "nothing": None}

    params = {"wx": normal(1, dtype, D, H), "wh": normal(2, dtype, H), "b": None}

    def xs(length):
        return {"u": _inputs(dtype, B, D)(length), "mask": None}

    return Case(step, params, {"h": _h(dtype), "nothing": None}, xs)


def _tokens(length):
    return jnp.asarray(np.random.default_rng(8).integers(0, V, (64, B))[:length], jnp.int32)


@_inhabitant
def tokens(dtype):
    """Integer inputs that look up an embedding; logits come out."""

    def step(params, h, x):
        h = jnp.tanh(params["embedding"][x] + h @ params["wh"])
        return h, h @ params["embedding"].T

    params = {"embedding": normal(1, dtype, V, H), "wh": normal(2, dtype, H, H)}
    return Case(step, params, _h(dtype), _tokens)


@_inhabitant
def integer_y(dtype):
    """A y with an integer leaf and None beside the floats."""

    def step(params, h, x):
        h = _rnn(params, h, x)
        return h, {"h": h, "best": jnp.argmax(h, axis=1).astype(jnp.int32), "none": None}

    return Case(step, _rnn_params(dtype), _h(dtype), _xs(dtype))


@_inhabitant
def no_y(dtype):
    """y is None: all gradients come through the carry."""

    def step(params, h, x):
        return _rnn(params, h, x), None

    return Case(step, _rnn_params(dtype), _h(dtype), _xs(dtype))


@_inhabitant
def no_params(dtype):
    """No parameters at all."""

    def step(params, h, x):
        h = jnp.tanh(1.5 * h + x)
        return h, h**2

    return Case(step, None, _h(dtype), _inputs(dtype, B, H))


@_inhabitant
def no_residuals(dtype):
    """A running sum: nothing is kept for the backward pass."""

    def step(params, h, x):
        h = h + x
        return h, -h

    return Case(step, {}, _h(dtype), _inputs(dtype, B, H))


@_inhabitant
def closed_over(dtype):
    """A step that closes over an array."""
    w = normal(9, dtype, H, H)

    def step(params, h, x):
        h = jnp.tanh(x @ params["wx"] + h @ w)
        return h, h

    return Case(step, {"wx": normal(1, dtype, D, H)}, _h(dtype), _xs(dtype))


# -------------------------------------------------------------------- rules


@_inhabitant
def checkpoint(dtype):
    """The step under `jax.checkpoint`."""
    return tanh_rnn(dtype)._replace(step=jax.checkpoint(tanh_rnn(dtype).step))


@_inhabitant
def checkpoint_policy(dtype):
    """`jax.checkpoint` that keeps the products."""
    step = jax.checkpoint(lstm(dtype).step, policy=jax.checkpoint_policies.dots_saveable)
    return lstm(dtype)._replace(step=step)


def _surrogate(v):
    return 1 / (1 + jnp.abs(4 * v)) ** 2


def _spiking(spike, dtype):
    def step(params, carry, x):
        v, s = carry
        v = params["leak"][None] * v * (1 - s) + x @ params["wx"] + s @ params["wh"]
        s = spike(v - 0.5)
        return (v, s), s @ params["wy"]

    params = {
        "leak": normal(1, dtype, H) + 0.8,
        "wx": normal(2, dtype, D, H, scale=1.0),
        "wh": normal(3, dtype, H, H),
        "wy": normal(4, dtype, H, Y),
    }
    return Case(step, params, (_h(dtype), jnp.zeros((B, H), dtype)), _xs(dtype))


@_inhabitant
def spike_jvp(dtype):
    """A spike with a surrogate gradient through `jax.custom_jvp`."""

    @jax.custom_jvp
    def spike(v):
        return (v > 0).astype(dtype)

    spike.defjvp(lambda primals, ts: (spike(*primals), _surrogate(*primals) * ts[0]))
    return _spiking(spike, dtype)


@_inhabitant
def spike_vjp(dtype):
    """The same through `jax.custom_vjp`."""

    @jax.custom_vjp
    def spike(v):
        return (v > 0).astype(dtype)

    spike.defvjp(lambda v: (spike(v), v), lambda v, ct: (_surrogate(v) * ct,))
    return _spiking(spike, dtype)


@_inhabitant
def inverse_vjp(dtype):
    """A `custom_vjp` whose rule divides by its residual: a placeholder gives 0·inf."""

    @jax.custom_vjp
    def log(v):
        return jnp.log(v)

    log.defvjp(lambda v: (jnp.log(v), v), lambda v, ct: (ct / v,))

    def step(params, h, x):
        h = log(1 + h**2 + (x @ params["wx"]) ** 2)
        return h, h

    return Case(step, {"wx": normal(1, dtype, D, H)}, _h(dtype), _xs(dtype))


@_inhabitant
def log_division(dtype):
    """Logarithm, division and square root under a checkpoint: NaN on a zero placeholder."""

    @jax.checkpoint
    def step(params, h, x):
        size = jnp.exp(x @ params["wx"])
        h = jnp.log(h) / size + jnp.sqrt(h) + params["b"][None] ** 2 + 2
        return h, 1 / h

    params = {"wx": normal(1, dtype, D, H), "b": normal(2, dtype, H)}
    return Case(step, params, jnp.abs(_h(dtype)) + 1, _xs(dtype))


# ------------------------------------------------------------ control flow


@_inhabitant
def stacked_layers(dtype):
    """An inner scan over three layers with stacked weights."""

    def step(params, hs, x):
        def layer(u, args):
            wx, wh, h = args
            h = jnp.tanh(u @ wx + h @ wh)
            return h, h

        top, hs = lax.scan(layer, x @ params["wi"], (params["wx"], params["wh"], hs))
        return hs, top

    params = {
        "wi": normal(1, dtype, D, H),
        "wx": normal(2, dtype, 3, H, H),
        "wh": normal(3, dtype, 3, H, H),
    }
    return Case(step, params, normal(4, dtype, 3, B, H), _xs(dtype))


@_inhabitant
def reversed_layers(dtype):
    """An inner scan over layers in reverse, one of whose carries depends on weights alone."""

    def step(params, h, x):
        def layer(carry, w):
            s, u = carry
            s = jnp.tanh(s * w.sum())
            return (s, jnp.tanh(u @ w * s)), None

        start = jnp.tanh(params["s"]), h + x @ params["wx"]
        (_, h), _ = lax.scan(layer, start, params["w"], reverse=True)
        return h, h

    params = {"s": normal(1, dtype), "wx": normal(2, dtype, D, H), "w": normal(3, dtype, 3, H, H)}
    return Case(step, params, _h(dtype), _xs(dtype))


@_inhabitant
def cond(dtype):
    """A branch chosen by the input."""

    def step(params, h, x):
        h = lax.cond(
            jnp.sum(x) > 0,
            lambda h: jnp.tanh(x @ params["wx"] + h @ params["wh"]),
            lambda h: 0.5 * h + params["b"][None] * jnp.cos(h),
            h,
        )
        return h, h

    return Case(step, _rnn_params(dtype), _h(dtype), _xs(dtype))


@_inhabitant
def while_loop(dtype):
    """A `while_loop` beside the path of the gradient: it scales by a frozen size."""

    def step(params, h, x):
        def halve(size):
            return 0.5 * size

        size = jnp.max(jnp.abs(lax.stop_gradient(h))) + 4
        size = lax.while_loop(lambda size: size > 1, halve, size)
        h = _rnn(params, h, x) * size
        return h, h

    return Case(step, _rnn_params(dtype), _h(dtype), _xs(dtype))


@_inhabitant
def jitted(dtype):
    """The step under `jax.jit`."""
    return lstm(dtype)._replace(step=jax.jit(lstm(dtype).step))


@_inhabitant
def vmapped(dtype):
    """A step for one sequence, mapped over the batch."""

    def one(params, h, x):
        h = jnp.tanh(x @ params["wx"] + h @ params["wh"] + params["b"])
        return h, h

    def step(params, h, x):
        return jax.vmap(one, in_axes=(None, 0, 0))(params, h, x)

    return Case(step, _rnn_params(dtype), _h(dtype), _xs(dtype))


@_inhabitant
def inner_gradient(dtype):
    """A step of optimisation: the carry is a weight, the parameters are how it learns."""

    def step(params, w, x):
        def loss(w):
            error = jnp.tanh(x[:, :D] @ w) - x[:, D:]
            return jnp.mean(error**2) + params["decay"] * jnp.sum(w**2)

        value, grad = jax.value_and_grad(loss)(w)
        return w - jnp.exp(params["log_rate"]) * grad, value

    params = {"log_rate": jnp.asarray(-1.0, dtype), "decay": jnp.asarray(0.05, dtype)}
    return Case(step, params, normal(1, dtype, D, H), _inputs(dtype, B, D + H))


# ------------------------------------------------------------------- keys


def _dropout(wrap, dtype):
    def step(params, carry, x):
        key, now = jax.random.split(wrap(carry["key"]))
        mask = jax.random.bernoulli(now, 0.7, (B, H)).astype(dtype)
        h = mask * _rnn(params, carry["h"], x)
        if not jnp.issubdtype(carry["key"].dtype, jax.dtypes.prng_key):
            key = jax.random.key_data(key)
        return {"h": h, "key": key}, h

    return step


@_inhabitant
def typed_key(dtype):
    """Dropout with a typed key in the carry."""
    carry = {"h": _h(dtype), "key": jax.random.key(3)}
    return Case(_dropout(lambda key: key, dtype), _rnn_params(dtype), carry, _xs(dtype))


@_inhabitant
def raw_key(dtype):
    """The same with a raw key, two uint32."""
    carry = {"h": _h(dtype), "key": jax.random.key_data(jax.random.key(3))}
    return Case(_dropout(jax.random.wrap_key_data, dtype), _rnn_params(dtype), carry, _xs(dtype))
