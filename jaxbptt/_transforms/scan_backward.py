"""The reverse sweep over a whole run: every chain in flight, and each weight's contraction.

One loop over the steps, newest first. The weights and x take one pullback, of the sum of
the cotangents of all chains in flight (see `scan_chains.py`), for that pullback is linear. What
the weights' contractions need is emitted for a block of steps and contracted at its end,
so that the emitted operands never take more than a fraction of what the residuals take.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbptt._arrays import at_most, size_in_bytes, widened, zeros
from jaxbptt._arrays import select_rows as select
from jaxbptt._closure.closure import Closure
from jaxbptt._closure.contraction import Contraction
from jaxbptt._closure.pullbacks import Mask
from jaxbptt._jaxprs.cpu_products import with_turned_weights
from jaxbptt._jaxprs.evaluate import ZERO, Bind, drop, merge, variables
from jaxbptt._jaxprs.loop_fission import Fission, divide
from jaxbptt._jaxprs.loops import SMALL, block_of, block_size, in_blocks, rows, scan_stacking
from jaxbptt._transforms.chain_by_chain import SeparateChains, is_needed, pull_chains
from jaxbptt._transforms.groups import Groups
from jaxbptt._transforms.scan_chains import Chains
from jaxbptt._transforms.scan_forward import Checkpoints
from jaxbptt._transforms.window_vjp import dense_weights, densify

_FEWEST = 100  # numbers: to add up fewer at each step takes less than a product after them


@dataclasses.dataclass(frozen=True)
class RecordedRun:
    """A recorded run, and how it is pulled back.

    Attributes:
        closure: the traced step.
        asked: which of the followed leaves of y have a cotangent.
        residuals: the recorded ones, each (length, *residual.shape), or what they are made of,
            block by block.
        invariant: the residuals that are the same at all steps.
        groups: which outputs reach which steps.
        factors: what λ is multiplied by as it enters each step, in the order of the steps, or
            None. Only where one chain reaches all steps.
        reverse: whether step 1 is the last row of the residuals.
    """

    closure: Closure
    asked: Mask
    residuals: list | Checkpoints
    invariant: list
    groups: Groups
    factors: jax.Array | None
    reverse: bool

    def reached(self, places: jax.Array) -> jax.Array:
        """For each of these rows, whether the one chain there is reaches it."""
        return jax.vmap(lambda place: self.groups.reached(self.step(place)))(places)

    def step(self, place: Any) -> Any:
        """Of a row of the residuals, the number of its step, from 1."""
        return self.groups.length - place if self.reverse else place + 1

    @property
    def at_once(self) -> int:
        """Of how many steps there are residuals at once."""
        kept = self.residuals
        return kept.steps if isinstance(kept, Checkpoints) else self.groups.length

    def recorded(self, start: Any, size: int) -> list:
        """The residuals of so many rows, `at_once` or what is left over."""
        if isinstance(self.residuals, Checkpoints):
            return self.residuals.record(self.closure, start, size)
        return block_of(self.residuals, start, size)


class RunCotangents(NamedTuple):
    """Cotangents of what a run was given, in followed leaves."""

    weights: list
    carry: list  # of the initial one
    xs: list


def pull_run(run: RecordedRun, ct_carry: list, ct_ys: list) -> RunCotangents:
    """Pulls a run back.

    Args:
        run: the recorded run.
        ct_carry: cotangent of the final carry.
        ct_ys: cotangents of the leaves of ys that are asked for, each (length, *y.shape).
    """
    groups, kinds = run.groups, run.closure.kinds
    if not groups.length:
        no_xs = [jnp.zeros((0, *kind.shape), kind.dtype) for kind in kinds.x]
        weights = [zeros(kind) for kind in (*kinds.closed_over, *kinds.params)]
        return RunCotangents(weights, ct_carry, no_xs)
    # A rule that is not linear, or that acts, has to see each chain's own cotangent.
    if is_needed(run.closure.pullback(y=run.asked), groups):
        chains = SeparateChains(
            run.closure, run.residuals, run.invariant, groups, run.reverse, ct_ys, run.asked
        )
        return RunCotangents(*pull_chains(chains, ct_carry))
    sweep = _Sweep.of(run)
    single = sweep.block(run.at_once) == groups.length
    contracted = None if single else sweep.contraction.zero_contractions()
    # What goes from block to block: λ of each chain, the sums of what is added up step by step, and
    # the products contracted so far, for which a single block needs no zeros to begin with.
    state = sweep.chains.at_the_end(ct_carry), sweep.contraction.zero_sums(), contracted

    def part(state: Any, start: Any, size: int) -> tuple[Any, list]:
        stacks = [*run.recorded(start, size), *block_of(ct_ys, start, size)]
        return sweep.over(stacks, start, size, state)

    (lam, sums, contracted), xs = in_blocks(
        part, state, groups.length, run.at_once, kinds.x, first=90, descending=not run.reverse
    )
    weights = sweep.contraction.finish(run.invariant, contracted, sums)
    return RunCotangents(dense_weights(run.closure, weights), sweep.chains.at_the_start(lam), xs)


@dataclasses.dataclass(frozen=True)
class _Sweep:
    """The loop over the steps, in blocks; its state is λ of each chain and the sums."""

    run: RecordedRun
    contraction: Contraction
    fission: Fission
    env: dict[Any, Any]
    chains: Chains

    @classmethod
    def of(cls, run: RecordedRun) -> "_Sweep":
        pullback, single = run.closure.pullback(y=run.asked), run.groups.chains == 1
        outputs, n = pullback.outputs, len(pullback.outputs.carry)
        contraction = pullback.divide(
            [*outputs.closed_over, *outputs.params],
            [*(outputs.carry if single else []), *outputs.x],
            fewest=_FEWEST,
        )
        # Recorded residuals and ȳ differ from step to step; λ is what the step before has made.
        jaxpr, recorded, end = pullback.program.jaxpr, pullback.recorded, pullback.residuals
        rows = jaxpr.invars[:recorded] + jaxpr.invars[end + n :]
        state = jaxpr.invars[end : end + n]
        constants = *jaxpr.constvars, *contraction.invariant
        env = dict(zip(constants, (*pullback.program.consts, *run.invariant), strict=True))
        # λ of a single chain is made in the loop's body; several are pulled back apart from it.
        n = n if single else 0
        now = [*drop(contraction.outs[:n], contraction.outs[:n]), *contraction.summands]
        stacked = [*drop(contraction.outs[n:], contraction.outs[n:]), *contraction.operands]
        fission = divide(contraction.in_loop, env, rows, state, now, stacked)
        chains = Chains(run.closure, pullback, run.groups, run.invariant)
        return cls(run, contraction, fission, env, chains)

    def block(self, length: int) -> int:
        """Of so many steps, how many steps' operands are stacked before they are contracted."""
        fission = self.fission
        weights = size_in_bytes(v.aval for v in variables(self.contraction.weights))
        # What is stacked is x̄ and the operands; the operands alone are used up in the block.
        n_xs = len(fission.stacked_outs) - len(self.contraction.operands)
        xs = fission.stacked_outs[:n_xs]
        return block_size(
            length,
            fission.temporaries(xs),
            held=size_in_bytes(v.aval for v in fission.rows) * length + weights,
            spared=self.run.closure.layout.remade_bytes * length,
            copied=fission.rows_read() + size_in_bytes(v.aval for v in variables(xs)),
            in_parts=weights,
        )

    def over(self, stacks: list, first: Any, length: int, state: Any) -> tuple[Any, list]:
        """Some of the steps backwards, in blocks: λ and the sums before them, x̄ in them.

        Args:
            stacks: what differs from step to step: recorded residuals, then ȳ, of these steps.
            first: the run's row that is their first.
            length: how many there are.
            state: λ, the sums, and the contracted products so far.
        """
        return in_blocks(
            functools.partial(self.block_of_steps, stacks, first),
            state,
            length,
            self.block(length),
            self.run.closure.kinds.x,
            first=72,
            descending=not self.run.reverse,
        )

    def block_of_steps(
        self, stacks: list, first: Any, state: Any, start: Any, size: int
    ) -> tuple[Any, list]:
        """A block of steps backwards: λ and the sums before it, x̄ in it."""
        lam, sums, contracted = state
        # Rows of the part at hand; the run's own rows begin at `first`.
        places = start + jnp.arange(size, dtype=jnp.int32)
        these = block_of(stacks, start, size)
        # The three parts of the body: before the loop over this block's steps, in it, and after it.
        hoisted = self.fission.run_before(self.env, these, size)
        # Large rows are read where they lie: of a block of them the loop would need a copy.
        small = at_most(size_in_bytes(v.aval for v in self.fission.rows), SMALL)
        run = with_turned_weights(self.fission.inside, self.env, size)
        (lam, sums), saved = scan_stacking(
            functools.partial(self.one_step, None if small else stacks, first, run),
            (lam, sums),
            (places, these if small else [], hoisted),
            [v.aval for v in self.fission.saved],
            size,
            first=48,
            reverse=not self.run.reverse,
            plain=SMALL,
        )
        stacked = self.fission.run_after(self.env, these, hoisted, saved, size)
        if self.run.groups.gaps:
            stacked = [select(self.run.reached(first + places), v) for v in stacked]
        n = len(stacked) - len(self.contraction.operands)
        # The weights' products, over all steps of the block at once.
        made = self.contraction.contract(stacked[n:])
        if contracted is not None:
            made = [total + v for total, v in zip(contracted, made, strict=True)]
        kinds = self.run.closure.kinds.x
        marks = self.contraction.outs[len(self.contraction.outs) - len(kinds) :]
        xs = [
            jnp.broadcast_to(zeros(kind), (size, *kind.shape)) if v is ZERO else v
            for v, kind in zip(merge(stacked[:n], marks), kinds, strict=True)
        ]
        return (lam, sums, made), xs

    def one_step(
        self, stacks: list | None, first: Any, run: Bind, state: Any, row: Any
    ) -> tuple[Any, list]:
        """One step backwards; its row is read from the stacks, where there are any."""
        (lam, sums), (place, values, hoisted) = state, row
        groups, step = self.run.groups, self.run.step(first + place)
        if stacks is not None:
            values = rows(stacks, place)
        # Chains that are over become zero, and the one whose group ends here begins.
        lam = self.chains.entering(step, lam)
        if self.run.factors is not None:
            lam = [_scale_or_zero(self.run.factors[step - 1], v) for v in lam]
        entering = self.chains.total(lam)
        outs, saved = self.fission.run_inside(self.env, entering, values, hoisted, run)
        n = len(outs) - len(self.contraction.summands)
        live = groups.reached(step) if groups.gaps else True
        sums = self.contraction.add(sums, outs[n:], live)
        if groups.chains > 1:
            lam = self.chains.pull(values, lam, step)
        else:
            # Leaves of λ that are known to be zero are not in the loop's state.
            older = merge(outs[:n], self.contraction.outs[: len(lam)])
            lam = densify(older, self.run.closure.kinds.carry)
        return (lam, sums), saved


def _scale_or_zero(factor: jax.Array, value: jax.Array) -> jax.Array:
    """A value times a factor, zeros where the factor is 0, whatever the value is there."""
    wide = widened(value)  # else the factors' rounding would add up to a bias
    product = wide * factor.astype(wide.real.dtype)
    return jnp.where(factor > 0, product, jnp.zeros_like(product)).astype(value.dtype)
