# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Hypergradients: a learning rate that is learned, and the short-horizon bias
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxbptt/jaxbptt/blob/main/notebooks/08_hypergradients.ipynb)
#
# A training run is a recurrent system. Its carry is the weights, a step is an update, and the learning rate is
# a parameter of that step. So truncated backpropagation through *training* gives the gradient of the losses to come
# with respect to the learning rate, while the training goes on. And it has the bias of all truncation, here in
# a form with a name: Wu, Ren, Liao and Grosse ("Understanding Short-Horizon Bias in Stochastic
# Meta-Optimization", 2018) showed on a noisy quadratic that short windows ask for rates that are too small. Below is
# such a quadratic, with `record` around the update.
#
# It needs about a minute on a CPU.

# %%
import importlib.util
import os

spec = importlib.util.find_spec("jaxbptt")
if spec is None or spec.origin is None:  # not installed; a clone in this folder has no origin
    repository = "jaxbptt[demo] @ git+https://github.com/jaxbptt/jaxbptt"
    source = os.environ.get("JAXBPTT_INSTALL", repository)
    # %pip install --quiet "{source}"

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxbptt

jax.config.update("jax_enable_x64", True)
SMALL = bool(os.environ.get("JAXBPTT_SMALL"))  # fewer steps, for a quick run of all cells
BLUE, ORANGE, GREEN, PINK, YELLOW = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
GRAY = "0.4"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})

# %% [markdown]
# ## The system
#
# A quadratic loss in many directions, $\ell(w) = \frac12 \sum_i h_i w_i^2$, some steep and some shallow. Each step sees
# it moved by noise, as a minibatch does: $g_i = h_i (w_i - \xi_i)$ with $\xi_i \sim N(0, 1/h_i)$, so that the
# gradient's noise has variance $h_i$. SGD at a rate $\alpha$ is then
#
# $$ w_i \leftarrow (1 - \alpha h_i)\, w_i + \alpha h_i \xi_i . $$
#
# Steep directions are soon at the level of their noise, and that noise grows with $\alpha$; the shallow ones need a
# large $\alpha$ for a long time. Since the expected loss depends on the means and variances of $w$ alone, and
# these follow a recursion of their own, the carry can be these, and the gradient is free of noise.

# %%
CURVATURES = jnp.asarray(np.geomspace(1.0, 1e-3, 60))


def inner_step(log_rate, w, _):
    """One step of SGD on means and variances: the carry after it, and the expected loss."""
    mean, variance = w
    shrink = 1 - jnp.exp(log_rate) * CURVATURES
    mean = shrink * mean
    variance = shrink**2 * variance + jnp.exp(2 * log_rate) * CURVATURES  # (α h)² / h
    return (mean, variance), 0.5 * jnp.sum(CURVATURES * (mean**2 + variance))


START = jnp.full(60, 3.0), jnp.zeros(60)

# %% [markdown]
# ## The hypergradient, by window
#
# At a rate of 0.1, after 200 steps: what would a larger rate, over the last h steps, do to the loss of now? One tape
# of 200 lags and `gradient_by_lag` say it for every h at once.

# %%
LONGEST, RATE = 200, 0.1


@jax.jit
def by_window(log_rate):
    rec = jaxbptt.record(inner_step, window=LONGEST, weights="current")
    tape = rec.init(log_rate, START, None)
    tape, losses = jax.lax.scan(lambda tape, _: rec(log_rate, tape, None), tape, length=LONGEST)
    lags = jaxbptt.gradient_by_lag(rec, log_rate, tape, jnp.ones(1), full=True)
    return jnp.cumsum(lags.params), losses


hypergradients, losses = by_window(jnp.log(RATE))


@jax.jit
def loss_after(log_rates):
    """The expected loss, with a rate for each step."""
    return jax.lax.scan(lambda w, r: inner_step(r, w, None), START, log_rates)[1][-1]


def by_differences(window, eps=1e-5):
    """d loss / d log α over the last steps, by finite differences."""
    last = jnp.arange(LONGEST) >= LONGEST - window
    up, down = (loss_after(jnp.log(RATE) + sign * eps * last) for sign in (1, -1))
    return float(up - down) / (2 * eps)


checked = [1, 3, 10, 30, 100, 200]
for window in checked:
    found, expected = float(hypergradients[window - 1]), by_differences(window)
    print(f"window {window:3d}: {found:+.5f}   by finite differences {expected:+.5f}")
    assert abs(found - expected) < 1e-6 * max(1, abs(expected))

# %%
fig, ax = plt.subplots(figsize=(8, 3.6))
windows = np.arange(1, LONGEST + 1)
ax.axhline(0, color=GRAY, lw=1)
ax.plot(windows, hypergradients, color=BLUE)
ax.plot(
    checked, [by_differences(w) for w in checked], "o", color=ORANGE, label="finite differences"
)
ax.fill_between(
    windows, hypergradients, 0, where=hypergradients > 0, color=ORANGE, alpha=0.25, lw=0
)
ax.set(xlabel="window (steps of training)", ylabel="d loss / d log α", xscale="log")
ax.set_title("Short windows say: a smaller rate. Long ones: a larger.")
ax.legend()
fig.tight_layout()
plt.show()
turn = int(np.argmax(np.asarray(hypergradients) < 0)) + 1
print(f"the sign is right from window {turn} on")
assert hypergradients[0] > 0 > hypergradients[-1]

# %% [markdown]
# At this state, in the short run, a smaller rate is better: it lets the noise of the steep directions
# die down at once. What it costs in the shallow ones comes later, and is more.
#
# ## Tuned online
#
# Let the rate be learned *while* the weights are: after each step of SGD, one step of Adam on $\log\alpha$ with the
# hypergradient of a window. The windows differ, nothing else does.

# %%
INNER, META = (1000 if SMALL else 4000), 0.05
WINDOWS = (1, 10, 100, 1000)


def tuned(window):
    """Rates and losses by step, for one run that tunes its rate as it goes."""
    learner = jaxbptt.learner(
        inner_step, lambda y, x: y, optax.adam(META), window=window, weights="current"
    )
    state = learner.init(jnp.log(RATE), START, None)

    def one(state, _):
        log_rate = state.params
        state, metrics = learner.update(state, None)
        return state, (jnp.exp(log_rate), metrics.loss)

    return jax.jit(lambda state: jax.lax.scan(one, state, length=INNER)[1])(state)


runs = {window: tuned(window) for window in WINDOWS}
constant = {
    rate: jax.lax.scan(lambda w, _, r=rate: inner_step(jnp.log(r), w, None), START, length=INNER)[1]
    for rate in np.geomspace(0.01, 1.9, 16)
}
best = min(constant, key=lambda rate: float(constant[rate][-1]))

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4))
for (window, (rates, losses)), color in zip(
    runs.items(), (YELLOW, ORANGE, GREEN, BLUE), strict=True
):
    left.loglog(np.arange(1, INNER + 1), rates, color=color, label=f"window {window}")
    right.loglog(np.arange(1, INNER + 1), losses, color=color, label=f"window {window}")
right.loglog(
    np.arange(1, INNER + 1),
    constant[best],
    color=GRAY,
    ls="--",
    label=f"best constant, {best:.2g}",
)
left.axhline(RATE, color=GRAY, ls=":", lw=1)
left.set(xlabel="step of training", ylabel="learning rate α", title="The rate each window chooses")
right.set(xlabel="step of training", ylabel="expected loss", title="And where it leads")
right.legend()
fig.tight_layout()
plt.show()

# %%
print("window   largest rate   last rate   mean loss   last loss")
for window, (rates, losses) in runs.items():
    print(
        f"{window:8d}  {rates.max():11.3f}   {rates[-1]:9.2e}   {losses.mean():9.3f}   {losses[-1]:9.4f}"
    )
print(
    f"constant  {best:11.3f}   {best:9.2e}   {constant[best].mean():9.3f}   {constant[best][-1]:9.4f}"
)
peaks = [float(rates.max()) for rates, _ in runs.values()]
lasts = [float(losses[-1]) for _, losses in runs.values()]
assert peaks == sorted(peaks)  # the longer the window, the larger the rate it dares
assert SMALL or lasts == sorted(lasts, reverse=True)  # and the lower the loss in the end

# %% [markdown]
# All windows find by themselves that the rate should rise first and fall later, and all beat the best constant rate by
# far. But the shorter the window, the less the rate dares to rise: a window of 1 stops at half of what a window of
# 100 takes. It is even ahead for a while, which is just what it asks for, and behind in the end, with a
# higher rate than the others *then*, since the shallow directions are still to be done.
#
# A window of 1 is the rule of hypergradient descent (Baydin et al., 2018), and the bias is its own. What a longer one
# costs is a tape: here of a hundred vectors.
