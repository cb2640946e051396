"""A recurrent actor-critic on gymnax's MemoryChain, with updates more often than episodes end.

    python examples/gymnax_memory.py [--steps 9000] [--compare]

A bit is shown at the first step of an episode and asked for at the last, 24 steps later. 32
environments run side by side, and start anew by themselves. Updates come every 5 steps: a gradient
that is cut where these began never meets both the bit and the answer, one through 30 steps does.
"""

import functools

import gymnax
import jax
import jax.numpy as jnp
import optax
from compare import main
from flax import nnx
from jax import lax

import jaxbptt

LENGTH, ENVS, HIDDEN, ROLLOUT, WINDOW, DISCOUNT = 24, 32, 32, 5, 30, 0.9
ENV, SETTINGS = gymnax.make("MemoryChain-bsuite")
SETTINGS = SETTINGS.replace(memory_length=LENGTH)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))


class Network(nnx.Module):
    """A GRU, the logits of both actions and the value."""

    def __init__(self, rngs):
        self.cell = nnx.GRUCell(3, HIDDEN, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, 3, kernel_init=nnx.initializers.normal(0.02), rngs=rngs)

    def __call__(self, h, seen):
        h, out = self.cell(h, seen)
        return h, self.head(out)


agent = jaxbptt.with_resets(lambda network, h, seen: network(h, seen), jnp.zeros(HIDDEN))


def act(states, y, key):
    """One step of the environments. Where an episode is over, a new one has begun."""
    keys = jax.random.split(key, ENVS + 1)
    action = jax.random.categorical(keys[0], y[:, :2])
    step = jax.vmap(lambda key, state, action: ENV.step(key, state, action, SETTINGS))
    seen, states, reward, terminated, truncated, _ = step(keys[1:], states, action)
    return (states, (seen, terminated | truncated)), (action, reward, terminated | truncated)


def rollout(call, network, carry, world, keys):
    """Steps of all; `call` is the agent, or its recorder with a tape for carry."""

    def body(both, key):
        carry, (states, x) = both
        carry, y = call(network, carry, x)
        world, happened = act(states, y, key)
        return (carry, world), (y, *happened)

    return lax.scan(body, (carry, world), keys)


def loss(ys, value, actions, rewards, done):
    """Advantage actor-critic; `value` is that of what comes after the rollout."""

    def back(after, now):
        after = now[0] + DISCOUNT * jnp.where(now[1], 0.0, after)
        return after, after

    returns = lax.scan(back, lax.stop_gradient(value), (rewards, done), reverse=True)[1]
    log_p, advantage = jax.nn.log_softmax(ys[..., :2]), returns - ys[..., 2]
    chosen = jnp.take_along_axis(log_p, actions[..., None], -1)[..., 0]
    entropy = -(jnp.exp(log_p) * log_p).sum(-1)
    return jnp.mean(advantage**2 / 2 - lax.stop_gradient(advantage) * chosen - 0.02 * entropy)


def train(keys, window=WINDOW, new=ROLLOUT):
    """The mean reward at each step, times an episode's steps. Without a window: today's way."""
    rec = window and jaxbptt.record(agent, window=window, weights="current")

    def recorded(network, tape, world, keys):
        (tape, world), (ys, *happened) = rollout(rec, network, tape, world, keys)
        value = agent(network, tape.carry, world[1])[1][:, 2]
        ct_ys = jax.grad(loss)(ys, value, *happened)  # of the newest outputs
        return rec.pullback(network, tape, ct_ys).params, tape, world, happened[1]

    def cut(network, carry, world, keys):
        def loss_fn(network):
            (after, new_world), (ys, *happened) = rollout(agent, network, carry, world, keys)
            value = agent(network, after, new_world[1])[1][:, 2]
            return loss(ys, value, *happened), (after, new_world, happened[1])

        grads, rest = jax.grad(loss_fn, has_aux=True)(network)
        return grads, *rest

    def update(state, keys):
        network, opt_state, *rest = state
        grads, carry, world, rewards = (recorded if window else cut)(network, *rest, keys)
        changes, opt_state = OPTIMIZER.update(grads, opt_state)
        return (optax.apply_updates(network, changes), opt_state, carry, world), rewards

    network, carry = Network(nnx.Rngs(0)), jnp.zeros((ENVS, HIDDEN))
    seen, states = jax.vmap(lambda key: ENV.reset(key, SETTINGS))(keys[:ENVS])
    world = states, (seen, jnp.ones(ENVS, bool))
    carry = rec.init(network, carry, world[1]) if window else carry
    state = network, OPTIMIZER.init(network), carry, world
    return (LENGTH + 1) * lax.scan(update, state, keys.reshape(-1, new))[1].mean(-1)


WAYS = {
    "rollouts of 5, cut where they begin": functools.partial(train, window=None),
    "rollouts of 30, cut where they begin": functools.partial(train, window=None, new=30),
    "jaxbptt, rollouts of 5, `window=30`": train,
    "jaxbptt, rollouts of 30, `window=30`": functools.partial(train, new=30),
}

if __name__ == "__main__":
    main(__doc__, lambda n: (jax.random.split(jax.random.key(0), n),), train, WAYS, 9000, "reward")
