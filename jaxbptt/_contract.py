"""Takes the weight contractions of a pullback out of the loop over the lags.

A weight's cotangent is a sum over the lags of something linear, in the end nearly
always a matrix product over the batch. Summing inside the loop reads and writes an
array of the weight's size at every lag. Instead the pullback's jaxpr is split:

* at each lag: λ, x̄, and the operands of the products (emitted, stacked by the loop);
* once, after the loop: ONE product over (lag, batch) for each weight, then the linear
  passes that led from it to the weight (transpose, pad, cast, sums, `psum`).

A scatter into zeros (an embedding) goes into its running sum in place. What has neither
form, or whose operands are larger than what they make, is summed in the loop.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jaxbptt._avals import zeros
from jaxbptt._interpret import ZERO, bind

# Linear in the one operand that varies with the lag ...
_LINEAR = frozenset(
    "broadcast_in_dim conj convert_element_type copy div dot_general dynamic_slice expand_dims "
    "gather imag mul neg pad psum psum2 psum_invariant real reduce_precision reduce_sum reshape "
    "rev sharding_constraint slice squeeze transpose".split()
)
# ... or in all operands together.
_JOINTLY_LINEAR = frozenset({"add", "add_any", "sub", "concatenate"})
_WORTH = 1.0  # operands are emitted if at most this many times as large as their product

Atom = Any  # a variable or a literal of a jaxpr, or ZERO
Env = dict[Any, Any]
Maker = dict[Any, core.JaxprEqn]  # of each variable, the equation that makes it


@dataclasses.dataclass(frozen=True)
class Split:
    """The equations of a pullback, divided into what happens at each lag and what once."""

    jaxpr: core.Jaxpr
    outs: list[Atom]  # wanted at each lag
    weights: list[Atom]  # wanted summed over the lags
    at_lag: list[core.JaxprEqn]
    after: list[core.JaxprEqn]
    products: list[core.JaxprEqn]  # dot_general of emitted operands, done once
    reductions: list[core.JaxprEqn]  # reduce_sum of an emitted operand, done once
    scatters: list[core.JaxprEqn]  # scatter-add into zeros, done in place in its sum
    plain: list[Atom]  # added up as they are
    emitted: list[Atom]  # operands, stacked over the lags

    def one_lag(self, consts: list, args: Sequence) -> tuple[list, list, list]:
        """At one lag: the values of `outs`, the emitted operands, and the terms of the sums."""
        env = _start(self.jaxpr, consts, args)
        _evaluate(self.at_lag, env)
        terms = [_read(env, eqn.invars[1:]) for eqn in self.scatters]
        return _read(env, self.outs), _read(env, self.emitted), [*terms, *_read(env, self.plain)]

    def zero_sums(self) -> list[jax.Array]:
        """Where the sums start: half precisions are added up in float32 and rounded once."""
        into = [zeros(eqn.outvars[0].aval) for eqn in self.scatters]
        return into + [_widened(zeros(v.aval)) for v in self.plain]

    def add(self, sums: list, terms: list, live: Any) -> list:
        """The sums with the terms of one more lag, if it is live."""
        n = len(self.scatters)
        new = [
            bind(eqn, [total, indices, where_or_zero(live, updates)])[0]
            for eqn, total, (indices, updates) in zip(self.scatters, sums, terms, strict=False)
        ]
        for total, term in zip(sums[n:], terms[n:], strict=True):
            new.append(total + where_or_zero(live, term).astype(total.dtype))
        return new

    def finish(self, consts: list, args: Sequence, emitted: list, sums: list) -> list:
        """The weights' cotangents; of `args` only those that are the same at all lags count."""
        env = _start(self.jaxpr, consts, args)
        stacks = dict(zip(self.emitted, emitted, strict=True))
        summed = [*(eqn.outvars[0] for eqn in self.scatters), *self.plain]
        env.update((v, s.astype(v.aval.dtype)) for v, s in zip(summed, sums, strict=True))
        for eqn in self.products:
            env[eqn.outvars[0]] = _product(eqn, *(stacks[v] for v in eqn.invars))
        for eqn in self.reductions:
            axes = (0, *(axis + 1 for axis in eqn.params["axes"]))
            env[eqn.outvars[0]] = jnp.sum(stacks[eqn.invars[0]], axes)
        _evaluate(self.after, env)
        return _read(env, self.weights)


def split(
    jaxpr: core.Jaxpr, constant: Sequence[bool], weights: list[Atom], outs: list[Atom]
) -> Split:
    """Divides the equations of a flat, pruned pullback.

    Args:
        jaxpr: the pullback's.
        constant: which inputs are the same at all lags.
        weights: outputs to be summed over the lags.
        outs: outputs wanted at each lag.
    """
    maker = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    weights, outs = ([ZERO if _is_zero(v, maker) else v for v in vs] for vs in (weights, outs))
    fixed = _fixed(jaxpr, constant)
    after, in_loop = _walk_back(jaxpr, fixed, maker, _variables(weights), _variables(outs))
    made_after = {v for eqn in after for v in eqn.outvars}
    ends = _variables([v for eqn in after for v in eqn.invars if v not in fixed] + weights)
    leaves = [v for v in dict.fromkeys(ends) if v not in made_after]
    makers = [maker[v] for v in leaves if v in maker and v not in in_loop and v not in fixed]

    products, emitted = _worthwhile([e for e in makers if e.primitive.name == "dot_general"], fixed)
    reductions = [
        e for e in makers if e.primitive.name == "reduce_sum" and e.invars[0] in emitted
    ]
    scatters = [
        e for e in makers if e.primitive.name == "scatter-add" and _is_zero(e.invars[0], maker)
    ]
    done = {e.outvars[0] for e in (*products, *reductions, *scatters)}
    plain = [v for v in leaves if v not in done]
    operands = [v for e in scatters for v in e.invars[1:]]
    return Split(
        jaxpr=jaxpr,
        outs=outs,
        weights=weights,
        at_lag=_needed(jaxpr.eqns, _variables([*outs, *emitted, *operands, *plain])),
        after=_needed(
            [e for e in jaxpr.eqns if e.outvars[0] in made_after or e.outvars[0] in fixed],
            [v for v in _variables(weights) if v not in leaves],
        ),
        products=products,
        reductions=reductions,
        scatters=scatters,
        plain=plain,
        emitted=emitted,
    )


def where_or_zero(live: Any, value: jax.Array) -> jax.Array:
    """The value where `live`, else zeros."""
    return jnp.where(live, value, jnp.zeros((), value.dtype))


def _fixed(jaxpr: core.Jaxpr, constant: Sequence[bool]) -> set:
    """The variables that are the same at all lags."""
    fixed = {*jaxpr.constvars, *(v for v, c in zip(jaxpr.invars, constant, strict=True) if c)}
    for eqn in jaxpr.eqns:
        if fixed.issuperset(_variables(eqn.invars)):
            fixed.update(eqn.outvars)
    return fixed


def _walk_back(
    jaxpr: core.Jaxpr, fixed: set, maker: Maker, weights: list, outs: list
) -> tuple[list[core.JaxprEqn], set]:
    """The linear passes between the leaves and the weights, and what the loop itself needs."""
    in_loop, to_weights = set(outs), set(weights)
    after = []
    for eqn in reversed(jaxpr.eqns):
        if fixed.issuperset(eqn.outvars):
            continue
        if _is_linear(eqn, fixed, maker) and not in_loop.intersection(eqn.outvars):
            if to_weights.intersection(eqn.outvars):
                after.append(eqn)
                to_weights.update(_variables(eqn.invars))
        else:
            in_loop.update(_variables(eqn.invars))
    return after[::-1], in_loop


def _is_linear(eqn: core.JaxprEqn, fixed: set, maker: Maker) -> bool:
    name, (out, *others) = eqn.primitive.name, eqn.outvars
    moving = [v for v in _variables(eqn.invars) if v not in fixed]
    if others or not moving:
        return False
    if name in _JOINTLY_LINEAR:
        return len(moving) == len(eqn.invars)
    if name not in _LINEAR or len(moving) != 1:
        return False
    if name in ("mul", "dot_general", "reduce_sum"):
        # Either operand may move; what shrinks its operand is better summed behind it.
        return moving[0].aval.size <= out.aval.size
    if name == "convert_element_type" and moving[0].aval.dtype != out.aval.dtype:
        # Rounding a sum once is not the sum of what was rounded, and adding up in the
        # narrower type loses digits; a product over all lags at once does neither.
        widens = jnp.promote_types(moving[0].aval.dtype, out.aval.dtype) == out.aval.dtype
        return widens and _comes_from_product(moving[0], maker)
    if name == "pad" and not (isinstance(eqn.invars[1], core.Literal) and eqn.invars[1].val == 0):
        return False
    return moving[0] is eqn.invars[0]


def _comes_from_product(v: Atom, maker: Maker) -> bool:
    while v in maker and maker[v].primitive.name in ("transpose", "reshape", "neg", "squeeze"):
        v = maker[v].invars[0]
    return v in maker and maker[v].primitive.name == "dot_general"


def _worthwhile(products: list[core.JaxprEqn], fixed: set) -> tuple[list, list]:
    """The products whose operands are worth emitting, and these operands, each once."""
    chosen: dict[int, core.JaxprEqn] = {}
    emitted: dict[Any, None] = {}
    for _ in range(2):  # an operand that one product pays for is free to another before it
        for eqn in products:
            operands = {v for v in eqn.invars if v not in emitted}
            size = sum(v.aval.size for v in operands)
            if size <= _WORTH * eqn.outvars[0].aval.size and not fixed.intersection(eqn.invars):
                chosen[id(eqn)] = eqn
                emitted.update(dict.fromkeys(eqn.invars))
    return [e for e in products if id(e) in chosen], list(emitted)


def _is_zero(atom: Atom, maker: Maker) -> bool:
    if isinstance(atom, core.Literal):
        return bool(atom.val == 0)
    made = maker.get(atom)
    return (
        made is not None
        and made.primitive.name == "broadcast_in_dim"
        and _is_zero(made.invars[0], maker)
    )


def _product(eqn: core.JaxprEqn, left: jax.Array, right: jax.Array) -> jax.Array:
    """The sum over the first axis of the products of `eqn`: that axis contracted too."""
    contract, batch = eqn.params["dimension_numbers"]
    contract = tuple((0, *(axis + 1 for axis in axes)) for axes in contract)
    batch = tuple(tuple(axis + 1 for axis in axes) for axes in batch)
    return lax.dot_general(
        left,
        right,
        (contract, batch),
        precision=eqn.params["precision"],
        preferred_element_type=eqn.params["preferred_element_type"],
    )


def _needed(eqns: Sequence[core.JaxprEqn], wanted: Iterable) -> list[core.JaxprEqn]:
    needed, kept = set(wanted), []
    for eqn in reversed(eqns):
        if needed.intersection(eqn.outvars):
            kept.append(eqn)
            needed.update(_variables(eqn.invars))
    return kept[::-1]


def _variables(atoms: Iterable[Atom]) -> list:
    return [v for v in atoms if isinstance(v, core.Var)]


def _start(jaxpr: core.Jaxpr, consts: list, args: Sequence) -> Env:
    env: Env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    return env


def _evaluate(eqns: Sequence[core.JaxprEqn], env: Env) -> None:
    for eqn in eqns:
        env.update(zip(eqn.outvars, bind(eqn, _read(env, eqn.invars)), strict=True))


def _read(env: Env, atoms: Iterable[Atom]) -> list:
    return [
        v if v is ZERO else v.val if isinstance(v, core.Literal) else env[v] for v in atoms
    ]


def _widened(array: jax.Array) -> jax.Array:
    narrow = jnp.issubdtype(array.dtype, jnp.floating) and jnp.finfo(array.dtype).bits < 32
    return array.astype(jnp.float32) if narrow else array
