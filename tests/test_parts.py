"""A window for each part of the carry, in `record` and in `scan`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import check, check_cotangents, drifting, moving, random_like, reach
from test_scan_cost import products
from test_scan_steps import pulled
from zoo import normal

import jaxbptt

LENGTH = 8


def step(p, carry, x):
    """Two cells that read each other; a counter beside them."""
    fast, (slow, count) = carry["fast"], carry["slow"]
    new = jnp.tanh(x @ p["wx"] + fast @ p["ff"] + slow @ p["sf"])
    slow = 0.9 * slow + jnp.tanh(fast @ p["fs"] + slow @ p["ss"] + x[:, :2])
    return {"fast": new, "slow": (slow, count + 1)}, new[:, :2] * slow


PARAMS = {
    "wx": normal(1, float, 3, 4),
    "ff": normal(2, float, 4, 4),
    "sf": normal(3, float, 2, 4),
    "fs": normal(4, float, 4, 2),
    "ss": normal(5, float, 2, 2),
}
CARRY = {"fast": normal(6, float, 2, 4), "slow": (normal(7, float, 2, 2), jnp.int32(0))}
XS = normal(8, float, LENGTH, 2, 3)
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


@pytest.mark.parametrize(
    ("window", "weights"),
    [(window, "stored") for window in PREFIXES] + [(PREFIXES[0], "current")],
    ids=str,
)
def test_record_at_every_step(window, weights):
    thetas = drifting(PARAMS, LENGTH) if weights == "stored" else [PARAMS] * LENGTH
    run = oracles.Run(step, thetas, CARRY, XS, LENGTH)
    rec = jaxbptt.record(step, window=window, weights=weights)
    assert rec.window == window
    carries, ys = run.trajectory
    ct_y, ct_carry = random_like(ys[0], 1), random_like(carries[0], 2)

    @jax.jit
    def one(theta, tape, x):
        def loss(theta):
            new, y = rec(theta, tape, x)
            pairs = zip(moving((ct_y, ct_carry)), moving((y, new.carry)), strict=True)
            return sum(jnp.sum(a * b) for a, b in pairs), new

        grad, new = jax.grad(loss, has_aux=True)(theta)
        return new, grad, rec.pullback(theta, new, ct_y[None], ct_carry)

    tape = rec.init(PARAMS, CARRY, XS[0])
    for t in range(1, LENGTH + 1):
        tape, grad, ct = one(thetas[t - 1], tape, XS[t - 1])
        want = run.unrolled(t, [reach(t, w) for w in of_moving(window)], [ct_y], ct_carry)
        check("parts, in the loop", grad, want.params, 1e-12)
        check_cotangents("parts, pullback", ct, want, 1e-12)


@pytest.mark.parametrize("every", [2, 4])
@pytest.mark.parametrize("window", PREFIXES[::2], ids=str)
def test_record_in_groups(window, every):
    def loss_step(p, c, x):
        c, y = step(p, c, x)
        return c, jnp.sum(y**2)

    run = oracles.Run(loss_step, PARAMS, CARRY, XS, LENGTH)
    rec = jaxbptt.record(loss_step, window=window, every=every)
    rows = min(every, max(of_moving(window)))

    @jax.jit
    def one(tape, x):
        def loss(p):
            new, y = rec(p, tape, x)
            return y, new

        return jax.grad(loss, has_aux=True)(PARAMS)

    pull = jax.jit(functools.partial(rec.pullback, PARAMS))
    tape = rec.init(PARAMS, CARRY, XS[0])
    for t in range(1, LENGTH + 1):
        grad, tape = one(tape, XS[t - 1])
        if t % every == 0:
            oldest = [reach(t, w, every, every) for w in of_moving(window)]
            want = run.unrolled(t, oldest, [jnp.ones(())] * rows)
            check("parts, in groups", grad, want.params, 1e-12)
        for m in range(1, min(t, max(of_moving(window))) + 1):
            oldest = [reach(t, w, every, m) for w in of_moving(window)]
            want = run.unrolled(t, oldest, [jnp.ones(())] * m)
            ct = pull(tape, jnp.ones(m))
            check_cotangents("parts, m outputs", ct, want, 1e-12)


@pytest.mark.parametrize("every", [1, 3, 4, 9])
@pytest.mark.parametrize("window", PREFIXES, ids=str)
def test_scan_against_each_group(window, every):
    run = oracles.Run(step, PARAMS, CARRY, XS, LENGTH)
    carries, ys = run.trajectory
    ct_ys, ct_carry = [random_like(y, s) for s, y in enumerate(ys)], random_like(carries[-1], 50)
    want = run.whole(of_moving(window), every, ct_ys, ct_carry)
    how = {"window": window, "every": every}
    got, _ = pulled(step, PARAMS, CARRY, XS, LENGTH, ct_ys, ct_carry, **how)
    for name in ("params", "carry", "xs"):
        check(f"parts, scan, {name}", getattr(got, name), getattr(want, name), 1e-12)


def test_equal_windows_are_one_window():
    parts = jaxbptt.record(step, window={"fast": 3, "slow": 3})
    one = jaxbptt.record(step, window=3)
    ct = []
    for rec in (parts, one):
        tape = rec.init(PARAMS, CARRY, XS[0])
        for x in XS[:5]:
            tape, _ = rec(PARAMS, tape, x)
        ct.append(rec.pullback(PARAMS, tape, jnp.ones((1, 2, 2))))
    jax.tree.map(np.testing.assert_array_equal, *ct)


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

    carry, xs = (jnp.full(2, 3.0), jnp.zeros(2)), jnp.ones((3, 2))
    scale, total = jax.grad(run)(carry, xs, window=1)
    assert scale.tolist() == [0, 0]  # y_1 = c⁰ c¹ with c¹ = 0
    assert total.tolist() == [3, 3]
    assert jax.grad(run)(carry, xs, window=None)[0].tolist() == [18, 18]
    scale, total = jax.grad(run)(carry, xs, window=(3, 1))
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


@pytest.mark.parametrize("bad", [0, -3, 2.0, True, None])
def test_each_window_is_a_positive_int(bad):
    with pytest.raises(ValueError, match=r"^window\['slow'\] must be an int of at least 1"):
        jaxbptt.record(step, window={"fast": 2, "slow": bad})
    with pytest.raises(ValueError, match=r"^window\['slow'\] must be an int of at least 1"):
        jaxbptt.scan(lambda c, x: (c, x), CARRY, XS, window={"fast": 2, "slow": bad})


def test_a_part_of_all_steps_may_have_any_window():
    def grad(slow):
        return jax.grad(
            lambda p: jnp.sum(
                jaxbptt.scan(
                    lambda c, x: step(p, c, x), CARRY, XS, window={"fast": 2, "slow": slow}
                )[1]
            )
        )(PARAMS)

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
        "encoder": normal(1, float, 3, 4),
        "fast": {"w": normal(2, float, 4, 4), "u": normal(3, float, 4, 4)},
        "slow": {"w": normal(4, float, 2, 2), "u": normal(5, float, 4, 2)},
        "head": normal(6, float, 2, 3),
    }
    h_fast, h_slow = normal(7, float, 2, 4), normal(8, float, 2, 2)
    fast, slow = jaxbptt.record(cell, window=2), jaxbptt.record(cell, window=4)

    @jax.jit
    def one(tapes, x):
        def loss(p):
            a, y = fast(p["fast"], tapes[0], jnp.tanh(x @ p["encoder"]))
            b, y = slow(p["slow"], tapes[1], y)
            return jnp.sum((y @ p["head"]) ** 2), (a, b)

        return jax.grad(loss, has_aux=True)(params)

    def unrolled(p, t):
        """The loss of step t; `p` is where gradient flows, `params` where it does not."""
        a, b = h_fast, h_slow
        for s in range(1, t + 1):
            now, in_fast, in_slow = s == t, s > t - 2, s > t - 4
            e = jnp.tanh(XS[s - 1] @ (p if now else params)["encoder"])
            a = a if in_fast and s - 1 > t - 2 else jax.lax.stop_gradient(a)
            a, y = cell((p if in_fast else params)["fast"], a, e)
            b = b if in_slow and s - 1 > t - 4 else jax.lax.stop_gradient(b)
            b, y = cell(
                (p if in_slow else params)["slow"], b, y if now else jax.lax.stop_gradient(y)
            )
        return jnp.sum((y @ p["head"]) ** 2)

    x = jnp.tanh(XS[0] @ params["encoder"])
    tapes = fast.init(params["fast"], h_fast, x), slow.init(params["slow"], h_slow, x)
    for t in range(1, LENGTH + 1):
        grad, tapes = one(tapes, XS[t - 1])
        check("separate recorders", grad, jax.grad(unrolled)(params, t), 1e-12)


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
