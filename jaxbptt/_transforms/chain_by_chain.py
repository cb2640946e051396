"""A run pulled back chain by chain: each group of outputs by itself, through its own window.

The sweep over all chains at once pulls back the sum of their cotangents, λ and ȳ apart. That is
right where the pullback is linear and does nothing else. A rule of the user's that is not linear
(a cotangent clipped at each step) or that acts (a print) needs to see each chain as it is.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbptt import _errors
from jaxbptt._arrays import where_or_zero
from jaxbptt._closure.closure import Closure
from jaxbptt._closure.pullbacks import Mask, Pullback
from jaxbptt._compat import lax_scan
from jaxbptt._jaxprs.loops import rows
from jaxbptt._transforms.groups import Groups
from jaxbptt._transforms.scan_forward import Checkpoints
from jaxbptt._transforms.tape import RecordedSteps
from jaxbptt._transforms.window_vjp import (
    Arriving,
    Wanted,
    Window,
    dense_weights,
    densify,
    window_sums,
    zero_sums,
)
from jaxbptt._types import leaf_type
from jaxbptt._windows import reach_of_rows


def is_needed(pullback: Pullback, groups: Groups) -> bool:
    """Whether chains have to be pulled back by themselves."""
    several = groups.chains > 1
    # The common sweep would run side effects at steps that no chain reaches.
    return (several and not pullback.is_linear) or (pullback.acts and (several or groups.gaps))


class ChainSums(NamedTuple):
    """What the chains so far have sent back, half precisions in float32."""

    weights: list
    carry: list
    xs: list  # padded in front (behind if reversed) by rows for steps before the first


def pull_chains(chains: "SeparateChains", ct_carry: list) -> ChainSums:
    """Cotangents of the weights, the initial carry and xs of a run, the last group's chain first.

    Args:
        chains: the recorded run, and the cotangents of its outputs.
        ct_carry: cotangent of the final carry.
    """
    length, every, kinds = chains.groups.length, chains.groups.every, chains.closure.kinds
    if not isinstance(length, int) and not chains.groups.whole:
        why = "where each group of outputs is pulled back by itself (a rule is not linear, or acts)"
        raise _errors.symbolic_length(length, why)
    sums = chains.zero_sums()
    # The last group is the short one, if there is one. It has a window of its own, so that it is
    # pulled back by itself; all others are alike, and share a loop.
    full, left_over = divmod(length, every)
    if left_over:
        sums = chains.with_chain(sums, jnp.int32(length), left_over, ct_carry)

    def one_group(sums: ChainSums, group: Any) -> tuple[ChainSums, None]:
        end = (group + 1) * every
        # Only the group at the run's end sees the final carry's cotangent.
        last = [where_or_zero(end == length, v) for v in ct_carry]
        return chains.with_chain(sums, end, every, last), None

    sums, _ = lax_scan(one_group, sums, jnp.arange(full, dtype=jnp.int32), reverse=True)
    begin = 0 if chains.reverse else chains.padding
    xs = [lax.slice_in_dim(v, begin, begin + length) for v in sums.xs]
    return ChainSums(
        dense_weights(chains.closure, sums.weights),
        [v.astype(kind.dtype) for v, kind in zip(sums.carry, kinds.carry, strict=True)],
        [v.astype(kind.dtype) for v, kind in zip(xs, kinds.x, strict=True)],
    )


@dataclasses.dataclass(frozen=True)
class SeparateChains:
    """A recorded run and what comes back into it.

    Attributes:
        closure: the traced step.
        residuals: the recorded ones, each (length, *residual.shape), or what those of a window are
            made of again for each chain.
        invariant: the residuals that are the same at all steps.
        groups: which outputs reach which steps.
        reverse: whether step 1 is the last row of the residuals.
        ct_ys: cotangents of the leaves of ys that are asked for, each (length, *y.shape).
        asked: which leaves these are, of those that are followed.
    """

    closure: Closure
    residuals: list | Checkpoints
    invariant: list
    groups: Groups
    reverse: bool
    ct_ys: list
    asked: Mask

    @property
    def padding(self) -> int:
        """How many rows x̄ has for steps before the first, which a window may cover."""
        return min(self.groups.window, self.groups.length) - 1

    @property
    def weights(self) -> list:
        """The types of the weights."""
        return [*self.closure.kinds.closed_over, *self.closure.kinds.params]

    def zero_sums(self) -> ChainSums:
        """What no chain sends back."""
        kinds, rows = self.closure.kinds, self.groups.length + self.padding
        return ChainSums(
            zero_sums(self.weights),
            zero_sums(kinds.carry),
            zero_sums([leaf_type(kind).stacked(rows) for kind in kinds.x]),
        )

    def recorded(self, end: Any, steps: int) -> tuple[list, Any]:
        """Residuals of the `steps` steps up to `end` at least, and which row is their first."""
        kept, length = self.residuals, self.groups.length
        if not isinstance(kept, Checkpoints):
            return kept, 0
        # Runs start where a block does, and are of one size: the last one ends with the run.
        size = steps + kept.steps - 1
        size = min(size + (length - size) % kept.steps, length)
        # The block in which the window's first step lies; no later than where a run of this size
        # ends with the last step.
        begin = jnp.maximum(end - steps, 0) // kept.steps * kept.steps
        begin = jnp.minimum(begin, length - size)
        first = length - size - begin if self.reverse else begin
        return kept.record(self.closure, first, size), first

    def with_chain(self, sums: ChainSums, end: Any, outputs: int, ct_carry: list) -> ChainSums:
        """The sums with what the group of so many outputs sends back that ends at step `end`."""
        every, length = self.groups.every, self.groups.length
        windows = self.groups.window, *self.groups.parts
        steps, *parts = (min(reach_of_rows(w, outputs, every), length) for w in windows)
        count = min(outputs, steps)
        newest = length - end if self.reverse else end - 1  # its row
        stacks, first = self.recorded(end, steps)

        def read(lag: Any) -> list:
            lag = jnp.minimum(lag, end - 1)  # the first step again, where there is none
            return rows(stacks, (newest + lag if self.reverse else newest - lag) - first)

        # From here on it is the same as for a recorded loop: a window that ends at this step.
        window = Window(
            RecordedSteps(read), self.invariant, steps, jnp.minimum(end, steps), tuple(parts)
        )
        ct_ys = [_rows_up_to(v, newest, count, self.reverse) for v in self.ct_ys]
        arriving = Arriving(ct_carry, ct_ys, count, self.asked)
        ct = window_sums(self.closure, window, arriving, Wanted(closed_over=True, xs=True))
        # λ goes on into init where it was not cut before the first step.
        of_leaves = self.groups.parts or (self.groups.window,) * len(ct.carry)
        reached = [end <= reach_of_rows(w, outputs, every) for w in of_leaves]
        into_init = [where_or_zero(r, lam) for r, lam in zip(reached, ct.carry, strict=True)]
        start = newest if self.reverse else newest + 1 - steps + self.padding
        # x̄ comes newest first, which is the order of the rows where the run goes from the last to
        # the first.
        xs = [v if self.reverse else jnp.flip(v, 0) for v in ct.xs]
        return ChainSums(
            _added(sums.weights, densify(ct.weights, self.weights)),
            _added(sums.carry, into_init),
            [_added_at(total, start, v) for total, v in zip(sums.xs, xs, strict=True)],
        )


def _rows_up_to(stack: jax.Array, newest: Any, count: int, reverse: bool) -> jax.Array:
    """The rows of the `count` steps that end in the row `newest`, oldest first."""
    start = newest if reverse else newest + 1 - count
    found = lax.dynamic_slice_in_dim(stack, start, count)
    return jnp.flip(found, 0) if reverse else found


def _added(totals: list, values: list) -> list:
    return [a + b.astype(a.dtype) for a, b in zip(totals, values, strict=True)]


def _added_at(total: jax.Array, start: Any, values: jax.Array) -> jax.Array:
    """The total with values added to its rows from `start` on."""
    old = lax.dynamic_slice_in_dim(total, start, len(values))
    return lax.dynamic_update_slice_in_dim(total, old + values.astype(total.dtype), start, 0)
