"""One step's closure: the step traced once, into flat programs.

The only wing that knows how JAX differentiates a step. What `jax.vjp` returns holds a
jaxpr that is compared by identity, so that it can't be carried through a loop; its leaves,
the residuals, can. A step is therefore traced into `forward`, the step with its residuals;
`derive`, the residuals that depend on parameters alone; and its linearization, of which
each pullback is a transpose.

Gradients flow through floating and complex leaves only; the others (integers,
booleans, keys) take part in `forward` and are no part of a pullback.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from jax.extend import core

from jaxbptt import _errors
from jaxbptt._arrays import at_most, size_in_bytes, struct_like
from jaxbptt._closure.constants import SMALL, hashes_of_constants
from jaxbptt._closure.pullbacks import Inputs, Linearization, Mask, Pullback
from jaxbptt._closure.residuals import Residuals
from jaxbptt._closure.step import trace_step
from jaxbptt._jaxprs.dependence import with_carry
from jaxbptt._jaxprs.evaluate import (
    Program,
    has_references,
    in_one_piece,
    leaves_explicit_axes,
    on_other_axes,
    without_calls,
    without_repeats,
)
from jaxbptt._types import LeafType, PyTree, StepFn, TreeType, leaf_type, type_of
from jaxbptt._windows import Windows


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """What is known of a traced step without any array.

    Attributes:
        outputs: the type of (carry, y, aux).
        followed: of each group of inputs, the leaves that gradients flow through.
        followed_y: the leaves of y that have a cotangent.
        window: the longest window of a leaf of λ.
        parts: the window of each leaf of λ, or nothing where they have one.
        recorded: the outputs of `forward` that one step leaves on the ring.
        invariant: those that `derive` gives as well.
        constants: hashes of the closed-over arrays that are constants, None for the others.
        remade_bytes: bytes of residuals that the pullbacks recompute.
        linearization: what pullbacks are made of.
        with_calls: `forward` before its calls were inlined, which knows the user's lines.
    """

    outputs: TreeType
    followed: Inputs
    followed_y: Mask
    window: int
    parts: tuple[int, ...]
    recorded: tuple[int, ...]
    invariant: tuple[int, ...]
    constants: tuple[str | None, ...]
    remade_bytes: int
    linearization: Linearization
    with_calls: core.Jaxpr


class Sources(NamedTuple):
    """What gradients flow to beside the parameters: leaves that are chosen when a tape is made.

    Of the arrays that the step closes over some are no parameters but constants, to which none
    flow: these have a hash of their values here, the others None.
    """

    closed_over: Mask
    carry: Mask
    x: Mask
    constants: tuple[str | None, ...]


class Outcome(NamedTuple):
    """What one step makes."""

    step: PyTree  # (carry, y, aux)
    recorded: list  # the residuals for the ring
    invariant: list  # those that depend on parameters and constants alone


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["closed_over", "forward", "derive", "linear_consts"],
    meta_fields=["layout"],
)
@dataclasses.dataclass(frozen=True)
class Closure:
    """A traced step and its pullbacks, in flat leaves: a pytree of the arrays they close over.

    These may be tracers of an outer transformation. As a pytree the closure can be an argument or a
    residual of a `custom_vjp`, so that none of them outlives its trace.

    Attributes:
        closed_over: arrays that the step closes over, its implicit parameters.
        forward: the step with its residuals.
        derive: the invariant residuals, from parameters and constants alone.
        linear_consts: arrays that the linearization closes over.
        layout: all else.
    """

    closed_over: list
    forward: Program
    derive: Program
    linear_consts: list
    layout: Layout

    def run(self, params: list, carry: list, x: list) -> Outcome:
        """Runs the step."""
        # The program's outputs are the step's own, then all residuals; of these some are recorded.
        outs = self.forward(*self.closed_over, *params, *carry, *x)
        outputs, recorded, invariant = (
            self.layout.outputs,
            self.layout.recorded,
            self.layout.invariant,
        )
        step = outputs.treedef.unflatten(outs[: len(outputs.leaves)])
        return Outcome(step, [outs[i] for i in recorded], [outs[i] for i in invariant])

    def invariant(self, params: list) -> list:
        """The residuals that depend on parameters and constants alone."""
        return self.derive(*self.closed_over, *params)

    @property
    def kinds(self) -> Inputs:
        """Abstract values of the leaves of each group that are followed: of their cotangents."""
        invars = iter(self.forward.jaxpr.invars)
        return Inputs(
            *(
                [v.aval for v in pick(mask, list(itertools.islice(invars, len(mask))))]
                for mask in self.layout.followed
            )
        )

    @property
    def sources(self) -> Sources:
        """What gradients flow to beside the parameters."""
        followed = self.layout.followed
        constants = self.layout.constants
        return Sources(followed.closed_over, followed.carry, followed.x, constants)

    @property
    def slot(self) -> tuple[LeafType, ...]:
        """What one step leaves on the ring."""
        outs = self.forward.jaxpr.outvars
        return tuple(leaf_type(outs[i].aval) for i in self.layout.recorded)

    def pullback(
        self, *, carry: Sequence[bool] | bool = True, y: Sequence[bool] | bool = True
    ) -> Pullback:
        """The pullback for outputs of which some may have no cotangent.

        Args:
            carry: whether there is a λ, for all of its leaves or for each.
            y: whether there is a ȳ, for all of its leaves or for each.
        """
        linear, kinds = self.layout.linearization, self.kinds
        # One flag may stand for all leaves.
        n_carry = len(kinds.carry)
        of_carry = (carry,) * n_carry if isinstance(carry, bool) else tuple(carry)
        of_y = (y,) * (len(linear.outputs) - n_carry) if isinstance(y, bool) else tuple(y)
        program = linear.pull(self.linear_consts, (*of_carry, *of_y))
        recorded = len(self.layout.recorded)
        # The outputs come in the order of the inputs that they are the cotangents of.
        outvars = iter(program.jaxpr.outvars)
        return Pullback(
            program,
            recorded,
            linear.residuals - recorded,
            Inputs(*(list(itertools.islice(outvars, len(group))) for group in kinds)),
        )

    @property
    def y_in_carry(self) -> list[int | None]:
        """For each leaf of ȳ the leaf of λ that it can be added to, None where there is none.

        A recurrent cell mostly returns its new state, or a part of it, as its output too.
        """
        linear, n = self.layout.linearization, len(self.kinds.carry)
        return [linear.same_as(i, n) for i in range(n, len(linear.outputs))]

    @property
    def indifferent_to_y(self) -> bool:
        """Whether leaving ȳ out saves a pullback nothing but additions, and changes nothing."""
        linear, n = self.layout.linearization, len(self.kinds.carry)
        y = len(linear.outputs) - n
        spared = linear.heavy((True,) * (n + y)) - linear.heavy((True,) * n + (False,) * y)
        # A rule of the user's that is not linear need not give zero for zero.
        return not spared and self.pullback().is_linear


def trace(
    step: StepFn,
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    *,
    stored: bool,
    has_aux: bool,
    windows: Windows,
    sources: Sources | None = None,
    with_constants: bool = True,
) -> Closure:
    """Traces one step from canonical arguments.

    Args:
        step: the user's step.
        params: parameters: arrays, tracers or ShapeDtypeStructs, strongly typed.
        carry: the same for the carry.
        x: the same for one input.
        stored: whether values that depend on parameters alone go on the ring too.
        has_aux: whether y is a pair of what is differentiated and what is not.
        windows: how many steps λ of each part of the carry is followed.
        sources: what gradients flow to beside the parameters; None for all that they can flow to.
        with_constants: whether large arrays that the step closes over may be constants; for
            where `sources` is None.

    Raises:
        TypeError: the step doesn't return a pair, or not a carry of the type it was given.
    """
    flow, outputs = trace_step(step, params, carry, x, has_aux)
    inputs = Inputs(*map(jax.tree.leaves, (flow.consts, params, carry, x)))
    n = len(flow.consts)
    # What the step closes over as inputs like the others.
    jaxpr = flow.jaxpr.replace(constvars=[], invars=[*flow.jaxpr.constvars, *flow.jaxpr.invars])

    def run(leaves: list) -> list:
        return core.jaxpr_as_fun(core.ClosedJaxpr(flow.jaxpr, leaves[:n]))(*leaves[n:])

    def closure_of(sources: Sources) -> Closure:
        return close(
            run,
            inputs,
            outputs,
            _followed(jaxpr, inputs, sources),
            differentiable(jax.tree.leaves(outputs.tree()[1])),
            windows=windows.by_leaf(type_of(carry)) or [windows.longest],
            stored=stored,
            constants=sources.constants,
            references=has_references(jaxpr, deep=True),
        )

    if sources is None or len(sources.closed_over) != n:
        # A new tape, or one of a step that closes over another number of arrays: chosen anew.
        return _choose(closure_of, jaxpr, inputs, with_constants)
    return closure_of(sources)


def _choose(
    closure_of: Callable[[Sources], Closure],
    jaxpr: core.Jaxpr,
    inputs: Inputs,
    with_constants: bool,
) -> Closure:
    """The closure that follows what somebody may want the gradient of, unless it costs too much."""
    constants: tuple[str | None, ...] = (None,) * len(inputs.closed_over)
    # What a step without parameters closes over are its parameters, however large.
    if not any(differentiable(inputs.params)):
        return _widest(closure_of, inputs, constants)
    if with_constants:
        constants = hashes_of_constants(inputs.closed_over)
    closure = _widest(closure_of, inputs, constants)
    # λ of what moves by itself is shown by `ct.carry` and serves nothing else. A simulator's may
    # cost more than all the rest.
    driven = closure.sources._replace(carry=(False,) * len(inputs.carry))
    if _followed(jaxpr, inputs, driven) == closure.layout.followed:
        return closure
    smaller = closure_of(driven)
    spared = size_in_bytes(closure.slot) - size_in_bytes(smaller.slot)
    return smaller if at_most(SMALL + 1, spared) else closure


def _followed(jaxpr: core.Jaxpr, inputs: Inputs, sources: Sources) -> Inputs:
    """Of each group of inputs the leaves that gradients flow through.

    Of the carry these are the sources, and what a path from any source reaches.
    """
    of_params = differentiable(inputs.params)
    groups = sources.closed_over, of_params, sources.carry, sources.x
    first = len(sources.closed_over) + len(of_params)
    carry = slice(first, first + len(inputs.carry))
    # A leaf of the carry that no source reaches has no cotangent that anybody could ask for.
    flags = with_carry(jaxpr, [flag for group in groups for flag in group], carry)
    return Inputs(sources.closed_over, of_params, tuple(flags[carry]), sources.x)


def _widest(
    closure_of: Callable[[Sources], Closure], inputs: Inputs, constants: tuple[str | None, ...]
) -> Closure:
    """The closure that follows all leaves that it can, beside constants.

    Of a number that a loop runs on until it is done, or that a callback is given, JAX
    has no derivative. Beside the path from the parameters that does no harm.
    """
    groups = inputs.closed_over, inputs.carry, inputs.x
    every = [flag for group in groups for flag in differentiable(group)]
    every[: len(constants)] = [
        flag and v is None for flag, v in zip(every[: len(constants)], constants, strict=True)
    ]
    candidates = [i for i, flag in enumerate(every) if flag]

    def attempt(chosen: set[int]) -> Closure:
        flags = iter([i in chosen for i in range(len(every))])
        closed_over, carry, x = (tuple(itertools.islice(flags, len(group))) for group in groups)
        closure = closure_of(Sources(closed_over, carry, x, constants))
        closure.pullback()  # some derivatives are missed only when they are transposed
        return closure

    try:
        return attempt(set(candidates))
    except Exception as error:
        missed = error
    kept: set[int] = set()
    try:
        attempt(kept)
    except Exception:
        raise missed from None  # it is on the path from the parameters
    # Halves are tried until each leaf that spoils the derivative is alone: few do, so that few of
    # the attempts fail.
    untried = [candidates]
    while untried:
        some = untried.pop()
        try:
            attempt(kept | set(some))
            kept |= set(some)
        except Exception:
            half = len(some) // 2
            untried += [some[half:], some[:half]] if half else []
    return attempt(kept)


def close(
    run: Callable[[list], list],
    inputs: Inputs,
    outputs: TreeType,
    followed: Inputs,
    followed_y: Mask,
    *,
    windows: Sequence[int],
    stored: bool,
    references: bool,
    constants: tuple[str | None, ...] = (),
) -> Closure:
    """The closure of a step given by its leaves.

    Args:
        run: from the leaves of all inputs to those of the carry, y and aux.
        inputs: the leaves of each group, arrays or ShapeDtypeStructs.
        outputs: the type of (carry, y, aux).
        followed: of each group, the leaves that gradients flow through.
        followed_y: the leaves of y that have a cotangent.
        windows: the window of each leaf of the carry.
        stored: whether values that depend on parameters alone go on the ring too.
        references: whether the step writes to references.
        constants: hashes of the closed-over arrays that are constants; empty if there are none.
    """
    # The step is traced forwards with all that its derivative keeps; what of it goes on record is
    # decided after that, and the derivative is traced once more from what is on record.
    leaves, mask = ([leaf for group in groups for leaf in group] for groups in (inputs, followed))
    of_outs = followed.carry + followed_y
    found = _differentiated(run, leaves, mask, of_outs, references)
    constants = constants or (None,) * len(inputs.closed_over)
    # Under "stored" each step's own parameters count; a constant is the same at all steps.
    known = [not stored or v is not None for v in constants] + [not stored] * len(inputs.params)
    residuals = Residuals.of(found.forward, len(outputs.leaves), known)
    jaxpr = found.forward.jaxpr
    recorded = [jaxpr.outvars[i].aval for i in residuals.recorded]
    if any(map(on_other_axes, recorded)) and leaves_explicit_axes(jaxpr):
        raise _errors.inside_auto_axes()
    kinds = [v.aval for v in pick(of_outs, jaxpr.outvars[: len(of_outs)])]
    last = kinds if references else [v.aval for v in pick(mask, jaxpr.invars)]
    linear = _linear_map(found.treedef, residuals, last, references)
    # Where nothing of the carry is followed a window says how many slots there are, and no more.
    of_lambda = pick(followed.carry, windows) if any(followed.carry) else []
    return Closure(
        closed_over=list(inputs.closed_over),
        forward=Program.of(found.forward),
        derive=Program.of(residuals.derive),
        linear_consts=list(linear.consts),
        layout=Layout(
            outputs=outputs,
            followed=followed,
            followed_y=followed_y,
            window=max(of_lambda, default=max(windows, default=1)),
            parts=tuple(of_lambda) if len(set(of_lambda)) > 1 else (),
            recorded=residuals.recorded,
            invariant=residuals.invariant,
            constants=constants,
            remade_bytes=residuals.remade_bytes,
            linearization=Linearization(linear.jaxpr, references, len(residuals.structs), kinds),
            with_calls=found.with_calls,
        ),
    )


class _Differentiated(NamedTuple):
    """A step with its residuals, and the structure of what its derivative was."""

    with_calls: core.Jaxpr
    forward: core.ClosedJaxpr  # without calls: outputs of the step, then residuals
    treedef: jax.tree_util.PyTreeDef


def _differentiated(
    run: Callable[[list], list],
    leaves: list,
    mask: Sequence[bool],
    of_outs: Mask,
    references: bool,
) -> _Differentiated:
    """Traces a step together with its derivative by the leaves in the mask."""
    # Of a step that writes to references JAX gives a pullback as a whole, and no linear map.
    differentiate: Any = jax.vjp if references else jax.linearize
    found: list[jax.tree_util.PyTreeDef] = []

    def with_residuals(*leaves: Any) -> list:
        # Integers, keys and leaves that are not followed are constants here: JAX would give them
        # float0 tangents.
        def primal(*given: Any) -> tuple[list, list]:
            outs = run(combine(mask, given, pick(mask, leaves, False)))
            return pick(of_outs, outs[: len(of_outs)]), outs

        _, linear, outs = differentiate(primal, *pick(mask, leaves), has_aux=True)
        # What JAX returns is a function; only its leaves can be carried through a loop.
        residuals, treedef = jax.tree.flatten(linear)
        found.append(treedef)
        return [*outs, *residuals]

    with_calls = jax.make_jaxpr(with_residuals)(*leaves)
    (treedef,) = found
    forward = without_repeats(without_calls(with_calls, leaves))
    return _Differentiated(with_calls.jaxpr, forward, treedef)


def _linear_map(
    treedef: jax.tree_util.PyTreeDef, residuals: Residuals, last: list, references: bool
) -> core.ClosedJaxpr:
    """What the step's derivative was, as a program from residuals and what goes through it.

    Args:
        treedef: its structure.
        residuals: what its leaves are.
        last: abstract values of the tangents, or of the cotangents where it is a pullback.
        references: whether it is one.
    """

    def run(values: list, last: list) -> list:
        linear = treedef.unflatten(residuals.every(values))
        return list(linear(last) if references else linear(*last))

    structs = residuals.structs, list(map(struct_like, last))
    traced = jax.make_jaxpr(run)(*structs)
    if references:
        return in_one_piece(traced)
    return without_repeats(without_calls(traced, [*structs[0], *structs[1]]))


def pick(mask: Sequence[bool], leaves: Sequence, which: bool = True) -> list:
    """The leaves where the mask is `which`."""
    return [leaf for m, leaf in zip(mask, leaves, strict=True) if m == which]


def combine(mask: Sequence[bool], true: Iterable, false: Iterable) -> list:
    """One list again from what `pick` took for True and for False."""
    true, false = iter(true), iter(false)
    return [next(true) if m else next(false) for m in mask]


def differentiable(leaves: Iterable) -> Mask:
    """Which leaves gradients can flow through."""
    return tuple(bool(jnp.issubdtype(leaf.dtype, jnp.inexact)) for leaf in leaves)
