"""What a learner carries from step to step, and how a group's cotangents gather in it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbptt import _errors
from jaxbptt._arrays import zeros
from jaxbptt._transforms.tape import Tape, phase_of, settings_of
from jaxbptt._types import LeafType, PyTree


class Metrics(NamedTuple):
    """What an update tells of its step.

    Attributes:
        loss: floating-point scalar, the loss of this step, before the update.
        aux: what the loss returned beside it; None if nothing.
        updated: bool scalar, whether the optimiser was stepped.
    """

    loss: jax.Array
    aux: PyTree
    updated: jax.Array


class Pending(NamedTuple):
    """What a group of `every` steps has gathered so far.

    Attributes:
        ct_ys: ȳ of the group's last min(every, window) steps: of each differentiable leaf of
            y one array (rows, *y.shape), oldest first.
        loss: the sum of its losses.
    """

    ct_ys: list[jax.Array]
    loss: jax.Array

    @classmethod
    def blank(cls, tape: Tape, ct_y: list[LeafType], loss: LeafType) -> "Pending":
        """Nothing gathered yet."""
        rows = rows_of(tape)
        stacks = [leaf.stacked(rows) for leaf in ct_y]
        return cls([zeros(stack) for stack in stacks], zeros(loss))

    def with_step(self, tape: Tape, ct_y: list, loss: jax.Array) -> "Pending":
        """With the newest step's ȳ and loss; the first of a group overwrites the last group's."""
        # Steps that a window shorter than the group leaves out go to row 0, until the one
        # that belongs there overwrites them.
        row = jnp.maximum(phase_of(tape) - 1 - (settings_of(tape).every - rows_of(tape)), 0)
        ct_ys = [
            lax.dynamic_update_index_in_dim(stack, ct, row, 0)
            for stack, ct in zip(self.ct_ys, ct_y, strict=True)
        ]
        return Pending(ct_ys, jnp.where(phase_of(tape) == 1, loss, self.loss + loss))

    def forgotten(self) -> "Pending":
        """The same with nothing in it."""
        return jax.tree.map(jnp.zeros_like, self)


class LearnerState(NamedTuple):
    """All that a learner carries from step to step: a pytree of fixed types.

    Attributes:
        params: the parameters.
        opt_state: the optimiser's state.
        tape: the `Tape`, with the live carry.
        step: uint32 scalar, how many inputs were taken, modulo 2³²: the position in the data.
        pending: the cotangents that wait for the end of their group; None at `every=1`.
    """

    params: PyTree
    opt_state: PyTree
    tape: Tape
    step: jax.Array
    pending: Pending | None


def rows_of(tape: Tape) -> int:
    """How many of a group's outputs have a gradient within the window."""
    return min(settings_of(tape).every, settings_of(tape).window)


def check_state(state: Any) -> None:
    """Refuses something else where the state belongs."""
    if not isinstance(state, LearnerState):
        raise ValueError(
            "state must be the LearnerState that init or the last update returned, but got "
            f"{_errors.describe(state)}. Make one with learner.init(params, carry, x)."
        )
