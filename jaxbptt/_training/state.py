"""The state that a learner carries from step to step, the cotangents of a group among it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbptt import _errors
from jaxbptt._arrays import zeros
from jaxbptt._transforms.tape import Tape, phase_of, settings_of
from jaxbptt._types import LeafType, PyTree


class Metrics(NamedTuple):
    """What an update reports of its step.

    Attributes:
        loss: floating-point scalar, the loss of this step under the parameters before the update.
        aux: what the loss returned beside it; None if nothing.
        updated: bool scalar, whether the optimiser was stepped.
    """

    loss: jax.Array
    aux: PyTree
    updated: jax.Array


class Pending(NamedTuple):
    """The cotangents and the loss of a group of `every` steps, as far as it has come.

    Attributes:
        ct_ys: ȳ of the last min(every, window) steps of the group: for each differentiable leaf
            of y an array (rows, *y.shape), oldest first.
        loss: the sum of the group's losses, a scalar.
    """

    ct_ys: list[jax.Array]
    loss: jax.Array

    @classmethod
    def empty(cls, tape: Tape, ct_y: list[LeafType], loss: LeafType) -> "Pending":
        """Makes room for the cotangents of a group; `ct_y` and `loss` are the types of a step."""
        # Rows that the window doesn't reach would never be read.
        rows = pending_rows(tape)
        stacks = [leaf.stacked(rows) for leaf in ct_y]
        return cls([zeros(stack) for stack in stacks], zeros(loss))

    def with_step(self, tape: Tape, ct_y: list, loss: jax.Array) -> "Pending":
        """Adds the newest step on the tape; a group's first step overwrites the last group."""
        # If the window is shorter than the group, the group's first steps have no row of their
        # own. They are written to row 0, which a later step overwrites before it is read.
        row = jnp.maximum(phase_of(tape) - 1 - (settings_of(tape).every - pending_rows(tape)), 0)
        ct_ys = [
            lax.dynamic_update_index_in_dim(stack, ct, row, 0)
            for stack, ct in zip(self.ct_ys, ct_y, strict=True)
        ]
        return Pending(ct_ys, jnp.where(phase_of(tape) == 1, loss, self.loss + loss))

    def cleared(self) -> "Pending":
        """Returns the same with zeros in it."""
        return jax.tree.map(jnp.zeros_like, self)


class LearnerState(NamedTuple):
    """All that a learner carries from step to step: a pytree whose types never change.

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


def pending_rows(tape: Tape) -> int:
    """How many steps of a group have outputs that the window reaches."""
    return min(settings_of(tape).every, settings_of(tape).window)


def check_state(state: Any) -> None:
    """Refuses a state that is no `LearnerState`."""
    if not isinstance(state, LearnerState):
        raise ValueError(
            "state must be the LearnerState that init or the last update returned, but got "
            f"{_errors.describe(state)}. Make one with learner.init(params, carry, x)."
        )
