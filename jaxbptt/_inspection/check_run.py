"""The run that a check looks at: recorded, with a copy of params and carry for each step."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt._compat import lax_scan
from jaxbptt._transforms.record import Recorder, record
from jaxbptt._types import PyTree


@dataclasses.dataclass(frozen=True)
class Window:
    """The last n steps of a run.

    Attributes:
        params: the parameters of all steps.
        carry: the carry that enters the oldest step.
        xs: inputs, leaves (n, *x.shape).
        length: n.
        outputs: the moving leaves of the newest carry and y.
        cts: their cotangents.
    """

    params: PyTree
    carry: PyTree
    xs: PyTree
    length: int
    outputs: list
    cts: list

    @property
    def x(self) -> PyTree:
        """One input."""
        return jax.tree.map(lambda leaf: leaf[0], self.xs)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What the recorder gave for a window of n steps.

    Attributes:
        window: the steps.
        rows: cotangents of the moving leaves of params, carry and x, each (n, ...).
        total: cotangents of the moving leaves of params over the whole window.
    """

    window: Window
    rows: list
    total: list


def recorded_run(
    step: Callable,
    params: PyTree,
    carry: PyTree,
    xs: PyTree,
    length: int,
    window: int,
    weights: str,
) -> tuple[Recorded, PyTree, PyTree]:
    """Records the run twice: as it is, and with a copy of params and carry in every x."""
    n = min(window, length)
    shapes = jax.eval_shape(step, params, carry, row(xs, 0))
    ct_carry, ct_y = _cotangents(shapes)
    zeros = [jnp.zeros_like(leaf) for leaf in moving(carry)]

    def copied(_: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        theta, probes, x = x
        return step(theta, added(carry, probes), x)

    def pull(rec: Recorder, theta: PyTree, carry: PyTree, xs: PyTree, wrap: Callable) -> Any:
        tape = rec.init(theta, carry, wrap(row(xs, 0)))

        def one(tape: Any, x: PyTree) -> Any:
            tape, y = rec(theta, tape, wrap(x))
            return tape, (tape.carry, y)

        tape, outs = lax_scan(one, tape, xs, length=length)
        rows = jax.tree.map(lambda leaf: leaf[None], ct_y)
        return rec.pullback(theta, tape, rows, ct_carry), outs

    @jax.jit
    def both(params: PyTree, carry: PyTree, xs: PyTree) -> Any:
        by_lag = record(copied, window=window)
        whole = record(step, window=window, weights=weights)
        ct, outs = pull(by_lag, (), carry, xs, lambda x: (params, zeros, x))
        total, _ = pull(whole, params, carry, xs, lambda x: x)
        return [leaf[window - n :] for leaf in moving(ct.xs)], moving(total.params), outs

    rows, total, (carries, ys) = both(params, carry, xs)
    last = Window(
        params,
        row(carries, length - n - 1) if length > n else carry,
        jax.tree.map(lambda leaf: leaf[length - n :], xs),
        n,
        moving(row((carries, ys), length - 1)),
        [np.asarray(ct).astype(np.complex128) for ct in moving((ct_carry, ct_y))],
    )
    return Recorded(last, rows, total), carries, ys


def _cotangents(shapes: PyTree) -> PyTree:
    """Normal numbers, and float0 where nothing can flow."""
    rng = np.random.default_rng(0)

    def one(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return np.zeros(leaf.shape, jax.dtypes.float0)
        value = rng.normal(size=leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            value = value + 1j * rng.normal(size=leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    return jax.tree.map(one, shapes)


def row(xs: PyTree, index: int) -> PyTree:
    """One step's tree out of a stack of them."""
    return jax.tree.map(lambda leaf: leaf[index], xs)


def moving(tree: PyTree) -> list:
    """The leaves that gradients can flow through."""
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def refill(tree: PyTree, values: Iterable) -> PyTree:
    """The tree with other values in its moving leaves."""
    values = iter(values)

    def one(leaf: Any) -> Any:
        return next(values) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf

    return jax.tree.map(one, tree)


def added(carry: PyTree, values: Iterable) -> PyTree:
    """The tree with something added to each moving leaf."""
    values = iter(values)
    return refill(carry, [leaf + next(values) for leaf in moving(carry)])
