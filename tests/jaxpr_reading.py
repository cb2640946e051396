"""How tests look into programs."""

import collections
import re

import jax


def inner(eqn):
    """The jaxprs among an equation's parameters: of loops, branches and calls."""
    for value in jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
    ):
        jaxpr = getattr(value, "jaxpr", value)
        if hasattr(jaxpr, "eqns"):
            yield jaxpr


def primitives(jaxpr):
    """How often each primitive stands in a program, inner programs included."""
    found = collections.Counter(eqn.primitive.name for eqn in jaxpr.eqns)
    for eqn in jaxpr.eqns:
        for each in inner(eqn):
            found += primitives(each)
    return found


# What hands a ring on, or writes one slot of it in place.
IN_PLACE = {"parameter", "get-tuple-element", "bitcast", "dynamic-update-slice"}


def rings_made_anew(compiled, ring_shapes):
    """The instructions of a compiled program that make another array of a ring's shape."""
    shapes = {",".join(map(str, shape)) for shape in ring_shapes}
    lines = compiled.as_text().splitlines()
    roots, name = {}, None  # of each computation, the operation at its root
    for line in lines:
        if head := re.match(r"%?([\w.\-]+) \(.*\{\s*$", line):
            name = head[1]
        elif root := re.search(r"ROOT .*? = \S+ ([\w\-]+)\(", line):
            roots[name] = root[1]
    found = []
    for line in lines:
        # A copy-start has a pair for its result.
        made = re.search(r"= \(?\w+\[([\d,]*)\][^=]*? ([\w\-]+)\(", line)
        if not made or made[1] not in shapes:
            continue
        operation = made[2]
        if operation == "fusion":
            operation = roots[re.search(r"calls=%?([\w.\-]+)", line)[1]]
        if operation not in IN_PLACE:
            found.append(line.strip())
    return found


def products(jaxpr, in_loop=False):
    """Of each matrix product the shape of what it makes, and whether it is in a loop."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.outvars[0].aval.shape, in_loop
        for body in inner(eqn):
            loop = in_loop or eqn.primitive.name in ("scan", "while")
            yield from products(body, loop)


def arrays(jaxpr):
    """The shapes of all values, those inside loops and calls included."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for body in inner(eqn):
            yield from arrays(body)
