"""Builds every message: which argument, what was expected, what came, where, what to do."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from jaxbptt._avals import LeafType, TreeType, leaf_type

_SHOWN = 8  # differing leaves listed before "and n more"


def positive_int(name: str, value: Any) -> None:
    """Refuses a `window` or `every` that is not a Python int of at least 1."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{name} must be a Python int known when the loop is traced, but got the traced "
            f"value {value}. Make it static, e.g. jax.jit(f, static_argnames='{name}')."
        )
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(
            f"{name} must be an int of at least 1 (it counts time steps), but got {value!r}."
        )


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuses an option that is not among `allowed`."""
    if value not in allowed:
        choices = " or ".join(repr(a) for a in allowed)
        raise ValueError(f"{name} must be {choices}, but got {value!r}.")


def is_pair(value: Any, *, what: str, remedy: str) -> None:
    """Refuses a step's return value that is not a pair."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        came = f"a {type(value).__name__}"
        if isinstance(value, tuple | list):
            came += f" of length {len(value)}"
        raise TypeError(f"step must return {what}, but it returned {came}. {remedy}")


def same_type(
    lead: str, expected: TreeType, got: TreeType, remedy: str, *, error: type[Exception]
) -> None:
    """Raises `error` unless two tree types agree, listing each leaf that differs.

    Args:
        lead: the start of the sentence, e.g. "carry must be of the type on the tape".
        expected: the type wanted.
        got: the type that came.
        remedy: a sentence that says what to do.
        error: `TypeError` for what a step returns, `ValueError` otherwise.
    """
    if expected == got:
        return
    wanted, came = _by_path(expected), _by_path(got)
    rows = [
        f"{path or 'the value itself'}: {_side(wanted, path, 'expected')}, {_side(came, path, 'got')}"
        for path in dict.fromkeys([*wanted, *came])
        if wanted.get(path) != came.get(path)
    ]
    if not rows:  # the same leaves in other containers
        rows = [f"the containers: {expected.treedef} expected, {got.treedef} got"]
        counted = "the containers differ"
    else:
        counted = f"{len(rows)} of {len(wanted)} leaves differ{'s' if len(rows) == 1 else ''}"
    raise error(f"{lead}, but {counted}:\n{_bullets(rows)}\n{remedy}")


def not_callable(step: Any) -> ValueError:
    """The error for something else where the step function belongs."""
    return ValueError(
        f"step must be a function step(params, carry, x) -> (carry, y), but got {_kind(step)}."
    )


def is_tape(value: Any, tape_class: type) -> None:
    """Refuses something else where the tape belongs."""
    if not isinstance(value, tape_class):
        raise ValueError(
            "tape must be the Tape that init or the last call returned, but got "
            f"{_kind(value)}. A carry goes in through rec.init(params, carry, x) or "
            "tape.replace(carry=carry)."
        )


def tape_as_carry() -> ValueError:
    """The error for a tape where a carry belongs."""
    return ValueError(
        "carry must be the carry that the step takes, but got a Tape. "
        "Pass tape.carry, or call the recorder with the tape: rec(params, tape, x)."
    )


def other_setting(name: str, wanted: Any, got: Any) -> ValueError:
    """The error for a tape made by a recorder with another window, every or weights."""
    return ValueError(
        f"tape was made by a recorder with {name}={got!r}, but this one has {name}={wanted!r}. "
        "Make a tape with this recorder's init; its carry can be kept: "
        "rec.init(params, tape.carry, x)."
    )


def other_residuals(expected: Iterable[LeafType], got: Iterable[LeafType]) -> ValueError:
    """The error for a ring that another step, or another version of JAX, has laid out."""
    wanted, came = [str(t) for t in expected], [str(t) for t in got]
    return ValueError(
        "tape was recorded by another step: in each slot expected the residuals "
        f"({', '.join(wanted) or 'none'}), but got ({', '.join(came) or 'none'}). "
        "Make a tape with this recorder's init; its carry can be kept: "
        "rec.init(params, tape.carry, x)."
    )


def loss_not_scalar(got: TreeType, every: int) -> TypeError:
    """The error for reverse mode with every > 1 through a y that is not a scalar loss."""
    came = ", ".join(str(t) for t in got.leaves) or "nothing"
    return TypeError(
        f"step must return its scalar loss as y for a gradient inside the loop at every={every}, "
        f"but y is {came}. Return (carry, loss), or (carry, (loss, aux)) with has_aux=True; "
        "or keep the cotangents of y and call rec.pullback(params, tape, ct_ys)."
    )


def rows_of(ct_ys: TreeType, window: int) -> int:
    """How many steps the cotangents `ct_ys` are for: the length of each leaf's first axis."""
    lengths = {path: leaf.shape[0] if leaf.shape else 0 for path, leaf in _by_path(ct_ys).items()}
    if len(set(lengths.values())) > 1:
        rows = [f"ct_ys{path}: {n}" for path, n in lengths.items()]
        raise ValueError(
            "ct_ys must have the same first axis, over time steps, in all leaves, but got lengths\n"
            f"{_bullets(rows)}\nStack the cotangents of the steps, oldest first."
        )
    count = next(iter(lengths.values()), 1)
    if not 1 <= count <= window:
        raise ValueError(
            f"ct_ys must have a first axis over 1 to window={window} steps, oldest first, "
            f"but got {count or 'none'}. Of one step: ct[None]; of more steps than the window "
            "holds: pull back earlier, or record with a longer window."
        )
    return count


def _by_path(kind: TreeType) -> dict[str, LeafType]:
    return {keystr(path): leaf for path, leaf in tree_flatten_with_path(kind.tree())[0]}


def _side(leaves: dict[str, LeafType], path: str, word: str) -> str:
    return f"{leaves[path]} {word}" if path in leaves else f"nothing {word}"


def _bullets(rows: list[str]) -> str:
    shown = [f"  * {row}" for row in rows[:_SHOWN]]
    if len(rows) > _SHOWN:
        shown.append(f"  * and {len(rows) - _SHOWN} more")
    return "\n".join(shown)


def _kind(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array {leaf_type(value)}"
    return f"a {type(value).__name__}"
