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
# # Which gradient is it?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxbptt/jaxbptt/blob/main/notebooks/03_which_gradient_is_it.ipynb)
#
# "Truncated backpropagation through time" is the name of a family. Two libraries with the same window may
# compute different things, and a recipe may compute something that is none of them. Here the family is
# drawn, edge by edge, from the gradients themselves; then the window slides over parameters that
# change; then a much-copied recipe gives .288 where .108 is right, and we look for the missing line.
#
# It needs about half a minute on a CPU.

# %%
import importlib.util
import os

spec = importlib.util.find_spec("jaxbptt")
if spec is None or spec.origin is None:  # not installed; a clone in this folder has no origin
    repository = "jaxbptt[demo] @ git+https://github.com/jaxbptt/jaxbptt"
    source = os.environ.get("JAXBPTT_INSTALL", repository)
    # %pip install --quiet "{source}"

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxbptt

jax.config.update("jax_enable_x64", True)
BLUE, ORANGE, GREEN, PINK, YELLOW = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
GRAY = "0.4"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})

# %% [markdown]
# ## BPTT(h; h′), drawn
#
# Williams and Peng (1990) gave the family two numbers: h, how many steps a gradient goes back, and h′,
# how many steps lie between gradients. Here they are `window` and `every`. Which input $x_s$ does the
# loss of step $t$ see? Nobody has to draw that by hand: take the derivative of each output by each input
# and look where it is not zero. Below, a row is an output, a column is an input.

# %%
STEPS = 24


def seen(window, every):
    """Which inputs each output's gradient reaches: bool (outputs, inputs)."""

    def outputs(xs):
        return jaxbptt.scan(lambda c, x: (0.9 * c + x,) * 2, 0.0, xs, window=window, every=every)[1]

    return np.asarray(jax.jacrev(outputs)(jnp.ones(STEPS)) != 0)


settings = {
    "one step\nwindow=1, every=1": (1, 1),
    "sliding window\nwindow=8, every=1": (8, 1),
    "BPTT(h; h′)\nwindow=8, every=4": (8, 4),
    "chunks\nwindow=8, every=8": (8, 8),
    "everything\nwindow=None": (None, 1),
}
reach = {name: seen(*setting) for name, setting in settings.items()}

# %%
fig, axes = plt.subplots(1, 5, figsize=(14, 3.6), sharey=True)
colors = (GRAY, BLUE, GREEN, ORANGE, "black")
for ax, color, (name, pattern), (_, every) in zip(
    axes, colors, reach.items(), settings.values(), strict=True
):
    t, s = np.nonzero(pattern)
    ax.scatter(s + 1, t + 1, s=22, marker="s", color=color, lw=0)
    if every > 1:
        for end in range(every, STEPS, every):
            ax.axhline(end + 0.5, color=GRAY, lw=0.7, ls=":")
    ax.set(xlabel="input of step s", title=name, aspect="equal", xticks=(1, 8, 16, 24))
axes[0].set(ylabel="loss of step t", yticks=(1, 8, 16, 24), ylim=(STEPS + 1, 0))
fig.tight_layout()
plt.show()

# %% [markdown]
# In the orange picture, chunks, the loss at a chunk's start sees one step and the one at its end sees
# eight: 4.5 on average. In the blue one every loss sees all eight. So *the same window is not
# the same truncation*: which one a figure in a paper is about has to be said.

# %%
for name, pattern in reach.items():
    back = pattern.sum(axis=1)[STEPS // 3 :]  # after the first window
    print(f"{name.splitlines()[1]:22s} steps seen: mean {back.mean():4.1f}, least {back.min()}")
assert reach["sliding window\nwindow=8, every=1"].sum(1)[7:].min() == 8
assert reach["chunks\nwindow=8, every=8"].sum(1).mean() == 4.5

# %% [markdown]
# ## Whose parameters?
#
# Update at every step with a window of 20, and the window spans twenty *different* parameter values.
# At which of them is a step of the past differentiated? There are three answers, and `weights` names them:
#
# - `"stored"`: each step at its own, as it was run. The exact derivative of what happened.
# - `"current"`: recorded activations, your parameters now in the products. Nothing of the parameters is kept.
# - `"replayed"`: the window run again under your parameters now.
#
# Here is a small cell that learns while it runs, $c_t = \tanh(w c_{t-1} + x_t)$ with
# $\ell_t = \frac12 (c_t - z_t)^2$. All three look at the same trajectory; what differs is the gradient.

# %%
WINDOW = 20


def cell(w, c, x):
    c = jnp.tanh(w * c + x)
    return c, c


WAYS = {"stored": BLUE, "current": ORANGE, "replayed": GREEN}
recorders = {way: jaxbptt.record(cell, window=WINDOW, weights=way) for way in WAYS}
rng = np.random.default_rng(0)
xs = jnp.asarray(rng.normal(size=400))
zs = jax.lax.scan(lambda c, x: cell(0.8, c, x), 0.0, xs)[1]  # a teacher's


def gradients(rate):
    """Gradients of w at each step of one run that follows "stored": (steps, 3)."""

    def update(state, batch):
        w, tapes = state
        x, z = batch

        def by(way):
            def loss_fn(w):
                tape, y = recorders[way](w, tapes[way], x)
                return 0.5 * (y - z) ** 2, tape

            return jax.grad(loss_fn, has_aux=True)(w)

        grads, tapes = zip(*(by(way) for way in WAYS), strict=True)
        return (w - rate * grads[0], dict(zip(WAYS, tapes, strict=True))), (w, jnp.stack(grads))

    tapes = {way: rec.init(0.1, 0.0, xs[0]) for way, rec in recorders.items()}
    return jax.lax.scan(update, (jnp.asarray(0.1), tapes), (xs, zs))[1]


rates = np.geomspace(1e-4, 1.0, 13)
w_runs, grad_runs = jax.jit(jax.vmap(gradients))(rates)

# %%
size = jnp.linalg.norm(grad_runs[..., 0], axis=1)
apart = {
    way: jnp.linalg.norm(grad_runs[..., i] - grad_runs[..., 0], axis=1) / size
    for i, way in enumerate(WAYS)
}
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
for way in ("current", "replayed"):
    left.loglog(rates, apart[way], "o-", ms=4, color=WAYS[way], label=f'"{way}" against "stored"')
left.set(xlabel="learning rate", ylabel="relative difference of the gradients")
left.set_title("The faster it learns, the more it matters")
left.legend()
for rate, color in zip((6, 9, 12), (BLUE, PINK, YELLOW), strict=True):
    right.plot(w_runs[rate], color=color, label=f"rate {rates[rate]:.2g}")
right.axhline(0.8, color=GRAY, ls=":", lw=1)
right.text(400, 0.81, "the teacher's", ha="right", va="bottom", color=GRAY)
right.set(xlabel="step", ylabel="w", title='Learning with "stored"')
right.legend(loc="lower right")
fig.tight_layout()
plt.show()

# %% [markdown]
# The difference is proportional to the learning rate, as it must be: it is made of how far the
# parameters moved while the window slid over them. At rates that train stably it is small, and then
# `"current"`, the cheapest, is the one to take. At fixed parameters all three agree to rounding:

# %%
_, still = jax.jit(gradients)(0.0)
disagreement = float(jnp.abs(still - still[:, :1]).max() / jnp.abs(still).max())
print(f"at fixed parameters the three differ by {disagreement:.0e} of the gradient at most")
assert disagreement < 1e-12
slope = np.polyfit(np.log(rates[:6]), np.log(np.asarray(apart["replayed"][:6])), 1)[0]
print(f"the difference grows as the rate to the power of {slope:.2f}")
assert 0.9 < slope < 1.1

# %% [markdown]
# ## .288 where .108 is right
#
# The recipe that most people find for PyTorch (in its forum, "Implementing truncated backpropagation through
# time") keeps the last states, detached, and walks back over them: each step's `backward` puts a gradient
# into the `.grad` of the state before it, and that is passed on to the step before. Here is its arithmetic
# without any library, on the smallest recurrent model, $c_t = w\,c_{t-1}$ from $c_0 = 0.9$ with
# $w = 0.2$, a loss $c_t$ at each step.


# %%
def forum_recipe(w, c0, steps, *, clear):
    """The gradient of w at each step, and what each lag adds to it at the last."""
    states, state_grads, history = [c0], [], []
    for _ in range(steps):
        states.append(w * states[-1])  # c_t = w c_{t-1}
        state_grads.append(0.0)  # the .grad of c_{t-1}, which starts empty ...
        if clear:
            state_grads = [0.0] * len(state_grads)
        added, ct = [], 1.0  # the loss is c_t itself
        for s in reversed(range(len(state_grads))):
            added.append(ct * states[s])  # ∂c_{s+1}/∂w = c_s
            state_grads[s] += ct * w  # ... and to which each backward ADDS
            ct = state_grads[s]
        history.append(sum(added))
    return history, added


for clear in (False, True):
    history, added = forum_recipe(0.2, 0.9, 3, clear=clear)
    print(
        f"state gradients {'cleared' if clear else 'not cleared'}:", np.round(history, 4), end="  "
    )
    print("the last by lag:", np.round(added, 4))


def recorded(steps):
    rec = jaxbptt.record(lambda w, c, x: (w * c,) * 2, window=3)
    tape, history = rec.init(0.2, 0.9, None), []
    for _ in range(steps):
        before = tape
        tape, _ = rec(0.2, tape, None)
        history.append(float(jax.grad(lambda w, tape=before: rec(w, tape, None)[1])(0.2)))
    return history, rec, tape


history, rec, tape = recorded(3)
by_lag = jaxbptt.gradient_by_lag(rec, 0.2, tape, jnp.ones(1), full=True).params
print(
    "jaxbptt:                     ", np.round(history, 4), "  the last by lag:", np.round(by_lag, 4)
)
wrong, wrong_by_lag = forum_recipe(0.2, 0.9, 3, clear=False)
np.testing.assert_allclose(wrong[-1], 0.288)
np.testing.assert_allclose(history, forum_recipe(0.2, 0.9, 3, clear=True)[0])
np.testing.assert_allclose(history[-1], 0.108)

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
lags = np.arange(3)
pairs = ((axes[0], by_lag, BLUE, "as it should be"), (axes[1], wrong_by_lag, ORANGE, "the recipe"))
for ax, parts, color, name in pairs:
    ax.bar(lags, parts, color=color, width=0.6)
    for lag, part in zip(lags, parts, strict=True):
        ax.text(lag, part + 0.004, f"{part:.3f}", ha="center")
    ax.set(xlabel="lag (steps before the present)", xticks=lags)
    ax.set_title(f"{name}: {np.sum(parts):.3f}")
axes[0].set(ylabel="added to the gradient of w", ylim=(0, 0.24))
fig.tight_layout()
plt.show()

# %% [markdown]
# At the third step the recipe meets the state gradients of the second again and adds to them: the step at lag
# 2 gets $w^2$ from now *and* $w$ from a step ago. The first two gradients are right, the loss falls, nothing
# is raised. One line clears it, `state.grad = None`; the recipe has no such line.
#
# A recorder has no place in which something could be left over: a pullback is a function of the tape.
# `jaxbptt.check_step` holds the gradient of *your* step against finite differences, lag by lag:

# %%
rng = np.random.default_rng(1)
params = {"w": 0.5 * rng.normal(size=(6, 6)), "u": rng.normal(size=(2, 6))}


def step(params, c, x):
    c = jnp.tanh(c @ params["w"] + x @ params["u"])
    return c, c


print(jaxbptt.check_step(step, params, np.zeros(6), rng.normal(size=(6, 2)), window=4))
