"""Any step that `jax.vjp` takes: the gradient inside the loop against the unrolled graph."""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from harness import first, grid, weigh
from jax import lax

import jaxbptt

LENGTH, WINDOW = 3, 2
F32, F64 = jnp.float32, jnp.float64
CASES = {}


class Case(NamedTuple):
    step: Any
    params: Any
    carry: Any
    xs: Any


def case(make):
    CASES[make.__name__] = make
    return make


draw = functools.partial(harness.draw, scale=0.6)


def cell_params(dtype=F64):
    return {"w": draw(1, 3, 3, dtype=dtype), "u": draw(2, 2, 3, dtype=dtype)}


def cell(params, h, x):
    return jnp.tanh(h @ params["w"] + x @ params["u"])


H, XS = draw(3, 3), draw(4, LENGTH, 2)


# --------------------------------------------------------------- containers


class Pair(NamedTuple):
    left: Any
    right: Any


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["value", "nothing"], meta_fields=["name"]
)
@dataclasses.dataclass
class Cell:
    value: Any
    nothing: Any
    name: str = "cell"


@case
def nested_carry():
    def step(params, carry, x):
        h = cell(params["rnn"], carry["h"].left, x)
        v = params["scale"][0] * carry["cell"].value + h.sum()
        box = dataclasses.replace(carry["cell"], value=v)
        return {"h": Pair(h, (carry["h"].right[0] * v,)), "cell": box, "no": None}, {"v": (v, None)}

    carry = {"h": Pair(H, (jnp.ones(()),)), "cell": Cell(jnp.ones(()), None), "no": None}
    return Case(step, {"rnn": cell_params(), "scale": [jnp.full((), 0.5)]}, carry, XS)


@case
def integers_booleans_and_none_in_the_carry():
    def step(params, carry, x):
        odd = carry["count"] % 2 == 1
        h = jnp.where(odd ^ carry["flag"], cell(params, carry["h"], x), jnp.sin(carry["h"]))
        count = carry["count"] + 1
        return {"h": h, "count": count, "flag": h[0] > 0, "none": None}, h[carry["count"] % 3]

    carry = {"h": H, "count": jnp.int32(0), "flag": jnp.array(False), "none": None}
    return Case(step, cell_params(), carry, XS)


def dropout_step(params, carry, x):
    key, now = jax.random.split(carry["key"])
    h = cell(params, carry["h"], x)
    kept = jax.random.bernoulli(now, 0.6, h.shape)
    return {"h": jnp.where(kept, h / 0.6, 0.0), "key": key}, h.sum()


@case
def typed_key_in_the_carry():
    return Case(dropout_step, cell_params(), {"h": H, "key": jax.random.key(3)}, XS)


@case
def other_kind_of_key_in_the_carry():
    return Case(dropout_step, cell_params(), {"h": H, "key": jax.random.key(3, impl="rbg")}, XS)


@case
def raw_key_in_the_carry():
    return Case(dropout_step, cell_params(), {"h": H, "key": jax.random.PRNGKey(3)}, XS)


@case
def key_as_input_under_remat():
    # The key itself is a residual: remat draws the mask again from it.
    @jax.checkpoint
    def step(params, h, x):
        mask = jax.random.bernoulli(x["key"], 0.6, h.shape)
        h = cell(params, jnp.where(mask, h, 0.0), x["v"])
        return h, h.sum()

    return Case(
        step, cell_params(), H, {"v": XS, "key": jax.random.split(jax.random.key(1), LENGTH)}
    )


@case
def integers_in_the_parameters():
    def step(params, h, x):
        h = cell(params["rnn"], h[params["order"]], x) * params["on"].astype(F64)
        return h, h.sum()

    params = {
        "rnn": cell_params(),
        "order": jnp.array([2, 0, 1]),
        "on": jnp.array([True, False, True]),
    }
    return Case(step, params, H, XS)


# -------------------------------------------------------- inputs and outputs


@case
def tokens_in_logits_and_prediction_out():
    def step(params, h, x):
        h = jnp.tanh(h @ params["w"] + params["e"][x["token"]] * x["scale"])
        logits = h @ params["w"]
        return h, {"logits": logits, "guess": jnp.argmax(logits), "right": logits[0] > 0}

    params = {"w": draw(1, 3, 3), "e": draw(2, 4, 3)}
    xs = {"token": jnp.array([0, 3, 3], jnp.uint8), "scale": draw(5, LENGTH)}
    return Case(step, params, H, xs)


@case
def no_output():
    return Case(lambda p, h, x: (cell(p, h, x), None), cell_params(), H, XS)


@case
def no_input():
    def step(params, h, x):
        assert x is None
        h = jnp.tanh(h @ params["w"])
        return h, h.sum()

    return Case(step, {"w": draw(1, 3, 3)}, H, None)


@case
def output_of_integers_only():
    return Case(lambda p, h, x: (cell(p, h, x), (jnp.int8(1), h > 0)), cell_params(), H, XS)


@case
def carry_without_gradient():
    def step(params, count, x):
        return count + 1, jnp.sin(params["u"].T @ x) * count.astype(F64)

    return Case(step, {"u": draw(2, 2, 3)}, jnp.int32(1), XS)


@case
def scalars_everywhere():
    return Case(
        lambda p, c, x: (p * c + x, jnp.sin(p * c)),
        jnp.float64(0.7),
        jnp.float64(0.3),
        draw(4, LENGTH),
    )


# ------------------------------------------------------------------- dtypes


def dtype_case(dtype):
    def step(params, h, x):
        h = cell(params, h, x)
        return h, (h * h).sum()

    return Case(step, cell_params(dtype), draw(3, 3, dtype=dtype), draw(4, LENGTH, 2, dtype=dtype))


CASES |= {
    name: functools.partial(dtype_case, jnp.dtype(name))
    for name in ("bfloat16", "float16", "float32", "float64")
}


@case
def mixed_precision():
    def step(params, h, x):
        half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), params)
        new = cell(half, h.astype(jnp.bfloat16), x.astype(jnp.bfloat16))
        h = h * jnp.float32(0.5) + new.astype(F32)
        return h, h.sum()

    return Case(step, cell_params(F32), draw(3, 3, dtype=F32), draw(4, LENGTH, 2, dtype=F32))


def complex_case(dtype):
    def step(params, z, x):
        z = jnp.tanh(z @ params["w"]) + x @ params["u"]
        return z, (jnp.abs(z).sum(), jnp.conj(z[0]) * z[1])

    return Case(step, cell_params(dtype), draw(3, 3, dtype=dtype), draw(4, LENGTH, 2, dtype=dtype))


CASES |= {
    name: functools.partial(complex_case, jnp.dtype(name)) for name in ("complex64", "complex128")
}


@case
def complex_state_between_real_ends():
    def step(params, z, x):
        decay = jnp.exp(lax.complex(-jnp.exp(params["rate"]), params["angle"]))
        z = decay * z + (x @ params["u"]).astype(decay.dtype)
        return z, jnp.real(z * params["c"]).sum()

    params = {"rate": draw(1, 3), "angle": draw(2, 3), "u": draw(5, 2, 3)}
    params["c"] = draw(6, 3, dtype=jnp.complex128)
    return Case(step, params, draw(3, 3, dtype=jnp.complex128), XS)


# ----------------------------------------------------- rules of one's own


@jax.custom_vjp
def vjp_spike(v):
    return (v > 0).astype(v.dtype)


vjp_spike.defvjp(lambda v: (vjp_spike(v), v), lambda v, ct: (ct / (1 + 5 * jnp.abs(v)) ** 2,))


@jax.custom_jvp
def jvp_spike(v):
    return (v > 0).astype(v.dtype)


jvp_spike.defjvp(lambda v, dv: (jvp_spike(v[0]), dv[0] / (1 + 5 * jnp.abs(v[0])) ** 2))


def spiking_case(spike):
    def step(params, v, x):
        v = 0.8 * v + x @ params["u"]
        s = spike(v - 0.2)
        return (v - s) @ params["w"], s.sum()

    return Case(step, cell_params(), H, XS)


CASES["custom_vjp_spike"] = functools.partial(spiking_case, vjp_spike)
CASES["custom_jvp_spike"] = functools.partial(spiking_case, jvp_spike)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def clipped(limit, v, count):
    return v * count.astype(v.dtype)


clipped.defvjp(
    lambda limit, v, count: (clipped(limit, v, count), count),
    lambda limit, count, ct: (jnp.clip(ct, -limit, limit) * count.astype(ct.dtype), None),
)


@case
def clipped_cotangent_with_an_integer_argument():
    def step(params, carry, x):
        h = clipped(0.1, cell(params, carry["h"], x), carry["n"])
        return {"h": h, "n": carry["n"]}, h.sum()

    return Case(step, cell_params(), {"h": H, "n": jnp.int32(1)}, XS)


@jax.custom_vjp
def on_the_host(v):
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(v.shape, v.dtype), v)


on_the_host.defvjp(
    lambda v: (on_the_host(v), v),
    lambda v, ct: (ct * jax.pure_callback(np.cos, jax.ShapeDtypeStruct(v.shape, v.dtype), v),),
)


@case
def callback_without_a_batching_rule():
    def step(params, h, x):
        h = on_the_host(h @ params["w"] + x @ params["u"])
        return h, h.sum()

    return Case(step, cell_params(), H, XS)


# ------------------------------------------------------------ transformations


def remat_case(policy):
    from jax.ad_checkpoint import checkpoint_name

    @functools.partial(jax.checkpoint, policy=policy)
    def step(params, h, x):
        z = checkpoint_name(h @ params["w"] + x @ params["u"], "z")
        h = jnp.tanh(jnp.sin(z) * jnp.log(2.0 + z))
        return h, h.sum()

    return Case(step, cell_params(), H, XS)


POLICIES = jax.checkpoint_policies
CASES |= {
    "checkpoint": functools.partial(remat_case, None),
    "checkpoint_saving_dots": functools.partial(remat_case, POLICIES.dots_saveable),
    "checkpoint_saving_names": functools.partial(remat_case, POLICIES.save_only_these_names("z")),
    "checkpoint_saving_all": functools.partial(remat_case, POLICIES.everything_saveable),
}


@case
def checkpoint_inside():
    def step(params, h, x):
        h = jax.checkpoint(cell)(params, h, x)
        h = jnp.sin(jax.checkpoint(cell)(params, h, x))
        return h, h.sum()

    return Case(step, cell_params(), H, XS)


@case
def inner_scan_over_layers():
    def step(params, carry, x):
        def layer(below, pair):
            w, h = pair
            h = jnp.tanh(h @ w + below)
            return h, h

        top, h = lax.scan(layer, x @ params["u"], (params["w"], carry))
        return h, top.sum()

    return Case(step, {"w": draw(1, 2, 3, 3), "u": draw(2, 2, 3)}, draw(3, 2, 3), XS)


@case
def inner_scan_under_remat():
    def step(params, h, x):
        @jax.checkpoint
        def trip(h, _):
            return cell(params, h, x), h[0]

        h, firsts = lax.scan(trip, h, None, length=3)
        return h, firsts

    return Case(step, cell_params(), H, XS)


@case
def cond_on_the_input():
    def step(params, h, x):
        h = lax.cond(x[0] > 0, lambda: cell(params, h, x), lambda: h * 0.5)
        return h, h.sum()

    return Case(step, cell_params(), H, XS)


@case
def switch_on_a_counter():
    def step(params, carry, x):
        branches = [
            lambda h: cell(params, h, x),
            lambda h: h * params["w"][0],
            lambda h: jnp.sin(h) + params["w"][1],
        ]
        h = lax.switch(carry["n"] % 3, branches, carry["h"])
        return {"h": h, "n": carry["n"] + 1}, h.sum()

    return Case(step, cell_params(), {"h": H, "n": jnp.int32(0)}, XS)


@case
def cond_on_the_parameters():
    def step(params, h, x):
        h = lax.cond(params["w"][0, 0] > 0, lambda: cell(params, h, x), lambda: h * params["w"][1])
        return h, h.sum()

    return Case(step, cell_params(), H, XS)


@case
def while_loop_off_the_gradient_path():
    def step(params, h, x):
        size = lax.stop_gradient(jnp.abs(h).sum())
        halvings = lax.while_loop(lambda n: size * 0.5**n > 0.1, lambda n: n + 1.0, 0.0)
        h = cell(params, h, x) * (1 + 0.1 * halvings)
        return h, h.sum()

    return Case(step, cell_params(), H, XS)


@case
def fori_loop_of_fixed_length():
    def step(params, h, x):
        h = lax.fori_loop(0, 2, lambda i, h: cell(params, h, x), h)
        return h, h.sum()

    return Case(step, cell_params(), H, XS)


@case
def jit_inside():
    inner = jax.jit(lambda p, h, x: (cell(p, h, x), 2.0))

    def step(params, h, x):
        h, two = inner(params, h, x)
        return h, h.sum() * two

    return Case(step, cell_params(), H, XS)


@case
def vmap_inside():
    def step(params, h, x):
        h = jax.vmap(cell, in_axes=(None, 0, None))(params, h, x)
        return h, h.sum()

    return Case(step, cell_params(), draw(3, 4, 3), XS)


@case
def an_optimisation_step():
    # The carry is the fast weights of an inner problem, the parameters its learning rates.
    def step(params, fast, x):
        def loss(fast):
            return jnp.sum((jnp.tanh(x @ fast["u"]) - 0.3) ** 2)

        value, slope = jax.value_and_grad(loss)(fast)
        return {"u": fast["u"] - jnp.exp(params["log_rate"])[None] * slope["u"]}, value

    return Case(step, {"log_rate": draw(1, 3)}, {"u": draw(2, 2, 3)}, XS)


@case
def sorting_gathering_scattering():
    def step(params, h, x):
        h = jnp.sort(cell(params, h, x))
        h = h.at[1].set(h[0] * x[0]).at[jnp.argmax(h)].add(0.1)
        return lax.cumsum(h) * 0.5, h[jnp.array([0, 0, 2])]

    return Case(step, cell_params(), H, XS)


@case
def closed_over_arrays():
    w, mask = draw(8, 3, 3), np.array([1.0, 0.0, 1.0])

    def step(params, h, x):
        h = jnp.tanh(h @ w * mask + x @ params["u"])
        return h, h.sum()

    return Case(step, {"u": draw(2, 2, 3)}, H, XS)


@case
def no_parameters():
    def step(params, h, x):
        h = jnp.tanh(h * x.sum())
        return h, h.sum()

    return Case(step, None, H, XS)


@case
def no_residuals():
    return Case(lambda p, h, x: (h + x.sum(), h.sum()), (), H, XS)


@case
def no_residuals_but_parameters():
    return Case(lambda p, h, x: (h + p["b"] + x.sum(), h.sum()), {"b": draw(1, 3)}, H, XS)


@case
def unused_parameters_carry_and_input():
    return Case(lambda p, c, x: (c, jnp.sin(p["u"]).sum()), cell_params(), (H, H), XS)


@case
def carry_replaced_by_the_input():
    return Case(lambda p, h, x: (x, (h @ p["u"]).sum()), cell_params(), XS[0], XS)


@case
def a_value_passed_on_twice():
    def step(params, carry, x):
        h = cell(params, carry[0], x)
        return (h, h, carry[1]), (h, carry[2].sum())

    return Case(step, cell_params(), (H, H, H), XS)


@case
def an_empty_array_in_the_carry():
    def step(params, carry, x):
        h = cell(params, carry[0], x)
        return (h, carry[1] * 2.0), carry[1]

    return Case(step, cell_params(), (H, jnp.zeros((0, 2))), XS)


# ------------------------------------------------------------------ the test


def online_gradients(recorder, example, thetas, ct_y, ct_carry):
    """At each step the gradient inside the loop: value_and_grad in scan in jit."""

    @jax.jit
    def run(carry, thetas, xs):
        def one(tape, inputs):
            theta, x = inputs

            def loss_fn(moving):
                params = oracles.refill(theta, moving)
                new_tape, y = recorder(params, tape, x)
                return weigh(ct_y, y) + weigh(ct_carry, new_tape.carry), new_tape

            (_, tape), ct = jax.value_and_grad(loss_fn, has_aux=True)(oracles.moving(theta))
            return tape, ct

        tape = recorder.init(first(thetas), carry, first(xs))
        return lax.scan(one, tape, (thetas, xs), length=LENGTH)[1]

    got = run(example.carry, oracles.stack(thetas), example.xs)
    return [np.asarray(leaf) for leaf in got]


def tolerance(name, example):
    # A product in bfloat16 has its error, whatever the dtype of the weights around it.
    inside = [jnp.zeros((), jnp.bfloat16)] if name == "mixed_precision" else []
    return oracles.tolerance(example.params, example.carry, example.xs, inside)


# What is kept of the parameters takes another way under "current"; it agrees where
# they don't change.
CURRENT = [
    "typed_key_in_the_carry",
    "mixed_precision",
    "complex_state_between_real_ends",
    "custom_vjp_spike",
    "checkpoint_saving_names",
    "inner_scan_over_layers",
    "cond_on_the_parameters",
    "an_optimisation_step",
    "closed_over_arrays",
    "no_parameters",
    "unused_parameters_carry_and_input",
]


# What runs by default: each kind of leaf, rule and loop that the library treats in a way of
# its own. That all the others can be traced is held below.
SAMPLE = [
    "integers_booleans_and_none_in_the_carry",
    "typed_key_in_the_carry",
    "key_as_input_under_remat",
    "integers_in_the_parameters",
    "tokens_in_logits_and_prediction_out",
    "no_output",
    "no_input",
    "output_of_integers_only",
    "carry_without_gradient",
    "bfloat16",
    "complex_state_between_real_ends",
    "clipped_cotangent_with_an_integer_argument",
    "callback_without_a_batching_rule",
    "inner_scan_under_remat",
    "no_parameters",
    "no_residuals",
    "unused_parameters_carry_and_input",
    "carry_replaced_by_the_input",
    "a_value_passed_on_twice",
    "an_empty_array_in_the_carry",
]


@pytest.mark.parametrize(
    ("name", "weights"),
    grid(
        [(name, "stored") for name in CASES] + [(name, "current") for name in CURRENT],
        always=[(name, "stored") for name in SAMPLE] + [("cond_on_the_parameters", "current")],
    ),
)
def test_gradient_inside_the_loop(name, weights):
    example = CASES[name]()
    size = 0.1 if weights == "stored" else 0.0
    thetas = oracles.drifting(example.params, LENGTH, size=size)
    reference = oracles.Run(example.step, thetas, example.carry, example.xs, LENGTH)
    carries, ys = reference.trajectory
    ct_y, ct_carry = oracles.random_like(ys[0], 1), oracles.random_like(carries[0], 2)
    recorder = jaxbptt.record(example.step, window=WINDOW, weights=weights)
    got = online_gradients(recorder, example, thetas, ct_y, ct_carry)
    for t in range(1, LENGTH + 1):
        want = reference.unrolled(t, oracles.reach(t, WINDOW), [ct_y], ct_carry)
        label = f"step {name}, {weights}"
        oracles.check(label, [leaf[t - 1] for leaf in got], want.params, tolerance(name, example))


# What has leaves of other types than float64, and each step that is not run above.
TYPED = [
    "integers_booleans_and_none_in_the_carry",
    "typed_key_in_the_carry",
    "key_as_input_under_remat",
    "integers_in_the_parameters",
    "tokens_in_logits_and_prediction_out",
    "carry_without_gradient",
    "bfloat16",
    "complex_state_between_real_ends",
    "no_input",
    "no_parameters",
    "an_empty_array_in_the_carry",
]


@pytest.mark.parametrize(
    "name", grid(CASES, always=lambda name: name in TYPED or name not in SAMPLE)
)
def test_cotangents_have_the_primals_types(name):
    example = CASES[name]()
    x = jax.tree.map(lambda v: v[0], example.xs)
    recorder = jaxbptt.record(example.step, window=WINDOW)

    def pull(params, carry, x):
        tape, y = recorder(params, recorder.init(params, carry, x), x)
        ct_y = jax.tree.map(lambda v: v[None], oracles.random_like(y, 1))
        return tape.carry, recorder.pullback(params, tape, ct_y)

    new_carry, got = jax.eval_shape(pull, example.params, example.carry, x)
    rows = jax.tree.map(lambda v: jnp.stack([v] * WINDOW), x)
    for ct, primal in ((got.params, example.params), (got.carry, example.carry), (got.xs, rows)):
        want = jax.eval_shape(lambda v: v, primal)
        assert jax.tree.structure(ct) == jax.tree.structure(want)
        for a, b in zip(jax.tree.leaves(ct), jax.tree.leaves(want), strict=True):
            assert a.shape == b.shape
            assert a.dtype == (b.dtype if oracles.is_moving(b) else jax.dtypes.float0)
    assert new_carry == jax.eval_shape(lambda v: v, example.carry)


# --------------------------------------------------------- closed-over tracers


def closing_over(w):
    """A step whose recurrent matrix is an implicit parameter."""

    def step(params, h, x):
        h = jnp.tanh(h @ w + x @ params["u"])
        return h, h.sum()

    return step


def with_explicit(params, h, x):
    return closing_over(params["w"])(params, h, x)


def unrolled_window(w, u, tape_carry, xs):
    """A loss of the last WINDOW steps from a carry that is a constant."""
    h = tape_carry
    for x in xs:
        h, y = with_explicit({"w": w, "u": u}, h, x)
    return y**2


@functools.cache
@jax.jit
def unrolled_windows():
    """Of the loss at each step its gradient by w and u."""
    w, u, xs = draw(1, 3, 3), draw(2, 2, 3), draw(4, LENGTH, 2)
    before, found = [H], []
    for t, x in enumerate(xs, 1):
        oldest = oracles.reach(t, WINDOW)
        before.append(with_explicit({"w": w, "u": u}, before[-1], x)[0])
        reference = jax.grad(unrolled_window, argnums=(0, 1))
        found.append(reference(w, u, before[oldest - 1], xs[oldest - 1 : t]))
    return found


@pytest.mark.parametrize(
    ("where", "weights"),
    grid(
        itertools.product(["eager", "jit", "scan"], ["stored", "current"]),
        always=[("eager", "stored"), ("jit", "current"), ("scan", "stored")],
    ),
)
def test_a_closed_over_tracer_gets_the_windows_gradient(where, weights):
    w, u = draw(1, 3, 3), draw(2, 2, 3)
    xs = draw(4, LENGTH, 2)

    def loss(w, u, tape, x):
        recorder = jaxbptt.record(closing_over(w), window=WINDOW, weights=weights)
        tape, y = recorder({"u": u}, tape, x)
        return y**2, tape

    grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
    tape = jaxbptt.record(closing_over(w), window=WINDOW, weights=weights).init({"u": u}, H, xs[0])
    if where == "scan":

        def one(tape, x):
            ct, tape = grad(w, u, tape, x)
            return tape, ct

        got = jax.jit(lambda tape: lax.scan(one, tape, xs))(tape)[1]
    else:
        call, rows = jax.jit(grad) if where == "jit" else grad, []
        for x in xs:
            ct, tape = call(w, u, tape, x)
            rows.append(ct)
        got = oracles.stack(rows)
    got = [np.asarray(leaf) for leaf in got]
    for t, want in enumerate(unrolled_windows(), 1):
        oracles.check(f"closed over, {where}", [leaf[t - 1] for leaf in got], want, 1e-12)


def test_closed_over_by_the_function_around_the_recorder():
    # The tape is made of tracers too.
    w, x = draw(1, 3, 3), XS[0]

    def loss(scale):
        recorder = jaxbptt.record(
            lambda p, h, x: (jnp.tanh(scale * (h @ w)) + x.sum(), None), window=3
        )
        tape = recorder.init(None, H, x)
        for _ in range(2):
            tape, _ = recorder(None, tape, x)
        return tape.carry.sum()

    def plain(scale):
        h = H
        for _ in range(2):
            h = jnp.tanh(scale * (lax.stop_gradient(h) @ w)) + x.sum()
        return h.sum()

    # The last call's window holds both steps: the gradient is that of two steps.
    def both(scale):
        h = H
        for _ in range(2):
            h = jnp.tanh(scale * (h @ w)) + x.sum()
        return h.sum()

    got = jax.grad(loss)(0.7)
    want, other = jax.jit(lambda scale: (jax.grad(both)(scale), jax.grad(plain)(scale)))(0.7)
    oracles.check("closed over by a closure", got, want, 1e-12)
    assert abs(float(got) - float(other)) > 1e-3


# ------------------------------------------------------------- no leaks


def log_step(params, c, x):
    c = c * jnp.exp(params["a"] * jnp.log(x))
    return c, jnp.log(c).sum() / params["a"].sum()


def division_step(params, c, x):
    c = params["a"] * x / c + x
    return c, (1 / c).sum()


def root_step(params, c, x):
    c = jnp.sqrt(params["a"] * c + x)
    return c, (c**-1.5).sum()


def norm_step(params, c, x):
    c = params["a"] * c / jnp.linalg.norm(c) + x
    return c, jnp.linalg.norm(c)


def remat_of(step):
    @jax.checkpoint
    def remat_step(params, c, x):
        return step(params, c, x)

    return remat_step


@jax.custom_vjp
def unforgiving(v):
    return jnp.log(v)


# Of no input is this zero or finite at a zero residual, whatever the cotangent.
unforgiving.defvjp(lambda v: (jnp.log(v), v), lambda v, ct: (jnp.where(v == 0, jnp.nan, ct / v),))


def unforgiving_step(params, c, x):
    c = x + unforgiving(params["a"] + c)
    return c, c.sum()


NAN_PRONE = {
    "log": log_step,
    "division": division_step,
    "root": root_step,
    "norm": norm_step,
    "remat of log": remat_of(log_step),
    "remat of division": remat_of(division_step),
    "custom_vjp": unforgiving_step,
}
POSITIVE = {"a": jnp.array([1.3, 0.8, 1.1])}
STARTS, INPUTS = jnp.array([0.7, 1.2, 1.9]), jnp.array([[1.5, 1.1, 0.6], [0.9, 2.0, 1.4]])


# By default each step once, every other one with the other weights.
ONCE = dict(zip(NAN_PRONE, itertools.cycle(["stored", "current"]), strict=False))


@pytest.mark.parametrize(
    ("name", "weights"),
    grid(itertools.product(NAN_PRONE, ["stored", "current"]), always=ONCE.items()),
)
def test_unwritten_slots_never_leak(name, weights):
    recorder = jaxbptt.record(NAN_PRONE[name], window=4, weights=weights)
    cts = np.array([0.3, 1.0, -0.5, 0.8])

    @jax.jit
    def go(carry, xs):
        tape = recorder.init(POSITIVE, carry, xs[0])
        empty, grads = recorder.pullback(POSITIVE, tape, cts, 1 + carry), []
        for x in xs:

            def loss_fn(params, tape=tape, x=x):
                new_tape, y = recorder(params, tape, x)
                return y, new_tape

            got, tape = jax.grad(loss_fn, has_aux=True)(POSITIVE)
            grads.append(got)
        return empty, grads, recorder.pullback(POSITIVE, tape, cts, 1 + carry)

    empty, grads, full = go(STARTS, INPUTS)
    assert not np.any(empty.params["a"])
    assert not np.any(empty.xs)
    np.testing.assert_array_equal(empty.carry, 1 + STARTS)  # λ flows through nothing
    reference = oracles.Run(NAN_PRONE[name], POSITIVE, STARTS, INPUTS, 2)
    for t, got in enumerate(grads, 1):
        want = reference.unrolled(t, 1, [np.ones(())])
        oracles.check(f"warm-up of {name}", got, want.params, 1e-12)
    want = reference.unrolled(2, 1, list(cts[2:]), 1 + STARTS)
    oracles.check_cotangents(f"warm-up of {name}, pullback", full, want, 1e-12)


@pytest.mark.parametrize("name", ["log", "remat of division"])
def test_unwritten_slots_never_leak_in_second_order(name):
    step = NAN_PRONE[name]
    recorder = jaxbptt.record(step, window=4)
    tape = jax.jit(recorder.init)(POSITIVE, STARTS, INPUTS[0])

    def online(a):
        return jax.grad(lambda a: recorder({"a": a}, tape, INPUTS[0])[1])(a)

    def empty(a):
        return recorder.pullback({"a": a}, tape, jnp.ones(2), 1 + STARTS).params["a"]

    got, of_nothing = jax.jit(jax.jacrev(lambda a: (online(a), empty(a))))(POSITIVE["a"])
    want = jax.jit(jax.hessian(lambda a: step({"a": a}, STARTS, INPUTS[0])[1]))(POSITIVE["a"])
    oracles.check(f"warm-up of {name}, second order", got, want, 1e-12)
    assert not np.any(of_nothing)


def test_a_nan_of_the_past_leaves_with_its_step():
    # A residual that is not a number reaches as far as the window and no further.
    recorder = jaxbptt.record(log_step, window=2)
    tape = recorder.init(POSITIVE, STARTS, INPUTS[0])
    call, pull = jax.jit(recorder), jax.jit(recorder.pullback)
    finite = []
    for x in (INPUTS[0], -INPUTS[0], INPUTS[0], INPUTS[1], INPUTS[0]):
        tape, _ = call(POSITIVE, tape, x)
        tape = tape.replace(carry=STARTS)
        finite.append(bool(np.all(np.isfinite(pull(POSITIVE, tape, jnp.ones(1)).params["a"]))))
    assert finite == [True, False, False, True, True]


def test_a_nan_does_not_outlive_clear():
    recorder = jaxbptt.record(log_step, window=3)
    tape = recorder.init(POSITIVE, STARTS, INPUTS[0])
    tape, _ = recorder(POSITIVE, tape, -INPUTS[0])
    tape = recorder.clear(tape).replace(carry=STARTS)
    tape, _ = recorder(POSITIVE, tape, INPUTS[0])
    got = recorder.pullback(POSITIVE, tape, jnp.ones(1)).params
    want = oracles.Run(log_step, POSITIVE, STARTS, INPUTS[:1], 1).unrolled(1, 1, [jnp.ones(())])
    oracles.check("after clear", got, want.params, 1e-12)


# ----------------------------------------------------------------- side effects


def test_a_step_runs_its_side_effects_once():
    seen = []

    def step(params, c, x):
        c = jnp.sin(params * c + x)
        jax.debug.callback(lambda v: seen.append(float(v)), c)
        return c, c

    recorder = jaxbptt.record(step, window=3)

    @jax.jit
    def update(tape, x):
        def loss_fn(p):
            new_tape, y = recorder(p, tape, x)
            return y, new_tape

        return jax.grad(loss_fn, has_aux=True)(0.5)

    tape, cs = recorder.init(0.5, 0.1, 0.0), []
    for x in (0.1, 0.2, 0.3):
        _, tape = update(tape, x)
        cs.append(float(tape.carry))
    jax.effects_barrier()
    assert seen == cs
