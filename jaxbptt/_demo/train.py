"""The main job's model and its online training: a gradient and an update at every step."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxbptt._demo.saves import Progress, Saves
from jaxbptt._demo.text import Symbols, UsageError
from jaxbptt._training.learner import Learner, learner
from jaxbptt._training.state import LearnerState, Metrics

Params = dict[str, jax.Array]
Carry = tuple[jax.Array, ...]  # each (batch, hidden); h first
Pair = tuple[jax.Array, jax.Array]

CELLS = {"rnn": 1, "gru": 3, "lstm": 4}  # and how many times `hidden` their gates take
BLOCK = 50  # steps in one call of compiled code; an interrupt waits for its end


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
        return carry, cross_entropy(logits, x[1])

    def loss(self, params: Params, carry: Carry, x: Pair) -> tuple[Carry, jax.Array]:
        """The next carry and the mean loss in nats."""
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


def cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Each stream's loss in nats (batch,)."""
    hit = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - hit


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
    saves: Saves | None = None,
) -> Run:
    """Trains online, step by step through `batch` parallel streams.

    Each stream starts at its own place and runs on into the next one's part, so the
    carry crosses no seam but the text's end.

    Args:
        model: the model.
        symbols: int32 (n,), the text to train on.
        settings: the settings.
        report: called after each block with its steps and bits per character.
        stopped: asked after each block whether to leave off.
        saves: where to go on from, and to save; None for neither.

    Raises:
        UsageError: the loss is no longer finite.
    """
    online = online_learner(model, settings)
    now = Progress(begin(online, model, settings))
    with contextlib.ExitStack() as stack:
        saved = saves and stack.enter_context(saves.of_run(settings.label, online))
        if saved:
            now = saved.restored(now)
            if now.curve:
                report(*now.curve[-1])
        left = settings.steps - now.steps
        for steps in {min(BLOCK, left), left % BLOCK}:
            # Compiled before the clock starts; what these steps learn is thrown away.
            few = _stream(symbols, settings.batch, 0, steps)
            online.run(begin(online, model, settings), few, block=BLOCK)
        clock = time.perf_counter() - now.seconds

        def callback(state: LearnerState, metrics: Metrics) -> bool:
            bits = float(metrics.aux.mean()) / math.log(2)
            now.state, now.seconds = state, time.perf_counter() - clock
            if not math.isfinite(bits):
                raise UsageError(
                    f"the loss is not finite after {now.steps} steps of {settings.label}. "
                    "Lower --learning-rate."
                )
            now.curve.append((now.steps, bits))
            report(len(metrics.loss), bits)
            last = stopped() or now.steps == settings.steps
            if saved:
                saved.save(now, last=last)
            return last

        stream = _stream(symbols, settings.batch, now.steps, settings.steps)
        state = online.run(now.state, stream, block=BLOCK, callback=callback)
    return Run(settings, state.params, now.curve, now.steps, now.seconds, state.tape.nbytes)


def online_learner(model: Model, settings: Settings) -> Learner:
    """What trains the model. Its aux is the loss in nats."""
    every = settings.every
    rate = optax.cosine_decay_schedule(settings.learning_rate, max(settings.steps // every, 1))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    def step(params: Params, carry: Carry, x: Pair) -> tuple[Carry, jax.Array]:
        return model.step(params, carry, x[0])

    def loss(logits: jax.Array, x: Pair) -> Pair:
        nats = cross_entropy(logits, x[1]).mean()
        return nats / every, nats  # a group's gradient: the mean over its losses

    window, weights = settings.window, settings.weights
    return learner(step, loss, optimizer, window=window, every=every, weights=weights)


def begin(online: Learner, model: Model, settings: Settings) -> LearnerState:
    """The state to start from."""
    x = jnp.zeros(settings.batch, jnp.int32)
    return online.init(model.init(settings.seed), model.carry(settings.batch), (x, x))


def tape_bytes(model: Model, settings: Settings) -> int:
    """Bytes of the ring, before anything is allocated."""
    online = online_learner(model, settings)
    state: LearnerState = jax.eval_shape(lambda: begin(online, model, settings))
    return state.tape.nbytes


def _stream(
    symbols: Symbols, batch: int, start: int, end: int
) -> Iterator[tuple[Symbols, Symbols]]:
    """Characters' numbers and those of the next ones, for each stream its own place."""
    place = (np.arange(batch) * (len(symbols) // batch) + start) % len(symbols)
    for _ in range(start, end):
        following = (place + 1) % len(symbols)
        yield symbols[place], symbols[following]
        place = following


def _normal(key: jax.Array, shape: tuple[int, ...], scale: float) -> jax.Array:
    return scale * jax.random.normal(key, shape, jnp.float32)
