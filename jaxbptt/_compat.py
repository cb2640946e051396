"""What differs between versions of JAX, and `lax.scan` as it was at import."""

import contextlib
from typing import Any

import jax
import numpy as np
from jax import lax

# A user may put `partial(jaxbptt.scan, window=None)` in place of `jax.lax.scan`, to try it in a
# library that can't be edited. Our own loops must not go through that.
lax_scan = lax.scan


def without_mesh() -> contextlib.AbstractContextManager:
    """A context in which programs show no trace of a mesh that the caller has entered."""
    use = getattr(jax.sharding, "use_abstract_mesh", None)  # JAX 0.7 has none
    return use(jax.sharding.AbstractMesh((), ())) if use else contextlib.nullcontext()


def savable_by_orbax(array: Any) -> Any:
    """Returns an array in a form that orbax can save under this version of JAX.

    Orbax saves an array on several devices under a mesh that it enters by `jax.set_mesh`, which
    JAX 0.7.0 doesn't have. There such an array is copied to the host.
    """
    if hasattr(jax, "set_mesh") or not getattr(array, "is_fully_addressable", False):
        return array
    return array if len(array.sharding.device_set) == 1 else np.asarray(array)
