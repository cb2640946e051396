"""The loss of one step: its value, what goes along with it, and the cotangent of y it gives."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbptt import _errors
from jaxbptt._arrays import as_strong_arrays
from jaxbptt._closure.closure import combine, pick
from jaxbptt._closure.pullbacks import Mask
from jaxbptt._types import PyTree, type_of


class Judged(NamedTuple):
    """A step's output, judged by the loss.

    Attributes:
        loss: a floating-point scalar.
        aux: what the loss returned beside it, or None.
        ct_y: ȳ = ∂loss/∂y, a list of the differentiable leaves alone.
    """

    loss: jax.Array
    aux: PyTree
    ct_y: list[jax.Array]


def evaluate(loss: Callable, y: PyTree, x: PyTree) -> tuple[jax.Array, PyTree]:
    """The loss and its aux.

    Raises:
        TypeError: the loss returns something else than a floating-point scalar, alone or
            first in a pair.
    """
    returned, aux = loss(y, x), None
    if isinstance(returned, tuple | list) and len(returned) == 2:
        returned, aux = returned
    alone = jax.tree_util.treedef_is_leaf(jax.tree.structure(returned))
    try:
        value = as_strong_arrays(returned, "loss", blame="step") if alone else None
    except TypeError:  # a message of its own, which knows that it is about the loss
        value = None
    if value is None or value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
        raise _not_a_loss(returned)
    return value, as_strong_arrays(aux, "aux", blame="step")


def judge(loss: Callable, y: PyTree, x: PyTree) -> Judged:
    """The loss of a canonical y, and its derivative.

    Raises:
        TypeError: as `evaluate`.
    """
    leaves, treedef = jax.tree.flatten(y)
    mask = differentiable(y)

    def of(moving: list) -> tuple[jax.Array, PyTree]:
        full = combine(mask, moving, pick(mask, leaves, False))
        return evaluate(loss, jax.tree.unflatten(treedef, full), x)

    value, pull, aux = jax.vjp(of, pick(mask, leaves), has_aux=True)
    (ct_y,) = pull(jnp.ones_like(value))
    return Judged(value, aux, ct_y)


def differentiable(tree: PyTree) -> Mask:
    """Of each leaf, whether gradients can flow through it."""
    return tuple(leaf.differentiable for leaf in type_of(tree).leaves)


def not_a_function(loss: Any) -> ValueError:
    """The error for something else where the loss belongs."""
    return ValueError(
        "loss must be a function loss(y, x) -> scalar, or -> (scalar, aux), but got "
        f"{_errors.describe(loss)}. Pass it uncalled, e.g. lambda y, x: jnp.mean((y - x[1]) ** 2)."
    )


def _not_a_loss(returned: Any) -> TypeError:
    return TypeError(
        "loss must return a floating-point scalar, or a pair (scalar, aux), but as the scalar it "
        f"returned {_errors.describe(returned)}. Reduce it, e.g. with jnp.mean; several losses: "
        "add them, and return each of them in aux."
    )
