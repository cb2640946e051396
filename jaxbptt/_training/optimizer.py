"""An optimiser of optax's form: started and stepped, its state kept of one type."""

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
    """What an `optax.GradientTransformation` is: two functions."""

    @property
    def init(self) -> Any:
        """`init(params)`: a state."""

    @property
    def update(self) -> Any:
        """`update(grads, state, params)`: changes to be added to the parameters, and a state."""


def check(optimizer: Any) -> None:
    """Refuses something else where the optimiser belongs."""
    if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        remedy = "Pass one, e.g. optax.adam(1e-3)."
        if callable(optimizer):
            remedy = "Call it, with its learning rate: e.g. optax.adam(1e-3)."
        raise ValueError(
            "optimizer must be an optax.GradientTransformation, with init and update, but got "
            f"{_errors.describe(optimizer)}. {remedy}"
        )


def trainable(tree: PyTree) -> PyTree:
    """The tree with None where no gradient can flow, which is all that an optimiser sees."""
    return jax.tree.map(lambda leaf: leaf if leaf_type(leaf).differentiable else None, tree)


def start(optimizer: Optimizer, params: PyTree) -> OptState:
    """The optimiser's first state. It is copied: some keep the parameters themselves."""
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(trainable(params))
    return jax.tree.map(jnp.copy, as_strong_arrays(state, "opt_state", blame="step"))


def advance(
    optimizer: Optimizer, grads: PyTree, state: OptState, params: PyTree, value: jax.Array
) -> tuple[PyTree, OptState]:
    """One step of the optimiser: (parameters, state), of the types they had.

    Args:
        optimizer: the optimiser. `value` is passed on if its update takes it.
        grads: the gradient, of the structure that `trainable` gives.
        state: the optimiser's state.
        params: the parameters.
        value: the loss that the gradient belongs to.

    Raises:
        TypeError: the optimiser returns changes or a state of another type.
    """
    extra = {"value": value} if _takes_value(optimizer.update) else {}
    # Of its integer counts and float schedules optax makes products, which strict
    # promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        changes, new_state = optimizer.update(grads, state, trainable(params), **extra)
        changes, new_state = (
            as_strong_arrays(changes, "changes", blame="step"),
            as_strong_arrays(new_state, "opt_state", blame="step"),
        )
        _check_changes(grads, changes)
        new_params = _moved(params, changes)
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


def _moved(params: PyTree, changes: PyTree) -> PyTree:
    rest = iter(jax.tree.leaves(changes))
    return jax.tree.map(
        lambda leaf: (
            (leaf + next(rest)).astype(leaf.dtype) if leaf_type(leaf).differentiable else leaf
        ),
        params,
    )


def _takes_value(update: Any) -> bool:
    try:
        parameters = inspect.signature(update).parameters
    except (TypeError, ValueError):  # it has no signature to read
        return False
    var = inspect.Parameter.VAR_KEYWORD
    return "value" in parameters or any(p.kind == var for p in parameters.values())


def _check_changes(grads: PyTree, changes: PyTree) -> None:
    """Refuses changes of another structure or shape; of another dtype they may be."""
    wanted, came = type_of(grads), type_of(changes)
    if len(wanted.leaves) == len(came.leaves):
        pairs = zip(wanted.leaves, came.leaves, strict=True)
        leaves = tuple(dataclasses.replace(c, dtype=w.dtype) for w, c in pairs)
        came = TreeType(came.treedef, leaves)
    _errors.same_type(
        "optimizer must return a change for each parameter, in the structure of the gradient",
        "changes",
        wanted,
        came,
        "Take one that maps gradients to changes leaf by leaf.",
        error=TypeError,
    )
