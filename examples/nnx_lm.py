"""A language model of flax nnx with Dropout, updated at every fifth character of its text.

    python examples/nnx_lm.py [--steps 6000] [--compare]

`from_nnx` makes a step of a module that has state, here the key and count of its Dropout.
"""

import functools
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from compare import main, pieces
from flax import nnx
from jax import lax

import jaxbptt

STREAMS, HIDDEN, WINDOW = 16, 128, 20
OPTIMIZER = optax.adam(2e-3)


def text(steps):
    """Symbols, and those that come next: int32 (steps, STREAMS), places of the text in parallel."""
    whole = "\n\n\n".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
    symbols = np.frombuffer(whole, np.uint8).astype(np.int32)
    rows = symbols[: len(symbols) // STREAMS * STREAMS].reshape(STREAMS, -1)[:, : steps + 1].T
    return ((jnp.asarray(rows[:-1]), jnp.asarray(rows[1:])),)


class Model(nnx.Module):
    """An LSTM that reads a symbol of each stream, and gives the logits of the next."""

    def __init__(self, rngs):
        self.embedding = nnx.Embed(128, 32, rngs=rngs)
        self.cell = nnx.OptimizedLSTMCell(32, HIDDEN, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, 128, rngs=rngs)

    def __call__(self, carry, symbol):
        carry, h = self.cell(carry, self.embedding(symbol))
        return carry, self.head(self.dropout(h))


def loss(logits, x):
    """Nats per character."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, x[1]).mean()


def start():
    """A step of all streams, its params, and a carry: that of the cell, and the Dropout's state."""
    model = Model(nnx.Rngs(0))
    step, params, state = jaxbptt.from_nnx(model)
    zeros = jnp.zeros((STREAMS, HIDDEN))
    return lambda params, carry, x: step(params, carry, x[0]), params, ((zeros, zeros), state)


def train(xs, window=WINDOW, every=5, weights="current"):
    """The loss at each character."""
    step, params, carry = start()
    learner = jaxbptt.learner(step, loss, OPTIMIZER, window=window, every=every, weights=weights)
    state = learner.init(params, carry, jax.tree.map(lambda v: v[0], xs))
    return lax.scan(learner.update, state, xs)[1].loss


def today(xs, new, old=0):
    """The same without jaxbptt: chunks, or the window run again for each update."""
    step, params, carry = start()
    return pieces(step, loss, OPTIMIZER, params, carry, xs, new, old)


WAYS = {
    "chunks of 20": functools.partial(today, new=20),
    "jaxbptt, `every=20`": functools.partial(train, every=20),
    "20 characters run again, every 5": functools.partial(today, new=5, old=15),
    "jaxbptt, `every=5`": train,
    "20 characters run again, every 1": functools.partial(today, new=1, old=19),
    "jaxbptt, `every=1`": functools.partial(train, every=1),
    'jaxbptt, `every=1, weights="stored"`': functools.partial(train, every=1, weights="stored"),
}

if __name__ == "__main__":
    main(__doc__, text, train, WAYS, steps=10000, what="nats")
