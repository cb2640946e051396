"""Stop and resume: what is restored goes on to the last bit, or is refused in a sentence."""

import functools
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import PATIENCE, ROOT, environment
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbptt
from jaxbptt._checkpoints.manifest import sealed

pytest.importorskip("orbax.checkpoint")
optax = pytest.importorskip("optax")

CHILD = ROOT / "tests" / "resume_child.py"
KILLS = 10
BLOCKS = 80  # of the whole run
AHEAD = 3  # blocks that a life may train while it is about to be killed: it never comes to the end


# ------------------------------------------------------------------ killed


class Life:
    """A child process, warmed up and waiting; see `resume_child.py`."""

    def __init__(self, seed, folder, log, directory, result):
        self.process = subprocess.Popen(
            [sys.executable, str(CHILD), directory, folder / result],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment(PYTHONHASHSEED=str(seed)),  # another order of sets
        )
        self.watchdog = threading.Timer(PATIENCE, self.process.kill)
        self.watchdog.start()

    def begin(self, blocks=0):
        """Lets it begin, and train so many blocks; returns the position it goes on from."""
        assert self.process.stdout.readline() == "ready\n"
        self.process.stdin.write("go\n" * (1 + blocks))
        self.process.stdin.flush()
        return self.progress()

    def progress(self):
        """Waits for the position after the next block."""
        self.at = int(self.process.stdout.readline())
        return self.at

    def end(self, *, kill):
        """Kills it or lets it end; returns the position it has told of, and its exit code."""
        if kill:
            self.process.kill()
        said, _ = self.process.communicate()
        self.watchdog.cancel()
        return int([self.at, *said.split()][-1]), self.process.returncode


def marks(path):
    """What tells a folder from one of the same name that an earlier life left behind."""
    found = path.stat()
    return path.name, found.st_ino, found.st_mtime_ns


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_as_one_that_never_stopped(tmp_path):
    chance, unfinished, lost, at, begun = random.Random(0), 0, 0, 0, set()
    directory = tmp_path / "checkpoints"
    with open(tmp_path / "stderr", "w+") as log:
        alone = Life(99, tmp_path, log, "-", "alone")
        alone.begin(BLOCKS)
        following = Life(0, tmp_path, log, directory, "resumed")
        for i in range(KILLS):
            life, following = following, Life(i + 1, tmp_path, log, directory, "resumed")
            blocks = chance.randint(2, 6)
            start = life.begin(blocks + AHEAD)
            lost += start < at
            for _ in range(blocks):
                life.progress()
            pause = chance.uniform(0, 0.15)
            time.sleep(pause)
            at, code = life.end(kill=True)
            there = sorted(os.listdir(directory))
            before, begun = begun, {marks(directory / name) for name in there if "tmp" in name}
            unfinished += bool(begun - before)
            print(
                f"life {i + 1:2}: from {start:3} to {at:3}, then killed; left: {', '.join(there)}"
            )
            assert code == -signal.SIGKILL
        print(f"{unfinished} of {KILLS} kills fell into a save; after {lost} steps were run again")
        start = following.begin()
        at, code = following.end(kill=False)
        print(
            f"last life: from {start:3} to {at:3}; left: {', '.join(sorted(os.listdir(directory)))}"
        )
        assert code == alone.end(kill=False)[1] == 0, Path(log.name).read_text()
    expected, came = (pickle.loads((tmp_path / name).read_bytes()) for name in ("alone", "resumed"))
    assert len(came) == len(expected) > 40
    assert came == expected
    assert unfinished > 0
    assert lost > 0
    assert sorted(os.listdir(directory)) == ["546", "560"]


# ---------------------------------------------------------------- the state


def cell(params, carry, x):
    """A recurrent cell with dropout, its key in the carry."""
    key, drop = jax.random.split(carry["key"])
    h = jnp.tanh(x @ params["wx"] + carry["h"] @ params["wh"])
    h = jnp.where(jax.random.bernoulli(drop, 0.8, h.shape), h, jnp.zeros_like(h))
    return {"h": h, "key": key}, h


def loss(y, x):
    return jnp.mean((y - jnp.sum(x, 1, keepdims=True)) ** 2)


def numbers(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {"wx": numbers(0, 3, 4), "wh": numbers(1, 4, 4)}
CARRY = {"h": numbers(2, 2, 4), "key": jax.random.key(7)}
XS = numbers(3, 40, 2, 3)
ADAM = optax.adam(0.1)  # one, so that equal learners share what is compiled


def learner_of(step=cell, window=5, every=3, weights="current"):
    return jaxbptt.learner(step, loss, ADAM, window=window, every=every, weights=weights)


@functools.cache
def compiled(learner):
    return jax.jit(learner.update), jax.jit(learner.update, donate_argnums=0)


def trained(learner, steps, state=None, start=0):
    """A state after some steps."""
    state = learner.init(PARAMS, CARRY, XS[0]) if state is None else state
    for x in XS[start : start + steps]:
        state, _ = compiled(learner)[0](state, x)
    return state


def bits(leaf):
    if isinstance(leaf, int | float):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), leaf.shape, np.asarray(jax.random.key_data(leaf)).tobytes()
    return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()


def assert_same(came, expected):
    assert jax.tree.structure(came) == jax.tree.structure(expected)
    assert list(map(bits, jax.tree.leaves(came))) == list(map(bits, jax.tree.leaves(expected)))


def manifest_of(store, step):
    return Path(store._disk.directory, str(step), "manifest", "metadata")


def edit(store, step, **changes):
    """Writes something else into the manifest of a checkpoint."""
    path = manifest_of(store, step)
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | changes)))


@pytest.mark.parametrize(("every", "weights"), [(1, "stored"), (3, "current"), (3, "replayed")])
def test_what_is_restored_goes_on_to_the_last_bit(every, weights, tmp_path):
    learner = learner_of(every=every, weights=weights)
    state = trained(learner, 7)  # amid a group, and the ring has turned
    with jaxbptt.checkpoints(tmp_path, learner) as store:
        store.save(7, state, data={"position": 7})
    again = learner_of(every=every, weights=weights)
    like = jax.eval_shape(again.init, PARAMS, CARRY, XS[0])
    came, data = jaxbptt.checkpoints(tmp_path, again).restore(like)
    assert data == {"position": 7}
    assert_same(came, state)
    assert_same(trained(again, 9, came, 7), trained(learner, 9, state, 7))


def test_a_key_may_be_in_the_ring(tmp_path):
    learner = learner_of(weights="replayed")
    state = trained(learner, 7)
    keys = [v for v in state.tape._ring if jnp.issubdtype(v.dtype, jax.dtypes.prng_key)]
    assert [key.shape for key in keys] == [(5,)]
    with jaxbptt.checkpoints(tmp_path, learner) as store:
        store.save(7, state)
        assert_same(store.restore(state)[0], state)


def test_cleared_all_but_the_recorded_steps_comes_back(tmp_path):
    learner = learner_of()
    state = trained(learner, 7)
    with jaxbptt.checkpoints(tmp_path, learner) as store:
        store.save(7, state)
        came, _ = store.restore(learner.init(PARAMS, CARRY, XS[0]), clear=True)
    assert_same(came, learner.clear(state))
    assert int(state.tape.length) == 5
    assert_same(trained(learner, 5, came, 7), trained(learner, 5, learner.clear(state), 7))


DTYPES = ["bfloat16", "float16", "float64", "complex64", "float8_e4m3fn", "int4", "uint8", "bool"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_dtypes_come_back_as_they_were(dtype, tmp_path):
    drawn = jax.random.bits(jax.random.key(0), (3, 5), jnp.uint8)
    array = jax.lax.bitcast_convert_type(drawn, jnp.float8_e4m3fn).astype(dtype)  # NaNs too
    with jaxbptt.checkpoints(tmp_path, []) as store:
        store.save(0, [array, array[0, 0]])
        assert_same(store.restore([array, array[0, 0]])[0], [array, array[0, 0]])


def test_bfloat16_steps_come_back_as_they_were(tmp_path):
    def narrow(params, h, x):
        h = jnp.tanh(x @ params["wx"] + h @ params["wh"])
        return h, h

    params, h, xs = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (PARAMS, CARRY["h"], XS))
    rec = jaxbptt.record(narrow, window=3)
    tape, call = rec.init(params, h, xs[0]), jax.jit(rec)
    for x in xs[:5]:
        tape, _ = call(params, tape, x)
    with jaxbptt.checkpoints(tmp_path, rec) as store:
        store.save(5, (params, tape))
        (_, came), _ = store.restore((params, rec.init(params, h, xs[0])))
    assert {str(leaf.dtype) for leaf in came._ring} == {"bfloat16"}
    ct, pull = jnp.ones((1, 2, 4), jnp.bfloat16), jax.jit(rec.pullback)
    assert_same(pull(params, came, ct), pull(params, tape, ct))


def test_leaves_come_back_as_what_they_were(tmp_path):
    state = {
        "number": 0.1,
        "int": 3,
        "numpy": np.arange(3.0),
        "weak": jnp.asarray(0.1),
        "nothing": None,
        "empty": jnp.zeros((0, 3)),
        "rbg": jax.random.key(1, impl="rbg"),
        "keys": jax.random.split(jax.random.key(2), 3),
    }
    with jaxbptt.checkpoints(tmp_path, []) as store:
        store.save(0, state)
        came, data = store.restore(state)
    assert data is None
    assert_same(came, state)
    assert {name: type(leaf) for name, leaf in came.items()} == {
        name: type(leaf) for name, leaf in state.items()
    }
    assert came["weak"].weak_type
    assert jax.random.key_impl(came["rbg"]) == "rbg"
    # Bound to no device, it goes along with arrays that are: as the state to start from did.
    assert not came["weak"].committed
    assert not came["keys"].committed


@pytest.mark.parametrize("params", [{}, None], ids=["empty", "None"])
def test_a_step_without_parameters(params, tmp_path):
    rec = jaxbptt.record(lambda _, c, x: (jnp.sin(c) + x, c), window=2)
    tape = rec.init(params, 0.5, 0.0)
    for x in (1.0, 2.0, 3.0):
        tape, _ = rec(params, tape, x)
    with jaxbptt.checkpoints(tmp_path, rec) as store:
        store.save(3, (params, tape))
        came, _ = store.restore((params, rec.init(params, 0.0, 0.0)))
    assert_same(came, (params, tape))


def test_a_step_that_leaves_nothing_on_the_tape(tmp_path):
    rec = jaxbptt.record(lambda w, c, x: (c + x, c + x), window=2)
    tape, _ = rec(1.0, rec.init(1.0, 0.5, 0.0), 1.0)
    assert tape.nbytes == 0
    with jaxbptt.checkpoints(tmp_path, rec) as store:
        store.save(3, tape)
        assert_same(store.restore(rec.init(1.0, 0.5, 0.0))[0], tape)


def test_several_recorders_in_one_state(tmp_path):
    fast, slow = jaxbptt.record(cell, window=2), jaxbptt.record(cell, window=7, every=2)
    state = [each.init(PARAMS, CARRY, XS[0]) for each in (fast, slow)]
    with jaxbptt.checkpoints(tmp_path, [fast, slow]) as store:
        store.save(1, state)
        assert_same(store.restore(state)[0], state)
        assert [
            tape["window"] for tape in json.loads(manifest_of(store, 1).read_text())["tapes"]
        ] == ["2", "7"]
    with pytest.raises(
        ValueError, match="from a recorder with window=7, but was made by one with window=2"
    ):
        jaxbptt.checkpoints(tmp_path, [slow, fast]).restore(state)
    with pytest.raises(ValueError, match="one for each tape, but got 3 for 2 tapes"):
        jaxbptt.checkpoints(tmp_path, [fast, slow, fast]).restore(state)


def test_many_runs_at_once(tmp_path):
    learner = learner_of()
    state = jax.tree.map(lambda v: jnp.stack([v] * 3), trained(learner, 7))  # as of vmap
    with jaxbptt.checkpoints(tmp_path, learner) as store:
        store.save(7, state)
        assert_same(store.restore(state)[0], state)
        with pytest.raises(
            ValueError, match=r"like.tape.carry\['h'\]: float32\[3,2,4\] saved, float32\[2,4\] in"
        ):
            store.restore(learner.init(PARAMS, CARRY, XS[0]))


# ------------------------------------------------------------- on the disk


def test_a_save_returns_before_it_is_on_disk(tmp_path):
    state = np.random.default_rng(0).normal(size=4_000_000)
    with jaxbptt.checkpoints(tmp_path, []) as store:
        store.save(1, state)
        assert store.latest is None
        store.wait()
        assert store.latest == 1
        store.save(2, state)
        assert store.latest == 1
    assert store.latest == 2  # the end of the block has waited


def test_an_exception_does_not_lose_the_save_before_it(tmp_path):
    state = np.random.default_rng(0).normal(size=4_000_000)
    store = jaxbptt.checkpoints(tmp_path, [])

    def interrupted():
        with store:
            store.save(1, state)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        interrupted()
    assert_same(store.restore(state)[0], state)


def test_a_state_may_be_donated_as_soon_as_it_is_saved(tmp_path):
    step = jax.jit(lambda state: jax.tree.map(lambda v: 1.5 * v + 1, state), donate_argnums=0)
    state, expected = {str(i): jnp.full(100_000 + i, float(i)) for i in range(8)}, []
    with jaxbptt.checkpoints(tmp_path, [], keep=None) as store:
        for i in range(4):
            before = jax.tree.leaves(state)[0].unsafe_buffer_pointer()
            state = step(state)
            assert i == 0 or jax.tree.leaves(state)[0].unsafe_buffer_pointer() == before
            expected.append(jax.tree.map(np.array, state))
            store.save(i, state)
            for _ in range(3):
                state = step(state)
        for i in range(4):
            assert_same(store.restore(state, step=i)[0], expected[i])


@pytest.mark.exhaustive
def test_a_donated_learner_is_saved_as_it_was(tmp_path):
    learner = learner_of()
    state, alone = (learner.init(PARAMS, CARRY, XS[0]) for _ in range(2))
    with jaxbptt.checkpoints(tmp_path, learner, keep=None) as store:
        for i, x in enumerate(XS[:9]):
            state, _ = compiled(learner)[1](state, x)
            store.save(i, state)
        for i in range(9):
            alone = trained(learner, 1, alone, i)
            assert_same(store.restore(state, step=i)[0], alone)


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (3, [3, 4, 5]), (None, [1, 2, 3, 4, 5])])
def test_the_newest_are_kept(keep, left, tmp_path):
    with jaxbptt.checkpoints(tmp_path, [], keep=keep) as store:
        for step in range(1, 4):
            store.save(step, jnp.full(3, step))
    with jaxbptt.checkpoints(tmp_path, [], keep=keep) as store:  # counts those there are
        store.save(4, jnp.full(3, 4))
        store.save(5, jnp.full(3, 5))
    assert store.steps == left
    assert store.restore(jnp.zeros(3, int))[0].tolist() == [5, 5, 5]


def test_only_who_writes_removes_what_an_interrupted_save_has_left(tmp_path):
    with jaxbptt.checkpoints(tmp_path, []) as store:
        store.save(1, jnp.zeros(3))
    left = tmp_path / "7.orbax-checkpoint-tmp"
    left.mkdir()
    reader = jaxbptt.checkpoints(tmp_path, [])
    assert reader.latest == 1
    reader.restore(jnp.zeros(3))
    assert left.exists()  # another process may be writing there
    with store:
        store.save(2, jnp.zeros(3))
    assert not left.exists()
    assert store.latest == 2


def test_what_goes_wrong_in_the_background_is_told(tmp_path):
    array, said = np.random.default_rng(0).normal(size=4_000_000), ""
    for i in range(20):
        folder = tmp_path / str(i)
        store = jaxbptt.checkpoints(folder, [])
        store.save(1, array)
        while folder.exists():  # what is just being written can't be deleted along with the rest
            shutil.rmtree(folder, ignore_errors=True)
        try:
            store.close()
        except OSError as error:
            said = str(error)
            break
        # It was written before it was deleted, so that nothing went wrong: once more.
    assert "the state of step 1 could not be written" in said


def test_an_error_of_the_writers_end_does_not_hide_that_of_the_write(tmp_path, monkeypatch):
    store = jaxbptt.checkpoints(tmp_path, [])
    store.save(1, PARAMS)
    store.wait()
    writer, closed = store._disk._writer, []

    def failing(error):
        def fail():
            closed.append(error)
            raise error

        return fail

    monkeypatch.setattr(writer, "wait_until_finished", failing(ValueError("of the write")))
    monkeypatch.setattr(writer, "close", failing(FileNotFoundError("of the end")))
    with pytest.raises(OSError, match=r"step 1 could not be written: of the write\. The"):
        store.close()
    assert len(closed) == 2
    monkeypatch.undo()
    writer.close()


def test_a_damaged_checkpoint_is_named_and_another_one_taken(tmp_path):
    with jaxbptt.checkpoints(tmp_path, []) as store:
        for step in (1, 2):
            store.save(step, jnp.full(3, step))
    shutil.rmtree(tmp_path / "2" / "state" / "d")
    with pytest.raises(ValueError, match=r"checkpoint 2 in .* must be one .* whole, .* its state"):
        store.restore(jnp.zeros(3, int))
    assert store.restore(jnp.zeros(3, int), step=1)[0].tolist() == [1, 1, 1]
    shutil.rmtree(tmp_path / "1" / "manifest")
    with pytest.raises(ValueError, match=r'its manifest there is: .*"manifest" was not found'):
        store.restore(jnp.zeros(3, int), step=1)


# ------------------------------------------------------------ several devices


@pytest.mark.exhaustive
def test_leaves_are_restored_to_the_sharding_asked_for(tmp_path):
    mesh = jax.make_mesh((4, 2), ("batch", "model"), axis_types=(AxisType.Auto,) * 2)
    lay = lambda spec: jax.sharding.NamedSharding(mesh, spec)  # noqa: E731
    learner = learner_of(weights="replayed")
    params = {"wx": numbers(0, 3, 8), "wh": numbers(1, 8, 8)}
    carry = {"h": numbers(2, 4, 8), "key": jax.random.key(7)}
    x = numbers(3, 4, 3)
    state = jax.jit(learner.init)(params, carry, x)

    def laid(state):
        def one(path, leaf):
            spec = P(None, "model") if "'w" in jax.tree_util.keystr(path) else P()
            if "'h'" in jax.tree_util.keystr(path):
                spec = P("batch", "model")
            if leaf.shape == (5, 4, 8):
                spec = P(None, "batch", "model")
            return lay(spec)

        return jax.tree_util.tree_map_with_path(one, state)

    spread = jax.device_put(state, laid(state))
    keys = [v for v in jax.tree.leaves(spread) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key)]
    assert len(keys) == 2
    structs = jax.tree.map(
        lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s), state, laid(state)
    )
    with jaxbptt.checkpoints(tmp_path, learner) as store:
        store.save(1, state)
        store.save(2, spread)
        for step in (1, 2):
            for like in (spread, structs):
                came, _ = store.restore(like, step=step)
                assert_same(came, state)
                for leaf, given in zip(*map(jax.tree.leaves, (came, spread)), strict=True):
                    assert leaf.sharding.is_equivalent_to(given.sharding, leaf.ndim)
                cleared, _ = store.restore(like, step=step, clear=True)
                assert cleared.tape._ring[0].sharding.spec == P(None, "batch", "model")
                assert not cleared.tape._ring[0].any()
            came, _ = store.restore(state, step=step)
            assert_same(came, state)
            assert not any(leaf.committed for leaf in jax.tree.leaves(came))
        onto = jax.device_put(state, jax.devices()[3])
        came, _ = store.restore(onto)
        assert {next(iter(v.devices())) for v in jax.tree.leaves(came)} == {jax.devices()[3]}


def test_a_step_with_collectives_is_told_by_its_options_alone(tmp_path):
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))

    def step(params, h, x):
        h = jnp.tanh(params * h + x)
        return h - jax.lax.pmean(h, "batch"), h

    def over(window):
        rec = jaxbptt.record(step, window=window)

        @jax.jit
        @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("batch"), out_specs=P("batch"))
        def run(h):
            tape = rec.init(jnp.float32(0.5), h, h)
            tape, _ = rec(jnp.float32(0.5), tape, h)
            return jax.tree.map(lambda v: jnp.reshape(v, (1, *v.shape)), tape)

        return rec, run(numbers(0, 8))

    rec, tape = over(3)
    with jaxbptt.checkpoints(tmp_path, rec) as store:
        store.save(1, tape)
        assert_same(store.restore(tape)[0], tape)
    longer, like = over(4)
    with pytest.raises(ValueError, match="continue a tape of window=4, but the one in"):
        jaxbptt.checkpoints(tmp_path, longer).restore(like)


# -------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoint 7 of a learner with window 5, every 3."""
    learner = learner_of()
    state = trained(learner, 7)
    with jaxbptt.checkpoints(tmp_path_factory.mktemp("saved") / "run", learner) as store:
        store.save(7, state)
    return store, state


def copied(saved, tmp_path):
    shutil.copytree(saved[0]._disk.directory, tmp_path / "run")
    return jaxbptt.checkpoints(tmp_path / "run", learner_of())


def fresh(learner, x=XS[0]):
    carry = CARRY | {"h": jnp.zeros((x.shape[0], 4), jnp.float32)}
    return jax.eval_shape(learner.init, PARAMS, carry, x)


def without_dropout(params, carry, x):
    h = jnp.tanh(x @ params["wx"] + carry["h"] @ params["wh"])
    return {"h": h, "key": carry["key"]}, h


def test_another_jax_is_refused_but_for_the_parameters(saved, tmp_path):
    store, state = copied(saved, tmp_path), saved[1]
    edit(store, 7, jax="0.6.9")
    ours = re.escape(jax.__version__)
    with pytest.raises(
        ValueError,
        match=rf"^like.tape must continue a tape of JAX {ours}, but the one in checkpoint 7 in "
        r".*run is of JAX 0.6.9: restore\(like, clear=True\) gives all else back, with the tape "
        r"empty\.$",
    ):
        store.restore(state)
    came, _ = store.restore(state, clear=True)
    assert_same(came, learner_of().clear(state))


def test_a_state_without_a_tape_is_read_by_any_jax(tmp_path):
    with jaxbptt.checkpoints(tmp_path, learner_of()) as store:
        store.save(1, PARAMS)
    edit(store, 1, jax="0.6.9")
    assert_same(store.restore(PARAMS)[0], PARAMS)


OTHERS = {
    "window": (learner_of(window=6), "a tape of window=6, but .* is of window=5: restore"),
    "every": (learner_of(every=2), "a tape of every=2, but .* is of every=3: restore"),
    "weights": (
        learner_of(weights="stored"),
        "a tape of weights=stored, but .* of weights=current: ",
    ),
    "both": (
        learner_of(window=2, every=2),
        "a tape of window=2 and every=2, but .* is of window=5 and every=3: restore",
    ),
    "step": (learner_of(step=without_dropout), "a tape of this step, but .* is of another step: "),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_tape_is_refused_but_for_the_parameters(name, saved):
    other, message = OTHERS[name]
    _, state = saved
    store = jaxbptt.checkpoints(saved[0]._disk.directory, other)
    with pytest.raises(ValueError, match="like.tape must continue " + message):
        store.restore(fresh(other))
    came, _ = store.restore(fresh(other), clear=True)
    empty = other.init(state.params, state.tape.carry, XS[0])
    assert_same(came, empty._replace(opt_state=state.opt_state, step=state.step))


def test_inputs_of_another_type_are_refused_but_for_the_parameters(saved):
    def step(params, carry, x):
        return cell(params, carry, x["in"])

    learner = jaxbptt.learner(
        step, lambda y, x: loss(y, x["in"]), ADAM, window=5, every=3, weights="current"
    )
    like = jax.eval_shape(learner.init, PARAMS, CARRY, {"in": XS[0], "more": XS[0, 0]})
    store = jaxbptt.checkpoints(saved[0]._disk.directory, learner)
    message = r"a tape of x=float32\[2,3\], float32\[3\], but .* of x=float32\[2,3\]: restore"
    with pytest.raises(ValueError, match=message):
        store.restore(like)
    assert_same(store.restore(like, clear=True)[0].params, saved[1].params)


def test_another_library_is_named(saved, tmp_path):
    store = copied(saved, tmp_path)
    said = json.loads(manifest_of(store, 7).read_text())
    edit(store, 7, jaxbptt="0.0.1", tapes=[said["tapes"][0] | {"step": "another"}])
    with pytest.raises(ValueError, match=r"a tape of jaxbptt .*, but .* is of jaxbptt 0.0.1: rest"):
        store.restore(saved[1])
    edit(store, 7, format=2)
    with pytest.raises(
        ValueError, match=r"must be of format 1, but is of 2\. Read it with the jaxb"
    ):
        store.restore(saved[1])


def test_leaves_of_another_type_are_listed_with_their_paths(saved):
    store, state = saved
    params = PARAMS | {"wx": jnp.zeros((3, 4), jnp.bfloat16)}
    with pytest.raises(
        ValueError,
        match=r"like must be of the type of the state in checkpoint 7 in .*, but 1 of \d+ leaves "
        r"differs:\n  \* like.params\['wx'\]: float32\[3,4\] saved, bfloat16\[3,4\] in like\nMake",
    ):
        store.restore(state._replace(params=params))
    with pytest.raises(
        ValueError,
        match=r"the structure differs:\n  \* like.params\['b'\]: nothing saved, float32\[4\] in",
    ):
        store.restore(state._replace(params=PARAMS | {"b": numbers(0, 4)}), clear=True)
    with pytest.raises(
        ValueError, match=r"like.opt_state\[0\].mu\['wh'\]: float32\[4,4\] saved, noth"
    ):
        store.restore(state._replace(opt_state=()))


def test_where_there_is_no_checkpoint(tmp_path):
    store = jaxbptt.checkpoints(tmp_path / "nowhere", [])
    assert store.latest is None
    assert store.steps == []
    message = "directory must hold a complete checkpoint, but there is none in .*nowhere"
    with pytest.raises(FileNotFoundError, match=message):
        store.restore(PARAMS)
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "nowhere" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=message):
        store.restore(PARAMS)
    with store:
        store.save(5, PARAMS)
    with pytest.raises(FileNotFoundError, match=r"one of \[5\], but got 4. Leave it out"):
        store.restore(PARAMS, step=4)


def test_steps_go_up(tmp_path):
    with jaxbptt.checkpoints(tmp_path, []) as store:
        with pytest.raises(ValueError, match=r"step must be at least 0, but got -1\. Go on from"):
            store.save(-1, PARAMS)
        store.save(jnp.int32(5), PARAMS)
        for step in (4, 5):
            with pytest.raises(
                ValueError, match=rf"at least 6, after the .* in .*, but got {step}"
            ):
                store.save(step, PARAMS)
        with pytest.raises(ValueError, match=r"step must be an int, but got 6.5. Of a LearnerSta"):
            store.save(6.5, PARAMS)
        store.save(6, PARAMS)


def test_what_cannot_be_saved_is_named(tmp_path):
    rec = jaxbptt.record(cell, window=5)
    donated = jnp.zeros(3)
    jax.jit(lambda v: v + 1, donate_argnums=0)(donated)
    with jaxbptt.checkpoints(tmp_path, rec) as store:
        with pytest.raises(
            ValueError, match=r"state\['a'\] must be an array or a number, but got 'm"
        ):
            store.save(1, {"a": "mine"})
        with pytest.raises(
            ValueError, match=r"state\[0\] must be an array or a number, but got 1180"
        ):
            store.save(1, [2**70])
        with pytest.raises(
            ValueError, match=r"state\['x'\] must be an array that is there, but it was don"
        ):
            store.save(1, {"x": donated})
        with pytest.raises(
            ValueError, match=r"state must be an array, but got a ShapeDtypeStruct fl"
        ):
            store.save(1, jax.ShapeDtypeStruct((3,), jnp.float32))
        with pytest.raises(ValueError, match=r"state must be an array, but got the traced value"):
            jax.jit(lambda v: store.save(1, v))(donated)
        with pytest.raises(
            ValueError, match=r"data must be what JSON holds, but .*ndarray.* Convert"
        ):
            store.save(1, PARAMS, data={"position": np.zeros(3)})
        other = jaxbptt.record(without_dropout, window=5)
        with pytest.raises(ValueError, match=r"tape must be of this recorder's step"):
            store.save(1, other.init(PARAMS, CARRY, XS[0]))
        assert store.latest is None


def test_faults_of_the_options(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"recorder must be what jaxbptt.record .* got a function"):
        jaxbptt.checkpoints(tmp_path, cell)
    for keep in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"keep must be an int of at least 1, .* got {keep}"):
            jaxbptt.checkpoints(tmp_path, [], keep=keep)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"directory must be a directory, but .*file is a"):
        jaxbptt.checkpoints(tmp_path / "file", [])
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxbptt\[checkpoint\]'"):
        jaxbptt.checkpoints(tmp_path, [])
