"""`gradient_by_range`: a gradient's terms summed over ranges of lags that double in length."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxbptt._closure.closure import combine
from jaxbptt._inspection.by_lag import given_to_split
from jaxbptt._transforms.record import Recorder
from jaxbptt._transforms.tape import Tape
from jaxbptt._transforms.window_vjp import by_range
from jaxbptt._types import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByRange:
    """What `gradient_by_range` returns: a pytree that can be added up over steps.

    Attributes:
        params: what each range of lags adds to each parameter's gradient, leaves
            (ranges, *leaf.shape), half precisions in float32, None for leaves that no gradient
            can flow through; summed over the ranges, these are the gradient.
        windows: the windows that end with a range, static: 1, 2, 4, … and the tape's window last.
            A window has the ranges up to its own: of windows 1, 2, 4, 8 the ranges are lag 0,
            lag 1, lags 2 to 3, and lags 4 to 7.
    """

    params: PyTree
    windows: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        return f"ByRange(windows={self.windows})"


def gradient_by_range(
    recorder: Recorder,
    params: PyTree,
    tape: Tape,
    ct_ys: PyTree,
    ct_carry: PyTree = None,
) -> ByRange:
    """Splits a gradient into ranges of lags: 0, 1, 2 to 3, 4 to 7, and so on up to the window.

    The sums of the terms that `gradient_by_lag` tells of, over the lags of each range. As there are
    few ranges, the terms themselves can be added up over many steps and not their norms alone,
    and in the sum the noise of single steps averages out: `Bias.of` takes such sums, of two
    independent runs or more, and says how biased each window is. `estimate_bias` does it
    all where the inputs are at hand.

    Args:
        recorder: what `record` returned.
        params: as for `pullback`.
        tape: as for `pullback`.
        ct_ys: as for `pullback`.
        ct_carry: as for `pullback`.

    Returns:
        `ByRange(params, windows)`; `jax.tree.map(jnp.add, a, b)` adds two of them. Zero in ranges
        for which nothing is recorded. With a window for each part of the carry the ranges are
        those of the longest.

    Raises:
        ValueError: as for `pullback`.

    Cost:
        `window` pullbacks of the step, and ceil(log₂ window) + 1 copies of the parameters.

    Examples:
        >>> import jax.numpy as jnp, jaxbptt
        >>> rec = jaxbptt.record(lambda w, c, x: (w * c + x, w * c + x), window=4)
        >>> tape = rec.init(0.5, 0.0, 0.0)
        >>> for x in (1.0, 1.0, 1.0, 1.0, 1.0):
        ...     tape, y = rec(0.5, tape, x)
        >>> found = jaxbptt.gradient_by_range(rec, 0.5, tape, jnp.ones(1))
        >>> print(found.windows, found.params)  # c_4, then w c_3, then w² c_2 + w³ c_1
        (1, 2, 4) [1.875 0.875 0.5  ]
    """
    closure, params, window, arriving = given_to_split(
        "gradient_by_range", recorder, params, tape, ct_ys, ct_carry
    )
    windows = _doubling_up_to(closure.layout.window)
    # Summed in one walk over the lags, which is cut at the end of each range.
    of_ranges = by_range(closure, window, arriving, windows)
    stacked = [jnp.stack(leaves) for leaves in zip(*of_ranges, strict=True)]
    mask = closure.layout.followed.params
    leaves = combine(mask, stacked, [None] * (len(mask) - len(stacked)))
    return ByRange(jax.tree.unflatten(jax.tree.structure(params), leaves), windows)


def _doubling_up_to(window: int) -> tuple[int, ...]:
    """1, 2, 4, … below the window, and the window."""
    return (*(2**i for i in range((window - 1).bit_length())), window)
