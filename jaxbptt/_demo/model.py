"""The main job's model: an RNN, GRU or LSTM cell that predicts the next character."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt._demo.text import Symbols

Params = dict[str, jax.Array]
Carry = tuple[jax.Array, ...]  # each (batch, hidden); the hidden state h comes first
InputAndTarget = tuple[jax.Array, jax.Array]  # each (batch,): a character and the next one

# How many times `hidden` the gates of each cell take.
GATES = {"rnn": 1, "gru": 3, "lstm": 4}


@dataclasses.dataclass(frozen=True)
class Model:
    """A recurrent cell with a softmax over characters on top.

    Attributes:
        cell: "rnn", "gru" or "lstm".
        hidden: the size of the cell.
        symbols: the number of different characters.
    """

    cell: str
    hidden: int
    symbols: int

    def init(self, seed: int) -> Params:
        """Random float32 parameters."""
        n, width = self.hidden, GATES[self.cell] * self.hidden
        # Drawn by NumPy, since to compile JAX's generator takes longer than all the rest here.
        normal = np.random.default_rng(seed).normal
        b = np.zeros(width)
        if self.cell == "lstm":
            # The forget gate starts open, so that the cell remembers from the first step on.
            b[n : 2 * n] = 1
        params = {
            "Wx": normal(0, 0.1, (self.symbols, width)),
            "Wh": normal(0, n**-0.5, (n, width)),
            "b": b,
            "Wy": normal(0, n**-0.5, (n, self.symbols)),
            "by": np.zeros(self.symbols),
        }
        return {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}

    def initial_carry(self, batch: int) -> Carry:
        """The carry before the first character."""
        leaves = 2 if self.cell == "lstm" else 1
        return tuple(jnp.zeros((batch, self.hidden), jnp.float32) for _ in range(leaves))

    def step(self, params: Params, carry: Carry, x: jax.Array) -> tuple[Carry, jax.Array]:
        """Reads one character per stream, x (batch,).

        Returns the next carry and the logits (batch, symbols) of the next character.
        """
        # A row of Wx for each character is what a product with a one-hot input would give.
        from_input = params["Wx"][x] + params["b"][None]
        carry = self._next_carry(carry, from_input, carry[0] @ params["Wh"])
        return carry, carry[0] @ params["Wy"] + params["by"][None]

    def loss(self, params: Params, carry: Carry, x: InputAndTarget) -> tuple[Carry, jax.Array]:
        """The next carry, and the mean loss over the streams."""
        carry, logits = self.step(params, carry, x[0])
        return carry, cross_entropy(logits, x[1])

    def _next_carry(self, carry: Carry, from_input: jax.Array, from_carry: jax.Array) -> Carry:
        h = carry[0]
        if self.cell == "rnn":
            return (jnp.tanh(from_input + from_carry),)
        if self.cell == "gru":
            r, z, n = jnp.split(from_input, 3, axis=1)
            hr, hz, hn = jnp.split(from_carry, 3, axis=1)
            r, z = jax.nn.sigmoid(r + hr), jax.nn.sigmoid(z + hz)
            n = jnp.tanh(n + r * hn)
            return (n + z * (h - n),)
        i, f, g, o = jnp.split(from_input + from_carry, 4, axis=1)
        c = jax.nn.sigmoid(f) * carry[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c


def cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """The mean loss over the streams, in bits per character.

    Args:
        logits: (batch, symbols).
        target: (batch,), the characters that came.
    """
    of_target = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
    return (jax.nn.logsumexp(logits, axis=1) - of_target).mean() / math.log(2)


def bits_per_character(model: Model, params: Params, streams: Symbols) -> float:
    """The mean loss on parallel streams of text, (steps, streams), read from the start."""
    return float(_mean_loss(model, params, jnp.asarray(streams)))


@functools.partial(jax.jit, static_argnums=0)
def _mean_loss(model: Model, params: Params, streams: jax.Array) -> jax.Array:
    step = functools.partial(model.loss, params)
    carry = model.initial_carry(streams.shape[1])
    return jax.lax.scan(step, carry, (streams[:-1], streams[1:]))[1].mean()
