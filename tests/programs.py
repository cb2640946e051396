"""Random steps for property tests, over random trees of arrays."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from jax import lax

fixed_profile = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # shrinking would compile hundreds of steps
    suppress_health_check=[HealthCheck.too_slow],
)

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
            np.asarray((3 if dtype == "int32" else 1) * rng.normal(size=shape)).astype(dtype)
        )
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
        lambda v: jnp.asarray((2 * rng.normal(size=(length, *v.shape))).astype(v.dtype)), x
    )
