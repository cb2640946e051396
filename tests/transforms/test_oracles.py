"""The truncated gradient at every step of a run, held against three independent oracles."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import zoo
from harness import first, grid, online, weigh
from jax import lax
from oracles import Run, check, check_cotangents, moving, random_like, reach

import jaxbptt

LENGTH = 9
WINDOWS = [1, 2, 3, 7, LENGTH + 3]
CELLS = ["tanh_rnn", "fused_gru", "lstm"]


@functools.cache
def run_of(name, dtype, weights):
    """The run that a cell is tested on: drifting parameters for "stored", else fixed ones."""
    case = zoo.ZOO[name](dtype)
    thetas = oracles.drifting(case.params, LENGTH) if weights == "stored" else case.params
    return Run(case.step, thetas, case.carry, case.xs(LENGTH), LENGTH)


@functools.cache
def cotangents_of(run):
    """Random cotangents of all outputs and of all carries."""
    carries, ys = run.trajectory
    numbered = range(1, run.length + 1)
    return (
        [random_like(y, t) for t, y in zip(numbered, ys, strict=True)],
        [random_like(c, 100 + t) for t, c in zip(numbered, carries, strict=True)],
    )


def steps_of(rec, run):
    """What a run recorded online gives: of each step (t, ct_y, ct_carry, gradients, pullback)."""
    ct_ys, ct_carries = cotangents_of(run)
    found = online(rec, run, ct_ys, ct_carries)
    rows = ct_ys, ct_carries, found.grads, found.cts
    yield from zip(range(1, run.length + 1), *rows, strict=True)


def check_step(label, want, grads, ct, allowed):
    """Both ways to the gradient against one oracle."""
    check(f"{label}, in the loop, params", grads[0], want.params, allowed)
    check(f"{label}, in the loop, x", grads[1], [leaf[-1] for leaf in want.xs], allowed)
    check_cotangents(f"{label}, pullback", ct, want, allowed)


# --------------------------------------------------- every step, every window


RUNS = [(name, "stored", "float64") for name in CELLS]
RUNS += [("fused_gru", "current", "float64"), ("lstm", "stored", "float32")]
# Each run and each window once; single precision where it adds up most.
ONCE = [(*run, window) for run, window in zip(RUNS, [1, LENGTH + 3, 2, 3, 7], strict=True)]


@pytest.mark.parametrize(
    ("name", "weights", "dtype", "window"),
    grid([(*run, window) for run in RUNS for window in WINDOWS], always=ONCE),
)
def test_every_step_agrees_with_the_unrolled_graph_and_with_dense_jacobians(
    name, weights, dtype, window
):
    run = run_of(name, jnp.dtype(dtype), weights)
    rec = jaxbptt.record(run.step, window=window, weights=weights)
    allowed = oracles.tolerance(run.carry)
    for t, ct_y, ct_carry, grads, ct in steps_of(rec, run):
        oldest = reach(t, window)
        want = run.unrolled(t, oldest, [ct_y], ct_carry)
        check_step(f"{dtype}, unrolled graph", want, grads, ct, allowed)
        want = run.dense(t, oldest, [ct_y], ct_carry)
        check_step(f"{dtype}, dense Jacobians", want, grads, ct, allowed)
        if oldest > 1:  # the truncation is real
            full = run.unrolled(t, 1, [ct_y], ct_carry)
            assert oracles.relative_error(ct.params, full.params) > 1e-4
            assert oracles.relative_error(grads[0], full.params) > 1e-4


LINEAR = [("float64", "current"), ("float32", "stored")]


@pytest.mark.parametrize(
    ("dtype", "weights", "window"),
    grid(
        [(*kind, window) for kind in LINEAR for window in WINDOWS],
        always=[(*LINEAR[0], 3), (*LINEAR[1], LENGTH + 3)],
    ),
)
def test_linear_cell_agrees_with_its_closed_form(dtype, weights, window):
    run = run_of("linear", jnp.dtype(dtype), "current")  # the form is for fixed parameters
    rec = jaxbptt.record(run.step, window=window, weights=weights)
    xs = np.stack([np.asarray(x) for x in run.xs])
    for t, ct_y, ct_carry, grads, ct in steps_of(rec, run):
        want = oracles.linear_cell(run.thetas[0], run.carry, xs, t, window, ct_y, ct_carry)
        want = oracles.Expected([want[name] for name in "abd"], [want["carry"]], [want["xs"]])
        allowed = oracles.tolerance(run.carry)
        check_step(f"{dtype}, closed form of the linear cell", want, grads, ct, allowed)


# Rows of an embedding are added up in place, where a slot without a step must add nothing. What
# `pullback` makes of the parameters again goes through an inner scan in the scan's own order.
OTHERS = [("tokens", "stored", 4), ("reversed_layers", "current", 2)]


@pytest.mark.parametrize(("name", "weights", "window"), OTHERS)
def test_other_steps_agree_with_the_unrolled_graph(name, weights, window):
    run = run_of(name, jnp.dtype("float64"), weights)
    rec = jaxbptt.record(run.step, window=window, weights=weights)
    for t, ct_y, ct_carry, grads, ct in steps_of(rec, run):
        want = run.unrolled(t, reach(t, window), [ct_y], ct_carry)
        check_step("float64, other steps", want, grads, ct, 1e-12)


# ------------------------------------------------------------ the online loop


@pytest.mark.parametrize("name", grid(["tanh_rnn", "fused_gru"], always=["tanh_rnn"]))
def test_scanned_sgd_agrees_with_a_python_loop_over_the_unrolled_graph(name):
    window, rate = 3, 0.1
    case = zoo.ZOO[name](jnp.float64)
    rec = jaxbptt.record(case.step, window=window)
    xs = case.xs(LENGTH)

    @jax.jit
    def train(params, carry):
        def update(state, x):
            params, tape = state

            def loss(params):
                new, y = rec(params, tape, x)
                return jnp.sum(y**2), new

            (value, tape), grads = jax.value_and_grad(loss, has_aux=True)(params)
            return (jax.tree.map(lambda p, g: p - rate * g, params, grads), tape), value

        tape = rec.init(params, carry, case.x())
        return lax.scan(update, (params, tape), xs)

    (params, tape), values = train(case.params, case.carry)

    thetas, expected = [case.params] * LENGTH, []
    for t in range(1, LENGTH + 1):
        run = Run(case.step, thetas, case.carry, xs, LENGTH)
        y = run.trajectory[1][t - 1]
        y = np.asarray(y)
        expected.append(np.sum(y**2))
        grads = run.unrolled(t, reach(t, window), [2 * y]).params
        updated = [p - rate * g for p, g in zip(moving(thetas[-1]), grads, strict=True)]
        thetas = thetas[:t] + [oracles.refill(case.params, updated)] * (LENGTH - t)
    final = oracles.refill(case.params, updated)
    check("float64, scanned SGD, losses", values, np.stack(expected), 1e-12)
    check("float64, scanned SGD, params", params, final, 1e-12)
    check("float64, scanned SGD, carry", tape.carry, run.trajectory[0][-1], 1e-12)
    assert oracles.relative_error(params, case.params) > 1e-2


# ---------------------------------------------------------------------- every


def scored_step(params, h, x):
    """A tanh RNN with a scalar loss for y."""
    h, y = zoo.ZOO["tanh_rnn"](jnp.float64).step(params, h, x)
    return h, jnp.mean(jnp.cos(y))


def scored_step_with_aux(params, h, x):
    """The same with an integer and an array on the side."""
    new, loss = scored_step(params, h, x)
    return new, (loss, {"old": h, "count": jnp.asarray(3, jnp.int32)})


@functools.cache
def scored_run():
    length = 10
    case = zoo.ZOO["tanh_rnn"](jnp.float64)
    thetas = oracles.drifting(case.params, length)
    return Run(scored_step, thetas, case.carry, case.xs(length), length)


GROUPS = [(3, 1), (1, 2), (2, 2), (7, 2), (2, 3), (3, 3), (7, 3), (1, 5), (3, 5), (5, 5), (7, 5)]


@pytest.mark.parametrize(("window", "every"), grid(GROUPS, always=[(1, 2), (2, 2), (7, 3)]))
def test_groups_of_every_steps_go_back_together(window, every):
    run = scored_run()
    has_aux = (window + every) % 4 == 0
    step = scored_step_with_aux if has_aux else scored_step
    rec = jaxbptt.record(step, window=window, every=every, has_aux=has_aux)
    tried = {2, every} if every > 1 else {1}  # a group that is cut short is tried at two rows
    times = range(1, run.length + 1)
    ct_carries = [random_like(run.carry, t) for t in times]
    ct_ys = [
        {rows: random_like(np.zeros(min(rows, window)), 200 + t) for rows in tried} for t in times
    ]

    def one(tape, row):
        params, x, ct_carry, ct_ys = row

        def loss(params, x):
            new, y = rec(params, tape, x)
            y, aux = y if has_aux else (y, None)
            return 2.5 * y + weigh(ct_carry, new.carry), (new, aux)

        grads, (new, aux) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        cts = {rows: rec.pullback(params, new, ct, ct_carry) for rows, ct in ct_ys.items()}
        return new, (grads, cts, aux, rec.due(new))

    @jax.jit
    def go(rows, carry):
        tape = rec.init(first(rows[0]), carry, first(rows[1]))
        return lax.scan(one, tape, rows)[1]

    rows = *run.stacked, oracles.stack(ct_carries), oracles.stack(ct_ys)
    found = oracles.unstack(go(rows, run.carry), run.length)
    befores = [run.carry, *run.trajectory[0]]
    for t, (grads, cts, aux, due) in zip(times, found, strict=True):
        ct_carry = ct_carries[t - 1]
        assert bool(due) == (t % every == 0)
        if has_aux:
            np.testing.assert_allclose(aux["old"], befores[t - 1], rtol=1e-12)
        if due:
            oldest = reach(t, window, every, every)
            ones = [np.asarray(2.5)] * min(every, window)
            want = run.unrolled(t, oldest, ones, ct_carry)
            newest_x = [leaf[-1] for leaf in want.xs]
            check("float64, every, in the loop, params", grads[0], want.params, 1e-12)
            check("float64, every, in the loop, x", grads[1], newest_x, 1e-12)
        else:
            assert not any(np.any(g) for g in jax.tree.leaves(grads))
        rows = (t - 1) % every + 1
        if rows in tried:
            want = run.unrolled(
                t, reach(t, window, every, rows), list(ct_ys[t - 1][rows]), ct_carry
            )
            check_cotangents("float64, every, pullback", cts[rows], want, 1e-12)


@pytest.mark.parametrize(("window", "every"), grid([(4, 1), (5, 3)], always=[(4, 1)]))
def test_pullback_takes_any_number_of_rows_up_to_the_window(window, every):
    run = run_of("tanh_rnn", jnp.dtype("float64"), "stored")
    rec = jaxbptt.record(run.step, window=window, every=every)
    ct_ys = [
        {
            rows: np.stack([random_like(run.trajectory[1][0], 10 * t + row) for row in range(rows)])
            for rows in (2, window)
        }
        for t in range(1, run.length + 1)
    ]

    def one(tape, row):
        theta, x, ct_ys = row
        tape, _ = rec(theta, tape, x)
        return tape, {rows: rec.pullback(theta, tape, ct) for rows, ct in ct_ys.items()}

    @jax.jit
    def go(rows, carry):
        tape = rec.init(first(rows[0]), carry, first(rows[1]))
        return lax.scan(one, tape, rows)[1]

    found = oracles.unstack(go((*run.stacked, oracles.stack(ct_ys)), run.carry), run.length)
    for t, cts in enumerate(found, 1):
        for rows, ct in cts.items():
            want = run.unrolled(t, reach(t, window, every, rows), list(ct_ys[t - 1][rows]))
            check_cotangents("float64, several rows, pullback", ct, want, 1e-12)


# ------------------------------------- "current" away from fixed parameters


def array_tree(tree):
    """The tree in NumPy."""
    return jax.tree.map(np.asarray, tree)


def tanh_back(p, past, lam, ct_y):
    """Recorded activations, weights of now: z = x wx + h wh + b, h' = tanh z, y = h' wy."""
    grads = {name: np.zeros_like(v) for name, v in p.items()}
    grads["wy"] = past[-1]["new"].T @ ct_y
    lam, xs = lam + ct_y @ p["wy"].T, []
    for now in reversed(past):
        dz = lam * (1 - now["new"] ** 2)
        grads["wx"] += now["x"].T @ dz
        grads["wh"] += now["h"].T @ dz
        grads["b"] += dz.sum(0)
        xs.append(dz @ p["wx"].T)
        lam = dz @ p["wh"].T
    return grads, lam, xs[::-1]


def tanh_forward(p, h, x):
    new = np.tanh(x @ p["wx"] + h @ p["wh"] + p["b"])
    return {"x": x, "h": h, "new": new}


def gru_forward(p, h, x):
    wx, wh = p["w"][: zoo.D], p["w"][zoo.D :]
    rx, zx, nx = np.split(x @ wx + p["b"], 3, axis=1)
    rh, zh, nh = np.split(h @ wh, 3, axis=1)
    r, z = 1 / (1 + np.exp(-rx - rh)), 1 / (1 + np.exp(-zx - zh))
    n = np.tanh(nx + r * nh)
    return {"x": x, "h": h, "r": r, "z": z, "n": n, "nh": nh, "new": (1 - z) * n + z * h}


def gru_back(p, past, lam, ct_y):
    """The fused GRU; slices of its one matrix are weights of now as well."""
    wx, wh = p["w"][: zoo.D], p["w"][zoo.D :]
    dw, db = np.zeros_like(p["w"]), np.zeros_like(p["b"])
    lam, xs = lam + ct_y, []
    for now in reversed(past):
        r, z, n, h = now["r"], now["z"], now["n"], now["h"]
        dn = lam * (1 - z) * (1 - n**2)
        dz = lam * (h - n) * z * (1 - z)
        dr = dn * now["nh"] * r * (1 - r)
        by_x = np.concatenate([dr, dz, dn], axis=1)
        by_h = np.concatenate([dr, dz, dn * r], axis=1)
        dw += np.concatenate([now["x"].T @ by_x, h.T @ by_h])
        db += by_x.sum(0)
        xs.append(by_x @ wx.T)
        lam = by_h @ wh.T + lam * z
    return {"w": dw, "b": db}, lam, xs[::-1]


def normed_forward(p, h, x):
    w = p["g"] * p["v"] / np.linalg.norm(p["v"], axis=0)
    return {"x": x, "h": h, "new": np.tanh(x @ p["wx"] + h @ w)}


def normed_back(p, past, lam, ct_y):
    """The normalised weight is one of now, and so is the rule that leads from it to g and v."""
    size = np.linalg.norm(p["v"], axis=0)
    unit = p["v"] / size
    dw, dwx = np.zeros_like(p["v"]), np.zeros_like(p["wx"])
    lam, xs = lam + ct_y, []
    for now in reversed(past):
        dz = lam * (1 - now["new"] ** 2)
        dw += now["h"].T @ dz
        dwx += now["x"].T @ dz
        xs.append(dz @ p["wx"].T)
        lam = dz @ (p["g"] * unit).T
    dg = np.sum(dw * unit, 0)
    return {"v": p["g"] / size * (dw - unit * dg), "g": dg, "wx": dwx}, lam, xs[::-1]


BY_HAND = {
    "tanh_rnn": (tanh_forward, tanh_back),
    "fused_gru": (gru_forward, gru_back),
    "weight_norm": (normed_forward, normed_back),
}


@pytest.mark.parametrize(
    ("name", "window"),
    grid(itertools.product(BY_HAND, [1, 4]), always=[(name, 4) for name in BY_HAND]),
)
def test_current_weights_replace_exactly_what_depends_on_parameters_alone(name, window):
    forward, back = BY_HAND[name]
    run = run_of(name, jnp.dtype("float64"), "stored")
    rec = jaxbptt.record(run.step, window=window, weights="current")
    past, h = [], np.asarray(run.carry)
    for t, ct_y, ct_carry, grads, ct in steps_of(rec, run):
        theta = array_tree(run.thetas[t - 1])
        past.append(forward(theta, h, np.asarray(run.xs[t - 1])))
        h = past[-1]["new"]
        by_name, lam, xs = back(theta, past[-window:], np.asarray(ct_carry), np.asarray(ct_y))
        want = oracles.Expected([by_name[key] for key in sorted(by_name)], [lam], [np.stack(xs)])
        check_step("float64, current weights by hand", want, grads, ct, 1e-12)
        if t > 2 and window > 2:  # and not the weights as they were
            stored = run.unrolled(t, reach(t, window), [ct_y], ct_carry)
            assert oracles.relative_error(ct.params, stored.params) > 1e-4
