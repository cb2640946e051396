"""The loop that stacks: what `lax.scan` gives, and no stack a copy at the turns around it."""

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import draw, grid
from jax import lax

import jaxbptt
from jaxbptt._arrays import size_in_bytes
from jaxbptt._compat import scan_counts
from jaxbptt._jaxprs.loops import scan_stacking
from jaxbptt._transforms import scan_backward, scan_forward


def many_types(state, row):
    """A trip with an output of each type there is."""
    key, total = state
    total = total + row
    outs = [
        total,
        total.astype(jnp.bfloat16),
        lax.complex(total, total),
        total > 2,
        (total * 100).astype(jnp.int8),
        (3 * total).astype(jnp.uint32),
        jax.random.fold_in(key, 3),
        row,
        total[0],
    ]
    return (jax.random.fold_in(key, 1), total), outs


STATE = jax.random.key(0), jnp.zeros(3)
KINDS = jax.eval_shape(many_types, STATE, STATE[1])[1]


def raw(tree):
    """Of keys their words, so that all can be compared."""

    def one(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    return jax.tree.map(one, tree)


def same(one, other):
    for a, b in zip(*(jax.tree.leaves(raw(tree)) for tree in (one, other)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("length", "unroll", "reverse"),
    grid(
        [(*how, reverse) for how in ((0, 1), (1, 1), (5, 1), (5, 2)) for reverse in (False, True)],
        always=[(0, 1, False), (1, 1, True), (5, 1, True), (5, 2, False)],
    ),
)
def test_it_is_lax_scan(length, unroll, reverse):
    how = {"reverse": reverse, "unroll": unroll}

    @jax.jit
    def both(xs):
        ours = scan_stacking(many_types, STATE, xs, KINDS, length, first=0, **how)
        return ours, lax.scan(many_types, STATE, xs, **how)

    same(*both(draw(1, length, 3, scale=1.0)))


def test_small_rows_are_stacked_by_lax_scan_itself():
    def loops(plain):
        run = lambda xs: scan_stacking(many_types, STATE, xs, KINDS, 5, first=0, plain=plain)  # noqa: E731
        return jax.make_jaxpr(run)(draw(1, 5, 3)).jaxpr.eqns

    size = size_in_bytes(KINDS)
    for plain, carried in ((size, 2), (size - 1, 2 + len(KINDS))):
        (loop,) = (eqn for eqn in loops(plain) if eqn.primitive.name == "scan")
        assert scan_counts(loop)[1] == carried


def test_of_many_runs_at_once_too():
    @jax.jit
    @jax.vmap
    def both(xs):
        ours = scan_stacking(many_types, STATE, xs, KINDS, 5, first=0)
        return ours, lax.scan(many_types, STATE, xs)

    same(*both(draw(1, 4, 5, 3, scale=1.0)))


@pytest.mark.parametrize(
    ("dtype", "many"),
    grid(
        [(d, n) for d in ("bool", "int4", "int8", "float8_e4m3fn") for n in (120, 300)],
        # More than the loop has numbers to begin with; and than one byte has, where that is quick.
        always=[("bool", 300), ("int4", 120), ("int8", 300), ("float8_e4m3fn", 120)],
    ),
)
def test_there_may_be_more_stacks_than_a_dtype_has_numbers(dtype, many):
    kinds = [jax.ShapeDtypeStruct((), dtype)] * many
    trip = lambda state, row: (state, [row] * many)  # noqa: E731
    xs = jnp.asarray(np.arange(3), dtype)
    stacks = jax.jit(lambda xs: scan_stacking(trip, None, xs, kinds, 3, first=96)[1])(xs)
    assert len(stacks) == many
    assert all(np.array_equal(stack, xs) for stack in stacks)


# ------------------------------------------------- what the compiler makes of it

WINDOW, BATCH, HIDDEN = 7, 2, 5  # so few rows that products are left to be contracted
PARAMS = [{"u": 0.3 * u, "v": 0.3 * v} for u, v in draw(2, 3, 2, HIDDEN, HIDDEN, scale=1.0)]


def layers(params, carry, x):
    """Gated layers of one size, whose stacks are all of one shape."""
    new = []
    for weights, h in zip(params, carry, strict=True):
        gate = jax.nn.sigmoid(h @ weights["u"] + x)
        x = gate * h + jnp.tanh(h @ weights["v"] + x)
        new.append(x)
    return new, x


def first_carry():
    return [jnp.zeros((BATCH, HIDDEN))] * 3


def sgd(params, grads):
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


def online(weights):
    """A run of updates, one at each step."""
    rec = jaxbptt.record(layers, window=WINDOW, weights=weights)

    one = harness.sgd(rec, 0.1, lambda y: jnp.sum(y**2))

    def update(state, x):
        return one(state, x)[0], None

    xs = draw(3, 20, BATCH, HIDDEN)
    state = PARAMS, rec.init(PARAMS, first_carry(), xs[0])
    return lambda state: lax.scan(update, state, xs)[0], state


def chunks(window, length=WINDOW):
    """A run of chunks, an update after each."""

    def update(state, xs):
        def loss_fn(params):
            step = lambda carry, x: layers(params, carry, x)  # noqa: E731
            carry, ys = jaxbptt.scan(step, state[1], xs, window=window)
            return jnp.sum(ys**2), carry

        grads, carry = jax.grad(loss_fn, has_aux=True)(state[0])
        return (sgd(state[0], grads), carry), None

    xs = draw(3, 4, length, BATCH, HIDDEN)
    return lambda state: lax.scan(update, state, xs)[0], (PARAMS, first_carry())


PROGRAMS = {
    "current": (lambda: online("current"), WINDOW),
    "stored": (lambda: online("stored"), WINDOW),
    "replayed": (lambda: online("replayed"), WINDOW),
    "chunks": (lambda: chunks(None), WINDOW),
    "chunks, several chains": (lambda: chunks(3), WINDOW),
    "long chunks, in blocks": (lambda: chunks(None, 64), 64),
}


@pytest.mark.compiled
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_stack_begins_as_a_copy(monkeypatch, name):
    for module in (scan_forward, scan_backward):
        monkeypatch.setattr(module, "SMALL", -1)  # such small ones are those of lax.scan
    make, length = PROGRAMS[name]
    run, state = make()
    text = jax.jit(run, donate_argnums=0).lower(state).compile().as_text()
    shape = f"[{length},{BATCH},{HIDDEN}]{{"
    stacks = [line for line in text.splitlines() if shape in line.split("(")[0]]
    assert stacks
    assert not [line for line in stacks if " copy(" in line]
