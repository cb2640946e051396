"""One process of several that train together; `tests/transforms/test_devices.py` starts it.

    python tests/one_process.py PORT COUNT INDEX OUT

Joins COUNT processes at PORT, lays the batch over all their devices, and runs the online loop
and a gradient of `jaxbptt.scan`. The first process writes what came out to OUT.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbptt

BATCH, INPUTS, HIDDEN, STEPS, WINDOW = 8, 3, 16, 6, 3


def numbers(seed, *shape):
    return 0.5 * np.random.default_rng(seed).normal(size=shape)


PARAMS = {"wx": numbers(0, INPUTS, HIDDEN), "wh": numbers(1, HIDDEN, HIDDEN)}
CARRY, XS, TARGETS = (
    numbers(2, BATCH, HIDDEN),
    numbers(3, STEPS, BATCH, INPUTS),
    numbers(4, STEPS, BATCH, HIDDEN),
)


def step(params, h, x):
    h = jnp.tanh(x @ params["wx"] + h @ params["wh"])
    return h, h


def online(weights, params, carry, xs, targets):
    """SGD at every step: parameters, losses, and the carry at the end."""
    rec = jaxbptt.record(step, window=WINDOW, weights=weights)

    def update(state, row):
        params, tape = state
        x, target = row

        def loss_fn(params):
            new_tape, y = rec(params, tape, x)
            return jnp.mean((y - target) ** 2), new_tape

        (loss, tape), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return (jax.tree.map(lambda p, g: p - 0.3 * g, params, grads), tape), loss

    tape = rec.init(params, carry, xs[0])
    (params, tape), losses = lax.scan(update, (params, tape), (xs, targets))
    return params, losses, tape.carry


def truncated(params, carry, xs, targets):
    """The gradient of the loss of a whole run, cut at the window."""

    def loss_fn(params):
        _, ys = jaxbptt.scan(lambda h, x: step(params, h, x), carry, xs, window=WINDOW)
        return jnp.mean((ys - targets) ** 2)

    return jax.grad(loss_fn)(params)


def results(devices):
    """A flat dictionary of numpy arrays, the same in every process."""
    mesh = Mesh(np.array(devices), ("data",))
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    steps = NamedSharding(mesh, P(None, "data"))

    def lay(array, sharding):
        return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])

    params = {name: lay(value, everywhere) for name, value in PARAMS.items()}
    args = params, lay(CARRY, rows), lay(XS, steps), lay(TARGETS, steps)
    out = {}
    for weights in ("stored", "current", "replayed"):
        run = jax.jit(online, static_argnums=0, out_shardings=everywhere)
        params, losses, carry = run(weights, *args)
        made = {**params, "losses": losses, "carry": carry}
        out |= {f"{weights} {name}": np.asarray(value) for name, value in made.items()}
    grads = jax.jit(truncated, out_shardings=everywhere)(*args)
    return out | {f"scan {name}": np.asarray(value) for name, value in grads.items()}


def main():
    port, count, index, out = sys.argv[1:]
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Enough for the slowest of them to import JAX on a busy machine.
    jax.distributed.initialize(
        f"localhost:{port}", int(count), int(index), initialization_timeout=1800
    )
    found = results(jax.devices())
    print(f"{jax.process_count()} processes, {len(jax.devices())} devices")
    if jax.process_index() == 0:
        np.savez(out, **found)


if __name__ == "__main__":
    main()
