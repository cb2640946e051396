"""What differs between the releases of JAX, and `lax.scan` as it was at import."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core
from jax.sharding import PartitionSpec

# A library that one can't edit is tried with `jax.lax.scan = partial(jaxbptt.scan, window=None)`.
# Our own loops must not go through what has been put there.
lax_scan = lax.scan

# What JAX raises where symbolic dimensions are compared, of which it isn't known which is larger.
_place = core if hasattr(core, "InconclusiveDimensionOperation") else jax.core  # the latter in 0.7
Inconclusive: type[Exception] = getattr(_place, "InconclusiveDimensionOperation")  # noqa: B009


def varying(aval: Any) -> frozenset:
    """The mesh axes over which an abstract value varies inside `shard_map`."""
    manual = getattr(aval, "manual_axis_type", None)  # JAX 0.10 on; before, it was called vma
    return manual.varying if manual else getattr(aval, "vma", None) or frozenset()


def as_varying(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """An array that is the same along mesh axes, as one that may vary along them."""
    if hasattr(lax, "pcast"):
        return lax.pcast(array, axes, to="varying")
    return getattr(lax, "pvary")(array, axes)  # noqa: B009  its name before JAX 0.8


def other_memory(aval: Any) -> Any:
    """The memory that an abstract value lies in, None for the device's own."""
    if not hasattr(jax, "memory"):  # before JAX 0.8 types don't tell
        return None
    space = getattr(aval, "memory_space", None)
    return None if space is jax.memory.Space.Device else space


def with_axis_in_front(spec: PartitionSpec) -> PartitionSpec:
    """The spec of arrays stacked along a new first axis, which no axis of the mesh divides."""
    if not hasattr(spec, "partitions"):  # before JAX 0.10 a spec is a tuple, and no more
        return PartitionSpec(None, *spec)
    # Over which axes there are terms of a sum, or copies for one, is no matter of positions.
    return spec.update(partitions=(None, *spec.partitions))


def bind_params(eqn: core.JaxprEqn) -> tuple[Sequence, dict[str, Any]]:
    """With what an equation's primitive is bound: functions, and parameters by name."""
    params = eqn.primitive.get_bind_params(eqn.params)
    # Before JAX 0.10 a pair; the functions have since moved in among the parameters.
    return params if isinstance(params, tuple) else ((), params)


def with_constvars(jaxpr: core.Jaxpr, constvars: list, invars: list) -> core.Jaxpr:
    """The same program with other of its inputs as constants."""
    given: dict[str, Any] = {"constvars": constvars, "invars": invars}
    if hasattr(jaxpr, "consts"):
        # Since JAX 0.12 a jaxpr may hold its constants, and without any it has no constvars. Ours
        # are kept beside it, so that something has to stand for them.
        given["consts"] = [None] * len(constvars)
    return jaxpr.replace(**given)


def scan_counts(eqn: core.JaxprEqn) -> tuple[int, int]:
    """How many consts and how many carries a scan's equation has."""
    # Since JAX 0.12 the equation doesn't say how many carries and xs it has. Outside
    # the body an x and a y have one axis more, a carry and a const as many as inside.
    body = eqn.params["jaxpr"].jaxpr
    carries = sum(_same_rank(eqn.outvars, body.outvars))
    return sum(_same_rank(eqn.invars, body.invars)) - carries, carries


def _same_rank(outside: Sequence[Any], inside: Sequence[Any]) -> list[bool]:
    return [a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside, strict=True)]


def jit_is_disabled() -> bool:
    """Whether `jax.disable_jit` is on, so that loops run as Python loops on concrete arrays."""
    return bool(getattr(jax.config, "jax_disable_jit"))  # noqa: B009  set when JAX starts


def call_with_rule(run: Callable, *args: Any) -> Any:
    """Calls a `custom_vjp` that takes symbolic zeros, in a `shard_map` without jit too."""
    try:
        return run(*args)
    except NotImplementedError as refused:  # before anything ran
        if "shard_map" not in str(refused):
            raise
        return jax.jit(run)(*args)


def without_mesh() -> contextlib.AbstractContextManager:
    """A context in which programs show no trace of a mesh that the caller has entered."""
    use = getattr(jax.sharding, "use_abstract_mesh", None)  # JAX 0.7 has none
    return use(jax.sharding.AbstractMesh((), ())) if use else contextlib.nullcontext()


def with_axes(axes: Sequence[tuple[Any, int]], function: Callable[[], Any]) -> Any:
    """What a function of no arguments returns where axes of these names and sizes are known."""
    if not hasattr(core, "set_current_trace"):  # before JAX 0.10
        return _traced_with_axes(axes, function)
    with core.take_current_trace() as current:
        pass
    found = []

    def run() -> None:
        with core.set_current_trace(current):
            found.append(function())

    # Nothing is traced by it, the names are all that is wanted of it.
    jax.make_jaxpr(run, axis_env=axes)()
    return found[0]


def _traced_with_axes(axes: Sequence[tuple[Any, int]], function: Callable[[], Any]) -> Any:
    closed, shapes = jax.make_jaxpr(function, axis_env=axes, return_shape=True)()
    try:
        outs = core.jaxpr_as_fun(closed)()
    except NameError as cause:
        names = ", ".join(repr(name) for name, _ in axes)
        raise NameError(
            f"jax.grad must stand inside of the vmap with the axis {names} where another vmap is "
            "inside of that one, in this version of JAX. Take the gradient in the mapped function "
            "and sum it, or use JAX 0.10 or later."
        ) from cause
    return jax.tree.unflatten(jax.tree.structure(shapes), outs)


def savable_by_orbax(array: Any) -> Any:
    """Returns an array in a form that orbax can save under this version of JAX.

    Orbax saves an array on several devices under a mesh that it enters by `jax.set_mesh`, which
    JAX 0.7.0 doesn't have. There such an array is copied to the host.
    """
    if hasattr(jax, "set_mesh") or not getattr(array, "is_fully_addressable", False):
        return array
    return array if len(array.sharding.device_set) == 1 else np.asarray(array)
