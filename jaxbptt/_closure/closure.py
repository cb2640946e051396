"""One step's closure: traced, flattened, split by what it depends on, and rebuilt.

The only file that knows what `jax.vjp` returns. The closure's treedef holds a
jaxpr that is compared by identity, so the closure itself can't be carried through
a loop; its leaves, the residuals, can. A step is therefore traced once into flat
programs, without calls inside: `forward` is the step with its residuals, `pull` the
closure applied to residuals (see `_pulls` for its variants), and `derive` the residuals
that depend on parameters alone.

Gradients flow through floating and complex leaves only; the others (integers,
booleans, keys) take part in `forward` and are no part of a pullback.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import jax
from jax import numpy as jnp
from jax.extend import core

from jaxbptt._closure.contract import Split
from jaxbptt._closure.contraction import split
from jaxbptt._closure.pullbacks import heavy, trace_pulls
from jaxbptt._closure.residuals import Residuals
from jaxbptt._closure.step import trace_step
from jaxbptt._jaxprs.evaluate import ZERO, acts, without_calls
from jaxbptt._jaxprs.linearity import is_linear
from jaxbptt._types import LeafType, PyTree, StepFn, TreeType, leaf_type, type_of
from jaxbptt._windows import Windows

Mask: TypeAlias = tuple[bool, ...]
Consts: TypeAlias = dict[str, list]

# Groups of input leaves. "hoisted" are the arrays that the step closes over.
_WEIGHTS = ("hoisted", "params")
_INPUTS = (*_WEIGHTS, "carry", "x")


@dataclasses.dataclass(frozen=True)
class Closure:
    """A traced step and its pullback, in flat leaves.

    `consts` holds the arrays closed over: "hoisted" by the step (its implicit
    parameters), and by each program under its name. They may be tracers of an outer
    transformation, so whoever puts the programs inside a `custom_vjp` passes them as
    arguments and calls `bind`.
    """

    consts: Consts
    programs: dict[str, core.Jaxpr]
    outputs: TreeType  # of (carry, y, aux)
    cotangents: dict[str, list[Any]]  # abstract values of the pullback's outputs, by group
    masks: dict[str, Mask]  # the differentiable leaves of hoisted, params, carry, x and y
    recorded: tuple[int, ...]  # outputs of `forward` that go on the ring
    fixed: tuple[int, ...]  # outputs of `forward` that `derive` gives as well
    slot: tuple[LeafType, ...]  # what one step leaves on the ring
    spared: int  # bytes of residuals that the pullbacks make again
    zero: dict[str, Mask]  # of each pullback, the outputs that are zero and not in its program
    over: dict[str, Mask]  # of each, the leaves of the carry whose window is over
    window: int  # the longest window of a leaf of λ
    parts: tuple[int, ...]  # the window of each leaf of λ, or nothing where they have one
    asked: Mask  # the differentiable hoisted arrays whose gradient anybody could ask for
    linear: bool  # whether the pullback is known to be linear in λ and ȳ

    def bind(self, consts: Consts) -> "Closure":
        """The same closure over other arrays."""
        return dataclasses.replace(self, consts=consts)

    def explicit_only(self) -> "Closure":
        """The same closure, its pullbacks leaving out what the step closes over."""
        return dataclasses.replace(self, asked=(False,) * len(self.asked))

    def forward(self, params: list, carry: list, x: list) -> tuple[PyTree, list, list]:
        """The step: (carry, y, aux), the residuals for the ring, and the fixed ones."""
        outs = self._run("forward", [*self.consts["hoisted"], *params, *carry, *x])
        step = self.outputs.treedef.unflatten(outs[: len(self.outputs.leaves)])
        return step, [outs[i] for i in self.recorded], [outs[i] for i in self.fixed]

    def derive(self, params: list) -> list:
        """The fixed residuals, from the parameters alone."""
        return self._run("derive", [*self.consts["hoisted"], *params])

    def unvaried(self, split: Split, fixed: list) -> list:
        """The arguments of a divided program that are the same at all lags, None elsewhere."""
        before, after = self._around_fixed(split.jaxpr)
        return [None] * before + fixed + [None] * after

    def split(
        self, name: str, wanted: Sequence[str], *, weights: bool = True, effects: bool = True
    ) -> Split:
        """A pullback, divided, with these groups wanted at each lag."""
        jaxpr, zero, over = self.programs[name], self.zero[name], self.over[name]
        rest = iter(fill(zero, [ZERO] * sum(zero), jaxpr.outvars))
        of: dict[str, list] = {
            group: [next(rest) for _ in self.cotangents[group]] for group in _INPUTS
        }
        before, after = self._around_fixed(jaxpr)
        constant = [False] * before + [True] * len(self.fixed) + [False] * after
        of["carry"] = [ZERO if o else v for v, o in zip(of["carry"], over, strict=True)]
        of["hoisted"] = [v if m else ZERO for v, m in zip(of["hoisted"], self.asked, strict=True)]
        summed = [v for group in _WEIGHTS for v in of[group]] if weights else []
        outs = [v for group in wanted for v in of[group]]
        return split(jaxpr, constant, summed, outs, effects=effects)

    @property
    def acts(self) -> bool:
        """Whether the pullback has side effects."""
        return any(map(acts, self.programs["pull"].eqns))

    @property
    def indifferent_to_y(self) -> bool:
        """Whether a zero ȳ saves the pullback nothing but additions."""
        pull, pull_carry = (heavy(self.programs[name]) for name in ("pull", "pull_carry"))
        return pull == pull_carry

    def over_at(self, lag: int, parts: Sequence[int]) -> int:
        """How many of the distinct windows are over at a lag, `parts` being what they reach."""
        return len({w for w, part in zip(self.parts, parts, strict=True) if part <= lag})

    def by_group(self, weights: list) -> dict[str, list]:
        """A flat list over the weights, by group."""
        n = len(self.cotangents["hoisted"])
        return {"hoisted": weights[:n], "params": weights[n:]}

    def _around_fixed(self, jaxpr: core.Jaxpr) -> tuple[int, int]:
        """How many inputs a pullback has before and after the fixed residuals."""
        before = len(self.slot)
        return before, len(jaxpr.invars) - before - len(self.fixed)

    def _run(self, name: str, args: list) -> list:
        return core.jaxpr_as_fun(core.ClosedJaxpr(self.programs[name], self.consts[name]))(*args)


def trace(
    step: StepFn,
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    *,
    stored: bool,
    has_aux: bool,
    windows: Windows,
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

    Raises:
        TypeError: the step doesn't return a pair, or not a carry of the type it was given.
    """
    flow, outputs = trace_step(step, params, carry, x, has_aux)
    groups = dict(zip(_INPUTS, map(jax.tree.leaves, (flow.consts, params, carry, x)), strict=True))
    masks = {name: differentiable(leaves) for name, leaves in groups.items()}
    masks["y"] = differentiable(jax.tree.leaves(outputs.tree()[1]))
    found: list = []

    def record(*leaves: Any) -> list:
        outs, residuals, pull = _vjp(flow, leaves, masks)
        found.append(pull)
        return [*outs, *residuals]

    leaves = [leaf for group in groups.values() for leaf in group]
    forward = without_calls(jax.make_jaxpr(record)(*leaves), leaves)
    n, (pull,) = len(outputs.leaves), found
    residuals = Residuals.of(forward, n, len(groups["hoisted"] + groups["params"]), stored)
    of_leaves = pick(masks["carry"], windows.by_leaf(type_of(carry)))
    parts = of_leaves if len(set(of_leaves)) > 1 else []
    pulls = trace_pulls(pull, residuals, sum(masks["carry"]), parts)
    programs = {"forward": forward, "derive": residuals.derive}
    programs |= {name: p.closed for name, p in pulls.items()}
    cotangents = iter(v.aval for v in programs["pull"].jaxpr.outvars)
    return Closure(
        consts={"hoisted": list(flow.consts)} | {k: list(p.consts) for k, p in programs.items()},
        programs={k: p.jaxpr for k, p in programs.items()},
        outputs=outputs,
        cotangents={g: [next(cotangents) for _ in range(sum(masks[g]))] for g in _INPUTS},
        masks=masks,
        recorded=residuals.recorded,
        fixed=residuals.fixed,
        slot=tuple(leaf_type(forward.jaxpr.outvars[i].aval) for i in residuals.recorded),
        spared=residuals.spared,
        zero={name: p.zero for name, p in pulls.items()},
        over={name: p.over for name, p in pulls.items()},
        window=max(of_leaves, default=windows.longest),
        parts=tuple(parts),
        linear=is_linear(pull, residuals.count),
        asked=tuple(isinstance(v, jax.core.Tracer) for v in pick(masks["hoisted"], flow.consts)),
    )


def pick(mask: Sequence[bool], leaves: Sequence, which: bool = True) -> list:
    """The leaves where the mask is `which`."""
    return [leaf for m, leaf in zip(mask, leaves, strict=True) if m == which]


def fill(mask: Sequence[bool], true: Iterable, false: Iterable) -> list:
    """One list again from what `pick` took for True and for False."""
    true, false = iter(true), iter(false)
    return [next(true) if m else next(false) for m in mask]


def differentiable(leaves: Iterable) -> Mask:
    """Which leaves gradients can flow through."""
    return tuple(bool(jnp.issubdtype(leaf.dtype, jnp.inexact)) for leaf in leaves)


def _vjp(
    flow: core.ClosedJaxpr, leaves: Sequence, masks: dict[str, Mask]
) -> tuple[list, list, core.ClosedJaxpr]:
    """Outputs of the step, its residuals, and its pullback from residuals and cotangents."""
    mask = [m for group in _INPUTS for m in masks[group]]
    outs_mask = masks["carry"] + masks["y"]
    n = len(flow.consts)

    def primal(*differentiable: Any) -> tuple[list, list]:
        every = fill(mask, differentiable, pick(mask, leaves, False))
        outs = core.jaxpr_as_fun(core.ClosedJaxpr(flow.jaxpr, every[:n]))(*every[n:])
        return pick(outs_mask, outs[: len(outs_mask)]), outs

    _, pull, outs = jax.vjp(primal, *pick(mask, leaves), has_aux=True)
    residuals, treedef = jax.tree.flatten(pull)

    def apply(residuals: list, cts: list) -> tuple:
        return jax.tree.unflatten(treedef, residuals)(cts)

    examples = pick(outs_mask, outs[: len(outs_mask)])
    return outs, residuals, jax.make_jaxpr(apply)(residuals, examples)
