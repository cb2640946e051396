"""The tape: one layout, one trace, counters that stay small, a ring that is never copied."""

import functools
import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from harness import grid, online, sgd
from jax import lax
from jaxpr_reading import rings_made_anew

import jaxbptt

F32 = jnp.float32
PARAMS = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(3, 3)) * 0.5)}
CARRY = {"h": jnp.array([0.3, -0.2, 0.5]), "n": jnp.int32(0)}
XS = jnp.asarray(np.random.default_rng(2).normal(size=(12, 3)))


def step(params, carry, x):
    h = jnp.tanh(carry["h"] @ params["w"] + x)
    return {"h": h, "n": carry["n"] + 1}, jnp.sin(h).sum()


def layout(tape):
    """What makes two tapes interchangeable."""
    avals = [(jnp.shape(v), v.dtype, v.aval.weak_type) for v in jax.tree.leaves(tape)]
    return jax.tree.structure(tape), avals


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(recorder, length):
    """The tape after so many steps."""
    tape = recorder.init(PARAMS, CARRY, XS[0])
    return lax.scan(lambda t, x: (recorder(PARAMS, t, x)[0], None), tape, XS[:length])[0]


# -------------------------------------------------------------------- layout


def scalar_step(params, c, x):
    c = jnp.tanh(params["a"] * c + params["b"] * x)
    return c, params["a"] * c**2


SCALARS = {"a": jnp.float64(0.5), "b": jnp.float64(-1.0)}


@pytest.mark.parametrize("weights", grid(["stored", "current"], always=["current"]))
def test_one_layout_for_all_ways_to_call(weights):
    recorder = jaxbptt.record(scalar_step, window=3, weights=weights)
    kinds = {
        "arrays": (SCALARS, jnp.float64(0.1), jnp.float64(2.0)),
        "numbers": ({"a": 0.5, "b": -1.0}, 0.1, 2.0),
        "numpy": ({"a": np.float64(0.5), "b": np.array(-1.0)}, np.array(0.1), np.float64(2.0)),
        "weak": ({"a": 1.0 * jnp.asarray(0.5), "b": jnp.asarray(-1.0)}, jnp.asarray(0.1), 2.0),
        "structs": (SCALARS, 0.1, jax.ShapeDtypeStruct((), jnp.float64)),
        "weak structs": (SCALARS, 0.1, jax.ShapeDtypeStruct((), jnp.float64, weak_type=True)),
    }
    tapes = {}
    for kind, args in kinds.items():
        tapes[kind] = recorder.init(*args)
        if "structs" not in kind:
            tapes[f"jit {kind}"] = jax.jit(recorder.init)(*args)
            tapes[f"call {kind}"] = recorder(args[0], tapes[kind], args[2])[0]
            tapes[f"jit call {kind}"] = jax.jit(recorder)(args[0], tapes[kind], args[2])[0]
    tapes["scan"] = lax.scan(
        lambda tape, x: recorder(SCALARS, tape, x), tapes["arrays"], jnp.arange(2.0)
    )[0]
    tapes["grad"] = jax.grad(lambda p: recorder(p, tapes["arrays"], 2.0)[::-1], has_aux=True)(
        SCALARS
    )[1]
    assert jnp.asarray(0.1).aval.weak_type  # or this test would show nothing
    expected = layout(tapes["arrays"])
    assert {kind: layout(tape) for kind, tape in tapes.items()} == dict.fromkeys(tapes, expected)


def test_results_are_the_same_for_all_ways_to_call():
    recorder = jaxbptt.record(scalar_step, window=3)
    numbers, jitted = ({"a": 0.5, "b": -1.0}, 0.1), jax.jit(recorder)
    one, two = recorder.init(*numbers, 0.0), recorder.init(SCALARS, jnp.float64(0.1), XS[0, 0])
    for x in (1.0, 0.3, -0.4, 0.9):
        one, _ = recorder(numbers[0], one, x)
        two, _ = jitted(SCALARS, two, jnp.float64(x))
    got = jax.jit(recorder.pullback)(SCALARS, one, np.ones(1)).params
    want = recorder.pullback(numbers[0], two, np.ones(1)).params
    oracles.check("eager with numbers, jitted with arrays", got, want, 1e-14)


def test_float32_inputs_make_a_float32_tape_under_x64():
    params, carry, x = jax.tree.map(lambda v: v.astype(F32), (PARAMS["w"], XS[0], XS[1]))
    recorder = jaxbptt.record(lambda p, c, x: (jnp.tanh(c @ p + x) * 0.5, None), window=3)
    floats = [v for v in jax.tree.leaves(recorder.init(params, carry, x)) if oracles.is_moving(v)]
    assert {v.dtype for v in floats} == {jnp.dtype("float32")}


def test_a_tape_made_in_one_jit_is_used_in_another():
    recorder = jaxbptt.record(step, window=4)
    tape = run(recorder, 5)
    again = jax.jit(lambda tape: lax.scan(lambda t, x: recorder(PARAMS, t, x), tape, XS[5:7])[0])
    tape = jax.jit(jaxbptt.record(step, window=4))(PARAMS, again(tape), XS[7])[0]
    got = jax.jit(recorder.pullback)(PARAMS, tape, np.ones(1))
    want = oracles.Run(step, PARAMS, CARRY, XS[:8], 8).unrolled(8, 5, [np.ones(())])
    oracles.check_cotangents("tape through three jits", got, want, 1e-12)


def test_a_tape_is_a_pytree():
    recorder = jaxbptt.record(step, window=4)
    tape = run(recorder, 5)
    pull = jax.jit(recorder.pullback)
    want = pull(PARAMS, tape, np.ones(2)).params
    copies = {
        "tree.map": jax.tree.map(jnp.array, tape),
        "flatten": jax.tree.unflatten(jax.tree.structure(tape), jax.tree.leaves(tape)),
        "device_put": jax.device_put(tape, jax.devices()[1]),
        "numpy": jax.tree.map(np.asarray, tape),
        "scan": lax.scan(lambda t, _: (t, None), tape, None, length=2)[0],
        "cond": lax.cond(tape.length > 2, lambda t: t, recorder.clear, tape),
        "while": lax.while_loop(lambda t: t.length < 0, lambda t: t, tape),
    }
    for name, copy in copies.items():
        params = jax.device_put(PARAMS, jax.devices()[1 if name == "device_put" else 0])
        assert isinstance(copy, jaxbptt.Tape)
        got = pull(params, copy, np.ones(2)).params
        oracles.check(f"tape through {name}", got, want, 0.0)
    # Not traced, NumPy's arrays meet the library as they are, and are computed with one by one.
    got = recorder.pullback(PARAMS, copies["numpy"], np.ones(2)).params
    oracles.check("tape of NumPy's arrays, not traced", got, want, 1e-14)


def test_a_recorder_is_static_by_value():
    # Made anew in each call, it still finds the compiled function of the last one.
    traces = []

    def counted(params, carry, x):
        traces.append(0)
        return step(params, carry, x)

    @functools.partial(jax.jit, static_argnums=0)
    def call(recorder, tape, x):
        return recorder(PARAMS, tape, x)[0]

    tape = jaxbptt.record(counted, window=2).init(PARAMS, CARRY, XS[0])
    call(jaxbptt.record(counted, window=2), tape, XS[0])
    count = len(traces)
    call(jaxbptt.record(counted, window=2), tape, XS[0])
    assert len(traces) == count


# -------------------------------------------------------------------- traces


def online_loop(recorder, rate=0.1):
    """A gradient and an SGD update at every step."""

    one = sgd(recorder, rate)

    def losses_only(state, x):
        state, (value, _) = one(state, x)
        return state, value

    return jax.jit(lambda params, tape, xs: lax.scan(losses_only, (params, tape), xs))


def counting(step):
    traces = []

    def counted(params, carry, x):
        traces.append(0)
        return step(params, carry, x)

    return counted, traces


@pytest.mark.parametrize("weights", grid(["stored", "current"], always=["current"]))
def test_traces_are_few_and_do_not_depend_on_the_window(weights):
    counts = {}
    for window, every in ((1, 1), (2, 1), (50, 1), (6, 3)):
        counted, traces = counting(step)
        recorder = jaxbptt.record(counted, window=window, every=every, weights=weights)
        tape = recorder.init(PARAMS, CARRY, XS[0])
        at_init = len(traces)
        loop = online_loop(recorder)
        (params, tape), _ = loop(PARAMS, tape, XS)
        first = len(traces)
        loop(params, tape, XS)
        assert len(traces) == first  # the second call traces nothing
        counts[window, every] = (at_init, first - at_init)
    assert len(set(counts.values())) == 1, counts
    assert max(counts[1, 1]) <= 2


def test_a_second_call_traces_nothing():
    counted, traces = counting(step)
    recorder = jaxbptt.record(counted, window=3)
    call, pull = jax.jit(recorder), jax.jit(recorder.pullback)
    grad = jax.jit(jax.grad(lambda p, tape, x: recorder(p, tape, x)[1]))
    tape = recorder.init(PARAMS, CARRY, XS[0])
    seen = []
    for x in XS[:6]:
        grad(PARAMS, tape, x)
        tape, _ = call(PARAMS, tape, x)
        pull(PARAMS, tape, jnp.ones(1))
        seen.append(len(traces))
    assert len(set(seen)) == 1
    assert seen[0] <= 4  # init, call, grad and pullback


def test_another_shape_traces_again():
    # So the counter above can move.
    counted, traces = counting(lambda p, c, x: (jnp.tanh(p * c) + x.sum(), None))
    recorder = jaxbptt.record(counted, window=3)
    call = jax.jit(recorder)
    for size in (2, 3):
        call(0.5, recorder.init(0.5, 0.1, XS[0, :size]), XS[0, :size])
    assert len(traces) == 4


# ------------------------------------------------------------------ counters


COUNTERS = [(3, 4), (4, 3), (1, 1), (5, 5), (2, 7)]


@pytest.mark.parametrize(("window", "every"), grid(COUNTERS, always=[(3, 4), (4, 3), (1, 1)]))
def test_counters_follow_python_ints_for_ten_thousand_steps(window, every):
    steps = 10_000
    recorder = jaxbptt.record(lambda p, c, x: (c + 1, x), window=window, every=every)
    tape = recorder.init(None, 0, 0.0)

    @jax.jit
    def loop(tape):
        def one(tape, x):
            tape, _ = recorder(None, tape, x)
            return tape, (tape.carry, tape.length, recorder.due(tape), small(tape))

        return lax.scan(one, tape, jnp.zeros(steps))

    def small(tape):
        """Every integer on the tape but the user's own."""
        rest = jax.tree.leaves(tape.replace(carry=0))
        ints = [v for v in rest if jnp.issubdtype(v.dtype, jnp.integer) and v.ndim == 0]
        return jnp.stack([v.astype(jnp.int64) for v in ints])

    _, (carry, length, due, ints) = loop(tape)
    s = np.arange(1, steps + 1)
    np.testing.assert_array_equal(carry, s)
    np.testing.assert_array_equal(length, np.minimum(s, window))
    np.testing.assert_array_equal(due, s % every == 0)
    assert np.max(ints) <= max(window, every)  # whatever is counted can't overflow
    assert np.min(ints) >= 0
    # ... and comes round: the whole state of the counters has a period.
    period, begin = window * every, window + every
    np.testing.assert_array_equal(ints[begin:-period], ints[begin + period :])


def test_counters_are_32_bits_wide_however_large_the_default_int():
    recorder = jaxbptt.record(lambda p, c, x: (c, x), window=3, every=2)
    tape = recorder.init(None, 0.0, 0.0)
    ints = [v for v in jax.tree.leaves(tape) if jnp.issubdtype(v.dtype, jnp.integer)]
    assert {v.dtype for v in ints} == {jnp.dtype("int32")}


def test_gradient_does_not_drift_after_thousands_of_steps():
    # After n steps of a periodic drive the window's gradient is that of a fresh tape.
    recorder = jaxbptt.record(step, window=3)
    drive = np.tile(XS[:4], (1000, 1))

    @jax.jit
    def recorded(drive):
        tape = recorder.init(PARAMS, CARRY, XS[0])
        tape, _ = lax.scan(lambda t, x: recorder(PARAMS, t, x), tape, drive)
        return recorder.pullback(PARAMS, tape, np.ones(1)).params

    got = recorded(drive)
    older = jax.jit(lambda xs: lax.scan(lambda c, x: step(PARAMS, c, x), CARRY, xs)[0])(drive[:-3])
    want = oracles.Run(step, PARAMS, older, drive[-3:], 3).unrolled(3, 1, [np.ones(())])
    oracles.check("after 4000 steps", got, want.params, 1e-12)


def test_length_and_due_by_step():
    recorder = jaxbptt.record(step, window=3, every=2)
    call = jax.jit(recorder)
    tape = recorder.init(PARAMS, CARRY, XS[0])
    seen = [(int(tape.length), bool(recorder.due(tape)))]
    for x in np.asarray(XS[:5]):
        tape, _ = call(PARAMS, tape, x)
        seen.append((int(tape.length), bool(recorder.due(tape))))
    assert seen == [(0, False), (1, False), (2, True), (3, False), (3, True), (3, False)]
    assert tape.length.dtype == jnp.int32


@pytest.mark.parametrize("window", grid([2, 3, 5], always=[2, 5]))
def test_a_group_has_its_gradient_where_it_is_due_and_zeros_elsewhere(window):
    recorder = jaxbptt.record(step, window=window, every=3)

    @jax.jit
    def grads(xs):
        def one(tape, x):
            def loss_fn(params):
                new_tape, y = recorder(params, tape, x)
                return y, new_tape

            ct, tape = jax.grad(loss_fn, has_aux=True)(PARAMS)
            return tape, (ct["w"], recorder.due(tape))

        return lax.scan(one, recorder.init(PARAMS, CARRY, xs[0]), xs)[1]

    reference, rows = oracles.Run(step, PARAMS, CARRY, XS, 12), min(window, 3)
    cts, dues = jax.device_get(grads(XS[:9]))
    assert dues.tolist() == [t % 3 == 0 for t in range(1, 10)]
    assert not np.any(cts[~dues])
    for t in (3, 6, 9):
        oldest = oracles.reach(t, window, 3, 3)
        want = reference.unrolled(t, oldest, [np.ones(())] * rows)
        oracles.check("a group of three", {"w": cts[t - 1]}, want.params, 1e-12)


# ------------------------------------------------------ clear, replace, nbytes


@pytest.mark.parametrize("every", [1, 2])
def test_clear_forgets_the_steps_and_keeps_the_carry(every):
    recorder = jaxbptt.record(step, window=3, every=every)
    call, pull, tape = jax.jit(recorder), jax.jit(recorder.pullback), run(recorder, 5)
    cleared = jax.jit(recorder.clear)(tape)
    fresh = recorder.init(PARAMS, tape.carry, XS[0])
    assert layout(cleared) == layout(fresh)
    # Bit for bit a new tape: so its ring is zero, and its groups start anew.
    for got, want in zip(jax.tree.leaves(cleared), jax.tree.leaves(fresh), strict=True):
        np.testing.assert_array_equal(got, want)
    assert int(cleared.length) == 0
    for x in np.asarray(XS[5:7]):
        (cleared, _), (fresh, _) = call(PARAMS, cleared, x), call(PARAMS, fresh, x)
        assert bool(recorder.due(cleared)) == bool(recorder.due(fresh))
    got, want = (pull(PARAMS, t, np.ones(every)).params for t in (cleared, fresh))
    oracles.check("after clear", got, want, 0.0)
    older = pull(PARAMS, run(recorder, 7), np.ones(every)).params
    assert oracles.relative_error(older, want) > 1e-3


def test_replace_puts_in_a_carry_and_keeps_the_steps():
    recorder = jaxbptt.record(step, window=3)
    tape = run(recorder, 2)
    new = tape.replace(carry={"h": np.ones(3), "n": np.int32(40)})
    assert layout(new) == layout(tape)
    assert int(new.length) == 2
    last, y = jax.jit(recorder)(PARAMS, new, XS[2])
    now = {"h": np.ones(3), "n": np.int32(40)}
    np.testing.assert_array_equal(y, jax.jit(step)(PARAMS, now, XS[2])[1])
    assert int(last.carry["n"]) == 41

    def reset_between(w):
        params, carry = {"w": w}, CARRY
        for x in XS[:2]:
            carry, _ = step(params, carry, x)
        # The cotangent goes into the replaced carry as if the last step had returned it.
        h = carry["h"] + lax.stop_gradient(1 - carry["h"])
        return step(params, {"h": h, "n": 0}, XS[2])[1]

    got = jax.jit(recorder.pullback)(PARAMS, last, np.ones(1)).params["w"]
    oracles.check("after replace", got, jax.jit(jax.grad(reset_between))(PARAMS["w"]), 1e-12)
    np.testing.assert_array_equal(tape.carry["h"], run(recorder, 2).carry["h"])


def of_size(width, batch, **options):
    """The type of a tape of 20 steps with one (width, width) weight."""

    def step(w, carry, x):
        carry = jnp.tanh(carry @ w + x)
        return carry, carry

    row = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    square = jax.ShapeDtypeStruct((width, width), jnp.float32)
    return jax.eval_shape(jaxbptt.record(step, window=20, **options).init, square, row, row)


def test_a_large_ring_that_is_mostly_parameters_is_warned_of():
    copies, rest = 20 * 4 * 4096**2, 20 * 2 * 4 * 8 * 4096
    wanted = rf"{copies + rest:,} bytes, of which {copies:,} .*weights='current'.* {rest:,} bytes"
    with pytest.warns(UserWarning, match=wanted):
        of_size(4096, 8)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((4096, 8), {"weights": "current"}),
        ((4096, 8), {"weights": "replayed"}),
        ((3072, 8), {}),  # less than a GiB
        ((4096, 2**13), {}),  # more of activations than of parameters
    ],
)
def test_no_other_ring_is_warned_of(size, options):
    of_size(*size, **options)  # a warning would be an error


@pytest.mark.parametrize("weights", ["stored", "current"])
def test_nbytes_is_known_before_anything_is_allocated(weights):
    recorder = jaxbptt.record(step, window=13, weights=weights)
    tape = recorder.init(PARAMS, CARRY, XS[0])
    ring = [v for v in jax.tree.leaves(tape) if v.shape[:1] == (13,)]
    assert tape.nbytes == sum(v.nbytes for v in ring) > 0
    assert jax.eval_shape(recorder.init, PARAMS, CARRY, XS[0]).nbytes == tape.nbytes
    assert type(tape.nbytes) is int


def test_nbytes_of_a_ring_that_would_not_fit():
    side = 100_000
    array = jax.ShapeDtypeStruct((side, side), jnp.float64)
    recorder = jaxbptt.record(lambda p, c, x: (jnp.sin(c * p), x), window=1000)
    tape = jax.eval_shape(recorder.init, array, array, jax.ShapeDtypeStruct((), F32))
    assert tape.nbytes >= 2 * 1000 * 8 * side**2


def test_nbytes_grows_with_the_window_alone():
    def nbytes(window):
        return jax.eval_shape(jaxbptt.record(step, window=window).init, PARAMS, CARRY, XS[0]).nbytes

    assert nbytes(10) == 10 * nbytes(1)


# ------------------------------------------------------------- compiled copies

WINDOW = 13  # no other axis has this length


def ring_of(tape):
    return [v.shape for v in jax.tree.leaves(tape) if v.shape[:1] == (WINDOW,)]


def gru(params, h, x):
    a, b, c = jnp.split(x @ params["wx"] + params["b"][None], 3, axis=1)
    wr, wz, wn = jnp.split(params["wh"], 3, axis=1)
    r, z = jax.nn.sigmoid(a + h @ wr), jax.nn.sigmoid(b + h @ wz)
    h = (1 - z) * jnp.tanh(c + (r * h) @ wn) + z * h
    return h, jnp.mean((h @ params["wy"]) ** 2)


def rnn(params, h, x):
    h = jnp.tanh(x @ params["wx"] + h @ params["wh"] + params["b"][None])
    return h, jnp.mean((h @ params["wy"]) ** 2)


def cell_arguments(blocks, dtype=F32):
    b, d, h, o = 4, 24, 32, 5
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(0.3 * rng.normal(size=shape), dtype)

    params = {"wx": draw(d, blocks * h), "wh": draw(h, blocks * h), "b": draw(blocks * h)}
    return params | {"wy": draw(h, o)}, draw(b, h), draw(29, b, d)


CELLS = {"rnn": (rnn, 1), "gru": (gru, 3)}
LOOPS = list(itertools.product(CELLS, ["stored", "current"], [1, 4]))


def layers(params, carry, x):
    """A step that leaves many small arrays of one type, and many that are large."""
    large, rows = [jnp.sin(v) * params["a"] for v in carry["large"]], []
    for h in carry["h"]:
        x = jnp.tanh(params["a"] * h * jnp.cos(x) + params["b"] * large[0][0])
        rows.append(x)
    return {"h": rows, "large": large}, jnp.sum(x) + sum(map(jnp.mean, large))


@pytest.mark.parametrize("weights", ["stored", "current", "replayed"])
def test_many_small_residuals_lie_in_a_few_arrays(weights):
    params = {"a": jnp.float64(0.9), "b": jnp.float64(0.2)}
    carry = {
        "h": list(jnp.linspace(-1.0, 1.0, 60).reshape(20, 3)),
        "large": list(jnp.ones((9, 300))),
    }
    recorder = jaxbptt.record(layers, window=4, weights=weights)
    tape = recorder.init(params, carry, XS[0])
    ring = [leaf for leaf in jax.tree.leaves(tape) if leaf.shape[:1] == (4,)]
    assert sum(leaf.shape == (4, 8, 3) for leaf in ring) >= 2
    assert sum(leaf.shape == (4, 300) for leaf in ring) >= 9
    # Of the inputs and carries that a window is run again from nothing is left out.
    if weights == "replayed":
        assert tape.nbytes == 4 * 8 * (60 + 9 * 300 + 3)

    # Each step with parameters of its own where the tape holds these.
    thetas = oracles.drifting(params, 7) if weights == "stored" else [params] * 7
    run = oracles.Run(layers, thetas, carry, XS[:7], 7)
    ct_ys = [oracles.random_like(y, t) for t, y in enumerate(run.trajectory[1])]
    ct_carries = [oracles.random_like(c, 50 + t) for t, c in enumerate(run.trajectory[0])]
    found = online(recorder, run, ct_ys, ct_carries)
    for t in range(1, 8):
        want = run.unrolled(t, oracles.reach(t, 4), ct_ys[t - 1 : t], ct_carries[t - 1])
        oracles.check(f"{t}, called", found.grads[t - 1][0], want.params, 1e-12)
        oracles.check(f"{t}", found.cts[t - 1].params, want.params, 1e-12)
        oracles.check(f"{t}, carry", found.cts[t - 1].carry, want.carry, 1e-12)


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("cell", "weights", "every"),
    grid(LOOPS, always=[("rnn", "stored", 4), ("gru", "current", 1)]),
)
def test_the_online_loop_copies_no_ring(cell, weights, every):
    step, blocks = CELLS[cell]
    params, carry, xs = cell_arguments(blocks)
    recorder = jaxbptt.record(step, window=WINDOW, every=every, weights=weights)
    tape = recorder.init(params, carry, xs[0])
    # Donated, as a caller would: what comes in may be written over.
    loop = jax.jit(online_loop(recorder), donate_argnums=(0, 1))
    compiled = loop.lower(params, tape, xs).compile()
    assert len(ring_of(tape)) >= 3
    assert rings_made_anew(compiled, ring_of(tape)) == []


@pytest.mark.exhaustive
@pytest.mark.compiled
@pytest.mark.parametrize("weights", ["stored", "current"])
def test_a_donated_update_copies_no_ring(weights):
    params, carry, xs = cell_arguments(1)
    recorder = jaxbptt.record(rnn, window=WINDOW, weights=weights)
    tape = recorder.init(params, carry, xs[0])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, tape, x):
        def loss_fn(params):
            new_tape, y = recorder(params, tape, x)
            return y, new_tape

        ct, tape = jax.grad(loss_fn, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, ct), tape

    compiled = update.lower(params, tape, xs[0]).compile()
    assert rings_made_anew(compiled, ring_of(tape)) == []


EXPORTS = list(itertools.product(["cpu", "cuda", "tpu"], ["stored", "current"]))


@pytest.mark.parametrize(
    ("platform", "weights"),
    grid(EXPORTS, always=[("cpu", "stored"), ("cuda", "current"), ("tpu", "current")]),
)
def test_only_a_tpu_multiplies_what_it_reads_by_one(platform, weights):
    params, carry, xs = cell_arguments(1)
    recorder = jaxbptt.record(rnn, window=WINDOW, weights=weights)
    tape = recorder.init(params, carry, xs[0])
    exported = jax.export.export(jax.jit(online_loop(recorder)), platforms=[platform])
    text = exported(params, tape, xs).mlir_module()
    # The one is behind a barrier, and the program has no other.
    assert ("optimization_barrier" in text) == (platform == "tpu")


@pytest.mark.compiled
def test_the_detector_sees_a_ring_written_as_a_whole():
    params, carry, xs = cell_arguments(1)
    tape = jaxbptt.record(rnn, window=WINDOW).init(params, carry, xs[0])
    ring = [v for v in jax.tree.leaves(tape) if v.shape[:1] == (WINDOW,)]
    rolled = jax.jit(lambda ring: [jnp.roll(v, 1, 0) for v in ring], donate_argnums=0)
    assert len(rings_made_anew(rolled.lower(ring).compile(), ring_of(tape))) >= len(ring)


@pytest.mark.exhaustive
@pytest.mark.compiled
def test_the_detector_sees_a_copied_ring():
    # A loop that writes its ring while the old one is still to be read.
    params, carry, xs = cell_arguments(1)
    recorder = jaxbptt.record(rnn, window=WINDOW)
    tape = recorder.init(params, carry, xs[0])

    def one(state, x):
        params, tape = state
        new_tape, _ = recorder(params, tape, x)
        newer_tape, _ = recorder(params, tape.replace(carry=new_tape.carry), 2 * x)
        old = recorder.pullback(params, tape, jnp.ones(1, F32)).params
        new = recorder.pullback(params, newer_tape, jnp.ones(1, F32)).params
        params = jax.tree.map(lambda p, a, b: p - a - b, params, old, new)
        return (params, new_tape), newer_tape.carry

    loop = jax.jit(lambda params, tape, xs: lax.scan(one, (params, tape), xs))
    compiled = loop.lower(params, tape, xs).compile()
    assert any(" copy(" in line for line in rings_made_anew(compiled, ring_of(tape)))


# ---------------------------------------------------------------------- repr


def test_a_tape_and_a_recorder_print_on_one_line():
    recorder = jaxbptt.record(step, window=20, weights="current")
    tape = recorder.init(PARAMS, CARRY, XS[0])
    options = "window=20, every=1, weights='current'"
    carry = "{'h': float64[3], 'n': int32[]}"
    assert repr(recorder) == f"Recorder(step, {options})"
    assert repr(tape) == f"Tape({options}, carry={carry}, ring {tape.nbytes / 1024:.1f} KiB)"
    seen = []
    jax.jit(lambda tape: seen.append(repr(tape)))(tape)
    jax.eval_shape(lambda tape: seen.append(repr(tape)), tape)
    assert set(seen) == {repr(tape)}
    many = jaxbptt.record(step, window=3, has_aux=True)
    assert repr(many) == "Recorder(step, window=3, every=1, weights='stored', has_aux=True)"


@pytest.mark.parametrize(
    ("units", "size"), [(4, "48 B"), (256, "3.0 KiB"), (2**18, "3.0 MiB"), (2**28, "3.0 GiB")]
)
def test_the_size_of_a_ring_in_words(units, size):
    recorder = jaxbptt.record(lambda w, c, x: (jnp.sin(c), None), window=3)
    x = jax.ShapeDtypeStruct((units,), F32)
    tape = jax.eval_shape(lambda c: recorder.init(None, c, x), x)
    assert tape.nbytes == 3 * 4 * units
    assert repr(tape).endswith(f"carry=float32[{units}], ring {size})")


def test_a_large_carry_and_leaves_that_are_no_arrays_print_too():
    recorder = jaxbptt.record(lambda w, c, x: (c, None), window=3)
    carry = {f"a rather long name {i}": jnp.zeros(3) for i in range(9)}
    tape = recorder.init(None, carry, None)
    assert repr(tape) == "Tape(window=3, every=1, weights='stored', carry=9 leaves, ring 0 B)"
    marked = jax.tree.map(lambda _: "mark", recorder.init(None, 0.0, 0.0))
    assert repr(marked).endswith("carry=str, ring 0 B)")
    assert "\n" not in repr(jax.tree.map(lambda _: "mark", tape))


def test_jit_takes_a_recorder_whose_step_can_not_be_hashed():
    class Unhashable:
        __hash__ = None

        def __call__(self, params, carry, x):
            return step(params, carry, x)

    recorder = jaxbptt.record(Unhashable(), window=3)
    tape, y = jax.jit(recorder)(PARAMS, recorder.init(PARAMS, CARRY, XS[0]), XS[0])
    assert hash(recorder) == hash(recorder)
    plain = jaxbptt.record(step, window=3)
    assert hash(plain) == hash(jaxbptt.record(step, window=3))
    assert float(y) == float(plain(PARAMS, plain.init(PARAMS, CARRY, XS[0]), XS[0])[1])
    assert int(tape.length) == 1
