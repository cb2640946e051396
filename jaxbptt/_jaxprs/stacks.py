"""A loop that stacks what its trips make, each stack an array of its own from the start.

`lax.scan` begins all its stacks with the same zeros. Compilers make one array of those of one
shape, so that each stack begins as a copy of it, again at each turn of a loop around. Stacks
that begin with different numbers, of which none is ever read, are written where they lie.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxbptt._arrays import filled
from jaxbptt._compat import lax_scan
from jaxbptt._types import leaf_type

_NUMBERS = range(29, 128)  # seldom the step's own constants, and any integer dtype has them


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
) -> tuple[Any, list]:
    """`lax.scan` of a trip whose outputs are a list of these types.

    Args:
        trip: from a state and a row, the next state and its outputs.
        state: the first state.
        rows: arrays, each (length, ...).
        kinds: types or abstract values of what one trip makes.
        length: how many trips.
        first: which of the numbers the first stack begins with. Loops of one program have others.
        reverse: whether to start from the last row.
        unroll: how many trips one of the compiled loop has.
    """

    def one(state: Any, row: Any) -> tuple[Any, None]:
        (state, stacks), (place, row) = state, row
        state, outs = trip(state, row)
        return (state, [_put(*pair, place) for pair in zip(stacks, outs, strict=True)]), None

    stacks = [
        filled(leaf_type(kind).stacked(length), _NUMBERS[i % len(_NUMBERS)])
        for i, kind in enumerate(kinds, first)
    ]
    if not length:
        return state, stacks
    places = jnp.arange(length, dtype=jnp.int32)
    done, _ = lax_scan(one, (state, stacks), (places, rows), reverse=reverse, unroll=unroll)
    return done


def _put(stack: Any, value: Any, place: Any) -> Any:
    return lax.dynamic_update_index_in_dim(stack, value, place, 0, allow_negative_indices=False)
