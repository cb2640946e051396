"""The bias of the expected gradient: closed forms, noise, and the windows of copy tasks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import ROOT, run_python

import jaxbptt
from jaxbptt import Bias, ByRange, estimate_bias

NONE = 2**31 - 1


def stacked(*runs, windows=(1, 2, 4)):
    """Runs of one parameter leaf, each a list over the ranges."""
    return ByRange({"w": jnp.array(runs), "n": None}, windows)


# ------------------------------------------------------------ of sums by range


def test_without_noise_it_is_what_the_ranges_say():
    one = [[3.0, 0.0], [0.0, 1.0], [0.0, 3.0]]
    bias = Bias.of(stacked(one, one))
    assert bias.kept.tolist() == [9, 13, 25]
    assert bias.missed.tolist() == [16, 9, 0]
    assert bias.measured == 25
    assert bias.signal == 1
    np.testing.assert_allclose(bias.share, [0.36, 0.52, 1], rtol=1e-15)
    assert bias.relative.tolist() == [0.8, 0.6, 0]
    assert [int(bias.window_for(s)) for s in (0.3, 0.36, 0.37, 0.52, 0.53, 1)] == [1, 1, 2, 2, 4, 4]
    assert [int(bias.window_within(d)) for d in (0.8, 0.79, 0.6, 0.5, 1e-9)] == [1, 2, 2, 4, 4]
    assert bias.window_for(0.5).dtype == bias.window_within().dtype == jnp.int32
    assert repr(bias) == "Bias({1: 0.8, 2: 0.6, 4: 0})"


def test_a_share_that_falls_again_is_not_enough():
    one = [[4.0], [-3.0], [3.0]]
    bias = Bias.of(stacked(one, one))
    assert bias.share.tolist() == [1, 0.25, 1]
    assert bias.window_for(0.8) == 4
    assert bias.window_for(0.2) == 1


def test_pairs_of_runs_by_hand():
    rng = np.random.default_rng(0)
    runs = rng.normal(size=(3, 3, 5)) + 1j * rng.normal(size=(3, 3, 5))
    bias = Bias.of(stacked(*runs))
    pairs = [(q, r) for q in range(3) for r in range(3) if q != r]
    whole = runs.sum(1)
    for i in range(3):
        kept, behind = runs[:, : i + 1].sum(1), runs[:, i + 1 :].sum(1)
        want = np.mean([np.vdot(kept[q], whole[r]).real for q, r in pairs])
        np.testing.assert_allclose(bias.kept[i], want, rtol=1e-12)
        want = np.mean([np.vdot(behind[q], behind[r]).real for q, r in pairs])
        np.testing.assert_allclose(bias.missed[i], want, rtol=1e-12)
    want = np.mean([np.vdot(v, v).real for v in whole])
    np.testing.assert_allclose(bias.measured, want, rtol=1e-12)


@pytest.mark.parametrize("n", [2, 5])
def test_products_are_unbiased_whatever_the_noise(n):
    rng = np.random.default_rng(n)
    mean = rng.normal(size=(3, 4)) / 2
    draws = mean + 2 * rng.normal(size=(40_000, n, 3, 4))
    bias = jax.jit(jax.vmap(lambda runs: Bias.of(ByRange(runs, (1, 2, 4)))))(draws)
    whole = mean.sum(0)
    for i in range(3):
        behind = mean[i + 1 :].sum(0)
        for found, want in (
            (bias.kept[:, i], (whole - behind) @ whole),
            (bias.missed[:, i], behind @ behind),
        ):
            spread = np.std(found) / np.sqrt(len(found))
            assert abs(np.mean(found) - want) <= 4 * spread
            assert spread < 0.2
    # The square of what a single run has found is noise for the most part.
    assert np.mean(bias.measured) > 5 * whole @ whole


def test_a_gradient_that_is_noise_gives_no_window():
    bias = Bias.of(stacked([[1.0], [1.0], [1.0]], [[-1.0], [-1.0], [-1.0]]))
    assert bias.signal < 0
    assert np.all(np.isinf(bias.relative))
    assert bias.share.tolist() == [0, 0, 0]
    assert bias.window_for(1e-6) == bias.window_within(1e6) == NONE
    nothing = Bias.of(stacked([[0.0], [0.0], [0.0]], [[0.0], [0.0], [0.0]]))
    assert nothing.signal == 0
    assert nothing.window_within() == NONE


def test_leaves_of_several_dtypes_and_of_many_axes():
    leaves = {"a": jnp.ones((2, 2, 3, 4), jnp.float32), "b": jnp.ones((2, 2), jnp.float64)}
    bias = Bias.of(ByRange(leaves, (1, 2)))
    assert bias.kept.dtype == jnp.float64
    assert (bias.kept.tolist(), bias.missed.tolist()) == ([26, 52], [13, 0])
    many = jax.vmap(lambda _: bias)(jnp.arange(3))
    assert many.window_for(0.5).tolist() == many.window_within(0.5).tolist() == [1, 1, 1]
    assert repr(many) == "Bias(windows=(1, 2))"


# ------------------------------------------------------------ of a step


def delayed(w, c, x):
    """What is written now is read five steps later."""
    return jnp.append(w * x[0], c[:-1]), c[-1]


def squared(y, x):
    return (y - x[1]) ** 2


def test_a_delay_in_closed_form():
    heard = np.random.default_rng(1).normal(size=(2, 30))
    said = 2 * np.roll(heard, 5, axis=1)
    c = jnp.zeros((2, 5))
    bias = jax.jit(lambda w: estimate_bias(delayed, squared, w, c, (heard, said), window=7))(0.5)
    # ∂/∂w (w x_{t-5} - 2 x_{t-5})², all of it at lag 5, over what comes behind the first 7 steps.
    grads = [np.mean(2 * (0.5 - 2) * x[2:25] ** 2) for x in heard]
    assert bias.windows == (1, 2, 4, 7)
    full = grads[0] * grads[1]
    np.testing.assert_allclose(bias.kept, [0, 0, 0, full], rtol=1e-12)
    np.testing.assert_allclose(bias.missed, [full, full, full, 0], rtol=1e-12)
    np.testing.assert_allclose(bias.measured, np.mean(np.square(grads)), rtol=1e-12)
    assert bias.window_within() == bias.window_for(0.9) == 7


def test_a_loss_of_params_counts_with_lag_0():
    xs, c = (np.ones((2, 30)), np.ones((2, 30))), jnp.zeros((2, 5))

    def loss(y, x, w):
        return (y - x[1]) ** 2 + 3 * w["w"], {"y": y}

    def step(w, c, x):
        return delayed(w["w"], c, x)

    params = {"n": jnp.int32(3), "w": jnp.array(0.5)}
    bias = estimate_bias(step, loss, params, c, xs, window=8)
    np.testing.assert_allclose(bias.kept, [6, 6, 6, 4], rtol=1e-12)  # 3, and -1 at lag 5
    np.testing.assert_allclose(bias.missed, [1, 1, 1, 0], rtol=1e-12)


def test_noise_from_far_back_counts_by_norm_and_not_in_expectation():
    """c keeps a sum of noise; what is to be learned is all at lag 0."""

    def step(b, c, x):
        c = {"noise": 0.98 * c["noise"] + b["far"], "near": b["near"]}
        return c, (c["near"] - 1) ** 2 + x * c["noise"]

    b = {"far": jnp.array(0.0), "near": jnp.array(0.0)}
    xs = np.random.default_rng(3).normal(size=(8, 2000))
    carry = {"noise": jnp.zeros(8), "near": jnp.zeros(8)}
    bias = jax.jit(lambda b: estimate_bias(step, lambda y, x: y, b, carry, xs, window=64))(b)
    assert bias.window_within() == 1
    rec = jaxbptt.record(step, window=64)

    def look(tape, x):
        tape, y = rec(b, tape, x)
        return tape, jaxbptt.gradient_by_lag(rec, b, tape, jnp.ones_like(y)[None])

    tape = rec.init(b, jax.tree.map(lambda v: v[0], carry), xs[0, 0])
    _, lags = jax.jit(lambda tape: jax.lax.scan(look, tape, xs[0, :300]))(tape)
    decay = jaxbptt.fit_decay(jax.tree.map(lambda v: v[64:].mean(0), lags))
    assert decay.window_for(0.95) > 64


def test_what_is_wrong_is_said():
    c, xs = jnp.zeros((2, 5)), (np.ones((2, 30)), np.ones((2, 30)))

    def go(loss=squared, carry=c, xs=xs, window=8):
        return estimate_bias(delayed, loss, 0.5, carry, xs, window=window)

    with pytest.raises(ValueError, match=r"^loss must be a function loss\(y, x\) -> scalar"):
        go(loss=0.5)
    with pytest.raises(
        ValueError, match=r"^loss must be callable as loss\(y, x\) or loss\(y, x, params\)"
    ):
        go(loss=lambda y: y)
    with pytest.raises(TypeError, match=r"^loss must return a floating-point scalar"):
        go(loss=lambda y, x: y[None])
    several = r"^xs must be inputs of two independent runs or more(.|\n)*xs\[0\]: float64\[1,30\]"
    with pytest.raises(ValueError, match=several):
        go(xs=jax.tree.map(lambda v: v[:1], xs))
    for wrong in ((), 1.0, np.ones(30), (np.ones((2, 30)), np.ones((2, 29)))):
        with pytest.raises(ValueError, match=r"^xs must be inputs of two independent runs"):
            go(xs=wrong)
    with pytest.raises(ValueError, match=r"more steps than the window, 30, but got"):
        go(window=30)
    with pytest.raises(ValueError, match=r"^carry must be what each of the 2 runs starts from"):
        go(carry=jnp.zeros(5))
    with pytest.raises(ValueError, match=r"^window must be"):
        go(window=0)
    with pytest.raises(ValueError, match=r"^runs must be what gradient_by_range returned"):
        Bias.of({"w": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match=r"^runs.params must have a leaf"):
        Bias.of(ByRange({}, (1, 2)))
    for shape in ((3,), (1, 3), (2, 2)):
        with pytest.raises(ValueError, match=r"^runs must be stacked along a first axis"):
            Bias.of(ByRange(jnp.ones(shape), (1, 2, 4)))
    for delta in (0, -1.0, float("nan"), None):
        with pytest.raises(ValueError, match=r"^delta must be"):
            go().window_within(delta)
    for share in (0, 1.1, None):
        with pytest.raises(ValueError, match=r"^share must be"):
            go().window_for(share)


# ------------------------------------------------------------ what it is for


@pytest.mark.slow
@pytest.mark.parametrize(("lag", "needed"), [(2, 3), (6, 8), (10, 12)])
def test_a_window_within_a_factor_of_two_of_what_a_copy_task_needs(lag, needed, tmp_path):
    """The windows needed are those of `benchmarks/advice.md`."""
    pytest.importorskip("optax")
    script = ROOT / "benchmarks" / "advice.py"
    options = ("--tasks", f"copy-{lag}", "--advice", "--seeds", "1")
    done = run_python(script, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = re.findall(rf"^\| copy-{lag} \| - \| (\d+) \|", done.stdout, re.MULTILINE)
    assert needed / 2 <= int(row) <= 2 * needed
