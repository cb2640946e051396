"""Results that others have published or that can be worked out on paper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from harness import grid
from influence import SIGNS, UNITS, WIRING
from jax import lax

import jaxbptt


def test_three_scalar_products_give_the_derivative_worked_out_on_paper():
    # x₃ = w³ x₀, so dx₃/dw = 3 w² x₀ = .108. A recipe that keeps a graph alive and forgets
    # to clear the state's gradient gives .288 here.
    rec = jaxbptt.record(lambda w, x, _: (w * x, w * x), window=3)

    def loss(w, tape):
        tape, x = rec(w, tape, None)
        return x, tape

    @jax.jit
    def three(w, x):
        tape, grads = rec.init(w, x, None), []
        for _ in range(3):
            (_, tape), grad = jax.value_and_grad(loss, has_aux=True)(w, tape)
            grads.append(grad)
        return grads, rec.pullback(w, tape, jnp.ones(1)).params

    grads, pulled = three(0.2, 0.9)
    np.testing.assert_allclose(grads, [0.9, 0.36, 0.108], rtol=1e-12)
    np.testing.assert_allclose(pulled, 0.108, rtol=1e-12)


# ------------------------------------------------------- influence balancing
# Tallec & Ollivier, "Unbiasing Truncated Backpropagation Through Time", 2017.

SETTLED = 400  # steps after which the influence no longer changes


def balance(theta, s, x):
    """s ← A s + θ b; y = s₀."""
    s = jnp.asarray(WIRING) @ s + theta * jnp.asarray(SIGNS)
    return s, s[0]


@functools.cache
def influence(window):
    """d s₀ / dθ through the last `window` steps, θ̄ of the loss ½(s₀ - 1)², and s₀."""
    rec = jaxbptt.record(balance, window=window, weights="current")

    @jax.jit
    def run(theta):
        tape = rec.init(theta, jnp.ones(UNITS), None)
        tape, _ = lax.scan(lambda tape, _: rec(theta, tape, None), tape, length=SETTLED)

        def loss(theta):
            _, y = rec(theta, tape, None)
            return 0.5 * (y - 1) ** 2, y

        ct = rec.pullback(theta, tape, jnp.ones(1))
        return ct.params, *jax.grad(loss, has_aux=True)(theta)

    return run(0.5)


@pytest.mark.parametrize(
    ("window", "figure"),
    [(1, 1.0), (10, 10.0), (20, 16.476), (40, 0.566), (50, -4.75), (SETTLED, -6.0)],
)
def test_cumulative_influence_has_the_published_figures(window, figure):
    digits = 5e-3 if figure == -4.75 else 5e-4
    assert abs(float(influence(window)[0]) - figure) < digits


@pytest.mark.parametrize(
    "window",
    grid([1, 2, 10, 20, 39, 40, 41, 42, 50, SETTLED], always=[1, 10, 20, 40, 41, 50, SETTLED]),
)
def test_the_gradients_sign_is_wrong_up_to_window_40_and_right_from_41(window):
    # s₀ settles at -6 θ, so from θ = ½ the loss falls when θ does: the gradient is positive.
    _, grad, y = influence(window)
    np.testing.assert_allclose(y, -3.0, rtol=1e-9)
    assert (grad > 0) == (window >= 41)


def test_the_influence_of_each_window_is_a_running_sum_over_lags():
    # θ as the input: x̄ then holds each lag's share, and the sums cross zero after 40.
    rec = jaxbptt.record(lambda _, s, theta: balance(theta, s, None), window=60)

    @jax.jit
    def run(theta):
        tape = rec.init(None, jnp.ones(UNITS), theta)
        tape, _ = lax.scan(
            lambda tape, theta: rec(None, tape, theta), tape, jnp.full(SETTLED, theta)
        )
        return rec.pullback(None, tape, jnp.ones(1)).xs

    sums = np.cumsum(run(0.5)[::-1])
    power, by_hand = np.eye(UNITS), []
    for _ in range(60):
        by_hand.append(power[0] @ SIGNS)
        power = power @ WIRING
    np.testing.assert_allclose(sums, np.cumsum(by_hand), rtol=1e-12, atol=1e-12)
    assert np.all(sums[:40] > 0)
    assert np.all(sums[40:] < 0)


# -------------------------------------------------------------- min-char-rnn
# After Karpathy's character model: one stream, one-hot characters, cross entropy.

VOCABULARY, HIDDEN, CHUNK = 7, 5, 6


def character_step(params, h, token):
    x = jax.nn.one_hot(token, VOCABULARY, dtype=h.dtype)
    h = jnp.tanh(params["wxh"] @ x + params["whh"] @ h + params["bh"])
    return h, params["why"] @ h + params["by"]


def written_backwards(params, h, tokens, targets):
    """The chunk forwards and backwards by hand: loss, gradients, what h got, and the last h."""
    hs, errors, loss = [h], [], 0.0
    for token, target in zip(tokens, targets, strict=True):
        drive = params["wxh"][:, token] + params["whh"] @ hs[-1] + params["bh"]
        hs.append(np.tanh(drive))
        logits = params["why"] @ hs[-1] + params["by"]
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        loss -= np.log(probabilities[target])
        probabilities[target] -= 1
        errors.append(probabilities)
    grads = {name: np.zeros_like(value) for name, value in params.items()}
    to_earlier = np.zeros_like(h)
    for t in reversed(range(len(tokens))):
        grads["why"] += np.outer(errors[t], hs[t + 1])
        grads["by"] += errors[t]
        to_drive = (params["why"].T @ errors[t] + to_earlier) * (1 - hs[t + 1] ** 2)
        grads["bh"] += to_drive
        grads["wxh"][:, tokens[t]] += to_drive
        grads["whh"] += np.outer(to_drive, hs[t])
        to_earlier = params["whh"].T @ to_drive
    return loss, grads, to_earlier, hs[-1]


@pytest.mark.parametrize("weights", ["stored", "current"])
def test_chunks_agree_term_by_term_with_a_backward_pass_written_by_hand(weights):
    rng = np.random.default_rng(0)
    sizes = {
        "wxh": (HIDDEN, VOCABULARY),
        "whh": (HIDDEN, HIDDEN),
        "why": (VOCABULARY, HIDDEN),
        "bh": (HIDDEN,),
        "by": (VOCABULARY,),
    }
    params = {name: 0.5 * rng.normal(size=size) for name, size in sizes.items()}
    text = rng.integers(0, VOCABULARY, 3 * CHUNK + 1)
    h = rng.normal(size=HIDDEN)
    rec = jaxbptt.record(character_step, window=CHUNK, every=CHUNK, weights=weights)

    @jax.jit
    def chunk(params, tape, tokens, targets):
        tape, logits = lax.scan(lambda tape, token: rec(params, tape, token), tape, tokens)

        def loss(logits):
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)
            return -jnp.sum(picked)

        value, ct_ys = jax.value_and_grad(loss)(logits)
        return tape, value, rec.pullback(params, tape, ct_ys)

    tape = rec.init(params, h, jnp.asarray(0))
    for start in range(0, 3 * CHUNK, CHUNK):
        tokens, targets = text[start : start + CHUNK], text[start + 1 : start + CHUNK + 1]
        arrays = jax.tree.map(jnp.asarray, params)
        tape, loss, ct = chunk(arrays, tape, jnp.asarray(tokens), jnp.asarray(targets))
        want_loss, grads, to_earlier, h = written_backwards(params, h, tokens, targets)
        np.testing.assert_allclose(loss, want_loss, rtol=1e-12)
        np.testing.assert_allclose(tape.carry, h, rtol=1e-12)
        for name in params:
            oracles.check(f"float64, by hand, d{name}", ct.params[name], grads[name], 1e-12)
        oracles.check("float64, by hand, dhnext", ct.carry, to_earlier, 1e-12)
        params = {name: params[name] - 0.1 * grads[name] for name in params}
