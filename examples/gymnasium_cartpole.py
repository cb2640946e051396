"""A recurrent actor-critic in gymnasium's CartPole, which is Python and can't be compiled.

    python examples/gymnasium_cartpole.py [--steps 8000] [--compare]

Both velocities are hidden, so that the network has to remember. What it did in order to act is what
is differentiated: nothing is run a second time to learn.
"""

import functools

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
from compare import main
from flax import nnx
from jax import lax

import jaxbptt

ENVS, HIDDEN, ROLLOUT, WINDOW, DISCOUNT = 16, 64, 8, 16, 0.98
OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(3e-3))


class Network(nnx.Module):
    """A GRU, the logits of both actions and a tenth of the value."""

    def __init__(self, rngs):
        self.cell = nnx.GRUCell(2, HIDDEN, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, 3, rngs=rngs)

    def __call__(self, h, seen):
        h, out = self.cell(h, seen)
        return h, self.head(out)


agent = jaxbptt.with_resets(lambda network, h, seen: network(h, seen), jnp.zeros(HIDDEN))
rec = jaxbptt.record(agent, window=WINDOW, weights="current")


def loss(ys, value, actions, rewards, done):
    """Advantage actor-critic; `value` is that of what comes after the rollout."""

    def back(after, now):
        after = now[0] + DISCOUNT * jnp.where(now[1], 0.0, after)
        return after, after

    value = lax.stop_gradient(10 * value[:, 2])
    returns = lax.scan(back, value, (rewards, done), reverse=True)[1]
    log_p, advantage = jax.nn.log_softmax(ys[..., :2]), returns / 10 - ys[..., 2]
    chosen = jnp.take_along_axis(log_p, actions[..., None], -1)[..., 0]
    entropy = -(jnp.exp(log_p) * log_p).sum(-1)
    return jnp.mean(advantage**2 / 2 - lax.stop_gradient(advantage) * chosen - 3e-3 * entropy)


@functools.partial(jax.jit, static_argnums=0)
def act(call, network, carry, x, key):
    """`call` is the agent, or its recorder with a tape for carry."""
    carry, y = call(network, carry, x)
    return carry, y, jax.random.categorical(key, y[:, :2])


@jax.jit
def learn(network, opt_state, tape, x, rows):
    """From what was recorded while acting."""
    ys, *happened = jax.tree.map(lambda *parts: jnp.stack(parts), *rows)
    ct_ys = jax.grad(loss)(ys, agent(network, tape.carry, x)[1], *happened)
    grads = rec.pullback(network, tape, ct_ys).params
    changes, opt_state = OPTIMIZER.update(grads, opt_state)
    return optax.apply_updates(network, changes), opt_state


@jax.jit
def learn_today(network, opt_state, h, xs, x, rows):
    """By running the window again, from the carry where it began."""
    xs, (_, *happened) = (jax.tree.map(lambda *parts: jnp.stack(parts), *v) for v in (xs, rows))

    def loss_fn(network):
        after, ys = lax.scan(lambda h, x: agent(network, h, x), h, xs)
        return loss(ys[-ROLLOUT:], agent(network, after, x)[1], *happened)

    changes, opt_state = OPTIMIZER.update(jax.grad(loss_fn)(network), opt_state)
    return optax.apply_updates(network, changes), opt_state


def see(observation, first):
    """Place and angle, at a scale of 1, and which episodes have just begun."""
    return observation[:, [0, 2]] * np.float32([1, 5]), first


def train(steps, record=True):
    """After how many steps each episode ended. Without `record`: today's way."""
    how = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    envs = gymnasium.make_vec("CartPole-v1", ENVS, "sync", vector_kwargs=how)
    x = see(envs.reset(seed=0)[0], np.ones(ENVS, bool))
    network, carry = Network(nnx.Rngs(0)), jnp.zeros((ENVS, HIDDEN))
    carry, opt_state = rec.init(network, carry, x) if record else carry, OPTIMIZER.init(network)
    age, ages, rows, past = np.zeros(ENVS), [], [], []
    for key in jax.random.split(jax.random.key(0), steps):
        past = [*past, (None if record else carry, x)][-WINDOW:]
        carry, y, action = act(rec if record else agent, network, carry, x, key)
        observation, reward, terminated, truncated, _ = envs.step(np.asarray(action))
        done, age = terminated | truncated, age + 1
        ages, age = ages + age[done].tolist(), np.where(done, 0, age)
        rows, x = [*rows, (y, action, reward.astype(np.float32), done)], see(observation, done)
        if len(rows) == ROLLOUT:
            given = (learn, carry) if record else (learn_today, past[0][0], [x for _, x in past])
            network, opt_state = given[0](network, opt_state, *given[1:], x, rows)
            rows = []
    return np.array(ages)


WAYS = {
    "16 steps run again, every 8": functools.partial(train, record=False),
    "jaxbptt, `window=16`, every 8": train,
}

if __name__ == "__main__":
    main(__doc__, lambda n: (n,), train, WAYS, 8000, "steps of an episode", compiled=False)
