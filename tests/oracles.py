"""Three references for truncated backpropagation, none of which knows the library.

`Run.unrolled`: the run as one graph under `jax.grad`, one copy of the parameters per
step, the older carry detached; as a `lax.scan` over the copies, which compiles once for all
steps and windows. `Run.dense`: products of dense Jacobians in NumPy.
`linear_cell`: sums of powers for a cell whose gradient can be written down.

Steps are counted from 1. Only floating and complex leaves have cotangents; `moving`
lists them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WORST: dict[str, float] = {}
"""The largest relative error that `check` has seen under each label."""


class Expected(NamedTuple):
    """Lists of arrays: θ̄, the last λ, and x̄ with the steps oldest … newest in front."""

    params: list
    carry: list
    xs: list


# ------------------------------------------------------------------- leaves


def is_moving(leaf: Any) -> bool:
    """Whether gradients can flow through a leaf."""
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def moving(tree: Any) -> list:
    """The leaves that gradients can flow through."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_moving(leaf)]


def refill(tree: Any, values: Any) -> Any:
    """The tree with other values in its `moving` leaves."""
    values = iter(values)
    return jax.tree.map(lambda leaf: next(values) if is_moving(leaf) else leaf, tree)


def stack(trees: list) -> Any:
    """One tree with an axis over steps in front."""

    def one(*leaves):
        if all(isinstance(leaf, np.ndarray) or _is_plain(leaf) for leaf in leaves):
            return jnp.asarray(np.stack([np.asarray(leaf) for leaf in leaves]))
        return jnp.stack(leaves)

    return jax.tree.map(one, *trees)


def unstack(tree: Any, length: int) -> list:
    """A list of trees, one for each step."""
    leaves, treedef = jax.tree.flatten(tree)
    rows = [_rows(leaf, length) for leaf in leaves]
    return [treedef.unflatten([row[s] for row in rows]) for s in range(length)]


def _rows(leaf, length):
    if not _is_plain(leaf):
        return [leaf[s] for s in range(length)]
    whole = np.asarray(leaf)
    return [jnp.asarray(whole[s, ...]) for s in range(length)]


def _is_plain(leaf):
    """Whether NumPy can do it, which unlike JAX has nothing to compile for each shape."""
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        return False
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def random_like(tree: Any, seed: int) -> Any:
    """A cotangent of `tree`: normal numbers, and float0 where nothing can flow."""
    rng = np.random.default_rng(seed)

    def one(leaf):
        if not is_moving(leaf):
            return np.zeros(leaf.shape, jax.dtypes.float0)
        value = rng.normal(size=leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            value = value + 1j * rng.normal(size=leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    return jax.tree.map(one, tree)


def drifting(params: Any, length: int, seed: int = 7, size: float = 0.1) -> list:
    """Parameters that change at every step: a list of `length` trees."""
    rng = np.random.default_rng(seed)

    def moved(leaf):
        factor = np.asarray(1 + size * rng.normal(size=leaf.shape), leaf.dtype)
        return jnp.asarray(np.asarray(leaf) * factor, leaf.dtype)

    return [refill(params, [moved(leaf) for leaf in moving(params)]) for _ in range(length)]


# --------------------------------------------------------------------- runs


def reach(newest: int, window: int, every: int = 1, rows: int = 1) -> int:
    """The oldest step that the cotangents of the last `rows` outputs reach."""
    first = newest - rows + 1
    return max(1, first - max(window - every, 0), newest - window + 1)


class Run:
    """A run of T steps with its own parameters at each step.

    Args:
        step: `step(params, carry, x) -> (carry, y)`.
        thetas: list of T parameter trees, or one tree (not a list) for all steps.
        carry: the carry that enters step 1.
        xs: inputs, leaves (T, ...).
        length: T.
    """

    def __init__(self, step, thetas, carry, xs, length):
        self.step, self.carry, self.length = step, carry, length
        self.thetas = thetas if isinstance(thetas, list) else [thetas] * length
        self.xs = unstack(xs, length)

    @functools.cached_property
    def trajectory(self):
        """(carries, ys): lists of T, each as the step returned it."""
        carries, ys, carry = [], [], self.carry
        for theta, x in zip(self.thetas, self.xs, strict=True):
            carry, y = _jitted(self.step)(theta, carry, x)
            carries.append(carry)
            ys.append(y)
        return carries, ys

    def unrolled(self, newest, oldest, ct_ys, ct_carry=None) -> Expected:
        """Oracle 1.

        Args:
            newest: the step whose carry `ct_carry` belongs to.
            oldest: the first step reached; the carry that enters it is detached. Or a list,
                for each moving leaf of the carry the step from which on it is followed.
            ct_ys: list of cotangents of the last outputs, oldest first.
            ct_carry: cotangent of the newest carry, or None.
        """
        ct_thetas, probes, ct_xs, oldest, first = self._terms(newest, oldest, ct_ys, ct_carry)
        return Expected(
            [np.sum(np.stack(leaves), 0) for leaves in zip(*ct_thetas, strict=True)],
            [probes[o - 1][i] for i, o in enumerate(oldest)],
            [np.stack(leaves)[first - 1 : newest] for leaves in zip(*ct_xs, strict=True)],
        )

    def by_lag(self, newest, oldest, ct_ys, ct_carry=None) -> tuple[list, list]:
        """Of each lag, its share of the parameters' gradient and the λ that leaves its step."""
        ct_thetas, probes, _, oldest, first = self._terms(newest, oldest, ct_ys, ct_carry)
        steps = range(newest, first - 1, -1)
        lams = [
            [v if s >= o else np.zeros_like(v) for v, o in zip(probes[s - 1], oldest, strict=True)]
            for s in steps
        ]
        return [ct_thetas[s - 1] for s in steps], lams

    def _terms(self, newest, oldest, ct_ys, ct_carry):
        carries, ys = self.trajectory
        length = len(self.xs)
        no_y, no_carry = zeros_of(ys[0]), zeros_of(carries[0])
        rows = [no_y] * length
        for s, ct in zip(range(newest - len(ct_ys), newest), ct_ys, strict=True):
            if s >= 0:
                rows[s] = moving(ct)
        lams = [no_carry] * length
        if ct_carry is not None:
            lams[newest - 1] = moving(ct_carry)
        oldest = oldest if isinstance(oldest, list) else [oldest] * len(no_carry)
        first = min(oldest, default=newest - len(ct_ys) + 1)
        # Reached through another leaf, an older one would otherwise be followed again.
        cut = np.arange(1, length + 1)[:, None] <= np.array(oldest, int)
        found = _unrolled(self.step, self.stacked, self.carry, cut, by_step(rows), by_step(lams))
        ct_thetas, probes, ct_xs = (_steps_of(leaves, length) for leaves in found)
        return ct_thetas, probes, ct_xs, oldest, first

    @functools.cached_property
    def stacked(self):
        """(parameters, inputs) with an axis over steps in front of their leaves."""
        return stack(self.thetas), stack(self.xs)

    def whole(self, window, every, ct_ys, ct_carry) -> Expected:
        """The whole run, each group of outputs on its own: what `scan` sends back.

        Args:
            window: as in the library, None for no truncation; or a list, one for each
                moving leaf of the carry.
            every: as in the library.
            ct_ys: list of T cotangents of the outputs.
            ct_carry: cotangent of the final carry.
        """
        n = len(moving(self.carry))
        windows = window if isinstance(window, list) else [window or self.length + every] * n
        longest = max(windows, default=window or self.length + every)
        total = None
        for first in range(1, self.length + 1, every):
            end = min(first + every - 1, self.length)
            rows = end - first + 1
            oldest = reach(end, longest, every, rows)
            each = [reach(end, w, every, rows) for w in windows]
            last = ct_carry if end == self.length else None
            one = self.unrolled(end, each, ct_ys[max(first, oldest) - 1 : end], last)
            missing = self.length - end
            xs = [np.pad(v, [(end - len(v), missing)] + [(0, 0)] * (v.ndim - 1)) for v in one.xs]
            pairs = zip(one.carry, each, strict=True)
            lam = [v if start == 1 else np.zeros_like(v) for v, start in pairs]
            one = Expected(one.params, lam, xs)
            total = one if total is None else jax.tree.map(np.add, total, one)
        return total

    def dense(self, newest, oldest, ct_ys, ct_carry=None) -> Expected:
        """Oracle 2, for steps whose moving leaves are real. Arguments as for `unrolled`."""
        steps = range(oldest - 1, newest)
        ct_ys = dict(zip(range(newest - len(ct_ys), newest), ct_ys, strict=True))
        y_size = sum(leaf.size for leaf in moving(self.trajectory[1][0]))
        lam = np.zeros(sum(leaf.size for leaf in moving(self.carry)))
        if ct_carry is not None:
            lam = _flat(ct_carry)
        params, xs = 0.0, []
        for s in reversed(steps):
            of_carry, of_y = self.jacobians[s]
            ct_y = _flat(ct_ys[s]) if s in ct_ys else np.zeros(y_size)
            ct = [a.T @ lam + b.T @ ct_y for a, b in zip(of_carry, of_y, strict=True)]
            params, lam = params + ct[0], ct[1]
            xs.append(ct[2])
        rows = [_cut_up(x, moving(self.xs[0])) for x in reversed(xs)]
        return Expected(
            _cut_up(params, moving(self.thetas[0])),
            _cut_up(lam, moving(self.carry)),
            [np.stack(leaves) for leaves in zip(*rows, strict=True)],
        )

    @functools.cached_property
    def jacobians(self):
        """For each step: Jacobians of carry and of y, each by (params, carry, x), float64."""
        befores = [self.carry, *self.trajectory[0][:-1]]
        return [
            jax.tree.map(lambda m: np.asarray(m, np.float64), _jacobians(self.step, *args))
            for args in zip(self.thetas, befores, self.xs, strict=True)
        ]


def again(run: Run, thetas: list, t: int, window: int) -> Run:
    """What weights="replayed" differentiates: the last steps, all with the parameters of step t.

    Args:
        run: a run of which the first t steps are recorded.
        thetas: the parameters of each of its steps.
        t: the newest step.
        window: the number of steps on the ring.

    Returns:
        A run from the oldest carry on the ring; its last step, `length`, is step t.
    """
    first, steps = max(1, t - window + 1), min(window, run.length)
    carry = run.carry if first == 1 else run.trajectory[0][first - 2]
    xs = stack(run.xs[first - 1 : first - 1 + steps])
    part = Run(run.step, [thetas[t - 1]] * steps, carry, xs, steps)
    # Steps after t get no cotangent; with them all windows of a run compile once.
    part.length = t - first + 1
    return part


@functools.cache
def _jitted(step):
    return jax.jit(step)


def zeros_of(tree):
    return [np.zeros(leaf.shape, leaf.dtype) for leaf in moving(tree)]


def by_step(rows):
    """Of a list of steps with a list of leaves each: the leaves, with an axis over steps."""
    return [np.stack([np.asarray(v) for v in leaves]) for leaves in zip(*rows, strict=True)]


def _steps_of(leaves, length):
    """The reverse: of leaves with an axis over steps, a list of steps with their leaves."""
    leaves = [np.asarray(leaf) for leaf in leaves]
    return [[leaf[s] for leaf in leaves] for s in range(length)]


def _weigh(cts, leaves):
    pairs = zip(cts, leaves, strict=True)
    return sum((jnp.sum(jnp.real(ct * v).astype(jnp.float64)) for ct, v in pairs), 0.0)


@functools.partial(jax.jit, static_argnums=0)
def _unrolled(step, stacked, carry, cut, ct_ys, ct_carries):
    """Gradients for each step of its copy of the parameters, its carry and its input."""
    # The carry of a scan keeps its type; a step may drop a weak one.
    carry = jax.tree.map(lambda v: lax.convert_element_type(v, v.dtype), carry)

    def total(copies, probes, inputs):
        def one(now, row):
            (theta, x), copy, probe, given, cut, ct_y, ct_carry = row
            older = [jnp.where(cut[i], lax.stop_gradient(v), v) for i, v in enumerate(moving(now))]
            now = refill(now, [v + p for v, p in zip(older, probe, strict=True)])
            now, y = step(refill(theta, copy), now, refill(x, given))
            return now, _weigh(ct_y, moving(y)) + _weigh(ct_carry, moving(now))

        rows = stacked, copies, probes, inputs, cut, ct_ys, ct_carries
        return jnp.sum(lax.scan(one, carry, rows)[1])

    thetas, xs = stacked
    probes = [jnp.zeros((len(cut), *v.shape), v.dtype) for v in moving(carry)]
    return jax.grad(total, (0, 1, 2))(moving(thetas), probes, moving(xs))


@functools.partial(jax.jit, static_argnums=0)
def _jacobians(step, params, carry, x):
    def flat(*values):
        args = [
            refill(tree, _cut_up(value, moving(tree)))
            for value, tree in zip(values, (params, carry, x), strict=True)
        ]
        return tuple(_joined(out) for out in step(*args))

    return jax.jacfwd(flat, (0, 1, 2))(_joined(params), _joined(carry), _joined(x))


def _joined(tree):
    leaves = moving(tree)
    return jnp.concatenate([v.ravel() for v in leaves]) if leaves else jnp.zeros(0)


def _flat(tree):
    return np.concatenate([np.asarray(v, np.float64).ravel() for v in moving(tree)] or [[]])


def _cut_up(vector, like):
    ends = np.cumsum([leaf.size for leaf in like])
    return [
        vector[end - leaf.size : end].reshape(leaf.shape)
        for end, leaf in zip(ends, like, strict=True)
    ]


# -------------------------------------------------------------- linear cell


def linear_cell(params, carry, xs, newest, window, ct_y, ct_carry) -> dict[str, np.ndarray]:
    """Oracle 3: c_s = a c_{s-1} + b x_s + d and y_s = c_s, each unit by itself.

    With k steps reached and c the carry that entered the oldest of them,
    c_t = aᵏ c + Σ_j aʲ (b x_{t-j} + d), j = 0 … k-1, is differentiated by hand.

    Args:
        params: {"a": (H,), "b": (D, H), "d": (H,)}, the same at all steps.
        carry: c_0, (B, H).
        xs: (T, B, D).
        newest: t.
        window: as in the library.
        ct_y: ȳ_t, (B, H).
        ct_carry: c̄_t, (B, H).

    Returns:
        The cotangents of a, b, d, carry, and xs (k, B, D), oldest first.
    """
    a, b, d = (np.asarray(params[name], np.float64) for name in "abd")
    xs, carry, ct = (np.asarray(v, np.float64) for v in (xs, carry, ct_y + ct_carry))
    k = min(newest, window)

    def carry_at(t):
        return a**t * carry + sum(a**j * (xs[t - 1 - j] @ b + d) for j in range(t))

    start = carry_at(newest - k)
    lags = range(k)
    by_a = k * a ** (k - 1) * start
    by_a = by_a + sum(j * a ** (j - 1) * (xs[newest - 1 - j] @ b + d) for j in lags if j)
    return {
        "a": np.sum(ct * by_a, 0),
        "b": sum(xs[newest - 1 - j].T @ (ct * a**j) for j in lags),
        "d": np.sum(ct, 0) * sum(a**j for j in lags),
        "carry": ct * a**k,
        "xs": np.stack([(ct * a**j) @ b.T for j in reversed(lags)]),
    }


# --------------------------------------------------------------- comparison


def tolerance(*trees: Any) -> float:
    """The relative error allowed: that of the narrowest moving leaf."""
    bits = min((jnp.finfo(leaf.dtype).bits for leaf in moving(trees)), default=64)
    return {64: 1e-12, 32: 5e-6, 16: 2e-2}[bits]


def relative_error(got: Any, want: Any) -> float:
    """The largest difference, each leaf against its own largest entry.

    A leaf a thousand times smaller than the largest one is held against that.
    """
    got, want = moving(got), moving(want)
    assert [v.shape for v in got] == [v.shape for v in want]
    # Lists of arrays of different sizes; the widest type holds all of them.
    got, want = ([np.asarray(v).astype(np.complex128) for v in vs] for vs in (got, want))
    largest = max((np.max(np.abs(v), initial=0.0) for v in want), default=0.0)
    worst = 0.0
    for g, w in zip(got, want, strict=True):
        scale = max(np.max(np.abs(w), initial=0.0), 1e-3 * largest)
        gap = np.max(np.abs(g - w), initial=0.0)
        if not gap <= 0.0:  # a NaN too
            worst = max(worst, gap / scale if scale and np.isfinite(gap) else np.inf)
    return float(worst)


def check(label: str, got: Any, want: Any, allowed: float) -> None:
    """Asserts that `got` is `want` within `allowed`, and remembers the worst error."""
    error = relative_error(got, want)
    WORST[label] = max(WORST.get(label, 0.0), error)
    assert error <= allowed, f"{label}: relative error {error:.2e} > {allowed:.0e}"


def check_cotangents(label: str, got: Any, want: Expected, allowed: float) -> None:
    """Holds `(params, carry, xs)` with xs over a whole window against an oracle."""
    check(f"{label}, params", got.params, want.params, allowed)
    check(f"{label}, carry", got.carry, want.carry, allowed)
    xs = [np.asarray(leaf) for leaf in moving(got.xs)]
    steps = [len(leaf) for leaf in want.xs]
    recent = [leaf[len(leaf) - n :] for leaf, n in zip(xs, steps, strict=True)]
    check(f"{label}, xs", recent, want.xs, allowed)
    for leaf, n in zip(xs, steps, strict=True):
        assert not np.any(leaf[: len(leaf) - n]), f"{label}: x beyond the window has a cotangent"
