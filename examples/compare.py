"""What the examples share: the command line, and the comparison with what is done without jaxbptt.

`python examples/NAME.py --compare` prints the table that is on the example's page.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax


def main(doc, data, train, ways, steps, what="loss", compiled=True):
    """Trains, and prints ten means over time; or, with `--compare`, a row for each of the ways.

    Args:
        doc: the example's docstring.
        data: from a number of steps to the arguments of `train` and of the ways, a tuple.
        train: returns a number for each step or update, alone or first in a pair whose second
            is printed at the end.
        ways: name to a function that trains from the start and returns such numbers.
        steps: how many steps, by default.
        what: what the numbers are.
        compiled: whether these functions can be compiled as a whole.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--steps", type=int, default=steps, metavar="N")
    parser.add_argument("--compare", action="store_true", help="with what is done without jaxbptt")
    args = parser.parse_args()
    given = data(args.steps)
    if args.compare:
        calls, memory = {name: functools.partial(way, *given) for name, way in ways.items()}, {}
        if compiled:
            calls, memory = with_memory(ways, given)
        table(calls, memory, args.steps, what)
        return
    result, more = (jax.jit(train) if compiled else train)(*given), None
    if isinstance(result, tuple):
        result, more = result
    for part, block in enumerate(np.array_split(np.asarray(result), 10), 1):
        print(f"{part * args.steps // 10:7d} steps: {what} {block.mean():.3f}")
    if more is not None:
        print(jax.tree.map(lambda v: round(float(v), 3), more))


def pieces(step, loss, optimizer, params, carry, xs, new, old=0):
    """What one writes without this library: `jax.grad` of a `lax.scan` over a piece of xs.

    The carry goes on from piece to piece as a number. With old=0 the pieces are chunks of `new`
    steps. Otherwise the model is run again over `old` steps before each piece, so that gradients
    reach back `old + new` steps, as with `window=old + new, every=new`.

    Returns:
        The loss of each step but the first `old`, before the update that it is part of.
    """

    def update(state, begin):
        params, opt_state, carry = state
        both = jax.tree.map(lambda v: lax.dynamic_slice_in_dim(v, begin, old + new), xs)

        def mean_loss(params):
            def body(carry, x):
                after, y = step(params, carry, x)
                return after, (after, y)

            _, (carries, ys) = lax.scan(body, carry, both)
            ys, seen = jax.tree.map(lambda v: v[old:], (ys, both))
            losses = jax.vmap(loss)(ys, seen)
            return losses.mean(), (jax.tree.map(lambda c: c[new - 1], carries), losses)

        (_, (carry, losses)), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
        changes, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, changes), opt_state, carry), losses

    begins = jnp.arange(0, len(jax.tree.leaves(xs)[0]) - old - new + 1, new)
    return lax.scan(update, (params, optimizer.init(params), carry), begins)[1].ravel()


def in_rows(xs, new):
    """Pieces of `new` steps; what is left over at the end is dropped."""
    return jax.tree.map(lambda v: v[: len(v) // new * new].reshape(-1, new, *v.shape[1:]), xs)


def with_memory(ways, given):
    """Compiles each way: name to a call of it, and to the bytes that it takes."""
    programs = {name: jax.jit(way).lower(*given).compile() for name, way in ways.items()}
    # What XLA reserves beside arguments and results; a tape is made within, and counts.
    memory = {name: p.memory_analysis().temp_size_in_bytes for name, p in programs.items()}
    return {name: functools.partial(p, *given) for name, p in programs.items()}, memory


def table(calls, memory, steps, what, rounds=7):
    """Runs all in turn, `rounds` times each after a first, and prints the medians."""
    results = {name: np.asarray(call()).ravel() for name, call in calls.items()}
    took = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            took[name].append(time.perf_counter() - start)
    print(f"| way | µs a step | KiB | {what}, last tenth |\n|---|---|---|---|")
    for name, result in results.items():
        each = 1e6 * statistics.median(took[name]) / steps
        kept = f"{memory[name] / 1024:,.0f}" if name in memory else ""
        last = np.array_split(result, 10)[-1].mean()
        print(f"| {name} | {each:,.1f} | {kept} | {last:.3g} |", flush=True)
