"""`scan(remat=k)`: the same gradient from carries at the starts of blocks of k steps."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import two_parts
from harness import draw, grid, pulled, worst
from hypothesis import given as drawn
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P
from oracles import check, random_like
from programs import fixed_profile, several, steps
from zoo import ZOO

import jaxbptt
from jaxbptt._transforms.scan_forward import steps_between_checkpoints

PARAMS = {"w": draw(0, 4, 4), "u": draw(1, 3, 4), "b": draw(2, 1, 4), "v": draw(3, 4, 2)}
LENGTH = 7


def step(p, c, x):
    h = jnp.tanh(c @ p["w"] + x @ p["u"] + p["b"])
    return h, (h @ p["v"]) ** 2


def flipped(steps, reverse):
    return steps[::-1] if reverse else steps


# ------------------------------------------------------- every window, every block


@functools.cache
def run_of(length):
    """The steps in the order in which they run, for the oracle, and cotangents."""
    run = oracles.Run(step, PARAMS, draw(4, 2, 4), draw(5, length, 2, 3), length)
    carries, ys = run.trajectory
    return run, [random_like(y, t) for t, y in enumerate(ys)], random_like(carries[-1], 50)


RELATIONS = [(None, 1), (1, 1), (3, 3), (2, 3), (5, 8), (5, 1), (3, 2), (5, 2), (8, 2), (20, 1)]
BLOCKS = [2, 3, 4, 7, 20, True]
WAYS = [(LENGTH, False), (LENGTH, True), (9, False), (1, False)]


@pytest.mark.parametrize(
    ("window", "every", "remat", "length", "reverse"),
    grid(
        [(*relation, k, *way) for relation, k, way in itertools.product(RELATIONS, BLOCKS, WAYS)],
        always=[
            (None, 1, 3, 7, False),
            (3, 3, 3, 7, False),  # blocks and chunks are the same, one step is left over
            (3, 3, 2, 7, True),  # a chunk begins in the midst of a block
            (2, 3, 2, 7, True),  # steps that no chain reaches
            (5, 1, 2, 7, False),  # chains that reach over blocks
            (5, 2, 3, 9, False),  # blocks without a rest
            (5, 2, 4, 7, True),
            (5, 8, 20, 7, True),  # the whole run is one block
            (1, 1, True, 1, False),
            (8, 2, True, 7, False),
        ],
    ),
)
def test_every_relation_of_window_every_and_block(window, every, remat, length, reverse):
    run, ct_ys, ct_carry = run_of(length)
    how = {"window": window, "every": every, "reverse": reverse, "remat": remat}
    xs = flipped(draw(5, length, 2, 3), reverse)
    got, _ = pulled(step, PARAMS, run.carry, xs, length, flipped(ct_ys, reverse), ct_carry, **how)
    want = run.whole(window, every, ct_ys, ct_carry)
    assert worst([got.params, got.carry], [want.params, want.carry]) < 1e-12
    assert worst(flipped(np.asarray(got.xs[0]), reverse), want.xs[0]) < 1e-12


PARTS = [{"fast": 2, "slow": 5}, {"fast": 5, "slow": 2}, {"fast": 3, "slow": (20, 1)}]


@pytest.mark.parametrize(
    ("window", "every", "remat", "reverse"),
    grid(
        itertools.product(PARTS, [1, 2, 4], [2, 3, 4, True], [False, True]),
        always=[
            (PARTS[0], 1, 3, False),
            (PARTS[1], 2, 4, True),
            (PARTS[2], 4, 3, False),
        ],
    ),
    ids=str,
)
def test_a_window_for_each_part(window, every, remat, reverse):
    n, xs = two_parts.LENGTH, two_parts.XS
    run = oracles.Run(two_parts.step, two_parts.PARAMS, two_parts.CARRY, xs, n)
    carries, ys = run.trajectory
    ct_ys, ct_carry = [random_like(y, t) for t, y in enumerate(ys)], random_like(carries[-1], 50)
    how = {"window": window, "every": every, "remat": remat, "reverse": reverse}
    given = [flipped(v, reverse) for v in (xs, ct_ys)]
    got, _ = pulled(
        two_parts.step, two_parts.PARAMS, run.carry, given[0], n, given[1], ct_carry, **how
    )
    slow = window["slow"]
    want = run.whole(
        [window["fast"], slow[0] if isinstance(slow, tuple) else slow], every, ct_ys, ct_carry
    )
    assert worst([got.params, got.carry], [want.params, want.carry]) < 1e-12
    assert worst(flipped(np.asarray(got.xs[0]), reverse), want.xs[0]) < 1e-12


FIRST = ["typed_key", "integer_leaves", "tokens", "checkpoint_policy", "no_params", "bfloat16"]


@pytest.mark.parametrize(
    ("name", "window", "every"),
    grid(
        [(name, *relation) for name in sorted(ZOO) for relation in ((None, 1), (5, 2), (2, 3))],
        always=[(name, *((None, 1), (5, 2), (2, 3))[i % 3]) for i, name in enumerate(FIRST)],
    ),
)
def test_a_zoo_of_steps(name, window, every):
    case = ZOO[name](np.float64)
    xs = case.xs(LENGTH)
    # A product in bfloat16 has its error, whatever the dtype of the weights around it.
    inside = [np.zeros((), jnp.bfloat16)] if name == "bfloat16" else []
    allowed = oracles.tolerance(case.params, case.carry, xs, inside)
    how = {"window": window, "every": every, "remat": 3}
    held_against_each_group(case.step, case.params, case.carry, xs, LENGTH, allowed, **how)


def held_against_each_group(step, params, carry, xs, length, allowed, **how):
    run = oracles.Run(step, [params] * length, carry, xs, length)
    carries, ys = run.trajectory
    ct_ys, ct_carry = [random_like(y, s) for s, y in enumerate(ys)], random_like(carries[-1], 50)
    want = run.whole(how["window"], how["every"], ct_ys, ct_carry)
    got, outs = pulled(step, params, carry, xs, length, ct_ys, ct_carry, **how)
    for name in ("params", "carry", "xs"):
        check(f"remat, {name}", getattr(got, name), getattr(want, name), allowed)
    check("remat, values", outs, (carries[-1], oracles.stack(ys)), allowed)


@pytest.mark.exhaustive
@fixed_profile
@drawn(
    made=steps(),
    window=st.none() | st.integers(1, 7),
    every=st.integers(1, 5),
    length=st.integers(1, 6),
    remat=st.integers(1, 6),
)
def test_random_steps(made, window, every, length, remat):
    step, params, carry, x = made
    xs = several(x, length)
    allowed = 100 * oracles.tolerance(params, carry, xs)  # random programs may cancel
    how = {"window": window, "every": every, "remat": remat}
    held_against_each_group(step, params, carry, xs, length, allowed, **how)


@pytest.mark.parametrize("reverse", grid([True, False], always=[True]))
def test_random_cuts_count_the_steps_of_the_run(reverse):
    init, xs = draw(4, 2, 4), draw(5, 11, 2, 3)

    @jax.jit
    def grads(p, key):
        def loss(p, remat):
            how = {"window": jaxbptt.random_window(key, 3), "reverse": reverse, "remat": remat}
            return jnp.sum(jaxbptt.scan(functools.partial(step, p), init, xs, **how)[1])

        return [jax.grad(loss)(p, remat) for remat in (None, 4)]

    assert worst(*grads(PARAMS, jax.random.key(3))) < 1e-13


# ------------------------------------------------------------ what lax.scan does


def run_with(p, init, xs, scan=jaxbptt.scan, f=step, **how):
    return scan(functools.partial(f, p), init, xs, **how)


def arguments(length):
    return PARAMS, draw(4, 2, 4), draw(5, length, 2, 3)


@pytest.mark.compiled
@pytest.mark.parametrize(("remat", "unroll", "reverse"), [(4, 1, False), (3, 2, True)])
def test_values_are_those_of_the_plain_loop_to_the_last_bit(remat, unroll, reverse):
    """Beside a gradient too."""
    ours = functools.partial(jaxbptt.scan, window=3, every=2, remat=remat)
    how = {"unroll": unroll, "reverse": reverse}

    def outs_and_grad(*args):
        outs, pull = jax.vjp(functools.partial(run_with, scan=ours, **how), *args)
        return outs, pull(outs)

    got, _ = jax.jit(outs_and_grad)(*arguments(11))
    want = jax.jit(functools.partial(run_with, scan=lax.scan, **how))(*arguments(11))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def by_hand(f, init, xs, block):
    """Checkpointed BPTT as one writes it."""

    @jax.checkpoint
    def piece(carry, xs):
        return lax.scan(f, carry, xs)

    pieces = jax.tree.map(lambda v: v.reshape(-1, block, *v.shape[1:]), xs)
    carry, ys = lax.scan(piece, init, pieces)
    return carry, jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), ys)


def squares(run):
    return lambda *args: sum(jnp.sum(v**2) for v in jax.tree.leaves(run(*args)))


@pytest.mark.parametrize("remat", grid([1, 4, 12], always=[4]))
def test_no_window_is_checkpointed_bptt(remat):
    ours = functools.partial(run_with, window=None, remat=remat)
    theirs = functools.partial(run_with, scan=by_hand, block=remat)
    grads = [jax.jit(jax.grad(squares(run), (0, 1, 2)))(*arguments(12)) for run in (ours, theirs)]
    assert worst(*grads) < 1e-12


def test_no_window_is_the_checkpointed_loop_of_equinox():
    loops = pytest.importorskip("equinox.internal")
    ours = functools.partial(run_with, window=None, remat=True)
    theirs = functools.partial(run_with, scan=loops.scan, kind="checkpointed")
    grads = [jax.jit(jax.grad(squares(run), (0, 1, 2)))(*arguments(12)) for run in (ours, theirs)]
    assert worst(*grads) < 1e-12


def test_the_step_runs_once_more_and_its_effects_happen_again(capsys):
    def f(c, x):
        jax.debug.print("at {}", x)
        return 0.5 * c + jnp.sin(c * x), None

    def printed(scan, **how):
        jax.grad(lambda c: scan(f, c, jnp.arange(6.0), **how)[0])(0.3)
        jax.effects_barrier()
        return capsys.readouterr().out.split()[1::2]

    steps = [f"{s}.0" for s in range(6)]
    assert printed(jaxbptt.scan, window=2, remat=4) == [*steps, "4.0", "5.0", *steps[:4]]
    assert printed(jaxbptt.scan, window=2) == steps
    assert sorted(printed(by_hand, block=3)) == sorted(2 * steps)


def test_second_order():
    def first(w, remat):
        def loss(w):
            f = lambda c, x: (jnp.tanh(w * c + x),) * 2  # noqa: E731
            ys = jaxbptt.scan(f, 0.1, draw(0, 7), window=3, every=2, remat=remat)[1]
            return jnp.sum(ys**2)

        return jax.grad(loss)(w)

    both = jax.jit(lambda w: [jax.grad(first)(w, remat) for remat in (None, 3)])
    np.testing.assert_allclose(*both(0.7), rtol=1e-12)


def test_under_vmap_jit_disabled_and_without_steps():
    def loss(w, xs, remat):
        f = lambda c, x: (jnp.tanh(w * c + x), c * x)  # noqa: E731
        return jnp.sum(jaxbptt.scan(f, xs.sum(), xs, window=3, remat=remat)[1])

    grad = jax.grad(loss, (0, 1))
    ws, xs = draw(0, 3), draw(1, 3, 7)
    got, want = jax.jit(
        lambda *args: [jax.vmap(functools.partial(grad, remat=remat))(*args) for remat in (3, None)]
    )(ws, xs)
    assert worst(got, want) < 1e-13
    with jax.disable_jit():
        assert worst([g[0] for g in got], list(grad(ws[0], xs[0], 3))) < 1e-13
    assert [float(g.sum()) for g in grad(0.5, jnp.zeros(0), 3)] == [0, 0]


@pytest.mark.parametrize("window", grid([3, None], always=[3]))
def test_inside_shard_map_with_checked_axes(window):
    def loss(w, xs, reduce):
        def f(c, x):
            c = jnp.tanh(c @ w + x)
            return c, reduce(c.sum())

        return jnp.sum(jaxbptt.scan(f, jnp.zeros_like(xs[0]), xs, window=window, remat=2)[1])

    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        lambda w, xs: loss(w, xs, lambda v: lax.psum(v, "i")),
        mesh=mesh,
        in_specs=(P(), P(None, "i")),
        out_specs=P(),
    )
    args = draw(0, 3, 3), draw(1, 5, 2, 3)
    alone = functools.partial(loss, reduce=lambda v: v)
    assert worst(*(jax.jit(jax.grad(run))(*args) for run in (sharded, alone))) < 1e-12


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_a_batch_laid_over_devices_of_explicit_axes():
    def loss(w, init, xs):
        def f(c, x):
            c = jnp.tanh(c @ w + x)
            return c, jnp.sum(c**2)

        return jnp.sum(jaxbptt.scan(f, init, xs, window=3, remat=2)[1])

    grad = jax.jit(jax.grad(loss, (0, 1, 2)))
    args = draw(0, 3, 3), draw(1, 8, 3), draw(2, 5, 8, 3)
    want = grad(*args)
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Explicit,))
    enter = jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh
    with enter(mesh):
        placed = [
            jax.device_put(v, jax.sharding.NamedSharding(mesh, spec))
            for v, spec in zip(args, (P(), P("i"), P(None, "i")), strict=True)
        ]
        got = jax.jit(jax.grad(loss, (0, 1, 2)))(*placed)
    assert worst(got, want) < 1e-12


# ---------------------------------------------- chains that go back by themselves


@jax.custom_vjp
def clipped(c):
    return c


clipped.defvjp(lambda c: (c, None), lambda _, ct: (jnp.clip(ct, -0.3, 0.3),))


def clipping(w, c, x):
    c = clipped(jnp.tanh(w * c + x))
    return c, c**2


@pytest.mark.parametrize(
    ("window", "every", "remat", "reverse"),
    grid(
        itertools.product([None, 1, 3, 4, 6, 20], [1, 2, 3], [2, 3, 4, 20], [False, True]),
        always=[(3, 3, 2, False), (4, 1, 3, False), (4, 2, 2, True), (6, 2, 4, False)],
    ),
)
def test_a_derivative_that_is_not_linear(window, every, remat, reverse):
    """Where each chain goes back by itself its window is run again."""
    p = {"w": jnp.asarray(0.7), "start": jnp.asarray(0.1)}

    def loss(p, xs, remat):
        how = {"window": window, "every": every, "remat": remat, "reverse": reverse}
        ys = jaxbptt.scan(functools.partial(clipping, p["w"]), p["start"], xs, **how)[1]
        return jnp.sum(3 * ys)

    both = jax.jit(lambda *args: [jax.grad(loss, (0, 1))(*args, k) for k in (None, remat)])
    assert worst(*both(p, draw(0, 9))) < 1e-13


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="JAX 0.7 has no jax.new_ref")
@pytest.mark.parametrize("remat", grid([2, 4, 20], always=[4]))
def test_a_step_that_writes_to_references(remat):
    def f(w, c, x):
        r = jax.new_ref(w * c)
        r[...] += x
        h = jnp.tanh(r[...])
        return h, r[...] * h

    def loss(w, remat):
        how = {"window": 5, "every": 2, "remat": remat}
        return jnp.sum(run_with(w, jnp.asarray(0.1), draw(0, 9), f=f, **how)[1])

    both = jax.jit(lambda w: [jax.grad(loss)(w, k) for k in (None, remat)])
    np.testing.assert_allclose(*both(0.7), rtol=1e-13)


# ------------------------------------------------------------------------ memory


def many_residuals(p, c, x):
    """A small carry, of which a step makes ten times as much."""
    h = c
    for _ in range(5):
        h = jnp.sin(h * p["a"] + x) * jnp.exp(-(h**2))
    return 0.9 * c + h, jnp.sum(h)


SIZE = 64
A_CARRY, A_STEP = 8 * SIZE, 8 * SIZE * 15  # bytes; of the residuals no more than these


def temporaries(length, scan=jaxbptt.scan, f=many_residuals, **how):
    def loss(p, init, xs):
        carry, ys = run_with(p, init, xs, scan, f, **how)
        return jnp.sum(ys[-1]) + jnp.sum(carry**2)

    args = {"a": draw(0, SIZE)}, draw(1, SIZE), draw(2, length)
    program = jax.jit(jax.grad(loss)).lower(*args).compile()
    return program.memory_analysis().temp_size_in_bytes


TRUNCATED = [
    ({"window": 100, "every": 100}, 1),
    ({"window": 20}, 20),
    ({"window": 150, "every": 30}, 5),
    ({"window": 10, "every": 70}, 1),
    ({"window": None}, 1),
]


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("how", "chains"), grid(TRUNCATED, always=[TRUNCATED[0], TRUNCATED[2]]), ids=str
)
def test_memory_is_that_of_carries_and_of_one_block(how, chains):
    short, long = (temporaries(n, **how, remat=50) for n in (1000, 5000))
    per_step = 3 * 8  # ȳ, and what the loss makes of it
    assert long - short <= 4000 * (1.1 * A_CARRY / 50 + per_step)
    assert short <= (1000 / 50 + 2) * A_CARRY + 1.3 * 50 * A_STEP + chains * 8 * A_CARRY
    assert short < temporaries(1000, **how) / 3


@pytest.mark.compiled
def test_memory_where_each_chain_runs_its_window_again():
    def f(p, c, x):
        c, y = many_residuals(p, clipped(c), x)
        return c, y

    how = {"window": 40, "every": 10, "remat": 50}
    short, long = (temporaries(n, f=f, **how) for n in (1000, 5000))
    per_step = 3 * 8 + 8  # ȳ, what the loss makes of it, and x̄
    assert long - short <= 4000 * (1.1 * A_CARRY / 50 + per_step)
    assert short <= (1000 / 50 + 2) * A_CARRY + 1.3 * (40 + 2 * 50) * A_STEP


@pytest.mark.compiled
def test_memory_is_that_of_checkpointed_pieces():
    theirs = temporaries(2000, by_hand, block=50)
    assert temporaries(2000, window=None, remat=50) <= 1.1 * theirs


@pytest.mark.compiled
def test_no_stack_is_copied_at_each_block():
    def loss(p, init, xs):
        how = {"window": 20, "every": 5, "remat": 50}
        return jnp.sum(run_with(p, init, xs, f=many_residuals, **how)[0] ** 2)

    args = {"a": draw(0, SIZE)}, draw(1, SIZE), draw(2, 1000)
    text = jax.jit(jax.grad(loss)).lower(*args).compile().as_text()
    copied = re.findall(r"= \w+\[(\d+),\d+\]\S* copy\(", text)
    assert not {"50", "20", "21"}.intersection(copied)


def closure_like(a_step):
    """As much of a closure as the choice of a block looks at, with so many bytes of residuals."""

    def of(**attributes):
        return type("Like", (), attributes)

    out = of(aval=jax.ShapeDtypeStruct((a_step,), np.int8))
    return of(forward=of(jaxpr=of(outvars=[out])), layout=of(recorded=(0,)))


@pytest.mark.parametrize(
    ("carry", "a_step", "length", "steps"),
    [
        (100, 100, 10_000, 100),  # the root of the length, where a carry is as large as a step's
        (100, 1600, 10_000, 25),  # residuals, and shorter where it is smaller
        (1600, 100, 10_000, 400),
        (100, 100, 10_007, 100),  # a prime number of steps: some are left over
        (100, 100, 9_000, 100),
        (100, 100, 9_999, 101),
        (1, 10**6, 10_000, 8),  # no fewer
        (10**6, 1, 10_000, 10_000),
        (0, 100, 50, 10),
        (100, 0, 50, 50),
        (100, 100, 5, 5),
        (100, 100, 0, 1),
    ],
)
def test_a_block_of_our_choice(carry, a_step, length, steps):
    init = [jax.ShapeDtypeStruct((carry,), np.int8)]
    assert steps_between_checkpoints(closure_like(a_step), init, length) == steps


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("bad", [0, -1, 1.5, "auto", (2,)])
def test_remat_must_be_a_positive_int(bad):
    with pytest.raises(ValueError, match="remat must be an int of at least 1"):
        jaxbptt.scan(lambda c, x: (c + x, None), 0.0, jnp.ones(3), window=2, remat=bad)


def test_remat_must_be_known_when_the_loop_is_traced():
    def run(k):
        return jaxbptt.scan(lambda c, x: (c + x, None), 0.0, jnp.ones(3), window=2, remat=k)

    with pytest.raises(ValueError, match=r"remat must be a Python int known when .* static_argn"):
        jax.jit(run)(2)


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="JAX 0.7 has no jax.new_ref")
def test_a_reference_that_f_closes_over():
    ref = jax.new_ref(jnp.zeros(()))

    def f(c, x):
        ref[...] += x
        return c * x, None

    with pytest.raises(TypeError, match="must not close over a mutable reference"):
        jaxbptt.scan(f, 0.5, jnp.ones(3), window=None, remat=2)


@jax.custom_vjp
def approximated(v):
    return jnp.sin(v)


approximated.defvjp(lambda v: (jnp.sin(v), v), lambda v, ct: (0.7 * ct * jnp.cos(v),))


@pytest.mark.parametrize("window", [None, 9, 2])
def test_second_derivatives_of_a_rule_that_is_not_exact(window):
    xs = jnp.arange(1.0, 6.0) * 0.3

    def loss(w, scan):
        def body(c, x):
            c = approximated(w * c + x)
            return c, c**2

        return jnp.sum(scan(body, 0.4, xs)[1])

    def second(scan):
        grad = jax.grad(lambda w: loss(w, scan))
        return grad(0.6), jax.grad(grad)(0.6), jax.jvp(grad, (0.6,), (1.0,))[1]

    whole = functools.partial(jaxbptt.scan, window=window)
    got = second(functools.partial(whole, remat=2))
    np.testing.assert_allclose(got, second(whole), rtol=1e-12)
    if window != 2:
        np.testing.assert_allclose(got, second(lax.scan), rtol=1e-12)
