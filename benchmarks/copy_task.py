"""The copy task of Aicher, Foti & Fox (2019), with fixed windows and with adaptive ones.

    python benchmarks/copy_task.py [--steps 20000] [--seeds 3]

A marker and ten symbols go by; eleven steps after each of them it has to be said. Two LSTM layers
of 50 units read 64 streams; SGD at a rate of 1, clipped at 1, updates every five steps. Every 500
steps an adaptive run looks at the gradient by lag, and takes the smallest window whose estimated
relative bias is below δ, from 2 to 100, rounded up to a multiple of 5. Prints perplexities on
other streams: 6 is chance, and 1.68 is what no memory at all can reach.
"""

import argparse
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbptt

LAG, SYMBOLS, UNITS, STREAMS = 10, 6, 50, 64
EVERY, LOOK, LONGEST = 5, 500, 100
WINDOWS, DELTAS = (5, 10, 15, 20, 30), (0.9, 0.5, 0.1)


def streams(seed, steps):
    """Symbols and what has to be said, int32 (steps, STREAMS): 0 is a blank, 1 the marker."""
    rng, period = np.random.default_rng(seed), 2 * (LAG + 1)
    blocks = np.zeros((steps // period + 2, period, STREAMS), np.int32)
    blocks[:, 0] = 1
    blocks[:, 1 : LAG + 1] = rng.integers(2, SYMBOLS, (len(blocks), LAG, STREAMS))
    said = blocks.reshape(-1, STREAMS)
    heard = np.stack([np.roll(row, -rng.integers(period)) for row in said.T], 1)
    return heard[LAG + 1 :][:steps], heard[: -(LAG + 1)][:steps]


def init(seed):
    keys = iter(jax.random.split(jax.random.key(seed), 6))

    def matrix(rows, columns):
        most = math.sqrt(3 / max(rows, columns))
        return jax.random.uniform(next(keys), (rows, columns), jnp.float32, -most, most)

    def layer():
        wx, wh = matrix(UNITS, 4 * UNITS), matrix(UNITS, 4 * UNITS)
        return {"wx": wx, "wh": wh, "b": jnp.zeros(4 * UNITS)}

    return {
        "in": matrix(SYMBOLS, UNITS),
        "layers": [layer(), layer()],
        "out": matrix(UNITS, SYMBOLS),
        "b": jnp.zeros(SYMBOLS),
    }


def step(params, carry, x):
    h, after = params["in"][x[0]], []
    for layer, (h_old, c) in zip(params["layers"], carry, strict=True):
        gates = h @ layer["wx"] + h_old @ layer["wh"] + layer["b"]
        i, f, g, o = jnp.split(gates, 4, axis=1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        after.append((h, c))
    return after, h @ params["out"] + params["b"]


def loss(y, x):
    return optax.softmax_cross_entropy_with_integer_labels(y, x[1]).mean()


def blank():
    return [(jnp.zeros((STREAMS, UNITS)), jnp.zeros((STREAMS, UNITS))) for _ in range(2)]


class Run:
    """Training with a window that may change; one compiled program for each length."""

    def __init__(self, seed, steps):
        self.stream, self.held_out = streams(seed, steps), streams(1000 + seed, 1000)
        self.optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))
        self.params, self.carry = init(seed), blank()

    def train(self, window, start, stop):
        learner = learner_of(window, self.optimizer)
        state = learner.init(self.params, self.carry, (self.stream[0][0], self.stream[1][0]))
        xs = tuple(v[start:stop] for v in self.stream)
        state, _ = train_of(learner)(state, xs)
        self.params, self.carry = state.params, state.tape.carry

    def decay(self, start):
        """The mean gradient by lag over 22 steps, each of a phase of its own."""
        xs = tuple(v[start : start + LONGEST + 22] for v in self.stream)
        return measure(self.params, xs)

    def perplexity(self):
        return float(evaluate(self.params, self.held_out))


OPTIMIZERS: dict = {}


def learner_of(window, optimizer):
    if window not in OPTIMIZERS:
        OPTIMIZERS[window] = jaxbptt.learner(
            step,
            lambda y, x: loss(y, x) / EVERY,
            optimizer,
            window=window,
            every=EVERY,
            weights="current",
        )
    return OPTIMIZERS[window]


TRAIN: dict = {}


def train_of(learner):
    if learner not in TRAIN:
        TRAIN[learner] = jax.jit(lambda state, xs: jax.lax.scan(learner.update, state, xs))
    return TRAIN[learner]


@jax.jit
def measure(params, xs):
    """The decay of λ as the paper takes it: norms of each stream, and of the mean over all."""
    rec = jaxbptt.record(step, window=LONGEST, weights="current")
    tape = rec.init(params, blank(), tuple(v[0] for v in xs))
    head = tuple(v[:LONGEST] for v in xs)
    tape, _ = jax.lax.scan(lambda tape, x: (rec(params, tape, x)[0], None), tape, head)

    def look(tape, x):
        tape, y = rec(params, tape, x)
        ct = jax.grad(loss)(y, x)[None]
        lams = jaxbptt.gradient_by_lag(rec, params, tape, ct, full=True).carry
        lams = jnp.concatenate(jax.tree.leaves(lams), axis=2)  # (lags, STREAMS, all units)
        return tape, (jnp.linalg.norm(lams, axis=2).mean(1), lams.mean(1))

    _, (norms, means) = jax.lax.scan(look, tape, tuple(v[LONGEST:] for v in xs))
    norms = norms.mean(0)
    together = jnp.linalg.norm(jnp.cumsum(means.mean(0), axis=0), axis=1)
    return jaxbptt.fit_decay(jaxbptt.ByLag(norms, norms, together))


@jax.jit
def evaluate(params, xs):
    def one(carry, x):
        carry, y = step(params, carry, x)
        return carry, loss(y, x)

    return jnp.exp(jax.lax.scan(one, blank(), xs)[1][100:].mean())


def fixed(window, seed, steps):
    run = Run(seed, steps)
    run.train(window, 0, steps)
    return run.perplexity(), [window]


def adaptive(delta, seed, steps):
    run, window, taken = Run(seed, steps + LONGEST + 22), 15, []
    for start in range(0, steps, LOOK):
        asked = int(run.decay(start).window_within(delta))
        window = min(max(2, asked), LONGEST)
        taken.append(window)
        run.train(-(-window // 5) * 5, start, start + LOOK)
    return run.perplexity(), taken


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    print(
        f"jax {jax.__version__}, {jax.default_backend()}, {args.steps} steps, {args.seeds} seeds\n"
    )
    print("| window | perplexity | sd | median window | last window |\n|---|---|---|---|---|")
    for name, run, values in (("", fixed, WINDOWS), ("δ = ", adaptive, DELTAS)):
        for value in values:
            results = [run(value, seed, args.steps) for seed in range(args.seeds)]
            found = [perplexity for perplexity, _ in results]
            taken = [w for _, windows in results for w in windows]
            last = statistics.mean(windows[-1] for _, windows in results)
            sd = statistics.stdev(found) if len(found) > 1 else float("nan")
            print(
                f"| {name}{value} | {statistics.mean(found):.3f} | {sd:.3f} "
                f"| {statistics.median(taken):.0f} | {last:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
