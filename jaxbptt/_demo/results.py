"""What the main job looks at after training: held-out bits, gradient by lag, a sample."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxbptt._demo.text import Symbols
from jaxbptt._demo.train import Carry, Model, Pair, Params, Run
from jaxbptt._transforms.record import record
from jaxbptt._transforms.tape import Tape

_POSITIONS = 64  # time steps over which the gradient by lag is averaged, in each stream


@dataclasses.dataclass(frozen=True)
class Seen:
    """A run, and what was seen of it on the held-out part (bits per character)."""

    run: Run
    before: float
    after: float
    norms: npt.NDArray[np.float32]

    def facts(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        run = self.run
        return {
            "window": run.settings.window,
            "every": run.settings.every,
            "steps": run.steps,
            "seconds": run.seconds,
            "steps_per_second": run.speed,
            "tape_bytes": run.nbytes,
            "held_out_bits_before": self.before,
            "held_out_bits_after": self.after,
            "curve": run.curve,
            "gradient_norm_by_lag": self.norms.tolist(),
        }


def look(model: Model, run: Run, held_out: Symbols, lags: int) -> Seen:
    """Looks at a run, up to `lags` steps back where the held-out streams are that long."""
    untrained = model.init(run.settings.seed)
    return Seen(
        run,
        held_out_bits(model, untrained, held_out),
        held_out_bits(model, run.params, held_out),
        gradient_by_lag(model, run.params, held_out, min(lags, len(held_out) - 1)),
    )


def held_out_bits(model: Model, params: Params, held_out: Symbols) -> float:
    """Bits per character on held-out streams (steps, streams); the carry flows through."""
    return float(_mean_loss(model, params, jnp.asarray(held_out))) / math.log(2)


def gradient_by_lag(
    model: Model, params: Params, held_out: Symbols, lags: int
) -> npt.NDArray[np.float32]:
    """Mean norm of ∂loss_t/∂x_{t-k} for k = 0 … lags-1, x_s being a one-hot row.

    Read off a tape of `lags` steps at up to 64 held-out positions of each stream.

    Args:
        model: the model.
        params: its parameters, held fixed.
        held_out: int32 (steps, streams), of more than `lags` steps.
        lags: how far to look back, however long the window was in training.
    """
    xs = jnp.asarray(held_out[: lags + _POSITIONS])
    return np.asarray(_norms(model, lags, params, (xs[:-1], xs[1:])))[::-1]


def sample(model: Model, params: Params, prompt: Symbols, length: int, seed: int) -> Symbols:
    """`length` characters that the model draws after reading `prompt`, a little sharpened."""
    given = np.pad(prompt[1:], (0, length), constant_values=-1)

    @jax.jit
    def draw(params: Params, given: jax.Array, key: jax.Array) -> jax.Array:
        def one(
            state: tuple[Carry, jax.Array], x: Pair
        ) -> tuple[tuple[Carry, jax.Array], jax.Array]:
            carry, logits = model.step(params, *state)
            drawn = jax.random.categorical(x[1], logits / 0.7).astype(jnp.int32)
            symbol = jnp.where(x[0] < 0, drawn, x[0])
            return (carry, symbol), symbol[0]

        keys = jax.random.split(key, len(given))
        start = model.carry(1), jnp.asarray(prompt[:1])
        return jax.lax.scan(one, start, (given, keys))[1][-length:]

    return np.asarray(draw(params, jnp.asarray(given), jax.random.key(seed)))


@partial(jax.jit, static_argnums=0)
def _mean_loss(model: Model, params: Params, held_out: jax.Array) -> jax.Array:
    _, losses = jax.lax.scan(
        lambda carry, x: model.loss(params, carry, x),
        model.carry(held_out.shape[1]),
        (held_out[:-1], held_out[1:]),
    )
    return losses.mean()


@partial(jax.jit, static_argnums=(0, 1))
def _norms(model: Model, lags: int, params: Params, xs: Pair) -> jax.Array:
    """Mean norms, oldest first, over the steps that have a full tape behind them."""
    rec = record(model.losses, window=lags, weights="current")
    streams = xs[0].shape[1]

    def put(tape: Tape, x: Pair) -> tuple[Tape, None]:
        one_hot = jax.nn.one_hot(x[0], model.symbols, dtype=jnp.float32)
        return rec(params, tape, (one_hot, x[1]))[0], None

    def measure(tape: Tape, x: Pair) -> tuple[Tape, jax.Array]:
        tape, _ = put(tape, x)
        ct = rec.pullback(params, tape, jnp.ones((1, streams), jnp.float32))
        return tape, jnp.linalg.norm(ct.xs[0], axis=2).mean(1)

    blank = jnp.zeros((streams, model.symbols), jnp.float32), jnp.zeros(streams, jnp.int32)
    tape = rec.init(params, model.carry(streams), blank)
    tape, _ = jax.lax.scan(put, tape, jax.tree.map(lambda a: a[: lags - 1], xs))
    return jax.lax.scan(measure, tape, jax.tree.map(lambda a: a[lags - 1 :], xs))[1].mean(0)
