"""The recorded run: a loop of steps that leaves its residuals behind, stacked."""

from typing import Any, NamedTuple

from jaxbptt._arrays import size_in_bytes
from jaxbptt._closure.closure import Closure
from jaxbptt._jaxprs.loop_fission import divide
from jaxbptt._jaxprs.loops import block_of, block_size, in_blocks, scan_stacking


class RunOutputs(NamedTuple):
    """What a recorded run leaves."""

    carry: list  # the last one
    ys: list
    residuals: list  # those on record, each (length, *residual.shape)


def record_run(
    closure: Closure, init: list, xs: list, length: int, *, reverse: bool, unroll: int
) -> RunOutputs:
    """Runs a step that has no parameters of its own.

    Args:
        closure: the traced step.
        init: the initial carry.
        xs: the inputs, each (length, *x.shape).
        length: how many steps.
        reverse: whether to start from the last row.
        unroll: how many steps a trip of the compiled loop has.
    """
    program, n, m = closure.forward, len(init), len(closure.closed_over)
    jaxpr, consts = program.jaxpr, [*program.consts, *closure.closed_over]
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars[:m]), consts, strict=True))
    state, row = jaxpr.invars[m : m + n], jaxpr.invars[m + n :]
    ys = jaxpr.outvars[n : len(closure.layout.outputs.leaves)]
    residuals = [jaxpr.outvars[i] for i in closure.layout.recorded]
    made = [v for v in residuals if v not in row]  # residuals that are x itself are in xs already
    fission = divide(jaxpr.eqns, env, row, state, jaxpr.outvars[:n], ys + made)

    out_bytes = size_in_bytes(v.aval for v in ys + made)
    block = block_size(
        length,
        fission.temporaries(fission.stacked_outs),
        out_bytes * length + size_in_bytes(closure.kinds.closed_over),
        closure.layout.remade_bytes * length,
        copied=out_bytes + fission.rows_read(),
    )

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
        )
        return carry, fission.run_after(env, x, hoisted, saved, size)

    kinds = [v.aval for v in ys + made]
    carry, outs = in_blocks(run, init, length, block, kinds, first=24, descending=reverse)
    stacks = dict(zip((*row, *made), (*xs, *outs[len(ys) :]), strict=True))
    return RunOutputs(carry, outs[: len(ys)], [stacks[v] for v in residuals])
