"""Throughput of a sweep: whole learner runs in one program, against one run at a time.

    python benchmarks/sweep.py [--repeats 3] [--steps 200] [--members 4 16 64]

A run is an LSTM trained online, an update at every step, with a learning rate and a seed of
its own; every member has its own tape. "One at a time" calls one compiled program for each
member; `vmap` and `lax.map` have all members in one program, and say how many times as fast.
All are compiled before the clock starts; figures are medians of interleaved calls.
"""

import argparse
import statistics

import jax
import jax.numpy as jnp
import optax
from cells import Shape, problem
from jax import lax
from measure import seconds

import jaxbptt

# B, D, H, window
SHAPES = [(1, 16, 32, 20), (1, 32, 64, 20), (4, 32, 64, 20), (16, 32, 64, 20)]


def trained(model, window):
    """A function from a learning rate and a key to the mean loss of a whole run."""
    params, xs = model.params, model.xs

    def run(rate, key):
        learner = jaxbptt.learner(
            model.step,
            lambda y, x: jnp.mean((y[..., : x.shape[-1]] - jnp.tanh(x)) ** 2),
            optax.inject_hyperparams(optax.adam)(rate),
            window=window,
            weights="current",
        )
        keys = jax.random.split(key, len(params))
        first = {
            name: value + 0.1 * jax.random.normal(k, value.shape)
            for k, (name, value) in zip(keys, params.items(), strict=True)
        }
        _, metrics = lax.scan(learner.update, learner.init(first, model.carry, xs[0]), xs)
        return metrics.loss.mean()

    return run


def medians(calls, repeats):
    """Seconds of each call, in turn."""
    took = [[seconds(call) for call in calls] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*took, strict=True)]


def contestants(run, members):
    """The sweep, one run at a time, under `vmap` and under `lax.map`: each gives all losses."""
    rates = jnp.geomspace(1e-4, 1e-2, members)
    keys = jax.random.split(jax.random.key(0), members)
    single, together = jax.jit(run), jax.jit(jax.vmap(run))
    mapped = jax.jit(lambda rates, keys: lax.map(lambda member: run(*member), (rates, keys)))
    return [
        lambda: jnp.stack([single(rate, key) for rate, key in zip(rates, keys, strict=True)]),
        lambda: together(rates, keys),
        lambda: mapped(rates, keys),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--members", type=int, nargs="+", default=[4, 16, 64])
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {args.repeats} repeats")
    print("| B | D | H | window | members | one at a time, steps/s | vmap | lax.map |")
    print("|---|---|---|---|---|---|---|---|")
    for batch, inputs, hidden, window in SHAPES:
        run = trained(problem(Shape("LSTM", batch, inputs, hidden, window), args.steps), window)
        for members in args.members:
            calls = contestants(run, members)
            want, *others = (call() for call in calls)
            for got in others:
                assert jnp.allclose(want, got, rtol=1e-4), "these are not the same runs"
            apart, *took = medians(calls, args.repeats)
            cells = [batch, inputs, hidden, window, members, f"{members * args.steps / apart:,.0f}"]
            cells += [f"{apart / t:.2f}" for t in took]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
