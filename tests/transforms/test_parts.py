"""A window for each part of the carry, in `record` and in `scan`."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from harness import draw, grid, online, pulled
from jax import lax
from jaxpr_reading import products
from oracles import check, check_cotangents, drifting, random_like, reach
from two_parts import CARRY, LENGTH, PARAMS, XS, step

import jaxbptt

PREFIXES = [
    {"fast": 2, "slow": 5},
    {"fast": 5, "slow": 2},
    {"fast": 1, "slow": (3, 1)},
    {"fast": 3, "slow": (3, 7)},
    {"fast": 2, "slow": (20, 1)},
]


def of_moving(window):
    """The windows of fast and of slow."""
    slow = window["slow"]
    return [window["fast"], slow[0] if isinstance(slow, tuple) else slow]


@functools.cache
def run_of(weights):
    """The run, with parameters that drift where they are stored, and cotangents of each step."""
    thetas = drifting(PARAMS, LENGTH) if weights == "stored" else [PARAMS] * LENGTH
    run = oracles.Run(step, thetas, CARRY, XS, LENGTH)
    carries, ys = run.trajectory
    ct_ys = [random_like(y, t) for t, y in enumerate(ys)]
    return run, ct_ys, [random_like(c, 50 + t) for t, c in enumerate(carries)]


@pytest.mark.parametrize(
    ("window", "weights"),
    grid(
        [(window, "stored") for window in PREFIXES] + [(PREFIXES[0], "current")],
        always=[(PREFIXES[1], "stored"), (PREFIXES[3], "stored"), (PREFIXES[0], "current")],
    ),
    ids=str,
)
def test_record_at_every_step(window, weights):
    run, ct_ys, ct_carries = run_of(weights)
    rec = jaxbptt.record(step, window=window, weights=weights)
    assert rec.window == window
    found = online(rec, run, ct_ys, ct_carries)
    rows = ct_ys, ct_carries, found.grads, found.cts
    for t, ct_y, ct_carry, grads, ct in zip(range(1, LENGTH + 1), *rows, strict=True):
        want = run.unrolled(t, [reach(t, w) for w in of_moving(window)], [ct_y], ct_carry)
        check("parts, in the loop", grads[0], want.params, 1e-12)
        check_cotangents("parts, pullback", ct, want, 1e-12)


def loss_step(p, c, x):
    c, y = step(p, c, x)
    return c, jnp.sum(y**2)


@functools.cache
def scored_run():
    return oracles.Run(loss_step, PARAMS, CARRY, XS, LENGTH)


def outputs_pulled(window, every, all_of_them):
    """For how many outputs at once the pullback is asked."""
    longest = min(LENGTH, max(of_moving(window)))
    return [m for m in range(1, longest + 1) if all_of_them or m in (1, every, longest)]


IN_GROUPS = list(itertools.product(PREFIXES[::2], [2, 4]))


@pytest.mark.parametrize(
    ("window", "every", "all_of_them"),
    grid(
        [(*case, False) for case in IN_GROUPS] + [(*case, True) for case in IN_GROUPS],
        always=[(PREFIXES[0], 2, False), (PREFIXES[2], 4, False), (PREFIXES[4], 4, False)],
    ),
    ids=str,
)
def test_record_in_groups(window, every, all_of_them):
    run = scored_run()
    rec = jaxbptt.record(loss_step, window=window, every=every)
    rows = min(every, max(of_moving(window)))
    numbers = outputs_pulled(window, every, all_of_them)

    @jax.jit
    def go(carry, xs):
        def one(tape, x):
            def loss(p):
                new, y = rec(p, tape, x)
                return y, new

            grad, new = jax.grad(loss, has_aux=True)(PARAMS)
            cts = [rec.pullback(PARAMS, new, jnp.ones(m)) for m in numbers]
            return new, (
                grad,
                [(ct.params, ct.carry["fast"], ct.carry["slow"][0], ct.xs) for ct in cts],
            )

        return lax.scan(one, rec.init(PARAMS, carry, xs[0]), xs)[1]

    for t, (grad, cts) in enumerate(oracles.unstack(go(CARRY, XS), LENGTH), 1):
        if t % every == 0:
            oldest = [reach(t, w, every, every) for w in of_moving(window)]
            want = run.unrolled(t, oldest, [np.ones(())] * rows)
            check("parts, in groups", grad, want.params, 1e-12)
        for m, (params, *carry, xs) in zip(numbers, cts, strict=True):
            if m > t:
                continue
            oldest = [reach(t, w, every, m) for w in of_moving(window)]
            want = run.unrolled(t, oldest, [np.ones(())] * m)
            ct = oracles.Expected(params, carry, xs)
            check_cotangents("parts, m outputs", ct, want, 1e-12)


@pytest.mark.parametrize(
    ("window", "every"),
    grid(
        itertools.product(PREFIXES, [1, 3, 4, 9]),
        always=[
            (PREFIXES[0], 3),
            (PREFIXES[1], 1),
            (PREFIXES[2], 4),
            (PREFIXES[3], 9),
            (PREFIXES[4], 1),
            (PREFIXES[0], 4),
        ],
    ),
    ids=str,
)
def test_scan_against_each_group(window, every):
    run, ct_ys, ct_carries = run_of("current")
    want = run.whole(of_moving(window), every, ct_ys, ct_carries[-1])
    how = {"window": window, "every": every}
    got, _ = pulled(step, PARAMS, CARRY, XS, LENGTH, ct_ys, ct_carries[-1], **how)
    for name in ("params", "carry", "xs"):
        check(f"parts, scan, {name}", getattr(got, name), getattr(want, name), 1e-12)


def test_equal_windows_are_one_window():
    @jax.jit
    def pulled_back(carry, xs):
        def one(rec):
            go = lambda tape, x: (rec(PARAMS, tape, x)[0], None)  # noqa: E731
            tape, _ = lax.scan(go, rec.init(PARAMS, carry, xs[0]), xs)
            ct = rec.pullback(PARAMS, tape, jnp.ones((1, 2, 2)))
            return ct.params, ct.carry["fast"], ct.carry["slow"][0], ct.xs

        return [one(jaxbptt.record(step, window=w)) for w in ({"fast": 3, "slow": 3}, 3)]

    jax.tree.map(np.testing.assert_array_equal, *pulled_back(CARRY, XS[:5]))


def test_a_part_whose_window_is_over_is_not_computed_with():
    rec = jaxbptt.record(step, window={"fast": 2, "slow": 9})
    tape = rec.init(PARAMS, CARRY, XS[0])
    pull = functools.partial(rec.pullback, PARAMS, ct_ys=jnp.ones((1, 2, 2)))
    jaxpr = jax.make_jaxpr(lambda tape: pull(tape))(tape)
    loops = [e.params["jaxpr"].jaxpr for e in jaxpr.jaxpr.eqns if e.primitive.name == "scan"]
    made = [[shape for shape, _ in products(loop)] for loop in loops]
    assert (2, 3) in made[0]  # x̄ through wx, which only fast has
    assert (2, 3) not in made[-1]
    assert len(made[-1]) < len(made[0])


def test_a_carry_that_is_handed_on_unchanged_is_still_cut():
    """`lax.scan` itself would make it a parameter of all steps."""

    def run(carry, xs, **how):
        def f(c, x):
            return (c[0], c[1] + x * c[0]), c[0] * c[1]

        return jaxbptt.scan(f, carry, xs, **how)[1].sum()

    @jax.jit
    def grads(carry, xs):
        return [jax.grad(run)(carry, xs, window=window) for window in (1, None, (3, 1))]

    one, full, parts = grads((np.full(2, 3.0), np.zeros(2)), np.ones((3, 2)))
    scale, total = one
    assert scale.tolist() == [0, 0]  # y_1 = c⁰ c¹ with c¹ = 0
    assert total.tolist() == [3, 3]
    assert full[0].tolist() == [18, 18]
    scale, total = parts
    assert total.tolist() == [3, 3]
    assert scale.tolist() == [3 + 6, 3 + 6]  # c¹ of step s as it is: 0, 3, 6


@pytest.mark.parametrize(
    "window", [{"fast": 2}, {"fast": 2, "slow": (1, 2, 3)}, (2, 3), {"fast": 2, "slow": [1, 2]}]
)
def test_a_window_that_does_not_fit_the_carry(window):
    shown = r"window\[.*carry\['fast'\]: float64\[2,4\]\n.*carry\['slow'\]\[1\]: int32\[\]"
    with pytest.raises(ValueError, match=rf"(?s)^window must be one int, or ints in .*{shown}"):
        jaxbptt.record(step, window=window).init(PARAMS, CARRY, XS[0])
    with pytest.raises(ValueError, match=rf"(?s)^window must be one int, or ints in .*{shown}"):
        jaxbptt.scan(lambda c, x: step(PARAMS, c, x), CARRY, XS, window=window)


@pytest.mark.parametrize("bad", [0, -3, 2.0, True])
def test_each_window_is_a_positive_int(bad):
    with pytest.raises(ValueError, match=r"^window\['slow'\] must be an int of at least 1"):
        jaxbptt.record(step, window={"fast": 2, "slow": bad})
    with pytest.raises(ValueError, match=r"^window\['slow'\] must be an int of at least 1"):
        jaxbptt.scan(lambda c, x: (c, x), CARRY, XS, window={"fast": 2, "slow": bad})


def with_nothing_beside(carry, x):
    """A step whose carry has parts without leaves."""
    a = jnp.sin(carry["a"] + 0.3 * carry["more"]["b"]) * x
    return {"a": a, "extra": None, "more": {"b": 0.5 * carry["more"]["b"] + a, "none": ()}}, a


NOTHING_BESIDE = {"a": jnp.float64(0.4), "extra": None, "more": {"b": jnp.float64(0.2), "none": ()}}


@pytest.mark.parametrize("made", ["by tree.map", "by hand"])
def test_a_window_may_be_none_where_the_carry_is(made):
    of_leaves = {"a": 2, "extra": None, "more": {"b": 3, "none": ()}}
    if made == "by hand":
        of_leaves["more"]["none"] = None  # no leaves either
    xs = jnp.linspace(0.5, 1.5, 5)

    def summed(xs, t):
        """y of step t, by the chain rule written out: a is cut behind 2 steps, b behind 3."""
        a, b, y = NOTHING_BESIDE["a"], NOTHING_BESIDE["more"]["b"], 0.0
        for s in range(t + 1):
            a = a if s > t - 1 else lax.stop_gradient(a)
            b = b if s > t - 2 else lax.stop_gradient(b)
            x = xs[s] if s > t - 3 else lax.stop_gradient(xs[s])
            a = y = jnp.sin(a + 0.3 * b) * x
            b = 0.5 * b + a
        return y

    want = sum(jax.grad(summed)(xs, t) for t in range(5))
    loss = lambda xs: jnp.sum(  # noqa: E731
        jaxbptt.scan(with_nothing_beside, NOTHING_BESIDE, xs, window=of_leaves)[1]
    )
    np.testing.assert_allclose(jax.grad(loss)(xs), want, rtol=1e-12)

    rec = jaxbptt.record(lambda _, c, x: with_nothing_beside(c, x), window=of_leaves)
    tape = rec.init(None, NOTHING_BESIDE, xs[0])
    total = jnp.zeros(5)
    for t in range(5):
        tape, _ = rec(None, tape, xs[t])
        rows = rec.pullback(None, tape, jnp.ones(1)).xs  # those behind the present, oldest first
        first = max(t - 2, 0)
        total = total.at[first : t + 1].add(rows[len(rows) - (t + 1 - first) :])
    np.testing.assert_allclose(total, want, rtol=1e-12)


def test_none_is_no_window_of_a_part_that_exists():
    window = {"fast": 2, "slow": None}
    said = r"^window\['slow'\] must be an int of at least 1 .* but got None for a part .* 2 leaves"
    with pytest.raises(ValueError, match=said):
        jaxbptt.record(step, window=window).init(PARAMS, CARRY, XS[0])
    with pytest.raises(ValueError, match=said):
        jaxbptt.scan(lambda c, x: step(PARAMS, c, x), CARRY, XS, window=window)
    for nothing in (None, {"fast": None, "slow": None}):
        with pytest.raises(ValueError, match=r"^window must be an int of at least 1"):
            jaxbptt.record(step, window=nothing)
    with pytest.raises(ValueError, match=r"^window must be an int of at least 1"):
        jaxbptt.scan(lambda c, x: step(PARAMS, c, x), CARRY, XS, window={"fast": None})


def test_a_part_of_all_steps_may_have_any_window():
    def grad(slow):
        @jax.jit
        @jax.grad
        def of_run(p):
            windows = {"fast": 2, "slow": slow}
            return jnp.sum(jaxbptt.scan(functools.partial(step, p), CARRY, XS, window=windows)[1])

        return of_run(PARAMS)

    want = grad(LENGTH)
    for slow in (100, 2**31 - 1, 2**32, 2**63 - 1):
        jax.tree.map(np.testing.assert_array_equal, grad(slow), want)


def test_a_traced_window_of_a_part_is_refused_with_a_remedy_that_works():
    def run(slow):
        return jaxbptt.record(step, window={"fast": 2, "slow": slow})

    with pytest.raises(ValueError, match=r"^window\['slow'\] must be .* Close over a Python int"):
        jax.jit(run)(3)


def test_a_tape_made_with_other_windows_is_refused():
    tape = jaxbptt.record(step, window={"fast": 2, "slow": 9}).init(PARAMS, CARRY, XS[0])
    other = jaxbptt.record(step, window={"fast": 3, "slow": 9})
    with pytest.raises(ValueError, match=r"^tape must be from a recorder with window=\{'fast': 3"):
        other(PARAMS, tape, XS[0])


def test_a_recorder_with_windows_can_be_jitted():
    rec = jaxbptt.record(step, window={"fast": 2, "slow": 4})
    tape, _ = jax.jit(rec)(PARAMS, rec.init(PARAMS, CARRY, XS[0]), XS[0])
    assert tape.length == 1


def test_recorders_of_separate_modules_under_one_gradient():
    """An encoder without memory, a fast cell with 2, a slow one with 4, and a head.

    Through time gradient flows within each recorder only. In the graph below, at the present
    step all edges are there; at older steps a cell's input is cut, for it was an input of its
    recorder, and so is the carry that entered the oldest step of its window.
    """

    def cell(p, h, x):
        h = jnp.tanh(h @ p["w"] + x @ p["u"])
        return h, h

    params = {
        "encoder": draw(1, 3, 4),
        "fast": {"w": draw(2, 4, 4), "u": draw(3, 4, 4)},
        "slow": {"w": draw(4, 2, 2), "u": draw(5, 4, 2)},
        "head": draw(6, 2, 3),
    }
    h_fast, h_slow = draw(7, 2, 4), draw(8, 2, 2)
    fast, slow = jaxbptt.record(cell, window=2), jaxbptt.record(cell, window=4)

    @jax.jit
    def recorded(params, carries, xs):
        def one(tapes, x):
            def loss(p):
                a, y = fast(p["fast"], tapes[0], jnp.tanh(x @ p["encoder"]))
                b, y = slow(p["slow"], tapes[1], y)
                return jnp.sum((y @ p["head"]) ** 2), (a, b)

            return jax.grad(loss, has_aux=True)(params)[::-1]

        x = jnp.tanh(xs[0] @ params["encoder"])
        tapes = [
            rec.init(params[name], carry, like)
            for rec, name, carry, like in zip(
                (fast, slow), ("fast", "slow"), carries, (x, carries[0]), strict=True
            )
        ]
        return lax.scan(one, tuple(tapes), xs)[1]

    def flows(where, tree):
        """The tree, with gradient only where it says."""
        return jax.tree.map(lambda v: jnp.where(where, v, lax.stop_gradient(v)), tree)

    def unrolled(p, xs, t):
        """The loss of step t."""

        def one(carry, row):
            (a, b), (s, x) = carry, row
            e = jnp.tanh(x @ flows(s == t, p["encoder"]))
            a, y = cell(flows(s > t - 2, p["fast"]), flows(s - 1 > t - 2, a), e)
            b, y = cell(flows(s > t - 4, p["slow"]), flows(s - 1 > t - 4, b), flows(s == t, y))
            return (a, b), jnp.where(s == t, jnp.sum((y @ p["head"]) ** 2), 0.0)

        return jnp.sum(lax.scan(one, (h_fast, h_slow), (np.arange(1, LENGTH + 1), xs))[1])

    @jax.jit
    def of_each_step(params, xs):
        return lax.map(lambda t: jax.grad(unrolled)(params, xs, t), np.arange(1, LENGTH + 1))

    got = oracles.unstack(recorded(params, (h_fast, h_slow), XS), LENGTH)
    for one, want in zip(got, oracles.unstack(of_each_step(params, XS), LENGTH), strict=True):
        check("separate recorders", one, want, 1e-12)


@pytest.mark.compiled
def test_scan_does_not_compute_with_parts_that_are_over():
    w, u = jnp.ones((64, 64)), jnp.ones((64, 2))

    def step(carry, x):
        fast = jnp.tanh(carry["fast"] @ w + (carry["slow"] + x) @ u.T)
        return {"fast": fast, "slow": 0.9 * carry["slow"] + fast @ u}, fast.sum()

    def flops(window):
        def loss(carry):
            return jaxbptt.scan(step, carry, jnp.ones((40, 1, 2)), window=window)[1].sum()

        init = {"fast": jnp.zeros((1, 64)), "slow": jnp.zeros((1, 2))}
        return jax.jit(jax.grad(loss)).lower(init).compile().cost_analysis()["flops"]

    short, parts, long = (flops(window) for window in (2, {"fast": 2, "slow": 30}, 30))
    # The products with w are for `fast` alone; those with u, which go on, are 1/32 of them.
    assert parts - short < (long - short) / 8
