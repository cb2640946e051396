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
# # An agent that learns while it acts
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxbptt/jaxbptt/blob/main/notebooks/07_online_agent.ipynb)
#
# A T-maze (Bakker, 2002): a sign at the start says on which side the exit is, then comes a corridor of a
# length that is never the same, then a junction. The sign is long out of sight when it is needed. A
# recurrent policy has to keep it, and *learn* to keep it from a reward that comes at the end.
#
# Sixty-four episodes run side by side, each starts anew when it ends, and the parameters change at every
# time step. There are no rollouts to store and nothing is cut into chunks. With a window of 1 the task
# can't be learned, provably ([the proof](https://jaxbptt.github.io/jaxbptt/policy/)); with one that spans an episode it is.
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
import sys
import urllib.request

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxbptt

# The maze and the loss are those of examples/policy.py, in the repository.
POLICY = "https://raw.githubusercontent.com/jaxbptt/jaxbptt/main/examples/policy.py"
places = [place for place in (".", "../examples") if os.path.exists(f"{place}/policy.py")]
if not places:  # no clone around this notebook
    urllib.request.urlretrieve(POLICY, "policy.py")
sys.path[:0] = places or ["."]
from policy import act, first_carry, first_params, loss, observe, percent

SMALL = bool(os.environ.get("JAXBPTT_SMALL"))  # fewer steps and seeds, for a quick run of all cells
BLUE, ORANGE, GRAY = "#0072B2", "#D55E00", "0.4"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})

# %% [markdown]
# ## Agent and maze are one step
#
# The maze lives in the carry, as integers. `with_resets` wraps the part that has a memory: where an
# episode starts, `h` starts anew, and no gradient crosses from one episode into the next.

# %%
HIDDEN = 32


def cell(params, h, seen):
    sign, place = seen
    h = jnp.tanh(sign @ params["sign"] + place @ params["place"] + h @ params["h"])
    return h, h @ params["logits"]


policy = jaxbptt.with_resets(cell, jnp.zeros(HIDDEN, jnp.float32))


def step(params, carry, key):
    maze, at_start = carry["maze"], carry["maze"].position == 0
    h, logits = policy(params, carry["h"], (jax.vmap(observe)(maze), at_start))
    action_key, maze_key = jax.random.split(key)
    choice = jax.random.categorical(action_key, logits).astype(jnp.int32)
    maze, reward, ends = jax.vmap(act)(maze, choice - 1, jax.random.split(maze_key, len(choice)))
    y = {"logits": logits, "choice": choice, "reward": reward, "at_start": at_start, **ends}
    return {"h": h, "maze": maze}, y


# %% [markdown]
# Training is a `lax.scan` over random keys. Five seeds run in one program, by `vmap` of the whole run.

# %%
STEPS, SEEDS, SIZE, BATCH = (500, 2, 50, 32) if SMALL else (2000, 5, 50, 64)


def train(seed, window):
    """After each block of steps: how many episodes of it ended how, and the parameters."""
    learner = jaxbptt.learner(step, loss, optax.adam(2e-3), window=window)
    keys = jax.random.split(jax.random.key(seed), 3)
    state = learner.init(first_params(keys[0]), first_carry(keys[1], BATCH), keys[0])

    def block(state, keys):
        state, metrics = jax.lax.scan(learner.update, state, keys)
        return state, (jax.tree.map(jnp.sum, metrics.aux), state.params)

    blocks = jax.random.split(keys[2], (STEPS // SIZE, SIZE))
    return jax.lax.scan(block, state, blocks)[1]


counts, params = {}, {}
for window in (1, 12):
    run = jax.jit(jax.vmap(lambda seed, window=window: train(seed, window)))
    counts[window], params[window] = run(jnp.arange(SEEDS))
found = {window: np.asarray(percent(c)) for window, c in counts.items()}  # (seeds, blocks)

# %%
fig, ax = plt.subplots(figsize=(8, 4))
ends = np.arange(1, STEPS // SIZE + 1) * SIZE
for window, color in ((1, ORANGE), (12, BLUE)):
    ax.plot(ends, found[window].T, color=color, lw=0.7, alpha=0.4)
    ax.plot(ends, found[window].mean(0), color=color, lw=2, label=f"window {window}")
ax.axhline(50, color=GRAY, ls=":", lw=1)
ax.text(STEPS, 46, "a coin at the junction", ha="right", va="top", color=GRAY)
ax.set(xlabel="time step (and update)", ylabel="episodes that end in the exit, %", ylim=(0, 103))
ax.set_title("A window of 1 learns to walk, and never to remember")
ax.legend(loc="upper left")
fig.tight_layout()
plt.show()

# %%
for window in (1, 12):
    late = found[window][:, -5:].mean(1)
    largest = float(jnp.abs(params[window]["sign"]).max())
    print(
        f"window {window:2d}: {late.mean():5.1f} % of the last episodes end in the exit "
        f"(sd over seeds {late.std(ddof=1):.1f}); largest weight of the sign, ever: {largest:.3g}"
    )
assert float(jnp.abs(params[1]["sign"]).max()) == 0.0  # not small: no gradient ever reached it
assert SMALL or found[12][:, -5:].mean() > 95

# %% [markdown]
# With a window of 1 the weights that the sign comes in by are *exactly* zero after all those updates: at the one
# step where the sign is seen there is no loss, and where there is a loss the sign is no longer seen.
#
# ## What the agent keeps
#
# Send it down the longest corridor, once with the sign to the left and once to the right, and look at its
# memory: the two first principal components of `h`, step by step.

# %%
CORRIDOR = 10


def walk(params, sign):
    """h at each step of a corridor of 10 with this sign, straight on: (11, HIDDEN)."""

    def one(h, position):
        places = jnp.array(
            [position == 0, (position > 0) & (position < CORRIDOR), position == CORRIDOR]
        )
        seen = jnp.where(position == 0, sign, 0.0)[None], places.astype(jnp.float32)
        h, logits = cell(params, h, seen)
        return h, (h, jax.nn.softmax(logits))

    return jax.lax.scan(one, jnp.zeros(HIDDEN), jnp.arange(CORRIDOR + 1))[1]


best = int(np.argmax(found[12][:, -5:].mean(1)))
trained = jax.tree.map(lambda v: v[best, -1], params[12])
paths = {name: walk(trained, sign) for name, sign in (("left", -1.0), ("right", 1.0))}
together = jnp.concatenate([hs for hs, _ in paths.values()])
axes_of_h = jnp.linalg.svd(together - together.mean(0), full_matrices=False)[2][:2]

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
for (name, (hs, _)), color in zip(paths.items(), (ORANGE, BLUE), strict=True):
    a, b = axes_of_h @ (hs - together.mean(0)).T
    left.plot(a, b, "o-", color=color, ms=5, lw=1, label=f"sign to the {name}")
    left.annotate(
        "junction", (a[-1], b[-1]), xytext=(6, 4), textcoords="offset points", color=color
    )
    left.annotate("start", (a[0], b[0]), xytext=(6, 4), textcoords="offset points", color=color)
left.set(xlabel="first component of h", ylabel="second component")
left.set_title("Two corridors that look the same")
left.margins(0.15)
left.legend()
for (name, (_, p)), color in zip(paths.items(), (ORANGE, BLUE), strict=True):
    right.plot(p[:, 0], "o-", color=color, ms=4, label=f"turn left, sign to the {name}")
right.plot(paths["left"][1][:, 1], "s--", color=GRAY, ms=4, label="straight on, sign to the left")
right.set(xlabel="position", ylabel="probability of the action", xticks=range(0, CORRIDOR + 1, 2))
right.set_title("What it does")
right.legend(loc="center")
fig.tight_layout()
plt.show()

# %%
at_junction = {name: float(p[-1, 0]) for name, (_, p) in paths.items()}
print(f"turns left at the junction: {at_junction}")
assert SMALL or (at_junction["left"] > 0.9 and at_junction["right"] < 0.1)

# %% [markdown]
# ## Where its gradient comes from
#
# Take the agent as it was when it began to find the exit, and `gradient_by_lag` at every step of some
# more episodes: how much does the sign, seen k steps ago, add to the gradient of now? Beyond an episode's
# start there is nothing: `with_resets` lets no gradient through.

# %%
LOOK, LONGEST = 300, 16
rec = jaxbptt.record(step, window=LONGEST)
keys = jax.random.split(jax.random.key(7), LOOK + LONGEST + 1)


@jax.jit
def by_lag(params):
    tape = rec.init(params, first_carry(keys[0], BATCH), keys[0])

    def look(tape, key):
        tape, y = rec(params, tape, key)
        ct = jax.grad(lambda logits: loss(y | {"logits": logits}, key)[0])(y["logits"])
        cts = jax.tree.map(
            lambda v: (
                jnp.zeros((1, *v.shape), v.dtype)
                if jnp.issubdtype(v.dtype, jnp.floating)
                else np.zeros((1, *v.shape), jax.dtypes.float0)
            ),
            y,
        )
        lags = jaxbptt.gradient_by_lag(rec, params, tape, cts | {"logits": ct[None]})
        return tape, lags.params["sign"]

    norms = jax.lax.scan(look, tape, keys[1:])[1]
    return norms[LONGEST:].mean(0)


begins = int(np.argmax(found[12][best] > 60)) if found[12][best].max() > 60 else -1
norms = by_lag(jax.tree.map(lambda v: v[best, begins], params[12]))
fig, ax = plt.subplots(figsize=(8, 3.4))
ax.bar(np.arange(LONGEST), norms, color=[ORANGE] + [BLUE] * (LONGEST - 1), width=0.7)
ax.axvline(10.5, color=GRAY, ls=":", lw=1)
ax.text(10.7, float(norms.max()) * 0.9, "no episode is longer", color=GRAY)
ax.set(xlabel="lag (steps before the present)", ylabel="norm added to the sign's weights")
ax.set_title("Credit for the sign, by how long ago it was seen")
fig.tight_layout()
plt.show()
print(f"lag 0: {norms[0]}, beyond an episode's start: {norms[11:]}")
assert norms[0] == 0
assert np.all(norms[11:] == 0)
assert norms[1:11].max() > 0

# %% [markdown]
# Lag 0 is all that a window of 1 sees, and it is nothing. The credit lies between one and ten steps back, as
# far as the corridors are long; the second rise is at 4, where the nearest junction is. What comes from lags 1
# to 3 is the wish not to turn in the corridor, which the sign has no part in once it is learned.
