"""Draws docs/idea.png: a loop over single steps, the tape beside it, and how far a gradient goes.

python docs/idea.py
"""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

STEPS, WINDOW = 7, 5
BLUE, ORANGE, GRAY = "#0072B2", "#D55E00", "0.4"
Y, STEP, SLOT = 2.75, 1.55, 0.35  # heights
SIZE = 12.5  # points: on a phone the picture is a third as wide


def box(axes, x, y, text, color, filled):
    """A rounded box with its middle at (x, y)."""
    shape = FancyBboxPatch(
        (x - 0.34, y - 0.18),
        0.68,
        0.36,
        boxstyle="round,pad=0.06",
        fc=color if filled else "white",
        ec=color,
        lw=1.4,
    )
    axes.add_patch(shape)
    color = "white" if filled else color
    axes.text(x, y, text, ha="center", va="center", color=color, fontsize=SIZE)


def arrow(axes, start, end, color, width=1.6):
    """An arrow from start to end."""
    style = {"arrowstyle": "-|>", "color": color, "lw": width, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops={**style, "mutation_scale": 14})


def draw(axes):
    """The last steps of a stream, the newest on the right."""
    newest, oldest = STEPS - 1, STEPS - WINDOW

    def say(x, y, text, color, ha="left"):
        axes.text(x, y, text, color=color, ha=ha, va="center", fontsize=SIZE)

    for place in range(STEPS):
        lag = newest - place
        recorded = lag < WINDOW
        color = BLUE if recorded else GRAY
        box(axes, place, STEP, "step", color, recorded)
        say(place, STEP - 0.46, "$t$" if lag == 0 else f"$t-{lag}$", color, "center")
        arrow(axes, (place - 0.6, STEP + 0.1), (place - 0.4, STEP + 0.1), color)
        if recorded:
            box(axes, place, SLOT, "residuals", BLUE, False)
        if 0 < lag < WINDOW:
            arrow(axes, (place + 0.6, STEP - 0.1), (place + 0.4, STEP - 0.1), ORANGE, 2.4)
    box(axes, newest, Y, "loss", ORANGE, True)
    arrow(axes, (newest - 0.1, STEP + 0.26), (newest - 0.1, Y - 0.26), BLUE)
    arrow(axes, (newest + 0.1, Y - 0.26), (newest + 0.1, STEP + 0.26), ORANGE, 2.4)
    axes.plot([oldest - 0.5] * 2, [STEP - 0.35, Y + 0.2], color=ORANGE, ls=":", lw=1.8)
    say(oldest - 0.38, Y + 0.04, f"window={WINDOW}: the gradient", ORANGE)
    say(oldest - 0.38, Y - 0.22, "λ goes back to here", ORANGE)
    say(-0.5, STEP + 0.5, "the carry goes on →", GRAY)
    say(oldest - 0.55, SLOT + 0.13, f"the tape: a ring of {WINDOW} slots,", BLUE, "right")
    say(oldest - 0.55, SLOT - 0.13, "however long the loop", BLUE, "right")
    axes.set(xlim=(-0.65, STEPS - 0.5), ylim=(0.05, Y + 0.3))
    axes.axis("off")


def main():
    """Writes the picture beside this file."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.subplots())
    figure.savefig(Path(__file__).with_name("idea.png"), dpi=150)


if __name__ == "__main__":
    main()
