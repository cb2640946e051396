"""What the library does on a GPU: exactness, updates, whole sequences; a page, a JSON, figures.

    PYTHONPATH=. python benchmarks/gpu.py OUT [--quick]

takes at most eight minutes on one GPU, with JAX, and with PyTorch for two of the tables. Each row,
medians of interleaved runs, is written to OUT/gpu.json as it comes, those that matter most first:
cut at any time it leaves what it has measured. `--quick` runs all of it in seconds, on a CPU too,
with sizes that say nothing about speed.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from cells import Shape, gru, lstm, problem
from jax import lax
from measure import medians
from ways import chunks, first, forward, recorded, rerun, sgd

import jaxbptt

LIMIT = 460  # seconds after which no other row is begun
EXACT_LIMIT = 110  # and no other row about exactness
WEIGHTS = ("stored", "current", "replayed")


@dataclasses.dataclass
class Book:
    """The rows, kept on disk as they come."""

    out: Path
    quick: bool
    begun: float = dataclasses.field(default_factory=time.perf_counter)
    rows: list = dataclasses.field(default_factory=list)

    @property
    def age(self):
        return time.perf_counter() - self.begun

    def enter(self, table, measure, **label):
        """Measures a row, unless it is late; a row that fails says why, and the rest goes on."""
        if self.age > (EXACT_LIMIT if table == "exact" else LIMIT):
            return
        try:
            found = measure()
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
        self.rows.append({"table": table, **label, **found})
        print(json.dumps(self.rows[-1]), flush=True)
        self.write()

    def write(self):
        facts = {
            "device": str(jax.devices()[0].device_kind),
            "jax": jax.__version__,
            "seconds": round(self.age),
            "rows": self.rows,
        }
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "gpu.json").write_text(json.dumps(facts, indent=1))
        (self.out / "GPU.md").write_text(page(facts))


# ---------------------------------------------------------------- exactness


def worst(got, want):
    """The largest error, relative to each leaf's largest value."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


@functools.partial(jax.jit, static_argnums=0)
def unrolled(step, copies, carry, xs, oldest, first, last):
    """The gradient of the losses of steps first … last, for each step's copy of the parameters.

    The run as one graph under `jax.grad`; the carry that enters step `oldest` is detached.
    """

    def loss_fn(copies):
        def one(carry, row):
            i, params, x = row
            carry = jax.tree.map(lambda v: jnp.where(i <= oldest, lax.stop_gradient(v), v), carry)
            carry, loss = step(params, carry, x)
            return carry, jnp.where((first <= i) & (i <= last), loss, 0.0)

        rows = jnp.arange(len(xs)), copies, xs
        return jnp.sum(lax.scan(one, carry, rows)[1])

    return jax.grad(loss_fn)(copies)


def copied(params, length):
    """A copy of the parameters for each step."""
    return jax.tree.map(lambda v: jnp.broadcast_to(v, (length, *v.shape)), params)


def added(copies):
    """The sum over the steps."""
    return jax.tree.map(lambda v: jnp.sum(v, 0), copies)


def sine(cell, params, carry, x):
    """The cell with a loss for its output."""
    carry, y = cell(params, carry, x)
    return carry, jnp.sum(jnp.sin(y))


SINE = {cell: functools.partial(sine, cell) for cell in (lstm, gru)}


def exact(cell, way, precision, quick):
    """The error of one gradient against the unrolled graph, in float32 at this precision."""
    p = problem(Shape("LSTM" if cell is lstm else "GRU", 4, 8, 16 if quick else 128, 5), 15)
    every, length, step = 5 if "every 5" in way else 1, 15, SINE[cell]
    with jax.default_matmul_precision(precision):
        graph = functools.partial(unrolled, step, copied(p.params, length), p.carry, p.xs)
        if way.startswith("scan"):
            window = None if way == "scan None" else 5

            def loss_fn(params):
                body = functools.partial(step, params)
                return jnp.sum(jaxbptt.scan(body, p.carry, p.xs, window=window, every=every)[1])

            got = jax.jit(jax.grad(loss_fn))(p.params)
            ends = [length - 1] if window is None else range(every - 1, length, every)
            groups = [(max(0, t - 4), t - every + 1, t) for t in ends]
            groups = [(0, 0, length - 1)] if window is None else groups
            want = jax.tree.map(lambda *v: sum(v), *(added(graph(*group)) for group in groups))
        else:
            rec = jaxbptt.record(step, window=5, every=every, weights=way.split(",")[0])

            @jax.jit
            def last(params):
                def one(tape, x):
                    grad, tape = jax.grad(lambda q: rec(q, tape, x)[::-1], has_aux=True)(params)
                    return tape, grad

                tape = rec.init(params, p.carry, p.xs[0])
                return jax.tree.map(lambda v: v[-1], lax.scan(one, tape, p.xs)[1])

            got, want = last(p.params), added(graph(length - 5, length - every, length - 1))
        return {"error": worst(got, want)}


def learned(quick):
    """A learner's parameters after a run, against the same updates by the unrolled graph."""
    p, length, rate = problem(Shape("LSTM", 4, 8, 16 if quick else 128, 5), 12), 12, 0.01
    learner = jaxbptt.learner(SINE[lstm], lambda y, x: y, Sgd(rate), window=5)
    with jax.default_matmul_precision("highest"):
        state = learner.init(p.params, p.carry, first(p.xs))
        state, _ = jax.jit(lambda state: lax.scan(learner.update, state, p.xs))(state)
        copies, theta = copied(p.params, length), p.params
        for t in range(length):
            copies = jax.tree.map(lambda v, new, t=t: v.at[t:].set(new), copies, theta)
            grads = added(unrolled(SINE[lstm], copies, p.carry, p.xs, t - 4, t, t))
            theta = jax.tree.map(lambda a, g: a - rate * g, theta, grads)
    return {"error": worst(state.params, theta)}


@dataclasses.dataclass(frozen=True)
class Sgd:
    """Of optax's form, so that optax need not be there."""

    rate: float

    def init(self, params):
        return ()

    def update(self, grads, state, params=None):
        return jax.tree.map(lambda g: -self.rate * g, grads), state


# -------------------------------------------------------------------- speed


def of_type(p, dtype):
    """The problem in another type."""
    cast = functools.partial(jax.tree.map, lambda v: v.astype(dtype))
    return dataclasses.replace(p, params=cast(p.params), carry=cast(p.carry), xs=cast(p.xs))


def paced(p, window, pace):
    """All cotangents in flight moved together, where the release has it."""
    rec = jaxbptt.record(p.step, window=window, weights="current", pace=pace)

    def update(state, x):
        params, tape = state
        tape, loss, grads = rec.advance(params, tape, x, lambda y: p.loss(y, x))
        return (sgd(params, grads), tape), loss

    run = jax.jit(lambda state: lax.scan(update, state, p.xs), donate_argnums=0)
    return run, (p.params, rec.init(p.params, p.carry, first(p.xs)))


def updates(shape, dtype, steps, repeats):
    """µs for an update by each way, and MB of scratch."""
    p = of_type(problem(shape, steps), dtype)
    ways = {
        "no gradient": forward(p),
        "window 1": recorded(p, 1, "current"),
        "run again": rerun(p, shape.window),
        **{weights: recorded(p, shape.window, weights) for weights in WEIGHTS},
    }
    if hasattr(jaxbptt.Recorder, "advance"):
        paces = [pace for pace in (1, 4) if pace <= shape.window]
        ways |= {f"pace {pace}": paced(p, shape.window, pace) for pace in paces}
    compiled = {name: (run.lower(state).compile(), state) for name, (run, state) in ways.items()}
    took = medians(compiled, repeats)
    scratch = {
        name: round(run.memory_analysis().temp_size_in_bytes / 1e6, 1)
        for name, (run, _) in compiled.items()
    }
    return {name: round(1e6 * t / steps, 1) for name, t in took.items()} | {"MB": scratch}


def sequences(shape, steps, repeats):
    """Milliseconds for the gradient of a whole sequence, and MB of scratch."""
    p = problem(shape, steps)
    ways = {
        "lax.scan": chunks(p, steps),
        "window None": chunks(p, steps, functools.partial(jaxbptt.scan, window=None)),
        "20 every 20": chunks(p, steps, functools.partial(jaxbptt.scan, window=20, every=20)),
        "20 every 1": chunks(p, steps, functools.partial(jaxbptt.scan, window=20)),
    }
    compiled = {name: (run.lower(state).compile(), state) for name, (run, state) in ways.items()}
    took = medians(compiled, repeats)
    scratch = {
        name: round(run.memory_analysis().temp_size_in_bytes / 1e6, 1)
        for name, (run, _) in compiled.items()
    }
    return {name: round(1e3 * t, 3) for name, t in took.items()} | {"MB": scratch}


def torch_sequences(shape, steps, repeats):
    """Milliseconds for the gradient of a whole sequence by PyTorch's LSTM or GRU: cuDNN's."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def now():
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    net = getattr(torch.nn, shape.cell)(shape.inputs, shape.hidden).to(device)
    xs = torch.randn(steps, shape.batch, shape.inputs, device=device)
    took = []
    for _ in range(repeats + 3):
        start = now()
        net.zero_grad()
        ((net(xs)[0] - 0.1) ** 2).mean(dim=(1, 2)).sum().backward()
        took.append(now() - start)
    return {"PyTorch": round(1e3 * statistics.median(took[3:]), 3)}


def torch_updates(shape, steps):
    """µs for an update by the forum's recipe for windows: retained graphs, walked back by hand."""
    import torch
    import torch_sliding

    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    size = shape.batch, shape.inputs, shape.hidden, shape.window
    return {"PyTorch": round(1e6 * torch_sliding.sliding(shape.cell, *size, steps), 1)}


# --------------------------------------------------------------------- page


def page(facts):
    """The rows as tables in Markdown."""
    lines = [f"{facts['device']}, JAX {facts['jax']}, {facts['seconds']} s.", ""]
    for table in dict.fromkeys(row["table"] for row in facts["rows"]):
        rows = [row for row in facts["rows"] if row["table"] == table]
        columns = list(dict.fromkeys(key for row in rows for key in row if key != "table"))
        lines += [f"## {table}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for row in rows:
            shown = [row.get(key, "") for key in columns]
            shown = [
                ", ".join(f"{k} {n}" for k, n in v.items()) if type(v) is dict else v for v in shown
            ]
            shown = [f"{v:.1e}" if type(v) is float and v < 1e-3 else str(v) for v in shown]
            lines.append("| " + " | ".join(shown) + " |")
        lines.append("")
    return "\n".join(lines)


def draw(book):
    """Time against the window, if there is something to draw it with."""
    rows = [r for r in book.rows if r["table"] == "against the window, µs" and "failed" not in r]
    try:
        import matplotlib
    except ImportError:
        return
    if not rows:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    batches = sorted({row["batch"] for row in rows})
    figure, axes = plt.subplots(
        1, len(batches), figsize=(9, 3.6), layout="constrained", squeeze=False
    )
    for ax, batch in zip(axes[0], batches, strict=True):
        some = sorted((r for r in rows if r["batch"] == batch), key=lambda r: r["window"])
        for name in (k for k, v in some[0].items() if type(v) is float):
            ax.loglog([r["window"] for r in some], [r[name] for r in some], marker="o", label=name)
        ax.set(title=f"LSTM, batch {batch}", xlabel="window, steps", ylabel="µs for an update")
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(book.out / "gpu.png", dpi=150)


# -------------------------------------------------------------------- order


def main(argv=None):
    """Goes through the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)
    book, quick = Book(options.out, options.quick), options.quick

    recorders = [f"{weights}, every {every}" for weights in WEIGHTS for every in (1, 5)]
    ways = [*recorders, "scan None", "scan 5", "scan 5, every 5"]
    for precision in ("highest",) if quick else ("highest", "default"):
        for cell in (gru,) if quick else (lstm, gru):
            for way in ways[::2] if quick else ways:
                label = {"cell": cell.__name__, "way": way, "precision": precision}
                book.enter("exact", functools.partial(exact, cell, way, precision, quick), **label)
    book.enter("exact", functools.partial(learned, quick), cell="lstm", way="learner")

    def size(cell, batch, hidden, window):
        return (
            Shape(cell, batch, 8, 16, 4)
            if quick
            else Shape(cell, batch, hidden // 2, hidden, window)
        )

    def named(shape):
        return {key: getattr(shape, key) for key in ("cell", "batch", "hidden", "window")}

    steps, repeats = (6, 1) if quick else (60, 5)
    f32, bf16 = jnp.float32, jnp.bfloat16
    grid = [("LSTM", b, h, 20, f32) for h in (256, 1024) for b in (1, 32, 256)]
    grid += [(cell, b, 256, 20, f32) for cell in ("GRU", "LIF", "LRU") for b in (1, 32)]
    grid += [("LSTM", 256, h, 20, bf16) for h in (256, 1024)]
    grid += [("LSTM", b, 256, 100, f32) for b in (1, 32, 256)] + [("GRU", 256, 1024, 100, f32)]
    sequence = [("LSTM", 1, 256), ("LSTM", 32, 256), ("LSTM", 256, 256), ("LSTM", 128, 1024)]
    sequence += [("GRU", 1, 256), ("GRU", 32, 256), ("GRU", 128, 1024)]
    if quick:
        grid, sequence = [("LSTM", 2, 0, 0, f32), ("LIF", 2, 0, 0, bf16)], [("GRU", 2, 0)]
    for row in sequence:
        shape = size(*row, 20)
        table, length = "a whole sequence of 100 steps, ms", 20 if quick else 100
        book.enter(table, functools.partial(sequences, shape, length, repeats), **named(shape))
        book.enter(
            "PyTorch, " + table,
            functools.partial(torch_sequences, shape, length, repeats),
            **named(shape),
        )
    for *row, dtype in grid:
        shape = size(*row)
        kind = {"type": jnp.dtype(dtype).name}
        measure = functools.partial(updates, shape, dtype, steps, repeats)
        book.enter("an update, µs", measure, **named(shape), **kind)
    for batch in (2,) if quick else (1, 32):
        for window in (2,) if quick else (5, 50, 200):
            shape = dataclasses.replace(size("LSTM", batch, 256, window), window=window)
            measure = functools.partial(updates, shape, f32, steps, repeats)
            book.enter("against the window, µs", measure, **named(shape))
    for cell, batch in (("LSTM", 2),) if quick else (("LSTM", 1), ("LSTM", 32), ("GRU", 32)):
        shape = size(cell, batch, 256, 20)
        measure = functools.partial(torch_updates, shape, 12 if quick else 80)
        book.enter("PyTorch's sliding loop, µs", measure, **named(shape))
    draw(book)
    book.write()
    print(f"{len(book.rows)} rows in {book.age:.0f} s", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
