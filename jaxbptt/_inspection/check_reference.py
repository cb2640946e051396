"""The reference of a check: finite differences of the window, in float64 where step runs in it."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbptt._compat import lax_scan
from jaxbptt._inspection.check_run import Window, added, moving, refill
from jaxbptt._inspection.check_ways import narrowed_to
from jaxbptt._types import PyTree

_ALIKE = 50  # tolerances within which float64 must repeat the recorded outputs, if at all


class Difference(NamedTuple):
    """A directional derivative, what two sizes of difference leave in doubt, and rounding."""

    value: float
    doubt: float
    noise: float


@dataclasses.dataclass(frozen=True)
class Reference:
    """The window as a function of one copy of the parameters, carry and x per step."""

    window: Window
    outputs: Callable[[list, list, Any], list]  # rows, direction, sizes -> rows of outputs
    rows: list  # moving leaves of params, of what is added to the carry, of x: (n, ...)
    zeros: list  # of their shapes and dtypes
    dtype: Any  # whose rounding the outputs have
    lifted: bool
    note: str = ""

    def derivative(self, leaf: int, row: int, direction: np.ndarray) -> Difference:
        """The derivative of the loss by one leaf of one step's copy, along a direction."""
        h = self._size(leaf, row)
        sizes = np.array([0.0, h, -h, h / 2, -h / 2])
        with x64() if self.lifted else contextlib.nullcontext():
            along = list(self.zeros)
            along[leaf] = np.zeros(self.rows[leaf].shape, self.rows[leaf].dtype)
            along[leaf][row] = direction
            outs = [np.asarray(v) for v in self.outputs(self.rows, along, sizes)]
        outs = [v.astype(np.complex128) for v in outs]
        weighted = [ct * v for ct, v in zip(self.window.cts, outs, strict=True)]
        noise = np.sqrt(sum(np.sum(np.abs(v[0]) ** 2) for v in weighted))
        losses = sum(np.real(np.sum((v - v[:1]).reshape(5, -1), 1)) for v in weighted)
        return _extrapolated(losses, h, 8 * _eps(self.dtype) * float(noise))

    def _size(self, leaf: int, row: int) -> float:
        """∛ε of the leaf's size: there the truncation and the rounding of D(h) balance."""
        n_params = len(moving(self.window.params))
        carry = moving(self.window.carry)
        at = leaf - n_params
        values = carry[at] if 0 <= at < len(carry) else self.rows[leaf][row]
        values = np.abs(np.asarray(values).astype(np.complex128))
        mean = float(np.sqrt(np.mean(values**2))) if values.size else 0.0
        return _eps(self.dtype) ** (1 / 3) * (max(mean, 0.1) if mean else 1.0)


def reference(step: Callable, window: Window, allowed: float) -> Reference:
    """The reference in float64, or in the arrays' own dtypes where that is not the same function.

    Args:
        step: `step(params, carry, x) -> (carry, y)`.
        window: the recorded steps.
        allowed: the relative rounding error of the recorded outputs.
    """
    if all(jnp.finfo(v.dtype).bits == 64 for v in moving((window.params, window.carry, window.xs))):
        return _build(step, window, lifted=True)
    with x64():
        try:
            lifted = _build(step, _lift(window), lifted=True)
            outs = lifted.outputs(
                lifted.rows, [jnp.zeros_like(r) for r in lifted.rows], np.zeros(1)
            )
            same = _alike(outs, window.outputs, min(0.25, _ALIKE * allowed))
            why = "is another function in float64"
        except Exception as cause:  # whatever the user's step raises at other dtypes
            same, why = False, f"does not run in float64 ({type(cause).__name__})"
    if same:
        return lifted
    own = _build(step, window, lifted=False)
    return dataclasses.replace(own, note=f"step {why}: its own dtypes were used.")


def _build(step: Callable, window: Window, lifted: bool) -> Reference:
    closed = jax.make_jaxpr(step)(window.params, window.carry, window.x)
    dtypes = [narrowed_to(closed.jaxpr)]
    if not lifted:
        dtypes += [v.dtype for v in moving((window.params, window.carry, window.xs))]
    n = window.length
    rows = [jnp.broadcast_to(v, (n, *v.shape)) for v in moving(window.params)]
    rows += [jnp.zeros((n, *v.shape), v.dtype) for v in moving(window.carry)]
    rows += moving(window.xs)
    zeros = [jnp.zeros_like(leaf) for leaf in rows]
    return Reference(window, _forward(step, window), rows, zeros, narrowest(dtypes), lifted)


def _forward(step: Callable, window: Window) -> Callable[[list, list, Any], list]:
    def one(carry: PyTree, row: tuple[list, PyTree]) -> tuple[PyTree, list]:
        values = iter(row[0])
        theta = refill(window.params, values)
        before = added(carry, values)
        after, y = step(theta, before, refill(row[1], values))
        return jax.tree.map(_as, after, carry), moving(y)

    @jax.jit
    def outputs(rows: list, direction: list, sizes: jax.Array) -> list:
        def at(size: jax.Array) -> list:
            pairs = zip(rows, direction, strict=True)
            moved = [r + lax.convert_element_type(size, d.dtype) * d for r, d in pairs]
            carry, ys = lax_scan(one, window.carry, (moved, window.xs), length=window.length)
            return [*moving(carry), *(y[-1] for y in ys)]

        return lax.map(at, sizes)

    return outputs


def _extrapolated(losses: np.ndarray, h: float, rounding: float) -> Difference:
    """Richardson's combination of central differences, and how far to trust it.

    A kink anywhere within h shifts it by at most half of `doubt`; a jump by at most all.
    Of a smooth function, `doubt` is of the order h².
    """
    _, up, down, half_up, half_down = losses
    wide, narrow = (up - down) / (2 * h), (half_up - half_down) / h
    bend, half_bend = (up + down) / h, (half_up + half_down) / (h / 2)  # right minus left slope
    doubt = abs(2 * half_bend - bend) + 6 * abs(narrow - wide)
    value = (4 * narrow - wide) / 3
    if not np.isfinite(doubt):
        return Difference(0.0, np.inf, np.inf)
    return Difference(float(value), float(doubt), rounding / h)


def x64() -> Any:
    """A context in which arrays may have 64 bits."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return getattr(jax.experimental, "enable_x64")(True)  # noqa: B009  its place before JAX 0.8


def narrowest(dtypes: Iterable[Any]) -> Any:
    """The real dtype with the largest rounding error; float64 if there is none."""
    reals: list[Any] = [jnp.finfo(d).dtype for d in dtypes if d is not None]
    return max(reals, key=_eps, default=jnp.dtype("float64"))


def _eps(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps)


def _lift(window: Window) -> Window:
    def one(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        wide = jnp.complex128 if jnp.iscomplexobj(leaf) else jnp.float64
        return lax.convert_element_type(leaf, wide)

    params, carry, xs = jax.tree.map(one, (window.params, window.carry, window.xs))
    return dataclasses.replace(window, params=params, carry=carry, xs=xs)


def _as(value: Any, like: Any) -> Any:
    """A step that casts its carry to a dtype of its own goes on in that of the carry it got."""
    value = jnp.asarray(value)
    return value if value.dtype == like.dtype else lax.convert_element_type(value, like.dtype)


def _alike(outs: Sequence, recorded: Sequence, allowed: float) -> bool:
    pairs = [(np.asarray(a[0]), np.asarray(b)) for a, b in zip(outs, recorded, strict=True)]
    gaps = [float(np.linalg.norm((a - b.astype(a.dtype)).ravel())) for a, b in pairs]
    sizes = [float(np.linalg.norm(a.ravel())) for a, _ in pairs]
    return all(gap <= allowed * max(size, 1e-3) for gap, size in zip(gaps, sizes, strict=True))
