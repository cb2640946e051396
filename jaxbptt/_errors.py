"""Builds every message: which argument, what was expected, what came, where, what to do."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from jaxbptt._types import LeafType, TreeType, is_reference, leaf_type

MOST_STEPS = 2**31 - 1
_SHOWN = 8  # differing leaves listed before "and n more"
_KEEP_CARRY = (
    "Make a tape with this recorder's init; the carry can be kept: rec.init(params, tape.carry, x)."
)
_NUMBERS = (
    "A number or NumPy scalar that the step closes over is part of it: one that changes, or that "
    "gradients are wanted of, has to be an array (jnp.asarray) before the tape is made."
)


# ------------------------------------------------------------ options


def positive_int(name: str, value: Any) -> None:
    """Refuses a `window`, `every` or `remat` that is not a Python int of at least 1."""
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


def countable(name: str, steps: int) -> None:
    """Refuses a window of more steps than a tape's counters, which are int32, can count."""
    if steps > MOST_STEPS:
        raise ValueError(
            f"{name} must be at most {MOST_STEPS} (a tape counts its steps in int32), but got "
            f"{steps}. A tape has a slot for each step of the window: take one that fits in memory."
        )


def is_remat(value: Any) -> None:
    """Refuses a `remat` that is neither None, nor a bool, nor a positive int."""
    if value is not None and not isinstance(value, bool):
        positive_int("remat", value)


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
        "forward pass is made inside of jax.sharding.auto_axes (JAX's x.at[i].get with an "
        "out_sharding is too), where an array has no sharding to be recorded with. Put auto_axes "
        "around the whole loop, or write the step with Explicit shardings (a table is looked up by "
        "a product with jax.nn.one_hot too); scan with window=None takes it as it is."
    )


def above_one(name: str, value: Any, what: str) -> None:
    """Refuses what is not a number above 1, known when the loop is traced."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} must be a Python number, but got the traced value {value}.")
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not value > 1:
        raise ValueError(f"{name} must be a number above 1 ({what}), but got {value!r}.")


def is_key(name: str, value: Any) -> None:
    """Refuses what `jax.random` doesn't draw from; keys under `vmap` to come are keys."""
    if hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return
    try:
        jax.eval_shape(jax.random.wrap_key_data, value)  # an array of the older form
    except (TypeError, ValueError) as cause:
        raise ValueError(
            f"{name} must be a key for jax.random, but got {describe(value)}. Make one with "
            "jax.random.key(seed), and split it for every update."
        ) from cause


def one_key(name: str, value: Any) -> None:
    """Refuses several keys where a random window, or a reach, is drawn."""
    typed = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    # An old-form key is itself an array of numbers.
    if len(value.shape) != (0 if typed else 1):
        raise ValueError(
            f"{name} must be drawn from one key for a run, but its key is "
            f"{describe(value)}. Take one of them, or vmap over the runs."
        )


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
    if not isinstance(value, str) or value not in allowed:
        choices = ", ".join(map(repr, allowed[:-1])) + f" or {allowed[-1]!r}"
        raise ValueError(f"{name} must be {choices}, but got {value!r}.")


def is_bool(name: str, value: Any) -> None:
    """Refuses what is neither true nor false, or both."""
    if not isinstance(value, bool | int | np.bool_):
        raise ValueError(f"{name} must be True or False, but got {describe(value)}.")


# ------------------------------------------------------------ what a step is and returns


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
    # With leaves that only one of the two has, a count of differing leaves would mislead.
    if wanted.keys() == came.keys() and differ:
        count = f"{len(rows)} of {len(wanted)} leaves differ{'s' if len(rows) == 1 else ''}"
    else:
        count = "the structure differs"
    raise error(f"{lead}, but {count}:\n{bullets(rows)}\n{remedy}")


def not_an_array(path: str, leaf: Any, *, returned: bool) -> Exception:
    """The error for a leaf that JAX can't make an array of."""
    if returned:
        remedy = "Leave out of it what is not an array."
        if is_reference(leaf):
            remedy = "Return its value, ref[...]."
        return TypeError(
            f"step must return arrays or numbers, but {path} is {describe(leaf)}. {remedy}"
        )
    remedy = "Let the step close over what is not an array."
    if is_reference(leaf):
        remedy = "Pass its value, ref[...], or make the reference inside the step with jax.new_ref."
    return ValueError(f"{path} must be an array or a number, but got {describe(leaf)}. {remedy}")


def too_large(path: str, leaf: int, kind: Any, *, returned: bool) -> Exception:
    """The error for an integer that has more bits than the dtype that JAX makes of it."""
    who = "step must return" if returned else f"{path} must be"
    where = f", but {path} is" if returned else ", but got"
    error = TypeError if returned else ValueError
    return error(
        f"{who} a number that {kind} can hold{where} {leaf}. Pass a float, or an array of a dtype "
        "that has room for it (64 bits need jax_enable_x64)."
    )


def cast(expected: TreeType, got: TreeType) -> str:
    """The end of a remedy: how to cast the first leaf of another dtype; empty if there is none.

    A number that began as an integer and comes out as one with a gradient may have begun wrong.
    """
    wanted, came = _by_path(expected), _by_path(got)
    for path in (path for path in wanted if path in came):
        kinds = [wanted[path].dtype, came[path].dtype]
        if kinds[0] != kinds[1] and not any(jnp.issubdtype(k, jax.dtypes.extended) for k in kinds):
            part = ".real" if _is_complex(kinds[1]) and not _is_complex(kinds[0]) else ""
            remedy = f", e.g. with h{part}.astype(jnp.{kinds[0]})"
            number = wanted[path].shape == () and jnp.issubdtype(kinds[0], jnp.integer)
            if number and jnp.issubdtype(kinds[1], jnp.inexact):
                remedy += f", or begin with a carry of dtype {kinds[1]}, such as 0.0 in place of 0"
            return remedy
    return ""


def _is_complex(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.complexfloating))


# ------------------------------------------------------------ tapes and recorders


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


def same_leaves_as_made(expected: dict[str, Any], got: dict[str, Any]) -> None:
    """Refuses a tape whose leaves are not of the types that the recorder gave them.

    Args:
        expected: the types by name; None where only that there is an array can be asked for.
        got: the types that came; None for what is no array.
    """
    rows = [
        f"tape.{name}: {kind or 'an array'} expected, {got[name] or 'no array'} got"
        for name, kind in expected.items()
        if got[name] is None or got[name] != kind
    ]
    if rows:
        differ = f"{len(rows)} of {len(expected)} leaves differ{'s' if len(rows) == 1 else ''}"
        raise ValueError(
            f"tape must have leaves of the types that it was made with, but {differ}:\n"
            f"{bullets(rows)}\nA tape is handed on as it is: what is computed with (a mean of "
            "two, a cast) are carries and parameters, through tape.replace(carry=...). One that "
            "vmap made is used under vmap."
        )


def ring_varies(axes: Sequence[str]) -> ValueError:
    """The error for a ring that came into a `shard_map` laid over axes that its values don't know.

    What a step makes of replicated parameters alone is the same on all devices, and JAX's types
    say so; of what came in by `in_specs` they don't.
    """
    over = ", ".join(map(repr, axes))
    return ValueError(
        f"tape must not vary over the mesh axes ({over}) where what the step leaves on it does "
        "not, but it came into the shard_map so: with weights='stored' a value of replicated "
        "parameters lies on its ring. Make the tape inside of the shard_map, or record with "
        "weights='current', which keeps no such values."
    )


def other_residuals(expected: Sequence[LeafType], got: Sequence[LeafType]) -> ValueError:
    """The error for a ring that another step, or another version of JAX, has laid out."""
    wanted, came = (", ".join(map(str, types)) or "nothing" for types in (expected, got))
    return ValueError(
        f"tape must be of this recorder's step, which leaves in each slot ({wanted}), but was "
        f"recorded by another step: it holds ({came}). {_KEEP_CARRY} {_NUMBERS}"
    )


def remat_of_symbolic(length: Any) -> ValueError:
    """The error for checkpoints of a run of which only a symbol says how long it is."""
    return ValueError(
        f"length must be known when the loop is traced with remat, but is the symbol {length}: how "
        "many checkpoints there are depends on it. Leave remat out, or export for a number of "
        "steps."
    )


def constant_changed(index: int, array: Any) -> ValueError:
    """The error for a constant that has other values than when the tape was made."""
    return ValueError(
        f"{_constant(index, array)}, so that the tape holds no copies of it, but is "
        f"{'traced' if isinstance(array, jax.core.Tracer) else 'an array of other values'} now. "
        "What changes from call to call belongs in params, or, if gradients should not flow to "
        'it, in x or in the carry; or use weights="current", which takes its values now for all '
        "steps on the tape."
    )


def constant_differentiated(index: int, array: Any) -> ValueError:
    """The error for a gradient by what was a constant when the tape was made."""
    return ValueError(
        f"{_constant(index, array)}, to which no gradient flows, but is differentiated by now. "
        "Make it part of params, or make the tape with init inside of the function that is "
        "differentiated."
    )


def _constant(index: int, array: Any) -> str:
    return (
        f"step closes over {leaf_type(array)} (number {index} of what it closes over), which was "
        "a constant when the tape was made"
    )


def other_step() -> ValueError:
    """The error for a ring that a step with other equations has filled."""
    return ValueError(
        "tape must be of this recorder's step, but was recorded by a step that computes something "
        f"else from the same shapes. {_KEEP_CARRY} {_NUMBERS}"
    )


# ------------------------------------------------------------ losses, reach and pace


def loss_not_scalar(got: TreeType, every: int) -> TypeError:
    """The error for reverse mode with every > 1 through a y that is not a scalar loss."""
    came = ", ".join(str(t) for t in got.leaves) or "nothing"
    return TypeError(
        f"step must return its scalar loss as y for a gradient inside the loop at every={every}, "
        f"but y is {came}. Return (carry, loss), or (carry, (loss, aux)) with has_aux=True; "
        "or keep the cotangents of y and call rec.pullback(params, tape, ct_ys)."
    )


def loss_not_scalar_with_pace(got: TreeType) -> TypeError:
    """The error for a call of a recorder with a pace whose y is not a scalar loss."""
    came = ", ".join(str(t) for t in got.leaves) or "nothing"
    return TypeError(
        "step must return its scalar loss as y for a recorder with a pace, since the loss's "
        f"cotangent starts within the call, but y is {came}. Return (carry, loss), or (carry, "
        "(loss, aux)) with has_aux=True; or use rec.advance(params, tape, x, loss)."
    )


def not_a_reach(value: Any) -> ValueError:
    """The error for a reach that is no number of lags."""
    return ValueError(
        f"reach must be an int, an integer scalar or a random_reach, but got {describe(value)}. "
        "It counts the lags that this call goes back, the newest step's among them."
    )


def traced_reach_again() -> ValueError:
    """The error for a derivative of a gradient whose reach is known only when it runs."""
    return ValueError(
        "reach must be a Python int where the gradient is differentiated again, but it is known "
        "only when the call runs, and a loop of so many lags has no reverse mode. Pass an int, or "
        "leave it out."
    )


def no_pace() -> ValueError:
    """The error for advance without a pace."""
    return ValueError(
        "recorder must have a pace for advance, but has none. Give it one, record(step, "
        "window=..., pace=...), or differentiate a call of the recorder."
    )


def has_pace(name: str) -> ValueError:
    """The error for what walks the whole window, of a recorder that doesn't."""
    return ValueError(
        f"recorder must have no pace for {name}, which walks the whole window, but has one: its "
        "cotangents are on their way already. Use rec.advance, or a recorder without a pace."
    )


def carry_with_pace() -> ValueError:
    """The error for a loss of the new tape's carry, of a recorder with a pace."""
    return ValueError(
        "loss must reach the step through its y for a recorder with a pace, but tape.carry has a "
        "cotangent, which comes after the call is over. Make it part of y, or use a recorder "
        "without a pace."
    )


def warn_of_parameters(stored: int, current: int) -> None:
    """Warns of a ring that is mostly copies of the parameters, from its bytes with and without."""
    if 2 * (stored - current) > stored:
        warnings.warn(
            f"the ring has {stored:,} bytes, of which {stored - current:,} are copies of the "
            "parameters and of what depends on them alone, one for each step of the window. "
            f"record(..., weights='current') keeps none of these and takes {current:,} bytes; it "
            "differentiates past steps at the current parameters.",
            stacklevel=4,
        )


# ------------------------------------------------------------ cotangents and inputs


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


# ------------------------------------------------------------ words


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
    if is_reference(value):
        return f"a mutable reference {leaf_type(value.aval.inner_aval)}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        noun = "a ShapeDtypeStruct" if isinstance(value, jax.ShapeDtypeStruct) else "an array"
        return f"{noun} {leaf_type(value)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of length {len(value)}"
    if isinstance(value, str | int | float | bool) or value is None:
        return repr(value)
    return f"a {type(value).__name__}"
