"""λ of every chain in flight: what enters a step, and what a step makes of it.

Each leaf of λ has its chains in front. With one window group g uses the slot g % chains: the
group that used it before has ended by then, and nothing is moved. With a window for each part they
lie by age, youngest first, so that those that are old enough to have lost a part are together,
and are pulled back by a program without it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbptt._arrays import select_rows as select
from jaxbptt._arrays import where_or_zero
from jaxbptt._closure.closure import Closure, pick
from jaxbptt._closure.pullbacks import Pullback
from jaxbptt._jaxprs.evaluate import bind
from jaxbptt._transforms.groups import Groups
from jaxbptt._transforms.window_vjp import densify


@dataclasses.dataclass(frozen=True)
class Chains:
    """The chains of a run; where there is one, λ has no axis for it."""

    closure: Closure
    pullback: Pullback  # of the outputs that have a cotangent
    groups: Groups
    invariant: list  # the residuals that are the same at all steps

    @property
    def windows(self) -> list[int]:
        """The window of each leaf of λ."""
        one = [self.groups.window] * len(self.closure.kinds.carry)
        return list(self.groups.parts) or one

    @property
    def single(self) -> bool:
        """Whether there is one chain."""
        return self.groups.chains == 1

    def at_the_end(self, ct_carry: list) -> list:
        """λ before the last step: the final carry's cotangent is the last group's."""
        if self.single:
            return ct_carry
        ages = self._ages(self.groups.length)
        return [select(age == 0, v[None]) for age, v in zip(ages, ct_carry, strict=True)]

    def entering(self, step: Any, lam: list) -> list:
        """λ as it enters a step: zero where a chain is over, or starts there.

        What comes out of a step at which a chain is over is never asked for, so that a pullback
        need not give zero for zero.
        """
        if self.groups.whole:
            return lam
        # A step that ends a group starts that group's chain: its slot held a chain that is over.
        starts: Any = self.groups.starts(step)
        if self.groups.parts and not self.single:
            lam = [jnp.where(starts, _older(v), v) for v in lam]
            starts = False
        goes_on = [~(starts & (age == 0)) for age in self._ages(step)]
        return self._followed(step, lam, goes_on)

    def total(self, lam: list) -> list:
        """The sum over the chains."""
        return lam if self.single else [jnp.sum(v, 0) for v in lam]

    def at_the_start(self, lam: list) -> list:
        """The sum of the λ that reach the initial carry."""
        if self.groups.whole:
            return lam
        return self.total(self._followed(1, lam, [True] * len(lam)))

    def pull(self, values: list, lam: list, step: Any) -> list:
        """λ of several chains one step further.

        Args:
            values: the step's recorded residuals, then its ȳ.
            lam: λ as it entered the step.
            step: the step's number.
        """
        if not lam:
            return []  # there is no carry to follow, and nothing to batch over
        counts, n = [len(v) for v in lam], self.pullback.recorded
        residuals, ct_y = [*values[:n], *self.invariant], values[n:]
        own = self._ages(step)[counts.index(max(counts))] == 0
        # Chains lie by age, so that the leaves of λ are shorter the shorter their window is:
        # between two lengths the same leaves are alive.
        ends = sorted(set(counts))
        pulled: list[list] = [[] for _ in lam]
        for start, end in zip([0, *ends], ends, strict=False):
            # Chains of these ages have the leaves of λ whose window is that long.
            alive = [count > start for count in counts]
            there = [v[start:end] for v in pick(alive, lam)]
            if start == 0:
                older = self._youngest(residuals, there, ct_y, own[:end])
            else:
                pullback = self.closure.pullback(carry=alive, y=False)
                older = self._pulled(pullback, alive, residuals, there)
            for rows, v in zip(pick(alive, pulled), older, strict=True):
                rows.append(v)
        return [rows[0] if len(rows) == 1 else jnp.concatenate(rows) for rows in pulled]

    def _youngest(self, residuals: list, lam: list, ct_y: list, own: jax.Array) -> list:
        """λ of the chains that have all parts; the step's own takes ȳ in."""
        every = [True] * len(lam)
        if self.closure.indifferent_to_y:
            of_own = [select(own, v[None]) for v in ct_y]
            return self._pulled(self.pullback, every, residuals, lam, of_own)
        # Where ȳ costs more than additions it is pulled back once and not for every chain; the two
        # results add up, for the pullback is linear.
        older = self._pulled(self.closure.pullback(y=False), every, residuals, lam)
        no_lam = [jnp.zeros_like(v[0]) for v in lam]
        present = self._pull(self.pullback, every, residuals, no_lam, ct_y)
        return [v + select(own, u[None]) for v, u in zip(older, present, strict=True)]

    def _pulled(
        self, pullback: Pullback, alive: list[bool], residuals: list, lam: list, ct_y: Sequence = ()
    ) -> list:
        """`_pull` of every chain, in one batch: what is known to be linear can be batched."""

        def pull(lam: list, ct_y: list) -> list:
            return self._pull(pullback, alive, residuals, lam, ct_y)

        return jax.vmap(pull)(lam, list(ct_y))

    def _pull(
        self, pullback: Pullback, alive: list[bool], residuals: list, lam: list, ct_y: list
    ) -> list:
        """λ of one chain one step further, of the leaves that are alive."""
        contraction = pullback.divide([], pick(alive, pullback.outputs.carry))
        # Chains are pulled back as a batch, which has many rows.
        made = contraction.at_lag([*residuals, *lam, *ct_y], bind)
        return densify(made.outs, pick(alive, self.closure.kinds.carry))

    def _ages(self, step: Any) -> list[Any]:
        """The ages of the chains of each leaf of λ at a step."""
        counts = [self.groups.chains_of(w) for w in self.windows]
        if self.single:
            return [0 for _ in counts]
        if self.groups.parts:
            return [jnp.arange(n, dtype=jnp.int32) for n in counts]
        # Slot g mod n belongs to group g: how far it is from the step's own group is the chain's
        # age.
        return [(jnp.arange(n, dtype=jnp.int32) - self.groups.own(step)) % n for n in counts]

    def _followed(self, step: Any, lam: list, flags: list) -> list:
        """λ where the flags are set and the chains reach the step."""
        kept = []
        for v, flag, age, window in zip(lam, flags, self._ages(step), self.windows, strict=True):
            alive = self.groups.alive(step, age, window) & flag
            kept.append(where_or_zero(alive, v) if self.single else select(alive, v))
        return kept


def _older(lam: jax.Array) -> jax.Array:
    """λ by age as the step before sees it, which is in a group of its own: none is there yet."""
    return jnp.concatenate([jnp.zeros_like(lam[:1]), lam[:-1]])
