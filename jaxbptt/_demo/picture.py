"""The main job's picture: learning curves, and the gradient's norm by lag."""

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxbptt._demo.results import Seen
from jaxbptt._inspection.plot import COLOURS, draw_norms, lay_out


def picture(done: Sequence[Seen]) -> Figure:
    """Learning curves, and the gradient's norm by lag, for up to two runs."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    curves, lags = figure.subplots(1, 2)
    for seen, colour in zip(done, COLOURS, strict=False):
        run, label = seen.run, seen.run.settings.label
        steps, bits = [at for at, _ in run.curve], [bits for _, bits in run.curve]
        curves.plot(steps, bits, color=colour, linewidth=0.7, alpha=0.5)
        curves.plot(steps, _smooth(bits), color=colour, label=f"{label}, training")
        curves.plot(
            run.steps, seen.after, "o", color=colour, label=f"{label}, held out: {seen.after:.2f}"
        )
        draw_norms(lags, seen.norms, f"trained with {label}", colour)
    curves.set(xlabel="steps", ylabel="bits per character", title="Learning online")
    lags.axvline(
        done[0].run.settings.window - 0.5, color="grey", linestyle=":", label="end of the window"
    )
    lay_out(lags, max(len(seen.norms) for seen in done))
    lags.set(
        xlabel="lag k (steps)",
        ylabel="mean norm of ∂loss(t) / ∂x(t-k)",
        title="The gradient by lag, on held-out text",
    )
    curves.spines[["top", "right"]].set_visible(False)
    for axes in (curves, lags):
        axes.legend(frameon=False)
    return figure


def _smooth(values: list[float], width: int = 9) -> list[float]:
    """The mean over up to `width` neighbours."""
    half = width // 2
    return [float(np.mean(values[max(i - half, 0) : i + half + 1])) for i in range(len(values))]
