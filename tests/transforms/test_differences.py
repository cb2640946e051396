"""What `scan` does otherwise than `lax.scan`: a test for each row of the documentation's table."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import ROOT, draw, worst
from jax import lax
from jax.experimental import io_callback
from jaxpr_reading import inner, primitives

import jaxbptt

whole = functools.partial(jaxbptt.scan, window=None)
windowed = functools.partial(jaxbptt.scan, window=2)
XS = draw(0, 6)


def rows():
    page = (ROOT / "docs" / "semantics.md").read_text("utf-8")
    section = page.split("## What differs from `lax.scan`\n")[1].split("\n## ")[0]
    return re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)[1:]


def test_that_rows_and_tests_are_the_same():
    tests = [name for name in globals() if name.startswith("test_")]
    tests.remove("test_that_rows_and_tests_are_the_same")
    assert tests == ["test_" + re.sub(r"\W+", "_", row.lower()).strip("_") for row in rows()]


def cell(w, c, x):
    c = jnp.tanh(w * c + x)
    return c, c**2


def run(scan, w, xs=XS, **how):
    """The sum of what all steps put out."""
    return jnp.sum(scan(functools.partial(cell, w), 0.1, xs, **how)[1])


def equations(jaxpr):
    """The equations of a program and of those inside."""
    for eqn in jaxpr.eqns:
        yield eqn
        for each in inner(eqn):
            yield from equations(each)


# -------------------------------------------------------------- what a window says


def test_what_is_cut_off():
    def loss(scan, init):
        return jnp.sum(scan(lambda c, x: (0.5 * c + x,) * 2, init, XS)[1])

    got, of_whole, of_lax = [
        jax.grad(functools.partial(loss, s))(1.0) for s in (windowed, whole, lax.scan)
    ]
    assert got == 0.5 + 0.25
    assert of_whole == of_lax == sum(0.5**k for k in range(1, 7))


def test_a_carry_that_stays_as_it_is():
    def loss(scan, w):
        return scan(lambda c, x: ((c[0], c[0] * c[1] + x), None), (w, 0.1), XS)[0][1]

    def closed_over(w):
        return windowed(lambda c, x: (w * c + x, None), 0.1, XS)[0]

    assert jax.grad(functools.partial(loss, windowed))(0.7) == 0  # the first step is out of reach
    by_hand = [0.1]
    for x in np.asarray(XS):
        by_hand.append(0.7 * by_hand[-1] + x)
    np.testing.assert_allclose(jax.grad(closed_over)(0.7), by_hand[-2] + 0.7 * by_hand[-3])
    got, want = (jax.grad(functools.partial(loss, scan))(0.7) for scan in (whole, lax.scan))
    np.testing.assert_allclose(got, want, rtol=1e-13)


def test_rules_that_are_not_linear():
    @jax.custom_vjp
    def halved_at_most(v):
        return v

    halved_at_most.defvjp(lambda v: (v, None), lambda _, ct: (jnp.minimum(ct, 0.5),))

    def loss(scan, xs):
        return jnp.sum(scan(lambda c, x: (halved_at_most(c) + x,) * 2, 0.0, xs)[1])

    by_lax, by_none, each = [
        jax.grad(functools.partial(loss, scan))(jnp.ones(3))
        for scan in (lax.scan, whole, functools.partial(jaxbptt.scan, window=3))
    ]
    assert by_lax.tolist() == by_none.tolist() == [1.5, 1.5, 1.0]
    assert each.tolist() == [2.0, 1.5, 1.0]  # 1 of its own output, a half of each later one


# ------------------------------------------------------------ side effects, references


def test_side_effects_in_pullbacks():
    seen = []

    @jax.custom_vjp
    def watched(v):
        return v

    def back(_, ct):
        jax.debug.callback(lambda ct: seen.append(float(ct)), ct)
        return (ct,)

    watched.defvjp(lambda v: (v, None), back)

    def how_often(scan):
        loss = lambda w: jnp.sum(scan(lambda c, x: cell(w, watched(c), x), 0.1, XS)[1])  # noqa: E731
        seen.clear()
        jax.block_until_ready(jax.grad(loss)(0.5))
        jax.effects_barrier()
        return len(seen)

    assert how_often(lax.scan) == how_often(whole) == 6
    assert how_often(windowed) == 6 + 5


def test_side_effects_of_steps():
    def how_often(scan):
        seen = []

        def step(c, x):
            io_callback(lambda x: seen.append(float(x)), None, x, ordered=True)
            return c * x, None

        jax.block_until_ready(jax.grad(lambda c: scan(step, c, XS)[0])(0.5))
        jax.effects_barrier()
        return len(seen)

    assert how_often(whole) == how_often(windowed) == 6
    assert how_often(lax.scan) == 0


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="references came with JAX 0.8")
def test_references_from_outside():
    def count(scan):
        steps = jax.new_ref(jnp.zeros(()))

        def step(c, x):
            steps[...] += 1.0
            return c + x, None

        scan(step, 0.0, XS)
        return steps[...]

    assert count(whole) == 6
    with pytest.raises(TypeError, match="must not close over a mutable reference"):
        count(windowed)


# --------------------------------------------------------------- transformations of JAX


@pytest.mark.parametrize("scan", [whole, windowed])
def test_forward_mode(scan):
    loss = functools.partial(run, scan)
    for transform in (lambda f: jax.jvp(f, (0.5,), (1.0,)), lambda f: jax.jacfwd(f)(0.5)):
        with pytest.raises(TypeError, match="forward-mode"):
            transform(loss)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.linearize(loss, 0.5)[1](1.0)
    assert jax.hessian(loss)(0.5) == jax.jvp(jax.grad(loss), (0.5,), (1.0,))[1] != 0
    if scan is whole:
        np.testing.assert_allclose(
            jax.hessian(loss)(0.5), jax.hessian(functools.partial(run, lax.scan))(0.5), rtol=1e-12
        )


def test_linear_transpose():
    def linear(scan, c):
        return scan(lambda c, x: (x * c, 2.0 * c), c, XS)

    start, ct = jnp.float64(1.0), (jnp.float64(3.0), jnp.ones(6))
    with pytest.raises(NotImplementedError, match="custom_vjp"):
        jax.linear_transpose(functools.partial(linear, whole), start)(ct)
    (got,) = jax.vjp(functools.partial(linear, whole), start)[1](ct)
    (want,) = jax.linear_transpose(functools.partial(linear, lax.scan), start)(ct)
    np.testing.assert_allclose(got, want, rtol=1e-13)


def test_jit_disabled():
    def loss(scan, c):
        return scan(lambda c, x: (c * x if x > 0 else c + x, None), c, XS)[0]

    with jax.disable_jit():
        got, want = (jax.grad(functools.partial(loss, scan))(0.5) for scan in (whole, lax.scan))
        assert got == want
        with pytest.raises(jax.errors.TracerBoolConversionError, match="traced array"):
            loss(windowed, 0.5)
        assert jax.grad(functools.partial(run, windowed))(0.5) != 0


# ------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("scan", [whole, windowed])
def test_half_precisions(scan):
    def loss(scan, w):
        return jnp.sum(scan(lambda c, _: (c, w), (), length=1000)[1].astype(jnp.float32))

    w = jnp.bfloat16(1.0)
    assert jax.grad(functools.partial(loss, scan))(w) == 1000
    assert jax.grad(functools.partial(loss, lax.scan))(w) == 256  # beyond, 1 is rounded off


def test_order_of_sums():
    w, xs = draw(1, 12, 12), draw(2, 50, 12)

    def loss(scan, w):
        return jnp.sum(scan(lambda c, x: (jnp.tanh(w @ c + x),) * 2, jnp.zeros(12), xs)[1] ** 2)

    def steps_in_a_product(scan):
        """Of each product with the weight's shape, over how many axes it sums."""
        jaxpr = jax.make_jaxpr(jax.grad(functools.partial(loss, scan)))(w).jaxpr
        found = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
        found = [e for e in found if e.outvars[0].aval.shape == w.shape]
        return [len(e.params["dimension_numbers"][0][0]) for e in found]

    values = [jax.jit(functools.partial(loss, scan))(w) for scan in (whole, windowed, lax.scan)]
    assert values[0] == values[1] == values[2]
    grads = [jax.grad(functools.partial(loss, scan))(w) for scan in (whole, lax.scan)]
    assert worst(*grads) < 1e-12
    assert steps_in_a_product(lax.scan) == [0]  # of two vectors, at each step
    assert set(steps_in_a_product(whole)) == {1}  # over the steps of a block


def test_unrolling():
    def unrolled(scan):
        jaxpr = jax.make_jaxpr(jax.grad(functools.partial(run, scan, unroll=2)))(0.5).jaxpr
        return [e.params["unroll"] for e in equations(jaxpr) if e.primitive.name == "scan"]

    assert set(unrolled(lax.scan)) == {2}
    assert unrolled(whole) == [2, 1]
    programs = [
        jax.make_jaxpr(jax.grad(functools.partial(run, whole, _split_transpose=split)))(0.5)
        for split in (False, True)
    ]
    assert str(programs[0]) == str(programs[1])


# --------------------------------------------------------------------- before it runs


def test_faults():
    xs = {"a": jnp.ones(3), "b": 1.0}
    for scan in (whole, windowed):
        with pytest.raises(ValueError, match=r"every leaf, but got xs\['b'\]"):
            scan(lambda c, x: (c, x), 0.0, xs)
    with pytest.raises(ValueError, match="scan got value with no leading axis"):
        lax.scan(lambda c, x: (c, x), 0.0, xs)


def test_the_traced_program():
    def top(scan):
        return {e.primitive.name for e in jax.make_jaxpr(functools.partial(run, scan))(0.5).eqns}

    assert "scan" in top(lax.scan)
    for scan in (whole, windowed):
        assert "scan" not in top(scan)
        jaxpr = jax.make_jaxpr(functools.partial(run, scan))(0.5).jaxpr
        assert primitives(jaxpr)["scan"] == 1


def test_cost_of_tracing():
    def traces(scan, jit):
        seen = []

        def step(c, x):
            seen.append(1)
            return cell(0.5, c, x)

        call = jit(lambda xs: scan(step, 0.1, xs)[0])
        for _ in range(3):
            call(XS)
        return len(seen)

    assert traces(lax.scan, lambda f: f) == traces(whole, lambda f: f) == 1
    assert traces(windowed, lambda f: f) == 3
    assert traces(windowed, jax.jit) == 1
