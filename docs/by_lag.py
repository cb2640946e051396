"""Draws docs/by_lag.png: how far back the gradient of an LSTM comes from.

python docs/by_lag.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import jaxbptt

INPUTS, HIDDEN, WINDOW, STEPS = 16, 64, 40, 300


def lstm(params, carry, x):
    """A long short-term memory; y is a number."""
    both = jnp.concatenate([x, carry["h"]])
    new, keep, enter, leave = jnp.split(params["gates"] @ both + params["bias"], 4)
    c = jax.nn.sigmoid(keep) * carry["c"] + jax.nn.sigmoid(enter) * jnp.tanh(new)
    h = jax.nn.sigmoid(leave) * jnp.tanh(c)
    return {"c": c, "h": h}, params["out"] @ h


def mean_by_lag():
    """The norms by lag, before training, as the mean over many steps."""
    keys = jax.random.split(jax.random.key(0), 3)
    shape = 4 * HIDDEN, INPUTS + HIDDEN
    params = {
        "gates": jax.random.normal(keys[0], shape, jnp.float32) / shape[1] ** 0.5,
        # A bias of one: gates that mostly keep.
        "bias": jnp.repeat(jnp.array([0.0, 1.0, 0.0, 0.0], jnp.float32), HIDDEN),
        "out": jax.random.normal(keys[1], (HIDDEN,), jnp.float32) / HIDDEN**0.5,
    }
    xs = jax.random.normal(keys[2], (WINDOW + STEPS, INPUTS), jnp.float32)
    rec = jaxbptt.record(lstm, window=WINDOW, weights="current")
    nothing = jnp.zeros(HIDDEN, jnp.float32)

    def look(tape, x):
        tape, y = rec(params, tape, x)
        return tape, jaxbptt.gradient_by_lag(rec, params, tape, jnp.ones_like(y)[None])

    tape = rec.init(params, {"c": nothing, "h": nothing}, xs[0])
    lags = jax.jit(lambda tape: jax.lax.scan(look, tape, xs)[1])(tape)
    return jax.tree.map(lambda norms: norms[WINDOW:].mean(0), lags)


def main():
    """Writes the picture beside this file."""
    figure = Figure(figsize=(5.2, 3.1), layout="constrained")
    FigureCanvasAgg(figure)
    jaxbptt.plot_by_lag(mean_by_lag(), ax=figure.subplots())
    figure.savefig(Path(__file__).with_name("by_lag.png"), dpi=200)


if __name__ == "__main__":
    main()
