"""What many tests do: draw numbers, record a run in one compiled loop, pull a `scan` back, SGD."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import lax
from oracles import is_moving, moving, refill

import jaxbptt

F64 = jnp.float64


# ------------------------------------------------------------------- cases


def grid(cases: Any, always: Any) -> list:
    """Parameters of a test: all cases, those that are not in `always` in the exhaustive tier.

    Args:
        cases: values, or tuples of values for several arguments.
        always: those of them that the default tier runs: a list of them, or a function of a case.
    """
    cases = list(cases)
    chosen = always if callable(always) else list(always).__contains__
    kept = [case for case in cases if chosen(case)]
    assert kept, "the default tier would run no case"
    if not callable(always):
        assert len(kept) == len(list(always)), "a case of the default tier is not in the grid"
    return [
        case if chosen(case) else pytest.param(*_as_args(case), marks=pytest.mark.exhaustive)
        for case in cases
    ]


def _as_args(case):
    return case if type(case) is tuple else (case,)


# ----------------------------------------------------------------- numbers


def draw(seed: int, *shape: int, scale: float = 0.5, dtype: Any = F64) -> jax.Array:
    """Normal numbers; drawn in NumPy, since each shape would be compiled by JAX."""
    return jnp.asarray(scale * numbers(seed, *shape, dtype=dtype), dtype)


def numbers(seed: int, *shape: int, dtype: Any = np.float64) -> np.ndarray:
    """Normal numbers as NumPy has them, complex ones with an imaginary part of their own."""
    value = np.random.default_rng(seed).normal(size=shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        value = value + 1j * np.random.default_rng(seed + 1000).normal(size=shape)
    return value


def drawer(scale: float = 0.5) -> Any:
    """A function from a shape to normal numbers, others at each call."""
    rng = np.random.default_rng(0)

    def draw(*shape: int, dtype: Any = F64) -> jax.Array:
        return jnp.asarray(scale * rng.normal(size=shape), dtype)

    return draw


def weigh(ct: Any, tree: Any) -> Any:
    """A float64 scalar whose gradient with respect to `tree` is `ct`."""
    pairs = zip(moving(ct), moving(tree), strict=True)
    return sum((jnp.sum(jnp.real(a * b)).astype(F64) for a, b in pairs), 0.0)


def ct_like(tree: Any, values: Any) -> Any:
    """A cotangent of `tree` with these values in its moving leaves, float0 in the others."""
    values = iter(values)
    return jax.tree.map(
        lambda v: next(values) if is_moving(v) else np.zeros(v.shape, jax.dtypes.float0), tree
    )


def first(tree: Any) -> Any:
    """Of leaves with an axis over steps, those of the first step."""
    return jax.tree.map(lambda leaf: leaf[0], tree)


def recorded(rec, thetas, carry, xs, t):
    """The tape after t steps."""

    @jax.jit
    def go(thetas, carry, xs):
        def one(tape, row):
            return rec(row[0], tape, row[1])[0], None

        tape = rec.init(first(thetas), carry, first(xs))
        return lax.scan(one, tape, (thetas, xs), length=t)[0]

    rows = oracles.stack(oracles.unstack(xs, t))
    return go(oracles.stack(thetas[:t]), carry, rows)


def worst(got: Any, wanted: Any) -> float:
    """The largest error, relative to each leaf's largest value (to 1 where that is zero)."""

    def one(a, b):
        a, b = np.asarray(a), np.asarray(b)
        scale = float(np.max(np.abs(b), initial=0.0)) or 1.0
        return float(np.max(np.abs(a - b), initial=0.0)) / scale

    return max(jax.tree.leaves(jax.tree.map(one, got, wanted)))


# ------------------------------------------------------------------ record


class Online(NamedTuple):
    """What `online` found; each a list with an entry for each step.

    Attributes:
        grads: the gradient inside the loop: (of the parameters, of x), their moving leaves.
        cts: what `pullback` says after the step.
        ys: the outputs.
        carries: the carries after the steps.
    """

    grads: list
    cts: list
    ys: list
    carries: list


def online(rec: Any, run: oracles.Run, ct_ys: list, ct_carries: list | None = None) -> Online:
    """Records a run in one compiled loop and takes its gradient both ways at every step.

    Args:
        rec: a recorder of `run.step` with every=1.
        run: parameters for each step, the first carry, the inputs.
        ct_ys: for each step a cotangent of its output.
        ct_carries: for each step a cotangent of its carry; zero if left out.
    """
    carries, ys = run.trajectory
    if ct_carries is None:
        ct_carries = [ct_like(c, oracles.zeros_of(c)) for c in carries]

    @jax.jit
    def go(stacked, carry, cts):
        def one(tape, row):
            (theta, x), ct_y, ct_carry = row
            ct_y, ct_carry = ct_like(ys[0], ct_y), ct_like(carries[0], ct_carry)

            def loss(values, inputs):
                new, y = rec(refill(theta, values), tape, refill(x, inputs))
                return weigh(ct_y, y) + weigh(ct_carry, new.carry), (new, y)

            of_both = jax.grad(loss, (0, 1), has_aux=True)
            grads, (new, y) = of_both(moving(theta), moving(x))
            ct = rec.pullback(theta, new, one_row(ct_y), ct_carry)
            found = Online(grads, moving_only(ct), y, new.carry)
            return new, found

        thetas, xs = stacked
        tape = rec.init(first(thetas), carry, first(xs))
        return lax.scan(one, tape, (stacked, *cts), length=run.length)[1]

    cts = [oracles.by_step([moving(ct) for ct in each]) for each in (ct_ys, ct_carries)]
    found = go(run.stacked, run.carry, cts)
    return Online(*(oracles.unstack(each, run.length) for each in found))


def one_row(ct_y: Any) -> Any:
    """The cotangent of one output as `pullback` wants it, with an axis over outputs."""
    return jax.tree.map(lambda v: v[None], ct_y)


def moving_only(ct: Any) -> oracles.Expected:
    """Cotangents without their float0 leaves, which no compiled function returns."""
    return oracles.Expected(moving(ct.params), moving(ct.carry), moving(ct.xs))


def sgd(rec: Any, rate: float, loss: Any = lambda y: y) -> Any:
    """The body of an online loop: SGD by the gradient of each step's loss of y.

    It takes ((params, tape), x) and returns the next of these, and (the loss, the gradient).
    """

    def update(state, x):
        params, tape = state

        def loss_fn(params):
            new_tape, y = rec(params, tape, x)
            return loss(y), new_tape

        (value, tape), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return (jax.tree.map(lambda p, g: p - rate * g, params, grads), tape), (value, grads)

    return update


# -------------------------------------------------------------------- scan


def pulled(
    step: Any, params: Any, carry: Any, xs: Any, length: int, ct_ys: list, ct_carry: Any, **how: Any
) -> tuple[oracles.Expected, Any]:
    """The cotangents that `scan` sends back, and its outputs.

    Args:
        step: `step(params, carry, x)`; the parameters are what f closes over.
        params: the parameters.
        carry: init.
        xs: inputs, leaves (length, ...).
        length: the number of steps.
        ct_ys: for each step a cotangent of its output.
        ct_carry: a cotangent of the last carry.
        how: window, every, reverse, …
    """

    def run(thetas, init, inputs):
        now, rows = refill(carry, init), refill(xs, inputs)
        closed_over = refill(params, thetas)
        last, ys = jaxbptt.scan(
            lambda c, x: step(closed_over, c, x), now, rows, length=length, **how
        )
        return (moving(last), moving(ys)), (last, ys)

    @jax.jit
    def go(thetas, init, inputs, cts):
        _, pull, outs = jax.vjp(run, thetas, init, inputs, has_aux=True)
        return pull(cts), outs

    cts = moving(ct_carry), [np.stack(vs) for vs in zip(*map(moving, ct_ys), strict=True)]
    got, outs = go(moving(params), moving(carry), moving(xs), cts)
    return oracles.Expected(*got), outs


# --------------------------------------------------------------- processes

ROOT = Path(jaxbptt.__file__).parents[1]
# Seconds for what another process does. It ends one that hangs, and says nothing of how fast one
# must be: on a machine with ten times the load all takes ten times as long.
PATIENCE = 1800


def environment(**changes: str | None) -> dict[str, str]:
    """The environment of a process that imports this library, and compiles as the tests do.

    What has been compiled is shared, and XLA's costlier passes are off; the other settings of
    the tests are not there.

    Args:
        changes: variables that are to be otherwise; None takes one away.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    changes = {"PYTHONPATH": path, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | changes
    return {k: v for k, v in (os.environ | changes).items() if v is not None}


def run_python(*arguments: Any, cwd: Path, **changes: str | None) -> subprocess.CompletedProcess:
    """Runs Python as a reader would, with warnings as errors; see `environment` for changes."""
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(**changes),
        timeout=PATIENCE,
    )


def not_there(program: str) -> set[str]:
    """The names that a program takes from `jaxbptt`, as far as there are none."""
    nodes = list(ast.walk(ast.parse(program)))
    names = {n.attr for n in nodes if isinstance(n, ast.Attribute) and _is_ours(n.value)}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "jaxbptt":
            names |= {alias.name for alias in node.names}
    return {name for name in names if not hasattr(jaxbptt, name)}


def _is_ours(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "jaxbptt"
