"""`learner`: online training as a pair of pure functions, a recorded step and its optimiser."""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxbptt import _errors
from jaxbptt._arrays import as_strong_arrays
from jaxbptt._closure.closure import pick
from jaxbptt._closure.step import own_containers
from jaxbptt._compat import lax_scan
from jaxbptt._training import loss as _objective
from jaxbptt._training import optimizer as _optimizer
from jaxbptt._training import stream as _stream
from jaxbptt._training import update as _update
from jaxbptt._training.state import LearnerState, Metrics, Pending, check_state
from jaxbptt._transforms.record import Recorder, record
from jaxbptt._types import PyTree, StepFn, leaf_type, type_of


@dataclasses.dataclass(frozen=True)
class Learner:
    """Online training as pure functions; made by `learner`."""

    recorder: Recorder
    loss: Callable[[PyTree, PyTree], Any]
    optimizer: _optimizer.Optimizer
    on_nonfinite: str

    def init(self, params: PyTree, carry: PyTree, x: PyTree) -> LearnerState:
        """The state to start from, with nothing recorded.

        Args:
            params: the parameters to start from. They and `carry` are copied, so that the
                state can be donated.
            carry: the carry to start from.
            x: one input, arrays or `jax.ShapeDtypeStruct`s.

        Returns:
            A `LearnerState`. Under `jax.eval_shape` it allocates nothing, and `.tape.nbytes`
            tells the size of the ring.

        Raises:
            TypeError: the step doesn't return `(carry, y)` with the carry's type, or the
                loss not a floating-point scalar, alone or first in a pair.
            ValueError: `params` or `carry` is a tape, or a leaf isn't an array.
        """
        tape = self.recorder.init(params, carry, x)
        params = jax.tree.map(jnp.copy, as_strong_arrays(params, "params"))
        x = as_strong_arrays(x, "x", structs=True)
        _, y, loss, _ = jax.eval_shape(self._plainly, params, tape.carry, x)
        pending = None
        if self.recorder.every > 1:
            moving = pick(_objective.differentiable(y), type_of(y).leaves)
            pending = Pending.blank(tape, moving, leaf_type(loss))
        opt_state = _optimizer.start(self.optimizer, params)
        return LearnerState(params, opt_state, tape, jnp.zeros((), jnp.uint32), pending)

    def update(self, state: LearnerState, x: PyTree) -> tuple[LearnerState, Metrics]:
        """One time step: forward, backward where a group ends, and the optimiser's step.

        The body of a `lax.scan`; jit it with `donate_argnums=0`. A derivative *through* it, of
        either mode, is that of the whole computation and is not truncated: hypergradients, of
        what the optimiser or the loss closes over, are exact.

        Args:
            state: what `init` or the last update returned.
            x: one input, of the shape given to `init`.

        Returns:
            The new state, of the same type, and `Metrics`.

        Raises:
            TypeError: the loss or the optimiser returns something else than it must.
            ValueError: `state` is not a `LearnerState` of this learner, or `x`, or something
                put into the state, has other shapes than in `init`.

        Cost:
            One step and one slot written; where a group ends, `window` pullbacks of the step
            and one step of the optimiser.
        """
        check_state(state)
        x, clears = as_strong_arrays(x, "x"), self.on_nonfinite == "clear"
        return _update.update(self.recorder, self.loss, self.optimizer, clears, state, x)

    def clear(self, state: LearnerState, carry: PyTree = None) -> LearnerState:
        """Forgets the recorded steps and the pending cotangents; the next step starts a group.

        Args:
            state: the state. Its parameters, optimiser and step count stay.
            carry: a carry to go on from, of the type of the one on the tape. It is copied.
                None keeps the one on the tape.

        Returns:
            The state, as one that began here. In a compiled loop under `lax.cond` it may have
            the ring copied at each step; `on_nonfinite="clear"` does not.

        Raises:
            ValueError: `state` is not a `LearnerState`, or `carry` not of the carry's type.
        """
        check_state(state)
        tape = state.tape
        if carry is not None:
            tape = tape.replace(carry=carry)
            tape = tape.replace(carry=jax.tree.map(jnp.copy, tape.carry))
        pending = state.pending and state.pending.forgotten()
        return state._replace(tape=self.recorder.clear(tape), pending=pending)

    def evaluate(
        self, state: LearnerState, xs: PyTree, carry: PyTree = None
    ) -> tuple[PyTree, Metrics]:
        """Runs steps under the parameters as they are; nothing is recorded and nothing learned.

        Args:
            state: the state, which stays as it is.
            xs: inputs, leaves (steps, *x.shape).
            carry: the carry to start from; None for the one on the tape.

        Returns:
            The last carry, and `Metrics` with leaves (steps, ...). To be jitted, as `lax.scan`.
        """
        check_state(state)

        def one(carry: PyTree, x: PyTree) -> tuple[PyTree, Metrics]:
            carry, _, loss, aux = self._plainly(state.params, carry, x)
            return carry, Metrics(loss, aux, jnp.zeros((), bool))

        carry = state.tape.carry if carry is None else carry
        return lax_scan(one, as_strong_arrays(carry, "carry"), as_strong_arrays(xs, "xs"))

    def run(
        self,
        state: LearnerState,
        xs: Iterable[PyTree],
        *,
        block: int = 100,
        callback: Callable[[LearnerState, Metrics], Any] | None = None,
        progress: bool | str = False,
    ) -> LearnerState:
        """Trains on a stream that need not end, nor fit in memory.

        Inputs are stacked into blocks on the host; each block is one call of a compiled
        `lax.scan`, the state donated. While it runs the next one is read (where JAX
        dispatches asynchronously). Equal learners share what is compiled, and it goes with them.

        Args:
            state: the state to start from. It is donated: go on with what is returned.
            xs: an iterable of single inputs, one for each time step.
            block: how many steps run in one call; a last block may be shorter.
            callback: called after each block as `callback(state, metrics)`, with metrics of
                shape (steps, ...). What it keeps of the state it must copy, as a checkpoint
                does, for the next block writes over it. If it returns something true (as some
                libraries' save does) the run ends; inputs read ahead, at most a block, are
                then left out.
            progress: True, or a description, for a progress bar (needs tqdm).

        Returns:
            The state after the last step. Nothing else is kept, however long the stream.

        Raises:
            ImportError: there is no tqdm for the progress bar.
            ValueError: `state`, `xs` or `block` is something else, or an x is not of the type
                given to `init`.

        Note:
            Whatever ends a run before its time, an exception from xs, a fault in an x, or
            Ctrl-C, leaves the newest state behind: as `error.state`, with all inputs
            before a fault done, and after Ctrl-C with all blocks that were begun.
            `int(state.step)` is where to go on in the data.
        """
        check_state(state)
        return _stream.run(self._compiled.run_block, state, xs, block, callback, progress)

    @functools.cached_property
    def _compiled(self) -> "_Compiled":
        """What equal learners share, as long as there is one of them."""
        try:
            number = hash(self)
        except TypeError:  # a step, a loss or an optimiser need not be hashable
            return _Compiled(self)
        shared = _COMPILED.get(number)
        if shared is None or shared.learner != self:
            shared = _COMPILED[number] = _Compiled(self)
        return shared

    def _plainly(self, params: PyTree, carry: PyTree, x: PyTree) -> tuple:
        """(carry, y, loss, aux) of one step that is not recorded."""
        carry, y = self.recorder.step(*own_containers(params, carry, x))
        carry, y = (
            as_strong_arrays(carry, "carry", blame="step"),
            as_strong_arrays(y, "y", blame="step"),
        )
        return carry, y, *_objective.evaluate(self.loss, y, x)


class _Compiled:
    """The compiled runs of equal learners, held by these alone.

    In a cache of JAX's, with a learner for a key, they would keep all alive that its step closes
    over: a sweep would grow without end.
    """

    def __init__(self, learner: Learner):
        self.learner = learner
        update = learner.update
        self._run = jax.jit(
            lambda steps, state, xs: lax_scan(update, state, xs, length=steps),
            static_argnums=0,
            donate_argnums=1,
        )

    def run_block(
        self, steps: int, state: LearnerState, xs: PyTree
    ) -> tuple[LearnerState, Metrics]:
        """So many updates in one call; the state is donated."""
        return self._run(steps, state, xs)


_COMPILED: weakref.WeakValueDictionary[int, _Compiled] = weakref.WeakValueDictionary()


def learner(
    step: StepFn,
    loss: Callable[[PyTree, PyTree], Any],
    optimizer: _optimizer.Optimizer,
    *,
    window: PyTree,
    every: int = 1,
    weights: str = "stored",
    on_nonfinite: str = "pass",
) -> Learner:
    """Makes online training of a step function a pair of pure functions, `init` and `update`.

    At each time step t, with ȳ_t = ∂loss(y_t, x_t)/∂y_t,

        (c_t, y_t) = step(θ, c_{t-1}, x_t)
        θ̄ = what `Recorder.pullback` makes of the last m = every cotangents ȳ
        θ ← θ + optimizer.update(θ̄)                                    if m divides t

    so θ̄ is the gradient of the sum of a group's m losses, truncated as `record` says. For
    their mean divide the loss by m. Schedules and all that an optimiser counts count its own
    steps, not time steps.

    Args:
        step: `step(params, carry, x) -> (carry, y)`, one time step.
        loss: `loss(y, x)`, a floating-point scalar, or a pair `(scalar, aux)`. It takes
            its target from x, and parameters only by way of y.
        optimizer: an `optax.GradientTransformation`. It sees None for the leaves of params that
            no gradient can flow through, and the conjugate gradient of complex ones. If its
            update takes `value`, it gets the loss, summed over the group.
        window: how many steps a gradient reaches back; as in `record`.
        every: after how many steps there are a gradient and an update, m.
        weights: whose parameters the recorded steps are differentiated at. As in `record`:
            "stored", those of their time; "current" or "replayed", those of now.
        on_nonfinite: what follows on a NaN or an infinity in the loss, the new carry or the
            gradient. "pass": nothing. "clear": the step leaves its trace in the metrics alone.
            Parameters and optimiser stay, the carry goes back to what entered the step, and the
            recorded steps and pending cotangents are forgotten. (A carry from which no step
            is finite then stays; put in another with `Learner.clear`.)

    Returns:
        A `Learner`: hashable, and equal to one made of the same arguments.

    Raises:
        ValueError: `step` or `loss` is not a function, `optimizer` not an optimiser, or an
            option not one of its values.

    Cost:
        A tape, `window` slots. Between the ends of groups an update costs a forward step.

    Note:
        Optimisers that evaluate the loss again (line searches), or keep several copies
        of the parameters in params (`optax.lookahead`), have no place here. Under `vmap`
        map a whole run, `init` included: the ends of groups then stay branches.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxbptt
        >>> step = lambda w, c, x: (w * c + x, w * c + x)
        >>> loss = lambda y, x: (y - 2.0) ** 2
        >>> learner = jaxbptt.learner(step, loss, optax.sgd(0.1), window=20)
        >>> state = learner.init(0.1, 0.0, 0.0)
        >>> train = jax.jit(lambda state, xs: jax.lax.scan(learner.update, state, xs))
        >>> state, metrics = train(state, jnp.ones(100))
        >>> round(float(state.params), 3), int(state.step)  # w c + 1 is 2 at w = ½
        (0.5, 100)
    """
    rec = record(step, window=window, every=every, weights=weights)
    if not callable(loss):
        raise _objective.not_a_function(loss)
    _optimizer.check(optimizer)
    _errors.one_of("on_nonfinite", on_nonfinite, ("pass", "clear"))
    return Learner(rec, loss, optimizer, on_nonfinite)
