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
# # Parts with their own memory
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxbptt/jaxbptt/blob/main/notebooks/06_parts_with_their_own_memory.ipynb)
#
# Not every part of a model remembers for equally long. Here a fast part reads the stream and a slow part
# keeps a trace of it; the fast one needs credit over a few steps, the slow one over many. A window for each
# part says so: `window={"fast": 4, "slow": 20}`. What does that save against 20 for both, what does it lose,
# and how far is its gradient from the other? All three are measured below.
#
# It needs about two minutes on a CPU.

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
import time

import jax
import jax.flatten_util
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxbptt

SMALL = bool(os.environ.get("JAXBPTT_SMALL"))  # fewer steps and seeds, for a quick run of all cells
BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "0.4"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})

# %% [markdown]
# ## The stream
#
# Bits come in, one at a time. The first target is the bit of two steps ago. Now and then a second bit comes in
# beside it, and fifteen steps later it is asked for. The fast part is a tanh network of 128
# units whose memory fades by half at each step; the slow one, 16 units, leaks a twentieth.

# %%
BATCH, FAST, SLOW, RECENT, HOLD = 16, 128, 16, 2, 15


def draw(seed, steps):
    """Inputs (steps, BATCH, 3): bit, second bit, question. Targets and their weights (steps, BATCH, 2)."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (steps, BATCH))
    phase = (np.arange(steps)[:, None] + rng.integers(0, HOLD + 5, BATCH)) % (HOLD + 5)
    mark, asked = phase == 0, phase == HOLD
    recent = np.concatenate([np.zeros_like(bits[:RECENT]), bits[:-RECENT]])
    second = rng.integers(0, 2, (steps, BATCH))
    held = np.concatenate([np.zeros_like(second[:HOLD]), second[:-HOLD]])
    asked[:HOLD] = False  # what came before the stream can't be known
    x = np.stack([2 * bits - 1, (2 * second - 1) * mark, asked], -1)
    return {
        "x": jnp.asarray(x, jnp.float32),
        "target": jnp.asarray(np.stack([recent, held], -1), jnp.float32),
        "weight": jnp.asarray(np.stack([np.ones_like(asked), asked], -1), jnp.float32),
    }


def step(params, carry, batch):
    x, fast, slow = batch["x"], carry["fast"], carry["slow"]
    fast = jnp.tanh(x @ params["in"] + fast @ params["fast"] + slow @ params["down"] + params["b"])
    slow = 0.95 * slow + jnp.tanh(fast @ params["up"])
    seen = jnp.concatenate([fast, slow], 1)
    return {"fast": fast, "slow": slow}, seen @ params["out"]


def loss(y, batch):
    """Bits per question, and beside it the two kinds apart: (sum, number)."""
    each = batch["weight"] * optax.sigmoid_binary_cross_entropy(y, batch["target"]) / np.log(2)
    return each.sum(1).mean(), (each.sum(0), batch["weight"].sum(0))


def first_params(seed):
    k = jax.random.split(jax.random.key(seed), 4)

    def matrix(key, rows, columns):
        return jax.random.normal(key, (rows, columns)) / rows**0.5

    return {
        "in": matrix(k[0], 3, FAST),
        "fast": 0.5 * jax.random.orthogonal(k[1], FAST),
        "down": 0.1 * matrix(k[2], SLOW, FAST),
        "b": jnp.zeros(FAST),
        "up": jnp.zeros((FAST, SLOW)),  # nothing gets into the slow part by chance
        "out": matrix(k[3], FAST + SLOW, 2),
    }


CARRY = {"fast": jnp.zeros((BATCH, FAST)), "slow": jnp.zeros((BATCH, SLOW))}

# %% [markdown]
# ## Four windows

# %%
SHORT, LONG = 4, 20
WINDOWS = {
    "both 4": SHORT,
    "fast 4, slow 20": {"fast": SHORT, "slow": LONG},
    "fast 20, slow 4": {"fast": LONG, "slow": SHORT},
    "both 20": LONG,
}
COLORS = dict(zip(WINDOWS, (GRAY, BLUE, ORANGE, GREEN), strict=True))
STEPS, SEEDS = (500, 1) if SMALL else (8000, 3)


def trainer(window):
    # At a constant rate the end is a matter of luck.
    rate = optax.cosine_decay_schedule(1e-3, STEPS)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    learner = jaxbptt.learner(step, loss, optimizer, window=window, weights="current")

    def run(params, stream):
        first = jax.tree.map(lambda v: v[0], stream)
        return jax.lax.scan(learner.update, learner.init(params, CARRY, first), stream)

    return jax.jit(run)


def smooth(sums, counts, width):
    kernel = np.ones(width)
    return np.convolve(sums, kernel, "valid") / np.maximum(np.convolve(counts, kernel, "valid"), 1)


streams = [draw(seed, STEPS) for seed in range(SEEDS)]
runs = {
    name: trainer(window).lower(first_params(0), streams[0]).compile()
    for name, window in WINDOWS.items()
}
losses, seconds, ends = ({name: [] for name in WINDOWS} for _ in range(3))
for seed, stream in enumerate(streams):
    for name, run in runs.items():  # in turn, as the machine has slow minutes
        began = time.perf_counter()
        state, metrics = jax.block_until_ready(run(first_params(seed), stream))
        seconds[name].append(time.perf_counter() - began)
        losses[name].append(metrics.aux)
        ends[name].append(state.params)


def curve(name, kind, steps, width):
    """Steps, and bits for each question of this kind: the mean over the seeds and over `width` steps."""
    smoothed = [smooth(sums[:steps, kind], n[:steps, kind], width) for sums, n in losses[name]]
    return np.arange(len(smoothed[0])) + width, np.mean(smoothed, 0)


# %%
fig, axes = plt.subplots(1, 2, figsize=(12, 4), sharey=True)
for name in WINDOWS:
    style = {"color": COLORS[name], "label": name}
    if name == "both 4":  # on top, with gaps through which the others are seen
        style |= {"ls": "--", "zorder": 3}
    axes[0].plot(*curve(name, 0, 100, 5), **style)
    axes[1].plot(*curve(name, 1, STEPS, 200), **style)
axes[0].set(xlabel="step", title=f"the bit of {RECENT} steps ago: the first 100 steps")
axes[0].text(50, 0.3, "all four windows alike", color=GRAY)
axes[1].set(xlabel="step", title=f"the second bit, {HOLD} steps later", ylim=(0, 1.15))
axes[0].set_ylabel("bits per question; a guess costs 1")
axes[1].legend(title="window", loc="lower left")
fig.tight_layout()
plt.show()

# %%
print(f"{'window':16s} {'recent':>8s} {'second':>8s} {'µs a step':>10s}")
last = {name: [curve(name, kind, STEPS, 200)[1][-1] for kind in (0, 1)] for name in WINDOWS}
for name, (recent, second) in last.items():
    print(f"{name:16s} {recent:8.3f} {second:8.3f} {1e6 * np.median(seconds[name]) / STEPS:10.0f}")
assert SMALL or max(last[name][1] for name in ("fast 4, slow 20", "both 20")) < 0.6
assert SMALL or min(last[name][1] for name in ("both 4", "fast 20, slow 4")) > 0.9

# %% [markdown]
# All windows learn the recent bit: two steps are within every one of them. The second bit is learned only
# where the *slow* part has its long window. There the mixed window ends as low as the long one for both, a few
# hundred steps later. A long window for the fast part alone takes longer than the mixed one, and doesn't help: a
# bit that went through the slow part's 15 steps can't come back by another way.
#
# ## How far apart are the gradients?
#
# At the parameters that the mixed window has learned, the gradients of one stream by all four windows, against
# the one that has 20 steps of everything. At each step the mean over the 16 streams of the batch; then
# their cosine, and the cosine of the means over all steps.


# %%
def gradients(window, params, stream):
    """The gradient of each step's loss, at fixed parameters, as rows of a matrix."""
    rec = jaxbptt.record(step, window=window, weights="current")
    tape = rec.init(params, CARRY, jax.tree.map(lambda v: v[0], stream))

    def one(tape, batch):
        def loss_fn(params):
            new_tape, y = rec(params, tape, batch)
            return loss(y, batch)[0], new_tape

        grads, tape = jax.grad(loss_fn, has_aux=True)(params)
        return tape, jax.flatten_util.ravel_pytree(grads)[0]

    return jax.jit(lambda tape: jax.lax.scan(one, tape, stream)[1][LONG:])(tape)


def cosine(a, b):
    return (a * b).sum(-1) / (jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1))


held_out = draw(99, 400)
found = {name: gradients(w, ends["fast 4, slow 20"][-1], held_out) for name, w in WINDOWS.items()}
reference = found["both 20"]
of_step = {name: np.asarray(cosine(rows, reference)) for name, rows in found.items()}
of_mean = {name: float(cosine(rows.mean(0), reference.mean(0))) for name, rows in found.items()}

# %%
shown = [name for name in WINDOWS if name != "both 20"]
fig, ax = plt.subplots(figsize=(8, 3.6))
for place, name in enumerate(shown):
    scatter = np.random.default_rng(0).uniform(-0.25, 0.25, len(of_step[name]))
    ax.plot(of_step[name], place + scatter, ".", color=COLORS[name], ms=3, alpha=0.5)
    ax.plot([of_mean[name]], [place], "D", color="black", ms=7)
ax.plot([], [], "D", color="black", label="mean gradient")
ax.plot([], [], ".", color=GRAY, label="each step")
ax.set(yticks=range(len(shown)), yticklabels=shown, xlim=(-0.3, 1.05))
ax.set(xlabel="cosine with the gradient of 20 steps for both", ylim=(len(shown) - 0.5, -0.5))
ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
fig.tight_layout()
plt.show()
for name in shown:
    print(f"{name:16s} cosine: mean gradient {of_mean[name]:.3f}, steps {of_step[name].mean():.3f}")

# %% [markdown]
# ## What it saves
#
# Beyond lag 4 no λ of the fast part is carried on, and what only it would have cost is not computed. The
# ring is the same: it keeps what the longest window needs.

# %%
for name in WINDOWS:
    rec = jaxbptt.record(step, window=WINDOWS[name], weights="current")
    first = jax.tree.map(lambda v: v[0], held_out)
    tape = jax.eval_shape(rec.init, first_params(0), CARRY, first)
    share = np.median(np.divide(seconds[name], seconds["both 20"]))
    print(f"{name:16s} tape {tape.nbytes / 1024:6.0f} KiB, time per step {share:.2f} of both 20")

# %% [markdown]
# When the parts are modules that should stay apart, or are called at different rates, give each a recorder of
# its own instead: then gradient crosses between them at the present step only
# ([the picture of the two](https://jaxbptt.github.io/jaxbptt/semantics/)).
