"""Decides which equations of a pullback run at each lag, and which once for all lags.

From each weight's cotangent the jaxpr is walked back through linear passes to the
product, reduction or scatter that made it; see `_contract` for what becomes of these.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from jaxbptt._closure.contract import Product, Split
from jaxbptt._jaxprs.evaluate import ZERO, Atom, acts, needed, variables
from jaxbptt._jaxprs.zeros import is_0

Maker = dict[Any, core.JaxprEqn]  # of each variable, the equation that makes it

# Linear in the one operand that varies with the lag ...
_LINEAR = frozenset(
    "broadcast_in_dim conj convert_element_type copy div dot_general dynamic_slice expand_dims "
    "gather imag mul neg pad psum psum2 psum_invariant real reduce_sum reshape "
    "rev sharding_constraint slice squeeze transpose".split()
)
# ... or in all operands together.
_JOINTLY_LINEAR = frozenset({"add", "add_any", "sub", "concatenate"})
_WORTH = 1.0  # operands are emitted if at most this many times as large as their product


def split(
    jaxpr: core.Jaxpr,
    constant: Sequence[bool],
    weights: list[Atom],
    outs: list[Atom],
    *,
    effects: bool = False,
) -> Split:
    """Divides the equations of a flat, pruned pullback.

    Args:
        jaxpr: the pullback's.
        constant: which inputs are the same at all lags.
        weights: outputs to be summed over the lags.
        outs: outputs wanted at each lag.
        effects: whether its side effects are wanted too, at each lag.
    """
    maker = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    weights, outs = ([ZERO if _is_zero(v, maker) else v for v in vs] for vs in (weights, outs))
    fixed = _fixed(jaxpr, constant)
    eqns = needed(jaxpr.eqns, variables([*weights, *outs]), effects=effects)
    acting = [e for e in eqns if effects and acts(e)]
    shown = variables(v for e in acting for v in e.invars)
    after, in_loop = _walk_back(eqns, fixed, maker, variables(weights), [*variables(outs), *shown])
    made_after = {v for eqn in after for v in eqn.outvars}
    ends = [v for eqn in after for v in variables(eqn.invars) if v not in fixed]
    leaves = [v for v in dict.fromkeys(ends + variables(weights)) if v not in made_after]
    makers = [maker[v] for v in leaves if v in maker and v not in in_loop and v not in fixed]

    chosen, emitted = _worthwhile([e for e in makers if e.primitive.name == "dot_general"], fixed)
    turned = _turned([v for v in leaves if v not in in_loop and v not in weights], after)
    products = [_product(e, turned.get(e.outvars[0])) for e in chosen]
    reductions = [e for e in makers if e.primitive.name == "reduce_sum" and e.invars[0] in emitted]
    scatters = [e for e in makers if _scatters_into_zeros(e, maker)]
    done = {e.outvars[0] for e in (*chosen, *reductions, *scatters)}
    plain = [turned[v].outvars[0] if v in turned else v for v in leaves if v not in done]
    summed = {*leaves, *plain, *(p.made for p in products)}
    operands = [v for e in scatters for v in e.invars[1:]]
    return Split(
        jaxpr=jaxpr,
        outs=outs,
        weights=weights,
        at_lag=needed(eqns, variables([*outs, *emitted, *operands, *plain]), effects=effects),
        after=needed(
            [e for e in eqns if (made_after | fixed).difference(summed).intersection(e.outvars)],
            [v for v in variables(weights) if v not in summed],
        ),
        products=products,
        reductions=reductions,
        scatters=scatters,
        plain=plain,
        emitted=emitted,
        acts=bool(acting),
    )


def _fixed(jaxpr: core.Jaxpr, constant: Sequence[bool]) -> set:
    """The variables that are the same at all lags."""
    fixed = {*jaxpr.constvars, *(v for v, c in zip(jaxpr.invars, constant, strict=True) if c)}
    for eqn in jaxpr.eqns:
        if fixed.issuperset(variables(eqn.invars)):
            fixed.update(eqn.outvars)
    return fixed


def _walk_back(
    eqns: list[core.JaxprEqn], fixed: set, maker: Maker, weights: list, outs: list
) -> tuple[list[core.JaxprEqn], set]:
    """The linear passes between the leaves and the weights, and what the loop itself needs."""
    in_loop, to_weights = set(outs), set(weights)
    after = []
    for eqn in reversed(eqns):
        if fixed.issuperset(eqn.outvars):
            continue
        if _is_linear(eqn, fixed, maker) and not in_loop.intersection(eqn.outvars):
            if to_weights.intersection(eqn.outvars):
                after.append(eqn)
                to_weights.update(variables(eqn.invars))
        else:
            in_loop.update(variables(eqn.invars))
    return after[::-1], in_loop


def _is_linear(eqn: core.JaxprEqn, fixed: set, maker: Maker) -> bool:
    name = eqn.primitive.name
    out: Any
    out, *others = eqn.outvars
    moving = [v for v in variables(eqn.invars) if v not in fixed]
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
        return _widens(moving[0].aval, out.aval) and _is_summed_wide(moving[0], maker)
    if name == "pad" and not _is_zero(eqn.invars[1], maker):
        return False
    return moving[0] is eqn.invars[0]


def _widens(narrow: Any, wide: Any) -> bool:
    if not (jnp.issubdtype(narrow.dtype, jnp.inexact) and jnp.issubdtype(wide.dtype, jnp.inexact)):
        return False
    a, b = jnp.finfo(narrow.dtype), jnp.finfo(wide.dtype)
    return bool(a.nmant <= b.nmant and a.maxexp <= b.maxexp)


def _is_summed_wide(v: Atom, maker: Maker) -> bool:
    """Whether it comes from a product or a scatter, which are added up in float32."""
    while v in maker and maker[v].primitive.name in ("transpose", "reshape", "neg", "squeeze"):
        v = maker[v].invars[0]
    return v in maker and (
        maker[v].primitive.name == "dot_general" or _scatters_into_zeros(maker[v], maker)
    )


def _scatters_into_zeros(eqn: core.JaxprEqn, maker: Maker) -> bool:
    return eqn.primitive.name == "scatter-add" and _is_zero(eqn.invars[0], maker)


def _worthwhile(products: list[core.JaxprEqn], fixed: set) -> tuple[list, list]:
    """The products whose operands are worth emitting, and these operands, each once."""
    chosen: dict[int, core.JaxprEqn] = {}
    emitted: dict[Any, None] = {}
    for _ in range(2):  # an operand that one product pays for is free to another before it
        for eqn in products:
            product: Any = eqn.outvars[0]
            size = sum(v.aval.size for v in set(variables(eqn.invars)) if v not in emitted)
            if size <= _WORTH * product.aval.size and not fixed.intersection(eqn.invars):
                chosen[id(eqn)] = eqn
                emitted.update(dict.fromkeys(eqn.invars))
    return [e for e in products if id(e) in chosen], list(emitted)


def _turned(leaves: list, after: list[core.JaxprEqn]) -> dict[Any, core.JaxprEqn]:
    """Of each leaf that is only ever transposed, its transposition.

    A sum is kept the way round in which it is wanted: a transposition by itself copies.
    """
    readers: dict[Any, list[core.JaxprEqn]] = {v: [] for v in leaves}
    for eqn in after:
        for v in variables(eqn.invars):
            readers.get(v, []).append(eqn)
    only = {v: eqns[0] for v, eqns in readers.items() if len(eqns) == 1}
    return {v: eqn for v, eqn in only.items() if eqn.primitive.name == "transpose"}


def _product(eqn: core.JaxprEqn, transpose: core.JaxprEqn | None) -> Product:
    """The product itself, or with its operands changed over where that is its transposition."""
    (left, _), (batch, _) = eqn.params["dimension_numbers"]
    operand: Any = eqn.invars[0]
    out: Any = eqn.outvars[0]
    a, b, n = len(batch), operand.aval.ndim - len(left), out.aval.ndim
    changed = (*range(a), *range(b, n), *range(a, b))
    if transpose is not None and transpose.params["permutation"] == changed:
        return Product(eqn, True, transpose.outvars[0])
    return Product(eqn, False, out)


def _is_zero(atom: Atom, maker: Maker) -> bool:
    if isinstance(atom, core.Literal):
        return is_0(atom)
    made = maker.get(atom)
    return (
        made is not None
        and made.primitive.name == "broadcast_in_dim"
        and _is_zero(made.invars[0], maker)
    )
