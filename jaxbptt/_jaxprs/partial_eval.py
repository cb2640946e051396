"""Partial evaluation of a program of which some inputs are unknown.

Which values depend on neither carry nor x is found by reading the step's program, with the marker
UNKNOWN on those two, rather than by comparing arrays.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core

from jaxbptt._compat import lax_scan, scan_counts
from jaxbptt._jaxprs.evaluate import (
    UNKNOWN,
    Marker,
    Value,
    acts,
    bind,
    drop,
    interpret,
    merge,
)


def known_rule(eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    """Outputs that depend on an UNKNOWN input are UNKNOWN; loops and branches are split.

    So are equations with side effects, and what depends on them: what a reference holds is not
    seen from here.
    """
    if acts(eqn):
        return [UNKNOWN] * len(eqn.outvars)
    if not any(v is UNKNOWN for v in values):
        return bind(eqn, values)
    if eqn.primitive.name == "scan":
        return _known_scan(eqn, values)
    if eqn.primitive.name == "cond" and values[0] is not UNKNOWN:
        return _known_cond(eqn, values)
    return [UNKNOWN] * len(eqn.outvars)


def _known_scan(eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    """The part of an inner scan that can run without its unknown inputs.

    A scan over stacked layers is the everyday case: what it keeps of the weights
    is known although the activations beside it are not.
    """
    p = eqn.params
    body, length = p["jaxpr"], p["length"]
    n, carries = scan_counts(eqn)
    m = n + carries
    consts, init, xs = values[:n], values[n:m], values[m:]
    # There is no first iteration to look at.
    if length == 0:
        return [UNKNOWN] * len(eqn.outvars)

    def trip(carry: list, x: list) -> list[Value]:
        args = [*consts, *merge(carry, init), *merge(x, xs)]
        return interpret(body.jaxpr, body.consts, args, known_rule)

    def first(carry: list, xs: list) -> list[Value]:
        return trip(carry, [lax.index_in_dim(x, 0, keepdims=False) for x in xs])

    # A carry that enters known may leave unknown: start again with it unknown.
    while True:
        kinds = _kinds(first, drop(init, init), drop(xs, xs))
        known = drop(init, init)
        init = [kinds[i] or v for i, v in enumerate(init)]
        if len(drop(init, init)) == len(known):
            break
    ys_kinds = kinds[len(init) :]

    def known_trip(carry: list, x: list) -> tuple[list, list]:
        outs = trip(carry, x)
        return drop(outs[: len(init)], init), drop(outs[len(init) :], ys_kinds)

    # The known part of the loop runs by itself; the rest of it will run with the step.
    last, ys = lax_scan(
        known_trip,
        drop(init, init),
        drop(xs, xs),
        length=length,
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    return merge(last, init) + merge(ys, ys_kinds)


def _known_cond(eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    # An output is known if it is known in every branch: which one runs is not decided here.
    index, operands = values[0], values[1:]

    def runner(branch: core.ClosedJaxpr) -> Callable[[list], list[Value]]:
        def run(arrays: list) -> list[Value]:
            return interpret(branch.jaxpr, branch.consts, merge(arrays, operands), known_rule)

        return run

    runs = [runner(branch) for branch in eqn.params["branches"]]
    each = [_kinds(run, drop(operands, operands)) for run in runs]
    kinds = [UNKNOWN if UNKNOWN in kind else None for kind in zip(*each, strict=True)]
    # All branches must give the same outputs: those that every one of them knows.
    branches = [lambda arrays, run=run: drop(run(arrays), kinds) for run in runs]
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        outs = lax.switch(index, branches, drop(operands, operands))
    else:
        outs = _on_platform(platforms, branches, drop(operands, operands))
    return merge(outs, kinds)


def _on_platform(platforms: Sequence, branches: list[Callable], arrays: list) -> list:
    """The branch of the platform: no other can be compiled there, so that a switch won't do."""
    # Each branch has the names of its platforms, or None for those that no other has.
    named = {name: b for names, b in zip(platforms, branches, strict=True) for name in names or ()}
    default = [b for names, b in zip(platforms, branches, strict=True) if names is None]
    return lax.platform_dependent(arrays, default=default[0] if default else None, **named)


def _kinds(run: Callable[..., list[Value]], *arrays: Any) -> list[Value]:
    """For each output of `run` its Marker, or None where it is an array."""
    kinds: list[Value] = []

    def look(*arrays: Any) -> None:
        kinds[:] = [v if isinstance(v, Marker) else None for v in run(*arrays)]

    jax.eval_shape(look, *arrays)
    return kinds
