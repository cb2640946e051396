"""The T-maze example: its maze, what its gradient can't reach, and what is learned of it."""

import ast
import itertools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import ROOT, run_python
from jax import lax

import jaxbptt

optax = pytest.importorskip("optax")
SCRIPT = ROOT / "examples" / "policy.py"
PAGE = ROOT / "docs" / "policy.md"
BATCH, STEPS, HIDDEN = 64, 1500, 32


@pytest.fixture(scope="module", autouse=True)
def policy():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        yield __import__("policy")
        del sys.modules["policy"]


@pytest.fixture(scope="module")
def first(policy):
    """Parameters and a carry before training, by a number."""

    @jax.jit
    def draw(seed):
        keys = jax.random.split(jax.random.key(seed))
        return policy.first_params(keys[0]), policy.first_carry(keys[1], BATCH)

    return draw


@pytest.fixture(scope="module")
def walk(policy):
    """Forty steps: the carries before and after each, and its y."""

    @jax.jit
    def run(params, carry):
        def visit(carry, key):
            after, y = policy.step(params, carry, key)
            return after, (carry, after, y)

        return lax.scan(visit, carry, jax.random.split(jax.random.key(4), 40))[1]

    return run


def int32(*numbers):
    return jnp.array(numbers, jnp.int32)


# ------------------------------------------------------------------- the maze

MAZES = [(s, j, p) for s in (-1, 1) for j in range(4, 11) for p in range(j + 1)]


def by_hand(sign, junction, position, action):
    """(reward, over, turned at the junction, in the exit)."""
    if position == 0:
        return 0, False, False, False
    if position < junction:
        return (0, False, False, False) if action == 0 else (-1, True, False, False)
    return 1 if action == sign else -1, True, action != 0, action == sign


def test_each_action_at_each_place_does_what_the_rules_say(policy):
    cases = [(*maze, action) for maze in MAZES for action in (-1, 0, 1)]
    *maze, action = int32(*cases).T
    keys = jax.random.split(jax.random.key(0), len(cases))
    after, reward, ends = jax.jit(jax.vmap(policy.act))(policy.Maze(*maze), action, keys)
    got = np.stack([reward, ends["episodes"], ends["turns"], ends["exits"]], 1)
    np.testing.assert_array_equal(got, [by_hand(*case) for case in cases])
    fresh = jax.jit(jax.vmap(policy.new_maze))(keys)
    for n, (sign, junction, position, _) in enumerate(cases):
        expected = [part[n] for part in fresh] if got[n, 1] else (sign, junction, position + 1)
        assert [int(part[n]) for part in after] == [int(part) for part in expected]


def test_the_sign_is_seen_at_the_start_alone_and_the_junction_is_told_from_the_corridor(policy):
    sign, place = jax.jit(jax.vmap(policy.observe))(policy.Maze(*int32(*MAZES).T))
    np.testing.assert_array_equal(sign[:, 0], [s if p == 0 else 0 for s, _, p in MAZES])
    kind = [0 if p == 0 else 1 + (p == j) for _, j, p in MAZES]
    np.testing.assert_array_equal(place, np.eye(3)[kind])


def test_signs_are_fair_and_lengths_vary_independently_of_them(policy):
    keys = jax.random.split(jax.random.key(1), 14_000)
    mazes = jax.jit(jax.vmap(policy.new_maze))(keys)
    assert set(mazes.sign.tolist()) == {-1, 1}
    assert not mazes.position.any()
    pairs = list(zip(mazes.sign.tolist(), mazes.junction.tolist(), strict=True))
    expected = 14_000 / 14
    assert set(pairs) == set(itertools.product((-1, 1), range(4, 11)))
    assert all(abs(pairs.count(pair) - expected) < 5 * expected**0.5 for pair in set(pairs))


def test_episodes_of_a_batch_end_at_different_times_and_start_without_memory(first, walk):
    params, start = first(2)
    params["sign"] = jnp.ones((1, HIDDEN), jnp.float32)
    before, after, y = walk(params, start)
    over, mazes = np.asarray(y["episodes"]), after["maze"]
    np.testing.assert_array_equal(mazes.position == 0, over)
    times = {tuple(np.flatnonzero(row)) for row in over.T}
    assert len(times) > BATCH / 2
    same = jax.tree.map(lambda a, b: np.asarray(a == b) | over, before["maze"], mazes)
    assert same.sign.all()
    assert same.junction.all()
    together = over.sum(1).argmax()  # at this step most episodes start, each in its own maze
    assert len(set(np.asarray(mazes.junction)[together, over[together]].tolist())) > 3
    started = np.asarray(y["at_start"])
    h = np.asarray(after["h"])[started]
    seen = np.asarray(before["maze"].sign)[started][:, None] + np.asarray(params["place"])[0]
    np.testing.assert_allclose(h, np.tanh(seen), atol=1e-6)


# ------------------------------------------------- what is learned, and what can't be


def largest_for_the_sign():
    """Passes gradients on, and keeps the largest that the sign's weights ever got."""

    def update(grads, largest, params=None):
        return grads, jnp.maximum(largest, jnp.abs(grads["sign"]).max())

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.float32), update)


@pytest.fixture(scope="module")
def trained(policy, first):
    """By window: params, the largest gradient of the sign's weights, how episodes ended."""

    def run(window):
        optimizer = optax.chain(largest_for_the_sign(), optax.adam(2e-3))
        learner = jaxbptt.learner(policy.step, policy.loss, optimizer, window=window)

        @jax.jit
        def train(keys):
            state = learner.init(*first(0), keys[0])
            return lax.scan(learner.update, state, keys)

        state, metrics = train(jax.random.split(jax.random.key(1), STEPS))
        return state.params, float(state.opt_state[0]), jax.tree.map(np.asarray, metrics.aux)

    return {window: run(window) for window in (1, 12)}


@pytest.mark.slow
def test_the_signs_weights_get_no_gradient_through_a_window_of_1_and_stay_zero(trained):
    params, largest, _ = trained[1]
    assert largest == 0.0
    assert not params["sign"].any()
    params, largest, _ = trained[12]
    assert largest > 1e-3
    assert params["sign"].all()


@pytest.mark.slow
def test_a_window_of_1_learns_to_walk_and_then_tosses_a_coin(trained):
    ends = trained[1][2]
    late = {end: count[-300:].sum() for end, count in ends.items()}
    assert late["turns"] > 0.95 * late["episodes"]
    turns, exits = ends["turns"].sum(), ends["exits"].sum()
    assert turns > 5000
    assert abs(exits - turns / 2) < 3 * turns**0.5 / 2


@pytest.mark.slow
def test_a_window_as_long_as_the_longest_episode_finds_the_exit(trained):
    late = {end: count[-300:].sum() for end, count in trained[12][2].items()}
    assert late["exits"] > 0.95 * late["episodes"]


@pytest.mark.slow
def test_nothing_that_a_window_of_1_learned_depends_on_the_sign(first, walk, trained):
    _, start = first(5)
    mirrored = start | {"maze": start["maze"]._replace(sign=-start["maze"].sign)}

    def first_episode(params, carry):
        _, _, y = walk(params, carry)
        over = np.asarray(y["episodes"])
        first = np.cumsum(over, 0) - over == 0
        assert first.sum(0).max() == 11  # to the end of the longest corridor
        return np.where(first[..., None], y["logits"], 0), first

    logits, first = zip(*(first_episode(trained[1][0], c) for c in (start, mirrored)), strict=True)
    np.testing.assert_array_equal(*logits)
    np.testing.assert_array_equal(*first)
    logits, _ = zip(*(first_episode(trained[12][0], c) for c in (start, mirrored)), strict=True)
    assert (logits[0] != logits[1]).any()


@pytest.mark.slow
def test_no_gradient_crosses_the_start_of_an_episode(policy, first, trained):
    def nudged(params, carry, x):
        key, nudge = x
        carry, y = policy.step(params, carry | {"h": carry["h"] + nudge}, key)
        return carry, y["logits"]

    window, params = 16, trained[12][0]
    rec = jaxbptt.record(nudged, window=window)
    none = jnp.zeros((BATCH, HIDDEN), jnp.float32)

    def visit(tape, key):
        return rec(params, tape, (key, none))[0], tape.carry["maze"].position

    @jax.jit
    def run(keys):
        tape = rec.init(params, first(6)[1], (keys[0], none))
        tape, positions = lax.scan(visit, tape, keys)
        ct = rec.pullback(params, tape, jnp.ones((1, BATCH, 3), jnp.float32))
        return ct.xs[1][::-1], ct.carry["h"], positions[-1]

    by_lag, beyond, age = run(jax.random.split(jax.random.key(7), 40))
    assert set(age.tolist()) >= {0, 1, 5, 9}  # the newest step's number in its episode
    # The nudge of an episode's first step goes into the memory that is abandoned there.
    expected = np.arange(window)[:, None] < np.asarray(age)
    np.testing.assert_array_equal(np.asarray(by_lag != 0).any(-1), expected)
    assert not beyond.any()


# ------------------------------------------------------------ the script and its page


@pytest.mark.slow
def test_the_script_prints_a_table_and_draws_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    options = "--window 2 --steps 30 --batch 4 --seeds 2 --seed 3 --picture curves.png"
    done = run_python(SCRIPT, *options.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ +steps +30 +after ± sd", done.stdout, re.MULTILINE)
    assert re.search(
        r"^window +2 +[\d.]+ +[\d.]+ ± [\d.]+ +\d+/\d+ +[\d.]+$", done.stdout, re.MULTILINE
    )
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_what_the_training_counts_is_in_the_table_and_in_the_picture(
    policy, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("matplotlib")

    def train(seed, window, steps, batch, size):
        assert (window, steps, batch, size) == (2, 500, 4, 250)
        found = jnp.stack([10 * seed, 20 * seed])  # seeds 1 and 2
        return {}, counts(40, 30, found), counts(10, 10, 2 * seed)

    def counts(episodes, turns, exits):
        full = [jnp.full_like(exits, number) for number in (episodes, turns)]
        return dict(zip(policy.ENDS, (*full, exits), strict=True))

    drawn = []
    draw = policy.draw

    def drawing(curves, ends, file):
        drawn.append((curves, list(ends)))
        draw(curves, ends, file)

    monkeypatch.setattr(policy, "train", train)
    monkeypatch.setattr(policy, "draw", drawing)
    picture = tmp_path / "curves.png"
    options = f"--window 2 --steps 500 --batch 4 --seeds 2 --seed 1 --picture {picture}"
    monkeypatch.setattr(sys, "argv", ["policy.py", *options.split()])
    policy.main()
    _, head, row = capsys.readouterr().out.splitlines()
    assert re.search(r"^ +steps +250 +500 +after ± sd", head)
    # In the mean of two seeds: 15 and 30 of 40 episodes; afterwards 2 and 4 of 10.
    assert re.search(r"^window +2 +37\.5 +75\.0 +30\.00 ± 14\.14 +90/120 +[\d.]+$", row)
    ((curves, ends),) = drawn
    np.testing.assert_array_equal(curves[2], [[25, 50], [50, 100]])
    assert ends == [250, 500]
    assert picture.stat().st_size > 5000


def test_numbers_that_make_no_sense_are_refused(policy, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["policy.py", "--window", "1", "0"])
    with pytest.raises(SystemExit, match="2"):
        policy.main()
    assert "must be at least 1" in capsys.readouterr().err


def without_docstrings(tree):
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for function in functions:
        if ast.get_docstring(function):
            del function.body[0]
    return {function.name: ast.dump(function) for function in functions}


def test_the_pages_code_is_that_of_the_example_and_short():
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    assert len([line for line in code.splitlines() if line]) <= 25
    on_page = without_docstrings(ast.parse(code))
    in_example = without_docstrings(ast.parse(SCRIPT.read_text("utf-8")))
    assert on_page == {name: in_example[name] for name in ("cell", "step")}
