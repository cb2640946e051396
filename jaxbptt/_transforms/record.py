"""`record`: a step function whose reverse mode reaches back through a window of recorded steps."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbptt import _errors
from jaxbptt._arrays import as_strong_arrays, zeros
from jaxbptt._closure.closure import Closure, fill, pick, trace
from jaxbptt._closure.fingerprint import program_hash
from jaxbptt._transforms.cotangents import Cotangents, with_float0
from jaxbptt._transforms.tape import (
    Settings,
    Tape,
    blank,
    cleared,
    is_blank,
    is_due,
    layout,
    push,
    settings_of,
    x_struct,
)
from jaxbptt._transforms.window_vjp import (
    given_window,
    padded,
    pull_newest_x,
    pull_window,
    tape_window,
)
from jaxbptt._types import LeafType, PyTree, StepFn, type_of
from jaxbptt._windows import Windows

Leaves = dict[str, list]  # leaves by group

_GROUPS = ("hoisted", "params", "x")


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

    def __call__(self, params: PyTree, tape: Tape, x: PyTree) -> tuple[Tape, PyTree]:
        """Runs one step and records it.

        Args:
            params: parameters for this step, of the shapes given to `init`.
            tape: the tape that `init` or the last call returned.
            x: one input, of the shape given to `init`.

        Returns:
            The new tape and the step's y. In reverse mode a cotangent of y, and of the new
            tape's carry, goes back through the last `window` steps to `params` and to what
            the step closes over; `x` gets the newest step's share, the old tape nothing.
            With `every=m > 1` this happens where `due(new_tape)`, for all the losses of
            the group at once; other calls give zeros.

        Raises:
            TypeError: the step doesn't return `(carry, y)` with the carry's type, or, when
                differentiated with `every > 1`, y is not a scalar.
            ValueError: the tape is not one of this recorder's, or `params` or `x` have other
                shapes than it was made for.

        Cost:
            One step and one slot written; in reverse mode `window` pullbacks of the step.
        """
        _errors.is_tape(tape, Tape)
        _errors.no_tape("params", params, Tape)
        _errors.no_tape("x", x, Tape)
        params, x = as_strong_arrays(params, "params"), as_strong_arrays(x, "x")
        closure, tape = closure_for(self, params, tape, x)
        tape, y, aux = _call(closure, tape, params, x)
        return tape, (y, aux) if self.has_aux else y

    def pullback(
        self, params: PyTree, tape: Tape, ct_ys: PyTree, ct_carry: PyTree = None
    ) -> Cotangents:
        """Sends cotangents back through the recorded steps.

        Args:
            params: with `weights="current"` the parameters to use for what depends on
                parameters alone, with "replayed" those to run the window with; with "stored"
                only their shapes count.
            tape: the tape after the newest step.
            ct_ys: cotangents of the outputs of the last m steps, 1 ≤ m ≤ window: leaves
                (m, *y.shape), oldest first; of y without aux if `has_aux`. Leaves of y
                that are integers take float0 arrays.
            ct_carry: cotangent of the tape's carry; None for zero.

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
        params, x = as_strong_arrays(params, "params"), x_struct(tape)
        closure, tape = closure_for(self, params, tape, x)
        window, lam, ct_ys, rows = given_window(closure, tape, params, ct_ys, ct_carry)
        ct = pull_window(closure.explicit_only(), window, lam, ct_ys, rows, keep_xs=True)
        xs = [jnp.flip(padded(v, closure.window - window.steps), 0) for v in ct.xs]
        return Cotangents(
            with_float0(closure.masks["params"], closure.by_group(ct.weights)["params"], params),
            with_float0(closure.masks["carry"], ct.carry, tape.carry),
            with_float0(closure.masks["x"], xs, x, (closure.window,)),
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
    step: StepFn, *, window: PyTree, every: int = 1, weights: str = "stored", has_aux: bool = False
) -> Recorder:
    """Wraps a step function so that gradients flow back through its last `window` calls.

    With (c_s, y_s) = step(θ_s, c_{s-1}, x_s), a cotangent (ȳ, c̄) at step t gives

        λ_t = c̄,  ȳ_t = ȳ,  ȳ_s = 0 for s < t
        λ_{s-1} = (∂c_s/∂c_{s-1})ᵀ λ_s + (∂y_s/∂c_{s-1})ᵀ ȳ_s
        θ̄ = Σ_s (∂c_s/∂θ)ᵀ λ_s + (∂y_s/∂θ)ᵀ ȳ_s         for s = t … max(1, t-window+1)

    which is `jax.grad` of y_t through the last `window` steps with the older carry
    detached: BPTT(h; h′) of Williams & Peng with h = window and h′ = every. Arrays that
    the step closes over are implicit parameters. With a window for each part of the carry a
    leaf's λ is cut at its own lag and the rest flows on, so that parameters still get what
    reaches them through other leaves.

    Args:
        step: `step(params, carry, x) -> (carry, y)`, one time step: the body of a `lax.scan`
            with its parameters in front. Anything that `jax.vjp` takes.
        window: how many steps a cotangent reaches back, the present one included. 1 is the
            ordinary one-step gradient, a window as long as the past full BPTT. Or ints in the
            containers of the carry, or of its outer part: a window for each part, such as
            `{"fast": 5, "slow": 50}`.
        every: after how many steps cotangents start, m. The outputs of m steps, counted
            from the first step, then go back together, `window` steps from the last of
            them. `window == every` is truncation by chunks, 1 the sliding window.
        weights: whose parameters the recorded steps are differentiated at. "stored": each
            step's own (exact; they sit on the ring). "current": recorded activations with
            the caller's parameters now, for every value that depends on neither carry nor
            x; none of these is on the ring. "replayed": the ring holds carries and inputs, and
            the window is run again under the caller's parameters from the oldest carry there.
        has_aux: whether y is a pair `(y, aux)` whose second half is not differentiated.

    Returns:
        A `Recorder`.

    Raises:
        ValueError: `window` holds something else than positive ints, `every` is not one, or
            `weights` is none of these; from `init` on, `window` does not fit the carry.

    Cost:
        `window` slots of residuals, whatever the length of the loop; for a gradient,
        `window` pullbacks of the step. The longest window of a part that gradients flow through
        counts; of a part whose window is over nothing is computed.

    References:
        Williams & Peng, "An Efficient Gradient-Based Algorithm for On-Line Training of
        Recurrent Network Trajectories", Neural Computation 2(4), 1990.
        Sutskever, "Training Recurrent Neural Networks", PhD thesis, Toronto, 2013 (k1, k2).
        Harlap et al., "PipeDream", 2018 (weight stashing: "stored").

    Example:
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
    windows = Windows.of(window)
    _errors.positive_int("every", every)
    _errors.one_of("weights", weights, ("stored", "current", "replayed"))
    every = min(int(every), 2**31 - 1)  # a group that long never ends, nor does its counter wrap
    return Recorder(step, windows, every, weights, bool(has_aux))


# ------------------------------------------------------------ a recorder's step and tape


def trace_recorder(recorder: Recorder, params: PyTree, carry: PyTree, x: PyTree) -> Closure:
    """The closure of a recorder's step."""
    return trace(
        recorder.step,
        params,
        carry,
        x,
        stored=recorder.weights == "stored",
        has_aux=recorder.has_aux,
        windows=recorder.windows,
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
    made = settings_of(tape)
    for name in ("windows", "every", "weights"):
        if getattr(made, name) != getattr(recorder, name):
            raise _errors.other_setting(name, getattr(recorder, name), getattr(made, name))
    remedy = "Pass what init was given, or make a tape with init for the new shapes."
    given = {"params": params, "tape.carry": tape.carry, "x": x}
    for name, kind in (("params", made.params), ("tape.carry", made.carry), ("x", made.x)):
        lead = f"{name} must be of the type that the tape was made for"
        _errors.same_type(lead, name, kind, type_of(given[name]), remedy)
    closure = trace_recorder(recorder, params, tape.carry, x)
    slot, came = slot_types(recorder, closure, tape.carry, x), layout(tape)
    if slot == came and made.step == program_hash(closure):
        return closure, tape
    if is_blank(tape):
        return closure, _blank_tape(recorder, closure, params, tape.carry, x)
    if slot != came:
        raise _errors.other_residuals(slot, came)
    raise _errors.other_step()


def _blank_tape(
    recorder: Recorder, closure: Closure, params: PyTree, carry: PyTree, x: PyTree
) -> Tape:
    settings = Settings(
        closure.window,
        recorder.windows,
        recorder.every,
        recorder.weights,
        *(type_of(params), type_of(carry), type_of(x)),
        program_hash(closure),
    )
    return blank(carry, slot_types(recorder, closure, carry, x), settings)


def record_step(recorder: Recorder, params: PyTree, tape: Tape, x: PyTree) -> tuple[Tape, PyTree]:
    """A call of the recorder without its own rule for derivatives.

    That rule would give an outer derivative the truncated gradient, and nothing for the tape.
    """
    params = as_strong_arrays(params, "params")
    closure, tape = closure_for(recorder, params, tape, x)
    leaves = [jax.tree.leaves(tree) for tree in (params, tape.carry, x)]
    (carry, y, _), residuals, _ = closure.forward(*leaves)
    if recorder.weights == "replayed":
        residuals = [*leaves[1], *leaves[2]]
    return push(tape, carry, residuals), y


# ------------------------------------------------------------ one call and its reverse mode


def _call(closure: Closure, tape: Tape, params: PyTree, x: PyTree) -> tuple[Tape, PyTree, PyTree]:
    """Runs the step and records it; returns (new tape, y, aux).

    Every array is an argument of the `custom_vjp`, what the step closes over included:
    a tracer that is only closed over would get no gradient, or outlive its trace.
    """
    groups = {"hoisted": closure.consts["hoisted"]}
    groups |= {"params": jax.tree.leaves(params), "x": jax.tree.leaves(x)}
    masks = closure.masks
    moving = {name: pick(masks[name], leaves) for name, leaves in groups.items()}
    still = {name: pick(masks[name], leaves, False) for name, leaves in groups.items()}
    every, replays = settings_of(tape).every, settings_of(tape).weights == "replayed"
    programs = {name: value for name, value in closure.consts.items() if name != "hoisted"}
    closure = closure.bind({})  # what the rules close over outlives this trace: no array of it

    def run(moving: Leaves, still: Leaves, tape: Tape, consts: Leaves) -> tuple[Any, list]:
        args = {name: fill(masks[name], moving[name], still[name]) for name in moving}
        bound = closure.bind(consts | {"hoisted": args["hoisted"]})
        carry_leaves = jax.tree.leaves(tape.carry)
        (carry, y, aux), recorded, fixed = bound.forward(args["params"], carry_leaves, args["x"])
        recorded = [*carry_leaves, *args["x"]] if replays else recorded
        return (push(tape, carry, recorded), y, aux), fixed

    @jax.custom_vjp
    def recorded_step(*args: Any) -> Any:
        return run(*args)[0]

    def forward(moving: Leaves, still: Leaves, tape: Tape, consts: Leaves) -> tuple[Any, Any]:
        y = type_of(closure.outputs.tree()[1])
        if every > 1 and not (len(y.leaves) == 1 and _is_scalar(y.leaves[0])):
            raise _errors.loss_not_scalar(y, every)
        outs, fixed = run(moving, still, tape, consts)
        again = (moving, still) if replays else None  # the parameters to run the window with
        return outs, (outs[0], fixed, consts, again)

    def backward(saved: Any, cts: Any) -> tuple[Leaves, None, None, None]:
        tape, fixed, consts, again = saved
        ct_tape, ct_y, _ = cts
        ct_carry = pick(masks["carry"], jax.tree.leaves(ct_tape.carry))
        ct_y = pick(masks["y"], jax.tree.leaves(ct_y))
        params = []
        if again:
            args = [fill(masks[g], again[0][g], again[1][g]) for g in ("hoisted", "params")]
            consts, params = consts | {"hoisted": args[0]}, args[1]
        bound = closure.bind(consts)
        return _pull_group(bound, tape, params, fixed, ct_carry, ct_y), None, None, None

    recorded_step.defvjp(forward, backward)
    return recorded_step(moving, still, tape, programs)


def _pull_group(
    closure: Closure, tape: Tape, params: list, fixed: list, ct_carry: list, ct_y: list
) -> dict[str, list]:
    """Cotangents of hoisted, params and x for the group that the newest step ends, or zeros."""
    every = settings_of(tape).every
    rows = min(every, closure.window)

    def back() -> dict[str, list]:
        window = tape_window(closure, tape, params, fixed, rows)
        ct_ys = [jnp.broadcast_to(v, (rows, *v.shape)) for v in ct_y]
        ct = pull_window(closure, window, ct_carry, ct_ys, rows, keep_xs=False)
        x = pull_newest_x(closure, window, ct_carry, ct_y)
        return closure.by_group(ct.weights) | {"x": x}

    if every == 1:
        return back()
    nothing = {group: [zeros(k) for k in closure.cotangents[group]] for group in _GROUPS}
    return lax.cond(is_due(tape), back, lambda: nothing)


def _is_scalar(leaf: Any) -> bool:
    return leaf.shape == () and leaf.differentiable
