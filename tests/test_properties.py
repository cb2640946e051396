"""Random steps, windows, groups and lengths against the unrolled graph."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from jax import lax
from oracles import check, check_cotangents, moving, random_like, reach

import jaxbptt

# ------------------------------------------------------------- random steps
# A step is a short program over a growing list of values: the leaves of params, carry
# and x to start with, then one more for each operation.


@jax.custom_jvp
def spike(v):
    return (v > 0.1).astype(v.dtype)


spike.defjvp(lambda primals, ts: (spike(*primals), ts[0] / (1 + primals[0] ** 2)))


@jax.custom_vjp
def reciprocal(v):
    return 1 / v


reciprocal.defvjp(lambda v: (1 / v, v), lambda v, ct: (-ct / v**2,))

OPERATIONS = {
    "add": lambda a, b: a + b,
    "multiply": lambda a, b: a * b,
    "tanh": lambda a, b: jnp.tanh(a - 0.5 * b),
    "divide": lambda a, b: a / (1 + b**2),
    "log": lambda a, b: jnp.log(1 + a**2),
    "select": lambda a, b: jnp.where(a > 0.123, a, b),
    "spike": lambda a, b: spike(a) * b,
    "reciprocal": lambda a, b: reciprocal(1 + a**2),
    "total": lambda a, b: jnp.sum(a * b),
    "checkpoint": jax.checkpoint(lambda a, b: jnp.sin(a) * jnp.cos(b)),
    "cond": lambda a, b: lax.cond(jnp.sum(a) > 0.123, jnp.sin, lambda v: v * b, a),
    "scan": lambda a, b: lax.scan(lambda v, _: (jnp.sin(v + b), None), a, length=3)[0],
    "while": lambda a, b: a * lax.while_loop(lambda v: v > 1, lambda v: v / 2, loud(b)),
    "jit": jax.jit(lambda a, b: jnp.exp(-(a**2)) + b),
}


def loud(v):
    """A number from 1 up that no gradient flows into."""
    return 1 + lax.stop_gradient(jnp.max(jnp.abs(v)))


def fit(value, like):
    """The value in another shape and dtype."""
    if value.shape != like.shape:
        value = jnp.broadcast_to(jnp.mean(value), like.shape)
    return value.astype(like.dtype)


SHAPES = st.sampled_from([(), (2,), (2, 3)])
MIXTURES = [["float64"], ["float64"], ["float64", "float32"]]
PLACES = st.integers(0, 9)
CONTAINERS = {
    "list": list,
    "tuple": tuple,
    "dict": lambda leaves: {f"leaf{i}": leaf for i, leaf in enumerate(leaves)},
    "nested": lambda leaves: {"first": leaves[:1], "none": None, "rest": tuple(leaves[1:])},
}


@st.composite
def trees(draw, dtypes, least):
    """A tree of arrays."""
    specs = draw(st.lists(st.tuples(SHAPES, dtypes), min_size=least, max_size=3))
    rng = np.random.default_rng(len(specs))
    leaves = [
        jnp.asarray(
            3 * rng.normal(size=shape) if dtype == "int32" else rng.normal(size=shape)
        ).astype(dtype)
        for shape, dtype in specs
    ]
    return CONTAINERS[draw(st.sampled_from(sorted(CONTAINERS)))](leaves)


@st.composite
def steps(draw):
    """(step, params, carry, x) of a random program."""
    floats = draw(st.sampled_from(MIXTURES))
    some, any_kind = st.sampled_from(floats), st.sampled_from([*floats, "int32"])
    carry = draw(st.tuples(trees(some, 1), trees(any_kind, 0)))
    params, x = draw(trees(some, 1)), draw(trees(any_kind, 0))
    names = st.sampled_from(sorted(OPERATIONS))
    program = draw(st.lists(st.tuples(names, PLACES, PLACES), min_size=3, max_size=7))
    targets = [draw(PLACES) for _ in jax.tree.leaves(carry)]
    outputs = draw(st.lists(PLACES, max_size=2))
    note(f"program {program}, carry from {targets}, y from {outputs}")

    def step(params, carry, x):
        pool = [
            v.astype(jnp.float64) * 0.1 if v.dtype == jnp.int32 else v
            for v in jax.tree.leaves((carry, params, x))
        ]
        for name, i, j in program:
            # A new value and an old one: long chains, and inputs that are not left behind.
            a, b = pool[-1 - i % len(pool)], pool[j % len(pool)]
            pool.append(OPERATIONS[name](a, fit(b, a)))
        leaves, treedef = jax.tree.flatten(carry)
        new = [
            v + 1 if v.dtype == jnp.int32 else 0.5 * v + jnp.tanh(fit(pool[-1 - k % len(pool)], v))
            for v, k in zip(leaves, targets, strict=True)
        ]
        ys = [pool[-1 - k % len(pool)] for k in outputs]
        return treedef.unflatten(new), {"floats": ys, "count": jnp.asarray(len(ys), jnp.int32)}

    return step, params, carry, x


def several(x, length):
    """A different input at each step, of the type of x."""
    rng = np.random.default_rng(11)
    return jax.tree.map(
        lambda v: jnp.asarray(2 * rng.normal(size=(length, *v.shape))).astype(v.dtype), x
    )


# ---------------------------------------------------------------- properties

fixed_profile = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # shrinking would compile hundreds of steps
    suppress_health_check=[HealthCheck.too_slow],
)


@fixed_profile
@given(
    made=steps(),
    window=st.integers(1, 6),
    every=st.integers(1, 4),
    rows=st.integers(1, 6),
    length=st.integers(3, 6),
    weights=st.sampled_from(["stored", "current"]),
)
def test_random_steps_agree_with_the_unrolled_graph(made, window, every, rows, length, weights):
    step, params, carry, x = made
    rows, xs = min(rows, window), several(x, length)
    thetas = oracles.drifting(params, length, size=0.3)
    thetas = thetas if weights == "stored" else [params] * length
    run = oracles.Run(step, thetas, carry, xs, length)
    carries, ys = run.trajectory
    ct_ys = [random_like(y, s) for s, y in enumerate(ys)]
    ct_carries = [random_like(c, 50 + s) for s, c in enumerate(carries)]
    ct_rows = ([random_like(ys[0], 99)] * rows + ct_ys)[-rows:]
    record = functools.partial(jaxbptt.record, step, window=window, weights=weights)
    alone, grouped = record(), record(every=every)

    @jax.jit
    def go(thetas, carry, xs, ct_ys, ct_carries):
        def both(tapes, given):
            theta, x, ct_y, ct_carry = given

            def loss(values):
                new, y = alone(oracles.refill(theta, values), tapes[0], x)
                pairs = zip(ct_y + ct_carry, moving((y, new.carry)), strict=True)
                return sum((jnp.sum(a * b).astype(jnp.float64) for a, b in pairs), 0.0), new

            grads, new = jax.grad(loss, has_aux=True)(moving(theta))
            return (new, grouped(theta, tapes[1], x)[0]), grads

        first = jax.tree.map(lambda v: v[0], (thetas, xs))
        tapes = tuple(rec.init(first[0], carry, first[1]) for rec in (alone, grouped))
        tapes, grads = lax.scan(both, tapes, (thetas, xs, ct_ys, ct_carries), length=length)
        return grads, tapes[1]

    @jax.jit
    def pull(params, tape):
        together = jax.tree.map(join, *ct_rows)
        return grouped.pullback(params, tape, together, ct_carries[-1])

    grads, tape = go(
        oracles.stack(run.thetas),
        carry,
        xs,
        oracles.stack([moving(ct) for ct in ct_ys]),
        oracles.stack([moving(ct) for ct in ct_carries]),
    )
    allowed = 100 * oracles.tolerance(params, carry, xs)  # random programs may cancel
    label = f"random steps, float{64 if allowed < 1e-9 else 32}"
    for t in range(1, length + 1):
        want = run.unrolled(t, reach(t, window), [ct_ys[t - 1]], ct_carries[t - 1])
        check(f"{label}, in the loop", [leaf[t - 1] for leaf in grads], want.params, allowed)
    want = run.unrolled(length, reach(length, window, every, rows), ct_rows, ct_carries[-1])
    got = pull(run.thetas[-1], tape)
    check_cotangents(f"{label}, pullback", got, want, allowed)


def join(*leaves):
    """Cotangents of several steps with an axis in front; float0 stays with NumPy."""
    return (np if leaves[0].dtype == jax.dtypes.float0 else jnp).stack(leaves)
