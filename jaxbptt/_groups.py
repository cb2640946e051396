"""Which steps the outputs of each group reach: the arithmetic of window and every over a run.

Steps are counted from 1 in the order in which they run, groups from 0.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Groups:
    """Groups of `every` outputs over `length` steps, each reaching back over a window.

    Going backwards, a group's chain is alive from the group's end to its reach. As many
    as `chains` are alive at once; a group has the slot `group % chains`, for by the time
    that a slot's next group starts the one before is over.
    """

    length: int
    window: int
    every: int
    parts: tuple[int, ...] = ()  # the window of each leaf of λ, or nothing where they have one

    @classmethod
    def of(cls, length: int, windows: Sequence[int], every: int) -> "Groups":
        """The groups of a run, one where one does: all outputs in it, or nothing cut off.

        Args:
            length: how many steps there are.
            windows: the window of each leaf of λ, at least one.
            every: how many outputs a group has.
        """
        steps = max(length, 1)
        windows = [min(w, steps + every - 1) for w in windows]  # no more is there to reach
        window = max(windows)
        parts = tuple(windows) if len(set(windows)) > 1 else ()
        if not parts and window >= length + every - 1:
            return cls(length, steps, steps)
        if every >= steps:
            return cls(length, min(window, steps), steps, parts)
        return cls(length, window, every, parts)

    @property
    def chains(self) -> int:
        """How many chains are alive at once, at most."""
        return max(1, -(-self.window // self.every))

    @property
    def whole(self) -> bool:
        """Whether one chain reaches every step: full backpropagation through time."""
        return self.window == self.every >= self.length and not self.parts

    @property
    def gaps(self) -> bool:
        """Whether there are steps that no chain reaches."""
        return self.window < self.every

    def starts(self, step: Any) -> jax.Array:
        """Whether a group before the last one ends at this step: its chain starts at zero."""
        return (step % self.every == 0) & (step < self.length)

    def own(self, step: Any) -> jax.Array:
        """For each slot, whether it is that of this step's own group: bool (chains,)."""
        return jnp.arange(self.chains, dtype=jnp.int32) == (step - 1) // self.every % self.chains

    def alive(self, step: Any) -> jax.Array:
        """For each slot, whether its chain reaches this step: bool (chains,)."""
        return self._reaching(step, self.window)

    def parts_alive(self, step: Any) -> list[jax.Array]:
        """The same for each leaf of λ, a list of one where they have one window."""
        return [self._reaching(step, window) for window in self.parts or (self.window,)]

    def _reaching(self, step: Any, window: int) -> jax.Array:
        group = (step - 1) // self.every
        group += (jnp.arange(self.chains, dtype=jnp.int32) - group) % self.chains
        first = group * self.every + 1
        end = jnp.minimum(first + (self.every - 1), self.length)
        reach = jnp.maximum(first - max(window - self.every, 0), end - (window - 1))
        return (first <= self.length) & (reach <= step)
