"""A tape through `flax.serialization`, to the last bit; and what it must not be restored into."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import zoo
from harness import F64, run_python
from training_loops import momentum, scanned, wave

import jaxbptt

serialization = pytest.importorskip("flax.serialization")


def recorded(case, **options):
    recorder = jaxbptt.record(case.step, **{"window": 3} | options)
    tape = recorder.init(case.params, case.carry, case.x())
    for _ in range(4):
        tape, _ = jax.jit(recorder)(case.params, tape, case.x())
    return recorder, tape


def bits(tree):
    def one(v):
        is_key = jnp.issubdtype(v.dtype, jax.dtypes.prng_key)
        return v.dtype, v.shape, np.asarray(jax.random.key_data(v) if is_key else v).tobytes()

    return list(map(one, jax.tree.leaves(tree)))


def through_bytes(state, like):
    data = serialization.msgpack_serialize(serialization.to_state_dict(state))
    return serialization.from_state_dict(like, serialization.msgpack_restore(data))


@pytest.mark.parametrize("weights", ["current", "replayed"])
@pytest.mark.parametrize("name", ["tanh_rnn", "typed_key", "none_leaves", "integer_leaves"])
def test_a_tape_comes_back_to_the_last_bit(name, weights):
    case = zoo.ZOO[name](F64)
    recorder, tape = recorded(case, weights=weights, every=2)
    got = through_bytes(tape, recorder.init(case.params, case.carry, case.x()))
    assert bits(got) == bits(tape)
    assert jax.tree.structure(got) == jax.tree.structure(tape)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(got))


def test_half_precision_comes_back():
    case = zoo.ZOO["tanh_rnn"](jnp.bfloat16)
    recorder, tape = recorded(case)
    got = through_bytes(tape, recorder.init(case.params, case.carry, case.x()))
    assert bits(got) == bits(tape)


def test_training_goes_on_as_if_it_had_not_stopped():
    case = zoo.ZOO["tanh_rnn"](F64)
    learner = jaxbptt.learner(case.step, wave, momentum(), window=3, every=2)
    start = learner.init(case.params, case.carry, case.x())
    state, _ = scanned(learner)(start, case.xs(5))
    back = serialization.from_bytes(start, serialization.to_bytes(state))
    got, want = (scanned(learner)(each, case.xs(4))[0] for each in (back, state))
    oracles.check("through bytes", oracles.moving(got), oracles.moving(want), 0.0)


def test_a_tape_of_another_step_is_refused():
    case = zoo.ZOO["tanh_rnn"](F64)
    _, tape = recorded(case)
    other = jaxbptt.record(lambda p, c, x: (2 * case.step(p, c, x)[0], c), window=3)
    like = other.init(case.params, case.carry, case.x())
    with pytest.raises(ValueError, match="the target must be a tape of the same step, under the"):
        through_bytes(tape, like)


def test_other_types_and_missing_parts_are_refused():
    case = zoo.ZOO["tanh_rnn"](F64)
    recorder, tape = recorded(case)
    longer = jaxbptt.record(case.step, window=5).init(case.params, case.carry, case.x())
    with pytest.raises(
        ValueError, match=r"but of ring\[0\] float64.* was saved and the target has"
    ):
        through_bytes(tape, longer)
    state = serialization.to_state_dict(tape)
    del state["head"]
    with pytest.raises(ValueError, match="to_state_dict made of one, but 'head' is missing"):
        serialization.from_state_dict(recorder.init(case.params, case.carry, case.x()), state)


ORDERS = {
    "flax first": "import flax.serialization as s; import jaxbptt",
    "flax later": "import jaxbptt; import flax.serialization as s",
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_imports_does_not_matter_and_flax_is_not_imported(order, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, jaxbptt\n" * (order == "flax later")
        + "assert 'flax' not in sys.modules\n" * (order == "flax later")
        + ORDERS[order]
        + "\nrec = jaxbptt.record(lambda w, c, x: (w * c + x, c), window=2)\n"
        "state = s.to_state_dict(rec.init(0.5, 0.0, 0.0))\n"
        "assert sorted(state) == ['carry', 'head', 'length', 'ring', 'step']\n"
    )
    done = run_python(program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
