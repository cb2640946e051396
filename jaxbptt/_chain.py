"""The window-composed VJP: the recurrence of λ over the lags and the sum over them.

    λ_{s-1} = (∂c_s/∂c_{s-1})ᵀ λ_s + (∂y_s/∂c_{s-1})ᵀ ȳ_s
    θ̄ = Σ_s (∂c_s/∂θ)ᵀ λ_s + (∂y_s/∂θ)ᵀ ȳ_s

from the newest step backwards. All lists hold differentiable leaves.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbptt._avals import zeros
from jaxbptt._closure import Closure
from jaxbptt._interpret import ZERO, Value


@dataclasses.dataclass(frozen=True)
class Window:
    """The recorded steps that a cotangent meets on its way back.

    Attributes:
        read: from a lag to the residuals of that step; every lag below `steps` can be read.
        fixed: the residuals that are the same in all steps.
        steps: how many lags there are at most (static).
        reach: lags from here on are not reached (may be traced).
    """

    read: Callable[[Any], list]
    fixed: list
    steps: int
    reach: Any


@dataclasses.dataclass(frozen=True)
class WindowCotangents:
    """Flat cotangents of a window: sums for step and params, the last λ, x̄ by lag."""

    step: list
    params: list
    carry: list
    xs: list  # each (steps, *x.shape), or (rows, *x.shape) without the older ones; lag 0 first


def pull_window(
    closure: Closure, window: Window, ct_carry: list, ct_ys: list, rows: int, *, older_xs: bool = True
) -> WindowCotangents:
    """Chains the closures of a window.

    Args:
        closure: the traced step.
        window: the recorded steps.
        ct_carry: c̄, the cotangent of the newest carry.
        ct_ys: ȳ of the last `rows` steps, each leaf (rows, *y.shape), oldest first.
        rows: how many of the newest steps have a ȳ; the older ones only pass λ on.
        older_xs: whether x̄ is wanted of the steps without a ȳ too.
    """
    kinds = {group: closure.cotangents_of(group) for group in ("step", "params", "carry", "x")}
    weights = ("step", "params")

    def trip(state, lag, ct_y):
        lam, sums = state
        live = lag < window.reach
        ct = closure.pull(window.read(lag), window.fixed, lam, ct_y)
        # Selecting what came, rather than zeroing what goes in: a pullback of the
        # user's own need not give zero for zero, and 0·inf is NaN.
        lam = _each(lambda new, old, kind: jnp.where(live, _dense(new, kind), old),
                    ct["carry"], lam, kinds["carry"])
        sums = {g: _each(lambda total, v: _add(total, live, v), sums[g], ct[g]) for g in weights}
        xs = _each(lambda v, kind: _where_or_zero(live, _dense(v, kind)), ct["x"], kinds["x"])
        return (lam, sums), xs if older_xs or ct_y is not None else []

    state = ct_carry, {g: _each(_accumulator, kinds[g]) for g in weights}
    newest_first = [jnp.flip(leaf, 0) for leaf in ct_ys]
    state, xs = lax.scan(
        lambda state, row: trip(state, *row), state, (jnp.arange(rows), newest_first)
    )
    if rows < window.steps:
        lags = jnp.arange(rows, window.steps)
        state, older = lax.scan(lambda state, lag: trip(state, lag, None), state, lags)
        if older_xs:
            xs = _each(lambda new, old: jnp.concatenate([new, old]), xs, older)
    lam, sums = state
    step, params = (_each(lambda a, k: a.astype(k.dtype), sums[g], kinds[g]) for g in weights)
    return WindowCotangents(step, params, lam, xs)


def _each(function: Callable, *lists: list) -> list:
    return [function(*items) for items in zip(*lists, strict=True)]


def _dense(value: Value, kind: Any) -> jax.Array:
    return zeros(kind) if value is ZERO else value


def _where_or_zero(live: Any, value: jax.Array) -> jax.Array:
    return jnp.where(live, value, jnp.zeros((), value.dtype))


def _add(total: jax.Array, live: Any, value: Value) -> jax.Array:
    if value is ZERO:
        return total
    return total + _where_or_zero(live, value).astype(total.dtype)


def _accumulator(kind: Any) -> jax.Array:
    """Zeros to sum a window in: half precisions are summed in float32 and rounded once."""
    start = zeros(kind)
    narrow = jnp.issubdtype(kind.dtype, jnp.floating) and jnp.finfo(kind.dtype).bits < 32
    return start.astype(jnp.float32) if narrow else start
