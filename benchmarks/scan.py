"""Time and memory of one gradient through `jaxbptt.scan`, against what one writes without it.

    python benchmarks/scan.py [--repeats 15] [--only full head sliding]

* full: `window=None` against `jax.grad` of `lax.scan`;
* head: the same where the step ends in a projection on V words and their cross-entropy;
* sliding: `window=16, every=1` against a window run again for each output, under `vmap`.

Every figure is the median of interleaved runs in one process, memory is what XLA reserves
for temporaries. Ratios above one are in favour of `jaxbptt.scan`, but for memory.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
from cells import lstm
from jax import lax

import jaxbptt

# B, D, H, T
SHAPES = [
    (1, 128, 256, 50),
    (8, 128, 256, 50),
    (32, 128, 256, 50),
    (1, 512, 512, 35),
    (32, 512, 512, 35),
    (32, 64, 64, 100),
    (8, 256, 256, 64),
    (128, 128, 256, 35),
]
# B, D, H, T, V
HEADS = [
    (1, 128, 256, 50, 1000),
    (8, 128, 256, 50, 1000),
    (32, 128, 256, 50, 1000),
    (1, 128, 256, 50, 10000),
    (8, 128, 256, 50, 10000),
]
SLIDING = [(1, 128, 256, 50), (8, 128, 256, 50), (32, 128, 256, 50), (32, 64, 64, 100)]
WINDOW = 16


def gru(params, carry, x):
    """A GRU cell whose two matrix products make all gates at once."""
    (h,) = carry
    inputs, hidden = x @ params["wx"] + params["b"], h @ params["wh"]
    (r_x, z_x, n_x), (r_h, z_h, n_h) = (jnp.split(v, 3, axis=-1) for v in (inputs, hidden))
    r, z = jax.nn.sigmoid(r_x + r_h), jax.nn.sigmoid(z_x + z_h)
    h = (1 - z) * jnp.tanh(n_x + r * n_h) + z * h
    return (h,), h


CELLS = {"LSTM": (lstm, 4, 2), "GRU": (gru, 3, 1)}  # cell, gates, leaves of the carry


def problem(kind, batch, inputs, hidden, steps, words=0):
    """Parameters, a first carry, and inputs."""
    _, gates, leaves = CELLS[kind]
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "wx": jax.random.normal(keys[0], (inputs, gates * hidden)) / inputs**0.5,
        "wh": jax.random.normal(keys[1], (hidden, gates * hidden)) / hidden**0.5,
        "b": jnp.zeros((gates * hidden,)),
    }
    xs = jax.random.normal(keys[2], (steps, batch, inputs))
    if words:
        params["head"] = jax.random.normal(keys[3], (hidden, words)) / hidden**0.5
        xs = xs, jax.random.randint(keys[4], (steps, batch), 0, words)
    return params, (jnp.zeros((batch, hidden)),) * leaves, xs


def with_head(cell):
    """The cell with a projection on words; the output is the loss of this step."""

    def step(params, carry, x):
        x, word = x
        carry, h = cell(params, carry, x)
        scores = jax.nn.log_softmax(h @ params["head"])
        return carry, -jnp.take_along_axis(scores, word[:, None], -1).mean()

    return step


def run_loss(scan, step, mean_of):
    """Loss of a whole run as a function of the parameters, the inputs and the first carry."""

    def loss(params, carry, xs):
        _, ys = scan(functools.partial(step, params), carry, xs)
        return mean_of(ys)

    return loss


def windows_loss(step, mean_of):
    """The same, each output from a run of its own over the window before it."""

    def loss(params, carry, xs):
        steps = xs.shape[0]

        def body(carry, x):
            return step(params, carry, x)[0], carry

        _, before = lax.scan(body, carry, xs)  # the carry that entered each step
        before = lax.stop_gradient(before)

        def output(end):
            start = jnp.maximum(end - (WINDOW - 1), 0)
            carry = jax.tree.map(lambda v: v[start], before)

            def body(carry, i):
                new, y = step(params, carry, xs[jnp.minimum(start + i, steps - 1)])
                reached = start + i <= end
                return jax.tree.map(lambda a, b: jnp.where(reached, a, b), new, carry), y

            _, ys = lax.scan(body, carry, jnp.arange(WINDOW))
            return ys[end - start]

        return mean_of(jax.vmap(output)(jnp.arange(steps)))

    return loss


def compare(ours, theirs, args, repeats):
    """How many times as fast the first loss's gradient is, and how much memory it takes."""
    programs = [jax.jit(jax.grad(f, (0, 1))).lower(*args).compile() for f in (ours, theirs)]
    memory = [program.memory_analysis().temp_size_in_bytes for program in programs]
    for program in programs:
        jax.block_until_ready(program(*args))
    times = [[], []]
    for _ in range(repeats):
        for program, took in zip(programs, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            took.append(time.perf_counter() - start)
    a, b = (statistics.median(took) for took in times)
    return a, b, memory[0] / memory[1]


def square(ys):
    return jnp.mean((ys - 0.1) ** 2)


def table(title, shapes, cells, contest, repeats):
    """Prints a line for each shape and the means."""
    print(f"\n### {title}\n")
    print("| cell | B, D, H, T | other ms | scan ms | times as fast | memory |")
    print("|---|---|---|---|---|---|")
    speeds, memories = [], []
    for kind in cells:
        for shape in shapes:
            ours, theirs, memory = compare(*contest(kind, shape), repeats)
            speeds.append(theirs / ours)
            memories.append(memory)
            row = [kind, ", ".join(map(str, shape)), f"{1e3 * theirs:.2f}", f"{1e3 * ours:.2f}"]
            row += [f"{speeds[-1]:.2f}", f"{memory:.2f}"]
            print("| " + " | ".join(row) + " |", flush=True)
    print(
        f"\ngeometric mean {statistics.geometric_mean(speeds):.2f}, least {min(speeds):.2f}; "
        f"memory {statistics.geometric_mean(memories):.2f}, most {max(memories):.2f}"
    )


def full(kind, shape):
    cell = CELLS[kind][0]
    losses = [
        run_loss(s, cell, square) for s in (functools.partial(jaxbptt.scan, window=None), lax.scan)
    ]
    return *losses, problem(kind, *shape)


def head(kind, shape):
    step = with_head(CELLS[kind][0])
    losses = [
        run_loss(s, step, jnp.mean)
        for s in (functools.partial(jaxbptt.scan, window=None), lax.scan)
    ]
    return *losses, problem(kind, *shape)


def sliding(kind, shape):
    cell = CELLS[kind][0]
    ours = functools.partial(jaxbptt.scan, window=WINDOW)
    return run_loss(ours, cell, square), windows_loss(cell, square), problem(kind, *shape)


TABLES = {
    "full": ("window=None against jax.grad(lax.scan)", SHAPES, full),
    "head": ("the same with a head of V words (B, D, H, T, V)", HEADS, head),
    "sliding": (f"window={WINDOW}, every=1 against a window for each output", SLIDING, sliding),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {args.repeats} repeats")
    for name in args.only:
        title, shapes, contest = TABLES[name]
        table(title, shapes, args.cells, contest, args.repeats)


if __name__ == "__main__":
    main()
