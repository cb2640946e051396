"""Products of some rows with a weight read across: the chain's own, as a CPU does them best.

λ meets each weight the other way round than the step did, so that both operands are
contracted along their last axis. XLA's CPU backend does that at half its rate where there are
few rows. With the weight in front and the rows turned it is a plain product, but XLA turns it
back unless both the operand and what comes out are held behind a barrier.

With more rows it still costs a quarter. There a loop turns the weight once, before it begins.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jaxbptt._arrays import at_most
from jaxbptt._jaxprs.evaluate import Bind, bind

_ROWS = range(4, 17)  # with fewer rows it doesn't always gain
_MORE_ROWS = range(17, 129)  # beyond these a weight is read across at the full rate
_WEIGHT = 2**14  # numbers: in smaller ones two more operations cost as much as they save
_TRIPS = 16  # of a loop at least, of which a weight that was turned saves some 3 to 10 what it cost


def with_turned_weights(eqns: Sequence[core.JaxprEqn], env: Mapping, trips: Any) -> Bind:
    """Runs the equations of a loop's body, with the weights turned that gain by it on a CPU.

    Args:
        eqns: the equations of the body.
        env: the values of variables that are the same in all trips, before the loop.
        trips: how many there are.
    """
    if not at_most(_TRIPS, trips):
        return bind_product
    across = {e.invars[1] for e in eqns if _is_across(e, _MORE_ROWS)}
    turned = {v: _turned(env[v]) for v in across if v in env}

    def run(eqn: core.JaxprEqn, values: list) -> list:
        if not _is_across(eqn, _MORE_ROWS) or eqn.invars[1] not in turned:
            return bind_product(eqn, values)

        def plain(left: jax.Array, right: jax.Array, _: jax.Array) -> jax.Array:
            return bind(eqn, [left, right])[0]

        def along(left: jax.Array, _: jax.Array, right: jax.Array) -> jax.Array:
            return lax.dot_general(
                left,
                right,
                (((1,), (0,)), ((), ())),
                precision=eqn.params["precision"],
                preferred_element_type=eqn.params["preferred_element_type"],
            )

        args = *values, turned[eqn.invars[1]]
        return [lax.platform_dependent(*args, cpu=along, default=plain)]

    return run


def _turned(weight: jax.Array) -> jax.Array:
    # Without the barrier XLA would make one product of the two again. Elsewhere nothing reads it.
    def held(weight: jax.Array) -> jax.Array:
        return lax.optimization_barrier(weight.T)

    return lax.platform_dependent(weight, cpu=held, default=lambda weight: weight.T)


def bind_product(eqn: core.JaxprEqn, values: list) -> list:
    """Runs one equation on arrays: `bind`, or on a CPU the same product by another way."""
    if not _is_across(eqn, _ROWS):
        return bind(eqn, values)

    def plain(left: jax.Array, right: jax.Array) -> jax.Array:
        return bind(eqn, [left, right])[0]

    def turned(left: jax.Array, right: jax.Array) -> jax.Array:
        precision = eqn.params["precision"]
        # The weight in front, the rows turned: this is the product that is wanted, turned.
        product = lax.dot_general(
            right,
            lax.optimization_barrier(left.T),
            (((1,), (0,)), ((), ())),
            precision=precision[::-1] if isinstance(precision, tuple) else precision,
            preferred_element_type=eqn.params["preferred_element_type"],
        )
        return lax.optimization_barrier(product).T

    # Chosen when the program is compiled: the same trace may be lowered for several platforms.
    return [lax.platform_dependent(*values, cpu=turned, default=plain)]


def _is_across(eqn: core.JaxprEqn, rows: range) -> bool:
    """Whether it is a product of so many rows with a large enough weight that is read across."""
    if eqn.primitive.name != "dot_general":
        return False
    left: Any
    right: Any
    left, right = (v.aval for v in eqn.invars)
    return (
        eqn.params["dimension_numbers"] == (((1,), (1,)), ((), ()))
        and eqn.params.get("out_sharding") is None
        and left.ndim == right.ndim == 2
        and left.dtype == right.dtype
        and left.dtype in (jnp.float32, jnp.float64)
        and left.shape[0] in rows
        and at_most(_WEIGHT, right.size)
        and at_most(left.shape[0] + 1, right.shape[0])
    )
