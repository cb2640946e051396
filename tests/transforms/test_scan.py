"""`scan` against an unrolled graph for each group, and against `lax.scan` where nothing is cut."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from harness import draw, grid, pulled, worst
from jax import lax
from jax.sharding import PartitionSpec as P
from oracles import random_like

import jaxbptt


def weights():
    return {"w": draw(0, 4, 4), "u": draw(1, 3, 4), "b": draw(2, 1, 4), "v": draw(3, 4, 2)}


def step_with_head(p, c, x):
    h = jnp.tanh(c @ p["w"] + x @ p["u"] + p["b"])
    return h, (h @ p["v"]) ** 2


def bare_step(p, c, x):
    h = jnp.tanh(c @ p["w"] + x @ p["u"] + p["b"])
    return h, h


def with_head(p):
    return functools.partial(step_with_head, p)


def bare(p):
    return functools.partial(bare_step, p)


# --------------------------------------------------- every window, every group


@functools.cache
def run_of(step, length):
    """The steps in the order in which they run, for the oracle, and cotangents."""
    run = oracles.Run(step, weights(), draw(4, 2, 4), draw(5, length, 2, 3), length)
    carries, ys = run.trajectory
    return run, [random_like(y, t) for t, y in enumerate(ys)], random_like(carries[-1], 50)


def flipped(steps, reverse):
    return steps[::-1] if reverse else steps


RELATIONS = itertools.product([1, 2, 3, 5, 8, 9, 20], [1, 2, 3, 8])


@pytest.mark.parametrize(
    ("window", "every", "reverse", "step", "length"),
    grid(
        [
            (*relation, reverse, step, length)
            for relation in RELATIONS
            for reverse, length in ((False, 1), (False, 7), (True, 7))
            for step in (step_with_head, bare_step)
        ],
        always=[
            (1, 1, False, step_with_head, 7),
            (3, 3, False, bare_step, 7),  # one chain, chunk by chunk
            (2, 3, True, step_with_head, 7),  # steps that no chain reaches
            (5, 8, True, bare_step, 7),  # one group, not all of it reached
            (5, 1, False, bare_step, 7),  # a chain for each step
            (3, 2, True, bare_step, 7),  # groups that don't divide the window
            (5, 2, False, step_with_head, 7),
            (8, 2, True, step_with_head, 7),  # just as much as the whole run needs,
            (8, 3, False, step_with_head, 7),  # and one too few
            (9, 8, False, bare_step, 7),
            (20, 1, True, bare_step, 7),
            (2, 3, False, step_with_head, 1),
            (5, 2, False, bare_step, 1),
        ],
    ),
)
def test_every_relation_of_window_and_every(window, every, reverse, step, length):
    run, ct_ys, ct_carry = run_of(step, length)
    p, xs = weights(), draw(5, length, 2, 3)
    given = [flipped(v, reverse) for v in (xs, ct_ys)]
    how = {"window": window, "every": every, "reverse": reverse}
    got, _ = pulled(step, p, run.carry, given[0], length, given[1], ct_carry, **how)
    want = run.whole(window, every, ct_ys, ct_carry)
    assert worst([got.params, got.carry], [want.params, want.carry]) < 1e-12
    assert worst(flipped(np.asarray(got.xs[0]), reverse), want.xs[0]) < 1e-12


def test_a_short_window_differs_from_full():
    init, xs = draw(4, 2, 4), draw(5, 7, 2, 3)
    cuts = [(None, 1), (3, 1), (7, 1), (7, 4), (10, 4)]

    @jax.jit
    def grads(p):
        def loss(p, window, every):
            how = {"window": window, "every": every}
            return jnp.sum(jaxbptt.scan(with_head(p), init, xs, **how)[1])

        return [jax.grad(loss)(p, *cut) for cut in cuts]

    full, *others = grads(weights())
    errors = dict(zip(cuts[1:], (worst(other, full) for other in others), strict=True))
    assert errors[3, 1] > 1e-3
    assert errors[7, 1] < 1e-14
    assert errors[7, 4] > 1e-4
    assert errors[10, 4] < 1e-14


# ------------------------------------------------------------- what lax.scan does


def same_as_lax(run, *args, tolerance=1e-12):
    """`run(scan, *args)` is a scalar: its value is lax.scan's, and so is its gradient."""

    def ours(*a, **k):
        return jaxbptt.scan(*a, **k, window=None)

    n = tuple(range(len(args)))

    @jax.jit
    def both(*args):
        def of(scan):
            one = functools.partial(run, scan)
            return one(*args), jax.value_and_grad(one, n)(*args)

        return of(ours), of(lax.scan)

    (value, got), (same_value, wanted) = both(*args)
    assert value == same_value  # to the bit
    assert worst(got, wanted) < tolerance


def total(tree):
    return sum(jnp.sum(v.astype(float) ** 2) for v in jax.tree.leaves(tree))


def test_no_xs_with_length():
    same_as_lax(lambda scan, w: total(scan(lambda c, _: (w * c, c), 1.0, None, 5)), 0.7)
    same_as_lax(lambda scan, w: total(scan(lambda c, _: (w * c, None), 1.0, length=5)), 0.7)


@pytest.mark.parametrize("unroll", [2, 3, True])
def test_unroll_and_reverse(unroll):
    def run(scan, w, xs):
        return total(scan(lambda c, x: (w * c + x, c), 0.0, xs, None, True, unroll))

    same_as_lax(run, 0.7, draw(0, 7))


def test_empty_sequences_and_trees():
    def run(scan, w, init, xs):
        return total(scan(lambda c, x: (jnp.tanh(w * c + x), c), init, xs))

    same_as_lax(run, 0.7, 0.3, jnp.zeros((0,)))
    same_as_lax(lambda scan, w: total(scan(lambda c, x: (c, w * x), (), jnp.ones(3))), 0.7)
    assert jaxbptt.scan(lambda c, x: (c, x), None, None, 3, window=2) == (None, None)


def test_a_weakly_typed_carry_is_promoted_as_by_lax():
    def run(scan, xs):
        return total(scan(lambda c, x: (c + x, c * 0.5), 0, xs))

    with jax.numpy_dtype_promotion("standard"):
        same_as_lax(run, draw(0, 5))
    for dtype in (float, np.float32):
        init = jnp.asarray(1.0) if dtype is float else jnp.float32(1.0)
        ours = jaxbptt.scan(lambda c, _: (c * 0.5, c), init, None, 3, window=1)
        theirs = lax.scan(lambda c, _: (c * 0.5, c), init, None, 3)
        assert jax.tree.map(jax.typeof, ours) == jax.tree.map(jax.typeof, theirs)


def test_integers_keys_and_containers_in_the_carry():
    def run(scan, w, xs):
        def f(c, x):
            key, sub = jax.random.split(c["key"])
            noise = jax.random.normal(sub, (), w.dtype)
            h = jnp.tanh(w * c["h"] + x["a"] * noise)
            return {"key": key, "h": h, "n": c["n"] + x["i"], "none": None}, (h, c["n"])

        init = {"key": jax.random.key(1), "h": jnp.zeros(()), "n": jnp.int32(0), "none": None}
        c, (h, _) = scan(f, init, {"a": xs, "i": jnp.arange(5, dtype=jnp.int32)})
        return total((c["h"], h))

    same_as_lax(run, jnp.asarray(0.7), draw(0, 5))


def test_nested_either_way():
    xs = draw(0, 4, 3)
    for outer_ours, inner_ours in ((False, True), (True, False), (True, True)):

        def run(scan, w, xs, outer_ours=outer_ours, inner_ours=inner_ours):
            outer, inner = (scan if o else lax.scan for o in (outer_ours, inner_ours))

            def row(c, r):
                return inner(lambda c, x: (jnp.tanh(w * c + x), c * x), c, r)

            return total(outer(row, 0.1, xs))

        same_as_lax(run, 0.7, xs)


ARGUMENTS = list(itertools.product((False, True), repeat=3))[1:]


def summed_squares(w, init, xs, window):
    def f(c, x):
        c = jnp.tanh(w * c + x)
        return c, c**2

    return total(jaxbptt.scan(f, init, xs, window=window))


@functools.cache
def its_gradient(window):
    return jax.jit(jax.grad(functools.partial(summed_squares, window=window), (0, 1, 2)))


@pytest.mark.parametrize(
    ("window", "batched"),
    grid(
        itertools.product([2, None], ARGUMENTS),
        # Each argument alone, and all of them; where nothing is cut off only xs, and all.
        always=lambda case: sum(case[1]) != 2 and (case[0] == 2 or case[1][2]),
    ),
)
def test_batched_by_vmap_each_argument_alone(window, batched):
    many, one = (draw(0, 3), draw(1, 3), draw(2, 3, 6)), (draw(3), draw(4), draw(5, 6))
    grad = its_gradient(window)
    args = [m if b else o for m, o, b in zip(many, one, batched, strict=True)]
    got = jax.jit(jax.vmap(grad, [0 if b else None for b in batched]))(*args)
    got, args = jax.tree.map(np.asarray, (got, args))
    for i in range(3):
        row = [a[i] if b else a for a, b in zip(args, batched, strict=True)]
        assert worst([v[i] for v in got], list(grad(*row))) < 1e-12


def test_in_cond_while_jit_and_checkpoint():
    def run(scan, w, xs):
        def f(c, x):
            return jax.checkpoint(lambda c, x: jnp.tanh(w * c + x))(c, x), c

        def branch(xs):
            return total(scan(f, 0.1, xs))

        return lax.cond(xs[0] < 9, jax.jit(jax.checkpoint(branch)), lambda xs: xs[0], xs)

    same_as_lax(run, 0.7, draw(0, 5))

    def body(v):
        return jaxbptt.scan(lambda c, x: (c + x, None), v, jnp.ones(3), window=2)[0]

    assert jax.jit(lambda v: lax.while_loop(lambda v: v < 10, body, v))(0.0) == 12


@pytest.mark.parametrize("window", grid([2, None], always=[2]))
def test_donated_buffers_and_static_arguments(window):
    def run(p, init, xs, power):
        return jnp.sum(jaxbptt.scan(bare(p), init, xs, window=window)[1] ** power)

    def update(p, init, xs, power):
        grad = jax.grad(run)(p, init, xs, power)
        return jax.tree.map(lambda a, b: a - 0.1 * b, p, grad)

    p, init, xs = weights(), draw(4, 2, 4), draw(5, 7, 2, 3)
    p.pop("v")
    wanted = jax.jit(lambda *args: [update(*args, power) for power in (2, 3)])(p, init, xs)
    donating = jax.jit(update, static_argnums=3, donate_argnums=0)
    for power, want in zip((2, 3), wanted, strict=True):
        given = jax.tree.map(jnp.copy, p)
        assert worst(donating(given, init, xs, power), want) < 1e-13
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))


STILL = {"int": 0, "none": (), "key": jax.random.key(0)}


@pytest.mark.parametrize(
    ("carry", "window", "every"),
    grid(
        [(name, *relation) for name in STILL for relation in ((2, 1), (5, 2), (3, 3))],
        always=[("int", 2, 1), ("none", 5, 2), ("key", 3, 3), ("key", 2, 1)],
    ),
)
def test_no_carry_that_gradients_flow_through(carry, window, every):
    def run(scan, w, xs):
        return jnp.sum(scan(lambda c, x: (c, jnp.tanh(w @ x)), STILL[carry], xs)[1])

    ours = functools.partial(jaxbptt.scan, window=window, every=every)

    @jax.jit
    def grads(w, xs):
        return [jax.grad(run, 1)(scan, w, xs) for scan in (ours, lax.scan)]

    assert worst(*grads(draw(0, 3, 3), draw(1, 6, 3))) < 1e-13


def test_outputs_that_are_inputs_have_no_gradient_where_none_is_due():
    @jax.jit
    def grads(xs):
        def loss(xs, f):
            return jnp.sum(jaxbptt.scan(f, 0.0, xs, window=1, every=3)[1])

        fs = (lambda c, x: (0.5 * c + x, x), lambda c, x: (0.5 * c + x, x * 1.0))
        return [jax.grad(loss)(xs, f) for f in fs]

    for got in grads(jnp.ones(6)):
        assert got.tolist() == [0, 0, 1, 0, 0, 1]


# ------------------------------------------- higher order, meshes, other callers


def squared_tanh(w, c, x):
    c = jnp.tanh(w * c + x)
    return c, c**2


@pytest.mark.parametrize("window", [2, None])
def test_second_order(window):
    xs, start = draw(0, 5), jnp.asarray(0.1)

    def first(w):
        def run(w):
            f = functools.partial(squared_tanh, w)
            return jnp.sum(jaxbptt.scan(f, start, xs, window=window)[1])

        return jax.grad(run)(w)

    @jax.jit
    def both_ways(w):
        return first(w), jax.grad(first)(w), jax.jvp(first, (w,), (1.0,))[1]

    w, eps = 0.7, 1e-5
    at = jax.jit(first)
    wanted = (at(w + eps) - at(w - eps)) / (2 * eps)
    run = oracles.Run(squared_tanh, jnp.asarray(w), start, xs, 5)
    of_all = run.whole(window, 1, [np.ones(())] * 5, np.zeros(()))
    value, by_grad, by_jvp = both_ways(w)
    np.testing.assert_allclose(value, of_all.params[0], rtol=1e-12)
    np.testing.assert_allclose(by_grad, wanted, rtol=1e-7)
    np.testing.assert_allclose(by_jvp, wanted, rtol=1e-7)


@pytest.mark.parametrize("window", [2, None])
def test_inside_shard_map_with_checked_axes(window):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(w, xs):
        def f(c, x):
            c = jnp.tanh(c @ w + x)
            return c, lax.psum(c.sum(), "i")

        init = jnp.zeros_like(xs[0])
        return jnp.sum(jaxbptt.scan(f, init, xs, window=window)[1])

    def alone(w, xs):
        def f(c, x):
            c = jnp.tanh(c @ w + x)
            return c, c.sum()

        return jnp.sum(jaxbptt.scan(f, jnp.zeros_like(xs[0]), xs, window=window)[1])

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(None, "i")), out_specs=P())
    w, xs = draw(0, 3, 3), draw(1, 5, 2, 3)
    np.testing.assert_allclose(sharded(w, xs), alone(w, xs), rtol=1e-12)  # without jit too
    grads = [jax.jit(jax.grad(run))(w, xs) for run in (sharded, alone)]
    assert worst(*grads) < 1e-12


@pytest.mark.parametrize(
    ("window", "kind"),
    grid(
        itertools.product([2, None], ["Auto", "Explicit"]),
        always=[(2, "Explicit"), (None, "Auto")],
    ),
)
@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_a_batch_laid_over_devices(window, kind):
    def loss(w, init, xs):
        def f(c, x):
            c = jnp.tanh(c @ w + x)
            return c, jnp.sum(c**2)

        return jnp.sum(jaxbptt.scan(f, init, xs, window=window)[1])

    args = draw(0, 3, 3), draw(1, 8, 3), draw(2, 5, 8, 3)
    want = jax.jit(jax.grad(loss, (0, 1, 2)))(*args)
    mesh = jax.make_mesh((4,), ("i",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    enter = jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh
    with enter(mesh):
        specs = P(), P("i"), P(None, "i")
        placed = [
            jax.device_put(v, jax.sharding.NamedSharding(mesh, spec))
            for v, spec in zip(args, specs, strict=True)
        ]
        got = jax.jit(jax.grad(loss, (0, 1, 2)))(*placed)
    assert worst(got, want) < 1e-12


def test_record_agrees_at_fixed_parameters():
    p, init, xs = weights(), draw(4, 2, 4), draw(5, 7, 2, 3)

    def step(p, c, x):
        c, y = step_with_head(p, c, x)
        return c, jnp.sum(y)

    rec = jaxbptt.record(step, window=3)

    def loss_fn(p, tape, x):
        return rec(p, tape, x)[::-1]

    @jax.jit
    def both(p):
        def body(tape, x):
            (_, tape), grad = jax.value_and_grad(loss_fn, has_aux=True)(p, tape, x)
            return tape, grad

        def loss(p):
            return jnp.sum(jaxbptt.scan(functools.partial(step, p), init, xs, window=3)[1])

        online = lax.scan(body, rec.init(p, init, xs[0]), xs)[1]
        return jax.grad(loss)(p), jax.tree.map(lambda g: g.sum(0), online)

    assert worst(*both(p)) < 1e-12


def test_a_pullback_that_cannot_be_batched_runs_one_chain_after_another():
    def host(a):
        return np.asarray(a) * 2.0

    @jax.custom_vjp
    def double(a):
        return 2.0 * a

    def back(_, ct):
        return (jax.pure_callback(host, jax.ShapeDtypeStruct(ct.shape, ct.dtype), ct),)

    double.defvjp(lambda a: (double(a), None), back)

    def run(scan, w, by, **how):
        def f(c, x):
            c = jnp.tanh(by(w * c) + x)
            return c, c**2

        return jnp.sum(scan(f, 0.1, draw(0, 6), **how)[1])

    with pytest.raises(NotImplementedError, match="vmap"):
        jax.vmap(jax.grad(lambda a: double(a) ** 2))(jnp.ones(2))
    grads = jax.jit(
        lambda w: [
            jax.grad(run, 1)(jaxbptt.scan, w, by, window=3) for by in (double, lambda a: 2.0 * a)
        ]
    )
    got, wanted = grads(0.2)
    np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_compiled_once_and_as_large_whatever_the_length():
    traced = []

    def size(length, window, every):
        def loss(w, xs):
            def f(c, x):
                traced.append(length)
                return jnp.tanh(c @ w + x), c

            return total(jaxbptt.scan(f, xs[0], xs, window=window, every=every))

        grad = jax.jit(jax.grad(loss))
        args = draw(0, 3, 3), draw(1, length, 2, 3)
        text = grad.lower(*args).as_text()
        grad(*args), grad(*args)
        return text.count("\n")

    sizes = {size(length, window, 1) for length, window in ((64, 4), (512, 4), (512, 64))}
    assert len(sizes) == 1
    assert traced == [64, 512, 512]


def test_parameter_values_are_not_stacked():
    def loss(scan, w, xs):
        def f(c, x):
            u = (w / jnp.linalg.norm(w)).astype(jnp.float32)
            return jnp.tanh(c @ u + x), None

        return jnp.sum(scan(f, xs[0], xs)[0])

    def ours(*a):
        return jaxbptt.scan(*a, window=None)

    w, xs = draw(0, 64, 64, dtype=jnp.float32), draw(1, 32, 1, 64, dtype=jnp.float32)
    text = jax.jit(jax.grad(lambda w: loss(ours, w, xs))).lower(w).as_text()
    assert "32x64x64" not in text


@pytest.mark.parametrize("bad", [0, -1, True, 1.5, "all"])
def test_window_and_every_must_be_positive_ints(bad):
    def f(c, x):
        return c + x, None

    with pytest.raises(ValueError, match="window must be an int of at least 1"):
        jaxbptt.scan(f, 0.0, jnp.ones(3), window=bad)
    with pytest.raises(ValueError, match="every must be an int of at least 1"):
        jaxbptt.scan(f, 0.0, jnp.ones(3), window=2, every=bad)
    with pytest.raises(ValueError, match="every must be an int of at least 1"):
        jaxbptt.scan(f, 0.0, jnp.ones(3), window=None, every=None)


def test_faults_are_those_of_lax_scan():
    def f(c, x):
        return c, x

    faults = [
        (f, 0.0, {"a": jnp.ones(3), "b": jnp.ones(4)}),
        (f, 0.0, jnp.ones(3), 4),
        (f, 0.0, None),
        (lambda c, x: (c, c, x), 0.0, jnp.ones(3)),
        (lambda c, x: ((c, c), x), 0.0, jnp.ones(3)),
        (lambda c, x: (jnp.ones(2), x), 0.0, jnp.ones(3)),
    ]
    for fault in faults:
        theirs, ours = refusal(lax.scan, *fault), refusal(jaxbptt.scan, *fault, window=2)
        assert type(ours) is type(theirs)
        # Further on, JAX 0.7 names the Python type that a leaf of init has inside its own trace.
        assert str(ours)[:100] == str(theirs)[:100]


def refusal(scan, *args, **how):
    try:
        scan(*args, **how)
    except (TypeError, ValueError) as refused:
        return refused
    raise AssertionError("not refused")


def test_xs_without_an_axis_over_steps():
    with pytest.raises(ValueError, match=r"every leaf, but got xs\['b'\]: float64\[\]. Let f"):
        jaxbptt.scan(lambda c, x: (c, x), 0.0, {"a": jnp.ones(3), "b": 1.0}, window=2)


def test_forward_mode_is_refused_by_jax():
    def run(w):
        return jaxbptt.scan(lambda c, x: (w * c + x, None), 0.0, jnp.ones(3), window=None)[0]

    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(run, (0.5,), (1.0,))


def test_what_cannot_be_called_is_refused_before_xs_are_looked_at():
    for window in (2, None):
        with pytest.raises(TypeError, match="f argument should be a callable"):
            jaxbptt.scan(42, 0.0, 1.0, window=window)


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="references came with JAX 0.8")
def test_rows_of_a_reference_are_read_and_written_where_nothing_is_cut():
    def loss(scan, xs):
        rows = jax.new_ref(xs)

        def step(c, row):
            row[...] = 2.0 * row[...]
            return c * row[...], None

        return scan(step, 1.0, rows)[0] + jnp.sum(rows[...] ** 2)

    xs = draw(0, 3)
    scans = functools.partial(jaxbptt.scan, window=None), lax.scan
    got, want = [jax.value_and_grad(functools.partial(loss, scan))(xs) for scan in scans]
    assert worst(got, want) < 1e-13


@pytest.mark.parametrize("window", [2, None])
def test_a_weakly_typed_argument_has_a_weakly_typed_gradient(window):
    weak, strong = jnp.full(3, 0.5), draw(0, 3)
    assert weak.weak_type
    assert not strong.weak_type

    def loss(w, init, xs):
        step = lambda c, x: (jnp.tanh(w * c + x), c)  # noqa: E731
        return jnp.sum(jaxbptt.scan(step, init, xs, window=window)[1])

    for args in ((weak, strong, strong[:, None]), (strong, weak, weak[:, None])):
        with jax.numpy_rank_promotion("allow"):
            grads = jax.grad(loss, (0, 1, 2))(*args)
        assert [g.weak_type for g in grads] == [v.weak_type for v in args]


def test_the_names_of_scopes_stay_on_the_operations_of_a_gradient():
    def run(w):
        def step(c, x):
            with jax.named_scope("the cell"):
                return jnp.tanh(w * c + x), None

        return jaxbptt.scan(step, 0.0, draw(0, 3), window=2)[0]

    text = jax.jit(jax.grad(run)).lower(0.5).as_text(debug_info=True)
    assert any("the cell" in line and "tanh" in line for line in text.splitlines())
    assert any("the cell" in line and "transpose" in line for line in text.splitlines())


def test_a_gradient_is_exported_for_any_length_and_batch():
    export = pytest.importorskip("jax.export")

    def grad(scan, w, xs):
        def loss(w):
            step = lambda c, x: (jnp.tanh(w * c + x), c)  # noqa: E731
            return jnp.sum(scan(step, jnp.zeros_like(xs[0]), xs)[1])

        return jax.grad(loss)(w)

    ours = jax.jit(functools.partial(grad, functools.partial(jaxbptt.scan, window=None)))
    length, batch = export.symbolic_shape("length, batch")
    xs = jax.ShapeDtypeStruct((length, batch), float)
    exported = export.export(ours)(jax.ShapeDtypeStruct((), float), xs)
    for shape in ((4, 3), (7, 2)):
        got, want = exported.call(0.7, draw(0, *shape)), grad(lax.scan, 0.7, draw(0, *shape))
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_without_jit_the_steps_run_one_by_one_as_under_lax_scan():
    def loss(scan, w):
        seen = []

        def step(c, x):
            seen.append(float(x))
            return (jnp.tanh(w * c + x), c) if x > 0.2 else (w * c, c)

        return jnp.sum(scan(step, 0.1, jnp.linspace(0.0, 1.0, 5))[1]), seen

    with jax.disable_jit():
        scans = functools.partial(jaxbptt.scan, window=None), lax.scan
        (got, seen), (want, _) = [
            jax.grad(functools.partial(loss, scan), has_aux=True)(0.5) for scan in scans
        ]
    np.testing.assert_allclose(got, want, rtol=1e-13)
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_works_with_jit_disabled():
    def run(w):
        return jaxbptt.scan(lambda c, x: (w * c + x, None), 0.0, jnp.arange(1.0, 5.0), window=2)[0]

    with jax.disable_jit():
        assert jax.grad(run)(0.5) == 5.5


def test_put_in_the_place_of_lax_scan(monkeypatch):
    """A library that one can't edit is tried so; flax passes an argument of its own."""

    def run(w):
        def body(c, x):
            return jnp.tanh(w * c + x), c**2

        return total(lax.scan(body, 0.1, jnp.arange(5.0), _split_transpose=False)[1])

    want = jax.value_and_grad(run)(0.7)
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jaxbptt.scan, window=None))
    got = jax.value_and_grad(run)(0.7)
    assert got[0] == want[0]
    np.testing.assert_allclose(got[1], want[1], rtol=1e-13)
    # What the library itself loops over is lax.scan all the same.
    rec = jaxbptt.record(lambda w, c, x: (jnp.tanh(w * c + x),) * 2, window=3)
    tape = rec.init(0.5, 0.1, 0.0)
    tape, _ = lax.scan(lambda tape, x: rec(0.5, tape, x), tape, jnp.arange(4.0))
    assert np.isfinite(rec.pullback(0.5, tape, jnp.ones(1)).params)
