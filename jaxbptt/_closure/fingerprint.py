"""A step's fingerprint: equal wherever the same JAX makes the same programs of it.

The programs are walked and not printed. The printed form of a jaxpr has the names of jitted
functions in it, but not the arrays that inner programs close over; sets in it are ordered anew in
each process; and it leaves no way to drop an equation, as `program_hash` does.
"""

import hashlib
import itertools
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxbptt._closure.closure import Closure
from jaxbptt._closure.constants import value_hash
from jaxbptt._jaxprs.evaluate import needed, variables
from jaxbptt._jaxprs.primitives import RETYPES
from jaxbptt._types import leaf_type

Part: TypeAlias = str | bytes  # of what is hashed

# Names and lines of source, which change nothing that is computed.
_LABELS = frozenset({"name", "debug_info", "name_and_src_info"})
_PLACES = re.compile(r" at [^\s,)>]+")  # addresses in memory and lines of files, in a repr

# What a program's hash also ignores, because the same step traced under another transformation,
# on another mesh or at another time may have other: operations that only change a value's type
# beside its dtype, or its layout; parameters that describe these; and the precision of products,
# which `jax.default_matmul_precision` sets at the moment of tracing.
_LAYOUT = frozenset({"weak_type", "sharding", "out_sharding"})
_PRECISION = frozenset({"precision", "preferred_element_type"})
_PLAIN = bool | int | float | complex | str | bytes


def fingerprint(closure: Closure) -> str:
    """Hashes what a step computes, what it leaves on the tape, and how it is pulled back.

    It hashes the programs after the rules of `custom_vjp` and the policies of `jax.checkpoint`
    are applied, so it depends on these. The values of the arrays that the step closes over
    count, as do the numbers in its source. Names, lines of source, shardings and addresses in
    memory do not count.

    Checkpoints hold the fingerprint: another way to make it would refuse all older tapes.

    Args:
        closure: the step, traced from types.

    Returns:
        64 hexadecimal digits.

    Cost:
        Python's time to walk all equations, at a checkpoint's first save: about 0.2 s for 10,000.
    """
    return _hexdigest(_closure_parts(closure))


def program_hash(closure: Closure, *, residuals: bool, arrays: bool) -> str:
    """Hashes what a step computes, to tell a tape of another step.

    It is made at each trace, of the forward program alone. The step may be traced under other
    transformations than when the tape was made. So conversions to the dtype that a value
    already has, mesh axes and shardings do not count; nor do the values of closed-over arrays,
    which are parameters. A number in the step's source counts.

    Args:
        closure: the traced step.
        residuals: whether what it leaves on the ring counts. Under `jax.checkpoint`, or with
            another derivative rule, that may be other values of the same types.
        arrays: whether the values count of the arrays that functions with a derivative rule of
            their own close over: such are no parameters, and not on the ring.

    Returns:
        16 hexadecimal digits.
    """
    forward = closure.forward.jaxpr
    outs = forward.outvars[: len(closure.layout.outputs.leaves)]  # residuals come after them
    if residuals:
        outs = [*outs, *(forward.outvars[i] for i in closure.layout.recorded)]
    eqns = needed(forward.eqns, variables(outs))
    parts = _program_parts(forward.replace(eqns=eqns, outvars=outs), loose=True)
    inside = [*closure.forward.consts, *closure.linear_consts] if arrays else []
    return _hexdigest([*parts, *(str(value_hash(v)) for v in inside)])[:16]


def _hexdigest(parts: Iterable[Part]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
        # So that "ab", "c" and "a", "bc" are told apart.
        digest.update(b"\n")
    return digest.hexdigest()


def _closure_parts(closure: Closure) -> Iterator[Part]:
    yield f"slot {closure.layout.recorded} {closure.layout.invariant}"
    yield from _value_parts(closure.closed_over)
    pullbacks = closure.pullback().program, closure.pullback(y=False).program
    for program in (closure.forward, closure.derive, *pullbacks):
        yield from _program_parts(program.jaxpr)
        yield from _value_parts(program.consts)


def _program_parts(jaxpr: core.Jaxpr, *, loose: bool = False) -> Iterator[Part]:
    """Walks a jaxpr; with `loose` it leaves out what `program_hash` ignores."""
    # Variables have no names of their own: they are numbered in the order in which they come.
    numbers: dict[Any, int] = {}
    next_number = itertools.count()
    same: dict[Any, Any] = {}  # what a variable is another type of
    ignored = _LABELS | _LAYOUT | _PRECISION if loose else _LABELS

    def atom_parts(atoms: Iterable) -> Iterator[Part]:
        for atom in (same.get(v, v) if _is_var(v) else v for v in atoms):
            if isinstance(atom, core.Literal):
                # The same number may be one of Python's in one trace and an array in another.
                aval: Any = atom.aval
                yield from _value_parts(np.asarray(atom.val, aval.dtype) if loose else atom.val)
            else:
                if atom not in numbers:
                    numbers[atom] = next(next_number)
                yield f"%{numbers[atom]}"
            bare = loose and hasattr(atom.aval, "shape")
            yield f"{atom.aval.dtype}{atom.aval.shape}" if bare else _type_text(atom.aval)

    # In a fixed order: inputs, equations, outputs. Each variable's type goes with its number.
    yield from atom_parts([*jaxpr.constvars, *jaxpr.invars])
    for eqn in jaxpr.eqns:
        if loose and _only_retypes(eqn):
            # The result stands for its operand, as if the equation were not there.
            operand: Any = eqn.invars[0]
            same[eqn.outvars[0]] = same.get(operand, operand) if _is_var(operand) else operand
            continue
        yield eqn.primitive.name
        yield from atom_parts(eqn.invars)
        for key, value in sorted(eqn.params.items()):
            if key not in ignored:
                yield key
                yield from _value_parts(value, loose)
        yield from atom_parts(eqn.outvars)
    yield "returns"
    yield from atom_parts(jaxpr.outvars)


def _is_var(atom: Any) -> bool:
    return isinstance(atom, core.Var)


def _only_retypes(eqn: core.JaxprEqn) -> bool:
    """Whether an equation returns its operand with the dtype that it has already."""
    if eqn.primitive.name not in RETYPES:
        return False
    operand: Any = eqn.invars[0]
    result: Any = eqn.outvars[0]
    return len(eqn.invars) == 1 and operand.aval.dtype == result.aval.dtype


def _type_text(aval: Any) -> str:
    if not hasattr(aval, "shape"):  # a token, or a reference
        return _repr_without_places(aval)
    return f"{leaf_type(aval)} {getattr(aval, 'weak_type', False)}"


def _value_parts(value: Any, loose: bool = False) -> Iterator[Part]:
    """Walks a parameter of an equation, or a constant."""
    if isinstance(value, core.ClosedJaxpr):
        yield from _program_parts(value.jaxpr, loose=loose)
        yield from _value_parts(value.consts, loose)
    elif isinstance(value, core.Jaxpr):
        yield from _program_parts(value, loose=loose)
    elif isinstance(value, jax.Array | np.ndarray | np.generic):
        yield from _array_parts(value)
    elif isinstance(value, Mapping):
        yield from _value_parts(sorted(value.items()), loose)
    elif isinstance(value, tuple | list):
        yield f"{type(value).__name__} of {len(value)}"
        for item in value:
            yield from _value_parts(item, loose)
    elif isinstance(value, set | frozenset):
        # The order of a set is another in each process.
        yield from sorted(map(_repr_without_places, value))
    # Where an array lies changes nothing that is computed.
    elif not isinstance(value, jax.sharding.Sharding):
        yield _repr_without_places(value)
        if loose:
            yield from _function_parts(value)


def _function_parts(value: Any) -> Iterator[Part]:
    """What tells a Python function of a callback from another: names, numbers and words in it."""
    # JAX wraps it, in an object whose attributes have been in either place.
    names = [*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())]
    inside = [getattr(value, name, None) for name in names]
    for function in (v for v in (value, *inside) if isinstance(v, types.FunctionType)):
        code, cells = function.__code__, function.__closure__ or ()
        plain = (v for v in (*code.co_consts, *map(_content, cells)) if isinstance(v, _PLAIN))
        yield repr((code.co_names, *plain))


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing is in it yet
        return None


def _array_parts(array: Any) -> Iterator[Part]:
    """The type and all bytes of an array; its repr would leave out the middle of a long one."""
    yield str(leaf_type(array))
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    yield np.asarray(array).tobytes()


def _repr_without_places(value: Any) -> str:
    return _PLACES.sub("", repr(value))
