"""A state leaf by leaf: what is saved of each leaf, and how it is restored."""

import dataclasses
import zlib
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.tree_util import keystr, tree_flatten_with_path

from jaxbptt import _errors
from jaxbptt._arrays import is_prng_key
from jaxbptt._training.state import Pending
from jaxbptt._transforms.tape import Tape
from jaxbptt._types import PyTree, leaf_type


@dataclasses.dataclass(frozen=True)
class SavedLeaf:
    """One leaf of a state.

    Attributes:
        path: where it is, e.g. ".params['w']"; no two leaves of a state have the same path.
        value: an array, a `jax.ShapeDtypeStruct` or a number.
        on_tape: whether it belongs to the recorded steps, which `clear` leaves out.
    """

    path: str
    value: Any
    on_tape: bool

    @property
    def kind(self) -> str:
        """Its type in words: dtype and shape, or Python's name for a number's type."""
        if isinstance(self.value, int | float | complex):
            return type(self.value).__name__
        return str(leaf_type(self.value))

    @property
    def empty(self) -> bool:
        """Whether it is an array of size 0, of which there is nothing to save."""
        return 0 in np.shape(self.value)

    def saved(self) -> Any:
        """Returns the array to save: the value itself, or the data of keys.

        Raises:
            ValueError: it was donated, or is a struct and no array.
        """
        if isinstance(self.value, jax.ShapeDtypeStruct):
            raise ValueError(
                f"state{self.path} must be an array, but got a ShapeDtypeStruct {self.kind}. Pass "
                "the state itself."
            )
        if isinstance(self.value, jax.Array) and self.value.is_deleted():
            raise ValueError(
                f"state{self.path} must be an array that is there, but it was donated. Save a "
                "state before the next call takes it."
            )
        if is_prng_key(self.value):
            return jax.random.key_data(self.value)
        return self.value if isinstance(self.value, jax.Array) else np.asarray(self.value)

    def wanted(self) -> Any:
        """Describes, for the reader, the array that was saved of this leaf.

        Returns:
            A ShapeDtypeStruct with a sharding where this leaf lies on chosen devices, else a
            NumPy array, so that a NumPy array is read.
        """
        like: Any = self.value
        if is_prng_key(self.value):
            like = jax.eval_shape(jax.random.key_data, self.value)
        elif isinstance(self.value, int | float | complex):
            like = np.asarray(self.value)
        if self._sharding() is not None:
            return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=self._sharding())
        return np.empty(like.shape, like.dtype)

    def blank(self) -> Any:
        """Returns zeros in the form that is read, for a leaf that was not saved or is cleared."""
        wanted = self.wanted()
        zeros = np.zeros(wanted.shape, wanted.dtype)
        return zeros if isinstance(wanted, np.ndarray) else jax.device_put(zeros, wanted.sharding)

    def restored(self, read: Any) -> Any:
        """Turns what was read into a leaf of this one's kind: number, NumPy, key or array."""
        if isinstance(self.value, int | float | complex):
            return type(self.value)(read.item())
        if isinstance(self.value, np.ndarray | np.generic):
            return np.asarray(read)
        if is_prng_key(self.value):
            return jax.random.wrap_key_data(jnp.asarray(read), impl=_key_impl(self.value))
        # JAX makes a weakly typed array of a Python number alone.
        if getattr(self.value, "weak_type", False) and not read.shape:
            return jnp.asarray(read.item())
        return jnp.asarray(read)

    def _sharding(self) -> Sharding | None:
        # An array that is not committed to a device must not be restored as a committed one:
        # computations with arrays on other devices would then be refused.
        committed = getattr(self.value, "committed", True)
        return getattr(self.value, "sharding", None) if committed else None


@dataclasses.dataclass(frozen=True)
class FlatState:
    """A state as a list of leaves.

    Attributes:
        leaves: all leaves, in the order of `jax.tree.leaves`.
        tapes: the tapes by path, in the same order.
        treedef: the structure of the state.
    """

    leaves: tuple[SavedLeaf, ...]
    tapes: dict[str, Tape]
    treedef: jax.tree_util.PyTreeDef

    @classmethod
    def of(cls, tree: PyTree, name: str) -> "FlatState":
        """Flattens a state.

        Args:
            tree: arrays, ShapeDtypeStructs and numbers, with tapes among them.
            name: what a message calls it.

        Raises:
            ValueError: a leaf is something else.
        """
        # Tapes and pending cotangents are flattened by themselves: which of their leaves
        # belong to the recorded steps depends on the node that they are in.
        nodes = tree_flatten_with_path(tree, is_leaf=lambda v: isinstance(v, Tape | Pending))[0]
        leaves, seen = [], Counter[str]()
        for outer, node in nodes:
            for inner, value in tree_flatten_with_path(node)[0]:
                path = keystr((*outer, *inner))
                _check_savable(name + path, value)
                # A container may give two of its children the same key.
                seen[path] += 1
                unique = path if seen[path] == 1 else f"{path}#{seen[path]}"
                leaves.append(SavedLeaf(unique, value, _is_on_tape(node, inner)))
        tapes = {keystr(path): node for path, node in nodes if isinstance(node, Tape)}
        return cls(tuple(leaves), tapes, jax.tree.structure(tree))


def checksum(array: Any) -> str | None:
    """The CRC-32 of an array's bytes; None where this process does not hold all of them."""
    if not getattr(array, "is_fully_addressable", True):
        return None
    return f"{zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data):08x}"


def _is_on_tape(node: Any, path: tuple) -> bool:
    """Whether a leaf, at a path within a node, belongs to the recorded steps."""
    return isinstance(node, Pending) or (
        isinstance(node, Tape) and path[0] != jax.tree_util.GetAttrKey("carry")
    )


def _key_impl(keys: Any) -> Any:
    """The implementation of keys, which may be a ShapeDtypeStruct."""
    impls = []
    # key_impl takes no struct, but a tracer of the struct's type.
    jax.eval_shape(lambda keys: impls.append(jax.random.key_impl(keys)), keys)
    return impls[0]


def _check_savable(path: str, value: Any) -> None:
    """Refuses a leaf that can't be saved."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{path} must be an array, but got the traced value {value}. Save outside of jit, "
            "between two calls of what is compiled."
        )
    if is_prng_key(value):
        return
    number = isinstance(value, int | float | complex)
    dtype = np.asarray(value).dtype if number else getattr(value, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
        raise ValueError(
            f"{path} must be an array or a number, but got {_errors.describe(value)}. What else "
            "there is to keep goes into data, as JSON."
        )
