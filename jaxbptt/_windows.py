"""The window: one number of steps for the whole carry, one for each part of it, or random cuts."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxbptt import _errors
from jaxbptt._compat import lax_scan
from jaxbptt._types import PyTree, TreeType


@dataclasses.dataclass(frozen=True)
class Windows:
    """Numbers of steps in the structure of a carry or of a prefix of it: static, hashable."""

    treedef: jax.tree_util.PyTreeDef
    steps: tuple[int | None, ...]  # None for a part of the carry that has no leaves

    @classmethod
    def of(cls, window: PyTree) -> "Windows":
        """Checks a window and makes it hashable.

        A None inside may stand where the carry has none too: `by_leaf` sees whether it does.

        Raises:
            ValueError: one of its leaves is not a positive int, or it has none.
        """
        # None is no leaf to JAX, but here it stands for a part of the carry without any.
        leaves, treedef = jax.tree_util.tree_flatten_with_path(window, is_leaf=_is_leaf)
        if all(steps is None for _, steps in leaves):
            _errors.positive_int("window", window)
        for path, steps in leaves:
            if isinstance(steps, RandomWindow):
                raise _errors.random_part("window" + jax.tree_util.keystr(path))
            if steps is not None:
                _errors.positive_int("window" + jax.tree_util.keystr(path), steps)
        return cls(treedef, tuple(None if steps is None else int(steps) for _, steps in leaves))

    def countable(self) -> "Windows":
        """The same, if a tape's counters can count their steps.

        Raises:
            ValueError: one of them is too long.
        """
        for path, steps in jax.tree_util.tree_flatten_with_path(self.tree())[0]:
            _errors.countable("window" + jax.tree_util.keystr(path), steps)
        return self

    @property
    def longest(self) -> int:
        """The longest of the windows."""
        return max(steps for steps in self.steps if steps is not None)

    def tree(self) -> PyTree:
        """The window as it was given."""
        return self.treedef.unflatten(self.steps)

    def by_leaf(self, carry: TreeType) -> list[int]:
        """The window of each leaf of a carry.

        Raises:
            ValueError: the window is no prefix of the carry, or has None for a part with leaves.
        """
        try:
            # The window may be a prefix of the carry: one number then holds for all leaves of a
            # part.
            parts = self.treedef.flatten_up_to(carry.tree())
        except (TypeError, ValueError) as cause:
            raise _errors.not_a_prefix(self.tree(), carry) from cause
        sizes = [len(jax.tree.leaves(part)) for part in parts]
        for i, (steps, size) in enumerate(zip(self.steps, sizes, strict=True)):
            if steps is None and size:
                raise _errors.no_window(self._path(i), size)
        return [w or 0 for w, n in zip(self.steps, sizes, strict=True) for _ in range(n)]

    def _path(self, part: int) -> str:
        paths = jax.tree_util.tree_flatten_with_path(self.tree(), is_leaf=_is_leaf)[0]
        return "window" + jax.tree_util.keystr(paths[part][0])


def _is_leaf(value: PyTree) -> bool:
    return value is None or isinstance(value, RandomWindow)


def reach_of_rows(window: int, rows: int, every: int) -> int:
    """How many steps the last `rows` outputs of a group reach, which may fall short of `every`."""
    return min(window, rows + max(window - every, 0))


# ------------------------------------------------------------ random cuts


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
            Floats (length,), 0 where λ is cut between a step and the next one, else 1 / (1 - c);
            1 for the last step, whose λ is the cotangent of the final carry.
        """
        _errors.one_key("window", self.key)
        if not isinstance(length, int):
            raise _errors.symbolic_length(length, "with a random window")
        # One draw for each pair of neighbouring steps, between which λ may be cut.
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
        ValueError: `key` is not a key, or `mean` or `alpha` not a number above 1.

    References:
        Tallec & Ollivier, "Unbiasing Truncated Backpropagation Through Time", 2017 (ARTBP).

    Examples:
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
    _errors.is_key("key", key)
    _errors.above_one("mean", mean, "it counts the steps between two cuts, on average")
    _errors.above_one("alpha", alpha, "long stretches are rare as their length to the power -alpha")
    return RandomWindow(key, float(mean), float(alpha))


# ------------------------------------------------------------ how far one call goes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RandomReach:
    """A reach that is drawn; made by `random_reach`."""

    key: jax.Array
    mean: float = dataclasses.field(metadata={"static": True})


def random_reach(key: jax.Array, mean: float) -> RandomReach:
    """A reach for one call of a recorder whose expected gradient is the whole window's.

    Lag k is reached with probability (1 - 1/mean)ᵏ, and what goes on to it is divided by the
    probability of each further step, so that the mean over the keys is the gradient of the whole
    window, for the price of `mean` lags on average (fewer where the window ends before).
    What that costs is variance: where it is there, the term at lag k is multiplied by
    (1 - 1/mean)⁻ᵏ.

    Args:
        key: a key for `jax.random`; give every call a key of its own.
        mean: lags that a call goes back, on average, were the window endless; a number above 1.

    Returns:
        A `RandomReach`, to be given as `reach`.

    Raises:
        ValueError: `key` is not a key, or `mean` is not a number above 1.

    References:
        Beatson & Adams, "Efficient Optimization of Loops and Limits with Randomized Telescoping
        Sums", ICML 2019 (the estimator); Tallec & Ollivier, 2017 (of the kind, for chunks).

    Examples:
        >>> import jax, jax.numpy as jnp, jaxbptt
        >>> rec = jaxbptt.record(lambda w, c, x: (w * c + x, w * c + x), window=4)
        >>> tape = rec.init(0.5, 0.0, 0.0)
        >>> for _ in range(4):
        ...     tape, y = rec(0.5, tape, 1.0)
        >>> def gradient(key):
        ...     reach = jaxbptt.random_reach(key, mean=2)
        ...     return rec.pullback(0.5, tape, jnp.ones(1), reach=reach).params
        >>> keys = jax.random.split(jax.random.key(0), 20_000)
        >>> exact = rec.pullback(0.5, tape, jnp.ones(1)).params
        >>> abs(float(jax.vmap(gradient)(keys).mean() - exact)) < 0.02
        True
    """
    _errors.is_key("key", key)
    _errors.above_one("mean", mean, "it counts the lags that a call goes back, on average")
    return RandomReach(key, float(mean))


@dataclasses.dataclass(frozen=True)
class Reach:
    """How many lags one call goes back, the newest step's among them.

    Attributes:
        lags: an int, or an int32 scalar that is known when the call runs.
        keep: the probability of each further lag, by which what goes on is divided; static.
    """

    lags: int | jax.Array
    keep: float = 1.0

    @classmethod
    def of(cls, reach: int | jax.Array | RandomReach | None, window: int) -> "Reach | None":
        """A reach as it was given, cut to 1 … window.

        Raises:
            ValueError: it is neither an int nor an integer scalar nor drawn.
        """
        if reach is None:
            return None
        if isinstance(reach, RandomReach):
            _errors.one_key("reach", reach.key)
            keep = 1 - 1 / reach.mean
            # The number of lags n has P(n > k) = keepᵏ.
            least = float(jnp.finfo(jnp.float32).tiny)
            u = jax.random.uniform(reach.key, dtype=jnp.float32, minval=least)
            further = jnp.log(u) / jnp.log(jnp.float32(keep))
            # Cut before the cast: far in the tail the number may be larger than an int32.
            lags = 1 + jnp.minimum(further, window).astype(jnp.int32)
            return cls(jnp.clip(lags, 1, window), keep)
        # A Python int stays one, so that the program is that of a window of this length.
        if isinstance(reach, int) and not isinstance(reach, bool):
            return cls(min(max(reach, 1), window))
        dtype, shape = getattr(reach, "dtype", None), getattr(reach, "shape", None)
        if dtype is None or shape != () or not jnp.issubdtype(dtype, jnp.integer):
            raise _errors.not_a_reach(reach)
        return cls(jnp.clip(jnp.asarray(reach), 1, window).astype(jnp.int32))

    @property
    def traced(self) -> bool:
        """Whether it is known only when the call runs."""
        return not isinstance(self.lags, int)


jax.tree_util.register_dataclass(Reach, data_fields=["lags"], meta_fields=["keep"])
