"""Whether a program is linear in some of its inputs, as a pullback should be in its cotangents.

JAX's own pullbacks are. A `custom_vjp` rule of the user's need not be: clip(a + b) is not
clip(a) + clip(b). What is not known to be linear here counts as not linear, which costs time and
no exactness.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from jaxbptt._compat import scan_counts
from jaxbptt._jaxprs.evaluate import program_called
from jaxbptt._jaxprs.primitives import BILINEAR, CALLS, CALLS_WITH_RULES, IN_ALL, JOINT, LINEAR

# Inside of these too: they are only read here, and not rewritten.
_CALLS = CALLS | CALLS_WITH_RULES

# What a value is: independent of the inputs in question, zero, or linear in them.
FIXED, ZERO, MOVES = "fixed", "zero", "linear"
_Kinds = list[str]


class _NotLinearError(Exception):
    pass


def is_linear(closed: core.ClosedJaxpr, fixed: int) -> bool:
    """Whether all outputs are linear in the inputs from `fixed` on, taken together."""
    kinds = [FIXED] * fixed + [MOVES] * (len(closed.jaxpr.invars) - fixed)
    try:
        return FIXED not in _outputs(closed.jaxpr, kinds)
    except _NotLinearError:
        return False


def _outputs(jaxpr: core.Jaxpr, kinds: Sequence[str]) -> _Kinds:
    """What the outputs are, if the inputs are of these kinds.

    Raises:
        _NotLinearError: a value depends on what moves, and is not known to do so linearly.
    """
    env: dict[Any, str] = dict.fromkeys(jaxpr.constvars, FIXED)
    env.update(zip(jaxpr.invars, kinds, strict=True))

    def kind_of(atom: Any) -> str:
        if isinstance(atom, core.Literal):
            return FIXED if jnp.ndim(atom.val) or atom.val else ZERO
        return env[atom]

    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, _rule(eqn, [kind_of(v) for v in eqn.invars]), strict=True))
    return [kind_of(v) for v in jaxpr.outvars]


def _rule(eqn: core.JaxprEqn, kinds: _Kinds) -> _Kinds:
    """The kinds of an equation's outputs."""
    name, count = eqn.primitive.name, len(eqn.outvars)
    if MOVES not in kinds:
        return _still(eqn, kinds)
    if name in _CALLS:
        return _outputs(*_inner(eqn, kinds))
    if name == "scan":
        return _scan(eqn, kinds)
    # Which branch runs may not depend on what moves.
    if name == "cond" and kinds[0] == FIXED:
        branches = [_outputs(b.jaxpr, kinds[1:]) for b in eqn.params["branches"]]
        return [_joined(list(each)) for each in zip(*branches, strict=True)]
    if not _is_rounding(eqn) and not fills(eqn) and _is_known(name, kinds, count):
        return [MOVES] * count
    raise _NotLinearError


def _still(eqn: core.JaxprEqn, kinds: _Kinds) -> _Kinds:
    """The same where nothing moves: what is made of zeros alone, as sums begin, stays zero."""
    name, count = eqn.primitive.name, len(eqn.outvars)
    if ZERO not in kinds:
        return [FIXED] * count
    if name in _CALLS or name == "scan":
        try:
            return _scan(eqn, kinds) if name == "scan" else _outputs(*_inner(eqn, kinds))
        except _NotLinearError:
            return [FIXED] * count
    # What is linear in something makes zero of zero.
    as_moving = [MOVES if kind == ZERO else kind for kind in kinds]
    is_zero = name in BILINEAR or (not fills(eqn) and _is_known(name, as_moving, count))
    return [ZERO if is_zero else FIXED] * count


def _is_known(name: str, kinds: _Kinds, outs: int) -> bool:
    """Whether a primitive is linear, without a constant beside, in what moves."""
    # Affine is not linear: a constant beside what moves would be added once for each term.
    moving = kinds.count(MOVES)
    if name in BILINEAR:
        return moving == 1
    if name in ("ragged_dot", "ragged_dot_general"):
        return moving == kinds[:2].count(MOVES) == 1
    if name in IN_ALL:
        return FIXED not in kinds
    if name in JOINT:
        together = kinds[: JOINT[name]]
        return FIXED not in together and moving == together.count(MOVES)
    if name == "select_n":
        return FIXED not in kinds[1:]  # what moves is inexact, and so never the choice itself
    if name in ("scatter", "scatter-add"):
        return FIXED not in (kinds[0], kinds[2])
    if name == "custom_linear_solve":  # in its right-hand sides, which come last
        return MOVES not in kinds[:-outs] and FIXED not in kinds[-outs:]
    if name == "triangular_solve":
        return kinds == [FIXED, MOVES]
    first_alone = name in LINEAR or name in ("unstack", "scatter-mul")
    return first_alone and kinds[0] == MOVES and moving == 1


def _is_rounding(eqn: core.JaxprEqn) -> bool:
    """Whether it rounds to so few digits that a sum of what was rounded is another number."""
    if eqn.primitive.name == "reduce_precision":
        return True
    if eqn.primitive.name != "convert_element_type":
        return False
    dtype: Any = eqn.outvars[0].aval.dtype  # type: ignore[attr-defined]
    return not jnp.issubdtype(dtype, jnp.inexact) or jnp.finfo(dtype).bits < 16


def fills(eqn: core.JaxprEqn) -> bool:
    """Whether a gather puts a number in the place of what is out of bounds: 0 and NaN add up."""
    number = eqn.params.get("fill_value") if eqn.primitive.name == "gather" else None
    return number is not None and bool(number == number) and bool(number != 0)


def _joined(kinds: _Kinds) -> str:
    """The kind of what is one or the other of several."""
    if MOVES in kinds and FIXED in kinds:
        raise _NotLinearError
    return MOVES if MOVES in kinds else FIXED if FIXED in kinds else ZERO


def _scan(eqn: core.JaxprEqn, kinds: _Kinds) -> _Kinds:
    """A loop: what the carry is when it enters is joined with what it is when it comes out."""
    consts, carries = scan_counts(eqn)
    carry, xs = kinds[consts : consts + carries], kinds[consts + carries :]
    while True:
        outs = _outputs(eqn.params["jaxpr"].jaxpr, [*kinds[:consts], *carry, *xs])
        # A carry that begins at zero and comes out as moving moves from then on: to a fixpoint,
        # which is found after as many rounds as there are leaves at most.
        joined = [_joined([a, b]) for a, b in zip(carry, outs, strict=False)]
        if joined == carry:
            return [*carry, *outs[carries:]]
        carry = joined


def _inner(eqn: core.JaxprEqn, kinds: _Kinds) -> tuple[core.Jaxpr, _Kinds]:
    """The jaxpr that a call runs, and the kinds of its inputs."""
    inner = program_called(eqn)
    if inner is None:
        raise _NotLinearError
    return inner.jaxpr, kinds
