"""Pace: the gradient of each call is the sum of the terms that are due then, and no other.

The oracle takes the terms of each loss, lag by lag, from the unrolled graph, and adds up those that
the definition gives to a call.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from harness import draw, grid, weigh, worst
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxpr_reading import rings_made_anew
from oracles import moving, random_like
from zoo import ZOO

import jaxbptt

F64, F32 = jnp.float64, jnp.float32
LENGTH = 11
PACES = [(1, 1), (3, 1), (3, 2), (5, 1), (5, 5), (6, 2), (6, 3), (7, 3), (9, 4), (20, 3), (20, 20)]


def due_terms(run, window, pace, ct_ys, parts=None):
    """What the definition says of each call: lists of leaves, by call."""
    parts = parts or [window] * len(moving(run.carry))
    chains = -(-window // pace)
    terms = []
    for t in range(1, run.length + 1):
        oldest = [max(1, t - part + 1) for part in parts]
        terms.append(run.by_lag(t, oldest, [ct_ys[t - 1]])[0])
    calls = []
    for t in range(run.length):
        total = [np.zeros(v.shape, v.dtype) for v in moving(run.thetas[0])]
        for j in range(min(chains, t + 1)):
            lags = terms[t - j][j * pace : min(j * pace + pace, window)]
            total = [sum((term[i] for term in lags), v) for i, v in enumerate(total)]
        calls.append(total)
    return calls


@functools.cache
def run_of(name, dtype=F64):
    case = ZOO[name](dtype)
    params = oracles.drifting(case.params, LENGTH)
    run = oracles.Run(case.step, params, case.carry, case.xs(LENGTH), LENGTH)
    return run, [random_like(y, t) for t, y in enumerate(run.trajectory[1])]


def advanced(rec, run, ct_ys):
    """The gradient of each call, in one compiled loop."""
    ys = run.trajectory[1]

    @jax.jit
    def go(stacked, carry, cts):
        def one(tape, row):
            (theta, x), ct_y = row
            ct_y = oracles.refill(ys[0], ct_y)
            tape, _, grads = rec.advance(theta, tape, x, lambda y: weigh(ct_y, y))
            return tape, moving_only_params(grads)

        thetas, xs = stacked
        x = jax.tree.map(lambda v: v[0], xs)
        tape = rec.init(jax.tree.map(lambda v: v[0], thetas), carry, x)
        return lax.scan(one, tape, (stacked, cts), length=run.length)[1]

    found = go(run.stacked, run.carry, oracles.by_step([moving(ct) for ct in ct_ys]))
    return oracles.unstack(found, run.length)


def moving_only_params(grads):
    return [v for v in jax.tree.leaves(grads) if v.dtype != jax.dtypes.float0]


STEPS = """tanh_rnn fused_gru lstm linear nested_dict integer_leaves none_leaves tokens no_residuals
    checkpoint spike_vjp stacked_layers cond jitted bfloat16 complex_recurrence typed_key""".split()


@pytest.mark.parametrize(
    ("name", "window", "pace"),
    grid(
        [(name, *pair) for name in STEPS for pair in PACES],
        lambda case: case[1:] == (6, 2) or (case[0] == "lstm" and case[1:] in [(5, 1), (7, 3)]),
    ),
)
def test_each_call_has_the_terms_that_are_due(name, window, pace):
    run, ct_ys = run_of(name)
    rec = jaxbptt.record(run.step, window=window, pace=pace)
    got, want = advanced(rec, run, ct_ys), due_terms(run, window, pace, ct_ys)
    allowed = 2e-2 if name == "bfloat16" else oracles.tolerance(run.carry, run.thetas[0])
    for t in range(LENGTH):
        oracles.check(f"pace, {name}, call {t}", got[t], want[t], allowed)


@pytest.mark.parametrize("name", ["tanh_rnn", "lstm", "tokens"])
def test_at_fixed_parameters_current_is_stored(name):
    case = ZOO[name](F64)
    run = oracles.Run(case.step, case.params, case.carry, case.xs(LENGTH), LENGTH)
    ct_ys = [random_like(y, t) for t, y in enumerate(run.trajectory[1])]
    stored, current = (
        advanced(jaxbptt.record(run.step, window=7, pace=3, weights=w), run, ct_ys)
        for w in ("stored", "current")
    )
    for a, b in zip(stored, current, strict=True):
        assert worst(a, b) <= 1e-12


def test_without_delay_it_is_the_window_itself():
    run, ct_ys = run_of("lstm")
    got = advanced(jaxbptt.record(run.step, window=6, pace=6), run, ct_ys)
    for t in range(LENGTH):
        want = run.unrolled(t + 1, oracles.reach(t + 1, 6), [ct_ys[t]])
        oracles.check("pace of the window", got[t], want.params, 1e-12)


# ------------------------------------------------------------ a loss as y, under jax.grad


W = {"w": draw(0, 3, 3), "u": draw(1, 2, 3), "v": draw(2, 3, 2)}
XS, H = draw(3, LENGTH, 2, 2), draw(4, 2, 3)


def with_loss(p, h, x):
    """A loss head in the step, which only the newest step's ȳ goes through."""
    h = jnp.tanh(h @ p["w"] + x @ p["u"])
    return h, jnp.sum((h @ p["v"]) ** 2)


def with_aux(p, h, x):
    h, loss = with_loss(p, h, x)
    return h, (loss, {"h": h})


def without_head(p, h, x):
    h = jnp.tanh(h @ p["w"] + x @ p["u"])
    return h, jnp.sum(h**2) + 0 * jnp.sum(p["v"])


@functools.cache
def reference(step):
    run = oracles.Run(step, W, H, XS, LENGTH)
    return run, [np.ones(())] * LENGTH


@pytest.mark.parametrize("weights", ["stored", "current"])
@pytest.mark.parametrize("step", [with_loss, without_head])
def test_under_grad_the_loss_is_y(step, weights):
    rec = jaxbptt.record(step, window=7, pace=3, weights=weights)

    def one(tape, x):
        (value, tape), grads = jax.value_and_grad(
            lambda p: tuple(3.0 * v if i else v for i, v in enumerate(rec(p, tape, x)))[::-1],
            has_aux=True,
        )(W)
        return tape, (value, grads)

    values, got = jax.jit(lambda tape: lax.scan(one, tape, XS)[1])(rec.init(W, H, XS[0]))
    run, ct_ys = reference(step)
    want = due_terms(run, 7, 3, ct_ys)
    np.testing.assert_allclose(values, 3.0 * np.stack(run.trajectory[1]), rtol=1e-12)
    for t in range(LENGTH):
        mine = [v[t] / 3.0 for v in jax.tree.leaves(got)]
        oracles.check("pace, under grad", mine, want[t], 1e-12)


def test_aux_goes_along_and_x_has_its_share_of_the_newest_step():
    rec = jaxbptt.record(with_aux, window=5, pace=2, has_aux=True)
    tape = rec.init(W, H, XS[0])
    h = H
    for x in XS[:4]:

        def loss(x, tape=tape):
            new, (value, aux) = rec(W, tape, x)
            return value, (new, aux)

        ct_x, (tape, aux) = jax.grad(loss, has_aux=True)(x)
        want = jax.grad(lambda x, h=h: with_loss(W, h, x)[1])(x)
        np.testing.assert_allclose(ct_x, want, rtol=1e-12)
        h = with_loss(W, h, x)[0]
        np.testing.assert_allclose(aux["h"], h, rtol=1e-12)


def test_closed_over_arrays_get_their_terms():
    def one(w, tape, x):
        rec = jaxbptt.record(lambda p, h, x: with_loss({**p, "w": w}, h, x), window=5, pace=2)
        return rec({"u": W["u"], "v": W["v"]}, tape, x)[::-1]

    rest = {"u": W["u"], "v": W["v"]}
    tape = jaxbptt.record(
        lambda p, h, x: with_loss({**p, "w": W["w"]}, h, x), window=5, pace=2
    ).init(rest, H, XS[0])

    def trip(tape, x):
        grad, tape = jax.grad(one, has_aux=True)(W["w"], tape, x)
        return tape, grad

    got = jax.jit(lambda tape: lax.scan(trip, tape, XS)[1])(tape)
    run, ct_ys = reference(with_loss)
    place = sorted(W).index("w")
    for t, want in enumerate(due_terms(run, 5, 2, ct_ys)):
        oracles.check("pace, closed over", [got[t]], [want[place]], 1e-12)


@pytest.mark.parametrize(("window", "pace"), [(5, 1), (6, 3), (7, 3), (9, 4)])
def test_a_run_and_its_flush_sum_to_the_windows_gradients(window, pace):
    rec = jaxbptt.record(without_head, window=window, pace=pace)
    more = -(-window // pace) - 1
    xs = jnp.concatenate([XS, jnp.zeros((more, 2, 2))])
    counts = jnp.arange(len(xs)) < LENGTH

    def one(tape, row):
        x, counts = row
        tape, _, grads = rec.advance(W, tape, x, lambda y: jnp.where(counts, y, 0.0))
        return tape, grads

    grads = jax.jit(lambda tape: lax.scan(one, tape, (xs, counts))[1])(rec.init(W, H, XS[0]))
    got = jax.tree.map(lambda v: jnp.sum(v, 0), grads)

    def loss(p):
        return jnp.sum(jaxbptt.scan(functools.partial(without_head, p), H, XS, window=window)[1])

    assert worst(got, jax.jit(jax.grad(loss))(W)) <= 1e-12


# ------------------------------------------------------------ parts, resets, clear, vmap, meshes


def test_a_window_for_each_part():
    run, ct_ys = run_of("lstm")
    window = jax.tree.unflatten(jax.tree.structure(run.carry), [3, 7])
    got = advanced(jaxbptt.record(run.step, window=window, pace=3), run, ct_ys)
    for t, want in enumerate(due_terms(run, 7, 3, ct_ys, parts=[3, 7])):
        oracles.check("pace, parts", got[t], want, 1e-12)


def test_clear_forgets_the_chains_too():
    rec = jaxbptt.record(with_loss, window=5, pace=2)
    tape = rec.init(W, H, XS[0])
    for x in XS[:3]:
        tape, _ = rec(W, tape, x)
    cleared = rec.clear(tape)
    begun = rec.init(W, tape.carry, XS[0])
    for x in XS[3:7]:
        cleared, _, got = rec.advance(W, cleared, x, lambda y: y)
        begun, _, want = rec.advance(W, begun, x, lambda y: y)
        assert worst(got, want) == 0.0


def test_sequences_in_a_batch_that_begin_anew():
    start, rec_of = {"start": draw(9, 3)}, functools.partial(jaxbptt.record, window=6, pace=2)
    first = jnp.array([[True, True], [False, False], [False, True], [False, False], [True, False]])

    def cell(p, h, x):
        h = jnp.tanh(h @ p["w"] + x @ p["u"])
        return h, h

    packed = jaxbptt.with_resets(cell, lambda p: p["start"])
    params = W | start
    run = oracles.Run(packed, params, H, (XS[:5], first), 5)
    ct_ys = [random_like(y, t) for t, y in enumerate(run.trajectory[1])]
    got = advanced(rec_of(packed), run, ct_ys)
    for t, want in enumerate(due_terms(run, 6, 2, ct_ys)):
        oracles.check("pace, resets", got[t], want, 1e-12)


def test_under_vmap_each_run_is_its_own():
    rec = jaxbptt.record(with_loss, window=5, pace=2)

    def gradients(h, xs):
        def one(tape, x):
            tape, _, grads = rec.advance(W, tape, x, lambda y: y)
            return tape, grads

        return lax.scan(one, rec.init(W, h, xs[0]), xs)[1]

    hs, xs = jnp.stack([H, 2 * H]), jnp.stack([XS, XS[::-1]])
    got = jax.jit(jax.vmap(gradients))(hs, xs)
    for i in range(2):
        want = jax.jit(gradients)(hs[i], xs[i])
        assert worst(jax.tree.map(lambda v, i=i: v[i], got), want) <= 1e-12


def test_a_batch_laid_over_devices_inside_shard_map():
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
    rec = jaxbptt.record(with_loss, window=5, pace=2)

    def gradients(params, h, xs):
        def one(tape, x):
            grads, tape = jax.grad(lambda p: rec(p, tape, x)[::-1], has_aux=True)(params)
            return tape, grads

        return lax.scan(one, rec.init(params, h, xs[0]), xs)[1]

    laid = jax.shard_map(
        gradients, mesh=mesh, in_specs=(P(), P("batch"), P(None, "batch")), out_specs=P()
    )
    got, want = jax.jit(laid)(W, H, XS), jax.jit(gradients)(W, H, XS)
    assert worst(got, want) <= 1e-12


def test_second_order_is_the_derivative_of_the_gradient_of_the_call():
    rec = jaxbptt.record(with_loss, window=4, pace=2)
    tape = rec.init(W, H, XS[0])
    for x in XS[:4]:
        tape, _ = rec(W, tape, x)

    def gradient(w):
        grads = jax.grad(lambda w: rec({**W, "w": w}, tape, XS[4])[1])(w)
        return jnp.sum(grads * draw(5, 3, 3))

    got = jax.jit(jax.grad(gradient))(W["w"])
    h, direction = 1e-6, draw(6, 3, 3)
    ends = [jax.jit(gradient)(W["w"] + s * h * direction) for s in (1, -1)]
    np.testing.assert_allclose(jnp.sum(got * direction), (ends[0] - ends[1]) / (2 * h), rtol=1e-6)


def test_the_tape_has_one_layout_and_its_size_is_said():
    rec = jaxbptt.record(with_loss, window=7, pace=3)
    plain = jax.eval_shape(jaxbptt.record(with_loss, window=1).init, W, H, XS[0]).nbytes
    tape = rec.init(W, H, XS[0])
    assert tape.nbytes == plain * 3 * 4  # ceil(7 / 3) columns of 3 + 1 rows
    kinds = jax.tree.map(jax.typeof, tape)
    for t in range(30):
        tape, _ = rec(W, tape, XS[t % LENGTH])
        assert int(tape.length) == min(t + 1, 7)
    assert jax.tree.map(jax.typeof, tape) == kinds


@pytest.mark.compiled
@pytest.mark.parametrize("weights", ["stored", "current"])
def test_the_ring_is_written_and_read_in_place(weights):
    rec = jaxbptt.record(with_loss, window=32, pace=2, weights=weights)
    tape = rec.init(W, H, XS[0])

    def run(params, tape, xs):
        def one(state, x):
            params, tape = state
            tape, _, grads = rec.advance(params, tape, x, lambda y: y)
            return (jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), tape), None

        return lax.scan(one, (params, tape), xs)[0]

    compiled = jax.jit(run, donate_argnums=1).lower(W, tape, XS).compile()
    shapes = {leaf.shape for leaf in jax.tree.leaves(tape) if leaf.shape[:2] == (3, 16)}
    assert shapes
    assert rings_made_anew(compiled, shapes) == []


# ------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"pace": 0}, r"pace must be an int of at least 1"),
        ({"pace": 2.0}, r"pace must be an int of at least 1 .* got 2\.0"),
        ({"pace": 6}, r"pace must be at most the window, 5, but got 6"),
        ({"pace": 2, "every": 2}, r"every must be 1 with a pace, but got 2"),
        ({"pace": 2, "weights": "replayed"}, r"weights must be 'stored' or 'current' with a pace"),
    ],
)
def test_a_pace_that_does_not_go_with_the_rest(how, said):
    with pytest.raises(ValueError, match=said):
        jaxbptt.record(with_loss, window=5, **how)


def test_what_needs_the_whole_window_or_a_pace():
    rec = jaxbptt.record(with_loss, window=5, pace=2)
    tape, _ = rec(W, rec.init(W, H, XS[0]), XS[0])
    with pytest.raises(ValueError, match="must have no pace for pullback"):
        rec.pullback(W, tape, jnp.ones(1))
    with pytest.raises(ValueError, match="must have no pace for gradient_by_lag"):
        jaxbptt.gradient_by_lag(rec, W, tape, jnp.ones(1))
    with pytest.raises(ValueError, match=r"tape\.carry has a cotangent"):
        jax.grad(lambda p: rec(p, tape, XS[0])[0].carry.sum())(W)
    plain = jaxbptt.record(with_loss, window=5)
    with pytest.raises(ValueError, match="recorder must have a pace for advance"):
        plain.advance(W, plain.init(W, H, XS[0]), XS[0], lambda y: y)
    with pytest.raises(ValueError, match="recorder with pace=None, but was made by one with"):
        plain(W, tape, XS[0])


def test_a_loss_that_is_none():
    def vector(p, h, x):
        h = with_loss(p, h, x)[0]
        return h, h

    rec = jaxbptt.record(vector, window=5, pace=2)
    tape = rec.init(W, H, XS[0])
    with pytest.raises(TypeError, match=r"scalar loss as y for a recorder with a pace.*advance"):
        rec(W, tape, XS[0])
    with pytest.raises(TypeError, match="loss must return a floating-point scalar"):
        rec.advance(W, tape, XS[0], lambda y: y)
    tape, value, _ = rec.advance(W, tape, XS[0], lambda y: (jnp.sum(y), "aux"))
    assert value[1] == "aux"


def test_a_collective_over_a_mapped_axis_with_the_gradient_outside():
    def centred(p, h, x):
        a = h @ p["w"] + x @ p["u"]
        h = jnp.tanh(a - lax.pmean(a, "rows"))
        return h, jnp.sum(h**2)

    rec = jaxbptt.record(centred, window=4, pace=2)

    def run(p, h, xs):
        tape, total = rec.init(p, h, xs[0]), 0.0
        for x in xs[:3]:
            tape, y = rec(p, tape, x)
            total += y
        return total

    rows = jnp.stack([H, 2 * H]), jnp.stack([XS, -XS])
    mapped = functools.partial(jax.vmap, in_axes=(None, 0, 0), axis_name="rows")
    outside = jax.jit(jax.grad(lambda p: jnp.sum(mapped(run)(p, *rows))))(W)
    inside = jax.jit(lambda p: mapped(jax.grad(run))(p, *rows))(W)
    assert worst(outside, jax.tree.map(lambda v: jnp.sum(v, 0), inside)) <= 1e-12
