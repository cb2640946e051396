"""Loops that stack what their iterations make, and loops in blocks of iterations.

`lax.scan` begins all its stacks with zeros. XLA merges equal arrays of zeros, so that each stack is
copied from a shared one, every time an enclosing loop runs. Stacks that begin with different
numbers, none of which is ever read, are written where they lie. Where a row is small, to look its
place up takes longer than such a copy: there the stacks are those of `lax.scan`.

In blocks, what is kept for a block stays small, however long the loop is.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbptt._arrays import at_most, filled, size_in_bytes
from jaxbptt._compat import lax_scan
from jaxbptt._types import leaf_type

_NUMBERS = range(29, 128)  # seldom the step's own constants, and any integer dtype has them
SMALL = 1024  # bytes of a row at most that is stacked, and read, by `lax.scan` itself
_SHARE = 0.15  # what a block keeps takes at most this share of what `jax.vjp` would hold
_FEW = 1024  # trips of a loop whose numbers are a constant of its program
_FEWEST = 8  # steps in a block: fewer save little memory, and each block adds all weights up once


def scan_stacking(
    trip: Callable[[Any, Any], tuple[Any, list]],
    state: Any,
    rows: Any,
    kinds: Iterable,
    length: int,
    first: int,
    *,
    reverse: bool = False,
    unroll: int = 1,
    plain: int = -1,
    place: Callable[[Any], Any] | None = None,
) -> tuple[Any, list]:
    """`lax.scan` of a trip whose outputs are a list of these types.

    Args:
        trip: from a state and a row, the next state and its outputs.
        state: the first state.
        rows: arrays, each (length, ...).
        kinds: types or abstract values of what one trip makes.
        length: how many trips.
        first: an offset into the numbers that stacks begin with; each loop of a program has its
            own range (see its callers).
        reverse: whether to start from the last row.
        unroll: how many trips one of the compiled loop has.
        plain: bytes of a row at most for which the stacks are those of `lax.scan`.
        place: from the number of a row to where in the stacks that trip's outputs are written, if
            that is elsewhere; each place is some row's.
    """
    kinds = [leaf_type(kind) for kind in kinds]
    counted = isinstance(length, int) and length  # lax.scan takes no symbolic length
    if counted and at_most(size_in_bytes(kinds), plain):
        return lax_scan(trip, state, rows, length, reverse=reverse, unroll=unroll)

    # The stacks travel in the state, for what lax.scan stacks itself it begins with zeros. The
    # place is a row of its own, so that a reversed loop writes where lax.scan would.
    def one(state: Any, row: Any) -> tuple[Any, None]:
        (state, stacks), ((number,), row) = state, row
        state, outs = trip(state, row)
        there = place(number) if place else number
        return (state, [put(*pair, there) for pair in zip(stacks, outs, strict=True)]), None

    stacks = [
        filled(kind.stacked(length), _NUMBERS[i % len(_NUMBERS)])
        for i, kind in enumerate(kinds, first)
    ]
    if not length:
        return state, stacks
    given = counting(length), rows
    done, _ = lax_scan(one, (state, stacks), given, reverse=reverse, unroll=unroll)
    return done


def counting(length: Any, start: int = 0) -> Any:
    """The numbers of a loop's trips, (length, 1), to go through as rows of one number each.

    XLA knows what is in a constant inside of the loop too, and has nothing to make before it; but
    of a constant of a single axis that counts it makes an iota, once before each loop.
    """
    few = isinstance(length, int) and length <= _FEW
    numbers = (np if few else jnp).arange(start, start + length, dtype=np.int32)
    return numbers[:, None]


def put(stack: Any, value: Any, place: Any) -> Any:
    """The stack with one row written."""
    return lax.dynamic_update_index_in_dim(stack, value, place, 0, allow_negative_indices=False)


# ------------------------------------------------------------ in blocks


def block_size(
    length: int, a_step: int, held: int, spared: int, *, copied: int, in_parts: int = 0
) -> int:
    """How many steps a block has.

    Args:
        length: how many steps there are.
        a_step: bytes that a block keeps for each of its steps.
        held: bytes that are held in any case.
        spared: bytes that `jax.vjp` would hold beyond these.
        copied: bytes that one of several blocks holds of each of its steps once more.
        in_parts: bytes that several blocks take in addition.
    """
    if not all(isinstance(n, int) for n in (length, a_step, held, spared, copied, in_parts)):
        return length  # symbolic dimensions: what there is room for is not known
    # What `jax.vjp` would have kept beyond ours is there to be spent, and a share of the rest.
    allowed = int(_SHARE * (held + spared)) + spared
    if a_step * length <= max(allowed, in_parts):
        return length
    # As large as memory allows, but of those sizes one that divides the length, if there is one: a
    # block that is left over is compiled by itself.
    most = min(length, max(_FEWEST, allowed // (a_step + copied)))
    even = [size for size in range(most, most // 2, -1) if length % size == 0]
    return even[0] if even else most


def in_blocks(
    run: Callable[[Any, Any, int], tuple[Any, list]],
    state: Any,
    length: int,
    block: int,
    kinds: Iterable,
    first: int,
    *,
    descending: bool,
) -> tuple[Any, list]:
    """Runs blocks one after the other, those left over before the others.

    Args:
        run: from a state, the first row of a block and its size, the next state and the
            block's stacked outputs.
        state: the first state.
        length: how many rows there are.
        block: how many a block has.
        kinds: types or abstract values of one row of each output.
        first: see `scan_stacking`.
        descending: whether to go from the last row to the first.
    """
    if block == length:
        return run(state, jnp.int32(0), length)
    count, rest = divmod(length, block)
    parts = []
    if rest:
        state, part = run(state, jnp.int32(length - rest if descending else 0), rest)
        parts.append(part)
    # The rows left over are those that run first, so that all whole blocks are in one loop.
    starts = (0 if descending else rest) + block * jnp.arange(count, dtype=jnp.int32)
    of_block = [leaf_type(kind).stacked(block) for kind in kinds]
    state, outs = scan_stacking(
        lambda s, i: run(s, i, block), state, starts, of_block, count, first, reverse=descending
    )
    parts.append([v.reshape(count * block, *v.shape[2:]) for v in outs])
    if descending:
        parts.reverse()
    return state, [
        vs[0] if len(vs) == 1 else lax.concatenate(vs, 0) for vs in zip(*parts, strict=True)
    ]


def rows(stacks: list, place: Any) -> list:
    """One row of each stack.

    Indices are never negative; saying so saves XLA the normalisation.
    """
    return [
        lax.dynamic_index_in_dim(v, place, 0, keepdims=False, allow_negative_indices=False)
        for v in stacks
    ]


def block_of(stacks: list, start: Any, size: int) -> list:
    """The rows of one block of each stack."""
    if stacks and size == stacks[0].shape[0]:
        return stacks
    return [lax.dynamic_slice_in_dim(v, start, size, allow_negative_indices=False) for v in stacks]
