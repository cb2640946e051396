"""The gradient by range of lags against the unrolled graph, its terms added up by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from harness import grid, one_row, recorded
from jax import lax
from oracles import check, drifting, moving, random_like, reach
from two_parts import CARRY, PARAMS, XS
from two_parts import step as two_parts
from zoo import ZOO

import jaxbptt


def added_up(terms, windows):
    """Of terms by lag, the sums over the lags that each window has and the one before it lacks."""
    zeros = [np.zeros_like(v) for v in terms[0]]
    starts = (0, *windows[:-1])
    return [
        [sum(leaves, start) for start, *leaves in zip(zeros, *terms[a:b], strict=True)]
        for a, b in zip(starts, windows, strict=True)
    ]


def check_ranges(label, found, terms, windows):
    assert found.windows == windows
    leaves = [np.asarray(v) for v in jax.tree.leaves(found.params)]
    for i, want in enumerate(added_up(terms, windows)):
        check(label, [v[i] for v in leaves], want, 1e-12)


@pytest.mark.parametrize(
    ("name", "t", "window", "windows"),
    grid(
        [
            ("tanh_rnn", 7, 6, (1, 2, 4, 6)),
            ("lstm", 7, 4, (1, 2, 4)),
            ("tokens", 3, 5, (1, 2, 4, 5)),  # warming up: ranges that are not there yet
            ("integer_leaves", 6, 3, (1, 2, 3)),
            ("no_y", 6, 2, (1, 2)),
            ("tanh_rnn", 4, 1, (1,)),
        ],
        always=[("tanh_rnn", 7, 6, (1, 2, 4, 6)), ("tokens", 3, 5, (1, 2, 4, 5))],
    ),
)
def test_each_range(name, t, window, windows):
    case = ZOO[name](np.float64)
    xs, thetas = case.xs(7), drifting(case.params, 7)
    run = oracles.Run(case.step, thetas, case.carry, xs, 7)
    carries, ys = run.trajectory
    ct_y, ct_carry = random_like(ys[0], 1), random_like(carries[0], 2)
    rec = jaxbptt.record(case.step, window=window)
    tape = recorded(rec, thetas, case.carry, xs, t)

    @jax.jit
    def look(theta, tape):
        found = jaxbptt.gradient_by_range(rec, theta, tape, one_row(ct_y), ct_carry)
        return found, moving(rec.pullback(theta, tape, one_row(ct_y), ct_carry).params)

    found, whole = look(thetas[-1], tape)
    terms, _ = run.by_lag(t, reach(t, window), [ct_y], ct_carry)
    check_ranges("by range", found, terms, windows)
    sums = [np.asarray(v).sum(0) for v in jax.tree.leaves(found.params)]
    check("by range, summed", sums, whole, 1e-14)


@pytest.mark.parametrize("weights", grid(["stored", "current", "replayed"], always=["current"]))
def test_windows_for_parts_and_several_outputs(weights):
    run = oracles.Run(two_parts, PARAMS, CARRY, XS, 8)
    window = {"fast": 3, "slow": 7}  # the fast part's window ends within a range
    rec = jaxbptt.record(two_parts, window=window, every=3, weights=weights)
    tape = recorded(rec, run.thetas, CARRY, XS, 8)
    ct_ys = [random_like(run.trajectory[1][0], s) for s in range(3)]

    @jax.jit
    def look(params, tape, ct_ys):
        return jaxbptt.gradient_by_range(rec, params, tape, ct_ys)

    found = look(PARAMS, tape, np.stack(ct_ys))
    terms, _ = run.by_lag(8, [reach(8, w, 3, 3) for w in (3, 7)], ct_ys)
    check_ranges("by range, parts", found, terms, (1, 2, 4, 7))


def test_half_precision_is_added_up_in_float32_and_leaves_without_a_gradient_are_none():
    def step(params, c, x):
        c = c + params["w"] * x
        return c, c

    params = {"w": jnp.ones((), jnp.bfloat16), "n": jnp.int32(1)}
    rec = jaxbptt.record(step, window=8)
    tape = rec.init(params, jnp.zeros((), jnp.bfloat16), jnp.zeros((), jnp.bfloat16))
    for x in [1, 256, 1, 1, 1, 1, 1, 1]:  # 256 + 1 is 256 in bfloat16
        tape, y = rec(params, tape, jnp.asarray(x, jnp.bfloat16))
    found = jaxbptt.gradient_by_range(rec, params, tape, jnp.ones_like(y)[None])
    assert found.params["n"] is None
    assert found.params["w"].dtype == jnp.float32
    assert found.params["w"].tolist() == [1, 1, 2, 259]


def test_sums_over_the_steps_of_a_loop_hold_nothing_else():
    rec = jaxbptt.record(lambda w, c, x: (w * c + x, w * c + x), window=4)
    w, xs = jnp.array(0.5), jnp.arange(1.0, 7.0)

    def one(state, x):
        tape, sums = state
        tape, _ = rec(w, tape, x)
        found = jaxbptt.gradient_by_range(rec, w, tape, jnp.ones(1))
        return (tape, jax.tree.map(jnp.add, sums, found)), found

    tape = rec.init(w, jnp.array(0.0), xs[0])
    none = jaxbptt.ByRange(jnp.zeros(3), (1, 2, 4))
    (_, sums), each = jax.jit(lambda tape: lax.scan(one, (tape, none), xs))(tape)
    np.testing.assert_allclose(sums.params, each.params.sum(0), rtol=1e-14)
    assert repr(sums) == "ByRange(windows=(1, 2, 4))"
    many = jax.vmap(lambda ct: jaxbptt.gradient_by_range(rec, w, tape, ct).params)(jnp.ones((2, 1)))
    assert many.shape == (2, 3)


def test_what_is_wrong_is_said():
    case = ZOO["tanh_rnn"](np.float64)
    rec = jaxbptt.record(case.step, window=3)
    tape, ct_ys = rec.init(case.params, case.carry, case.x()), jnp.ones((1, 2, 5))
    with pytest.raises(ValueError, match=r"^recorder must be what jaxbptt.record returned"):
        jaxbptt.gradient_by_range(case.step, case.params, tape, ct_ys)
    with pytest.raises(ValueError, match=r"^tape must be the Tape"):
        jaxbptt.gradient_by_range(rec, case.params, case.carry, ct_ys)
    with pytest.raises(ValueError, match=r"^ct_ys must have a first axis over 1 to window=3"):
        jaxbptt.gradient_by_range(rec, case.params, tape, jnp.ones((4, 2, 5)))
    paced = jaxbptt.record(case.step, window=3, pace=1)
    tape = paced.init(case.params, case.carry, case.x())
    with pytest.raises(ValueError, match=r"^recorder must have no pace for gradient_by_range"):
        jaxbptt.gradient_by_range(paced, case.params, tape, ct_ys)
