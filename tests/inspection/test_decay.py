"""The fitted decay against closed forms, against a loop in NumPy, and against full BPTT."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import grid
from jax import lax
from zoo import normal

import jaxbptt
from jaxbptt import ByLag, fit_decay

NONE = 2**31 - 1


def run(rec, params, carry, xs):
    tape = rec.init(params, carry, np.zeros(xs.shape[1:]))
    return lax.scan(lambda tape, x: rec(params, tape, x), tape, xs)[0]


@functools.cache
def biased(w, window, length=None):
    """c = w c + b + x and y = c, where a window of K gives b the gradient 1 + w + … + w^(K-1)."""
    return biased_by(w, window, 2 * window if length is None else length)


@functools.partial(jax.jit, static_argnums=(1, 2))
def biased_by(w, window, length):
    def step(b, c, x):
        c = w * c + b + x
        return c, c

    rec, b = jaxbptt.record(step, window=window), jnp.array(0.3)
    tape = run(rec, b, jnp.array(0.0), np.zeros(length))
    return jaxbptt.gradient_by_lag(rec, b, tape, np.ones(1))


# Compiled once for all norms of a shape; some tests call `fit_decay` itself.
fit = jax.jit(fit_decay, static_argnames=("burn_in", "by"))


@functools.partial(jax.jit, static_argnums=0)
def by_lag(rec, params, carry, xs, ct_ys):
    """The gradient by lag after a run."""
    return jaxbptt.gradient_by_lag(rec, params, run(rec, params, carry, xs), ct_ys)


# ------------------------------------------------------------ closed forms


CELLS = [(*cell, by) for cell in [(0.5, 10), (0.9, 30), (0.97, 12)] for by in ("params", "carry")]


@pytest.mark.parametrize(
    ("w", "window", "by"), grid(CELLS, always=[(0.5, 10, "params"), (0.97, 12, "carry")])
)
def test_a_linear_cell_in_closed_form(w, window, by):
    decay = fit(biased(w, window), by=by)
    k = np.arange(1, window + 1)
    missed, full = w**k / (1 - w), 1 / (1 - w)
    known = np.max(full - 2 * missed)  # what a window gives, less what it misses
    np.testing.assert_allclose(decay.rate, w, rtol=1e-12)
    np.testing.assert_allclose(decay.carry, w, rtol=1e-12)
    np.testing.assert_allclose(decay.share, 1 - w**k, rtol=1e-12)
    np.testing.assert_allclose(decay.bias, missed / known if known > 0 else np.inf, rtol=1e-11)


def test_a_sign_that_alternates():
    decay = fit(biased(-0.8, 20))
    k = np.arange(1, 21)
    missed = 0.8**k / (1 - 0.8)
    known = np.max(np.abs(1 - (-0.8) ** k) / 1.8 - missed)
    np.testing.assert_allclose(decay.rate, 0.8, rtol=1e-12)
    np.testing.assert_allclose(decay.bias, missed / known, rtol=1e-11)


SHARES = list(itertools.product([0.5, 0.9, 0.97], [0.3, 0.94, 0.9999, 1]))


@pytest.mark.parametrize(
    ("w", "share"), grid(SHARES, always=[(0.5, 0.94), (0.9, 0.3), (0.97, 0.9999), (0.5, 1)])
)
def test_the_window_for_a_share_on_the_tape_and_beyond_it(w, share):
    got = fit(biased(w, 12)).window_for(share)
    assert got.dtype == jnp.int32
    assert got.shape == ()
    assert int(got) == (NONE if share == 1 else np.ceil(np.log(1 - share) / np.log(w)))


@pytest.mark.parametrize("delta", [0.9, 0.1, 1e-3, 1e-7])
def test_the_window_within_a_bias_on_the_tape_and_beyond_it(delta):
    got = fit(biased(0.7, 12)).window_within(delta)
    assert got.dtype == jnp.int32
    assert int(got) == np.ceil(np.log(delta * (1 - 2 * 0.7**12)) / np.log(0.7))


def test_a_bound_that_is_met_is_enough():
    norms = jnp.array([2.0, 1.0, 1.0, 0.0])  # an end: λ is zero before
    decay = fit_decay(
        ByLag(norms, jnp.array([1.0, 1.0, 0.0, 0.0]), jnp.array([2.0, 3.0, 4.0, 4.0]))
    )
    assert decay.share.tolist() == [0.5, 0.75, 1, 1]
    assert decay.bias.tolist() == [0.5, 0.25, 0, 0]
    assert [decay.window_for(s) for s in (0.5, 0.51, 0.75, 1.0)] == [1, 2, 2, 3]
    assert [decay.window_within(d) for d in (0.5, 0.49, 0.25, 1e-9)] == [1, 2, 2, 3]


@pytest.mark.parametrize("w", [1.0, 1.1, -1.2])
def test_without_decay_no_window_is_long_enough(w):
    decay = fit(biased(w, 10))
    np.testing.assert_allclose(decay.rate, abs(w), rtol=1e-12)
    np.testing.assert_allclose(decay.share, 0, atol=1e-12)
    assert np.all(np.isinf(decay.bias))
    assert decay.window_for(1e-6) == decay.window_within(1e6) == NONE


def test_a_gradient_that_may_be_zero_as_far_as_the_tape_shows():
    decay = fit(biased(0.97, 12))  # it misses more than it has
    assert np.all(np.isinf(decay.bias))
    assert decay.window_within(0.5) == NONE
    assert 12 < decay.window_for(0.5) < NONE


def test_the_rate_of_a_matrix_is_its_spectral_radius():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(5, 5))
    a = jnp.asarray(q @ np.diag([0.8, -0.5, 0.4, 0.3, 0.1]) @ np.linalg.inv(q))

    def step(b, c, x):
        c = a @ c + b + x
        return c, c

    rec = jaxbptt.record(step, window=60)
    lags = by_lag(rec, np.ones(5), np.zeros(5), np.zeros((80, 5)), rng.normal(size=(1, 5)))
    decay = fit(lags)
    np.testing.assert_allclose([decay.rate, decay.carry], 0.8, rtol=1e-6)
    # The transient at the first lags is what the burn-in is for.
    assert abs(fit(lags, burn_in=0).rate - 0.8) > 100 * abs(decay.rate - 0.8)
    assert abs(fit(lags, burn_in=45).rate - 0.8) < abs(decay.rate - 0.8)


# --------------------------------------------------- a loop in plain NumPy


def by_hand(leaves, lams, partials, tau):
    """Rate, share and bias of noisy norms: sums written out, far past the tape."""
    e = np.sqrt(np.sum(np.square(leaves), 0))
    g = np.sqrt(np.sum(np.square(partials), 0))
    phi = np.sqrt(np.sum(np.square(lams), 0))
    n = len(e)

    def line(norms):
        return np.polyfit(np.arange(tau, n), np.log(norms[tau:]), 1)

    slope, at_0 = line(e)
    mine = [e[k] if k < n else np.exp(at_0 + slope * k) for k in range(2000)]
    beta = np.exp(line(phi)[0])
    m = max(e[k] / phi[k - 1] for k in range(1, n))
    theirs = [e[0]]
    for k in range(1, 2000):  # lag k goes by the λ that leaves lag k - 1
        j = k - 1
        theirs.append(m * (phi[j] if j <= tau else phi[tau] * beta ** (j - tau)))
    found = {}
    for by, rate, terms in (("params", np.exp(slope), mine), ("carry", beta, theirs)):
        tail = [sum(terms[k:]) for k in range(n + 1)]
        least = max(g[k - 1] - tail[k] for k in range(1, n + 1))
        found[by] = (
            rate,
            [1 - tail[k] / tail[0] for k in range(1, n + 1)],
            [tail[k] / least for k in range(1, n + 1)],
        )
    return found


@pytest.mark.parametrize("tau", grid([None, 0, 3, 14], always=[None, 14]))
def test_several_noisy_leaves_against_a_loop(tau):
    rng = np.random.default_rng(1)
    n, decays = 18, 0.75 ** np.arange(18)

    def noisy(size):
        return size * decays * np.exp(0.3 * rng.normal(size=n))

    leaves, lams = [noisy(1), noisy(2)], [noisy(0.5), noisy(1), noisy(0.1)]
    partials = [np.cumsum(v) * 0.9 for v in leaves]
    lags = ByLag(
        {"a": leaves[0], "b": leaves[1]}, tuple(lams), dict(zip("ab", partials, strict=True))
    )
    want = by_hand(leaves, lams, partials, n // 2 if tau is None else tau)
    for by in ("params", "carry"):
        got = fit(lags, burn_in=tau, by=by)
        for value, wanted in zip((got.rate, got.share, got.bias), want[by], strict=True):
            np.testing.assert_allclose(value, wanted, rtol=1e-9)
        assert np.all(np.diff(got.share) > 0)
        assert np.all(np.diff(got.bias) < 0)
    rates = [np.exp(np.polyfit(np.arange(9, n), np.log(v[9:]), 1)[0]) for v in lams]
    np.testing.assert_allclose(fit(lags).carry, rates, rtol=1e-9)


@pytest.mark.exhaustive
def test_the_mean_of_many_steps_and_not_a_single_one():
    rng = np.random.default_rng(2)
    norms = 0.8 ** np.arange(30) * np.exp(rng.normal(size=(3000, 30)))
    steps = ByLag(norms, norms, np.cumsum(norms, 1))
    mean = fit(jax.tree.map(lambda v: v.mean(0), steps))
    np.testing.assert_allclose(mean.rate, 0.8, rtol=2e-3)
    np.testing.assert_allclose(mean.share, 1 - 0.8 ** np.arange(1, 31), rtol=0.02)
    alone = jax.jit(jax.vmap(fit_decay))(steps).rate
    assert np.std(alone) > 0.02


# -------------------------------------------------------------------- zeros


@pytest.mark.parametrize("by", ["params", "carry"])
def test_lags_that_are_not_recorded_are_fitted(by):
    decay = fit(biased(0.8, 20, length=9), by=by)
    k = np.arange(1, 21)
    np.testing.assert_allclose([decay.rate, decay.carry], 0.8, rtol=1e-12)
    np.testing.assert_allclose(decay.share, 1 - 0.8**k, rtol=1e-12)
    # Only 9 lags tell how large the full gradient is.
    np.testing.assert_allclose(decay.bias, 0.8**k / (1 - 2 * 0.8**9), rtol=1e-11)


def test_zeros_between_norms_do_not_count_in_the_fit():
    holes = 0.8 ** np.arange(16.0)
    holes[[9, 12]] = 0
    decay = fit(ByLag(holes, holes, np.cumsum(holes)))
    np.testing.assert_allclose([decay.rate, decay.carry], 0.8, rtol=1e-12)


def test_a_past_that_ends_is_no_decay():
    def step(b, line, x):  # a delay line of 3: y is what came 3 steps ago
        return jnp.concatenate([(x + b)[None], line[:2]]), line[2]

    rec = jaxbptt.record(step, window=8)
    decay = fit(by_lag(rec, np.array(0.0), np.zeros(3), np.zeros(9), np.ones(1)))
    assert decay.share.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert decay.bias.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert decay.window_for(0.95) == decay.window_within(0.1) == 4


def test_parameters_that_the_past_does_not_reach():
    def step(readout, c, x):
        c = 0.9 * c + x
        return c, readout * c

    rec = jaxbptt.record(step, window=6)
    lags = by_lag(rec, np.array(2.0), np.array(1.0), np.ones(8), np.ones(1))
    assert lags.carry[-1] > 0
    decay = fit(lags)
    assert decay.share.tolist() == [1] * 6
    assert decay.bias.tolist() == [0] * 6
    assert decay.window_for(1.0) == decay.window_within(1e-3) == 1
    np.testing.assert_allclose(decay.carry, 0.9, rtol=1e-12)


def test_a_step_without_a_past():
    norms = np.array([2.0, 0, 0])
    decay = fit_decay(ByLag(norms, (), np.full(3, 2.0)))
    assert decay.share.tolist() == [1, 1, 1]
    assert decay.carry == ()


@pytest.mark.parametrize("recorded", [0, 1])
def test_too_few_norms_for_a_rate_are_no_answer(recorded):
    decay = fit(biased(0.5, 6, length=recorded))
    assert all(np.all(np.isnan(v)) for v in (decay.rate, decay.carry, decay.share))
    assert not np.any(np.isfinite(decay.bias))
    assert decay.window_for(0.5) == decay.window_within(0.5) == NONE


def test_norms_that_overflow():
    norms = np.array([1, 1e10, 1e20, 1e30, 1e38, np.inf], np.float32)
    decay = fit(ByLag([norms, norms], norms, [norms, norms]))
    assert decay.rate > 1
    assert decay.share.tolist() == [0] * 6
    assert np.all(np.isinf(decay.bias))
    large = (1e30 * 0.5 ** np.arange(6)).astype(np.float32)  # its square is infinite
    np.testing.assert_allclose(
        fit(ByLag([large, large], large, [large, large])).share,
        1 - 0.5 ** np.arange(1, 7),
        rtol=1e-5,
    )


def test_parts_with_windows_of_their_own():
    def step(p, c, x):
        fast = jnp.tanh(x + p["f"] * c["fast"] + c["slow"])
        slow = 0.95 * c["slow"] + 0.05 * p["s"] * x
        return {"fast": fast, "slow": slow}, fast

    params = {"f": jnp.array(0.6), "s": jnp.array(0.3)}
    rec = jaxbptt.record(step, window={"fast": 5, "slow": 50})
    xs = normal(0, float, 100)

    def visit(tape, x):
        tape, y = rec(params, tape, x)
        return tape, jaxbptt.gradient_by_lag(rec, params, tape, y[None])

    @jax.jit
    def visits(xs):
        tape = rec.init(params, {"fast": jnp.array(0.0), "slow": jnp.array(0.0)}, xs[0])
        return lax.scan(visit, tape, xs)[1]

    lags = jax.tree.map(lambda v: v[60:].mean(0), jax.device_get(visits(xs)))
    assert not np.any(lags.carry["fast"][5:])
    decay = fit(lags)
    np.testing.assert_allclose(decay.carry["slow"], 0.95, rtol=1e-6)
    fast = np.polyfit([2, 3, 4], np.log(lags.carry["fast"][2:5]), 1)[0]
    np.testing.assert_allclose(decay.carry["fast"], np.exp(fast), rtol=1e-9)
    np.testing.assert_allclose(decay.rate, 0.95, rtol=0.02)  # what reaches s through slow
    assert np.all(np.isfinite(decay.bias))
    assert 5 < decay.window_for(0.95) < 60


# -------------------------------------------------- the bias of full BPTT


def test_bounds_the_true_bias_of_a_recurrent_net():
    """A tanh RNN of spectral radius 0.9, 48 sequences of 60 steps, the loss at their end."""
    hidden, window, length = 8, 16, 60
    w = np.asarray(normal(3, float, hidden, hidden))
    w = 0.9 * w / np.max(np.abs(np.linalg.eigvals(w)))
    params = {"x": normal(1, float, 3, hidden), "h": jnp.asarray(w), "y": normal(2, float, hidden)}

    def step(p, h, x):
        h = jnp.tanh(x @ p["x"] + h @ p["h"])
        return h, h @ p["y"]

    xs = normal(4, float, 48, length, 3)
    h0 = jnp.zeros(hidden)
    rec = jaxbptt.record(step, window=window)

    @jax.jit
    @jax.vmap
    def lags_of(xs):
        tape = run(rec, params, h0, xs[:-1])
        tape, y = rec(params, tape, xs[-1])
        return jaxbptt.gradient_by_lag(rec, params, tape, 2 * (y - 1)[None])

    def loss(copies, xs):  # one copy of the parameters for each step
        def at(h, row):
            return step(row[0], h, row[1])

        return (lax.scan(at, h0, (copies, xs))[1][-1] - 1) ** 2

    @jax.jit
    @jax.vmap
    def whole(xs):
        copies = jax.tree.map(lambda v: jnp.broadcast_to(v, (length, *v.shape)), params)
        grads = jax.grad(loss)(copies, xs)
        grads = [v[::-1].reshape(length, -1) for v in jax.tree.leaves(grads)]
        return jnp.cumsum(jnp.concatenate(grads, axis=1), axis=0)

    steps, sums = lags_of(xs), np.asarray(whole(xs))
    full = sums[:, -1]
    windows = [1, 2, 4, 7, 11, 16]
    cut = {k: sums[:, k - 1] for k in range(1, window + 1)}

    def norm(v):
        return np.linalg.norm(v, axis=-1)

    per_step = np.array([norm(cut[k] - full).mean() for k in windows]) / norm(full).mean()
    lags = jax.tree.map(lambda v: v.mean(0), jax.device_get(steps))
    at = np.array(windows) - 1
    for by, loosest in (("params", 4), ("carry", 5)):
        bias = np.asarray(fit(lags, by=by).bias)[at]
        assert np.all(bias >= per_step), by
        assert np.all(bias <= loosest * per_step), by

    # Of the expected gradient, whose norms then are those of E[ĝ_K].
    expected = np.array([norm((cut[k] - full).mean(0)) for k in windows]) / norm(full.mean(0))
    of_mean = np.array([norm(v.mean(0)) for v in cut.values()])
    nothing = jax.tree.map(np.zeros_like, lags.partial)
    bias = fit(lags._replace(partial=nothing | {"h": of_mean})).bias
    assert np.all(np.asarray(bias)[at] >= expected)

    within = int(fit(lags).window_within(0.1))
    assert norm(cut[within] - full).mean() < 0.1 * norm(full).mean()


# ---------------------------------------------------------- transformations


def test_under_jit_and_vmap_and_traced_once():
    traces = []

    @jax.jit
    def decide(lags, share):
        traces.append(0)
        decay = fit_decay(lags)
        return decay, decay.window_for(share), decay.window_within(0.05)

    many = [biased(w, 8) for w in (0.5, 0.6, 0.99)]
    alone = [decide(lags, share) for lags, share in zip(many, (0.9, 0.99, 0.9), strict=True)]
    assert len(traces) == 1
    assert [int(a[1]) for a in alone] == [4, 10, 230]
    stacked = jax.tree.map(lambda *v: np.stack(v), *many)
    decays, shares, deltas = jax.jit(jax.vmap(decide, (0, None)))(stacked, 0.9)
    for i, lags in enumerate(many):
        want = fit(lags)
        for got, wanted in zip(decays, want, strict=True):
            np.testing.assert_allclose(got[i], wanted, rtol=1e-12)
        assert shares[i] == want.window_for(0.9)
        assert deltas[i] == want.window_within(0.05)
    np.testing.assert_array_equal(decays.window_for(0.9), shares)  # a batch of its own
    assert not decide.lower(many[0], 0.9).as_text().count("callback")


def test_several_float_types_give_the_widest():
    norms = (0.5 ** np.arange(6)).astype(np.float32)
    single = fit(ByLag(norms, norms, norms))
    assert {v.dtype for v in single} == {jnp.dtype(jnp.float32)}
    mixed = fit(ByLag([norms, norms.astype(np.float64)], norms, [norms, norms]))
    assert {v.dtype for v in mixed} == {jnp.dtype(jnp.float64)}
    np.testing.assert_allclose(mixed.share, 1 - 0.5 ** np.arange(1, 7), rtol=1e-12)
    assert single.window_for(np.float64(0.9)) == mixed.window_for(jnp.float32(0.9)) == 4


# ------------------------------------------------------------------- faults


def test_what_is_wrong_is_said():
    norms = np.ones(4)
    lags = ByLag({"w": norms}, norms, {"w": norms})
    with pytest.raises(
        ValueError,
        match=r"^lags must be what gradient_by_lag .* but got a tuple",
    ):
        fit_decay(tuple(lags))
    full = lags._replace(params={"w": jnp.ones((4, 2))})
    with pytest.raises(
        ValueError,
        match=r"\['w'\] is float64\[4,2\]. Leave out full=True",
    ):
        fit_decay(full)
    stacked = jax.tree.map(lambda v: np.stack([v, v]), lags)
    with pytest.raises(
        ValueError,
        match=r"take the mean, jax.tree.map\(lambda v: v.mean\(0\)",
    ):
        fit_decay(stacked)
    with pytest.raises(
        ValueError,
        match=r"lags.carry is float64\[3\]",
    ):
        fit_decay(lags._replace(carry=jnp.ones(3)))
    with pytest.raises(
        ValueError,
        match=r"of two lags or more .* is float64\[1\]",
    ):
        fit_decay(jax.tree.map(lambda v: v[:1], lags))
    with pytest.raises(
        ValueError,
        match=r"lags.carry is int64\[4\]",
    ):
        fit_decay(lags._replace(carry=jnp.ones(4, int)))
    with pytest.raises(
        ValueError,
        match=r"^lags.params must have a leaf.*but got \{\}\. Pass what",
    ):
        fit_decay(ByLag({}, norms, {}))
    with pytest.raises(
        ValueError,
        match=r"^burn_in must be an int from 0 to 2.*but got 3\. None",
    ):
        fit_decay(lags, burn_in=3)
    with pytest.raises(
        ValueError,
        match=r"^burn_in must be an int .* but got -1",
    ):
        fit_decay(lags, burn_in=-1)
    with pytest.raises(
        ValueError,
        match=r"^by must be 'params' or 'carry', but got 'x'",
    ):
        fit_decay(lags, by="x")
    decay = fit_decay(lags)
    for share in (0, 1.01, -0.5, np.nan):
        with pytest.raises(
            ValueError,
            match=rf"^share must be above 0 and at most 1, but got .*{share}",
        ):
            decay.window_for(share)
    for delta in (0, -1.0, np.nan):
        with pytest.raises(
            ValueError,
            match=rf"^delta must be above 0, but got .*{delta}",
        ):
            decay.window_within(delta)


@pytest.mark.parametrize("bad", [jnp.ones(2) / 2, np.ones(1), [0.5], "0.5x", None, 1j, (), {}])
def test_a_share_is_one_number(bad):
    norms = 0.5 ** np.arange(4.0)
    decay = fit_decay(ByLag({"w": norms}, norms, {"w": norms}))
    with pytest.raises(
        ValueError, match=r"^share must be one number, above 0 and at most 1, but got"
    ):
        decay.window_for(bad)
    with pytest.raises(ValueError, match=r"^delta must be one number, above 0, but got"):
        decay.window_within(bad)
    with pytest.raises(ValueError, match=r"^share must be one number"):
        jax.jit(decay.window_for)(jnp.ones(2) / 2)
    shares = jnp.array([0.5, 0.9])
    assert jax.vmap(decay.window_for)(shares).tolist() == [decay.window_for(s) for s in (0.5, 0.9)]


def test_it_prints_on_one_line():
    norms = 0.5 ** np.arange(4.0)
    lags = ByLag({"w": norms}, norms, {"w": norms})
    assert repr(fit_decay(lags)) == "Decay(rate=0.5, lags=4)"
    seen = []
    jax.eval_shape(lambda v: seen.append(repr(fit_decay(v))), lags)
    assert seen == ["Decay(rate=float64[], share=float64[4])"]
    batch = jax.vmap(fit_decay)(jax.tree.map(lambda v: np.stack([v, v]), lags))
    assert repr(batch) == "Decay(rate=float64[2], share=float64[2,4])"
