"""The conductances of a neuron of jaxley, fitted to a recorded voltage while it comes in.

    python examples/jaxley_fit.py [--steps 12288] [--compare]

A cell of three branches with the channels of Hodgkin and Huxley gets a noisy current. The recording
is made with the true conductances; the fit begins with others. There is an update every 16 steps
(0.4 ms), with a gradient through the last 256 (6.4 ms), longer than a spike.
"""

import functools

import jax
import jax.numpy as jnp
import jaxley as jx
import numpy as np
import optax
from compare import in_rows, main, pieces
from jax import lax
from jaxley.channels import HH
from jaxley.integrate import build_init_and_step_fn

import jaxbptt

DT, WINDOW, EVERY, STEPS = 0.025, 256, 16, 12288  # ms, then steps
SLOWER = optax.linear_schedule(1.5e-2, 1e-3, STEPS // EVERY)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(SLOWER))
# Logarithms of the conductances over the true ones.
FIRST = jax.tree.map(jnp.float32, {"HH_gNa": -0.7, "HH_gK": 0.5, "HH_gLeak": 0.5})


def neuron():
    cell = jx.Cell(jx.Branch(jx.Compartment(), 2), parents=[-1, 0, 0])
    cell.insert(HH())
    for name in FIRST:
        cell.make_trainable(name, verbose=False)
    cell.branch(0).loc(0.0).record(verbose=False)
    cell.to_jax()
    return cell


CELL = neuron()
INIT, STEP = build_init_and_step_fn(CELL)
TRUTH = CELL.get_parameters()
STATES, _ = INIT(TRUTH)


def conductances(logs):
    """What jaxley calls params."""
    return [{name: value * jnp.exp(logs[name]) for name, value in one.items()} for one in TRUTH]


def step(logs, states, x):
    """One step of the simulator; y is the voltage where it is recorded."""
    # With the states given, `init_fn` computes the parameters alone.
    _, params = INIT(conductances(logs), states)
    states = STEP(states, params, {"i": x["current"][None]}, {"i": np.array([0])}, delta_t=DT)
    return states, states["v"][0]


def loss(voltage, x):
    return ((voltage - x["voltage"]) / 10) ** 2


@functools.partial(jax.jit, static_argnums=0)
def recording(steps):
    """A current that wanders within some 5 ms, and the voltage of the true neuron."""

    def wander(now, noise):
        now = now * (1 - DT / 5) + noise * (2 * DT / 5) ** 0.5
        return now, now

    noise = jax.random.normal(jax.random.key(1), (steps,))
    x = {"current": 0.05 + 0.05 * lax.scan(wander, 0.0, noise)[1]}
    true = jax.tree.map(jnp.zeros_like, FIRST)
    return (x | {"voltage": lax.scan(functools.partial(step, true), STATES, x)[1]},)


def train(xs):
    """The loss at each step, and the conductances over the true ones."""
    how = {"window": WINDOW, "every": EVERY, "weights": "current"}
    learner = jaxbptt.learner(step, loss, OPTIMIZER, **how)
    state = learner.init(FIRST, STATES, jax.tree.map(lambda v: v[0], xs))
    state, metrics = lax.scan(learner.update, state, xs)
    return metrics.loss, jax.tree.map(jnp.exp, state.params)


def with_integrate(cell, xs, new, lengths=None):
    """Today's way: the gradient of `jx.integrate`, which begins where the last one ended."""

    def update(state, piece):
        def mean_loss(logs):
            stimuli = cell.branch(0).loc(0.0).data_stimulate(piece["current"])
            how = {"delta_t": DT, "checkpoint_lengths": lengths, "return_states": True}
            how |= {"data_stimuli": stimuli, "all_states": states}
            voltages, after = jx.integrate(cell, conductances(logs), **how)
            losses = loss(voltages[0, 1:], piece)
            return losses.mean(), (losses, after)

        logs, opt_state, states = state
        (_, (losses, states)), grads = jax.value_and_grad(mean_loss, has_aux=True)(logs)
        changes, opt_state = OPTIMIZER.update(grads, opt_state)
        return (optax.apply_updates(logs, changes), opt_state, states), losses

    return lax.scan(update, (FIRST, OPTIMIZER.init(FIRST), STATES), in_rows(xs, new))[1].ravel()


def run_again(xs):
    return pieces(step, loss, OPTIMIZER, FIRST, STATES, xs, EVERY, WINDOW - EVERY)


if __name__ == "__main__":
    integrate = functools.partial(with_integrate, neuron())
    ways = {
        "`jx.integrate`, 4096 steps": functools.partial(integrate, new=4096),
        "the same, checkpointed": functools.partial(integrate, new=4096, lengths=[64, 64]),
        "`jx.integrate`, 256 steps": functools.partial(integrate, new=256),
        "256 steps run again, every 16": run_again,
        "jaxbptt, `window=256, every=16`": lambda xs: train(xs)[0],
    }
    main(__doc__, recording, train, ways, STEPS)
