"""One step's closure: traced, flattened, split by what it depends on, and rebuilt.

The only file that knows what `jax.vjp` returns. The closure's treedef holds a
jaxpr that is compared by identity, so the closure itself can't be carried through
a loop; its leaves, the residuals, can. A step is therefore traced once into flat
programs: `forward` is the step with its residuals, `pull` the closure applied to
residuals, `pull_carry` what remains of it for a zero cotangent of y, and `derive`
the residuals that depend on parameters alone.

Gradients flow through floating and complex leaves only; the others (integers,
booleans, keys) take part in `forward` and are no part of a pullback.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import jax
from jax import numpy as jnp
from jax.extend import core

from jaxbptt import _errors
from jaxbptt._avals import LeafType, TreeType, canonical, leaf_type, type_of
from jaxbptt._interpret import (
    UNKNOWN,
    ZERO,
    Marker,
    drop,
    interpret,
    known_rule,
    merge,
    prune,
    zero_rule,
)
from jaxbptt._types import PyTree, StepFn

Mask: TypeAlias = tuple[bool, ...]
Consts: TypeAlias = dict[str, list]

_INPUTS = ("step", "params", "carry", "x")  # groups of input leaves; "step": closed over by it


class Program:
    """A jaxpr apart from the arrays it closes over; outputs known beforehand are Markers."""

    def __init__(self, closed: core.ClosedJaxpr, kinds: Sequence[Marker | None]):
        self.jaxpr, self.consts, self.kinds = closed.jaxpr, list(closed.consts), kinds

    def __call__(self, consts: list, args: Iterable) -> list:
        outs = core.jaxpr_as_fun(core.ClosedJaxpr(self.jaxpr, consts))(*args)
        return merge(outs, self.kinds)


@dataclasses.dataclass(frozen=True)
class Closure:
    """A traced step and its pullback, in flat leaves.

    `consts` are the arrays closed over: by the step (its implicit parameters) and by
    each program. They may be tracers of an outer transformation, so whoever puts the
    programs inside a `custom_vjp` passes them as arguments and calls `bind`.
    """

    consts: Consts
    programs: dict[str, Program]
    outputs: TreeType  # of (carry, y, aux)
    masks: dict[str, Mask]  # the differentiable leaves of step, params, carry, x and y
    picked: tuple[int, ...]  # positions of the residuals, each value once
    place: tuple[int, ...]  # of each residual, its index in `picked`
    fixed: Mask  # of each picked residual: is it derived instead of recorded?
    slot: tuple[LeafType, ...]  # what one step leaves on the ring

    def bind(self, consts: Consts) -> "Closure":
        """The same closure over other arrays."""
        return dataclasses.replace(self, consts=consts)

    def forward(self, params: list, carry: list, x: list) -> tuple[PyTree, list, list]:
        """The step: (carry, y, aux), the residuals for the ring, and the fixed ones."""
        args = [*self.consts["step"], *params, *carry, *x]
        outs = self.programs["forward"](self.consts["forward"], args)
        n = len(self.outputs.leaves)
        residuals = [outs[n + i] for i in self.picked]
        recorded, fixed = pick(self.fixed, residuals, False), pick(self.fixed, residuals)
        return self.outputs.treedef.unflatten(outs[:n]), recorded, fixed

    def derive(self, params: list) -> list:
        """The fixed residuals, from the parameters alone."""
        return self.programs["derive"](self.consts["derive"], [*self.consts["step"], *params])

    def pull(
        self, recorded: list, fixed: list, ct_carry: list, ct_y: list | None
    ) -> dict[str, list]:
        """Applies the closure: cotangents of step, params, carry and x, or ZERO.

        `ct_y=None` is a zero cotangent of y, and what only y leads to costs nothing.
        """
        values = fill(self.fixed, fixed, recorded)
        name = "pull_carry" if ct_y is None else "pull"
        args = [*(values[i] for i in self.place), *ct_carry, *(ct_y or ())]
        outs = iter(self.programs[name](self.consts[name], args))
        return {group: [next(outs) for m in self.masks[group] if m] for group in _INPUTS}

    def cotangents_of(self, group: str) -> list[Any]:
        """The abstract values of the cotangents that `pull` gives for a group of inputs."""
        counts = [sum(self.masks[g]) for g in _INPUTS]
        start = sum(counts[: _INPUTS.index(group)])
        outs = self.programs["pull"].jaxpr.outvars
        return [v.aval for v in outs[start : start + sum(self.masks[group])]]


def trace(
    step: StepFn, params: PyTree, carry: PyTree, x: PyTree, *, stored: bool, has_aux: bool
) -> Closure:
    """Traces one step from canonical arguments.

    Args:
        step: the user's step.
        params: parameters: arrays, tracers or ShapeDtypeStructs, strongly typed.
        carry: the same for the carry.
        x: the same for one input.
        stored: whether values that depend on parameters alone go on the ring too.
        has_aux: whether y is a pair of what is differentiated and what is not.

    Raises:
        TypeError: the step doesn't return a pair, or not a carry of the type it was given.
    """
    flow, outputs = _trace_step(step, params, carry, x, has_aux)
    groups = dict(zip(_INPUTS, map(jax.tree.leaves, (flow.consts, params, carry, x)), strict=True))
    y = jax.tree.leaves(outputs.tree()[1])
    masks = {name: _differentiable(leaves) for name, leaves in (groups | {"y": y}).items()}
    # Nobody can ask for the gradient of a closed-over array that isn't a tracer.
    masks["step"] = tuple(
        m and isinstance(c, jax.core.Tracer)
        for m, c in zip(masks["step"], flow.consts, strict=True)
    )
    programs: dict[str, Program] = {}

    def record(*leaves):
        outs, pull = _vjp(flow, leaves, masks)
        residuals, apply = _unpack(pull)
        cts = pick(masks["carry"] + masks["y"], outs[: len(groups["carry"]) + len(y)])
        programs.update(_trace_pull(apply, residuals, cts, sum(masks["carry"])))
        return [*outs, *residuals]

    closed = jax.make_jaxpr(record)(*(leaf for leaves in groups.values() for leaf in leaves))
    variables = closed.jaxpr.outvars[len(outputs.leaves) :]
    first: dict[int, int] = {}
    for i, v in enumerate(variables):
        first.setdefault(id(v), i)
    programs["forward"] = Program(closed, [None] * len(closed.jaxpr.outvars))
    programs["derive"], fixed = _trace_derive(
        closed, groups, [len(outputs.leaves) + i for i in first.values()], stored
    )
    recorded = pick(fixed, [variables[i] for i in first.values()], False)
    return Closure(
        consts={"step": list(flow.consts)} | {name: p.consts for name, p in programs.items()},
        programs=programs,
        outputs=outputs,
        masks=masks,
        picked=tuple(first.values()),
        place=tuple(list(first).index(id(v)) for v in variables),
        fixed=fixed,
        slot=tuple(leaf_type(v.aval) for v in recorded),
    )


def pick(mask: Sequence[bool], leaves: Sequence, which: bool = True) -> list:
    """The leaves where the mask is `which`."""
    return [leaf for m, leaf in zip(mask, leaves, strict=True) if m == which]


def fill(mask: Sequence[bool], true: Iterable, false: Iterable) -> list:
    """One list again from what `pick` took for True and for False."""
    true, false = iter(true), iter(false)
    return [next(true) if m else next(false) for m in mask]


def _differentiable(leaves: Iterable) -> Mask:
    return tuple(bool(jnp.issubdtype(leaf.dtype, jnp.inexact)) for leaf in leaves)


def _trace_step(
    step: StepFn, params: PyTree, carry: PyTree, x: PyTree, has_aux: bool
) -> tuple[core.ClosedJaxpr, TreeType]:
    """The step as a jaxpr, what it closes over among its consts; the type of its outputs."""

    def checked(params, carry, x):
        pair = step(params, carry, x)
        _errors.is_pair(pair, what="a pair (carry, y)", remedy="Return None for y if there is none.")
        new_carry, y = pair
        aux = None
        if has_aux:
            what = "y as a pair (y, aux) because has_aux=True"
            _errors.is_pair(y, what=what, remedy="Return (carry, (y, aux)).")
            y, aux = y
        new_carry = canonical(new_carry, "the carry that step returned", TypeError)
        _errors.same_type(
            "step must return a carry of the type it was given",
            type_of(carry),
            type_of(new_carry),
            "Return the carry in the containers, shapes and dtypes that it came in, "
            "e.g. with h.astype(jnp.float32).",
            error=TypeError,
        )
        return new_carry, *canonical((y, aux), "the y that step returned", TypeError)

    closed, shapes = jax.make_jaxpr(checked, return_shape=True)(params, carry, x)
    return closed, type_of(shapes)


def _vjp(flow: core.ClosedJaxpr, leaves: Sequence, masks: dict[str, Mask]) -> tuple[list, Any]:
    """Outputs of the step and its `jax.vjp` closure over the differentiable leaves."""
    mask = [m for group in _INPUTS for m in masks[group]]
    n, n_carry = len(flow.consts), len(masks["carry"])
    outs_mask = masks["carry"] + masks["y"]

    def primal(*differentiable):
        every = fill(mask, differentiable, pick(mask, leaves, False))
        outs = core.jaxpr_as_fun(core.ClosedJaxpr(flow.jaxpr, every[:n]))(*every[n:])
        return pick(outs_mask, outs[: n_carry + len(masks["y"])]), outs

    _, pull, outs = jax.vjp(primal, *pick(mask, leaves), has_aux=True)
    return outs, pull


def _unpack(pull: Any) -> tuple[list, Any]:
    """The residuals of a closure, keys as raw numbers, and the function that applies it to such."""
    leaves, treedef = jax.tree.flatten(pull)
    is_key = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    # A ring of typed keys can't be filled with zeros.
    impls = [jax.random.key_impl(v) if k else None for v, k in zip(leaves, is_key, strict=True)]
    raw = [jax.random.key_data(v) if k else v for v, k in zip(leaves, is_key, strict=True)]

    def apply(raw, cts):
        wrapped = [
            v if impl is None else jax.random.wrap_key_data(v, impl=impl)
            for v, impl in zip(raw, impls, strict=True)
        ]
        return treedef.unflatten(wrapped)(cts)

    return raw, apply


def _trace_pull(apply: Any, residuals: list, cts: list, n_carry: int) -> dict[str, Program]:
    """The programs `pull` and `pull_carry`; `cts` are examples of the cotangents."""
    pull = prune(jax.make_jaxpr(apply)(residuals, cts))
    kinds: list = []

    def without_y(residuals, ct_carry):
        args = [*residuals, *ct_carry, *[ZERO] * (len(cts) - n_carry)]
        outs = interpret(pull.jaxpr, pull.consts, args, zero_rule)
        kinds[:] = [v if v is ZERO else None for v in outs]
        return drop(outs, outs)

    pull_carry = prune(jax.make_jaxpr(without_y)(residuals, cts[:n_carry]))
    return {
        "pull": Program(pull, [None] * len(pull.jaxpr.outvars)),
        "pull_carry": Program(pull_carry, kinds),
    }


def _trace_derive(
    forward: core.ClosedJaxpr, groups: dict[str, list], positions: list[int], stored: bool
) -> tuple[Program, Mask]:
    """The program for the outputs at `positions` that are known without carry and x."""
    kinds: list = []

    def known(hoisted, params):
        parameters = [UNKNOWN if stored else v for v in (*hoisted, *params)]
        unknown = [UNKNOWN] * (len(groups["carry"]) + len(groups["x"]))
        outs = interpret(forward.jaxpr, forward.consts, [*parameters, *unknown], known_rule)
        kinds[:] = [outs[i] if outs[i] is UNKNOWN else None for i in positions]
        return drop([outs[i] for i in positions], kinds)

    closed = prune(jax.make_jaxpr(known)(groups["step"], groups["params"]))
    return Program(closed, [None] * len(closed.jaxpr.outvars)), tuple(k is None for k in kinds)
