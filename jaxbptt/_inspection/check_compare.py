"""Compares what was recorded with the reference, and says of each leaf and lag what differs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from jaxbptt._inspection import check_report as words
from jaxbptt._inspection.check_reference import Difference, Reference, narrowest, reference
from jaxbptt._inspection.check_report import Finding, Report
from jaxbptt._inspection.check_run import Recorded, Window, moving
from jaxbptt._inspection.check_ways import Way, Ways, narrowed_to, ways_by_lag

_DIRECTIONS = 3  # random directions for each leaf


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One moving leaf at one lag: recorded, by finite differences, and how it gets there."""

    path: str
    group: str
    lag: int
    gradient: np.ndarray
    got: list[float]
    differences: list[Difference]
    way: Way | None

    @property
    def size(self) -> float:
        """Of its derivatives along directions of ±1, as far as they can be trusted."""
        sure = [abs(d.value) - d.doubt for d in self.differences if np.isfinite(d.doubt)]
        size = np.linalg.norm(self.gradient.ravel())
        return float(max([size if np.isfinite(size) else 0.0, *sure]))


def compare(step: Callable, recorded: Recorded, tolerance: float | None) -> Report:
    """The report on a run whose outputs are finite."""
    window = recorded.window
    closed = jax.make_jaxpr(step)(window.params, window.carry, window.x)
    dtypes = [v.dtype for v in (*moving((window.params, window.carry, window.xs)), *window.outputs)]
    own = narrowest([*dtypes, narrowed_to(closed.jaxpr)])
    tolerance = tolerance or float(jnp.finfo(own).eps) ** 0.5
    ref = reference(step, window, float(jnp.finfo(own).eps) ** 0.5)
    n_params, n_carry = (len(jax.tree.leaves(tree)) for tree in (window.params, window.carry))
    ways = ways_by_lag(closed.jaxpr, n_params, n_carry, window.length)
    directions = _directions(recorded)
    leaves = _evaluate(recorded, ref, directions, ways)
    findings, disregarded = _judge(leaves, tolerance)
    findings += _judge_sums(recorded, directions, leaves, tolerance, {f.path for f in findings})
    notes = (ref.note,) if ref.note else ()
    compared = len(leaves) * _DIRECTIONS
    return Report(not findings, findings, compared, disregarded, str(ref.dtype), notes)


def _names(window: Window) -> list[tuple[int, str, str]]:
    """Number among all leaves, group and path of each moving leaf."""
    trees = {"params": window.params, "carry": window.carry, "x": window.x}
    named = [(g, g + keystr(p), v) for g in trees for p, v in tree_flatten_with_path(trees[g])[0]]
    moves = [jnp.issubdtype(v.dtype, jnp.inexact) for *_, v in named]
    return [(i, g, path) for i, (g, path, _) in enumerate(named) if moves[i]]


def _directions(recorded: Recorded) -> list[np.ndarray]:
    """For each leaf some directions of ±1, for complex leaves of modulus 1."""
    rng = np.random.default_rng(1)

    def signs(shape: tuple[int, ...]) -> np.ndarray:
        return rng.choice([-1.0, 1.0], size=(_DIRECTIONS, *shape))

    return [
        (signs(v.shape[1:]) + 1j * signs(v.shape[1:])) / 2**0.5
        if jnp.iscomplexobj(v)
        else signs(v.shape[1:])
        for v in recorded.rows
    ]


def _evaluate(
    recorded: Recorded, ref: Reference, directions: list[np.ndarray], ways: list[Ways]
) -> list[_Leaf]:
    n, found = recorded.window.length, []
    for i, (number, group, path) in enumerate(_names(recorded.window)):
        for lag in range(n):
            row = n - 1 - lag
            gradient = _wide(recorded.rows[i][row])
            differences = [ref.derivative(i, row, v) for v in directions[i]]
            got = [_along(gradient, v) for v in directions[i]]
            way = ways[lag].get(number)
            found.append(_Leaf(path, group, lag, gradient, got, differences, way))
    return found


def _judge(leaves: list[_Leaf], tolerance: float) -> tuple[list[Finding], int]:
    findings: list[Finding] = []
    disregarded, largest = 0, max((leaf.size for leaf in leaves), default=0.0)
    said: set[tuple[str, str]] = set()
    for leaf in leaves:
        if not np.all(np.isfinite(leaf.gradient)):
            finding: Finding | None = words.not_finite(leaf.path, leaf.lag, "The gradient of ")
        else:
            peers = max(other.size for other in leaves if other.path == leaf.path)
            room = tolerance * max(leaf.size, 1e-2 * peers, 1e-3 * largest)
            finding, doubtful = _judge_one(leaf, room)
            disregarded += doubtful
        once = finding and finding.kind in ("flat", "not finite")
        if finding and not (once and (finding.kind, finding.path) in said):
            findings.append(finding)
            said.add((finding.kind, finding.path))
    return findings, disregarded


def _judge_one(leaf: _Leaf, room: float) -> tuple[Finding | None, int]:
    """A finding or None, and how many directions were in doubt."""
    gaps = [abs(g - d.value) - d.noise for g, d in zip(leaf.got, leaf.differences, strict=True)]
    sure = [gap - d.doubt for gap, d in zip(gaps, leaf.differences, strict=True)]
    worst, way = int(np.argmax(sure)), leaf.way or Way()
    doubtful = sum(gap > room >= left for gap, left in zip(gaps, sure, strict=True))
    if sure[worst] > room:
        expected, got = leaf.differences[worst].value, leaf.got[worst]
        if np.any(leaf.gradient):
            return words.differs(leaf.path, leaf.lag, expected, got, way), doubtful
        return words.cut(leaf.path, leaf.lag, expected, way), doubtful
    looked_at = leaf.group == "carry" or (leaf.group == "params" and leaf.lag == 0)
    if looked_at and _only_flat(leaf):
        return words.flat(leaf.path, leaf.lag, way), doubtful
    return None, doubtful


def _only_flat(leaf: _Leaf) -> bool:
    """Whether the leaf reaches the outputs, but only in jumps, and gets no gradient."""
    way = leaf.way
    if way is None or way.smooth or np.any(leaf.gradient):
        return False
    return bool(way.cuts - {"stop_gradient"})


def _judge_sums(
    recorded: Recorded,
    directions: list[np.ndarray],
    leaves: list[_Leaf],
    tolerance: float,
    found: set[str],
) -> list[Finding]:
    """Over the whole window, where nothing was found at a single lag."""
    names, findings = _names(recorded.window), []
    for i, total in enumerate(map(_wide, recorded.total)):
        path = names[i][2]
        lags = [leaf for leaf in leaves if leaf.path == path]
        room = tolerance * max([float(np.linalg.norm(total.ravel())), *(v.size for v in lags)])
        for d, v in enumerate(directions[i]):
            sums = [
                sum(parts) for parts in zip(*(leaf.differences[d] for leaf in lags), strict=True)
            ]
            got = _along(total, v)
            if path not in found and not abs(got - sums[0]) <= room + sums[1] + sums[2]:
                findings.append(words.sum_differs(path, sums[0], got))
                break
    return findings


def _along(gradient: np.ndarray, direction: np.ndarray) -> float:
    return float(np.real(np.sum(gradient * direction)))


def _wide(leaf: Any) -> np.ndarray:
    return np.asarray(leaf).astype(np.complex128)
