"""Draws docs/idea.png: a loop over single steps, the tape beside it, and how far a gradient goes.

python docs/idea.py
"""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

STEPS, WINDOW = 9, 5
BLUE, ORANGE, GRAY = "#0072b2", "#d55e00", "0.62"
Y, STEP, SLOT = 2.75, 1.7, 0.45  # heights


def box(axes, x, y, text, color, filled):
    """A rounded box with its middle at (x, y)."""
    shape = FancyBboxPatch(
        (x - 0.3, y - 0.2),
        0.6,
        0.4,
        boxstyle="round,pad=0.05",
        fc=color if filled else "white",
        ec=color,
        lw=1.4,
    )
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", color="white" if filled else color, fontsize=10)


def arrow(axes, start, end, color, width=1.4):
    """An arrow from start to end."""
    style = {"arrowstyle": "-|>", "color": color, "lw": width, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)


def draw(axes):
    """The last steps of a stream, the newest on the right."""
    for place in range(STEPS):
        lag = STEPS - 1 - place
        recorded = lag < WINDOW
        color = BLUE if recorded else GRAY
        name = "$t$" if lag == 0 else f"$t-{lag}$"
        box(axes, place, STEP, "step", color, recorded)
        axes.text(place, STEP - 0.5, name, ha="center", va="center", color=color, fontsize=9)
        arrow(axes, (place - 0.65, STEP + 0.06), (place - 0.36, STEP + 0.06), color)
        if recorded:
            box(axes, place, SLOT, "residuals", BLUE, False)
    for lag in range(WINDOW - 1):
        place = STEPS - 1 - lag
        arrow(axes, (place - 0.36, STEP - 0.1), (place - 0.65, STEP - 0.1), ORANGE, 2.2)
    newest, oldest = STEPS - 1, STEPS - WINDOW
    box(axes, newest, Y, "loss", ORANGE, True)
    arrow(axes, (newest - 0.08, STEP + 0.26), (newest - 0.08, Y - 0.26), BLUE)
    arrow(axes, (newest + 0.08, Y - 0.26), (newest + 0.08, STEP + 0.26), ORANGE, 2.2)
    axes.plot([oldest - 0.5] * 2, [STEP - 0.35, STEP + 0.75], color=ORANGE, ls=":", lw=1.5)
    axes.text(
        oldest - 0.4,
        STEP + 0.55,
        f"the gradient ends here: window={WINDOW}",
        color=ORANGE,
        fontsize=10,
        va="center",
    )
    axes.text(
        oldest - 0.5,
        SLOT,
        f"the tape: a ring of {WINDOW} slots,\nhowever long the loop ",
        color=BLUE,
        fontsize=10,
        ha="right",
        va="center",
    )
    axes.text(-0.6, Y, "carry goes on →", color=GRAY, fontsize=10, va="center")
    axes.text(1.6, Y, "← cotangent λ goes back", color=ORANGE, fontsize=10, va="center")
    axes.set(xlim=(-0.75, STEPS - 0.5), ylim=(0.1, Y + 0.35))
    axes.axis("off")


def main():
    """Writes the picture beside this file."""
    figure = Figure(figsize=(10, 3.1), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.subplots())
    figure.savefig(Path(__file__).with_name("idea.png"), dpi=110)


if __name__ == "__main__":
    main()
