"""`check_step`: holds the recorded gradient of a step against finite differences."""

import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from jaxbptt import _errors
from jaxbptt._arrays import as_strong_arrays
from jaxbptt._inspection import check_report as words
from jaxbptt._inspection.check_compare import compare
from jaxbptt._inspection.check_report import Finding, Report
from jaxbptt._inspection.check_run import recorded_run, row
from jaxbptt._transforms.record import record
from jaxbptt._types import PyTree, StepFn


def check_step(
    step: StepFn,
    params: PyTree,
    carry: PyTree,
    xs: PyTree,
    *,
    window: int,
    weights: str = "stored",
    has_aux: bool = False,
    tolerance: float | None = None,
) -> Report:
    """Holds a step's recorded gradient against finite differences, by leaf and lag.

    With the carry that enters the window kept fixed, L = Re ⟨ȳ, y_t⟩ + Re ⟨c̄, c_t⟩ for
    random ȳ and c̄ is a function of one copy of the parameters, the carry and x per lag
    k. For each leaf θ of these and random directions v of ±1, what is compared is

        Re ⟨∂L/∂θ_{t-k}, v⟩  recorded,   (4 D(h/2) - D(h)) / 3  in float64,
        D(h) = (L(θ_{t-k} + h v) - L(θ_{t-k} - h v)) / 2h

    so that no reverse rule of the step is trusted; then the sum over lags with the
    gradient that a recorder of the step itself gives. h is ∛ε of the leaf's size.

    Args:
        step: `step(params, carry, x) -> (carry, y)`, as for `record`.
        params: parameters of the step, arrays of any dtype.
        carry: the carry that enters the first step.
        xs: inputs, each leaf (T, *x.shape), T ≥ 1 steps; without leaves, T is `window`.
        window: how many steps back to look from step T, the newest included.
        weights: as for `record`.
        has_aux: as for `record`.
        tolerance: the relative difference allowed, √ε of the narrowest dtype that the
            step computes in by default.

    Returns:
        A `Report`: `ok`, `findings`, readable when printed, `raise_if_bad()` for tests.

    Raises:
        ValueError: `window` is not a positive int, a leaf of `xs` has no axis over time
            or one of another length, `tolerance` is not positive, or an argument is traced.
        TypeError: the step doesn't return `(carry, y)` with the carry's type.

    Cost:
        T recorded steps, 2 * `window` pullbacks and, for each leaf at each lag, 15 runs of
        `window` steps. In bytes the ring, and three copies of the parameters per lag in
        float64. Meant for small sizes, outside of jit.

    References:
        Griewank & Walther, "Evaluating Derivatives", SIAM, 2008: differences, their errors.

    Example:
        >>> import jax.numpy as jnp, jaxbptt
        >>> step = lambda w, c, x: (jnp.tanh(w * c + x), jnp.round(w) * c)
        >>> jaxbptt.check_step(step, 0.5, 0.0, jnp.ones(4), window=2).ok
        True
    """
    params, carry, xs, length = _arguments(params, carry, xs, window, tolerance)
    args = (params, carry, row(xs, 0))
    record(step, window=window, weights=weights, has_aux=has_aux).init(*args)  # refuses misuse

    plain = _without_aux(step, has_aux)
    bad = _unsteady(_without_aux(_unjitted(step), has_aux), args)
    if bad := bad or _not_finite_given(params, carry, xs):
        return Report(False, bad)
    recorded, carries, ys = recorded_run(plain, params, carry, xs, length, window, weights)
    bad = _first_not_finite(carries, ys)
    return Report(False, bad) if bad else compare(plain, recorded, tolerance)


# ------------------------------------------------------------------ arguments


def _arguments(
    params: PyTree, carry: PyTree, xs: PyTree, window: Any, tolerance: float | None
) -> tuple[PyTree, PyTree, PyTree, int]:
    _errors.positive_int("window", window)
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance must be a positive number or None, but got {tolerance!r}.")
    params, carry, xs = (
        as_strong_arrays(tree, name)
        for tree, name in ((params, "params"), (carry, "carry"), (xs, "xs"))
    )
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, carry, xs))):
        raise ValueError(
            "check_step must be given arrays, but got traced ones: call it outside jit."
        )
    lengths = {path: leaf.shape[:1] for path, leaf in _leaves(xs, "xs")}
    if len({*lengths.values()}) > 1 or {(), (0,)} & {*lengths.values()}:
        came = ", ".join(f"{path}: {n[0] if n else 'no axis'}" for path, n in lengths.items())
        raise ValueError(
            "xs must have a first axis over the same number of time steps, at least 1, in every "
            f"leaf, but got {came}. Stack the inputs of the steps."
        )
    return params, carry, xs, next(iter(lengths.values()), (window,))[0]


def _without_aux(step: Callable, has_aux: bool) -> Callable:
    def plain(params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        carry, y = step(params, carry, x)
        carry, y = as_strong_arrays(carry, "carry", blame="step"), y[0] if has_aux else y
        return carry, as_strong_arrays(y, "y", blame="step")

    return plain


def _unjitted(step: Callable) -> Callable:
    """The function in a `jax.jit`, which would give the same trace again."""
    return getattr(step, "__wrapped__", step) if hasattr(step, "lower") else step


def _leaves(tree: PyTree, name: str) -> list[tuple[str, Any]]:
    return [(name + keystr(path), leaf) for path, leaf in tree_flatten_with_path(tree)[0]]


# --------------------------------------------------------- the step by itself


def _unsteady(step: Callable, args: tuple) -> list[Finding]:
    """Whether the same arguments give the same outputs: run again, and traced again."""
    saved = np.random.get_state(), random.getstate()

    def rewind() -> None:
        np.random.set_state(saved[0])
        random.setstate(saved[1])

    def fresh() -> Callable:
        return jax.jit(lambda *args: step(*args))  # another function, or its trace is found again

    try:
        run = fresh()
        first = run(*args)
        if path := _difference(first, run(*args)):
            return [words.random(path, "runs")]
        if path := _difference(first, fresh()(*args)):
            rewind()
            drawn = not _difference(first, fresh()(*args))
            return [words.random(path, "is traced") if drawn else words.state(path)]
    finally:
        rewind()
    return []


def _difference(one: tuple[PyTree, PyTree], other: tuple[PyTree, PyTree]) -> str | None:
    """The path of the first output that differs by more than an order of summation may."""
    for name, a, b in zip(("carry", "y"), one, other, strict=True):
        for (path, v), w in zip(_leaves(a, name), jax.tree.leaves(b), strict=True):
            if jnp.issubdtype(v.dtype, jax.dtypes.prng_key):
                v, w = jax.random.key_data(v), jax.random.key_data(w)
            if not jnp.issubdtype(v.dtype, jnp.inexact):
                same = np.array_equal(v, w)
            else:
                room = 64 * float(jnp.finfo(v.dtype).eps)
                v, w = (np.asarray(u).astype(np.complex128) for u in (v, w))
                size = np.max(np.abs(v), initial=0.0, where=np.isfinite(v))
                same = np.allclose(v, w, rtol=0.0, atol=room * size, equal_nan=True)
            if not same:
                return path
    return None


def _finite(leaf: Any) -> bool:
    return not jnp.issubdtype(leaf.dtype, jnp.inexact) or bool(jnp.all(jnp.isfinite(leaf)))


def _not_finite_given(params: PyTree, carry: PyTree, xs: PyTree) -> list[Finding]:
    given = [*_leaves(params, "params"), *_leaves(carry, "carry"), *_leaves(xs, "xs")]
    return [
        words.not_finite(path, None, "What was given as ") for path, v in given if not _finite(v)
    ]


def _first_not_finite(carries: PyTree, ys: PyTree) -> list[Finding]:
    """The outputs that are not finite at the first step where one is not."""
    outs = [*_leaves(carries, "carry"), *_leaves(ys, "y")]
    outs = [(path, leaf) for path, leaf in outs if not _finite(leaf)]
    for step in range(len(outs[0][1]) if outs else 0):
        lag = len(outs[0][1]) - 1 - step
        bad = [path for path, leaf in outs if not _finite(leaf[step])]
        if bad:
            return [words.not_finite(path, lag, "The output ") for path in bad]
    return []
