"""`learner`: online training as a pair of pure functions, a recorded step and its optimiser."""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbptt import _errors
from jaxbptt._arrays import as_strong_arrays, widened
from jaxbptt._closure.step import own_containers
from jaxbptt._compat import lax_scan
from jaxbptt._signatures import name_of
from jaxbptt._training.group import pull_group
from jaxbptt._training.loss import (
    LossAndCtY,
    evaluate_loss,
    loss_and_ct_y,
    not_a_function,
    takes_params,
)
from jaxbptt._training.optimizer import (
    Optimizer,
    check_optimizer,
    init_opt_state,
    step_optimizer,
    trainable,
)
from jaxbptt._training.state import (
    LearnerState,
    Metrics,
    Pending,
    check_one_state,
    check_pending,
    check_returned_carry,
    check_same_dtypes,
    check_state,
    check_steps,
)
from jaxbptt._training.stream import RunBlock, run_stream
from jaxbptt._transforms.record import Recorder, advance_step, record, record_step
from jaxbptt._transforms.tape import (
    Tape,
    is_due,
    keep_or_roll_back,
    phase_of,
    settings_of,
    with_group_ended,
    x_struct,
)
from jaxbptt._types import PyTree, StepFn, is_one_leaf, leaf_type, type_of
from jaxbptt._windows import RandomReach, Reach, Windows


@dataclasses.dataclass(frozen=True)
class Learner:
    """Online training as pure functions; made by `learner`.

    Attributes:
        recorder: the `Recorder` of the step, which `checkpoints` and `gradient_by_lag` take.
        loss: `loss(y, x)` or `loss(y, x, params)`.
        optimizer: the optimiser.
        on_nonfinite: "pass" or "clear".
    """

    recorder: Recorder
    loss: Callable[..., Any]
    optimizer: Optimizer
    on_nonfinite: str

    def __repr__(self) -> str:
        rec = self.recorder
        functions = f"{name_of(rec.step)}, {name_of(self.loss)}, {rec.options}"
        return f"Learner({functions}, on_nonfinite={self.on_nonfinite!r})"

    def init(self, params: PyTree, carry: PyTree, x: PyTree) -> LearnerState:
        """Makes the state to start from, with nothing recorded.

        Args:
            params: the parameters to start from. They and `carry` are copied, so that the
                state can be donated.
            carry: the carry to start from.
            x: one input, arrays or `jax.ShapeDtypeStruct`s.

        Returns:
            A `LearnerState`. Under `jax.eval_shape` nothing is allocated, and `.tape.nbytes`
            is the size of the ring.

        Raises:
            TypeError: the step doesn't return `(carry, y)` with the carry's type, or the
                loss not a floating-point scalar, alone or first in a pair.
            ValueError: `params` or `carry` is a tape, or a leaf isn't an array.
        """
        tape = self.recorder.init(params, carry, x)
        params = jax.tree.map(jnp.copy, as_strong_arrays(params, "params"))
        x = as_strong_arrays(x, "x", structs=True)
        pending = self._empty_pending(params, tape, x)
        opt_state = init_opt_state(self.optimizer, params)
        return LearnerState(params, opt_state, tape, jnp.zeros((), jnp.uint32), pending)

    def update(
        self,
        state: LearnerState,
        x: PyTree,
        *,
        ends: Any = None,
        reach: int | jax.Array | RandomReach | None = None,
    ) -> tuple[LearnerState, Metrics]:
        """Takes one time step: forward, and where a group ends backward and the optimiser's step.

        It is the body of a `lax.scan`; jit it with `donate_argnums=0`. Derivatives *through* it,
        of either mode, are those of the whole computation and are not truncated: hypergradients
        with respect to what the optimiser or the loss closes over are exact.

        Args:
            state: what `init` or the last update returned.
            x: one input, of the shape given to `init`.
            reach: how many lags the cotangents of this update go back, as in a call of a
                recorder: as if the window were that long; None for the window. Not with a pace.
            ends: bool scalar, traced or not: whether the group ends at this step, however many
                it has, `every` at most. The optimiser is then stepped on the group so far,
                which reaches no further behind its first step than a full group, and the next
                step begins a new one. The recorded steps stay. None where only `every` counts.

        Returns:
            The new state, of the same type, and `Metrics`.

        Raises:
            TypeError: the loss doesn't return a scalar; or the optimiser doesn't return changes
                of the gradient's structure and a state of its old type.
            ValueError: `state` is not a `LearnerState` of this learner; or `x`, or something
                put into the state, has other shapes than in `init`; or `ends` is no bool scalar.

        Cost:
            One step, and one slot of the ring written. Where a group ends, also `window`
            pullbacks of the step and one step of the optimiser.
        """
        check_state(state)
        x, ends = as_strong_arrays(x, "x"), _checked_flag(ends)
        params = as_strong_arrays(state.params, "params")
        if self.recorder.pace is not None:
            return self._update_with_pace(state, params, x, ends, reach)
        back = Reach.of(reach, settings_of(state.tape).window)
        # Forward: the step, its loss, and the cotangent ȳ that the loss gives of y.
        tape, y = record_step(self.recorder, params, state.tape, x)
        loss, aux, ct_y, ct_params = loss_and_ct_y(self.loss, y, x, params)
        check_pending(state.pending, self._pending_like(tape, ct_y, loss, ct_params))
        # Under "pass" nobody asks, and no test for NaNs is compiled.
        finite = _all_finite((loss, tape.carry)) if self.on_nonfinite == "clear" else None

        # The group's cotangents gather until it ends. At every=1 each step is a group of its
        # own, and nothing has to wait.
        if state.pending is None:
            group = Pending([ct[None] for ct in ct_y], loss, ct_params)
            grads = self._gradient(params, tape, group, back, full=True)
            pending, new = None, self._apply_gradient(grads, state, loss, finite)
        else:
            pending = state.pending.with_step(tape, ct_y, loss, ct_params)
            due = is_due(tape) if ends is None else is_due(tape) | ends
            new = self._end_group(state, tape, pending, due, finite, back, full=ends is None)
            # The next step then begins a group, as after a full one.
            tape = tape if ends is None else with_group_ended(tape, due)
        # The loss and the metrics stay as they are: they tell of the step that was rolled back.
        if new.finite is not None:
            tape = keep_or_roll_back(new.finite, tape, state.tape)
        new_state = LearnerState(new.params, new.opt_state, tape, state.step + 1, pending)
        return new_state, Metrics(loss, aux, new.updated)

    def flush(self, state: LearnerState) -> LearnerState:
        """Steps the optimiser on a group that is not full; the next step begins a new one.

        Without it the losses of a last group, such as before `clear`, never give a gradient
        if the run doesn't end with a full group. The gradient is that of `update` with `ends`:
        the group reaches no further behind its first step than a full one.

        Args:
            state: the state.

        Returns:
            A state with the same recorded steps and the same step count. Where no loss is
            pending (right after a group's end, and always at `every=1`) nothing changes.
            With `on_nonfinite="clear"`, a gradient that isn't finite is not applied, and the
            recorded steps are cleared.

        Raises:
            TypeError: the optimiser doesn't return what it should, as for `update`.
            ValueError: `state` is not a `LearnerState` of this learner.

        Cost:
            As the end of a group: `window` pullbacks of the step, and one of the optimiser.
        """
        check_state(state)
        tape, pending = state.tape, state.pending
        if pending is None:
            return state
        check_pending(
            pending, jax.eval_shape(self._empty_pending, state.params, tape, x_struct(tape))
        )
        # A full group has had its update, and its cotangents only lie there until they are written
        # over.
        waiting = (phase_of(tape) > 0) & ~is_due(tape)
        finite = jnp.ones((), bool) if self.on_nonfinite == "clear" else None
        new = self._end_group(state, tape, pending, waiting, finite, full=False)
        tape = with_group_ended(tape, waiting)
        if new.finite is not None:
            tape = keep_or_roll_back(new.finite, tape, state.tape)
        return state._replace(params=new.params, opt_state=new.opt_state, tape=tape)

    def with_window(
        self, state: LearnerState, window: PyTree, *, every: int | None = None
    ) -> tuple["Learner", LearnerState]:
        """Goes on with another window: a learner that has it, and a state for that learner.

        Parameters, the optimiser and its state, the carry and the step count go on. A tape has
        the size of its window, so the new one starts empty, and a group with it; `flush` first
        where the losses that are pending should count.

        Args:
            state: the state; it stays usable until the new one, which shares its parameters and
                the optimiser's state, is donated.
            window: as in `learner`.
            every: as in `learner`; None for the one there is. A pace goes on too, as far as the
                new window allows.

        Returns:
            `(learner, state)`.

        Raises:
            ValueError: `state` is not a `LearnerState`, or `window` or `every` is not what
                `learner` takes.
        """
        check_state(state)
        rec, tape = self.recorder, state.tape
        every = rec.every if every is None else every
        pace = rec.pace and min(rec.pace, Windows.of(window).longest)
        # A pace can't be longer than the window.
        new = record(rec.step, window=window, every=every, weights=rec.weights, pace=pace)
        changed = dataclasses.replace(self, recorder=new)
        x, params = x_struct(tape), as_strong_arrays(state.params, "params")
        tape = new.init(params, tape.carry, x)
        return changed, state._replace(tape=tape, pending=changed._empty_pending(params, tape, x))

    def clear(self, state: LearnerState, carry: PyTree = None) -> LearnerState:
        """Forgets the recorded steps and the pending cotangents; the next step starts a group.

        Losses of a group that is not full are forgotten too: `flush` first makes them count.

        Args:
            state: the state. Its parameters, optimiser and step count stay.
            carry: a carry to go on from, of the type of the one on the tape. It is copied.
                None keeps the one on the tape.

        Returns:
            A state as if training began here.

        Cost:
            The ring is zeroed. Under `lax.cond` in a compiled loop that may copy the ring at
            each step; `on_nonfinite="clear"` does not.

        Raises:
            ValueError: `state` is not a `LearnerState`, or `carry` not of the carry's type.
        """
        check_state(state)
        tape = state.tape
        if carry is not None:
            # The first checks the type. The copy lets the state be donated, and the caller's
            # carry survive.
            tape = tape.replace(carry=carry)
            tape = tape.replace(carry=jax.tree.map(jnp.copy, tape.carry))
        pending = state.pending and state.pending.cleared()
        return state._replace(tape=self.recorder.clear(tape), pending=pending)

    def evaluate(
        self, state: LearnerState, xs: PyTree, carry: PyTree = None
    ) -> tuple[PyTree, Metrics]:
        """Runs steps under fixed parameters, without recording and without learning.

        Args:
            state: the state; it is not changed.
            xs: inputs, leaves (steps, *x.shape).
            carry: the carry to start from; None for the one on the tape.

        Returns:
            The last carry, and `Metrics` with leaves (steps, ...).

        Raises:
            ValueError: `state` is not a `LearnerState`, a leaf isn't an array, `xs` has no axis
                over steps, or `carry` is not of the containers and dtypes of the one on the tape.

        Cost:
            One step for each input. As with `lax.scan`, jit the call.
        """
        check_state(state)

        # The step itself and not the recorder: nothing is written to a ring that nobody reads.
        def body(carry: PyTree, x: PyTree) -> tuple[PyTree, Metrics]:
            out = self._step_unrecorded(state.params, carry, x)
            return out.carry, Metrics(out.loss, out.aux, jnp.zeros((), bool))

        carry = as_strong_arrays(state.tape.carry if carry is None else carry, "carry")
        xs = as_strong_arrays(xs, "xs")
        check_same_dtypes(carry, state.tape.carry)
        check_steps(xs)
        return lax_scan(body, carry, xs)

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

        Inputs are stacked into blocks on the host. Each block is one call of a compiled
        `lax.scan`, to which the state is donated. Where JAX dispatches asynchronously the next
        block is read while one runs. Equal learners share what is compiled, and it is freed
        with the last of them.

        Args:
            state: the state to start from. It is donated: go on with what is returned.
            xs: an iterable of single inputs, one for each time step.
            block: how many steps run in one call; a last block may be shorter.
            callback: called after each block as `callback(state, metrics)`, with metrics of
                shape (steps, ...). The next block overwrites the state, so the callback must
                copy what it keeps of it, as a checkpoint does. If it returns something true
                (as some libraries' save does) the run ends; inputs read ahead, at most a
                block, are then left out.
            progress: True, or a description, for a progress bar (needs tqdm).

        Returns:
            The state after the last step. Nothing else is kept, however long the stream.

        Raises:
            ImportError: a progress bar is asked for, and tqdm is not installed.
            ValueError: `state` is not a `LearnerState`, `xs` not iterable, `block` not an int
                of at least 1, `callback` not a function, or `progress` neither a bool nor a
                str; or an x is not of the type given to `init`.

        Note:
            Whatever ends a run early (an exception from xs or from the callback, a fault in
            an x, Ctrl-C) carries the newest state as `error.state`. All inputs before a fault
            have then been trained on, and after Ctrl-C all blocks that were dispatched.
            `int(state.step)` is the position in the data to go on from. Only a block that
            itself raises (out of memory, `jax_debug_nans`) takes the state with it.

        Cost:
            Beside the updates, one state in memory and at most two blocks of inputs.
        """
        check_state(state)
        check_one_state(state)
        return run_stream(self._compiled.for_block, state, xs, block, callback, progress)

    @functools.cached_property
    def _compiled(self) -> "_Compiled":
        """The compiled loop that equal learners share, as long as there is one of them."""
        try:
            # Looked up by hash and compared afterwards: two learners may have the same hash.
            number = hash((self, self.recorder.step))
        except TypeError:  # steps, losses and optimisers need not be hashable
            return _Compiled(self)
        shared = _COMPILED.get(number)
        if shared is None or shared.learner != self:
            shared = _COMPILED[number] = _Compiled(self)
        return shared

    def _step_unrecorded(self, params: PyTree, carry: PyTree, x: PyTree) -> "_Unrecorded":
        """Runs the step and its loss without a tape."""
        new_carry, y = self.recorder.step(*own_containers(params, carry, x))
        new_carry = as_strong_arrays(new_carry, "carry", blame="step")
        check_returned_carry(carry, new_carry)
        y = as_strong_arrays(y, "y", blame="step")
        return _Unrecorded(new_carry, y, *evaluate_loss(self.loss, y, x, params))

    def _empty_pending(self, params: PyTree, tape: Tape, x: PyTree) -> Pending | None:
        """Room for a group's cotangents. Traces the step and its loss, to check them too."""
        out = jax.eval_shape(self._step_unrecorded, params, tape.carry, x)
        if self.recorder.every == 1:
            return None
        ct_y, ct_params = (
            [leaf for leaf in type_of(tree).leaves if leaf.differentiable]
            for tree in (out.y, params if takes_params(self.loss) else None)
        )
        return Pending.empty(tape, ct_y, leaf_type(out.loss), ct_params)

    def _pending_like(self, tape: Tape, ct_y: list, loss: jax.Array, ct_params: list) -> Any:
        """The types of pending cotangents, from those of a step."""
        if self.recorder.every == 1:
            return None
        kinds = [*map(leaf_type, ct_y)], leaf_type(loss), [*map(leaf_type, ct_params)]
        return jax.eval_shape(lambda: Pending.empty(tape, *kinds))

    def _end_group(
        self,
        state: LearnerState,
        tape: Tape,
        pending: Pending,
        due: jax.Array,
        finite: jax.Array | None,
        reach: Reach | None = None,
        *,
        full: bool,
    ) -> "_Updated":
        """Steps the optimiser on a group where it is due.

        Args:
            state: the state before, whose parameters and optimiser go on.
            tape: the tape, at the end of the group where it is due.
            pending: the cotangents of the group.
            due: bool scalar, whether the group ends here.
            finite: whether no NaN or infinity was met so far; None where nobody asks.
            reach: how many lags of the window count; None for all.
            full: whether a group that ends is known to have `every` steps.
        """

        # In a branch: within a group, backward and the optimiser's step cost nothing.
        def update_now() -> _Updated:
            grads = self._gradient(state.params, tape, pending, reach, full=full)
            return self._apply_gradient(grads, state, pending.loss, finite)

        def skip() -> _Updated:
            return _Updated(state.params, state.opt_state, jnp.zeros((), bool), finite)

        return lax.cond(due, update_now, skip)

    def _update_with_pace(
        self, state: LearnerState, params: PyTree, x: PyTree, ends: Any, reach: Any
    ) -> tuple[LearnerState, Metrics]:
        """An update that takes every cotangent in flight further, and none through the window."""
        for name, value in (("ends", ends), ("reach", reach)):
            if value is not None:
                raise _errors.has_pace(name)

        def judge(y: PyTree) -> tuple[LossAndCtY, list]:
            judged = loss_and_ct_y(self.loss, y, x, params)
            return judged, judged.ct_y

        made = advance_step(self.recorder, params, state.tape, x, judge)
        loss, aux, _, ct_params = made.judged
        finite = None
        if self.on_nonfinite == "clear":
            finite = _all_finite((loss, made.tape.carry))
        # What the loss itself adds by its params belongs to this step, and does not wait.
        grads = _ascent(trainable(made.grads), ct_params)
        new = self._apply_gradient(grads, state, loss, finite)
        tape = made.tape
        if new.finite is not None:
            tape = keep_or_roll_back(new.finite, tape, state.tape)
        new_state = LearnerState(new.params, new.opt_state, tape, state.step + 1, None)
        return new_state, Metrics(loss, aux, new.updated)

    def _gradient(
        self,
        params: PyTree,
        tape: Tape,
        group: Pending,
        reach: Reach | None = None,
        *,
        full: bool,
    ) -> PyTree:
        """The direction of steepest ascent of the loss of a group, for `trainable` leaves.

        Args:
            params: the parameters.
            tape: the tape, at the end of the group.
            group: the group's cotangents.
            reach: how many lags of the window count; None for all.
            full: whether it is known to have `every` steps.
        """
        ct_ys = group.newest_last(tape, full=full)
        # A group that may be short is masked by its number of steps; of a full one that is not
        # needed.
        steps = None if full else phase_of(tape)
        return _ascent(
            pull_group(self.recorder, params, tape, ct_ys, steps, reach), group.ct_params
        )

    def _apply_gradient(
        self, grads: PyTree, state: LearnerState, loss: jax.Array, finite: jax.Array | None
    ) -> "_Updated":
        """Steps the optimiser; where `finite` is a flag, only if that and the gradient allow it."""

        def step() -> tuple[PyTree, PyTree]:
            return step_optimizer(self.optimizer, grads, state.opt_state, state.params, loss)

        if finite is None:
            params, opt_state = step()
            return _Updated(params, opt_state, jnp.ones((), bool), None)
        # The gradient too: a finite loss can have an infinite derivative.
        finite = finite & _all_finite(grads)
        params, opt_state = lax.cond(finite, step, lambda: (state.params, state.opt_state))
        return _Updated(params, opt_state, finite, finite)


class _Unrecorded(NamedTuple):
    """What a step gives that is not recorded: arrays, or their structs."""

    carry: PyTree
    y: PyTree
    loss: jax.Array
    aux: PyTree


class _Updated(NamedTuple):
    """What an update leaves.

    Attributes:
        params: the parameters.
        opt_state: the optimiser's state.
        updated: bool scalar, whether the optimiser was stepped.
        finite: bool scalar, whether no NaN or infinity was met; None where nobody asked.
    """

    params: PyTree
    opt_state: PyTree
    updated: jax.Array
    finite: jax.Array | None


def _ascent(ct: PyTree, ct_params: list) -> PyTree:
    """The direction of steepest ascent, of a cotangent and what the loss itself adds to it."""
    if ct_params:
        # Half precisions are added in float32 and rounded once.
        leaves, treedef = jax.tree.flatten(ct)
        pairs = zip(leaves, ct_params, strict=True)
        sums = [(widened(a) + widened(b)).astype(a.dtype) for a, b in pairs]
        ct = jax.tree.unflatten(treedef, sums)
    # Where parameters are complex, a cotangent is the conjugate of that direction.
    return jax.tree.map(lambda v: jnp.conj(v) if jnp.iscomplexobj(v) else v, ct)


def _checked_flag(ends: Any) -> jax.Array | None:
    """The flag as an array, or a refusal."""
    if ends is None:
        return None
    flag = as_strong_arrays(ends, "ends") if is_one_leaf(ends) else None
    if flag is None or flag.shape or flag.dtype != jnp.bool:
        raise ValueError(
            "ends must be a bool scalar, True where the group ends at this step, but got "
            f"{_errors.describe(ends)}. All sequences of a batch share a group: of several flags "
            "take jnp.any(flags) or jnp.all(flags)."
        )
    return flag


def _all_finite(tree: PyTree) -> jax.Array:
    """Whether no floating or complex leaf has a NaN or an infinity."""
    leaves = jax.tree.leaves(trainable(tree))
    return jnp.all(jnp.array([True, *(jnp.all(jnp.isfinite(leaf)) for leaf in leaves)]))


class _Compiled:
    """The compiled loop of equal learners, referred to by these alone.

    In a cache of JAX's with learners as keys, it would keep alive all that their steps close
    over, and the memory of a sweep over learners would grow without end.
    """

    def __init__(self, learner: Learner):
        self.learner = learner
        update = learner.update
        self._loop = jax.jit(
            lambda steps, state, xs: lax_scan(update, state, xs, length=steps),
            static_argnums=0,
            donate_argnums=1,
        )
        self._lengths: set[int] = set()  # that it has been compiled for

    def for_block(self, steps: int, state: LearnerState, xs: PyTree) -> RunBlock:
        """Compiles the loop over so many steps, and returns a function that runs it."""
        jit_disabled = jax.config.jax_disable_jit  # type: ignore[attr-defined]
        if steps not in self._lengths and not jit_disabled:
            # jit keeps what is compiled here, and the call finds it.
            self._loop.lower(steps, state, xs).compile()
            self._lengths.add(steps)
        return functools.partial(self._loop, steps)


_COMPILED: weakref.WeakValueDictionary[int, _Compiled] = weakref.WeakValueDictionary()


def learner(
    step: StepFn,
    loss: Callable[..., Any],
    optimizer: Optimizer,
    *,
    window: PyTree,
    every: int = 1,
    weights: str = "stored",
    on_nonfinite: str = "pass",
    pace: int | None = None,
) -> Learner:
    """Makes online training of a step function a pair of pure functions, `init` and `update`.

    At each time step t, with ȳ_t = ∂loss(y_t, x_t)/∂y_t,

        (c_t, y_t) = step(θ, c_{t-1}, x_t)
        θ̄ = what `Recorder.pullback` makes of the last m = every cotangents ȳ
        θ ← θ + optimizer.update(θ̄)                                    if m divides t

    so θ̄ is the gradient of the sum of a group's m losses, truncated as `record` says. For
    their mean, divide the loss by m. Schedules, and whatever else an optimiser counts, count
    the optimiser's steps and not time steps.

    Args:
        step: `step(params, carry, x) -> (carry, y)`, one time step.
        loss: `loss(y, x)`, a floating-point scalar, or a pair `(scalar, aux)`. It takes
            its target from x. Or `loss(y, x, params)`, such as for weight decay: its gradient
            by the params that it is given adds to θ̄, for all m losses of a group, those too
            whose outputs the window doesn't reach. It is given params if it can't be called
            without, as its signature says: a loss with a default for its third argument, or
            with `*args`, is called as `loss(y, x)`.
        optimizer: an `optax.GradientTransformation`, or another pair of `init` and `update`.
            For the leaves of params that no gradient flows through it is given None, and for
            complex ones the conjugate of what `jax.grad` gives, which points uphill. If its
            update takes `value`, it is given the loss, summed over the group.
        window: how many steps a gradient reaches back; as in `record`.
        every: after how many steps there are a gradient and an update, m. Groups run on
            across resets, and until they are full; `update(..., ends=flag)` ends one where the
            data say so, and `flush` where a run is over.
        weights: at which parameters the recorded steps are differentiated, as in `record`:
            "stored", those that each step was recorded under; "current" or "replayed", the
            newest.
        pace: None, or how many lags each update takes every cotangent in flight further, as in
            `record`: then θ̄ of an update is made of the losses of the last ceil(window / pace)
            steps, each at the lags that are due. `every` is 1 then.
        on_nonfinite: what happens at a NaN or an infinity in the loss, the new carry or the
            gradient. "pass": nothing. "clear": only the metrics and the step count show that
            the step happened. Parameters and optimiser stay, the carry goes back to what
            entered the step, and recorded steps and pending cotangents are cleared. (If no
            step from that carry is finite, every step is cleared; `Learner.clear` takes
            another carry.)

    Returns:
        A `Learner`, hashable, and equal to one made of the same arguments.

    Raises:
        ValueError: `step` or `loss` is not a function, or `loss` takes other arguments,
            `optimizer` has no `init` and `update`, or an option is not one of its values.

    Cost:
        Memory: a tape of `window` slots. Time: an update within a group costs a forward step;
        one that ends a group also costs `window` pullbacks and a step of the optimiser.

    Note:
        Optimisers that evaluate the loss again (line searches), or that keep several copies
        of the parameters in params (`optax.lookahead`), don't work here. `vmap` a whole run,
        `init` included, and not single updates: the ends of groups then stay branches.

    Examples:
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
    rec = record(step, window=window, every=every, weights=weights, pace=pace)
    if not callable(loss):
        raise not_a_function(loss)
    takes_params(loss)  # refuses one that takes other arguments
    check_optimizer(optimizer)
    _errors.one_of("on_nonfinite", on_nonfinite, ("pass", "clear"))
    return Learner(rec, loss, optimizer, on_nonfinite)
