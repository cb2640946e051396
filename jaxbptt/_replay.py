"""The window run again: residuals from recorded carries and inputs, under other parameters.

With weights="replayed" a slot holds what a step was given, its carry and x. Before a
pullback the steps run again from the oldest carry there is, each from the carry that the
one before it now returns, so that λ sees one trajectory of one set of parameters.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxbptt._blocks import rows
from jaxbptt._closure import Closure
from jaxbptt._stacks import scan_stacking


def replayed(
    closure: Closure, params: list, read: Callable[[Any], list], window: int, length: Any
) -> Callable[[Any], list]:
    """A function from a lag to the residuals of that step in the trajectory run again.

    Args:
        closure: the traced step.
        params: leaves of the parameters to run it with.
        read: from a lag to the carry and x of that step, the oldest step's beyond what is
            recorded.
        window: how many slots there are.
        length: how many of them are recorded.
    """
    n = len(closure.masks["carry"])

    def body(carry: list, lag: Any) -> tuple[list, list]:
        given = read(lag)
        recorded, x = given[:n], given[n:]
        begins = lag >= length - 1  # later carries are made again
        carry = [jnp.where(begins, v, c) for v, c in zip(recorded, carry, strict=True)]
        (carry, _, _), residuals, _ = closure.forward(params, carry, x)
        return jax.tree.leaves(carry), residuals

    lags = jnp.arange(window, dtype=jnp.int32)
    oldest = read(window - 1)[:n]
    _, stacks = scan_stacking(body, oldest, lags, closure.slot, window, first=48, reverse=True)
    return lambda lag: rows(stacks, lag)
