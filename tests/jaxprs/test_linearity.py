"""Derivative rules that are not linear in their cotangent, and how they are told from others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from harness import F64, draw, online, pulled
from jax import lax
from oracles import check, random_like, reach
from zoo import ZOO

import jaxbptt
from jaxbptt._jaxprs.linearity import is_linear

LENGTH = 7


# ----------------------------------------------------- what is linear, by itself


def linear_in_second(function, *args):
    """Whether `function(residual, ct)` is known to be linear in ct."""
    closed = jax.make_jaxpr(function)(*args)
    return is_linear(closed, len(jax.tree.leaves(args[0])))


R, CT = draw(0, 3, 3), draw(1, 3, 3)
LINEAR = {
    "product": lambda r, ct: r * ct - 2 * ct,
    "matrices": lambda r, ct: (r @ ct, ct.T @ r),
    "division": lambda r, ct: ct / r,
    "selection": lambda r, ct: jnp.where(r > 0, ct, 0.0),
    "into zeros": lambda r, ct: jnp.zeros((5, 3)).at[jnp.array([0, 2, 2])].add(ct),
    "a row of zeros": lambda r, ct: jnp.concatenate([ct, jnp.zeros((1, 3))]),
    "padding": lambda r, ct: jnp.pad(ct, 1),
    "sums": lambda r, ct: jnp.cumsum(ct, 0) + jnp.sum(ct),
    "complex": lambda r, ct: jnp.real(jnp.conj(lax.complex(ct, r * ct)) * lax.complex(r, r)),
    "branch": lambda r, ct: lax.cond(r[0, 0] > 0, lambda v: 2 * v, lambda v: 0 * v, ct),
    "loop": lambda r, ct: lax.fori_loop(0, 3, lambda _, v: r @ v, ct),
    "loop from zeros": lambda r, ct: lax.scan(
        lambda c, row: (c + row[1] * row[0], c), jnp.zeros(3), (ct, r)
    ),
    "call": lambda r, ct: jax.jit(lambda v: jax.checkpoint(lambda u: r * u)(v))(ct),
    "rows looked up": lambda r, ct: ct[jnp.array([2, 0])],
    "a sum in a loop": lambda r, ct: (
        lax.scan(lambda sums, row: (sums + jnp.outer(row, ct[0]), row @ r), jnp.zeros((3, 3)), r)[0]
        + ct
    ),
    "stacked and taken apart": lambda r, ct: lax.cond(
        r[0, 0] > 0, lambda v: jnp.stack([v[0], v[1]]), lambda v: 2 * v[:2], ct
    ),
    "a solution": lambda r, ct: jnp.linalg.solve(r + 3 * jnp.eye(3), ct),
    "scaled rows": lambda r, ct: ct.at[jnp.array([0, 2])].multiply(r[:2]),
    "rows that may lie outside": lambda r, ct: ct.at[jnp.array([0, 5])].get(
        mode="fill", fill_value=0
    ),
    "what it is not made of": lambda r, ct: (ct, jnp.zeros(2)),
}
OTHER = {
    "clipped": lambda r, ct: jnp.clip(ct, -1.0, 1.0),
    "by its norm": lambda r, ct: ct / jnp.maximum(1.0, jnp.sqrt(jnp.sum(ct**2))),
    "noise added": lambda r, ct: ct + r,
    "selected by itself": lambda r, ct: jnp.where(ct > 0, ct, 0.0),
    "selected beside a number": lambda r, ct: jnp.where(r > 0, ct, 1.0),
    "product with itself": lambda r, ct: ct * ct,
    "sign": lambda r, ct: jnp.sign(ct),
    "put among others": lambda r, ct: jnp.concatenate([ct, r]),
    "put into others": lambda r, ct: r.at[0].add(ct[0]),
    "padded with one": lambda r, ct: jnp.pad(ct, 1, constant_values=1.0),
    "rounded": lambda r, ct: ct.astype(jnp.int32).astype(float),
    "in a branch": lambda r, ct: lax.cond(r[0, 0] > 0, jnp.abs, lambda v: v, ct),
    "one branch fixed": lambda r, ct: lax.cond(r[0, 0] > 0, lambda v: r, lambda v: v, ct),
    "branch chosen by it": lambda r, ct: lax.cond(ct[0, 0] > 0, lambda v: 2 * v, lambda v: v, ct),
    "in a loop": lambda r, ct: lax.fori_loop(0, 3, lambda _, v: jnp.tanh(v), ct),
    "loop from ones": lambda r, ct: lax.scan(lambda c, v: (c + v, c), jnp.ones(3), ct),
    "in a call": lambda r, ct: jax.jit(jnp.abs)(ct),
    "filled with ones": lambda r, ct: ct.at[jnp.array([0, 5])].get(mode="fill", fill_value=1.0),
    "in eight bits": lambda r, ct: ct.astype(jnp.float8_e4m3fn).astype(ct.dtype),
    "fewer digits": lambda r, ct: lax.reduce_precision(ct, 4, 3),
    "ones added in a loop": lambda r, ct: lax.scan(lambda c, v: (c + 1.0, v + c), jnp.zeros(3), ct)[
        1
    ],
    "a constant": lambda r, ct: (ct, jnp.ones(2)),
    "divided by": lambda r, ct: r / ct,
    "on the host": lambda r, ct: jax.pure_callback(np.asarray, ct, ct),
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_program(name):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert linear_in_second(LINEAR[name], R, CT)


@pytest.mark.parametrize("name", OTHER)
def test_a_program_that_is_not_or_not_known_to_be_linear(name):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert not linear_in_second(OTHER[name], R, CT)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_the_pullbacks_of_ordinary_steps_are_known_to_be_linear(name):
    """Or else they would be pulled back the slow way, and nobody would notice."""
    case = ZOO[name](F64)

    def pull(carry, cts):
        _, pull = jax.vjp(case.step, case.params, carry, case.x())
        return pull(cts)

    outs = jax.eval_shape(case.step, case.params, case.carry, case.x())
    cts = oracles.refill(outs, [jnp.zeros(v.shape, v.dtype) for v in oracles.moving(outs)])
    moving = oracles.moving(cts)

    def of_moving(carry, *moving):
        rest = iter(moving)
        full = jax.tree.map(
            lambda v: next(rest) if oracles.is_moving(v) else np.zeros(v.shape, jax.dtypes.float0),
            outs,
        )
        return oracles.moving(pull(carry, full))

    closed = jax.make_jaxpr(of_moving)(case.carry, *moving)
    assert is_linear(closed, len(jax.tree.leaves(case.carry)))


# ------------------------------------------------------------ clipped at each step


def clipping(bound):
    """The identity, through which no entry of a cotangent passes that is larger than `bound`."""

    @jax.custom_vjp
    def clipped(v):
        return v

    clipped.defvjp(lambda v: (v, None), lambda _, ct: (jnp.clip(ct, -bound, bound),))
    return clipped


clipped = clipping(0.3)
PARAMS = {"w": draw(0, 4, 4), "u": draw(1, 3, 4), "b": draw(2, 4)}
CARRY, XS = draw(3, 2, 4), draw(4, LENGTH, 2, 3)


def step(p, c, x):
    """λ is clipped on its way into the step, and ȳ with it."""
    h = jnp.tanh(clipped(c @ p["w"]) + x @ p["u"] + p["b"][None])
    return h, 3 * clipped(h)


def by_groups(window, every, cts, lam, reverse=False):
    run = oracles.Run(step, PARAMS, CARRY, XS[::-1] if reverse else XS, LENGTH)
    want = run.whole(window, every, cts[::-1] if reverse else cts, lam)
    xs = [v[::-1] for v in want.xs] if reverse else want.xs
    return oracles.Expected(want.params, want.carry, xs)


@pytest.fixture(scope="module")
def given():
    carries, ys = oracles.Run(step, PARAMS, CARRY, XS, LENGTH).trajectory
    return [random_like(y, s) for s, y in enumerate(ys)], random_like(carries[-1], 50)


@pytest.mark.parametrize(
    ("window", "every", "reverse"),
    [
        (2, 1, False),
        (4, 1, True),
        (5, 2, False),
        (6, 3, True),
        (5, 3, False),
        (LENGTH + 2, 2, False),
    ],
)
def test_each_group_is_clipped_by_itself(window, every, reverse, given):
    """The length is no multiple of every: a last group that is cut short is among them."""
    want = by_groups(window, every, *given, reverse)
    how = {"window": window, "every": every, "reverse": reverse}
    got, _ = pulled(step, PARAMS, CARRY, XS, LENGTH, *given, **how)
    check("clipped, scan", got, want, 1e-12)


@pytest.mark.parametrize(("window", "every"), [(3, 3), (2, 4)])
def test_where_one_chain_is_alive_at_a_time_too(window, every, given):
    want = by_groups(window, every, *given)
    got, _ = pulled(step, PARAMS, CARRY, XS, LENGTH, *given, window=window, every=every)
    check("clipped, scan", got, want, 1e-12)


def test_without_a_window_all_outputs_go_back_in_one_chain_as_under_lax_scan(given):
    want = by_groups(LENGTH, LENGTH, *given)
    got, _ = pulled(step, PARAMS, CARRY, XS, LENGTH, *given, window=None)
    check("clipped, scan", got, want, 1e-12)


def test_clipping_matters_here(given):
    got, _ = pulled(step, PARAMS, CARRY, XS, LENGTH, *given, window=3)
    free = functools.partial(lambda clip, p, c, x: with_clip(clip, p, c, x), lambda v: v)
    other, _ = pulled(free, PARAMS, CARRY, XS, LENGTH, *given, window=3)
    assert oracles.relative_error(got, other) > 0.1


def with_clip(clip, p, c, x):
    h = jnp.tanh(clip(c @ p["w"]) + x @ p["u"] + p["b"][None])
    return h, 3 * clip(h)


@pytest.mark.parametrize("weights", ["stored", "current", "replayed"])
def test_record_clips_each_chain(weights, given):
    run = oracles.Run(step, PARAMS, CARRY, XS, LENGTH)
    cts, _ = given
    found = online(jaxbptt.record(step, window=3, weights=weights), run, cts)
    for t in range(1, LENGTH + 1):
        want = run.unrolled(t, reach(t, 3), [cts[t - 1]])
        check("clipped, record", found.grads[t - 1][0], want.params, 1e-12)
        oracles.check_cotangents("clipped, record", found.cts[t - 1], want, 1e-12)


def test_scan_is_the_sum_of_what_record_gives(given):
    """The same settings, the same parameters: the same gradient, whatever the rule."""
    cts, _ = given
    run = oracles.Run(step, PARAMS, CARRY, XS, LENGTH)
    found = online(jaxbptt.record(step, window=3), run, cts)
    total = [
        np.sum(np.stack(leaves), 0) for leaves in zip(*(g[0] for g in found.grads), strict=True)
    ]
    none = jnp.zeros_like(CARRY)
    got, _ = pulled(step, PARAMS, CARRY, XS, LENGTH, cts, none, window=3)
    check("clipped, scan and record", got.params, total, 1e-12)


def two_parts(p, carry, x):
    fast, slow = carry["fast"], carry["slow"]
    new = jnp.tanh(clipped(fast @ p["w"]) + x @ p["u"] + slow)
    return {"fast": new, "slow": clipped(0.8 * slow + 0.3 * new)}, 2 * new * slow


@pytest.mark.parametrize("every", [1, 2, 4])
def test_with_a_window_for_each_part(every):
    carry = {"fast": CARRY, "slow": draw(5, 2, 4)}
    p = {"w": PARAMS["w"], "u": PARAMS["u"]}
    run = oracles.Run(two_parts, p, carry, XS, LENGTH)
    carries, ys = run.trajectory
    cts = [random_like(y, s) for s, y in enumerate(ys)], random_like(carries[-1], 50)
    want = run.whole([2, 5], every, *cts)
    how = {"window": {"fast": 2, "slow": 5}, "every": every}
    got, _ = pulled(two_parts, p, carry, XS, LENGTH, *cts, **how)
    check("clipped, parts", got, want, 1e-12)


def test_the_gradient_of_the_clipped_gradient():
    def loss(w, scan):
        return jnp.sum(scan(lambda c, x: step({**PARAMS, "w": w}, c, x), CARRY, XS)[1])

    def first(w, scan):
        return jnp.sum(jax.grad(loss)(w, scan) ** 2)

    ours = functools.partial(jaxbptt.scan, window=3)
    w, eps, direction = PARAMS["w"], 1e-6, draw(9, 4, 4)
    got = jnp.vdot(jax.jit(jax.grad(lambda w: first(w, ours)))(w), direction)
    value = jax.jit(lambda w: first(w, ours))
    wanted = (value(w + eps * direction) - value(w - eps * direction)) / (2 * eps)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_in_half_precision_the_chains_are_added_up_in_float32():
    """400 chains: in bfloat16 their sum would stand still."""
    length = 400
    xs, one = jnp.ones(length, jnp.bfloat16), jnp.ones((), jnp.bfloat16)
    clip = clipping(8.0)

    def run(scan, w):
        return jnp.sum(scan(lambda c, x: (clip(w * x + 0 * c), w * x), 0 * one, xs)[1])

    got = jax.jit(jax.grad(functools.partial(run, functools.partial(jaxbptt.scan, window=2))))(one)
    assert got == length


@pytest.mark.parametrize(
    "window", [{"fast": 6, "slow": 1}, {"fast": 8, "slow": 1}, {"fast": 1, "slow": 9}]
)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_part_whose_window_is_longer_than_the_run(window, reverse):
    """x̄ too lies at its own step."""
    carry = {"fast": CARRY, "slow": draw(5, 2, 4)}
    p, xs = {"w": PARAMS["w"], "u": PARAMS["u"]}, XS[:6]
    run = oracles.Run(two_parts, p, carry, xs[::-1] if reverse else xs, 6)
    carries, ys = run.trajectory
    cts, lam = [random_like(y, s) for s, y in enumerate(ys)], random_like(carries[-1], 50)
    want = run.whole([window["fast"], window["slow"]], 2, cts, lam)
    want = want._replace(xs=[v[::-1] for v in want.xs]) if reverse else want
    cts = cts[::-1] if reverse else cts
    how = {"window": window, "every": 2, "reverse": reverse}
    got, _ = pulled(two_parts, p, carry, xs, 6, cts, lam, **how)
    check("clipped, long parts", got, want, 1e-12)


STEPS = {
    "an inner loop": lambda p, c, x: (
        lax.scan(lambda a, w: (jnp.tanh(w * a + x), a), c, p)[0],
        lax.scan(lambda a, w: (jnp.tanh(w * a + x), a), c, p)[1][-1],
    ),
    "a loop in a loop": lambda p, c, x: (
        lax.scan(lambda a, w: (lax.fori_loop(0, 2, lambda _, b: jnp.sin(w * b), a), a), c + x, p)[
            0
        ],
        c,
    ),
    "a checkpointed loop": lambda p, c, x: (
        lax.scan(jax.checkpoint(lambda a, w: (jnp.tanh(w * a + x), None)), c, p)[0],
        c,
    ),
    "a stack": lambda p, c, x: (jnp.sum(jnp.stack([jnp.tanh(p[0] * c), p[1] * x]), 0), c),
    "a solution": lambda p, c, x: (
        jnp.linalg.solve(jnp.outer(p, p) + 3 * jnp.eye(3), c + x),
        c,
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_pullbacks_of_everyday_operations_are_known_to_be_linear(name):
    p, c, x = draw(0, 3), draw(1, 3), draw(2, 3)

    def pull(res, *cts):
        return jax.vjp(STEPS[name], *res)[1](cts)

    closed = jax.make_jaxpr(pull)((p, c, x), *STEPS[name](p, c, x))
    assert is_linear(closed, 3)
