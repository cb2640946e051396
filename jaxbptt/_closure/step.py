"""The user's step as a jaxpr, and whether it returns what a step must."""

import operator
from collections.abc import Iterable

import jax
from jax.extend import core

from jaxbptt import _errors
from jaxbptt._arrays import as_strong_arrays
from jaxbptt._jaxprs.evaluate import with_arrays_outside
from jaxbptt._types import PyTree, StepFn, TreeType, is_reference, type_of


def trace_step(
    step: StepFn, params: PyTree, carry: PyTree, x: PyTree, has_aux: bool
) -> tuple[core.ClosedJaxpr, TreeType]:
    """The step as a jaxpr, the arrays it closes over as consts; the type of (carry, y, aux).

    Raises:
        TypeError: the step doesn't return a pair, or not a carry of the type it was given; it
            closes over a mutable reference, or changes its parameters in place.
    """

    def checked(params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        own = own_containers(params, carry, x)
        # Some containers make their leaves anew whenever they are looked at: of those nothing can
        # be told by comparing the leaves before and after.
        before = jax.tree.leaves(own[0])
        steady = all(map(operator.is_, before, jax.tree.leaves(own[0])))
        pair = step(*own)
        if steady:  # else some container makes new leaves whenever it is looked at
            _params_are_left(before, own[0])
        remedy = "Return (carry, None) if there is no output, (carry, (a, b)) if there are several."
        _errors.is_pair(pair, "a pair (carry, y)", remedy)
        new_carry, y = pair
        aux = None
        if has_aux:
            _errors.is_pair(
                y, "y as a pair (y, aux), as has_aux=True says", "Return (carry, (y, aux))."
            )
            y, aux = y
        new_carry = as_strong_arrays(new_carry, "carry", blame="step")
        _errors.same_type(
            "step must return a carry of the type it was given",
            "carry",
            type_of(carry),
            type_of(new_carry),
            "Return it in the containers, shapes and dtypes that it came in"
            f"{_errors.cast(type_of(carry), type_of(new_carry))}.",
            words=("in", "out"),
            error=TypeError,
        )
        y = as_strong_arrays(y, "y", blame="step")
        return new_carry, y, as_strong_arrays(aux, "aux", blame="step")

    # What the step closes over, arrays and tracers alike, JAX hands out as constants.
    closed, shapes = jax.make_jaxpr(checked, return_shape=True)(params, carry, x)
    refuse_references(closed.jaxpr.constvars)
    # Also those that are used in a jitted function alone.
    return with_arrays_outside(closed, jax.tree.leaves((params, carry, x))), type_of(shapes)


def refuse_references(closed_over: Iterable) -> None:
    """Refuses a step that closes over a mutable reference: a pullback can't reach it."""
    for v in filter(is_reference, closed_over):
        raise TypeError(
            f"step must not close over a mutable reference, but closes over one of {v.aval}. Put "
            "its value into the carry, or make the reference inside the step with jax.new_ref."
        )


def own_containers(*trees: PyTree) -> tuple[PyTree, ...]:
    """The same trees for a step to keep: it may write into them, or use up what is read once."""
    return jax.tree.map(lambda leaf: leaf, trees)


def _params_are_left(before: list, after: PyTree) -> None:
    """Refuses a step that changes its parameters in place: what it writes there is lost.

    A flax module does, whose random numbers or batch statistics move on when it is called.
    """
    kept = set(map(id, before))
    new = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_flatten_with_path(after)[0]
        if id(leaf) not in kept
    ]
    if new:
        raise TypeError(
            f"step must leave params as they are, but it changed params{new[0]} in place, which is "
            "lost after the step. Carry what changes: from_nnx or from_linen make such a step of a "
            "flax module with Dropout, BatchNorm or other state; else return it in the carry, or "
            "write into a copy."
        )
