"""Resets: each sequence in a packed batch is as it would be by itself, gradients included."""

import functools
import itertools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from harness import grid
from jax import lax

import jaxbptt
from jaxbptt import with_resets

LENGTH, ROWS, UNITS = 10, 4, 3
IS_FIRST = np.zeros((LENGTH, ROWS), bool)
for row, starts in enumerate([(0, 4), (1, 2, 6), (), (3, 9)]):  # the others go on from init
    IS_FIRST[list(starts), row] = True


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


PARAMS = {
    "w": 0.5 * normal(0, ROWS, UNITS, UNITS),
    "v": normal(1, ROWS, UNITS),
    "a": 0.7 + 0.1 * normal(2, ROWS),
    "h0": normal(3, ROWS, UNITS),
}
SHARED = jax.tree.map(lambda leaf: leaf[0], PARAMS)
START = {"h": normal(4, ROWS, UNITS), "s": normal(5, ROWS)}
XS = normal(6, LENGTH, ROWS)
CT_YS = normal(7, LENGTH, ROWS, UNITS)
CT_END = {"h": normal(8, ROWS, UNITS), "s": normal(9, ROWS)}
NO_END = jax.tree.map(jnp.zeros_like, CT_END)


def cell(params, carry, x):
    """One time step of one sequence; an integer that counts steps has a say in the values."""
    h = jnp.tanh(params["w"] @ carry["h"] + params["v"] * x + 0.3 * carry["s"])
    s = params["a"] * carry["s"] + jnp.sin(h).sum() * jnp.cos(carry["n"].astype(h.dtype))
    return {"h": h, "s": s, "n": carry["n"] + 1}, h * s


def initial(params):
    return {"h": jnp.tanh(params["h0"]), "s": params["h0"].sum(), "n": jnp.asarray(1)}


def going_on(start):
    return {**start, "n": jnp.zeros(start["s"].shape, int)}


batched = with_resets(jax.vmap(cell), jax.vmap(initial))  # each row has its own parameters
shared = with_resets(jax.vmap(cell, in_axes=(None, 0, 0)), initial)


# ------------------------------------------------- the reference: every piece by itself


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
def piece_alone(params, start, xs, goes_on, end, cut, ct_ys, ct_end):
    """One sequence of `end` steps as one graph, the carry that enters step `cut` detached.

    Its arrays are of the longest sequence's length, so that one program is for all of them.
    """

    def where(mask, a, b):
        return jax.tree.map(functools.partial(jnp.where, mask), a, b)

    def one(carry, row):
        s, x = row
        carry = where(s == cut, jax.tree.map(lax.stop_gradient, carry), carry)
        new, y = cell(params, carry, x)
        return where(s < end, new, carry), y

    carry = where(goes_on, going_on(start), initial(params))
    carry, ys = lax.scan(one, carry, (np.arange(len(xs)), xs))
    total = (ct_ys * ys).sum() + (ct_end["h"] * carry["h"]).sum() + ct_end["s"] * carry["s"]
    return total, ys


def row_alone(params, start, xs, is_first, ct_ys, ct_end, window, every):
    """A row cut into its sequences: ys, and cotangents of (params, start, xs) by group."""
    length = len(xs)
    bounds = [0, *(int(t) for t in np.flatnonzero(is_first) if t), length]
    zeros = functools.partial(jax.tree.map, np.zeros_like)
    ends = [min(first + every, length) for first in range(0, length, every)]
    groups, rows = [zeros((params, start, xs)) for _ in ends], []
    for begin, stop in itertools.pairwise(bounds):
        steps = stop - begin
        goes_on = not is_first[begin]
        own_xs = moved(xs, begin, 0, steps)
        for g, end in enumerate(ends):
            first = g * every
            # Groups are laid over the whole run, and reach no further than the piece.
            oldest = oracles.reach(end, window or length + every, every, end - first) - 1
            at, cut = np.arange(length)[:, None], oldest - begin
            inside = (at >= max(first, oldest)) & (at < end)
            ct = moved(np.where(inside, ct_ys, 0.0), begin, 0, steps)
            last = ct_end if end == stop == length else zeros(ct_end)
            args = params, start, own_xs, goes_on, steps, cut if cut > 0 else -1, ct, last
            (_, ys), found = jax.device_get(piece_alone(*args))
            found = *found[:2], moved(found[2], 0, begin, steps)
            groups[g] = jax.tree.map(np.add, groups[g], found)
        rows.append(ys[:steps])
    return np.concatenate(rows), oracles.stack(groups)


def moved(rows, begin, to, count):
    """So many rows put elsewhere, zeros around them."""
    new = np.zeros_like(rows)
    new[to : to + count] = rows[begin : begin + count]
    return new


def alone(params, window, every, ct_end=CT_END):
    """ys (rows, length, ...) and cotangents (rows, groups, ...) of the rows one by one."""
    by_row = jax.device_get((params, START, ct_end))
    by_step = jax.device_get((XS, IS_FIRST, CT_YS))
    rows = []
    for row in range(ROWS):
        own, start, last = jax.tree.map(lambda v: v[row], by_row)  # noqa: B023  called at once
        steps = (v[:, row] for v in by_step)
        rows.append(row_alone(own, start, *steps, last, window, every))
    return oracles.stack(rows)


def summed(tree, axis):
    return jax.tree.map(lambda v: np.asarray(v).sum(axis), tree)


# -------------------------------------------------------------------- packed sequences


SCANS = list(itertools.product([1, 3, None], [1, 3]))


@pytest.mark.parametrize(("window", "every"), grid(SCANS, always=[(1, 3), (3, 1), (None, 3)]))
def test_scan_treats_each_piece_of_a_packed_batch_as_a_sequence_of_its_own(window, every):
    def total(params, start, xs):
        end, ys = jaxbptt.scan(
            functools.partial(batched, params),
            going_on(start),
            (xs, IS_FIRST),
            window=window,
            every=every,
        )
        return (CT_YS * ys).sum() + sum((CT_END[k] * end[k]).sum() for k in CT_END), ys

    (_, ys), got = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(PARAMS, START, XS)
    want_ys, want = alone(PARAMS, window, every)
    params, start, xs = summed(want, 1)
    label = f"resets, scan {window}/{every}"
    oracles.check(f"{label}, ys", ys, want_ys.swapaxes(0, 1), 1e-12)
    oracles.check(f"{label}, params", got[0], params, 1e-12)
    oracles.check(f"{label}, init", got[1], start, 1e-12)
    oracles.check(f"{label}, xs", got[2], xs.swapaxes(0, 1), 1e-12)
    # Row 0 is reset at once; no output with a gradient reaches step 1 at 1/3.
    fed = [bool(v) for v in got[1]["s"]]
    assert fed == [False] + [(window, every) != (1, 3)] * (ROWS - 1)


def loss_loop(step, params, window, every, weights="stored"):
    """The gradient inside a loop that records, at each step: (losses, gradients)."""

    def weighted(params, carry, inputs):
        (x, ct), is_first = inputs
        carry, y = step(params, carry, (x, is_first))
        return carry, (ct * y).sum()

    rec = jaxbptt.record(weighted, window=window, every=every, weights=weights)
    inputs = (XS, CT_YS), jnp.asarray(IS_FIRST)

    def update(tape, inputs):
        def loss_fn(params):
            new_tape, loss = rec(params, tape, inputs)
            return loss, new_tape

        (loss, tape), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return tape, (loss, grads)

    @jax.jit
    def run(inputs):
        tape = rec.init(params, going_on(START), jax.tree.map(lambda v: v[0], inputs))
        return lax.scan(update, tape, inputs)[1]

    return jax.device_get(run(inputs))


LOOPS = [(*w, by) for w in [(1, 1), (3, 1), (3, 3), (5, 3)] for by in ("stored", "current")]


@pytest.mark.parametrize(
    ("window", "every", "weights"),
    grid(LOOPS, always=[(3, 1, "current"), (5, 3, "stored")]),
)
def test_a_recording_loop_treats_each_piece_as_a_sequence_of_its_own(window, every, weights):
    losses, grads = loss_loop(batched, PARAMS, window, every, weights)
    ys, (want, _, _) = alone(PARAMS, window, every, NO_END)
    label = f"resets, record {window}/{every} {weights}"
    want_losses = (np.asarray(CT_YS).swapaxes(0, 1) * ys).sum((0, 2))
    oracles.check(f"{label}, losses", losses, want_losses, 1e-12)
    got = jax.tree.map(lambda v: v[every - 1 :: every], grads)
    for g in range(LENGTH // every):
        at = jax.tree.map(lambda v: v[g], got), jax.tree.map(lambda v: v[:, g], want)  # noqa: B023
        oracles.check(label, *at, 1e-12)
    assert not any(leaf[LENGTH // every * every :].any() for leaf in jax.tree.leaves(grads))


def test_a_learned_start_has_a_gradient_while_its_reset_is_in_the_window():
    window = 2
    _, grads = loss_loop(shared, SHARED, window, 1)
    repeated = jax.tree.map(lambda v: np.broadcast_to(v, (ROWS, *v.shape)), SHARED)
    _, (want, _, _) = alone(repeated, window, 1, NO_END)
    oracles.check("resets, learned start", grads, summed(want, 0), 1e-12)
    seen = [bool(IS_FIRST[max(t - window + 1, 0) : t + 1].any()) for t in range(LENGTH)]
    assert not all(seen)
    assert [bool(g.any()) for g in grads["h0"]] == seen


def test_a_learned_start_is_taken_from_the_parameters_of_the_step_that_resets():
    def step(params, c, x):
        return params["w"] * c + x, params["w"] * c + x

    rec = jaxbptt.record(with_resets(step, lambda params: params["start"]), window=4)
    first, second = {"w": 0.5, "start": 4.0}, {"w": 0.25, "start": 100.0}
    tape = rec.init(first, 7.0, (0.0, False))
    tape, _ = rec(first, tape, (9.0, False))
    tape, _ = rec(first, tape, (1.0, True))
    tape, y = rec(second, tape, (2.0, False))
    ct = rec.pullback(second, tape, jnp.ones(1))
    assert float(y) == 0.25 * (0.5 * 4.0 + 1.0) + 2.0
    assert float(ct.params["start"]) == 0.25 * 0.5
    assert float(ct.params["w"]) == (0.5 * 4.0 + 1.0) + 0.25 * 4.0
    np.testing.assert_array_equal(ct.xs[0], [0.0, 0.0, 0.25, 1.0])
    assert float(ct.carry) == 0.0


@pytest.mark.parametrize("with_record", [False, True])
def test_an_initial_carry_that_is_closed_over_has_the_gradient_of_one_in_the_parameters(
    with_record,
):
    def total(params, h0):
        step = with_resets(jax.vmap(cell, in_axes=(None, 0, 0)), initial({"h0": h0}))
        if not with_record:
            f = functools.partial(step, params)
            return jaxbptt.scan(f, going_on(START), (XS, IS_FIRST), window=3)[1].sum()
        rec = jaxbptt.record(step, window=3)
        tape = rec.init(params, going_on(START), (XS[3], IS_FIRST[3]))
        tape, _ = rec(params, tape, (XS[3], IS_FIRST[3]))
        return rec(params, tape, (XS[4], IS_FIRST[4]))[1].sum()

    def in_params(params):
        if not with_record:
            f = functools.partial(shared, params)
            return jaxbptt.scan(f, going_on(START), (XS, IS_FIRST), window=3)[1].sum()
        carry, _ = shared(params, going_on(START), (XS[3], IS_FIRST[3]))
        return shared(params, carry, (XS[4], IS_FIRST[4]))[1].sum()

    got = jax.jit(jax.grad(total, (0, 1)))(SHARED, SHARED["h0"])
    want = jax.jit(jax.grad(in_params))(SHARED)
    oracles.check("resets, closed over", got[1], want["h0"], 1e-12)
    oracles.check("resets, closed over", got[0]["w"], want["w"], 1e-12)


@pytest.mark.exhaustive
def test_documents_packed_into_rows_have_the_loss_and_gradient_of_documents_one_by_one():
    rng = np.random.default_rng(0)
    lengths = [[5, 3], [3, 2, 3], [8]]  # documents by row; all rows are full
    documents = [[rng.integers(0, 6, size=n) for n in row] for row in lengths]
    tokens = np.stack([np.concatenate(row) for row in documents], 1)
    is_first = np.stack([np.concatenate([np.arange(n) == 0 for n in row]) for row in lengths], 1)
    params = {"embed": normal(1, 6, 4), "w": 0.4 * normal(2, 4, 4), "start": normal(3, 4)}

    def step(params, h, token):
        h = jnp.tanh(h @ params["w"] + params["embed"][token])
        return h, -jax.nn.log_softmax(h @ params["embed"].T)

    def loss_packed(params):
        f = functools.partial(with_resets(step, lambda params: params["start"]), params)
        return jaxbptt.scan(f, jnp.zeros((3, 4)), (tokens, is_first), window=None)[1].sum()

    def loss_of_one(params, document):
        return lax.scan(functools.partial(step, params), params["start"], document)[1].sum()

    got = jax.jit(jax.value_and_grad(loss_packed))(params)
    one = jax.jit(jax.value_and_grad(loss_of_one))
    each = [one(params, document) for row in documents for document in row]
    oracles.check("resets, documents", got, summed(oracles.stack(each), 0), 1e-12)


# ------------------------------------------------------------------------- single steps


def test_vmap_over_scalar_flags_is_the_flag_of_a_batch():
    one = with_resets(cell, initial)
    start, flags = going_on(START), IS_FIRST[3]
    assert set(flags) == {False, True}

    def run(step, params):
        new, y = step(params, start, (XS[3], flags))
        return y.sum() + new["s"].sum(), (new, y)

    got = jax.jit(jax.grad(functools.partial(run, jax.vmap(one)), has_aux=True))(PARAMS)
    want = jax.jit(jax.grad(functools.partial(run, batched), has_aux=True))(PARAMS)
    oracles.check("resets, vmap", got, want, 1e-12)
    np.testing.assert_array_equal(got[1][0]["n"], want[1][0]["n"])


@pytest.mark.parametrize("with_nan", grid(["h", "s"], always=["s"]))
def test_nan_in_an_abandoned_carry_reaches_neither_scan_nor_its_gradient(with_nan):
    flags = jnp.asarray(IS_FIRST).at[0].set(True)

    def total(params, start):
        f = functools.partial(batched, params)
        return jaxbptt.scan(f, going_on(start), (XS, flags), window=3)[1].sum()

    broken = START | {with_nan: jnp.full_like(START[with_nan], jnp.nan)}
    run = jax.jit(jax.value_and_grad(total, (0, 1)))
    got, want = run(PARAMS, broken), run(PARAMS, START)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert np.isfinite(want[0])
    assert not any(leaf.any() for leaf in jax.tree.leaves(got[1][1]))


@pytest.mark.parametrize("weights", grid(["stored", "current"], always=["current"]))
def test_nan_in_an_abandoned_carry_does_not_reach_a_recorded_gradient(weights):
    rec = jaxbptt.record(batched, window=3, weights=weights)
    inputs = XS[4], jnp.asarray([True, False, True, False])
    tape, call = rec.init(PARAMS, going_on(START), inputs), jax.jit(rec)
    for _ in range(2):  # finite steps in the window, abandoned too
        tape, _ = call(PARAMS, tape, inputs)
    hole = jnp.where(inputs[1], jnp.nan, 0.0)
    broken = tape.carry | {"h": tape.carry["h"] + hole[:, None], "s": tape.carry["s"] + hole}

    def loss(params, tape):
        return rec(params, tape, inputs)[1].sum()

    run = jax.jit(jax.value_and_grad(loss))
    got, want = run(PARAMS, tape.replace(carry=broken)), run(PARAMS, tape)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(want))


DTYPES = ["bool", "int8", "uint32", "bfloat16", "float32", "complex64", "complex128", "key"]


@pytest.mark.parametrize(
    "dtype", grid(DTYPES, always=["bool", "uint32", "bfloat16", "complex64", "key"])
)
def test_leaves_of_any_dtype_start_from_the_initial_ones(dtype):
    def leaf(seed, *shape):
        if dtype == "key":
            return jax.random.split(jax.random.key(seed), shape) if shape else jax.random.key(seed)
        numbers = np.random.default_rng(seed).normal(size=shape)
        return jnp.asarray(
            numbers * (1 + 2j) if dtype.startswith("complex") else numbers > 0, dtype
        )

    def shown(v):
        return np.asarray(jax.random.key_data(v) if dtype == "key" else v)

    carry = {"flat": leaf(0, 4), "deep": [leaf(1, 4, 3), None]}
    fresh = {"flat": leaf(2), "deep": [leaf(3, 3), None]}
    flags = jnp.asarray([True, False, False, True])
    step = with_resets(lambda params, carry, x: (carry, x), fresh)
    assert step((), carry, ("untouched", flags))[1] == "untouched"
    got, _ = jax.jit(step)((), carry, (0.0, flags))
    for path in (lambda c: c["flat"], lambda c: c["deep"][0]):
        assert path(got).dtype == path(carry).dtype
        result, old, new = (shown(path(tree)) for tree in (got, carry, fresh))
        for row, first in enumerate(flags):
            np.testing.assert_array_equal(result[row], new if first else old[row])


def test_keys_in_the_carry_make_the_noise_of_separate_sequences():
    def step(params, carry, x):
        key, use = jax.random.split(carry["key"])
        h = params * carry["h"] + x + jax.random.normal(use)
        return {"key": key, "h": h}, h

    def start(seed):
        return {"key": jax.random.key(seed), "h": jnp.asarray(0.5)}

    xs, is_first = normal(0, 7), np.arange(7) == 4
    rec = jaxbptt.record(with_resets(step, start(1)), window=2)

    @jax.jit
    def packed(xs, is_first):
        _, ys = jaxbptt.scan(functools.partial(rec.step, 0.9), start(0), (xs, is_first), window=2)
        tape = rec.init(0.9, start(0), (xs[0], False))
        return ys, lax.scan(functools.partial(rec, 0.9), tape, (xs, is_first))[1]

    @jax.jit
    def separate(xs):
        f = functools.partial(step, 0.9)
        pieces = [lax.scan(f, start(0), xs[:4])[1], lax.scan(f, start(1), xs[4:])[1]]
        return jnp.concatenate(pieces)

    want = separate(xs)
    oracles.check("resets, keys", packed(xs, is_first), (want, want), 1e-12)


def test_one_flag_without_axes_resets_the_whole_batch():
    one = jnp.asarray(True)
    got, _ = jax.jit(batched)(PARAMS, going_on(START), (XS[0], one))
    want, _ = jax.jit(jax.vmap(lambda params, x: cell(params, initial(params), x)))(PARAMS, XS[0])
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_ring_holds_the_flags_and_not_the_flags_broadcast():
    step = with_resets(lambda params, h, x: (jnp.tanh(h * x), None), jnp.zeros(UNITS))
    rec = jaxbptt.record(step, window=5)
    tape = jax.eval_shape(rec.init, (), START["h"], (START["h"], jnp.zeros(ROWS, bool)))
    assert [leaf.shape for leaf in jax.tree.leaves(tape) if leaf.dtype == bool] == [(5, ROWS)]


def test_the_step_keeps_its_name_and_can_be_hashed():
    assert with_resets(cell, initial).__name__ == "cell"
    assert with_resets(jax.jit(cell), initial).__name__ == "cell"
    nameless = with_resets(functools.partial(cell, SHARED), initial)
    assert nameless.__name__ == "resetting_step"
    for step in (batched, nameless):
        assert len({step, step}) == 1
    jitted = jax.jit(lambda step, *args: step(*args), static_argnums=0)
    jitted(batched, PARAMS, going_on(START), (XS[0], IS_FIRST[0]))


# ------------------------------------------------------------------------------- faults


class Fault(NamedTuple):
    """What is handed in, and a pattern of the message."""

    name: str
    match: str
    initial: object = jax.vmap(initial)
    inputs: object = (XS[0], IS_FIRST[0])


GOOD = jax.vmap(initial)(PARAMS)
FAULTS = [
    Fault("a lone x", r"x must be a pair \(x, is_first\) .* an array float64\[4\]", inputs=XS[0]),
    Fault("a triple", r"x must be a pair .* a tuple of length 3\. Pass", inputs=(1, 2, 3)),
    Fault(
        "integer flags",
        r"is_first must be a bool array.* int64\[4\]\. Compare",
        inputs=(XS[0], jnp.arange(4)),
    ),
    Fault("a number", r"is_first must be a bool array.* but got 1\.", inputs=(XS[0], 1)),
    Fault("no flags", r"is_first must be a bool array.* but got None\.", inputs=(XS[0], None)),
    Fault("a list of flags", r"is_first must .* a list of length 4", inputs=(XS[0], [True] * 4)),
    Fault(
        "another batch",
        r"is_first must have a shape that each leaf .* 3 of 3 leaves differ:\n"
        r"  \* carry\['h'\]: float64\[4,3\] in the carry, bool\[5\] in is_first\n",
        inputs=(XS[0], jnp.zeros(5, bool)),
    ),
    Fault(
        "flags deeper than a leaf",
        r"2 of 3 leaves differ:\n  \* carry\['n'\]: int64\[4\] in the carry, bool\[4,3\] in is_"
        r"first\n  \* carry\['s'\].*\nGive is_first the batch axes",
        inputs=(XS[0], jnp.zeros((4, 3), bool)),
    ),
    Fault(
        "another dtype",
        r"initial_carry must have the carry's .* 1 of 3 leaves differs:\n"
        r"  \* initial_carry\['h'\]: float64\[4,3\] in the carry, float32\[4,3\] given\nMake",
        initial=GOOD | {"h": GOOD["h"].astype(jnp.float32)},
    ),
    Fault(
        "what to cast to",
        r"Make it like the carry that .* starts from, e\.g\. with h\.astype\(jnp.float64\)",
        initial=GOOD | {"h": GOOD["h"].astype(jnp.float32)},
    ),
    Fault("empty flags", r"is_first must .* a tuple of length 0", inputs=(XS[0], ())),
    Fault("a dict for flags", r"is_first must .* but got a dict", inputs=(XS[0], {})),
    Fault(
        "no broadcast",
        r"initial_carry\['h'\]: float64\[4,3\] in the carry, float64\[2\] given\nMake",
        initial=GOOD | {"h": jnp.zeros(2)},
    ),
    Fault(
        "larger than the carry",
        r"initial_carry\['s'\]: float64\[4\] in the carry, float64\[1,4\] given\nMake",
        initial=lambda params: GOOD | {"s": jnp.zeros((1, 4))},
    ),
    Fault(
        "a leaf less",
        r"the structure differs:\n  \* initial_carry\['s'\]: .* in the carry, nothing given\nMake",
        initial={name: GOOD[name] for name in "hn"},
    ),
    Fault(
        "no array",
        r"initial_carry\['h'\] must be an array or a number, but got a object",
        initial=GOOD | {"h": object()},
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_a_sentence_when_the_step_is_traced(fault):
    step = with_resets(jax.vmap(cell), fault.initial)
    with pytest.raises(
        ValueError,
        match=fault.match,
    ):
        step(PARAMS, going_on(START), fault.inputs)


def test_a_fault_shows_through_record_and_scan():
    step = with_resets(jax.vmap(cell), {"h": GOOD["h"]})
    with pytest.raises(
        ValueError,
        match="initial_carry must have the carry's structure",
    ):
        jaxbptt.record(step, window=2).init(PARAMS, going_on(START), (XS[0], IS_FIRST[0]))
    f = functools.partial(step, PARAMS)
    with pytest.raises(
        ValueError,
        match="initial_carry must have the carry's structure",
    ):
        jaxbptt.scan(f, going_on(START), (XS, IS_FIRST), window=2)


def test_a_step_that_is_no_function_is_refused():
    with pytest.raises(
        ValueError,
        match=re.escape("step must be a function step(params, carry, x)"),
    ):
        with_resets(GOOD, initial)


# ------------------------------------------------ an initial carry of more than params


class Kept:
    """A callable object: the integer that counts steps goes on across resets."""

    def __call__(self, params, carry, x):
        assert x.shape == (ROWS,)
        return {**jax.vmap(initial)(params), "n": carry["n"]}


def kept(params, carry, x):
    return Kept()(params, carry, x)


def any_arguments(*args):
    assert len(args) == 1
    return jax.vmap(initial)(*args)


def optional(params, carry=None, x=None):
    assert carry is None
    return jax.vmap(initial)(params)


@pytest.mark.parametrize(
    ("function", "goes_on"),
    [
        (kept, True),
        (Kept(), True),
        (lambda params, carry, x: kept(params, carry, x), True),
        (functools.partial(lambda more, p, c, x: kept(p, c, x), 1), True),
        (jax.jit(kept), True),
        (any_arguments, False),
        (optional, False),
        (functools.partial(optional, carry=None), False),
    ],
)
def test_an_initial_carry_gets_carry_and_x_if_it_wants_them(function, goes_on):
    step = with_resets(jax.vmap(cell), function)
    carry = {**START, "n": jnp.arange(ROWS)}
    got, _ = step(PARAMS, carry, (XS[0], IS_FIRST[0]))
    begun = jax.vmap(initial)(PARAMS)["n"]
    want = jnp.where(IS_FIRST[0] & (not goes_on), begun, jnp.arange(ROWS)) + 1
    np.testing.assert_array_equal(got["n"], want)


def test_a_gradient_crosses_through_what_is_made_of_the_carry_alone():
    def scaled(params, carry, x):
        return {"h": 0.5 * carry["h"], "s": carry["s"] * 0, "n": carry["n"]}

    def total(h, flags):
        step = with_resets(lambda p, c, x: (c, None), scaled)
        return step(None, {**going_on(START), "h": h}, (XS[0], flags))[0]["h"].sum()

    got = jax.grad(total)(START["h"], IS_FIRST[0])
    np.testing.assert_array_equal(got, np.where(IS_FIRST[0], 0.5, 1.0)[:, None] * np.ones(UNITS))


@pytest.mark.parametrize("function", [lambda: GOOD, lambda p, c: GOOD, lambda p, *, c: GOOD])
def test_an_initial_carry_of_other_arguments(function):
    said = (
        r"initial_carry must be callable as initial_carry\(params\) or initial_carry\(params, carry"
    )
    with pytest.raises(ValueError, match=said):
        with_resets(jax.vmap(cell), function)


def test_an_error_of_the_initial_carry_says_where_it_was_called():
    step = with_resets(jax.vmap(cell), lambda params: params["start"])
    with pytest.raises(KeyError, match="start") as caught:
        step(PARAMS, going_on(START), (XS[0], IS_FIRST[0]))
    assert caught.value.__notes__ == [
        "Raised by initial_carry, which with_resets called as initial_carry(params)."
    ]
