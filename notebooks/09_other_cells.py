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
# # Other cells: the recorder does not care
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxbptt/jaxbptt/blob/main/notebooks/09_other_cells.ipynb)
#
# What is recorded is a function, `step(params, carry, x) -> (carry, y)`. It need not be a layer of any
# library, and it may be of any. Here five cells of very different kinds learn the same thing in the same loop, not a
# line of which knows the cell: a cell drawn as a random graph, in the manner of ENAS; spiking neurons; a
# linear recurrence with complex eigenvalues; and modules of equinox and haiku.
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
if not all(map(importlib.util.find_spec, ("equinox", "haiku"))):
    also = "equinox dm-haiku"
    # %pip install --quiet {also}

# %%
import os

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxbptt

SMALL = bool(os.environ.get("JAXBPTT_SMALL"))  # fewer steps, for a quick run of all cells
BLUE, ORANGE, GREEN, PINK, YELLOW = COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
GRAY = "0.4"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})

# %% [markdown]
# ## The task, and the loop
#
# Random bits come in; five steps later each has to be said. This is the whole of the training, for all cells.

# %%
LAG, BATCH, UNITS, WINDOW = 5, 32, 64, 35
STEPS = 300 if SMALL else 3000

rng = np.random.default_rng(0)
bits = rng.integers(0, 2, (STEPS + LAG, BATCH, 1)).astype(np.float32)
stream = {"in": jnp.asarray(2 * bits[LAG:] - 1), "target": jnp.asarray(bits[:-LAG])}


def loss(y, x):
    return optax.sigmoid_binary_cross_entropy(y, x["target"]).mean() / np.log(2)


def train(step, params, carry, rate=2e-3):
    """Parameters and carry after an online run with a window of 35, and the loss of each step."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    learner = jaxbptt.learner(step, loss, optimizer, window=WINDOW)
    state = learner.init(params, carry, jax.tree.map(lambda v: v[0], stream))
    state, metrics = jax.jit(lambda s: jax.lax.scan(learner.update, s, stream))(state)
    return state.params, state.tape.carry, metrics.loss


def matrix(key, rows, columns, scale=1.0):
    return scale * jax.random.normal(key, (rows, columns)) / rows**0.5


results = {}

# %% [markdown]
# ## A sampled graph
#
# The recurrent cell of ENAS (Pham et al., 2018) is a graph: each node takes the output of one earlier node through
# a gated layer with an activation of its own, and what no other node has taken is averaged. Here one is drawn at
# random. Its authors train language models with it through 35 steps.

# %%
NODES = 8
ACTIVATIONS = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "identity": lambda v: v,
    "sigmoid": jax.nn.sigmoid,
}
graph_rng = np.random.default_rng(2)
graph = [
    (int(graph_rng.integers(n)), str(graph_rng.choice(list(ACTIVATIONS)))) for n in range(1, NODES)
]
loose = sorted(set(range(NODES)) - {source for source, _ in graph})


def gated(h, gate_and_new, activation):
    gate, new = jnp.split(gate_and_new, 2, axis=1)
    return h + jax.nn.sigmoid(gate) * (activation(new) - h)


def graph_step(params, h, x):
    nodes = [gated(h, x["in"] @ params["in"] + h @ params["h"], jnp.tanh)]
    for weights, (source, name) in zip(params["nodes"], graph, strict=True):
        nodes.append(gated(nodes[source], nodes[source] @ weights, ACTIVATIONS[name]))
    h = sum(nodes[n] for n in loose) / len(loose)
    return h, h @ params["out"]


keys = jax.random.split(jax.random.key(0), NODES + 2)
params = {
    "in": matrix(keys[0], 1, 2 * UNITS),
    "h": matrix(keys[1], UNITS, 2 * UNITS),
    "nodes": [matrix(key, UNITS, 2 * UNITS) for key in keys[2:-1]],
    "out": matrix(keys[-1], UNITS, 1, 0.1),
}

fig, ax = plt.subplots(figsize=(9, 2.6))
for node, (source, _) in enumerate(graph, start=1):
    bend = "arc3,rad=-0.4" if node - source > 1 else "arc3"
    arrow = {
        "arrowstyle": "-|>",
        "color": GRAY,
        "connectionstyle": bend,
        "shrinkA": 9,
        "shrinkB": 9,
    }
    ax.annotate("", (node, 0), (source, 0), arrowprops=arrow)
for node, name in enumerate(["tanh", *(name for _, name in graph)]):
    ax.plot(node, 0, "o", ms=16, color=COLORS[2] if node in loose else COLORS[0])
    ax.text(node, 0, node, color="white", ha="center", va="center")
    ax.text(node, -0.5, name, ha="center", va="top")
ax.set(xlim=(-0.5, NODES - 0.5), ylim=(-0.9, 1.6), title="The sampled cell; green: averaged into h")
ax.axis("off")
fig.tight_layout()
plt.show()

results["sampled graph"] = train(graph_step, params, jnp.zeros((BATCH, UNITS)))

# %% [markdown]
# ## Spiking neurons
#
# Leaky neurons that send out a spike where they cross a threshold, and are set back. A step has derivative
# zero almost everywhere, so the backward pass takes that of a smooth function in its place: a `custom_jvp`, of
# which the recorder need know nothing.


# %%
@jax.custom_jvp
def spike(v):
    return (v > 0).astype(v.dtype)


@spike.defjvp
def spike_jvp(primals, tangents):
    (v,), (dv,) = primals, tangents
    return spike(v), dv / (1 + 5 * jnp.abs(v)) ** 2  # Zenke and Ganguli, 2018


NEURONS = 128


def spiking_step(params, carry, x):
    v, tired, s, trace = carry
    tired = 0.9 * tired + s  # who has spiked of late spikes less easily
    v = 0.5 * v + x["in"] @ params["in"] + s @ params["h"] + params["b"] - s
    s = spike(v - 1 - params["tired"] * tired)
    trace = 0.3 * trace + s
    return (v, tired, s, trace), trace @ params["out"]


keys = jax.random.split(jax.random.key(1), 4)
params = {
    "in": matrix(keys[0], 1, NEURONS),
    "h": matrix(keys[1], NEURONS, NEURONS),
    "b": matrix(keys[2], 1, NEURONS, 0.2)[0],
    "tired": jnp.full(NEURONS, 0.2),
    "out": matrix(keys[3], NEURONS, 1, 0.1),
}
results["spiking"] = train(spiking_step, params, (jnp.zeros((BATCH, NEURONS)),) * 4)

# %%
trained, carry, _ = results["spiking"]
spikes = jax.lax.scan(
    lambda carry, x: (lambda c, _: (c, c[2][0]))(*spiking_step(trained, carry, {"in": x})),
    carry,
    stream["in"][:60],
)[1]
fig, (top, ax) = plt.subplots(
    2, 1, figsize=(9, 4), sharex=True, gridspec_kw={"height_ratios": (1, 6)}
)
top.step(np.arange(60), stream["in"][:60, 0, 0], where="mid", color=COLORS[1], lw=1)
top.set(ylabel="bit", yticks=())
t, neuron = np.nonzero(np.asarray(spikes)[:, np.argsort(spikes.mean(0))])
ax.scatter(t, neuron, s=3, marker="|", color="black", lw=1)
ax.set(xlabel="step", ylabel="neuron, by rate", xlim=(-1, 60))
top.set_title("Spikes of the trained network")
fig.tight_layout()
plt.show()
print(f"a neuron spikes in {100 * float(spikes.mean()):.0f} % of the steps")

# %% [markdown]
# ## A linear recurrence
#
# The recurrent unit of Orvieto et al. (2023): $c_t = \lambda \odot c_{t-1} + B x_t$ with complex $\lambda$ inside the
# unit circle, and something nonlinear only behind it. Complex carries and parameters are recorded like real ones.


# %%
def linear_step(params, c, x):
    eigenvalues = jnp.exp(-jnp.exp(params["decay"]) + 1j * jnp.exp(params["angle"]))
    scale = jnp.sqrt(1 - jnp.abs(eigenvalues) ** 2)
    c = eigenvalues * c + scale * (x["in"] @ params["in"])
    h = jax.nn.gelu((c @ params["mix"]).real)
    return c, h @ params["out"]


keys = jax.random.split(jax.random.key(2), 6)
u, phase = jax.random.uniform(keys[0], (2, UNITS))
radius = jnp.sqrt(0.6**2 + u * (0.98**2 - 0.6**2))
params = {
    "decay": jnp.log(-jnp.log(radius)),
    "angle": jnp.log(0.02 + np.pi * phase),
    "in": matrix(keys[1], 1, UNITS) + 1j * matrix(keys[2], 1, UNITS),
    "mix": matrix(keys[3], UNITS, UNITS) + 1j * matrix(keys[4], UNITS, UNITS),
    "out": matrix(keys[5], UNITS, 1, 0.1),
}
before = params
results["linear"] = train(linear_step, params, jnp.zeros((BATCH, UNITS), jnp.complex64))

# %%
fig, ax = plt.subplots(figsize=(8, 4.4))
turn = np.linspace(0, np.pi, 200)
ax.plot(np.cos(turn), np.sin(turn), color=GRAY, lw=1)
old, new = (
    np.asarray(jnp.exp(-jnp.exp(p["decay"]) + 1j * jnp.exp(p["angle"])))
    for p in (before, results["linear"][0])
)
ax.plot([old.real, new.real], [old.imag, new.imag], color=BLUE, lw=0.8, alpha=0.6)
ax.plot(old.real, old.imag, "o", ms=4, mfc="white", color=GRAY, label="before training")
ax.plot(new.real, new.imag, "o", ms=4, color=BLUE, label="after")
ax.set(aspect="equal", xlabel="real part", ylabel="imaginary part", ylim=(-0.03, 1.03))
ax.set_title("Eigenvalues λ, in the upper half of the unit circle")
ax.legend(loc="center")
fig.tight_layout()
plt.show()

# %% [markdown]
# ## A module of equinox
#
# An equinox module is a pytree, so it *is* the params.


# %%
class Model(eqx.Module):
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __call__(self, h, x):
        h = self.cell(x, h)
        return h, self.head(h)


def equinox_step(model, h, x):
    return jax.vmap(model)(h, x["in"])


keys = jax.random.split(jax.random.key(3))
model = Model(eqx.nn.GRUCell(1, UNITS, key=keys[0]), eqx.nn.Linear(UNITS, 1, key=keys[1]))
results["equinox GRU"] = train(equinox_step, model, jnp.zeros((BATCH, UNITS)))

# %% [markdown]
# ## A module of haiku
#
# `hk.transform` makes a pure function of it, which is one line away from a step.


# %%
def haiku_model(x, carry):
    out, carry = hk.LSTM(UNITS)(x, carry)
    return carry, hk.Linear(1)(out)


net = hk.without_apply_rng(hk.transform(haiku_model))


def haiku_step(params, carry, x):
    return net.apply(params, x["in"], carry)


carry = hk.LSTMState(jnp.zeros((BATCH, UNITS)), jnp.zeros((BATCH, UNITS)))
params = net.init(jax.random.key(4), stream["in"][0], carry)
results["haiku LSTM"] = train(haiku_step, params, carry)

# %% [markdown]
# ## All of them

# %%
fig, ax = plt.subplots(figsize=(8.5, 4))
for (name, (_, _, losses)), color in zip(results.items(), COLORS, strict=True):
    smooth = np.convolve(losses, np.ones(50) / 50, "valid")
    ax.plot(np.arange(len(smooth)) + 50, smooth, color=color, label=name)
ax.axhline(1, color=GRAY, ls=":", lw=1)
ax.text(STEPS, 1.01, "a guess", ha="right", va="bottom", color=GRAY)
ax.set(xlabel="step (and update)", ylabel="bits per symbol (mean of 50 steps)", ylim=(0, 1.12))
ax.set_title(f"Say the bit of {LAG} steps ago: one loop, five cells")
ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
fig.tight_layout()
plt.show()
for name, (_, _, losses) in results.items():
    print(f"{name:14s} {float(losses[-100:].mean()):.4f} bits at the end")
    assert SMALL or losses[-100:].mean() < 0.5, name
