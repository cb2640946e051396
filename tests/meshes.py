"""Meshes of the test's devices, and arguments laid over them."""

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def mesh_of(kind="Auto", **axes):
    """A mesh whose axes are all of one kind."""
    types = (getattr(AxisType, kind),) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types)


def entered(mesh):
    """A context in which a mesh is the current one."""
    return jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh)


def laid(mesh, specs, args):
    """The arguments over a mesh; a spec is for all leaves below it."""

    def put(spec, tree):
        return jax.device_put(tree, NamedSharding(mesh, spec))

    return jax.tree.map(put, specs, args, is_leaf=lambda v: isinstance(v, P))
