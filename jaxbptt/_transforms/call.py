"""One recorded step and its reverse mode: the custom VJP that reaches back through the tape."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbptt import _errors
from jaxbptt._arrays import zeros
from jaxbptt._closure.closure import Closure, fill, pick
from jaxbptt._transforms import tape as _tape
from jaxbptt._transforms.cotangents import given_ct_carry, given_ct_ys
from jaxbptt._transforms.tape import Tape
from jaxbptt._transforms.window_vjp import Window, pull_newest_x, pull_window, replayed
from jaxbptt._types import PyTree, type_of
from jaxbptt._windows import within

Leaves = dict[str, list]  # leaves by group

_GROUPS = ("hoisted", "params", "x")


def call(closure: Closure, tape: Tape, params: PyTree, x: PyTree) -> tuple[Tape, PyTree, PyTree]:
    """Runs the step and records it; returns (new tape, y, aux).

    Every array is an argument of the `custom_vjp`, what the step closes over included:
    a tracer that is only closed over would get no gradient, or outlive its trace.
    """
    groups = {"hoisted": closure.consts["hoisted"]}
    groups |= {"params": jax.tree.leaves(params), "x": jax.tree.leaves(x)}
    masks = closure.masks
    moving = {name: pick(masks[name], leaves) for name, leaves in groups.items()}
    still = {name: pick(masks[name], leaves, False) for name, leaves in groups.items()}
    every, replays = tape._settings.every, tape._settings.weights == "replayed"
    programs = {name: value for name, value in closure.consts.items() if name != "hoisted"}
    closure = closure.bind({})  # what the rules close over outlives this trace: no array of it

    def run(moving: Leaves, still: Leaves, tape: Tape, consts: Leaves) -> tuple[Any, list]:
        args = {name: fill(masks[name], moving[name], still[name]) for name in moving}
        bound = closure.bind(consts | {"hoisted": args["hoisted"]})
        carry_leaves = jax.tree.leaves(tape.carry)
        (carry, y, aux), recorded, fixed = bound.forward(args["params"], carry_leaves, args["x"])
        recorded = [*carry_leaves, *args["x"]] if replays else recorded
        return (_tape.push(tape, carry, recorded), y, aux), fixed

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


def tape_window(closure: Closure, tape: Tape, params: list, fixed: list, rows: int) -> Window:
    """What the last `rows` outputs of a group reach of a tape, as far as it is recorded."""
    every = tape._settings.every
    steps, *parts = (within(w, rows, every) for w in (closure.window, *closure.parts))
    read = _tape.reader(tape._ring, tape._head, tape.length)
    if tape._settings.weights == "replayed":
        read = replayed(closure, params, read, tape._settings.window, tape.length)
    return Window(read, fixed, steps, jnp.minimum(tape.length, steps), tuple(parts))


def given_window(
    closure: Closure, tape: Tape, params: PyTree, ct_ys: PyTree, ct_carry: PyTree
) -> tuple[Window, list, list, int]:
    """What checked cotangents from outside reach; c̄, ȳ by leaf, and the rows of ȳ."""
    rows, ct_ys = given_ct_ys(closure, ct_ys, closure.window)
    lam = given_ct_carry(closure, tape.carry, ct_carry)
    leaves = jax.tree.leaves(params)
    return tape_window(closure, tape, leaves, closure.derive(leaves), rows), lam, ct_ys, rows


def _pull_group(
    closure: Closure, tape: Tape, params: list, fixed: list, ct_carry: list, ct_y: list
) -> dict[str, list]:
    """Cotangents of hoisted, params and x for the group that the newest step ends, or zeros."""
    every = tape._settings.every
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
    return lax.cond(_tape.due(tape), back, lambda: nothing)


def _is_scalar(leaf: Any) -> bool:
    return leaf.shape == () and leaf.differentiable
