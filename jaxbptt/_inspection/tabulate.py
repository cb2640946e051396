"""`tabulate`: lists what the tape holds of a step, and what `jax.checkpoint` would save."""

import dataclasses
import itertools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from jaxbptt._arrays import as_strong_arrays, size_in_bytes, struct_like
from jaxbptt._closure import step as _step
from jaxbptt._closure.closure import Closure
from jaxbptt._transforms.record import Recorder, record, trace_recorder
from jaxbptt._types import LeafType, PyTree, StepFn, leaf_type

_PLACES = ("ring", "parameters", "made again")
_POLICIES = "everything_saveable dots_saveable dots_with_no_batch_dims_saveable nothing_saveable"
# Code in these folders is not the user's.
_SKIPPED = tuple(os.path.join(os.path.dirname(file), "") for file in (jax.__file__, __file__))


@dataclasses.dataclass(frozen=True)
class Row:
    """One residual of a step.

    Attributes:
        name: from `checkpoint_name`, else an input's key path, file and line, or the primitive.
        primitive: what made it, "" for an input.
        source: path and line of the user's code that made it, "" where unknown. For a function
            of JAX that was traced before, this can be its first caller's, on some versions.
        shape: at one step.
        dtype: its dtype.
        nbytes: bytes at one step.
        place: "ring": recorded at every step; "parameters": derived from parameters or
            constants alone; "made again": recomputed from other residuals, by a few cheap
            elementwise operations.
    """

    name: str
    primitive: str
    source: str
    shape: tuple[int, ...]
    dtype: Any
    nbytes: int
    place: str


@dataclasses.dataclass(frozen=True)
class Policy:
    """The step under `jax.checkpoint` with a policy.

    Attributes:
        name: of the policy in `jax.checkpoint_policies`.
        nbytes: bytes on the ring per step.
        products: how many matrix products and convolutions a pullback of the step recomputes.
    """

    name: str
    nbytes: int
    products: int


@dataclasses.dataclass(frozen=True)
class Table:
    """What a tape holds; made by `tabulate`, printed as aligned text.

    Attributes:
        rows: the residuals of a step, the largest first.
        nbytes: bytes of the ring, window times the bytes per step.
        policies: the same step under `jax.checkpoint`.
        suggestion: a policy that saves at least a fifth of the ring, in a sentence, or None.
    """

    rows: list[Row]
    nbytes: int
    policies: list[Policy]
    suggestion: str | None

    def __str__(self) -> str:
        rows = [("bytes", "type", "where", "value")]
        for r in self.rows:
            value = dict.fromkeys([r.name, r.primitive, os.path.basename(r.source)])
            kind = str(LeafType(r.shape, r.dtype))
            rows.append((f"{r.nbytes:,}", kind, r.place, " ".join(filter(None, value))))
        rest = [("bytes", "under jax.checkpoint, policy", "products again")]
        rest += [(f"{p.nbytes:,}", p.name, str(p.products)) for p in self.policies]
        sums = [sum(r.nbytes for r in self.rows if r.place == place) for place in _PLACES]
        each = ", ".join(f"{place} {n:,}" for place, n in zip(_PLACES, sums, strict=True))
        total = f"Bytes per step: {each}. On the tape: {self.nbytes:,}."
        return "\n".join([*_aligned(rows), total, "", *_aligned(rest), self.suggestion or ""])


def tabulate(
    step: StepFn,
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    *,
    window: PyTree = 1,
    weights: str = "stored",
    has_aux: bool = False,
) -> Table:
    """Lists what `record` would keep of a step: each value with its origin, bytes and place.

    Args:
        step: `step(params, carry, x) -> (carry, y)`, one time step.
        params: parameters: arrays or `jax.ShapeDtypeStruct`s of any structure, shapes and dtypes.
        carry: the same for the carry, of the type that the step returns.
        x: the same for one input.
        window: how many steps the tape holds, as for `record`.
        weights: "stored" or "current".
        has_aux: whether y is a pair `(y, aux)`.

    Returns:
        A `Table`.

    Raises:
        TypeError: the step doesn't return `(carry, y)` with the carry's type.
        ValueError: an argument is one that `record` or `Recorder.init` refuses.

    Cost:
        Seven traces of the step. Nothing runs and nothing is allocated.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxbptt
        >>> def step(params, carry, x):
        ...     h = jnp.tanh(params["w"] @ carry["h"] + x)
        ...     return {"h": h}, h.sum()
        >>> w, h = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 8), (8,)))
        >>> table = jaxbptt.tabulate(step, {"w": w}, {"h": h}, h, window=10, weights="current")
        >>> [(row.name, row.place) for row in table.rows if not row.primitive]
        [("params['w']", 'parameters'), ("carry['h']", 'ring')]
        >>> table.nbytes  # at each of 10 steps carry['h'] and a value of tanh's, 32 bytes each
        640
    """
    recorder = record(step, window=window, weights=weights, has_aux=has_aux)
    if weights == "replayed":
        raise ValueError(
            "weights must be 'stored' or 'current' for a table of residuals, but got 'replayed', "
            "whose ring holds the carry and x of each step and nothing else."
        )
    trees = {"params": params, "carry": carry, "x": x}
    given = {name: as_strong_arrays(tree, name, structs=True) for name, tree in trees.items()}
    nbytes = jax.eval_shape(recorder.init, *given.values()).nbytes
    closure = trace_recorder(recorder, *given.values())
    rows = _rows(closure, given)
    # What each of JAX's policies would leave on the tape, found by tracing the step under it.
    tried = [_under_policy(recorder, name, closure, given) for name in _POLICIES.split()]
    policies = [policy for policy in tried if policy]
    return Table(rows, nbytes, policies, _suggestion(_ring_bytes(closure), policies))


class _Origin(NamedTuple):
    """Where a value of a jaxpr comes from."""

    variable: Any  # the input, or what the equation below made
    primitive: str  # "" for an input
    source: str  # path and line
    tag: str  # from `checkpoint_name`, or ""


def _rows(closure: Closure, given: dict[str, PyTree]) -> list[Row]:
    jaxpr = closure.layout.with_calls
    paths = [f"closed over [{i}]" for i in range(len(closure.closed_over))]
    for group, tree in given.items():
        paths += [group + jax.tree_util.keystr(k) for k, _ in jax.tree.leaves_with_path(tree)]
    path = {id(v): name for v, name in zip(jaxpr.invars, paths, strict=True)}
    # A value that comes from an input unchanged is called by the input's path.
    origins = [_origin(jaxpr, v) for v in jaxpr.outvars]
    tags = {id(origin.variable): origin.tag for origin in origins if origin.tag}
    place = dict.fromkeys(closure.layout.recorded, "ring")
    place |= dict.fromkeys(closure.layout.invariant, "parameters")
    outs, n, rows = closure.forward.jaxpr.outvars, len(closure.layout.outputs.leaves), []
    # The same value may be a residual more than once.
    first = {id(v): i for i, v in reversed([*enumerate(outs)]) if i >= n}
    for i in sorted(first.values()):
        origin, kind = origins[i], leaf_type(outs[i].aval)
        line, nbytes = os.path.basename(origin.source), size_in_bytes([outs[i].aval])
        # The value may be tagged and used under its tag, or beside it.
        name = tags.get(id(origin.variable)) or path.get(id(origin.variable))
        name = name or line or origin.primitive or "constant"
        made = origin.primitive, origin.source
        rows.append(Row(name, *made, kind.shape, kind.dtype, nbytes, place.get(i, "made again")))
    return sorted(rows, key=lambda row: (-row.nbytes, _PLACES.index(row.place)))


def _origin(jaxpr: core.Jaxpr, v: Any) -> _Origin:
    """Follows a variable back to what made it, into calls and past mere tags."""
    maker, tag = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}, ""
    while isinstance(v, core.Var) and v in maker:
        eqn = maker[v]
        name, inner = eqn.primitive.name, eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        inner = getattr(inner, "jaxpr", inner)
        # `checkpoint_name` and what `jax.checkpoint` puts around residuals change no value.
        if name in ("name", "reduce_precision"):
            tag, v = tag or eqn.params.get("name", ""), eqn.invars[0]
        elif name != "scan" and inner and len(inner.outvars) == len(eqn.outvars):
            found = _origin(inner, inner.outvars[eqn.outvars.index(v)])
            tag = tag or found.tag
            if found.variable not in inner.invars:
                return found._replace(source=found.source or _line(eqn), tag=tag)
            # The call hands an argument through: go on from what was passed.
            v = eqn.invars[inner.invars.index(found.variable)]
        else:
            return _Origin(v, name, _line(eqn), tag)
    return _Origin(v, "", "", tag)


def _line(eqn: core.JaxprEqn) -> str:
    """Path and line of the user's code that an equation comes from, or ""."""
    frames = getattr(eqn.source_info.traceback, "frames", ())
    # Frames below these are of whoever called tabulate.
    inner = itertools.takewhile(lambda f: f.file_name not in (_step.__file__, __file__), frames)
    users = (f for f in inner if not f.file_name.startswith(_SKIPPED))
    return next((f"{f.file_name}:{f.line_num}" for f in users), "")


def _under_policy(
    recorder: Recorder, name: str, plain: Closure, given: dict[str, PyTree]
) -> Policy | None:
    """Traces the step under `jax.checkpoint`; None where JAX can't."""
    policy = getattr(jax.checkpoint_policies, name)
    # The step may be an object that is not hashable, which jax.checkpoint would ask for.
    step = jax.checkpoint(lambda *args: recorder.step(*args), policy=policy)
    try:
        closure = trace_recorder(dataclasses.replace(recorder, step=step), *given.values())
    except (NotImplementedError, TypeError):  # ordered effects, complex values
        return None
    again = _products(closure.pullback().program.jaxpr) - _products(plain.pullback().program.jaxpr)
    return Policy(name, _ring_bytes(closure), max(again, 0))


def _ring_bytes(closure: Closure) -> int:
    """Bytes that one step leaves on the ring."""
    return size_in_bytes(struct_like(kind) for kind in closure.slot)


def _products(jaxpr: core.Jaxpr) -> int:
    """Counts matrix products and convolutions, those in a scan once for each iteration."""
    count = 0
    for eqn in jaxpr.eqns:
        nested = [getattr(p, "jaxpr", p) for p in jax.tree.leaves([*eqn.params.values()])]
        inner = sum(_products(p) for p in nested if isinstance(p, core.Jaxpr))
        # How often a while loop runs isn't known, nor which branch: each jaxpr counts once.
        count += inner * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        count += eqn.primitive.name in ("dot_general", "conv_general_dilated")
    return count


def _suggestion(per_step: int, policies: list[Policy]) -> str | None:
    """Of the policies that save a fifth or more, the one that recomputes least, in a sentence."""
    small = [p for p in policies if 5 * p.nbytes <= 4 * per_step > 0]
    if not small:
        return None
    # Time is worth more than bytes: among those that save enough, the cheapest.
    best = min(small, key=lambda p: (p.products, p.nbytes))
    return (
        f"Try jax.checkpoint(step, policy=jax.checkpoint_policies.{best.name}): {best.nbytes:,} "
        f"bytes per step (-{1 - best.nbytes / per_step:.0%}), {best.products} products again."
    )


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns of equal width, the numbers in the first one to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[row[0].rjust(widths[0]), *map(str.ljust, row[1:], widths[1:])] for row in rows]
    return ["  ".join(row).rstrip() for row in cells]
