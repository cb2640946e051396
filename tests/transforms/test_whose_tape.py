"""A tape belongs to the step that recorded it: another step's is refused, its own never."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import draw
from jax import lax
from jax.sharding import PartitionSpec as P
from meshes import entered, laid, mesh_of

import jaxbptt

XS = jnp.asarray([0.3, 0.2, 0.4])
OTHER = r"^tape must be of this recorder's step, but was recorded by a step that computes"


def scaled(scale, nonlinearity=jnp.tanh):
    def step(w, c, x):
        c = nonlinearity(scale * w * c + x)
        return c, c

    return step


def recorded(rec, w=0.5, xs=XS):
    tape = rec.init(w, 0.1, 0.0)
    for x in xs:
        tape, _ = rec(w, tape, x)
    return tape


def ways(rec, tape):
    """Everything that takes a tape and needs the step."""
    yield lambda: rec(0.5, tape, 0.1)
    yield lambda: jax.jit(rec)(0.5, tape, 0.1)
    yield lambda: rec.pullback(0.5, tape, jnp.ones(1))
    yield lambda: jax.grad(lambda w: rec(w, tape, 0.1)[1])(0.5)
    yield lambda: jaxbptt.gradient_by_lag(rec, 0.5, tape, jnp.ones(1))
    yield lambda: lax.scan(lambda tape, x: rec(0.5, tape, x), tape, XS)


def test_a_tape_that_a_jitted_function_closes_over():
    one, two = (jaxbptt.record(scaled(s), window=3) for s in (1.0, 3.0))
    blank = one.init(0.5, 0.1, 0.0)
    want = two(0.5, two.init(0.5, 0.1, 0.0), 0.3)[1]
    np.testing.assert_allclose(jax.jit(lambda w: two(w, blank, 0.3)[1])(0.5), want, rtol=1e-13)
    tape = recorded(one)
    with pytest.raises(ValueError, match=OTHER):
        jax.jit(lambda w: two(w, tape, 0.3))(0.5)


@pytest.mark.parametrize("weights", ["stored", "current", "replayed"])
def test_a_tape_of_another_step_with_the_same_slots_is_refused(weights):
    one, two = (jaxbptt.record(scaled(s), window=3, weights=weights) for s in (1.0, 3.0))
    tape = recorded(one)
    for way in ways(two, tape):
        with pytest.raises(ValueError, match=OTHER):
            way()


@jax.custom_jvp
def steep(v):
    return jnp.tanh(v)


@jax.custom_jvp
def flat(v):
    return jnp.tanh(v)


steep.defjvps(lambda t, out, v: t * (3.0 * jnp.sin(v)))
flat.defjvps(lambda t, out, v: t * (0.5 * jnp.sin(v)))
cell_step = scaled(1.0, lambda v: jnp.tanh(v) ** 2)


@pytest.mark.parametrize("weights", ["stored", "current"])
@pytest.mark.parametrize(
    ("one", "two"),
    [
        (scaled(1.0, steep), scaled(1.0, flat)),
        (cell_step, jax.checkpoint(cell_step)),
        (jax.checkpoint(cell_step), cell_step),
    ],
    ids=["another rule", "checkpoint added", "checkpoint taken away"],
)
def test_another_derivative_of_the_same_step_counts_where_it_is_on_the_ring(weights, one, two):
    tape = recorded(jaxbptt.record(one, window=3, weights=weights))
    for way in ways(jaxbptt.record(two, window=3, weights=weights), tape):
        with pytest.raises(ValueError, match=r"^tape must be of this recorder's step"):
            way()


def called_back(function):
    def step(w, c, x):
        c = jnp.tanh(w * c + jax.pure_callback(function, jax.typeof(x), x))
        return c, c

    return step


@pytest.mark.parametrize("weights", ["stored", "replayed"])
def test_another_callback_counts(weights):
    def times(number):
        return lambda v: np.asarray(v) * number

    how = {"window": 3, "weights": weights}
    tape = recorded(jaxbptt.record(called_back(lambda v: np.sin(v)), **how))
    jaxbptt.record(called_back(lambda v: np.sin(v)), **how)(0.5, tape, 0.1)
    with pytest.raises(ValueError, match=OTHER):
        jaxbptt.record(called_back(lambda v: np.cos(v)), **how)(0.5, tape, 0.1)
    tape = recorded(jaxbptt.record(called_back(times(2.0)), **how))
    jaxbptt.record(called_back(times(2.0)), **how)(0.5, tape, 0.1)
    with pytest.raises(ValueError, match=OTHER):
        jaxbptt.record(called_back(times(3.0)), **how)(0.5, tape, 0.1)


def test_carries_and_inputs_serve_any_derivative_of_the_step():
    one, two = (
        jaxbptt.record(step, window=3, weights="replayed")
        for step in (cell_step, jax.checkpoint(cell_step))
    )
    tape = recorded(one)
    want, got = (rec.pullback(0.5, tape, jnp.ones(1)).params for rec in (one, two))
    np.testing.assert_allclose(got, want, rtol=1e-13)


def test_another_operation_counts_and_another_number_inside_a_loop():
    tape = recorded(jaxbptt.record(scaled(2.0, jnp.sin), window=3))
    with pytest.raises(ValueError, match=OTHER):
        jaxbptt.record(scaled(2.0, jnp.cos), window=3)(0.5, tape, 0.1)

    def looped(number):
        def step(w, c, x):
            c = lax.fori_loop(0, 3, lambda _, c: jnp.sin(w * c + number * x), c)
            return c, c

        return jaxbptt.record(step, window=3)

    tape = recorded(looped(1.0))
    with pytest.raises(ValueError, match=OTHER):
        looped(1.5)(0.5, tape, 0.1)


def test_a_blank_tape_fits_whatever_step_comes_first():
    one, two = (jaxbptt.record(scaled(s), window=3) for s in (1.0, 3.0))
    right = recorded(two)
    tape = one.init(0.5, 0.1, 0.0)
    for x in XS:
        tape, _ = two(0.5, tape, x)
    got, want = (two.pullback(0.5, t, jnp.ones(1)) for t in (tape, right))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    cleared = one.clear(recorded(one))
    assert two(0.5, cleared, 0.1)[0].length == 1


@pytest.mark.parametrize("leak", [0.9, np.float64(0.9), jnp.array(0.9), jnp.asarray(0.9)])
def test_a_number_that_becomes_a_tracer_before_anything_is_recorded(leak):
    def recorder(leak):
        return jaxbptt.record(lambda w, c, x: (leak * c + w * x,) * 2, window=3)

    tape = recorder(leak).init(0.5, 0.0, XS[0])
    for x in XS:
        grad, tape = jax.grad(
            lambda a, x=x, tape=tape: recorder(a)(0.5, tape, x)[::-1], has_aux=True
        )(jnp.asarray(leak, float))
    want = jax.grad(lambda a: 0.5 * (a * a * XS[0] + a * XS[1] + XS[2]))(0.9)
    np.testing.assert_allclose(grad, want, rtol=1e-13)


def test_afterwards_it_is_refused_with_what_to_do():
    def recorder(leak):
        return jaxbptt.record(lambda w, c, x: (leak * c + w * x,) * 2, window=3)

    tape = recorded(recorder(0.9))
    with pytest.raises(ValueError, match=r"^tape must be of .* has to be an array \(jnp.asarray\)"):
        jax.grad(lambda a: recorder(a)(0.5, tape, 0.1)[1])(0.9)
    tape = recorded(recorder(jnp.asarray(0.9)))  # what it says
    assert np.isfinite(jax.grad(lambda a: recorder(a)(0.5, tape, 0.1)[1])(0.9))


# ---------------------------------------------------- its own step, traced another way

W, U, H = draw(0, 4, 4), draw(1, 3, 4), draw(2, 2, 4)
ROWS = draw(3, 5, 2, 3)
SCALE = jnp.asarray(0.9)


def cell(p, h, x):
    h = jnp.tanh(h @ p["w"] * SCALE + jnp.where(x @ p["u"] > 0, x @ p["u"], 0.1))
    return h, jnp.mean(h)


PARAMS = {"w": W, "u": U}
REC = jaxbptt.record(cell, window=3)


@functools.cache
def tape_of_cell():
    tape = REC.init(PARAMS, H, ROWS[0])
    for x in ROWS:
        tape, _ = REC(PARAMS, tape, x)
    return tape


def test_under_every_transformation_a_tape_stays_its_own():
    tape = tape_of_cell()

    def grad(p, tape, x):
        return jax.grad(lambda p: REC(p, tape, x)[1])(p)

    want = grad(PARAMS, tape, ROWS[0])
    many = jax.tree.map(lambda v: jnp.stack([v, v]), tape)
    found = {
        "jit": jax.jit(grad)(PARAMS, tape, ROWS[0]),
        "vmap": jax.tree.map(
            lambda v: v[0], jax.vmap(grad, (None, 0, None))(PARAMS, many, ROWS[0])
        ),
        "checkpoint": jax.checkpoint(grad)(PARAMS, tape, ROWS[0]),
        "remade": jax.grad(
            lambda p: jaxbptt.record(lambda *a: cell(*a), window=3)(p, tape, ROWS[0])[1]
        )(PARAMS),
    }
    for name, got in found.items():
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, err_msg=name)


@pytest.mark.exhaustive
def test_without_jit_a_tape_stays_its_own():
    with jax.disable_jit():
        assert REC(PARAMS, tape_of_cell(), ROWS[0])[0].length == 3


def times(array, v, place):
    """The product of a matrix and a vector, the matrix closed over in some place."""

    def product(v):
        return array @ v

    if place == "the step":
        return product(v)
    if place == "a jitted function":
        return jax.jit(product)(v)
    if place == "a jitted function in another":
        return jax.jit(lambda v: jax.jit(product)(v) * 1.0)(v)
    if place == "a branch":
        return lax.cond(v[0] > -99.0, product, lambda v: v, v)
    if place == "a loop":
        return lax.scan(lambda c, _: (product(c), None), v, None, length=1)[0]
    if place == "jax.checkpoint":
        return jax.checkpoint(product)(v)
    return jax.vmap(product)(v[None])[0]


PLACES = ["the step", "a jitted function", "a jitted function in another", "a branch", "a loop"]


@pytest.mark.parametrize("place", [*PLACES, "jax.checkpoint", "vmap"])
def test_an_array_may_change_wherever_it_is_closed_over(place):
    held = [draw(3, 4, 4)]
    rec = jaxbptt.record(
        lambda w, c, x: (jnp.tanh(times(held[0], w * c, place) + x),) * 2, window=2
    )
    tape, xs = rec.init(0.7, jnp.ones(4), jnp.zeros(4)), draw(5, 2, 4)
    tape, _ = rec(0.7, tape, xs[0])
    first, held[0] = held[0], draw(6, 4, 4)
    tape, _ = rec(0.7, tape, xs[1])

    def both(w):
        c = jnp.tanh(first @ (w * jnp.ones(4)) + xs[0])
        return jnp.sum(jnp.tanh(held[0] @ (w * c) + xs[1]))

    got = rec.pullback(0.7, tape, jnp.ones((1, 4))).params
    np.testing.assert_allclose(got, jax.grad(both)(0.7), rtol=1e-12)


@pytest.mark.parametrize("place", [*PLACES, "jax.checkpoint", "vmap"])
def test_an_array_that_becomes_a_tracer_wherever_it_is_closed_over(place):
    def recorder(array):
        def step(w, c, x):
            c = jnp.tanh(times(array, w * c, place) + array[0] + x)
            return c, c

        return jaxbptt.record(step, window=2)

    array, zero = draw(3, 4, 4), jnp.zeros(4)
    tape, _ = recorder(array)(0.7, recorder(array).init(0.7, jnp.ones(4), zero), zero)

    @jax.jit
    def last(array):
        return jnp.sum(recorder(array)(0.7, tape, zero)[1])

    def both(array):
        c = jnp.tanh(array @ (0.7 * jnp.ones(4)) + array[0])
        return jnp.sum(jnp.tanh(array @ (0.7 * c) + array[0]))

    np.testing.assert_allclose(jax.grad(last)(array), jax.grad(both)(array), rtol=1e-12)


@pytest.mark.parametrize("weights", ["stored", "current", "replayed"])
def test_an_array_in_a_rule_is_part_of_the_step_where_each_step_has_its_own(weights):
    def recorder(array):
        @jax.custom_vjp
        def product(v):
            return array @ v

        product.defvjp(lambda v: (array @ v, None), lambda _, ct: (array.T @ ct,))
        step = lambda w, c, x: (jnp.tanh(product(w * c) + x),) * 2  # noqa: E731
        return jaxbptt.record(step, window=2, weights=weights)

    one, two, zero = recorder(draw(3, 4, 4)), recorder(draw(6, 4, 4)), jnp.zeros(4)
    tape, _ = one(0.7, one.init(0.7, jnp.ones(4), zero), zero)
    jax.jit(one)(0.7, tape, zero)
    if weights == "stored":
        with pytest.raises(ValueError, match=OTHER):
            two(0.7, tape, zero)
    else:
        two(0.7, tape, zero)


def test_arrays_that_the_step_closes_over_may_change():
    def recorder(scale):
        return jaxbptt.record(lambda w, c, x: (jnp.tanh(scale * w * c + x),) * 2, window=3)

    tape = recorded(recorder(jnp.asarray(1.0)))
    assert np.isfinite(recorder(jnp.asarray(3.0)).pullback(0.5, tape, jnp.ones(1)).params)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_a_tape_brought_to_a_mesh_and_off_it_stays_its_own():
    mesh = mesh_of(data=2)
    with entered(mesh):
        p, h, x = laid(mesh, (P(), P("data"), P("data")), (PARAMS, H, ROWS[0]))
        there = jax.jit(lambda p, h, x: REC(p, REC.init(p, h, x), x)[0])(p, h, x)
        there, _ = jax.jit(REC)(p, there, x)
        here = jax.device_put(tape_of_cell(), jax.sharding.NamedSharding(mesh, P()))
        assert jax.jit(REC)(p, here, x)[0].length == 3
    here = jax.device_put(jax.device_get(there))
    assert jax.jit(REC)(PARAMS, here, ROWS[0])[0].length == 3


def gated(p, c, x):
    z = jax.nn.sigmoid(c @ p["w"] + x)
    h = z * c + (1 - z) * jnp.tanh(x * p["b"])
    return h, h


def of_sizes(p, c, x):
    h = jnp.tanh(jnp.abs(c @ p["w"] + x)) + jax.nn.relu(x)
    return h, h


def of_powers(p, c, x):
    h = jnp.tanh((c @ p["w"] + x) ** 2 + jnp.abs(x) ** p["b"])
    return h, h


def in_a_loop(p, c, x):
    h, _ = lax.scan(lambda h, _: (jnp.tanh(0.5 * h @ p["w"] + 1.0), None), c, None, length=2)
    return h + x, h


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("step", [gated, of_sizes, of_powers, in_a_loop])
@pytest.mark.parametrize("place", ["batch over devices", "shard_map", "set_mesh"])
@pytest.mark.parametrize("weights", ["stored", "current"])
def test_an_empty_tape_goes_to_a_mesh_under_jit(step, place, weights):
    """A mesh moves equations, and merges others than there are without one."""
    mesh = mesh_of(data=2)
    params, c, x = {"w": jnp.eye(4), "b": jnp.ones((1, 4))}, jnp.zeros((8, 4)), draw(1, 8, 4)
    rec = jaxbptt.record(step, window=3, weights=weights)
    tape = rec.init(params, c, x)

    def gradient(params, tape, x):
        return jax.grad(lambda p: jnp.sum(rec(p, tape, x)[1]))(params)

    want = gradient(params, tape, x)
    if place == "shard_map":
        run = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P(), P()), out_specs=P())
        got = jax.jit(run)(params, tape, x)
    elif place == "set_mesh":
        with entered(mesh):
            got = jax.jit(gradient)(params, tape, x)
    else:
        put = functools.partial(jax.device_put, device=jax.sharding.NamedSharding(mesh, P("data")))
        got = jax.jit(gradient)(params, tape.replace(carry=put(c)), put(x))
    jax.tree.map(lambda v, w: np.testing.assert_allclose(v, w, rtol=1e-12, atol=1e-15), got, want)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_a_replicated_tape_under_shard_map():
    mesh = mesh_of(data=2)
    tape = tape_of_cell()

    def local(p, tape, x):
        return lax.pmean(REC(p, tape, x)[1], "data")

    run = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P()), out_specs=P(), check_vma=False)
    got, want = jax.jit(run)(PARAMS, tape, ROWS[0]), REC(PARAMS, tape, ROWS[0])[1]
    np.testing.assert_allclose(got, want, rtol=1e-12)


# ------------------------------------------------- containers that a step writes into


def test_a_step_may_write_into_the_containers_that_it_is_given():
    def step(w, carry, x):
        carry["h"] = jnp.tanh(w * carry.pop("old") + x.pop("u"))
        carry["old"] = carry.pop("h")
        return carry, carry["old"]

    def as_usual(w, carry, x):
        h = jnp.tanh(w * carry["old"] + x["u"])
        return {"old": h}, h

    def gradients(f):
        x, carry = {"u": jnp.asarray(0.3)}, {"old": jnp.asarray(0.1)}
        rec = jaxbptt.record(f, window=2)
        tape, _ = rec(0.5, rec.init(0.5, carry, x), x)
        yield jax.grad(lambda w: rec(w, tape, x)[1])(0.5)

        def loss(w):
            how = {"window": 2}
            return jaxbptt.scan(lambda c, x: f(w, c, x), carry, {"u": XS}, **how)[1].sum()

        yield jax.grad(loss)(0.5)
        assert list(x) == ["u"]
        assert list(carry) == ["old"]

    assert list(gradients(step)) == list(gradients(as_usual))


def test_a_carry_written_in_place_is_held_to_its_type():
    def step(w, carry, x):
        carry["h"] = (w * carry["h"] + x).astype(jnp.bfloat16)
        return carry, x

    with pytest.raises(TypeError, match=r"^step must return a carry of the type it was given"):
        jaxbptt.record(step, window=2).init(0.5, {"h": jnp.zeros(2)}, jnp.ones(2))


def test_parameters_changed_in_place_are_refused():
    def step(p, c, x):
        p["count"] = p["count"] + 1
        return p["w"] * c + x, c

    params = {"w": jnp.asarray(0.5), "count": jnp.asarray(0)}
    with pytest.raises(TypeError, match=r"it changed params\['count'\] in place, .* from_nnx or"):
        jaxbptt.record(step, window=2).init(params, jnp.asarray(0.1), jnp.asarray(0.2))


def test_how_exactly_products_are_computed_is_no_part_of_the_step():
    tape = tape_of_cell()
    with jax.default_matmul_precision("default"):
        assert jax.jit(REC)(PARAMS, tape, ROWS[0])[0].length == 3


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="needs jax.set_mesh")
@pytest.mark.parametrize("inner", ["cond", "scan"])
def test_a_step_with_programs_inside_it_on_a_mesh_that_came_later(inner):
    def step(w, c, x):
        if inner == "cond":
            c = lax.cond(
                w.sum() > 0, lambda c: jnp.tanh(c @ w + x), lambda c: c + jnp.zeros((1, 4)), c
            )
        else:
            c = lax.scan(lambda c, _: (jnp.tanh(c @ w + x + jnp.ones((1, 4))), None), c, None, 2)[0]
        return c, c.sum()

    rec = jaxbptt.record(step, window=3)
    tape = rec.init(W, H, H)
    tape, _ = rec(W, tape, H)
    with entered(mesh_of(data=2)):
        assert jax.jit(rec)(W, tape, H)[0].length == 2


@pytest.mark.parametrize("weights", ["stored", "current", "replayed"])
def test_a_step_that_repeats_itself_takes_its_tape_into_a_map(weights):
    """Inside, each of two equal products has a copy of w that varies over the mesh, and 0.1 too."""

    def step(w, c, x):
        c = jnp.tanh(w * x + c) + jnp.sin(w * x) + 0.1 * (w * x) + jnp.cos(w) * c + jnp.cos(w) * x
        return c, jnp.sum(c)

    rec = jaxbptt.record(step, window=2, weights=weights)
    w, rows, lots = jnp.asarray(0.5), jnp.asarray(draw(0, 3, 4, 2)), jnp.zeros((4, 2))
    tapes = jax.vmap(lambda c, x: rec.init(w, c, x))(lots, rows[0])

    def one(w, tape, x):
        grad = jax.grad(lambda w: rec(w, tape, x)[1])(w)
        return rec(w, tape, x)[0], grad

    def of_first(w, tape, x):  # the part of a device has one row
        made = one(w, *jax.tree.map(lambda v: v[0], (tape, x)))
        return jax.tree.map(lambda v: v[None], made)

    specs = {"in_specs": (P(), P("d"), P("d")), "out_specs": P("d")}
    mapped = jax.jit(jax.shard_map(of_first, mesh=mesh_of(d=4), **specs))
    alone = jax.jit(jax.vmap(one, (None, 0, 0)))
    want = tapes
    if weights == "stored":  # cos(w) is the same on all devices, but came in as if it were not
        with pytest.raises(ValueError, match=r"^tape must not vary over the mesh axes \('d'\)"):
            mapped(w, tapes, rows[0])
        return
    for x in rows:
        tapes, grads = mapped(w, tapes, x)
        want, wanted = alone(w, want, x)
    np.testing.assert_allclose(tapes.carry, want.carry, rtol=1e-12)
    # w is the same on all devices: JAX sums its gradient over them.
    np.testing.assert_allclose(grads, np.full(4, wanted.sum()), rtol=1e-12)
