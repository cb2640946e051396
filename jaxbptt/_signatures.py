"""How a function that a user hands in is to be called: with few arguments, or with more."""

import inspect
from collections.abc import Callable
from typing import Any

from jaxbptt._errors import describe


def takes_more(function: Callable, name: str, few: tuple[str, ...], more: tuple[str, ...]) -> bool:
    """Whether a function wants the longer of two lists of arguments, as its signature says.

    It gets the shorter list wherever that will do: arguments with a default and `*args` don't
    ask for more. Partials, methods, callable objects and functions wrapped by `jax.jit` or
    `functools.wraps` count as what is left for the caller to give. What has no signature (some
    functions written in C) gets the shorter list.

    Args:
        function: what the user handed in.
        name: what a message calls it.
        few: the names of the arguments in the shorter list.
        more: those in the longer list.

    Raises:
        ValueError: it can be called with neither.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return False
    # If both fit, the shorter list: what has a default does not ask for more.
    fits = [_can_bind(signature, len(names)) for names in (few, more)]
    if any(fits):
        return not fits[0]
    raise _other_arguments(function, name, (few, more), signature)


def check_takes(function: Callable, name: str, given: tuple[str, ...]) -> None:
    """Refuses a function that can't be called with these arguments, as its signature says."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    if not _can_bind(signature, len(given)):
        raise _other_arguments(function, name, (given,), signature)


def _other_arguments(
    function: Callable, name: str, given: tuple[tuple[str, ...], ...], signature: inspect.Signature
) -> ValueError:
    forms = " or ".join(f"{name}({', '.join(names)})" for names in given)
    return ValueError(
        f"{name} must be callable as {forms}, but the arguments of {_named(function)} are "
        f"{signature.replace(return_annotation=signature.empty)}. Bind what is left over, e.g. "
        "with functools.partial."
    )


def _can_bind(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _named(function: Any) -> str:
    return getattr(function, "__name__", None) or describe(function)


def name_of(function: Any) -> str:
    """A function's name, or that of a callable object's class, for a `repr`."""
    inner = getattr(function, "func", function)  # of a partial
    return getattr(inner, "__name__", None) or type(inner).__name__
