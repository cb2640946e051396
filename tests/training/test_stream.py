"""The driver: one compiled loop for each block, read ahead, nothing kept, no state lost."""

import functools
import gc
import itertools
import signal
import sys
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import lax
from training_loops import momentum

import jaxbptt
from jaxbptt._training import learner as _learner

T = 23
INPUTS = np.random.default_rng(0).normal(size=(T, 2, 3))
TARGETS = np.random.default_rng(1).integers(0, 4, size=(T, 2))
PARAMS = {"w": jnp.asarray(0.3 * INPUTS[:2, 0, :2]), "u": jnp.asarray(INPUTS[:3, 1, :2])}


def step(params, h, x):
    h = jnp.tanh(h @ params["w"] + x["u"] @ params["u"])
    return h, h


def loss(y, x):
    return jnp.mean((y - x["k"][:, None].astype(y.dtype)) ** 2), x["k"].sum()


OPTIMIZER = momentum()


def make(step=step, **options):
    return jaxbptt.learner(step, loss, OPTIMIZER, **{"window": 4, "every": 2} | options)


def stream(start=0, stop=T):
    for u, k in zip(INPUTS[start:stop], TARGETS[start:stop], strict=True):
        yield {"u": u, "k": k}


def begun(learner):
    return learner.init(PARAMS, jnp.zeros((2, 2)), next(stream()))


@pytest.fixture(scope="module")
def want():
    """The whole stream as one loop: (state, metrics)."""
    learner = make()
    xs = {"u": jnp.asarray(INPUTS), "k": jnp.asarray(TARGETS)}
    return jax.jit(lambda s: lax.scan(learner.update, s, xs))(begun(learner))


def around_each_block(monkeypatch, call):
    """Has each block run by `call(run, state, xs)`."""
    for_block = _learner._Compiled.for_block
    monkeypatch.setattr(
        _learner._Compiled,
        "for_block",
        lambda *args: functools.partial(call, for_block(*args)),
    )


def check_state(state, want):
    oracles.check("stream, state", (state.params, state.tape), (want.params, want.tape), 1e-12)
    assert int(state.step) == int(want.step)


@pytest.mark.parametrize("block", [1, 5, T, 100])
def test_is_the_loop_that_it_cuts_up(block, want):
    learner, seen = make(), []

    def callback(state, metrics):
        seen.append((int(state.step), jax.tree.map(np.asarray, metrics)))

    state = learner.run(begun(learner), stream(), block=block, callback=callback)
    check_state(state, want[0])
    sizes = [len(metrics.loss) for _, metrics in seen]
    assert sizes == [block] * (T // block) + [T % block] * bool(T % block)
    assert [done for done, _ in seen] == list(np.cumsum(sizes))
    metrics = jax.tree.map(lambda *parts: np.concatenate(parts), *[m for _, m in seen])
    oracles.check("stream, metrics", metrics, want[1], 1e-12)
    np.testing.assert_array_equal(metrics.updated, want[1].updated)
    np.testing.assert_array_equal(metrics.aux, TARGETS.sum(1))


def test_reads_the_next_block_while_one_is_on_its_way(monkeypatch):
    events, wait = [], jax.block_until_ready
    around_each_block(monkeypatch, lambda run, *args: events.append("start") or run(*args))
    monkeypatch.setattr(jax, "block_until_ready", lambda v: events.append("wait") or wait(v))

    def reading():
        for x in stream(0, 5):
            events.append("read")
            yield x

    learner = make()
    learner.run(begun(learner), reading(), block=2, callback=lambda s, m: events.append("told"))
    assert " ".join(events) == (
        "read read start read read wait told start read wait told start wait told"
    )


def test_goes_on_where_it_left_off(want):
    learner = make()
    state = learner.run(begun(learner), stream(0, 7), block=3)
    state = learner.run(state, stream(7), block=5)
    check_state(state, want[0])


def test_an_empty_stream_changes_nothing():
    learner = make()
    state = begun(learner)
    assert learner.run(state, iter(()), callback=lambda s, m: 1 / 0) is state
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_the_callback_ends_it():
    learner, inputs, told = make(), iter(list(stream())), []

    def callback(state, metrics):
        told.append(int(state.step))
        return len(told) == 2

    state = learner.run(begun(learner), inputs, block=4, callback=callback)
    assert told == [4, 8]
    assert int(state.step) == 8
    assert T - len(list(inputs)) == 12  # a block was read ahead


def test_compiled_once():
    traces = []

    def counted(*args):
        traces.append(1)
        return step(*args)

    alive = []  # what equal learners share goes with the last of them

    def run(stop):
        learner = make(counted)
        alive.append(learner)
        learner.run(begun(learner), stream(0, stop), block=4)

    run(8)
    seen = len(traces)
    begun(make(counted))
    of_init = len(traces) - seen
    run(20)
    assert len(traces) == seen + 2 * of_init
    run(11)  # the shorter block
    more = len(traces)
    run(7)
    run(3)
    assert len(traces) == more + 2 * of_init


def test_nothing_is_kept():
    learner, refs = make(), {"inputs": [], "losses": []}

    def reading():
        for x in itertools.islice(itertools.cycle(stream()), 200):
            x = {name: np.array(leaf) for name, leaf in x.items()}
            refs["inputs"].append(weakref.ref(x["u"]))
            yield x

    def callback(state, metrics):
        gc.collect()
        for name, most in (("inputs", 2), ("losses", 1)):
            assert sum(ref() is not None for ref in refs[name]) <= most
        refs["losses"].append(weakref.ref(metrics.loss))

    state = begun(learner)
    gc.freeze()  # so that collecting goes through what the run makes, and not through JAX
    try:
        learner.run(state, reading(), block=10, callback=callback)
    finally:
        gc.unfreeze()
    assert len(refs["losses"]) == 20


def test_the_state_is_written_over():
    learner, kept = make(), []

    def callback(state, metrics):
        kept.append((state.params, jax.tree.map(jnp.copy, state.params)))

    learner.run(begun(learner), stream(0, 8), block=4, callback=callback)
    assert kept[0][0]["w"].is_deleted()
    assert np.isfinite(kept[0][1]["w"]).all()


def test_a_state_that_was_written_over_is_told_of():
    learner = make()
    state = begun(learner)
    learner.run(state, stream(0, 4), block=4)
    for again in (
        lambda: learner.run(state, stream(0, 4), block=4),
        lambda: learner.update(state, 0.0),
        lambda: learner.evaluate(state, jnp.zeros(3)),
    ):
        with pytest.raises(ValueError, match="run has taken its memory"):
            again()


def test_the_states_of_several_learners_are_told_of():
    learner = make()
    both = jax.tree.map(lambda v: jnp.stack([v, v]), begun(learner))
    with pytest.raises(ValueError, match="that of one learner, but holds those of several"):
        learner.run(both, stream(0, 4))


# ------------------------------------------------------------------ kinds of x


def test_a_buffer_that_is_filled_again(want):
    buffer = {"u": np.empty((2, 3)), "k": np.empty(2, TARGETS.dtype)}

    def reading():
        for x in stream():
            for name, leaf in x.items():
                buffer[name][...] = leaf
            yield buffer

    learner = make()
    check_state(learner.run(begun(learner), reading(), block=5), want[0])


@pytest.mark.parametrize(
    "x",
    [
        1.5,
        pytest.param(True, marks=pytest.mark.exhaustive),
        None,
        pytest.param([], marks=pytest.mark.exhaustive),
        pytest.param(np.float64(2), marks=pytest.mark.exhaustive),
        {"a": 3, "b": (None, jnp.ones(2))},
        jax.random.key(3),
        np.ones(2, jnp.bfloat16),
    ],
    ids=str,
)
def test_inputs_of_all_kinds(x):
    def step(params, c, x):
        return params * c + 1.0, params * c

    learner = jaxbptt.learner(step, lambda y, x: y**2, OPTIMIZER, window=3)
    seen = []
    state = learner.init(0.5, 0.2, x)
    state = learner.run(state, [x] * 5, block=2, callback=lambda s, m: seen.extend(m.loss))
    plain = learner.init(0.5, 0.2, x)
    update = jax.jit(learner.update)
    for at in range(5):
        plain, metrics = update(plain, x)
        np.testing.assert_allclose(seen[at], metrics.loss, rtol=1e-12)


def test_inputs_that_jax_alone_makes_arrays_of():
    class Reading:
        def __jax_array__(self):
            return jnp.asarray(0.5)

    learner = jaxbptt.learner(
        lambda w, c, x: (w * c + x, c), lambda y, x: y**2, OPTIMIZER, window=2
    )
    states = [learner.run(learner.init(0.5, 0.2, 0.5), [x] * 3, block=2) for x in (Reading(), 0.5)]
    oracles.check("__jax_array__", states[0].params, states[1].params, 0.0)


# ---------------------------------------------------------------------- faults


class StreamError(Exception):
    """What a stream raises."""


def failing(fault, after):
    yield from stream(0, after)
    raise fault


def run_into(error, xs, block=4, **options):
    """What ended the run, and what the callback was told until then."""
    learner, told = make(), []

    def callback(state, metrics):
        told.append(int(state.step))

    with pytest.raises(error, match="LearnerState after") as caught:
        learner.run(begun(learner), xs, block=block, callback=callback, **options)
    return learner, caught.value, told


def test_a_stream_that_raises(want):
    fault = StreamError("no more")
    learner, error, told = run_into(StreamError, failing(fault, 10))
    assert error is fault
    assert told == [4, 8, 10]
    assert int(error.state.step) == 10
    assert error.__notes__ == ["The LearnerState after 10 steps is in this exception's .state."]
    check_state(learner.run(error.state, stream(10)), want[0])


def test_a_stream_that_raises_at_once():
    learner, error, told = run_into(StreamError, failing(StreamError(), 0))
    assert told == []
    assert int(learner.run(error.state, stream(0, 3)).step) == 3


def test_an_interrupt_while_reading(want):
    learner, error, told = run_into(KeyboardInterrupt, failing(KeyboardInterrupt(), 10))
    assert told == [4]
    assert int(error.state.step) == 8  # the block that had begun
    check_state(learner.run(error.state, stream(8)), want[0])


def test_a_callback_that_raises(want):
    learner = make()

    def callback(state, metrics):
        if int(state.step) == 12:
            raise StreamError("enough")

    with pytest.raises(StreamError, match="enough") as caught:
        learner.run(begun(learner), stream(), block=4, callback=callback)
    check_state(learner.run(caught.value.state, stream(12)), want[0])


@pytest.fixture
def interruptible():
    """Ctrl-C as Python handles it, also where the tests were started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_while_a_block_starts(monkeypatch, want, interruptible):
    """The old state is donated and the new one not there yet."""
    calls = []

    def interrupted(run, *args):
        found = run(*args)
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return found

    around_each_block(monkeypatch, interrupted)
    before = signal.getsignal(signal.SIGINT)
    learner, error, told = run_into(KeyboardInterrupt, stream())
    assert told == [4]
    assert signal.getsignal(signal.SIGINT) is before
    check_state(learner.run(error.state, stream(8)), want[0])


def test_an_interrupt_while_a_block_is_compiled(want, interruptible):
    """It ends the run at once: nothing is donated yet."""
    pressed = []

    def interrupted(*args):
        if pressed == [False]:
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    learner = make(interrupted)
    state = begun(learner)
    pressed.append(False)
    with pytest.raises(KeyboardInterrupt, match="LearnerState after 0 steps") as caught:
        learner.run(state, stream(), block=T)
    assert caught.value.state is state
    check_state(learner.run(state, stream(), block=T), want[0])


def test_a_handler_of_ones_own_is_called(monkeypatch, want):
    came = []

    def signalled(run, *args):
        told = len(came)
        signal.raise_signal(signal.SIGINT)
        assert len(came) == told
        return run(*args)

    around_each_block(monkeypatch, signalled)
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        learner = make()
        state = learner.run(begun(learner), stream(), block=10)
    finally:
        signal.signal(signal.SIGINT, before)
    assert came == [signal.SIGINT] * 3
    check_state(state, want[0])


def test_in_a_thread(want):
    found = []
    learner = make()
    thread = threading.Thread(target=lambda: found.append(learner.run(begun(learner), stream())))
    thread.start()
    thread.join()
    check_state(found[0], want[0])


def bad_at(at, x):
    return itertools.chain(stream(0, at), [x], stream(at))


GOOD = {"u": INPUTS[0], "k": TARGETS[0]}


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (
            GOOD | {"u": INPUTS[0, :1]},
            r"after 10 steps, x must be of the type that the tape was made for, but 1 of 2 leaves "
            r"differs:\n  \* x\['u'\]: float64\[2,3\] expected, float64\[1,3\] got\nxs must give",
        ),
        (GOOD | {"k": TARGETS[0].astype(np.int32)}, r"x\['k'\]: int64\[2\] expected, int32\[2\]"),
        (GOOD | {"u": jnp.ones((2, 3), jnp.float32)}, r"x\['u'\]: .*, float32\[2,3\] got"),
        (GOOD | {"more": 1}, r"the structure differs:\n  \* x\['more'\]: nothing expected, int64"),
        (INPUTS[0], r"x\['k'\]: int64\[2\] expected, nothing got"),
        (GOOD | {"u": "text"}, r"after 10 steps, x\['u'\] must be an array .* but got 'text'"),
        (GOOD | {"u": object()}, r"after 10 steps, x\['u'\] must be an array"),
    ],
)
def test_an_x_of_another_type(x, said, want):
    learner = make()
    with pytest.raises(ValueError, match=said) as caught:
        learner.run(begun(learner), bad_at(10, x), block=4)
    assert int(caught.value.state.step) == 10
    check_state(learner.run(caught.value.state, stream(10)), want[0])


def test_the_position_of_a_fault_counts_the_steps_before_this_stream():
    learner = make()
    state = learner.run(begun(learner), stream(0, 7), block=4)
    with pytest.raises(ValueError, match=r"^after 10 steps, x\['u'\] must be an array"):
        learner.run(state, [*stream(7, 10), GOOD | {"u": "text"}], block=4)


def test_inputs_that_are_stacked_already():
    learner = make()
    with pytest.raises(ValueError, match=r"stacked already go through jax.lax.scan\(learner.upd"):
        learner.run(begun(learner), {"u": INPUTS, "k": TARGETS}.values())


@pytest.mark.parametrize("xs", [3, None, stream])
def test_what_is_no_stream(xs):
    learner = make()
    with pytest.raises(ValueError, match="xs must be an iterable of single inputs"):
        learner.run(begun(learner), xs)


def test_block_is_a_number_of_steps():
    learner = make()
    with pytest.raises(ValueError, match="block must be an int of at least 1"):
        learner.run(begun(learner), stream(), block=0)


# -------------------------------------------------------------------- progress


def test_a_progress_bar(capsys, want):
    pytest.importorskip("tqdm")
    learner = make()
    check_state(learner.run(begun(learner), list(stream()), block=5, progress=True), want[0])
    shown = capsys.readouterr().err
    assert f"{T}/{T}" in shown
    assert f"loss {want[1].loss[-3:].mean():.4g}" in shown
    learner.run(begun(learner), stream(), block=5, progress="online")
    shown = capsys.readouterr().err
    assert "online: 23 steps" in shown
    learner.run(begun(learner), stream(0, 2))
    assert capsys.readouterr().err == ""


def test_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    learner = make()
    with pytest.raises(ImportError, match=r"progress=True needs tqdm, .* 'jaxbptt\[train\]'"):
        learner.run(begun(learner), stream(), progress=True)
    assert int(learner.run(begun(learner), stream(0, 3)).step) == 3


def test_a_learner_that_was_run_is_let_go_with_all_that_its_step_closes_over():
    class Table:
        def __init__(self):
            self.rows = jnp.ones((8, 8))

    kept = []
    for rate in (0.1, 0.2, 0.3):
        table = Table()
        kept.append(weakref.ref(table))

        def step(w, c, x, table=table):
            return w * c + x + 0 * table.rows[0, 0], w * c

        learner = jaxbptt.learner(step, lambda y, x: y**2, momentum(rate), window=2)
        learner.run(learner.init(0.5, 0.0, 0.0), [0.1] * 4, block=2)
        del table, step, learner
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3


def test_a_learner_need_not_be_hashable():
    class Step:
        __hash__ = None

        def __call__(self, w, c, x):
            return w * c + x, w * c

        def __eq__(self, other):
            return self is other

    learner = jaxbptt.learner(Step(), lambda y, x: y**2, momentum(), window=2)
    state = learner.run(learner.init(0.5, 0.0, 0.0), [0.1] * 3, block=2)
    assert state.step == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"callback": 3}, r"callback must be a function callback\(state, metrics\), .* but got 3"),
        ({"callback": "save"}, "callback must be a function .* but got 'save'"),
        ({"callback": lambda state: 0}, r"callback must be callable as callback\(state, metrics\)"),
        ({"progress": 3}, "progress must be True, False or a description, but got 3"),
        ({"progress": None}, "progress must be True, False or a description, but got None"),
    ],
)
def test_options_of_a_run(options, said):
    learner = make()
    state = begun(learner)
    with pytest.raises(ValueError, match=said):
        learner.run(state, stream(), **options)
    assert not state.step.is_deleted()


def test_a_number_that_would_wrap_is_refused():
    """NumPy has room for it, and the device has not."""
    learner = jaxbptt.learner(lambda w, c, x: (c, w), lambda y, x: y * 0, OPTIMIZER, window=2)
    with jax.enable_x64(False) if hasattr(jax, "enable_x64") else jax.experimental.disable_x64():
        state = learner.init(np.float32(1), np.float32(0), 0)
        state = learner.run(state, [1, -(2**31)])
        with pytest.raises(ValueError, match=r"^after 2 steps, x must be a number that int32 can"):
            learner.run(state, [2**33])
        with pytest.raises(
            ValueError, match=r"^x must be a number that int32 can hold, but got 85"
        ):
            learner.update(state, np.int64(2**33))
        with pytest.raises(
            ValueError, match=r"^x must be a number that uint32 can hold, but got 1"
        ):
            learner.update(state, np.array([1, 2**40], np.uint64))


def test_functions_that_can_not_be_hashed():
    class Unhashable:
        __hash__ = None

        def __init__(self, function):
            self.function = function

        def __call__(self, params, carry, x):
            return self.function(params, carry, x)

    learner = make(Unhashable(step))
    plain = make()
    got, want = (each.run(begun(each), stream(), block=5) for each in (learner, plain))
    oracles.check("unhashable", oracles.moving(got.params), oracles.moving(want.params), 0.0)
