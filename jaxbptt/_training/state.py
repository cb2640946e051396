"""The state that a learner carries from step to step, the cotangents of a group among it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import keystr, tree_flatten_with_path

from jaxbptt import _errors
from jaxbptt._arrays import as_strong_arrays, where_or_zero, widened, zeros
from jaxbptt._transforms.tape import Tape, phase_of, settings_of
from jaxbptt._types import LeafType, PyTree, TreeType, leaf_type, type_of


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
            of y an array (rows, *y.shape), a ring in which step i of the group, from 0, has
            row i mod rows.
        loss: the sum of the group's losses, a scalar.
        ct_params: the sum of what the losses themselves have as a gradient by params, for each
            differentiable leaf of params; empty where the loss doesn't take params.
    """

    ct_ys: list[jax.Array]
    loss: jax.Array
    ct_params: list[jax.Array]

    @classmethod
    def empty(
        cls, tape: Tape, ct_y: list[LeafType], loss: LeafType, ct_params: list[LeafType]
    ) -> "Pending":
        """Makes room for the cotangents of a group; the others are the types of one step's."""
        # Rows that the window doesn't reach would never be read.
        rows = pending_rows(tape)
        stacks = [leaf.stacked(rows) for leaf in ct_y]
        # Half precisions are added up in float32.
        sums = [widened(zeros(leaf)) for leaf in ct_params]
        return cls([zeros(stack) for stack in stacks], zeros(loss), sums)

    def with_step(
        self, tape: Tape, ct_y: list, loss: jax.Array, ct_params: list[jax.Array]
    ) -> "Pending":
        """Adds the newest step on the tape; a group's first step overwrites the last group."""
        # If the window is shorter than the group, its last steps overwrite its first.
        first, row = phase_of(tape) == 1, (phase_of(tape) - 1) % pending_rows(tape)
        ct_ys = [
            lax.dynamic_update_index_in_dim(stack, ct, row, 0)
            for stack, ct in zip(self.ct_ys, ct_y, strict=True)
        ]

        def added(total: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(first, new.astype(total.dtype), total + new.astype(total.dtype))

        ct_params = [added(*pair) for pair in zip(self.ct_params, ct_params, strict=True)]
        return Pending(ct_ys, added(self.loss, loss), ct_params)

    def newest_last(self, tape: Tape, *, full: bool) -> list[jax.Array]:
        """ȳ of the group that ends at the newest step, with zeros for steps before the group.

        Args:
            tape: the tape.
            full: whether the group is known to have `every` steps.
        """
        rows = pending_rows(tape)
        steps = settings_of(tape).every if full else phase_of(tape)
        # The newest step's row comes last: where the group is shorter than the ring, rows that the
        # last group left are in front, and are masked.
        ordered = [jnp.roll(stack, -steps % rows, 0) for stack in self.ct_ys]
        if full:
            return ordered
        ours = jnp.arange(rows, dtype=jnp.int32) >= rows - steps

        def masked(stack: jax.Array) -> jax.Array:
            return where_or_zero(ours.reshape(-1, *[1] * (stack.ndim - 1)), stack)

        return list(map(masked, ordered))

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


def check_pending(given: Any, made: PyTree) -> None:
    """Refuses pending cotangents that are not of the type that `init` made.

    Raises:
        ValueError: they are of another learner, or something was computed with them.
    """
    _errors.same_type(
        "state.pending must be of the type that init made",
        "state.pending",
        type_of(made),
        type_of(as_strong_arrays(given, "state.pending")),
        "Hand a state on as it came; begin a new group with learner.clear(state).",
    )


def check_returned_carry(carry: PyTree, returned: PyTree) -> None:
    """Refuses a carry of another type than the step was given."""
    came, went = type_of(carry), type_of(returned)
    _errors.same_type(
        "step must return a carry of the type it was given",
        "carry",
        came,
        went,
        "Return it in the containers, shapes and dtypes that it came in"
        f"{_errors.cast(came, went)}.",
        words=("in", "out"),
        error=TypeError,
    )


def check_same_dtypes(carry: PyTree, on_tape: PyTree) -> None:
    """Refuses a carry of other containers or dtypes; another batch is another shape."""
    expected, got = type_of(on_tape), type_of(carry)
    # Shapes are taken from what came: an evaluation may have a batch of another size.
    if len(expected.leaves) == len(got.leaves):
        pairs = zip(expected.leaves, got.leaves, strict=True)
        leaves = tuple(LeafType(came.shape, made.dtype) for made, came in pairs)
        expected = TreeType(expected.treedef, leaves)
    _errors.same_type(
        "carry must have the containers and dtypes of the carry on the tape",
        "carry",
        expected,
        got,
        f"Make it like the one given to init{_errors.cast(expected, got)}.",
    )


def check_steps(xs: PyTree) -> None:
    """Refuses inputs without an axis over steps, the same in all leaves.

    Raises:
        ValueError: a leaf has none, or one of another length; or there are no leaves.
    """
    leaves = tree_flatten_with_path(xs)[0]
    # A scalar has no first axis, and shows as the length ().
    lengths = {leaf.shape[:1] for _, leaf in leaves}
    if len(lengths) == 1 and lengths != {()}:
        return
    rows = [f"xs{keystr(path)}: {leaf_type(leaf)}" for path, leaf in leaves] or ["xs: no leaves"]
    raise ValueError(
        "xs must be inputs of several steps, with an axis over steps in front, the same in all "
        f"leaves, but got\n{_errors.bullets(rows)}\nStack the inputs, e.g. jnp.stack(inputs); of a "
        "single one x: jax.tree.map(lambda v: v[None], x)."
    )


def check_state(state: Any) -> None:
    """Refuses a state that is no `LearnerState`, or whose step is no count."""
    if not isinstance(state, LearnerState):
        raise ValueError(
            "state must be the LearnerState that init or the last update returned, but got "
            f"{_errors.describe(state)}. Make one with learner.init(params, carry, x)."
        )
    if not jnp.issubdtype(jnp.result_type(state.step), jnp.integer):
        raise ValueError(
            "state.step must be an integer, the number of inputs that were taken, but got "
            f"{_errors.describe(state.step)}. Hand a state on as it came."
        )
    leaves = jax.tree.leaves(state)
    if any(isinstance(v, jax.Array) and _is_used_up(v) for v in leaves):
        raise ValueError(
            "state must be one that is still there, but run has taken its memory: it trains in "
            "place. Go on with the state that run returned, or give it a copy: "
            "jax.tree.map(jnp.copy, state)."
        )


def _is_used_up(array: jax.Array) -> bool:
    return not isinstance(array, jax.core.Tracer) and array.is_deleted()


def check_one_state(state: "LearnerState") -> None:
    """Refuses the states of several learners where one loop trains one."""
    if jnp.ndim(state.step):
        raise ValueError(
            "state must be that of one learner, but holds those of several (its step is of shape "
            f"{jnp.shape(state.step)}). Train them by jax.vmap over a lax.scan of update."
        )
