"""What remains of a jaxpr when some of its inputs are zero.

A zero stays symbolic through linear primitives, so that nothing is computed with it. JAX's
own pullbacks also begin arrays as zeros, to add to (of a gather, of the branch that a select
does not take). Those are _BLANK: as good as ZERO beside a ZERO, and an array elsewhere, where
zero times infinity has to be what it would have been.
"""

from collections.abc import Sequence
from typing import Any

from jax.extend import core

from jaxbptt._arrays import zeros
from jaxbptt._jaxprs.evaluate import ZERO, Marker, Value, bind, interpret
from jaxbptt._jaxprs.linearity import BILINEAR, JOINT, LINEAR
from jaxbptt._types import leaf_type

_BLANK = Marker("BLANK")

# What leaves an array that begins as zeros as it was.
_MOVED = frozenset({"broadcast_in_dim", "pvary", "reshape", "transpose"})


def remaining(closed: core.ClosedJaxpr, values: Sequence[Value]) -> list[Value]:
    """The outputs of a linear program of which some inputs are ZERO: arrays, or ZERO."""
    outs = interpret(closed.jaxpr, closed.consts, values, _zero_rule)
    atoms = closed.jaxpr.outvars
    return [zeros(a.aval) if v is _BLANK else v for v, a in zip(outs, atoms, strict=True)]


def _zero_rule(eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    name, zero = eqn.primitive.name, [v is ZERO for v in values]
    if _begins_as_zeros(eqn) or (name in _MOVED and values[0] is _BLANK):
        return [_BLANK]
    if not any(zero):
        return bind(eqn, _dense(values, eqn.invars))
    if name in ("add", "add_any"):
        return [values[1] if zero[0] else values[0]]
    blank = [isinstance(v, Marker) or is_0(a) for v, a in zip(values, eqn.invars, strict=True)]
    if name == "scatter-add" and zero[2] and not blank[0]:
        return [values[0]]
    if (
        (name in LINEAR and zero[0])
        or name in BILINEAR
        or (name in JOINT and all(blank[: JOINT[name]]))
        or (name == "select_n" and all(blank[1:]))
        or (name in ("scatter", "scatter-add") and blank[0] and blank[2])
    ):
        return [ZERO] * len(eqn.outvars)
    return bind(eqn, _dense(values, eqn.invars))


def _dense(values: Sequence[Value], atoms: Sequence) -> list:
    return [
        zeros(a.aval) if isinstance(v, Marker) else v for v, a in zip(values, atoms, strict=True)
    ]


def _begins_as_zeros(eqn: core.JaxprEqn) -> bool:
    if eqn.primitive.name != "broadcast_in_dim":
        return False
    return is_0(eqn.invars[0]) and leaf_type(eqn.outvars[0].aval).differentiable


def is_0(atom: Any) -> bool:
    """Whether it is a zero written in the program."""
    return isinstance(atom, core.Literal) and not atom.val
