"""The main job's results: the gradient by lag, a sample, a table, and a picture of the runs."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxbptt
from jaxbptt._demo.model import Carry, InputAndTarget, Model, Params
from jaxbptt._demo.saves import TrainingProgress
from jaxbptt._demo.text import Symbols
from jaxbptt._demo.train import TrainingConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POSITIONS = 32  # in the held-out text, over which the gradient by lag is averaged
_TEMPERATURE = 0.7  # below 1, so that a sample has fewer unlikely characters
# Okabe and Ito's, in the order in which `plot_by_lag` takes them.
_COLOURS = ("#0072B2", "#D55E00", "#009E73")
_CAPTION = (
    "Dots: measured on the held-out tenth of the text. Thin lines: the training text as it is "
    "read; where they rise and fall together, the text is harder or easier."
)


@dataclasses.dataclass(frozen=True)
class RunResult:
    """A run that has ended, and its gradient by lag on held-out text."""

    config: TrainingConfig
    progress: TrainingProgress
    norms: jaxbptt.ByLag

    def bits_after(self, seconds: float) -> float:
        """Held-out bits per character after so much time, between two measurements if need be."""
        steps, bits = zip(*self.progress.held_out_curve, strict=True)
        return float(np.interp(seconds * self.progress.speed, steps, bits))

    def as_json(self) -> dict[str, Any]:
        """What `results.json` says of the run."""
        config, progress = self.config, self.progress
        return {
            "window": config.window,
            "every": config.every,
            "learning_rate": config.learning_rate,
            "steps": progress.steps,
            "seconds": progress.seconds,
            "steps_per_second": progress.speed,
            "tape_bytes": progress.state.tape.nbytes,
            "held_out_bits_before": progress.held_out_curve[0][1],
            "held_out_bits_after": progress.held_out_curve[-1][1],
            "curve": progress.curve,
            "held_out_curve": progress.held_out_curve,
            "gradient_norm_by_lag": np.asarray(self.norms.carry).tolist(),
        }


def mean_norms_by_lag(model: Model, params: Params, held_out: Symbols, lags: int) -> jaxbptt.ByLag:
    """The gradient's norms by lag, averaged over up to 32 positions in the held-out text.

    Args:
        model: the model.
        params: its parameters, held fixed.
        held_out: (steps, streams).
        lags: how far to look back, however long the window was in training; less where the
            text is shorter.

    Returns:
        The norms of `jaxbptt.gradient_by_lag`, with those of the carry's parts in one.
    """
    lags = min(lags, len(held_out) - 1)
    streams = jnp.asarray(held_out[: lags + _POSITIONS])
    return _mean_norms(model, lags, params, (streams[:-1], streams[1:]))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _mean_norms(model: Model, lags: int, params: Params, xs: InputAndTarget) -> jaxbptt.ByLag:
    recorder = jaxbptt.record(model.loss, window=lags, weights="current")

    def record_step(tape: jaxbptt.Tape, x: InputAndTarget) -> tuple[jaxbptt.Tape, None]:
        return recorder(params, tape, x)[0], None

    def measure(tape: jaxbptt.Tape, x: InputAndTarget) -> tuple[jaxbptt.Tape, jaxbptt.ByLag]:
        tape, _ = record_step(tape, x)
        norms = jaxbptt.gradient_by_lag(recorder, params, tape, jnp.ones(1, jnp.float32))
        of_carry = jnp.linalg.norm(jnp.stack(norms.carry), axis=0)
        return tape, norms._replace(carry=of_carry)

    first_x = jax.tree.map(lambda rows: rows[0], xs)
    tape = recorder.init(params, model.initial_carry(xs[0].shape[1]), first_x)
    # The tape is full before the first measurement, so that each lag has as many of them.
    tape, _ = jax.lax.scan(record_step, tape, jax.tree.map(lambda rows: rows[: lags - 1], xs))
    _, norms = jax.lax.scan(measure, tape, jax.tree.map(lambda rows: rows[lags - 1 :], xs))
    return jax.tree.map(lambda rows: rows.mean(0), norms)


def sample(model: Model, params: Params, prompt: Symbols, length: int, seed: int) -> Symbols:
    """Draws `length` characters from the model after it has read `prompt`."""

    @jax.jit
    def draw(params: Params, prompt: jax.Array, noise: jax.Array) -> jax.Array:
        def read(carry: Carry, symbol: jax.Array) -> tuple[Carry, jax.Array]:
            return model.step(params, carry, symbol[None])

        def write(
            state: tuple[Carry, jax.Array], noise: jax.Array
        ) -> tuple[tuple[Carry, jax.Array], jax.Array]:
            carry, logits = state
            symbol = jnp.argmax(logits / _TEMPERATURE + noise[None], axis=1)
            return model.step(params, carry, symbol), symbol[0]

        carry, logits = jax.lax.scan(read, model.initial_carry(1), prompt)
        return jax.lax.scan(write, (carry, logits[-1]), noise)[1]

    # The largest of logits with Gumbel noise is a draw from their softmax. [seed, 1], since the
    # parameters were drawn with seed.
    noise = np.random.default_rng([seed, 1]).gumbel(size=(length, model.symbols)).astype(np.float32)
    return np.asarray(draw(params, jnp.asarray(prompt), jnp.asarray(noise)), np.int32)


def table(runs: Sequence[RunResult]) -> str:
    """The runs side by side, one a column, in plain text."""
    facts = [run.as_json() for run in runs]
    rows = [
        ("", [run.config.label for run in runs]),
        ("held-out bits per character, before", _formatted(facts, "held_out_bits_before", ".3f")),
        ("held-out bits per character, after", _formatted(facts, "held_out_bits_after", ".3f")),
        ("steps", _formatted(facts, "steps", ",")),
        ("seconds", _formatted(facts, "seconds", ".2f")),
        ("steps per second", _formatted(facts, "steps_per_second", ",.0f")),
        ("learning rate", _formatted(facts, "learning_rate", ".3g")),
        ("bytes of the tape", _formatted(facts, "tape_bytes", ",")),
    ]
    if len(runs) > 1:
        # At their ends all have read as many characters, but not for as long; here they have.
        seconds = min(run.progress.seconds for run in runs)
        bits = [f"{run.bits_after(seconds):.3f}" for run in runs]
        rows.insert(3, (f"held-out bits, each after {seconds:.2f} s", bits))
    return "\n".join(f"{name:36}" + "".join(f"{v:>24}" for v in values) for name, values in rows)


def _formatted(facts: list[dict[str, Any]], name: str, how: str) -> list[str]:
    return [format(each[name], how) for each in facts]


def picture(runs: Sequence[RunResult]) -> "Figure":
    """Learning curves by step and by second, and the gradient by lag, of up to three runs."""
    # Imported here, for who compiles or times the training draws nothing. Not by pyplot, which
    # would keep the figure and look for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    by_step, by_second, by_lag = figure.subplots(1, 3)
    for run, colour in zip(runs, _COLOURS, strict=False):
        label, progress = run.config.label, run.progress
        by_step.plot(*_columns(progress.curve), color=colour, linewidth=0.6, alpha=0.4)
        steps, bits = _columns(progress.held_out_curve)
        look: Any = {"color": colour, "marker": "o", "markersize": 3.5}
        by_step.plot(steps, bits, label=f"{label}: {bits[-1]:.2f}", **look)
        by_second.plot(steps / (progress.speed or 1), bits, label=label, **look)
        jaxbptt.plot_by_lag(run.norms, ax=by_lag, names=[label], params=None, share=None)
    window = runs[0].config.window
    by_lag.axvline(window - 0.5, color="grey", linestyle=":", label="end of the window")
    by_step.set(xlabel="steps (characters of each stream)", title="Learning, by the character")
    by_second.set(xlabel="seconds of training", title="Learning, by the second")
    by_lag.set(title="How far back gradients reach, on held-out text")
    # Untrained, a model is so much worse that it would leave no room for the rest.
    worst = max(bits for run in runs for _, bits in run.progress.held_out_curve[1:])
    by_step.set_ylim(top=1.1 * worst)
    by_second.set_ylim(by_step.get_ylim())
    for ax in (by_step, by_second):
        ax.set(ylabel="bits per character")
        ax.spines[["top", "right"]].set_visible(False)
    for ax in (by_step, by_second, by_lag):
        ax.legend(frameon=False)
    figure.supxlabel(_CAPTION, fontsize="small")
    return figure


def _columns(curve: Sequence[tuple[int, float]]) -> Any:
    return np.array(curve, float).reshape(-1, 2).T
