"""Takes the weight contractions of a pullback out of the loop over the lags.

A weight's cotangent is a sum over the lags of something linear, in the end nearly
always a matrix product over the batch. Summing inside the loop reads and writes an
array of the weight's size at every lag. Instead the pullback's jaxpr is split:

* at each lag: λ, x̄, and the operands of the products (emitted, stacked by the loop);
* once, after the loop: ONE product over (lag, batch) for each weight, then the linear
  passes that led from it to the weight (transpose, pad, cast, sums, `psum`).

A scatter into zeros (an embedding) goes into its running sum in place. What has neither
form, or whose operands are larger than what they make, is summed in the loop. Which
equation goes where is decided in `_split`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jaxbptt._arrays import zeros
from jaxbptt._jaxprs.cpu_products import bind_product
from jaxbptt._jaxprs.evaluate import Atom, Bind, Env, bind, evaluate, values_of
from jaxbptt._types import explicit


@dataclasses.dataclass(frozen=True)
class Product:
    """A `dot_general`, and whether its operands change places, which transposes what it makes."""

    eqn: core.JaxprEqn
    swapped: bool
    made: Any  # the variable that it stands for


@dataclasses.dataclass(frozen=True)
class Split:
    """The equations of a pullback, divided into what happens at each lag and what once."""

    jaxpr: core.Jaxpr
    outs: list[Atom]  # wanted at each lag
    weights: list[Atom]  # wanted summed over the lags
    at_lag: list[core.JaxprEqn]
    after: list[core.JaxprEqn]
    products: list["Product"]  # of emitted operands, done once
    reductions: list[core.JaxprEqn]  # reduce_sum of an emitted operand, done once
    scatters: list[core.JaxprEqn]  # scatter-add into zeros, done in place in its sum
    plain: list[Atom]  # added up as they are
    emitted: list[Atom]  # operands, stacked over the lags
    acts: bool  # whether there are side effects among `at_lag`

    @property
    def terms(self) -> list[Atom]:
        """What each lag adds to the sums: indices and updates of the scatters, then `plain`."""
        return [v for eqn in self.scatters for v in eqn.invars[1:]] + self.plain

    def one_lag(
        self, consts: list, args: Sequence, run: Bind = bind_product
    ) -> tuple[list, list, list]:
        """At one lag: the values of `outs`, of `emitted` and of `terms`, each equation by `run`."""
        env = _start(self.jaxpr, consts, args)
        evaluate(self.at_lag, env, run)
        return values_of(self.outs, env), values_of(self.emitted, env), values_of(self.terms, env)

    def zero_sums(self) -> list[jax.Array]:
        """Where the sums start; half precisions are added up in float32."""
        made = [eqn.outvars[0] for eqn in self.scatters]
        return [widened(zeros(v.aval)) for v in [*made, *self.plain]]

    def add(self, sums: list, terms: list, live: Any) -> list:
        """The sums with the terms of one more lag, if it is live."""
        n, terms = len(self.scatters), list(terms)
        new = [
            _scattered(eqn, total, indices, where_or_zero(live, updates))
            for eqn, total, indices, updates in zip(
                self.scatters, sums, terms[: 2 * n : 2], terms[1 : 2 * n : 2], strict=False
            )
        ]
        for total, term in zip(sums[n:], terms[2 * n :], strict=True):
            new.append(total + where_or_zero(live, term).astype(total.dtype))
        return new

    def contract(self, emitted: list) -> list[jax.Array]:
        """The products and reductions over all lags of the emitted operands."""
        stacks = dict(zip(self.emitted, emitted, strict=True))
        made = [_product(p, *(stacks[v] for v in p.eqn.invars)) for p in self.products]
        for eqn in self.reductions:
            axes = (0, *(axis + 1 for axis in eqn.params["axes"]))
            made.append(jnp.sum(widened(stacks[eqn.invars[0]]), axes))
        return made

    def zero_contractions(self) -> list[jax.Array]:
        """What `contract` gives for no lags at all."""
        return [widened(zeros(v.aval)) for v in self._contracted()]

    def finish(self, consts: list, args: Sequence, contracted: list, sums: list) -> list:
        """The weights' cotangents; of `args` only those that are the same at all lags count.

        Half precisions come out in float32, to be rounded once.
        """
        env = _start(self.jaxpr, consts, args)
        summed = [*(eqn.outvars[0] for eqn in self.scatters), *self.plain]
        env.update(zip(summed, sums, strict=True))
        env.update(zip(self._contracted(), contracted, strict=True))
        for eqn in self.after:
            values = [widened(v) for v in values_of(eqn.invars, env)]
            env.update(zip(eqn.outvars, bind(eqn, values), strict=True))
        return values_of(self.weights, env)

    def _contracted(self) -> list[Any]:
        return [p.made for p in self.products] + [e.outvars[0] for e in self.reductions]


def where_or_zero(live: Any, value: jax.Array) -> jax.Array:
    """The value where `live`, else zeros."""
    return value if live is True else jnp.where(live, value, jnp.zeros((), value.dtype))


def _scattered(
    eqn: core.JaxprEqn, total: jax.Array, indices: jax.Array, updates: jax.Array
) -> jax.Array:
    """A scatter-add into a running sum, whose type may be wider than the equation's."""
    if total.dtype == updates.dtype:
        return bind(eqn, [total, indices, updates])[0]
    names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
    params = {name: eqn.params[name] for name in names}
    return lax.scatter_add(total, indices, updates.astype(total.dtype), **params)


def _product(product: Product, left: jax.Array, right: jax.Array) -> jax.Array:
    """The sum over the first axis of a product: that axis contracted too."""
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
        preferred_element_type=jnp.float32 if _is_narrow(dtype) else dtype,
        out_sharding=explicit(product.made.aval),
    )


def _start(jaxpr: core.Jaxpr, consts: list, args: Sequence) -> Env:
    env: Env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    return env


def _is_narrow(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32)


def widened(value: Any) -> Any:
    """The value in the type to add up in: float32 for the half precisions."""
    narrow = hasattr(value, "dtype") and _is_narrow(value.dtype)
    return lax.convert_element_type(value, jnp.float32) if narrow else value
