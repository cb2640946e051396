"""Runs what names the axis of a `vmap` where that axis is out of sight.

JAX calls the rules of a `custom_vjp` while it differentiates. If `jax.grad` stands outside of a
`vmap` with an `axis_name`, that is when the mapped function is over: a collective
in what the rules trace would name an axis that nobody knows. What is traced already needs no
name in sight, since each of its operations meets the mapped arrays themselves.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax import lax
from jax.extend import core

from jaxbptt._jaxprs.evaluate import Program, named_axes

Axes = tuple[tuple[Any, int], ...]  # names and sizes


def axes_in_sight(effects: Iterable) -> Axes:
    """The axes that a program with these effects names, to run it with later."""
    return tuple((name, lax.axis_size(name)) for name in named_axes(effects))


def run_in_sight(axes: Axes, function: Callable[[], Any]) -> Any:
    """What a function returns, which may close over arrays, with all these axes in sight."""
    missing = [(name, size) for name, size in axes if not _is_in_sight(name)]
    if not missing:
        return function()
    closed: core.ClosedJaxpr
    closed, shapes = jax.make_jaxpr(function, axis_env=missing, return_shape=True)()
    return jax.tree.unflatten(jax.tree.structure(shapes), Program.of(closed)())


def _is_in_sight(name: Any) -> bool:
    try:
        lax.axis_size(name)
    except NameError:
        return False
    return True
