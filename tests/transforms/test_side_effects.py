"""Side effects: mutable references inside a step, prints of a cotangent in a pullback."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from harness import draw, online, pulled
from jax import lax
from jax.experimental import io_callback
from oracles import check, drifting, random_like, reach

import jaxbptt

LENGTH = 6
PARAMS = {"w": draw(0, 4, 4), "v": draw(1, 4)}
CARRY, XS = draw(2, 2, 4), draw(3, LENGTH, 2, 4)
needs_references = pytest.mark.skipif(
    not hasattr(jax, "new_ref"), reason="needs jax.new_ref, which came after JAX 0.7"
)


# -------------------------------------------------------------- references


# Each step that writes to references, then the same without them: the oracle. (`lax.scan` is none:
# under JAX 0.10 its own gradient of `begun_as_zeros` is zero with respect to v.)


def overwritten(p, c, x):
    """A scratch array that begins as a product, is added to, and read twice."""
    r = jax.new_ref(c @ p["w"])
    r[...] = r[...] + x
    h = jnp.tanh(r[...])
    r[...] = h * p["v"][None]
    return h, r[...]


def overwritten_pure(p, c, x):
    h = jnp.tanh(c @ p["w"] + x)
    return h, h * p["v"][None]


def begun_as_zeros(p, c, x):
    """An accumulator: what it holds is not what it began as."""
    r = jax.new_ref(jnp.zeros_like(c))
    r[...] += c @ p["w"]
    r[...] += x
    return jnp.sin(r[...]), jnp.sum(r[...] ** 2 * p["v"][None])


def begun_as_zeros_pure(p, c, x):
    r = c @ p["w"] + x
    return jnp.sin(r), jnp.sum(r**2 * p["v"][None])


def of_parameters(p, c, x):
    """It begins as parameters alone, and then depends on the carry."""
    r = jax.new_ref(p["v"])
    r[...] += jnp.sum(c, 0)
    return jnp.tanh(c @ p["w"] + r[...][None] * x), jnp.sum(jnp.cos(r[...]))


def of_parameters_pure(p, c, x):
    r = p["v"] + jnp.sum(c, 0)
    return jnp.tanh(c @ p["w"] + r[None] * x), jnp.sum(jnp.cos(r))


def in_a_loop(p, c, x):
    """Written to in an inner loop, by rows, in a jitted function."""

    @jax.jit
    def inner(c):
        r = jax.new_ref(jnp.zeros((3, *c.shape)))

        def body(i, c):
            c = jnp.tanh(c @ p["w"] + x)
            r[i] = c
            return c

        c = lax.fori_loop(0, 3, body, c)
        return c, jnp.sum(r[...] * p["v"][None, None], (0, 1))

    return inner(c)


def in_a_loop_pure(p, c, x):
    y = 0.0
    for _ in range(3):
        c = jnp.tanh(c @ p["w"] + x)
        y += jnp.sum(c * p["v"][None], 0)
    return c, y


STEPS = [
    (overwritten, overwritten_pure),
    (begun_as_zeros, begun_as_zeros_pure),
    (of_parameters, of_parameters_pure),
    (in_a_loop, in_a_loop_pure),
]
each_step = pytest.mark.parametrize(("step", "pure"), STEPS, ids=lambda step: step.__name__)


@needs_references
@each_step
@pytest.mark.parametrize("weights", ["stored", "current", "replayed"])
def test_a_reference_inside_a_step_under_record(step, pure, weights):
    thetas = drifting(PARAMS, LENGTH) if weights == "stored" else PARAMS
    run = oracles.Run(pure, thetas, CARRY, XS, LENGTH)
    carries, ys = run.trajectory
    cts = [random_like(y, s) for s, y in enumerate(ys)]
    lams = [random_like(c, 50 + s) for s, c in enumerate(carries)]
    rec = jaxbptt.record(step, window=3, weights=weights)
    found = online(rec, run, cts, lams)
    for t in range(1, LENGTH + 1):
        want = run.unrolled(t, reach(t, 3), [cts[t - 1]], lams[t - 1])
        label = f"references, {weights}"
        newest_x = [leaf[-1] for leaf in want.xs]
        check(f"{label}, in the loop", found.grads[t - 1], [want.params, newest_x], 1e-12)
        oracles.check_cotangents(f"{label}, pullback", found.cts[t - 1], want, 1e-12)


@needs_references
@each_step
@pytest.mark.parametrize(("window", "every"), [(None, 1), (3, 1), (4, 2)])
def test_a_reference_inside_a_step_under_scan(step, pure, window, every):
    run = oracles.Run(pure, PARAMS, CARRY, XS, LENGTH)
    carries, ys = run.trajectory
    cts, lam = [random_like(y, s) for s, y in enumerate(ys)], random_like(carries[-1], 50)
    want = run.whole(window, every, cts, lam)
    how = {"window": window, "every": every}
    got, _ = pulled(step, PARAMS, CARRY, XS, LENGTH, cts, lam, **how)
    check("references, scan", got, want, 1e-12)


@needs_references
def test_under_the_parameters_of_now_a_reference_does_not_hold_those_of_then():
    """ "current" away from fixed parameters: as for the same step without references."""
    found = []
    for step in (overwritten, overwritten_pure):
        rec = jaxbptt.record(step, window=3, weights="current")
        run = oracles.Run(overwritten_pure, drifting(PARAMS, LENGTH), CARRY, XS, LENGTH)
        cts = [random_like(y, s) for s, y in enumerate(run.trajectory[1])]
        found.append(online(rec, run, cts).cts)
    check("references, current", found[0], found[1], 1e-13)


@needs_references
def test_a_reference_from_outside_is_refused_where_a_window_cuts():
    count = jax.new_ref(jnp.zeros(()))

    def step(p, c, x):
        count[...] += 1.0
        return c * p + x, c

    said = r"^step must not close over a mutable reference, but closes over one of Ref\{float64"
    with pytest.raises(TypeError, match=said):
        jaxbptt.record(step, window=2).init(0.5, 0.0, 0.0)
    with pytest.raises(TypeError, match=said):
        jaxbptt.scan(lambda c, x: step(0.5, c, x), 0.0, jnp.ones(3), window=2)
    # Without a window `scan` is lax.scan, which takes it.
    last, _ = jaxbptt.scan(lambda c, x: step(0.5, c, x), 0.0, jnp.ones(3), window=None)
    assert last == 1.75
    assert count[...] == 3


# ------------------------------------------------------ effects in pullbacks


def watch_of(seen, *, ordered):
    """The identity, which writes down each cotangent that goes through it."""

    def note(ct):
        seen.append(np.asarray(ct).item())

    @jax.custom_vjp
    def watch(v):
        return v

    def back(_, ct):
        if ordered:
            io_callback(note, None, ct, ordered=True)
        else:
            jax.debug.callback(note, ct)
        return (ct,)

    watch.defvjp(lambda v: (v, None), back)
    return watch


def watched(seen, *, ordered):
    """A step that writes down the cotangent of its carry."""
    watch = watch_of(seen, ordered=ordered)

    def step(w, c, x):
        c = jnp.tanh(w * watch(c) + x)
        return c, c**2

    return step


INPUTS = jnp.asarray([0.3, -0.2, 0.4, 0.1, -0.3, 0.2])
W = 0.8


def cotangents(first, last):
    """By hand: what goes through `watch` for the output of step `last`, back to step `first`."""
    cs = [0.1]
    for x in np.asarray(INPUTS):
        cs.append(np.tanh(W * cs[-1] + x))
    lam, found = 2 * cs[last], []
    for s in range(last, first - 1, -1):
        lam = lam * (1 - cs[s] ** 2) * W
        found.append(lam)
    return found


def test_a_print_of_the_cotangent_happens_once_for_each_lag_that_is_recorded():
    seen = []
    rec = jaxbptt.record(watched(seen, ordered=False), window=3)
    tape = jax.jit(rec.init)(W, 0.1, 0.0)
    update = jax.jit(jax.grad(lambda w, tape, x: rec(w, tape, x)[::-1], has_aux=True))
    for t, x in enumerate(INPUTS, 1):
        seen.clear()
        _, tape = update(W, tape, x)
        jax.effects_barrier()
        np.testing.assert_allclose(sorted(seen), sorted(cotangents(max(1, t - 2), t)), rtol=1e-12)
    seen.clear()
    jax.block_until_ready(rec.pullback(W, tape, jnp.ones(1)))
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(seen), sorted(cotangents(4, 6)), rtol=1e-12)


def in_a_branch(v, watch):
    return lax.cond(v > -9.0, watch, lambda v: v, v)


def in_an_inner_loop(v, watch):
    return lax.scan(lambda v, _: (watch(v), None), v, None, 1)[0]


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("place", [in_a_branch, in_an_inner_loop])
@pytest.mark.parametrize("weights", ["stored", "current", "replayed"])
def test_an_effect_on_the_way_to_x_happens_once_at_the_newest_lag_too(ordered, place, weights):
    seen = []
    watch = watch_of(seen, ordered=ordered)

    def step(w, c, x):
        c = jnp.tanh(place(w * c + x, watch))
        return c, c**2

    rec = jaxbptt.record(step, window=3, weights=weights)
    tape = rec.init(W, 0.1, 0.0)
    for x in INPUTS[:-1]:
        tape, _ = rec(W, tape, x)
    both = jax.jit(jax.grad(lambda w, x: rec(w, tape, x)[1], (0, 1)))
    of_w, of_x = both(W, INPUTS[-1])
    jax.effects_barrier()
    assert len(seen) == 3

    def unrolled(w, x):
        c = 0.1
        for s, v in enumerate([*INPUTS[:-1], x]):
            c = jnp.tanh((w if s >= len(INPUTS) - 3 else W) * c + v)
        return c**2

    want = jax.grad(unrolled, (0, 1))(W, INPUTS[-1])
    np.testing.assert_allclose((of_w, of_x), want, rtol=1e-12)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_ordered_effects_come_newest_first_for_each_output(window):
    seen = []
    step = watched(seen, ordered=True)

    def loss(w):
        _, ys = jaxbptt.scan(lambda c, x: step(w, c, x), 0.1, INPUTS, window=window)
        return jnp.sum(ys)

    jax.block_until_ready(jax.jit(jax.grad(loss))(W))
    jax.effects_barrier()
    want = [cotangents(max(1, t - window + 1), t) for t in range(len(INPUTS), 0, -1)]
    np.testing.assert_allclose(seen, [ct for chain in want for ct in chain], rtol=1e-12)


@pytest.mark.parametrize("every", [2, 3])
def test_in_a_gap_that_no_gradient_reaches_nothing_is_printed(every):
    seen = []
    step = watched(seen, ordered=True)

    def loss(w):
        how = {"window": 1, "every": every}
        return jnp.sum(jaxbptt.scan(lambda c, x: step(w, c, x), 0.1, INPUTS, **how)[1])

    jax.block_until_ready(jax.jit(jax.grad(loss))(W))
    jax.effects_barrier()
    want = [cotangents(t, t)[0] for t in range(len(INPUTS), 0, -every)]
    np.testing.assert_allclose(seen, want, rtol=1e-12)


def test_without_a_window_as_often_as_under_lax_scan():
    seen = []
    step = watched(seen, ordered=False)

    def loss(scan, w):
        return jnp.sum(scan(lambda c, x: step(w, c, x), 0.1, INPUTS)[1])

    found = []
    for scan in (lax.scan, functools.partial(jaxbptt.scan, window=None)):
        seen.clear()
        jax.block_until_ready(jax.jit(jax.grad(functools.partial(loss, scan)))(W))
        jax.effects_barrier()
        found.append(sorted(seen))
    assert len(found[0]) == len(INPUTS)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-12)


def test_the_gradient_by_lag_shows_each_lag_once():
    seen = []
    rec = jaxbptt.record(watched(seen, ordered=True), window=3)
    tape = rec.init(W, 0.1, 0.0)
    for x in INPUTS[:2]:
        tape, _ = rec(W, tape, x)
    jax.block_until_ready(jaxbptt.gradient_by_lag(rec, W, tape, jnp.ones(1)))
    jax.effects_barrier()
    np.testing.assert_allclose(seen, cotangents(1, 2), rtol=1e-12)


def test_a_collective_is_no_side_effect():
    """JAX counts its axis among the effects; it must not cost a branch at each lag."""
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))

    def branches(reduce):
        def step(w, c, x):
            c = jnp.tanh(reduce(w * c) + x)
            return c, reduce(c)

        rec = jaxbptt.record(step, window=3)

        def local(w, x):
            tape = rec.init(w, x, x)
            return jax.grad(lambda w: rec(w, tape, x)[1])(w)

        none = jax.sharding.PartitionSpec()
        run = jax.shard_map(local, mesh=mesh, in_specs=(none, none), out_specs=none)
        return str(jax.make_jaxpr(run)(0.5, 0.1)).count("cond[")

    assert branches(lambda v: lax.psum(v, "i")) == branches(lambda v: 1.0 * v)
