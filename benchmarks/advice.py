"""Which window a task needs, and which one each way of asking says.

    python benchmarks/advice.py [--tasks copy-2 echo-6 characters ...] [--advice] [--quick]

On the copy tasks a symbol of four is heard every L steps, blanks between, and the one before it has
to be said, wrong at random in one of ten cases: the target lies L steps back, and a window of L+1
reaches it. On echo-6 a symbol of two is heard at every step, and said six steps later. The
characters are those of Python's documentation. A GRU of 32 units reads 16 streams; Adam updates
at every step, at a rate that falls to zero.

Trains with each window and prints the mean loss on other streams; of these the smallest window
whose loss is within 2 % of the best. Then looks at several moments of a run with the longest
window, and prints the largest window that `estimate_bias` asks for at one of them, and the
smallest and largest that `fit_decay` does, from norms as Aicher, Foti & Fox (2019) have them.
"""

import argparse
import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbptt

TASKS = ("copy-2", "copy-6", "copy-10", "copy-25", "echo-6", "characters")
WINDOWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
LONGEST, UNITS, STREAMS, NOISE = 64, 32, 16, 0.1
LOOKS, LOOKED_AT = 16, 1000  # moments of a run, and steps of each half of the streams


# ------------------------------------------------------------ tasks


def echoed(lag, seed, steps):
    """What is heard and what is to be said, int32 (steps, STREAMS), a symbol at every step."""
    rng = np.random.default_rng(seed)
    heard = rng.integers(1, 3, (steps + lag, STREAMS)).astype(np.int32)
    wrong = rng.random((steps, STREAMS)) < NOISE
    said = np.where(wrong, rng.integers(1, 3, wrong.shape), heard[:-lag])
    return heard[lag:], said.astype(np.int32)


def copied(lag, seed, steps):
    """The same with a symbol every `lag` steps: 0 is a blank."""
    rng = np.random.default_rng(seed)
    heard = np.zeros((steps // lag + 3, lag, STREAMS), np.int32)
    heard[:, 0] = rng.integers(1, 5, (len(heard), STREAMS))
    heard = heard.reshape(-1, STREAMS)
    heard = np.stack([np.roll(row, -rng.integers(lag)) for row in heard.T], 1)
    heard, said = heard[lag:], heard[:-lag]
    wrong = (rng.random(said.shape) < NOISE) & (said > 0)
    said = np.where(wrong, rng.integers(1, 5, said.shape), said)
    return heard[:steps], said[:steps].astype(np.int32)


@functools.cache
def text():
    """The numbers of all characters of Python's documentation, and how many there are."""
    from pydoc_data.topics import topics

    content = "\n\n\n".join(topics[name] for name in sorted(topics))
    characters = sorted(set(content))
    number = {c: i for i, c in enumerate(characters)}
    return np.array([number[c] for c in content], np.int32), len(characters)


def read(seed, steps):
    """Characters and those after them; from seed 1000 on of the last tenth of the text."""
    symbols, _ = text()
    most = len(symbols) // 10
    part = symbols[-most:] if seed >= 1000 else symbols[:-most]
    starts = np.random.default_rng(seed).integers(0, len(part) - steps, STREAMS)
    rows = np.stack([part[start : start + steps + 1] for start in starts], 1)
    return rows[:-1], rows[1:]


def stream(task, seed, steps):
    name, _, lag = task.partition("-")
    if name == "characters":
        return tuple(map(jnp.asarray, read(seed, steps)))
    made = copied if name == "copy" else echoed
    return tuple(map(jnp.asarray, made(int(lag), seed, steps)))


# ------------------------------------------------------------ the model, and its training


def init(task, seed):
    symbols = text()[1] if task == "characters" else 5
    of_in, of_h, of_out = jax.random.split(jax.random.key(seed), 3)
    recurrent = [jax.random.orthogonal(key, UNITS) for key in jax.random.split(of_h, 3)]
    return {
        "in": jax.random.normal(of_in, (symbols, 3 * UNITS)) / 2,
        "h": jnp.concatenate(recurrent, axis=1),
        "b": jnp.zeros(3 * UNITS).at[UNITS : 2 * UNITS].set(1.0),  # gates that keep
        "out": jax.random.normal(of_out, (UNITS, symbols)) / UNITS**0.5,
        "b_out": jnp.zeros(symbols),
    }


def step(params, h, x):
    from_x = jnp.split(params["in"][x[0]] + params["b"], 3, axis=1)
    from_h = jnp.split(h @ params["h"], 3, axis=1)
    reset, keep = (jax.nn.sigmoid(from_x[i] + from_h[i]) for i in (0, 1))
    new = jnp.tanh(from_x[2] + reset * from_h[2])
    h = new + keep * (h - new)
    return h, h @ params["out"] + params["b_out"]


def loss(y, x):
    return optax.softmax_cross_entropy_with_integer_labels(y, x[1]).mean()


@functools.partial(jax.jit, static_argnums=0)
def train(window, params, xs, held_out):
    """The loss on other streams after training, and the parameters at LOOKS moments of it."""
    steps = len(xs[0])
    rate = optax.cosine_decay_schedule(3e-3, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    learner = jaxbptt.learner(step, loss, optimizer, window=window, weights="current")
    state = learner.init(params, jnp.zeros((STREAMS, UNITS)), jax.tree.map(lambda v: v[0], xs))

    def part(state, xs):
        before = state.params
        return jax.lax.scan(learner.update, state, xs)[0], before

    parts = jax.tree.map(lambda v: v.reshape(LOOKS, -1, *v.shape[1:]), xs)
    state, moments = jax.lax.scan(part, state, parts)
    _, metrics = learner.evaluate(state, held_out)
    return metrics.loss[100:].mean(), moments


# ------------------------------------------------------------ what is said of windows


@jax.jit
def expected(params, xs):
    """The bias of the expected gradient, from two halves of the streams."""
    halves = jax.tree.map(lambda v: jnp.stack(jnp.split(v, 2, axis=1)), xs)
    h = jnp.zeros((2, STREAMS // 2, UNITS))
    return jaxbptt.estimate_bias(step, loss, params, h, halves, window=LONGEST)


@jax.jit
def by_norms(params, xs):
    """The decay of the mean norms of single steps' terms."""
    rec = jaxbptt.record(step, window=LONGEST, weights="current")
    tape = rec.init(params, jnp.zeros((STREAMS, UNITS)), jax.tree.map(lambda v: v[0], xs))

    def look(tape, x):
        tape, y = rec(params, tape, x)
        ct_ys = jax.grad(loss)(y, x)[None]
        return tape, jaxbptt.gradient_by_lag(rec, params, tape, ct_ys)

    _, stacked = jax.lax.scan(look, tape, xs)
    return jaxbptt.fit_decay(jax.tree.map(lambda v: v[LONGEST:].mean(0), stacked))


def advice(task, seed, moments):
    """At each moment what is said, NaN where nothing can be: expected, then of norms."""
    rows = []
    for i in range(LOOKS):
        params = jax.tree.map(lambda v, i=i: v[i], moments)
        xs = stream(task, 500 + 100 * seed + i, LONGEST + LOOKED_AT)
        bias, decay = expected(params, xs), by_norms(params, jax.tree.map(lambda v: v[:400], xs))
        print(f"{task}, moment {i}: signal {float(bias.signal):.2f}, {bias}", flush=True)
        said = int(bias.window_within(0.3)) if bias.signal > 0.5 else None
        norms = [decay.window_for(0.95), decay.window_within(0.1), decay.window_within(0.5)]
        rows.append([said, *map(int, norms)])
    return rows


def span(values):
    """The smallest and the largest; what is endless as ∞."""
    shown = ["∞" if v == 2**31 - 1 else str(v) for v in sorted(v for v in values if v is not None)]
    return f"{shown[0]} … {shown[-1]}" if shown else "-"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--steps", type=int, default=6400)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--advice", action="store_true", help="leave out the other windows")
    parser.add_argument("--quick", action="store_true", help="one short task")
    args = parser.parse_args()
    if args.quick:
        args.tasks, args.steps, args.seeds, args.advice = ["copy-2"], 1600, 1, True
    windows = [LONGEST] if args.advice else WINDOWS
    seeds = range(args.seeds)
    print(f"jax {jax.__version__}, {jax.default_backend()}, {args.steps} steps, {args.seeds} seeds")
    lines = []
    for task in args.tasks:
        losses, moments = {}, {}
        for window in windows:
            found = []
            for seed in seeds:
                xs, held_out = stream(task, seed, args.steps), stream(task, 1000 + seed, 4100)
                end, moments[seed] = train(window, init(task, seed), xs, held_out)
                found.append(float(end))
            losses[window] = statistics.mean(found)
            print(
                f"{task}, window {window}: loss {losses[window]:.4f}",
                np.round(found, 4),
                flush=True,
            )
        best = min(losses.values())
        needed = min(w for w in windows if losses[w] <= 1.02 * best)
        rows = [advice(task, seed, moments[seed]) for seed in seeds]
        said = [max((row[0] for row in of_seed if row[0]), default=0) for of_seed in rows]
        norms = [[row[i] for of_seed in rows for row in of_seed] for i in (1, 2, 3)]
        lines.append(
            f"| {task} | {'-' if args.advice else needed} | {', '.join(map(str, said))} | "
            + " | ".join(map(span, norms))
            + " |"
        )
    print("\n| task | needed | `estimate_bias` | share 0.95 | δ = 0.1 | δ = 0.5 |")
    print("|---|---|---|---|---|---|", *lines, sep="\n")


if __name__ == "__main__":
    main()
