"""Runs what names the axis of a `vmap` where that axis is out of sight.

JAX calls the rules of a `custom_vjp` while it differentiates. If `jax.grad` stands outside of a
`vmap` with an `axis_name`, that is when the mapped function is over: a collective in what
the rules trace would name an axis that nobody knows.

What a rule computes is meant for each row of the map. Where JAX sees an array that is the same
in all rows (a sum over them is), it takes its cotangent for that of all rows together, and
a collective would count it once more for each row. So what goes into the rules and comes
out of them is made to look as if it were another in each row.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from jax import lax
from jax.extend import core

from jaxbptt._arrays import is_inexact
from jaxbptt._compat import call_with_rule, varying, with_axes
from jaxbptt._jaxprs.evaluate import inner_jaxprs
from jaxbptt._types import PyTree

Axes = tuple[tuple[Any, int], ...]  # names and sizes


def axes_in_sight(eqns: Iterable[core.JaxprEqn]) -> Axes:
    """The mapped axes that equations name, to run them with later."""
    # Looked up while the step is traced, where the map that has these axes still encloses it.
    names = dict.fromkeys(_named(eqns))
    return tuple((name, lax.axis_size(name)) for name in names if _is_in_sight(name))


def _named(eqns: Iterable[core.JaxprEqn]) -> Iterator[Any]:
    for eqn in eqns:
        for key in ("axis_name", "axes"):  # not all collectives say so in their effects
            names = eqn.params.get(key, ())
            # The axes of other primitives are numbers.
            names = names if isinstance(names, tuple | list) else (names,)
            yield from (name for name in names if not isinstance(name, int))
        for inner in inner_jaxprs(eqn):
            yield from _named(inner.eqns)


def _is_in_sight(name: Any) -> bool:
    try:
        lax.axis_size(name)
    except (NameError, TypeError):
        return False
    return True


def with_rule(run: Callable, forward: Callable, backward: Callable, axes: Axes) -> Callable:
    """A function with a derivative of its own, whose rules find these axes in sight.

    Args:
        run: the function.
        forward: of the same arguments, each leaf with a `value` and whether it is `perturbed`:
            what `run` returns, and what `backward` needs.
        backward: from that and the cotangents, some of them symbolic zeros, to those of
            the arguments.
        axes: the mapped axes that the rules name.
    """
    ruled = jax.custom_vjp(run)
    ruled.defvjp(
        lambda *args: _in_sight(axes, lambda: forward(*args)),
        lambda saved, cts: _in_sight(axes, lambda: backward(saved, cts)),
        symbolic_zeros=True,
    )
    return functools.partial(call_with_rule, ruled)


def _in_sight(axes: Axes, function: Callable[[], PyTree]) -> PyTree:
    """What a function returns, which may close over arrays, with all these axes in sight."""
    # Differentiated inside of the map, its axes are in sight as they are.
    missing = [(name, size) for name, size in axes if not _is_in_sight(name)]
    return with_axes(missing, function) if missing else function()


def as_mapped(axes: Axes, tree: PyTree) -> PyTree:
    """The same arrays, which JAX takes for others in each row of the mapped axes."""
    for name, _ in axes:
        # Whatever depends on the index of the row counts as different in each.
        index = lax.axis_index(name)
        if not varying(jax.typeof(index)):  # else it is an axis of a mesh, of which types tell
            tree = jax.tree.map(lambda v, i=index: _either(i < 0, v), tree)
    return tree


def _either(which: jax.Array, value: jax.Array) -> jax.Array:
    return lax.select_n(which, value, value) if is_inexact(value.dtype) else value
