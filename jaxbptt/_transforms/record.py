"""`record`: a step function whose reverse mode reaches back through a window of recorded steps."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbptt import _errors
from jaxbptt._arrays import Packing, as_strong_arrays, size_in_bytes, zeros
from jaxbptt._closure.closure import Closure, Sources, pick, trace
from jaxbptt._closure.constants import changed_constants
from jaxbptt._closure.program_hash import program_hash
from jaxbptt._closure.pullbacks import Mask
from jaxbptt._jaxprs.named_axes import as_mapped, axes_in_sight, with_rule
from jaxbptt._signatures import name_of
from jaxbptt._transforms.cotangents import (
    Cotangents,
    is_scalar,
    is_symbolic_zero,
    primal_values,
    refuse_what_is_not_followed,
    value_and_ct_y,
    with_float0,
    with_none,
    without_symbolic,
)
from jaxbptt._transforms.pace import Given, call_with_pace, finish, move_chains
from jaxbptt._transforms.tape import (
    Settings,
    Tape,
    blank,
    check_counters,
    cleared,
    is_blank,
    is_due,
    layout,
    push,
    settings_of,
    x_struct,
)
from jaxbptt._transforms.window_vjp import (
    Arriving,
    Wanted,
    given_window,
    padded,
    pull_newest_x,
    pull_window,
    tape_window,
)
from jaxbptt._types import LeafType, PyTree, StepFn, leaf_type, type_of
from jaxbptt._windows import RandomReach, Reach, Windows

_LARGE = 2**30  # bytes of a ring from which on it is looked at what they are


@dataclasses.dataclass(frozen=True)
class Recorder:
    """A step function that records; made by `record`.

    Calling it runs one step. Reverse-mode differentiation of the call is the
    window-composed VJP.
    """

    step: StepFn
    windows: Windows
    every: int
    weights: str
    has_aux: bool
    pace: int | None = None

    def __hash__(self) -> int:
        # So that jit takes a recorder whose step can't be hashed: as it takes any function.
        try:
            step = hash(self.step)
        except TypeError:
            step = id(self.step)
        return hash((step, self.windows, self.every, self.weights, self.has_aux, self.pace))

    def __repr__(self) -> str:
        aux = ", has_aux=True" if self.has_aux else ""
        return f"Recorder({name_of(self.step)}, {self.options}{aux})"

    @property
    def options(self) -> str:
        """Its options as they would be written, on one line."""
        pace = "" if self.pace is None else f", pace={self.pace}"
        return f"window={self.window!r}, every={self.every}, weights={self.weights!r}{pace}"

    @property
    def window(self) -> PyTree:
        """How many steps a cotangent reaches back, as it was given."""
        return self.windows.tree()

    def init(self, params: PyTree, carry: PyTree, x: PyTree) -> Tape:
        """A tape with nothing recorded yet.

        Args:
            params: parameters of the step (their shapes and dtypes count).
            carry: the carry to start from. It is copied, so that the tape can be donated.
            x: one input, arrays or `jax.ShapeDtypeStruct`s.

        Returns:
            A `Tape`. Under `jax.eval_shape` it allocates nothing and its `nbytes` tells the
            size of the ring.

        Raises:
            TypeError: the step doesn't return `(carry, y)` with the carry's type.
            ValueError: `carry` is a tape, or a leaf isn't an array.

        Warns:
            UserWarning: with `weights="stored"`, the ring has more than 1 GiB, and more than
                half of it is copies of the parameters.
        """
        for name, value in (("params", params), ("carry", carry), ("x", x)):
            _errors.no_tape(name, value, Tape)
        params, x = (
            as_strong_arrays(params, "params", structs=True),
            as_strong_arrays(x, "x", structs=True),
        )
        carry = jax.tree.map(jnp.copy, as_strong_arrays(carry, "carry"))
        closure = trace_recorder(self, params, carry, x)
        return _blank_tape(self, closure, params, carry, x)

    def __call__(
        self,
        params: PyTree,
        tape: Tape,
        x: PyTree,
        *,
        reach: int | jax.Array | RandomReach | None = None,
    ) -> tuple[Tape, PyTree]:
        """Runs one step and records it.

        Args:
            params: parameters for this step, of the shapes given to `init`.
            tape: the tape that `init` or the last call returned.
            x: one input, of the shape given to `init`.
            reach: how many lags the cotangents of this call go back, the newest step's among
                them, as if the window were that long: an int or an integer scalar, which may be
                traced, cut to 1 … window, or a `random_reach`; None for the window. With `every`
                above 1 it counts from the group's end.

        Returns:
            The new tape and the step's y. In reverse mode a cotangent of y, and of the new
            tape's carry, goes back through the last `window` steps to `params` and to what
            the step closes over; `x` gets the newest step's share, the old tape nothing.
            With `every=m > 1` this happens where `due(new_tape)`, for all the losses of
            the group at once; other calls give zeros.

        Raises:
            TypeError: the step doesn't return `(carry, y)` with the carry's type, or, when
                differentiated with `every > 1`, y is not a scalar.
            ValueError: the tape is not one of this recorder's, `params` or `x` have other shapes
                than it was made for, or a constant that the step closes over has other values,
                or is differentiated.

        Cost:
            One step and one slot written; in reverse mode `window` pullbacks of the step, or as
            many as the reach asks for, in blocks of 16 where it is traced. Under `vmap` the
            longest reach counts. With a traced reach the gradient can't be differentiated again.
        """
        _errors.is_tape(tape, Tape)
        _errors.no_tape("params", params, Tape)
        _errors.no_tape("x", x, Tape)
        params, x = as_strong_arrays(params, "params"), as_strong_arrays(x, "x")
        closure, tape = closure_for(self, params, tape, x)
        if self.pace is None:
            back = Reach.of(reach, closure.layout.window)
            tape, y, aux = _call(closure, tape, params, x, back)
        elif reach is not None:
            raise _errors.has_pace("reach")
        else:
            tape, y, aux = call_with_pace(closure, tape, params, x)
        return tape, (y, aux) if self.has_aux else y

    def advance(
        self, params: PyTree, tape: Tape, x: PyTree, loss: Callable[[PyTree], Any]
    ) -> tuple[Tape, Any, PyTree]:
        """Runs and records one step, and takes every cotangent in flight `pace` lags further.

        Args:
            params: parameters for this step, of the shapes given to `init`.
            tape: the tape that `init` or the last call returned.
            x: one input, of the shape given to `init`.
            loss: from the step's y (without aux if `has_aux`) to a floating-point scalar, or to
                a pair `(scalar, aux)`; traced and differentiated by y within the call.

        Returns:
            `(tape, value, grads)`, the new tape, what `loss` returned, and the gradient of this
            call by params, of the losses of the last ceil(window / pace) calls, each at the lags
            that its cotangent goes back now. Leaves that no gradient can flow through are
            float0.

        Raises:
            TypeError: `loss` returns something else than a floating-point scalar, or a pair that
                begins with one.
            ValueError: the recorder has no pace, or `loss` is no function; or as for a call of the
                recorder.

        Cost:
            One step, one slot written, and `pace` pullbacks of ceil(window / pace) steps each.
        """
        if self.pace is None:
            raise _errors.no_pace()
        if not callable(loss):
            raise ValueError(
                "loss must be a function of y that returns a floating-point scalar or a pair "
                f"(scalar, aux), but got {_errors.describe(loss)}."
            )
        _errors.is_tape(tape, Tape)
        params, x = as_strong_arrays(params, "params"), as_strong_arrays(x, "x")

        def judge(y: PyTree) -> tuple[Any, list]:
            (_, value), ct_y = value_and_ct_y(loss, y)
            return value, [v for v in jax.tree.leaves(ct_y) if v.dtype != jax.dtypes.float0]

        made = advance_step(self, params, tape, x, judge)
        return made.tape, made.judged, made.grads

    def pullback(
        self,
        params: PyTree,
        tape: Tape,
        ct_ys: PyTree,
        ct_carry: PyTree = None,
        *,
        reach: int | jax.Array | RandomReach | None = None,
    ) -> Cotangents:
        """Sends cotangents back through the recorded steps.

        Args:
            params: with `weights="current"` the parameters to use for what depends on
                parameters alone, with "replayed" those to run the window with; with "stored"
                only their shapes count.
            tape: the tape after the newest step.
            ct_ys: cotangents of the outputs of the last m steps, 1 ≤ m ≤ window: leaves
                (m, *y.shape), oldest first; of y without aux if `has_aux`. For leaves of y
                without a gradient (integers, booleans, keys) None, or float0 arrays.
            ct_carry: cotangent of the tape's carry, with None, or float0, for leaves without a
                gradient; None for zero.
            reach: how many lags they go back, as if the window were that long; see the call.

        Returns:
            `Cotangents(params, carry, xs)`. Together the m outputs reach back over
            min(window, m + max(window - every, 0)) steps, the newest included: all of the
            window unless m falls short of `every`. Rows of `ct_ys` from before the first
            recorded step count as nothing.

        Raises:
            ValueError: the tape is not one of this recorder's, or the cotangents have
                another structure, shape or dtype than y and the carry.

        Cost:
            `window` pullbacks of the step.
        """
        _errors.is_tape(tape, Tape)
        if self.pace is not None:
            raise _errors.has_pace("pullback")
        params, x = as_strong_arrays(params, "params"), x_struct(tape)
        closure, tape = closure_for(self, params, tape, x)
        back = Reach.of(reach, closure.layout.window)
        window, arriving = given_window(closure, tape, params, ct_ys, ct_carry, back)
        ct = pull_window(closure, window, arriving, Wanted(closed_over=False, xs=True))
        of_params = ct.weights[len(closure.kinds.closed_over) :]
        length, followed = closure.layout.window, closure.layout.followed
        # The sweep goes from the newest step back; what is returned is in the order of time, as
        # ct_ys.
        xs = [jnp.flip(padded(v, length - window.steps), 0) for v in ct.xs]
        return Cotangents(
            with_float0(followed.params, of_params, params),
            with_float0(followed.carry, ct.carry, tape.carry),
            with_float0(followed.x, xs, x, (length,)),
        )

    def due(self, tape: Tape) -> jax.Array:
        """Whether the newest step on the tape ends a group of `every` steps (bool scalar)."""
        _errors.is_tape(tape, Tape)
        return is_due(tape)

    def clear(self, tape: Tape) -> Tape:
        """Forgets the recorded steps and keeps the carry; the next step starts a new group."""
        _errors.is_tape(tape, Tape)
        return cleared(tape)


def record(
    step: StepFn,
    *,
    window: PyTree,
    every: int = 1,
    weights: str = "stored",
    has_aux: bool = False,
    pace: int | None = None,
) -> Recorder:
    """Wraps a step function so that gradients flow back through its last `window` calls.

    With (c_s, y_s) = step(θ_s, c_{s-1}, x_s), a cotangent (ȳ, c̄) at step t gives

        λ_t = c̄,  ȳ_t = ȳ,  ȳ_s = 0 for s < t
        λ_{s-1} = (∂c_s/∂c_{s-1})ᵀ λ_s + (∂y_s/∂c_{s-1})ᵀ ȳ_s
        θ̄ = Σ_s (∂c_s/∂θ)ᵀ λ_s + (∂y_s/∂θ)ᵀ ȳ_s         for s = t … max(1, t-window+1)

    which is `jax.grad` of y_t through the last `window` steps with the older carry
    detached: BPTT(h; h′) of Williams & Peng with h = window and h′ = every. At fixed parameters
    and with every = 1, the gradient of the call for the last x is that of

        def last_y(params, carry, xs):
            for s, x in enumerate(xs):
                if s == len(xs) - window:
                    carry = jax.lax.stop_gradient(carry)
                carry, y = step(params, carry, x)
            return y

    without running the window again. Arrays that the step closes over are implicit parameters;
    those of more than 64 KiB whose values are known at `init` are constants, beside parameters.
    With a window for each part of the carry a leaf's λ is cut at its own lag and the rest flows
    on, so that parameters still get what reaches them through other leaves.

    Args:
        step: `step(params, carry, x) -> (carry, y)`, one time step: a `lax.scan` body that takes
            the parameters as an extra first argument. Anything that `jax.vjp` takes.
        window: how many steps the gradient reaches back, including the current one (often called
            k2). 1 is the ordinary one-step gradient, a window as long as the past full BPTT. Or
            ints in the containers of the carry, or of its outer part: a window for each part,
            such as `{"fast": 5, "slow": 50}`; None where the carry has None.
        every: how many steps share one gradient, m (often called k1). The outputs of m steps,
            counted from the first step, go back together, `window` steps from the last of
            them. `window == every` is truncation by chunks, 1 the sliding window.
        weights: which parameters are used when differentiating past steps. "stored": each
            step's own (exact; they sit on the ring). "current": recorded activations with
            the caller's parameters now, for every value that depends on neither carry nor
            x; none of these is on the ring. "replayed": the ring holds carries and inputs, and
            the window is run again under the caller's parameters from the oldest carry there.
        has_aux: whether y is a pair `(y, aux)` whose second half is not differentiated.
        pace: None, or how many lags each call takes every cotangent in flight further, from 1 to
            the window. Then a call is `pace` pullbacks one after the other in place of
            `window`, each of ceil(window / pace) steps in one batch, and a loss's share at lag k
            arrives k // pace calls later; at fixed parameters the gradients of a run and of
            ceil(window / pace) - 1 calls with zero losses behind it sum to the same. The step
            returns its scalar loss as y, or `advance` is given the loss. Not with `every` above
            1, nor with "replayed". For small batches and for accelerators; with "stored" the
            weights of each step are read as before.

    Returns:
        A `Recorder`.

    Raises:
        ValueError: `window` holds something else than positive ints below 2³¹, `every` is not a
            positive int, or `weights` is none of these; from `init` on, `window` does not fit
            the carry.

    Cost:
        `window` slots of residuals, whatever the length of the loop; for a gradient,
        `window` pullbacks of the step. The longest window of a part that gradients flow through
        counts; of a part whose window is over nothing is computed.

    References:
        Williams & Peng, "An Efficient Gradient-Based Algorithm for On-Line Training of
        Recurrent Network Trajectories", Neural Computation 2(4), 1990.
        Sutskever, "Training Recurrent Neural Networks", PhD thesis, Toronto, 2013 (k1, k2).
        Harlap et al., "PipeDream", 2018 (weight stashing: "stored").

    Examples:
        >>> import jax, jax.numpy as jnp, jaxbptt
        >>> step = lambda w, c, x: (w * c + x, w * c + x)
        >>> rec = jaxbptt.record(step, window=3)
        >>> tape = rec.init(0.5, 0.0, 0.0)
        >>> for x in (1.0, 0.0, 0.0, 0.0):
        ...     tape, y = rec(0.5, tape, x)
        >>> float(rec.pullback(0.5, tape, jnp.ones(1)).params)  # 3 of the 3 w² that reach x_1
        0.75
    """
    if not callable(step):
        raise _errors.not_callable(step)
    _errors.is_bool("has_aux", has_aux)
    windows = Windows.of(window).countable()
    _errors.positive_int("every", every)
    # What the mode decides, and where: what goes into a slot (`slot_types`, `record_step`,
    # `_call`), which residuals are made of the parameters at hand (`trace_recorder`, and from there
    # `Residuals`), and how a lag is read (`tape_window`).
    _errors.one_of("weights", weights, ("stored", "current", "replayed"))
    if pace is not None:
        _errors.positive_int("pace", pace)
        _check_pace(int(pace), windows.longest, every, weights)
    every = min(int(every), 2**31 - 1)  # a group that long never ends, nor does its counter wrap
    pace = None if pace is None else int(pace)
    return Recorder(step, windows, every, weights, bool(has_aux), pace)


def _check_pace(pace: int, window: int, every: int, weights: str) -> None:
    """Refuses a pace that does not go with the other options."""
    if pace > window:
        raise ValueError(
            f"pace must be at most the window, {window}, but got {pace}: a cotangent goes no "
            "further back. Leave it out, and the whole window is walked at each call."
        )
    for name, value, allowed in (("every", every, 1), ("weights", weights, "stored")):
        if value != allowed and value != "current":
            allowed_too = " or 'current'" if name == "weights" else ""
            raise ValueError(
                f"{name} must be {allowed!r}{allowed_too} with a pace, but got {value!r}. "
                f"Leave out {name} or the pace."
            )


# ------------------------------------------------------------ a recorder's step and tape


def trace_recorder(
    recorder: Recorder, params: PyTree, carry: PyTree, x: PyTree, sources: Sources | None = None
) -> Closure:
    """The closure of a recorder's step, which follows these sources, or all that it can."""
    return trace(
        recorder.step,
        params,
        carry,
        x,
        stored=recorder.weights == "stored",
        has_aux=recorder.has_aux,
        windows=recorder.windows,
        sources=sources,
        # To run the window again costs the ring nothing but carries and inputs, whatever is
        # differentiated.
        with_constants=recorder.weights != "replayed",
    )


def slot_types(
    recorder: Recorder, closure: Closure, carry: PyTree, x: PyTree
) -> tuple[LeafType, ...]:
    """The types of what one step leaves on the ring."""
    return type_of((carry, x)).leaves if recorder.weights == "replayed" else closure.slot


def closure_for(recorder: Recorder, params: PyTree, tape: Tape, x: PyTree) -> tuple[Closure, Tape]:
    """The closure of the step on this tape, or a refusal before anything runs.

    Where nothing is recorded yet the tape need not be of this step: it is made anew.
    """
    # From the cheapest question to the dearest: options, then types, then the step itself.
    made = settings_of(tape)
    for name in ("windows", "every", "weights", "pace"):
        if getattr(made, name) != getattr(recorder, name):
            raise _errors.other_setting(name, getattr(recorder, name), getattr(made, name))
    remedy = "Pass what init was given, or make a tape with init for the new shapes."
    given = {"params": params, "tape.carry": tape.carry, "x": x}
    for name, kind in (("params", made.params), ("tape.carry", made.carry), ("x", made.x)):
        lead = f"{name} must be of the type that the tape was made for"
        _errors.same_type(lead, name, kind, type_of(given[name]), remedy)
    check_counters(tape)
    closure = trace_recorder(recorder, params, tape.carry, x, made.sources)
    changed = changed_constants(closure.layout.constants, closure.closed_over)
    if changed and is_blank(tape):
        closure = trace_recorder(recorder, params, tape.carry, x)
        return closure, _blank_tape(recorder, closure, params, tape.carry, x)
    # What is made of constants is not on the ring; of the parameters that "current" takes neither.
    if changed and recorder.weights == "stored":
        raise _errors.constant_changed(changed[0], closure.closed_over[changed[0]])
    slot, came = slot_types(recorder, closure, tape.carry, x), layout(tape)
    of_this_step = made.step == _hash_of(recorder, closure)
    # Two steps may leave slots of the same types, so that the program itself is compared too.
    if slot == came and of_this_step:
        return closure, tape
    if is_blank(tape):
        return closure, _blank_tape(recorder, closure, params, tape.carry, x)
    if slot != came and of_this_step and len(slot) == len(came):
        _errors.same_leaves_as_made(*(_by_name(each, made.packing) for each in (slot, came)))
    if slot != came:
        raise _errors.other_residuals(slot, came)
    raise _errors.other_step()


def _hash_of(recorder: Recorder, closure: Closure) -> str:
    # Where the window is run again the ring holds no residuals. What is not on the ring has to be
    # the same at each step where each step's own counts.
    weights = recorder.weights
    return program_hash(closure, residuals=weights != "replayed", arrays=weights == "stored")


def _by_name(slot: Sequence[LeafType], packing: Packing) -> dict[str, LeafType]:
    names = [
        f"_ring[{i}], a slot of it" + ("" if row is None else f", row {row}")
        for i, row in packing.places
    ]
    return dict(zip(names, slot, strict=True))


def _blank_tape(
    recorder: Recorder, closure: Closure, params: PyTree, carry: PyTree, x: PyTree
) -> Tape:
    slot = slot_types(recorder, closure, carry, x)
    settings = Settings(
        closure.layout.window,
        recorder.windows,
        recorder.every,
        recorder.weights,
        recorder.pace,
        *(type_of(params), type_of(carry), type_of(x)),
        _hash_of(recorder, closure),
        closure.sources,
        # With a pace a ring has rows and columns of slots, and is read by the row.
        Packing.of(slot, apart=recorder.pace is not None),
    )
    slots = math.prod(settings.slots)
    # With symbolic dimensions nobody knows how large it will be.
    nbytes = slots * size_in_bytes(slot)
    if recorder.weights == "stored" and isinstance(nbytes, int) and nbytes > _LARGE:
        # Traced once more, for only the difference tells what is there of parameters alone.
        without = dataclasses.replace(recorder, weights="current")
        smaller = trace_recorder(without, params, carry, x, closure.sources).slot
        _errors.warn_of_parameters(nbytes, slots * size_in_bytes(smaller))
    lam = [leaf_type(kind) for kind in closure.kinds.carry]
    return blank(carry, slot, lam, settings)


def record_step(recorder: Recorder, params: PyTree, tape: Tape, x: PyTree) -> tuple[Tape, PyTree]:
    """A call of the recorder without its own rule for derivatives.

    That rule would give an outer derivative the truncated gradient, and nothing for the tape.
    """
    params = as_strong_arrays(params, "params")
    closure, tape = closure_for(recorder, params, tape, x)
    leaves = [jax.tree.leaves(tree) for tree in (params, tape.carry, x)]
    made = closure.run(*leaves)
    # A slot is either what the step was given or what its derivative keeps.
    replays = recorder.weights == "replayed"
    recorded = [*leaves[1], *leaves[2]] if replays else made.recorded
    return push(tape, made.step[0], recorded), made.step[1]


class Advanced(NamedTuple):
    """What one step of a recorder with a pace makes."""

    tape: Tape
    y: PyTree
    judged: Any
    grads: PyTree  # of params, float0 where nothing can flow


def advance_step(
    recorder: Recorder,
    params: PyTree,
    tape: Tape,
    x: PyTree,
    judge: Callable[[PyTree], tuple[Any, list]],
) -> Advanced:
    """Runs and records one step, and moves all cotangents in flight.

    Args:
        recorder: a recorder with a pace.
        params: strong arrays, as `record_step` takes them.
        tape: the tape before the step.
        x: one input, strong arrays.
        judge: from y to something, and ȳ in the leaves that gradients flow through.
    """
    closure, tape = closure_for(recorder, params, tape, x)
    leaves = [jax.tree.leaves(tree) for tree in (params, tape.carry, x)]
    made = closure.run(*leaves)
    carry, y, _ = made.step
    judged, ct_y = judge(y)
    how: Any = {"asked": (True,) * len(ct_y), "closed_over": False}
    pushed, given = push(tape, carry, made.recorded), Given(made.recorded, made.invariant)
    moved = move_chains(closure, pushed, given, ct_y, **how)
    weights = finish(closure, settings_of(tape), made.invariant, moved.unfinished, **how)
    grads = weights[len(closure.kinds.closed_over) :]
    followed = closure.layout.followed.params
    return Advanced(moved.tape, y, judged, with_float0(followed, grads, params))


# ------------------------------------------------------------ one call and its reverse mode


def _call(
    closure: Closure, tape: Tape, params: PyTree, x: PyTree, reach: Reach | None
) -> tuple[Tape, PyTree, PyTree]:
    """Runs the step and records it; returns (new tape, y, aux).

    Every array is an argument of the `custom_vjp`, what the step closes over included:
    a tracer that is only closed over would get no gradient, or outlive its trace.
    """
    every, replays = settings_of(tape).every, settings_of(tape).weights == "replayed"
    # A reach that is a Python int is part of the program, and no argument of the rule.
    static = reach if reach is not None and not reach.traced else None
    axes, layout = axes_in_sight(closure.forward.jaxpr.eqns), closure.layout

    def run(
        closed_over: list, params: list, x: list, rest: tuple[Tape, Closure, Reach | None]
    ) -> tuple[Any, list]:
        tape, closure, _ = rest
        bound = dataclasses.replace(closure, closed_over=closed_over)
        carry = jax.tree.leaves(tape.carry)
        made = bound.run(params, carry, x)
        new_carry, y, aux = as_mapped(axes, made.step)
        pushed = push(tape, new_carry, [*carry, *x] if replays else made.recorded)
        return (pushed, y, aux), made.invariant

    def forward(*args: Any) -> tuple[Any, _Saved]:
        y = type_of(layout.outputs.tree()[1])
        if every > 1 and not (len(y.leaves) == 1 and is_scalar(y.leaves[0])):
            raise _errors.loss_not_scalar(y, every)
        # Of closed-over arrays only those get a cotangent that somebody differentiates by.
        asked = tuple(v.perturbed for v in args[0])
        refuse_what_is_not_followed(layout, args[0], args[2])
        closed_over, params, x, rest = primal_values(args)
        outs, invariant = run(closed_over, params, x, rest)
        # Only to run the window again are the parameters needed after this.
        bound = dataclasses.replace(rest[1], closed_over=closed_over if replays else [])
        again = params if replays else []
        return outs, _Saved(outs[0], bound, again, invariant, rest[2], asked)

    def backward(saved: _Saved, cts: Any) -> tuple[list | None, ...]:
        followed, kinds = saved.closure.layout.followed, saved.closure.kinds
        ct_tape, ct_y, _ = cts
        of_carry = pick(followed.carry, jax.tree.leaves(ct_tape.carry))
        of_y = pick(saved.closure.layout.followed_y, jax.tree.leaves(ct_y))
        # Where nobody asked for the gradient of a leaf, its λ begins as zeros.
        lam = without_symbolic(of_carry, kinds.carry)
        ct = _pull_group(saved, static or saved.reach, lam, of_y)
        groups = followed.closed_over, followed.params, followed.x
        return *map(with_none, groups, as_mapped(axes, ct)), None

    apart = dataclasses.replace(closure, closed_over=[])
    leaves = jax.tree.leaves(params), jax.tree.leaves(x)
    traced = None if static else reach
    recorded_step = with_rule(lambda *args: run(*args)[0], forward, backward, axes)
    return recorded_step(closure.closed_over, *leaves, (tape, apart, traced))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Saved:
    """What a call leaves for its reverse mode."""

    tape: Tape  # after the step
    closure: Closure
    params: list  # to run the window again with
    invariant: list
    reach: Reach | None  # where it is traced
    asked: Mask = dataclasses.field(metadata={"static": True})  # closed-over arrays with a gradient


class _GroupCotangents(NamedTuple):
    """Cotangents of what a call was given, in followed leaves."""

    closed_over: list
    params: list
    x: list


def _pull_group(saved: _Saved, reach: Reach | None, ct_carry: list, ct_y: list) -> _GroupCotangents:
    """The cotangents for the group that the newest step ends, or zeros."""
    closure, tape, kinds = saved.closure, saved.tape, saved.closure.kinds
    every = settings_of(tape).every
    # With a window below `every` the group's earlier outputs have no gradient.
    rows = min(every, closure.layout.window)
    asked = tuple(not is_symbolic_zero(v) for v in ct_y)
    # Leaves of y that nobody asked for are left out of the pullback altogether.
    of_y = pick(asked, ct_y)

    def back() -> _GroupCotangents:
        window = tape_window(closure, tape, saved.params, saved.invariant, rows, reach=reach)
        # With every > 1 each loss of the group gets the cotangent of this call.
        ys = [jnp.broadcast_to(v, (rows, *v.shape)) for v in of_y]
        # Of the newest step alone x̄ costs less, but a side effect would happen twice there.
        acts = closure.pullback(y=asked).acts
        wanted = Wanted(pick(closure.layout.followed.closed_over, saved.asked), xs=acts)
        arriving = Arriving(ct_carry, ys, rows, asked).with_y_in_carry(closure)
        ct = pull_window(closure, window, arriving, wanted)
        if acts:
            x = [v[0] for v in ct.xs]
        else:
            newest = [*window.read(0), *window.invariant]
            newest_y = [v[-1] for v in arriving.ys]
            x = pull_newest_x(closure, newest, arriving.carry, newest_y, arriving.asked)
        # Closed-over arrays and parameters are contracted together, as weights.
        n = len(kinds.closed_over)
        return _GroupCotangents(ct.weights[:n], ct.weights[n:], x)

    if every == 1:
        return back()
    nothing = _GroupCotangents(
        *(list(map(zeros, k)) for k in (kinds.closed_over, kinds.params, kinds.x))
    )
    # In a branch, so that steps within a group cost a forward pass alone.
    return lax.cond(is_due(tape), back, lambda: nothing)
