"""`fit_decay`: how fast a gradient decays with the lag, and which window that calls for."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from jaxbptt import _errors
from jaxbptt._arrays import as_strong_arrays
from jaxbptt._inspection.by_lag import ByLag
from jaxbptt._types import PyTree, in_words, leaf_type

NO_WINDOW = 2**31 - 1  # the answer where no window is long enough


class Decay(NamedTuple):
    """What `fit_decay` returns; leaves of more axes, from `vmap`, work as well.

    Attributes:
        rate: β, a float scalar: the factor from one lag's norm to the next.
        carry: β of each leaf of λ, float scalars in the structure of the carry.
        share: float (window,): the part that a window of k+1 has of the summed norms of all
            lags' contributions, those past the tape included; 0 where β ≥ 1.
        bias: float (window,): an estimated bound of how far the gradient of a window of k+1 is
            from that of full BPTT, relative to the latter; inf where β ≥ 1, and where no
            window on the tape shows that the full gradient isn't zero.
    """

    rate: jax.Array
    carry: PyTree
    share: jax.Array
    bias: jax.Array

    def __repr__(self) -> str:
        if jnp.shape(self.rate) or isinstance(self.rate, jax.core.Tracer):
            return f"Decay(rate={in_words(self.rate)}, share={in_words(self.share)})"
        return f"Decay(rate={float(self.rate):.3g}, lags={len(self.share)})"

    def window_for(self, share: Any) -> jax.Array:
        """The smallest window that has at least this share of the contributions.

        Args:
            share: above 0, at most 1.

        Returns:
            int32 scalar. Where it is above the tape's window, it is how far the fitted decay
            has to go on: what to record, not what was seen. 2³¹-1 where no window is long
            enough, or the fit is NaN.

        Raises:
            ValueError: `share` is not one number, above 0 and at most 1.
        """
        share = checked_bound("share", share, 1.0, self.share)
        return _smallest_window(
            self.share >= share, (1 - share) / (1 - self.share[..., -1]), self.rate
        )

    def window_within(self, delta: Any) -> jax.Array:
        """The smallest window whose relative bias is at most `delta`, by estimate.

        Args:
            delta: above 0; Aicher, Foti & Fox take 0.9, 0.5 and 0.1.

        Returns:
            int32 scalar, as for `window_for`.

        Raises:
            ValueError: `delta` is not one number, above 0.
        """
        delta = checked_bound("delta", delta, math.inf, self.bias)
        return _smallest_window(self.bias <= delta, delta / self.bias[..., -1], self.rate)


def fit_decay(lags: ByLag, *, burn_in: int | None = None, by: str = "params") -> Decay:
    """Fits a geometric decay to a gradient by lag, and estimates what each window misses.

    With e_k the norm of what lag k adds to the gradient, a line of slope log β fitted to
    log e_k by least squares from lag `burn_in` on, and e_k on that line past the tape:

        T(K) = e_K + e_{K+1} + …
        share(K) = 1 - T(K) / T(0)
        bias(K) = T(K) / max_j (‖ĝ_j‖ - T(j)),    j = 1 … window

    By the triangle inequality the gradient ĝ_K of a window of K is no further than T(K) from
    that of full BPTT, whose norm is no less than any ‖ĝ_j‖ - T(j).

    It is assumed that norms decay geometrically *in expectation* from `burn_in` on, past the
    tape as on it. Norms of one step scatter, so take the mean over many:
    `jax.tree.map(lambda v: v.mean(0), stacked)`. The bias is then E‖ĝ_K - ĝ‖ / E‖ĝ‖, with
    means taken leaf by leaf: the bias of a gradient as it is used, noise included, most of which an
    optimiser averages out. For that of the expected gradient, which calls for shorter
    windows, take `estimate_bias`. A cause further back than the tape leaves no trace on it.

    Where the last lags are zero in params and in carry, nothing is recorded, and the line is
    assumed to go on. Where they are zero in one of the two alone, nothing from further back
    reaches the parameters. With a window for each part the fit sees what these windows let
    through; to choose them, record with one window for all.

    Args:
        lags: norms, from `gradient_by_lag`, or the mean of many; leaves (window,).
        burn_in: τ, the first lag that is fitted; None for the middle of those above zero.
        by: "params" takes e_k as measured on the tape. "carry" bounds it as Aicher, Foti & Fox
            do, by M ‖λ_{t-k}‖ with the β of ‖λ‖, which is taken as measured up to τ and as
            geometric from there; M is the largest ratio of the two on the tape.

    Returns:
        `Decay(rate, carry, share, bias)`, with `window_for(share)` and `window_within(delta)`.
        NaN where fewer than two norms above zero are left to fit.

    Raises:
        ValueError: `lags` are not norms of at least two lags, `burn_in` leaves fewer than two
            of them, or `by` is another word.

    Cost:
        A few operations on arrays (window,).

    References:
        Aicher, Foti & Fox, "Adaptively Truncating Backpropagation Through Time to Control
        Gradient Bias", UAI 2019. Their K is a window of K+1 here.

    Examples:
        >>> import jax.numpy as jnp, jaxbptt
        >>> norms = 0.5 ** jnp.arange(8.0)
        >>> lags = jaxbptt.ByLag(params=norms, carry=norms / 2, partial=jnp.cumsum(norms))
        >>> decay = jaxbptt.fit_decay(lags)
        >>> print(f"{decay.rate:.2f}", decay.share[:3], decay.window_for(0.99))
        0.50 [0.5   0.75  0.875] 7
    """
    _errors.one_of("by", by, ("params", "carry"))
    lags = _checked_norms(lags)
    # A line needs two lags.
    last = len(jax.tree.leaves(lags.params)[0]) - 2
    if burn_in is not None and (type(burn_in) is not int or not 0 <= burn_in <= last):
        raise ValueError(
            f"burn_in must be an int from 0 to {last}, to leave two of the {last + 2} lags, but "
            f"got {burn_in!r}. None takes the middle."
        )
    return _fit(lags, burn_in, by)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _fit(lags: ByLag, burn_in: int | None, by: str) -> Decay:
    zeros = jnp.zeros_like(jax.tree.leaves(lags)[0])  # the norms of a tree without leaves
    params, lams, partial = (functools.reduce(jnp.hypot, jax.tree.leaves(v), zeros) for v in lags)
    lag = jnp.arange(len(params), dtype=jnp.int32)
    recorded = lag < jnp.maximum(_extent(params), _extent(lams))
    # Zero in one alone: λ is not handed on, or it doesn't get to the parameters.
    ends = _extent(params) != _extent(lams)
    # Past what is recorded the line goes on, on the tape and beyond it.
    line = fit_line(params if by == "params" else lams, burn_in)
    if by == "params":
        terms, beyond = jnp.where(recorded, params, line.at(lag)), line.sum_from(len(params))
    else:
        terms, beyond = _bounded_by_carry(params, lams, line)
    terms, beyond = jnp.where(ends & ~recorded, 0, terms), jnp.where(ends, 0, beyond)
    # T(0) … T(window), added up from the far end, where the terms are small.
    tails = jnp.cumsum(jnp.concatenate([beyond[None], terms[::-1]]))[::-1]
    missed, grows = tails[1:], jnp.isinf(beyond)
    # A lower bound of the full gradient's norm, by the triangle inequality.
    full_norm = jnp.where(recorded, partial - missed, -jnp.inf).max()
    share = jnp.where(grows, 0, 1 - missed / tails[0])
    bias = jnp.where(grows | (full_norm <= 0), jnp.inf, missed / full_norm)
    of_carry = jax.tree.map(lambda norms: fit_line(norms, burn_in).rate, lags.carry)
    return Decay(line.rate, of_carry, share, bias)


class Line(NamedTuple):
    """A straight line through the logarithms of norms by lag."""

    slope: jax.Array
    lag: jax.Array  # the mean of the fitted lags
    log: jax.Array  # the mean of the logarithms there
    first: jax.Array  # τ, the first lag that is fitted

    @property
    def rate(self) -> jax.Array:
        """β, the factor from one lag to the next."""
        return jnp.exp(self.slope)

    def at(self, lag: Any) -> jax.Array:
        """The fitted norm at a lag."""
        return jnp.exp(self.log + self.slope * (jnp.asarray(lag, self.lag.dtype) - self.lag))

    def sum_from(self, lag: int) -> jax.Array:
        """The sum of the fitted norms from a lag on, inf where they don't decay."""
        return jnp.where(self.slope >= 0, jnp.inf, self.at(lag) / -jnp.expm1(self.slope))


@functools.partial(jax.jit, static_argnums=1)
def fit_line(norms: jax.Array, burn_in: int | None) -> Line:
    """Fits a line by least squares to the norms above zero from lag `burn_in` on.

    Args:
        norms: (window,).
        burn_in: the first lag; None for the middle of the lags up to the last that isn't zero.

    Returns:
        A `Line`, NaN where there are fewer than two such norms.
    """
    extent = _extent(norms)
    first = jnp.maximum(jnp.minimum(extent // 2, extent - 2), 0) if burn_in is None else burn_in
    lags = jnp.arange(len(norms), dtype=jnp.int32)
    used = (norms > 0) & jnp.isfinite(norms) & (lags >= first)
    lags = lags.astype(norms.dtype)
    # What is left out gets the logarithm 0: in the sums, 0 times that of zero would be NaN.
    logs, n = jnp.log(jnp.where(used, norms, 1)), jnp.sum(used, dtype=norms.dtype)
    lag, log = (jnp.sum(jnp.where(used, v, 0)) / n for v in (lags, logs))
    # Centred sums keep their digits where the lags are large.
    centred = jnp.where(used, lags - lag, 0)
    slope = jnp.sum(centred * (logs - log)) / jnp.sum(centred * centred)
    return Line(slope, lag, log, jnp.asarray(first, jnp.int32))


def _bounded_by_carry(
    params: jax.Array, lams: jax.Array, line: Line
) -> tuple[jax.Array, jax.Array]:
    """Bounds each lag's contribution by the λ that enters it, and the sum of all past the tape."""
    lags, entering = jnp.arange(len(lams), dtype=jnp.int32), lams[:-1]
    ratio = jnp.where(entering > 0, params[1:] / jnp.where(entering > 0, entering, 1), 0).max()
    # From τ on the bound decays from what was measured there, with the fitted rate.
    line = line._replace(lag=line.first.astype(lams.dtype), log=jnp.log(lams[line.first]))
    bounds = ratio * jnp.where(lags <= line.first, lams, line.at(lags))
    # λ of lag k enters the step at lag k+1. At lag 0 the given cotangents enter: no bound there.
    return jnp.concatenate([params[:1], bounds[:-1]]), ratio * line.sum_from(len(lams) - 1)


def _extent(norms: jax.Array) -> jax.Array:
    """One more than the last lag whose norm isn't zero."""
    return jnp.where(norms != 0, jnp.arange(1, len(norms) + 1, dtype=jnp.int32), 0).max()


def _smallest_window(enough: jax.Array, ratio: jax.Array, rate: jax.Array) -> jax.Array:
    """The smallest window that is enough.

    Args:
        enough: bool (..., window): whether a window of k+1 is.
        ratio: the factor by which what the tape misses has to fall, if no window on it is enough.
        rate: β.
    """
    window = enough.shape[-1]
    # Past the tape what is missed falls by β with each step.
    longer = window + jnp.ceil(jnp.log(ratio) / jnp.log(rate))
    known = (rate < 1) & (longer < NO_WINDOW / 2)  # neither holds for NaN
    longer = jnp.where(known, jnp.maximum(longer, window + 1), 0).astype(jnp.int32)
    # Of equal values argmax takes the first.
    first = jnp.argmax(enough, axis=-1).astype(jnp.int32) + 1
    return jnp.where(enough.any(axis=-1), first, jnp.where(known, longer, NO_WINDOW))


def checked_bound(name: str, value: Any, most: float, like: jax.Array) -> jax.Array:
    """The number as an array of `like`'s dtype."""
    wanted = "above 0" if most == math.inf else f"above 0 and at most {most:g}"
    try:
        number = jnp.asarray(value, like.dtype) if np.shape(value) == () else None
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or jnp.iscomplexobj(value):
        raise ValueError(
            f"{name} must be one number, {wanted}, but got {_errors.describe(value)}. For several, "
            "call it for each, or jax.vmap it over them."
        )
    # A traced number has no value that could be looked at.
    if not isinstance(value, jax.core.Tracer) and not 0 < float(value) <= most:
        raise ValueError(f"{name} must be {wanted}, but got {value!r}.")
    return number


def _checked_norms(lags: Any) -> ByLag:
    """The norms, all in the widest of their dtypes."""
    if not isinstance(lags, ByLag):
        raise ValueError(
            f"lags must be what gradient_by_lag returned, but got a {type(lags).__name__}. "
            "Call jaxbptt.gradient_by_lag(rec, params, tape, ct_ys)."
        )
    lags = as_strong_arrays(lags, "lags")
    kinds = {f"lags{keystr(p)}": leaf_type(v) for p, v in tree_flatten_with_path(lags)[0]}
    for path, kind in kinds.items():
        first = next(iter(kinds.values())).shape[:1]
        floating = jnp.issubdtype(kind.dtype, jnp.floating)
        if kind.shape != first or first < (2,) or not floating:
            raise ValueError(
                "lags must hold norms, a float array (window,) of two lags or more for each "
                f"leaf, but {path} is {kind}. Leave out full=True; of several time steps take "
                "the mean, jax.tree.map(lambda v: v.mean(0), stacked)."
            )
    if not jax.tree.leaves(lags.params):
        raise ValueError(
            "lags.params must have a leaf, for what a window cuts short is the gradient of the "
            f"parameters, but got {lags.params!r}. Pass what the step learns as params."
        )
    # One dtype for all, as norms of parameters and of the carry are compared.
    dtype = max((kind.dtype for kind in kinds.values()), key=lambda d: jnp.finfo(d).bits)
    return jax.tree.map(lambda v: v.astype(dtype), lags)
