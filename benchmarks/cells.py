"""The models that the benchmarks run, each a step, parameters, a first carry and inputs."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

VOCABULARY = 10_000


@dataclasses.dataclass(frozen=True)
class Shape:
    """A point of the grid."""

    cell: str
    batch: int
    inputs: int
    hidden: int
    window: int

    def __str__(self) -> str:
        """As it stands in the tables."""
        return f"{self.cell} {self.batch}, {self.inputs}, {self.hidden}, {self.window}"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A step with what it runs on; `loss` is of one step's output and input."""

    step: Callable
    loss: Callable
    params: Any
    carry: Any
    xs: Any


def lstm(params, carry, x):
    """An LSTM cell; the output is the hidden state."""
    h, c = carry
    return gated(x @ params["wx"] + h @ params["wh"] + params["b"], c)


def gated(gates, c):
    """The new state of an LSTM and its output, of what goes into its four gates."""
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h


def gru(params, h, x):
    """A GRU cell whose two matrix products make all gates at once."""
    drive, recurrent = x @ params["wx"] + params["b"], h @ params["wh"]
    r, z, n = jnp.split(drive, 3, axis=-1)
    hr, hz, hn = jnp.split(recurrent, 3, axis=-1)
    z = jax.nn.sigmoid(z + hz)
    n = jnp.tanh(n + jax.nn.sigmoid(r + hr) * hn)
    h = n + z * (h - n)
    return h, h


def stack(params, carry, x):
    """Three LSTM cells, one on top of the other."""
    new = []
    for name, part in zip(("0", "1", "2"), carry, strict=True):
        part, x = lstm(params[name], part, x)
        new.append(part)
    return tuple(new), x


def lru(params, h, x):
    """A diagonal linear recurrence, real, with a nonlinear read-out."""
    decay = jnp.exp(-jnp.exp(params["nu"]))
    h = decay * h + jnp.sqrt(1 - decay**2) * (x @ params["wx"])
    return h, jnp.tanh(h @ params["wy"])


@jax.custom_jvp
def spike(v):
    """A spike where the potential is above zero."""
    return (v > 0).astype(v.dtype)


@spike.defjvp
def _surrogate(primals, tangents):
    (v,), (dv,) = primals, tangents
    return spike(v), dv / (1 + 10 * jnp.abs(v)) ** 2


def lif(params, carry, x):
    """Leaky integrate-and-fire neurons, recurrently connected, with a surrogate gradient."""
    v, s = carry
    v = 0.9 * v * (1 - s) + x @ params["wx"] + s @ params["wh"]
    s = spike(v - 1)
    return (v, s), s


def language(params, carry, x):
    """An embedding, an LSTM and a head of 10,000 words; y is each stream's loss."""
    word, following = x
    carry, h = lstm(params, carry, params["embedding"][word])
    logits = h @ params["head"]
    hit = jnp.take_along_axis(logits, following[:, None], axis=1)[:, 0]
    return carry, jax.nn.logsumexp(logits, axis=1) - hit


_GATES = {"LSTM": 4, "GRU": 3, "LIF": 1}


def problem(shape: Shape, steps: int) -> Problem:
    """The model of a shape, with inputs for one block of steps."""
    batch, inputs, hidden = shape.batch, shape.inputs, shape.hidden
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def draw(*size):
        return jax.random.normal(next(keys), size) / math.sqrt(size[0])

    def weights(inputs, gates):
        wide = gates * hidden
        return {"wx": draw(inputs, wide), "wh": draw(hidden, wide), "b": jnp.zeros(wide)}

    def blank():
        return jnp.zeros((batch, hidden))

    xs = jax.random.normal(next(keys), (steps, batch, inputs))
    if shape.cell == "stack":
        params = {"0": weights(inputs, 4), "1": weights(hidden, 4), "2": weights(hidden, 4)}
        return Problem(stack, square, params, tuple((blank(), blank()) for _ in range(3)), xs)
    if shape.cell == "LRU":
        params = {"nu": draw(hidden) - 2, "wx": draw(inputs, hidden), "wy": draw(hidden, hidden)}
        return Problem(lru, square, params, blank(), xs)
    if shape.cell == "language":
        words = jax.random.randint(next(keys), (2, steps, batch), 0, VOCABULARY)
        params = weights(inputs, 4)
        params |= {"embedding": draw(VOCABULARY, inputs), "head": draw(hidden, VOCABULARY)}
        return Problem(language, mean, params, (blank(), blank()), (words[0], words[1]))
    params = weights(inputs, _GATES[shape.cell])
    step, carry = {
        "LSTM": (lstm, (blank(), blank())),
        "GRU": (gru, blank()),
        "LIF": (lif, (blank(), blank())),
    }[shape.cell]
    return Problem(step, square, params, carry, xs)


def square(y, x):
    """A loss that asks nothing of the model but to be differentiated."""
    del x
    return jnp.mean((y - 0.1) ** 2)


def mean(y, x):
    """Of losses that the step has made."""
    del x
    return jnp.mean(y)
