"""All benchmarks of the online loop: measures, and writes `RESULTS.md` with its plots.

    python benchmarks/all.py [--only online every ...] [--repeats 5] [--torch PYTHON]
    python benchmarks/all.py --only            # nothing measured: tables and plots again

Each section's measurements go into `results.json` as they come; a section that is not run
keeps those of the last time. `--torch` names an interpreter that has PyTorch, and Ignite and
snnTorch for their columns; without it these columns stay as they are. Every ratio is of medians
of interleaved runs. The whole takes about half an hour on two cores.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import platform
import resource
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import measure
import report
import ways
from cells import Shape, problem

import jaxbptt

HERE = Path(__file__).parent
GRID = [
    Shape("LSTM", 1, 128, 256, 20),
    Shape("LSTM", 8, 128, 256, 20),
    Shape("LSTM", 32, 128, 256, 20),
    Shape("LSTM", 128, 128, 256, 20),
    Shape("LSTM", 1, 512, 512, 35),
    Shape("LSTM", 32, 256, 512, 20),
    Shape("LSTM", 8, 512, 1024, 10),
    Shape("LSTM", 32, 64, 64, 20),
    Shape("LSTM", 1, 32, 64, 50),
    Shape("LSTM", 8, 64, 64, 200),
    Shape("LSTM", 8, 128, 256, 5),
    Shape("GRU", 1, 128, 256, 20),
    Shape("GRU", 32, 128, 256, 20),
    Shape("stack", 8, 128, 128, 20),
    Shape("LRU", 8, 64, 256, 50),
    Shape("LIF", 8, 64, 256, 50),
    Shape("language", 8, 64, 128, 20),
]
EVERY = 5
SMALL = [GRID[i] for i in (0, 1, 2, 7, 8, 11, 13)]
CHUNKS = [*SMALL[:5], GRID[11], Shape("GRU", 8, 128, 256, 20), GRID[12], GRID[15]]
# What PyTorch's ways are asked for.
TORCH_CELLS = {
    "sliding": ("LSTM", "GRU"),
    "chunks": ("LSTM", "GRU"),
    "ignite": ("LSTM",),
    "snntorch": ("LIF",),
}


class Torch:
    """PyTorch in a process of its own, or nothing."""

    def __init__(self, python):
        self.process, self.version = None, None
        if python:
            command = [python, HERE / "torch_sliding.py", str(len(os.sched_getaffinity(0)))]
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
            self.version = self._line()

    def _line(self):
        return self.process.stdout.readline().strip()

    def timers(self, columns, shape, steps):
        """Of each column's way that there is for the shape, what measures seconds per step."""
        found = {}
        for column, way in columns.items():
            timer = functools.partial(self._seconds, way, shape, steps)
            asked = self.process is not None and shape.cell in TORCH_CELLS[way]
            if asked and not math.isnan(timer()):
                found[column] = timer
        return found

    def _seconds(self, way, shape, steps):
        print(way, *dataclasses.astuple(shape), steps, file=self.process.stdin, flush=True)
        return float(self._line())


def prepared(shape, every=1):
    """The model, and how many steps make a block: some tenths of a second, a window at least."""
    operations, moved = measure.least(problem(shape, 3), shape.window)
    few = int(every * 0.1 / max(operations / 1e11, moved / 1e10))
    blocks = -(-max(shape.window, min(4000, few)) // shape.window)
    return problem(shape, blocks * shape.window), blocks * shape.window


def per_step(contestants, steps, repeats, timers=None):
    """Seconds per step of blocks of so many, and of the timers, which say that themselves."""
    took = measure.medians(contestants, repeats, timers)
    return {k: v / steps if k in contestants else v for k, v in took.items()}


def with_floor(model, window, contestants, steps, repeats, timers=None):
    """The same beside the floor, at the rates that the machine had in between."""
    rates = {"product": measure.product(), "copy": measure.copy()}
    found = per_step(contestants | rates, steps, repeats, timers)
    took = {name: steps * found.pop(name) for name in rates}
    floor = measure.floor_seconds(*measure.least(model, window), took)
    multiply, copied = measure.rates(took)
    return found | {"floor": floor, "multiply": multiply, "copy": copied}


def online(shape, repeats, torch):
    """An update at every step, against re-running the window, and the rest."""
    model, steps = prepared(shape)
    window = shape.window
    contestants = {
        "re-run": ways.rerun(model, window),
        "current": ways.recorded(model, window, "current"),
        "stored": ways.recorded(model, window, "stored"),
        "closures": ways.closures(model, window),
    }
    torch_steps = max(2 * window, min(4 * window, 60)) + 20
    timers = torch.timers({"PyTorch": "sliding"}, shape, torch_steps)
    took = with_floor(model, window, contestants, steps, repeats, timers)
    rec = jaxbptt.record(model.step, window=window, weights="current")
    tape = jax.eval_shape(rec.init, model.params, model.carry, ways.first(model.xs))
    kept = measure.residual_bytes(model)
    return took | {"tape": tape.nbytes, "kept": kept * window}


def every(shape, repeats, torch):
    """An update every few steps, the window four times as long."""
    del torch
    shape = Shape(shape.cell, shape.batch, shape.inputs, shape.hidden, 4 * EVERY)
    model, steps = prepared(shape, EVERY)
    contestants = {
        "re-run": ways.rerun(model, shape.window, EVERY),
        "current": ways.recorded_every(model, shape.window, EVERY),
    }
    return per_step(contestants, steps, repeats)


def recording(shape, repeats, torch):
    """Recording without a gradient, against the plain loop."""
    del torch
    model, steps = prepared(shape, shape.window)
    contestants = {"plain": ways.forward(model), "recorded": ways.unused(model, shape.window)}
    return per_step(contestants, steps, repeats)


def chunks(shape, repeats, torch):
    """A whole window, then one update."""
    model, steps = prepared(shape, shape.window)
    contestants = {
        "grad(lax.scan)": ways.chunks(model, shape.window),
        "jaxbptt.scan": ways.scanned_chunks(model, shape.window),
        "record": ways.recorded_every(model, shape.window, shape.window),
    }
    if shape.cell in ("LSTM", "GRU"):
        contestants["nnx.RNN"] = ways.nnx_chunks(model, shape.window)
    columns = {"PyTorch": "chunks", "Ignite": "ignite", "snnTorch": "snntorch"}
    timers = torch.timers(columns, shape, 10 * shape.window)
    return per_step(contestants, steps, repeats, timers)


def compiling(shape, repeats, torch):
    """Seconds to trace and compile one update, against one window of `jax.grad(lax.scan)`."""
    del torch
    model = problem(shape, shape.window)
    contestants = {
        "grad(lax.scan)": lambda: ways.chunks(model, shape.window),
        "current": lambda: ways.recorded(model, shape.window, "current"),
        "stored": lambda: ways.recorded(model, shape.window, "stored"),
    }
    return measure.compile_seconds(contestants, min(repeats, 3))


WINDOWS = [Shape("LSTM", 8, 64, 128, window) for window in (5, 10, 20, 50, 100, 200)]
BATCHES = [Shape("LSTM", batch, 128, 256, 20) for batch in (1, 4, 16, 64, 128)]
LONGER = [WINDOWS[2], Shape("LSTM", 1, 32, 64, 20), Shape("GRU", 1, 128, 256, 20)]
HIDDEN = [Shape("LSTM", 8, 64, hidden, 20) for hidden in (64, 128, 256, 512, 1024)]


def curve(shape, repeats, torch):
    """The two that matter."""
    del torch
    model, steps = prepared(shape)
    contestants = {
        "re-run": ways.rerun(model, shape.window),
        "current": ways.recorded(model, shape.window, "current"),
    }
    found = with_floor(model, shape.window, contestants, steps, repeats)
    for name, (function, state) in contestants.items():
        compiled = function.lower(state).compile().memory_analysis()
        state = sum(v.nbytes for v in jax.tree.leaves(state))
        found[f"{name} bytes"] = state + compiled.temp_size_in_bytes
    return found


def longer(shape, repeats, torch):
    """A window ten times as long."""
    del torch
    contestants, steps = {}, {}
    for window in (shape.window, 10 * shape.window):
        model, steps[f"{window}"] = prepared(dataclasses.replace(shape, window=window))
        contestants[f"{window}"] = ways.recorded(model, window, "current")
    return {k: v / steps[k] for k, v in measure.medians(contestants, repeats).items()}


def length(shape, repeats, torch, blocks=100, size=10_000):
    """A million steps: seconds per step of each block, and resident bytes after it.

    In turn with them, for the machine has slow minutes, a second run of the first block.
    """
    del repeats, torch
    model = problem(shape, size)
    function, first = ways.recorded(model, shape.window, "current")
    function = function.lower(first).compile()
    state, rows = jax.tree.map(jnp.copy, first), []
    for _ in range(blocks):
        state, block = timed(function, state)
        _, anew = timed(function, jax.tree.map(jnp.copy, first))
        rows.append((block / size, anew / size, resident()))
    seconds, again, bytes_ = zip(*rows, strict=True)
    return {"seconds": seconds, "first again": again, "resident": bytes_, "block": size}


def timed(function, state):
    jax.block_until_ready(state)
    start = time.perf_counter()
    state = jax.block_until_ready(function(state))[0]
    return state, time.perf_counter() - start


def resident():
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * resource.getpagesize()


SECTIONS = {
    "online": (online, GRID),
    "every": (every, SMALL),
    "recording": (recording, SMALL),
    "chunks": (chunks, CHUNKS),
    "compiling": (compiling, SMALL),
    "window": (curve, WINDOWS),
    "batch": (curve, BATCHES),
    "hidden": (curve, HIDDEN),
    "longer": (longer, LONGER),
    "length": (length, [Shape("LSTM", 1, 16, 32, 20)]),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--torch", metavar="PYTHON")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    path = args.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"sections": {}}
    torch = Torch(args.torch)
    for name in args.only:
        run, shapes = SECTIONS[name]
        before = {tuple(row["shape"]): row for row in results["sections"].get(name, [])}
        rows = []
        for shape in shapes:
            found = run(shape, args.repeats, torch)
            key = (shape.cell, shape.batch, shape.inputs, shape.hidden, shape.window)
            kept = {k: v for k, v in before.get(key, {}).items() if found.get(k) is None}
            rows.append(kept | {k: v for k, v in found.items() if v is not None} | {"shape": key})
            print(name, shape, {k: v for k, v in found.items() if isinstance(v, float)}, flush=True)
        results["sections"][name] = rows
        results |= machine(torch, results)
        path.write_text(json.dumps(results, indent=1) + "\n")
    report.write(results, args.out)


def machine(torch, before):
    return {
        "jax": jax.__version__,
        "torch": torch.version or before.get("torch"),
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
    }


if __name__ == "__main__":
    main()
