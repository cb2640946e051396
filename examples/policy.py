"""Trains a recurrent policy online in a T-maze: a window of 1 provably can't learn it, 12 does.

    python examples/policy.py [--window 1 12] [--steps 2000] [--seeds 5] [--picture curves.png]

A sign at the start says on which side the exit is. Then comes a corridor, of another length in each
episode, and at its end a junction. Agent and maze are one step function, the maze in its carry.
Episodes run side by side, with an update at every time step; docs/policy.md has the proof.
"""

import argparse
import functools
import importlib.util
import time
from itertools import cycle
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbptt

# ------------------------------------------------------------------- the maze

LEFT, FORWARD, RIGHT = -1, 0, 1  # actions
NEAREST, FARTHEST = 4, 10  # steps from the start to the junction
ENDS = ("episodes", "turns", "exits")  # all that end, with a turn at the junction, in the exit


class Maze(NamedTuple):
    """One episode: int32 scalars."""

    sign: jax.Array  # LEFT or RIGHT: where the exit is
    junction: jax.Array  # its position, NEAREST ... FARTHEST
    position: jax.Array  # 0 is the start


def new_maze(key):
    """The start of an episode, drawn at random."""
    sign_key, junction_key = jax.random.split(key)
    sign = jnp.where(jax.random.bernoulli(sign_key), RIGHT, LEFT).astype(jnp.int32)
    junction = jax.random.randint(junction_key, (), NEAREST, FARTHEST + 1, jnp.int32)
    return Maze(sign, junction, jnp.zeros((), jnp.int32))


def observe(maze):
    """What is seen: the sign at the start, elsewhere 0, and which of three kinds the place is."""
    at_start, at_junction = maze.position == 0, maze.position == maze.junction
    place = jnp.array([at_start, ~at_start & ~at_junction, at_junction])
    return jnp.where(at_start, maze.sign, 0)[None].astype(jnp.float32), place.astype(jnp.float32)


def act(maze, action, key):
    """One action: the maze after it, a new one if the episode is over; the reward; how it ended.

    From the start every action leads into the corridor. A turn in there runs into the wall, which
    ends the episode with -1. At the junction the turn to the exit is worth 1, all else -1.
    """
    at_start, at_junction = maze.position == 0, maze.position == maze.junction
    turned = ~at_start & (action != FORWARD)
    over, found = turned | at_junction, at_junction & (action == maze.sign)
    reward = jnp.where(found, 1, jnp.where(over, -1, 0)).astype(jnp.float32)
    farther = maze._replace(position=maze.position + 1)
    maze = jax.tree.map(lambda new, old: jnp.where(over, new, old), new_maze(key), farther)
    return maze, reward, dict(zip(ENDS, (over, turned & at_junction, found), strict=True))


# ------------------------------------------------------------------ the agent

HIDDEN = 32


def cell(params, h, seen):
    """A tanh RNN, and the logits of the three actions."""
    sign, place = seen
    h = jnp.tanh(sign @ params["sign"] + place @ params["place"] + h @ params["h"])
    return h, h @ params["logits"]


policy = jaxbptt.with_resets(cell, jnp.zeros(HIDDEN, jnp.float32))


def step(params, carry, key):
    """One time step of agent and maze, in all episodes of the batch."""
    maze, at_start = carry["maze"], carry["maze"].position == 0
    h, logits = policy(params, carry["h"], (jax.vmap(observe)(maze), at_start))
    action_key, maze_key = jax.random.split(key)
    choice = jax.random.categorical(action_key, logits).astype(jnp.int32)
    maze_keys = jax.random.split(maze_key, len(choice))
    maze, reward, ends = jax.vmap(act)(maze, choice - 1, maze_keys)
    y = {"logits": logits, "choice": choice, "reward": reward, "at_start": at_start, **ends}
    return {"h": h, "maze": maze}, y


def loss(y, key):
    """REINFORCE with a bonus for entropy; none at the start, where all actions come to the same."""
    log_p = jax.nn.log_softmax(y["logits"])
    chosen = (log_p * jax.nn.one_hot(y["choice"], 3, dtype=log_p.dtype)).sum(-1)
    entropy = -(jnp.exp(log_p) * log_p).sum(-1)
    gain = jnp.where(y["at_start"], 0.0, y["reward"] * chosen + 0.1 * entropy)
    return -gain.mean(), {end: y[end].sum() for end in ENDS}


def first_params(key):
    """Parameters before training. The sign's weights are zero: h has no trace of it by chance."""
    keys = jax.random.split(key, 3)
    return {
        "sign": jnp.zeros((1, HIDDEN), jnp.float32),
        "place": jax.random.normal(keys[0], (3, HIDDEN), jnp.float32) / 2,
        "h": jax.random.orthogonal(keys[1], HIDDEN, dtype=jnp.float32),
        "logits": jax.random.normal(keys[2], (HIDDEN, 3), jnp.float32) / HIDDEN**0.5,
    }


def first_carry(key, batch):
    """A new episode in each element of the batch."""
    mazes = jax.vmap(new_maze)(jax.random.split(key, batch))
    return {"h": jnp.zeros((batch, HIDDEN), jnp.float32), "maze": mazes}


# --------------------------------------------------------------- the training


def train(seed, window, steps=2000, batch=64, size=250):
    """Parameters, and counts of how episodes end: in each block of `size` steps, and afterwards."""
    learner = jaxbptt.learner(step, loss, optax.adam(2e-3), window=window)
    keys = jax.random.split(jax.random.key(seed), 5)
    state = learner.init(first_params(keys[0]), first_carry(keys[1], batch), keys[0])

    def block(state, keys):
        state, metrics = jax.lax.scan(learner.update, state, keys)
        return state, jax.tree.map(jnp.sum, metrics.aux)

    state, counts = jax.lax.scan(block, state, jax.random.split(keys[2], (steps // size, size)))
    carry, after_keys = first_carry(keys[3], batch), jax.random.split(keys[4], 1000)
    _, metrics = learner.evaluate(state, after_keys, carry)
    return state.params, counts, jax.tree.map(jnp.sum, metrics.aux)


def percent(counts):
    """How many of a hundred episodes end in the exit."""
    return 100 * counts["exits"] / np.maximum(counts["episodes"], 1)


def row(counts, after, seconds):
    """A run in the table."""
    found, means = percent(after), " ".join(f"{mean:5.1f}" for mean in percent(counts).mean(0))
    right = f"{counts['exits'].sum()}/{counts['turns'].sum()}"
    sd = found.std(ddof=min(len(found) - 1, 1))
    return f"{means}{found.mean():7.2f} ± {sd:.2f}{right:>15s}{seconds:9.1f}"


COLOURS, GREY = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00"), "0.4"


def draw(curves, ends, file):
    """Learning curves: thin of each seed, thick their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.axhline(50, color=GREY, linestyle=":", label="a coin at the junction")
    for (window, curve), colour in zip(curves.items(), cycle(COLOURS)):
        axes.plot(ends, curve.T, color=colour, lw=0.7, alpha=0.4)
        axes.plot(ends, curve.mean(0), "o-", color=colour, ms=3, label=f"window {window}")
    axes.set(xlabel="steps", ylabel="episodes that end in the exit, %", ylim=(0, 103))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=130)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = functools.partial(parser.add_argument, type=int, metavar="N")
    add("--window", nargs="+", default=[1, 12], help="one run for each (default: 1 12)")
    add("--steps", default=2000, help="in blocks of 250 (default: 2000)")
    add("--batch", default=64, help="episodes side by side (default: 64)")
    add("--seed", default=0, help="the first seed (default: 0)")
    add("--seeds", default=5, help="how many seeds (default: 5)")
    add("--picture", type=str, metavar="FILE", help="draw the learning curves")
    args = parser.parse_args()
    if min(args.steps, args.batch, args.seeds, *args.window) < 1:
        parser.error("--window, --steps, --batch and --seeds must be at least 1")
    if args.picture and importlib.util.find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib: pip install 'jaxbptt[demo]'")
    size = min(args.steps, 250)
    ends, curves = range(size, args.steps + 1, size), {}
    run = functools.partial(train, steps=args.steps, batch=args.batch, size=size)
    print("Episodes that end in the exit, in %: in blocks of steps, and after training")
    print("    steps", *(f"{end:5d}" for end in ends), "  after ± sd    right turns  seconds")
    for window in args.window:
        began = time.perf_counter()
        done = jax.jit(jax.vmap(functools.partial(run, window=window)))
        _, counts, after = jax.tree.map(np.asarray, done(args.seed + jnp.arange(args.seeds)))
        print(f"window {window:2d}", row(counts, after, time.perf_counter() - began), flush=True)
        curves[window] = percent(counts)
    if args.picture:
        draw(curves, ends, args.picture)


if __name__ == "__main__":
    main()
