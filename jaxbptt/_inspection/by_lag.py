"""`gradient_by_lag`: what each step of a window adds to a gradient, and the λ it hands on."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbptt import _errors
from jaxbptt._arrays import as_strong_arrays, widened
from jaxbptt._closure.closure import Closure, combine
from jaxbptt._closure.pullbacks import Mask
from jaxbptt._transforms.cotangents import with_float0
from jaxbptt._transforms.record import Recorder, closure_for
from jaxbptt._transforms.tape import Tape, x_struct
from jaxbptt._transforms.window_vjp import Arriving, Window, by_lag, given_window, padded
from jaxbptt._types import PyTree


class ByLag(NamedTuple):
    """What `gradient_by_lag` returns: leaves with a first axis over the lags, lag 0 first.

    Norms are float arrays (window,), one for each leaf; with `full=True` there are arrays
    (window, *leaf.shape). Both are zero at lags for which nothing is recorded, or which a
    part's own window does not reach.

    Attributes:
        params: the contribution to each parameter's gradient; summed over the lags, these
            are the gradient.
        carry: λ as it leaves the step at this lag, the cotangent of the carry that entered it
            (dhnext in a hand-written backward pass). At the last lag that is reached it is
            `pullback`'s `ct.carry`.
        partial: always norms, of the sum of the contributions of lags 0 … k. That sum is the
            gradient of each parameter that a window of k+1 would have given (of no more than
            k+1 for any part). At lags for which nothing is recorded it stays as it is.
    """

    params: PyTree
    carry: PyTree
    partial: PyTree


def gradient_by_lag(
    recorder: Recorder,
    params: PyTree,
    tape: Tape,
    ct_ys: PyTree,
    ct_carry: PyTree = None,
    *,
    full: bool = False,
) -> ByLag:
    """Splits a gradient by lag, to show how far back credit really flows.

    The terms of the sum that `Recorder.pullback` gives, for k = 0 … window-1:

        θ̄_k = (∂c_{t-k}/∂θ)ᵀ λ_{t-k} + (∂y_{t-k}/∂θ)ᵀ ȳ_{t-k}     and     λ_{t-k-1}

    or their Euclidean norms, for which no more than one lag's terms are held at a time, and
    the norms of θ̄_0 + … + θ̄_k. `fit_decay` turns them into a rate and a window,
    `plot_by_lag` draws them.

    Args:
        recorder: what `record` returned.
        params: as for `pullback`.
        tape: as for `pullback`.
        ct_ys: as for `pullback`.
        ct_carry: as for `pullback`.
        full: whether to return the terms themselves: `window` copies of the parameters.

    Returns:
        `ByLag(params, carry, partial)`. For leaves that no gradient can flow through, norms
        are zeros (window,) of float32, terms are float0 arrays (window, *leaf.shape).

    Raises:
        ValueError: as for `pullback`.

    Cost:
        `window` pullbacks of the step, and two arrays of each parameter's size at a time: the
        lag's own term, and the sum so far. With `full=True` all `window` terms.

    References:
        Aicher, Foti & Fox, "Adaptively Truncating Backpropagation Through Time to Control
        Gradient Bias", UAI 2019: the decay of ‖λ‖ with the lag bounds the bias.

    Examples:
        >>> import jax.numpy as jnp, jaxbptt
        >>> rec = jaxbptt.record(lambda w, c, x: (w * c + x, w * c + x), window=3)
        >>> tape = rec.init(0.5, 0.0, 0.0)
        >>> for x in (1.0, 0.0, 0.0, 0.0):
        ...     tape, y = rec(0.5, tape, x)
        >>> jaxbptt.gradient_by_lag(rec, 0.5, tape, jnp.ones(1)).carry.tolist()
        [0.5, 0.25, 0.125]
    """
    closure, params, window, arriving = given_to_split(
        "gradient_by_lag", recorder, params, tape, ct_ys, ct_carry
    )
    # What is asked for as norms becomes so inside the loop, where one lag's are held at a time.
    found = by_lag(closure, window, arriving, (lambda v: v) if full else _norm, _norm)
    length = closure.layout.window
    unreached = length - window.steps
    terms, lams = ([padded(v, unreached) for v in vs] for vs in (found.params, found.carry))
    # Behind the last lag that is reached the sum of contributions doesn't fall back to zero.
    sums = [jnp.pad(v, (0, unreached), mode="edge") for v in found.sums]
    # Leaves that no gradient flows through are put back, as zeros or as float0.
    of_params, of_carry = closure.layout.followed.params, closure.layout.followed.carry
    partial = _norms(of_params, sums, params, length)
    if not full:
        return ByLag(
            _norms(of_params, terms, params, length),
            _norms(of_carry, lams, tape.carry, length),
            partial,
        )
    rows_of_all = (length,)
    return ByLag(
        with_float0(of_params, terms, params, rows_of_all),
        with_float0(of_carry, lams, tape.carry, rows_of_all),
        partial,
    )


class ToSplit(NamedTuple):
    """What a gradient is made of that is to be split by lag."""

    closure: Closure
    params: PyTree  # strong arrays
    window: Window
    arriving: Arriving


def given_to_split(
    name: str, recorder: Recorder, params: PyTree, tape: Tape, ct_ys: PyTree, ct_carry: PyTree
) -> ToSplit:
    """Checks what a function that splits a gradient by lag was given; a message calls it `name`."""
    if not isinstance(recorder, Recorder):
        raise _errors.not_a_recorder(recorder)
    _errors.is_tape(tape, Tape)
    if recorder.pace is not None:
        raise _errors.has_pace(name)
    params, x = as_strong_arrays(params, "params"), x_struct(tape)
    closure, tape = closure_for(recorder, params, tape, x)
    return ToSplit(closure, params, *given_window(closure, tape, params, ct_ys, ct_carry))


def _norms(mask: Mask, norms: list, primal: PyTree, window: int) -> PyTree:
    """Norms in the structure of `primal`; zeros where nothing can flow, so that all add up."""
    nothing = [jnp.zeros(window, jnp.float32)] * (len(mask) - len(norms))
    return jax.tree.unflatten(jax.tree.structure(primal), combine(mask, norms, nothing))


def _norm(value: jax.Array) -> jax.Array:
    """The Euclidean norm, in float32 at least."""
    # In half precision squares would overflow, and their sum lose digits.
    value = widened(jnp.abs(value))
    return jnp.sqrt(jnp.sum(value * value))
