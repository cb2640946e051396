"""One online update: a recorded step, the gradient of its group, and the optimiser's step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbptt._arrays import canonical
from jaxbptt._training import optimizer as _optimizer
from jaxbptt._training.loss import differentiable, judge
from jaxbptt._training.optimizer import Optimizer, trainable
from jaxbptt._training.state import LearnerState, Metrics, rows_of
from jaxbptt._transforms import tape as _tape
from jaxbptt._transforms.cotangents import with_float0
from jaxbptt._transforms.record import Recorder
from jaxbptt._transforms.tape import Tape
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
    tape, y = _recorded(rec, state.params, state.tape, x)
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

    outcome = learn() if pending is None else lax.cond(_tape.due(tape), learn, wait)
    params, opt_state, updated, sound = outcome
    if sound is not None:
        tape = _tape_if(sound, tape, state.tape.carry)
    new = LearnerState(params, opt_state, tape, state.step + 1, pending)
    return new, Metrics(value, aux, updated)


def _recorded(rec: Recorder, params: PyTree, tape: Tape, x: PyTree) -> tuple[Tape, PyTree]:
    """One recorded step, without the recorder's own rule for derivatives.

    That rule would give an outer derivative the truncated gradient, and nothing for the tape.
    """
    params = canonical(params, "params")
    closure, tape = rec._resume(params, tape, x)
    leaves = [jax.tree.leaves(tree) for tree in (params, tape.carry, x)]
    (carry, y, _), residuals, _ = closure.forward(*leaves)
    if rec.weights == "replayed":
        residuals = [*leaves[1], *leaves[2]]
    return _tape.push(tape, carry, residuals), y


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


def _tape_if(sound: jax.Array, tape: Tape, before: PyTree) -> Tape:
    """The tape, or one that begins again from the carry before its newest step.

    Only the counters are put back. Zeroing the ring as `clear` does would copy it at every
    step; what is in its slots is overwritten before it is read, pending cotangents too.
    """

    def kept(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(sound, new, old)

    nothing = jnp.zeros((), jnp.int32)
    return dataclasses.replace(
        tape,
        carry=jax.tree.map(kept, tape.carry, before),
        length=kept(tape.length, nothing),
        _head=kept(tape._head, nothing),
        _phase=kept(tape._phase, nothing),
    )


def _all_finite(tree: PyTree) -> jax.Array:
    """Whether there is no NaN and no infinity in the leaves that can have one."""
    leaves = jax.tree.leaves(trainable(tree))
    return jnp.all(jnp.array([True, *(jnp.all(jnp.isfinite(leaf)) for leaf in leaves)]))
