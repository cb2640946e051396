"""The reverse sweep over a whole run: every chain in flight, and each weight's contraction.

One loop over the steps, newest first. The chains that are alive (see `_groups`) are
pulled back together, batched; the weights and x take one more pullback, of the sum of
the chains' cotangents, for that pullback is linear. What the weights' contractions need
is emitted for a block of steps and contracted at its end, so that the emitted operands
never take more than a fraction of what the residuals take.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbptt._avals import size_in_bytes, zeros
from jaxbptt._blocks import block_of, block_size, in_blocks, rows
from jaxbptt._chain import dense_weights, densify
from jaxbptt._closure import Closure
from jaxbptt._contract import Split, where_or_zero
from jaxbptt._groups import Groups
from jaxbptt._interpret import ZERO, drop, merge, variables
from jaxbptt._random_window import times
from jaxbptt._stages import Stages, divide


@dataclasses.dataclass(frozen=True)
class Run:
    """A recorded run.

    Attributes:
        stacks: the recorded residuals, each (length, *residual.shape).
        fixed: the residuals that are the same at all steps.
        groups: which outputs reach which steps.
        factors: what λ is multiplied by as it enters each step, in the order of the steps, or
            None. Only where one chain reaches all steps.
        reverse: whether step 1 is the last row of the stacks.
    """

    stacks: list
    fixed: list
    groups: Groups
    factors: jax.Array | None
    reverse: bool

    def reached(self, places: jax.Array) -> jax.Array:
        """For each of these rows, whether the one chain there is reaches it."""
        return jax.vmap(lambda place: self.groups.alive(self.step(place))[0])(places)

    def step(self, place: Any) -> Any:
        """Of a row of the stacks, the number of its step, from 1."""
        return self.groups.length - place if self.reverse else place + 1


def pull_run(closure: Closure, run: Run, ct_carry: list, ct_ys: list) -> tuple[list, list, list]:
    """Cotangents of the weights, the initial carry and xs of a run.

    Args:
        closure: the traced step.
        run: the recorded run.
        ct_carry: cotangent of the final carry.
        ct_ys: cotangents of ys, each (length, *y.shape).
    """
    groups, kinds = run.groups, closure.cotangents
    if not groups.length:
        no_xs = [jnp.zeros((0, *kind.shape), kind.dtype) for kind in kinds["x"]]
        return [zeros(kind) for kind in (*kinds["hoisted"], *kinds["params"])], ct_carry, no_xs
    sweep = _Sweep.of(closure, run, [*run.stacks, *ct_ys])
    block = sweep.block()
    contracted = None if block == groups.length else sweep.split.zero_contractions()
    state = _at_the_end(groups, ct_carry), sweep.split.zero_sums(), contracted
    (lam, sums, contracted), xs = in_blocks(
        sweep.block_of_steps, state, groups.length, block, descending=not run.reverse
    )
    unvaried = closure.unvaried(sweep.split, run.fixed)
    weights = sweep.split.finish(closure.consts["pull"], unvaried, contracted, sums)
    return dense_weights(closure, weights), _at_the_start(groups, lam), xs


@dataclasses.dataclass(frozen=True)
class _Sweep:
    """The loop over the steps, in blocks; its state is λ of each chain and the sums."""

    closure: Closure
    run: Run
    stacks: list  # of what differs from step to step: recorded residuals, then ȳ
    split: Split
    stages: Stages
    env: dict[Any, Any]
    pull_chains: Callable | None  # None where there is one chain, whose λ the stages give

    @classmethod
    def of(cls, closure: Closure, run: Run, stacks: list) -> "_Sweep":
        single = run.groups.chains == 1
        split = closure.split("pull", ("carry", "x") if single else ("x",))
        invars, n = split.jaxpr.invars, len(closure.cotangents["carry"])
        after_fixed = len(run.stacks) + len(run.fixed)
        rows, fixed = invars[: len(run.stacks)], invars[len(run.stacks) : after_fixed]
        rows, state = rows + invars[after_fixed + n :], invars[after_fixed : after_fixed + n]
        known = (*split.jaxpr.constvars, *fixed), (*closure.consts["pull"], *run.fixed)
        env = dict(zip(*known, strict=True))
        n = n if single else 0
        now = [*drop(split.outs[:n], split.outs[:n]), *split.terms]
        later = [*drop(split.outs[n:], split.outs[n:]), *split.emitted]
        stages = divide(split.at_lag, env, rows, state, now, later)
        pull_chains = None if single else _chains_pull(closure, run.fixed)
        return cls(closure, run, stacks, split, stages, env, pull_chains)

    def block(self) -> int:
        """How many steps' operands are emitted before they are contracted."""
        length = self.run.groups.length
        weights = size_in_bytes(v.aval for v in variables(self.split.weights))
        kept = self.stages.later[: len(self.stages.later) - len(self.split.emitted)]
        held, spared = size_in_bytes(self.stacks) + weights, self.closure.spared * length
        return block_size(
            length,
            self.stages.temporaries(kept),
            held,
            spared,
            copied=self.stages.rows_read() + size_in_bytes(v.aval for v in variables(kept)),
            in_parts=weights,
        )

    def block_of_steps(self, state: Any, start: Any, size: int) -> tuple[Any, list]:
        """A block of steps backwards: λ and the sums before it, x̄ in it."""
        lam, sums, contracted = state
        places = start + jnp.arange(size, dtype=jnp.int32)
        these = block_of(self.stacks, start, size)
        early = self.stages.ahead(self.env, these, size)
        (lam, sums), cut = lax.scan(
            self.one_step, (lam, sums), (places, early), reverse=not self.run.reverse
        )
        later = self.stages.behind(self.env, these, early, cut, size)
        if self.run.groups.gaps:
            later = [_select(self.run.reached(places), v) for v in later]
        n = len(later) - len(self.split.emitted)
        made = self.split.contract(later[n:])
        if contracted is not None:
            made = [total + v for total, v in zip(contracted, made, strict=True)]
        kinds = self.closure.cotangents["x"]
        marks = self.split.outs[len(self.split.outs) - len(kinds) :]
        xs = [
            jnp.broadcast_to(zeros(kind), (size, *kind.shape)) if v is ZERO else v
            for v, kind in zip(merge(later[:n], marks), kinds, strict=True)
        ]
        return (lam, sums, made), xs

    def one_step(self, state: Any, row: Any) -> tuple[Any, list]:
        """One step backwards."""
        (lam, sums), (place, early) = state, row
        groups, step, values = self.run.groups, self.run.step(place), rows(self.stacks, place)
        lam = _entering(groups, step, lam)
        if self.run.factors is not None:
            lam = [times(self.run.factors[step - 1], v) for v in lam]
        total = [jnp.sum(v, 0) for v in lam] if self.pull_chains else lam
        outs, cut = self.stages.trip(self.env, total, values, early)
        n = len(outs) - len(self.split.terms)
        live = groups.alive(step)[0] if groups.gaps else True
        sums = self.split.add(sums, outs[n:], live)
        if self.pull_chains:
            lam = self.pull_chains(values, lam, groups.own(step))
        else:
            older = merge(outs[:n], self.split.outs[: len(lam)])
            lam = densify(older, self.closure.cotangents["carry"])
        return (lam, sums), cut


def _at_the_end(groups: Groups, ct_carry: list) -> list:
    """λ of each chain before the last step: the final carry's cotangent is the last group's."""
    if groups.chains == 1:
        return ct_carry
    return [_select(groups.own(groups.length), v[None]) for v in ct_carry]


def _entering(groups: Groups, step: Any, lam: list) -> list:
    """λ of each chain as it enters a step: zero where it is over, or starts there.

    What comes out of a step at which a chain is over is never asked for, so that a pullback
    need not give zero for zero.
    """
    if groups.whole:
        return lam
    goes_on = ~(groups.starts(step) & groups.own(step))
    if groups.chains == 1 and not groups.parts:
        return _follow(groups, [goes_on], lam)
    return _follow(groups, [alive & goes_on for alive in groups.parts_alive(step)], lam)


def _at_the_start(groups: Groups, lam: list) -> list:
    """The sum of the λ that reach the initial carry."""
    if groups.whole:
        return lam
    lam = _follow(groups, groups.parts_alive(1), lam)
    return lam if groups.chains == 1 else [jnp.sum(v, 0) for v in lam]


def _follow(groups: Groups, flags: list, lam: list) -> list:
    """λ where the flags, of each chain and leaf or of each chain, are set."""
    flags = flags * len(lam) if len(flags) == 1 else flags
    pairs = zip(flags, lam, strict=True)
    if groups.chains == 1:
        return [where_or_zero(flag[0], v) for flag, v in pairs]
    return [_select(flag, v) for flag, v in pairs]


def _chains_pull(closure: Closure, fixed: list) -> Callable[[list, list, jax.Array], list]:
    """A function from residuals and ȳ of a step and each chain's λ to the λ one step further."""
    kinds, n = closure.cotangents["carry"], len(closure.slot)
    both = closure.split("pull", ("carry",), weights=False)
    alone = closure.split("pull_carry", ("carry",), weights=False)

    def pull_chains(values: list, lam: list, own: jax.Array) -> list:
        if not lam:
            return []  # there is no carry to follow, and nothing to batch over
        residuals, ct_y = [*values[:n], *fixed], values[n:]

        def pull(lam: list, ct_y: list) -> list:
            outs, _, _ = both.one_lag(closure.consts["pull"], [*residuals, *lam, *ct_y])
            return densify(outs, kinds)

        def pull_carry(lam: list) -> list:
            outs, _, _ = alone.one_lag(closure.consts["pull_carry"], [*residuals, *lam])
            return densify(outs, kinds)

        # The step's own chain takes ȳ in.
        if closure.indifferent_to_y:
            return _batched(pull, lam, [_select(own, v[None]) for v in ct_y])
        older = _batched(pull_carry, lam)
        present = pull([jnp.zeros_like(v[0]) for v in lam], ct_y)
        return [v + _select(own, u[None]) for v, u in zip(older, present, strict=True)]

    return pull_chains


def _batched(pull: Callable, *args: list) -> list:
    """`vmap` over the chains, or one after the other where a pullback can't be batched."""
    try:
        return jax.vmap(pull)(*args)
    except NotImplementedError:
        return lax.map(lambda row: pull(*row), args)


def _select(flags: jax.Array, values: jax.Array) -> jax.Array:
    """The rows of `values` where the flag is set, else zeros."""
    return where_or_zero(flags.reshape(flags.shape + (1,) * (values.ndim - 1)), values)
