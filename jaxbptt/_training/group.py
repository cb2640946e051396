"""The gradient of a group of steps, full or cut short: what its cotangents send back."""

import jax

from jaxbptt._arrays import as_strong_arrays
from jaxbptt._closure.closure import combine, pick
from jaxbptt._training.optimizer import trainable
from jaxbptt._training.state import pending_rows
from jaxbptt._transforms.cotangents import given_ct_carry, with_float0
from jaxbptt._transforms.record import Recorder, closure_for
from jaxbptt._transforms.tape import Tape, x_struct
from jaxbptt._transforms.window_vjp import Arriving, Wanted, pull_window, tape_window
from jaxbptt._types import PyTree, type_of
from jaxbptt._windows import Reach


def pull_group(
    recorder: Recorder,
    params: PyTree,
    tape: Tape,
    ct_ys: list,
    steps: jax.Array | None,
    reach: Reach | None,
) -> PyTree:
    """Sends a group's cotangents back, for the `trainable` leaves of params.

    Args:
        recorder: what recorded the tape.
        params: the parameters, as `Recorder.pullback` takes them.
        tape: the tape, at the end of the group.
        ct_ys: ȳ of the group, a list over the differentiable leaves of y, each (rows, *y.shape),
            newest last, with zeros for steps before the group.
        steps: how many steps the group has, int32, where it may be fewer than `every`: then it
            reaches no further behind its first step than a full group. None for a full one.
        reach: how many lags of the window count; None for all.
    """
    params, x = as_strong_arrays(params, "params"), x_struct(tape)
    closure, tape = closure_for(recorder, params, tape, x)
    leaves, rows = jax.tree.leaves(params), pending_rows(tape)
    window = tape_window(closure, tape, leaves, closure.invariant(leaves), rows, steps, reach)
    # ȳ comes in the leaves that could have a gradient; those of them that no path reaches are not
    # followed, and drop out here.
    differentiable = tuple(
        v.differentiable for v in type_of(closure.layout.outputs.tree()[1]).leaves
    )
    of_y = combine(differentiable, ct_ys, [None] * (len(differentiable) - len(ct_ys)))
    lam = given_ct_carry(closure, tape.carry, None)
    arriving = Arriving(lam, pick(closure.layout.followed_y, of_y), rows)
    ct = pull_window(closure, window, arriving, Wanted(closed_over=False, xs=False))
    of_params = ct.weights[len(closure.kinds.closed_over) :]
    return trainable(with_float0(closure.layout.followed.params, of_params, params))
