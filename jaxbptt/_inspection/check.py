"""`check_step`: holds the recorded gradient of a step against finite differences."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt import _errors
from jaxbptt._arrays import as_strong_arrays
from jaxbptt._compat import lax_scan
from jaxbptt._inspection import check_report as words
from jaxbptt._inspection.by_lag import gradient_by_lag
from jaxbptt._inspection.check_differences import (
    Recorded,
    compare,
    differentiable_leaves,
    is_differentiable,
    named_leaves,
)
from jaxbptt._inspection.check_report import Finding, Report
from jaxbptt._transforms.record import record
from jaxbptt._transforms.tape import Tape
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
    gradient of the whole window. h is ∛ε of the leaf's size.

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
        A `Report` with `ok` and `findings`, readable when printed, with `raise_if_bad()` for tests.

    Raises:
        ValueError: `window` is not a positive int, a leaf of `xs` has no axis over time
            or one of another length, `tolerance` is not positive, or an argument is traced.
        TypeError: the step doesn't return `(carry, y)` with the carry's type.

    Cost:
        T recorded steps, 2 * `window` pullbacks and, for each leaf at each lag, 12 runs of
        `window` steps, 36 where it gets no gradient. In bytes the ring, and two copies of
        the parameters per lag, one in float64. Meant for small sizes, outside of jit.

    References:
        Griewank & Walther, "Evaluating Derivatives", SIAM, 2008: differences, their errors.

    Examples:
        >>> import jax.numpy as jnp, jaxbptt
        >>> step = lambda w, c, x: (jnp.tanh(w * c + x), jnp.round(w) * c)
        >>> jaxbptt.check_step(step, 0.5, 0.0, jnp.ones(4), window=2).ok
        True
    """
    args = _checked(params, carry, xs, window, tolerance)
    one_step = (args.params, args.carry, _row(args.xs, 0))
    # `init` refuses steps and options that can't be, in the words that users know from `record`.
    record(step, window=window, weights=weights, has_aux=has_aux).init(*one_step)

    plain = _without_aux(step, has_aux)
    # What is wrong with the step itself would show as a wrong gradient: it is looked for first.
    if findings := _not_repeatable(_without_aux(_unjitted(step), has_aux), one_step):
        return Report(False, findings)
    given = [*_not_finite(args.params, "params"), *_not_finite(args.carry, "carry")]
    if given := [*given, *_not_finite(args.xs, "xs")]:
        return Report(False, [words.not_finite("What was given as", path) for path, _ in given])
    recorded, outputs = _recorded_run(plain, args, window, weights)
    if findings := _first_not_finite(*outputs, args.length):
        return Report(False, findings)
    return compare(plain, recorded, tolerance)


# ------------------------------------------------------------------ arguments


class _Arguments(NamedTuple):
    params: PyTree
    carry: PyTree
    xs: PyTree  # leaves (length, *x.shape)
    length: int


def _checked(
    params: PyTree, carry: PyTree, xs: PyTree, window: Any, tolerance: float | None
) -> _Arguments:
    _errors.positive_int("window", window)
    number = isinstance(tolerance, int | float | np.number)
    if tolerance is not None and not (number and tolerance > 0):
        raise ValueError(f"tolerance must be a positive number or None, but got {tolerance!r}.")
    # Python numbers and weakly typed arrays would be other dtypes here than in a recorded loop.
    params, carry, xs = (
        as_strong_arrays(tree, name)
        for tree, name in ((params, "params"), (carry, "carry"), (xs, "xs"))
    )
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, carry, xs))):
        raise ValueError(
            "check_step must be given arrays, but got traced ones: call it outside jit."
        )
    lengths = {path: leaf.shape[:1] for path, leaf in named_leaves(xs, "xs")}
    if len({*lengths.values()}) > 1 or {(), (0,)} & {*lengths.values()}:
        came = ", ".join(f"{path}: {n[0] if n else 'no axis'}" for path, n in lengths.items())
        raise ValueError(
            "xs must have a first axis over the same number of time steps, at least 1, in every "
            f"leaf, but got {came}. Stack the inputs of the steps."
        )
    # Without leaves xs don't say how long the run is.
    return _Arguments(params, carry, xs, next(iter(lengths.values()), (window,))[0])


def _without_aux(step: Callable, has_aux: bool) -> Callable:
    def plain(params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        carry, y = step(params, carry, x)
        carry, y = as_strong_arrays(carry, "carry", blame="step"), y[0] if has_aux else y
        return carry, as_strong_arrays(y, "y", blame="step")

    return plain


def _unjitted(step: Callable) -> Callable:
    """The function in a `jax.jit`, for jit would find the trace that it made before."""
    return getattr(step, "__wrapped__", step) if hasattr(step, "lower") else step


def _row(xs: PyTree, index: int) -> PyTree:
    """One step's tree out of a stack of them."""
    return jax.tree.map(lambda leaf: leaf[index], xs)


# --------------------------------------------------------- the step by itself


def _not_repeatable(step: Callable, args: tuple) -> list[Finding]:
    """Whether the same arguments give other outputs when run again, or traced again."""
    # Whatever the step draws, the caller's generators go on as if it hadn't run.
    saved = np.random.get_state(), random.getstate()

    def rewind() -> None:
        np.random.set_state(saved[0])
        random.setstate(saved[1])

    def fresh() -> Callable:
        # A function of its own, or jit would find the trace of the last one.
        return jax.jit(lambda *args: step(*args))

    try:
        run = fresh()
        first = run(*args)
        if path := _difference(first, run(*args)):
            return [words.random(path, "runs")]
        if path := _difference(first, fresh()(*args)):
            # A draw is the same again from the same state of the generators, a counter isn't.
            rewind()
            drawn = not _difference(first, fresh()(*args))
            return [words.random(path, "is traced") if drawn else words.state(path)]
    finally:
        rewind()
    return []


def _difference(one: tuple[PyTree, PyTree], other: tuple[PyTree, PyTree]) -> str | None:
    """The path of the first output that differs by more than an order of summation may."""
    names = [
        path
        for name, tree in zip(("carry", "y"), one, strict=True)
        for path, _ in named_leaves(tree, name)
    ]
    for path, v, w in zip(names, jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(v.dtype, jax.dtypes.prng_key):
            v, w = jax.random.key_data(v), jax.random.key_data(w)
        # Threads may add up in another order each time.
        room = 64 * float(jnp.finfo(v.dtype).eps) if is_differentiable(v) else 0.0
        v, w = (np.asarray(u).astype(np.complex128) for u in (v, w))
        size = np.max(np.abs(v), initial=0.0, where=np.isfinite(v))
        if not np.allclose(v, w, rtol=0.0, atol=room * size, equal_nan=True):
            return path
    return None


def _not_finite(tree: PyTree, name: str) -> list[tuple[str, Any]]:
    """The leaves with a NaN or an infinity."""
    return [
        (path, leaf)
        for path, leaf in named_leaves(tree, name)
        if is_differentiable(leaf) and not jnp.all(jnp.isfinite(leaf))
    ]


def _first_not_finite(carries: PyTree, ys: PyTree, length: int) -> list[Finding]:
    """The outputs that are not finite at the first step where one is not."""
    bad = [*_not_finite(carries, "carry"), *_not_finite(ys, "y")]
    for step in range(length):
        if first := [path for path, leaf in bad if not jnp.all(jnp.isfinite(leaf[step]))]:
            return [words.not_finite("The output", path, length - 1 - step) for path in first]
    return []


# ------------------------------------------------------------ the recorded run


def _recorded_run(
    step: Callable, args: _Arguments, window: int, weights: str
) -> tuple[Recorded, tuple[PyTree, PyTree]]:
    """Records the run, and takes the gradient of a random loss of its newest step.

    Returns:
        What was recorded of the last steps, and (carries, ys) of all, leaves (length, ...).
    """
    # A loss with a random weight for each output: no two errors cancel but by chance.
    struct = jax.eval_shape(step, args.params, args.carry, _row(args.xs, 0))
    ct_carry, ct_y = _random_cotangents(struct)
    recorder = record(step, window=window, weights=weights)
    followed: list[bool] = []  # known as soon as the run is traced

    @jax.jit
    def run(params: PyTree, carry: PyTree, xs: PyTree) -> Any:
        def run_step(tape: Tape, x: PyTree) -> tuple[Tape, tuple[PyTree, PyTree]]:
            tape, y = recorder(params, tape, x)
            return tape, (tape.carry, y)

        tape = recorder.init(params, carry, _row(xs, 0))
        tape, outputs = lax_scan(run_step, tape, xs, length=args.length)
        ct_ys = jax.tree.map(lambda leaf: leaf[None], ct_y)
        terms = gradient_by_lag(recorder, params, tape, ct_ys, ct_carry, full=True)
        ct = recorder.pullback(params, tape, ct_ys, ct_carry)
        ct_xs = jax.tree.map(lambda leaf: leaf[::-1], ct.xs)  # from oldest first to lag 0 first
        found = terms.params, terms.carry, ct_xs
        followed[:] = map(is_differentiable, jax.tree.leaves(found))
        by_lag = differentiable_leaves(found)
        return by_lag, differentiable_leaves(ct.params), outputs

    by_lag, total, (carries, ys) = run(args.params, args.carry, args.xs)
    # Where fewer steps are recorded than the window has, the rest of `by_lag` is zero.
    n = min(window, args.length)
    before = args.length - n  # steps that are no longer in the window
    recorded = Recorded(
        args.params,
        _row(carries, before - 1) if before else args.carry,
        jax.tree.map(lambda leaf: leaf[before:], args.xs),
        n,
        differentiable_leaves(_row((carries, ys), args.length - 1)),
        [np.asarray(v).astype(np.complex128) for v in differentiable_leaves((ct_carry, ct_y))],
        followed,
        [leaf[:n] for leaf in by_lag],
        total,
    )
    return recorded, (carries, ys)


def _random_cotangents(struct: PyTree) -> PyTree:
    """Normal numbers, and float0 where nothing can flow."""
    # With a fixed seed, so that a report can be had again.
    rng = np.random.default_rng(0)

    def cotangent(leaf: Any) -> Any:
        if not is_differentiable(leaf):
            return np.zeros(leaf.shape, jax.dtypes.float0)
        value = rng.normal(size=leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            value = value + 1j * rng.normal(size=leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    return jax.tree.map(cotangent, struct)
