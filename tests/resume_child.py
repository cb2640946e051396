"""A training run that is killed and started again, for the test of resuming: a process of its own.

    python resume_child.py DIRECTORY RESULT

It says "ready" when it is compiled, and waits for a line on stdin. Then it goes on from the
latest checkpoint in DIRECTORY, saving after every other block, and says how far it is. It waits
for a line before each block, too, until stdin is closed. At the end the bytes of its state go to
RESULT. With "-" for DIRECTORY it neither saves nor restores.
"""

import contextlib
import pickle
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbptt

with contextlib.suppress(ImportError):  # loaded ahead
    import orbax.checkpoint  # noqa: F401

BATCH, INPUT, HIDDEN, WINDOW = 4, 8, 64, 5
BLOCK, BLOCKS = 7, 80  # 7 ends amid a group of 3, and amid a turn of the ring


def normal(seed, *shape):
    return jnp.asarray(0.2 * np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {
    "wx": normal(0, INPUT, HIDDEN),
    "wh": normal(1, HIDDEN, HIDDEN),
    "wy": normal(2, HIDDEN, INPUT),
    "unused": normal(3, 512, 512),  # it makes a save take its time
}
CARRY = {"h": normal(4, BATCH, HIDDEN), "key": jax.random.key(5)}


def step(params, carry, x):
    """A recurrent cell with dropout, its key in the carry."""
    key, drop = jax.random.split(carry["key"])
    h = jnp.tanh(x @ params["wx"] + carry["h"] @ params["wh"])
    h = jnp.where(jax.random.bernoulli(drop, 0.9, h.shape), h / 0.9, 0.0)
    return {"h": h, "key": key}, h @ params["wy"]


def loss(y, x):
    return jnp.mean((y - jnp.roll(x, 1, axis=1)) ** 2)


REC = jaxbptt.record(step, window=WINDOW, weights="replayed")
ADAM = optax.adam(1e-2)
LEARNER = jaxbptt.learner(step, loss, ADAM, window=WINDOW, every=3, weights="current")


def by_hand(state, x):
    """An update at every step."""
    params, opt_state, tape = state

    def loss_fn(params):
        new_tape, y = REC(params, tape, x)
        return loss(y, x), new_tape

    grads, tape = jax.grad(loss_fn, has_aux=True)(params)
    changes, opt_state = ADAM.update(grads, opt_state)
    return (optax.apply_updates(params, changes), opt_state, tape), None


@jax.jit
def start():
    x = jnp.zeros((BATCH, INPUT))
    hand = PARAMS, ADAM.init(PARAMS), REC.init(PARAMS, CARRY, x)
    return {"hand": hand, "learner": LEARNER.init(PARAMS, CARRY, x)}


def run(state, xs):
    hand, _ = jax.lax.scan(by_hand, state["hand"], xs)
    learned, _ = jax.lax.scan(LEARNER.update, state["learner"], xs)
    return {"hand": hand, "learner": learned}


def inputs(position):
    """A block of the data, which is found again by its position alone; it takes its time."""
    time.sleep(0.03)
    return np.random.default_rng(position).normal(size=(BLOCK, BATCH, INPUT)).astype(np.float32)


def main(directory, result):
    state, position = start(), 0
    update = jax.jit(run, donate_argnums=0).lower(state, inputs(0)).compile()
    print("ready", flush=True)
    sys.stdin.readline()
    with contextlib.ExitStack() as stack:
        store = None
        if directory != "-":
            store = stack.enter_context(jaxbptt.checkpoints(directory, [REC, LEARNER], keep=2))
            if store.latest is not None:
                state, data = store.restore(state)
                position = data["position"]
        print(position, flush=True)
        while position < BLOCK * BLOCKS:
            sys.stdin.readline()
            state, position = update(state, inputs(position)), position + BLOCK
            if store is not None and position % (2 * BLOCK) == 0:
                store.save(position, state, data={"position": position})
            print(position, flush=True)
    with open(result, "wb") as file:
        pickle.dump([bits(leaf) for leaf in jax.tree.leaves(state)], file)


def bits(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()


if __name__ == "__main__":
    main(*sys.argv[1:])
