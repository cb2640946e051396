"""Which arrays that a step closes over are constants: large ones, whose values are known.

A frozen encoder or a table is as large as a model. If it were a parameter like the others, a ring
would hold it once for each step, and all that only its gradient needs.
"""

import hashlib
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt._arrays import size_in_bytes

# Up to this many bytes an array costs a ring little, and may be somebody's parameter.
SMALL = 64 * 1024

# By the array's id, with a reference that tells whether the id is still that array's.
_known: dict[int, tuple[weakref.ref, str]] = {}


def hashes_of_constants(closed_over: Sequence[Any]) -> tuple[str | None, ...]:
    """A hash of the values of each array that is a constant, and None for each other array."""
    return tuple(_hash_of(v) if _is_constant(v) else None for v in closed_over)


def value_hash(array: Any) -> str | None:
    """A hash of the values of an array of numbers that can be read here, None for another."""
    return _hash_of(array) if _is_known(array) else None


def changed_constants(hashes: Sequence[str | None], closed_over: Sequence[Any]) -> list[int]:
    """Which arrays were constants with these hashes and have other, or unknown, values now."""
    now = hashes_of_constants(closed_over)
    return [i for i, (v, w) in enumerate(zip(hashes, now, strict=True)) if v not in (None, w)]


def _is_constant(array: Any) -> bool:
    return _is_known(array) and size_in_bytes([array]) > SMALL


def _is_known(array: Any) -> bool:
    """Whether an array is of numbers, and its values can be read here."""
    if isinstance(array, jax.core.Tracer) or not getattr(array, "is_fully_addressable", True):
        return False
    return bool(jnp.issubdtype(array.dtype, np.number) or array.dtype == bool)


def _hash_of(array: Any) -> str:
    # A step is traced anew at each eager call. What JAX made does not change, NumPy's arrays may.
    found = _known.get(id(array))
    if found is not None and found[0]() is array:
        return found[1]
    # As bytes where they lie: bfloat16 has no buffer of its own type, and a copy would be large.
    values = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    digest = hashlib.sha256(values.data).hexdigest()[:16]
    if isinstance(array, jax.Array):
        key = id(array)
        _known[key] = weakref.ref(array, lambda _: _known.pop(key, None)), digest
    return digest
