"""A tape as a dictionary of arrays, for `flax.serialization`, and back, to the last bit."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt._arrays import is_prng_key
from jaxbptt._serialization import flax_serialization, serialize_with_flax
from jaxbptt._transforms.tape import InFlight, Tape, in_flight_of, settings_of
from jaxbptt._types import PyTree, leaf_type

# The names of what a tape holds beside its carry, and the fields that they stand for.
_FIELDS = {
    "length": "length",
    "ring": "_ring",
    "head": "_head",
    "phase": "_phase",
    "put_in": "_put_in",
}


def _parts(tape: Tape) -> dict[str, PyTree]:
    """What a tape holds by name, its cotangents in flight among it where there is a pace."""
    fields = {name: getattr(tape, field) for name, field in _FIELDS.items()}
    # Only a tape that is replayed has flags of carries that were put in.
    held = {name: part for name, part in fields.items() if part is not None}
    parts = {"carry": tape.carry} | held
    if (in_flight := in_flight_of(tape)) is not None:
        parts["in_flight"] = {"lam": in_flight.lam, "count": in_flight.count}
    return parts


def tape_to_state_dict(tape: Tape) -> dict[str, Any]:
    """Returns what a tape holds under string keys; keys of `jax.random` as their data.

    The hash of the step goes along as bytes: a tape of another step means nothing.
    """
    to_state_dict = flax_serialization().to_state_dict
    parts = {name: to_state_dict(_key_data(part)) for name, part in _parts(tape).items()}
    return parts | {"step": _step(tape)}


def tape_from_state_dict(tape: Tape, state: dict[str, Any]) -> Tape:
    """Returns a tape like the one given, with what `tape_to_state_dict` made in it.

    Raises:
        ValueError: something is missing, of another type, or of another step.
    """
    parts = _parts(tape)
    missing = [name for name in (*parts, "step") if name not in state]
    if missing:
        raise ValueError(
            "the state of a tape must be what flax.serialization.to_state_dict made of one, but "
            f"{missing[0]!r} is missing. Restore it into a tape of the same recorder's init."
        )
    # A ring of another step may have the same shapes, and would give a wrong gradient in silence.
    if not np.array_equal(state["step"], _step(tape)):
        raise ValueError(
            "the target must be a tape of the same step, under the same JAX, but the one that was "
            "saved is of another. Restore the carry alone: from_state_dict(tape.carry, "
            "state['carry'])."
        )
    read = {name: _restored(part, state[name], name) for name, part in parts.items()}
    if "in_flight" in read:
        tape = dataclasses.replace(tape, _in_flight=InFlight(**read["in_flight"]))
    names = {"carry": "carry"} | _FIELDS
    fields = {field: read[name] for name, field in names.items() if name in read}
    return dataclasses.replace(tape, **fields)


def _restored(like: PyTree, state: Any, name: str) -> PyTree:
    from_state_dict = flax_serialization().from_state_dict
    read = from_state_dict(_key_data(like), state)

    def one(path: Any, like: Any, read: Any) -> jax.Array:
        value = jnp.asarray(read)
        if is_prng_key(like):
            # Of a struct JAX can't tell the implementation: then it is the default one.
            impl = jax.random.key_impl(like) if isinstance(like, jax.Array) else None
            value = jax.random.wrap_key_data(value, impl=impl)
        if leaf_type(value) != leaf_type(like):
            raise ValueError(
                "the target must be a tape of the types of the one that was saved, but of "
                f"{name}{jax.tree_util.keystr(path)} {leaf_type(value)} was saved and the target "
                f"has {leaf_type(like)}. Make the target by the same recorder's init."
            )
        return value

    return jax.tree_util.tree_map_with_path(one, like, read)


def _key_data(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda v: jax.random.key_data(v) if is_prng_key(v) else v, tree)


def _step(tape: Tape) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(settings_of(tape).step), np.uint8)


serialize_with_flax(Tape, tape_to_state_dict, tape_from_state_dict)
