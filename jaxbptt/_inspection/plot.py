"""`plot_by_lag`: draws a gradient by lag, its decay, and the window that holds a share of it."""

from itertools import cycle
from math import floor, log10
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from jaxbptt import _errors
from jaxbptt._inspection.by_lag import ByLag
from jaxbptt._inspection.decay import Decay, fit_decay, fit_line
from jaxbptt._types import PyTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

# Okabe & Ito's colours, which can be told apart without seeing red or green, and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_GREY, _INK = "#7A7A7A", "#333333"
_FONT_SIZE = 7  # points
_MARKERS = ".x+1"  # the first for the first round of colours, and so on
_STYLES = ("-", "--", "-.", ":")
# Marks the lines that took a colour, so that a second gradient in the same axes takes others.
_PART = "part of λ"


def plot_by_lag(
    lags: ByLag,
    *,
    ax: "Axes | None" = None,
    share: float | None = 0.95,
    names: PyTree = None,
    params: Literal["all", "each"] | None = "all",
    burn_in: int | None = None,
    legend: bool = True,
) -> "Axes":
    """Draws the norms by lag on a logarithmic axis, their decay, and a window.

    There is a line for each part of λ, with its fitted decay dashed and the rate in its label;
    thinner lines for the contributions to the parameters; and a vertical line where the
    smallest window ends that has a share of these. Zeros are left out, and so are parts that
    no gradient flows through.

    Args:
        lags: norms, from `gradient_by_lag`, or the mean of many (see `fit_decay`).
        ax: where to draw, with the legend inside; None for a figure of its own, as wide as a
            column of a paper with the legend above the axes, and made without pyplot:
            `ax.figure.savefig("by_lag.pdf")`.
        share: of the contributions, above 0 and at most 1; None for no window.
        names: of the parts of λ, strings in the structure of the carry or in a list; None for
            their paths, carry['fast'], or λ where there is one part only.
        params: "all" draws all parameters together, "each" one line for each of their leaves,
            None nothing.
        burn_in: as for `fit_decay`.
        legend: whether to draw a legend. Without one the labels are still on the lines, for a
            later `ax.legend()`.

    Returns:
        The matplotlib Axes.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: `lags` are no norms, or another argument is not as above.

    Examples:
        After `pip install 'jaxbptt[plot]'`:

            ax = jaxbptt.plot_by_lag(lags)
            ax.figure.savefig("by_lag.png")
    """
    _need_matplotlib()
    if params is not None:
        _errors.one_of("params", params, ("all", "each"))
    decay = fit_decay(lags, burn_in=burn_in)
    parts, own_figure = _parts(lags, names), ax is None
    ax = _column() if ax is None else ax
    # Several gradients may be drawn into one picture: colours go on where the last one ended.
    used = sum(line.get_gid() == _PART for line in ax.lines)
    for i, (name, norms) in enumerate(parts, used):
        line = draw_norms(ax, norms, name, COLOURS[i % len(COLOURS)], burn_in=burn_in)
        line.set(gid=_PART, marker=_MARKERS[i // len(COLOURS) % len(_MARKERS)])
    for (name, norms), style in zip(_contributions(lags, params), cycle(_STYLES), strict=False):
        draw_norms(ax, norms, name, _GREY, burn_in=burn_in, thin=style)
    lay_out(ax, len(decay.share))
    if share is not None:
        _draw_window(ax, decay, share)
    if legend and own_figure:
        _add_legend_above(ax)
    elif legend:
        # Not quite see-through, as lines may run behind it.
        ax.legend(edgecolor="none", fontsize="small")
    return ax


def draw_norms(
    ax: "Axes",
    norms: Any,
    name: str,
    colour: str,
    *,
    burn_in: int | None = None,
    thin: str | None = None,
) -> "Line2D":
    """Draws norms (window,) and, dashed, their fitted decay, whose rate follows the name.

    With `thin`, the style of the line, there are no dots and no dashes.
    """
    from matplotlib.colors import to_rgba

    norms = np.asarray(norms)
    lags = np.arange(len(norms))
    # The rate of a thin line is in its label, but its dashes would cover the others'.
    fit = fit_line(jnp.asarray(norms), burn_in)
    rate = float(fit.rate)
    label = f"{name}  {_rounded(rate)} per step" if rate > 0 else name
    # Zeros have no place on the axis, and leave a gap in the line.
    drawable = _on_log_axis(norms)
    shown = np.where(drawable, norms, np.nan)
    faint = to_rgba(colour, 1 if thin else 0.4)
    (line,) = ax.plot(lags, shown, thin or "-", color=faint, linewidth=0.8, label=label)
    line.set(markeredgecolor=colour, markerfacecolor=colour, markersize=4)
    # A single point has no line to be seen by, and too many dots are a band.
    if not thin or np.count_nonzero(drawable) == 1:
        line.set(marker=".", markevery=max(1, np.count_nonzero(drawable) // 50))
    if rate > 0 and not thin:
        fitted = lags[int(fit.first) : np.flatnonzero(drawable)[-1] + 1]
        ax.plot(fitted, np.asarray(fit.at(fitted)), "--", color=_INK, linewidth=0.7, zorder=3)
    return line


def lay_out(ax: "Axes", window: int) -> None:
    """Sets a logarithmic axis over whole lags, and leaves out the frame."""
    from matplotlib.ticker import MaxNLocator

    ax.set_yscale("log")
    # A gradient that was drawn here before may reach further back.
    before = [np.size(line.get_xdata()) for line in ax.lines if line.get_gid() == _PART]
    ax.set_xlim(-0.5, max(window, *before, 0) - 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    ax.set(xlabel="lag (steps)", ylabel="gradient norm")
    ax.spines[["top", "right"]].set_visible(False)


def _rounded(rate: float) -> str:
    """Two digits at least, and two of the distance to 1: 0.9980 is not 1.00."""
    apart = abs(1 - rate)
    return f"{rate:.{max(2, 1 - floor(log10(apart))) if apart > 1e-6 else 2}f}"


def _parts(lags: ByLag, names: PyTree) -> list[tuple[str, Any]]:
    """Names and norms of the leaves of λ that gradients flow through."""
    leaves = tree_leaves_with_path(lags.carry)
    paths = [f"carry{keystr(path)}" for path, _ in leaves] if len(leaves) > 1 else ["λ"]
    given = paths[: len(leaves)] if names is None else jax.tree.leaves(names)
    if len(given) != len(leaves):
        raise ValueError(
            f"names must be one string for each of the {len(leaves)} leaves of the carry, but got "
            f"{names!r}. Leave it out for their paths."
        )
    return [(name, v) for name, (_, v) in zip(given, leaves, strict=True) if _on_log_axis(v).any()]


def _contributions(lags: ByLag, params: str | None) -> list[tuple[str, Any]]:
    """Names and norms of what the parameters get, all together or each leaf."""
    leaves = [(f"params{keystr(path)}", v) for path, v in tree_leaves_with_path(lags.params)]
    if params == "all":
        # Norms of parts are joined as the sides of a right angle.
        leaves = [("parameters", np.hypot.reduce([np.asarray(v) for _, v in leaves]))]
    return [(name, v) for name, v in leaves if params and _on_log_axis(v).any()]


def _on_log_axis(norms: Any) -> Any:
    """Which norms have a place on a logarithmic axis."""
    return (norms > 0) & np.isfinite(norms)


def _draw_window(ax: "Axes", decay: Decay, share: float) -> None:
    """Draws a vertical line behind the last lag of a window, or says why there is none."""
    end, window, percent = int(decay.window_for(share)), len(decay.share), f"{100 * share:.6g} %"
    label = f"{percent} within {end:,} step{'s' * (end > 1)}"
    if end > window:
        label = f"{label}, by the fit" if end < 2**31 - 1 else f"no window has {percent}"
    if np.isnan(decay.share[-1]):
        label = f"can't tell what window has {percent}"
    if end <= window:
        # Between two lags, so that it is clear which is the last one within.
        ax.axvline(end - 0.5, color=_INK, linewidth=0.7, zorder=1, label=label)
    else:
        # An empty line takes the label into the legend.
        ax.plot([], [], " ", label=label)


def _column() -> "Axes":
    """The axes of a new figure as wide as a column, without pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # pyplot would keep the figure alive, and may want a display.
    figure = Figure(figsize=(3.5, 2.0), dpi=300, layout="constrained")
    FigureCanvasAgg(figure)
    ax: Axes = figure.subplots()
    ax.tick_params(which="both", labelsize=_FONT_SIZE)
    ax.xaxis.label.set_fontsize(_FONT_SIZE)
    ax.yaxis.label.set_fontsize(_FONT_SIZE)
    return ax


def _add_legend_above(ax: "Axes") -> None:
    """Adds a legend above the axes, in a figure that grows by what it needs."""
    place: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0}
    legend = ax.legend(frameon=False, handlelength=1.4, fontsize=_FONT_SIZE, **place)
    labels = [text.get_text() for text in legend.get_texts()]
    # The layout engine gives the legend its room, but from that of the axes.
    figure = ax.figure.canvas.figure
    width, height = figure.get_size_inches()
    width = max(width, 0.9 + 0.05 * max(map(len, labels), default=0))
    figure.set_size_inches(width, height + 0.15 * len(labels))


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError(
            "plot_by_lag needs matplotlib, which is not there. pip install 'jaxbptt[plot]'"
        ) from None
