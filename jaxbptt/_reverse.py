"""The reverse sweep over a whole run: every chain in flight, and each weight's contraction.

One loop over the steps, newest first. The chains that are alive (see `_groups`) are
pulled back together, batched; the weights and x take one more pullback, of the sum of
the chains' cotangents, for that pullback is linear. What the weights' contractions need
is emitted for a block of steps and contracted at its end, so that the emitted operands
never take more than a fraction of what the residuals take.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbptt._avals import zeros
from jaxbptt._chain import dense_weights, densify
from jaxbptt._closure import Closure
from jaxbptt._contract import Split, where_or_zero
from jaxbptt._groups import Groups

_SHARE = 0.2  # emitted operands take at most this share of the residuals' memory


@dataclasses.dataclass(frozen=True)
class Run:
    """A recorded run.

    Attributes:
        stacks: the recorded residuals, each (length, *residual.shape).
        fixed: the residuals that are the same at all steps.
        groups: which outputs reach which steps.
        reverse: whether step 1 is the last row of the stacks.
    """

    stacks: list
    fixed: list
    groups: Groups
    reverse: bool


def pull_run(closure: Closure, run: Run, ct_carry: list, ct_ys: list) -> tuple[list, list, list]:
    """Cotangents of the weights, the initial carry and xs of a run.

    Args:
        closure: the traced step.
        run: the recorded run.
        ct_carry: cotangent of the final carry.
        ct_ys: cotangents of ys, each (length, *y.shape).
    """
    groups = run.groups
    if not groups.length:
        no_xs = [jnp.zeros((0, *kind.shape), kind.dtype) for kind in closure.cotangents["x"]]
        kinds = [*closure.cotangents["hoisted"], *closure.cotangents["params"]]
        return [zeros(kind) for kind in kinds], ct_carry, no_xs
    split = closure.split("pull", ("carry", "x") if groups.chains == 1 else ("x",))
    block = _block(split, run)
    trip = functools.partial(_trip, closure, run, split, ct_ys)

    def pull_block(state: Any, start: Any, size: int) -> tuple[Any, list]:
        lam, sums, contracted = state
        places = start + jnp.arange(size, dtype=jnp.int32)
        backwards = not run.reverse
        (lam, sums), (xs, emitted) = lax.scan(trip, (lam, sums), places, reverse=backwards)
        terms = split.contract(emitted)
        return (lam, sums, [a + b for a, b in zip(contracted, terms, strict=True)]), xs

    state = (_first(closure, groups, ct_carry), split.zero_sums(), split.zero_contractions())
    (lam, sums, contracted), xs = _in_blocks(pull_block, state, run, block)
    unvaried = closure.unvaried(split, run.fixed)
    weights = split.finish(closure.consts["pull"], unvaried, contracted, sums)
    if groups.chains > 1:
        lam = [jnp.sum(v, 0) for v in lam]
    return dense_weights(closure, weights), lam, xs


def _first(closure: Closure, groups: Groups, ct_carry: list) -> list:
    """λ of each chain before the last step: the final carry's cotangent is the last group's."""
    if groups.chains == 1:
        return ct_carry
    own = groups.own(groups.length)
    return [_select(own, v[None]) for v in ct_carry]


def _trip(
    closure: Closure, run: Run, split: Split, ct_ys: list, state: Any, place: Any
) -> tuple[Any, Any]:
    """One step backwards."""
    lam, sums = state
    groups = run.groups
    residuals = [lax.dynamic_index_in_dim(v, place, 0, keepdims=False) for v in run.stacks]
    residuals = closure.residuals(residuals, run.fixed)
    ct_y = [lax.dynamic_index_in_dim(v, place, 0, keepdims=False) for v in ct_ys]
    step = groups.length - place if run.reverse else place + 1
    alive = groups.alive(step)
    single = groups.chains == 1
    if single and not groups.whole:
        lam = [where_or_zero(~groups.starts(step), v) for v in lam]
    elif not single:
        own = groups.own(step)
        keep = alive & ~(groups.starts(step) & own)
        lam = [_select(keep, v) for v in lam]
    total = lam if single else [jnp.sum(v, 0) for v in lam]
    outs, emitted, terms = split.one_lag(closure.consts["pull"], [*residuals, *total, *ct_y])
    n = len(lam) if single else 0
    xs = densify(outs[n:], closure.cotangents["x"])
    # With several chains a step's own is always alive; a single one may be over.
    live = alive[0] if single and not groups.whole else True
    if live is not True:
        xs, emitted = ([where_or_zero(live, v) for v in vs] for vs in (xs, emitted))
    if single:
        lam = densify(outs[:n], closure.cotangents["carry"])
        if live is not True:
            lam = [where_or_zero(live, v) for v in lam]
    else:
        older = _pull_chains(closure, residuals, lam, ct_y, own)
        lam = [_select(alive, v) for v in older]
    return (lam, split.add(sums, terms, live)), (xs, emitted)


def _pull_chains(closure: Closure, residuals: list, lam: list, ct_y: list, own: jax.Array) -> list:
    """Each chain's λ one step further; the step's own chain takes ȳ in."""
    kinds = closure.cotangents["carry"]
    both = closure.split("pull", ("carry",), weights=False)

    def pull(lam: list, ct_y: list) -> list:
        outs, _, _ = both.one_lag(closure.consts["pull"], [*residuals, *lam, *ct_y])
        return densify(outs, kinds)

    if closure.indifferent_to_y:
        return _batched(pull, lam, [_select(own, v[None]) for v in ct_y])
    alone = closure.split("pull_carry", ("carry",), weights=False)

    def pull_carry(lam: list) -> list:
        outs, _, _ = alone.one_lag(closure.consts["pull_carry"], [*residuals, *lam])
        return densify(outs, kinds)

    older = _batched(pull_carry, lam)
    present = pull([jnp.zeros_like(v[0]) for v in lam], ct_y)
    return [v + _select(own, u[None]) for v, u in zip(older, present, strict=True)]


def _batched(pull: Callable, *args: list) -> list:
    """`vmap` over the chains, or one after the other where a pullback can't be batched."""
    try:
        return jax.vmap(pull)(*args)
    except NotImplementedError:
        return lax.map(lambda row: pull(*row), args)


def _select(flags: jax.Array, values: jax.Array) -> jax.Array:
    """Of each chain its values where its flag is set, else zeros."""
    return where_or_zero(flags.reshape(flags.shape + (1,) * (values.ndim - 1)), values)


def _block(split: Split, run: Run) -> int:
    """How many steps' operands are emitted before they are contracted."""
    length = run.groups.length
    emitted = sum(v.aval.size * v.aval.dtype.itemsize for v in split.emitted)
    held = sum(v.size * v.dtype.itemsize for v in run.stacks)
    if not emitted:
        return length
    most = min(length, max(1, int(_SHARE * held / emitted), -(-length // 8)))
    even = [size for size in range(most, max(most // 2, 1) - 1, -1) if length % size == 0]
    return even[0] if even else most


def _in_blocks(pull_block: Callable, state: Any, run: Run, block: int) -> tuple[Any, list]:
    """Runs blocks of steps newest first, those left over before the others."""
    length = run.groups.length
    count, rest = divmod(length, block)
    parts = []
    if rest:
        start = 0 if run.reverse else length - rest
        state, newest = pull_block(state, start, rest)
        parts.append(newest)
    if count:
        starts = (rest if run.reverse else 0) + block * jnp.arange(count, dtype=jnp.int32)

        def body(state: Any, start: Any) -> tuple[Any, list]:
            return pull_block(state, start, block)

        state, xs = lax.scan(body, state, starts, reverse=not run.reverse)
        parts.append([v.reshape(count * block, *v.shape[2:]) for v in xs])
    if not run.reverse:
        parts.reverse()
    return state, [
        jnp.concatenate(vs) if rest and count else vs[0] for vs in zip(*parts, strict=True)
    ]
