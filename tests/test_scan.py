"""`scan` against an unrolled graph for each group, and against `lax.scan` where nothing is cut."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxbptt

KEYS = jax.random.split(jax.random.key(0), 9)


def draw(i, *shape):
    return 0.6 * jax.random.normal(KEYS[i], shape)


def weights():
    return {"w": draw(0, 4, 4), "u": draw(1, 3, 4), "b": draw(2, 1, 4), "v": draw(3, 4, 2)}


def with_head(p):
    def f(c, x):
        h = jnp.tanh(c @ p["w"] + x @ p["u"] + p["b"])
        return h, (h @ p["v"]) ** 2

    return f


def bare(p):
    def f(c, x):
        h = jnp.tanh(c @ p["w"] + x @ p["u"] + p["b"])
        return h, h

    return f


def unrolled(f, init, xs, ct_ys, ct_carry, window, every, reverse):
    """Each group's graph on its own, from a detached carry; the sum of what it sends back."""
    length = xs.shape[0]
    row = list(range(length))[::-1] if reverse else list(range(length))
    carries = [init]
    for t in range(length):
        carries.append(f(carries[-1], xs[row[t]])[0])
    total = 0.0
    for first in range(1, length + 1, every):
        end = min(first + every - 1, length)
        reach = max(1, first - max(window - every, 0), end - window + 1)
        c = init if reach == 1 else lax.stop_gradient(carries[reach - 1])
        for s in range(reach, end + 1):
            c, y = f(c, xs[row[s - 1]])
            if s >= first:
                total += jnp.sum(y * ct_ys[row[s - 1]])
        if end == length:
            total += jnp.sum(c * ct_carry)
    return total


def worst(got, wanted):
    """The largest error, relative to each leaf's largest value (to 1 where that is zero)."""

    def one(a, b):
        scale = float(np.max(np.abs(b), initial=0.0)) or 1.0
        return float(np.max(np.abs(a - b), initial=0.0)) / scale

    return max(jax.tree.leaves(jax.tree.map(one, got, wanted)))


@pytest.mark.parametrize("make", [with_head, bare])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3, 8])
@pytest.mark.parametrize("window", [1, 2, 3, 5, 9, 20])
def test_every_relation_of_window_and_every(window, every, reverse, make):
    for length in (7,) if reverse else (1, 7):
        out = 2 if make is with_head else 4
        p, init, xs = weights(), draw(4, 2, 4), draw(5, length, 2, 3)
        ct_ys, ct_carry = draw(6, length, 2, out), draw(7, 2, 4)

        def ours(p, init, xs, ct_ys=ct_ys, ct_carry=ct_carry):
            f = make(p)
            c, ys = jaxbptt.scan(f, init, xs, reverse=reverse, window=window, every=every)
            return jnp.sum(ys * ct_ys) + jnp.sum(c * ct_carry)

        def oracle(p, init, xs, ct_ys=ct_ys, ct_carry=ct_carry):
            return unrolled(make(p), init, xs, ct_ys, ct_carry, window, every, reverse)

        args = p, init, xs
        assert worst(jax.grad(ours, (0, 1, 2))(*args), jax.grad(oracle, (0, 1, 2))(*args)) < 1e-12


def test_a_short_window_differs_from_full():
    p, init, xs = weights(), draw(4, 2, 4), draw(5, 7, 2, 3)

    def grad(**how):
        return jax.grad(lambda p: jnp.sum(jaxbptt.scan(with_head(p), init, xs, **how)[1]))(p)

    assert worst(grad(window=3), grad(window=None)) > 1e-3
    assert worst(grad(window=7), grad(window=None)) < 1e-14
    assert worst(grad(window=7, every=4), grad(window=None)) > 1e-4
    assert worst(grad(window=10, every=4), grad(window=None)) < 1e-14


def same_as_lax(run, *args, tolerance=1e-12):
    """`run(scan, *args)` is a scalar: its value is lax.scan's, and so is its gradient."""

    def ours(*a, **k):
        return jaxbptt.scan(*a, **k, window=None)

    n = tuple(range(len(args)))
    got = jax.value_and_grad(lambda *a: run(ours, *a), n)(*args)
    wanted = jax.value_and_grad(lambda *a: run(lax.scan, *a), n)(*args)
    assert run(ours, *args) == run(lax.scan, *args)  # to the bit
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
    for outer_ours, inner_ours in itertools.product((False, True), repeat=2):

        def run(scan, w, xs, outer_ours=outer_ours, inner_ours=inner_ours):
            outer, inner = (scan if o else lax.scan for o in (outer_ours, inner_ours))

            def row(c, r):
                return inner(lambda c, x: (jnp.tanh(w * c + x), c * x), c, r)

            return total(outer(row, 0.1, xs))

        same_as_lax(run, 0.7, xs)


@pytest.mark.parametrize("window", [2, None])
def test_batched_by_vmap_each_argument_alone(window):
    def run(w, init, xs):
        def f(c, x):
            c = jnp.tanh(w * c + x)
            return c, c**2

        return total(jaxbptt.scan(f, init, xs, window=window))

    grad = jax.grad(run, (0, 1, 2))
    many, one = (draw(0, 3), draw(1, 3), draw(2, 3, 6)), (draw(3), draw(4), draw(5, 6))
    for batched in itertools.product((False, True), repeat=3):
        if any(batched):
            args = [m if b else o for m, o, b in zip(many, one, batched, strict=True)]
            got = jax.vmap(grad, [0 if b else None for b in batched])(*args)
            for i in range(3):
                row = [a[i] if b else a for a, b in zip(args, batched, strict=True)]
                assert worst(jax.tree.map(lambda v, i=i: v[i], got), grad(*row)) < 1e-12


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

    assert lax.while_loop(lambda v: v < 10, body, 0.0) == 12


@pytest.mark.parametrize("window", [2, None])
def test_donated_buffers_and_static_arguments(window):
    def run(scan, p, init, xs, power, **how):
        return jnp.sum(scan(bare(p), init, xs, **how)[1] ** power)

    def update(p, init, xs, power):
        grad = jax.grad(run, 1)(jaxbptt.scan, p, init, xs, power, window=window)
        return jax.tree.map(lambda a, b: a - 0.1 * b, p, grad)

    p, init, xs = weights(), draw(4, 2, 4), draw(5, 7, 2, 3)
    p.pop("v")
    wanted = [update(p, init, xs, power) for power in (2, 3)]
    donating = jax.jit(update, static_argnums=3, donate_argnums=0)
    for power, want in zip((2, 3), wanted, strict=True):
        given = jax.tree.map(jnp.copy, p)
        assert worst(donating(given, init, xs, power), want) < 1e-13
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))


@pytest.mark.parametrize("carry", [0, (), jax.random.key(0)], ids=["int", "none", "key"])
def test_no_carry_that_gradients_flow_through(carry):
    def run(scan, w, xs, **how):
        return jnp.sum(scan(lambda c, x: (c, jnp.tanh(w @ x)), carry, xs, **how)[1])

    w, xs = draw(0, 3, 3), draw(1, 6, 3)
    for window, every in ((2, 1), (5, 2), (3, 3)):
        ours = functools.partial(jaxbptt.scan, window=window, every=every)
        got, want = (jax.grad(functools.partial(run, scan))(w, xs) for scan in (ours, lax.scan))
        assert worst(got, want) < 1e-13


def test_outputs_that_are_inputs_have_no_gradient_where_none_is_due():
    for f in (lambda c, x: (0.5 * c + x, x), lambda c, x: (0.5 * c + x, x * 1.0)):
        got = jax.grad(lambda xs, f=f: jnp.sum(jaxbptt.scan(f, 0.0, xs, window=1, every=3)[1]))(
            jnp.ones(6)
        )
        assert got.tolist() == [0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("window", [2, None])
def test_second_order(window):
    xs = draw(0, 5)

    def run(w, cut):
        def f(c, x):
            c = jnp.tanh(w * c + x)
            return c, c**2

        if cut:
            return jnp.sum(jaxbptt.scan(f, 0.1, xs, window=window)[1])
        ones = jnp.ones(5)
        return unrolled(f, jnp.asarray(0.1), xs, ones, 0.0, window or 5, 1, False)

    def first(w):
        return jax.grad(run)(w, True)

    w, eps = 0.7, 1e-5
    wanted = (first(w + eps) - first(w - eps)) / (2 * eps)
    np.testing.assert_allclose(first(w), jax.grad(run)(w, False), rtol=1e-12)
    np.testing.assert_allclose(jax.grad(first)(w), wanted, rtol=1e-7)
    np.testing.assert_allclose(jax.jvp(first, (w,), (1.0,))[1], wanted, rtol=1e-7)


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
    assert worst(jax.grad(sharded)(w, xs), jax.grad(alone)(w, xs)) < 1e-12


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("window", [2, None])
@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_a_batch_laid_over_devices(window, kind):
    def loss(w, init, xs):
        def f(c, x):
            c = jnp.tanh(c @ w + x)
            return c, jnp.sum(c**2)

        return jnp.sum(jaxbptt.scan(f, init, xs, window=window)[1])

    args = draw(0, 3, 3), draw(1, 8, 3), draw(2, 5, 8, 3)
    want = jax.grad(loss, (0, 1, 2))(*args)
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
        c, y = with_head(p)(c, x)
        return c, jnp.sum(y)

    rec = jaxbptt.record(step, window=3)

    def loss_fn(p, tape, x):
        return rec(p, tape, x)[::-1]

    def body(tape, x):
        (_, tape), grad = jax.value_and_grad(loss_fn, has_aux=True)(p, tape, x)
        return tape, grad

    grads = lax.scan(body, rec.init(p, init, xs[0]), xs)[1]
    ours = jax.grad(
        lambda p: jnp.sum(jaxbptt.scan(lambda c, x: step(p, c, x), init, xs, window=3)[1])
    )(p)
    assert worst(ours, jax.tree.map(lambda g: g.sum(0), grads)) < 1e-12


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
    got = jax.grad(lambda w: run(jaxbptt.scan, w, double, window=3))(0.2)
    wanted = jax.grad(lambda w: run(jaxbptt.scan, w, lambda a: 2.0 * a, window=3))(0.2)
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

    w, xs = draw(0, 64, 64).astype(jnp.float32), draw(1, 32, 1, 64).astype(jnp.float32)
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


def test_works_with_jit_disabled():
    def run(w):
        return jaxbptt.scan(lambda c, x: (w * c + x, None), 0.0, jnp.arange(1.0, 5.0), window=2)[0]

    with jax.disable_jit():
        assert jax.grad(run)(0.5) == 5.5
