"""Builds every message: which argument, what was expected, what came, where, what to do."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from jaxbptt._types import LeafType, TreeType, leaf_type

_SHOWN = 8  # differing leaves listed before "and n more"
_KEEP_CARRY = (
    "Make a tape with this recorder's init; the carry can be kept: rec.init(params, tape.carry, x)."
)
_NUMBERS = (
    "A number or NumPy scalar that the step closes over is part of it: one that changes, or that "
    "gradients are wanted of, has to be an array (jnp.asarray) before the tape is made."
)


def positive_int(name: str, value: Any) -> None:
    """Refuses a `window` or `every` that is not a Python int of at least 1."""
    if isinstance(value, jax.core.Tracer):
        remedy = f"Make it static, e.g. jax.jit(f, static_argnames='{name}')."
        if "[" in name:  # in a container, which can't be static
            remedy = "Close over a Python int."
        raise ValueError(
            f"{name} must be a Python int known when the loop is traced, but got the traced "
            f"value {value}. {remedy}"
        )
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(
            f"{name} must be an int of at least 1 (it counts time steps), but got {value!r}."
        )


def no_window(name: str, leaves: int) -> ValueError:
    """The error for None as the window of a part of the carry that has leaves."""
    count = "a leaf" if leaves == 1 else f"{leaves} leaves"
    return ValueError(
        f"{name} must be an int of at least 1 (it counts time steps), but got None for a part of "
        f"the carry with {count}. None is the window of a part without any; the number of all "
        "steps that run lets this part's gradient through to the end."
    )


def symbolic_length(length: Any, why: str) -> ValueError:
    """The error for a symbolic number of steps, where the number has to be known."""
    return ValueError(
        f"the length of the run must be a number {why}, but got the symbolic dimension {length}. "
        "Export for a fixed number of steps; the batch may be symbolic."
    )


def inside_auto_axes() -> ValueError:
    """The error for residuals that a step leaves inside of `auto_axes`."""
    return ValueError(
        "step must keep to the Explicit axes of its mesh, but what its pullback needs of the "
        "forward pass is made inside of jax.sharding.auto_axes, where an array has no sharding to "
        "be recorded with. Put auto_axes around the whole loop, or write the step with Explicit "
        "shardings; scan with window=None takes it as it is."
    )


def above_one(name: str, value: Any, what: str) -> None:
    """Refuses what is not a number above 1, known when the loop is traced."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} must be a Python number, but got the traced value {value}.")
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not value > 1:
        raise ValueError(f"{name} must be a number above 1 ({what}), but got {value!r}.")


def random_part(name: str) -> ValueError:
    """The error for a random window where only a number of steps can be."""
    return ValueError(
        f"{name} must be an int, but got a random window, which only scan takes, as its whole "
        "window: the cuts are drawn for a whole run and for all parts of the carry at once."
    )


def random_groups(every: int) -> ValueError:
    """The error for a random window with groups of outputs."""
    return ValueError(
        f"every must be 1 with a random window, but got {every}: all outputs send their "
        "cotangents back through the same random cuts. Leave every out."
    )


def not_a_prefix(window: Any, carry: TreeType) -> ValueError:
    """The error for a window whose containers are not those of the carry."""
    shown = [f"window{keystr(path)}: {steps}" for path, steps in tree_flatten_with_path(window)[0]]
    there = [f"carry{path}: {leaf}" for path, leaf in _by_path(carry).items()]
    return ValueError(
        "window must be one int, or ints in the containers of the carry or of its outer part, "
        f"but got\n{bullets(shown)}\nfor a carry with\n{bullets(there)}\n"
        "Give each part of the carry its window under the part's own key."
    )


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuses an option that is not among `allowed`."""
    if value not in allowed:
        choices = ", ".join(map(repr, allowed[:-1])) + f" or {allowed[-1]!r}"
        raise ValueError(f"{name} must be {choices}, but got {value!r}.")


def not_callable(step: Any) -> ValueError:
    """The error for something else where the step function belongs."""
    return ValueError(
        f"step must be a function step(params, carry, x) -> (carry, y), but got {describe(step)}."
    )


def is_pair(value: Any, what: str, remedy: str) -> None:
    """Refuses a step's return value that is not a pair."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"step must return {what}, but it returned {describe(value)}. {remedy}")


def same_type(
    lead: str,
    name: str,
    expected: TreeType,
    got: TreeType,
    remedy: str,
    *,
    words: tuple[str, str] = ("expected", "got"),
    error: type[Exception] = ValueError,
) -> None:
    """Raises `error` unless two tree types agree, listing each leaf that differs.

    Args:
        lead: the start of the sentence, e.g. "carry must be of the type on the tape".
        name: what leads to the tree, put before each path.
        expected: the type wanted.
        got: the type that came.
        remedy: a sentence that says what to do.
        words: what to call the type wanted and the one that came, in the list.
        error: `TypeError` for what a step returns, `ValueError` otherwise.
    """
    if expected == got:
        return
    wanted, came = _by_path(expected), _by_path(got)
    differ = [path for path in {**wanted, **came} if wanted.get(path) != came.get(path)]
    rows = [
        f"{name}{path}: {_type_at(wanted, path)} {words[0]}, {_type_at(came, path)} {words[1]}"
        for path in differ
    ]
    if not rows:  # the same leaves in other containers
        rows = [f"{name}: {expected.treedef} {words[0]}, {got.treedef} {words[1]}"]
    if wanted.keys() == came.keys() and differ:
        count = f"{len(rows)} of {len(wanted)} leaves differ{'s' if len(rows) == 1 else ''}"
    else:
        count = "the structure differs"
    raise error(f"{lead}, but {count}:\n{bullets(rows)}\n{remedy}")


def not_an_array(path: str, leaf: Any, *, returned: bool) -> Exception:
    """The error for a leaf that JAX can't make an array of."""
    if returned:
        return TypeError(
            f"step must return arrays or numbers, but {path} is {describe(leaf)}. "
            "Leave out of it what is not an array."
        )
    return ValueError(
        f"{path} must be an array or a number, but got {describe(leaf)}. "
        "Let the step close over what is not an array."
    )


def is_tape(value: Any, tape_class: type) -> None:
    """Refuses something else where the tape belongs."""
    if not isinstance(value, tape_class):
        raise ValueError(
            "tape must be the Tape that init or the last call returned, but got "
            f"{describe(value)}. A carry goes in through rec.init(params, carry, x) or "
            "tape.replace(carry=carry)."
        )


def not_a_recorder(value: Any) -> ValueError:
    """The error for something else where the recorder belongs."""
    return ValueError(
        f"recorder must be what jaxbptt.record returned, but got {describe(value)}. "
        "Wrap the step: jaxbptt.record(step, window=...)."
    )


def no_tape(name: str, value: Any, tape_class: type) -> None:
    """Refuses a tape where params, a carry or x belongs."""
    if isinstance(value, tape_class):
        remedy = "Pass tape.carry." if name == "carry" else "Mind the order: params, tape, x."
        raise ValueError(f"{name} must be what the step takes as {name}, but got a Tape. {remedy}")


def other_setting(name: str, wanted: Any, got: Any) -> ValueError:
    """The error for a tape made by a recorder with another window, every or weights."""
    if name == "windows":
        name, wanted, got = "window", wanted.tree(), got.tree()
    return ValueError(
        f"tape must be from a recorder with {name}={wanted!r}, but was made by one with "
        f"{name}={got!r}. {_KEEP_CARRY}"
    )


def other_residuals(expected: Sequence[LeafType], got: Sequence[LeafType]) -> ValueError:
    """The error for a ring that another step, or another version of JAX, has laid out."""
    wanted, came = (", ".join(map(str, types)) or "nothing" for types in (expected, got))
    return ValueError(
        f"tape must be of this recorder's step, which leaves in each slot ({wanted}), but was "
        f"recorded by another step: it holds ({came}). {_KEEP_CARRY} {_NUMBERS}"
    )


def other_step() -> ValueError:
    """The error for a ring that a step with other equations has filled."""
    return ValueError(
        "tape must be of this recorder's step, but was recorded by a step that computes something "
        f"else from the same shapes. {_KEEP_CARRY} {_NUMBERS}"
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
    lengths = {path: leaf.shape[:1] for path, leaf in _by_path(ct_ys).items()}
    if len(set(lengths.values())) > 1:
        rows = [f"ct_ys{path}: {n[0] if n else 'no axis'}" for path, n in lengths.items()]
        raise ValueError(
            "ct_ys must have the same first axis, over time steps, in all leaves, but got "
            f"lengths\n{bullets(rows)}\nStack the cotangents of the steps, oldest first."
        )
    length = next(iter(lengths.values()), (1,))
    if not length or not 1 <= length[0] <= window:
        came = f"length {length[0]}" if length else "a scalar"
        raise ValueError(
            f"ct_ys must have a first axis over 1 to window={window} steps, oldest first, but got "
            f"{came}. Of one step: ct[None]; of more steps than the window holds: pull back "
            "earlier, or record with a longer window."
        )
    return length[0]


def has_steps(xs: TreeType) -> None:
    """Refuses an `xs` with a leaf that has no axis over time steps."""
    for path, leaf in _by_path(xs).items():
        if not leaf.shape:
            raise ValueError(
                "xs must have a first axis over time steps in every leaf, but got "
                f"xs{path}: {leaf}. Let f close over what is the same at all steps."
            )


def _by_path(kind: TreeType) -> dict[str, LeafType]:
    return {keystr(path): leaf for path, leaf in tree_flatten_with_path(kind.tree())[0]}


def _type_at(leaves: dict[str, LeafType], path: str) -> str:
    return str(leaves[path]) if path in leaves else "nothing"


def bullets(rows: list[str]) -> str:
    """A list of rows, the first few of many."""
    shown = [f"  * {row}" for row in rows[:_SHOWN]]
    if len(rows) > _SHOWN:
        shown.append(f"  * and {len(rows) - _SHOWN} more")
    return "\n".join(shown)


def describe(value: Any) -> str:
    """What a value is, for a message: `got` so and so."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        noun = "a ShapeDtypeStruct" if isinstance(value, jax.ShapeDtypeStruct) else "an array"
        return f"{noun} {leaf_type(value)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of length {len(value)}"
    if isinstance(value, str | int | float | bool) or value is None:
        return repr(value)
    return f"a {type(value).__name__}"
