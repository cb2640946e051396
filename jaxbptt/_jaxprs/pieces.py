"""Long programs in pieces, between which XLA's CPU backend fuses nothing.

It fuses what is elementwise into one function, however long, and makes again what several of these
need. Both compiling and running take a time that grows far faster than the program: for a step of
2,000 equations 85 s and 0.6 s, in pieces 7 s and 0.004 s.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jaxbptt._arrays import at_most, size_in_bytes
from jaxbptt._compat import varying as varying_axes
from jaxbptt._jaxprs.primitives import HEAVY
from jaxbptt._types import explicit, is_part_of_sum, is_reference

_LENGTH = 200  # equations of a piece, about
_SHORT = 300  # equations in a row, without a product among them, that stay in one piece
_LONG = 1500  # equations that do not, whatever is among them
_LARGE = 2**18  # bytes of a value from which on it costs too much to hand it on


class Piece(NamedTuple):
    """Equations that follow one another, and of what they make the variables to hold."""

    eqns: Sequence[core.JaxprEqn]
    held: list[Any]


def is_long(eqns: Sequence[core.JaxprEqn]) -> bool:
    """Whether a program has more than one piece."""
    if len(eqns) <= _SHORT:
        return False
    # Nothing is fused over a product. A step of many layers has nothing to gain.
    ends = [i for i, eqn in enumerate(eqns) if eqn.primitive.name in HEAVY]
    longest = max(b - a for a, b in itertools.pairwise([-1, *ends, len(eqns)]))
    return longest > _SHORT or len(eqns) > _LONG


def in_pieces(eqns: Sequence[core.JaxprEqn], varying: Iterable) -> list[Piece]:
    """The equations in pieces.

    Args:
        eqns: equations, in order.
        varying: their inputs without those that are the same in all iterations of a loop.
    """
    if not is_long(eqns):
        return [Piece(eqns, [])]
    count = round(len(eqns) / _LENGTH)
    # What is the same in all iterations the compiler takes out of the loop, unless it is held.
    moving = set(varying)
    for eqn in eqns:
        if moving.intersection(_variables(eqn.invars)):
            moving.update(eqn.outvars)
    ends = [len(eqns) * i // count for i in range(count + 1)]
    pieces: list[Piece] = []
    read: set[Any] = set()  # by later pieces
    for start, end in reversed([*itertools.pairwise(ends)]):
        piece = eqns[start:end]
        made = [v for eqn in piece for v in eqn.outvars if v in read and v in moving]
        pieces.append(Piece(piece, [v for v in made if _holdable(v)]))
        read.update(v for eqn in piece for v in _variables(eqn.invars))
    return pieces[::-1]


def hold(values: Sequence[jax.Array]) -> list[jax.Array]:
    """The same values, out of sight of the CPU's compiler."""
    if not values:
        return []
    smallest = min(values, key=lambda v: v.size)

    def held(*values: jax.Array) -> list[jax.Array]:
        # A barrier would be gone before anything is fused; a branch stays. Which one is taken is
        # known only when it runs, and what the other one makes must differ.
        return lax.cond(_true(lax.stop_gradient(smallest)), lambda *v: [*v], _others, *values)

    # Elsewhere compilers have limits of their own, and a branch costs more.
    return lax.platform_dependent(*values, cpu=held, default=lambda *v: [*v])


def _others(*values: jax.Array) -> list[jax.Array]:
    return [~v if v.dtype == bool else -v for v in values]


@jax.custom_batching.custom_vmap
def _true(value: jax.Array) -> jax.Array:
    """True, of which the compiler doesn't know that it is."""
    number = jnp.real(value).ravel()[0]
    if jnp.issubdtype(number.dtype, jnp.floating):
        number = lax.bitcast_convert_type(number.astype(jnp.float32), jnp.uint32)
    # The bit that is shifted in is not set, whatever the number was.
    shifted = lax.shift_right_logical(number.astype(jnp.uint32), jnp.uint32(1))
    return shifted != jnp.uint32(2**32 - 1)


@_true.def_vmap
def _(axis_size: int, batched: list[bool], value: jax.Array) -> tuple[jax.Array, bool]:
    """One answer for the whole batch, for a branch of many answers would be none."""
    return (_true(value[0]) if axis_size else jnp.array(True)), False


def _holdable(variable: Any) -> bool:
    aval = variable.aval
    dtype: Any = getattr(aval, "dtype", None)
    # A reference and a token are no arrays, and of a key there is no other value to make.
    array = dtype is not None and not is_reference(variable)
    plain = array and any(jnp.issubdtype(dtype, kind) for kind in (jnp.number, bool))
    if not plain or aval.size == 0 or varying_axes(aval) or explicit(aval) or is_part_of_sum(aval):
        return False
    return at_most(size_in_bytes([aval]), _LARGE)


def _variables(atoms: Iterable) -> list[Any]:
    return [v for v in atoms if isinstance(v, core.Var)]
