"""Types of arrays: what a leaf is, made canonical, compared by value and written down."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbptt._types import PyTree


@dataclasses.dataclass(frozen=True)
class LeafType:
    """Shape and dtype of one leaf, equal when these are.

    `vma` (the mesh axes over which the leaf varies inside `shard_map`) rides along
    and does not count: a tape means the same inside and outside.
    """

    shape: tuple[int, ...]
    dtype: Any
    vma: frozenset = dataclasses.field(default=frozenset(), compare=False)

    def __str__(self) -> str:
        name = "float0" if self.dtype == jax.dtypes.float0 else self.dtype
        return f"{name}[{','.join(map(str, self.shape))}]"

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


def type_of(tree: PyTree) -> TreeType:
    """The type of a pytree of arrays, tracers or ShapeDtypeStructs."""
    leaves, treedef = jax.tree.flatten(tree)
    return TreeType(treedef, tuple(leaf_type(leaf) for leaf in leaves))


def leaf_type(leaf: Any) -> LeafType:
    """The type of one array, tracer, abstract value or ShapeDtypeStruct."""
    if isinstance(leaf, jax.Array):
        leaf = jax.typeof(leaf)
    vma = getattr(leaf, "vma", None) or frozenset()
    return LeafType(tuple(leaf.shape), leaf.dtype, vma)


def canonical(tree: PyTree, name: str, error: type[Exception] = ValueError) -> PyTree:
    """Makes every leaf a strongly typed array of a dtype that JAX has; keeps ShapeDtypeStructs.

    Python scalars, weakly typed arrays and NumPy's float64 would otherwise give a
    step other residuals than the arrays that the loop carries.

    Args:
        tree: arrays, tracers, numbers or ShapeDtypeStructs.
        name: what a message calls the tree.
        error: the type of exception for a leaf that is none of these.
    """

    def one(path, leaf):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return _canonical_struct(leaf)
        try:
            leaf = jnp.asarray(leaf)
        except TypeError as cause:
            raise error(
                f"{name}{jax.tree_util.keystr(path)} must be an array or a number, but it is "
                f"{leaf!r} of type {type(leaf).__name__}. Close over what is not an array."
            ) from cause
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return leaf
        return lax.convert_element_type(leaf, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, tree)


def _canonical_struct(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return leaf
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if dtype == leaf.dtype and not leaf.weak_type:
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, dtype)


def struct_of(kind: TreeType) -> PyTree:
    """ShapeDtypeStructs of a type, to trace with where there are no arrays."""

    def one(leaf):
        extra = {"vma": leaf.vma} if leaf.vma else {}
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, **extra)

    return kind.treedef.unflatten([one(leaf) for leaf in kind.leaves])


def zeros(aval: Any) -> jax.Array:
    """Zeros of a type, varying over the same mesh axes inside `shard_map`."""
    array = jnp.zeros(aval.shape, aval.dtype)
    vma = getattr(aval, "vma", None)
    if not vma:
        return array
    axes = tuple(sorted(vma))
    if hasattr(lax, "pcast"):  # JAX 0.8 on; before, the same thing was called pvary
        return lax.pcast(array, axes, to="varying")
    return lax.pvary(array, axes)
