"""The pullback of a step as flat programs: whole, without ȳ, and without λ of parts that are over.

What is zero is not computed with: it is taken out of the program when that is made.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core

from jaxbptt._arrays import struct_like
from jaxbptt._closure.residuals import Residuals
from jaxbptt._jaxprs.evaluate import ZERO, Value, drop, in_one_piece, prune
from jaxbptt._jaxprs.zeros import remaining

# More than elementwise work.
_HEAVY = ("dot_general", "conv_general_dilated", "scan", "while", "cond", "scatter-add")


@dataclasses.dataclass(frozen=True)
class Pull:
    """A program from recorded and fixed residuals, λ and ȳ to the cotangents of all inputs.

    Attributes:
        closed: the program. λ of the parts that are over are inputs that it does not read.
        zero: outputs that are zero, and that the program does not have.
        over: the leaves of the carry whose window is over.
    """

    closed: core.ClosedJaxpr
    zero: tuple[bool, ...]
    over: tuple[bool, ...]


def name_of(with_y: bool, over: int) -> str:
    """The name of a program: with ȳ or without, with this many distinct windows over."""
    return ("pull" if with_y else "pull_carry") + (f"_{over}" if over else "")


def trace_pulls(
    pull: core.ClosedJaxpr, residuals: Residuals, n_carry: int, parts: Sequence[int]
) -> dict[str, Pull]:
    """The programs by name.

    Args:
        pull: the closure applied to all residuals, λ and ȳ.
        residuals: what there is of the residuals.
        n_carry: how many leaves λ has.
        parts: the window of each of them, or nothing where they have one.
    """
    n, pull = len(residuals.avals), in_one_piece(pull)
    cts = [struct_like(v.aval) for v in pull.jaxpr.invars[residuals.count :]]

    def program(with_y: bool, over: Sequence[bool]) -> Pull:
        zero: list[bool] = []

        def run(*args: Any) -> list[Value]:
            lam = [ZERO if o else v for o, v in zip(over, args[n : n + n_carry], strict=True)]
            ct_y = args[n + n_carry :] if with_y else [ZERO] * (len(cts) - n_carry)
            values = [*residuals.every(args[:n]), *lam, *ct_y]
            outs = remaining(pull, values)
            zero[:] = [v is ZERO for v in outs]
            return drop(outs, outs)

        given = [*residuals.avals, *(cts if with_y else cts[:n_carry])]
        closed = prune(jax.make_jaxpr(run)(*given), effects=True)
        return Pull(closed, tuple(zero), tuple(over))

    ends = [0, *sorted(set(parts))[:-1]]
    over = [[w <= end for w in parts] or [False] * n_carry for end in ends]
    return {
        name_of(with_y, i): program(with_y, over[i])
        for i in range(len(ends))
        for with_y in (True, False)
    }


def heavy(jaxpr: core.Jaxpr) -> collections.Counter:
    """How often a jaxpr calls for more than elementwise work."""
    return collections.Counter(e.primitive.name for e in jaxpr.eqns if e.primitive.name in _HEAVY)
