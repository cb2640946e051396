"""What the tests of the learner share: SGD, runs with its metrics, a loss of any output."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from jax import lax

RATE, DECAY = 0.1, 0.5


class Optimizer(NamedTuple):
    """Of optax's form: the library needs no more of it."""

    init: Any
    update: Any


def momentum(rate: Any = RATE, decay: float = DECAY) -> Optimizer:
    """SGD with momentum."""

    def update(grads, state, params=None):
        state = jax.tree.map(lambda m, g: decay * m + g, state, grads)
        return jax.tree.map(lambda m: -rate * m, state), state

    return Optimizer(lambda params: jax.tree.map(jnp.zeros_like, params), update)


# -------------------------------------------------------------------- losses


def wave(y: Any, x: Any) -> jax.Array:
    """A loss of any y; it takes x too."""
    del x
    parts = [jnp.mean(jnp.sin(jnp.real(v)) + jnp.imag(v) ** 2) for v in oracles.moving(y)]
    return sum(parts, jnp.zeros(()))


@functools.cache
def forward(step: Any, loss: Any) -> Any:
    """One step by hand, compiled: (params, carry, x) to (carry, its loss, the cotangent of y)."""

    @jax.jit
    def one(params, carry, x):
        carry, y = step(params, carry, x)
        of_leaves = jax.value_and_grad(lambda leaves: loss(oracles.refill(y, leaves), x))
        return carry, *of_leaves(oracles.moving(y))

    return one


# ---------------------------------------------------------------------- runs


def scanned(learner: Any) -> Any:
    """The loop over inputs, compiled: from a state to the last one and the metrics of each."""
    return jax.jit(lambda state, xs: lax.scan(learner.update, state, xs))


def steps(update: Any, state: Any, xs: Any) -> tuple[Any, Any]:
    """One step after the other: the last state and the metrics of each."""
    metrics = []
    for x in xs:
        state, one = update(state, x)
        metrics.append(one)
    return state, jax.tree.map(lambda *leaves: np.stack(leaves), *metrics)


def all_states(learner: Any, case: Any, xs: Any) -> tuple[Any, list, list]:
    """A run from the start, in one program.

    Args:
        learner: made of `case.step`.
        case: one of the zoo.
        xs: inputs with an axis over steps.

    Returns:
        The last state, and of each step the parameters after it and its metrics.
    """

    @jax.jit
    def go(params, carry, x, xs):
        def one(state, x):
            state, metrics = learner.update(state, x)
            return state, (state.params, metrics)

        return lax.scan(one, learner.init(params, carry, x), xs)

    state, (params, metrics) = go(case.params, case.carry, case.x(), xs)
    length = len(metrics.loss)
    return state, oracles.unstack(params, length), oracles.unstack(metrics, length)


def avals(tree: Any) -> list:
    """The types of the leaves, weak ones among them."""
    return [jax.typeof(leaf) for leaf in jax.tree.leaves(tree)]
