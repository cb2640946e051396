"""A pullback divided into what happens at each lag and what once, after the loop over the lags.

A weight's cotangent is a sum over the lags of something linear, in the end nearly
always a matrix product over the batch. Summing inside the loop reads and writes an
array of the weight's size at every lag. Instead the pullback's equations are divided:

* at each lag: λ, x̄, and the operands of the products, which the loop stacks;
* once, after the loop: ONE product over (lag, batch) for each weight, then the linear
  passes that led from it to the weight (transpose, pad, cast, sums, `psum`).

A scatter into zeros (an embedding) goes into its running sum in place. What has neither
form, or whose operands are larger than what they make, is summed in the loop.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxbptt._arrays import (
    at_most,
    is_half_precision,
    select_rows,
    where_or_zero,
    widened,
    zeros,
)
from jaxbptt._compat import lax_scan
from jaxbptt._jaxprs.cpu_products import bind_product, with_turned_weights
from jaxbptt._jaxprs.evaluate import (
    ZERO,
    Atom,
    Bind,
    Env,
    Program,
    acts,
    bind,
    evaluate,
    needed,
    values_of,
    variables,
)
from jaxbptt._jaxprs.linearity import fills
from jaxbptt._jaxprs.primitives import JOINT_PASSES, MOVES_ZEROS, PASSES
from jaxbptt._types import explicit

Maker = dict[Any, core.JaxprEqn]  # of each variable, the equation that makes it

_WORTH = 1  # operands are stacked if at most this many times as large as their product


@dataclasses.dataclass(frozen=True)
class Product:
    """A `dot_general`, and whether its operands change places, which transposes what it makes."""

    eqn: core.JaxprEqn
    swapped: bool
    made: Any  # the variable that it stands for


class AtLag(NamedTuple):
    """Values that one lag makes; an output may be ZERO."""

    outs: list
    operands: list
    summands: list


@dataclasses.dataclass(frozen=True)
class Contraction:
    """The equations of a pullback, divided into what happens at each lag and what once."""

    program: Program
    invariant: list[Any]  # inputs that are the same at all lags
    outs: list[Atom]  # wanted at each lag
    weights: list[Atom]  # wanted summed over the lags
    in_loop: list[core.JaxprEqn]
    after_loop: list[core.JaxprEqn]
    products: list[Product]  # of operands, done once
    reductions: list[core.JaxprEqn]  # reduce_sum of an operand, done once
    summed_operands: list[Atom]  # operands that are wanted summed over the lags too
    scatters: list[core.JaxprEqn]  # scatter-add into zeros, done in place in its sum
    summed_as_is: list[Atom]
    operands: list[Atom]  # stacked over the lags
    acts: bool  # whether there are side effects in the loop

    @property
    def summands(self) -> list[Atom]:
        """What a lag adds to the sums: indices and updates of the scatters, then the rest."""
        return [v for eqn in self.scatters for v in eqn.invars[1:]] + self.summed_as_is

    def at_lag(self, args: Sequence, run: Bind = bind_product) -> "AtLag":
        """What one lag makes of the pullback's arguments, each equation run by `run`."""
        jaxpr = self.program.jaxpr
        env: Env = dict(zip(jaxpr.constvars, self.program.consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        evaluate(self.in_loop, env, run, set(jaxpr.invars).difference(self.invariant))
        return AtLag(
            *(values_of(atoms, env) for atoms in (self.outs, self.operands, self.summands))
        )

    def runner(self, invariant: list, lags: int) -> Bind:
        """What runs an equation in a loop over so many lags; made before the loop."""
        env: Env = dict(zip(self.invariant, invariant, strict=True))
        return with_turned_weights(self.in_loop, env, lags)

    def zero_sums(self) -> list[jax.Array]:
        """Where the sums start; half precisions are added up in float32."""
        made = [eqn.outvars[0] for eqn in self.scatters]
        return [widened(zeros(v.aval)) for v in [*made, *self.summed_as_is]]

    def add(self, sums: list, summands: list, live: Any) -> list:
        """The sums with the summands of one more lag, if it is live."""
        n = len(self.scatters)
        added = [
            total + where_or_zero(live, v).astype(total.dtype)
            for total, v in zip(sums[n:], summands[2 * n :], strict=True)
        ]
        return self._scattered(sums[:n], summands[: 2 * n], live) + added

    def add_batch(self, sums: list, summands: list, live: jax.Array) -> list:
        """The sums with the summands of several lags, along a first axis, where these are live."""
        n = len(self.scatters)
        added = [
            total + jnp.sum(select_rows(live, v).astype(total.dtype), 0)
            for total, v in zip(sums[n:], summands[2 * n :], strict=True)
        ]
        if not n:
            return added

        # One scatter after the other goes in place; all in one would need their sum beside it.
        def trip(sums: list, row: tuple[list, Any]) -> tuple[list, None]:
            return self._scattered(sums, *row), None

        return lax_scan(trip, sums[:n], (summands[: 2 * n], live))[0] + added

    def _scattered(self, sums: list, summands: list, live: Any) -> list:
        """The sums of the scatters with what one lag scatters, if it is live."""
        # Each scatter has two summands, its indices and its updates, one after the other.
        rows = zip(self.scatters, sums, summands[::2], summands[1::2], strict=True)
        return [
            _scatter(eqn, total, indices, where_or_zero(live, updates))
            for eqn, total, indices, updates in rows
        ]

    def contract(self, operands: list) -> list[jax.Array]:
        """The products and reductions of the stacked operands, over all lags."""
        # A product has whole stacks for operands now, and the lag is one more axis to contract.
        stacks = dict(zip(self.operands, operands, strict=True))
        made = [_over_lags(p, *(stacks[v] for v in p.eqn.invars)) for p in self.products]
        for eqn in self.reductions:
            axes = (0, *(axis + 1 for axis in eqn.params["axes"]))
            made.append(jnp.sum(widened(stacks[eqn.invars[0]]), axes))
        return made + [jnp.sum(widened(stacks[v]), 0) for v in self.summed_operands]

    def zero_contractions(self) -> list[jax.Array]:
        """What `contract` gives for no lags at all."""
        return [widened(zeros(v.aval)) for v in self._contracted()]

    def finish(self, invariant: list, contracted: list, sums: list) -> list:
        """The weights' cotangents: arrays or ZERO, half precisions in float32, to be rounded once.

        Args:
            invariant: the arguments that are the same at all lags.
            contracted: what `contract` gave.
            sums: what `add` gave at the last lag.
        """
        env: Env = dict(zip(self.program.jaxpr.constvars, self.program.consts, strict=True))
        env.update(zip(self.invariant, invariant, strict=True))
        summed = [*(eqn.outvars[0] for eqn in self.scatters), *self.summed_as_is]
        env.update(zip(summed, sums, strict=True))
        env.update(zip(self._contracted(), contracted, strict=True))
        # These are linear: run once on the sum they give what they would have given at each lag.
        for eqn in self.after_loop:
            values = [widened(v) for v in values_of(eqn.invars, env)]
            env.update(zip(eqn.outvars, bind(eqn, values), strict=True))
        return values_of(self.weights, env)

    def _contracted(self) -> list[Any]:
        made = [p.made for p in self.products] + [e.outvars[0] for e in self.reductions]
        return made + self.summed_operands


def divide_pullback(
    program: Program,
    invariant: Sequence[bool],
    weights: list[Atom],
    outs: list[Atom],
    *,
    effects: bool = False,
    fewest: int = 0,
) -> Contraction:
    """Divides the equations of a flat, pruned pullback.

    From each weight's cotangent they are walked back through linear passes to the
    product, reduction or scatter that made it.

    Args:
        program: the pullback.
        invariant: which inputs are the same at all lags.
        weights: outputs to be summed over the lags.
        outs: outputs wanted at each lag.
        effects: whether its side effects are wanted too, at each lag.
        fewest: products of two vectors that have fewer numbers are summed in the loop.
    """
    jaxpr = program.jaxpr
    # JAX fills in zeros where no cotangent arrives. Known as ZERO they cost nothing further on.
    maker = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    weights, outs = ([ZERO if _is_zero(v, maker) else v for v in vs] for vs in (weights, outs))
    constant = _invariant(jaxpr, invariant)
    eqns = needed(jaxpr.eqns, variables([*weights, *outs]), effects=effects)

    # What the loop itself needs, and the linear passes between its ends and the weights.
    acting = [e for e in eqns if effects and acts(e)]
    shown = variables(v for e in acting for v in e.invars)
    passes, in_loop = _walk_back(
        eqns, constant, maker, variables(weights), [*variables(outs), *shown]
    )

    # The ends: variables that a pass reads and that no pass makes. Each is summed over the lags.
    of_passes = {v for eqn in passes for v in eqn.outvars}
    ends = [v for eqn in passes for v in variables(eqn.invars) if v not in constant]
    ends = [v for v in dict.fromkeys(ends + variables(weights)) if v not in of_passes]
    makers = [maker[v] for v in ends if v in maker and v not in in_loop and v not in constant]

    # An end made by a product whose operands are smaller than it is: the operands are stacked.
    chosen, operands = _worthwhile(
        [e for e in makers if e.primitive.name == "dot_general" and not _is_tiny(e, fewest)],
        constant,
    )
    turned = _turned([v for v in ends if v not in in_loop and v not in weights], passes)
    products = [_product(e, turned.get(e.outvars[0])) for e in chosen]
    # A bias is the sum over the batch of what is an operand already: that costs nothing more.
    reductions = [e for e in makers if e.primitive.name == "reduce_sum" and e.invars[0] in operands]
    scatters = [e for e in makers if _scatters_into_zeros(e, maker)]
    done = {e.outvars[0] for e in (*chosen, *reductions, *scatters)}
    as_is = [turned[v].outvars[0] if v in turned else v for v in ends if v not in done]
    as_is = _added_up(as_is, passes, weights)
    # Of a single row a bias has the operand itself for its cotangent.
    summed_operands = [v for v in as_is if v in operands]
    as_is = [v for v in as_is if v not in operands]

    # After the loop remain the passes behind what is summed, and what these read.
    summed = {*ends, *as_is, *summed_operands, *(p.made for p in products)}
    scattered = [v for e in scatters for v in e.invars[1:]]
    return Contraction(
        program=program,
        invariant=[v for v, c in zip(jaxpr.invars, invariant, strict=True) if c],
        outs=outs,
        weights=weights,
        in_loop=needed(eqns, variables([*outs, *operands, *scattered, *as_is]), effects=effects),
        after_loop=needed(
            [e for e in eqns if (of_passes | constant).difference(summed).intersection(e.outvars)],
            [v for v in variables(weights) if v not in summed],
        ),
        products=products,
        reductions=reductions,
        summed_operands=summed_operands,
        scatters=scatters,
        summed_as_is=as_is,
        operands=operands,
        acts=bool(acting),
    )


def _invariant(jaxpr: core.Jaxpr, inputs: Sequence[bool]) -> set:
    """The variables that are the same at all lags."""
    constant = {*jaxpr.constvars, *(v for v, c in zip(jaxpr.invars, inputs, strict=True) if c)}
    for eqn in jaxpr.eqns:
        if constant.issuperset(variables(eqn.invars)):
            constant.update(eqn.outvars)
    return constant


def _walk_back(
    eqns: list[core.JaxprEqn], constant: set, maker: Maker, weights: list, outs: list
) -> tuple[list[core.JaxprEqn], set]:
    """The linear passes between the leaves and the weights, and what the loop itself needs."""
    in_loop, to_weights = set(outs), set(weights)
    after = []
    # Backwards, whatever reads a variable is seen before the equation that makes it: an equation
    # runs after the loop if it is a pass, a weight needs it and the loop does not.
    for eqn in reversed(eqns):
        if constant.issuperset(eqn.outvars):
            continue
        if _is_pass(eqn, constant, maker) and not in_loop.intersection(eqn.outvars):
            if to_weights.intersection(eqn.outvars):
                after.append(eqn)
                to_weights.update(variables(eqn.invars))
        else:
            in_loop.update(variables(eqn.invars))
    return after[::-1], in_loop


def _is_pass(eqn: core.JaxprEqn, constant: set, maker: Maker) -> bool:
    name = eqn.primitive.name
    out: Any
    out, *others = eqn.outvars
    moving = [v for v in variables(eqn.invars) if v not in constant]
    if others or not moving:
        return False
    # A term that does not move would be added once instead of once at each lag.
    if name in JOINT_PASSES:
        return len(moving) == len(eqn.invars)
    if name not in PASSES or len(moving) != 1:
        return False
    if name in ("mul", "dot_general", "reduce_sum"):
        # Either operand may move; what shrinks its operand is better summed behind it.
        return at_most(moving[0].aval.size, out.aval.size)
    if name == "convert_element_type" and moving[0].aval.dtype != out.aval.dtype:
        # Rounding a sum once is not the sum of what was rounded, and adding up in the
        # narrower type loses digits; a product over all lags at once does neither.
        return _widens(moving[0].aval, out.aval) and _is_summed_wide(moving[0], maker)
    if (name == "pad" and not _is_zero(eqn.invars[1], maker)) or fills(eqn):
        return False
    # The other operands, such as a divisor or the indices of a gather, are constant.
    return moving[0] is eqn.invars[0]


def _widens(narrow: Any, wide: Any) -> bool:
    if not (jnp.issubdtype(narrow.dtype, jnp.inexact) and jnp.issubdtype(wide.dtype, jnp.inexact)):
        return False
    # float16 and bfloat16 are as wide as each other, and neither holds all numbers of the other.
    a, b = jnp.finfo(narrow.dtype), jnp.finfo(wide.dtype)
    return bool(a.nmant <= b.nmant and a.maxexp <= b.maxexp)


def _is_summed_wide(v: Atom, maker: Maker) -> bool:
    """Whether it comes from a product or a scatter, which are added up in float32."""
    # Past what moves numbers about or changes their sign alone.
    while v in maker and maker[v].primitive.name in ("transpose", "reshape", "neg", "squeeze"):
        v = maker[v].invars[0]
    return v in maker and (
        maker[v].primitive.name == "dot_general" or _scatters_into_zeros(maker[v], maker)
    )


def _scatters_into_zeros(eqn: core.JaxprEqn, maker: Maker) -> bool:
    return eqn.primitive.name == "scatter-add" and _is_zero(eqn.invars[0], maker)


def _is_tiny(product: core.JaxprEqn, fewest: int) -> bool:
    """Whether it multiplies two vectors to so few numbers that a loop adds them up in passing."""
    left: Any = product.invars[0]
    out: Any = product.outvars[0].aval
    # Nothing contracted within the step: an outer product, each of whose numbers is one product.
    contracted = math.prod(left.aval.shape[i] for i in product.params["dimension_numbers"][0][0])
    tiny = at_most(contracted, 1) and at_most(out.size + 1, fewest)
    return tiny and not is_half_precision(out.dtype)


def _worthwhile(products: list[core.JaxprEqn], constant: set) -> tuple[list, list]:
    """The products whose operands are worth stacking, and these operands, each once."""
    chosen: dict[int, core.JaxprEqn] = {}
    operands: dict[Any, None] = {}
    for _ in range(2):  # an operand that one product pays for is free to another before it
        for eqn in products:
            product: Any = eqn.outvars[0]
            # Stacked operands are written once and read once, where a sum in the loop is read and
            # written at each lag.
            size = sum(v.aval.size for v in set(variables(eqn.invars)) if v not in operands)
            if at_most(size, _WORTH * product.aval.size) and not constant.intersection(eqn.invars):
                chosen[id(eqn)] = eqn
                operands.update(dict.fromkeys(eqn.invars))
    return [e for e in products if id(e) in chosen], list(operands)


def _added_up(leaves: list, passes: list[core.JaxprEqn], weights: list[Atom]) -> list:
    """The leaves, those that only ever meet in a sum added up before they are summed over the lags.

    Else there would be a sum for each of them. Half precisions would be rounded at each lag.
    """
    reads = collections.Counter(
        [*variables(weights), *(v for eqn in passes for v in variables(eqn.invars))]
    )
    kept = dict.fromkeys(leaves)
    for eqn in passes:
        out: Any = eqn.outvars[0]
        terms = set(variables(eqn.invars))
        if eqn.primitive.name in ("add", "add_any") and len(terms) == 2:
            # Read by this addition alone, neither term's own sum is of use to anything.
            alone = all(v in kept and reads[v] == 1 for v in terms)
            if alone and not is_half_precision(out.aval.dtype):
                for v in terms:
                    del kept[v]
                kept[out] = None
    return list(kept)


def _turned(leaves: list, after: list[core.JaxprEqn]) -> dict[Any, core.JaxprEqn]:
    """Of each leaf that is only ever transposed, its transposition.

    A sum is kept the way round in which it is wanted: a transposition by itself copies.
    """
    readers: dict[Any, list[core.JaxprEqn]] = {v: [] for v in leaves}
    for eqn in after:
        for v in variables(eqn.invars):
            readers.get(v, []).append(eqn)
    # With a second reader the leaf is needed as it is as well.
    only = {v: eqns[0] for v, eqns in readers.items() if len(eqns) == 1}
    return {v: eqn for v, eqn in only.items() if eqn.primitive.name == "transpose"}


def _product(eqn: core.JaxprEqn, transpose: core.JaxprEqn | None) -> Product:
    """The product itself, or with its operands changed over where that is its transposition."""
    # What a product makes has the batch's axes in front, then those of the left operand, then those
    # of the right one; operands that change places exchange the last two groups.
    (left, _), (batch, _) = eqn.params["dimension_numbers"]
    operand: Any = eqn.invars[0]
    out: Any = eqn.outvars[0]
    a, b, n = len(batch), operand.aval.ndim - len(left), out.aval.ndim
    changed = (*range(a), *range(b, n), *range(a, b))
    if transpose is not None and transpose.params["permutation"] == changed:
        return Product(eqn, True, transpose.outvars[0])
    return Product(eqn, False, out)


def _is_zero(atom: Atom, maker: Maker) -> bool:
    """Whether a variable is made of zeros alone: what no cotangent reaches, JAX fills with them."""
    if isinstance(atom, core.Literal):
        return bool(not np.ndim(atom.val) and not atom.val)
    made = maker.get(atom)
    return (
        made is not None and made.primitive.name in MOVES_ZEROS and _is_zero(made.invars[0], maker)
    )


def _scatter(
    eqn: core.JaxprEqn, total: jax.Array, indices: jax.Array, updates: jax.Array
) -> jax.Array:
    """A scatter-add into a running sum, whose type may be wider than the equation's."""
    if total.dtype == updates.dtype:
        return bind(eqn, [total, indices, updates])[0]
    names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
    params = {name: eqn.params[name] for name in names}
    return lax.scatter_add(total, indices, updates.astype(total.dtype), **params)


def _over_lags(product: Product, left: jax.Array, right: jax.Array) -> jax.Array:
    """The sum over the first axis of a product: that axis contracted too."""
    # The lag is the first axis of both stacks: all other axes move up by one.
    params = product.eqn.params
    contract, batch = params["dimension_numbers"]
    contract = tuple((0, *(axis + 1 for axis in axes)) for axes in contract)
    batch = tuple(tuple(axis + 1 for axis in axes) for axes in batch)
    precision = params["precision"]
    if product.swapped:
        left, right, contract, batch = right, left, contract[::-1], batch[::-1]
        precision = precision[::-1] if isinstance(precision, tuple) else precision
    dtype = product.made.aval.dtype
    return lax.dot_general(
        left,
        right,
        (contract, batch),
        precision=precision,
        preferred_element_type=jnp.float32 if is_half_precision(dtype) else dtype,
        out_sharding=explicit(product.made.aval),
    )
