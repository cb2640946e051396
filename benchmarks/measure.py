"""How the benchmarks measure: interleaved medians, rates, operations, compile time."""

import dataclasses
import functools
import math
import statistics
import time

import jax
import jax.numpy as jnp
from jax import lax


def seconds(call):
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def medians(contestants, repeats, timers=None):
    """Seconds per call of each name's (function, state), run in turn; a first call compiles.

    Among them the medians of `timers`, functions that say themselves how long it took. They
    come last in a turn, and before the next one there is a call that isn't measured: a core that
    did nothing in the meantime is slow at first.
    """
    timers = timers or {}
    states, took = {}, {name: [] for name in (*contestants, *timers)}
    for name, (function, state) in contestants.items():
        own = jax.tree.map(jnp.copy, state)  # contestants share parameters, and donate
        states[name] = jax.block_until_ready(function(own))[0]

    def call(name):
        start = time.perf_counter()
        states[name] = jax.block_until_ready(contestants[name][0](states[name]))[0]
        return time.perf_counter() - start

    for _ in range(repeats):
        call(next(iter(contestants)))
        for name in contestants:
            took[name].append(call(name))
        for name, timer in timers.items():
            took[name].append(timer())
    return {name: statistics.median(values) for name, values in took.items()}


def compile_seconds(contestants, repeats):
    """Seconds to trace and compile each name's (function, state), in turn, from cold caches."""
    took = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, make in contestants.items():
            jax.clear_caches()
            function, state = make()
            start = time.perf_counter()
            function.lower(state).compile()
            took[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in took.items()}


SIZE = 1536


def product():
    """A large float32 matrix product, to run in turn with what is held against its rate."""
    a = jax.random.normal(jax.random.key(0), (SIZE, SIZE)) / SIZE**0.5
    return jax.jit(lambda b: (a @ b, None), donate_argnums=0), a


def copy():
    """256 MB read and written in place, for the rate of memory."""
    return jax.jit(lambda a: (-a, None), donate_argnums=0), jnp.zeros(2**26)


def rates(took):
    """Operations and bytes per second, from the medians of `product` and `copy`."""
    return 2 * SIZE**3 / took["product"], 2 * 4 * 2**26 / took["copy"]


def least(problem, window):
    """The least that one online step takes: operations of its products, and bytes moved.

    Products: those of one step, of its pullback to carry and parameters, and for the others of
    the window those of pullbacks of the carry, for an older output has no cotangent. Bytes: what
    `jax.vjp` keeps beside parameters, written for one step and read for each; the parameters
    read, and their gradient and they written.
    """
    older = dataclasses.replace(problem, step=lambda *args: (problem.step(*args)[0], ()))
    run, newest = step_and_pullback(problem)
    operations = run + newest + (window - 1) * step_and_pullback(older)[1]
    size = sum(v.nbytes for v in jax.tree.leaves(problem.params))
    moved = 2 * residual_bytes(problem) + (window - 1) * residual_bytes(older) + 3 * size
    return operations, moved


def step_and_pullback(problem):
    """Operations of the products of one step, and of its pullback to carry and parameters."""
    x = jax.tree.map(lambda v: v[0], problem.xs)
    args = problem.params, problem.carry
    step = lambda p, c: problem.step(p, c, x)  # noqa: E731
    run = products(step, *args)
    cts = jax.tree.map(jnp.zeros_like, step(*args))
    return run, products(lambda p, c, ct: jax.vjp(step, p, c)[1](ct), *args, cts) - run


def floor_seconds(operations, moved, took):
    """Those operations at the best rate, or those bytes copied, whichever takes longer."""
    multiply, copied = rates(took)
    return max(operations / multiply, moved / copied)


def products(function, *args):
    """Operations of the matrix products in a function, inner functions included."""
    return _products(jax.make_jaxpr(function)(*args).jaxpr)


def _products(jaxpr):
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contract)
            total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
        inner = (getattr(value, "jaxpr", value) for value in eqn.params.values())
        total += sum(_products(jaxpr) for jaxpr in inner if hasattr(jaxpr, "eqns"))
    return total


def residual_bytes(problem):
    """Bytes that `jax.vjp` keeps of a step and that change when carry and x do.

    Found by running it on two carries and inputs: what is the same for both depends on the
    parameters alone.
    """

    def kept(carry, x):
        pull = jax.vjp(lambda p, c, x: problem.step(p, c, x), problem.params, carry, x)[1]
        return jax.tree.leaves(pull)

    rows = [jax.tree.map(lambda v, i=i: v[i], problem.xs) for i in (0, 1)]
    step = functools.partial(problem.step, problem.params)
    carry, _ = lax.scan(step, problem.carry, problem.xs)
    one, other = jax.jit(kept)(problem.carry, rows[0]), jax.jit(kept)(carry, rows[1])
    return sum(a.nbytes for a, b in zip(one, other, strict=True) if not bool((a == b).all()))
