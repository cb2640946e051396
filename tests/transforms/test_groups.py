"""Which steps the outputs of each group reach, counted out for all short runs."""

import itertools

import jax
import numpy as np
import pytest

import jaxbptt
from jaxbptt._transforms.groups import Groups
from jaxbptt._types import type_of
from jaxbptt._windows import Windows, reach_of_rows

# Steps and ages of one shape for all cases, so that each operation is compiled once.
LONGEST = 10
STEPS = np.arange(1, LONGEST + 1, dtype=np.int32)[:, None]
AGES = np.arange(LONGEST, dtype=np.int32)[None]

RUNS = list(itertools.product(range(LONGEST + 1), range(1, LONGEST + 1)))
SINGLE = [((w,), *run) for run in RUNS for w in range(1, LONGEST + 1)]
# Of two windows all, but fewer runs of them: all groups full, one cut short, all in one.
PAIRS = [
    ((v, w), length, every)
    for length, every in itertools.product((0, 1, 4, 7, 8), (1, 2, 3, 4, 8))
    for v, w in itertools.product((1, 2, 3, 4, 5, 8, 10), repeat=2)
]


def ends_of(length, every):
    """The first and the last step of each group."""
    firsts = range(1, length + 1, every)
    return [(first, min(first + every - 1, length)) for first in firsts]


def reach(first, end, window, every):
    """The oldest step that the outputs of a group reach, as the definition has it."""
    return max(1, first - max(window - every, 0), end - window + 1)


def pairs_of(length, window, every):
    """(output, step) wherever the step is no newer and the output's cotangent reaches it."""
    return {
        (t, s)
        for first, end in ends_of(length, every)
        for t in range(first, end + 1)
        for s in range(reach(first, end, window, every), t + 1)
    }


def groups_of(windows, length, every):
    """As `scan` makes them: windows that reach beyond the run are all one."""
    most = max(length, 1) + every - 1
    return Groups.of(length, [min(w, most) for w in windows], every)


def windows_of(groups, count):
    return groups.parts or (groups.window,) * count


def alive(groups, window):
    """By step and age, from step 1 and age 0."""
    return np.asarray(groups.alive(STEPS, AGES, window))


def own(groups):
    return np.broadcast_to(groups.own(STEPS), STEPS.shape)[:, 0]


def pairs_said(groups, window):
    """The same pairs by `own` and `alive`."""
    numbers, table = own(groups), alive(groups, window)
    steps = range(1, groups.length + 1)
    return {
        (t, s)
        for t in steps
        for s in range(1, t + 1)
        if table[s - 1, numbers[t - 1] - numbers[s - 1]]
    }


@pytest.mark.parametrize("cases", [SINGLE, PAIRS], ids=["one window", "two windows"])
def test_an_output_reaches_the_steps_that_the_definition_says(cases):
    for windows, length, every in cases:
        groups = groups_of(windows, length, every)
        for given, window in zip(windows, windows_of(groups, len(windows)), strict=True):
            want = pairs_of(length, given, every)
            assert pairs_said(groups, window) == want, (windows, length, every)


@pytest.mark.parametrize("cases", [SINGLE, PAIRS], ids=["one window", "two windows"])
def test_no_chain_is_older_than_there_are_chains(cases):
    for windows, length, every in cases:
        groups = groups_of(windows, length, every)
        case = windows, length, every
        leaves = windows_of(groups, len(windows))
        counts = [groups.chains_of(w) for w in leaves]
        if groups.chains == 1:  # then nobody asks how many there are of a leaf
            counts = [1 for _ in leaves]
        assert groups.chains == max(counts), case
        for count, window in zip(counts, leaves, strict=True):
            table = alive(groups, window)[:length]
            assert not table[:, count:].any(), case
            # With enough steps all of them are alive at once; then none is too many.
            if length >= groups.every * count and length:
                assert (table.sum(1) == count).any(), case


@pytest.mark.parametrize("cases", [SINGLE, PAIRS], ids=["one window", "two windows"])
def test_what_is_said_of_a_step_and_of_the_whole_run(cases):
    for windows, length, every in cases:
        groups = groups_of(windows, length, every)
        case = windows, length, every
        longest = max(windows)
        ends = ends_of(length, groups.every)
        steps = range(1, length + 1)

        # Groups are the given ones, or one of all steps where no chain but the last starts.
        assert ends == ends_of(length, every) or (
            len(ends) <= 1 and min(windows) >= length + every - 1
        ), case
        numbers = [g for g, (first, end) in enumerate(ends) for _ in range(first, end + 1)]
        assert own(groups)[:length].tolist() == numbers, case

        # A chain starts from zero at the end of each group but the last, which has c̄.
        starts = np.asarray(groups.starts(STEPS))[:length, 0]
        assert (np.flatnonzero(starts) + 1).tolist() == [end for _, end in ends[:-1]], case

        reached = np.asarray(groups.reached(STEPS))[:length, 0]
        own_group = [
            s >= reach(first, end, longest, every)
            for first, end in ends_of(length, every)
            for s in range(first, end + 1)
        ]
        if ends == ends_of(length, every):
            assert reached.tolist() == own_group, case
        all_pairs = pairs_of(length, longest, every)
        assert reached.tolist() == [any(s == at for _, at in all_pairs) for s in steps], case
        if length:
            assert groups.gaps == (not reached.all()), case

        # c̄ of the last step reaches all steps, as do all outputs: nothing is ever cut.
        triangle = length * (length + 1) // 2
        everything = all(len(pairs_of(length, w, every)) == triangle for w in windows)
        if length:
            one_chain = len(ends) == 1 and not groups.parts
            assert groups.whole == (everything and one_chain), case


def test_one_group_does_where_nothing_is_cut_off():
    """Full backpropagation through time is one chain, however it was asked for."""
    for length, every in RUNS:
        steps = max(length, 1)
        most = steps + every - 1
        assert Groups.of(length, [most], every) == Groups(length, steps, steps)
        assert Groups.of(length, [most, most], every) == Groups(length, steps, steps)
        assert Groups.of(length, [most], every).chains == 1
        assert Groups.of(length, [most], every).whole
        if most > 1 and length > 1:
            assert not Groups.of(length, [most - 1], every).whole or every >= length
            assert not Groups.of(length, [most, most - 1], every).whole


def test_equal_windows_of_parts_are_one_window():
    for windows in ([3], [3, 3], [3, 3, 3]):
        assert Groups.of(10, windows, 2) == Groups(10, 3, 2)
    assert Groups.of(10, [3, 1, 3], 2) == Groups(10, 3, 2, (3, 1, 3))


def test_the_arithmetic_is_that_of_traced_steps_too():
    """As the loops call it: a traced int32 step, ages of a few chains, a window of the object."""
    groups = Groups.of(7, [3, 5], 2)
    ages = np.arange(3, dtype=np.int32)

    @jax.jit
    def said(step):
        return (
            [groups.alive(step, ages, w) for w in (3, 5)],
            groups.starts(step),
            groups.own(step),
            groups.reached(step),
        )

    for step in range(1, 8):
        of_parts, starts, number, reached = said(np.int32(step))
        for found, window in zip(of_parts, (3, 5), strict=True):
            np.testing.assert_array_equal(found, alive(groups, window)[step - 1, :3])
        assert bool(starts) == (step in (2, 4, 6))
        assert int(number) == (step - 1) // 2
        assert reached


def test_the_last_rows_of_a_group_reach_what_the_definition_says():
    newest = 100  # so far from the first step that it is in nobody's way
    for window, every in itertools.product(range(1, 11), repeat=2):
        for rows in range(1, window + 1):
            oldest = reach(newest - rows + 1, newest, window, every)
            assert reach_of_rows(window, rows, every) == newest - oldest + 1, (window, rows, every)


# ----------------------------------------------------------------- windows

CARRY = type_of({"fast": np.zeros(2), "slow": (np.zeros((2, 3)), np.int32(0)), "none": None})


@pytest.mark.parametrize(
    ("window", "by_leaf"),
    [
        (3, [3, 3, 3]),
        ({"fast": 2, "slow": 5, "none": 9}, [2, 5, 5]),
        ({"fast": 2, "slow": (5, 7), "none": 1}, [2, 5, 7]),
        ({"slow": (np.int64(5), 1), "none": 1, "fast": np.int32(4)}, [4, 5, 1]),
    ],
    ids=str,
)
def test_each_leaf_gets_the_window_of_its_part(window, by_leaf):
    windows = Windows.of(window)
    assert windows.by_leaf(CARRY) == by_leaf
    assert windows.longest == max(jax.tree.leaves(window))
    assert windows.tree() == window
    assert all(type(steps) is int for steps in windows.steps)


def test_windows_are_static_and_equal_by_value():
    one, other = Windows.of({"a": 2, "b": (3, 4)}), Windows.of({"b": (np.int64(3), 4), "a": 2})
    assert one == other
    assert hash(one) == hash(other)
    assert one != Windows.of({"a": 2, "b": [3, 4]})
    assert one != Windows.of({"a": 2, "b": (3, 5)})
    assert Windows.of(2**63).steps == (2**63,)
    assert Windows.of((1, 9, 4)).longest == 9


@pytest.mark.parametrize(
    "window",
    [
        {"fast": 2},
        {"fast": 2, "slow": 3, "none": 1, "other": 1},
        {"fast": 2, "slow": (1, 2, 3), "none": 1},
        {"fast": 2, "slow": [1, 2], "none": 1},
        {"fast": (2,), "slow": 3, "none": 1},
        (2, 3, 4),
    ],
    ids=str,
)
def test_containers_that_are_not_those_of_the_carry_are_refused(window):
    shown = r"window\[.*carry\['fast'\]: float64\[2\]\n.*carry\['slow'\]\[1\]: int32\[\]"
    with pytest.raises(
        ValueError,
        match=rf"(?s)^window must be one int, or ints in the containers of the carry.*{shown}",
    ):
        Windows.of(window).by_leaf(CARRY)


@pytest.mark.parametrize("bad", [0, -1, True, 2.0, "all", None])
def test_what_is_no_positive_int_is_refused_by_its_path(bad):
    with pytest.raises(
        ValueError,
        match=r"^window must be an int of at least 1",
    ):
        Windows.of(bad)
    of_a_part = {"a": (3, bad)}
    with pytest.raises(
        ValueError,
        match=r"^window\['a'\]\[1\] must be an int of at least 1",
    ):  # None may be right, until the carry is known
        Windows.of(of_a_part).by_leaf(type_of({"a": (np.ones(2), np.ones(2))}))


@pytest.mark.parametrize("empty", [(), {}, [(), {}]], ids=str)
def test_a_window_without_any_number_is_refused(empty):
    with pytest.raises(
        ValueError,
        match=r"^window must be an int of at least 1",
    ):
        Windows.of(empty)


def test_a_random_window_is_for_the_whole_carry_of_scan_alone():
    drawn = jaxbptt.random_window(jax.eval_shape(lambda: jax.random.key(0)), mean=3)
    with pytest.raises(
        ValueError,
        match=r"^window\['a'\] must be an int, but got a random window",
    ):
        Windows.of({"a": drawn, "b": 2})


def test_a_traced_window_is_refused():
    with pytest.raises(
        ValueError,
        match=r"^window must be a Python int known when the loop is traced",
    ):
        jax.eval_shape(Windows.of, 3)
