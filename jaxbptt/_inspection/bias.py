"""`estimate_bias`: what each window misses of the expected gradient, told from the noise."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path

from jaxbptt import _errors
from jaxbptt._arrays import as_strong_arrays, zeros
from jaxbptt._compat import lax_scan
from jaxbptt._inspection.by_range import ByRange, gradient_by_range
from jaxbptt._inspection.decay import NO_WINDOW, checked_bound
from jaxbptt._signatures import takes_more
from jaxbptt._transforms.cotangents import value_and_ct_y
from jaxbptt._transforms.record import record
from jaxbptt._types import PyTree, StepFn, leaf_type


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bias:
    """What each window misses of the expected gradient; made by `estimate_bias` or by `of`.

    With ĝ_K the gradient of a window of K, ĝ that of the longest one here, and E the mean over
    the data at fixed parameters. All are unbiased estimates, and squares may fall below 0.

    Attributes:
        kept: ⟨E[ĝ_K], E[ĝ]⟩, float (n,), one for each of `windows`; the last is ‖E[ĝ]‖².
        missed: ‖E[ĝ - ĝ_K]‖², float (n,); the last is 0.
        measured: float scalar, the mean over the runs of ‖ĝ‖², in which what is left of the noise
            counts.
        windows: the windows K, n ints, static.
    """

    kept: jax.Array
    missed: jax.Array
    measured: jax.Array
    windows: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, runs: ByRange) -> "Bias":
        """The estimate from independent runs, for which no two of them have noise in common.

        With s_r, v_r what run r has found of two vectors, summed or averaged over its steps,

            ⟨E[s], E[v]⟩ is estimated by the mean of ⟨s_q, v_r⟩ over all pairs q ≠ r

        whose expectation has no term of noise, as that of ⟨s_r, v_r⟩ has.

        Args:
            runs: what `gradient_by_range` found in each run, added up over its steps at fixed
                parameters, the runs stacked along a first axis: leaves
                (runs, ranges, *leaf.shape), of two runs or more, all of as many steps.

        Raises:
            ValueError: `runs` is something else.
        """
        _check_runs(runs)
        leaves = [leaf.reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(runs.params)]
        n = len(leaves[0])
        # Inner products of each two ranges: within each run, and of the sums over all runs.
        own = _added([_products(leaf).sum(0) for leaf in leaves])
        every = _added([_products(leaf.sum(0)) for leaf in leaves])
        # Of each two ranges the mean over the pairs of different runs: of all, without those of
        # a run with itself.
        pairs = (every - own) / (n * (n - 1))
        # Summed from the far end, where the terms are small.
        behind = jnp.cumsum(jnp.cumsum(jnp.flip(pairs), axis=0), axis=1)
        missed = jnp.append(jnp.flip(jnp.diagonal(behind))[1:], 0)
        return cls(jnp.cumsum(pairs.sum(1)), missed, own.sum() / n, runs.windows)

    @property
    def share(self) -> jax.Array:
        """⟨E[ĝ_K], E[ĝ]⟩ / ‖E[ĝ]‖², float (n,); 0 where the latter can't be told from zero."""
        full = self.kept[..., -1:]
        return jnp.where(full > 0, self.kept / jnp.where(full > 0, full, 1), 0)

    @property
    def relative(self) -> jax.Array:
        """‖E[ĝ - ĝ_K]‖ / ‖E[ĝ]‖, float (n,); inf where the latter can't be told from zero."""
        full = self.kept[..., -1:]
        part = jnp.sqrt(jnp.maximum(self.missed, 0) / jnp.where(full > 0, full, 1))
        return jnp.where(full > 0, part, jnp.inf)

    @property
    def signal(self) -> jax.Array:
        """How much of `measured` isn't noise, float scalar: 1 for all, below a half look longer."""
        return jnp.where(self.measured > 0, self.kept[..., -1] / self.measured, 0)

    def __repr__(self) -> str:
        relative = self.relative
        if relative.ndim > 1 or isinstance(relative, jax.core.Tracer):
            return f"Bias(windows={self.windows})"
        rows = zip(self.windows, relative.tolist(), strict=True)
        return f"Bias({{{', '.join(f'{window}: {part:.2g}' for window, part in rows)}}})"

    def window_for(self, share: Any) -> jax.Array:
        """The smallest of the windows that has at least this share of the expected gradient.

        Args:
            share: above 0, at most 1.

        Returns:
            int32 scalar, at most about twice as long as need be, as all that is known is the range
            of lags in which the share is reached. The longest of the windows says no more than that
            no shorter one will do: measure with a longer one. 2³¹-1 where the expected gradient
            can't be told from zero.

        Raises:
            ValueError: `share` is not one number, above 0 and at most 1.
        """
        # A share may be passed and fallen below again, where ranges differ in sign.
        enough = self.share >= checked_bound("share", share, 1.0, self.missed)
        return self._smallest(jnp.flip(jnp.cumprod(jnp.flip(enough, -1), axis=-1), -1) > 0)

    def window_within(self, delta: Any = 0.3) -> jax.Array:
        """The smallest of the windows whose relative bias is at most `delta`.

        Args:
            delta: above 0. Below 1 the truncated gradient leads downhill all the same. At 0.3 the
                windows were within a factor of two of what was needed on all tasks of
                `benchmarks/advice.md`.

        Returns:
            int32 scalar, as for `window_for`.

        Raises:
            ValueError: `delta` is not one number, above 0.
        """
        return self._smallest(self.relative <= checked_bound("delta", delta, math.inf, self.missed))

    def _smallest(self, enough: jax.Array) -> jax.Array:
        """The smallest window that is enough."""
        # Of equal values argmax takes the first.
        found = jnp.array(self.windows, jnp.int32)[jnp.argmax(enough, axis=-1)]
        return jnp.where(enough.any(axis=-1), found, NO_WINDOW)


def estimate_bias(
    step: StepFn,
    loss: Callable[..., Any],
    params: PyTree,
    carry: PyTree,
    xs: PyTree,
    *,
    window: PyTree,
) -> Bias:
    """Estimates how much of the expected gradient each window misses.

    With ĝ_K the gradient of one step's loss that a window of K gives, K = 1, 2, 4, … `window`,

        share(K) = ⟨E[ĝ_K], E[ĝ]⟩ / ‖E[ĝ]‖²        bias(K) = ‖E[ĝ - ĝ_K]‖ / ‖E[ĝ]‖

    where ĝ is that of the whole window, and E the mean over the data at fixed parameters. Of
    what the loss falls by a small step against E[ĝ], share(K) is left by a step against E[ĝ_K].
    `window_within(0.3)` of the result is a window to train with.

    It is not the norm of what single steps miss: at long lags that is mostly noise, which an
    optimiser averages out, and can ask for windows many times too long. So terms are added
    up over a run, and products of means are estimated by the inner products of the
    sums of independent runs, to which noise adds nothing. Every other step would not do for
    a second run: neighbours have all but one step of their windows in common. So take other
    streams of the batch, or stretches of one stream one after the other, much longer than the
    window.

    What there is to be seen depends on the parameters. Before training a gradient says nothing
    yet of what is far back, and once all is learned no gradient is left. So measure at several
    moments of a training run with the longest window that you can afford, and take the largest
    of the windows.

    Args:
        step: as for `record`.
        loss: `loss(y, x)` or `loss(y, x, params)` as for `learner`, to a scalar or to a pair
            `(scalar, aux)`. What it takes of params itself counts with lag 0.
        params: the parameters to look at.
        carry: what each run starts from, leaves (runs, *leaf.shape).
        xs: inputs of two independent runs or more, leaves (runs, steps, *x.shape). The first
            `window` steps of a run fill its tape, the others are measured.
        window: the longest window, as for `record`. Further back nothing is seen: a cause behind
            it counts as none.

    Returns:
        A `Bias`, with `window_for(share)` and `window_within(delta)`.

    Raises:
        ValueError: `xs` are not two runs or more, each longer than the window; `carry` has another
            number of runs; `loss` takes other arguments; or as for `record`.
        TypeError: `step` or `loss` returns something else than it should, as for `learner`.

    Cost:
        A step and `window` pullbacks of it for each step of each run, the runs one after
        the other, and (runs + 2) (log₂ window + 1) copies of the parameters. As with
        `lax.scan`, jit the call.

    References:
        Aicher, Foti & Fox, "Adaptively Truncating Backpropagation Through Time to Control
        Gradient Bias", UAI 2019, whose bound from norms `fit_decay` gives; a gradient whose
        relative bias stays below 1 converges.

    Examples:
        What a step writes is read five steps later, so a window needs six steps:

        >>> import jax.numpy as jnp, jaxbptt
        >>> step = lambda w, c, x: (jnp.append(w * x, c[:-1]), c[-1])
        >>> loss = lambda y, x: (y - 1) ** 2
        >>> xs = jnp.ones((2, 40))  # two runs of 40 steps
        >>> bias = jaxbptt.estimate_bias(step, loss, 0.5, jnp.zeros((2, 5)), xs, window=8)
        >>> print(bias, bias.window_within(0.3))
        Bias({1: 1, 2: 1, 4: 1, 8: 0}) 8
    """
    takes_params = _takes_params(loss)
    # Parameters stand still here, so that all modes agree and this one is the cheapest.
    rec = record(step, window=window, weights="current")
    params, carry = as_strong_arrays(params, "params"), as_strong_arrays(carry, "carry")
    xs, longest = as_strong_arrays(xs, "xs"), rec.windows.longest
    _check_inputs(carry, xs, longest)

    def terms_of(tape: Any, y: PyTree, x: PyTree) -> ByRange:
        def of(given: tuple[PyTree, PyTree]) -> Any:
            return loss(given[0], x, given[1]) if takes_params else loss(given[0], x)

        _, (ct_y, ct_params) = value_and_ct_y(of, (y, params if takes_params else None))
        terms = gradient_by_range(rec, params, tape, jax.tree.map(lambda v: v[None], ct_y))
        return _with_own_params(terms, ct_params) if takes_params else terms

    def of_run(run: tuple[PyTree, PyTree]) -> ByRange:
        carry, xs = run
        first = jax.tree.map(lambda v: v[0], xs)
        tape = rec.init(params, carry, first)

        def fill(tape: Any, x: PyTree) -> tuple[Any, None]:
            return rec(params, tape, x)[0], None

        def measure(state: Any, x: PyTree) -> tuple[Any, None]:
            tape, sums = state
            tape, y = rec(params, tape, x)
            return (tape, jax.tree.map(jnp.add, sums, terms_of(tape, y, x))), None

        # Before the tape is full a long window would miss terms that it is to be judged by.
        tape, _ = lax_scan(fill, tape, jax.tree.map(lambda v: v[:longest], xs))
        # What is added up has the shape of one step's terms, which are known only after a trace.
        like = jax.eval_shape(lambda tape: terms_of(tape, rec(params, tape, first)[1], first), tape)
        sums = jax.tree.map(lambda v: zeros(leaf_type(v)), like)
        rest = jax.tree.map(lambda v: v[longest:], xs)
        (_, sums), _ = lax_scan(measure, (tape, sums), rest)
        measured = len(jax.tree.leaves(rest)[0])
        return jax.tree.map(lambda v: v / measured, sums)

    # One run after the other: each holds a few copies of the parameters.
    return Bias.of(jax.lax.map(of_run, (carry, xs)))


def _takes_params(loss: Any) -> bool:
    """Whether the loss is `loss(y, x, params)`."""
    if not callable(loss):
        raise ValueError(
            "loss must be a function loss(y, x) -> scalar, or -> (scalar, aux), but got "
            f"{_errors.describe(loss)}. Pass it uncalled, e.g. lambda y, x: jnp.mean((y - x) ** 2)."
        )
    return takes_more(loss, "loss", ("y", "x"), ("y", "x", "params"))


def _with_own_params(terms: ByRange, ct_params: PyTree) -> ByRange:
    """The terms, with what the loss takes of the parameters itself at lag 0."""
    own = jax.tree.leaves(ct_params)
    # The terms have no leaves for integers among the parameters, of which the cotangent is float0.
    moving = [leaf for leaf in own if leaf.dtype != jax.dtypes.float0]
    leaves = jax.tree.leaves(terms.params)
    added = [leaf.at[0].add(ct.astype(leaf.dtype)) for leaf, ct in zip(leaves, moving, strict=True)]
    structure = jax.tree.structure(terms.params)
    return dataclasses.replace(terms, params=jax.tree.unflatten(structure, added))


def _products(ranges: jax.Array) -> jax.Array:
    """The real inner products of each two ranges, (..., ranges, ranges), of (..., ranges, size)."""
    # An accelerator would otherwise multiply float32 in fewer bits.
    found = jnp.einsum("...ik,...jk->...ij", ranges, jnp.conj(ranges), precision="highest")
    return jnp.real(found)


def _added(values: list[jax.Array]) -> jax.Array:
    """Their sum, in the widest of their dtypes."""
    dtype = max((v.dtype for v in values), key=lambda d: jnp.finfo(d).bits)
    return functools.reduce(jnp.add, [v.astype(dtype) for v in values])


def _check_inputs(carry: PyTree, xs: PyTree, window: int) -> None:
    """Refuses inputs that are not two runs or more, each longer than the window."""
    of_xs, of_carry = tree_flatten_with_path(xs)[0], tree_flatten_with_path(carry)[0]
    shapes = {leaf.shape[:2] for _, leaf in of_xs}
    runs, steps = (*min(shapes, default=()), 0, 0)[:2]
    if len(shapes) != 1 or runs < 2 or steps <= window:
        rows = [f"xs{keystr(p)}: {leaf_type(v)}" for p, v in of_xs] or ["xs: no leaves"]
        raise ValueError(
            "xs must be inputs of two independent runs or more, with axes (runs, steps) in front, "
            f"the same in all leaves, and more steps than the window, {window}, but got\n"
            f"{_errors.bullets(rows)}\nOf (steps, streams, ...) halves of the streams are two "
            "runs: jnp.stack(jnp.split(xs, 2, axis=1)); of one long stream (steps, ...) its "
            "stretches are: xs.reshape(2, -1, *xs.shape[1:])."
        )
    wrong = [f"carry{keystr(p)}: {leaf_type(v)}" for p, v in of_carry if v.shape[:1] != (runs,)]
    if wrong:
        raise ValueError(
            f"carry must be what each of the {runs} runs starts from, with an axis over the runs "
            f"in front, but got\n{_errors.bullets(wrong)}\nFor the same one in all: "
            f"jax.tree.map(lambda v: jnp.stack([v] * {runs}), carry)."
        )


def _check_runs(runs: Any) -> None:
    """Refuses what is not terms by range, of several runs."""
    if not isinstance(runs, ByRange):
        raise ValueError(
            "runs must be what gradient_by_range returned, summed over the steps of each run, but "
            f"got {_errors.describe(runs)}. For inputs at hand estimate_bias does it all."
        )
    n, leaves = len(runs.windows), tree_flatten_with_path(runs.params)[0]
    if not leaves:
        raise ValueError(
            "runs.params must have a leaf that a gradient flows through, but it has none. Pass "
            "what the step learns as params."
        )
    first = leaves[0][1].shape[:1]
    if first < (2,) or any(leaf.shape[:2] != (*first, n) for _, leaf in leaves):
        rows = [f"runs.params{keystr(path)}: {leaf_type(leaf)}" for path, leaf in leaves]
        raise ValueError(
            "runs must be stacked along a first axis, two or more of them, with axes (runs, "
            f"{n} ranges) in front of each leaf, but got\n{_errors.bullets(rows)}\nSum over the "
            "steps of a run, then stack the runs: jax.tree.map(lambda *v: jnp.stack(v), a, b)."
        )
