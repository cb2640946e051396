"""Time and memory of the gradient of a long simulation: a neuron whose conductances are trained.

    python benchmarks/neuron.py [--lengths 100 1000 4000 20000 100000] [--repeats 7]

A cable of 50 compartments with the currents of Hodgkin and Huxley; the loss is the distance
of the last one's voltage from a target, over all steps. Gradients go back over all steps, or in
chunks of 200. Every figure is the median of interleaved runs in one process, and memory is what
XLA reserves for temporaries. The gradients of each kind are held against each other in float64.
Equinox's checkpointed loop is run where equinox is installed.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
from jax import lax

import jaxbptt

try:
    import equinox.internal as equinox
except ImportError:
    equinox = None

COMPARTMENTS, WINDOW, DT = 50, 200, 0.025


def vtrap(x, y):
    """X / (exp(x / y) - 1), also at 0."""
    small = jnp.abs(x / y) < 1e-4
    safe = jnp.where(small, y, x)
    return jnp.where(small, y * (1 - x / (2 * y)), safe / jnp.expm1(safe / y))


def step(params, state, current):
    """One step of exponential Euler: gates, then the voltage."""
    v, m, h, n = state

    def gate(value, opens, closes):
        steady = opens / (opens + closes)
        return steady + (value - steady) * jnp.exp(-DT * (opens + closes))

    m = gate(m, 0.1 * vtrap(-(v + 40.0), 10.0), 4.0 * jnp.exp(-(v + 65.0) / 18.0))
    h = gate(h, 0.07 * jnp.exp(-(v + 65.0) / 20.0), 1.0 / (1.0 + jnp.exp(-(v + 35.0) / 10.0)))
    n = gate(n, 0.01 * vtrap(-(v + 55.0), 10.0), 0.125 * jnp.exp(-(v + 65.0) / 80.0))
    sodium, potassium = params["sodium"] * m**3 * h, params["potassium"] * n**4
    padded = jnp.pad(v, 1, mode="edge")
    axial = params["axial"] * (padded[2:] - 2 * v + padded[:-2])
    inward = sodium * (50.0 - v) + potassium * (-77.0 - v) + params["leak"] * (-54.4 - v)
    v = v + DT * (inward + axial + current * jnp.where(jnp.arange(v.size) == 0, 1.0, 0.0))
    return (v, m, h, n), v[-1]


def problem(length):
    """Conductances of each compartment, a state at rest, currents and a target."""
    ones = jnp.ones(COMPARTMENTS)
    params = {"sodium": 120 * ones, "potassium": 36 * ones, "leak": 0.3 * ones, "axial": 5 * ones}
    state = -65.0 * ones, 0.053 * ones, 0.596 * ones, 0.318 * ones
    time = jnp.arange(length) * DT
    return params, state, 20.0 + 5 * jnp.sin(time / 7), -60.0 + jnp.sin(time / 5)


def mean_square(voltages, target):
    return jnp.mean((voltages - target) ** 2)


def through(run):
    """The gradient of a run's loss: `run(f, state, currents)` gives the voltages."""

    def loss(params, state, currents, target):
        return mean_square(run(functools.partial(step, params), state, currents), target)

    return jax.grad(loss)


def outputs(scan, **how):
    return lambda f, state, currents: scan(f, state, currents, **how)[1]


def pieces_of(steps, *, detached=False, again=False):
    """A scan over scans of so many steps, as one writes it; what is left over comes last."""

    def run(f, state, currents):
        def piece(state, currents):
            return lax.scan(f, lax.stop_gradient(state) if detached else state, currents)

        piece = jax.checkpoint(piece) if again else piece
        whole = len(currents) - len(currents) % steps
        state, voltages = lax.scan(piece, state, currents[:whole].reshape(-1, steps))
        return jnp.concatenate([voltages.reshape(-1), piece(state, currents[whole:])[1]])

    return run


def grads_in_the_loop(params, state, currents, target):
    """Chunks by hand with a gradient for each, added up: the forward loop is written anew."""
    steps, length = min(WINDOW, len(currents)), len(currents)

    def chunk(sofar, rows):
        total, state = sofar

        def loss(params):
            state_after, voltages = lax.scan(functools.partial(step, params), state, rows[0])
            return jnp.sum((voltages - rows[1]) ** 2) / length, state_after

        grad, state = jax.grad(loss, has_aux=True)(params)
        return (jax.tree.map(jnp.add, total, grad), state), None

    rows = currents.reshape(-1, steps), target.reshape(-1, steps)
    zeros = jax.tree.map(jnp.zeros_like, params)
    return lax.scan(chunk, (zeros, state), rows)[0][0]


def near_root(length):
    """The divisor of the length that is nearest to its root."""
    divisors = [k for k in range(1, length + 1) if length % k == 0]
    return min(divisors, key=lambda k: abs(k - length**0.5))


def ways(length):
    """The gradients: name, over all steps or in chunks, function."""
    chunk = min(WINDOW, length)
    cut = {"window": WINDOW, "every": WINDOW}
    found = [
        ("`lax.scan`", "all", through(outputs(lax.scan))),
        (
            "`jax.checkpoint` around pieces of √T",
            "all",
            through(pieces_of(near_root(length), again=True)),
        ),
        ("`scan(window=None)`", "all", through(outputs(jaxbptt.scan, window=None))),
        (
            "`scan(window=None, remat=True)`",
            "all",
            through(outputs(jaxbptt.scan, window=None, remat=True)),
        ),
        ("`lax.scan` and `stop_gradient`", "chunks", through(pieces_of(chunk, detached=True))),
        (
            "the same under `jax.checkpoint`",
            "chunks",
            through(pieces_of(chunk, detached=True, again=True)),
        ),
        ("a gradient for each chunk, added up", "chunks", grads_in_the_loop),
        ("`scan(window=200, every=200)`", "chunks", through(outputs(jaxbptt.scan, **cut))),
        ("the same with `remat=True`", "chunks", through(outputs(jaxbptt.scan, **cut, remat=True))),
        ("the same with `remat=50`", "chunks", through(outputs(jaxbptt.scan, **cut, remat=50))),
        ("the same with `remat=200`", "chunks", through(outputs(jaxbptt.scan, **cut, remat=200))),
    ]
    if equinox is not None:
        theirs = outputs(equinox.scan, kind="checkpointed")
        found.insert(2, ("equinox, `checkpointed`", "all", through(theirs)))
    return found


def hold_against_each_other(length):
    """Stops where two gradients over the same steps differ, in float64."""
    with jax.enable_x64(True):
        args = jax.tree.map(lambda v: v.astype(jnp.float64), problem(length))
        first = {}
        for name, steps, grad in ways(length):
            got = jax.jit(grad)(*args)
            want = first.setdefault(steps, got)
            worst = max(
                float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
                for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
            )
            assert worst < 1e-9, (name, worst)


def measure(length, repeats):
    """Of each way, seconds and bytes."""
    args = problem(length)
    programs = {name: jax.jit(grad).lower(*args).compile() for name, _, grad in ways(length)}
    took = {name: [] for name in programs}
    for turn in range(repeats + 1):  # the first is not measured
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            took[name] += [time.perf_counter() - start] if turn else []
    memory = {n: program.memory_analysis().temp_size_in_bytes for n, program in programs.items()}
    return {name: (statistics.median(took[name]), memory[name]) for name in programs}


def rounded(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[100, 1000, 4000, 20_000, 100_000]
    )
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {args.repeats} repeats\n")
    hold_against_each_other(1000)
    found = {length: measure(length, args.repeats) for length in args.lengths}
    print("| gradients over | way | " + " | ".join(f"T = {n:,}" for n in args.lengths) + " |")
    print("|---" * (2 + len(args.lengths)) + "|")
    for name, steps, _ in ways(args.lengths[0]):
        cells = [found[n][name] for n in args.lengths]
        shown = [f"{rounded(1e3 * s)} ms, {rounded(b / 2**20)} MiB" for s, b in cells]
        print(f"| {steps} | {name} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main()
