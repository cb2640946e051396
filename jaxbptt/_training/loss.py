"""The loss of one step: its value, its aux, and the cotangent of y."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbptt import _errors
from jaxbptt._arrays import as_strong_arrays
from jaxbptt._types import PyTree


class LossAndCtY(NamedTuple):
    """What the loss of one step gives.

    Attributes:
        loss: a floating-point scalar.
        aux: what the loss returned beside it; None if nothing.
        ct_y: ȳ = ∂loss/∂y, a list over the differentiable leaves of y.
    """

    loss: jax.Array
    aux: PyTree
    ct_y: list[jax.Array]


def evaluate_loss(loss: Callable, y: PyTree, x: PyTree) -> tuple[jax.Array, PyTree]:
    """Calls the loss, and returns its value and its aux as arrays.

    Raises:
        TypeError: the loss doesn't return a floating-point scalar, alone or first in a pair.
    """
    returned, aux = loss(y, x), None
    if isinstance(returned, tuple | list) and len(returned) == 2:
        returned, aux = returned
    # A container or None is refused with the message below, which shows what came.
    is_leaf = jax.tree_util.treedef_is_leaf(jax.tree.structure(returned))
    try:
        value = as_strong_arrays(returned, "loss", blame="step") if is_leaf else None
    except TypeError:  # the message below says that it is about the loss
        value = None
    if value is None or value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
        raise _not_a_loss(returned)
    return value, as_strong_arrays(aux, "aux", blame="step")


def loss_and_ct_y(loss: Callable, y: PyTree, x: PyTree) -> LossAndCtY:
    """Calls the loss and differentiates it with respect to y, whose leaves are strong arrays.

    Raises:
        TypeError: as `evaluate_loss`.
    """
    # allow_int: y may have integers and keys among its leaves. Their cotangents are float0.
    with_ct = jax.value_and_grad(lambda y: evaluate_loss(loss, y, x), has_aux=True, allow_int=True)
    (value, aux), ct_y = with_ct(y)
    cts = [ct for ct in jax.tree.leaves(ct_y) if ct.dtype != jax.dtypes.float0]
    return LossAndCtY(value, aux, cts)


def not_a_function(loss: Any) -> ValueError:
    """The error for a loss that can't be called."""
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
