"""What the library assumes about JAX, one named test for each assumption."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jax.sharding import PartitionSpec as P
from jaxpr_reading import inner

F32 = jnp.float32
X = jnp.asarray([0.5, -1.0, 2.0], F32)
W = jnp.asarray(np.arange(9.0).reshape(3, 3), F32)


def cell(w, c):
    return jnp.tanh(c @ w)


def leaf_types(tree):
    avals = [jax.typeof(leaf) for leaf in jax.tree.leaves(tree)]
    return [(aval.shape, aval.dtype, aval.weak_type) for aval in avals]


def equations(function, *args):
    """Every equation of a function's jaxpr, those of inner jaxprs included."""
    found = []

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            found.append(eqn)
            for body in inner(eqn):
                visit(body)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return found


def equation(function, *args, name):
    named = [eqn for eqn in equations(function, *args) if eqn.primitive.name == name]
    assert named, f"no primitive is called {name} here any more"
    return named[0]


# ------------------------------------------------------------------ jax.vjp's closure


def test_a_vjp_closure_is_a_pytree_of_arrays():
    _, pull = jax.vjp(cell, W, X)
    leaves = jax.tree.leaves(pull)
    assert leaves
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)


def test_a_vjp_closure_flattens_in_one_trace_and_rebuilds_in_another():
    treedefs = []

    @jax.jit
    def residuals(w, c):
        leaves, treedef = jax.tree.flatten(jax.vjp(cell, w, c)[1])
        treedefs.append(treedef)
        return leaves

    # Numbers that do not saturate: 1 - tanh² of a large one is zero but for rounding.
    small = 0.01 * X
    leaves = residuals(W, small)
    pulled = jax.jit(lambda leaves, ct: treedefs[0].unflatten(leaves)(ct))(leaves, X)
    for got, expected in zip(pulled, jax.vjp(cell, W, small)[1](X), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_two_traces_of_one_step_give_unequal_treedefs():
    # The reason why the ring holds leaves, and not closures.
    first, second = (jax.tree.structure(jax.vjp(cell, W, X)[1]) for _ in range(2))
    assert first != second


def test_a_vjp_closure_cannot_be_carried_through_scan():
    def body(pull, _):
        return jax.vjp(cell, W, X)[1], None

    with pytest.raises(
        TypeError,
        match="carry",
    ):
        lax.scan(body, jax.vjp(cell, W, X)[1], length=2)


def test_residuals_have_the_same_types_traced_jitted_and_scanned():
    types = []

    def step(c, _):
        types.append(leaf_types(jax.vjp(cell, W, c)[1]))
        return cell(W, c), None

    for run in (step, jax.jit(step), lambda c, _: lax.scan(step, c, length=2)):
        jax.make_jaxpr(run)(X, None)
    assert types[0]
    assert all(kinds == types[0] for kinds in types)


def test_a_weakly_typed_argument_gives_residuals_of_another_type():
    # The reason why arguments are made canonical first.
    def types(c):
        found = []
        jax.make_jaxpr(lambda c: found.extend(leaf_types(jax.vjp(jnp.sin, c)[1])) or c)(c)
        return found

    assert types(2.0) != types(jnp.asarray(2.0, jnp.result_type(float)))


def test_converting_to_its_own_dtype_makes_an_array_strongly_typed():
    weak = lax.full((), 2.0)
    strong = lax.convert_element_type(weak, weak.dtype)
    assert (weak.weak_type, strong.weak_type) == (True, False)
    assert strong.dtype == weak.dtype


def test_vjp_passes_aux_through_traced():
    def function(x):
        return jnp.sin(x), {"n": jnp.int32(3), "x": x}

    y, pull, aux = jax.vjp(function, X, has_aux=True)
    assert sorted(aux) == ["n", "x"]
    np.testing.assert_allclose(pull(jnp.ones_like(y))[0], jnp.cos(X), rtol=1e-6)


def test_an_inner_scan_keeps_its_loop_invariant_weights_once():
    def layers(w, c):
        return lax.scan(lambda c, _: (jnp.tanh(c @ w), None), c, length=5)[0]

    shapes = [leaf.shape for leaf in jax.tree.leaves(jax.vjp(layers, W, X)[1])]
    assert (5, 3, 3) not in shapes
    assert (3, 3) in shapes


def test_integers_get_float0_cotangents_of_their_shape():
    _, pull = jax.vjp(lambda i, x: x * i.astype(F32), jnp.arange(3), X)
    ct, _ = pull(X)
    assert isinstance(ct, np.ndarray)
    assert (ct.dtype, ct.shape) == (jax.dtypes.float0, (3,))


def test_integer_outputs_take_float0_cotangents():
    _, pull = jax.vjp(lambda x: (x, jnp.arange(3)), X)
    (ct,) = pull((X, np.zeros(3, jax.dtypes.float0)))
    np.testing.assert_array_equal(ct, X)


# ------------------------------------------------------------ jaxprs and what they close over


def through_grad(run):
    return jax.grad(lambda v: run(v).sum())


def through_jit(run):
    return jax.jit(lambda v: run(v))


def through_vmap(run):
    return lambda v: jax.vmap(run)(jnp.stack([v, v]))[0]


@pytest.mark.parametrize("outer", [through_grad, through_jit, through_vmap])
def test_make_jaxpr_hoists_closed_over_tracers_as_consts(outer):
    seen = []

    def run(v):
        closed = jax.make_jaxpr(lambda x: x * v)(X)
        seen.append([isinstance(c, jax.core.Tracer) for c in closed.consts])
        return core.jaxpr_as_fun(closed)(X)[0]

    outer(run)(X)
    assert all(kinds == [True] for kinds in seen)
    assert seen


def test_closed_over_arrays_are_consts_or_literals_and_no_tracers():
    closed = jax.make_jaxpr(lambda x: x * W[0])(X)
    assert not any(isinstance(c, jax.core.Tracer) for c in closed.consts)


def test_jaxpr_as_fun_takes_other_consts():
    def run(v):
        closed = jax.make_jaxpr(lambda x: x * v)(X)
        assert closed.consts
        doubled = core.ClosedJaxpr(closed.jaxpr, [2 * c for c in closed.consts])
        return core.jaxpr_as_fun(doubled)(X)[0]

    np.testing.assert_allclose(jax.jit(run)(X), 2 * X * X)


def test_gradients_flow_through_rebound_consts():
    def run(v):
        closed = jax.make_jaxpr(lambda x: x * v)(X)
        return core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, closed.consts))(X)[0].sum()

    np.testing.assert_allclose(jax.grad(run)(X), X)


def test_make_jaxpr_returns_the_shapes_in_the_containers_of_the_output():
    _, shapes = jax.make_jaxpr(lambda x: {"y": (x, None)}, return_shape=True)(X)
    assert shapes["y"][1] is None
    assert (shapes["y"][0].shape, shapes["y"][0].dtype) == ((3,), F32)


def test_make_jaxpr_takes_shape_dtype_structs():
    struct = jax.ShapeDtypeStruct((3,), F32)
    closed = jax.make_jaxpr(cell)(jax.ShapeDtypeStruct((3, 3), F32), struct)
    assert [v.aval.shape for v in closed.jaxpr.outvars] == [(3,)]


def test_one_value_returned_twice_is_one_variable():
    def twice(x):
        y = jnp.sin(x)
        return y, y, jnp.sin(x)

    first, second, other = jax.make_jaxpr(twice)(X).jaxpr.outvars
    assert first is second
    assert other is not first


def test_known_outputs_are_literals_with_a_value():
    (out,) = jax.make_jaxpr(lambda x: 3.0)(X).jaxpr.outvars
    assert isinstance(out, core.Literal)
    assert float(out.val) == 3.0


def test_jaxpr_replace_drops_equations():
    closed = jax.make_jaxpr(lambda x: (jnp.sin(x), jnp.cos(x))[0])(X)
    assert len(closed.jaxpr.eqns) == 2
    kept = [e for e in closed.jaxpr.eqns if e.outvars[0] in closed.jaxpr.outvars]
    smaller = core.ClosedJaxpr(closed.jaxpr.replace(eqns=kept), closed.consts)
    assert len(smaller.jaxpr.eqns) == 1
    np.testing.assert_allclose(core.jaxpr_as_fun(smaller)(X)[0], jnp.sin(X))


# ----------------------------------------------------------- equations, one by one


def rebind(eqn, values):
    """Runs one equation: the recipe that the library uses."""
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)
    with eqn.ctx.manager:
        return eqn.primitive.bind(*functions, *values, **params)


def test_an_equation_knows_the_scopes_that_it_was_traced_in():
    def run(x):
        with jax.named_scope("outer"), jax.named_scope("inner"):
            return jnp.sin(x)

    assert str(equation(run, X, name="sin").source_info.name_stack) == "outer/inner"
    assert not str(equation(jnp.sin, X, name="sin").source_info.name_stack)


def test_the_configuration_says_whether_jit_is_disabled():
    assert not jax.config.jax_disable_jit
    with jax.disable_jit():
        assert jax.config.jax_disable_jit


def test_an_equation_is_run_again_from_its_own_parameters():
    eqn = equation(lambda x: x @ W, X, name="dot_general")
    np.testing.assert_allclose(rebind(eqn, [X, W]), X @ W)


@jax.custom_jvp
def jvp_spike(x):
    return (x > 0).astype(x.dtype)


jvp_spike.defjvp(lambda x, t: (jvp_spike(*x), 7.0 * t[0]))


@jax.custom_vjp
def vjp_spike(x):
    return (x > 0).astype(x.dtype)


vjp_spike.defvjp(lambda x: (vjp_spike(x), None), lambda _, ct: (7.0 * ct,))


@pytest.mark.parametrize(
    ("function", "name"), [(jvp_spike, "custom_jvp_call"), (vjp_spike, "custom_vjp_call")]
)
def test_a_custom_rule_survives_running_its_equation_again(function, name):
    eqn = equation(function, X, name=name)

    def again(x):
        (y,) = rebind(eqn, [x])
        return y.sum()

    np.testing.assert_allclose(jax.grad(again)(X), jnp.full_like(X, 7.0))


def test_an_equation_is_run_again_with_its_own_matmul_precision():
    with jax.default_matmul_precision("float32"):
        eqn = equation(lambda x: x @ W, X, name="dot_general")
    assert "HIGHEST" in str(eqn.params["precision"])


def called(eqn):
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (jax.jit(jnp.sin), {"jit", "pjit"}),
        (jax.checkpoint(jnp.sin), {"checkpoint", "remat", "remat2"}),
        (jax.jit(jnp.sin, inline=False), {"jit", "pjit"}),
    ],
)
def test_a_call_is_one_to_one_in_inputs_and_outputs(function, names):
    (eqn,) = jax.make_jaxpr(function)(X).jaxpr.eqns
    assert eqn.primitive.name in names
    inner = called(eqn)
    assert len(inner.invars) == len(eqn.invars)
    assert [v.aval.shape for v in inner.outvars] == [v.aval.shape for v in eqn.outvars]
    assert [e.primitive.name for e in inner.eqns] == ["sin"]


def loop(w, c, xs):
    def body(c, x):
        return jnp.tanh(c @ w) + x, (c, x.sum())

    return lax.scan(body, c, xs, reverse=True, unroll=2)


def test_scan_is_described_by_the_parameters_that_are_read():
    p = equation(loop, W, X, jnp.ones((4, 3), F32), name="scan").params
    assert (p["length"], p["reverse"], p["unroll"]) == (4, True, 2)
    body = p["jaxpr"]
    assert isinstance(body, core.ClosedJaxpr)
    assert [v.aval.shape for v in body.jaxpr.invars] == [(3, 3), (3,), (3,)]
    assert [v.aval.shape for v in body.jaxpr.outvars] == [(3,), (3,), ()]


def test_scan_takes_consts_then_carry_then_xs_and_only_xs_and_ys_gain_an_axis():
    eqn = equation(loop, W, X, jnp.ones((4, 3), F32), name="scan")
    body = eqn.params["jaxpr"].jaxpr
    gained_in = [o.aval.ndim - i.aval.ndim for o, i in zip(eqn.invars, body.invars, strict=True)]
    gained_out = [o.aval.ndim - i.aval.ndim for o, i in zip(eqn.outvars, body.outvars, strict=True)]
    assert gained_in == [0, 0, 1]
    assert gained_out == [0, 1, 1]


def test_cond_takes_the_index_first_and_false_is_branch_zero():
    eqn = equation(lambda b, x: lax.cond(b, jnp.sin, jnp.cos, x), True, X, name="cond")
    assert eqn.invars[0].aval.shape == ()
    assert eqn.invars[0].aval.dtype == jnp.int32
    false, true = eqn.params["branches"]
    np.testing.assert_allclose(core.jaxpr_as_fun(false)(X)[0], jnp.cos(X))
    np.testing.assert_allclose(core.jaxpr_as_fun(true)(X)[0], jnp.sin(X))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("broadcast_in_dim", lambda x: jnp.broadcast_to(x, (2, 3))),
        ("concatenate", lambda x: jnp.concatenate([x, x])),
        ("conv_general_dilated", lambda x: lax.conv(x[None, None], W[:1, None], (1,), "SAME")),
        ("conj", lambda x: jnp.conj(lax.complex(x, x))),
        ("convert_element_type", lambda x: x.astype(jnp.bfloat16)),
        ("copy", lambda x: jnp.copy(x)),
        ("cumsum", jnp.cumsum),
        ("div", lambda x: x / X),
        ("dot_general", lambda x: x @ W),
        ("dynamic_slice", lambda x: lax.dynamic_slice(x, (1,), (1,))),
        ("dynamic_update_slice", lambda x: lax.dynamic_update_slice(x, X[:1], (1,))),
        ("gather", lambda x: x[jnp.array([0, 2])]),
        ("imag", lambda x: jnp.imag(lax.complex(x, x))),
        ("mul", lambda x: x * X),
        ("name", lambda x: checkpoint_name(x, "h")),
        ("neg", jnp.negative),
        ("pad", lambda x: jnp.pad(x, 1)),
        ("real", lambda x: jnp.real(lax.complex(x, x))),
        ("reduce_precision", lambda x: lax.reduce_precision(x, 8, 7)),
        ("reduce_sum", jnp.sum),
        ("reshape", lambda x: x.reshape(3, 1, 1)),
        ("rev", lambda x: jnp.flip(x)),
        ("scatter-add", lambda x: x.at[jnp.array([0, 0])].add(X[:2])),
        ("select_n", lambda x: jnp.where(X > 0, x, X)),
        ("slice", lambda x: x[1:]),
        ("squeeze", lambda x: lax.squeeze(x[:1], (0,))),
        ("sub", lambda x: x - X),
        ("transpose", lambda x: lax.transpose(x[None], (1, 0))),
    ],
)
def test_a_primitive_that_the_library_knows_keeps_its_name(name, function):
    assert equation(function, X, name=name)


def test_two_uses_of_one_value_are_added_by_add_any_or_add():
    pull = jax.make_jaxpr(lambda x, ct: jax.vjp(lambda x: jnp.sin(x) * x, x)[1](ct))(X, X)
    assert {"add", "add_any"} & {e.primitive.name for e in pull.jaxpr.eqns}


def test_dot_general_says_which_axes_it_contracts_and_batches():
    p = equation(
        lambda a, b: jnp.einsum("bi,bij->bj", a, b), W, jnp.ones((3, 3, 2), F32), name="dot_general"
    ).params
    (left, right), (batch_left, batch_right) = p["dimension_numbers"]
    assert (left, right, batch_left, batch_right) == ((1,), (1,), (0,), (0,))
    assert "preferred_element_type" in p


def test_reduce_sum_says_its_axes():
    assert equation(lambda w: w.sum(1), W, name="reduce_sum").params["axes"] == (1,)


def test_scatter_add_takes_operand_indices_updates():
    eqn = equation(lambda w: w.at[jnp.array([2, 0])].add(W[:2]), W, name="scatter-add")
    assert [v.aval.shape for v in eqn.invars] == [(3, 3), (2, 1), (2, 3)]


def pulled(function, *args):
    """The equations of a function's pullback."""
    y, pull = jax.vjp(function, *args)
    return jax.make_jaxpr(pull)(y).jaxpr.eqns


def test_an_embedding_gets_its_cotangent_by_a_scatter_add_into_zeros():
    eqns = pulled(lambda w: w[jnp.array([2, 0, 2])], W)
    (scatter,) = [eqn for eqn in eqns if eqn.primitive.name == "scatter-add"]
    (made,) = [eqn for eqn in eqns if scatter.invars[0] in eqn.outvars]
    assert made.primitive.name == "broadcast_in_dim"
    assert isinstance(made.invars[0], core.Literal)
    assert made.invars[0].val == 0


def test_a_slice_gets_its_cotangent_by_a_pad_with_a_literal_zero():
    (pad,) = [eqn for eqn in pulled(lambda w: w[:, :2], W) if eqn.primitive.name == "pad"]
    assert isinstance(pad.invars[1], core.Literal)
    assert pad.invars[1].val == 0


def test_a_matrix_gets_its_cotangent_by_one_dot_general_and_transposes():
    names = {eqn.primitive.name for eqn in pulled(lambda w: X[None] @ w, W)}
    assert "dot_general" in names
    assert names <= {"dot_general", "transpose", "reshape", "convert_element_type", "mul"}


# ------------------------------------------------------------------------- custom_vjp


def test_custom_vjp_takes_none_for_the_cotangent_of_a_whole_subtree():
    @jax.custom_vjp
    def first(a, rest):
        return a

    first.defvjp(lambda a, rest: (a, None), lambda _, ct: (2 * ct, None))
    rest = {"x": X, "n": jnp.int32(1), "key": jax.random.key(0)}
    ct, ct_rest = jax.grad(lambda a, x: first(a, rest | {"x": x}).sum(), (0, 1))(X, X)
    np.testing.assert_allclose(ct, jnp.full_like(X, 2.0))
    np.testing.assert_allclose(ct_rest, jnp.zeros_like(X))


def test_the_forward_rule_of_custom_vjp_is_not_traced_without_a_derivative():
    @jax.custom_vjp
    def function(x):
        return x

    def refuse(x):
        raise TypeError("differentiated")

    function.defvjp(refuse, lambda _, ct: (ct,))
    np.testing.assert_allclose(jax.jit(function)(X), X)
    with pytest.raises(
        TypeError,
        match="differentiated",
    ):
        jax.grad(lambda x: function(x).sum())(X)


def test_custom_vjp_hands_materialised_zeros_for_an_unused_output():
    seen = []

    @jax.custom_vjp
    def pair(x):
        return x, x

    def backward(_, cts):
        seen.extend(cts)
        return (cts[0],)

    pair.defvjp(lambda x: (pair(x), None), backward)
    jax.grad(lambda x: pair(x)[0].sum())(X)
    np.testing.assert_array_equal(seen[1], jnp.zeros_like(X))


def test_forward_mode_through_custom_vjp_is_refused_by_jax():
    with pytest.raises(
        TypeError,
        match="forward-mode",
    ):
        jax.jvp(vjp_spike, (X,), (X,))


def test_forward_over_reverse_through_custom_vjp_works():
    @jax.custom_vjp
    def cube(x):
        return x**3

    # The forward rule must not call the function itself: that would be forward mode through it.
    cube.defvjp(lambda x: (x**3, x), lambda x, ct: (3 * x**2 * ct,))
    _, tangent = jax.jvp(jax.grad(lambda x: cube(x).sum()), (X,), (X,))
    np.testing.assert_allclose(tangent, 6 * X * X, rtol=1e-6)


# ---------------------------------------------------------------------- leaves and avals


def test_random_keys_become_numbers_and_keys_again_inside_a_trace():
    impls = []

    @jax.jit
    def there_and_back(key):
        impls.append(jax.random.key_impl(key))
        raw = jax.random.key_data(key)
        return jax.random.wrap_key_data(raw, impl=impls[0]), raw

    for key in (jax.random.key(3), jax.random.key(3, impl="rbg")):
        impls.clear()
        again, raw = there_and_back(key)
        assert again.dtype == key.dtype
        assert raw.dtype == jnp.uint32
        assert jax.random.uniform(again) == jax.random.uniform(key)


def test_a_key_has_an_extended_dtype_and_a_number_has_not():
    for dtype, extended in ((jax.random.key(0).dtype, True), (X.dtype, False), (jnp.int32, False)):
        assert jnp.issubdtype(dtype, jax.dtypes.extended) is extended
        assert jnp.issubdtype(dtype, jax.dtypes.prng_key) is extended


def test_asarray_refuses_what_is_no_array_with_a_type_error():
    for thing in ("text", object()):
        with pytest.raises(
            TypeError,
            match=r"JAX|dtype",
        ):
            jnp.asarray(thing)


def varying(value):
    """The mesh axes over which a value varies; the name changed between JAX 0.7 and 0.10."""
    aval = jax.typeof(value)
    return aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying


def on_one_device(local):
    """Runs `local` inside `shard_map` over a mesh of one device and one axis, i."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("i",), devices=jax.devices()[:1], axis_types=auto)
    return jax.shard_map(local, mesh=mesh, in_specs=P("i"), out_specs=P("i"))(X)


def test_typeof_tells_which_mesh_axes_a_value_varies_over():
    assert varying(X) == frozenset()
    seen = []

    def local(x):
        seen.extend([varying(x), varying(jnp.zeros(3, F32))])
        return x

    on_one_device(local)
    assert seen[:2] == [frozenset({"i"}), frozenset()]


def test_zeros_are_made_varying_by_pcast_or_pvary():
    seen = []

    def local(x):
        zeros = jnp.zeros(3, F32)
        cast = (
            lax.pcast(zeros, ("i",), to="varying")
            if hasattr(lax, "pcast")
            else lax.pvary(zeros, ("i",))
        )
        seen.append(varying(cast))
        return x + cast

    on_one_device(local)
    assert seen[0] == frozenset({"i"})


def test_a_weight_shared_by_the_mesh_gets_its_cotangent_through_a_known_psum():
    names = set()

    def local(x):
        w = jnp.ones((), F32)  # varies over no axis, x does
        pull = jax.vjp(lambda w: w * x, w)[1]
        names.update(eqn.primitive.name for eqn in jax.make_jaxpr(pull)(x).jaxpr.eqns)
        return x

    on_one_device(local)
    assert names & {"psum", "psum2", "psum_invariant"}


def test_a_tracer_is_an_array_and_a_tracer():
    seen = []

    def look(x):
        seen.append((isinstance(x, jax.Array), isinstance(x, jax.core.Tracer)))
        return x

    jax.jit(look)(X)
    assert seen == [(True, True)]
    assert not isinstance(X, jax.core.Tracer)


def test_a_shape_dtype_struct_is_strongly_typed():
    assert not jax.ShapeDtypeStruct((3,), F32).weak_type


# --------------------------------------------------------------------- pytrees and loops


@dataclasses.dataclass(frozen=True)
class Box:
    value: jax.Array
    settings: tuple


jax.tree_util.register_dataclass(Box, data_fields=["value"], meta_fields=["settings"])


def test_static_fields_are_compared_by_value_in_a_scan_carry():
    def body(box, _):
        return Box(box.value + 1, ("window", int("3"))), None

    last, _ = lax.scan(body, Box(X, ("window", 3)), length=2)
    np.testing.assert_allclose(last.value, X + 2)
    with pytest.raises(
        TypeError,
        match="carry",
    ):
        lax.scan(body, Box(X, ("window", 4)), length=2)


def test_static_fields_of_equal_value_are_not_traced_again():
    traces = []

    @jax.jit
    def function(box):
        traces.append(box.settings)
        return box.value

    function(Box(X, ("window", int("300"))))
    function(Box(X, ("window", int("300"))))
    assert len(traces) == 1


def test_eval_shape_gives_sizes_in_the_containers_of_the_output():
    box = jax.eval_shape(lambda x: Box(jnp.zeros((10**9, *x.shape), x.dtype), ()), X)
    assert box.value.size * box.value.dtype.itemsize == 12 * 10**9


def test_a_buffer_can_be_donated_only_once():
    # The reason why a tape's counters are separate arrays.
    shared = jnp.zeros((), jnp.int32)
    add = jax.jit(lambda pair: (pair[0] + 1, pair[1] + 2), donate_argnums=0)
    with pytest.raises(
        Exception,
        match="donate",
    ):  # the class is XLA's
        jax.block_until_ready(add((shared, shared)))


def test_a_call_finds_what_was_compiled_ahead(caplog):
    # So that `Learner.run` compiles before it donates anything.
    function = jax.jit(lambda n, x: (x + n, x[0]), static_argnums=0, donate_argnums=1)
    x = jnp.ones(3)
    with jax.log_compiles():
        function.lower(5, x).compile()
        assert "Compiling" in caplog.text
        caplog.clear()
        function(5, x)
    assert "Compiling" not in caplog.text


def write(ring, value, slot):
    return lax.dynamic_update_index_in_dim(ring, value, slot, 0)


@pytest.mark.compiled
def test_a_donated_ring_is_written_in_place():
    step = jax.jit(write, donate_argnums=0)
    compiled = step.lower(jnp.zeros((1000, 300), F32), jnp.ones(300, F32), 3).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == 1000 * 300 * 4
    assert memory.temp_size_in_bytes < 300 * 4 * 10


@pytest.mark.compiled
def test_a_ring_in_a_scan_is_written_and_read_without_a_copy():
    def body(state, slot):
        ring, total = state
        ring = write(ring, jnp.ones(300, F32) * total, slot)
        oldest = lax.dynamic_index_in_dim(ring, (slot + 1) % 1000, 0, keepdims=False)
        return (ring, total + oldest.sum()), None

    def run(ring, total):
        return lax.scan(body, (ring, total), jnp.arange(4))[0]

    lowered = jax.jit(run, donate_argnums=0).lower(jnp.zeros((1000, 300), F32), F32(1))
    text = lowered.compile().as_text()
    assert "f32[1000,300]" in text
    assert not [
        line for line in text.splitlines() if "= f32[1000,300]" in line and " copy(" in line
    ]


def test_value_and_grad_takes_leaves_that_are_not_differentiable():
    # y of a step, as the loss is differentiated with respect to it.
    y = {"k": jax.random.key(0), "i": jnp.arange(3), "c": jnp.ones(2, jnp.complex64), "n": None}
    loss = jax.value_and_grad(
        lambda y: (jnp.sum(y["c"].real), y["i"]), has_aux=True, allow_int=True
    )
    (value, aux), ct = loss(y)
    assert value == 2
    assert (aux == y["i"]).all()
    assert ct["k"].dtype == ct["i"].dtype == jax.dtypes.float0
    assert ct["i"].shape == (3,)
    assert (ct["c"] == 1).all()
    assert ct["n"] is None


def test_tree_map_takes_none_for_an_empty_container():
    assert jax.tree.leaves({"a": None}) == []
    assert jax.tree.map(lambda v: v + 1, (None, 1)) == (None, 2)


# ------------------------------------------------------------------- effects


def test_the_named_axis_of_a_collective_is_an_effect_of_that_name():
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(v):
        return lax.psum(v, "i")

    jaxpr = jax.make_jaxpr(
        jax.shard_map(local, mesh=mesh, in_specs=P("i"), out_specs=P(), check_vma=False)
    )(X)
    (mapped,) = [e for e in jaxpr.eqns if e.primitive.name == "shard_map"]
    effects = {type(e).__name__ for eqn in inner_eqns(mapped) for e in eqn.effects}
    assert effects <= {"NamedAxisEffect"}
    printed = jax.make_jaxpr(lambda v: jax.debug.print("{}", v))(1.0)
    assert {type(e).__name__ for eqn in printed.eqns for e in eqn.effects} != {"NamedAxisEffect"}
    assert printed.eqns[-1].effects


def inner_eqns(eqn):
    return [e for jaxpr in inner(eqn) for e in jaxpr.eqns]


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="needs jax.new_ref, after JAX 0.7")
def test_a_reference_is_told_by_the_type_inside_it():
    jaxpr = jax.make_jaxpr(lambda v: jax.new_ref(v)[...])(X)
    (made,) = [e for e in jaxpr.eqns if e.primitive.name == "new_ref"]
    assert hasattr(made.outvars[0].aval, "inner_aval")
    assert not hasattr(made.invars[0].aval, "inner_aval")
    assert made.effects


def test_a_jitted_call_has_the_name_of_its_function():
    def whole(v):
        return 2 * v

    (eqn,) = jax.make_jaxpr(jax.jit(whole))(X).eqns
    assert eqn.params["name"] == "whole"
