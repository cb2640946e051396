"""How a step's inputs reach its outputs, read from its jaxpr: what on the way cuts a gradient."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from jaxbptt._compat import scan_counts


@dataclasses.dataclass(frozen=True)
class Way:
    """How one value reaches another: over all paths between them.

    Attributes:
        smooth: whether a path exists on which nothing cuts the gradient.
        cuts: the operations that cut it on some path.
        rules: functions on some path that bring a derivative rule of their own.
    """

    smooth: bool = True
    cuts: frozenset[str] = frozenset()
    rules: frozenset[str] = frozenset()

    def __or__(self, other: "Way") -> "Way":
        """Side by side."""
        return Way(self.smooth or other.smooth, self.cuts | other.cuts, self.rules | other.rules)

    def then(self, other: "Way") -> "Way":
        """One after the other."""
        return Way(self.smooth and other.smooth, self.cuts | other.cuts, self.rules | other.rules)


Ways = dict[int, Way]  # by the number of the input
_FLAT = {"round", "floor", "ceil", "sign", "stop_gradient", "nextafter"}


def ways_by_lag(jaxpr: core.Jaxpr, n_params: int, n_carry: int, lags: int) -> list[Ways]:
    """For each lag, how each input of that step reaches the newest outputs, if it does.

    Args:
        jaxpr: the step, (params, carry, x) -> (carry, y) on flat leaves.
        n_params: leaves of the parameters.
        n_carry: leaves of the carry.
        lags: how many lags.
    """
    outs = _walk(jaxpr, [{i: Way()} for i in range(len(jaxpr.invars))])
    moving = [ways for v, ways in zip(jaxpr.outvars, outs, strict=True) if _inexact(v)]
    result = [_join(moving)]
    for _ in range(lags - 1):
        onward = [result[-1].get(n_params + j) for j in range(n_carry)]
        pairs = zip(outs, onward, strict=False)  # the outputs after the carry are y
        result.append(_join([_then(ways, way) for ways, way in pairs if way is not None]))
    return result


def narrowed_to(jaxpr: core.Jaxpr) -> Any:
    """The narrowest floating dtype that something wider is rounded to, or None."""
    found = []
    for eqn in jaxpr.eqns:
        for inner in _inner(eqn):
            found.append(narrowed_to(inner))
        into = [_real(v) for v in eqn.invars if _inexact(v)]
        found += [
            _real(v)
            for v in eqn.outvars
            if _inexact(v) and any(jnp.finfo(_real(v)).eps > jnp.finfo(d).eps for d in into)
        ]
    return max(filter(None, found), key=lambda d: float(jnp.finfo(d).eps), default=None)


def _walk(jaxpr: core.Jaxpr, ways: Sequence[Ways]) -> list[Ways]:
    env: dict[Any, Ways] = dict(zip(jaxpr.invars, ways, strict=True))
    for eqn in jaxpr.eqns:
        into = [env.get(v, {}) if isinstance(v, core.Var) else {} for v in eqn.invars]
        env.update(zip(eqn.outvars, _through(eqn, into), strict=True))
    return [env.get(v, {}) if isinstance(v, core.Var) else {} for v in jaxpr.outvars]


def _through(eqn: core.JaxprEqn, into: list[Ways]) -> list[Ways]:
    name, inner = eqn.primitive.name, _inner(eqn)
    if name == "cond":
        branches = [_walk(branch, into[1:]) for branch in inner]
        return [_join([into[0], *outs]) for outs in zip(*branches, strict=True)]
    if name == "scan":
        return _through_scan(eqn, into)
    if name.startswith("custom_"):
        ways = _then(_join(into), Way(rules=frozenset([_rule_name(eqn)])))
        return [_cut(ways, eqn, v) for v in eqn.outvars]
    if len(inner) == 1 and _one_to_one(eqn, inner[0]):  # a call: jit, checkpoint
        return _walk(inner[0], into)
    return [_cut(_join(into), eqn, v) for v in eqn.outvars]


def _through_scan(eqn: core.JaxprEqn, into: list[Ways]) -> list[Ways]:
    """As often round the loop, once at least, as it takes until no further way is found."""
    (first, n), (body,) = scan_counts(eqn), _inner(eqn)
    carry = into[first : first + n]
    while True:
        outs = _walk(body, [*into[:first], *carry, *into[first + n :]])
        joined = [_join(pair) for pair in zip(carry, outs[:n], strict=True)]
        if joined == carry:
            return outs
        carry = joined


def _cut(ways: Ways, eqn: core.JaxprEqn, out: Any) -> Ways:
    """What is left after an equation: nothing smooth, if its derivative is zero."""
    name = eqn.primitive.name
    if _inexact(out) and name not in _FLAT:
        return ways
    if name == "convert_element_type":
        name = f"a cast to {out.aval.dtype}"
    stop = Way(False, frozenset([name]))
    return {i: way.then(stop) if way.smooth else way for i, way in ways.items()}


def _join(several: Sequence[Ways]) -> Ways:
    joined: Ways = {}
    for ways in several:
        for i, way in ways.items():
            joined[i] = joined[i] | way if i in joined else way
    return joined


def _then(ways: Ways, way: Way) -> Ways:
    return {i: before.then(way) for i, before in ways.items()}


def _inner(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
    """The jaxprs among an equation's parameters, the consts of closed ones left out."""
    found = []
    for value in eqn.params.values():
        several = value if isinstance(value, tuple | list) else (value,)
        found += [getattr(v, "jaxpr", v) for v in several]
    return [v for v in found if isinstance(v, core.Jaxpr)]


def _one_to_one(eqn: core.JaxprEqn, inner: core.Jaxpr) -> bool:
    sizes = (len(eqn.invars), len(eqn.outvars))
    return sizes == (len(inner.invars), len(inner.outvars))


def _rule_name(eqn: core.JaxprEqn) -> str:
    info = getattr(_inner(eqn)[0], "debug_info", None) if _inner(eqn) else None
    return getattr(info, "func_name", None) or eqn.primitive.name


def _inexact(atom: Any) -> bool:
    return bool(jnp.issubdtype(atom.aval.dtype, jnp.inexact))


def _real(atom: Any) -> Any:
    return jnp.finfo(atom.aval.dtype).dtype
