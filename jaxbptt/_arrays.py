"""Arrays of a type: made canonical, made up from it, or zero; several of them in one."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbptt import _errors
from jaxbptt._compat import Inconclusive, as_varying
from jaxbptt._types import LeafType, PyTree, TreeType, is_part_of_sum, is_reference, leaf_type


def as_strong_arrays(
    tree: PyTree, name: str, *, structs: bool = False, blame: str = "caller"
) -> PyTree:
    """Makes every leaf a strongly typed array of a dtype that JAX has.

    Python scalars, weakly typed arrays and NumPy's float64 would otherwise give a
    step other residuals than the arrays that the loop carries.

    Args:
        tree: arrays, tracers or numbers.
        name: what a message calls the tree.
        structs: whether ShapeDtypeStructs are allowed, and kept.
        blame: "step" if the step returned it, "caller" if it was passed in.

    Raises:
        TypeError: a leaf that the step returned is none of these.
        ValueError: a leaf that was passed in is none of these.
    """

    def one(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct) and structs:
            return _canonical_struct(leaf)
        if getattr(leaf, "dtype", None) == jax.dtypes.float0:  # the cotangent of an integer
            return leaf
        check_range(leaf, name, path, returned=blame == "step")
        if is_reference(leaf):
            where = name + jax.tree_util.keystr(path)
            raise _errors.not_an_array(where, leaf, returned=blame == "step")
        try:
            leaf = jnp.asarray(leaf)
        except (TypeError, ValueError) as cause:
            path = name + jax.tree_util.keystr(path)
            raise _errors.not_an_array(path, leaf, returned=blame == "step") from cause
        except OverflowError as cause:
            path = name + jax.tree_util.keystr(path)
            kind = jax.dtypes.canonicalize_dtype(int)
            raise _errors.too_large(path, leaf, kind, returned=blame == "step") from cause
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return leaf
        # Of its own dtype, and so a strong type: nothing else changes.
        return lax.convert_element_type(leaf, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, tree)


def check_range(leaf: Any, name: str, path: Any = (), *, returned: bool = False) -> None:
    """Refuses NumPy's 64-bit integers that JAX, with 32 bits, would wrap around without a word."""
    if not isinstance(leaf, np.ndarray | np.generic) or leaf.dtype.kind not in "iu":
        return
    kind = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if kind == leaf.dtype or not leaf.size:
        return
    # Between the two all others fit.
    for number in (int(leaf.min()), int(leaf.max())):
        if not np.iinfo(kind).min <= number <= np.iinfo(kind).max:
            where = name + jax.tree_util.keystr(path)
            raise _errors.too_large(where, number, kind, returned=returned)


def _canonical_struct(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return leaf
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if dtype == leaf.dtype and not leaf.weak_type:
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, dtype)


def structs_of(kind: TreeType) -> PyTree:
    """Something of a type to trace with, where there are no arrays."""
    return kind.treedef.unflatten([struct_like(leaf) for leaf in kind.leaves])


def struct_like(aval: Any) -> Any:
    """Something of an abstract value's type to trace with, its explicit sharding included."""
    if leaf_type(aval).varying or leaf_type(aval).memory:
        return zeros(aval)
    sharding = getattr(aval, "sharding", None)
    if sharding is not None and sharding.mesh.empty:
        sharding = None
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)


def zeros(aval: Any) -> jax.Array:
    """Zeros of a type, varying over the same mesh axes inside `shard_map`."""
    return filled(aval, 0)


def filled(aval: Any, number: int) -> jax.Array:
    """The same with another number everywhere, as far as the dtype has it."""
    kind = leaf_type(aval)
    # Where it lies and over what it varies belongs to its type inside of loops and maps.
    array = jnp.full(kind.shape, number, kind.dtype, device=kind.sharding)
    if kind.memory is not None:
        array = jax.device_put(array, kind.memory)
    axes = tuple(sorted(kind.varying))
    if not axes:
        return array
    return as_varying(array, axes)


def size_in_bytes(arrays: Iterable) -> int:
    """The bytes of arrays or abstract values."""
    return sum(v.size * v.dtype.itemsize for v in arrays)


def at_most(size: Any, limit: Any) -> bool:
    """Whether a size is known to be at most so large; of a symbolic dimension it may not be."""
    try:
        return bool(size <= limit)
    except Inconclusive:
        return False


def where_or_zero(live: Any, value: jax.Array) -> jax.Array:
    """The value where `live`, else zeros."""
    if live is True:
        return value
    if is_part_of_sum(jax.typeof(value)):  # which can't be broadcast against anything
        return lax.select_n(live, zeros(jax.typeof(value)), value)
    return jnp.where(live, value, jnp.zeros((), value.dtype))


def is_inexact(dtype: Any) -> bool:
    """Whether it is a type of floating-point or complex numbers."""
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def is_prng_key(value: Any) -> bool:
    """Whether it is a typed key of `jax.random`, or its struct; numbers have no dtype."""
    dtype = getattr(value, "dtype", None)
    return dtype is not None and bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def select_rows(flags: jax.Array, values: jax.Array) -> jax.Array:
    """The rows of `values` where the flag is set, else zeros."""
    return where_or_zero(flags.reshape(flags.shape + (1,) * (values.ndim - flags.ndim)), values)


def is_half_precision(dtype: Any) -> bool:
    """Whether it is a floating-point type of fewer than 32 bits."""
    return bool(jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32)


def widened(value: Any) -> Any:
    """The value in the type to add up in: float32 for the half precisions."""
    narrow = hasattr(value, "dtype") and is_half_precision(value.dtype)
    return lax.convert_element_type(value, jnp.float32) if narrow else value


_SMALL = 1024  # bytes of an array at most that lies in one with others
_TOGETHER = 8  # so many lie together: what writes more of them at once takes long to compile


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where each of a list of arrays lies: by itself, or with others of its type in one array.

    To hand an array to a compiled function and take it back costs a microsecond or two of Python,
    which is more than a small step may take. Where there are more than eight small arrays of a
    type, eight of them lie in one array, along a new axis.

    Attributes:
        places: for each array the number of the one that it lies in, and its row there, None where
            it lies by itself.
    """

    places: tuple[tuple[int, int | None], ...]

    @classmethod
    def of(cls, kinds: Sequence[LeafType], *, apart: bool = False) -> "Packing":
        """The packing of arrays of these types; each by itself where that is asked for."""
        alike = [None if apart else _small_type(kind) for kind in kinds]
        count = collections.Counter(kind for kind in alike if kind is not None)
        places: list[tuple[int, int | None]] = []
        filled: dict[tuple, tuple[int, int]] = {}  # of each type, an array and how many lie in it
        arrays = 0
        for kind in alike:
            if kind is None or count[kind] <= _TOGETHER:
                places.append((arrays, None))
                arrays += 1
                continue
            at, row = filled.get(kind, (0, _TOGETHER))
            if row == _TOGETHER:  # it is full, or there is none yet
                at, row = arrays, 0
                arrays += 1
            places.append((at, row))
            filled[kind] = at, row + 1
        return cls(tuple(places))

    def types(self, kinds: Sequence[LeafType]) -> list[LeafType]:
        """The types of the arrays that they lie in."""
        return [
            of[0] if row is None else of[0].stacked(len(of)) for row, of in self._grouped(kinds)
        ]

    def pack(self, values: Sequence[jax.Array]) -> list[jax.Array]:
        """The arrays that hold these."""
        return [of[0] if row is None else jnp.stack(of) for row, of in self._grouped(values)]

    def _grouped(self, items: Sequence) -> list[tuple[int | None, list]]:
        """For each array that there is, a row that says whether it is packed, and what it holds."""
        groups: dict[int, tuple[int | None, list]] = {}
        for (at, row), item in zip(self.places, items, strict=True):
            groups.setdefault(at, (row, []))[1].append(item)
        return list(groups.values())


def _small_type(kind: LeafType) -> tuple | None:
    """What arrays that lie together have in common; None for one that lies by itself."""
    # Where an array lies over a mesh is part of its type here, as it is not in a comparison.
    small = jnp.issubdtype(kind.dtype, np.number) and at_most(size_in_bytes([kind]), _SMALL)
    mesh = str(kind.sharding), str(kind.memory), kind.varying
    return (kind, *mesh) if small else None
