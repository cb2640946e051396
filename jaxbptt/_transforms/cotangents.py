"""Cotangents at the border: checked when they come in, made whole when they go out."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt import _errors
from jaxbptt._arrays import as_strong_arrays, zeros
from jaxbptt._closure.closure import Closure, Layout, combine, pick
from jaxbptt._closure.pullbacks import Mask
from jaxbptt._types import LeafType, PyTree, TreeType, type_of

_FLOAT0 = jax.dtypes.float0


class Cotangents(NamedTuple):
    """What `Recorder.pullback` returns.

    Leaves that no gradient can flow through (integers, booleans, keys) are arrays of
    dtype float0, as `jax.vjp` gives them.

    Attributes:
        params: θ̄, of the structure and shapes of the parameters, summed over the window.
        carry: λ of the carry that entered the oldest step reached; with a window for each
            part, each leaf's λ where it was cut. float0 also for a large part that nothing drives.
        xs: x̄ of each step in the window, leaves (window, *x.shape), oldest first, zero
            where nothing was recorded.
    """

    params: PyTree
    carry: PyTree
    xs: PyTree


def given_ct_ys(closure: Closure, ct_ys: PyTree, window: int) -> tuple[int, list]:
    """How many steps `ct_ys` is for, and its differentiable leaves, each (rows, *y.shape)."""
    ct_ys = as_strong_arrays(ct_ys, "ct_ys")
    rows = _errors.rows_of(type_of(ct_ys), window)
    y = type_of(closure.layout.outputs.tree()[1])
    ct_ys = _with_float0_for_none(ct_ys, y, (rows,))
    lead = "of y, with an axis over steps in front"
    return rows, _checked(closure.layout.followed_y, y, ct_ys, "ct_ys", lead, (rows,))


def given_ct_carry(closure: Closure, carry: PyTree, ct_carry: PyTree) -> list:
    """The differentiable leaves of `ct_carry`, which may be None for zero."""
    if ct_carry is None:
        return [zeros(kind) for kind in closure.kinds.carry]
    ct_carry = as_strong_arrays(ct_carry, "ct_carry")
    ct_carry = _with_float0_for_none(ct_carry, type_of(carry), ())
    followed = closure.layout.followed.carry
    return _checked(followed, type_of(carry), ct_carry, "ct_carry", "of the carry")


def with_float0(mask: Mask, cts: list, primal: PyTree, rows: tuple[int, ...] = ()) -> PyTree:
    """Cotangents in the structure of `primal`, float0 where nothing can flow."""
    leaves, treedef = jax.tree.flatten(primal)
    empty = [np.zeros((*rows, *leaf.shape), _FLOAT0) for leaf in pick(mask, leaves, False)]
    return jax.tree.unflatten(treedef, combine(mask, cts, empty))


def _with_float0_for_none(ct: PyTree, primal: TreeType, rows: tuple[int, ...]) -> PyTree:
    """The cotangent with float0 arrays where it has None for a leaf without a gradient."""
    try:
        # None has no leaves: the tree is taken apart at the places where y, or the carry, has its
        # own.
        parts = primal.treedef.flatten_up_to(ct)
    except (TypeError, ValueError):
        return ct  # what is wrong with it is said when it is checked
    filled = [
        np.zeros((*rows, *kind.shape), _FLOAT0)
        if part is None and not kind.differentiable
        else part
        for part, kind in zip(parts, primal.leaves, strict=True)
    ]
    return jax.tree.unflatten(primal.treedef, filled)


def _checked(
    followed: Mask, primal: TreeType, ct: PyTree, name: str, of: str, rows: Sequence[int] = ()
) -> list:
    """The leaves that are followed."""
    expected = tuple(
        LeafType((*rows, *leaf.shape), leaf.dtype if leaf.differentiable else _FLOAT0)
        for leaf in primal.leaves
    )
    remedy = f"Cast or reshape {name}."
    if any(leaf.dtype == _FLOAT0 for leaf in expected):
        remedy += (
            " Integers, booleans and keys take None, or numpy.zeros(shape, jax.dtypes.float0)."
        )
    _errors.same_type(
        f"{name} must have the structure, shapes and dtypes {of}",
        name,
        TreeType(primal.treedef, expected),
        type_of(ct),
        remedy,
    )
    return pick(followed, jax.tree.leaves(ct))


def is_scalar(leaf: LeafType) -> bool:
    """Whether a y of this type can be a loss."""
    return leaf.shape == () and leaf.differentiable


def value_and_ct_y(loss: Callable[[PyTree], Any], y: PyTree) -> tuple[tuple[Any, Any], PyTree]:
    """((the scalar, what the loss returned), ȳ with float0 where nothing can flow).

    Raises:
        TypeError: the loss returns neither a floating-point scalar nor a pair that begins with one.
    """

    def scalar(y: PyTree) -> tuple[jax.Array, Any]:
        returned = loss(y)
        # A pair is the loss and what it tells besides, as `has_aux` of `jax.value_and_grad` has it.
        pair = isinstance(returned, tuple | list) and len(returned) == 2
        value = as_strong_arrays(returned[0] if pair else returned, "loss(y)", blame="loss")
        leaves = type_of(value).leaves
        if len(leaves) != 1 or leaves[0].shape or not jnp.issubdtype(leaves[0].dtype, jnp.floating):
            raise TypeError(
                "loss must return a floating-point scalar, or a pair (scalar, aux), but as the "
                f"scalar it returned {_errors.describe(returned[0] if pair else returned)}. "
                "Reduce it, e.g. with jnp.mean."
            )
        (value,) = jax.tree.leaves(value)
        return value, (value, returned[1]) if pair else value

    # y may have integers among its leaves, of which the cotangent is float0.
    with_ct = jax.value_and_grad(scalar, has_aux=True, allow_int=True)
    (value, returned), ct_y = with_ct(y)
    return (value, returned), ct_y


# ------------------------------------------------------------ what a `custom_vjp` rule is given


def _is_primal(value: Any) -> bool:
    return isinstance(value, jax.custom_derivatives.CustomVJPPrimal)


def primal_values(args: PyTree) -> PyTree:
    """The values of what the forward rule is given, which says of each whether it is perturbed."""
    return jax.tree.map(lambda v: v.value, args, is_leaf=_is_primal)


def without_symbolic(cts: list, kinds: list) -> list:
    """Cotangents with arrays of zeros where nobody asked for the gradient."""
    return [zeros(k) if is_symbolic_zero(v) else v for v, k in zip(cts, kinds, strict=True)]


def with_none(followed: Mask, cts: list) -> list:
    """The cotangents of all leaves, None for those that gradients do not flow through."""
    return combine(followed, cts, [None] * (len(followed) - len(cts)))


def is_symbolic_zero(ct: Any) -> bool:
    """Whether nobody asked for the gradient of an output."""
    return isinstance(ct, jax.custom_derivatives.SymbolicZero)


def refuse_what_is_not_followed(layout: Layout, closed_over: Sequence, x: Sequence) -> None:
    """Refuses to differentiate by constants, and by what the step has no derivative by.

    Args:
        layout: what is known of the step.
        closed_over: what it closes over, each with `value` and `perturbed`, as a `custom_vjp` gives
            its arguments with symbolic zeros.
        x: the same for the leaves of x.
    """
    for i, (constant, given) in enumerate(zip(layout.constants, closed_over, strict=True)):
        if given.perturbed and constant is not None:
            raise _errors.constant_differentiated(i, given.value)
    for name, followed, group in (
        ("an array that the step closes over", layout.followed.closed_over, closed_over),
        ("a leaf of x", layout.followed.x, x),
    ):
        missed = [v.perturbed and not f for v, f in zip(group, followed, strict=True)]
        if any(missed):
            raise ValueError(
                "step must have a derivative with respect to what it is differentiated by, but has "
                f"none with respect to {name} (number {missed.index(True)}): a loop whose number "
                "of trips is not fixed, a callback or a rule of its own is on the way. Take that "
                "out of the way, or pass jax.lax.stop_gradient of the array."
            )
