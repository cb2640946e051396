"""Time of one online step, gradient and SGD update included, against re-running the window.

    python benchmarks/online.py [--repeats 5] [--steps 100]

"re-run" is what one writes without a recorder: the last `window` inputs and the carry
before them are kept, and at every step `jax.grad` differentiates the window run again.
Every figure is the median of interleaved runs in one process.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
from jax import lax

import jaxbptt

# B, D, H, window
SHAPES = [
    (1, 128, 256, 20),
    (8, 128, 256, 20),
    (32, 128, 256, 20),
    (1, 512, 512, 35),
    (32, 64, 64, 20),
    (1, 32, 64, 50),
]
RATE = 1e-3


def lstm(params, carry, x):
    """An LSTM cell; the output is the hidden state."""
    h, c = carry
    gates = x @ params["wx"] + h @ params["wh"] + params["b"]
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h


def problem(batch, inputs, hidden, steps):
    """Parameters, a first carry, and inputs for one block of steps."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "wx": jax.random.normal(keys[0], (inputs, 4 * hidden)) / inputs**0.5,
        "wh": jax.random.normal(keys[1], (hidden, 4 * hidden)) / hidden**0.5,
        "b": jnp.zeros((4 * hidden,)),
    }
    carry = jnp.zeros((batch, hidden)), jnp.zeros((batch, hidden))
    return params, carry, jax.random.normal(keys[2], (steps, batch, inputs))


def loss_of(y):
    return jnp.mean((y - 0.1) ** 2)


def sgd(params, grads):
    return jax.tree.map(lambda p, g: p - RATE * g, params, grads)


def recorded(window, weights, params, carry, xs):
    """The loop with the gradient inside, on a tape."""
    rec = jaxbptt.record(lstm, window=window, weights=weights)

    def update(state, x):
        params, tape = state

        def loss_fn(params):
            new_tape, y = rec(params, tape, x)
            return loss_of(y), new_tape

        (loss, tape), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return (sgd(params, grads), tape), loss

    state = params, rec.init(params, carry, xs[0])
    return jax.jit(lambda state: lax.scan(update, state, xs), donate_argnums=0), state


def put(slot, ring, value):
    return lax.dynamic_update_index_in_dim(ring, value, slot, 0)


def rerun(window, params, carry, xs):
    """The loop that keeps carries and inputs and differentiates the window run again."""

    def update(state, x):
        params, carries, inputs, carry, t = state
        slot = t % window
        carries = jax.tree.map(
            lambda r, v: lax.dynamic_update_index_in_dim(r, v, slot, 0), carries, carry
        )
        inputs = put(slot, inputs, x)
        order = (slot + 1 + jnp.arange(window)) % window
        oldest = jax.tree.map(lambda r: r[order[0]], carries)

        def loss_fn(params):
            _, ys = lax.scan(functools.partial(lstm, params), oldest, inputs[order])
            return loss_of(ys[-1])

        loss, grads = jax.value_and_grad(loss_fn)(params)
        carry, _ = lstm(params, carry, x)
        return (sgd(params, grads), carries, inputs, carry, t + 1), loss

    ring = lambda v: jnp.zeros((window, *v.shape), v.dtype)  # noqa: E731
    state = params, jax.tree.map(ring, carry), ring(xs[0]), carry, jnp.int32(0)
    return jax.jit(lambda state: lax.scan(update, state, xs), donate_argnums=0), state


def medians(contestants, repeats):
    """Seconds per call of each (function, state), run in turn."""
    times = {name: [] for name in contestants}
    states = {}
    for name, (function, state) in contestants.items():
        states[name] = jax.block_until_ready(function(jax.tree.map(jnp.copy, state)))[0]
    for _ in range(repeats):
        for name, (function, _) in contestants.items():
            start = time.perf_counter()
            states[name] = jax.block_until_ready(function(states[name]))[0]
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {args.repeats} repeats")
    print("| B | D | H | window | re-run µs/step | stored | current | stored x | current x |")
    print("|---|---|---|---|---|---|---|---|---|")
    ratios = {"stored": [], "current": []}
    for batch, inputs, hidden, window in SHAPES:
        params, carry, xs = problem(batch, inputs, hidden, args.steps)
        contestants = {"re-run": rerun(window, params, carry, xs)}
        for weights in ratios:
            contestants[weights] = recorded(window, weights, params, carry, xs)
        took = {k: 1e6 * v / args.steps for k, v in medians(contestants, args.repeats).items()}
        for weights in ratios:
            ratios[weights].append(took["re-run"] / took[weights])
        cells = [batch, inputs, hidden, window, *(f"{t:.0f}" for t in took.values())]
        cells += [f"{values[-1]:.2f}" for values in ratios.values()]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    for weights, values in ratios.items():
        mean = statistics.geometric_mean(values)
        print(f"{weights}: geometric mean {mean:.2f}, least {min(values):.2f}")


if __name__ == "__main__":
    main()
