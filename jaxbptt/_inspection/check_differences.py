"""Compares a recorded gradient, leaf by leaf and lag by lag, with finite differences."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.tree_util import keystr, tree_flatten_with_path

from jaxbptt._compat import lax_scan
from jaxbptt._inspection import check_report as words
from jaxbptt._inspection.check_report import Finding, Report
from jaxbptt._types import PyTree

_DIRECTIONS = 3  # random directions for each leaf
_AGREEMENT = 50  # tolerances within which float64 must reproduce the recorded outputs


class Recorded(NamedTuple):
    """The last n steps of a run, and the gradient that was recorded for them."""

    params: PyTree
    carry: PyTree  # enters the oldest step
    xs: PyTree  # leaves (n, *x.shape)
    length: int  # n
    outputs: list  # differentiable leaves of the newest carry and y
    ct_outputs: list[np.ndarray]  # their cotangents, complex128
    followed: list[bool]  # which leaves of params, carry and x have a gradient
    by_lag: list  # these gradients: (n, ...), lag 0 first
    total: list  # gradients of differentiable leaves of params, of the whole window


def is_differentiable(leaf: Any) -> bool:
    """Whether gradients can flow through a leaf."""
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def differentiable_leaves(tree: PyTree) -> list:
    """The leaves that gradients can flow through."""
    return list(filter(is_differentiable, jax.tree.leaves(tree)))


def named_leaves(tree: PyTree, name: str) -> list[tuple[str, Any]]:
    """Path and value of each leaf, the paths beginning with the name of the tree."""
    return [(name + keystr(path), leaf) for path, leaf in tree_flatten_with_path(tree)[0]]


def compare(step: Callable, recorded: Recorded, tolerance: float | None) -> Report:
    """Reports where a recorded gradient differs from finite differences.

    Args:
        step: `step(params, carry, x) -> (carry, y)`.
        recorded: a run whose outputs are finite.
        tolerance: the relative difference allowed, or None, as for `check_step`.
    """
    # The recorded gradient is allowed the rounding errors of the dtypes that it was computed in.
    own = _narrowest(step, recorded, [*_dtypes(recorded), *(v.dtype for v in recorded.outputs)])
    tolerance = tolerance or _eps(own) ** 0.5
    reference = _reference(step, recorded, _eps(own) ** 0.5)
    measured = _measure(recorded, reference)
    findings, disregarded = _judge(measured, tolerance)
    findings += _judge_sums(measured, recorded.total, tolerance, {f.path for f in findings})
    notes = (reference.note,) if reference.note else ()
    compared = _DIRECTIONS * sum(map(len, measured.values()))
    return Report(not findings, findings, compared, disregarded, str(reference.dtype), notes)


# --------------------------------------------------------- the recorded numbers


class _Difference(NamedTuple):
    """A directional derivative by finite differences."""

    value: float
    doubt: float  # how far it may be off, as differences of two sizes disagree
    noise: float  # how far rounding of the outputs may move it


class _Measured(NamedTuple):
    """One differentiable leaf at one lag."""

    gradient: np.ndarray  # as recorded, complex128
    directions: np.ndarray  # (3, *leaf.shape)
    differences: list[_Difference]  # along these
    jumps: bool  # whether the outputs depend on the leaf in jumps only

    @property
    def size(self) -> float:
        """How large derivatives along the directions are, as far as they can be trusted."""
        sure = [abs(d.value) - d.doubt for d in self.differences if np.isfinite(d.doubt)]
        norm = np.linalg.norm(self.gradient.ravel())
        return float(max([norm if np.isfinite(norm) else 0.0, *sure]))


def _measure(recorded: Recorded, reference: "_Reference") -> dict[str, list[_Measured]]:
    """By the path of each leaf with a gradient, that gradient at lags 0 to n-1 in both ways."""
    trees = {"params": recorded.params, "carry": recorded.carry, "x": recorded.xs}
    leaves = [leaf for name, tree in trees.items() for leaf in named_leaves(tree, name)]
    # Of a part of the carry that nothing drives a recorder may have no gradient.
    numbers = [i for i, followed in enumerate(recorded.followed) if followed]
    # One generator for all leaves, so that no two have the same signs.
    rng, measured = np.random.default_rng(1), {}
    for i, gradients in zip(numbers, recorded.by_lag, strict=True):
        path, lags = leaves[i][0], []
        directions = _directions(rng, gradients)
        for lag, gradient in enumerate(np.asarray(gradients).astype(np.complex128)):
            at = i, recorded.length - 1 - lag
            differences = [reference.derivative(*at, v) for v in directions]
            # Parameters of earlier steps act through the carry, which is looked at by itself.
            may_jump = path.startswith("carry") or (path.startswith("params") and lag == 0)
            constant = not any(np.any(gradient) or d.value or d.doubt for d in differences)
            jumps = may_jump and constant and reference.jumps(*at, directions)
            lags.append(_Measured(gradient, directions, differences, jumps))
        measured[path] = lags
    return measured


def _directions(rng: np.random.Generator, gradients: Any) -> np.ndarray:
    """Random directions of ±1, of a complex leaf with modulus 1: (3, *leaf.shape)."""
    shape = (_DIRECTIONS, *gradients.shape[1:])
    signs = rng.choice([-1.0, 1.0], size=shape)
    if jnp.iscomplexobj(gradients):
        signs = (signs + 1j * rng.choice([-1.0, 1.0], size=shape)) / 2**0.5
    return signs


def _along(gradient: np.ndarray, direction: np.ndarray) -> float:
    return float(np.real(np.sum(gradient * direction)))


# ----------------------------------------------------------------- the verdict


def _judge(measured: dict[str, list[_Measured]], tolerance: float) -> tuple[list[Finding], int]:
    """What is wrong at single lags, and how many directions were in doubt."""
    findings: list[Finding] = []
    disregarded = 0
    largest = max((m.size for lags in measured.values() for m in lags), default=0.0)
    for path, lags in measured.items():
        largest_of_leaf, known = max(m.size for m in lags), set()
        for lag, m in enumerate(lags):
            # Rounding errors of a faded gradient are relative to what it has been.
            room = tolerance * max(m.size, 1e-2 * largest_of_leaf, 1e-3 * largest)
            finding, doubtful = _judge_one(path, lag, m, room)
            disregarded += doubtful
            if finding and finding.kind not in known:
                findings.append(finding)
                # These go on at larger lags, so that the first lag says all.
                known |= {finding.kind} & {"flat", "not finite"}
    return findings, disregarded


def _judge_one(path: str, lag: int, m: _Measured, room: float) -> tuple[Finding | None, int]:
    """What is wrong by more than `room`, if anything, and how many directions were in doubt."""
    if not np.all(np.isfinite(m.gradient)):
        return words.not_finite("The gradient of", path, lag), 0
    # What rounding explains is no gap, and what a kink nearby may explain is not a sure one.
    got = [_along(m.gradient, v) for v in m.directions]
    gaps = [abs(g - d.value) - d.noise for g, d in zip(got, m.differences, strict=True)]
    sure = [gap - d.doubt for gap, d in zip(gaps, m.differences, strict=True)]
    doubtful = sum(gap > room >= left for gap, left in zip(gaps, sure, strict=True))
    worst = int(np.argmax(sure))
    if sure[worst] > room:
        expected = m.differences[worst].value
        # Zero to the last bit is no rounding error: something has cut the gradient.
        if np.any(m.gradient):
            return words.differs(path, lag, expected, got[worst]), doubtful
        return words.cut(path, lag, expected), doubtful
    return words.flat(path, lag) if m.jumps else None, doubtful


def _judge_sums(
    measured: dict[str, list[_Measured]], totals: list, tolerance: float, found: set[str]
) -> list[Finding]:
    """What is wrong over the whole window, of parameters that are right at each lag."""
    findings = []
    for (path, lags), total in zip(measured.items(), totals, strict=False):  # params come first
        total = np.asarray(total).astype(np.complex128)
        room = tolerance * max(float(np.linalg.norm(total.ravel())), *(m.size for m in lags))
        for i, direction in enumerate(lags[0].directions):
            expected, doubt, noise = map(sum, zip(*(m.differences[i] for m in lags), strict=True))
            got = _along(total, direction)
            # Written so that NaN is a finding too.
            if path not in found and not abs(got - expected) <= room + doubt + noise:
                findings.append(words.sum_differs(path, expected, got))
                break
    return findings


# ------------------------------------------------------------- the differences


class _Reference(NamedTuple):
    """The window as a function of a copy of params, carry and x for each step."""

    run: Callable[[list], list]  # the leaves of all copies to the outputs
    leaves: list  # of params, of what is added to the carry (zeros), of x: (n, ...)
    scales: list  # the size of each leaf at each step, (n,); None for integers and keys
    outputs: list[np.ndarray]  # of these leaves, complex128
    ct_outputs: list[np.ndarray]
    dtype: Any  # the real dtype whose rounding error the outputs have
    in_float64: bool
    note: str = ""

    def derivative(self, leaf: int, row: int, direction: np.ndarray) -> _Difference:
        """The derivative of the loss by one leaf of one step's copy, along a direction."""
        h, changes = self._increment(leaf, row), []
        for size in (h, -h, h / 2, -h / 2):
            outs = self._outputs_at(leaf, row, size * direction)
            # Subtracted before they are summed: large outputs that stay would round the rest.
            of_outputs = zip(self.ct_outputs, outs, self.outputs, strict=True)
            changes.append(sum(_along(ct, v - v_0) for ct, v, v_0 in of_outputs))
        # Each output may be off by a few ε; independent errors add up as their norm does.
        weighted = [ct * v for ct, v in zip(self.ct_outputs, self.outputs, strict=True)]
        norm = np.sqrt(sum(np.sum(np.abs(v) ** 2) for v in weighted))
        return _extrapolate(changes, h, 8 * _eps(self.dtype) * float(norm))

    def jumps(self, leaf: int, row: int, directions: np.ndarray) -> bool:
        """Whether the outputs depend on one leaf of one step's copy, but in jumps only.

        They change where the leaf moves by its own size, or by 1 more for casts to integers;
        but not where it moves by h from there, as a function would that is only saturated.
        """
        h, scale = self._increment(leaf, row), self.scales[leaf][row]
        changed = False
        for direction in directions:
            for size in (scale, -scale, scale + 1, -scale - 1):
                outs = self._outputs_at(leaf, row, size * direction)
                beyond = self._outputs_at(leaf, row, (size + h) * direction)
                if not all(map(np.array_equal, outs, beyond)):
                    return False
                changed |= not all(map(np.array_equal, outs, self.outputs))
        return changed

    def _outputs_at(self, leaf: int, row: int, change: np.ndarray) -> list[np.ndarray]:
        # The other leaves stay on the device: only this one is sent again.
        moved = np.array(self.leaves[leaf])
        moved[row] = moved[row] + change
        with x64() if self.in_float64 else contextlib.nullcontext():
            outs = self.run([*self.leaves[:leaf], moved, *self.leaves[leaf + 1 :]])
            return [np.asarray(v).astype(np.complex128) for v in outs]

    def _increment(self, leaf: int, row: int) -> float:
        """∛ε of the leaf's size: there the truncation and the rounding of D(h) balance."""
        return float(_eps(self.dtype) ** (1 / 3) * self.scales[leaf][row])


def _extrapolate(changes: list[float], h: float, rounding: float) -> _Difference:
    """Richardson's combination of central differences, and how far to trust it.

    A kink anywhere within h shifts it by at most half of `doubt`; a jump by at most all.
    Of a smooth function, `doubt` is of the order h².

    Args:
        changes: of the loss, by h, -h, h/2 and -h/2.
        h: the larger size.
        rounding: how far each of these may be off.
    """
    up, down, half_up, half_down = changes
    wide, narrow = (up - down) / (2 * h), (half_up - half_down) / h
    bend, half_bend = (up + down) / h, (half_up + half_down) / (h / 2)  # right minus left slope
    doubt = abs(2 * half_bend - bend) + 6 * abs(narrow - wide)
    # Past the edge of a function's domain nothing is known.
    if not np.isfinite(doubt):
        return _Difference(0.0, np.inf, np.inf)
    return _Difference((4 * narrow - wide) / 3, doubt, rounding / h)


def _reference(step: Callable, recorded: Recorded, expected_error: float) -> _Reference:
    """The reference in float64, or in the arrays' own dtypes where that is another function."""

    def widened(leaf: Any) -> Any:
        if not is_differentiable(leaf):
            return leaf
        return leaf.astype(jnp.complex128 if jnp.iscomplexobj(leaf) else jnp.float64)

    with x64():
        try:
            trees = jax.tree.map(widened, (recorded.params, recorded.carry, recorded.xs))
            wide = recorded._replace(**dict(zip(("params", "carry", "xs"), trees, strict=True)))
            reference = _reference_as_given(step, wide, in_float64=True)
            # Random numbers, for one, are others in float64.
            if _agree(reference.outputs, recorded.outputs, min(0.25, _AGREEMENT * expected_error)):
                return reference
            why = "is another function in float64"
        except Exception as cause:  # whatever the user's step raises at other dtypes
            why = f"does not run in float64 ({type(cause).__name__})"
    reference = _reference_as_given(step, recorded, in_float64=False)
    return reference._replace(note=f"step {why}: its own dtypes were used.")


def _reference_as_given(step: Callable, recorded: Recorded, *, in_float64: bool) -> _Reference:
    """The reference in the dtypes of the recorded arrays."""
    n = recorded.length

    def run_step(carry: PyTree, copies: tuple[PyTree, PyTree, PyTree]) -> tuple[PyTree, list]:
        params, change, x = copies
        moved = jax.tree.map(lambda v, d: v + d if is_differentiable(v) else v, carry, change)
        after, y = step(params, moved, x)
        # A step that casts its carry to a dtype of its own goes on in that of the carry it got.
        cast = jax.tree.map(
            lambda v, like: v if v.dtype == like.dtype else lax.convert_element_type(v, like.dtype),
            after,
            carry,
        )
        return cast, differentiable_leaves(y)

    # Compiled once, it serves all leaves, steps, directions and sizes.
    @jax.jit
    def run(leaves: list) -> list:
        copies = jax.tree.unflatten(treedef, leaves)
        newest, ys = lax_scan(run_step, recorded.carry, copies, length=n)
        return [*differentiable_leaves(newest), *(y[-1] for y in ys)]

    # Every step gets a copy of its own, so that one can be changed and the others not.
    trees = recorded.params, recorded.carry
    copies = jax.tree.map(lambda v: jnp.broadcast_to(v, (n, *v.shape)), trees)
    leaves, treedef = jax.tree.flatten((*copies, recorded.xs))
    scales = [[_scale(v) for v in leaf] if is_differentiable(leaf) else None for leaf in leaves]
    # What is added to a carry is as large as the carry, but begins at zero.
    first, last = (len(jax.tree.leaves(each)) for each in (trees[:1], trees))
    for i in filter(lambda i: is_differentiable(leaves[i]), range(first, last)):
        leaves[i] = jnp.zeros_like(leaves[i])
    outputs = [np.asarray(v).astype(np.complex128) for v in run(leaves)]
    dtype = _narrowest(step, recorded, [] if in_float64 else _dtypes(recorded))
    return _Reference(run, leaves, scales, outputs, recorded.ct_outputs, dtype, in_float64)


def _scale(leaf: Any) -> float:
    """The root mean square of a leaf, at least 0.1; 1 for zeros."""
    values = np.abs(np.asarray(leaf).astype(np.complex128))
    mean = float(np.sqrt(np.mean(values**2))) if values.size else 0.0
    return max(mean, 0.1) if mean else 1.0


def _agree(outs: list[np.ndarray], recorded: list, allowed: float) -> bool:
    """Whether each output is what was recorded, up to a relative error."""
    for got, want in zip(outs, map(np.asarray, recorded), strict=True):
        gap = np.linalg.norm((got - want.astype(np.complex128)).ravel())
        if not gap <= allowed * max(float(np.linalg.norm(got.ravel())), 1e-3):
            return False
    return True


# ------------------------------------------------------------------- precision


def x64() -> Any:
    """A context in which arrays may have 64 bits."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return getattr(jax.experimental, "enable_x64")(True)  # noqa: B009  its place before JAX 0.8


def _narrowest(step: Callable, recorded: Recorded, dtypes: Iterable[Any]) -> Any:
    """The real dtype with the largest rounding error, of `dtypes` and of what the step casts to."""
    x = jax.tree.map(lambda leaf: leaf[0], recorded.xs)
    closed = jax.make_jaxpr(step)(recorded.params, recorded.carry, x)
    reals: list[Any] = [jnp.finfo(d).dtype for d in (*dtypes, *_rounded_to(closed.jaxpr))]
    return max(reals, key=_eps, default=jnp.dtype("float64"))


def _rounded_to(jaxpr: core.Jaxpr) -> Iterator[Any]:
    """The dtypes that something wider is rounded to."""
    for eqn in jaxpr.eqns:
        # Calls, loops, branches and custom rules have their jaxprs among their parameters.
        for value in jax.tree.leaves([*eqn.params.values()]):
            inner = getattr(value, "jaxpr", value)
            if isinstance(inner, core.Jaxpr):
                yield from _rounded_to(inner)
        args, outs = (
            [v.dtype for v in differentiable_leaves([v.aval for v in vs])]
            for vs in (eqn.invars, eqn.outvars)
        )
        yield from (out for out in outs if any(_eps(out) > _eps(arg) for arg in args))


def _dtypes(recorded: Recorded) -> list[Any]:
    trees = (recorded.params, recorded.carry, recorded.xs)
    return [leaf.dtype for leaf in differentiable_leaves(trees)]


def _eps(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps)
