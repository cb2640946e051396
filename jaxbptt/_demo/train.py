"""The main job's online training, one run of it: a gradient and an update at every step."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbptt
from jaxbptt._demo.model import (
    Carry,
    InputAndTarget,
    Model,
    Params,
    bits_per_character,
    cross_entropy,
)
from jaxbptt._demo.saves import JobCheckpoints, RunCheckpoints, TrainingProgress
from jaxbptt._demo.text import Symbols, Text, UsageError

BLOCK = 50  # steps in one call of compiled code; an interrupt waits for its end
# Where a run is measured on held-out text, in 32nds of its steps: more often while it learns fast.
_MEASURED_AT = (1, 2, 3, *range(4, 33, 4))


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The options that decide what one run computes."""

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
        """The truncation, which is what tells the runs of a job apart."""
        return f"window {self.window}" + (f", every {self.every}" if self.every > 1 else "")


def train(
    model: Model,
    text: Text,
    config: TrainingConfig,
    *,
    stop_asked: Callable[[], bool] = lambda: False,
    checkpoints: JobCheckpoints | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> TrainingProgress:
    """Trains online, step by step through `batch` parallel streams.

    Args:
        model: the model.
        text: what to train on, and the held-out part to measure on.
        config: the options.
        stop_asked: called after each block; the run ends early when it returns True.
        checkpoints: where to continue from and where to save; None for neither.
        say: told what happens while no progress bar moves.

    Returns:
        The progress, up to the last step or an early end.

    Raises:
        UsageError: the loss is no longer finite.
    """
    say(f"{config.label}: compiling, which takes some seconds")
    learner = make_learner(model, config)
    progress = TrainingProgress(initial_state(learner, model, config))
    with contextlib.ExitStack() as stack:
        saves = None
        if checkpoints is not None:
            saves = stack.enter_context(checkpoints.of_run(config.label, learner))
            progress = saves.restored(progress, say)
        remaining = Stream(text.train, config.batch, progress.steps, config.steps)
        _compile(learner, model, config, remaining)
        run = _Run(model, text, config, progress, saves, stop_asked)
        # The curve begins untrained; the checkpoint of a resumed run has its beginning already.
        if not progress.held_out_curve:
            run.measure()
        run.block_began = time.perf_counter()
        learner.run(
            progress.state,
            remaining,
            block=BLOCK,
            callback=run.after_block,
            progress=f"{config.label}: bits per character",
        )
    # After the last save: a resumed run has no measurement where this one was interrupted.
    if progress.held_out_curve[-1][0] < progress.steps:
        run.measure()
    return progress


@dataclasses.dataclass
class _Run:
    """Keeps account of a run: `Learner.run` calls it after each block."""

    model: Model
    text: Text
    config: TrainingConfig
    progress: TrainingProgress
    saves: RunCheckpoints | None
    stop_asked: Callable[[], bool]
    block_began: float = 0.0

    def after_block(self, state: jaxbptt.LearnerState, metrics: jaxbptt.Metrics) -> bool:
        """Notes what a block has brought, and returns True to end the run."""
        progress, config = self.progress, self.config
        progress.seconds += time.perf_counter() - self.block_began
        progress.state = state
        done, bits = progress.steps, float(metrics.loss.mean())
        if not math.isfinite(bits):
            raise UsageError(
                f"the loss is not finite after {done} steps of {config.label}. "
                "Lower --learning-rate."
            )
        progress.curve.append((done, bits))
        if self._is_due(done - len(metrics.loss), done):
            self.measure()
        last = self.stop_asked() or done == config.steps
        if self.saves:
            self.saves.save(progress, last=last)
        # The clock starts anew, so that it counts neither measuring nor saving.
        self.block_began = time.perf_counter()
        return last

    def _is_due(self, before: int, after: int) -> bool:
        # Counted from the first step, so that a resumed run measures at the same steps.
        steps = self.config.steps
        return any(32 * before < mark * steps <= 32 * after for mark in _MEASURED_AT)

    def measure(self) -> None:
        """Adds a point to the curve on held-out text."""
        progress = self.progress
        bits = bits_per_character(self.model, progress.state.params, self.text.held_out)
        progress.held_out_curve.append((progress.steps, bits))


def make_learner(model: Model, config: TrainingConfig) -> jaxbptt.Learner:
    """The learner of a run; its loss is in bits per character."""
    every = config.every
    # Schedules count updates, not steps.
    updates = max(config.steps // every, 1)
    optimizer = optax.chain(
        # The gradient is that of the sum of a group's losses; this makes it that of their mean.
        optax.scale(1 / every),
        # Online, single gradients are noisy.
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(config.learning_rate, updates)),
    )

    def step(params: Params, carry: Carry, x: InputAndTarget) -> tuple[Carry, jax.Array]:
        return model.step(params, carry, x[0])

    def loss(logits: jax.Array, x: InputAndTarget) -> jax.Array:
        return cross_entropy(logits, x[1])

    return jaxbptt.learner(
        step, loss, optimizer, window=config.window, every=every, weights=config.weights
    )


def initial_state(
    learner: jaxbptt.Learner, model: Model, config: TrainingConfig
) -> jaxbptt.LearnerState:
    """The state before the first step."""
    x = jnp.zeros(config.batch, jnp.int32)
    return learner.init(model.init(config.seed), model.initial_carry(config.batch), (x, x))


def tape_bytes(model: Model, config: TrainingConfig) -> int:
    """The size of the recorded steps, found without allocating them."""
    learner = make_learner(model, config)
    state: jaxbptt.LearnerState = jax.eval_shape(lambda: initial_state(learner, model, config))
    return state.tape.nbytes


@dataclasses.dataclass(frozen=True)
class Stream:
    """A text read in parallel streams: for each step the characters and the next ones.

    Each stream starts at its own place and runs on into the next one's part, so a carry meets
    a seam only where the text ends and begins again.

    Attributes:
        symbols: (n,), the text.
        batch: the number of streams.
        start: the first step.
        stop: the step to stop before.
    """

    symbols: Symbols
    batch: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[tuple[Symbols, Symbols]]:
        n = len(self.symbols)
        position = (np.arange(self.batch) * (n // self.batch) + self.start) % n
        for _ in range(len(self)):
            following = (position + 1) % n
            yield self.symbols[position], self.symbols[following]
            position = following


def _compile(
    learner: jaxbptt.Learner, model: Model, config: TrainingConfig, remaining: Stream
) -> None:
    """Compiles what a run needs, so that its clock counts training alone.

    `Learner.run` compiles a program for each length of a block: a full one, and the last.
    """
    for steps in {min(BLOCK, len(remaining)), len(remaining) % BLOCK} - {0}:
        few = dataclasses.replace(remaining, stop=remaining.start + steps)
        learner.run(initial_state(learner, model, config), few, block=BLOCK)
