"""Partial evaluation of a jaxpr in which some inputs are a marker instead of an array.

Two questions about a step are answered by reading its jaxpr rather than by
comparing arrays: which values depend on neither carry nor x (marker UNKNOWN on
those two), and what remains of a pullback when a cotangent is zero (marker ZERO, `_zero.py`).
Both walk the equations in order, put the equations of a call (`jit`, `checkpoint`) in
its place, and leave the rest to a rule.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core

from jaxbptt._arrays import struct_like
from jaxbptt._compat import bind_params, lax_scan, scan_counts
from jaxbptt._jaxprs.primitives import CALLS


class Marker:
    """What stands in for an array that is unknown, or known to be zero."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name


UNKNOWN = Marker("UNKNOWN")
ZERO = Marker("ZERO")

Value = Any  # an array, a tracer or a Marker
Rule = Callable[[core.JaxprEqn, list[Value]], list[Value]]
Atom = Any  # a variable or a literal of a jaxpr, or ZERO
Env = dict[Any, Any]  # the value of each variable
Bind = Callable[[core.JaxprEqn, list], list]  # `bind`, or what does the same

_WHOLE = "run_whole"  # the name of a call that is left whole


@functools.partial(jax.tree_util.register_dataclass, data_fields=["consts"], meta_fields=["jaxpr"])
@dataclasses.dataclass(frozen=True)
class Program:
    """A jaxpr with the arrays it closes over: a pytree, so that it can be handed to any loop."""

    jaxpr: core.Jaxpr
    consts: list

    @classmethod
    def of(cls, closed: core.ClosedJaxpr) -> "Program":
        """The program of a traced function."""
        return cls(closed.jaxpr, list(closed.consts))

    def __call__(self, *args: Any) -> list:
        """The outputs, from the values of all inputs."""
        return core.jaxpr_as_fun(core.ClosedJaxpr(self.jaxpr, self.consts))(*args)


def interpret(jaxpr: core.Jaxpr, consts: Sequence, args: Sequence, rule: Rule) -> list[Value]:
    """The outputs of `jaxpr`, where `rule` says what an equation gives."""
    env: dict[Any, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Value:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name in CALLS and eqn.params.get("name") != _WHOLE:
            outs = interpret(*_called(eqn), values, rule)
        else:
            outs = rule(eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def bind(eqn: core.JaxprEqn, values: list) -> list:
    """Runs one equation on arrays."""
    functions, params = bind_params(eqn)
    with eqn.ctx.manager:
        outs = eqn.primitive.bind(*functions, *values, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


def evaluate(eqns: Sequence[core.JaxprEqn], env: Env, run: Bind) -> None:
    """Adds to the values in `env` those that the equations make, each by `run`."""
    for eqn in eqns:
        env.update(zip(eqn.outvars, run(eqn, values_of(eqn.invars, env)), strict=True))


def values_of(atoms: Iterable[Atom], env: Env) -> list:
    """What the atoms stand for."""
    return [v if v is ZERO else v.val if isinstance(v, core.Literal) else env[v] for v in atoms]


def without_calls(closed: core.ClosedJaxpr, structs: Sequence) -> core.ClosedJaxpr:
    """The same program from inputs of these types, the equations of every call in its place."""
    if not any(eqn.primitive.name in CALLS for eqn in closed.jaxpr.eqns):
        return closed

    def run(*args: Any) -> list[Value]:
        return interpret(closed.jaxpr, closed.consts, args, bind)

    return jax.make_jaxpr(run)(*structs)


def in_one_piece(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The same program as one equation if it writes to references, else as it is.

    Which of its equations are needed, and in which order, can't be read off the variables then.
    """
    if not has_references(closed.jaxpr):
        return closed

    def whole(*args: Any) -> list:
        return core.jaxpr_as_fun(closed)(*args)

    whole.__name__ = _WHOLE
    return jax.make_jaxpr(jax.jit(whole))(*(struct_like(v.aval) for v in closed.jaxpr.invars))


def has_references(jaxpr: core.Jaxpr, *, deep: bool = False) -> bool:
    """Whether a program uses mutable references, `deep`: inside of loops and branches too."""
    return any(
        any(map(is_reference, [*eqn.invars, *eqn.outvars]))
        or (eqn.primitive.name in CALLS and has_references(_called(eqn)[0], deep=deep))
        or (deep and any(has_references(inner, deep=True) for inner in inner_jaxprs(eqn)))
        for eqn in jaxpr.eqns
    )


def inner_jaxprs(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The programs that an equation runs, in whatever way."""
    for value in eqn.params.values():
        for each in value if isinstance(value, tuple | list) else [value]:
            each = each.jaxpr if isinstance(each, core.ClosedJaxpr) else each
            if isinstance(each, core.Jaxpr):
                yield each


def is_reference(atom: Any) -> bool:
    """Whether a variable is a mutable reference (`jax.new_ref`) and not an array."""
    return hasattr(atom.aval, "inner_aval")


def prune(closed: core.ClosedJaxpr, *, effects: bool = False) -> core.ClosedJaxpr:
    """Drops the equations that no output needs, those with side effects too unless asked for."""
    kept = needed(closed.jaxpr.eqns, variables(closed.jaxpr.outvars), effects=effects)
    return core.ClosedJaxpr(closed.jaxpr.replace(eqns=kept), closed.consts)


def needed(
    eqns: Iterable[core.JaxprEqn], wanted: Iterable, *, effects: bool = False
) -> list[core.JaxprEqn]:
    """The equations that make the wanted variables, and those with side effects if asked for."""
    wanted, kept = set(wanted), []
    for eqn in reversed(list(eqns)):
        if wanted.intersection(eqn.outvars) or (effects and acts(eqn)):
            kept.append(eqn)
            wanted.update(variables(eqn.invars))
    return kept[::-1]


def acts(eqn: core.JaxprEqn) -> bool:
    """Whether an equation has side effects; to JAX a collective's named axis is one, not here."""
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects)


def variables(atoms: Iterable) -> list[Any]:
    """What among the atoms is a variable."""
    return [v for v in atoms if isinstance(v, core.Var)]


def drop(values: Sequence, marks: Sequence) -> list:
    """The values whose place holds no Marker in `marks`."""
    return [v for v, m in zip(values, marks, strict=True) if not isinstance(m, Marker)]


def merge(values: Sequence, marks: Sequence) -> list:
    """Puts `values` back between the Markers of `marks`: the inverse of `drop`."""
    rest = iter(values)
    return [m if isinstance(m, Marker) else next(rest) for m in marks]


def _called(eqn: core.JaxprEqn) -> tuple[core.Jaxpr, Sequence]:
    inner: Any = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return (inner.jaxpr, inner.consts) if isinstance(inner, core.ClosedJaxpr) else (inner, ())


# ------------------------------------------------------------ what is known


def known_rule(eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    """Outputs that depend on an UNKNOWN input are UNKNOWN; loops and branches are split.

    So is what has side effects, or comes of one: what a reference holds is not seen from here.
    """
    if acts(eqn):
        return [UNKNOWN] * len(eqn.outvars)
    if not any(v is UNKNOWN for v in values):
        return bind(eqn, values)
    if eqn.primitive.name == "scan":
        return _known_scan(eqn, values)
    if eqn.primitive.name == "cond" and values[0] is not UNKNOWN:
        return _known_cond(eqn, values)
    return [UNKNOWN] * len(eqn.outvars)


def _known_scan(eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    """The part of an inner scan that can run without its unknown inputs.

    A scan over stacked layers is the everyday case: what it keeps of the weights
    is known although the activations beside it are not.
    """
    p = eqn.params
    body, length = p["jaxpr"], p["length"]
    n, carries = scan_counts(eqn)
    m = n + carries
    consts, init, xs = values[:n], values[n:m], values[m:]
    if length == 0:
        return [UNKNOWN] * len(eqn.outvars)

    def trip(carry: list, x: list) -> list[Value]:
        args = [*consts, *merge(carry, init), *merge(x, xs)]
        return interpret(body.jaxpr, body.consts, args, known_rule)

    def first(carry: list, xs: list) -> list[Value]:
        return trip(carry, [lax.index_in_dim(x, 0, keepdims=False) for x in xs])

    # A carry that enters known may leave unknown: start again with it unknown.
    while True:
        kinds = _kinds(first, drop(init, init), drop(xs, xs))
        known = drop(init, init)
        init = [kinds[i] or v for i, v in enumerate(init)]
        if len(drop(init, init)) == len(known):
            break
    ys_kinds = kinds[len(init) :]

    def known_trip(carry: list, x: list) -> tuple[list, list]:
        outs = trip(carry, x)
        return drop(outs[: len(init)], init), drop(outs[len(init) :], ys_kinds)

    last, ys = lax_scan(
        known_trip,
        drop(init, init),
        drop(xs, xs),
        length=length,
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    return merge(last, init) + merge(ys, ys_kinds)


def _known_cond(eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    index, operands = values[0], values[1:]

    def runner(branch: core.ClosedJaxpr) -> Callable[[list], list[Value]]:
        def run(arrays: list) -> list[Value]:
            return interpret(branch.jaxpr, branch.consts, merge(arrays, operands), known_rule)

        return run

    runs = [runner(branch) for branch in eqn.params["branches"]]
    each = [_kinds(run, drop(operands, operands)) for run in runs]
    kinds = [UNKNOWN if UNKNOWN in kind else None for kind in zip(*each, strict=True)]
    branches = [lambda arrays, run=run: drop(run(arrays), kinds) for run in runs]
    return merge(lax.switch(index, branches, drop(operands, operands)), kinds)


def _kinds(run: Callable[..., list[Value]], *arrays: Any) -> list[Value]:
    """For each output of `run` its Marker, or None where it is an array."""
    kinds: list[Value] = []

    def look(*arrays: Any) -> None:
        kinds[:] = [v if isinstance(v, Marker) else None for v in run(*arrays)]

    jax.eval_shape(look, *arrays)
    return kinds
