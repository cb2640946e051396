"""A spiking network of spyx that keeps a cue in mind, trained while its input streams by.

    python examples/spiking.py [--steps 6000] [--compare]

In each trial of 40 steps one of four groups of inputs fires for 10 steps, then all are silent but
for noise, and in the last 10 steps the network has to say which group it was.
"""

import functools

import jax
import jax.numpy as jnp
import optax
import spyx
from compare import in_rows, main, pieces
from flax import nnx
from jax import lax

import jaxbptt

CUES, GROUP, BATCH, HIDDEN = 4, 10, 16, 64
TRIAL, CUE, ANSWER = 40, 10, 10  # steps
WINDOW, EVERY = 40, 5
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-3))


def stream(steps, seed=0):
    """Spikes, the cue of each trial, the time within it; each (steps, ...)."""
    keys = jax.random.split(jax.random.key(seed))
    trial, time = jnp.divmod(jnp.arange(steps), TRIAL)
    cue = jax.random.randint(keys[0], (steps // TRIAL + 1, BATCH), 0, CUES)[trial]
    shown = jax.nn.one_hot(cue, CUES) * (time < CUE)[:, None, None]
    rates = 0.005 + 0.4 * jnp.repeat(shown, GROUP, axis=-1)
    spikes = jax.random.bernoulli(keys[1], rates).astype(jnp.float32)
    return ({"spikes": spikes, "cue": cue, "time": time},)


def network():
    """Inputs to recurrent LIF neurons, and these to leaky integrators that don't spike."""
    rngs = nnx.Rngs(0)
    neurons = spyx.nn.RLIF((HIDDEN,), activation=spyx.axn.superspike(5), rngs=rngs)
    neurons.recurrent_w[...] *= 0.5 / HIDDEN**0.5
    neurons.beta[...] = jnp.linspace(0.5, 0.98, HIDDEN)
    into, out = nnx.Linear(CUES * GROUP, HIDDEN, rngs=rngs), nnx.Linear(HIDDEN, CUES, rngs=rngs)
    return spyx.nn.Sequential(into, neurons, out, spyx.nn.LI((CUES,), rngs=rngs))


def start():
    """A step of all rows, the network as its params, and a carry: the state of the neurons."""
    model = network()
    zeros = model.initial_state(BATCH)

    def one(model, state, spikes):
        y, state = model(spikes, state)
        return state, y

    trials = jaxbptt.with_resets(one, zeros)  # each trial starts with neurons at rest
    return lambda model, c, x: trials(model, c, (x["spikes"], x["time"] == 0)), model, zeros


def loss(y, x):
    """Cross entropy, where an answer is asked for."""
    wrong = optax.softmax_cross_entropy_with_integer_labels(y, x["cue"]).mean()
    return jnp.where(x["time"] >= TRIAL - ANSWER, wrong * TRIAL / ANSWER, 0.0)


def train(xs, window=WINDOW, every=EVERY):
    """The loss at each step."""
    step, model, zeros = start()
    learner = jaxbptt.learner(step, loss, OPTIMIZER, window=window, every=every, weights="current")
    state = learner.init(model, zeros, jax.tree.map(lambda v: v[0], xs))
    return lax.scan(learner.update, state, xs)[1].loss


def trial_by_trial(xs):
    """Today's way: `spyx.nn.run` over a trial, and the gradient of that."""
    model = network()

    def update(state, trial):
        def mean_loss(model):
            ys, _ = spyx.nn.run(model, trial["spikes"])
            return jax.vmap(loss)(ys, trial).mean()

        model, opt_state = state
        value, grads = jax.value_and_grad(mean_loss)(model)
        changes, opt_state = OPTIMIZER.update(grads, opt_state)
        return (optax.apply_updates(model, changes), opt_state), value

    return lax.scan(update, (model, OPTIMIZER.init(model)), in_rows(xs, TRIAL))[1]


def today(xs, new, old=0):
    """The same without jaxbptt: chunks, or the window run again for each update."""
    step, model, zeros = start()
    return pieces(step, loss, OPTIMIZER, model, zeros, xs, new, old)


WAYS = {
    "`spyx.nn.run`, trial by trial": trial_by_trial,
    "chunks of 5": functools.partial(today, new=5),
    "window of 40 run again, every 5": functools.partial(today, new=5, old=35),
    "jaxbptt, `window=40, every=5`": train,
    "jaxbptt, `window=40, every=40`": functools.partial(train, every=40),
}


if __name__ == "__main__":
    main(__doc__, stream, train, WAYS, steps=6000)
