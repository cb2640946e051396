"""Draws docs/edges.png: along which edges of the unrolled graph a gradient flows, found by trying.

    python docs/edges.py

A fast and a slow part in two compositions: one recorder with a window for each part, and a
recorder for each. The cells are linear, so an edge carries gradient exactly if the gradient of
what is added to the nodes changes once the edge's coefficient does.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import jaxbptt

STEPS, WINDOWS = 8, {"fast": 3, "slow": 6}
EDGES = {  # from a part, one step earlier or not, to a part
    "ff": ("fast", 1, "fast"),
    "fs": ("fast", 1, "slow"),
    "ss": ("slow", 1, "slow"),
    "sf": ("slow", 0, "fast"),
}
NOTHING_ADDED = {"fast": 0.0, "slow": 0.0}


def slow_cell(added, slow, x):
    edges, fast = x
    slow = edges["ss"] * slow + edges["fs"] * fast + added["slow"]
    return slow, slow


def fast_cell(added, fast, x):
    edges, slow = x
    fast = edges["ff"] * fast + edges["sf"] * slow + added["fast"]
    return fast, fast


def one_recorder(edges):
    """The gradient by what is added to each part, after all steps."""

    def step(added, carry, edges):
        slow, _ = slow_cell(added, carry["slow"], (edges, carry["fast"]))
        fast, y = fast_cell(added, carry["fast"], (edges, slow))
        return {"fast": fast, "slow": slow}, y

    rec = jaxbptt.record(step, window=WINDOWS)

    def loss_fn(added, tape, edges):
        return rec(added, tape, edges)[::-1]  # y is the loss, the tape goes along

    tape = rec.init(NOTHING_ADDED, {"fast": 1.0, "slow": 1.0}, at(edges, 0))
    for s in range(STEPS):
        grad, tape = jax.grad(loss_fn, has_aux=True)(NOTHING_ADDED, tape, at(edges, s))
    return grad


def two_recorders(edges):
    """The same with a recorder for each part."""
    fast_rec = jaxbptt.record(fast_cell, window=WINDOWS["fast"])
    slow_rec = jaxbptt.record(slow_cell, window=WINDOWS["slow"])

    def loss_fn(added, tapes, edges):
        fast_tape, slow_tape = tapes
        slow_tape, slow = slow_rec(added, slow_tape, (edges, fast_tape.carry))
        fast_tape, y = fast_rec(added, fast_tape, (edges, slow))
        return y, (fast_tape, slow_tape)

    tapes = [rec.init(NOTHING_ADDED, 1.0, (at(edges, 0), 1.0)) for rec in (fast_rec, slow_rec)]
    for s in range(STEPS):
        grad, tapes = jax.grad(loss_fn, has_aux=True)(NOTHING_ADDED, tapes, at(edges, s))
    return grad


def at(edges, step):
    return {name: values[step] for name, values in edges.items()}


def live_edges(gradient):
    """The edges (name, lag) along which gradient flows from the last step's y."""
    plain = {name: jnp.full(STEPS, 0.5) for name in EDGES}
    names = [(name, lag) for name in EDGES for lag in range(STEPS)]
    changed = [{**plain, name: plain[name].at[STEPS - 1 - lag].set(0.75)} for name, lag in names]
    each = jax.vmap(gradient)(jax.tree.map(lambda *v: jnp.stack(v), *changed))
    moved = sum(abs(each[part] - gradient(plain)[part]) for part in NOTHING_ADDED) > 1e-6
    return {edge for edge, is_live in zip(names, moved.tolist(), strict=True) if is_live}


# ------------------------------------------------------------------------ drawing

HEIGHT = {"y": 2.0, "fast": 1.0, "slow": 0.0}
LIVE = {"fast": "#0072b2", "slow": "#d55e00"}  # told apart by those who are colour-blind, too


def draw(axes, title, live):
    for lag in range(STEPS):
        x = -lag
        arrow(axes, (x, HEIGHT["fast"]), (x, HEIGHT["y"]), "black" if lag == 0 else None)
        for name, (source, earlier, target) in EDGES.items():
            if lag + earlier < STEPS:
                colour = LIVE[source] if (name, lag) in live else None
                arrow(axes, (x - earlier, HEIGHT[source]), (x, HEIGHT[target]), colour)
    reached = {("fast", 0)} | {(EDGES[name][0], lag + EDGES[name][1]) for name, lag in live}
    for lag in range(STEPS):
        for part in ("fast", "slow"):
            face = LIVE[part] if (part, lag) in reached else "white"
            edge = LIVE[part] if (part, lag) in reached else "0.6"
            axes.plot(-lag, HEIGHT[part], "o", ms=12, mfc=face, mec=edge, zorder=3)
    axes.plot(0, HEIGHT["y"], "s", ms=10, color="black", zorder=3)
    for lag in range(1, STEPS):
        axes.plot(-lag, HEIGHT["y"], "s", ms=8, mfc="white", mec="0.6", zorder=3)
    axes.set_title(title, fontsize=11, loc="left")
    names = ["$t$", *(f"$t-{lag}$" for lag in range(1, STEPS))]
    axes.set_xticks([-lag for lag in range(STEPS)], names)
    axes.set_yticks([HEIGHT[k] for k in ("y", "fast", "slow")], ["y", "fast", "slow"])
    axes.tick_params(length=0)
    axes.set(xlim=(-STEPS + 0.5, 0.5), ylim=(-0.4, 2.35))
    axes.spines[:].set_visible(False)


def arrow(axes, start, end, colour):
    style = (
        {"arrowstyle": "<|-", "color": colour, "lw": 2.0}
        if colour
        else {
            "arrowstyle": "-",
            "color": "0.8",
            "lw": 1.0,
        }
    )  # a live one points the way of the gradient
    axes.annotate("", end, start, arrowprops={**style, "shrinkA": 7, "shrinkB": 7})


def main():
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    draw(left, "one recorder, window={'fast': 3, 'slow': 6}", live_edges(one_recorder))
    draw(right, "a recorder for each part, with windows of 3 and 6", live_edges(two_recorders))
    figure.savefig(Path(__file__).with_name("edges.png"), dpi=130)


if __name__ == "__main__":
    main()
