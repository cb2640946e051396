"""Which part of a pullback runs at each lag and which once, and that it comes to the same sum.

The programs here are written down as a pullback might look; each is summed over a few lags
as it stands, and again as it was divided.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import numbers
from jax import lax

from jaxbptt._closure.contraction import Contraction, divide_pullback
from jaxbptt._jaxprs.evaluate import ZERO, Program, prune, without_calls

LAGS = 3
BATCH, IN, OUT = 2, 5, 7  # so few rows that operands are smaller than their product
F32, F64, BF16 = jnp.float32, jnp.float64, jnp.bfloat16


def draw(seed, *shape, dtype=np.float64):
    return numbers(seed, *shape, dtype=dtype).astype(dtype)


# -------------------------------------------------------------- the machinery


class Divided(NamedTuple):
    """A program and how it was divided."""

    contraction: Contraction
    closed: Any

    @property
    def at_lag(self):
        return names(self.contraction.in_loop)

    @property
    def after(self):
        return names(self.contraction.after_loop)


def names(eqns):
    return [eqn.primitive.name for eqn in eqns]


def row(values):
    """Something of the type of one lag of a stack."""
    return [jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for v in values]


def divided(function, moving, fixed=(), weights=1):
    """Divides `function(*moving, *fixed)`, whose first outputs are weights.

    Args:
        function: from arrays of one lag and arrays that are the same at all lags to a list.
        moving: stacks over the lags.
        fixed: arrays.
        weights: how many outputs are to be summed; the rest is wanted at each lag.
    """
    like = [*row(moving), *(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in fixed)]
    closed = prune(without_calls(jax.make_jaxpr(lambda *args: list(function(*args)))(*like), like))
    outs = closed.jaxpr.outvars
    constant = [False] * len(moving) + [True] * len(fixed)
    return Divided(
        divide_pullback(Program.of(closed), constant, outs[:weights], outs[weights:]), closed
    )


def as_divided(made, moving, fixed=(), live=None):
    """The sums and, by lag, what is wanted there, by the parts of a divided program.

    `live` says of each lag whether it counts.
    """
    part = made.contraction
    sums, stacks, wanted = part.zero_sums(), [], []
    for lag in range(LAGS):
        now = True if live is None else live[lag]
        outs, emitted, terms = part.at_lag([*(v[lag] for v in moving), *fixed])
        sums = part.add(sums, terms, now)
        stacks.append([v if live is None else jnp.where(now, v, 0 * v) for v in emitted])
        wanted.append(outs)
    contracted = part.contract([jnp.stack(vs) for vs in zip(*stacks, strict=True)])
    for value, zero in zip(contracted, part.zero_contractions(), strict=True):
        assert (value.shape, value.dtype) == (zero.shape, zero.dtype)
    # What differs from lag to lag isn't there any more at the end.
    return part.finish(list(fixed), contracted, sums), wanted


def as_it_stands(function, moving, fixed=()):
    """All outputs at each lag."""
    return [list(function(*(v[lag] for v in moving), *fixed)) for lag in range(LAGS)]


def same_sums(function, moving, fixed=(), weights=1, rtol=1e-13):
    """Divides a program, compares it with itself, and returns how it was divided."""
    made = divided(function, moving, fixed, weights)

    @jax.jit
    def both(moving, fixed):
        return as_divided(made, moving, fixed), as_it_stands(function, moving, fixed)

    (got, wanted), each = both(list(moving), list(fixed))
    for i, value in enumerate(got):
        want = sum(wide(outs[i]) for outs in each)
        rtol = 1e-6 if value.dtype == F32 else rtol
        np.testing.assert_allclose(wide(value), want, rtol=rtol, atol=rtol * np.abs(want).max())
    for outs, here in zip(wanted, each, strict=True):
        for value, want in zip(outs, here[weights:], strict=True):
            np.testing.assert_array_equal(value, want)
    return made


def wide(value):
    value = np.asarray(value)
    return value.astype(np.result_type(value.dtype if value.dtype != BF16 else np.float64, F64))


H, G = draw(1, LAGS, BATCH, IN), draw(2, LAGS, BATCH, OUT)
W = draw(3, IN, OUT)
HALVES = H.astype(BF16), G.astype(BF16)


def outer(h, g, **how):
    """What nearly every weight's cotangent is: a product over the batch."""
    return lax.dot_general(h, g, (((0,), (0,)), ((), ())), **how)


# ------------------------------------------------------------------- products


def test_a_product_over_the_batch_is_done_once():
    made = same_sums(lambda h, g: [outer(h, jnp.tanh(g))], [H, G])
    assert made.at_lag == ["tanh"]
    assert made.after == []
    (product,) = made.contraction.products
    assert not product.swapped
    assert product.made is made.contraction.weights[0]
    assert made.contraction.operands == list(product.eqn.invars)
    assert made.contraction.summed_as_is == made.contraction.summands == []


TURNED = {
    "as JAX's own pullback of x @ w": (lambda h, g: outer(g, h).T, (BATCH, IN), (BATCH, OUT)),
    "of 3 heads in front": (
        lambda h, g: lax.dot_general(g, h, (((1,), (1,)), ((0,), (0,)))).transpose(0, 2, 1),
        (3, BATCH, IN),
        (3, BATCH, OUT),
    ),
    "of other axes in each": (
        lambda h, g: lax.dot_general(g, h, (((2,), (0,)), ((1,), (2,)))).transpose(0, 2, 1),
        (BATCH, IN, 3),
        (OUT, 3, BATCH),
    ),
}


@pytest.mark.parametrize("name", TURNED)
def test_a_product_that_is_only_transposed_is_made_the_other_way_round(name):
    go, *shapes = TURNED[name]
    moving = [draw(seed, LAGS, *shape) for seed, shape in enumerate(shapes, 4)]
    made = same_sums(lambda h, g: [go(h, g)], moving)
    (product,) = made.contraction.products
    assert product.swapped
    assert made.at_lag == made.after == []
    assert product.made is made.contraction.weights[0]
    jaxpr = jax.make_jaxpr(made.contraction.contract)(moving[::-1]).jaxpr
    assert names(jaxpr.eqns) == ["dot_general"]


@pytest.mark.parametrize(
    "function",
    [
        lambda h, g: [outer(g, h).T, jnp.sin(outer(g, h).T)],
        lambda h, g: [outer(g, h).T + outer(g, h).T * 2.0],
    ],
    ids=["and another", "and added"],
)
def test_products_that_are_transposed_and_more(function):
    made = same_sums(function, [H, G], weights=len(function(H[0], G[0])))
    assert [product.swapped for product in made.contraction.products].count(True) >= 1


def test_a_product_that_is_read_twice_or_turned_otherwise_stays_as_it_is():
    def twice(h, g):
        product = outer(g, h)
        return [product.T, -product]

    made = same_sums(twice, [H, G], weights=2)
    assert [product.swapped for product in made.contraction.products] == [False]
    assert made.after == ["transpose", "neg"]

    heads = [draw(4, LAGS, 3, BATCH, IN), draw(5, LAGS, 3, BATCH, OUT)]
    dims = (((1,), (1,)), ((0,), (0,)))
    for axes in [(1, 0, 2), (2, 1, 0), (1, 2, 0)]:
        made = same_sums(lambda h, g, t=axes: [lax.dot_general(g, h, dims).transpose(t)], heads)
        assert [product.swapped for product in made.contraction.products] == [False]
        assert made.after == ["transpose"]


def test_changed_operands_change_their_precisions():
    high_low = (lax.Precision.HIGHEST, lax.Precision.DEFAULT)
    made = divided(lambda h, g: [outer(g, h, precision=high_low).T], [H, G])
    jaxpr = jax.make_jaxpr(made.contraction.contract)([G, H]).jaxpr
    (eqn,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert eqn.invars == jaxpr.invars[::-1]
    assert eqn.params["precision"] == high_low[::-1]
    plain = divided(lambda h, g: [outer(g, h, precision=high_low)], [H, G])
    jaxpr = jax.make_jaxpr(plain.contraction.contract)([G, H]).jaxpr
    assert jaxpr.eqns[-1].params["precision"] == high_low


def test_operands_larger_than_their_product_are_not_kept():
    wide_batch = [draw(6, LAGS, 20, IN), draw(7, LAGS, 20, OUT)]
    made = same_sums(lambda h, g: [outer(h, g)], wide_batch)
    assert made.at_lag == ["dot_general"]
    assert made.contraction.summed_as_is == made.contraction.weights
    assert (made.contraction.products, made.contraction.operands) == ([], [])
    # As large: 2 (3 + 6) numbers make 3 x 6. One number more and they are larger.
    for columns, kept in ((6, True), (5, False)):
        moving = [draw(8, LAGS, 2, 3), draw(9, LAGS, 2, columns)]
        assert bool(divided(lambda h, g: [outer(h, g)], moving).contraction.products) == kept


def test_an_operand_that_is_paid_for_is_free_to_others():
    """g is emitted for the large product, so that the small one has only its own to pay for."""
    small = draw(10, LAGS, BATCH, 3)  # 6 + 14 numbers for 21 at once would do; 2 are 6
    tall = draw(11, LAGS, BATCH, 30)
    few = draw(12, LAGS, BATCH, 2)  # 4 + 14 numbers for 14: too many alone

    def pair(few, g, tall):
        return [outer(few, g), outer(tall, g)]

    made = same_sums(pair, [few, G, tall], weights=2)
    assert len(made.contraction.products) == 2
    assert made.at_lag == []
    alone = same_sums(lambda few, g: [outer(few, g)], [few, G])
    assert alone.contraction.products == []
    assert len(divided(lambda s, g: [outer(s, g)], [small, G]).contraction.products) == 1
    # An operand counts once, however often it is read, and is emitted once.
    square = same_sums(lambda g: [outer(g, g)], [draw(19, LAGS, 5, OUT)])
    assert square.contraction.operands == [square.contraction.program.jaxpr.invars[0]]


def test_a_product_with_a_matrix_that_is_the_same_at_all_lags():
    """It is linear in the other operand: the sum comes first, unless that is the larger."""
    grows = same_sums(lambda g, w: [lax.dot(w.T, jnp.tanh(g))], [draw(13, LAGS, IN, 1)], [W])
    assert grows.contraction.products == []
    assert grows.at_lag == ["tanh"]
    assert grows.after[-1] == "dot_general"
    left = same_sums(lambda g, w: [lax.dot(jnp.tanh(g), w)], [draw(14, LAGS, 1, IN)], [W])
    assert (left.at_lag, left.after) == (["tanh"], ["dot_general"])
    shrinks = same_sums(lambda g, w: [lax.dot(w, g)], [draw(15, LAGS, OUT, 1)], [W])
    assert (shrinks.at_lag, shrinks.after) == (["dot_general"], [])


def test_a_fixed_operand_is_never_kept_for_each_lag():
    """Though g is there for another product anyway, and the row v is small."""

    def function(h, g, v):
        return [outer(h, g), lax.dot(v, g)]

    made = same_sums(function, [H, G], [draw(18, 1, BATCH)], weights=2)
    assert len(made.contraction.products) == 1
    assert made.contraction.operands == made.contraction.program.jaxpr.invars[:2]
    assert made.contraction.summed_as_is == [made.contraction.weights[1]]


def test_two_factors_that_both_move_are_no_linear_pass():
    made = same_sums(lambda h, g: [outer(h, g) * outer(h, -g)], [H, G])
    assert made.at_lag == ["dot_general", "neg", "dot_general", "mul"]
    assert made.after == []
    assert made.contraction.summed_as_is == made.contraction.weights


# ----------------------------------------------------- passes behind a product


PASSES = {
    "transpose": (lambda p, w: p.T, "transpose"),
    "reshape": (lambda p, w: p.reshape(-1), "reshape"),
    "squeeze": (lambda p, w: p[:1].squeeze(0), "squeeze"),
    "expand_dims": (lambda p, w: lax.expand_dims(p, (0,)), "broadcast_in_dim"),
    "neg": (lambda p, w: -p, "neg"),
    "rev": (lambda p, w: lax.rev(p, (0, 1)), "rev"),
    "slice": (lambda p, w: p[1:3], "slice"),
    "dynamic_slice": (lambda p, w: lax.dynamic_slice(p, (1, 2), (2, 2)), "dynamic_slice"),
    "gather": (lambda p, w: p[np.array([3, 0, 3])], "gather"),
    "pad with zeros": (lambda p, w: jnp.pad(p, ((1, 2), (0, 3))), "pad"),
    "mul": (lambda p, w: p * w, "mul"),
    "mul from the right": (lambda p, w: w * p, "mul"),
    "mul by a number": (lambda p, w: p * 3.0, "mul"),
    "by what is made of the fixed": (lambda p, w: p * jnp.exp(w), "mul"),
    "div": (lambda p, w: p / w, "div"),
    "copy": (lambda p, w: jnp.copy(p), "copy"),
    "concatenate": (lambda p, w: jnp.concatenate([p, -p]), "concatenate"),
    "add": (lambda p, w: p + lax.rev(p, (0,)), "add"),
    "sub": (lambda p, w: p - lax.rev(p, (0,)), "sub"),
    "broadcast": (lambda p, w: lax.broadcast(p, (2,)), "broadcast_in_dim"),
    "dot_general": (lambda p, w: lax.dot(p, w.T @ draw(16, IN, 9)), "dot_general"),
}


@pytest.fixture(scope="module")
def passes():
    """All of them behind one product each, compiled together."""

    def function(h, g, w):
        # A product for each, so that every one is the end of its own way.
        return [go(outer(h, i * g), w) for i, (go, _) in enumerate(PASSES.values(), 1)]

    return same_sums(function, [H, G], [W], weights=len(PASSES))


def test_linear_passes_come_after_the_loop(passes):
    assert len(passes.contraction.products) == len(PASSES)
    assert passes.contraction.summed_as_is == []
    assert set(passes.at_lag) <= {"mul", "convert_element_type"}  # i * g


@pytest.mark.parametrize("name", PASSES)
def test_each_linear_pass_comes_after_the_loop(name):
    go, primitive = PASSES[name]
    made = divided(lambda h, g, w: [go(outer(h, g), w)], [H, G], [W])
    assert made.at_lag == []
    swapped = name == "transpose"  # which costs nothing at all
    assert made.contraction.products[0].swapped == swapped
    assert (primitive in made.after) != swapped


STAYING = {
    "rounded to fewer digits": lambda p, h, w: lax.reduce_precision(p, 8, 7),
    "tanh": lambda p, h, w: jnp.tanh(p),
    "exp": lambda p, h, w: jnp.exp(p),
    "abs": lambda p, h, w: jnp.abs(p),
    "sign": lambda p, h, w: jnp.sign(p),
    "integer_pow": lambda p, h, w: p**2,
    "max with a number": lambda p, h, w: jnp.maximum(p, 0.0),
    "clamp": lambda p, h, w: lax.clamp(-0.1, p, 0.1),
    "round": lambda p, h, w: jnp.round(p),
    "select_n": lambda p, h, w: jnp.where(p > 0, p, w),
    "cumsum": lambda p, h, w: jnp.cumprod(p, 0),
    "sort": lambda p, h, w: jnp.sort(p, 0),
    "reduce_max": lambda p, h, w: jnp.max(p, 0),
    "plus the same at all lags": lambda p, h, w: p + w,
    "minus the same at all lags": lambda p, h, w: w - p,
    "plus a number": lambda p, h, w: p + 1.0,
    "divided": lambda p, h, w: w / p,
    "divided by what moves": lambda p, h, w: p / (2.0 + jnp.cos(h[0])[:, None]),
    "times what moves": lambda p, h, w: p * h[0][:, None],
    "padded with a number": lambda p, h, w: jnp.pad(p, ((1, 0), (0, 2)), constant_values=2.0),
    "padded with what moves": lambda p, h, w: lax.pad(p, h[0, 0], [(1, 0, 0), (0, 2, 0)]),
    "beside the same at all lags": lambda p, h, w: jnp.concatenate([p, w]),
    "sliced where it moves": lambda p, h, w: lax.dynamic_slice_in_dim(
        p, (h[0, 0] > 0).astype(jnp.int32), 2
    ),
    "narrowed": lambda p, h, w: p.astype(F32),
    "to integers": lambda p, h, w: (8 * p).astype(jnp.int32),
    "dotted with itself": lambda p, h, w: lax.dot(p, p.T),
    "summed": lambda p, h, w: jnp.sum(p, 0),
    "a shrinking product": lambda p, h, w: lax.dot(p, w[0][:, None]),
    "a loop": lambda p, h, w: lax.fori_loop(0, 2, lambda _, v: v * w, p),
}


@pytest.mark.parametrize("name", STAYING)
def test_nothing_else_comes_after_the_loop(name):
    go = STAYING[name]
    made = divided(lambda h, g, w: [go(outer(h, g), h, w)], [H, G], [W])
    assert made.after == []
    assert made.contraction.products == []
    assert made.contraction.summed_as_is == made.contraction.weights


def test_what_stays_in_the_loop_comes_to_the_same_sum():
    def function(h, g, w):
        return [go(outer(h, g), h, w) for name, go in STAYING.items() if name != "to integers"]

    made = same_sums(function, [H, G], [W], weights=len(STAYING) - 1)
    assert made.after == []


def test_a_pass_on_the_way_to_the_loop_stays_in_it():
    """A product that is read by what isn't linear, or wanted at each lag, is made there."""
    made = same_sums(lambda h, g: [-outer(h, g), jnp.tanh(outer(h, -g))], [H, G], weights=2)
    assert made.after == ["neg"]
    assert sorted(made.at_lag) == ["dot_general", "neg", "tanh"]

    def shared(h, g):
        product = outer(h, g)
        return [-product, jnp.tanh(product)]

    made = same_sums(shared, [H, G], weights=2)
    assert (made.at_lag, made.after) == (["dot_general", "tanh"], ["neg"])
    assert len(made.contraction.summed_as_is) == 2
    assert made.contraction.products == []


def test_a_pass_that_the_loop_needs_is_not_made_again_after_it():
    def function(h, g):
        passed = -outer(h, g)
        return [passed, jnp.tanh(passed)]

    made = same_sums(function, [H, G], weights=2)
    assert (made.at_lag, made.after) == (["dot_general", "neg", "tanh"], [])
    assert (made.contraction.products, made.contraction.operands) == ([], [])


def test_psum_behind_a_product_is_done_once():
    def over_devices(function):
        return jax.make_jaxpr(function, axis_env=[("devices", 2)])

    like = row([H, G])
    closed = over_devices(lambda h, g: [lax.psum(outer(h, g), "devices")])(*like)
    part = divide_pullback(Program.of(closed), [False, False], closed.jaxpr.outvars, [])
    assert len(part.products) == 1
    assert [name.split("_")[0] for name in names(part.after_loop)] in (["psum"], ["psum2"])
    closed = over_devices(lambda h, g: [lax.pmax(outer(h, g), "devices")])(*like)
    part = divide_pullback(Program.of(closed), [False, False], closed.jaxpr.outvars, [])
    assert (part.products, part.after_loop) == ([], [])


# -------------------------------------------------------------- complex numbers

Z = draw(20, LAGS, BATCH, IN, dtype=np.complex128)
V = draw(21, LAGS, BATCH, OUT, dtype=np.complex128)


def test_complex_numbers():
    """conj, real and imag are no complex-linear maps, but they are additive, which is enough."""
    fixed = draw(22, IN, OUT, dtype=np.complex128)

    def function(z, v, w):
        return [
            outer(z, lax.conj(v)),
            lax.conj(outer(lax.conj(z), v)),
            lax.real(outer(z, v)),
            lax.imag(outer(-z, v)),
            outer(z, 2 * v) * lax.conj(w),
            lax.conj(outer(v, 3 * z).T),
        ]

    made = same_sums(function, [Z, V], [fixed], weights=6)
    assert len(made.contraction.products) == 6
    assert {"conj", "real", "imag", "mul"} <= set(made.after)
    assert "real" not in made.at_lag
    assert made.after.count("conj") == 3  # one of them of the fixed
    split_up = divided(lambda z, v: [abs(outer(z, v))], [Z, V])
    assert split_up.after == []


# ----------------------------------------------------- sums, scatters, and the rest


def test_a_bias_is_summed_once_where_its_operand_is_emitted_anyway():
    def function(h, g):
        ct = g * 2.0
        return [outer(h, ct), jnp.sum(ct, 0), jnp.sum(ct, (0, 1)), jnp.sum(h * 2.0, 0)]

    made = same_sums(function, [H, G], weights=4)
    assert made.at_lag == ["mul", "mul", "reduce_sum"]  # of 2 h, which no product needs
    assert [eqn.params["axes"] for eqn in made.contraction.reductions] == [(0,), (0, 1)]
    assert made.contraction.summed_as_is == [made.contraction.weights[3]]
    assert len(made.contraction.operands) == 2


def test_a_bias_by_itself_is_summed_in_the_loop():
    made = same_sums(lambda g: [jnp.sum(jnp.sin(g), 0)], [G])
    assert made.at_lag == ["sin", "reduce_sum"]
    assert (made.contraction.reductions, made.contraction.operands) == ([], [])


ROWS = np.array([[4, 1], [0, 4], [4, 4]], np.int32)  # of an embedding, by lag


def scattered(into, places, updates):
    return into.at[places].add(updates, mode="drop")


def test_a_scatter_into_zeros_goes_into_its_sum_in_place():
    def function(places, g):
        return [
            scattered(jnp.zeros((6, OUT)), places, g),
            scattered(jnp.zeros((6, OUT)), places, -g).T,
        ]

    made = same_sums(function, [ROWS, G], weights=2)
    assert len(made.contraction.scatters) == 2
    assert "scatter-add" not in made.at_lag
    assert made.after == ["transpose"]
    assert len(made.contraction.summands) == 4
    assert made.contraction.summed_as_is == []


def test_a_scatter_into_something_else_is_done_at_each_lag():
    def function(places, g, table):
        return [scattered(table, places, g), scattered(jnp.ones((6, OUT)), places, g)]

    made = same_sums(function, [ROWS, G], [draw(23, 6, OUT)], weights=2)
    assert made.contraction.scatters == []
    assert made.at_lag.count("scatter-add") == 2
    overwritten = divided(lambda i, g: [jnp.zeros((6, OUT)).at[i].set(g)], [ROWS, G])
    assert overwritten.contraction.scatters == []


def test_a_scatter_that_is_wanted_at_each_lag_too():
    def function(places, g):
        table = scattered(jnp.zeros((6, OUT)), places, g)
        return [table, table, jnp.tanh(table)]

    made = same_sums(function, [ROWS, G])
    assert made.contraction.scatters == []
    assert "scatter-add" in made.at_lag


def test_lags_that_do_not_count_may_hold_anything():
    """Beyond the window rings hold what they will: nothing of it may come into a sum."""

    def function(h, g, places):
        product = outer(h, g)
        return [product, jnp.tanh(g), scattered(jnp.zeros((6, OUT)), places, g), jnp.sum(g, 0)]

    moving = [H.copy(), G.copy(), ROWS]
    moving[0][1], moving[1][1] = np.inf, np.nan
    made = divided(function, moving, weights=4)
    assert (
        len(made.contraction.products)
        == len(made.contraction.scatters)
        == len(made.contraction.reductions)
        == 1
    )

    @jax.jit
    def some(moving, live):
        part = made.contraction
        sums = part.zero_sums()
        stacks = []
        for lag in range(LAGS):
            _, emitted, terms = part.at_lag([v[lag] for v in moving])
            sums = part.add(sums, terms, live[lag])
            stacks.append([jnp.where(live[lag], v, 0.0) for v in emitted])
        contracted = part.contract([jnp.stack(vs) for vs in zip(*stacks, strict=True)])
        return part.finish([], contracted, sums)

    got = some(moving, np.array([True, False, True]))
    table = np.zeros((6, OUT))
    for lag in (0, 2):
        np.add.at(table, ROWS[lag], G[lag])
    want = [
        H[0].T @ G[0] + H[2].T @ G[2],
        np.tanh(G[0]) + np.tanh(G[2]),
        table,
        G[0].sum(0) + G[2].sum(0),
    ]
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-14)


# ------------------------------------------------------------ inputs and outputs


def test_a_weight_that_is_wanted_at_each_lag_too():
    def function(h, g):
        product = outer(h, g)
        return [product, -product, product, jnp.tanh(h)]

    made = same_sums(function, [H, G], weights=2)
    assert len(made.contraction.outs) == 2
    assert sorted(made.at_lag) == ["dot_general", "tanh"]
    assert made.after == ["neg"]
    assert made.contraction.summed_as_is == [made.contraction.weights[0]]


def test_the_bias_of_a_single_row_is_summed_after_the_loop():
    def function(h, g):
        g = jnp.tanh(g)
        return [outer(h, g), jnp.squeeze(g, 0)]

    made = same_sums(function, [H[:, :1], G[:, :1]], weights=2)
    assert made.contraction.summands == []
    assert len(made.contraction.summed_operands) == 1


def test_what_only_the_lags_want_is_not_summed():
    made = same_sums(lambda h, g, w: [outer(h, g), g @ w.T, h], [H, G], [W])
    assert made.at_lag == ["transpose", "dot_general"]
    assert made.contraction.outs[1] is made.contraction.program.jaxpr.invars[0]
    nothing = same_sums(lambda h, g: [jnp.tanh(h)], [H, G], weights=0)
    assert (
        nothing.contraction.weights
        == nothing.contraction.summands
        == nothing.contraction.operands
        == []
    )


def test_weights_that_are_tied_or_inputs_themselves():
    def function(h, g, w):
        product = outer(h, g)
        return [product, g, product, w, jnp.exp(w), g]

    made = same_sums(function, [H, G], [W], weights=6)
    assert len(made.contraction.products) == 1
    g, w = made.contraction.program.jaxpr.invars[1:]
    # What is an operand already is summed with the others, after the loop.
    assert made.contraction.summed_operands == [g]
    assert g not in made.contraction.summed_as_is
    assert made.contraction.summed_as_is.count(w) == 1
    # What is the same at all lags still counts once for each.
    assert "exp" in made.at_lag


def test_what_is_made_of_fixed_arrays_alone_is_there_after_the_loop_as_well():
    def function(h, g, w):
        norm = jnp.sqrt(jnp.sum(w**2, 0, keepdims=True))
        return [outer(h, g / norm) / norm]

    made = same_sums(function, [H, G], [W])
    assert made.at_lag[-1] == "div"
    assert {"sqrt", "reduce_sum", "div"} <= set(made.after)
    assert len(made.contraction.products) == 1


def test_zeros_are_not_summed():
    def function(h, g):
        return [jnp.zeros((4, 3)), outer(h, g), 0.0 * jnp.ones(())]

    made = divided(function, [H, G], weights=2)
    assert made.contraction.weights[0] is ZERO
    outs = [*made.closed.jaxpr.outvars[1:2], ZERO]
    part = divide_pullback(Program.of(made.closed), [False, False], [ZERO, *outs], outs)
    assert part.weights[0] is part.weights[2] is part.outs[1] is ZERO
    got = part.finish([], [np.zeros((IN, OUT))] * len(part.products), [H[0].T @ G[0]])
    assert got[0] is got[2] is ZERO
    np.testing.assert_array_equal(got[1], H[0].T @ G[0])


def test_arrays_that_the_program_closes_over_are_the_same_at_all_lags():
    scale = jnp.asarray(draw(24, IN, OUT))
    made = same_sums(lambda h, g: [outer(h, g) * scale], [H, G])
    assert made.closed.consts
    assert (made.at_lag, made.after) == ([], ["mul"])


# -------------------------------------------------------------- half precisions


def bias(g):
    """The cotangent of a bias in its own precision; `jnp.sum` would round from float32."""
    like = jax.ShapeDtypeStruct((OUT,), g.dtype)
    return jax.linear_transpose(lambda b: lax.broadcast_in_dim(b, (BATCH, OUT), (1,)), like)(g)


def half_program(h, g, w):
    product = outer(h, g)
    return [
        product,
        outer(-h, g).astype(F32),
        -outer(g, -h).T,
        *bias(g),
        jnp.abs(g),
        outer(h, g) * w,
    ]


def test_half_precisions_are_added_up_in_float32():
    """Against sums in float64 of the same halves: off by float32's rounding and not by theirs."""
    w = W.astype(BF16)
    made = divided(half_program, HALVES, [w], weights=6)
    assert len(made.contraction.reductions) == 1
    got, _ = jax.jit(lambda moving, w: as_divided(made, moving, [w]))(HALVES, w)
    h, g = (v.astype(np.float64) for v in HALVES)
    product = np.einsum("lbi,lbo->io", h, g)
    want = [product, -product, product, g.sum((0, 1)), np.abs(g).sum(0), product * wide(w)]
    for value, exact in zip(got, want, strict=True):
        assert value.dtype == F32
        np.testing.assert_allclose(value, exact, rtol=1e-6, atol=1e-6)


def test_a_long_sum_of_halves_does_not_stall():
    """1 + 1 + … in bfloat16 stops at 256."""
    made = divided(lambda g: [jnp.tanh(g) * 0.0 + 1.0], [np.ones((1, 2), BF16)])

    def add(sums, _):
        _, _, terms = made.contraction.at_lag([jnp.ones(2, BF16)])
        return made.contraction.add(sums, terms, True), None

    total = jax.jit(lambda: lax.scan(add, made.contraction.zero_sums(), length=1000)[0])()
    assert [v.dtype for v in total] == [F32]
    np.testing.assert_array_equal(total[0], [1000.0, 1000.0])


@pytest.mark.parametrize(
    ("narrow", "to", "moves"),
    [
        (BF16, F32, True),
        (jnp.float16, F32, True),
        (F32, F64, True),
        (F32, jnp.complex64, True),
        (F32, jnp.complex128, True),
        (F64, F32, False),
        (F64, jnp.complex64, False),
        (F32, BF16, False),
        (BF16, jnp.float16, False),  # more digits, but a smaller range
        (jnp.float16, BF16, False),
        (F32, jnp.int32, False),
    ],
)
def test_only_a_cast_that_loses_nothing_is_moved(narrow, to, moves):
    moving = [v.astype(narrow) for v in (H, G)]
    made = divided(lambda h, g: [outer(h, g).astype(to)], moving)
    assert ("convert_element_type" in made.after) == moves
    assert ("convert_element_type" in made.at_lag) != moves
    if moves:
        assert made.at_lag == []


def test_a_cast_is_moved_behind_a_product_only():
    """Of anything else the sum would be in the narrower type."""
    halves = list(HALVES)
    for go in (
        lambda h, g: jnp.tanh(g).astype(F32),
        lambda h, g: jnp.sum(g, 0).astype(F32),
        lambda h, g: (outer(h, g) * outer(h, g)).astype(F32),
    ):
        made = divided(lambda h, g, go=go: [go(h, g)], halves)
        assert made.after == []
        assert made.at_lag[-1] == "convert_element_type"
        assert made.contraction.zero_sums()[0].dtype == F32
    behind = divided(lambda h, g: [(-outer(g, h).T.reshape(-1)).astype(F32)], halves)
    assert behind.after == ["reshape", "neg", "convert_element_type"]


# -------------------------------------------------------------- real pullbacks


def cell(h, c, x, w, u, b, table):
    """Gates of a fused matrix, a bias, an embedding, a scale that isn't a matrix."""
    gates = h @ w + (x @ u) * b[None, :] + table[jnp.array([2, 0])]
    i, f, o, n = jnp.split(gates, 4, axis=1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(n)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def test_the_pullback_of_a_cell_is_what_it_was():
    n, gates = 5, 20
    carry, x = [draw(s, LAGS, BATCH, n) for s in (30, 31)], draw(32, LAGS, BATCH, 3)
    weights = [draw(33, n, gates), draw(34, 3, gates), draw(35, gates), draw(36, 4, gates)]
    cts = [draw(s, LAGS, BATCH, n) for s in (37, 38)]

    def pullback(h, c, x, ct_h, ct_c, *weights):
        _, pull = jax.vjp(cell, h, c, x, *weights)
        found = pull((ct_h, ct_c))
        return [*found[3:], *found[:3]]

    made = same_sums(pullback, [*carry, x, *cts], weights, weights=4, rtol=1e-12)
    assert len(made.contraction.products) == 2
    assert len(made.contraction.scatters) == 1
    made_in_loop = [eqn.outvars[0].aval.shape for eqn in made.contraction.in_loop]
    assert (n, gates) not in made_in_loop
    assert (3, gates) not in made_in_loop


OPERATIONS = {
    "negate": lambda a, b, g, w: -a,
    "add": lambda a, b, g, w: a + b,
    "subtract": lambda a, b, g, w: a - b,
    "by the fixed": lambda a, b, g, w: a * w,
    "over the fixed": lambda a, b, g, w: a / w,
    "plus the fixed": lambda a, b, g, w: a + w,
    "by another": lambda a, b, g, w: a * b,
    "tanh": lambda a, b, g, w: jnp.tanh(a),
    "by what moves": lambda a, b, g, w: a * g[:1],
    "transposed": lambda a, b, g, w: (a.T * w.T).T,
    "cut and filled": lambda a, b, g, w: lax.pad(a[1:], jnp.zeros(()), [(1, 0, 0), (0, 0, 0)]),
    "turned": lambda a, b, g, w: lax.rev(a, (1,)),
}


@pytest.mark.parametrize("seed", range(4))
def test_random_programs(seed):
    """Six at a time: sums of products put through ten operations, of which any is wanted."""
    rng = np.random.default_rng(seed)
    programs = [
        [(str(rng.choice(list(OPERATIONS))), *rng.integers(0, 12, 2)) for _ in range(10)]
        for _ in range(6)
    ]
    wanted = rng.integers(0, 12, (6, 3))

    def outputs(h, g, w):
        weights, outs = [], []
        for program, picks in zip(programs, wanted, strict=True):
            pool = [outer(h, g), outer(jnp.sin(h), g)]
            for name, i, j in program:
                go = OPERATIONS[name]
                pool.append(go(pool[i % len(pool)], pool[j % len(pool)], g, w))
            weights += [pool[k % len(pool)] for k in picks]
            outs += [pool[picks[0] % len(pool)]] if picks[1] % 3 == 0 else []
        return [*weights, *outs]

    away_from_zero = np.sign(W) * (0.5 + np.abs(W))
    made = same_sums(outputs, [H, G], [away_from_zero], weights=18, rtol=1e-11)
    assert made.after
    assert made.contraction.summed_as_is
