"""Products of a few rows with a weight read across: the chain's own, as a CPU does them best.

λ meets each weight the other way round than the step did, so that both operands are
contracted along their last axis. XLA's CPU backend does that at half its rate where there are
few rows. With the weight in front and the rows turned it is a plain product, but XLA turns it
back unless both the operand and what comes out are held behind a barrier.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jaxbptt._arrays import at_most
from jaxbptt._jaxprs.evaluate import bind

_ROWS = range(4, 17)  # with fewer rows it doesn't always gain, with more the plain form is as fast
_WEIGHT = 2**14  # numbers: in smaller ones two more operations cost as much as they save


def bind_product(eqn: core.JaxprEqn, values: list) -> list:
    """Runs one equation on arrays: `bind`, or on a CPU the same product by another way."""
    if not _is_slow(eqn):
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


def _is_slow(eqn: core.JaxprEqn) -> bool:
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
        and left.shape[0] in _ROWS
        and at_most(_WEIGHT, right.size)
        and at_most(left.shape[0] + 1, right.shape[0])
    )
