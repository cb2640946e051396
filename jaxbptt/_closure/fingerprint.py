"""A step's fingerprint: equal wherever the same JAX makes the same programs of it."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxbptt._closure.closure import Closure
from jaxbptt._jaxprs.evaluate import needed, variables
from jaxbptt._types import leaf_type

# What only says of which type, or where, an array is, where its dtype stays the same.
_RETYPES = frozenset("convert_element_type copy pcast pvary reshard sharding_constraint".split())
_WHERE = frozenset({"weak_type", "sharding", "out_sharding"})
# How exactly products are computed is a setting of the moment, as `jax.default_matmul_precision`.
_EXACTNESS = frozenset({"precision", "preferred_element_type"})

# What a label says changes nothing that is computed.
_LABELS = frozenset({"name", "debug_info", "name_and_src_info"})
_PLACES = re.compile(r" at [^\s,)>]+")  # memory addresses, and lines of files


def fingerprint(closure: Closure) -> str:
    """A hash of what a step does and leaves on the tape, and of how it is pulled back.

    It is made of the programs themselves, with the rules of `custom_vjp` and the policies
    of `jax.checkpoint` applied: what these change, it sees. The values of the arrays that
    the step closes over count as the numbers in its source do. Names, lines of
    source, shardings and where things lie in memory do not count.

    Args:
        closure: the step, traced from types.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for piece in _pieces(closure):
        digest.update(piece if isinstance(piece, bytes) else piece.encode())
        digest.update(b"\n")
    return digest.hexdigest()


def program_hash(closure: Closure) -> str:
    """A hash of what a step computes: different for a tape of another step.

    Made at each trace, of the forward program alone. The step may be traced under other
    transformations than when the tape was made, so that conversions to the dtype that a value
    has, mesh axes and shardings do not count, nor do the values of closed-over arrays: these are
    parameters. A number in the step's source counts.

    Args:
        closure: the traced step.

    Returns:
        16 hexadecimal digits.
    """
    forward = closure.forward.jaxpr
    outs = forward.outvars[
        : len(closure.layout.outputs.leaves)
    ]  # without the residuals behind them
    eqns = needed(forward.eqns, variables(outs))
    digest = hashlib.sha256()
    for piece in _program(forward.replace(eqns=eqns, outvars=outs), loosely=True):
        digest.update(piece if isinstance(piece, bytes) else piece.encode())
        digest.update(b"\n")
    return digest.hexdigest()[:16]


def _pieces(closure: Closure) -> Iterator[str | bytes]:
    yield f"slot {closure.layout.recorded} {closure.layout.invariant}"
    yield from _value(closure.closed_over)
    pullbacks = closure.pullback().program, closure.pullback(y=False).program
    for program in (closure.forward, closure.derive, *pullbacks):
        yield from _program(program.jaxpr)
        yield from _value(program.consts)


def _program(jaxpr: core.Jaxpr, *, loosely: bool = False) -> Iterator[str | bytes]:
    """A jaxpr, its variables numbered in the order in which they come; loosely: `program_hash`."""
    names: dict[Any, int] = {}
    numbers = itertools.count()
    ignored = _LABELS | _WHERE | _EXACTNESS if loosely else _LABELS

    def atoms(values: Iterable) -> Iterator[str | bytes]:
        for v in values:
            if isinstance(v, core.Literal):
                yield from _value(v.val)
            else:
                if v not in names:
                    names[v] = next(numbers)
                yield f"%{names[v]}"
            bare = loosely and hasattr(v.aval, "shape")
            yield f"{v.aval.dtype}{v.aval.shape}" if bare else _type(v.aval)

    yield from atoms([*jaxpr.constvars, *jaxpr.invars])
    for eqn in jaxpr.eqns:
        if loosely and _retypes(eqn):
            names[eqn.outvars[0]] = names[eqn.invars[0]]
            continue
        yield eqn.primitive.name
        yield from atoms(eqn.invars)
        for key, value in sorted(eqn.params.items()):
            if key not in ignored:
                yield key
                yield from _value(value, loosely)
        yield from atoms(eqn.outvars)
    yield "returns"
    yield from atoms(jaxpr.outvars)


def _retypes(eqn: core.JaxprEqn) -> bool:
    """Whether an equation hands its operand on with the dtype that it has."""
    if eqn.primitive.name not in _RETYPES or isinstance(eqn.invars[0], core.Literal):
        return False
    operand: Any = eqn.invars[0]
    result: Any = eqn.outvars[0]
    return len(eqn.invars) == 1 and operand.aval.dtype == result.aval.dtype


def _type(aval: Any) -> str:
    if not hasattr(aval, "shape"):
        return _without_places(aval)
    return f"{leaf_type(aval)} {getattr(aval, 'weak_type', False)}"


def _value(value: Any, loosely: bool = False) -> Iterator[str | bytes]:
    """A parameter of an equation, or a constant."""
    if isinstance(value, core.ClosedJaxpr):
        yield from _program(value.jaxpr, loosely=loosely)
        yield from _value(value.consts, loosely)
    elif isinstance(value, core.Jaxpr):
        yield from _program(value, loosely=loosely)
    elif isinstance(value, jax.Array | np.ndarray | np.generic):
        yield from _array(value)
    elif isinstance(value, Mapping):
        yield from _value(sorted(value.items()), loosely)
    elif isinstance(value, tuple | list):
        yield f"{type(value).__name__} of {len(value)}"
        for each in value:
            yield from _value(each, loosely)
    elif isinstance(value, set | frozenset):
        yield from sorted(map(_without_places, value))
    elif not isinstance(value, jax.sharding.Sharding):
        yield _without_places(value)


def _array(value: Any) -> Iterator[str | bytes]:
    yield str(leaf_type(value))
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    yield np.asarray(value).tobytes()


def _without_places(value: Any) -> str:
    return _PLACES.sub("", repr(value))
