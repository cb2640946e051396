"""flax's recurrent cells, linen and nnx, against the unrolled graph and against flax itself."""

import functools
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from harness import first, grid
from jax import lax
from oracles import check, drifting, moving, random_like, reach, refill
from training_loops import momentum

import jaxbptt

nn = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "flax.md").read_text(encoding="utf-8")
WINDOW, LENGTH = 3, 4
B, D, H = 3, 6, 8  # so that contractions leave the loop; in a batch of 2 a norm is but signs


@pytest.fixture(autouse=True)
def settings():
    # Under strict promotion flax's own code refuses float64 in batch statistics.
    with jax.numpy_dtype_promotion("standard"):
        yield


class Case(NamedTuple):
    """A step as a user gets it, and the same step written by hand for the unrolled graph."""

    module: Any
    step: Callable
    by_hand: Callable
    params: Any
    carry: Any
    carry_by_hand: Any
    xs: Any

    def run(self, thetas):
        return oracles.Run(self.by_hand, thetas, self.carry_by_hand, self.xs, LENGTH)


CASES: dict[str, Callable[[], Case]] = {}


def case(name):
    def entered(make):
        CASES[name] = functools.cache(make)
        return make

    return entered


draw = functools.partial(harness.draw, scale=1.0)


def filled(tree, seed):
    """Other numbers in all float leaves, so that no bias and no first carry is zero."""
    return refill(tree, [draw(seed + i, *v.shape, scale=0.5) for i, v in enumerate(moving(tree))])


def raised(tree):
    """In float64, and a little more than flax starts with: a variance stays positive."""
    return refill(tree, [v.astype(float) + 0.3 for v in moving(tree)])


# ---------------------------------------------------------------- cells without state


def stateless(module, step, params, carry, xs):
    return Case(module, step, step, filled(params, 1), filled(carry, 50), filled(carry, 50), xs)


def linen_case(module, carry, *shape):
    xs = draw(99, LENGTH, *shape)
    types = jax.eval_shape(module.init, jax.random.key(1), carry, xs[0])
    params = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), types)
    return stateless(module, module.apply, params, carry, xs)


def linen_cell(make, *shape):
    cell = make(param_dtype=float)
    return linen_case(cell, cell.initialize_carry(jax.random.key(0), shape), *shape)


def call(module, carry, x):
    return module(carry, x)


def compiled_module(make, seed=1):
    """The module that `make` makes, with other parameters; one program makes it."""
    return nnx.jit(lambda: filled(make(), seed))()


def nnx_cell(make):
    cell = compiled_module(lambda: make(D, H, param_dtype=float, rngs=nnx.Rngs(0)))
    carry = jax.eval_shape(lambda: cell.initialize_carry((B, D), nnx.Rngs(1)))
    return stateless(cell, call, cell, carry, draw(99, LENGTH, B, D))


LINEN = [nn.SimpleCell, nn.GRUCell, nn.MGUCell, nn.LSTMCell, nn.OptimizedLSTMCell]
NNX = [nnx.GRUCell, nnx.LSTMCell, nnx.OptimizedLSTMCell]
for _cell in LINEN:
    _make = functools.partial(linen_cell, functools.partial(_cell, H), B, D)
    case(f"linen {_cell.__name__}")(_make)
for _cell in NNX:
    case(f"nnx {_cell.__name__}")(functools.partial(nnx_cell, _cell))


@case("nnx SimpleCell")
def nnx_simple():
    return nnx_cell(functools.partial(nnx.SimpleCell, dtype=float))  # float32 if not told


@case("linen ConvLSTMCell")
def linen_conv():
    return linen_cell(functools.partial(nn.ConvLSTMCell, 2, (2, 3)), B, 4, 3, 1)


def three_carries():
    return jnp.zeros((B, H)), (jnp.zeros((B, 9)), jnp.zeros((B, 9))), jnp.zeros((B, 7))


def one_after_the_other(cells, carries, x):
    new = []
    for cell, carry in zip(cells, carries, strict=True):
        carry, x = cell(carry, x)
        new.append(carry)
    return tuple(new), x


class LinenStack(nn.Module):
    num_feature_axes = 1

    @nn.compact
    def __call__(self, carry, x):
        made = nn.MGUCell(H, param_dtype=float), nn.OptimizedLSTMCell(9, param_dtype=float)
        return one_after_the_other((*made, nn.SimpleCell(7, param_dtype=float)), carry, x)


@case("linen stack of 3")
def linen_stack():
    return linen_case(LinenStack(), three_carries(), B, D)


class NnxStack(nnx.Module):
    num_feature_axes = 1

    def __init__(self, rngs):
        self.one = nnx.GRUCell(D, H, param_dtype=float, rngs=rngs)
        self.two = nnx.OptimizedLSTMCell(H, 9, param_dtype=float, rngs=rngs)
        self.three = nnx.SimpleCell(9, 7, dtype=float, param_dtype=float, rngs=rngs)

    def __call__(self, carry, x):
        return one_after_the_other((self.one, self.two, self.three), carry, x)


@case("nnx stack of 3")
def nnx_stack():
    stack = compiled_module(lambda: NnxStack(nnx.Rngs(0)))
    return stateless(stack, call, stack, three_carries(), draw(99, LENGTH, B, D))


# ------------------------------------------------------------- cells that have state


# The fast variance, E[x²] - E[x]², has lost digits before any gradient is taken.
NORM = {"momentum": 0.7, "use_fast_variance": False}


class Follower(nn.Module):
    """Subtracts a running mean: a collection through which gradients flow from step to step."""

    @nn.compact
    def __call__(self, x):
        mean = self.variable("averages", "mean", jnp.zeros, x.shape[-1], float)
        if not self.is_initializing():
            mean.value = 0.8 * mean.value + 0.2 * x.mean(0)
        return x - mean.value[None]


class LinenCell(nn.Module):
    """A GRU with what is asked for in the way of its carry."""

    num_feature_axes = 1

    dropout: bool = False
    norm: bool = False
    follower: bool = False

    @nn.compact
    def __call__(self, carry, x, train=True):
        carry, y = nn.GRUCell(H, param_dtype=float)(carry, x)
        if self.norm:
            carry = nn.BatchNorm(not train, param_dtype=float, **NORM)(carry)
        if self.follower:
            carry = Follower()(carry)
        if self.dropout:
            carry = nn.Dropout(0.4, deterministic=not train)(carry)
        return carry, y


def linen_variables(module):
    init = jax.jit(functools.partial(module.init, train=False))
    variables = init(jax.random.key(1), jnp.zeros((B, H)), jnp.zeros((B, D)))
    return {
        name: filled(part, 1) if name == "params" else raised(part)
        for name, part in variables.items()
    }


def linen_with_state(*collections, **what):
    module, h, key = LinenCell(**what), draw(50, B, H, scale=0.5), jax.random.key(5)
    variables = linen_variables(module)
    rngs = {"dropout": key} if "dropout" in what else None
    step, params, state = jaxbptt.from_linen(module, variables, rngs=rngs)

    def by_hand(params, carry, x):
        h, variables, key = carry
        key, now = jax.random.split(key)
        rngs = {"dropout": now}
        out, variables = module.apply(
            {"params": params, **variables}, h, x, rngs=rngs, mutable=list(collections)
        )
        return (out[0], variables, key), out[1]

    start = h, {name: variables[name] for name in collections}, key
    return Case(module, step, by_hand, params, (h, state), start, draw(99, LENGTH, B, D))


@case("linen, Dropout")
def linen_dropout():
    return linen_with_state(dropout=True)


@case("linen, BatchNorm and another collection")
def linen_collections():
    return linen_with_state("averages", "batch_stats", norm=True, follower=True)


class Average(nnx.Variable):
    """A variable of the user's own that is no parameter."""


class NnxCell(nnx.Module):
    """The same for nnx."""

    num_feature_axes = 1

    def __init__(self, rngs, dropout=False, norm=False, follower=False):
        self.cell = nnx.GRUCell(D, H, param_dtype=float, rngs=rngs)
        if norm:
            self.norm = nnx.BatchNorm(H, param_dtype=float, rngs=rngs, **NORM)
        if follower:
            self.average = Average(jnp.zeros(H))
        if dropout:
            self.dropout = nnx.Dropout(0.4, rngs=rngs)

    def __call__(self, carry, x):
        carry, y = self.cell(carry, x)
        if hasattr(self, "norm"):
            carry = self.norm(carry)
        if hasattr(self, "average"):
            self.average[...] = 0.8 * self.average[...] + 0.2 * carry.mean(0)
            carry = carry - self.average[...][None]
        if hasattr(self, "dropout"):
            carry = self.dropout(carry)
        return carry, y


def nnx_module(**what):

    @nnx.jit
    def make():
        module = NnxCell(nnx.Rngs(0, dropout=5), **what)
        _, params, rest = nnx.split(module, nnx.Param, ...)
        nnx.update(module, filled(params, 1), raised(rest))
        return module

    return make()


def nnx_with_state(**what):
    module, h = nnx_module(**what), draw(50, B, H, scale=0.5)
    step, params, state = jaxbptt.from_nnx(module)
    graph, _, rest = nnx.split(nnx.clone(module), nnx.Param, ...)

    def by_hand(params, carry, x):
        one = nnx.merge(graph, params, carry[1])
        h, y = one(carry[0], x)
        return (h, nnx.state(one, nnx.Not(nnx.Param))), y

    return Case(module, step, by_hand, params, (h, state), (h, rest), draw(99, LENGTH, B, D))


@case("nnx, Dropout")
def nnx_dropout():
    return nnx_with_state(dropout=True)


@case("nnx, BatchNorm and another variable")
def nnx_variables():
    return nnx_with_state(norm=True, follower=True)


# ------------------------------------------------------- held against the unrolled graph


def inner(cts, trees):
    pairs = zip(moving(cts), moving(trees), strict=True)
    return sum((jnp.sum(ct * v) for ct, v in pairs), 0.0)


def as_a_user(this, thetas, cts, **how):
    """The README's form: a gradient in the body of a compiled `lax.scan`, at every step."""
    rec = jaxbptt.record(this.step, **how)

    def one(tape, inputs):
        theta, x = inputs

        def loss_fn(theta):
            new_tape, y = rec(theta, tape, x)
            return inner(cts, (y, new_tape.carry)), (new_tape, y)

        (_, (tape, y)), grads = jax.value_and_grad(loss_fn, has_aux=True)(theta)
        return tape, (grads, y)

    @jax.jit
    def run(params, carry, thetas, xs):
        return lax.scan(one, rec.init(params, carry, first(xs)), (thetas, xs))

    tape, (grads, ys) = run(this.params, this.carry, oracles.stack(thetas), this.xs)
    return tape.carry, oracles.unstack(ys, LENGTH), oracles.unstack(grads, LENGTH)


def again(run, start, theta):
    """The run from the carry that it had after `start` steps, all with one tree of parameters.

    Filled up with inputs that no gradient asked for knows of, so that it is compiled as the other.
    """
    carry = run.trajectory[0][start - 1] if start else run.carry
    xs = oracles.stack(run.xs[start:] + run.xs[:start])
    return oracles.Run(run.step, [theta] * LENGTH, carry, xs, LENGTH)


HOWS = ["stored", "current", "replayed", "scan", "learner"]
# Each cell one way and each way several cells, among them some with state, which an adapter
# carries along.
CHOSEN = {
    "linen SimpleCell": ["stored"],
    "linen GRUCell": ["current"],
    "linen MGUCell": ["replayed"],
    "linen LSTMCell": ["scan"],
    "linen OptimizedLSTMCell": ["learner"],
    "linen ConvLSTMCell": ["stored"],
    "linen stack of 3": ["current"],
    "linen, Dropout": ["replayed"],
    "linen, BatchNorm and another collection": ["current"],
    "nnx SimpleCell": ["replayed"],
    "nnx GRUCell": ["learner"],
    "nnx LSTMCell": ["stored"],
    "nnx OptimizedLSTMCell": ["current"],
    "nnx stack of 3": ["scan"],
    "nnx, Dropout": ["learner"],
    "nnx, BatchNorm and another variable": ["replayed", "scan"],
}


@pytest.mark.parametrize(
    ("name", "how"),
    grid(
        itertools.product(CASES, HOWS),
        always=[(name, how) for name, hows in CHOSEN.items() for how in hows],
    ),
)
def test_exact(name, how):
    hold = {"scan": hold_scan, "learner": hold_learner}.get(how, hold_recorder)
    hold(CASES[name](), how, f"flax | {name} | {how}")


def hold_recorder(this, weights, label):
    # For parameters that change, "current" is defined by residuals and not by a graph.
    fixed = [this.params] * LENGTH
    thetas = fixed if weights == "current" else drifting(this.params, LENGTH)
    run = this.run(thetas)
    carries, ys = run.trajectory
    ct_y, ct_carry = cts = random_like(ys[0], 1), random_like(carries[0], 2)
    carry, got_ys, grads = as_a_user(this, thetas, cts, window=WINDOW, weights=weights)
    check(label, (carry, got_ys), (carries[-1], ys), 1e-12)
    for t in range(1, LENGTH + 1):
        if weights == "replayed":
            steps = min(t, WINDOW)
            want = again(run, t - steps, thetas[t - 1]).unrolled(steps, 1, [ct_y], ct_carry)
        else:
            want = run.unrolled(t, reach(t, WINDOW), [ct_y], ct_carry)
        assert any(map(np.any, want.params))
        check(label, grads[t - 1], want.params, 1e-12)


def hold_scan(this, _, label):
    every = 2
    run = this.run([this.params] * LENGTH)
    carries, ys = run.trajectory
    ct_ys, ct_carry = random_like(oracles.stack(ys), 1), random_like(carries[0], 2)
    trees = this.params, this.carry, this.xs

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def grad(values):
        params, init, xs = map(refill, trees, values)
        f = functools.partial(this.step, params)
        out = jaxbptt.scan(f, init, xs, window=WINDOW, every=every)
        return inner((ct_carry, ct_ys), out), out

    got, out = grad([moving(tree) for tree in trees])
    want = run.whole(WINDOW, every, oracles.unstack(ct_ys, LENGTH), ct_carry)
    check(label, out, (carries[-1], oracles.stack(ys)), 1e-12)
    for one, other in zip(got, want, strict=True):
        check(label, one, other, 1e-12)


class Descent(NamedTuple):
    """An optimiser whose state is the gradient that it was given last."""

    @staticmethod
    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    @staticmethod
    def update(grads, state, params):
        return jax.tree.map(lambda g: -0.1 * g, grads), grads


def hold_learner(this, _, label):
    ct_y = random_like(this.run(this.params).trajectory[1][0], 1)
    learner = jaxbptt.learner(this.step, lambda y, x: inner(ct_y, y), Descent(), window=WINDOW)

    @jax.jit
    def go(params, carry, xs):
        def one(state, x):
            state, _ = learner.update(state, x)
            return state, (state.params, state.opt_state)

        return lax.scan(one, learner.init(params, carry, first(xs)), xs)[1]

    params, grads = (oracles.unstack(each, LENGTH) for each in go(this.params, this.carry, this.xs))
    thetas = [this.params, *params]
    run = this.run(thetas[:-1])
    for t in range(1, LENGTH + 1):
        want = run.unrolled(t, reach(t, WINDOW), [ct_y]).params
        check(label, grads[t - 1], want, 1e-12)
        before = map(np.asarray, moving(thetas[t - 1]))
        moved = [v - 0.1 * g for v, g in zip(before, want, strict=True)]
        check(label, thetas[t], moved, 1e-12)


@pytest.mark.parametrize(
    "name",
    grid(
        [name for name in CASES if "another" in name],
        always=["nnx, BatchNorm and another variable"],
    ),
)
def test_a_window_for_the_state_alone(name):
    this = CASES[name]()
    run = this.run([this.params] * LENGTH)
    carries, ys = run.trajectory
    ct_y, ct_carry = cts = random_like(ys[0], 1), random_like(carries[0], 2)
    grads = as_a_user(this, run.thetas, cts, window=(WINDOW, 1))[2]
    windows = [WINDOW] + [1] * (len(moving(this.carry)) - 1)
    for t in range(1, LENGTH + 1):
        want = run.unrolled(t, [reach(t, w) for w in windows], [ct_y], ct_carry)
        check("flax, state with its window", grads[t - 1], want.params, 1e-12)
    whole = run.unrolled(LENGTH, reach(LENGTH, WINDOW), [ct_y], ct_carry)
    assert oracles.relative_error(grads[-1], whole.params) > 1e-3


# ----------------------------------------------------------------- held against flax


def flax_rnn(name):
    """flax's own loop over the sequence, as a function of params and the cell's carry."""
    this = CASES[name]()
    how = {"time_major": True, "return_carry": True}

    def linen(params, h):
        held = params if "params" in params else {"params": params, **this.carry[1].collections}
        others = [name for name in held if name != "params"]
        rnn = nn.RNN(this.module.clone(), variable_carry=others, **how)
        within = {name: {"cell": part} for name, part in held.items()}
        return rnn.apply(within, this.xs, initial_carry=h, mutable=others)[0]

    def of_nnx(params, h):
        module = params
        if isinstance(params, nnx.State):
            graph, _, rest = nnx.split(nnx.clone(this.module), nnx.Param, ...)
            module = nnx.merge(graph, params, rest)
        return nnx.RNN(module, **how)(this.xs, initial_carry=h)

    return linen if name.startswith("linen") else of_nnx


# nn.RNN gives Dropout keys of another rule than from_linen.
@pytest.mark.parametrize(
    "name",
    grid(
        [name for name in CASES if name != "linen, Dropout"],
        always=["linen, BatchNorm and another collection", "nnx GRUCell", "nnx, Dropout"],
    ),
)
def test_nothing_cut_is_the_gradient_through_the_rnn_of_flax(name):
    this, theirs = CASES[name](), flax_rnn(name)
    adapted = this.step is not this.by_hand
    h = this.carry[0] if adapted else this.carry

    def ours(params, h):
        init = (h, this.carry[1]) if adapted else h
        f = functools.partial(this.step, params)
        carry, ys = jaxbptt.scan(f, init, this.xs, window=None)
        return carry[0] if adapted else carry, ys

    cts = random_like(jax.eval_shape(ours, this.params, h), 3)

    def grad(run):
        def total(values):
            out = run(*map(refill, (this.params, h), values))
            return inner(cts, out), out

        return jax.jit(jax.grad(total, has_aux=True))((moving(this.params), moving(h)))

    check("flax, its own RNN", *(jax.tree.leaves(grad(run)) for run in (ours, theirs)), 1e-12)


def test_an_nnx_module_ends_as_the_module_that_was_called_step_by_step():
    what = {"dropout": True, "norm": True, "follower": True}
    this, h = nnx_with_state(**what), draw(50, B, H, scale=0.5)
    module = nnx_module(**what)

    @nnx.jit
    @nnx.grad
    def grad(module):
        carry, total = h, 0.0
        for x in oracles.unstack(this.xs, LENGTH):
            carry, y = module(carry, x)
            total += jnp.sum(y**2) + jnp.sum(carry)
        return total

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def ours(params):

        def f(carry, x):
            carry, y = this.step(params, carry, x)
            return carry, jnp.sum(y**2) + jnp.sum(carry[0])

        (_, state), terms = jaxbptt.scan(f, this.carry, this.xs, window=None)
        return jnp.sum(terms), state

    want = grad(module)
    got, state = ours(this.params)
    check("flax, nnx step by step", got, want, 1e-12)
    after = jax.tree.leaves(nnx.state(module, nnx.Not(nnx.Param)))
    for one, other in zip(jax.tree.leaves(state), after, strict=True):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_allclose(one, other, rtol=1e-14)

    nnx.update(fresh := nnx_module(**what), this.params, state)
    x = this.xs[0]
    assert jnp.array_equal(fresh(h, x)[1], this.step(this.params, (h, state), x)[1])


def test_an_nnx_module_that_a_scan_closes_over():
    model = compiled_module(lambda: nnx.GRUCell(D, H, param_dtype=float, rngs=nnx.Rngs(0)))
    xs, init = draw(0, 6, B, D), draw(1, B, H)

    def chunks(f, init, xs):
        parts = []
        for chunk in (xs[:3], xs[3:]):
            init, ys = lax.scan(f, lax.stop_gradient(init), chunk)
            parts.append(ys)
        return init, jnp.concatenate(parts)

    def grad(scan):
        def total(model):
            return jnp.sum(scan(lambda c, x: model(c, x), init, xs)[1] ** 2)

        return nnx.jit(nnx.grad(total))(model)

    for theirs, how in ((lax.scan, {"window": None}), (chunks, {"window": 3, "every": 3})):
        got, want = grad(functools.partial(jaxbptt.scan, **how)), grad(theirs)
        assert all(map(np.any, moving(want)))
        check("flax, closed over", got, want, 1e-12)


# ------------------------------------------------------------------- the adapters


def test_a_step_leaves_the_state_and_the_module_that_it_is_given():
    for name in ("linen", "nnx"):
        this = CASES[f"{name}, Dropout"]()
        before = [str(leaf) for leaf in jax.tree.leaves((this.carry, this.params))]
        if name == "nnx":
            before += map(str, jax.tree.leaves(this.module))
        (carry, y), (_, other) = (
            this.step(this.params, this.carry, first(this.xs)) for _ in range(2)
        )
        assert jnp.array_equal(y, other)
        after = [str(leaf) for leaf in jax.tree.leaves((this.carry, this.params))]
        if name == "nnx":
            after += map(str, jax.tree.leaves(this.module))
        assert before == after
        third = this.step(this.params, (this.carry[0], carry[1]), first(this.xs))[0]
        assert not jnp.array_equal(third[0], carry[0]), "the same mask twice"


def test_an_nnx_module_keeps_the_mode_it_had():
    module = nnx_module(dropout=True, norm=True)
    module.eval()
    step, params, state = jaxbptt.from_nnx(module)
    h, x = draw(50, B, H), draw(99, B, D)
    want = module(h, x)
    module.train()
    (carry, after), y = step(params, (h, state), x)
    assert jnp.array_equal(carry, want[0])
    assert jnp.array_equal(y, want[1])
    assert all(map(jnp.array_equal, moving(after), moving(state)))


def test_an_nnx_module_that_is_used_further_changes_nothing_of_the_step():
    module, h, x = nnx_module(dropout=True), draw(50, B, H), draw(99, B, D)
    step, params, state = jaxbptt.from_nnx(module)
    before = step(params, (h, state), x)[0][0]
    module(h, x)
    nnx.update(module, jax.tree.map(jnp.zeros_like, nnx.state(module, nnx.Param)))
    assert jnp.array_equal(step(params, (h, state), x)[0][0], before)


def test_params_that_wrt_leaves_out_are_constants():
    this = CASES["nnx, BatchNorm and another variable"]()
    step, params, state = jaxbptt.from_nnx(
        this.module, wrt=nnx.All(nnx.Param, nnx.PathContains("cell"))
    )
    assert set(params) == {"cell"}
    assert set(state) == {"average", "norm"}
    assert set(state["norm"]) == {"mean", "var"}
    h, x = draw(50, B, H), draw(99, B, D)

    def grad(step, params):
        return jax.jit(jax.grad(lambda p: jnp.sum(step(p, (h, state), x)[0][0] ** 3)))(params)

    want = moving(grad(this.step, this.params)["cell"])
    check("flax, wrt", moving(grad(step, params)), want, 1e-12)


@pytest.mark.parametrize(("has", "where"), [("dropout", "rngs.count"), ("norm", "mean")])
def test_without_the_adapter_a_module_would_forget_what_it_drew_or_measured(has, where):
    module, x = nnx_module(**{has: True}), draw(99, B, D)
    said = rf"^step must leave params as they are, but it changed params.*{where}.* from_nnx or"
    with pytest.raises(TypeError, match=said):
        jaxbptt.record(call, window=2).init(module, draw(50, B, H), x)
    learner = jaxbptt.learner(call, lambda y, x: jnp.mean(y), momentum(), window=2)
    with pytest.raises(TypeError, match=said):
        learner.init(module, draw(50, B, H), x)


def test_linen_variables_that_lack_parameters():
    step, params, state = jaxbptt.from_linen(nn.GRUCell(H, param_dtype=float), {})
    said = (
        r"^variables must be what GRUCell.init returned, but of nothing flax says: .* Pass module"
    )
    with pytest.raises(ValueError, match=said):
        jaxbptt.record(step, window=2).init(params, (draw(50, B, H), state), draw(99, B, D))


def test_arguments_of_the_module_are_passed_on():
    module = LinenCell(dropout=True)
    step, params, state = jaxbptt.from_linen(module, linen_variables(module), train=False)
    h, x = draw(50, B, H), draw(99, B, D)
    (carry, _), y = step(params, (h, state), x)
    want = module.apply({"params": params}, h, x, train=False)
    assert all(map(jnp.array_equal, (carry, y), want))

    def twice(module, carry, x):
        return module(module(carry, x, train=False)[0], x, train=False)

    step, params, state = jaxbptt.from_linen(module, linen_variables(module), method=twice)
    assert jnp.array_equal(
        step(params, (h, state), x)[0][0], module.apply({"params": params}, carry, x, False)[0]
    )


class Alone(nn.Module):
    def __call__(self, carry, x, train):
        return carry if train else None


class NnxAlone(nnx.Module):
    def __call__(self, carry, x):
        return jnp.stack([carry, carry])


KEY = jax.random.key(0)
GRU = nnx.GRUCell(D, 4, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (
            lambda: jaxbptt.from_linen(GRU, {}),
            r"module must be a flax\.linen\.Module, but got a GRUCell\. Pass an instance; from",
        ),
        (
            lambda: jaxbptt.from_nnx(nn.GRUCell(4)),
            r"module must be a flax\.nnx\.Module, but got a GRUCell\. Pass an instance; from",
        ),
        (
            lambda: jaxbptt.from_nnx(nnx.GRUCell),
            r"module must be a flax\.nnx\.Module, but got the class GRUCell\. Pass an instance",
        ),
        (
            lambda: jaxbptt.from_linen(nn.RNN(nn.GRUCell(4)), {}),
            r"module must be called as module\(carry, x\) -> \(carry, y\), but the arguments of "
            r"RNN are \(inputs, initial_carry, .*\)\. Pass a cell \(an RNN's \.cell\), and further",
        ),
        (
            lambda: jaxbptt.from_nnx(nnx.RNN(GRU)),
            r"module must be called as .* but the arguments of RNN are \(inputs, initial_carry, ",
        ),
        (
            lambda: jaxbptt.from_linen(Alone(), {}),
            r"but the arguments of Alone are \(carry, x, train\)\. .* e\.g\. train=True\.",
        ),
        (
            lambda: jaxbptt.from_linen(nn.GRUCell(4), {"ir": 0, "hr": 0}),
            r"variables must be what module\.init returned, with 'params' among its collections, "
            r"but got 'ir', 'hr'\. Pass \{'params': params, \.\.\.\}\.",
        ),
        (
            lambda: jaxbptt.from_linen(nn.GRUCell(4), {}, rngs={"dropout": 0}),
            r"rngs must hold keys, such as \{'dropout': .*\}, but got \{'dropout': 0\}\.",
        ),
    ],
)
def test_faults(faulty, message):
    with pytest.raises(ValueError, match=message):
        faulty()


@pytest.mark.parametrize("train", [True, False])
def test_a_linen_module_that_returns_no_pair(train):
    step, params, state = jaxbptt.from_linen(Alone(), {}, train=train)
    with pytest.raises(TypeError, match=r"step must return a pair \(carry, y\), but it returned"):
        jaxbptt.record(step, window=2).init(params, (jnp.zeros((2, 4)), state), 0.0)


def test_an_nnx_module_that_returns_no_pair():
    step, params, state = jaxbptt.from_nnx(NnxAlone())
    with pytest.raises(TypeError, match=r"it returned an array float64\[2,4\]\. .* NnxAlone"):
        jaxbptt.record(step, window=2).init(params, (jnp.zeros(4), state), 0.0)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_without_flax(library, monkeypatch):
    monkeypatch.setitem(sys.modules, f"flax.{library}", None)
    with pytest.raises(ImportError, match=r"needs flax, .*: pip install 'jaxbptt\[flax\]'"):
        getattr(jaxbptt, f"from_{library}")(GRU, *[{}] * (library == "linen"))


def test_a_carry_of_another_dtype_than_the_cell_gives_is_refused():
    for step, params in (
        (call, nnx.SimpleCell(D, H, param_dtype=float, rngs=nnx.Rngs(0))),
        (nn.SimpleCell(H, dtype=jnp.float32).apply, CASES["linen SimpleCell"]().params),
    ):
        with pytest.raises(TypeError, match=r"carry: float64\[3,8\] in, float32\[3,8\] out"):
            jaxbptt.record(step, window=2).init(params, jnp.zeros((B, H)), jnp.zeros((B, D)))


# ---------------------------------------------------------------------- the page


def test_the_table_of_the_page_lists_what_is_tested():
    rows = re.findall(r"^\| ((?:linen|nnx).*?) \| \d", PAGE, re.MULTILINE)
    assert sorted(rows) == sorted(CASES)
