"""Which residuals are recorded, which are known, which are made again; and that none is lost.

The programs here are written down as a step with its residuals might look.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core

from jaxbptt._closure.residuals import Residuals
from jaxbptt._jaxprs.evaluate import without_calls

MOST = 6  # cheap equations for one residual


class Sorted(NamedTuple):
    """A program and its residuals."""

    residuals: Residuals
    closed: Any
    n_outs: int

    @property
    def recorded(self):
        """Of the recorded outputs their places among the residuals."""
        return [i - self.n_outs for i in self.residuals.recorded]

    @property
    def fixed(self):
        return [i - self.n_outs for i in self.residuals.invariant]


def sort(program, weights, inputs, n_outs=0, stored=True):
    """Sorts the outputs of `program(*weights, *inputs)` from `n_outs` on."""
    like = [jax.ShapeDtypeStruct(np.shape(v), np.asarray(v).dtype) for v in (*weights, *inputs)]
    closed = without_calls(jax.make_jaxpr(lambda *args: list(program(*args)))(*like), like)
    return Sorted(Residuals.of(closed, n_outs, [not stored] * len(weights)), closed, n_outs)


def gives_back_all(made, weights, inputs, jit=True):
    """Whether the recorded and the fixed ones give all residuals, to the last bit."""
    found = made.residuals

    def both(weights, inputs):
        outs = core.jaxpr_as_fun(made.closed)(*weights, *inputs)
        fixed = core.jaxpr_as_fun(found.derive)(*weights)
        return found.every([*(outs[i] for i in found.recorded), *fixed]), outs[made.n_outs :]

    both = jax.jit(both) if jit else both
    got, want = both([jnp.asarray(v) for v in weights], [jnp.asarray(v) for v in inputs])
    assert len(got) == len(want) == found.count
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    return True


def sorted_and_tried(program, weights, inputs, **how):
    made = sort(program, weights, inputs, **how)
    assert gives_back_all(made, weights, inputs)
    given = (*made.residuals.recorded, *made.residuals.invariant)
    outs = made.closed.jaxpr.outvars
    kinds = [(v.shape, v.dtype) for v in made.residuals.structs]
    assert kinds == [(outs[i].aval.shape, outs[i].aval.dtype) for i in given]
    return made


X = np.linspace(-1.0, 1.3, 3)
W = np.array([0.5, -2.0, 3.0])


# ------------------------------------------------------------ what is made again


def test_beside_a_sigmoid_its_derivative_is_made_again():
    def program(x):
        s = jax.nn.sigmoid(x)
        return [s + 1.0, s, s * (1.0 - s)]

    made = sorted_and_tried(program, [], [X], n_outs=1)
    assert made.recorded == [0]
    assert made.residuals.count == 2
    assert made.residuals.remade_bytes == X.nbytes


def test_at_most_six_operations_make_a_residual_again():
    def program(x):
        start = at = jnp.tanh(x)
        outs = []
        for i in range(MOST + 1):
            at = at * (2.0 + i)
            outs.append(at)
        return [start, outs[-2], jnp.exp(x), outs[-1]]

    # The last needs the six before it and itself, but only itself beside the sixth.
    assert sorted_and_tried(program, [], [X]).recorded == [0, 2]
    without_sixth = sorted_and_tried(lambda x: program(x)[::3], [], [X])
    assert without_sixth.recorded == [0, 1]
    without_last = sorted_and_tried(lambda x: program(x)[:3], [], [X])
    assert without_last.recorded == [0, 2]


def test_an_operation_that_two_ways_share_counts_once():
    def program(x, tails):
        s = jnp.tanh(x)
        shared = s * 2.0 + 1.0  # 2 operations
        return [s, (shared * shared) * shared - shared + tails(shared)]

    five_and_six = sorted_and_tried(lambda x: program(x, lambda v: v), [], [X])
    assert five_and_six.recorded == [0]
    seven = sorted_and_tried(lambda x: program(x, lambda v: -v), [], [X])
    assert seven.recorded == [0, 1]


def test_what_is_not_cheap_is_recorded():
    def program(x, w):
        s = jnp.tanh(x)
        return [s, jnp.exp(s), s / w, lax.dot(s[None], s[:, None]), jnp.sum(s), s[:2], jnp.sort(s)]

    made = sorted_and_tried(program, [], [X, W])
    assert made.recorded == list(range(7))
    assert made.residuals.remade_bytes == 0


CHEAP = {
    "comparisons and masks": lambda s: [s > 0.1, ~(s <= 0.2), (s > 0) & (s < 0.5), s == s],
    "a choice": lambda s: [jnp.where(s > 0, s, 0.01 * s), jnp.maximum(s, 0.0), jnp.minimum(s, 0.3)],
    "signs": lambda s: [jnp.sign(s), jnp.abs(s), -s],
    "powers": lambda s: [s * s, s**3, 1 - s**2],
    "shapes": lambda s: [s[None], s[:, None].T, jnp.broadcast_to(s, (2, 3)), s.reshape(3, 1)],
    "casts": lambda s: [s.astype(jnp.float32), lax.reduce_precision(s, 8, 7), s + s],
}


@pytest.mark.parametrize("name", CHEAP)
def test_what_is_cheap_is_made_again(name):
    def program(x):
        s = jnp.tanh(x)
        return [s, *CHEAP[name](s)]

    made = sorted_and_tried(program, [], [X])
    assert made.recorded == [0]
    sizes = [v.aval.size * v.aval.dtype.itemsize for v in made.closed.jaxpr.outvars[1:]]
    assert made.residuals.remade_bytes == sum(sizes)


def test_only_from_what_is_recorded_itself():
    """x is no residual, so that what is cheaply made of it is not there without it."""
    assert sorted_and_tried(lambda x: [x * 2.0], [], [X]).recorded == [0]
    assert sorted_and_tried(lambda x: [x * 2.0, x], [], [X]).recorded == [1]

    def both(x):
        a = x * 2.0
        return [a * 3.0, a]

    # Of two that neither is there without x, the later is made of the earlier.
    assert sorted_and_tried(both, [], [X]).recorded == [1]


def test_one_that_is_made_again_may_serve_another():
    def program(x):
        s = jnp.tanh(x)
        a = s
        for _ in range(4):
            a = a * 1.5
        b = a
        for _ in range(4):
            b = b + 0.25
        return [b, s, a]  # b is 4 operations from a, and 8 from s

    made = sorted_and_tried(program, [], [X])
    assert made.recorded == [1]
    assert made.residuals.remade_bytes == 2 * X.nbytes


def test_both_that_one_is_made_of_must_be_recorded():
    def program(x):
        s, e = jnp.tanh(x), jnp.exp(x)
        return [s * e, e, s]

    assert sorted_and_tried(program, [], [X]).recorded == [1, 2]
    assert sorted_and_tried(lambda x: program(x)[:2], [], [X]).recorded == [0, 1]


def test_an_array_that_the_program_closes_over_is_not_there_again():
    table = jnp.asarray([1.0, 2.0, 4.0])

    def program(x):
        s = jnp.tanh(x)
        return [s, s * table, table]

    assert sorted_and_tried(lambda x: program(x)[:2], [], [X]).recorded == [0, 1]
    made = sorted_and_tried(program, [], [X])
    assert (made.recorded, made.fixed) == ([0, 1], [2])  # known without anything that comes in


# ------------------------------------------------------- duplicates and no arrays


def test_what_is_a_residual_twice_is_recorded_once():
    def program(x, n):
        s = jnp.tanh(x)
        double = s * 2.0
        return [s, x, s, n, double, x, double, n]

    made = sorted_and_tried(program, [], [X, np.int32(4)], n_outs=1)
    assert made.recorded == [0, 1, 2]
    assert made.residuals.count == 7
    assert made.residuals.remade_bytes == X.nbytes  # counted once as well


def test_no_residuals_at_all():
    made = sorted_and_tried(lambda w, x: [w * x], [W], [X], n_outs=1)
    assert (made.recorded, made.fixed, made.residuals.remade_bytes) == ([], [], 0)


def test_numbers_written_in_the_program():
    for stored in (True, False):
        made = sorted_and_tried(lambda w, x: [2.0, x, x * 3.0], [W], [X], stored=stored)
        assert made.recorded == [1]
        assert made.fixed == [0]  # known, whatever comes in


def test_a_key_is_a_residual_like_any_other():
    made = sort(lambda x: [x, x], [], [X])
    assert made.recorded == [0]
    like = jax.eval_shape(lambda: jax.random.key(0))
    closed = jax.make_jaxpr(lambda key, x: [key, jnp.tanh(x)])(like, jnp.asarray(X))
    found = Residuals.of(closed, 0, [])
    assert found.recorded == (0, 1)
    assert found.structs[0].dtype == like.dtype


# ------------------------------------------------------ what depends on parameters


def with_parameters(w, b, h, x):
    s = jnp.tanh(w * h + x)
    return [s, s, w, jnp.exp(b), b * 2.0, w * s, s * 3.0, b * jnp.exp(b)]


def test_under_stored_parameters_are_recorded_and_serve_others():
    """s, w, exp b and 2 b; w s, 3 s are made again, and b exp b of what isn't there is not."""
    made = sorted_and_tried(with_parameters, [W, W + 1], [X, 2 * X], n_outs=1, stored=True)
    assert (made.recorded, made.fixed) == ([0, 1, 2, 3, 6], [])
    assert made.residuals.derive.jaxpr.outvars == []
    assert made.residuals.derive.jaxpr.eqns == []


def test_under_current_nothing_is_made_again_of_parameters():
    """w s stays as it was recorded, with the w of that step."""
    made = sorted_and_tried(with_parameters, [W, W + 1], [X, 2 * X], n_outs=1, stored=False)
    assert (made.recorded, made.fixed) == ([0, 4], [1, 2, 3, 6])
    assert made.residuals.remade_bytes == X.nbytes  # of 3 s

    # With other parameters afterwards: theirs where a value is theirs alone.
    found, then, now = made.residuals, [W, W + 1], [10 * W, 3 - W]

    @jax.jit
    def later(then, now, inputs):
        outs = core.jaxpr_as_fun(made.closed)(*then, *inputs)
        values = [outs[i] for i in found.recorded], core.jaxpr_as_fun(found.derive)(*now)
        return found.every([*values[0], *values[1]])

    s, w, exp_b, twice_b, ws, thrice_s, b_exp_b = later(then, now, [X, 2 * X])
    h = np.tanh(W * X + 2 * X)
    np.testing.assert_allclose(s, h, rtol=1e-14)
    np.testing.assert_allclose(thrice_s, 3 * h, rtol=1e-14)
    np.testing.assert_allclose(ws, W * h, rtol=1e-14)
    np.testing.assert_array_equal(w, now[0])
    np.testing.assert_array_equal(twice_b, 2 * now[1])
    np.testing.assert_allclose(exp_b, np.exp(now[1]), rtol=1e-14)
    np.testing.assert_allclose(b_exp_b, now[1] * np.exp(now[1]), rtol=1e-14)


def test_the_program_for_the_fixed_has_nothing_else_in_it():

    def program(w, h):
        gain = jnp.cos(w)  # of parameters alone, but no residual
        return [jnp.tanh(gain * h), jnp.exp(w) * 2.0]

    made = sorted_and_tried(program, [W], [X], stored=False)
    assert (made.recorded, made.fixed) == ([0], [1])
    assert [e.primitive.name for e in made.residuals.derive.jaxpr.eqns] == ["exp", "mul"]


def test_an_input_is_never_a_parameter():
    made = sorted_and_tried(lambda h, x: [h, jnp.exp(x), h + x], [], [X, W], stored=False)
    assert made.fixed == []


# ------------------------------------------------------------- random programs

CHEAP_OPERATIONS = ["add", "mul", "neg", "max", "sub"]
COSTLY_OPERATIONS = ["tanh", "sin"]
OPERATIONS = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "sub": lambda a, b: a - b,
    "max": jnp.maximum,
    "neg": lambda a, b: -a,
    "tanh": lambda a, b: jnp.tanh(a),
    "sin": lambda a, b: jnp.sin(a),
}


def random_program(rng):
    """A program of two parameters and two inputs, and some of its values as residuals."""
    names = rng.choice(CHEAP_OPERATIONS * 3 + COSTLY_OPERATIONS, 14)
    places = rng.integers(0, 5, (14, 2))
    picks = rng.integers(0, 18, 8)

    def program(*args):
        pool = list(args)
        for name, (i, j) in zip(names, places, strict=True):
            pool.append(OPERATIONS[name](pool[-1 - i % len(pool)], pool[-1 - j % len(pool)]))
        return [pool[k] for k in picks]

    return program


def cost(v, sources, maker):
    """How many cheap equations make a variable of these others; None where it takes more."""
    seen, ends = set(), [v]
    while ends:
        at = ends.pop()
        if at in seen or (at in sources and at is not v):
            continue
        if at not in maker or maker[at].primitive.name not in CHEAP_OPERATIONS:
            return None
        seen.add(at)
        ends += [u for u in maker[at].invars if isinstance(u, core.Var)]
    return len(seen)


def test_random_programs():
    """No residual is lost, none is recorded in vain, and none takes more than it may."""
    rng = np.random.default_rng(0)
    weights, inputs = [W, W[::-1]], [X, X + 0.1]
    spared = current = 0
    for trial in range(60):
        stored = trial % 2 == 0
        made = sort(random_program(rng), weights, inputs, stored=stored)
        # Eagerly: programs of three numbers each, whose few operations are compiled once.
        assert gives_back_all(made, weights, inputs, jit=False)
        jaxpr, found = made.closed.jaxpr, made.residuals
        maker = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        recorded = {jaxpr.outvars[i] for i in found.recorded}
        fixed = {jaxpr.outvars[i] for i in found.invariant}
        left_out = set(jaxpr.outvars) - recorded - fixed
        assert not fixed or not stored
        for v in recorded:
            n = cost(v, recorded, maker)
            assert n is None or n > MOST
        order = list(maker)
        for v in left_out:
            earlier = {u for u in left_out if order.index(u) < order.index(v)}
            assert cost(v, recorded | earlier, maker) <= MOST
        assert found.remade_bytes == X.nbytes * len(left_out)
        spared += len(left_out)
        current += len(fixed)
    assert spared > 40
    assert current > 20
