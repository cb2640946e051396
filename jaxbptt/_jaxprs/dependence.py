"""Which outputs of a program have a derivative with respect to some of its inputs.

JAX finds the same by symbolic zeros when it differentiates. This runs before that, and may say of
too many outputs that they have one, never of too few.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from jaxbptt._compat import scan_counts
from jaxbptt._jaxprs.evaluate import has_references
from jaxbptt._jaxprs.primitives import CALLS, FLAT

Mask = list[bool]


def reached(jaxpr: core.Jaxpr, perturbed: Sequence[bool]) -> Mask:
    """Which outputs a derivative with respect to the perturbed inputs reaches."""
    flags: dict[Any, bool] = dict(zip(jaxpr.invars, perturbed, strict=True))

    def of(atoms: Sequence[Any]) -> Mask:
        return [not isinstance(v, core.Literal) and flags.get(v, False) for v in atoms]

    if any(perturbed) and has_references(jaxpr):
        return [is_inexact(v) for v in jaxpr.outvars]  # what a reference holds is not seen here
    for eqn in jaxpr.eqns:
        outs = _reached_by(eqn, of(eqn.invars))
        for v, out in zip(eqn.outvars, outs, strict=True):
            flags[v] = out and is_inexact(v)
    return of(jaxpr.outvars)


def is_inexact(atom: Any) -> bool:
    """Whether gradients can flow through a variable at all."""
    dtype: Any = getattr(atom.aval, "dtype", None)  # a reference has none
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def with_carry(jaxpr: core.Jaxpr, perturbed: Sequence[bool], carry: slice) -> Mask:
    """The perturbed inputs of a loop's body, whose first outputs are its next carry."""
    flags = list(perturbed)
    while True:
        # A leaf of the carry that comes out perturbed enters the next iteration so. Each round
        # perturbs one leaf more, or is the last.
        outs = reached(jaxpr, flags)[: carry.stop - carry.start]
        joined = [a or b for a, b in zip(flags[carry], outs, strict=True)]
        if joined == flags[carry]:
            return flags
        flags[carry] = joined


def _reached_by(eqn: core.JaxprEqn, perturbed: Mask) -> Mask:
    """The same for one equation."""
    name, params = eqn.primitive.name, eqn.params
    if name in FLAT or not any(perturbed):
        return [False] * len(eqn.outvars)
    if name in CALLS:
        inner: Any = params.get("jaxpr", params.get("call_jaxpr"))
        return reached(getattr(inner, "jaxpr", inner), perturbed)
    if name == "scan":
        consts, carries = scan_counts(eqn)
        body = params["jaxpr"].jaxpr
        return reached(body, with_carry(body, perturbed, slice(consts, consts + carries)))
    if name == "while":
        # The condition gives a boolean, which has no derivative.
        of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
        body, flags = params["body_jaxpr"].jaxpr, perturbed[of_cond:]
        return with_carry(body, flags, slice(of_body, len(flags)))[of_body:]
    if name == "cond":
        each = [reached(branch.jaxpr, perturbed[1:]) for branch in params["branches"]]
        return [any(flags) for flags in zip(*each, strict=True)]
    return [True] * len(eqn.outvars)
