"""Where a step is small: one gradient of a run, a call, a trace, against those without jaxbptt.

    python benchmarks/small.py [--repeats 601] [--only steps calls tracing] [--longest 5000]

* steps: ten steps of a few numbers each, of the kind that time series, filters and simulations
  are made of. Compiled, medians of interleaved runs in one process; gradients by the parameters
  that the step closes over.
* calls: one jitted online step of a stack of small layers, called from Python, with a tape of many
  leaves and a window of 1, against the same step with its carry alone: what handing over the tape
  costs. Of that the same step that is handed three numbers more and gives them back, and a block
  of ten recorded steps under `lax.scan`, by the step.
* tracing: processor time to trace and to compile the gradient of a step of many equations, best
  of three interleaved tries, from 1,000 equations on of one, and the time to run it; `record` is
  the gradient of one recorded call.

Ratios of speed above one are in favour of `jaxbptt.scan`.
"""

import argparse
import functools
import math
import statistics
import time

import jax
import jax.numpy as jnp
from jax import lax

import jaxbptt

KEY = jax.random.key(0)


def normal(seed, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, seed), shape)


# ------------------------------------------------------------ ten small steps
# Each gives parameters, a step(params, carry, x) -> (carry, y), a first carry and inputs.
# The loss is the sum of y over the steps, and of its square where y is no loss already.


def autoregression(length):
    """An AR(3) series with a level and a seasonal term, six numbers carried one by one."""
    params = {
        name: jnp.float32(0.1 * i) for i, name in enumerate("a b c drift phase noise".split())
    }

    def step(p, carry, x):
        first, second, third, level, cosine, sine = carry
        level = level + p["drift"]
        cosine, sine = (
            cosine * jnp.cos(p["phase"]) - sine * jnp.sin(p["phase"]),
            cosine * jnp.sin(p["phase"]) + sine * jnp.cos(p["phase"]),
        )
        mean = p["a"] * first + p["b"] * second + p["c"] * third + level + cosine
        score = 0.5 * ((x - mean) * jnp.exp(-p["noise"])) ** 2 + p["noise"]
        return (x, first, second, level, cosine, sine), score

    zero, one = jnp.float32(0), jnp.float32(1)
    return params, step, (zero, zero, zero, zero, one, zero), normal(1, length)


def kalman(length):
    """Log-likelihood of a local linear trend: two states, one observation."""
    params = {
        "q": jnp.full(2, -1.0),
        "r": jnp.float32(0.0),
        "f": jnp.array([[1.0, 1.0], [0.0, 0.9]]),
    }

    def step(p, carry, x):
        mean, cov = carry
        mean = p["f"] @ mean
        cov = p["f"] @ cov @ p["f"].T + jnp.diag(jnp.exp(p["q"]))
        variance, gap = cov[0, 0] + jnp.exp(p["r"]), x - mean[0]
        gain = cov[:, 0] / variance
        score = 0.5 * (gap**2 / variance + jnp.log(variance))
        return (mean + gain * gap, cov - jnp.outer(gain, cov[0])), score

    return params, step, (jnp.zeros(2), jnp.eye(2)), normal(2, length)


def gru(length, inputs=8, hidden=16):
    """A GRU cell on one vector."""
    params = {
        "wx": normal(3, 3 * hidden, inputs) / inputs**0.5,
        "wh": normal(4, 3 * hidden, hidden) / hidden**0.5,
        "b": jnp.zeros(3 * hidden),
    }

    def step(p, h, x):
        r_x, z_x, n_x = jnp.split(p["wx"] @ x + p["b"], 3)
        r_h, z_h, n_h = jnp.split(p["wh"] @ h, 3)
        r, z = jax.nn.sigmoid(r_x + r_h), jax.nn.sigmoid(z_x + z_h)
        h = (1 - z) * jnp.tanh(n_x + r * n_h) + z * h
        return h, jnp.mean(h**2)

    return params, step, jnp.zeros(hidden), normal(5, length, inputs)


def pendulum(length):
    """A damped, driven pendulum, half implicit."""
    params = {"gravity": jnp.float32(9.8), "length": jnp.float32(1.0), "damping": jnp.float32(0.1)}

    def step(p, carry, x):
        angle, speed = carry
        speed = speed + 0.02 * (
            x - p["gravity"] / p["length"] * jnp.sin(angle) - p["damping"] * speed
        )
        angle = angle + 0.02 * speed
        return (angle, speed), (angle - 0.1) ** 2

    return params, step, (jnp.float32(0.5), jnp.float32(0)), normal(6, length)


def average(length):
    """An exponential moving average, whose error is the loss."""

    def step(p, mean, x):
        rate = jax.nn.sigmoid(p)
        return (1 - rate) * mean + rate * x, (x - mean) ** 2

    return jnp.float32(-1.0), step, jnp.float32(0), normal(7, length)


@jax.custom_jvp
def spike(v):
    return (v > 0).astype(v.dtype)


@spike.defjvp
def _(primals, tangents):
    (v,), (t,) = primals, tangents
    return spike(v), t / (1 + 10 * jnp.abs(v)) ** 2


def neurons(length, units=8):
    """Leaky integrate-and-fire neurons with recurrent weights and a surrogate derivative."""
    params = {
        "w": normal(8, units, units) / units**0.5,
        "input": normal(9, units),
        "leak": jnp.full(units, 2.0),
    }

    def step(p, carry, x):
        v, s = carry
        v = jax.nn.sigmoid(p["leak"]) * v * (1 - s) + p["w"] @ s + p["input"] * x
        s = spike(v - 1.0)
        return (v, s), jnp.mean((s - 0.2) ** 2)

    return params, step, (jnp.zeros(units), jnp.zeros(units)), normal(10, length)


def logistic(length):
    """The logistic map, pulled a little to what is observed."""

    def step(p, c, x):
        c = p["rate"] * c * (1 - c)
        c = c + p["pull"] * (x - c)
        return c, (c - x) ** 2

    params = {"rate": jnp.float32(2.9), "pull": jnp.float32(0.1)}
    return params, step, jnp.float32(0.3), jax.nn.sigmoid(normal(11, length))


def holt_winters(length, season=12):
    """Triple exponential smoothing; a ring of seasonal terms is carried."""

    def step(p, carry, x):
        level, trend, ring = carry
        a, b, c = (jax.nn.sigmoid(v) for v in p)
        expected = level + trend + ring[0]
        new = a * (x - ring[0]) + (1 - a) * (level + trend)
        trend = b * (new - level) + (1 - b) * trend
        seasonal = c * (x - new) + (1 - c) * ring[0]
        return (new, trend, jnp.append(ring[1:], seasonal)), (x - expected) ** 2

    carry = jnp.float32(0), jnp.float32(0), jnp.zeros(season)
    return (jnp.float32(-1.0),) * 3, step, carry, normal(12, length)


def predators(length):
    """Lotka-Volterra by Euler's rule."""
    params = {
        "a": jnp.float32(1.1),
        "b": jnp.float32(0.4),
        "c": jnp.float32(0.1),
        "d": jnp.float32(0.4),
    }

    def step(p, carry, x):
        prey, others = carry
        meet = prey * others
        carry = (
            prey + 0.01 * (p["a"] * prey - p["b"] * meet),
            others + 0.01 * (p["c"] * meet - p["d"] * others),
        )
        return carry, (jnp.log(carry[0]) - x) ** 2

    return params, step, (jnp.float32(2), jnp.float32(1)), normal(13, length)


def td(length, states=10):
    """A tabular TD(0) update; the table is carried."""
    params = {"rate": jnp.float32(-1.0), "discount": jnp.float32(2.0)}
    at = jax.random.randint(KEY, (length + 1,), 0, states)

    def step(p, table, x):
        before, after, reward = x
        error = reward + jax.nn.sigmoid(p["discount"]) * table[after] - table[before]
        return table.at[before].add(jax.nn.sigmoid(p["rate"]) * error), error**2

    return params, step, jnp.zeros(states), (at[:-1], at[1:], normal(14, length))


STEPS = [
    ("autoregression", autoregression, 1000),
    ("Kalman filter", kalman, 500),
    ("GRU on a vector", gru, 100),
    ("pendulum", pendulum, 1000),
    ("moving average", average, 2000),
    ("spiking neurons", neurons, 300),
    ("logistic map", logistic, 2000),
    ("Holt-Winters", holt_winters, 500),
    ("Lotka-Volterra", predators, 1000),
    ("TD(0)", td, 500),
]
SCANS = functools.partial(jaxbptt.scan, window=None), lax.scan


def loss(scan, step, carry, xs):
    """The loss of a whole run as a function of the parameters."""
    return lambda params: jnp.mean(scan(lambda c, x: step(params, c, x), carry, xs)[1])


def seconds(programs, params, repeats):
    """The median time of each program, all run in turn."""
    for program in programs:
        jax.block_until_ready(program(params))
    took = [[] for _ in programs]
    for _ in range(repeats):
        for program, own in zip(programs, took, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(program(params))
            own.append(time.perf_counter() - start)
    return [statistics.median(v) for v in took]


def steps(repeats):
    print("\n### Small steps: window=None against jax.grad(lax.scan)\n")
    print("| step | T | lax.scan µs | scan µs | times as fast |")
    print("|---|---|---|---|---|")
    speeds = []
    for name, make, length in STEPS:
        params, step, carry, xs = make(length)
        programs = [
            jax.jit(jax.grad(loss(s, step, carry, xs))).lower(params).compile() for s in SCANS
        ]
        ours, theirs = seconds(programs, params, repeats)
        speeds.append(theirs / ours)
        row = name, length, f"{1e6 * theirs:.0f}", f"{1e6 * ours:.0f}", f"{speeds[-1]:.2f}"
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    mean = statistics.geometric_mean(speeds)
    print(f"\ngeometric mean {mean:.2f}, least {min(speeds):.2f}")


# ------------------------------------------------------------ calls from Python


def layers(count, units=4):
    """A step of so many small layers: parameters, step, carry, x."""

    def step(p, carry, x):
        new = []
        for (w, u, b), h in zip(p, carry, strict=True):
            x = jnp.tanh(x @ w + h @ u + b)
            new.append(x)
        return new, jnp.sum(x)

    weight = jnp.full((units, units), 0.1)
    params = [(weight + 0, weight + 0, jnp.zeros(units)) for _ in range(count)]
    return params, step, [jnp.zeros((1, units)) for _ in range(count)], jnp.ones((1, units))


def lstms(count, units):
    """The same of LSTM cells."""

    def step(p, carry, x):
        new = []
        for (w, u, b), (h, c) in zip(p, carry, strict=True):
            i, f, g, o = jnp.split(x @ w + h @ u + b, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            x = jax.nn.sigmoid(o) * jnp.tanh(c)
            new.append((x, c))
        return new, jnp.sum(x)

    weight, zeros = jnp.full((units, 4 * units), 0.1), jnp.zeros((1, units))
    params = [(weight + 0, weight + 0, jnp.zeros(4 * units)) for _ in range(count)]
    return params, step, [(zeros + 0, zeros + 0) for _ in range(count)], jnp.ones((1, units))


STACKS = [(layers, 1, 4), (layers, 5, 4), (layers, 20, 4), (layers, 20, 64)]
STACKS += [(lstms, 1, 64), (lstms, 2, 16), (lstms, 5, 64), (lstms, 10, 64)]


def online(run):
    """A jitted step of SGD: from parameters, what is carried and x to the first two anew."""

    def update(params, carried, x):
        loss = lambda params: run(params, carried, x)[::-1]  # noqa: E731
        (_, carried), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads), carried

    return update


def in_a_block(update):
    """Several such steps in one call."""

    def block(params, carried, xs):
        return lax.scan(lambda state, x: (update(*state, x), None), (params, carried), xs)[0]

    return block


def with_numbers(step):
    """A step that is handed three numbers beside its carry."""

    def more(p, carried, x):
        carry, numbers = carried
        carry, y = step(p, carry, x)
        return (carry, [v + 1 for v in numbers]), y

    return more


def calls(repeats, block=10):
    print("\n### One jitted online step called from Python, window 1: with a tape and without\n")
    print(
        "| stack of | leaves: params, carry, tape | plain µs | with three numbers µs | recorded µs "
        "| ratio | in blocks µs |"
    )
    print("|---|---|---|---|---|---|---|")
    for make, count, units in STACKS:
        params, step, carry, x = make(count, units)
        rec = jaxbptt.record(step, window=1, weights="current")
        recorded, tape = online(rec), rec.init(params, carry, x)

        numbers = [jnp.int32(i) for i in range(3)]
        ways = (online(step), carry, x), (online(with_numbers(step)), (carry, numbers), x)
        ways += ((recorded, tape, x),)
        ways += ((in_a_block(recorded), tape, jnp.broadcast_to(x, (block, *x.shape))),)
        # Each call is given the same arrays: only its own time is measured, until it is done.
        programs = [functools.partial(jax.jit(f), params, *args) for f, *args in ways]
        took = seconds([lambda _, p=p: p() for p in programs], None, repeats)
        plain, numbered, ours, in_blocks = took
        leaves = ", ".join(str(len(jax.tree.leaves(tree))) for tree in (params, carry, tape))
        times = (f"{1e6 * t:.0f}" for t in (plain, numbered, ours))
        name = f"{count} {make.__name__} of {units}"
        row = name, leaves, *times, f"{ours / plain:.2f}", f"{1e6 * in_blocks / block:.0f}"
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


# ------------------------------------------------------------ tracing and compiling

EQUATIONS = (100, 1000, 2000, 5000)
WIDTH = 32


def long_step(equations, products):
    """A step of about so many equations: elementwise, or with a small product among every ten."""

    def step(p, c, x):
        c = c + x
        for _ in range(equations // 10):
            a = jnp.tanh(c * p["scale"])
            b = (p["w"] @ a if products else a * p["bias"]) + 0.1
            c = c + a * jnp.sin(b) - b * 0.5 + lax.logistic(a - b)
        return c, jnp.sum(c)

    params = {"scale": jnp.ones(WIDTH), "bias": jnp.ones(WIDTH)}
    if products:
        params["w"] = normal(15, WIDTH, WIDTH) / WIDTH
    return params, step


def ways(step):
    """The gradient of a run by both, and the gradient of one recorded call."""
    carry, xs = jnp.zeros(WIDTH), normal(16, 20, WIDTH)

    def recorded(params):
        # What makes the tape is traced as well: a recorder belongs to its step.
        rec = jaxbptt.record(step, window=5)
        tape = rec.init(params, carry, xs[0])
        return rec(params, tape, xs[0])[1]

    losses = [*(loss(s, step, carry, xs) for s in SCANS), recorded]
    return dict(zip(("scan", "lax", "record"), map(jax.grad, losses), strict=True))


def times(grad, params, *, compiles):
    """Seconds to trace a gradient and to compile it, of the processor, and to run it."""
    jax.clear_caches()
    start = time.process_time()
    traced = jax.jit(lambda params: grad(params)).trace(params)
    middle = time.process_time()
    if not compiles:
        return middle - start, math.nan, math.nan
    compiled = traced.lower().compile()
    return middle - start, time.process_time() - middle, seconds([compiled], params, 21)[0]


def tracing(longest, compiled):
    print("\n### Processor time to trace and to compile, by the number of a step's equations\n")
    print(
        "| equations | products | traced, s: lax.scan | scan | record "
        "| compiled, s: lax.scan | scan | record | run, ms: lax.scan | scan |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for products in (False, True):
        for equations in (n for n in EQUATIONS if n <= longest):
            params, step = long_step(equations, products)
            best = {}
            for attempt in range(3 if equations < 1000 else 1):
                for name, grad in ways(step).items():
                    compiles = name != "lax" or (not attempt and equations <= compiled)
                    took = times(grad, params, compiles=compiles)
                    pairs = zip(best.get(name, took), took, strict=True)
                    best[name] = [
                        before if math.isnan(t) else min(before, t) for before, t in pairs
                    ]
            row = [f"{equations:,}", equations // 10 * products]
            for i in range(2):
                row += [f"{best[name][i]:.2f}" for name in ("lax", "scan", "record")]
            row += [f"{1e3 * best[name][2]:.2f}" for name in ("lax", "scan")]
            print("| " + " | ".join(map(str, row)).replace("nan", "-") + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=601)
    sections = ["steps", "calls", "tracing"]
    parser.add_argument("--only", nargs="+", choices=sections, default=sections)
    parser.add_argument("--longest", type=int, default=EQUATIONS[-1])
    parser.add_argument(
        "--compiled", type=int, default=2000, help="the longest step that lax.scan's is compiled of"
    )
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {args.repeats} repeats")
    if "steps" in args.only:
        steps(args.repeats)
    if "calls" in args.only:
        calls(args.repeats)
    if "tracing" in args.only:
        tracing(args.longest, args.compiled)


if __name__ == "__main__":
    main()
