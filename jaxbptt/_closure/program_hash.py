"""A step's hash, the same wherever the step is traced: to tell a tape of another step.

The same step traced on a mesh, under `shard_map` or by another transformation has its equations in
another order, more that only change a type, and repeats that were merged elsewhere. So values are
hashed and not a list of equations: each by what it is made of, as in value numbering (Alpern,
Wegman & Zadeck, "Detecting equality of variables in programs", POPL 1988).
"""

import hashlib
import types
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from jax.extend import core

from jaxbptt._closure.closure import Closure
from jaxbptt._closure.constants import value_hash
from jaxbptt._closure.fingerprint import LABELS, value_parts
from jaxbptt._compat import scan_counts
from jaxbptt._jaxprs.evaluate import has_references, needed, program_called, variables
from jaxbptt._jaxprs.primitives import CALLS, CALLS_WITH_RULES, RETYPES
from jaxbptt._types import is_reference

Key: TypeAlias = bytes  # of a value: equal for two that are made in the same way

# What else is no part of a value: its layout, how exactly products are computed, which
# `jax.default_matmul_precision` sets at the moment of tracing, and how many of a loop's inputs are
# the same in all iterations, among which a trace may put a number that another leaves inside.
_IGNORED = LABELS | frozenset(
    "weak_type sharding out_sharding precision preferred_element_type "
    "num_consts linear cond_nconsts body_nconsts".split()
)
_PLAIN = bool | int | float | complex | str | bytes


def program_hash(closure: Closure, *, residuals: bool, arrays: bool) -> str:
    """Hashes what a step computes.

    It is made at each trace, of the forward program alone. The step may be traced under other
    transformations than when the tape was made. So the order of equations, conversions to the dtype
    that a value already has, mesh axes and shardings do not count; nor do the values of closed-over
    arrays, which are parameters, or compared by themselves. A number in the step's source counts.

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
    eqns = needed(forward.eqns, variables(outs), effects=has_references(forward))
    values = _outputs(forward.replace(eqns=eqns, outvars=outs), _inputs(forward), ())
    inside = [*closure.forward.consts, *closure.linear_consts] if arrays else []
    hashes = sorted({str(value_hash(v)) for v in inside})
    return _key(*values, *hashes).hex()[:16]


def _key(*parts: str | bytes) -> Key:
    digest = hashlib.sha256()
    for part in parts:
        part = part if isinstance(part, bytes) else part.encode()
        # So that "ab", "c" and "a", "bc" are told apart.
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _inputs(jaxpr: core.Jaxpr) -> list[Key]:
    return [_key("input", str(i), _type(v.aval)) for i, v in enumerate(jaxpr.invars)]


def _outputs(jaxpr: core.Jaxpr, inputs: Sequence[Key], consts: Sequence[Any]) -> list[Key]:
    """The keys of a program's outputs, and of how it reads and writes its references, in order.

    Args:
        jaxpr: the program.
        inputs: the keys of its inputs.
        consts: the arrays that it closes over, where these are known.
    """
    env: dict[Any, Key] = dict(zip(jaxpr.invars, inputs, strict=True))
    for i, v in enumerate(jaxpr.constvars):
        env[v] = _key(*value_parts(consts[i])) if consts else _key("const", str(i))

    def key_of(atom: Any) -> Key:
        if not isinstance(atom, core.Literal):
            return env[atom]
        # The same number may be one of Python's in one trace and an array in another.
        aval: Any = atom.aval
        return _key(*value_parts(np.asarray(atom.val, aval.dtype)))

    uses = []
    for eqn in jaxpr.eqns:
        operands = list(map(key_of, eqn.invars))
        if _only_retypes(eqn):
            # The result stands for its operand, as if the equation were not there.
            env[eqn.outvars[0]] = operands[0]
            continue
        called = program_called(eqn) if eqn.primitive.name in CALLS | CALLS_WITH_RULES else None
        if called is not None:
            # A call makes what its program makes of the operands.
            outs = _outputs(called.jaxpr, operands, called.consts)
            env.update(zip(eqn.outvars, outs, strict=False))
            uses += outs[len(eqn.outvars) :]
            continue
        key = _key(eqn.primitive.name, *_parts(eqn, operands))
        for i, v in enumerate(eqn.outvars):
            env[v] = _key(key, str(i), _type(v.aval))
        if any(map(is_reference, eqn.invars)):
            uses.append(key)
    return [*map(key_of, jaxpr.outvars), *uses]


def _parts(eqn: core.JaxprEqn, operands: list[Key]) -> Iterator[str | bytes]:
    """What an equation's outputs are made of, beside its primitive."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        # What is the same in all iterations is known inside as what it is outside.
        consts, carries = scan_counts(eqn)
        rest = [
            _key("carry" if i < carries else "x", str(i)) for i in range(len(operands) - consts)
        ]
        body = params["jaxpr"]
        yield from _outputs(body.jaxpr, [*operands[:consts], *rest], body.consts)
        operands = operands[consts:]
    elif name == "cond":
        for branch in params["branches"]:
            yield "branch"
            yield from _outputs(branch.jaxpr, operands[1:], branch.consts)
        operands = operands[:1]
    elif name == "while":
        n, m = params["cond_nconsts"], params["body_nconsts"]
        carry = [_key("carry", str(i)) for i in range(len(operands) - n - m)]
        of_cond, of_body = operands[:n], operands[n : n + m]
        for label, first in (("cond_jaxpr", of_cond), ("body_jaxpr", of_body)):
            yield label
            yield from _outputs(params[label].jaxpr, [*first, *carry], params[label].consts)
        operands = operands[n + m :]
    yield "operands"
    yield from operands
    for label, value in sorted(params.items()):
        if label not in _IGNORED and not (name in ("scan", "cond", "while") and _is_program(value)):
            yield label
            yield from _param_parts(value)


def _is_program(value: Any) -> bool:
    first = value[0] if isinstance(value, tuple | list) and value else value
    return isinstance(first, core.ClosedJaxpr | core.Jaxpr)


def _param_parts(value: Any) -> Iterator[str | bytes]:
    """A parameter, the programs in it by what they make of their inputs."""
    if isinstance(value, core.ClosedJaxpr):
        yield from _outputs(value.jaxpr, _inputs(value.jaxpr), value.consts)
    elif isinstance(value, core.Jaxpr):
        yield from _outputs(value, _inputs(value), ())
    elif isinstance(value, tuple | list) and any(map(_is_program, value)):
        for item in value:
            yield from _param_parts(item)
    else:
        yield from value_parts(value)
        yield from _function_parts(value)


def _function_parts(value: Any) -> Iterator[str]:
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


def _only_retypes(eqn: core.JaxprEqn) -> bool:
    """Whether an equation returns its operand with the dtype and shape that it has already."""
    if eqn.primitive.name not in RETYPES | {"broadcast_in_dim"} or len(eqn.invars) != 1:
        return False
    operand: Any = eqn.invars[0].aval
    result: Any = eqn.outvars[0].aval
    return operand.dtype == result.dtype and operand.shape == result.shape


def _type(aval: Any) -> str:
    return f"{aval.dtype}{aval.shape}" if hasattr(aval, "shape") else type(aval).__name__
