"""The recorded run: a loop of steps that leaves its residuals behind, stacked.

Or one that leaves no more than a carry for each block of steps, from which `Checkpoints` runs
the block again when its residuals are wanted.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbptt._arrays import size_in_bytes
from jaxbptt._closure.closure import Closure
from jaxbptt._compat import lax_scan
from jaxbptt._jaxprs.loop_fission import Fission, divide
from jaxbptt._jaxprs.loops import SMALL, block_of, block_size, in_blocks, put, rows, scan_stacking


class RunOutputs(NamedTuple):
    """What a recorded run leaves."""

    carry: list  # the last one
    ys: list
    residuals: list  # those on record, each (length, *residual.shape)


def record_run(
    closure: Closure,
    init: list,
    xs: list,
    length: int,
    *,
    reverse: bool,
    unroll: int,
    with_ys: bool = True,
) -> RunOutputs:
    """Runs a step that has no parameters of its own.

    Args:
        closure: the traced step.
        init: the initial carry.
        xs: the inputs, each (length, *x.shape).
        length: how many steps.
        reverse: whether to start from the last row.
        unroll: how many steps a trip of the compiled loop has.
        with_ys: whether the outputs are wanted.
    """
    program, n, m = closure.forward, len(init), len(closure.closed_over)
    jaxpr, consts = program.jaxpr, [*program.consts, *closure.closed_over]
    # The program takes what the step closes over, then carry and x; it gives the step's outputs,
    # then the residuals.
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars[:m]), consts, strict=True))
    state, row = jaxpr.invars[m : m + n], jaxpr.invars[m + n :]
    ys = jaxpr.outvars[n : len(closure.layout.outputs.leaves)] if with_ys else []
    residuals = [jaxpr.outvars[i] for i in closure.layout.recorded]
    made = [v for v in residuals if v not in row]  # residuals that are x itself are in xs already
    fission = divide(jaxpr.eqns, env, row, state, jaxpr.outvars[:n], ys + made)
    block = _block(closure, fission, length)

    def run(carry: list, start: Any, size: int) -> tuple[list, list]:
        x = block_of(xs, start, size)
        hoisted = fission.run_before(env, x, size)

        def trip(carry: list, row: tuple[list, list]) -> tuple[list, list]:
            return fission.run_inside(env, carry, *row)

        carry, saved = scan_stacking(
            trip,
            carry,
            (x, hoisted),
            [v.aval for v in fission.saved],
            size,
            first=0,
            reverse=reverse,
            unroll=max(1, min(unroll, size)),
            plain=SMALL,
        )
        return carry, fission.run_after(env, x, hoisted, saved, size)

    # Blocks only matter where something is done for many steps at once, before the loop or after
    # it; without such work the block is the whole run.
    kinds = [v.aval for v in ys + made]
    carry, outs = in_blocks(run, init, length, block, kinds, first=24, descending=reverse)
    stacks = dict(zip((*row, *made), (*xs, *outs[len(ys) :]), strict=True))
    return RunOutputs(carry, outs[: len(ys)], [stacks[v] for v in residuals])


def _block(closure: Closure, fission: Fission, length: int) -> int:
    """How many steps of a recorded run are prepared, or put off, together."""
    out_bytes = size_in_bytes(v.aval for v in fission.stacked_outs)
    return block_size(
        length,
        fission.temporaries(fission.stacked_outs),
        out_bytes * length + size_in_bytes(closure.kinds.closed_over),
        closure.layout.remade_bytes * length,
        copied=out_bytes + fission.rows_read(),
    )


# ------------------------------------------------------------ in blocks that run again

_FEWEST = 8  # steps in a block of our choice: each block costs a sum of all weights


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["carries", "xs", "closed_over"],
    meta_fields=["steps", "length", "reverse", "unroll"],
)
@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """What a run leaves from which each block of its steps can be run again.

    Attributes:
        carries: the carry that entered each block's first step, in the order of the blocks.
        xs: the inputs, each (length, *x.shape).
        closed_over: the arrays that the step closes over.
        steps: how many steps a block has; the last one may have fewer.
        length: how many steps the run has.
        reverse: whether it starts from the last row.
        unroll: how many steps a trip of the compiled loop has.
    """

    carries: list
    xs: list
    closed_over: list
    steps: int
    length: int
    reverse: bool
    unroll: int

    def record(self, closure: Closure, start: Any, size: int) -> list:
        """The residuals of a block, which is run again.

        Args:
            closure: the traced step.
            start: the block's first row.
            size: how many steps it has.
        """
        # In the order in which the steps ran; rows and steps count in opposite directions if
        # reversed.
        steps_before = self.length - size - start if self.reverse else start
        return record_run(
            dataclasses.replace(closure, closed_over=self.closed_over),
            rows(self.carries, steps_before // self.steps),
            block_of(self.xs, start, size),
            size,
            reverse=self.reverse,
            unroll=self.unroll,
            with_ys=False,
        ).residuals


def run_with_checkpoints(
    step: Callable[..., list],
    closed_over: list,
    init: list,
    xs: list,
    length: int,
    block: int,
    *,
    reverse: bool,
    unroll: int,
) -> tuple[list, Checkpoints]:
    """Runs a step as `lax.scan` does; returns the last carry with ys, and where blocks start.

    Args:
        step: from the leaves of what it closes over, of a carry and of an x to those of the next
            carry and of y.
        closed_over: the arrays that the step closes over.
        init: the initial carry.
        xs: the inputs, each (length, *x.shape).
        length: how many steps.
        block: how many steps a block has.
        reverse: whether to start from the last row.
        unroll: how many steps a trip of the compiled loop has.
    """
    n, block = len(init), min(block, max(length, 1))
    slots = -(-length // block) + 1  # the last is for what comes after the last block's start

    def trip(state: Any, x: list) -> tuple[Any, list]:
        done, carry, carries = state
        # Each carry is written where the next block's first one belongs, which comes last.
        slot = (done + (block - 1)) // block
        carries = [put(stack, v, slot) for stack, v in zip(carries, carry, strict=True)]
        outs = step(*closed_over, *carry, *x)
        return (done + 1, outs[:n], carries), outs[n:]

    carries = [jnp.broadcast_to(v, (slots, *v.shape)) for v in init]
    state = jnp.int32(0), init, carries
    (_, carry, carries), ys = lax_scan(trip, state, xs, length, reverse=reverse, unroll=unroll)
    saved = Checkpoints(carries, xs, closed_over, block, length, reverse, unroll)
    return [*carry, *ys], saved


def steps_between_checkpoints(closure: Closure, init: list, length: int) -> int:
    """How many steps a block has so that carries and one block's residuals take least.

    Carries take (length / steps) times the bytes of one, residuals `steps` times those of one
    step; the sum is least where the two are equal. Of the sizes around that one that divides the
    length is taken, if there is one: no steps are left over then.
    """
    outs = closure.forward.jaxpr.outvars
    a_step = size_in_bytes(outs[i].aval for i in closure.layout.recorded)
    a_carry = size_in_bytes(init)
    # Of a batch of symbolic size nobody knows the bytes.
    ratio = a_carry / max(a_step, 1) if isinstance(a_step + a_carry, int) else 1.0
    best = round((length * ratio) ** 0.5)
    best = min(max(best, _FEWEST), max(length, 1))
    # Memory is flat around its least: half or twice the best size costs a quarter more.
    near = [k for k in range(best, min(2 * best, length + 1)) if length % k == 0]
    near += [k for k in range(best, max(best // 2, _FEWEST - 1), -1) if length % k == 0]
    return min(near, key=lambda k: max(k / best, best / k), default=best)
