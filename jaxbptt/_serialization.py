"""Types that `flax.serialization` is told of as soon as flax is imported, by whomever."""

import sys
from collections.abc import Callable
from typing import Any

_waiting: dict[type, tuple[Callable, Callable]] = {}


def serialize_with_flax(
    kind: type, to_state_dict: Callable[[Any], dict], from_state_dict: Callable[[Any, dict], Any]
) -> None:
    """Has a type registered with flax, now if flax is there, else when `tell_flax` finds it."""
    _waiting[kind] = to_state_dict, from_state_dict
    tell_flax()


def tell_flax() -> None:
    """Registers what is waiting if flax was imported. It imports nothing, and costs a look-up."""
    flax = sys.modules.get("flax.serialization") if _waiting else None
    # While flax itself is being imported its module is there but not whole.
    register = getattr(flax, "register_serialization_state", None)
    while register and _waiting:
        kind, functions = _waiting.popitem()
        register(kind, *functions, override=True)


def flax_serialization() -> Any:
    """The module `flax.serialization`, which the caller of a registered function has imported."""
    return sys.modules["flax.serialization"]
