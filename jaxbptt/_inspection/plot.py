"""`plot_by_lag`: a gradient by lag as a picture, its decay, and the window that this asks for."""

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

# Okabe & Ito's colours: told apart without seeing red or green, and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_GREY, _INK = "#7A7A7A", "#333333"
_SIZE = 7  # of letters, in points
_MARKS = ".x+1"  # for the first, the second, ... round of colours
_STYLES = ("-", "--", "-.", ":")
_PART = "part of λ"  # marks the lines that use up a colour


def plot_by_lag(
    lags: ByLag,
    *,
    ax: "Axes | None" = None,
    share: float | None = 0.95,
    names: PyTree = None,
    params: Literal["all", "each"] | None = "all",
    burn_in: int | None = None,
    legend: bool | None = None,
) -> "Axes":
    """Draws the norms by lag on a logarithmic axis, their decay, and a window.

    A line for each part of λ, its fitted decay dashed and its rate in the label; thinner, the
    contributions to the parameters; upright, where the smallest window ends that has a share
    of these. Zeros are left out, and parts that no gradient flows through.

    Args:
        lags: norms, from `gradient_by_lag`, or the mean of many (see `fit_decay`).
        ax: where to draw; None for a figure of its own, as wide as a column of a paper and
            made without pyplot: `ax.figure.savefig("by_lag.pdf")`.
        share: of the contributions, above 0 and at most 1; None for no window.
        names: of the parts of λ, strings in the structure of the carry or in a list; None for
            their paths, carry['fast'], or λ where there is one part only.
        params: "all" draws all parameters together, "each" one line for each of their leaves,
            None nothing.
        burn_in: as for `fit_decay`.
        legend: whether the labels are in a legend, not at the ends of the lines; None for
            where `ax` was given, a label is long, or a line ends before the others.

    Returns:
        The matplotlib Axes.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: `lags` are no norms, or another argument is not as above.

    Example:
        After `pip install 'jaxbptt[plot]'`::

            ax = jaxbptt.plot_by_lag(lags)
            ax.figure.savefig("by_lag.png")
    """
    _need_matplotlib()
    if params is not None:
        _errors.one_of("params", params, ("all", "each"))
    decay = fit_decay(lags, burn_in=burn_in)
    parts, lines, given = _parts(lags, names), [], ax is not None
    ax = _column() if ax is None else ax
    used = sum(line.get_gid() == _PART for line in ax.lines)
    for i, (name, norms) in enumerate(parts, used):
        lines.append(draw_norms(ax, norms, name, COLOURS[i % len(COLOURS)], burn_in=burn_in))
        lines[-1].set(gid=_PART, marker=_MARKS[i // len(COLOURS) % len(_MARKS)])
    for (name, norms), style in zip(_contributions(lags, params), cycle(_STYLES), strict=False):
        lines.append(draw_norms(ax, norms, name, _GREY, burn_in=burn_in, thin=style))
    lay_out(ax, len(decay.share))
    if legend is None:
        legend = given or _many(lines) or len({_last(line) for line in lines}) > 1
    if share is not None:
        _draw_window(ax, decay, share, named=not legend)
    if legend:
        _add_legend(ax, lines, given)
    else:
        _label_ends(ax, lines)
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
    """Draws norms (window,) and, dashed, their fitted decay, whose rate goes behind the name.

    With `thin`, the style of the line, there are no dots and no dashes.
    """
    from matplotlib.colors import to_rgba

    norms = np.asarray(norms)
    lags = np.arange(len(norms))
    fit = fit_line(jnp.asarray(norms), burn_in)
    rate = float(fit.rate)
    label = f"{name}  {_rounded(rate)} per step" if rate > 0 else name
    seen = _seen(norms)
    shown = np.where(seen, norms, np.nan)
    faint = to_rgba(colour, 1 if thin else 0.4)
    (line,) = ax.plot(lags, shown, thin or "-", color=faint, linewidth=0.8, label=label)
    line.set(markeredgecolor=colour, markerfacecolor=colour, markersize=4)
    if not thin or np.count_nonzero(seen) == 1:
        line.set_marker(".")
    if rate > 0 and not thin:
        fitted = lags[int(fit.first) : np.flatnonzero(seen)[-1] + 1]
        ax.plot(fitted, np.asarray(fit.at(fitted)), "--", color=_INK, linewidth=0.7, zorder=3)
    return line


def lay_out(ax: "Axes", window: int) -> None:
    """A logarithmic axis over whole lags, and no more ink than that needs."""
    from matplotlib.ticker import MaxNLocator

    ax.set_yscale("log")
    before = [np.size(line.get_xdata()) for line in ax.lines if line.get_gid() == _PART]
    ax.set_xlim(-0.5, max(window, *before, 0) - 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    ax.set(xlabel="lag (steps)", ylabel="gradient norm")
    ax.spines[["top", "right"]].set_visible(False)


def _rounded(rate: float) -> str:
    """Two digits at least, and of what is missing to 1 as well."""
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
    return [(name, v) for name, (_, v) in zip(given, leaves, strict=True) if _seen(v).any()]


def _contributions(lags: ByLag, params: str | None) -> list[tuple[str, Any]]:
    leaves = [(f"params{keystr(path)}", v) for path, v in tree_leaves_with_path(lags.params)]
    if params == "all":
        leaves = [("parameters", np.hypot.reduce([np.asarray(v) for _, v in leaves]))]
    return [(name, v) for name, v in leaves if params and _seen(v).any()]


def _seen(norms: Any) -> Any:
    """What has a place on a logarithmic axis."""
    return (norms > 0) & np.isfinite(norms)


def _draw_window(ax: "Axes", decay: Decay, share: float, *, named: bool) -> None:
    """An upright line behind the last lag of a window, named above the axes or in the legend."""
    end, window, percent = int(decay.window_for(share)), len(decay.share), f"{100 * share:.3g} %"
    words = f"{percent} within {end:,} step{'s' * (end > 1)}"
    if end > window:
        words = f"{words}, by the fit" if end < 2**31 - 1 else f"no window has {percent}"
    if np.isnan(decay.share[-1]):
        words = f"can't tell what window has {percent}"
    if end <= window:
        ax.axvline(end - 0.5, color=_INK, linewidth=0.7, zorder=1, label="" if named else words)
    elif not named:
        ax.plot([], [], " ", label=words)
    if named:
        at = min(end, window) / window
        side = "left" if at < 0.3 else "right" if at > 0.7 else "center"
        ax.text(at, 1.02, words, transform=ax.transAxes, ha=side, color=_INK, fontsize=_SIZE)


def _many(lines: "list[Line2D]") -> bool:
    """Whether labels take more room than there is beside the lines or between them."""
    return len(lines) > 5 or any(len(str(line.get_label())) > 32 for line in lines)


def _add_legend(ax: "Axes", lines: "list[Line2D]", given: bool) -> None:
    look: Any = {"frameon": False, "handlelength": 1.4, "fontsize": "small" if given else _SIZE}
    if given or not _many(lines):
        ax.legend(**look)
        return
    figure = ax.figure.canvas.figure
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.14 * (len(lines) + 1))
    figure.legend(loc="outside lower left", **look)


def _label_ends(ax: "Axes", lines: "list[Line2D]") -> None:
    """Each line's label behind its last norm and in its colour, none over another."""
    labels = []
    for line in lines:
        end = tuple(np.column_stack(line.get_data())[_last(line)])
        offset: Any = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        look: Any = {"color": line.get_markeredgecolor(), "fontsize": _SIZE}
        labels.append(ax.annotate(str(line.get_label()), end, **offset, **look))
        labels[-1].set_annotation_clip(False)
    ax.figure.canvas.figure.draw_without_rendering()  # makes room for the labels
    free = -np.inf  # points from here on up have no label yet
    for label in sorted(labels, key=lambda label: label.xy[1]):
        height = ax.transData.transform(label.xy)[1] * 72 / ax.figure.dpi
        up = max(height, free)
        label.xyann = 4, up - height
        free = up + 1.2 * _SIZE


def _last(line: "Line2D") -> int:
    """The lag of a line's last norm."""
    return int(np.flatnonzero(~np.isnan(np.asarray(line.get_ydata(), float)))[-1])


def _column() -> "Axes":
    """The axes of a new figure as wide as a column, without pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.5, 2.2), dpi=300, layout="constrained")
    FigureCanvasAgg(figure)
    ax: Axes = figure.subplots()
    ax.tick_params(labelsize=_SIZE)
    ax.xaxis.label.set_fontsize(_SIZE)
    ax.yaxis.label.set_fontsize(_SIZE)
    return ax


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError(
            "plot_by_lag needs matplotlib, which is not there. pip install 'jaxbptt[plot]'"
        ) from None
