"""Writes the tables and plots of the online benchmarks from what was measured."""

import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, StrMethodFormatter

plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
OURS, THEIRS, FLOOR = "#0072B2", "#D55E00", "#666666"  # told apart by the colour-blind too
CURVES = ("window", "batch", "hidden")
_AT = {"window": 4, "batch": 1, "hidden": 3}
MARK = "<!-- Below this line: written by hand. -->"
END = "<!-- Above this line: written by hand. -->"


def write(results, out):
    """`RESULTS.md`, whose part between the marks is kept, and the plots beside it."""
    path = out / "RESULTS.md"
    before = path.read_text() if path.exists() else MARK + END
    by_hand = before.split(MARK)[1].split(END)[0].strip()
    parts = [
        head(results),
        in_short(results["sections"]),
        online(results),
        others(results["sections"]),
        pictures(results["sections"], out),
        MARK,
        by_hand,
        END,
        goals(results["sections"]),
    ]
    path.write_text("\n\n".join(part for part in parts if part) + "\n")


def head(results):
    torch = f", PyTorch {results['torch']}" if results.get("torch") else ""
    return (
        "# The online loop: time and memory against every alternative\n\n"
        f"JAX {results['jax']}{torch}, Python {results['python']}, {results['device']} with "
        f"{results['cores']} cores, float32. Written by `python benchmarks/all.py`; every ratio is "
        "of medians of interleaved runs, above one in our favour unless it says otherwise. A shape "
        "is batch, inputs, hidden, window."
    )


def in_short(sections):
    """How fast it is against what somebody would write without it, and where it is slower."""
    rows = []

    def against(what, here, section, other, ours):
        found = [r for r in sections.get(section, []) if other in r and ours in r]
        if found:
            speeds = ratios(found, other, ours)
            worst = min(range(len(speeds)), key=speeds.__getitem__)
            lost = [name(r) for r, speed in zip(found, speeds, strict=True) if speed < 0.98]
            spread = f"{min(speeds):.2f} to {max(speeds):.2f}"
            rows.append([what, here, f"{statistics.geometric_mean(speeds):.2f}", spread])
            rows[-1] += [name(found[worst]), "; ".join(lost)]

    rerun = "the window run again under `jax.grad`, an update at each step"
    against(rerun, "`record`, `current`", "online", "re-run", "current")
    against(rerun, "`record`, `stored`", "online", "re-run", "stored")
    against("the same every 5 steps", "`record`, `current`", "every", "re-run", "current")
    closures = "a ring of whole `jax.vjp` closures, by hand"
    against(closures, "`record`, `current`", "online", "closures", "current")
    against("PyTorch, a sliding loop", "`record`, `current`", "online", "PyTorch", "current")
    for what, other in (
        ("`jax.grad` of `lax.scan`, chunk by chunk", "grad(lax.scan)"),
        ("flax's `nnx.RNN`, chunk by chunk", "nnx.RNN"),
        ("PyTorch's `nn.LSTM`, `nn.GRU`, chunk by chunk", "PyTorch"),
    ):
        against(what, "`scan`", "chunks", other, "jaxbptt.scan")
    columns = ["what you would write", "here", "times as fast", "from … to"]
    columns += ["least favourable shape", "slower at"]
    return "## In short\n\n" + table(columns, rows)


def goals(sections):
    """Each goal beside what was reached: geometric mean, and the least favourable."""
    rows = []

    def goal(name, ratios, mean, least, worst=min):
        ratios = list(ratios)
        if ratios:
            reached = statistics.geometric_mean(ratios), worst(ratios)
            rows.append([name, *(f"{r:.2f}" for r in reached), mean, least])

    found = sections.get("online", [])
    goal("`current` against re-running", ratios(found, "re-run", "current"), "≥ 3.0", "≥ 1.6")
    goal("`stored` against re-running", ratios(found, "re-run", "stored"), "≥ 1.0", "≥ 0.6")
    goal("`current` against a ring of closures", ratios(found, "closures", "current"), "", "")
    goal(
        "`current` against PyTorch's sliding loop",
        ratios(found, "PyTorch", "current"),
        "≥ 30",
        "≥ 8",
    )
    some = sections.get("every", [])
    goal("PyTorch's sliding loop against the floor", ratios(found, "PyTorch", "floor"), "", "")
    goal(
        "every 5, window 20, against re-running",
        ratios(some, "re-run", "current"),
        "≥ 1.3",
        "≥ 1.0",
    )
    some = sections.get("recording", [])
    goal(
        "recording alone: share of the plain loop's speed",
        ratios(some, "plain", "recorded"),
        "≥ 0.75",
        "≥ 0.5",
    )
    goal(
        "bytes of the tape against what `jax.vjp` keeps",
        ratios(found, "tape", "kept"),
        "≤ 1.0",
        "≤ 1.02",
        max,
    )
    some = sections.get("compiling", [])
    goal(
        "trace and compile, against one `grad(lax.scan)`",
        ratios(some, "current", "grad(lax.scan)"),
        "≤ 1.15",
        "",
        max,
    )
    some = ratios(sections.get("longer", []), "200", "20")
    goal("time per step, window 200 against 20", some, "≤ 10.5", "", max)
    large = [r for r in found if r["shape"][1] >= 32 and r["shape"][3] >= 256]
    goal(
        "share of the floor, B ≥ 32 and H ≥ 256",
        ratios(large, "floor", "current"),
        "≥ 0.6",
        "≥ 0.45",
    )
    columns = ["", "mean", "least favourable", "goal, mean", "goal, least"]
    return "## Goals\n\n" + table(columns, rows)


def ratios(rows, above, below):
    return [row[above] / row[below] for row in rows if above in row and below in row]


def online(results):
    rows = []
    for row in results["sections"].get("online", []):
        ratio = lambda name, row=row: f"{row[name] / row['current']:.2f}" if name in row else ""  # noqa: E731
        cells = [name(row), *(f"{1e6 * row[k]:.0f}" for k in ("floor", "current", "stored"))]
        cells += [ratio(k) for k in ("re-run", "closures", "PyTorch")]
        cells += [f"{row['re-run'] / row['stored']:.2f}", f"{row['floor'] / row['current']:.2f}"]
        rows.append([*cells, f"{row['tape'] / 1024:.0f}", f"{row['tape'] / row['kept']:.2f}"])
    columns = [
        "cell and shape", "floor µs", "`current` µs", "`stored` µs", "re-run ÷ `current`",
        "closures ÷ `current`", "PyTorch ÷ `current`", "re-run ÷ `stored`", "share of floor",
        "tape KiB", "of `jax.vjp`'s",
    ]  # fmt: skip
    return "## An SGD update at every step\n\n" + table(columns, rows)


def others(sections):
    """The tables of one line for each shape and a column for each contestant, in µs or seconds."""
    titles = {
        "every": "## An update every 5 steps, window 20 (µs per step)",
        "recording": "## Recording without a gradient (µs per step)",
        "chunks": "## Chunks: an update for each window (µs per step); PyTorch nn.LSTM, nn.GRU",
        "compiling": "## Trace and compile (seconds)",
    }
    parts = []
    for section, title in titles.items():
        rows = sections.get(section, [])
        if not rows:
            continue
        columns = [k for k in rows[0] if k != "shape"]
        columns += [k for row in rows for k in row if k not in {*columns, "shape"}]
        show = (lambda v: f"{v:.2f}") if section == "compiling" else (lambda v: f"{1e6 * v:.0f}")
        cells = [[name(r), *(show(r[k]) if k in r else "" for k in columns)] for r in rows]
        parts.append(f"{title}\n\n" + table(["cell and shape", *columns], cells))
    return "\n\n".join(parts)


def name(row):
    cell, *numbers = row["shape"]
    return f"{cell} {', '.join(map(str, numbers))}"


def table(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def pictures(sections, out):
    drawn = []
    if all(sections.get(name) for name in CURVES):
        figure, axes = plt.subplots(2, 3, figsize=(11, 6.6), sharey="row", layout="constrained")
        for column, section in zip(axes.T, CURVES, strict=True):
            curves(column, section, sections[section])
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        save(figure, out / "cost.png")
        drawn.append("![Time per step and memory against window, batch and hidden size](cost.png)")
    if sections.get("online"):
        figure, axes = plt.subplots(figsize=(8.5, 5.6))
        figure.subplots_adjust(left=0.37, right=0.97, top=0.99, bottom=0.09)
        shares(axes, sections["online"])
        save(figure, out / "floor.png")
        drawn.append(
            "![Share of this machine's arithmetic floor that each shape reaches](floor.png)"
        )
    if sections.get("length"):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
        flat(axes, sections["length"][0])
        save(figure, out / "length.png")
        drawn.append(flat_words(sections["length"][0]))
    return "\n\n".join(["## Against window, batch, hidden size and length", *drawn])


def save(figure, path):
    figure.savefig(path, dpi=110)
    plt.close(figure)


def curves(column, section, rows):
    """Time above, memory below."""
    at = [row["shape"][_AT[section]] for row in rows]
    time, memory = column
    for key, color, label in (
        ("re-run", THEIRS, "re-run under jax.grad"),
        ("current", OURS, "jaxbptt, current"),
        ("floor", FLOOR, "floor of this machine"),
    ):
        style = ":" if key == "floor" else "o-"
        time.loglog(at, [1e6 * r[key] for r in rows], style, color=color, label=label)
        if key != "floor":
            memory.loglog(at, [r[f"{key} bytes"] / 2**20 for r in rows], style, color=color)
    fixed = {k: rows[0]["shape"][i] for k, i in _AT.items() if k != section}
    time.set_title(", ".join(f"{k} {v}" for k, v in fixed.items()))
    if section == CURVES[0]:
        time.set_ylabel("µs per step")
        memory.set_ylabel("MiB: state and temporaries")
    memory.set_xlabel({"window": "window (steps)", "hidden": "hidden size"}.get(section, section))
    for axis, of_decade in ((time, (1,)), (memory, (1, 2, 5))):
        axis.set_xticks(at, map(str, at))
        axis.yaxis.set_major_locator(LogLocator(subs=of_decade))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.minorticks_off()


def shares(axes, rows):
    """How near to the floor each shape comes, `current` beside re-running."""
    for place, row in enumerate(rows):
        for key, color, up in (("current", OURS, -0.2), ("re-run", THEIRS, 0.2)):
            axes.barh(place + up, min(row["floor"] / row[key], 1.0), 0.38, color=color)
    axes.set_yticks([])
    axes.set(
        xlim=(0, 1), ylim=(len(rows) - 0.4, -1.5), xlabel="share of the arithmetic floor (cut at 1)"
    )
    # What a row was measured at stands beside it, in columns.
    shapes = [("cell", "batch", "inputs", "hidden", "window"), *(row["shape"] for row in rows)]
    for place, shape in enumerate(shapes, -1):
        for x, word in zip((-0.6, -0.35, -0.24, -0.13, -0.01), shape, strict=True):
            align = {"ha": "right" if x > -0.6 else "left", "va": "center"}
            axes.text(x, place, word, transform=axes.get_yaxis_transform(), **align)
    for color, label in ((OURS, "jaxbptt, current"), (THEIRS, "re-run under jax.grad")):
        axes.barh(0, 0, color=color, label=label)
    axes.legend(loc="lower right")


def flat(axes, row):
    steps = [row["block"] * (i + 1) / 1e6 for i in range(len(row["seconds"]))]
    size = f"{row['block']:,}"
    again = [1e6 * s for s in row["first again"]]
    axes[0].plot(steps, again, color=THEIRS, label=f"the first {size} steps, run again right after")
    for axis, values, words in (
        (axes[0], [1e6 * s for s in row["seconds"]], "µs per step"),
        (axes[1], [b / 2**20 for b in row["resident"]], "resident memory, MiB"),
    ):
        axis.plot(steps, values, color=OURS, label=f"{size} steps at this point of the run")
        axis.set_ylim(0, 1.3 * max(values[1:]))
        axis.set_xlabel("millions of steps")
        axis.set_ylabel(words)
    axes[0].legend(loc="lower left")


def flat_words(row):
    last = -(len(row["seconds"]) // 10)
    late, first = (statistics.median(row[key][last:]) for key in ("seconds", "first again"))
    grown = (row["resident"][-1] - row["resident"][1]) / 2**20
    return (
        "![Time per step and resident memory over the length of a run](length.png)\n\n"
        f"The last tenth of {len(row['seconds']) * row['block']:,} steps takes {late / first:.2f} "
        f"times as long as the first block run again in turn with it, and the process's resident "
        f"memory grows by {grown:.1f} MiB after the second block ({name(row)})."
    )
