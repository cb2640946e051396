"""`scan`: `lax.scan` with a truncated reverse mode."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend import core

from jaxbptt import _errors
from jaxbptt._arrays import struct_like
from jaxbptt._closure.closure import Closure, differentiable, fill, pick, trace
from jaxbptt._compat import lax_scan
from jaxbptt._jaxprs.evaluate import bind, is_reference, scan_counts
from jaxbptt._transforms.groups import Groups
from jaxbptt._transforms.scan_backward import Run, pull_run
from jaxbptt._transforms.scan_forward import record_run
from jaxbptt._types import PyTree, type_of
from jaxbptt._windows import RandomWindow, Windows

Leaves = dict[str, list]  # leaves by group

_GROUPS = ("hoisted", "carry", "x")


def scan(
    f: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    init: PyTree,
    xs: PyTree = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    _split_transpose: bool = False,
    *,
    window: PyTree,
    every: int = 1,
) -> tuple[PyTree, PyTree]:
    """`lax.scan` whose reverse-mode derivative reaches back `window` steps.

    The arguments before `window`, the results and the errors are those of `lax.scan`.
    Outputs come in groups of m = `every`, laid from the first step that runs, and all
    outputs of a group send their cotangents back together. A group of the steps
    first … end reaches back to step

        max(1, first - max(window - every, 0), end - window + 1)

    where λ stops, unless that is step 1: then it goes on into `init`. With a window for each
    part of the carry this holds for each leaf's λ. The final carry's cotangent goes with the
    last group. Arrays that `f` closes over are implicit parameters.

    Args:
        f: `f(carry, x) -> (carry, y)`, one time step.
        init: the initial carry.
        xs: inputs, each leaf (length, *x.shape).
        length: number of steps; needed where `xs` has no leaves.
        reverse: whether to run from the last row of `xs` to the first.
        unroll: how many steps one trip of the compiled forward loop has, as in `lax.scan`.
        _split_transpose: taken as `lax.scan` takes it; a derivative of our own does not need it.
        window: how many steps a cotangent reaches back, the present one included; None for
            all: full backpropagation through time. Or ints in the containers of the carry,
            or of its outer part: a window for each part. Or a `random_window`, whose cuts are
            drawn, and compensated so that the gradient is unbiased.
        every: after how many steps cotangents start. `window == every` is truncation by
            chunks, 1 the sliding window.

    Returns:
        `(carry, ys)`, as `lax.scan` returns them.

    Raises:
        ValueError: `window` is neither None nor a positive int nor such ints in containers
            that fit the carry, or `every` is not a positive int, or above 1 with a random window.
        TypeError: whatever `lax.scan` refuses.

    Cost:
        In reverse mode the residuals of `length` steps, and for each step one pullback plus,
        where window > every, ceil(window / every) pullbacks of the carry, batched. With a window
        for each part these are pullbacks of the parts that are not over yet.

    References:
        Williams & Peng, "An Efficient Gradient-Based Algorithm for On-Line Training of
        Recurrent Network Trajectories", Neural Computation 2(4), 1990: BPTT(h; h′).

    Example:
        >>> import jax, jax.numpy as jnp, jaxbptt
        >>> def loss(w):
        ...     step = lambda c, x: (w * c + x, None)
        ...     return jaxbptt.scan(step, 0.0, jnp.arange(1.0, 5.0), window=2)[0]
        >>> float(jax.grad(loss)(0.5))  # c_3 + w c_2, without the w² c_1 of full BPTT
        5.5
    """
    drawn = window if isinstance(window, RandomWindow) else None
    windows = None if window is None or drawn else Windows.of(window)
    _errors.positive_int("every", every)
    if drawn and every > 1:
        raise _errors.random_groups(every)
    _errors.has_steps(type_of(jax.eval_shape(lambda xs: xs, xs)))
    if windows is not None:
        by_leaf = windows.by_leaf(type_of(jax.eval_shape(lambda init: init, init)))
        windows = Windows.of(by_leaf or windows.longest)
    if windows or drawn:
        f = _unforwarded(f, ys_too=windows is not None and windows.longest < every)

    def plain(init: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
        return lax_scan(f, init, xs, length, reverse, unroll, _split_transpose)

    # lax.scan itself checks, promotes and hoists; what it leaves is one equation. With
    # jit disabled it would leave none.
    with jax.disable_jit(False):
        closed, shapes = jax.make_jaxpr(plain, return_shape=True)(init, xs)
    env: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(closed.jaxpr.invars, jax.tree.leaves((init, xs)), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for eqn in closed.jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        is_loop = eqn.primitive.name == "scan"
        cut = windows, every, drawn
        outs = _truncated(eqn, values, *cut) if is_loop else bind(eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))
    return jax.tree.unflatten(jax.tree.structure(shapes), [read(v) for v in closed.jaxpr.outvars])


def _unforwarded(f: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]], *, ys_too: bool) -> Callable:
    """The same step, with a carry that it returns as it came still an operation's result.

    `lax.scan` takes such a part of the carry out of the loop, as a parameter of all steps; but
    what a window says of a carry is not what it says of a parameter. An x that is returned as
    y goes around the loop; that matters where some outputs have no gradient (`ys_too`).
    """

    @functools.wraps(f)
    def step(carry: PyTree, x: PyTree) -> Any:
        came = {id(leaf) for leaf in jax.tree.leaves((carry, x))}
        outs = f(carry, x)
        if not isinstance(outs, tuple | list) or len(outs) != 2:
            return outs  # lax.scan says what is wrong with it

        def one(leaf: Any) -> Any:
            return lax.optimization_barrier(leaf) if id(leaf) in came else leaf

        return jax.tree.map(one, outs[0]), jax.tree.map(one, outs[1]) if ys_too else outs[1]

    return step


def _truncated(
    eqn: core.JaxprEqn,
    values: list,
    windows: Windows | None,
    every: int,
    drawn: RandomWindow | None,
) -> list:
    """The equation of a scan, with a derivative of its own; no windows: nothing is cut off."""
    body, length = eqn.params["jaxpr"], eqn.params["length"]
    n_consts, n_carry = scan_counts(eqn)
    consts, init = values[:n_consts], values[n_consts : n_consts + n_carry]
    if not windows and not drawn and any(map(is_reference, eqn.invars)):
        return bind(eqn, values)  # a derivative of our own can't write to references: JAX's does
    xs = values[n_consts + n_carry :]

    def step(_: PyTree, carry: list, x: list) -> tuple[list, list]:
        outs = core.jaxpr_as_fun(body)(*consts, *carry, *x)
        return outs[:n_carry], outs[n_carry:]

    leaves = [struct_like(v.aval) for v in body.jaxpr.invars[n_consts:]]
    carry, x = leaves[:n_carry], leaves[n_carry:]
    most = max(length, 1) + every - 1  # there are no more steps to reach
    steps = [min(w, most) for w in windows.steps] if windows else [most]
    by_leaf = pick(differentiable(carry), steps) if windows and n_carry else []
    by_leaf = by_leaf or [max(steps)]
    groups = Groups.of(length, by_leaf, every)
    # Of a single chain the parts that are over are masked, not left out of a program.
    parts = Windows.of(steps if groups.parts and (groups.chains > 1 or groups.gaps) else 1)
    closure = trace(step, (), carry, x, stored=False, has_aux=False, windows=parts)
    if windows and not closure.linear:
        groups = Groups.of(length, by_leaf, every, together=False)
    factors = None if drawn is None else drawn.factors(length)
    return _call(closure, eqn, consts, init, xs, groups, factors)


def _call(
    closure: Closure,
    eqn: core.JaxprEqn,
    consts: list,
    init: list,
    xs: list,
    groups: Groups,
    factors: jax.Array | None,
) -> list:
    """Every array is an argument of the `custom_vjp`: one only closed over gets no gradient."""
    masks, reverse, n = closure.masks, eqn.params["reverse"], len(init)
    leaves = {"hoisted": closure.consts["hoisted"], "carry": init, "x": xs}
    moving = {name: pick(masks[name], leaves[name]) for name in _GROUPS}
    still = {name: pick(masks[name], leaves[name], False) for name in _GROUPS}
    programs = {name: value for name, value in closure.consts.items() if name != "hoisted"}
    closure = closure.bind({})  # what the rules close over outlives this trace: no array of it

    @jax.custom_vjp
    def run(
        moving: Leaves, still: Leaves, programs: Leaves, consts: list, _: jax.Array | None
    ) -> list:
        args = {g: fill(masks[g], moving[g], still[g]) for g in _GROUPS}
        return bind(eqn, [*consts, *args["carry"], *args["x"]])

    def forward(
        moving: Leaves, still: Leaves, programs: Leaves, consts: list, factors: jax.Array | None
    ) -> tuple[list, Any]:
        args = {g: fill(masks[g], moving[g], still[g]) for g in _GROUPS}
        bound = closure.bind(programs | {"hoisted": args["hoisted"]})
        carry, ys, stacks = record_run(
            bound,
            args["carry"],
            args["x"],
            groups.length,
            reverse=reverse,
            unroll=eqn.params["unroll"],
        )
        return [*carry, *ys], (stacks, bound.derive([]), programs, factors)

    def backward(saved: Any, cts: list) -> tuple[Leaves, None, None, None, None]:
        stacks, fixed, programs, factors = saved
        ct_carry, ct_ys = pick(masks["carry"], cts[:n]), pick(masks["y"], cts[n:])
        recorded = Run(stacks, fixed, groups, factors, reverse)
        weights, carry, xs = pull_run(closure.bind(programs), recorded, ct_carry, ct_ys)
        hoisted = closure.by_group(weights)["hoisted"]
        return {"hoisted": hoisted, "carry": carry, "x": xs}, None, None, None, None

    run.defvjp(forward, backward)
    return run(moving, still, programs, consts, factors)
