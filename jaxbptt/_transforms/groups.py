"""Which steps the outputs of each group reach: the arithmetic of window and every over a run.

Steps are counted from 1 in the order in which they run, groups from 0.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbptt._arrays import at_most


@dataclasses.dataclass(frozen=True)
class Groups:
    """Groups of `every` outputs over `length` steps, each reaching back over a window.

    Going backwards, a group's chain is alive from the group's end to its reach. As many
    as `chains` are alive at once. The age of a chain at a step counts the groups from the
    step's own to the chain's.
    """

    length: int
    window: int
    every: int
    parts: tuple[int, ...] = ()  # the window of each leaf of λ, or nothing where they have one

    @classmethod
    def of(
        cls, length: int, windows: Sequence[int], every: int, *, together: bool = True
    ) -> "Groups":
        """The groups of a run; a single group where that gives the same result.

        Args:
            length: how many steps there are.
            windows: the window of each leaf of λ, at least one, none longer than
                length + every - 1.
            every: how many outputs a group has.
            together: whether groups of which nothing is cut off may be sent back as one.
        """
        steps = max(length, 1)
        window = max(windows)
        parts = tuple(windows) if len(set(windows)) > 1 else ()
        # Where no group's window ends inside the run, groups can't be told apart: one chain does.
        if together and not parts and at_most(length + every - 1, window):
            return cls(length, steps, steps)
        # A single group, whatever `every` is: its window may still cut some of the steps off.
        if at_most(steps, every):
            return cls(length, min(window, steps), steps, parts)
        return cls(length, window, every, parts)

    @property
    def chains(self) -> int:
        """How many chains are alive at once, at most."""
        return self.chains_of(self.window)

    def chains_of(self, window: int) -> int:
        """The same for leaves of λ with this window."""
        return 1 if window is self.every else max(1, -(-window // self.every))

    @property
    def whole(self) -> bool:
        """Whether one chain reaches every step: full backpropagation through time."""
        one = self.window == self.every and at_most(self.length, self.every)
        return one and not self.parts

    @property
    def gaps(self) -> bool:
        """Whether there are steps that no chain reaches."""
        return not at_most(self.every, self.window)

    def starts(self, step: Any) -> jax.Array:
        """Whether a group before the last one ends at this step: its chain starts at zero."""
        return (step % self.every == 0) & (step < self.length)

    def own(self, step: Any) -> jax.Array:
        """The number of a step's own group."""
        return (step - 1) // self.every

    def reached(self, step: Any) -> jax.Array:
        """Whether the chain of a step's own group reaches it."""
        return self.alive(step, 0, self.window)

    def alive(self, step: Any, age: Any, window: int) -> jax.Array:
        """Whether a chain of this age and window reaches a step."""
        # The steps first … end are the group that the chain belongs to, as in `scan`'s definition.
        first = (self.own(step) + age) * self.every + 1
        end = jnp.minimum(first + (self.every - 1), self.length)
        reach = jnp.maximum(first - max(window - self.every, 0), end - (window - 1))
        return (first <= self.length) & (reach <= step)
