"""A language model of equinox, trained at every character of Python's own documentation.

    python examples/equinox_lm.py [--steps 6000] [--compare]

The module's arrays are params: `eqx.partition` takes them out, and the step puts them back.
"""

import functools
from pydoc_data.topics import topics

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from compare import main, pieces
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


class Model(eqx.Module):
    """A GRU that reads a symbol of one stream, and gives the logits of the next."""

    embedding: eqx.nn.Embedding
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embedding = eqx.nn.Embedding(128, 32, key=keys[0])
        self.cell = eqx.nn.GRUCell(32, HIDDEN, key=keys[1])
        self.head = eqx.nn.Linear(HIDDEN, 128, key=keys[2])

    def __call__(self, h, symbol):
        h = self.cell(self.embedding(symbol), h)
        return h, self.head(h)


def loss(logits, x):
    """Nats per character."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, x[1]).mean()


def start():
    """A step of all streams, its params, and a carry."""
    params, static = eqx.partition(Model(jax.random.key(0)), eqx.is_inexact_array)

    def step(params, h, x):
        return jax.vmap(eqx.combine(params, static))(h, x[0])

    return step, params, jnp.zeros((STREAMS, HIDDEN))


def train(xs, window=WINDOW, every=1):
    """The loss at each character."""
    step, params, h = start()
    learner = jaxbptt.learner(step, loss, OPTIMIZER, window=window, every=every, weights="current")
    state = learner.init(params, h, jax.tree.map(lambda v: v[0], xs))
    return lax.scan(learner.update, state, xs)[1].loss


def today(xs, new, old=0):
    """The same without jaxbptt: chunks, or the window run again for each update."""
    step, params, h = start()
    return pieces(step, loss, OPTIMIZER, params, h, xs, new, old)


WAYS = {
    "chunks of 20": functools.partial(today, new=20),
    "jaxbptt, `every=20`": functools.partial(train, every=20),
    "20 characters run again, every 5": functools.partial(today, new=5, old=15),
    "jaxbptt, `every=5`": functools.partial(train, every=5),
    "20 characters run again, every 1": functools.partial(today, new=1, old=19),
    "jaxbptt, `every=1`": train,
}

if __name__ == "__main__":
    main(__doc__, text, train, WAYS, steps=6000, what="nats")
