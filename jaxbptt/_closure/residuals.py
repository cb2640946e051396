"""Which residuals of a step are recorded, which are known without it, and which are recomputed.

`jax.vjp` keeps derivatives beside the values that they come from: for s = logistic(a) both
s and s (1 - s). Writing such a pair and reading it back costs more than the multiplication,
so what a few cheap elementwise operations make of other recorded values is left out, and
the pullback recomputes it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from jaxbptt._arrays import size_in_bytes, struct_like
from jaxbptt._jaxprs.evaluate import UNKNOWN, bind, drop, interpret, prune, variables
from jaxbptt._jaxprs.partial_eval import known_rule
from jaxbptt._jaxprs.primitives import CHEAP

_MOST = 6  # cheap equations at most that recompute one residual


@dataclasses.dataclass(frozen=True)
class Residuals:
    """The residuals of a step, sorted.

    Attributes:
        count: how many there are in all.
        recorded: outputs of the step's program that go on record.
        invariant: outputs that depend on known parameters alone.
        derive: the program from the parameters to the invariant ones.
        structs: types of the recorded and the invariant ones, to trace with.
        every: from the values of the recorded and the invariant ones to those of all residuals.
        remade_bytes: bytes of those that are recomputed.
    """

    count: int
    recorded: tuple[int, ...]
    invariant: tuple[int, ...]
    derive: core.ClosedJaxpr
    structs: list
    every: Callable[[Sequence], list]
    remade_bytes: int

    @classmethod
    def of(cls, forward: core.ClosedJaxpr, n_outs: int, known: Sequence[bool]) -> "Residuals":
        """Sorts the outputs of a program from `n_outs` on.

        Args:
            forward: the step with its residuals, without calls.
            n_outs: how many of its outputs are the step's own.
            known: of each parameter, whether it is known without the record of a step; they
                come first of its inputs.
        """
        outs, residuals = forward.jaxpr.outvars, forward.jaxpr.outvars[n_outs:]
        place: dict[int, int] = {}  # the same value may be a residual more than once
        for i, v in enumerate(residuals, n_outs):
            place.setdefault(id(v), i)
        derive, derived = _trace_derive(forward, known, list(place.values()))
        invariant = tuple(i for i, d in zip(place.values(), derived, strict=True) if d)
        others = [outs[i] for i, d in zip(place.values(), derived, strict=True) if not d]
        kept, eqns = _without_cheap(forward.jaxpr, others)
        recorded = tuple(place[id(v)] for v in kept)
        given = [outs[i] for i in (*recorded, *invariant)]

        def every(values: Sequence) -> list:
            env = {id(v): value for v, value in zip(given, values, strict=True)}
            for eqn in eqns:
                args = [v.val if isinstance(v, core.Literal) else env[id(v)] for v in eqn.invars]
                env[id(eqn.outvars[0])] = bind(eqn, args)[0]
            return [env[id(v)] for v in residuals]

        structs = [struct_like(v.aval) for v in given]
        remade = size_in_bytes(v.aval for v in others) - size_in_bytes(v.aval for v in kept)
        return cls(len(residuals), recorded, invariant, derive, structs, every, remade)


def _trace_derive(
    forward: core.ClosedJaxpr, known: Sequence[bool], positions: list[int]
) -> tuple[core.ClosedJaxpr, list[bool]]:
    """The program for the outputs at `positions` that known parameters give, and which they are."""
    inputs = forward.jaxpr.invars
    derived: list[bool] = []

    def derive(*weights: Any) -> list:
        args = [v if k else UNKNOWN for v, k in zip(weights, known, strict=True)]
        args += [UNKNOWN] * (len(inputs) - len(known))
        outs = interpret(forward.jaxpr, forward.consts, args, known_rule)
        values = [outs[i] for i in positions]
        derived[:] = [v is not UNKNOWN for v in values]
        return drop(values, values)

    closed = jax.make_jaxpr(derive)(*(struct_like(v.aval) for v in inputs[: len(known)]))
    return prune(closed), derived


def _without_cheap(jaxpr: core.Jaxpr, residuals: list) -> tuple[list, list[core.JaxprEqn]]:
    """The residuals that are not cheaply made of others, and the equations for those that are.

    Of others that are recorded, that is: under "current" a value made of recorded activations
    and of parameters stays as it was recorded.
    """
    order = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
    maker = {e.outvars[0]: e for e in jaxpr.eqns if _is_cheap(e) and not e.effects}
    kept = dict.fromkeys(residuals)
    eqns: dict[int, core.JaxprEqn] = {}
    # The last first: nothing left out is ever needed by what is looked at after it.
    for v in sorted((v for v in residuals if v in maker), key=lambda v: -order[v]):
        found = _from_others(v, kept, maker)
        if found is not None:
            del kept[v]
            eqns.update({order[e.outvars[0]]: e for e in found})
    return list(kept), [eqns[i] for i in sorted(eqns)]


def _is_cheap(eqn: core.JaxprEqn) -> bool:
    # On a mesh JAX reshards the constant of a derivative, so that slots would differ there.
    out: Any = eqn.outvars[0] if eqn.outvars else None
    scalar = eqn.primitive.name == "reshard" and out.aval.size == 1
    return scalar or eqn.primitive.name in CHEAP


def _from_others(v: Any, kept: dict, maker: dict) -> list[core.JaxprEqn] | None:
    """The few cheap equations that lead to a variable from others that are kept, if there are."""
    found: dict[Any, core.JaxprEqn] = {}
    open_ends = [v]
    while open_ends:
        at = open_ends.pop()
        if at in found or (at in kept and at is not v):
            continue
        if at not in maker or len(found) == _MOST:
            return None
        # What is made cheaply of what is cheaply made again counts too, up to a few equations in
        # all.
        found[at] = maker[at]
        open_ends += variables(maker[at].invars)
    return list(found.values())
