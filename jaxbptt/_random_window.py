"""`random_window`: cuts at random steps, compensated so that the gradient is unbiased."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxbptt import _errors
from jaxbptt._lax import lax_scan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RandomWindow:
    """A window that `scan` draws; made by `random_window`."""

    key: jax.Array
    mean: float = dataclasses.field(metadata={"static": True})
    alpha: float = dataclasses.field(metadata={"static": True})

    def factors(self, length: int) -> jax.Array:
        """What the λ that enters each step is multiplied by, in the order of the steps.

        Args:
            length: how many steps run.

        Returns:
            Floats (length,): 0 where λ is cut between a step and the next one, else 1 / (1 - c);
            1 for the last step, whose λ is the cotangent of the final carry.
        """
        drawn = jax.random.uniform(self.key, (max(length - 1, 0),))
        shift, slope = (1 - 1 / self.alpha) * self.mean, 1 / self.alpha

        def one(age: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
            c = 1 / (shift + slope * age)  # α / ((α-1) mean + age), which also has a limit at α = ∞
            cut = u < c
            return jnp.where(cut, 1, age + 1), jnp.where(cut, 0, 1 / (1 - c))

        first = 1 + 0 * jnp.sum(drawn[:1])  # it varies over a mesh as the key does
        return jnp.append(lax_scan(one, first, drawn)[1], 1)[:length]


def random_window(key: jax.Array, mean: float, alpha: float = 6.0) -> RandomWindow:
    """A window for `scan` whose gradient is unbiased, however short it is.

    λ is cut at random steps, for all parts of the carry at once. Where it is not, it is
    divided by the probability of that:

        λ_{s-1} = z_s ((∂c_s/∂c_{s-1})ᵀ λ_s + (∂y_s/∂c_{s-1})ᵀ ȳ_s)
        z_s = 0 with probability c, else 1 / (1 - c),        c = α / ((α - 1) mean + age)

    where age counts the steps since the last cut, so that E[z_s | z_1 … z_{s-1}] = 1 and the mean
    over the keys is the gradient of full BPTT. The stretches between two cuts are `mean` steps long
    on average, and long ones are rare as age⁻ᵅ: the factors of a stretch of k steps multiply to
    a power of k, (1 + k / ((α - 1) mean))ᵅ, and not to an exponential.

    What unbiasedness costs is variance, from which a gradient of short memory suffers most. Give
    every update a key of its own. In a loop compiled for a number of steps it
    saves no memory against `window=None`, and costs what that costs: less than a fixed window
    with `every=1`. A run in several calls of `scan` is cut between them, at fixed steps.

    Args:
        key: a key for `jax.random`, one or (under `vmap`) one for each run.
        mean: steps between two cuts, on average; a number above 1.
        alpha: a number above 1; for ∞ all steps are equally likely to be cut.

    Returns:
        A `RandomWindow`, to be given as `window`.

    Raises:
        ValueError: `mean` or `alpha` is not a number above 1.

    References:
        Tallec & Ollivier, "Unbiasing Truncated Backpropagation Through Time", 2017 (ARTBP).

    Example:
        >>> import jax, jax.numpy as jnp, jaxbptt
        >>> def gradient(key):
        ...     window = jaxbptt.random_window(key, mean=3)
        ...     step = lambda c, x: (0.9 * c + x, None)
        ...     last = lambda xs: jaxbptt.scan(step, 0.0, xs, window=window)[0]
        ...     return jax.grad(last)(jnp.ones(4))
        >>> each = jax.vmap(gradient)(jax.random.split(jax.random.key(0), 10_000))
        >>> [round(float(g), 1) for g in each.mean(0)]  # 0.9³ … 1, without bias
        [0.7, 0.8, 0.9, 1.0]
    """
    _errors.above_one("mean", mean, "it counts the steps between two cuts, on average")
    _errors.above_one("alpha", alpha, "long stretches are rare as their length to the power -alpha")
    return RandomWindow(key, float(mean), float(alpha))


def times(factor: jax.Array, value: jax.Array) -> jax.Array:
    """A value times a factor; where that is 0 zeros, whatever the value is."""
    wide = value
    if jnp.finfo(value.dtype).bits < 32:  # else the factors' rounding would add up to a bias
        wide = value.astype(jnp.float32)
    product = wide * factor.astype(wide.real.dtype)
    return jnp.where(factor > 0, product, jnp.zeros_like(product)).astype(value.dtype)
