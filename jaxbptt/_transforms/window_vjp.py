"""The window-composed VJP: the recurrence of λ over the lags and the sum over them.

    λ_{s-1} = (∂c_s/∂c_{s-1})ᵀ λ_s + (∂y_s/∂c_{s-1})ᵀ ȳ_s
    θ̄ = Σ_s (∂c_s/∂θ)ᵀ λ_s + (∂y_s/∂θ)ᵀ ȳ_s

from the newest step backwards. All lists hold differentiable leaves; "weights" are
the arrays that the step closes over, then the parameters.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbptt._arrays import zeros
from jaxbptt._closure.closure import Closure
from jaxbptt._closure.contract import Split, where_or_zero, widened
from jaxbptt._closure.pullbacks import name_of
from jaxbptt._compat import lax_scan
from jaxbptt._jaxprs.blocks import rows as rows_at
from jaxbptt._jaxprs.evaluate import ZERO, Value
from jaxbptt._jaxprs.stacks import scan_stacking
from jaxbptt._transforms.cotangents import given_ct_carry, given_ct_ys
from jaxbptt._transforms.tape import Tape, reader, settings_of
from jaxbptt._types import PyTree
from jaxbptt._windows import reach_of_rows


@dataclasses.dataclass(frozen=True)
class Window:
    """The recorded steps that a cotangent meets on its way back.

    Attributes:
        read: from a lag to the residuals of that step; every lag below `steps` can be read.
        fixed: the residuals that are the same in all steps.
        steps: how many lags there are at most (static).
        reach: lags from here on are not reached (may be traced).
        parts: of each leaf of λ, how many lags it is followed; nothing where that is all.
    """

    read: Callable[[Any], list]
    fixed: list
    steps: int
    reach: Any
    parts: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class WindowCotangents:
    """Flat cotangents of a window."""

    weights: list  # summed over the lags
    carry: list  # the last λ
    xs: list  # x̄ by lag, each (steps, *x.shape), lag 0 first; empty unless asked for

    def then(self, older: "WindowCotangents") -> "WindowCotangents":
        """Those of a longer window, of which `older` has the other lags."""
        if not self.weights and not self.xs:
            return older
        weights = _each(_plus, self.weights, older.weights)
        return WindowCotangents(weights, older.carry, _each(_joined, self.xs, older.xs))


def pull_window(
    closure: Closure, window: Window, ct_carry: list, ct_ys: list, rows: int, *, keep_xs: bool
) -> WindowCotangents:
    """Chains the closures of a window.

    Args:
        closure: the traced step.
        window: the recorded steps.
        ct_carry: c̄, the cotangent of the newest carry.
        ct_ys: ȳ of the last `rows` steps, each leaf (rows, *y.shape), oldest first.
        rows: how many of the newest steps have a ȳ; the older ones only pass λ on.
        keep_xs: whether x̄ is wanted.
    """
    ct = window_sums(closure, window, ct_carry, ct_ys, rows, keep_xs=keep_xs)
    return dataclasses.replace(ct, weights=dense_weights(closure, ct.weights))


def window_sums(
    closure: Closure, window: Window, ct_carry: list, ct_ys: list, rows: int, *, keep_xs: bool
) -> WindowCotangents:
    """`pull_window` with the weights' cotangents as they are added up: arrays or ZERO."""
    ct = WindowCotangents([], ct_carry, [])
    for part in _segments(closure, window, ct_ys, rows):
        ct = ct.then(_sweep(closure, window, part, ct.carry, keep_xs))
    return ct


def by_lag(
    closure: Closure,
    window: Window,
    ct_carry: list,
    ct_ys: list,
    rows: int,
    of: Callable[[jax.Array], jax.Array],
    of_sum: Callable[[jax.Array], jax.Array],
) -> tuple[list, list, list]:
    """By lag, stacked: the terms of θ̄, the λ handed on, and the sums of the terms so far.

    Terms and λ are put through `of`, the sums through `of_sum`; the arguments before these
    are those of `pull_window`.
    """
    state, stacks = (ct_carry, zero_sums(closure.cotangents["params"])), []
    for part in _segments(closure, window, ct_ys, rows):
        state, of_lags = _terms(closure, window, part, state, of, of_sum)
        stacks.append(of_lags)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacks)


def zero_sums(kinds: Iterable) -> list:
    """Zeros to add up arrays of these types in: half precisions in float32."""
    return [widened(zeros(kind)) for kind in kinds]


@dataclasses.dataclass(frozen=True)
class _Segment:
    """Lags that one program serves."""

    program: str
    start: int
    stop: int
    ct_ys: list  # each (stop - start, *y.shape), newest first; empty where there is no ȳ


def _segments(closure: Closure, window: Window, ct_ys: list, rows: int) -> list[_Segment]:
    newest_first = [jnp.flip(leaf, 0) for leaf in ct_ys]
    # One loop is cheaper than two, where rows of zeros cost next to nothing.
    together = rows == window.steps or (closure.indifferent_to_y and not window.parts)
    if together:
        newest_first = [padded(leaf, window.steps - rows) for leaf in newest_first]
    stops = sorted({window.steps, *window.parts} | (set() if together else {rows}))
    segments = []
    for start, stop in zip([0, *stops], stops, strict=False):
        with_y = together or start < rows
        name = name_of(with_y, closure.over_at(start, window.parts))
        ys = [leaf[start:stop] for leaf in newest_first] if with_y else []
        segments.append(_Segment(name, start, stop, ys))
    return segments


def _terms(
    closure: Closure,
    window: Window,
    part: _Segment,
    state: tuple[list, list],
    of: Callable,
    of_sum: Callable,
) -> tuple[tuple[list, list], tuple[list, list, list]]:
    """One segment of `by_lag`: the last λ and the sums, and what there is of each lag."""
    split = closure.split(part.program, ("params", "carry"), weights=False)
    kinds, over = closure.cotangents, closure.over[part.program]

    def trip(state: Any, row: Any) -> tuple[Any, Any]:
        lam, sums = state
        lag, ct_y = row
        args = [*window.read(lag), *window.fixed, *lam, *ct_y]
        live = lag < window.reach
        n, of_outs = len(kinds["params"]), [*kinds["params"], *kinds["carry"]]
        outs, _, _ = _one_lag(split, closure.consts[part.program], args, of_outs, live)
        params, older = [where_or_zero(live, v) for v in outs[:n]], outs[n:]
        lam = _each(jnp.where, [live & (not o) for o in over], older, lam)
        handed_on = [where_or_zero(live & (not o), v) for v, o in zip(lam, over, strict=True)]
        sums = _each(lambda total, v: total + v.astype(total.dtype), sums, params)
        found = [of(v) for v in params], [of(v) for v in handed_on], [of_sum(v) for v in sums]
        return (lam, sums), found

    lags = jnp.arange(part.start, part.stop, dtype=jnp.int32)
    return lax_scan(trip, state, (lags, part.ct_ys))


def pull_newest_x(closure: Closure, window: Window, ct_carry: list, ct_y: list) -> list:
    """x̄ of the newest step alone."""
    args = [*window.read(0), *window.fixed, *ct_carry, *ct_y]
    # The side effects of this step's pullback belong to the sweep.
    split = closure.split("pull", ("x",), weights=False, effects=False)
    outs, _, _ = split.one_lag(closure.consts["pull"], args)
    return densify(outs, closure.cotangents["x"])


def _sweep(
    closure: Closure, window: Window, part: _Segment, lam: list, keep_xs: bool
) -> WindowCotangents:
    """The lags of a segment in one loop, then the contractions over them."""
    program = part.program
    split = closure.split(program, ("carry", "x") if keep_xs else ("carry",))
    consts = closure.consts[program]
    x_kinds = closure.cotangents["x"] if keep_xs else []
    of_outs = [*closure.cotangents["carry"], *x_kinds]

    def trip(state: Any, row: Any) -> tuple[Any, Any]:
        lam, sums = state
        lag, ct_y = row
        live = lag < window.reach
        args = [*window.read(lag), *window.fixed, *lam, *ct_y]
        outs, emitted, terms = _one_lag(split, consts, args, of_outs, live)
        # What comes out is selected, rather than zeros sent in: a pullback of the
        # user's own need not give zero for zero, and 0·inf is NaN.
        older, xs = outs[: len(lam)], outs[len(lam) :]
        followed = [live & (not over) for over in closure.over[program]]
        lam = _each(jnp.where, followed, older, lam)
        kept = [where_or_zero(live, v) for v in (*xs, *emitted)]
        return (lam, split.add(sums, terms, live)), kept

    lags = jnp.arange(part.start, part.stop, dtype=jnp.int32)
    kept_kinds = [*x_kinds, *(v.aval for v in split.emitted)]
    (lam, sums), kept = scan_stacking(
        trip, (lam, split.zero_sums()), (lags, part.ct_ys), kept_kinds, len(lags), first=0
    )
    xs, emitted = kept[: len(x_kinds)], kept[len(x_kinds) :]
    unvaried = closure.unvaried(split, window.fixed)
    weights = split.finish(consts, unvaried, split.contract(emitted), sums)
    return WindowCotangents(weights, lam, xs)


def _one_lag(
    split: Split, consts: list, args: list, kinds: list, live: Any
) -> tuple[list, list, list]:
    """One lag of a divided pullback; side effects of a lag that is not live do not happen."""

    def run() -> tuple[list, list, list]:
        outs, emitted, terms = split.one_lag(consts, args)
        return densify(outs, kinds), emitted, terms

    if not split.acts:
        return run()
    none = jax.tree.map(lambda kind: jnp.zeros(kind.shape, kind.dtype), jax.eval_shape(run))
    return lax.cond(live, run, lambda: none)


def _each(function: Callable, *lists: list) -> list:
    return [function(*items) for items in zip(*lists, strict=True)]


def dense_weights(closure: Closure, values: list) -> list:
    """The weights' cotangents as arrays, in the weights' own dtypes."""
    kinds = [*closure.cotangents["hoisted"], *closure.cotangents["params"]]
    return _each(lambda v, kind: _dense(v, kind).astype(kind.dtype), values, kinds)


def padded(leaf: jax.Array, rows: int) -> jax.Array:
    """The leaf with rows of zeros behind."""
    return jnp.pad(leaf, [(0, rows)] + [(0, 0)] * (leaf.ndim - 1)) if rows else leaf


def _joined(new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.concatenate([new, old])


def _plus(a: Value, b: Value) -> Value:
    return b if a is ZERO else a if b is ZERO else a + b


def densify(values: list, kinds: list) -> list:
    """Arrays, where some values may be ZERO."""
    return _each(_dense, values, kinds)


def _dense(value: Value, kind: Any) -> jax.Array:
    return zeros(kind) if value is ZERO else value


# ------------------------------------------------------------ what of a tape a cotangent meets


def tape_window(closure: Closure, tape: Tape, params: list, fixed: list, rows: int) -> Window:
    """What the last `rows` outputs of a group reach of a tape, as far as it is recorded."""
    every = settings_of(tape).every
    steps, *parts = (reach_of_rows(w, rows, every) for w in (closure.window, *closure.parts))
    read = reader(tape)
    if settings_of(tape).weights == "replayed":
        read = replayed(closure, params, read, settings_of(tape).window, tape.length)
    return Window(read, fixed, steps, jnp.minimum(tape.length, steps), tuple(parts))


def given_window(
    closure: Closure, tape: Tape, params: PyTree, ct_ys: PyTree, ct_carry: PyTree
) -> tuple[Window, list, list, int]:
    """What checked cotangents from outside reach; c̄, ȳ by leaf, and the rows of ȳ."""
    rows, ct_ys = given_ct_ys(closure, ct_ys, closure.window)
    lam = given_ct_carry(closure, tape.carry, ct_carry)
    leaves = jax.tree.leaves(params)
    return tape_window(closure, tape, leaves, closure.derive(leaves), rows), lam, ct_ys, rows


# ------------------------------------------------------------ the window run again


def replayed(
    closure: Closure, params: list, read: Callable[[Any], list], window: int, length: Any
) -> Callable[[Any], list]:
    """A function from a lag to the residuals of that step in the trajectory run again.

    With weights="replayed" a slot holds what a step was given, its carry and x. Before a
    pullback the steps run again from the oldest carry there is, each from the carry that the
    one before it now returns, so that λ sees one trajectory of one set of parameters.

    Args:
        closure: the traced step.
        params: leaves of the parameters to run it with.
        read: from a lag to the carry and x of that step, the oldest step's beyond what is
            recorded.
        window: how many slots there are.
        length: how many of them are recorded.
    """
    n = len(closure.masks["carry"])

    def body(carry: list, lag: Any) -> tuple[list, list]:
        given = read(lag)
        recorded, x = given[:n], given[n:]
        begins = lag >= length - 1  # later carries are made again
        carry = [jnp.where(begins, v, c) for v, c in zip(recorded, carry, strict=True)]
        (carry, _, _), residuals, _ = closure.forward(params, carry, x)
        return jax.tree.leaves(carry), residuals

    lags = jnp.arange(window, dtype=jnp.int32)
    oldest = read(window - 1)[:n]
    _, stacks = scan_stacking(body, oldest, lags, closure.slot, window, first=48, reverse=True)
    return lambda lag: rows_at(stacks, lag)
