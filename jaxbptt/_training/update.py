"""One online update: a recorded step, the gradient of its group, and the optimiser's step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbptt._training import optimizer as _optimizer
from jaxbptt._training.loss import differentiable, judge
from jaxbptt._training.optimizer import Optimizer, trainable
from jaxbptt._training.state import LearnerState, Metrics, rows_of
from jaxbptt._transforms.cotangents import with_float0
from jaxbptt._transforms.record import Recorder, record_step
from jaxbptt._transforms.tape import Tape, is_due, keep_or_roll_back
from jaxbptt._types import PyTree


def update(
    rec: Recorder,
    loss: Callable[[PyTree, PyTree], Any],
    optimizer: Optimizer,
    clears: bool,
    state: LearnerState,
    x: PyTree,
) -> tuple[LearnerState, Metrics]:
    """One time step; see `Learner.update`. `clears`: what is not finite leaves no trace."""
    tape, y = record_step(rec, state.params, state.tape, x)
    value, aux, ct_y = judge(loss, y, x)
    sound = _all_finite((value, tape.carry)) if clears else None
    pending, ct_ys, total = None, [ct[None] for ct in ct_y], value
    if state.pending is not None:
        pending = state.pending.with_step(tape, ct_y, value)
        ct_ys, total = pending

    def learn() -> tuple:
        rows = with_float0(differentiable(y), ct_ys, y, (rows_of(tape),))
        grads = _gradient(rec, state.params, tape, rows)
        return _learned(optimizer, grads, state, total, sound)

    def wait() -> tuple:
        return state.params, state.opt_state, jnp.zeros((), bool), sound

    outcome = learn() if pending is None else lax.cond(is_due(tape), learn, wait)
    params, opt_state, updated, sound = outcome
    if sound is not None:
        tape = keep_or_roll_back(sound, tape, state.tape)
    new = LearnerState(params, opt_state, tape, state.step + 1, pending)
    return new, Metrics(value, aux, updated)


def _gradient(rec: Recorder, params: PyTree, tape: Tape, ct_ys: PyTree) -> PyTree:
    """The direction of steepest ascent, which is the conjugate where parameters are complex."""
    ct = trainable(rec.pullback(params, tape, ct_ys).params)
    return jax.tree.map(lambda v: jnp.conj(v) if jnp.iscomplexobj(v) else v, ct)


def _learned(
    optimizer: Optimizer, grads: PyTree, state: LearnerState, value: jax.Array, sound: Any
) -> tuple:
    """(params, opt_state, whether the optimiser was stepped, whether all is finite)."""

    def stepped() -> tuple:
        return _optimizer.advance(optimizer, grads, state.opt_state, state.params, value)

    if sound is None:
        return *stepped(), jnp.ones((), bool), None
    sound = sound & _all_finite(grads)
    return *lax.cond(sound, stepped, lambda: (state.params, state.opt_state)), sound, sound


def _all_finite(tree: PyTree) -> jax.Array:
    """Whether there is no NaN and no infinity in the leaves that can have one."""
    leaves = jax.tree.leaves(trainable(tree))
    return jnp.all(jnp.array([True, *(jnp.all(jnp.isfinite(leaf)) for leaf in leaves)]))
