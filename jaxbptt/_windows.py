"""The window: one number of steps for the whole carry, or one for each part of it."""

import dataclasses

import jax

from jaxbptt import _errors
from jaxbptt._random_window import RandomWindow
from jaxbptt._types import PyTree, TreeType


@dataclasses.dataclass(frozen=True)
class Windows:
    """Numbers of steps in the structure of a carry or of a prefix of it: static, hashable."""

    treedef: jax.tree_util.PyTreeDef
    steps: tuple[int, ...]

    @classmethod
    def of(cls, window: PyTree) -> "Windows":
        """Checks a window and makes it hashable.

        Raises:
            ValueError: one of its leaves is not a positive int.
        """
        leaves, treedef = jax.tree_util.tree_flatten_with_path(window, is_leaf=_is_leaf)
        if not leaves:
            _errors.positive_int("window", window)
        for path, steps in leaves:
            if isinstance(steps, RandomWindow):
                raise _errors.random_part("window" + jax.tree_util.keystr(path))
            _errors.positive_int("window" + jax.tree_util.keystr(path), steps)
        return cls(treedef, tuple(int(steps) for _, steps in leaves))

    @property
    def longest(self) -> int:
        """The longest of the windows."""
        return max(self.steps)

    def tree(self) -> PyTree:
        """The window as it was given."""
        return self.treedef.unflatten(self.steps)

    def by_leaf(self, carry: TreeType) -> list[int]:
        """The window of each leaf of a carry.

        Raises:
            ValueError: the window is no prefix of the carry.
        """
        try:
            parts = self.treedef.flatten_up_to(carry.tree())
        except (TypeError, ValueError) as cause:
            raise _errors.not_a_prefix(self.tree(), carry) from cause
        sizes = [len(jax.tree.leaves(part)) for part in parts]
        return [w for w, n in zip(self.steps, sizes, strict=True) for _ in range(n)]


def _is_leaf(value: PyTree) -> bool:
    return value is None or isinstance(value, RandomWindow)


def within(window: int, rows: int, every: int) -> int:
    """How many steps the last `rows` outputs of a group reach, which may fall short of `every`."""
    return min(window, rows + max(window - every, 0))
