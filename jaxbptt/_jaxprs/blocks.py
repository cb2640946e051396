"""A loop over time in blocks of steps, so that what is kept for a block stays small."""

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxbptt._jaxprs.stacks import scan_stacking
from jaxbptt._types import leaf_type

_SHARE = 0.15  # what a block keeps takes at most this share of what `jax.vjp` would hold
_FEWEST = 8  # steps in a block: fewer save little memory, and cost a sum of all weights each


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
    allowed = int(_SHARE * (held + spared)) + spared
    if a_step * length <= max(allowed, in_parts):
        return length
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
    """One row of each stack; a negative place would not be understood, and costs nothing so."""
    return [
        lax.dynamic_index_in_dim(v, place, 0, keepdims=False, allow_negative_indices=False)
        for v in stacks
    ]


def block_of(stacks: list, start: Any, size: int) -> list:
    """The rows of one block of each stack."""
    if stacks and size == stacks[0].shape[0]:
        return stacks
    return [lax.dynamic_slice_in_dim(v, start, size, allow_negative_indices=False) for v in stacks]
