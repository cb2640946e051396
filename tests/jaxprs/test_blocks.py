"""Blocks of steps: how long they are, and that a run in blocks is a run."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbptt._jaxprs.loops import block_of, block_size, in_blocks, rows

# ------------------------------------------------------------ how long they are

# A block keeps at most 15 parts in 100 of what `jax.vjp` would hold; fewer steps than 8 don't pay.
SHARE, FEWEST = 0.15, 8
CASES = [
    {"length": length, "a_step": a, "held": h, "spared": s, "copied": c, "in_parts": p}
    for length, a, h, s, c, p in itertools.product(
        (1, 2, 7, 8, 9, 12, 50, 97, 100, 1000),
        (0, 1, 40, 512),
        (0, 100, 1000, 40_000),
        (0, 333, 5000),
        (0, 1, 64),
        (0, 1000, 30_000),
    )
]


def size_of(length, a_step, held, spared, copied, in_parts):
    return block_size(length, a_step, held, spared, copied=copied, in_parts=in_parts)


def allowed(case):
    return SHARE * (case["held"] + case["spared"]) + case["spared"]


def divisors(length):
    return [n for n in range(1, length + 1) if length % n == 0]


def test_a_block_has_from_one_step_to_all():
    sizes = {case["length"]: set() for case in CASES}
    for case in CASES:
        assert type(size_of(**case)) is int, case
        assert 1 <= size_of(**case) <= case["length"], case
        sizes[case["length"]].add(size_of(**case))
    assert all(len(found) > 1 for length, found in sizes.items() if length > 8)
    assert all(found == {length} for length, found in sizes.items() if length <= 8)


def test_a_run_is_one_block_where_that_keeps_little_or_saves_nothing():
    for case in CASES:
        at_once = case["a_step"] * case["length"]
        if at_once <= allowed(case) or at_once <= case["in_parts"] or case["length"] <= FEWEST:
            assert size_of(**case) == case["length"], case


def test_what_a_block_keeps_is_within_its_share():
    several = 0
    for case in CASES:
        size = size_of(**case)
        if size < case["length"]:
            several += 1
            assert case["a_step"] * case["length"] > max(allowed(case), case["in_parts"]), case
            if size > FEWEST:
                assert size * (case["a_step"] + case["copied"]) <= allowed(case), case
    assert several > 100


def test_a_block_is_as_long_as_its_share_lets_it_or_divides_the_run_evenly():
    uneven = 0
    for case in CASES:
        size, length = size_of(**case), case["length"]
        if size == length:
            continue
        longer = [n for n in range(size + 1, length + 1) if n <= FEWEST] + [
            n
            for n in range(size + 1, length + 1)
            if n > FEWEST and n * (case["a_step"] + case["copied"]) <= int(allowed(case))
        ]
        if length % size:
            uneven += 1
            assert not longer, case
            assert not [n for n in divisors(length) if size / 2 < n <= size], case
        else:  # less than the share for the sake of even blocks, but more than half of it
            assert not set(longer) & set(divisors(length)), case
            assert len(longer) < size, case
    assert uneven > 10


@pytest.mark.parametrize(
    ("want", "case"),
    [
        (100, (100, 15, 10_000, 0, 0, 0)),  # 1500 bytes, which are the share
        (50, (100, 16, 10_000, 0, 0, 0)),  # 1600: up to 93 steps would do
        (50, (100, 16, 10_000, 0, 11, 0)),  # 55 steps, with what is copied
        (25, (100, 16, 10_000, 0, 16, 0)),  # 46
        (100, (100, 16, 10_000, 0, 16, 1600)),  # several blocks would take as much themselves
        (46, (97, 16, 10_000, 0, 16, 0)),  # a prime length
        (5, (10, 10**6, 0, 0, 0, 0)),  # at least 8 are allowed
        (8, (11, 10**6, 0, 0, 0, 0)),
        (50, (100, 16, 0, 1000, 0, 0)),  # what is spared counts whole, and its share: 1150
        (100, (100, 16, 0, 1400, 0, 0)),
    ],
)
def test_a_few_by_hand(want, case):
    assert size_of(*case) == want


# -------------------------------------------------------------- a run in blocks

LENGTH = 11
NUMBERS = np.arange(1, LENGTH + 1)
SIZES = [11, 4, 5, 1, 10, 7]  # nothing left over, 3, 1, nothing, 1 and 4


def one_by_one(numbers):
    """A state that knows in which order it came by the rows, and what each row makes of it."""
    state, outs = 1, []
    for number in numbers:
        state = (3 * state + int(number)) % 1009
        outs.append(state)
    return state, outs


def run_of(descending, seen):
    def run(state, start, size):
        seen.append(size)
        (numbers,) = block_of([jnp.asarray(NUMBERS)], start, size)
        outs = [None] * size
        for i in reversed(range(size)) if descending else range(size):
            state = (3 * state + numbers[i]) % 1009
            outs[i] = state
        pairs = jnp.stack([jnp.stack([v, -v]) for v in outs]).astype(jnp.float32)
        return state, [jnp.stack(outs), pairs]

    return run


KINDS = [jax.ShapeDtypeStruct((), jnp.int64), jax.ShapeDtypeStruct((2,), jnp.float32)]


@pytest.mark.parametrize("descending", [False, True])
def test_a_run_in_blocks_is_a_run_row_by_row(descending):
    seen = {size: [] for size in SIZES}

    @jax.jit
    def all_sizes(state):
        return [
            in_blocks(
                run_of(descending, seen[size]),
                state,
                LENGTH,
                size,
                KINDS,
                first=3,
                descending=descending,
            )
            for size in SIZES
        ]

    state, outs = one_by_one(NUMBERS[::-1] if descending else NUMBERS)
    outs = np.array(outs[::-1] if descending else outs)
    for size, (last, (numbers, pairs)) in zip(SIZES, all_sizes(jnp.int64(1)), strict=True):
        assert int(last) == state, size
        np.testing.assert_array_equal(numbers, outs)
        np.testing.assert_array_equal(pairs, np.stack([outs, -outs], 1))
        assert (numbers.dtype, pairs.dtype) == (jnp.int64, jnp.float32)
        # Blocks of one length are one loop, whose body is traced once.
        assert set(seen[size]) == {size, LENGTH % size} - {0}


def test_a_run_without_outputs():
    def run(state, start, size):
        return state + start * size, []

    state, outs = jax.jit(lambda state: in_blocks(run, state, 7, 3, [], first=0, descending=False))(
        jnp.int32(0)
    )
    assert (int(state), outs) == (0 * 1 + 1 * 3 + 4 * 3, [])


def test_one_block_is_run_as_it_is():
    called = []
    run = lambda *args: called.append(args) or ("state", ["outs"])  # noqa: E731
    done = in_blocks(run, "first", 7, 7, KINDS, first=0, descending=True)
    assert done == ("state", ["outs"])
    ((state, start, size),) = called
    assert (state, int(start), size) == ("first", 0, 7)


def test_one_row_and_one_block_of_stacks():
    stacks = [np.arange(5), np.arange(30.0).reshape(5, 3, 2)]
    assert block_of(stacks, jnp.int32(0), 5) is stacks  # no copy of all rows
    assert block_of([], jnp.int32(2), 2) == []

    @jax.jit
    def some(place):
        arrays = [jnp.asarray(v) for v in stacks]
        return rows(arrays, place), block_of(arrays, place, 2)

    for place in (0, 3):
        row, block = some(np.int32(place))
        for stack, one, two in zip(stacks, row, block, strict=True):
            np.testing.assert_array_equal(one, stack[place])
            np.testing.assert_array_equal(two, stack[place : place + 2])
    assert rows([], jnp.int32(1)) == []
