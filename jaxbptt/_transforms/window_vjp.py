"""The window-composed VJP: the recurrence of λ over the lags and the sum over them.

    λ_{s-1} = (∂c_s/∂c_{s-1})ᵀ λ_s + (∂y_s/∂c_{s-1})ᵀ ȳ_s
    θ̄ = Σ_s (∂c_s/∂θ)ᵀ λ_s + (∂y_s/∂θ)ᵀ ȳ_s

from the newest step backwards. All lists hold differentiable leaves; "weights" are
the arrays that the step closes over, then the parameters.
"""

import bisect
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbptt import _errors
from jaxbptt._arrays import select_rows, where_or_zero, widened, zeros
from jaxbptt._closure.closure import Closure, combine, pick
from jaxbptt._closure.contraction import AtLag, Contraction
from jaxbptt._closure.pullbacks import Mask, Pullback
from jaxbptt._compat import lax_scan
from jaxbptt._jaxprs.cpu_products import bind_product
from jaxbptt._jaxprs.evaluate import ZERO, Bind, Value
from jaxbptt._jaxprs.loops import counting, put, scan_stacking
from jaxbptt._jaxprs.loops import rows as rows_at
from jaxbptt._transforms.cotangents import given_ct_carry, given_ct_ys
from jaxbptt._transforms.tape import (
    RecordedSteps,
    Tape,
    layout,
    put_in_at,
    recorded_steps,
    settings_of,
)
from jaxbptt._types import PyTree, leaf_type
from jaxbptt._windows import Reach, reach_of_rows


@dataclasses.dataclass(frozen=True)
class Window:
    """The recorded steps that a cotangent meets on its way back.

    Attributes:
        recorded: the residuals of each step; every lag below `steps` can be read.
        invariant: the residuals that are the same in all steps.
        steps: how many lags there are at most (static).
        reach: lags from here on are not reached (may be traced).
        parts: of each leaf of λ, how many lags it is followed; nothing where that is all.
        cut: the same where a group is shorter than `parts` allows for (traced); else nothing.
        as_far: whether the loop over the lags ends where the reach does, and not at `steps`.
        keep: λ is divided by this as it goes on to a further lag, ȳ by as much.
        foreign_axes: mesh axes over which the ring varies, and what the step leaves on it does not.
    """

    recorded: RecordedSteps
    invariant: list
    steps: int
    reach: Any
    parts: tuple[int, ...] = ()
    cut: tuple[Any, ...] = ()
    as_far: bool = False
    keep: float = 1.0
    foreign_axes: tuple[str, ...] = ()

    def read(self, lag: Any) -> list:
        """The residuals of one step."""
        return self.recorded.read(lag)

    def followed(self, lag: Any, alive: Mask) -> list:
        """Of each leaf of λ whether it is followed at a lag, one of a segment's."""
        if not self.cut:
            return list(alive)
        return [a & (lag < cut) for a, cut in zip(alive, self.cut, strict=True)]


@dataclasses.dataclass(frozen=True)
class WindowCotangents:
    """Flat cotangents of a window."""

    weights: list  # summed over the lags: of closed-over arrays, then of params; arrays or ZERO
    carry: list  # the last λ
    xs: list  # x̄ by lag, each (steps, *x.shape), lag 0 first; empty unless asked for

    def then(self, older: "WindowCotangents") -> "WindowCotangents":
        """Those of a longer window, of which `older` has the other lags."""
        if not self.weights and not self.xs:
            return older
        weights = _each(plus, self.weights, older.weights)
        return WindowCotangents(weights, older.carry, _each(_joined, self.xs, older.xs))


class Arriving(NamedTuple):
    """The cotangents of a window's outputs.

    Attributes:
        carry: c̄, of the newest carry.
        ys: ȳ of the last `rows` steps, of the leaves that are asked for: each (rows, *y.shape),
            oldest first.
        rows: how many steps have a ȳ; the older ones only pass λ on.
        asked: which leaves of y have a cotangent, of those that are followed.
    """

    carry: list
    ys: list
    rows: int
    asked: Sequence[bool] | bool = True

    def with_y_in_carry(self, closure: Closure) -> "Arriving":
        """The same, with the newest ȳ in c̄ where y is the new carry, or a part of it.

        The loop over the lags then has no ȳ to bring along.
        """
        if self.rows != 1:
            return self
        places = closure.y_in_carry
        asked = [self.asked] * len(places) if isinstance(self.asked, bool) else self.asked
        carry, ys, rest = list(self.carry), iter(self.ys), []
        for is_asked, place in zip(asked, places, strict=True):
            if is_asked and place is not None:
                carry[place] = carry[place] + next(ys)[0]
            elif is_asked:
                rest.append(next(ys))
        still = tuple(a and place is None for a, place in zip(asked, places, strict=True))
        return Arriving(carry, rest, int(any(still)), still)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is wanted of a window, besides the last λ."""

    closed_over: Sequence[bool] | bool  # which of the arrays that the step closes over
    xs: bool


def pull_window(
    closure: Closure, window: Window, arriving: Arriving, wanted: Wanted
) -> WindowCotangents:
    """Chains the closures of a window, the weights' cotangents in the weights' own dtypes."""
    ct = window_sums(closure, window, arriving, wanted)
    return dataclasses.replace(ct, weights=dense_weights(closure, ct.weights))


def window_sums(
    closure: Closure, window: Window, arriving: Arriving, wanted: Wanted
) -> WindowCotangents:
    """`pull_window` with the weights' cotangents as they are added up: arrays or ZERO."""
    if window.as_far:
        # A loop that runs as often as a traced number says has no reverse mode: a second derivative
        # is refused here, in a sentence, before JAX meets that loop.
        carry, ys = once_differentiable((arriving.carry, arriving.ys))
        arriving = arriving._replace(carry=carry, ys=ys)
    # From the newest segment to the oldest; λ goes from one to the next.
    ct = WindowCotangents([], arriving.carry, [])
    try:
        for segment in _segments(closure, window, arriving):
            ct = ct.then(_sweep(closure, window, segment, ct.carry, wanted))
    except ValueError as refused:
        if window.foreign_axes:
            raise _errors.ring_varies(window.foreign_axes) from refused
        raise
    return ct


@jax.custom_jvp
def once_differentiable(values: PyTree) -> PyTree:
    """The values as they are, which no derivative may flow through: the loop has no fixed end."""
    return values


@once_differentiable.defjvp
def _refuse_a_derivative(primals: Any, tangents: Any) -> Any:
    raise _errors.traced_reach_again()


class TermsByLag(NamedTuple):
    """What there is of each lag, stacked: a list of leaves each."""

    params: list  # the terms of θ̄
    carry: list  # the λ handed on
    sums: list  # the sums of the terms so far


def by_lag(
    closure: Closure,
    window: Window,
    arriving: Arriving,
    of: Callable[[jax.Array], jax.Array],
    of_sum: Callable[[jax.Array], jax.Array],
) -> TermsByLag:
    """The terms of θ̄ and λ by lag, each put through `of`, the sums through `of_sum`."""
    state, stacks = (arriving.carry, zero_sums(closure.kinds.params)), []
    for segment in _segments(closure, window, arriving):
        state, of_lags = _terms(closure, window, segment, state, of, of_sum)
        stacks.append(of_lags)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacks)


def by_range(
    closure: Closure, window: Window, arriving: Arriving, ends: tuple[int, ...]
) -> list[list]:
    """The terms of θ̄ summed over ranges of lags, for the price of one walk over them all.

    Args:
        closure: the traced step.
        window: the recorded steps.
        arriving: the cotangents.
        ends: where each range ends, ascending; the next one begins there, the first at lag 0.

    Returns:
        For each range the sums of the parameters' leaves, half precisions in float32.
    """
    wanted, first = Wanted(closed_over=False, xs=False), len(closure.kinds.closed_over)
    lam, sums = arriving.carry, [[ZERO] * len(closure.kinds.params) for _ in ends]
    for segment in _segments(closure, window, arriving, ends):
        ct = _sweep(closure, window, segment, lam, wanted)
        # A range has several segments where a part's window ends within it.
        place = bisect.bisect_left(ends, segment.stop)
        lam, sums[place] = ct.carry, _each(plus, sums[place], ct.weights[first:])
    return [list(map(widened, densify(of_range, closure.kinds.params))) for of_range in sums]


def zero_sums(kinds: Iterable) -> list:
    """Zeros to add up arrays of these types in: half precisions in float32."""
    return [widened(zeros(kind)) for kind in kinds]


@dataclasses.dataclass(frozen=True)
class _Segment:
    """Lags that one pullback serves."""

    pullback: Pullback
    alive: Mask  # the leaves of λ whose window is not over
    start: int
    stop: int
    ct_ys: list  # each (stop - start, *y.shape), newest first; empty where there is no ȳ


def _segments(
    closure: Closure, window: Window, arriving: Arriving, cuts: Sequence[int] = ()
) -> list[_Segment]:
    """The window cut where a part's window is over, where the last row of ȳ is, and at `cuts`."""
    # With a reach below the number of rows the older ones are not reached.
    n, rows = len(closure.kinds.carry), min(arriving.rows, window.steps)
    # The loop goes by lag, and cotangents come in the order of time.
    newest_first = [jnp.flip(leaf, 0)[:rows] for leaf in arriving.ys]
    # One loop is cheaper than two, where rows of zeros cost next to nothing.
    together = rows == window.steps or (closure.indifferent_to_y and not window.parts)
    if together:
        newest_first = [padded(leaf, window.steps - rows) for leaf in newest_first]
    # Where the last ȳ has been taken in, and where a part of the carry has come to its end, another
    # pullback begins, which does less.
    stops = sorted({window.steps, *window.parts} | (set() if together or not rows else {rows}))
    stops = sorted({*stops, *(cut for cut in cuts if cut < window.steps)})
    segments = []
    for start, stop in zip([0, *stops], stops, strict=False):
        with_y = together or start < rows
        alive = tuple(start < part for part in window.parts or (stop,) * n)
        pullback = closure.pullback(carry=alive, y=arriving.asked if with_y else False)
        ys = [leaf[start:stop] for leaf in newest_first] if with_y else []
        segments.append(_Segment(pullback, alive, start, stop, ys))
    return segments


def _terms(
    closure: Closure,
    window: Window,
    segment: _Segment,
    state: tuple[list, list],
    of: Callable,
    of_sum: Callable,
) -> tuple[tuple[list, list], TermsByLag]:
    """One segment of `by_lag`: the last λ and the sums, and what there is of each lag."""
    kinds, alive, outputs = closure.kinds, segment.alive, segment.pullback.outputs
    contraction = segment.pullback.divide([], [*outputs.params, *or_zero(alive, outputs.carry)])

    def trip(state: Any, row: Any) -> tuple[Any, TermsByLag]:
        lam, sums = state
        (lag,), ct_y = row
        args = [*window.read(lag), *window.invariant, *pick(alive, lam), *ct_y]
        live = lag < window.reach
        outs = _at_lag(contraction, args, [*kinds.params, *kinds.carry], live).outs
        n = len(kinds.params)
        params, older = [where_or_zero(live, v) for v in outs[:n]], outs[n:]
        lam = _each(jnp.where, [live & a for a in alive], older, lam)
        handed_on = _each(lambda v, a: where_or_zero(live & a, v), lam, alive)
        sums = _each(lambda total, v: total + v.astype(total.dtype), sums, params)
        found = TermsByLag(
            *(list(map(f, vs)) for f, vs in ((of, params), (of, handed_on), (of_sum, sums)))
        )
        return (lam, sums), found

    lags = counting(segment.stop - segment.start, segment.start)
    return lax_scan(trip, state, (lags, segment.ct_ys))


def pull_newest_x(
    closure: Closure, residuals: list, ct_carry: list, ct_y: list, asked: Sequence[bool] | bool
) -> list:
    """x̄ of the newest step alone, from its recorded residuals and the invariant ones."""
    pullback = closure.pullback(y=asked)
    # The side effects of this step's pullback belong to the sweep.
    contraction = pullback.divide([], pullback.outputs.x, effects=False)
    made = contraction.at_lag([*residuals, *ct_carry, *ct_y])
    return densify(made.outs, closure.kinds.x)


def _sweep(
    closure: Closure, window: Window, segment: _Segment, lam: list, wanted: Wanted
) -> WindowCotangents:
    """The lags of a segment in one loop, then the contractions over them."""
    kinds, alive, outputs = closure.kinds, segment.alive, segment.pullback.outputs
    x_kinds = kinds.x if wanted.xs else []
    contraction = segment.pullback.divide(
        [*or_zero(wanted.closed_over, outputs.closed_over), *outputs.params],
        [*or_zero(alive, outputs.carry), *(outputs.x if wanted.xs else [])],
    )

    in_slots = _operands_in_slots(window, segment, contraction, wanted)
    stacked = [there is None for there in in_slots]
    run = contraction.runner(window.invariant, segment.stop - segment.start)

    # The state is λ as it enters the lag, and the sums of what is not contracted.
    def trip(state: Any, row: Any) -> tuple[Any, Any]:
        lam, sums = state
        (lag,), ct_y = row
        live, followed = (lag < window.reach) & (lag < segment.stop), window.followed(lag, alive)
        # A leaf that is cut in the midst of a segment stays what it was, and sends nothing on.
        sent = _each(where_or_zero, followed, lam) if window.cut else lam
        ct_y = _scaled(ct_y, window.keep, -lag) if window.keep != 1 else ct_y
        args = [*window.read(lag), *window.invariant, *pick(alive, sent), *ct_y]
        made = _at_lag(contraction, args, [*kinds.carry, *x_kinds], live, run)
        # What comes out is selected, rather than zeros sent in: a pullback of the
        # user's own need not give zero for zero, and 0·inf is NaN.
        older, xs = made.outs[: len(lam)], made.outs[len(lam) :]
        older = _scaled(older, window.keep, jnp.int32(-1)) if window.keep != 1 else older
        lam = _each(jnp.where, [live & f for f in followed], older, lam)
        # An operand of a lag that is not reached adds nothing to the product.
        kept = [where_or_zero(live, v) for v in (*xs, *pick(stacked, made.operands))]
        return (lam, contraction.add(sums, made.summands, live)), kept

    state = lam, contraction.zero_sums()
    kept_kinds = [*x_kinds, *(v.aval for v in pick(stacked, contraction.operands))]
    if window.as_far:
        return _blocks_as_far_as_the_reach(contraction, window, segment, trip, state, x_kinds)
    length = segment.stop - segment.start
    rows = counting(length, segment.start), segment.ct_ys
    place = None if all(stacked) else window.recorded.slot
    (lam, sums), kept = scan_stacking(trip, state, rows, kept_kinds, length, first=0, place=place)
    # The loop is over: what it stacked is contracted, for all its lags at once.
    xs, made = kept[: len(x_kinds)], kept[len(x_kinds) :]
    operands = combine(stacked, made, pick(stacked, in_slots, False))
    weights = contraction.finish(window.invariant, contraction.contract(operands), sums)
    return WindowCotangents(weights, lam, xs)


def _operands_in_slots(
    window: Window, segment: _Segment, contraction: Contraction, wanted: Wanted
) -> list[jax.Array | None]:
    """Of each operand what the slots hold of it, zeros where a lag is not reached, or None.

    An operand that is a residual need not be stacked anew. The loop then stacks the others in the
    order of the slots too, which it can where it comes to each slot and x̄ is not wanted by lag.
    """
    recorded, residuals = window.recorded, segment.pullback.residuals_by_variable
    whole = segment.start == 0 and segment.stop == recorded.slots
    if not whole or window.as_far or wanted.xs:
        return [None] * len(contraction.operands)
    live = recorded.slot(jnp.arange(recorded.slots, dtype=jnp.int32)) < window.reach

    def of(operand: Any) -> jax.Array | None:
        there = recorded.all_slots(residuals[operand]) if operand in residuals else None
        return None if there is None else select_rows(live, there)

    return list(map(of, contraction.operands))


_BLOCK = 16  # lags between two looks at the reach: fewer would contract the weights more often


def _blocks_as_far_as_the_reach(
    contraction: Contraction,
    window: Window,
    segment: _Segment,
    trip: Callable,
    state: tuple[list, list],
    x_kinds: list,
) -> WindowCotangents:
    """A segment's lags in blocks, as many as the reach asks for, each contracted at its end."""
    length = segment.stop - segment.start
    # The last block may reach behind the segment: its rows are padded, and masked by the trip.
    block = min(_BLOCK, length)
    rows = -(-length // block) * block
    ct_ys = [padded(leaf, rows - length) for leaf in segment.ct_ys]
    kinds = [*x_kinds, *(v.aval for v in contraction.operands)]
    n = len(x_kinds)
    # x̄ of the lags that are never walked is zero.
    xs = [zeros(leaf_type(kind).stacked(rows)) for kind in x_kinds]

    def goes_on(carried: tuple) -> Any:
        return segment.start + carried[0] < jnp.minimum(window.reach, segment.stop)

    def of_block(carried: tuple) -> tuple:
        # The state of the loop: the first lag of the next block, λ with what is summed lag by lag,
        # the products contracted so far, and x̄ of all lags.
        begin, state, contracted, xs = carried
        lags = begin + counting(block, segment.start)
        these = [lax.dynamic_slice_in_dim(leaf, begin, block) for leaf in ct_ys]
        state, kept = scan_stacking(trip, state, (lags, these), kinds, block, first=96)
        made = contraction.contract(kept[n:])
        contracted = [total + v for total, v in zip(contracted, made, strict=True)]
        xs = [
            lax.dynamic_update_slice_in_dim(all_, v, begin, 0)
            for all_, v in zip(xs, kept[:n], strict=True)
        ]
        return begin + block, state, contracted, xs

    carried = jnp.int32(0), state, contraction.zero_contractions(), xs
    _, (lam, sums), contracted, xs = lax.while_loop(goes_on, of_block, carried)
    weights = contraction.finish(window.invariant, contracted, sums)
    return WindowCotangents(weights, lam, [v[:length] for v in xs])


def _scaled(values: list, base: float, power: jax.Array) -> list:
    """Values times a power of a number, half precisions in float32."""

    def one(value: jax.Array) -> jax.Array:
        wide = widened(value)
        factor = jnp.power(jnp.asarray(base, wide.real.dtype), power.astype(wide.real.dtype))
        return (wide * factor.astype(wide.dtype)).astype(value.dtype)

    return list(map(one, values))


def _at_lag(
    contraction: Contraction, args: list, kinds: list, live: Any, run: Bind = bind_product
) -> AtLag:
    """One lag of a divided pullback; side effects of a lag that is not live do not happen."""

    def pulled() -> AtLag:
        made = contraction.at_lag(args, run)
        return made._replace(outs=densify(made.outs, kinds))

    if not contraction.acts:
        return pulled()
    none = jax.tree.map(lambda kind: jnp.zeros(kind.shape, kind.dtype), jax.eval_shape(pulled))
    return lax.cond(live, pulled, lambda: none)


def or_zero(wanted: Sequence[bool] | bool, values: list) -> list:
    """The values that are wanted, ZERO in place of the others."""
    if isinstance(wanted, bool):
        return list(values) if wanted else [ZERO] * len(values)
    return [v if w else ZERO for w, v in zip(wanted, values, strict=True)]


def _each(function: Callable, *lists: Iterable) -> list:
    return [function(*items) for items in zip(*lists, strict=True)]


def dense_weights(closure: Closure, values: list) -> list:
    """The weights' cotangents as arrays, in the weights' own dtypes."""
    kinds = [*closure.kinds.closed_over, *closure.kinds.params]
    return _each(lambda v, kind: _dense(v, kind).astype(kind.dtype), values, kinds)


def padded(leaf: jax.Array, rows: int) -> jax.Array:
    """The leaf with rows of zeros behind."""
    return jnp.pad(leaf, [(0, rows)] + [(0, 0)] * (leaf.ndim - 1)) if rows else leaf


def _joined(new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.concatenate([new, old])


def plus(a: Value, b: Value) -> Value:
    """The sum of two values of which each may be ZERO."""
    return b if a is ZERO else a if b is ZERO else a + b


def densify(values: list, kinds: list) -> list:
    """Arrays, where some values may be ZERO."""
    return _each(_dense, values, kinds)


def _dense(value: Value, kind: Any) -> jax.Array:
    return zeros(kind) if value is ZERO else value


# ------------------------------------------------------------ what of a tape a cotangent meets


def tape_window(
    closure: Closure,
    tape: Tape,
    params: list,
    invariant: list,
    rows: int,
    group: jax.Array | None = None,
    reach: Reach | None = None,
) -> Window:
    """What the last `rows` outputs of a group reach of a tape, as far as it is recorded.

    Args:
        closure: the traced step.
        tape: the tape after the newest step.
        params: leaves of the parameters, for "replayed".
        invariant: the residuals that depend on parameters alone.
        rows: how many outputs send cotangents back.
        group: how many steps the group has (traced), None where it has at least `rows`. One that
            is over after fewer reaches no further behind its first step.
        reach: how many lags of the window count; None for all.
    """
    settings, windows = settings_of(tape), (closure.layout.window, *closure.layout.parts)
    held, recorded, limit = settings.window, tape.length, None
    if reach is not None and reach.traced:
        tape, params, invariant = once_differentiable((tape, params, invariant))
    if reach is not None:
        recorded = jnp.minimum(recorded, reach.lags)
        if isinstance(reach.lags, int):
            # A reach that is known while tracing makes the program that a shorter window would.
            held = min(held, reach.lags)
            windows = tuple(min(w, held) for w in windows)
        elif reach.keep != 1:
            # A drawn one cuts off, with its probability, what the whole window would reach.
            limit = reach.lags
        else:  # then only masks and the number of trips know of it
            last = rows if group is None else jnp.minimum(group, rows)
            beyond = jnp.maximum(reach.lags - settings.every, 0)
            limit = jnp.minimum(reach.lags, last + beyond)
    as_far = limit is not None
    steps, *parts = (reach_of_rows(w, rows, settings.every) for w in windows)
    steps_read, foreign = recorded_steps(tape), frozenset[str]()
    if settings.weights == "replayed":
        steps_read = replayed(
            closure, params, steps_read.read, held, recorded, put_in_at(tape), as_far=as_far
        )
    else:
        pairs = zip(layout(tape), closure.slot, strict=True)
        foreign = frozenset().union(*(there.varying - left.varying for there, left in pairs))
    # Lags from `farthest` on are walked and masked: early in a run fewer steps are recorded than
    # the window has, at the end of a short group fewer are reached.
    farthest, cut = tape.length, list[Any]()
    if steps < settings.window:
        farthest = jnp.minimum(farthest, steps)
    if limit is not None:
        farthest = jnp.minimum(farthest, limit)
    if group is not None:
        # How far a group reaches behind its first step does not depend on how many steps it has.
        last = jnp.minimum(group, rows)
        shorter, *cut = (jnp.minimum(w, last + max(w - settings.every, 0)) for w in windows)
        farthest = jnp.minimum(farthest, shorter)
    keep = 1.0 if reach is None else reach.keep
    bounds = steps, farthest, tuple(parts), tuple(cut)
    return Window(steps_read, invariant, *bounds, as_far, keep, tuple(sorted(foreign)))


def given_window(
    closure: Closure,
    tape: Tape,
    params: PyTree,
    ct_ys: PyTree,
    ct_carry: PyTree,
    reach: Reach | None = None,
) -> tuple[Window, Arriving]:
    """Checked cotangents from outside, and what they reach of a tape."""
    rows, ys = given_ct_ys(closure, ct_ys, closure.layout.window)
    lam, leaves = given_ct_carry(closure, tape.carry, ct_carry), jax.tree.leaves(params)
    window = tape_window(closure, tape, leaves, closure.invariant(leaves), rows, reach=reach)
    return window, Arriving(lam, ys, rows).with_y_in_carry(closure)


# ------------------------------------------------------------ the window run again


def replayed(
    closure: Closure,
    params: list,
    read: Callable[[Any], list],
    window: int,
    length: Any,
    put_in: Callable[[Any], jax.Array],
    *,
    as_far: bool = False,
) -> RecordedSteps:
    """The residuals of the steps in the trajectory run again.

    With weights="replayed" a slot holds what a step was given, its carry and x. Before a
    pullback the steps run again from the oldest carry there is, each from the carry that the
    one before it now returns, so that λ sees one trajectory of one set of parameters.

    Args:
        closure: the traced step.
        params: leaves of the parameters to run it with.
        read: from a lag to the carry and x of that step; beyond what is recorded to some step's.
        window: how many slots there are.
        length: how many of them are recorded, and are to be run again.
        put_in: from a lag to whether the carry of that step was not made by the one before it.
        as_far: whether the loop runs `length` steps, and not `window`.
    """
    n = len(closure.layout.followed.carry)

    def body(carry: list, lag: Any) -> tuple[list, list]:
        given = read(lag)
        recorded, x = given[:n], given[n:]
        begins = (lag >= length - 1) | put_in(lag)  # other carries are made again
        # A select and no branch: lags before the oldest recorded step run too, and are masked
        # later.
        carry = [jnp.where(begins, v, c) for v, c in zip(recorded, carry, strict=True)]
        made = closure.run(params, carry, x)
        return jax.tree.leaves(made.step[0]), made.recorded

    # Before anything is recorded slots are zeros; the loop then makes residuals that are masked.
    oldest = read(jnp.maximum(length - 1, 0) if as_far else window - 1)[:n]
    if as_far:
        # Rows behind `length` are never written, and what is made of them is masked.
        stacks = [zeros(kind.stacked(window)) for kind in closure.slot]

        def step_again(i: Any, state: tuple[list, list]) -> tuple[list, list]:
            carry, stacks = state
            lag = length - 1 - i
            carry, residuals = body(carry, lag)
            return carry, [put(v, u, lag) for v, u in zip(stacks, residuals, strict=True)]

        _, stacks = lax.fori_loop(0, length, step_again, (oldest, stacks))
    else:
        lags = jnp.arange(window, dtype=jnp.int32)
        _, stacks = scan_stacking(body, oldest, lags, closure.slot, window, first=48, reverse=True)

    def read_again(lag: Any) -> list:
        return rows_at(stacks, jnp.minimum(lag, window - 1))

    # They were stacked in the order of the lags.
    return RecordedSteps(read_again, window, all_slots=stacks.__getitem__)
