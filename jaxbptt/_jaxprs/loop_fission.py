"""A loop's body divided by when it runs: for many trips at once before the loop, in it, after it.

A product of few rows with a large matrix takes as long as the matrix takes to be read. In
a loop it is read at each trip; for many trips at once it is read once. What does not depend
on the loop's state (a projection of the inputs) can run before the loop, and what the state
does not need (a loss head, x̄) after it. Only such products are moved, with what belongs to
them, and only primitives known to be pure and batchable.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxbptt._arrays import size_in_bytes
from jaxbptt._jaxprs.cpu_products import bind_product
from jaxbptt._jaxprs.evaluate import Atom, Bind, bind, evaluate, needed, values_of, variables
from jaxbptt._jaxprs.primitives import MOVABLE

Eqns = list[core.JaxprEqn]

_ROWS = 8  # a product of more rows than this does not wait for its matrix


@dataclasses.dataclass(frozen=True)
class Stages:
    """The equations of one trip, and what passes from stage to stage.

    The methods take `env`, the values of all variables that are the same at all trips.
    """

    rows: list[Any]  # inputs that differ from trip to trip
    state: list[Any]  # inputs that the trip before has made
    now: list[Atom]  # wanted in each trip
    later: list[Atom]  # wanted of all trips, stacked
    before: Eqns
    inside: Eqns
    after: Eqns
    early: list[Any]  # made before the loop, for the others
    cut: list[Any]  # known inside, stacked for what comes after

    def ahead(self, env: Mapping, rows: list, size: int) -> list:
        """`early` of a block of `size` trips, stacked."""
        return _together(self.before, env, self.rows, rows, self.early, size)

    def trip(self, env: Mapping, state: list, row: list, early: list) -> tuple[list, list]:
        """`now` and `cut` of one trip."""
        names, values = [*self.state, *self.rows, *self.early], [*state, *row, *early]
        return _run(bind_product, self.inside, env, names, values, self.now, self.cut)

    def behind(self, env: Mapping, rows: list, early: list, cut: list, size: int) -> list:
        """`later` of a block of `size` trips, stacked."""
        names, values = [*self.rows, *self.early, *self.cut], [*rows, *early, *cut]
        return _together(self.after, env, names, values, self.later, size)

    def temporaries(self, kept: Iterable[Atom]) -> int:
        """How many bytes one trip adds to what a block holds, without those of `kept`."""
        held = {*self.early, *self.cut, *variables(self.later)}
        scatters = [e for e in (*self.before, *self.after) if e.primitive.name == "scatter-add"]
        held |= _made(scatters)  # what else there is, the compiler makes in passing or in place
        return size_in_bytes(v.aval for v in held - {*self.rows, *variables(kept)})

    def rows_read(self) -> int:
        """How many bytes of the rows of one trip are read outside the loop."""
        read = {*_read(self.before), *_read(self.after), *variables(self.later)}
        return size_in_bytes(v.aval for v in read.intersection(self.rows))


def divide(
    eqns: Sequence[core.JaxprEqn],
    fixed: Iterable,
    rows: list,
    state: list,
    now: list[Atom],
    later: list[Atom],
) -> Stages:
    """Divides a loop's body.

    Args:
        eqns: what one trip runs, in order.
        fixed: variables that are the same at all trips.
        rows: inputs that differ from trip to trip.
        state: inputs that the trip before has made.
        now: outputs wanted in each trip.
        later: outputs wanted of all trips, stacked.
    """
    still = set(fixed)
    same = _reached(eqns, still)  # what could as well run once
    known = still.union(rows)
    moving = [e for e in eqns if not e.outvars or not still.issuperset(e.outvars)]
    before = _before(_reached(moving, known), still)
    ahead = _made(before)
    later_on = [e for e in moving if not e.outvars or not ahead.issuperset(e.outvars)]
    after = _after(later_on, still, now)
    behind = _made(after)

    last = _read(after) + variables(later)
    cut = [v for v in dict.fromkeys(last) if v not in (still | ahead | behind).union(rows)]
    inside = [e for e in eqns if e.effects or not (ahead | behind).intersection(e.outvars)]
    inside = needed(inside, variables(now) + cut, effects=True)
    read = {*_read(inside), *last, *variables(now)}
    early = [v for e in before for v in e.outvars if v in read]
    return Stages(
        rows=rows,
        state=state,
        now=now,
        later=later,
        before=needed([*same, *before], early),
        inside=inside,
        after=needed([*same, *after], variables(later)),
        early=early,
        cut=cut,
    )


def _before(free: Eqns, still: set) -> Eqns:
    """Of what needs no state, the products that wait and what they need.

    What is made of a product stays in the loop, where it costs no memory.
    """
    return needed(free, _made([e for e in free if _waits(e, still)]))


def _after(eqns: Eqns, still: set, now: list[Atom]) -> Eqns:
    """Of what the state does not need, the products that wait, and what needs them."""
    late: Eqns = []
    in_loop = set(variables(now))
    for eqn in reversed(eqns):
        if _movable(eqn) and not in_loop.intersection(eqn.outvars):
            late.append(eqn)
        else:
            in_loop.update(variables(eqn.invars))
    late.reverse()
    return _downstream([e for e in late if _waits(e, still)], late)


def _reached(eqns: Iterable[core.JaxprEqn], known: set) -> Eqns:
    """The movable equations that need no more than is known; what they make becomes known."""
    reached = []
    for eqn in eqns:
        if _movable(eqn) and known.issuperset(variables(eqn.invars)):
            reached.append(eqn)
            known.update(eqn.outvars)
    return reached


def _downstream(sources: Eqns, eqns: Eqns) -> Eqns:
    """The sources, and of the equations those that need something of theirs."""
    first, found = {id(e) for e in sources}, []
    made: set = set()
    for eqn in eqns:
        if id(eqn) in first or made.intersection(variables(eqn.invars)):
            found.append(eqn)
            made.update(eqn.outvars)
    return found


def _movable(eqn: core.JaxprEqn) -> bool:
    return eqn.primitive.name in MOVABLE and not eqn.effects


def _waits(eqn: core.JaxprEqn, still: set) -> bool:
    """Whether a product spends its time waiting for a matrix that is the same at all trips."""
    if eqn.primitive.name != "dot_general":
        return False
    contract, batch = eqn.params["dimension_numbers"]
    moving = [i for i, v in enumerate(eqn.invars) if isinstance(v, core.Var) and v not in still]
    if len(moving) != 1:
        return False
    (i,) = moving
    operand: Any = eqn.invars[i]
    shape = operand.aval.shape
    return math.prod(shape) <= _ROWS * math.prod(shape[axis] for axis in (*contract[i], *batch[i]))


def _together(
    eqns: Eqns, env: Mapping, names: list, stacks: list, wanted: list[Atom], size: int
) -> list:
    """The values of `wanted` for a block of trips."""
    stacked = dict(zip(names, stacks, strict=True))
    read = [v for v in dict.fromkeys(_read(eqns) + variables(wanted)) if v in stacked]

    def one(_: Any, values: list) -> list:
        return _run(bind, eqns, env, read, values, wanted)[0]  # many rows together

    # Where nothing wanted varies there is still a number of trips.
    return jax.vmap(one)(jnp.arange(size), [stacked[v] for v in read]) if wanted else []


def _run(
    run: Bind, eqns: Eqns, env: Mapping, names: list, values: list, *wanted: list[Atom]
) -> Any:
    env = {**env, **dict(zip(names, values, strict=True))}
    evaluate(eqns, env, run)
    return tuple(values_of(atoms, env) for atoms in wanted)


def _made(eqns: Eqns) -> set:
    return {v for e in eqns for v in e.outvars}


def _read(eqns: Eqns) -> list:
    return [v for e in eqns for v in variables(e.invars)]
