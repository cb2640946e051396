"""The gradient by lag against the unrolled graph, one copy of the parameters per step."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from harness import grid, moving_only, one_row, recorded
from jax import lax
from oracles import check, drifting, moving, random_like, reach
from two_parts import CARRY, PARAMS, XS
from two_parts import step as two_parts
from zoo import ZOO

import jaxbptt

LENGTH = 6


def only_of(norms, tree):
    """The norms of the leaves that gradients can flow through."""
    pairs = zip(jax.tree.leaves(norms), jax.tree.leaves(tree), strict=True)
    return [norm for norm, leaf in pairs if oracles.is_moving(leaf)]


@pytest.mark.parametrize(
    ("name", "t"),
    grid(
        [(name, 2) for name in ("tanh_rnn", "tokens")]  # warming up
        + [(name, 6) for name in ("lstm", "nested_dict", "tokens", "no_params", "no_y")]
        + [("stacked_layers", 6), ("integer_leaves", 6)],
        always=[("tokens", 2), ("no_params", 6), ("integer_leaves", 6)],
    ),
)
def test_each_lag(name, t):
    case = ZOO[name](np.float64)
    xs, thetas = case.xs(LENGTH), drifting(case.params, LENGTH)
    run = oracles.Run(case.step, thetas, case.carry, xs, LENGTH)
    carries, ys = run.trajectory
    ct_y, ct_carry = random_like(ys[0], 1), random_like(carries[0], 2)
    rec = jaxbptt.record(case.step, window=4)
    tape = recorded(rec, thetas, case.carry, xs, t)

    @jax.jit
    def look(theta, tape):
        here = functools.partial(jaxbptt.gradient_by_lag, rec, theta, tape, one_row(ct_y))
        of_all = rec.pullback(theta, tape, one_row(ct_y), ct_carry)
        terms = here(ct_carry, full=True)
        norms = terms.partial, here(ct_carry)
        return moving(terms.params), moving(terms.carry), norms, moving_only(of_all)

    *got, (partial, norms), ct = look(thetas[-1], tape)
    got = [[np.asarray(v) for v in part] for part in (*got, only_of(partial, thetas[-1]))]
    params, lams = run.by_lag(t, reach(t, 4), [ct_y], ct_carry)

    for lag in range(4):
        here = [[v[lag] for v in part] for part in got]
        if lag < len(params):
            check("by lag, params", here[0], params[lag], 1e-12)
            check("by lag, carry", here[1], lams[lag], 1e-12)
        else:
            assert not any(np.any(v) for v in [*here[0], *here[1]])
    template = thetas[-1], case.carry, thetas[-1]
    for norm, leaf in zip(jax.tree.leaves(norms), jax.tree.leaves(template), strict=True):
        assert norm.shape == (4,)
        assert oracles.is_moving(leaf) or not np.any(norm)
    norms = [only_of(part, tree) for part, tree in zip(norms, template, strict=True)]
    for norm, whole in zip(jax.tree.leaves(norms), jax.tree.leaves(got), strict=True):
        want = np.linalg.norm(whole.reshape(4, -1), axis=1)
        np.testing.assert_allclose(norm, want, rtol=1e-13)
    for lag in range(4):
        shorter = run.unrolled(t, reach(t, lag + 1), [ct_y], ct_carry).params
        for partial in (got[2], norms[2]):
            want = [np.linalg.norm(v) for v in shorter]
            check("by lag, partial", [np.asarray(v)[lag] for v in partial], want, 1e-12)
    check("by lag, summed", [v.sum(0) for v in got[0]], ct.params, 1e-14)
    check("by lag, last", [v[min(t, 4) - 1] for v in got[1]], ct.carry, 1e-14)


@pytest.mark.parametrize(
    "weights", grid(["stored", "current", "replayed"], always=["stored", "replayed"])
)
def test_windows_for_parts_and_several_outputs(weights):
    run = oracles.Run(two_parts, PARAMS, CARRY, XS, 8)
    rec = jaxbptt.record(two_parts, window={"fast": 2, "slow": 5}, every=3, weights=weights)
    tape = recorded(rec, run.thetas, CARRY, XS, 8)
    ct_ys = [random_like(run.trajectory[1][0], s) for s in range(3)]

    @jax.jit
    def look(params, tape, ct_ys):
        got = jaxbptt.gradient_by_lag(rec, params, tape, ct_ys, full=True)
        return [moving(part) for part in got]

    found = look(PARAMS, tape, np.stack(ct_ys))
    got = [[np.asarray(v) for v in part] for part in found]
    params, lams = run.by_lag(8, [reach(8, w, 3, 3) for w in (2, 5)], ct_ys)
    for lag in range(5):
        here = [[v[lag] for v in part] for part in got]
        check("by lag, parts", here[0], params[lag], 1e-12)
        check("by lag, parts, carry", here[1], lams[lag], 1e-12)
        sums = [np.sum(terms, axis=0) for terms in zip(*params[: lag + 1], strict=True)]
        check("by lag, parts, partial", here[2], [np.linalg.norm(v) for v in sums], 1e-12)


def test_partial_stays_where_one_output_of_several_reaches_no_further():
    rec = jaxbptt.record(two_parts, window=5, every=3)  # one output: 1 + (5 - 3) steps
    tape = recorded(rec, [PARAMS] * 8, CARRY, XS, 8)
    ct_ys = random_like(jax.eval_shape(two_parts, PARAMS, CARRY, XS[0])[1], 1)[None]

    @jax.jit
    def look(params, tape):
        by_lag = jaxbptt.gradient_by_lag(rec, params, tape, ct_ys)
        return by_lag.params, by_lag.partial, rec.pullback(params, tape, ct_ys).params

    shares, partial, grads = jax.tree.map(np.asarray, look(PARAMS, tape))
    for name, norms in partial.items():
        np.testing.assert_allclose(norms[2:], [np.linalg.norm(grads[name])] * 3, rtol=1e-13)
        assert not np.any(shares[name][3:])


def test_partial_of_half_precision_is_added_up_in_float32():
    def step(w, c, x):
        return c + w * x, c + w * x

    one = jnp.ones((), jnp.bfloat16)
    rec = jaxbptt.record(step, window=4)
    xs = jnp.array([1, 1, 1, 256], jnp.bfloat16)  # 256 + 1 is 256 in bfloat16
    tape = recorded(rec, [one] * 4, jnp.zeros((), jnp.bfloat16), xs, 4)
    got = jaxbptt.gradient_by_lag(rec, one, tape, one[None])
    assert got.partial.dtype == jnp.float32
    assert got.partial.tolist() == [256, 257, 258, 259]


def test_norms_of_half_precision_are_taken_in_float32():
    def step(w, c, x):
        return c + w * x, c + w * x

    w, x = jnp.ones(3, jnp.bfloat16), jnp.array([256, 1, 1], jnp.bfloat16)
    rec = jaxbptt.record(step, window=1)
    tape = recorded(rec, [w], jnp.zeros(3, jnp.bfloat16), x[None], 1)
    got = jaxbptt.gradient_by_lag(rec, w, tape, w[None])
    assert got.params.dtype == jnp.float32
    np.testing.assert_allclose(got.params, [65538**0.5], rtol=1e-6)  # in bfloat16 it is 256


def test_norms_can_be_averaged_over_time_whatever_the_leaves():
    def step(params, carry, x):
        h, count = carry
        h = jnp.tanh(params["w"] * h + params["table"][params["which"]] + x)
        return (h, count + 1), h

    params = {"w": jnp.array(0.5), "table": jnp.ones(3), "which": jnp.int32(1)}
    rec = jaxbptt.record(step, window=3)
    tape = rec.init(params, (jnp.array(0.0), jnp.int32(0)), jnp.array(0.0))

    def visit(tape, x):
        tape, _ = rec(params, tape, x)
        return tape, jaxbptt.gradient_by_lag(rec, params, tape, jnp.ones(1))

    _, stacked = jax.jit(lambda tape: lax.scan(visit, tape, np.arange(5.0)))(tape)
    mean = jax.tree.map(lambda v: np.asarray(v).mean(0), stacked)
    assert {leaf.shape for leaf in jax.tree.leaves(mean)} == {(3,)}
    assert not np.any(mean.params["which"])
    assert not np.any(mean.partial["which"])
    assert not np.any(mean.carry[1])
    assert np.all(mean.carry[0] > 0)


def test_dwhh_and_dhnext_of_a_hand_written_backward_pass():
    """h_s = tanh(x_s + W h_{s-1}) and y = h: the loop of a textbook, in NumPy."""
    w, h0 = np.array([[0.5, -0.3], [0.2, 0.7]]), np.array([0.1, -0.4])
    xs = np.array([[0.3, 0.1], [-0.5, 0.2], [0.4, 0.9], [0.0, -0.7]])
    hs = [h0]
    for x in xs:
        hs.append(np.tanh(x + w @ hs[-1]))
    d_whh, d_hnext, ct = [], [], np.ones(2)
    for s in (4, 3, 2):
        raw = (1 - hs[s] ** 2) * ct
        d_whh.append(np.outer(raw, hs[s - 1]))
        ct = w.T @ raw
        d_hnext.append(ct)

    def step(w, h, x):
        h = jnp.tanh(x + w @ h)
        return h, h

    rec = jaxbptt.record(step, window=3)
    tape = recorded(rec, [jnp.asarray(w)] * 4, jnp.asarray(h0), jnp.asarray(xs), 4)
    got = jaxbptt.gradient_by_lag(rec, jnp.asarray(w), tape, jnp.ones((1, 2)), full=True)
    np.testing.assert_allclose(got.params, np.stack(d_whh), rtol=1e-13)
    np.testing.assert_allclose(got.carry, np.stack(d_hnext), rtol=1e-13)


@pytest.mark.compiled
def test_norms_hold_no_copies_of_the_parameters():
    case = ZOO["lstm"](np.float64)
    rec = jaxbptt.record(case.step, window=50, weights="current")  # none on the tape either
    tape = jax.eval_shape(rec.init, case.params, case.carry, case.x())
    y = jax.eval_shape(case.step, case.params, case.carry, case.x())[1]

    def compiled(full):
        def look(params, tape):
            ct_ys = jnp.ones((1, *y.shape))
            return jaxbptt.gradient_by_lag(rec, params, tape, ct_ys, full=full)

        return jax.jit(look).lower(case.params, tape).compile().as_text()

    shapes = {tuple(sorted((50, *v.shape))) for v in case.params.values() if v.ndim > 1}

    def held(text):
        found = re.findall(r"f64\[([\d,]+)\]", text)
        return {tuple(sorted(map(int, dims.split(",")))) for dims in found}

    assert shapes
    assert shapes <= held(compiled(full=True))
    assert not shapes & held(compiled(full=False))


def test_what_is_wrong_is_said():
    case = ZOO["tanh_rnn"](np.float64)
    rec = jaxbptt.record(case.step, window=3)
    tape = rec.init(case.params, case.carry, case.x())
    with pytest.raises(
        ValueError, match=r"^recorder must be what jaxbptt.record returned, but got"
    ):
        jaxbptt.gradient_by_lag(case.step, case.params, tape, jnp.ones((1, 2, 5)))
    with pytest.raises(ValueError, match=r"^tape must be the Tape"):
        jaxbptt.gradient_by_lag(rec, case.params, case.carry, jnp.ones((1, 2, 5)))
    with pytest.raises(ValueError, match=r"^ct_ys must have a first axis over 1 to window=3"):
        jaxbptt.gradient_by_lag(rec, case.params, tape, jnp.ones((4, 2, 5)))
