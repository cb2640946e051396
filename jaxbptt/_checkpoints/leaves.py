"""A state leaf by leaf: what of each is saved, what belongs to the past, and how it comes back."""

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
from jaxbptt._training.state import Pending
from jaxbptt._transforms.tape import Tape
from jaxbptt._types import PyTree, leaf_type


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of a state.

    Attributes:
        path: where it is, e.g. ".params['w']"; no two leaves have the same.
        value: an array, a `jax.ShapeDtypeStruct` or a number.
        past: whether it belongs to the recorded steps, which a cleared state is without.
    """

    path: str
    value: Any
    past: bool

    @property
    def kind(self) -> str:
        """Its type in words: shape and dtype, or that of the number."""
        if isinstance(self.value, int | float | complex):
            return type(self.value).__name__
        return str(leaf_type(self.value))

    @property
    def empty(self) -> bool:
        """Whether there is nothing to save of it: an array of size 0."""
        return 0 in np.shape(self.value)

    def saved(self) -> Any:
        """What is saved of it: of keys their data.

        Raises:
            ValueError: it has been donated, or there never was an array.
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
        if _is_key(self.value):
            return jax.random.key_data(self.value)
        return self.value if isinstance(self.value, jax.Array) else np.asarray(self.value)

    def wanted(self) -> Any:
        """Something like what was saved, in place of this leaf, to be read.

        Where this leaf lies on chosen devices a ShapeDtypeStruct with its sharding, else
        an array of numpy.
        """
        kind: Any = self.value
        if _is_key(self.value):
            kind = jax.eval_shape(jax.random.key_data, self.value)
        elif isinstance(self.value, int | float | complex):
            kind = np.asarray(self.value)
        if self._sharding() is not None:
            return jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=self._sharding())
        return np.empty(kind.shape, kind.dtype)

    def blank(self) -> Any:
        """Zeros, in the form of what is read."""
        wanted = self.wanted()
        zeros = np.zeros(wanted.shape, wanted.dtype)
        return zeros if isinstance(wanted, np.ndarray) else jax.device_put(zeros, wanted.sharding)

    def restored(self, read: Any) -> Any:
        """What was read, as a leaf like this one."""
        if isinstance(self.value, int | float | complex):
            return type(self.value)(read.item())
        if isinstance(self.value, np.ndarray | np.generic):
            return np.asarray(read)
        if _is_key(self.value):
            return jax.random.wrap_key_data(jnp.asarray(read), impl=_key_impl(self.value))
        if getattr(self.value, "weak_type", False) and not read.shape:
            return jnp.asarray(read.item())
        return jnp.asarray(read)

    def _sharding(self) -> Sharding | None:
        # An array that is bound to no device must not become one: it goes along with others.
        bound = getattr(self.value, "committed", True)
        return getattr(self.value, "sharding", None) if bound else None


@dataclasses.dataclass(frozen=True)
class State:
    """A state in flat leaves.

    Attributes:
        leaves: all leaves, in order.
        tapes: the tapes by path, in order.
        treedef: of the whole.
    """

    leaves: tuple[Leaf, ...]
    tapes: dict[str, Tape]
    treedef: jax.tree_util.PyTreeDef

    @classmethod
    def of(cls, tree: PyTree, name: str) -> "State":
        """Takes a state apart.

        Args:
            tree: arrays, ShapeDtypeStructs and numbers, with tapes among them.
            name: what a message calls it.

        Raises:
            ValueError: a leaf is none of these.
        """
        nodes = tree_flatten_with_path(tree, is_leaf=lambda v: isinstance(v, Tape | Pending))[0]
        rows, count = [], Counter[str]()
        for path, node in nodes:
            for inner, value in tree_flatten_with_path(node)[0]:
                past = _is_past(node, inner)
                at = keystr((*path, *inner))
                count[at] += 1
                _check(name + at, value)
                # A container may give two children one key.
                rows.append(Leaf(at if count[at] == 1 else f"{at}#{count[at]}", value, past))
        tapes = {keystr(path): node for path, node in nodes if isinstance(node, Tape)}
        return cls(tuple(rows), tapes, jax.tree.structure(tree))


def checksum(array: Any) -> str | None:
    """A CRC-32 of an array's bytes; None where this process does not hold all of them."""
    if not getattr(array, "is_fully_addressable", True):
        return None
    return f"{zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data):08x}"


def _is_past(node: Any, path: tuple) -> bool:
    """Whether a leaf of a node belongs to the recorded steps."""
    return isinstance(node, Pending) or (
        isinstance(node, Tape) and path[0] != jax.tree_util.GetAttrKey("carry")
    )


def _is_key(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return dtype is not None and bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def _key_impl(keys: Any) -> Any:
    """The implementation of keys, which may be a ShapeDtypeStruct."""
    found = []
    jax.eval_shape(lambda keys: found.append(jax.random.key_impl(keys)), keys)
    return found[0]


def _check(path: str, value: Any) -> None:
    """Refuses what can't be saved."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{path} must be an array, but got the traced value {value}. Save outside of jit, "
            "between two calls of what is compiled."
        )
    if _is_key(value):
        return
    number = isinstance(value, int | float | complex)
    dtype = np.asarray(value).dtype if number else getattr(value, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
        raise ValueError(
            f"{path} must be an array or a number, but got {_errors.describe(value)}. What else "
            "there is to keep goes into data, as JSON."
        )
