"""Splits a loop body into work done before, inside and after the loop, batched outside it.

A product of few rows with a large matrix takes as long as the matrix takes to be read. In
a loop it is read in each iteration; for many iterations at once it is read once. What does
not depend on the loop's state (a projection of the inputs) can run before the loop, and what the
state does not need (a loss head, x̄) after it. Only such products are moved, with what belongs
to them, and only primitives known to be pure and batchable. Compilers call this loop fission.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxbptt._arrays import at_most, size_in_bytes
from jaxbptt._jaxprs.cpu_products import bind_product
from jaxbptt._jaxprs.evaluate import Atom, Bind, bind, evaluate, needed, values_of, variables
from jaxbptt._jaxprs.primitives import MOVABLE
from jaxbptt._types import is_part_of_sum

Eqns = list[core.JaxprEqn]

_ROWS = 8  # a product of more rows than this does not wait for its matrix


@dataclasses.dataclass(frozen=True)
class Fission:
    """The equations of a loop's body, divided, and what passes from one part to the next.

    The methods take `env`, the values of all variables that are the same in all iterations.
    """

    rows: list[Any]  # inputs that differ from iteration to iteration
    state: list[Any]  # inputs that the iteration before has made
    state_outs: list[Atom]  # outputs wanted in each iteration
    stacked_outs: list[Atom]  # outputs wanted of all iterations, stacked
    before: Eqns
    inside: Eqns
    after: Eqns
    hoisted: list[Any]  # made before the loop, for the others
    saved: list[Any]  # made inside, stacked for what comes after

    def run_before(self, env: Mapping, rows: list, size: int) -> list:
        """`hoisted` of a block of `size` iterations, stacked."""
        return _together(self.before, env, self.rows, rows, self.hoisted, size)

    def run_inside(
        self, env: Mapping, state: list, row: list, hoisted: list, run: Bind = bind_product
    ) -> tuple[list, list]:
        """`state_outs` and `saved` of one iteration, each equation run by `run`."""
        names, values = [*self.state, *self.rows, *self.hoisted], [*state, *row, *hoisted]
        return _run(run, self.inside, env, names, values, self.state_outs, self.saved)

    def run_after(self, env: Mapping, rows: list, hoisted: list, saved: list, size: int) -> list:
        """`stacked_outs` of a block of `size` iterations, stacked."""
        names, values = [*self.rows, *self.hoisted, *self.saved], [*rows, *hoisted, *saved]
        return _together(self.after, env, names, values, self.stacked_outs, size)

    def temporaries(self, kept: Iterable[Atom]) -> int:
        """How many bytes one iteration adds to what a block holds, without those of `kept`."""
        # What passes from one part to the next lies in memory for all iterations of a block.
        held = {*self.hoisted, *self.saved, *variables(self.stacked_outs)}
        scatters = [e for e in (*self.before, *self.after) if e.primitive.name == "scatter-add"]
        held |= _made(scatters)  # what else there is, the compiler makes in passing or in place
        return size_in_bytes(v.aval for v in held - {*self.rows, *variables(kept)})

    def rows_read(self) -> int:
        """How many bytes of the rows of one iteration are read outside the loop."""
        read = {*_read(self.before), *_read(self.after), *variables(self.stacked_outs)}
        return size_in_bytes(v.aval for v in read.intersection(self.rows))


def divide(
    eqns: Sequence[core.JaxprEqn],
    invariant: Iterable,
    rows: list,
    state: list,
    state_outs: list[Atom],
    stacked_outs: list[Atom],
) -> Fission:
    """Divides a loop's body.

    Args:
        eqns: what one iteration runs, in order.
        invariant: variables that are the same in all iterations.
        rows: inputs that differ from iteration to iteration.
        state: inputs that the iteration before has made.
        state_outs: outputs wanted in each iteration.
        stacked_outs: outputs wanted of all iterations, stacked.
    """
    # What could as well run once belongs to none of the three parts, and is made where it is read.
    constant = set(invariant)
    once = _reached(eqns, constant)
    varying = [e for e in eqns if not e.outvars or not constant.issuperset(e.outvars)]

    # Before the loop: what needs no state, as far as a product there waits for its matrix.
    before = _before(_reached(varying, constant.union(rows)), constant)
    made_before = _made(before)
    rest = [e for e in varying if not e.outvars or not made_before.issuperset(e.outvars)]

    # After the loop: what the state doesn't need, behind such a product.
    after = _after(rest, constant, state_outs)
    made_after = _made(after)

    # Inside: all else that is wanted, and what must be stacked for what comes after.
    last = _read(after) + variables(stacked_outs)
    elsewhere = (constant | made_before | made_after).union(rows)
    saved = [v for v in dict.fromkeys(last) if v not in elsewhere]
    moved = made_before | made_after
    inside = [e for e in eqns if e.effects or not moved.intersection(e.outvars)]
    inside = needed(inside, variables(state_outs) + saved, effects=True)
    # Of what is made before the loop, that which anything later reads is kept for all iterations.
    read = {*_read(inside), *last, *variables(state_outs)}
    hoisted = [v for e in before for v in e.outvars if v in read]
    return Fission(
        rows=rows,
        state=state,
        state_outs=state_outs,
        stacked_outs=stacked_outs,
        before=needed([*once, *before], hoisted),
        inside=inside,
        after=needed([*once, *after], variables(stacked_outs)),
        hoisted=hoisted,
        saved=saved,
    )


def _before(free: Eqns, constant: set) -> Eqns:
    """Of what needs no state, the products that wait and what they need.

    What is made of a product stays in the loop, where it costs no memory.
    """
    return needed(free, _made([e for e in free if _waits(e, constant)]))


def _after(eqns: Eqns, constant: set, state_outs: list[Atom]) -> Eqns:
    """Of what the state does not need, the products that wait, and what needs them."""
    late: Eqns = []
    in_loop = set(variables(state_outs))
    # Backwards, whatever reads a variable is seen before the equation that makes it. What cannot be
    # moved stays, and with it all that it reads.
    for eqn in reversed(eqns):
        if _movable(eqn) and not in_loop.intersection(eqn.outvars):
            late.append(eqn)
        else:
            in_loop.update(variables(eqn.invars))
    late.reverse()
    return _downstream([e for e in late if _waits(e, constant)], late)


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
    plain = not any(map(is_part_of_sum, [*eqn.invars, *eqn.outvars]))
    return eqn.primitive.name in MOVABLE and not eqn.effects and plain


def _waits(eqn: core.JaxprEqn, constant: set) -> bool:
    """Whether a product is bound by reading an invariant matrix."""
    if eqn.primitive.name != "dot_general":
        return False
    contract, batch = eqn.params["dimension_numbers"]
    varying = [i for i, v in enumerate(eqn.invars) if isinstance(v, core.Var) and v not in constant]
    if len(varying) != 1:
        return False
    # With both operands varying nothing is read twice; with neither, it is done once.
    (i,) = varying
    operand: Any = eqn.invars[i]
    shape = operand.aval.shape
    matrix = math.prod(shape[axis] for axis in (*contract[i], *batch[i]))
    # As many numbers as `_ROWS` rows of the side that meets the matrix.
    return at_most(math.prod(shape), _ROWS * matrix)


def _together(
    eqns: Eqns, env: Mapping, names: list, stacks: list, wanted: list[Atom], size: int
) -> list:
    """The values of `wanted` for a block of iterations."""
    stacked = dict(zip(names, stacks, strict=True))
    # What is a stack already goes as it is: not every type of array can be batched over.
    there = [isinstance(v, core.Var) and v in stacked for v in wanted]
    rest = [v for v, t in zip(wanted, there, strict=True) if not t]
    read = [v for v in dict.fromkeys(_read(eqns)) if v in stacked]

    def one(_: Any, values: list) -> list:
        return _run(bind, eqns, env, read, values, rest)[0]  # many rows together

    # Where nothing wanted varies there is still a number of iterations.
    made = iter(jax.vmap(one)(jnp.arange(size), [stacked[v] for v in read]) if rest else [])
    return [stacked[v] if t else next(made) for v, t in zip(wanted, there, strict=True)]


def _run(
    run: Bind, eqns: Eqns, env: Mapping, names: list, values: list, *wanted: list[Atom]
) -> Any:
    env = {**env, **dict(zip(names, values, strict=True))}
    evaluate(eqns, env, run, names)
    return tuple(values_of(atoms, env) for atoms in wanted)


def _made(eqns: Eqns) -> set:
    return {v for e in eqns for v in e.outvars}


def _read(eqns: Eqns) -> list:
    return [v for e in eqns for v in variables(e.invars)]
