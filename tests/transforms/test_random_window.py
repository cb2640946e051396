"""Random cuts: every pattern of cuts with its probability, then draws, then a published failure."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import grid
from influence import SIGNS, UNITS, WIRING
from jax import lax
from oracles import check, moving, random_like
from zoo import ZOO

import jaxbptt

LENGTH = 6


def hazard(age, mean, alpha):
    """The probability of a cut, as the law is written in the paper."""
    return 1 / mean if alpha == math.inf else alpha / ((alpha - 1) * mean + age)


def patterns(length, mean, alpha):
    """Each pattern of cuts between steps: its probability and what λ is multiplied by."""
    for cuts in itertools.product([False, True], repeat=length - 1):
        probability, factors, age = 1.0, [], 1
        for cut in cuts:
            c = hazard(age, mean, alpha)
            probability *= c if cut else 1 - c
            factors.append(0.0 if cut else 1 / (1 - c))
            age = 1 if cut else age + 1
        yield probability, factors


def by_hand(step, params, carry, xs, factors, ct_carry, ct_ys):
    """The unrolled graph with λ multiplied between the steps, and its cotangents."""

    @jax.custom_vjp
    def crossing(carry, factor):
        return carry

    def backward(factor, ct):
        scaled = jax.tree.map(
            lambda v: v if v.dtype == jax.dtypes.float0 else v * factor.astype(v.dtype), ct
        )
        return scaled, None

    crossing.defvjp(lambda carry, factor: (carry, factor), backward)

    def run(params, carry, xs):
        ys = []
        for s in range(len(factors) + 1):
            if s:
                carry = crossing(carry, jnp.asarray(factors[s - 1]))
            carry, y = step(params, carry, jax.tree.map(lambda v, s=s: v[s], xs))
            ys.append(y)
        return carry, jax.tree.map(lambda *v: jnp.stack(v), *ys)

    _, pull = jax.vjp(run, params, carry, xs)
    return pull((ct_carry, ct_ys))


def ours(step, params, carry, xs, window, ct_carry, ct_ys, **options):
    def run(params, carry, xs):
        return jaxbptt.scan(lambda c, x: step(params, c, x), carry, xs, window=window, **options)

    return jax.vjp(run, params, carry, xs)[1]((ct_carry, ct_ys))


@pytest.fixture
def given_draws(monkeypatch):
    """Makes the draws those of a pattern of cuts, bool (length - 1,), as a window's key."""
    monkeypatch.setattr("jaxbptt._errors.is_key", lambda name, key: None)
    monkeypatch.setattr(
        jax.random, "uniform", lambda cuts, shape: jnp.where(cuts, 0.0, 1.0).reshape(shape)
    )


NAMES = ["tanh_rnn", "lstm", "nested_dict", "tokens", "no_y"]
ONCE = list(zip(NAMES[:4], itertools.cycle([False, True]), strict=False))


@pytest.mark.parametrize(
    ("name", "reverse"), grid(itertools.product(NAMES, [False, True]), always=ONCE)
)
def test_each_pattern_of_cuts_is_that_of_the_unrolled_graph(name, reverse, given_draws):
    case = ZOO[name](np.float64)
    xs = case.xs(LENGTH)
    run = case.params, case.carry, xs
    outs = lax.scan(lambda c, x: case.step(case.params, c, x), case.carry, xs)
    cts = random_like(outs[0], 1), random_like(outs[1], 2)
    chosen = list(patterns(LENGTH, 3, 6))

    @jax.jit
    def found(cuts):
        window = jaxbptt.random_window(cuts, 3)
        flipped = case.params, case.carry, flip(xs, reverse)
        got = ours(case.step, *flipped, window, cts[0], flip(cts[1], reverse), reverse=reverse)
        return moving((*got[:2], flip(got[2], reverse)))

    @jax.jit
    def expected(factors):
        return moving(by_hand(case.step, *run, factors, *cts))

    for _, factors in (chosen[0], chosen[5], chosen[13], chosen[-1]):
        got, want = found(np.asarray(factors) == 0), expected(np.asarray(factors))
        check("random window", got, want, 1e-12)


def flip(tree, reverse):
    return jax.tree.map(lambda v: v[::-1], tree) if reverse else tree


def small():
    rng = np.random.default_rng(0)
    w, h, xs = (jnp.asarray(rng.normal(size=shape)) for shape in ((3, 3), (3,), (LENGTH, 3)))

    def step(w, h, x):
        h = jnp.tanh(w @ h + x)
        return h, jnp.sum(h * h)

    return step, w, h, xs


def gradient(window):
    """By w, the first carry and xs, as one vector."""
    got = ours(*small(), window, jnp.zeros(3), jnp.ones(LENGTH))
    return jnp.concatenate([v.ravel() for v in got])


@functools.cache
def full_gradient():
    return np.asarray(jax.jit(lambda: gradient(None))())


def all_patterns(mean, alpha):
    """Of each pattern of cuts the probability, and the gradient."""
    probabilities, factors = map(np.array, zip(*patterns(LENGTH, mean, alpha), strict=True))
    each = jax.jit(jax.vmap(lambda cuts: gradient(jaxbptt.random_window(cuts, mean, alpha))))
    return probabilities, np.asarray(each(factors == 0))


@pytest.mark.parametrize(("mean", "alpha"), [(3, 6), (1.5, 6), (4, 2.5), (3, math.inf)])
def test_the_mean_over_all_patterns_is_the_full_gradient(mean, alpha, given_draws):
    probabilities, each = all_patterns(mean, alpha)
    np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-14)
    assert len(np.unique(each, axis=0)) == 2 ** (LENGTH - 1)
    found = probabilities @ each
    check("random window, mean over all patterns", [found], [full_gradient()], 1e-13)


def test_the_error_of_a_mean_over_draws_falls_as_the_variance_says(given_draws, monkeypatch):
    probabilities, each = all_patterns(3, 6)
    monkeypatch.undo()
    full = full_gradient()
    variance = probabilities @ (each - full) ** 2

    @jax.jit
    def drawn(key):
        one = lambda key: gradient(jaxbptt.random_window(key, 3))  # noqa: E731
        return jax.vmap(one)(jax.random.split(key, 2**15))

    draws = np.asarray(drawn(jax.random.key(0)))
    for n in (1, 8, 64, 512):
        squares = ((draws.reshape(-1, n, len(full)).mean(1) - full) ** 2).mean(0)
        # 2^15 / n means: of their squared error one in sqrt(n / 2^14) can be expected.
        np.testing.assert_allclose(
            (squares * n).sum() / variance.sum(), 1, atol=4 * (n / 2**14) ** 0.5
        )
    random = variance > 1e-20  # the last x is reached by no cut
    beyond = (draws.mean(0) - full)[random] / np.sqrt(variance[random] / len(draws))
    assert np.abs(beyond).max() < 4


def test_stretches_have_the_mean_length_that_was_asked_for():
    for mean, alpha in ((5, 6.0), (2, 6.0), (5, math.inf)):
        factors = jaxbptt.random_window(jax.random.key(1), mean, alpha).factors(200_000)
        np.testing.assert_allclose(1 / np.mean(np.asarray(factors) == 0), mean, rtol=0.02)


# ------------------------------------------------------------------ a published failure
# Tallec & Ollivier 2017, influence balancing.


def balanced(window, updates=150, steps=200, rate=2e-5):
    """The losses after SGD on blocks of steps; `window` is made from an update's key."""

    def step(theta, s):
        s = jnp.asarray(WIRING) @ s + theta * jnp.asarray(SIGNS)
        return s, 0.5 * (s[0] - 1) ** 2

    def update(state, key):
        s, theta = state

        def loss_fn(theta):
            run = lambda s, _: step(theta, s)  # noqa: E731
            s_next, losses = jaxbptt.scan(run, s, length=steps, window=window(key))
            return losses.sum(), s_next

        grad, s = jax.grad(loss_fn, has_aux=True)(theta)
        return (s, theta - rate * grad), None

    @jax.jit
    def train(key):
        keys = jax.random.split(key, updates)
        (s, theta), _ = lax.scan(update, (jnp.ones(UNITS), jnp.asarray(0.5)), keys)
        return step(theta, s)[1], theta

    return train


def test_influence_balancing_converges():
    keys = jax.random.split(jax.random.key(0), 8)
    drawn = balanced(lambda key: jaxbptt.random_window(key, mean=16))
    losses, thetas = jax.vmap(drawn)(keys)
    assert np.max(losses) < 1e-6
    np.testing.assert_allclose(thetas, -1 / 6, rtol=1e-2)


@pytest.mark.parametrize("steps", grid([1, 10, 20, 40], always=[40]))
def test_with_a_fixed_window_it_diverges(steps):
    assert balanced(lambda _: steps)(jax.random.key(0))[0] > 100


# ----------------------------------------------------------------- how it is used


def test_it_works_where_scan_works():
    step, w, h, xs = small()

    def loss(w, key):
        window = jaxbptt.random_window(key, 3)
        return jaxbptt.scan(lambda c, x: step(w, c, x), h, xs, window=window)[1].sum()

    key, grad = jax.random.key(3), jax.jit(jax.grad(loss))
    want, keys = jax.grad(loss)(w, key), jax.random.split(key)
    check("random window, jit", [grad(w, key)], [want], 1e-13)
    twice = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(w, keys)
    check("random window, vmap", [np.asarray(twice)[1]], [grad(w, keys[1])], 1e-13)
    old = grad(w, jax.random.PRNGKey(3))  # a key of the older kind
    check("random window, old key", [old], [want], 1e-13)
    window = jaxbptt.random_window(key, 3)
    again = jax.jit(
        jax.grad(
            lambda w, window: jaxbptt.scan(lambda c, x: step(w, c, x), h, xs, window=window)[
                1
            ].sum()
        )
    )(w, window)  # it is a pytree: an argument of compiled code
    check("random window, an argument", [again], [want], 1e-13)


@pytest.mark.parametrize("length", [0, 1])
def test_short_runs_have_no_cut(length):
    step, w, h, xs = small()
    cts = random_like(h, 1), np.ones(length)

    @jax.jit
    def both(xs):
        window = jaxbptt.random_window(jax.random.key(0), 1.01)
        return [ours(step, w, h, xs, choice, *cts) for choice in (window, None)]

    got, want = both(np.asarray(xs)[:length])
    check("random window, short", got, want, 1e-13)


def test_a_value_that_is_not_finite_does_not_cross_a_cut(given_draws):
    @jax.jit
    @jax.grad
    def slope(h, cuts):
        step = lambda h, x: (jnp.sqrt(h * x), None)  # noqa: E731
        xs = jnp.asarray([1.0, 1.0, 0.0])  # the derivative of the last step is infinite
        return jaxbptt.scan(step, h, xs, window=jaxbptt.random_window(cuts, 3))[0]

    assert not np.isfinite(slope(1.0, np.array([False, False])))
    assert slope(1.0, np.array([False, True])) == 0


def test_half_precision_is_multiplied_in_single(given_draws):
    window = jaxbptt.random_window(jnp.zeros(1, bool), 16.13, math.inf)  # times 1.0661

    def loss(h):
        h, _ = jaxbptt.scan(lambda h, x: (h * x, None), h, jnp.ones(2, h.dtype), window=window)
        return h * jnp.bfloat16(1.9921875)

    # 2.1239, rounded once; with the factor rounded first, to 1.0625, it would be 2.1094.
    assert jax.jit(jax.grad(loss))(jnp.bfloat16(1)) == jnp.bfloat16(2.125)


@pytest.mark.parametrize("name", ["mean", "alpha"])
@pytest.mark.parametrize("value", [1, 0.5, -3, True, "3", math.nan, None])
def test_a_mean_or_alpha_that_is_no_number_above_one_is_refused(name, value):
    given = {"mean": 5, name: value}
    with pytest.raises(ValueError, match=rf"{name} must be a number above 1 \(.*but got"):
        jaxbptt.random_window(jax.random.key(0), **given)


@pytest.mark.parametrize("key", [None, 0, 0.5, "key", np.zeros(2), jnp.zeros((), jnp.int32), ()])
def test_what_is_no_key_is_refused(key):
    with pytest.raises(ValueError, match=r"key must be a key for jax.random, but got .*Make one"):
        jaxbptt.random_window(key, 3)


def test_a_run_is_drawn_from_one_key():
    step, w, h, xs = small()
    for keys in (jax.random.split(jax.random.key(0)), jax.random.split(jax.random.PRNGKey(0))):
        window = jaxbptt.random_window(keys, 3)
        with pytest.raises(ValueError, match="window must be drawn from one key for a run, but"):
            jaxbptt.scan(lambda c, x: step(w, c, x), h, xs, window=window)
        batch = jax.vmap(lambda v: jaxbptt.scan(lambda c, x: step(w, c, x), h, xs, window=v)[1])
        assert jax.tree.leaves(batch(window))[0].shape[0] == 2


def test_a_random_window_is_refused_where_it_has_no_meaning():
    window = jaxbptt.random_window(jax.random.key(0), 5)
    step, w, h, xs = small()
    with pytest.raises(ValueError, match="window must be an int, but got a random window, which"):
        jaxbptt.record(step, window=window)
    run = lambda c, x: step(w, c, x)  # noqa: E731
    with pytest.raises(ValueError, match="every must be 1 with a random window, but got 3"):
        jaxbptt.scan(run, h, xs, window=window, every=3)
    with pytest.raises(ValueError, match=r"window\['a'\] must be an int, but got a random window"):
        jaxbptt.scan(run, {"a": h}, xs, window={"a": window})
    traced = "mean must be a Python number, but got the traced value"
    with pytest.raises(ValueError, match=traced):
        jax.jit(lambda m: jaxbptt.random_window(jax.random.key(0), m).key)(3.0)
