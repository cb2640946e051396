"""Starts and steps an optimiser of optax's form, and keeps its state at one type."""

import dataclasses
import inspect
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from jaxbptt import _errors
from jaxbptt._arrays import as_strong_arrays
from jaxbptt._types import PyTree, TreeType, leaf_type, type_of

OptState: TypeAlias = PyTree


class Optimizer(Protocol):
    """A pair of functions, as an `optax.GradientTransformation` is."""

    @property
    def init(self) -> Any:
        """`init(params)` returns a state."""

    @property
    def update(self) -> Any:
        """`update(grads, state, params)` returns changes to add to params, and a state."""


def check_optimizer(optimizer: Any) -> None:
    """Refuses an optimiser without `init` and `update`."""
    if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        remedy = "Pass one, e.g. optax.adam(1e-3)."
        if callable(optimizer):
            remedy = "Call it, with its learning rate: e.g. optax.adam(1e-3)."
        raise ValueError(
            "optimizer must be an optax.GradientTransformation, with init and update, but got "
            f"{_errors.describe(optimizer)}. {remedy}"
        )


def trainable(tree: PyTree) -> PyTree:
    """Replaces the leaves that no gradient flows through by None, as the optimiser sees them."""
    return jax.tree.map(lambda leaf: leaf if leaf_type(leaf).differentiable else None, tree)


def init_opt_state(optimizer: Optimizer, params: PyTree) -> OptState:
    """Returns the optimiser's first state, copied: some optimisers keep params in it."""
    # Strict promotion, if the user has set it, is for the step; optax is not written for it.
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(trainable(params))
    return jax.tree.map(jnp.copy, as_strong_arrays(state, "opt_state", blame="step"))


def step_optimizer(
    optimizer: Optimizer, grads: PyTree, state: OptState, params: PyTree, loss: jax.Array
) -> tuple[PyTree, OptState]:
    """Takes one step of the optimiser.

    It does by hand what `optax.with_extra_args_support` and `optax.apply_updates` do: optax
    need not be installed, and an optimiser need not be of optax's class to take `value`.

    Args:
        optimizer: the optimiser.
        grads: the gradient, in the structure that `trainable` gives.
        state: the optimiser's state.
        params: the parameters.
        loss: the loss that the gradient belongs to, passed on as `value` if its update takes it.

    Returns:
        New parameters and a new state, of the types of the old ones.

    Raises:
        TypeError: the optimiser returns changes or a state of another type.
    """
    # An optimiser that lowers its rate on a plateau asks for the loss.
    extra = {"value": loss} if _takes_value(optimizer.update) else {}
    # optax multiplies integer counts and float schedules, which strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        changes, new_state = optimizer.update(grads, state, trainable(params), **extra)
        changes = as_strong_arrays(changes, "changes", blame="step")
        new_state = as_strong_arrays(new_state, "opt_state", blame="step")
        _check_changes(grads, changes)
        new_params = apply_updates(params, changes)
    _errors.same_type(
        "optimizer must return a state of the type it was given",
        "opt_state",
        type_of(state),
        type_of(new_state),
        "Let its update keep the containers, shapes and dtypes that its init made.",
        words=("in", "out"),
        error=TypeError,
    )
    return new_params, new_state


def apply_updates(params: PyTree, changes: PyTree) -> PyTree:
    """Adds changes to params, whose dtypes stay; a change of None leaves a leaf as it is."""

    def add(leaf: jax.Array, change: jax.Array | None) -> jax.Array:
        # As optax does: the sum may be wider than a half-precision parameter.
        return leaf if change is None else (leaf + change).astype(leaf.dtype)

    return jax.tree.map(add, params, changes)


def _takes_value(update: Any) -> bool:
    try:
        parameters = inspect.signature(update).parameters
    except (TypeError, ValueError):  # some callables have no signature
        return False
    var = inspect.Parameter.VAR_KEYWORD
    return "value" in parameters or any(p.kind == var for p in parameters.values())


def _check_changes(grads: PyTree, changes: PyTree) -> None:
    """Refuses changes of another structure or shape than the gradient's; dtypes may differ."""
    expected, got = type_of(grads), type_of(changes)
    # The comparison is of dtypes too, so the changes are given those of the gradient.
    if len(expected.leaves) == len(got.leaves):
        pairs = zip(expected.leaves, got.leaves, strict=True)
        leaves = tuple(dataclasses.replace(g, dtype=e.dtype) for e, g in pairs)
        got = TreeType(got.treedef, leaves)
    _errors.same_type(
        "optimizer must return a change for each parameter, in the structure of the gradient",
        "changes",
        expected,
        got,
        "Take one that maps gradients to changes leaf by leaf.",
        error=TypeError,
    )
