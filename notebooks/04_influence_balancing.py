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
# # Influence balancing: a gradient with the wrong sign
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxbptt/jaxbptt/blob/main/notebooks/04_influence_balancing.ipynb)
#
# Tallec and Ollivier ("Unbiasing Truncated Backpropagation Through Time", 2017) built a system on which
# truncated backpropagation doesn't merely learn slowly: it walks the wrong way, at *every* window up
# to 40 steps. Here it is, with their numbers, and with three ways out: a window that is long enough, cuts
# at random steps, and a window chosen from the gradient itself.
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

import jaxbptt

jax.config.update("jax_enable_x64", True)
SMALL = bool(os.environ.get("JAXBPTT_SMALL"))  # fewer steps, for a quick run of all cells
BLUE, ORANGE, GREEN, PINK, YELLOW = COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
GRAY = "0.4"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})

# %% [markdown]
# ## The system
#
# 23 units stand in a row; each keeps half of itself and takes half of its neighbour to the right. One
# parameter $\theta$ pushes the first 10 units up and the 13 behind them down:
#
# $$ s_t = A s_{t-1} + \theta\, b, \qquad \ell_t = \tfrac12 (s_{t,0} - 1)^2 . $$
#
# What $\theta$ does to unit 0 *at once* is positive. What it does in the long run is negative, because
# the 13 outnumber the 10, but their influence takes its time to get there.

# %%
UNITS = 23
A = jnp.asarray(0.5 * np.eye(UNITS) + 0.5 * np.eye(UNITS, k=1))
b = jnp.where(jnp.arange(UNITS) < 10, 1.0, -1.0)


def balance(theta, s, _):
    s = A @ s + theta * b
    return s, s[0]


# %% [markdown]
# ## The sign flips at 41
#
# Let it settle at $\theta = \frac12$ and ask for $\mathrm{d}s_{t,0}/\mathrm{d}\theta$ through windows of
# every length. One tape is enough: `gradient_by_lag` says what each lag adds.

# %%
LONGEST = 150


@jax.jit
def influence_by_lag(theta):
    rec = jaxbptt.record(balance, window=LONGEST, weights="current")
    tape = rec.init(theta, jnp.ones(UNITS), None)
    tape, _ = jax.lax.scan(lambda tape, _: rec(theta, tape, None), tape, length=400)
    lags = jaxbptt.gradient_by_lag(rec, theta, tape, jnp.ones(1), full=True)
    return lags.params


influence = np.cumsum(influence_by_lag(0.5))
published = {1: 1.0, 10: 10.0, 20: 16.476, 40: 0.566, 50: -4.75}
for window, figure in published.items():
    print(f"window {window:3d}: {influence[window - 1]:8.3f}   published {figure:g}")
    assert abs(influence[window - 1] - figure) < 6e-3
print(f"window {LONGEST}: {influence[-1]:8.3f}   all lags: -6")
first_right = int(np.argmax(influence < 0)) + 1
print(f"the sign is right from window {first_right} on")
assert first_right == 41

# %%
fig, ax = plt.subplots(figsize=(8, 3.6))
windows = np.arange(1, LONGEST + 1)
ax.axhline(0, color=GRAY, lw=1)
ax.plot(windows, influence, color=BLUE)
ax.fill_between(windows, influence, 0, where=influence > 0, color=ORANGE, alpha=0.2, lw=0)
ax.plot(list(published), list(published.values()), "o", color=ORANGE, label="published")
ax.axhline(-6, color=GRAY, ls=":", lw=1)
ax.text(LONGEST, -5.4, "whole gradient", ha="right", color=GRAY)
ax.annotate("wrong sign", (20, 6), color=ORANGE, ha="center")
ax.annotate("right from 41", (41, 0), (58, 5), arrowprops={"arrowstyle": "-", "color": GRAY})
ax.set(xlabel="window (steps)", ylabel="influence of θ on unit 0", xlim=(0, LONGEST))
ax.set_title("What a window sees of the gradient")
ax.legend(loc="upper right")
fig.tight_layout()
plt.show()

# %% [markdown]
# ## And so it learns the wrong thing
#
# 3,000 updates of SGD at rate $10^{-4}$, from $s = 1$ and $\theta = \frac12$; the best $\theta$ is $-\frac16$.
# *Sliding* updates after each step, with the last `window` steps in view. *Chunked* takes `window` steps, goes
# back through them from the loss at their end, and updates once.

# %%
UPDATES, RATE = 3000, 1e-4


def loss_of(y):
    return 0.5 * (y - 1) ** 2


def trained(window, steps):
    """θ after each of 3,000 updates, one every so many steps."""
    rec = jaxbptt.record(balance, window=window)

    def update(state, _):
        theta, tape = state
        tape, _ = jax.lax.scan(lambda tape, _: rec(theta, tape, None), tape, length=steps - 1)

        def loss_fn(theta):
            new_tape, y = rec(theta, tape, None)
            return loss_of(y), new_tape

        grad, tape = jax.grad(loss_fn, has_aux=True)(theta)
        theta = theta - RATE * grad
        return (theta, tape), theta

    state = jnp.asarray(0.5), rec.init(0.5, jnp.ones(UNITS), None)
    return jax.jit(lambda state: jax.lax.scan(update, state, length=UPDATES)[1])(state)


def settled(theta):
    """The loss once s no longer changes."""
    return loss_of(-6 * theta)


WINDOWS = [10, 40, 50] if SMALL else [1, 10, 40, 41, 50, 100]
sliding = {window: trained(window, 1) for window in WINDOWS}
chunked = {window: trained(window, window) for window in WINDOWS}
reference = {  # the same in plain numpy, by forward accumulation of the windows
    "sliding": {1: 211, 10: 2.0e10, 40: 27.5, 41: 1.78, 50: 2.5e-11, 100: 3.7e-17},
    "chunked": {1: 211, 10: np.inf, 40: 61.2, 41: 3.64, 50: 2.9e-7, 100: 3.2e-9},
}

print("loss at the last θ, once s has settled, and in brackets what plain numpy gives")
print("window  " + "".join(f"{w:>20d}" for w in WINDOWS))
for name, runs in (("sliding", sliding), ("chunked", chunked)):
    finals = [float(settled(thetas[-1])) for thetas in runs.values()]
    expectations = [reference[name][window] for window in runs]
    cells = [f"{f:.3g} ({r:.3g})" for f, r in zip(finals, expectations, strict=True)]
    print(f"{name:8s}" + "".join(f"{cell:>20s}" for cell in cells))
    for final, expected in zip(finals, expectations, strict=True):
        assert final > 1e9 if np.isinf(expected) else 0.9 < final / expected < 1.1

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
for ax, (name, runs) in zip(axes, (("sliding", sliding), ("chunked", chunked)), strict=True):
    for color, (window, thetas) in zip((*COLORS, "black"), runs.items(), strict=False):
        losses = settled(thetas)
        shown = np.where(losses < 1e12, losses, np.nan)
        ax.semilogy(shown, color=color, label=f"{window}", lw=1.6)
    ax.set(xlabel="update", title=name, ylim=(1e-18, 1e12))
axes[0].set_ylabel("loss, once s has settled")
axes[1].legend(title="window", loc="upper left", bbox_to_anchor=(1.0, 1.0))
fig.tight_layout()
plt.show()

# %% [markdown]
# Windows of 10 and 40 run away from the optimum, and no smaller step and no more data would help: the
# expected gradient itself points the wrong way. A window of 10 is *worse* than one of 1.
#
# ## Way out 1: cut at random
#
# `random_window` cuts at random steps, and divides what crosses a step that might have been cut by
# the probability that it was not. The gradient is noisier, and on average it is the whole one. The mean
# distance between cuts is 16 here, far below 41.

# %%
BLOCKS, BLOCK = (40 if SMALL else 150), 200


def by_scan(window_of, key):
    """θ after each update on a block of 200 steps."""

    def step(theta, s):
        s, y = balance(theta, s, None)
        return s, loss_of(y)

    def update(state, key):
        s, theta = state

        def loss_fn(theta):
            window = window_of(key)
            s_next, losses = jaxbptt.scan(
                lambda s, _: step(theta, s), s, length=BLOCK, window=window
            )
            return losses.sum(), s_next

        grad, s = jax.grad(loss_fn, has_aux=True)(theta)
        return (s, theta - 2e-5 * grad), theta

    start = jnp.ones(UNITS), jnp.asarray(0.5)
    return jax.lax.scan(update, start, jax.random.split(key, BLOCKS))[1]


keys = jax.random.split(jax.random.key(0), 8)
drawn = jax.jit(jax.vmap(lambda key: by_scan(lambda k: jaxbptt.random_window(k, mean=16), key)))(
    keys
)
whole = jax.jit(lambda key: by_scan(lambda _: None, key))(keys[0])
fixed = {w: jax.jit(lambda key, w=w: by_scan(lambda _: w, key))(keys[0]) for w in (16, 40)}
print("θ after the last update, eight keys:", np.round(drawn[:, -1], 4))
assert np.all(np.abs(drawn[:, -1] + 1 / 6) < (0.2 if SMALL else 2e-3))
assert all(abs(float(theta[-1]) + 1 / 6) > 1 for theta in fixed.values())

# %%
fig, ax = plt.subplots(figsize=(8, 3.6))
ax.plot(drawn.T, color=BLUE, lw=0.8, alpha=0.7)
ax.plot([], color=BLUE, label="random, mean 16 (eight keys)")
ax.plot(whole, color="black", lw=1.5, label="whole gradient")
for (window, theta), color in zip(fixed.items(), (ORANGE, PINK), strict=True):
    ax.plot(np.where(np.abs(theta) < 3, theta, np.nan), color=color, label=f"fixed, {window}")
ax.axhline(-1 / 6, color=GRAY, ls=":", lw=1)
ax.text(BLOCKS, -1 / 6 - 0.14, "optimum -1/6", ha="right", color=GRAY)
ax.set(xlabel="update (200 steps each)", ylabel="θ", ylim=(-0.8, 2))
ax.set_title("Cuts at random steps, compensated")
ax.legend()
fig.tight_layout()
plt.show()

# %% [markdown]
# ## Way out 2: ask the gradient how long the window must be
#
# A relative bias below 1 is what keeps the sign right. `fit_decay` takes the norms by lag of a tape, fits how
# they decay, and `window_within(delta)` is the smallest window whose estimated relative bias is at most
# delta. The tape must be long enough: a cause further back leaves no trace on it. On 20 lags, where the 13
# units have not been heard yet, all looks well and short windows are advised; on 60 the truth is in sight.


# %%
def decay_on(window):
    rec = jaxbptt.record(balance, window=window, weights="current")

    @jax.jit
    def lags(theta):
        tape = rec.init(theta, jnp.ones(UNITS), None)
        tape, _ = jax.lax.scan(lambda tape, _: rec(theta, tape, None), tape, length=400)
        return jaxbptt.gradient_by_lag(rec, theta, tape, jnp.ones(1))

    return jaxbptt.fit_decay(lags(0.5))


asked = {}
for window in (20, 60, 100, 150):
    decay = decay_on(window)
    asked[window] = [int(decay.window_within(delta)) for delta in (0.9, 0.5, 0.1)]
    print(
        f"on a tape of {window:3d}: factor per step {float(decay.rate):.3f}, windows for a ", end=""
    )
    print("relative bias of .9, .5, .1: " + ", ".join(map(str, asked[window])))
assert asked[20][-1] < 41  # fooled
assert all(41 < window < 70 for seen in (60, 100, 150) for window in asked[seen])

# %%
chosen = dict(zip((0.9, 0.5, 0.1), asked[150], strict=True))
fig, ax = plt.subplots(figsize=(8, 3.4))
for (delta, window), color in zip(chosen.items(), (BLUE, GREEN, PINK), strict=True):
    losses = settled(trained(window, 1))
    print(f"δ = {delta}: window {window}, loss at the end {float(losses[-1]):.1e}")
    assert losses[-1] < losses[0] / 10  # it goes the right way, the faster the longer
    ax.semilogy(losses, color=color, label=f"δ = {delta}: window {window}")
ax.semilogy(settled(sliding[40]), color=ORANGE, label="window 40")
ax.set(xlabel="update (every step)", ylabel="loss, once s has settled")
ax.set_title("Windows that were asked for")
ax.legend()
fig.tight_layout()
plt.show()

# %% [markdown]
# So record more than you use: look at a long tape now and then (`record` with a window of its own, no
# gradient through it), and choose the window for training from what it shows. `plot_by_lag` draws it.
