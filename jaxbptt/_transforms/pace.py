"""Pace: at each call every cotangent in flight goes a few lags further, all of them at once.

A sliding window of K steps costs K pullbacks one after the other at every step. With a pace p
the loss of a call goes back p lags at once, p more at the next call, and so on, beside the
losses of the calls before it: C = ceil(K / p) chains in flight, p + 1 steps apart. A call is p
pullbacks one after the other, each of all C chains in one batch, and a loss's term at lag k
arrives k // p calls later.

The ring has p + 1 rows of C columns, with step τ in the row τ mod (p + 1). At the i-th lag of a
call all chains read one row, chain j (of the loss j calls ago) in the column q - j, where q is the
column of the newest step at that lag. λ is kept in the order of the columns, and turned
by one where the next lag lies in another round of rows: nothing is gathered.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxbptt import _errors
from jaxbptt._arrays import select_rows as select
from jaxbptt._arrays import zeros
from jaxbptt._closure.closure import Closure
from jaxbptt._closure.contraction import AtLag, Contraction
from jaxbptt._closure.pullbacks import Mask, Pullback
from jaxbptt._compat import lax_scan
from jaxbptt._jaxprs.evaluate import ZERO, Value, bind
from jaxbptt._jaxprs.named_axes import as_mapped, axes_in_sight, with_rule
from jaxbptt._transforms.cotangents import (
    is_scalar,
    is_symbolic_zero,
    primal_values,
    refuse_what_is_not_followed,
    with_none,
)
from jaxbptt._transforms.tape import (
    Columns,
    Settings,
    Tape,
    columns_of,
    push,
    settings_of,
    with_chains,
)
from jaxbptt._transforms.window_vjp import dense_weights, densify, or_zero, plus, pull_newest_x
from jaxbptt._types import PyTree, type_of

Wanted: TypeAlias = Sequence[bool] | bool  # of each leaf, or of all


def call_with_pace(
    closure: Closure, tape: Tape, params: PyTree, x: PyTree
) -> tuple[Tape, PyTree, PyTree]:
    """Runs the step, records it and moves the chains, ȳ being 1; returns (new tape, y, aux).

    The chains move in the forward pass, for they are part of the new tape. What is left for the
    reverse mode is to multiply the gradient of the call by the cotangent of y.
    """
    settings = settings_of(tape)
    y_type = type_of(closure.layout.outputs.tree()[1])
    if not (len(y_type.leaves) == 1 and is_scalar(y_type.leaves[0])):
        raise _errors.loss_not_scalar_with_pace(y_type)

    # With ȳ = 1 now, for the chains have to move before anybody asks for a gradient; y's real
    # cotangent only scales what they give.
    def run(
        closed_over: list, params: list, x: list, rest: tuple[Tape, Closure]
    ) -> tuple[Any, Moved, list]:
        tape, closure = rest
        bound = dataclasses.replace(closure, closed_over=closed_over)
        made = bound.run(params, jax.tree.leaves(tape.carry), x)
        carry, y, aux = made.step
        ct_y = [jnp.ones_like(leaf) for leaf in jax.tree.leaves(y)]
        given = Given(made.recorded, made.invariant)
        pushed = push(tape, carry, made.recorded)
        moved = move_chains(closure, pushed, given, ct_y, asked=(True,), closed_over=True)
        return (moved.tape, y, aux), moved, made.invariant

    axes, layout = axes_in_sight(closure.forward.jaxpr.eqns), closure.layout

    def forward(*args: Any) -> tuple[Any, Any]:
        refuse_what_is_not_followed(layout, args[0], args[2])
        closed_over, params, x, rest = primal_values(args)
        outs, moved, invariant = run(closed_over, params, x, rest)
        return outs, (rest[1], invariant, moved.unfinished, moved.x)

    def backward(saved: Any, cts: Any) -> tuple[list | None, ...]:
        closure, invariant, unfinished, x = saved
        ct_tape, ct_y, _ = cts
        # A cotangent of the new carry would come when the chains have already moved.
        if not all(map(is_symbolic_zero, jax.tree.leaves(ct_tape.carry))):
            raise _errors.carry_with_pace()
        followed, (ct_y,) = closure.layout.followed, jax.tree.leaves(ct_y)
        if is_symbolic_zero(ct_y):
            return None, None, None, None
        weights = finish(
            closure, settings, invariant, unfinished, asked=(True,), closed_over=True, scale=ct_y
        )
        n = sum(followed.closed_over)
        x = [ct_y.astype(v.dtype) * v for v in x]
        masks = followed.closed_over, followed.params, followed.x
        groups = as_mapped(axes, (weights[:n], weights[n:], x))
        return *map(with_none, masks, groups), None

    apart = dataclasses.replace(closure, closed_over=[])
    leaves = jax.tree.leaves(params), jax.tree.leaves(x)
    recorded_step = with_rule(lambda *args: run(*args)[0], forward, backward, axes)
    return recorded_step(closure.closed_over, *leaves, (tape, apart))


class Given(NamedTuple):
    """Residuals that are not read from the tape."""

    newest: list  # those that the newest step left on the ring
    invariant: list  # those that depend on parameters alone


class Moved(NamedTuple):
    """What moving the chains gives."""

    tape: Tape  # with the chains where they are now
    unfinished: list["Unfinished"]  # of the weights' cotangents, for each pullback of the call
    x: list  # x̄ of the newest step


class Unfinished(NamedTuple):
    """A sum over lags before its products: see `Contraction`."""

    operands: list  # each (lags, *operand.shape)
    sums: list


def move_chains(
    closure: Closure, tape: Tape, given: Given, ct_y: list, *, asked: Mask, closed_over: Wanted
) -> Moved:
    """Starts the chain of the newest step and takes all chains in flight `pace` lags further.

    Args:
        closure: the traced step.
        tape: the tape after the newest step.
        given: residuals that are not read from the tape.
        ct_y: ȳ of the newest step, of the leaves that are asked for.
        asked: which leaves these are, of those that are followed.
        closed_over: which closed-over arrays' cotangents are wanted.
    """
    settings = settings_of(tape)
    chains = _Chains(closure, columns_of(tape), given.invariant, settings)
    first, *others = _divided(closure, settings, asked, closed_over)
    # The newest step's chain begins in its column, where the oldest one has come to its end.
    own = chains.ages(0) == 0
    lam = [select(~own, v) for v in chains.columns.in_flight.lam]
    if closure.indifferent_to_y:
        # One batch of all chains: the others' ȳ is zero, and costs next to nothing.
        of_own = [select(own, v[None]) for v in ct_y]
        lam, unfinished = chains.at_lag(first, lam, of_own, jnp.ones_like(own))
        parts = [unfinished]
    else:
        # ȳ by itself costs much, as of a loss head: only the new chain's own step pays for it.
        newest, of_newest = chains.of_newest(first, given.newest, ct_y)
        lam, unfinished = chains.at_lag(others[0], lam, [], ~own)
        lam = [v + select(own, u[None]) for v, u in zip(lam, newest, strict=True)]
        parts = [of_newest, unfinished]
    lam = chains.turned(lam, 0)
    if settings.lags_per_call != 1:
        lam, unfinished = chains.at_later_lags(others[-1], lam)
        parts.append(unfinished)
    # The chains themselves keep nothing of x̄, and no λ has come to the newest step.
    newest = [*given.newest, *given.invariant]
    x = pull_newest_x(closure, newest, list(map(zeros, closure.kinds.carry)), ct_y, asked)
    in_flight = dataclasses.replace(chains.columns.in_flight, lam=lam)
    return Moved(with_chains(tape, in_flight), parts, x)


def finish(
    closure: Closure,
    settings: Settings,
    invariant: list,
    unfinished: list[Unfinished],
    *,
    asked: Mask,
    closed_over: Wanted,
    scale: Any = None,
) -> list:
    """The weights' cotangents of a call, in the weights' own dtypes: closed-over arrays, params.

    Args:
        closure: the traced step.
        settings: what the tape is for.
        invariant: the residuals that depend on parameters alone.
        unfinished: what `move_chains` left, with the same `asked` and `closed_over`.
        asked: see `move_chains`.
        closed_over: see `move_chains`.
        scale: a factor, None for one. It comes before what is summed over a mesh is summed.
    """
    # Divided again, for a Contraction is no pytree that the reverse mode could be handed.
    contractions = _divided(closure, settings, asked, closed_over)
    total: list[Value] = [ZERO] * sum(map(len, (closure.kinds.closed_over, closure.kinds.params)))
    for contraction, (operands, sums) in zip(contractions, unfinished, strict=True):
        contracted = contraction.contract(operands)
        if scale is not None:
            contracted = [scale.astype(v.dtype) * v for v in contracted]
            sums = [scale.astype(v.dtype) * v for v in sums]
        of_call = contraction.finish(invariant, contracted, sums)
        total = [plus(*pair) for pair in zip(total, of_call, strict=True)]
    return dense_weights(closure, total)


def _divided(
    closure: Closure, settings: Settings, asked: Mask, closed_over: Wanted
) -> list[Contraction]:
    """The pullbacks of a call in the order in which `move_chains` uses them, divided."""

    def divided(pullback: Pullback) -> Contraction:
        weights = or_zero(closed_over, pullback.outputs.closed_over)
        return pullback.divide([*weights, *pullback.outputs.params], pullback.outputs.carry)

    pullbacks = [closure.pullback(y=asked)]
    if not closure.indifferent_to_y:
        pullbacks.append(closure.pullback(y=False))
    if settings.lags_per_call != 1:
        pullbacks.append(closure.pullback(y=False))
    return list(map(divided, pullbacks))


@dataclasses.dataclass(frozen=True)
class _Chains:
    """The chains in flight at one call."""

    closure: Closure
    columns: Columns
    invariant: list
    settings: Settings

    def ages(self, lag: Any) -> jax.Array:
        """How many calls ago the loss was of the chain in each column, at this lag of the call."""
        count = self.settings.slots[1]
        return (self.columns.quotient(lag) - jnp.arange(count, dtype=jnp.int32)) % count

    def at_lag(
        self, contraction: Contraction, lam: list, ct_y: list, counted: jax.Array
    ) -> tuple[list, Unfinished]:
        """λ after lag 0 of the call, of the chains in the columns that are counted."""
        sums, lag = contraction.zero_sums(), jnp.int32(0)
        moved = self._one_lag(contraction, lam, sums, ct_y, lag, counted)
        return moved.lam, Unfinished(moved.operands, moved.sums)

    def at_later_lags(self, contraction: Contraction, lam: list) -> tuple[list, Unfinished]:
        """λ after the lags of the call behind the first."""
        every = jnp.ones(self.settings.slots[1], bool)

        def trip(state: Any, lag: Any) -> tuple[Any, list]:
            lam, sums = state
            moved = self._one_lag(contraction, lam, sums, [], lag, every)
            return (self.turned(moved.lam, lag), moved.sums), moved.operands

        lags = jnp.arange(1, self.settings.lags_per_call, dtype=jnp.int32)
        (lam, sums), stacks = lax_scan(trip, (lam, contraction.zero_sums()), lags)
        return lam, Unfinished([v.reshape(-1, *v.shape[2:]) for v in stacks], sums)

    def of_newest(
        self, contraction: Contraction, residuals: list, ct_y: list
    ) -> tuple[list, Unfinished]:
        """λ of the newest step's chain after its first lag, alone."""
        made = contraction.at_lag([*residuals, *self.invariant, *self._no_lam(), *ct_y])
        sums = contraction.add(contraction.zero_sums(), made.summands, True)
        lam = densify(made.outs, self.closure.kinds.carry)
        return lam, Unfinished([v[None] for v in made.operands], sums)

    def turned(self, lam: list, lag: Any) -> list:
        """λ in the order of the columns of the next lag, which may lie in the round before."""
        wraps = self.columns.row(lag) == 0
        return [jnp.where(wraps, jnp.roll(v, -1, 0), v) for v in lam]

    def _one_lag(
        self,
        contraction: Contraction,
        lam: list,
        sums: list,
        ct_y: list,
        lag: Any,
        counted: jax.Array,
    ) -> "_AtLag":
        """One lag of the call: a pullback of all chains in one batch."""
        ages, kinds, pace = self.ages(lag), self.closure.kinds.carry, self.settings.lags_per_call
        # Each call takes a chain `pace` lags further, and moves the present one step on: a calls
        # old, it meets the step that lies a (pace + 1) + lag behind the newest.
        of_window = ages * pace + lag  # how far back each chain is
        recorded = self.columns.in_flight.count > lag + ages * (pace + 1)
        live = counted & recorded & (of_window < self.settings.window)
        # A part of λ whose own window is over is not followed any further.
        parts = self.closure.layout.parts or (self.settings.window,) * len(lam)
        lam = [select(of_window < part, v) for v, part in zip(lam, parts, strict=True)]

        def pull(residuals: list, lam: list, ct_y: list) -> AtLag:
            made = contraction.at_lag([*residuals, *self.invariant, *lam, *ct_y], bind)
            return made._replace(outs=densify(made.outs, kinds))

        made = jax.vmap(pull)(self.columns.read(lag), lam, ct_y)
        # What comes out is selected, rather than zeros sent in, which 0·inf would make NaN.
        return _AtLag(
            [select(live, v) for v in made.outs],
            contraction.add_batch(sums, made.summands, live),
            [select(live, v) for v in made.operands],
        )

    def _no_lam(self) -> list:
        return [zeros(kind) for kind in self.closure.kinds.carry]


class _AtLag(NamedTuple):
    """What one lag of all chains makes."""

    lam: list
    sums: list
    operands: list
