"""`scan`: `lax.scan` with a truncated reverse mode."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jaxbptt import _errors
from jaxbptt._arrays import at_most, struct_like
from jaxbptt._closure.closure import Closure, close, pick
from jaxbptt._closure.pullbacks import Inputs, Mask
from jaxbptt._closure.step import refuse_references
from jaxbptt._compat import jit_is_disabled, lax_scan, scan_counts
from jaxbptt._jaxprs.dependence import reached, with_carry
from jaxbptt._jaxprs.evaluate import (
    Program,
    bind,
    has_references,
    leaves_explicit_axes,
    prune,
)
from jaxbptt._jaxprs.named_axes import as_mapped, axes_in_sight, with_rule
from jaxbptt._transforms.cotangents import (
    is_symbolic_zero,
    primal_values,
    with_none,
    without_symbolic,
)
from jaxbptt._transforms.groups import Groups
from jaxbptt._transforms.scan_backward import RecordedRun, pull_run
from jaxbptt._transforms.scan_forward import (
    Checkpoints,
    record_run,
    run_with_checkpoints,
    steps_between_checkpoints,
)
from jaxbptt._types import PyTree, is_reference, leaf_type, type_of
from jaxbptt._windows import RandomWindow, Windows


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
    remat: int | bool | None = None,
) -> tuple[PyTree, PyTree]:
    """`lax.scan` whose reverse-mode derivative reaches back `window` steps.

    The arguments before `window`, the results and the errors are those of `lax.scan`.
    Outputs come in groups of m = `every`, laid from the first step that runs, and all
    outputs of a group send their cotangents back together. A group of the steps
    first … end reaches back to step

        max(1, first - max(window - every, 0), end - window + 1)

    where λ stops, unless that is step 1: then it goes on into `init`. With a window for each
    part of the carry this holds for each leaf's λ. The final carry's cotangent goes with the
    last group. Arrays that `f` closes over are implicit parameters. The values and derivatives
    are those of

        def scan(f, init, xs, window, every):
            ys = []
            for first in range(0, len(xs), every):
                end = min(first + every, len(xs))
                reach = max(0, first - max(window - every, 0), end - window)
                carry, group = init, []
                for s, x in enumerate(xs[:end]):
                    if 0 < s == reach:
                        carry, group = jax.lax.stop_gradient((carry, group))
                    carry, y = f(carry, x)
                    group.append(y)
                ys += group[first:]
            return carry, jnp.stack(ys)

    in one loop forwards and one backwards.

    Args:
        f: `f(carry, x) -> (carry, y)`, one time step.
        init: the initial carry.
        xs: inputs, each leaf (length, *x.shape).
        length: number of steps; needed where `xs` has no leaves.
        reverse: whether to run from the last row of `xs` to the first.
        unroll: how many steps one trip of the compiled forward loop has, as in `lax.scan`.
        _split_transpose: taken as `lax.scan` takes it; a derivative of our own does not need it.
        window: how many steps the gradient reaches back, including the current one; None for
            all: full backpropagation through time. Or ints in the containers of the carry,
            or of its outer part: a window for each part. Or a `random_window`, whose cuts are
            drawn, and compensated so that the gradient is unbiased.
        every: how many outputs share one backward pass. `window == every` is truncation by
            chunks, 1 the sliding window.
        remat: of how many steps the residuals are held at once, as in `jax.remat`. The run
            keeps the carries at the starts of blocks of that many steps, and runs one block after
            the other again on the way back. True for a number that takes little memory, by the
            sizes of carry and residuals; None or False keeps the residuals of all steps. Side
            effects of `f` happen again too, as under `jax.checkpoint`, whose policies hold
            inside `f` as ever.

    Returns:
        `(carry, ys)`, as `lax.scan` returns them.

    Raises:
        ValueError: `window` is neither None nor a positive int nor such ints in containers
            that fit the carry, or `every` is not a positive int, or above 1 with a random window;
            `remat` is neither None, a bool nor a positive int.
        TypeError: whatever `lax.scan` refuses.

    Cost:
        In reverse mode the residuals of `length` steps, and for each step one pullback plus,
        where window > every, ceil(window / every) pullbacks of the carry, batched. With a window
        for each part these are pullbacks of the parts that are not over yet. With remat=k, in
        place of those residuals, length / k carries and the residuals of k steps, and one more
        run forwards. A derivative of `f` that is not linear in its cotangents, or has side effects,
        is pulled back for each group by itself; with remat=k the group's window, and up to 2k steps
        around it, then run again for each.

    References:
        Williams & Peng, "An Efficient Gradient-Based Algorithm for On-Line Training of
        Recurrent Network Trajectories", Neural Computation 2(4), 1990: BPTT(h; h′).

    Examples:
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
    _errors.is_remat(remat)
    if drawn and every > 1:
        raise _errors.random_groups(every)
    if callable(f):  # else lax.scan says so
        _errors.has_steps(type_of(jax.tree.map(jax.typeof, xs)))
    if windows is not None:
        # The loop that JAX traces has its carry in leaves; so have the windows from here on.
        by_leaf = windows.by_leaf(type_of(jax.eval_shape(lambda init: init, init)))
        windows = Windows.of(by_leaf or windows.longest)
    if (windows or drawn) and callable(f):
        f = _unforwarded(f, ys_too=windows is not None and windows.longest < every)

    def plain(init: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
        return lax_scan(f, init, xs, length, reverse, unroll, _split_transpose)

    if not windows and not drawn and jit_is_disabled():
        return plain(init, xs)  # a Python loop, which JAX differentiates step by step

    # lax.scan itself checks, promotes and hoists; what it leaves is one equation. With
    # jit disabled it would leave none.
    with jax.disable_jit(False):
        closed, shapes = jax.make_jaxpr(plain, return_shape=True)(init, xs)
    env: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(closed.jaxpr.invars, jax.tree.leaves((init, xs)), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    cut = _Cut(windows, every, drawn, remat or None)
    for eqn in closed.jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        # What stands around the loop (a hoisted constant, a promotion) runs as it is.
        is_loop = eqn.primitive.name == "scan"
        outs = _truncated(eqn, values, cut) if is_loop else bind(eqn, values)
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
        # Known by identity: a part that is returned as it came is the same tracer.
        came = {id(leaf) for leaf in jax.tree.leaves((carry, x))}
        outs = f(carry, x)
        if not isinstance(outs, tuple | list) or len(outs) != 2:
            return outs  # lax.scan says what is wrong with it

        def one(leaf: Any) -> Any:
            return lax.optimization_barrier(leaf) if id(leaf) in came else leaf

        return jax.tree.map(one, outs[0]), jax.tree.map(one, outs[1]) if ys_too else outs[1]

    return step


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How far back a run is differentiated; no windows and nothing drawn: all the way."""

    windows: Windows | None
    every: int
    drawn: RandomWindow | None
    remat: int | bool | None

    def groups(self, length: int, followed: Mask, *, linear: bool) -> Groups:
        """Which outputs reach which steps.

        Args:
            length: how many steps there are.
            followed: which leaves of the carry gradients flow through.
            linear: whether the pullback is known to be linear, so that groups may go back as one.
        """
        most = max(length, 1) + self.every - 1  # there are no more steps to reach
        steps = [most]
        if self.windows:
            steps = [w if w and not at_most(most, w) else most for w in self.windows.steps]
        by_leaf = pick(followed, steps) if self.windows and followed else []
        together = linear or not self.windows
        return Groups.of(length, by_leaf or [max(steps)], self.every, together=together)


def _truncated(eqn: core.JaxprEqn, values: list, cut: _Cut) -> list:
    """The equation of a scan, with a derivative of its own.

    Only when it is differentiated is a derivative traced, and then of what is perturbed alone.
    Every array is an argument of the `custom_vjp`: one only closed over gets no gradient.
    """
    body = eqn.params["jaxpr"].jaxpr
    # With nothing to cut and nothing to run again, JAX's own rule gives the same gradient.
    plain = not cut.windows and not cut.drawn and not cut.remat
    if plain and (any(map(is_reference, eqn.invars)) or leaves_explicit_axes(body)):
        # A derivative of our own can't write to references, nor stack what lies on a mesh that
        # is not the caller's: JAX's does both.
        return bind(eqn, values)
    length, reverse = eqn.params["length"], eqn.params["reverse"]
    if cut.remat and not isinstance(length, int):
        raise _errors.remat_of_symbolic(length)
    n_consts, n_carry = scan_counts(eqn)
    refuse_references(eqn.invars[:n_consts])
    for v in filter(is_reference, eqn.invars[n_consts:]):
        raise ValueError(
            "init and xs must be arrays where a window cuts, but got a mutable reference "
            f"{v.aval}. Pass its value, ref[...]."
        )
    values = [_strong(v) for v in values]
    consts, init = values[:n_consts], values[n_consts : n_consts + n_carry]
    axes = axes_in_sight([eqn])

    def run(consts: list, init: list, xs: list, factors: jax.Array | None) -> list:
        return as_mapped(axes, bind(eqn, [*consts, *init, *xs]))

    def forward(*args: Any) -> tuple[list, Any]:
        perturbed = [v.perturbed for group in args[:3] for v in group]
        consts, init, xs, factors = primal_values(args)
        # Only here is a derivative traced: this rule is called when something is perturbed.
        closure = _closure_of(eqn, perturbed)
        bound = dataclasses.replace(closure, closed_over=consts)
        outs, kept = _run(eqn, bound, init, xs, cut.remat)
        return as_mapped(axes, outs), (closure, kept, bound.invariant([]), factors)

    def backward(saved: Any, cts: list) -> tuple[list | None, ...]:
        closure, residuals, invariant, factors = saved
        layout = closure.layout
        ct_ys = pick(layout.followed_y, cts[n_carry:])
        asked = tuple(not is_symbolic_zero(v) for v in ct_ys)
        linear = closure.pullback(y=asked).is_linear
        groups = cut.groups(length, layout.followed.carry, linear=linear)
        ct = pull_run(
            RecordedRun(closure, asked, residuals, invariant, groups, factors, reverse),
            without_symbolic(pick(layout.followed.carry, cts[:n_carry]), closure.kinds.carry),
            pick(asked, ct_ys),
        )
        followed = layout.followed.closed_over, layout.followed.carry, layout.followed.x
        of_consts = ct.weights, ct.carry, ct.xs
        return *map(with_none, followed, as_mapped(axes, of_consts)), None

    factors = None if cut.drawn is None else cut.drawn.factors(length)
    run_truncated = with_rule(run, forward, backward, axes)
    return run_truncated(consts, init, values[n_consts + n_carry :], factors)


def _strong(value: Any) -> Any:
    """A weakly typed array made strong outside of our rule: its gradient is weak again by JAX's."""
    if not getattr(value, "weak_type", False):
        return value
    return lax.convert_element_type(value, value.dtype)


def _run(
    eqn: core.JaxprEqn, closure: Closure, init: list, xs: list, remat: int | bool | None
) -> tuple[list, list | Checkpoints]:
    """The outputs of a run, and its residuals or what they are made of when they are wanted."""
    length = eqn.params["length"]
    how = {name: eqn.params[name] for name in ("reverse", "unroll")}
    if not remat:
        run = record_run(closure, init, xs, length, **how)
        return [*run.carry, *run.ys], run.residuals
    init = [jnp.asarray(v) for v in init]  # a Python number has no shape
    block = steps_between_checkpoints(closure, init, length) if remat is True else int(remat)
    # Not the body itself: of a function with a rule of its own a second derivative is that of what
    # its rule computes forwards.
    n, forward = len(closure.layout.outputs.leaves), closure.forward
    outs = forward.jaxpr.replace(outvars=forward.jaxpr.outvars[:n])
    step = Program.of(prune(core.ClosedJaxpr(outs, forward.consts), effects=True))
    return run_with_checkpoints(step, closure.closed_over, init, xs, length, block, **how)


def _closure_of(eqn: core.JaxprEqn, perturbed: list[bool]) -> Closure:
    """The closure of a loop's body, in which gradients flow through what is perturbed.

    It does not hold the arrays that the body closes over, which are there when the loop runs.
    """
    body, (n_consts, n_carry) = eqn.params["jaxpr"], scan_counts(eqn)
    n = n_consts + n_carry
    # A leaf of the carry that starts unperturbed may be made of what is: to a fixpoint.
    flags = with_carry(body.jaxpr, perturbed, slice(n_consts, n))
    structs = [struct_like(v.aval) for v in body.jaxpr.invars]
    inputs, followed = (
        Inputs(tuple(vs[:n_consts]), (), tuple(vs[n_consts:n]), tuple(vs[n:]))
        for vs in (structs, flags)
    )
    outs = [leaf_type(v.aval) for v in body.jaxpr.outvars]
    closure = close(
        lambda leaves: core.jaxpr_as_fun(body)(*leaves),
        inputs,
        type_of((outs[:n_carry], outs[n_carry:], None)),
        followed,
        tuple(reached(body.jaxpr, flags)[n_carry:]),
        windows=[1] * n_carry,
        stored=False,
        references=has_references(body.jaxpr, deep=True),
    )
    return dataclasses.replace(closure, closed_over=[])
