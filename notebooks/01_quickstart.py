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
# # Backpropagation through a window of the past
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxbptt/jaxbptt/blob/main/notebooks/01_quickstart.ipynb)
#
# A recurrent model takes one step at a time, $(c_t, y_t) = f(\theta, c_{t-1}, x_t)$. To learn what
# matters later, the gradient has to go back through earlier steps. Going back to the very first is too
# much for a stream that never ends, so one goes back a *window* of steps and stops: truncated
# backpropagation through time.
#
# `jaxbptt.record` does this to a step function. Your loop stays a loop over single steps with the
# gradient *inside* it. This notebook shows the ten lines, checks them by hand, and looks at how far
# back the gradient really comes from.
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
import optax

import jaxbptt

BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "0.4"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})

# %% [markdown]
# ## Checked by hand
#
# The smallest recurrent model there is multiplies: $x_t = w\,x_{t-1}$, with $x_0 = 0.9$ and $w = 0.2$.
# After three steps $x_3 = w^3 x_0$, so $\mathrm{d}x_3/\mathrm{d}w = 3 w^2 x_0 = 0.108$. Each of the three
# steps adds $w^2 x_0 = 0.036$ to it, so a window of 1 must give 0.036, a window of 2 twice that, and any
# window of at least 3 all of it. (Recipes that forget to clear the state's gradient give 0.288.)


# %%
def multiply(w, carry, x):
    carry = w * carry
    return carry, carry


def gradient_after_three_steps(window):
    rec = jaxbptt.record(multiply, window=window)
    tape = rec.init(0.2, 0.9, None)
    for _ in range(3):
        before = tape
        tape, _ = rec(0.2, tape, None)
    return jax.grad(lambda w: rec(w, before, None)[1])(0.2)


for window in (1, 2, 3, 50):
    by_hand = min(window, 3) * 0.2**2 * 0.9
    print(f"window {window:2d}: {gradient_after_three_steps(window):.3f}, by hand {by_hand:.3f}")
    np.testing.assert_allclose(gradient_after_three_steps(window), by_hand, rtol=1e-6)

# %% [markdown]
# The same for a linear cell with a vector inside, $c_t = A c_{t-1} + b x_t$ and $y_t = u^\top c_t$, against
# the recurrence written out in numpy: go backwards from the newest step, carry
# $\lambda_{s-1} = A^\top \lambda_s$ along, add up $\lambda_s c_{s-1}^\top$, and stop after `window` steps.

# %%
rng = np.random.default_rng(0)
A = (rng.normal(size=(4, 4)) / 2).astype(np.float32)
b, u = rng.normal(size=(2, 4)).astype(np.float32)
xs = rng.normal(size=12).astype(np.float32)


def linear(params, carry, x):
    carry = params["A"] @ carry + params["b"] * x
    return carry, params["u"] @ carry


def in_numpy(window):
    carries = [np.zeros(4, np.float32)]
    for x in xs:
        carries.append(A @ carries[-1] + b * x)
    ct_A, lam = np.zeros((4, 4), np.float32), u
    for s in range(len(xs), max(0, len(xs) - window), -1):
        ct_A += np.outer(lam, carries[s - 1])
        lam = A.T @ lam
    return ct_A


params = {"A": A, "b": b, "u": u}
for window in (1, 3, 12, 30):
    rec = jaxbptt.record(linear, window=window)
    tape = rec.init(params, np.zeros(4, np.float32), xs[0])
    for x in xs:
        tape, y = rec(params, tape, x)
    ct = rec.pullback(params, tape, jnp.ones(1))
    error = np.abs(ct.params["A"] - in_numpy(window)).max() / np.abs(in_numpy(window)).max()
    print(f"window {window:2d}: largest relative error {error:.0e}")
    assert error < 1e-5

# %% [markdown]
# ## The ten lines
#
# Something to learn: streams of random bits, where each target is the bit of eight steps ago. The
# gradient says so only if the window has nine steps or more: the present one and eight before it.

# %%
LAG, STEPS, BATCH, HIDDEN = 8, 4000, 8, 32

bits = np.random.default_rng(0).integers(0, 2, size=(STEPS + LAG, BATCH, 1)).astype(np.float32)
stream = {"x": 2 * bits[LAG:] - 1, "target": bits[:-LAG]}


def step(params, carry, x):
    carry = jnp.tanh(x @ params["wx"] + carry @ params["wh"] + params["b"])
    return carry, carry @ params["wy"]


def cross_entropy(y, target):  # in bits: 1 is a guess, 0 is certain
    return optax.sigmoid_binary_cross_entropy(y, target).mean() / jnp.log(2.0)


def first_params():
    rng = np.random.default_rng(1)
    orthogonal = np.linalg.qr(rng.normal(size=(HIDDEN, HIDDEN)))[0]
    weights = {"wx": rng.normal(size=(1, HIDDEN)) / 2, "wh": orthogonal / 2}  # memories fade
    weights |= {"b": np.zeros(HIDDEN), "wy": np.zeros((HIDDEN, 1))}
    return jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), weights)


# %% [markdown]
# This is all there is to write. `rec` stands where the step would stand, the tape stands where the
# carry would stand, and `jax.value_and_grad` is the ordinary one.


# %%
def online(window):
    rec = jaxbptt.record(step, window=window)
    optimizer = optax.adam(2e-3)

    def update(state, batch):
        params, opt_state, tape = state

        def loss_fn(params):
            new_tape, y = rec(params, tape, batch["x"])
            return cross_entropy(y, batch["target"]), new_tape

        (loss, tape), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        changes, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, changes), opt_state, tape), loss

    params = first_params()
    tape = rec.init(params, jnp.zeros((BATCH, HIDDEN)), stream["x"][0])
    state = params, optimizer.init(params), tape
    run = jax.jit(lambda state: jax.lax.scan(update, state, stream), donate_argnums=0)
    (params, _, tape), losses = run(state)
    return params, rec, tape, losses


# %% [markdown]
# With `every=5` the gradient is computed at every fifth step only, for five losses at once. The step
# then returns its loss, and `rec.due` says when there is a gradient to use.


# %%
def every_few(window, every):
    def loss_step(params, carry, batch):
        carry, y = step(params, carry, batch["x"])
        return carry, cross_entropy(y, batch["target"])

    rec = jaxbptt.record(loss_step, window=window, every=every)
    optimizer = optax.adam(2e-3)

    def update(state, batch):
        params, opt_state, tape = state

        def loss_fn(params):
            new_tape, loss = rec(params, tape, batch)
            return loss, new_tape

        (loss, tape), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        changes, new_opt_state = optimizer.update(grads, opt_state)
        new = optax.apply_updates(params, changes), new_opt_state
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(rec.due(tape), new, old), new, (params, opt_state)
        )
        return (params, opt_state, tape), loss

    params = first_params()
    first = jax.tree.map(lambda leaf: leaf[0], stream)
    tape = rec.init(params, jnp.zeros((BATCH, HIDDEN)), first)
    state = params, optimizer.init(params), tape
    run = jax.jit(lambda state: jax.lax.scan(update, state, stream), donate_argnums=0)
    return run(state)[1]


# %%
curves = {f"window {window}, every 1": online(window)[-1] for window in (1, 5, 50)}
curves |= {f"window {window}, every 5": every_few(window, 5) for window in (5, 50)}

print("bits per symbol over the last 500 steps; a guess costs 1")
for name, losses in curves.items():
    print(f"  {name:20s} {losses[-500:].mean():.3f}")
assert curves["window 50, every 1"][-500:].mean() < 0.2
assert curves["window 5, every 1"][-500:].mean() > 0.8

# %%
fig, ax = plt.subplots(figsize=(8, 4))
colors = {"window 1": GRAY, "window 5": ORANGE, "window 50": BLUE}
for name, losses in curves.items():
    smooth = np.convolve(losses, np.ones(100) / 100, mode="valid")
    window, every = name.split(", ")
    style = {"color": colors[window], "ls": "--" if every == "every 5" else "-"}
    ax.plot(np.arange(len(smooth)) + 100, smooth, label=name, **style)
ax.set(xlabel="step", ylabel="bits per symbol (mean of 100 steps)", ylim=(0, None))
ax.set_title(f"Recall the bit of {LAG} steps ago")
ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
fig.tight_layout()
plt.show()

# %% [markdown]
# Windows of 1 and 5 end before the cause, and stay at guessing. A window of 50 reaches it. With `every=5`
# the parameters change a fifth as often, so it takes longer to learn; in return five steps cost one pass
# over the window instead of five.
#
# ## How far back does it come from?
#
# `rec.pullback` gives the gradient in its explicit form. `ct.xs` is the gradient with respect to each
# input in the window, oldest first, so its norm by lag shows where the gradient comes from. Here it is
# averaged over 200 steps, before and after training.


# %%
def norms_by_lag(rec, params, tape, xs):
    def visit(tape, x):
        tape, y = rec(params, tape, x)
        ct = rec.pullback(params, tape, jnp.ones_like(y)[None])  # of the newest y alone
        return tape, jnp.linalg.norm(ct.xs[::-1].reshape(rec.window, -1), axis=1)

    return jax.jit(lambda tape: jax.lax.scan(visit, tape, xs)[1].mean(0))(tape)


trained, rec, tape, _ = online(50)
untrained = first_params() | {"wy": trained["wy"]}  # the first readout is zero and shows nothing
norms = {
    "before training": norms_by_lag(rec, untrained, tape, stream["x"][-200:]),
    "after": norms_by_lag(rec, trained, tape, stream["x"][-200:]),
}

# %%
fig, ax = plt.subplots(figsize=(7, 4))
for (name, values), color in zip(norms.items(), (GRAY, BLUE), strict=True):
    ax.semilogy(values, "o-", ms=3, color=color, label=name)
ax.axvline(LAG, color=GRAY, lw=1, ls=":")
ax.text(LAG + 0.5, 0.9, f"the bit to recall, {LAG} steps back", transform=ax.get_xaxis_transform())
ax.set(xlabel="lag (steps before the present)", ylabel="norm of the gradient of y by the input")
ax.margins(y=0.15)
ax.set_title("Where the gradient comes from")
ax.legend(loc="lower left")
fig.tight_layout()
plt.show()

# %%
strongest = int(norms["after"].argmax())
print(f"after training the strongest gradient comes from lag {strongest}")
assert strongest == LAG

# %% [markdown]
# ## What the tape costs
#
# `window` times the residuals of one step, however long the loop. Ask before allocating.

# %%
for weights in ("stored", "current"):
    for window in (5, 50):
        rec = jaxbptt.record(step, window=window, weights=weights)
        tape = jax.eval_shape(rec.init, trained, jnp.zeros((BATCH, HIDDEN)), stream["x"][0])
        print(f"weights={weights!r:10s} window={window:2d}: {tape.nbytes / 1024:7.1f} KiB")
