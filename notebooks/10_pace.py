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
# # Pace: what a delay costs in learning, and what it saves in time
#
# A sliding window of K steps costs K pullbacks, one after the other, at every step. With `pace=p` an update takes *all*
# cotangents in flight p lags further, in one batch: p pullbacks one after the other. The price is a delay. The term of a loss
# at lag k comes k // p updates late, and by then the parameters have moved on.
#
# Is that a good bargain? Three tasks, each with the same window and no pace, a pace of 4 and a pace of 1; by steps and by
# seconds, at three learning rates. At the end the other way to pay less: a `reach` that a compiled loop adapts.
#
# It needs about three minutes on a CPU.

# %%
import importlib.util
import pathlib

spec = importlib.util.find_spec("jaxbptt")
# On a fresh Colab machine. A clone of the repository in this folder is found too, but it has no origin.
if spec is None or spec.origin is None:
    places = [pathlib.Path(p).resolve() for p in (".", "..", "jaxbptt")]
    found = [p for p in places if (p / "jaxbptt" / "_version.py").exists()]
    if not found:
        raise SystemExit(
            "jaxbptt is not installed. Upload the repository or clone it beside this notebook, "
            "into a folder called jaxbptt, and run this cell again; it installs from there."
        )
    # %pip install --quiet "{found[0]}[demo]"

# %%
import os
import sys
import time
from pydoc_data.topics import topics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxbptt

# The maze and its loss are those of examples/policy.py, in the repository.
root = pathlib.Path(jaxbptt.__file__).resolve().parents[1]
places = [root, *(pathlib.Path(p).resolve() for p in (".", "..", "jaxbptt"))]
sys.path.insert(0, str(next(p for p in places if (p / "examples" / "policy.py").exists())))
from examples import policy

SMALL = bool(os.environ.get("JAXBPTT_SMALL"))  # fewer steps and seeds, for a quick run of all cells
BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "0.5"

# %% [markdown]
# ## A model for symbols
#
# A gated recurrent unit, and a softmax over symbols, for the copy task and for text.


# %%
def first_params(seed, symbols, units):
    k = jax.random.split(jax.random.key(seed), 3)
    recurrent = [jax.random.orthogonal(key, units) for key in jax.random.split(k[1], 3)]
    return {
        "in": jax.random.normal(k[0], (symbols, 3 * units)) / 2,
        "h": jnp.concatenate(recurrent, axis=1),
        "b": jnp.zeros(3 * units).at[units : 2 * units].set(1.0),  # gates that keep
        "out": jax.random.normal(k[2], (units, symbols)) / units**0.5,
        "b_out": jnp.zeros(symbols),
    }


def step(params, h, x):
    from_x = jnp.split(params["in"][x[0]] + params["b"], 3, axis=1)
    from_h = jnp.split(h @ params["h"], 3, axis=1)
    reset, keep = (jax.nn.sigmoid(from_x[i] + from_h[i]) for i in (0, 1))
    new = jnp.tanh(from_x[2] + reset * from_h[2])
    h = new + keep * (h - new)
    return h, h @ params["out"] + params["b_out"]


def nats(y, x):
    return optax.softmax_cross_entropy_with_integer_labels(y, x[1]).mean()


# %% [markdown]
# ## Three tasks
#
# - **Copy**, as in `05_copy_task` with a lag of 5: a symbol has to be said six steps after it was heard. Four streams, 32 units,
#   a window of 12. Of the symbols nothing is worth 0.83 bits.
# - **Maze**, the policy of `07_online_agent`, with 16 episodes side by side in place of 64, and a window of 12. The reward
#   comes up to ten steps after the sign. A coin at the junction misses the exit in half of all episodes.
# - **Text**, as in `02_character_model`, read by *one* reader: 64 units, a window of 50, and the last tenth held out.
#
# Every task is a stream in blocks, something to start from, and a score, which is better when lower.


# %%
class Task(NamedTuple):
    step: object
    loss: object
    window: int
    seeds: int
    begin: object  # seed -> parameters, carry, blocks of inputs
    score: object  # learner, state and metrics after a block -> a number
    label: str


def in_blocks(stream, size):
    return jax.tree.map(lambda v: jnp.asarray(v).reshape(-1, size, *v.shape[1:]), stream)


LAG, SYMBOLS = 5, 6


def begin_copy(seed, streams=4, units=32, size=500, blocks=2 if SMALL else 24):
    rng, period = np.random.default_rng(seed), 2 * (LAG + 1)
    cycles = np.zeros((size * blocks // period + 2, period, streams), np.int32)
    cycles[:, 0] = 1
    cycles[:, 1 : LAG + 1] = rng.integers(2, SYMBOLS, (len(cycles), LAG, streams))
    rows = cycles.reshape(-1, streams).T
    heard = np.stack([np.roll(row, -rng.integers(period)) for row in rows], 1)
    stream = heard[LAG + 1 :][: size * blocks], heard[: -(LAG + 1)][: size * blocks]
    carry = jnp.zeros((streams, units))
    return first_params(seed, SYMBOLS, units), carry, in_blocks(stream, size)


def begin_maze(seed, episodes=16, size=100, blocks=3 if SMALL else 30):
    keys = jax.random.split(jax.random.key(seed), 3)
    carry = policy.first_carry(keys[1], episodes)
    return policy.first_params(keys[0]), carry, jax.random.split(keys[2], (blocks, size))


text = "\n\n\n".join(topics[name] for name in sorted(topics))
characters = sorted(set(text))
number = {character: i for i, character in enumerate(characters)}
read, kept = np.split(np.array([number[c] for c in text], np.int32), [len(text) * 9 // 10])
HIDDEN, READERS = 64, 32  # of what is held out


def begin_text(seed, size=500, blocks=2 if SMALL else 20):
    at = np.arange(size * blocks) + seed * (len(read) // 3)
    carry = jnp.zeros((1, HIDDEN))
    stream = read[at % len(read)][:, None], read[(at + 1) % len(read)][:, None]
    return first_params(seed, len(characters), HIDDEN), carry, in_blocks(stream, size)


def missed(learner, state, metrics):
    ended = jax.tree.map(jnp.sum, metrics.aux)
    return 100 - 100 * ended["exits"] / jnp.maximum(ended["episodes"], 1)


def bits_of_kept(learner, state, metrics):
    at = np.arange(READERS) * (len(kept) // READERS) + np.arange(201)[:, None]
    held_out = jnp.asarray(kept[at[:-1]]), jnp.asarray(kept[at[1:]])
    _, found = learner.evaluate(state, held_out, carry=jnp.zeros((READERS, HIDDEN)))
    return found.loss.mean() / jnp.log(2)


def bits(learner, state, metrics):
    return metrics.loss.mean() / jnp.log(2)


TASKS = {
    "copy": Task(step, nats, 12, 3, begin_copy, bits, "bits per symbol"),
    "maze": Task(policy.step, policy.loss, 12, 6, begin_maze, missed, "episodes that miss, %"),
    "text": Task(step, nats, 50, 3, begin_text, bits_of_kept, "held-out bits per character"),
}
PACES = {None: (BLUE, "no pace"), 4: (GREEN, "pace 4"), 1: (ORANGE, "pace 1")}
if SMALL:
    del PACES[4]
RATES = (3e-3,) if SMALL else (1e-3, 3e-3, 1e-2)

# %% [markdown]
# ## Nothing is lost, it is only late
#
# At fixed parameters first. A run with a pace, and further calls with a loss of zero until nothing is in flight any
# more, adds up to the gradient that the window gives.

# %%
WINDOW, STEPS = 12, 60
params, carry, blocks = begin_copy(0)
xs = jax.tree.map(lambda v: v[0, :STEPS], blocks)


@jax.jit
@jax.grad
def whole(params):
    """The sum of a run's losses, each reaching back through the window."""

    def one(h, x):
        h, y = step(params, h, x)
        return h, nats(y, x)

    return jaxbptt.scan(one, carry, xs, window=WINDOW)[1].sum()


def by_call(rec, calls):
    """The gradient of each call: of a run, and of calls behind it whose loss is zero."""

    def one(tape, at):
        x = jax.tree.map(lambda v: v[at % STEPS], xs)

        def loss(y):
            return jnp.where(at < STEPS, nats(y, x), 0.0)

        tape, _, grads = rec.advance(params, tape, x, loss)
        return tape, grads

    start = rec.init(params, carry, jax.tree.map(lambda v: v[0], xs))
    return jax.lax.scan(one, start, jnp.arange(calls))[1]


def off_by(grads):
    """How far a sum of gradients is from the window's, as a share of its norm."""
    missing = jax.tree.map(lambda grads, sought: grads.sum(0) - sought, grads, sought)
    return float(optax.global_norm(missing) / optax.global_norm(sought))


sought = whole(params)


for pace in (4, 1):
    rec, late_ones = jaxbptt.record(step, window=WINDOW, pace=pace), -(-WINDOW // pace) - 1
    grads = jax.jit(by_call, static_argnums=(0, 1))(rec, STEPS + late_ones)
    run = off_by(jax.tree.map(lambda v: v[:STEPS], grads))
    print(f"pace {pace}: off by {run:.1e} after {STEPS} calls, ", end="")
    print(f"by {off_by(grads):.1e} after {late_ones} more without a loss")
    assert off_by(grads) < 1e-5 < run

# %% [markdown]
# ## Training, by steps and by seconds
#
# While training the parameters do move. All three paces see the same stream, from the same start and with the same
# optimiser. They take turns block by block, so that whatever else the machine does meets all of them; the time of
# a step is the median over blocks. `weights="current"`: with `"stored"` each step on the tape keeps its own
# parameters, so that its term is that of the step as it was run, and a pace saves little.


# %%
def train(task):
    """Scores, (pace, rate, seed, block) each, and the median seconds of a step, by pace."""

    def learner(pace, rate):
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
        options = {"window": task.window, "pace": pace, "weights": "current"}
        return jaxbptt.learner(task.step, task.loss, optimizer, **options)

    block = {
        pace: jax.jit(
            lambda rate, state, xs, pace=pace: jax.lax.scan(learner(pace, rate).update, state, xs)
        )
        for pace in PACES
    }
    score = {
        pace: jax.jit(lambda *after, pace=pace: task.score(learner(pace, 0.0), *after))
        for pace in PACES
    }
    seconds, scores = {pace: [] for pace in PACES}, {}
    for seed in range(1 if SMALL else task.seeds):
        params, carry, blocks = task.begin(seed)
        first, *_ = parts = [
            jax.tree.map(lambda v, i=i: v[i], blocks)
            for i in range(len(jax.tree.leaves(blocks)[0]))
        ]
        x = jax.tree.map(lambda v: v[0], first)
        for rate in RATES:
            states = {pace: learner(pace, rate).init(params, carry, x) for pace in PACES}
            if seed == 0 and rate == RATES[0]:  # compile
                jax.block_until_ready([block[p](rate, states[p], first) for p in PACES])
            for xs in parts:
                for pace in PACES:
                    began = time.perf_counter()
                    after = jax.block_until_ready(block[pace](rate, states[pace], xs))
                    seconds[pace].append(
                        (time.perf_counter() - began) / len(jax.tree.leaves(xs)[0])
                    )
                    states[pace] = after[0]
                    scores.setdefault((pace, rate, seed), []).append(score[pace](*after))
    of = {
        pace: np.array(
            [[scores[pace, r, s] for s in range(1 if SMALL else task.seeds)] for r in RATES], float
        )
        for pace in PACES
    }
    size = len(jax.tree.leaves(first)[0])
    return of, {pace: float(np.median(v)) for pace, v in seconds.items()}, size


results = {name: train(task) for name, task in TASKS.items()}


# %%
def late(curves, until=None):
    """Mean of the last fifth of the blocks, up to one of them: (seeds,)."""
    until = curves.shape[-1] if until is None else max(1, int(until))
    return curves[..., until - max(1, until // 5) : until].mean(-1)


def summary(ends):
    return f"{ends.mean():6.2f} ({ends.std(ddof=min(1, len(ends) - 1)):.2f})"


best = {
    name: {p: int(np.argmin(late(of[p]).mean(1))) for p in PACES}
    for name, (of, *_) in results.items()
}
print(
    "score: lower is better; mean (sd over seeds) of the last fifth of the steps, or of the time\n"
)
print(
    f"{'':13s} {'µs a step':>16s} {'rate':>6s} {'same rate, by steps':>20s} "
    f"{'by seconds':>15s}   {'own best rate, by steps':>23s}"
)
for name, (of, seconds, size) in results.items():
    row = best[name][None]
    time_given = min(seconds.values()) * size * of[None].shape[-1]
    for pace, (_, said) in PACES.items():
        curves, own = of[pace][row], best[name][pace]
        quick = f"{1e6 * seconds[pace]:6.0f} ({seconds[None] / seconds[pace]:.2f} ×)"
        print(
            f"{name:5s}{said:8s} {quick:>16s} {RATES[row]:6g} {summary(late(curves)):>20s} "
            f"{summary(late(curves, time_given / seconds[pace] / size)):>15s}   "
            f"{summary(late(of[pace][own])):>15s} at {RATES[own]:g}"
        )
    print(f"{'':5s}in steps: {size * of[None].shape[-1]:,}, in seconds: {time_given:.2f}")

# %%
fig, axes = plt.subplots(2, 3, figsize=(12, 6.4), sharey="col")
for column, (name, (of, seconds, size)) in zip(axes.T, results.items(), strict=True):
    row = best[name][None]
    steps = np.arange(1, of[None].shape[-1] + 1) * size
    for pace, (color, said) in PACES.items():
        curves = of[pace][row]
        for ax, at in zip(column, (steps, steps * seconds[pace]), strict=True):
            ax.plot(at, curves.T, color=color, lw=0.7, alpha=0.35)
            ax.plot(at, curves.mean(0), color=color, lw=2, label=said)
    column[0].set(title=f"{name}, rate {RATES[row]:g}", xlabel="step", ylabel=TASKS[name].label)
    column[1].set(xlabel="seconds", ylabel=TASKS[name].label)
axes[0, 0].legend(frameon=False)
for ax in axes.flat:
    ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# ## By learning rate
#
# How far the parameters move while a term is on its way is a matter of the rate.

# %%
fig, axes = plt.subplots(1, 3, figsize=(12, 3.6))
for ax, (name, (of, *_)) in zip(axes, results.items(), strict=True):
    for shift, (pace, (color, said)) in zip((0.94, 1.0, 1.06), PACES.items(), strict=True):
        ends = late(of[pace])  # (rates, seeds)
        at, spread = np.array(RATES) * shift, ends.std(1)
        ax.errorbar(at, ends.mean(1), spread, color=color, marker="o", capsize=3, label=said)
    ax.set(xscale="log", xlabel="learning rate", ylabel=TASKS[name].label, title=name)
    ax.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    ax.minorticks_off()
    ax.spines[["top", "right"]].set_visible(False)
axes[0].legend(frameon=False)
fig.tight_layout()
plt.show()
for name, (of, *_) in results.items():
    for i, rate in enumerate(RATES):
        told = "   ".join(f"{said} {summary(late(of[p])[i])}" for p, (_, said) in PACES.items())
        print(f"{name} at {rate:<6g} {told}")

# %% [markdown]
# TEXT
#
# ## A reach that adapts, in one compiled loop
#
# The other way to pay less is to go back no further than there is something to find. `reach=k` takes a k that is known only when
# the loop runs. Here a controller looks, at every tenth step, at what the older half of the reach adds to the
# gradient, as a share of its norm. Every hundred steps it doubles the reach where the mean of that share is above
# 0.3, and halves it where it is below 0.1.
#
# The stream is of bits, and the one to be said is that of one step ago, then of eight steps ago, then of one again.

# %%
LONGEST, LONG, THIRD = 32, 8, 300 if SMALL else 6000
rng = np.random.default_rng(0)
heard = rng.integers(0, 2, (3 * THIRD + LONG, 8)).astype(np.int32)
ago = np.repeat([1, LONG, 1], THIRD)
stream = jnp.asarray(heard[LONG:]), jnp.asarray(heard[np.arange(3 * THIRD) + LONG - ago])
learner = jaxbptt.learner(step, nats, optax.adam(3e-3), window=LONGEST, weights="current")


def share_of_older_half(rec, state, x, reach):
    """What the lags from reach / 2 on add to the gradient, as a share of its norm."""
    tape, y = rec(state.params, state.tape, x)
    ct = jax.grad(nats)(y, x)[None]
    whole, newer = (
        rec.pullback(state.params, tape, ct, reach=k).params for k in (reach, reach // 2)
    )
    older = jax.tree.map(jnp.subtract, whole, newer)
    return optax.global_norm(older) / jnp.maximum(optax.global_norm(whole), 1e-12)


def adaptive(loop, x):
    state, reach, share = loop
    share = jax.lax.cond(
        state.step % 10 == 0,
        lambda: 0.8 * share + 0.2 * share_of_older_half(learner.recorder, state, x, reach),
        lambda: share,
    )
    longer, shorter = jnp.minimum(2 * reach, LONGEST), jnp.maximum(reach // 2, 2)
    moved = jnp.where(share > 0.3, longer, jnp.where(share < 0.1, shorter, reach))
    reach = jnp.where(state.step % 100 == 99, moved, reach)
    state, metrics = learner.update(state, x, reach=reach)
    return (state, reach, share), (metrics.loss / jnp.log(2), reach)


def fixed(state, x):
    state, metrics = learner.update(state, x)
    return state, metrics.loss / jnp.log(2)


start = learner.init(
    first_params(0, 2, 32), jnp.zeros((8, 32)), jax.tree.map(lambda v: v[0], stream)
)
ways = {
    "adapted": (adaptive, (start, jnp.int32(2), jnp.float32(0.0))),
    "always 32": (fixed, start),
}
found, took = {}, {}
for name, (body, begin) in ways.items():
    run = jax.jit(lambda begin, body=body: jax.lax.scan(body, begin, stream)[1])
    jax.block_until_ready(run(begin))  # compile
    began = time.perf_counter()
    found[name] = jax.block_until_ready(run(begin))
    took[name] = time.perf_counter() - began
bits_adapted, reach = map(np.asarray, found["adapted"])
bits_fixed = np.asarray(found["always 32"])

# %%
fig, (top, bottom) = plt.subplots(2, 1, figsize=(8, 4.8), sharex=True)
top.plot(reach, color=BLUE, lw=2, label="reach")
top.plot(ago + 1, color=GRAY, ls=":", label="what the symbol needs")
top.set(yscale="log", ylabel="steps")
top.set_yticks((2, 4, 8, 16, 32), ("2", "4", "8", "16", "32"))
top.minorticks_off()
top.set_title("The reach follows what is to be remembered")
at = np.arange(50, 3 * THIRD, 100)
for name, color, curve in (
    ("adapted", BLUE, bits_adapted),
    ("always 32", GRAY, bits_fixed),
):
    bottom.plot(at, curve.reshape(-1, 100).mean(1), color=color, label=name)
bottom.set(xlabel="step (and update)", ylabel="bits per symbol")
for ax in (top, bottom):
    ax.legend(frameon=False, loc="upper right")
    ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()
print(f"mean reach {reach.mean():.1f} of {LONGEST}; in the thirds", end=" ")
print(", ".join(f"{part.mean():.1f}" for part in np.split(reach, 3)))
for name, curve in (("adapted", bits_adapted), ("always 32", bits_fixed)):
    ends = ", ".join(f"{part[-THIRD // 6 :].mean():.3f}" for part in np.split(curve, 3))
    print(f"{name:10s} {took[name]:.2f} s, bits at the end of each third: {ends}")
middle = np.split(reach, 3)[1]
assert SMALL or (reach[: THIRD // 2].mean() < LONG < middle[-THIRD // 2 :].mean())

# %% [markdown]
# TEXT2
