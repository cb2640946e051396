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
# # A character model: sliding window or chunks?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxbptt/jaxbptt/blob/main/notebooks/02_character_model.ipynb)
#
# `python -m jaxbptt` trains a recurrent model on text, online: every character is a step, a gradient, an update. Here
# are its parts, and then the question that everyone has who reads that: is a sliding window worth it? It
# costs a pass over the window at each step, where chunks of the same window pay that once a chunk. So: which
# learns faster *per character*, and which *per second*?
#
# It needs about three minutes on a CPU.

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
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxbptt

SMALL = bool(os.environ.get("JAXBPTT_SMALL"))  # fewer steps, for a quick run of all cells
BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "0.5"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})

# %% [markdown]
# ## The text
#
# Every Python has half a megabyte of English about Python. Its last tenth is held out; the rest is read by 32 readers
# at once, each from a place of its own.

# %%
text = "\n\n\n".join(topics[name] for name in sorted(topics))
characters = sorted(set(text))
number = {character: i for i, character in enumerate(characters)}
symbols = np.array([number[c] for c in text], np.int32)
train_part, held_out_part = np.split(symbols, [len(symbols) * 9 // 10])
STREAMS = 32


def parallel(part, steps, start=0):
    """The characters that each reader reads, and the next ones: int32 (steps, STREAMS) each."""
    places = np.arange(STREAMS) * (len(part) // STREAMS) + start
    at = (places + np.arange(steps + 1)[:, None]) % len(part)
    return jnp.asarray(part[at[:-1]]), jnp.asarray(part[at[1:]])


held_out = parallel(held_out_part, 500)  # of each of 32 places in the last tenth
print(f"{len(text):,} characters, {len(characters)} different; a sample:\n")
print(text[20_000:20_300])

# %% [markdown]
# ## The model
#
# A gated recurrent unit, and a softmax over characters. This is a step like any other; nothing in it
# knows of windows.

# %%
HIDDEN, SYMBOLS = 128, len(characters)


def first_params(seed=0):
    k = jax.random.split(jax.random.key(seed), 3)
    return {
        "in": 0.1 * jax.random.normal(k[0], (SYMBOLS, 3 * HIDDEN)),
        "h": jax.random.normal(k[1], (HIDDEN, 3 * HIDDEN)) / HIDDEN**0.5,
        "b": jnp.zeros(3 * HIDDEN),
        "out": jax.random.normal(k[2], (HIDDEN, SYMBOLS)) / HIDDEN**0.5,
        "b_out": jnp.zeros(SYMBOLS),
    }


def step(params, h, x):
    from_x = jnp.split(params["in"][x[0]] + params["b"], 3, axis=1)
    from_h = jnp.split(h @ params["h"], 3, axis=1)
    reset, keep = (jax.nn.sigmoid(from_x[i] + from_h[i]) for i in (0, 1))
    new = jnp.tanh(from_x[2] + reset * from_h[2])
    h = new + keep * (h - new)
    return h, h @ params["out"] + params["b_out"]


def nats(logits, x):
    return optax.softmax_cross_entropy_with_integer_labels(logits, x[1]).mean()


# %% [markdown]
# ## Ways to cut
#
# All with the same optimiser. The cheaper ones get more steps, so that all of them work for a similar time. Chunks have
# the fewest updates, each from the most losses, and so they get a second try with three times the rate.

# %%
BLOCK = 500
WAYS = {  # window, every, steps, learning rate
    "window 1": (1, 1, 25_000, 2e-3),
    "window 20, every 1": (20, 1, 5_000, 2e-3),
    "window 20, every 5": (20, 5, 15_000, 2e-3),
    "window 20, every 20": (20, 20, 36_000, 2e-3),
    "the same, rate times 3": (20, 20, 36_000, 6e-3),
}
COLORS = dict(zip(WAYS, (GRAY, BLUE, GREEN, ORANGE, "#E69F00"), strict=True))


def train(window, every, steps, rate):
    """Parameters; (characters of each stream, seconds, held-out bits per character) by block."""
    learner = jaxbptt.learner(
        step,
        lambda y, x: nats(y, x) / every,  # a group's gradient is the mean over its losses
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)),
        window=window,
        every=every,
        weights="current",
    )

    @jax.jit
    def block(state, xs):
        return jax.lax.scan(learner.update, state, xs)[0]

    @jax.jit
    def bits(state):
        _, metrics = learner.evaluate(state, held_out, carry=jnp.zeros((STREAMS, HIDDEN)))
        return metrics.loss.mean() * every / np.log(2)

    state = learner.init(
        first_params(), jnp.zeros((STREAMS, HIDDEN)), tuple(v[0] for v in held_out)
    )
    jax.block_until_ready((block(state, parallel(train_part, BLOCK)), bits(state)))  # compile
    curve, seconds = [(0, 0.0, float(bits(state)))], 0.0
    for start in range(0, steps, BLOCK):
        xs = parallel(train_part, BLOCK, start)
        began = time.perf_counter()
        state = jax.block_until_ready(block(state, xs))
        seconds += time.perf_counter() - began
        curve.append((start + BLOCK, seconds, float(bits(state))))
    return state.params, np.array(curve)


runs = {
    name: train(window, every, 500 if SMALL else steps, rate)
    for name, (window, every, steps, rate) in WAYS.items()
}

# %%
fig, axes = plt.subplots(1, 2, figsize=(12, 4.2), sharey=True)
for ax, column, label in zip(
    axes, (0, 1), ("characters read by each stream", "seconds"), strict=True
):
    for name, (_, curve) in runs.items():
        ax.plot(curve[:, column], curve[:, 2], color=COLORS[name], label=name)
    ax.set(xlabel=label, ylim=(1.9, 3.5))
axes[0].set(ylabel="held-out bits per character", title="per character")
axes[1].set(title="per second")
axes[1].legend()
fig.tight_layout()
plt.show()


# %%
def at(curve, column, value):
    """Bits where this column of the curve reaches a value."""
    return np.interp(value, curve[:, column], curve[:, 2])


most = min(curve[-1, 0] for _, curve in runs.values())
longest = min(curve[-1, 1] for _, curve in runs.values())
print(
    f"{'':22s} µs a step  bits after {most:.0f} characters  bits after {longest:.0f} s  at the end"
)
for name, (_, curve) in runs.items():
    micros = 1e6 * curve[-1, 1] / curve[-1, 0]
    print(
        f"{name:22s} {micros:9.0f}  {at(curve, 0, most):21.3f}  {at(curve, 1, longest):15.3f}"
        f"  {curve[-1, 2]:10.3f}"
    )
assert SMALL or at(runs["window 20, every 1"][1], 0, most) < min(
    at(runs[name][1], 0, most) for name in WAYS if name != "window 20, every 1"
)

# %% [markdown]
# **Per character** the sliding window is ahead of all others: it makes the most of each. **Per second** it is the last: an
# update costs a pass over 20 steps, nine times what a step in chunks costs, and it doesn't teach nine times as much.
# Chunks with a larger rate are the fastest way through a text that lies on a disk and can be read
# again. `every=5` is in between at the same rate; a window of 1 is quick and stops early, as it can't learn what is
# further back.
#
# So the sliding window is for streams where a step is dear or comes when it comes: an agent that acts, a
# sensor, a user. For a corpus take `every=window`, or something between. It is one number either way, and the
# loop stays the same.
#
# ## What it writes
#
# The model that got furthest, given a start, one character after the other:

# %%
best = min(runs, key=lambda name: runs[name][1][-1, 2])
params = runs[best][0]


@jax.jit
def write(params, prompt, key):
    h, logits = jax.lax.scan(
        lambda h, s: step(params, h, (s[None],)), jnp.zeros((1, HIDDEN)), prompt
    )

    def one(state, key):
        h, logits = state
        symbol = jax.random.categorical(key, logits / 0.6)
        h, logits = step(params, h, (symbol,))
        return (h, logits), symbol[0]

    return jax.lax.scan(one, (h, logits[-1]), jax.random.split(key, 400))[1]


prompt = "The statement "
said = write(params, jnp.array([number[c] for c in prompt]), jax.random.key(1))
print(f"[{best}]\n")
print(prompt + "".join(characters[s] for s in said))
