"""The loss of one step: its value, its aux, and the cotangent of y."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbptt import _errors
from jaxbptt._arrays import as_strong_arrays
from jaxbptt._signatures import takes_more
from jaxbptt._types import PyTree, is_one_leaf


class LossAndCtY(NamedTuple):
    """What the loss of one step gives.

    Attributes:
        loss: a floating-point scalar.
        aux: what the loss returned beside it; None if nothing.
        ct_y: ȳ = ∂loss/∂y, a list over the differentiable leaves of y.
        ct_params: ∂loss/∂params where the loss takes params, a list over their differentiable
            leaves; else empty.
    """

    loss: jax.Array
    aux: PyTree
    ct_y: list[jax.Array]
    ct_params: list[jax.Array]


def takes_params(loss: Callable) -> bool:
    """Whether a loss is `loss(y, x, params)` and not `loss(y, x)`.

    Raises:
        ValueError: it is neither.
    """
    return takes_more(loss, "loss", ("y", "x"), ("y", "x", "params"))


def evaluate_loss(loss: Callable, y: PyTree, x: PyTree, params: PyTree) -> tuple[jax.Array, PyTree]:
    """Calls the loss, and returns its value and its aux as arrays.

    Raises:
        TypeError: the loss doesn't return a floating-point scalar, alone or first in a pair.
    """
    returned, aux = loss(y, x, params) if takes_params(loss) else loss(y, x), None
    if isinstance(returned, tuple | list) and len(returned) == 2:
        returned, aux = returned
    # A container or None is refused with the message below, which shows what came.
    try:
        leaf = returned if is_one_leaf(returned) else None
        value = as_strong_arrays(leaf, "loss", blame="step")
    except TypeError:  # the message below says that it is about the loss
        value = None
    if value is None or value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
        raise _not_a_loss(returned)
    return value, as_strong_arrays(aux, "aux", blame="step")


def loss_and_ct_y(loss: Callable, y: PyTree, x: PyTree, params: PyTree) -> LossAndCtY:
    """Calls the loss and differentiates it with respect to y and to the params that it takes.

    The leaves of y and of params are strong arrays.

    Raises:
        TypeError: as `evaluate_loss`.
    """

    def of(given: tuple[PyTree, PyTree]) -> tuple[jax.Array, PyTree]:
        return evaluate_loss(loss, given[0], x, given[1])

    # allow_int: there may be integers and keys among the leaves. Their cotangents are float0.
    with_ct = jax.value_and_grad(of, has_aux=True, allow_int=True)
    (value, aux), ct = with_ct((y, params if takes_params(loss) else None))
    # Leaves without a gradient drop out, as in all lists of cotangents.
    ct_y, ct_params = (
        [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype != jax.dtypes.float0] for tree in ct
    )
    return LossAndCtY(value, aux, ct_y, ct_params)


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
