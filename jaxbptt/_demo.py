"""The main job's model and its online training: a gradient and an update at every step."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxbptt._demo_text import Symbols, UsageError
from jaxbptt._record import record
from jaxbptt._tape import Tape

Params = dict[str, jax.Array]
Carry = tuple[jax.Array, ...]  # each (batch, hidden); h first
Pair = tuple[jax.Array, jax.Array]

CELLS = {"rnn": 1, "gru": 3, "lstm": 4}  # and how many times `hidden` their gates take
BLOCK = 50  # steps in one call of compiled code; an interrupt waits for its end
_NATS_PER_BIT = math.log(2)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one training run is made of."""

    cell: str
    hidden: int
    batch: int
    window: int
    every: int
    weights: str
    steps: int
    learning_rate: float
    seed: int

    @property
    def label(self) -> str:
        """The truncation, for people."""
        return f"window {self.window}" + (f", every {self.every}" if self.every > 1 else "")


@dataclasses.dataclass(frozen=True)
class Model:
    """A recurrent cell with a softmax over characters on top."""

    cell: str
    hidden: int
    symbols: int

    def init(self, seed: int) -> Params:
        """Parameters drawn at random, float32."""
        n, gates = self.hidden, CELLS[self.cell] * self.hidden
        keys = jax.random.split(jax.random.key(seed), 3)
        b = np.zeros(gates, np.float32)
        if self.cell == "lstm":
            b[n : 2 * n] = 1  # an open forget gate
        return {
            "Wx": _normal(keys[0], (self.symbols, gates), 0.1),
            "Wh": _normal(keys[1], (n, gates), n**-0.5),
            "b": jnp.asarray(b),
            "Wy": _normal(keys[2], (n, self.symbols), n**-0.5),
            "by": jnp.zeros(self.symbols, jnp.float32),
        }

    def carry(self, batch: int) -> Carry:
        """The carry to start from."""
        leaves = 2 if self.cell == "lstm" else 1
        return tuple(jnp.zeros((batch, self.hidden), jnp.float32) for _ in range(leaves))

    def step(self, params: Params, carry: Carry, x: jax.Array) -> tuple[Carry, jax.Array]:
        """The next carry and the logits (batch, symbols) of the next character.

        x is characters' numbers (batch,), or the same as one-hot rows (batch, symbols).
        """
        one_hot = jnp.issubdtype(x.dtype, jnp.floating)
        drive = (x @ params["Wx"] if one_hot else params["Wx"][x]) + params["b"][None]
        carry = self._next(carry, drive, carry[0] @ params["Wh"])
        return carry, carry[0] @ params["Wy"] + params["by"][None]

    def losses(self, params: Params, carry: Carry, x: Pair) -> tuple[Carry, jax.Array]:
        """The next carry and each stream's loss in nats (batch,); x is input and target."""
        carry, logits = self.step(params, carry, x[0])
        hit = jnp.take_along_axis(logits, x[1][:, None], axis=1)[:, 0]
        return carry, jax.nn.logsumexp(logits, axis=1) - hit

    def loss(self, params: Params, carry: Carry, x: Pair) -> tuple[Carry, jax.Array]:
        """The next carry and the mean loss in nats: the step that is recorded."""
        carry, losses = self.losses(params, carry, x)
        return carry, losses.mean()

    def _next(self, carry: Carry, drive: jax.Array, recurrent: jax.Array) -> Carry:
        h = carry[0]
        if self.cell == "rnn":
            return (jnp.tanh(drive + recurrent),)
        if self.cell == "gru":
            r, z, n = jnp.split(drive, 3, axis=1)
            hr, hz, hn = jnp.split(recurrent, 3, axis=1)
            r, z = jax.nn.sigmoid(r + hr), jax.nn.sigmoid(z + hz)
            n = jnp.tanh(n + r * hn)
            return (n + z * (h - n),)
        i, f, g, o = jnp.split(drive + recurrent, 4, axis=1)
        c = jax.nn.sigmoid(f) * carry[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c


class State(NamedTuple):
    """What the compiled loop carries, donated to each block."""

    params: Params
    optimizer: optax.OptState
    tape: Tape


@dataclasses.dataclass(frozen=True)
class Run:
    """What training left: curve is (steps done, bits per character of the block before)."""

    settings: Settings
    params: Params
    curve: list[tuple[int, float]]
    steps: int
    seconds: float
    nbytes: int

    @property
    def speed(self) -> float:
        """Steps per second, without the time to compile."""
        return self.steps / self.seconds if self.steps else 0.0


def train(
    model: Model,
    symbols: Symbols,
    settings: Settings,
    *,
    report: Callable[[int, float], None],
    stopped: Callable[[], bool],
) -> Run:
    """Trains online, step by step through `batch` parallel streams.

    Each stream starts at its own place and runs on into the next one's part, so the
    carry crosses no seam but the text's end.

    Args:
        model: the model.
        symbols: int32 (n,), the text to train on.
        settings: the settings.
        report: called after each block with its steps and bits per character.
        stopped: asked before each block whether to leave off.

    Raises:
        UsageError: the loss is no longer finite.
    """
    state, block = _start(model, settings)
    compiled: dict[int, Callable[..., tuple[State, jax.Array]]] = {}
    text, curve, done, seconds = jnp.asarray(symbols), [], 0, 0.0
    while done < settings.steps and not stopped():
        steps = min(BLOCK, settings.steps - done)
        times = np.asarray((done + np.arange(steps)) % len(symbols), np.int32)
        if steps not in compiled:
            compiled[steps] = jax.jit(block, donate_argnums=0).lower(state, text, times).compile()
        begun = time.perf_counter()
        state, loss = compiled[steps](state, text, times)
        bits = float(loss) / _NATS_PER_BIT
        seconds += time.perf_counter() - begun
        done += steps
        if not math.isfinite(bits):
            raise UsageError(
                f"the loss is not finite after {done} steps of {settings.label}. "
                "Lower --learning-rate."
            )
        curve.append((done, bits))
        report(steps, bits)
    return Run(settings, state.params, curve, done, seconds, state.tape.nbytes)


def tape_bytes(model: Model, settings: Settings) -> int:
    """Bytes of the ring, before anything is allocated."""
    tape: Tape = jax.eval_shape(lambda: _start(model, settings)[0].tape)
    return tape.nbytes


def _start(
    model: Model, settings: Settings
) -> tuple[State, Callable[[State, jax.Array, jax.Array], tuple[State, jax.Array]]]:
    """The state to start from, and the function that runs a block of steps."""
    every, batch = settings.every, settings.batch
    rec = record(model.loss, window=settings.window, every=every, weights=settings.weights)
    rate = optax.cosine_decay_schedule(settings.learning_rate, max(settings.steps // every, 1))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    def update(grads: Params, old: tuple[Params, optax.OptState]) -> tuple[Params, optax.OptState]:
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies its integer counts
            updates, state = optimizer.update(grads, old[1], old[0])
            new: Params = optax.apply_updates(old[0], updates)
            return new, state

    def one(state: State, x: Pair) -> tuple[State, jax.Array]:
        def loss_fn(params: Params) -> tuple[jax.Array, tuple[Tape, jax.Array]]:
            tape, loss = rec(params, state.tape, x)
            return loss / every, (tape, loss)  # a group's gradient: the mean over its losses

        grads, (tape, loss) = jax.grad(loss_fn, has_aux=True)(state.params)
        old = state.params, state.optimizer
        if every == 1:
            new = update(grads, old)
        else:
            new = jax.lax.cond(rec.due(tape), lambda: update(grads, old), lambda: old)
        return State(*new, tape), loss

    def block(state: State, text: jax.Array, times: jax.Array) -> tuple[State, jax.Array]:
        n = len(text)
        first = np.asarray(np.arange(batch) * (n // batch), np.int32)

        def at(state: State, time: jax.Array) -> tuple[State, jax.Array]:
            place = (first + time) % n
            return one(state, (text[place], text[(place + 1) % n]))

        state, losses = jax.lax.scan(at, state, times)
        return state, losses.mean()

    params, x = model.init(settings.seed), jnp.zeros(batch, jnp.int32)
    return State(
        params, optimizer.init(params), rec.init(params, model.carry(batch), (x, x))
    ), block


def _normal(key: jax.Array, shape: tuple[int, ...], scale: float) -> jax.Array:
    return scale * jax.random.normal(key, shape, jnp.float32)
