"""What users hand in: pytrees, step functions, and the types of trees, compared by value."""

import dataclasses
import math
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding

from jaxbptt._compat import other_memory, varying, with_axis_in_front

PyTree: TypeAlias = Any
"""Any nesting of containers that JAX knows, with arrays (or None) at the leaves."""


class StepFn(Protocol):
    """One time step: a `lax.scan` body that takes the parameters as an extra first argument."""

    def __call__(self, params: PyTree, carry: PyTree, x: PyTree, /) -> tuple[PyTree, PyTree]:
        """Returns the next carry, of the type of `carry`, and the output y."""
        ...


@dataclasses.dataclass(frozen=True)
class LeafType:
    """Shape and dtype of one leaf, equal when these are.

    `varying` (the mesh axes over which the leaf varies inside `shard_map`) and `sharding`
    (over axes of type Explicit) and `memory` (where it is not the device's own) ride
    along and do not count: a tape means the same wherever it lies.
    """

    shape: tuple[int, ...]
    dtype: Any
    varying: frozenset = dataclasses.field(default=frozenset(), compare=False)
    sharding: Any = dataclasses.field(default=None, compare=False)
    memory: Any = dataclasses.field(default=None, compare=False)

    def __str__(self) -> str:
        name = "float0" if self.dtype == jax.dtypes.float0 else self.dtype
        return f"{name}[{','.join(map(str, self.shape))}]"

    def stacked(self, length: int) -> "LeafType":
        """The type of so many of them, one after another along a new first axis."""
        sharding = self.sharding
        if sharding is not None:
            sharding = NamedSharding(sharding.mesh, with_axis_in_front(sharding.spec))
        return LeafType((length, *self.shape), self.dtype, self.varying, sharding, self.memory)

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def differentiable(self) -> bool:
        """Whether gradients can flow through such a leaf at all."""
        return jnp.issubdtype(self.dtype, jnp.inexact)


@dataclasses.dataclass(frozen=True)
class TreeType:
    """Structure of a pytree with the types of its leaves: static, hashable, equal by value."""

    treedef: jax.tree_util.PyTreeDef
    leaves: tuple[LeafType, ...]

    def tree(self) -> PyTree:
        """The pytree with a `LeafType` at each leaf."""
        return self.treedef.unflatten(self.leaves)


def is_one_leaf(tree: PyTree) -> bool:
    """Whether it is a single leaf: neither a container, an empty one included, nor None."""
    structure = jax.tree.structure(tree)
    return jax.tree_util.treedef_is_leaf(structure) and len(jax.tree.leaves(tree)) == 1


def in_words(tree: PyTree, most: int = 60) -> str:
    """The types of a tree of arrays on one line; of a large tree only how many leaves it has."""

    # Types are written without the quotes that `repr` puts around strings.
    class Word(str):
        __repr__ = str.__str__

    def word(leaf: Any) -> Word:
        typed = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        return Word(leaf_type(leaf) if typed else type(leaf).__name__)

    words = " ".join(repr(jax.tree.map(word, tree)).split())
    return words if len(words) <= most else f"{len(jax.tree.leaves(tree))} leaves"


def type_of(tree: PyTree) -> TreeType:
    """The type of a pytree of arrays, tracers or ShapeDtypeStructs."""
    leaves, treedef = jax.tree.flatten(tree)
    return TreeType(treedef, tuple(leaf_type(leaf) for leaf in leaves))


def leaf_type(leaf: Any) -> LeafType:
    """The type of one array, tracer, abstract value or ShapeDtypeStruct; of a type, itself."""
    if isinstance(leaf, LeafType):
        return leaf
    if isinstance(leaf, jax.Array):  # tracers are too
        leaf = jax.typeof(leaf)
    return LeafType(
        tuple(leaf.shape), leaf.dtype, varying(leaf), explicit(leaf), other_memory(leaf)
    )


def is_reference(value: Any) -> bool:
    """Whether a variable, or a value, is a mutable reference (`jax.new_ref`) and not an array."""
    return hasattr(getattr(value, "aval", None), "inner_aval")


def is_part_of_sum(value: Any) -> bool:
    """Whether devices hold terms of a sum, or copies that get one: JAX can't batch over such."""
    sharding = getattr(getattr(value, "aval", value), "sharding", None)
    spec = getattr(sharding, "spec", None)
    return bool(getattr(spec, "unreduced", None) or getattr(spec, "reduced", None))


def explicit(aval: Any) -> NamedSharding | None:
    """The sharding in an abstract value's type, None where no axis of its mesh is Explicit."""
    sharding = getattr(aval, "sharding", None)
    if not isinstance(sharding, NamedSharding) or AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return sharding
