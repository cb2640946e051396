"""The shapes of the things that users hand in: pytrees and step functions."""

from typing import Any, Protocol, TypeAlias

PyTree: TypeAlias = Any
"""Any nesting of containers that JAX knows, with arrays (or None) at the leaves."""


class StepFn(Protocol):
    """One time step: the body of a `lax.scan` with its parameters in front."""

    def __call__(self, params: PyTree, carry: PyTree, x: PyTree, /) -> tuple[PyTree, PyTree]:
        """Returns the next carry, of the type of `carry`, and the output y."""
        ...
