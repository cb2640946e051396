"""Programs, and how their equations are run, inlined and left out."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxbptt._arrays import struct_like
from jaxbptt._compat import bind_params
from jaxbptt._jaxprs.pieces import hold, in_pieces, is_long
from jaxbptt._jaxprs.primitives import CALLS, MOVABLE, RETYPES
from jaxbptt._types import explicit, is_reference


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
        """The outputs, from the values of all inputs: arrays, where JAX has numbers of Python."""
        if is_long(self.jaxpr.eqns):
            env: Env = dict(zip(self.jaxpr.constvars, self.consts, strict=True))
            env.update(zip(self.jaxpr.invars, args, strict=True))
            evaluate(self.jaxpr.eqns, env, bind, self.jaxpr.invars)
            outs = values_of(self.jaxpr.outvars, env)
        else:
            outs = core.jaxpr_as_fun(core.ClosedJaxpr(self.jaxpr, self.consts))(*args)
        return [
            _as_array(v, atom.aval) if isinstance(atom, core.Literal) else v
            for atom, v in zip(self.jaxpr.outvars, outs, strict=True)
        ]


def _as_array(number: Any, aval: Any) -> jax.Array:
    return jnp.asarray(number, aval.dtype)


def interpret(
    jaxpr: core.Jaxpr,
    consts: Sequence,
    args: Sequence,
    rule: Rule,
    inlined: Callable[[core.JaxprEqn], bool] | None = None,
) -> list[Value]:
    """The outputs of `jaxpr`, where `rule` says what an equation gives.

    The equations of calls are run in their place, of those alone that are `inlined` if it says so.
    """
    inlined = inlined or _is_call
    env: dict[Any, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Value:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        if inlined(eqn):
            outs = interpret(*_called(eqn), values, rule, inlined)
        else:
            outs = rule(eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def bind(eqn: core.JaxprEqn, values: list) -> list:
    """Runs one equation on arrays."""
    functions, params = bind_params(eqn)
    scope = str(eqn.source_info.name_stack)  # profilers show what jax.named_scope called it
    with eqn.ctx.manager, jax.named_scope(scope) if scope else contextlib.nullcontext():
        outs = eqn.primitive.bind(*functions, *values, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


def evaluate(eqns: Sequence[core.JaxprEqn], env: Env, run: Bind, varying: Iterable = ()) -> None:
    """Adds to the values in `env` those that the equations make, each by `run`.

    Args:
        eqns: equations, in order.
        env: the values of all that they read and don't make.
        run: runs one of them.
        varying: of these inputs those that are not the same in all iterations of a loop.
    """
    for piece in in_pieces(eqns, varying):
        for eqn in piece.eqns:
            env.update(zip(eqn.outvars, run(eqn, values_of(eqn.invars, env)), strict=True))
        env.update(zip(piece.held, hold([env[v] for v in piece.held]), strict=True))


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


def with_arrays_outside(closed: core.ClosedJaxpr, structs: Sequence) -> core.ClosedJaxpr:
    """The same program, the arrays that jitted functions in it close over among its own.

    JAX hands a tracer in from outside, and leaves an array where it is used.
    """
    if not any(map(_closes_over, closed.jaxpr.eqns)):
        return closed

    def run(*args: Any) -> list[Value]:
        return interpret(closed.jaxpr, closed.consts, args, bind, _closes_over)

    return jax.make_jaxpr(run)(*structs)


def _closes_over(eqn: core.JaxprEqn) -> bool:
    """Whether an equation calls a function that closes over arrays."""
    # Under `jax.checkpoint` they are arguments.
    if eqn.primitive.name not in ("jit", "pjit", "closed_call", "core_call"):
        return False
    inner, consts = _called(eqn)
    return bool(consts) or any(map(_closes_over, inner.eqns))


def _is_call(eqn: core.JaxprEqn) -> bool:
    return eqn.primitive.name in CALLS and eqn.params.get("name") != _WHOLE


def without_repeats(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The same program where no pure equation computes what one before it has computed.

    XLA would merge them as well, but not the residuals that both leave on record, nor the two
    sums over the lags that their cotangents would be added up in.
    """
    merged: dict[Any, Any] = {}  # a variable of a repeated equation: that of the first
    firsts: dict[Any, core.JaxprEqn] = {}
    kept = []
    for eqn in closed.jaxpr.eqns:
        operands = [merged.get(v, v) if isinstance(v, core.Var) else v for v in eqn.invars]
        eqn = eqn.replace(invars=operands)
        first = firsts.setdefault(_what_it_computes(eqn), eqn)
        if first is eqn:
            kept.append(eqn)
        else:
            merged.update(zip(eqn.outvars, first.outvars, strict=True))
    if not merged:
        return closed
    outvars = [merged.get(v, v) if isinstance(v, core.Var) else v for v in closed.jaxpr.outvars]
    return core.ClosedJaxpr(closed.jaxpr.replace(eqns=kept, outvars=outvars), closed.consts)


def _what_it_computes(eqn: core.JaxprEqn) -> Any:
    """A key that two equations share only if they compute the same; for most kinds, none do."""
    # Those that only change a type among them: a mesh adds such an equation to each of two that
    # repeat, and the same step must leave the same on the ring there.
    if eqn.primitive.name not in MOVABLE | RETYPES:
        return id(eqn)
    # A literal by how it is written: 0.0 and -0.0 are equal to Python. The types of the results
    # tell apart what an enclosing mesh or axis makes of an equation.
    operands = [v if isinstance(v, core.Var) else (repr(v.val), v.aval) for v in eqn.invars]
    results = [v.aval for v in eqn.outvars]
    key = eqn.primitive, *eqn.params.values(), eqn.ctx, *operands, *results
    try:
        hash(key)
    except TypeError:
        return id(eqn)
    return key


def in_one_piece(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The same program as one equation if it writes to references, else as it is.

    Which of its equations are needed, and in which order, can't be read off the variables then.
    """
    if not has_references(closed.jaxpr):
        return closed

    def whole(*args: Any) -> list:
        return core.jaxpr_as_fun(closed)(*args)

    # Its name is what `interpret` knows it by, and leaves it as it is.
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
    # Which parameter holds a program, alone or among others, differs from primitive to primitive.
    for value in eqn.params.values():
        for each in value if isinstance(value, tuple | list) else [value]:
            each = each.jaxpr if isinstance(each, core.ClosedJaxpr) else each
            if isinstance(each, core.Jaxpr):
                yield each


def leaves_explicit_axes(jaxpr: core.Jaxpr) -> bool:
    """Whether a part of a program sees the Explicit axes of its mesh as Auto (`auto_axes`)."""
    values = [v.aval for eqn in jaxpr.eqns for v in [*eqn.invars, *eqn.outvars]]
    if any(map(explicit, values)) and any(map(on_other_axes, values)):
        return True
    inner = (inner for eqn in jaxpr.eqns for inner in inner_jaxprs(eqn))
    return any(map(leaves_explicit_axes, inner))


def on_other_axes(aval: Any) -> bool:
    """Whether an abstract value lies on a mesh of which no axis is Explicit."""
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    return mesh is not None and not mesh.empty and not explicit(aval)


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
        # Backwards: all that reads what an equation makes has been seen when it is its turn.
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


def program_called(eqn: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """The program that a call runs on its operands one to one, with a rule of its own or without.

    Primitives of later versions may keep it under another name: then None.
    """
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    inner: Any = next((eqn.params[name] for name in names if name in eqn.params), None)
    if isinstance(inner, core.Jaxpr) and not isinstance(inner, core.ClosedJaxpr):
        inner = core.ClosedJaxpr(inner, ())
    one_to_one = inner is not None and len(inner.jaxpr.invars) == len(eqn.invars)
    return inner if one_to_one else None


def _called(eqn: core.JaxprEqn) -> tuple[core.Jaxpr, Sequence]:
    inner: Any = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return (inner.jaxpr, inner.consts) if isinstance(inner, core.ClosedJaxpr) else (inner, ())
