"""Faults: each is one sentence at trace time, and the tape survives a refused call."""

import dataclasses
import functools
import re
import traceback
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbptt

F32 = jnp.float32
FLOAT0 = jax.dtypes.float0
PARAMS = {"w": jnp.full((3, 3), 0.3, F32)}
CARRY = {"h": jnp.zeros(3, F32), "n": jnp.zeros((), jnp.int32)}
X = jnp.arange(3, dtype=F32)
ONE = jnp.ones(1, F32)  # a cotangent of the newest y alone


def step(params, carry, x):
    h = jnp.tanh(carry["h"] @ params["w"] + x)
    return {"h": h, "n": carry["n"] + 1}, h.sum()


def vector_step(params, carry, x):
    carry, _ = step(params, carry, x)
    return carry, carry["h"]


def silent_step(params, carry, x):
    return step(params, carry, x)[0], None


def elementwise_step(params, carry, x):
    h = jnp.sin(carry["h"] * params["w"][0] + x)
    return {"h": h, "n": carry["n"]}, h.sum()


rec = jaxbptt.record(step, window=4)


def recorded_tape(recorder=rec):
    return after_two_steps(recorder)


@functools.partial(jax.jit, static_argnums=0)
def after_two_steps(recorder):
    tape = recorder.init(PARAMS, CARRY, X)
    for _ in range(2):
        tape, _ = recorder(PARAMS, tape, X)
    return tape


class Fault(NamedTuple):
    """A call that is refused: its name, the error, a pattern of the message, the call."""

    name: str
    error: type[Exception]
    match: str
    call: Callable


def table(*rows):
    return pytest.mark.parametrize("fault", [pytest.param(Fault(*r), id=r[0]) for r in rows])


def is_a_sentence(message):
    """What can be checked by machine of the form in which a stranger is told a fault."""
    counts = re.search(r"(\d+) of (\d+) leaves", message)
    return (
        message.endswith((".", "?", ")"))
        and "Tracer" not in message
        and "jax._src" not in message
        and "\n\n" not in message
        and (counts is None or int(counts[1]) <= int(counts[2]))
    )


def snapshot(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


# ------------------------------------------------------------------ options

BAD_COUNTS = [0, -1, True, np.True_, 2.0, None, "3", np.array(3), jnp.array(3)]


@pytest.mark.parametrize("value", BAD_COUNTS, ids=repr)
@pytest.mark.parametrize("name", ["window", "every"])
def test_a_count_of_steps_is_a_positive_int(name, value):
    with pytest.raises(
        ValueError,
        match=rf"^{name} must be an int of at least 1.*but got {re.escape(repr(value))}\.$",
    ):
        jaxbptt.record(step, **({"window": 3} | {name: value}))


def test_a_numpy_int_is_an_int():
    assert jaxbptt.record(step, window=np.int64(3), every=np.int32(2)).window == 3


@pytest.mark.parametrize("name", ["window", "every"])
def test_a_count_of_steps_is_not_traced(name):
    def make(value):
        jaxbptt.record(step, **({"window": 3} | {name: value}))

    with pytest.raises(
        ValueError,
        match=rf"^{name} must be a Python int known when the loop is traced, but got.*static",
    ):
        jax.jit(make)(3)


@pytest.mark.parametrize("value", ["Stored", "", None, 0, ["stored"]], ids=repr)
def test_weights_is_one_of_its_names(value):
    with pytest.raises(
        ValueError,
        match=r"^weights must be 'stored', 'current' or 'replayed', but got "
        + re.escape(repr(value)),
    ):
        jaxbptt.record(step, window=3, weights=value)


def test_step_is_a_function():
    with pytest.raises(
        ValueError,
        match=r"^step must be a function step\(params, carry, x\) -> \(carry, y\), but got a dict",
    ):
        jaxbptt.record(PARAMS, window=3)


# ----------------------------------------------------- what a step returns

PAIR = r"^step must return a pair \(carry, y\), but it returned "
LEAF = r"^step must return a carry of the type it was given, but 1 of 2 leaves differs:\n  \* carry"
OTHER = (
    r"^step must return a carry of the type it was given, but the structure differs:\n  \* carry"
)
STEP_RETURNS = {
    "an array": (lambda p, c, x: c["h"], PAIR + r"an array float32\[3\]\. .*\(carry, "),
    "an array of length 2": (
        lambda p, c, x: jnp.stack([x, x]),
        PAIR + r"an array float32\[2,3\]\.",
    ),
    "nothing": (lambda p, c, x: None, PAIR + r"None\. .*\(carry, "),
    "a dict of two": (lambda p, c, x: {"carry": c, "y": x}, PAIR + r"a dict\. .*\(carry, "),
    "three things": (lambda p, c, x: (c, x, x), PAIR + r"a tuple of length 3\. .*\(carry, "),
    "another shape": (
        lambda p, c, x: (c | {"h": c["h"][:2]}, x),
        LEAF + r"\['h'\]: float32\[3\] in, float32\[2\] out\nReturn",
    ),
    "another dtype": (
        lambda p, c, x: (c | {"h": c["h"].astype(jnp.bfloat16)}, x),
        LEAF + r"\['h'\]: float32\[3\] in, bfloat16\[3\] out\nReturn.*astype",
    ),
    "a promoted integer": (
        lambda p, c, x: (c | {"n": c["n"].astype(F32) + 1.0}, x),
        LEAF + r"\['n'\]: int32\[\] in, float32\[\] out\nReturn",
    ),
    "a leaf less": (
        lambda p, c, x: ({"h": c["h"]}, x),
        OTHER + r"\['n'\]: int32\[\] in, nothing out\nReturn",
    ),
    "a leaf more": (
        lambda p, c, x: (c | {"z": x}, x),
        OTHER + r"\['z'\]: nothing in, float32\[3\] out\nReturn",
    ),
    "None for a leaf": (
        lambda p, c, x: (c | {"h": None}, x),
        OTHER + r"\['h'\]: float32\[3\] in, nothing out\nReturn",
    ),
    "another container": (
        lambda p, c, x: ((c["h"], c["n"]), x),
        OTHER + r"\['h'\]: float32\[3\] in, nothing out.*carry\[0\]: nothing in, float32\[3\] out",
    ),
    "y before the carry": (
        lambda p, c, x: (x, c),
        OTHER + r"\['h'\]: float32\[3\] in, nothing out.*carry: nothing in, float32\[3\] out",
    ),
    "a carry that is no array": (
        lambda p, c, x: (c | {"h": "no"}, x),
        r"carry\['h'\].*'no'",
    ),
    "a y that is no array": (lambda p, c, x: (c, {"loss": "low"}), r"\by\['loss'\].*'low'"),
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", STEP_RETURNS)
def test_what_a_step_returns(name, jit):
    bad_step, match = STEP_RETURNS[name]
    init = jaxbptt.record(bad_step, window=4).init
    with pytest.raises(
        TypeError,
        match=f"(?s){match}",
    ) as caught:
        (jax.jit(init) if jit else init)(PARAMS, CARRY, X)
    assert is_a_sentence(str(caught.value))


@pytest.mark.parametrize(
    ("value", "came"),
    [(None, "None"), (3.0, "3.0"), ((1.0, 2.0, 3.0), "a tuple of length 3"), (X, "an array")],
    ids=["None", "number", "triple", "array"],
)
def test_has_aux_wants_a_pair(value, came):
    bad = jaxbptt.record(lambda p, c, x: (c, value), window=4, has_aux=True)
    with pytest.raises(
        TypeError,
        match=rf"^step must return y as a pair \(y, aux\).*has_aux=True.*, but it returned {came}",
    ):
        bad.init(PARAMS, CARRY, X)


@pytest.mark.parametrize("name", ["another shape", "another dtype", "an array"])
def test_a_step_that_goes_wrong_later_leaves_the_tape_alone(name):
    bad_step, match = STEP_RETURNS[name]
    tape = recorded_tape()
    before = snapshot(tape)
    with pytest.raises(
        TypeError,
        match=f"(?s){match}",
    ):
        jaxbptt.record(bad_step, window=4)(PARAMS, tape, X)
    assert snapshot(tape) == before


def test_weak_types_are_no_fault():
    def weak(params, carry, x):
        return jnp.where(x > 0, 1.0, 2.0), 0.0  # both weakly typed

    recorder = jaxbptt.record(weak, window=2)
    tape, y = recorder(None, recorder.init(None, 0.0, 0.0), 1.0)
    assert not jax.typeof(tape.carry).weak_type
    assert not jax.typeof(y).weak_type


# ---------------------------------------------------------------- the call

OTHER_PARAMS = r"params must be of the type that the tape was made for.*\['w'\].*float32\[3,3\]"
OTHER_X = r"^x must be of the type that the tape was made for.*float32\[3\].*"
NO_TAPE = r"^tape must be the Tape that init or the last call returned, but got "
MADE_BY = r"^tape must be from a recorder with "


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@table(
    ("params' shape", ValueError, OTHER_PARAMS + r".*float32\[4,3\].*init",
     lambda p, tape, x: rec({"w": jnp.ones((4, 3), F32)}, tape, x)),
    ("params' dtype", ValueError, OTHER_PARAMS + r".*float16\[3,3\].*init",
     lambda p, tape, x: rec({"w": p["w"].astype(jnp.float16)}, tape, x)),
    ("params' structure", ValueError, r"^params must.*\['b'\].*nothing.*float32\[3\].*init",
     lambda p, tape, x: rec(p | {"b": x}, tape, x)),
    ("no params", ValueError, OTHER_PARAMS + ".*nothing",
     lambda p, tape, x: rec(None, tape, x)),
    ("params no array", ValueError, r"^params\['w'\] must be an array or a number.*'three'",
     lambda p, tape, x: rec({"w": "three"}, tape, x)),
    ("x's shape", ValueError, OTHER_X + r"float32\[2\].*init",
     lambda p, tape, x: rec(p, tape, x[:2])),
    ("x's dtype", ValueError, OTHER_X + r"int32\[3\].*init",
     lambda p, tape, x: rec(p, tape, x.astype(jnp.int32))),
    ("x's structure", ValueError, r"^x must.*\['a'\].*nothing.*float32\[3\].*init",
     lambda p, tape, x: rec(p, tape, {"a": x})),
    ("no x", ValueError, OTHER_X + r"nothing",
     lambda p, tape, x: rec(p, tape, None)),
    ("carry's shape", ValueError, r"carry must be of the type.*\['h'\].*\[3\].*\[4\]",
     lambda p, tape, x: tape.replace(carry={"h": jnp.zeros(4, F32), "n": tape.carry["n"]})),
    ("carry's dtype", ValueError, r"carry must be of the type.*\['n'\].*int32\[\].*int64\[\]",
     lambda p, tape, x: tape.replace(carry={"h": x, "n": 0})),
    ("carry's structure", ValueError, r"carry must be of the type.*\['h'\].*nothing",
     lambda p, tape, x: tape.replace(carry=x)),
    ("another window", ValueError, MADE_BY + r"window=5, but was made by one with window=4.*init",
     lambda p, tape, x: jaxbptt.record(step, window=5)(p, tape, x)),
    ("another every", ValueError, MADE_BY + r"every=2, but was made by one with every=1.*init",
     lambda p, tape, x: jaxbptt.record(step, window=4, every=2)(p, tape, x)),
    ("other weights", ValueError, MADE_BY + r"weights='current', but .* weights='stored'.*init",
     lambda p, tape, x: jaxbptt.record(step, window=4, weights="current")(p, tape, x)),
    ("another step", ValueError, r"^tape .*recorded by another step.*float32\[3,3\].*init",
     lambda p, tape, x: jaxbptt.record(elementwise_step, window=4)(p, tape, x)),
    ("a carry for the tape", ValueError, NO_TAPE + r"a dict.*rec\.init\(params, carry, x\)",
     lambda p, tape, x: rec(p, tape.carry, x)),
    ("an array for the tape", ValueError, NO_TAPE + r"an array float32\[3\].*rec\.init",
     lambda p, tape, x: rec(p, tape.carry["h"], x)),
    ("a carry to due", ValueError, NO_TAPE + "a dict",
     lambda p, tape, x: rec.due(tape.carry)),
    ("a carry to clear", ValueError, NO_TAPE + "a dict",
     lambda p, tape, x: rec.clear(tape.carry)),
    ("a tape for the carry", ValueError, r"^carry must be what .*, but got a Tape.*tape\.carry",
     lambda p, tape, x: rec.init(p, tape, x)),
    ("a tape to replace", ValueError, r"^carry must be what .*, but got a Tape.*tape\.carry",
     lambda p, tape, x: tape.replace(carry=tape)),
    ("a tape for x", ValueError, r"^x must be what the step takes as x, but got a Tape.*order",
     lambda p, tape, x: rec(p, tape, tape)),
    ("a tape for init's params", ValueError, r"^params must be what .* but got a Tape",
     lambda p, tape, x: rec.init(tape, tape.carry, x)),
    ("a tape for init's x", ValueError, r"^x must be what the step takes as x, but got a Tape",
     lambda p, tape, x: rec.init(p, tape.carry, tape)),
    ("a type for params", ValueError, r"^params\['w'\] must be an array.*ShapeDtypeStruct",
     lambda p, tape, x: rec({"w": jax.ShapeDtypeStruct((3, 3), F32)}, tape, x)),
    ("a type for x", ValueError, r"^x must be an array.*ShapeDtypeStruct float32\[3\]",
     lambda p, tape, x: rec(p, tape, jax.ShapeDtypeStruct((3,), F32))),
    ("a type for the carry", ValueError, r"^carry\['h'\] must be an array.*ShapeDtypeStruct",
     lambda p, tape, x: rec.init(p, jax.eval_shape(lambda: CARRY), x)),
    ("a tape for params", ValueError, r"^params must be what .*, but got a Tape.*order",
     lambda p, tape, x: rec(tape, tape, x)),
)  # fmt: skip
def test_a_call_that_does_not_fit_the_tape(fault, jit):
    tape = recorded_tape()
    before = snapshot(tape)
    with pytest.raises(
        fault.error,
        match=f"(?s){fault.match}",
    ) as caught:
        (jax.jit(fault.call) if jit else fault.call)(PARAMS, tape, X)
    assert is_a_sentence(str(caught.value))
    assert snapshot(tape) == before


def test_a_refused_call_keeps_the_donated_tape():
    tape = recorded_tape()
    before = snapshot(tape)
    with pytest.raises(
        ValueError,
        match=r"^x must be of the type",
    ):
        jax.jit(rec, donate_argnums=1)(PARAMS, tape, X[:2])
    assert snapshot(tape) == before
    assert rec(PARAMS, tape, X)[0].length == 3


def test_a_tape_of_another_recorder_of_the_same_step_is_welcome():
    tape, _ = jaxbptt.record(step, window=4)(PARAMS, recorded_tape(), X)
    assert tape.length == 3


def test_a_batch_of_tapes_is_not_a_tape():
    tapes = jax.vmap(lambda h: rec.init(PARAMS, CARRY | {"h": h}, X))(jnp.zeros((2, 3), F32))
    with pytest.raises(
        ValueError,
        match=r"(?s)carry must be of the type.*\['h'\].*float32\[3\].*float32\[2,3\]",
    ):
        rec(PARAMS, tapes, X)


MADE_WITH = r"(?s)^tape must have leaves of the types that it was made with, but "


def means(*tapes):
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *tapes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: means(t, t), "2 of 5.*tape.length: int32.. expected, float32"),
        (lambda t: jax.tree.map(lambda v: v.astype(jnp.float16), t), "2 of 5.*length"),
        (
            lambda t: jax.tree.map(lambda v: None, t),
            "5 of 5.*tape.length: int32.. expected, no arr",
        ),
        (
            lambda t: jax.tree.map(lambda v: v[None], t),
            "5 of 5.*_head: int32.. expected, int32.1. g",
        ),
        (
            lambda t: jax.tree.map(lambda v: v.astype(F32) if v.dtype != jnp.int32 else v, t),
            None,
        ),
        (
            lambda t: jax.tree.map(lambda v: v.astype(jnp.float16) if v.ndim > 1 else v, t),
            r"3 of 3.*_ring.0., a slot of it: float32.3,3. expected, float16",
        ),
        (lambda t: jax.tree.map(lambda v: v[:2] if v.ndim > 1 else v, t), "3 of 5.*_ring.0."),
    ],
)
def test_a_tape_that_was_computed_with_is_refused(change, said):
    tape = recorded_tape()
    changed = change(tape)
    changed = dataclasses.replace(changed, carry=tape.carry)
    if said is None:
        rec(PARAMS, changed, X)
        return
    for call in (
        lambda: rec(PARAMS, changed, X),
        lambda: rec.pullback(PARAMS, changed, ONE),
        lambda: jaxbptt.gradient_by_lag(rec, PARAMS, changed, ONE),
        lambda: jax.jit(rec)(PARAMS, changed, X),
    ):
        with pytest.raises(ValueError, match=MADE_WITH + said) as caught:
            call()
        assert is_a_sentence(str(caught.value))


# ------------------------------------------------------------------ numbers


def test_a_window_that_no_counter_can_count():
    for window, path in ((2**31, ""), ({"h": 3, "n": 2**40}, r"\['n'\]")):
        said = rf"^window{path} must be at most 2147483647 \(a tape counts its steps in int32\)"
        with pytest.raises(ValueError, match=said):
            jaxbptt.record(step, window=window)
    scanned = jaxbptt.scan(lambda c, x: (c + x, c), 0.0, jnp.ones(3), window=2**31)
    assert float(scanned[0]) == 3


def test_the_longest_window_does_not_overflow():
    recorder = jaxbptt.record(lambda p, c, x: (c + x, None), window=2**31 - 1)
    tape = recorder.init(None, 1.0, 1.0)
    full = jnp.int32(2**31 - 1)
    tape = dataclasses.replace(tape, length=full, _head=full - 1)
    assert recorder(None, tape, 1.0)[0].length == full


@pytest.mark.parametrize(
    ("name", "call"),
    [
        (r"x\['n'\]", lambda big: rec.init(PARAMS, CARRY, {"n": big})),
        (r"params\['w'\]", lambda big: rec.init({"w": big}, CARRY, X)),
        (r"carry\['n'\]", lambda big: rec.init(PARAMS, CARRY | {"n": big}, X)),
        ("x", lambda big: rec(PARAMS, recorded_tape(), big)),
    ],
)
def test_a_number_that_no_integer_holds(name, call):
    for big in (2**65, -(2**65)):
        said = rf"^{name} must be a number that int64 can hold, but got {big}\. Pass a float"
        with pytest.raises(ValueError, match=said):
            call(big)
    with pytest.raises(TypeError, match="step must return a number that int64 can hold, but y is"):
        jaxbptt.record(lambda p, c, x: (c, 2**65), window=2).init(PARAMS, CARRY, X)


@pytest.mark.parametrize(
    ("dtype", "cast"),
    [
        (jnp.bfloat16, r"e\.g\. with h\.astype\(jnp\.bfloat16\)\.(\n|$)"),
        (jnp.int32, r"e\.g\. with h\.astype\(jnp\.int32\)\.(\n|$)"),
        (jnp.complex64, r"e\.g\. with h\.astype\(jnp\.complex64\)\.(\n|$)"),
        (bool, r"e\.g\. with h\.astype\(jnp\.bool\)\.(\n|$)"),
        (jnp.float64, r"that it came in\.(\n|$)"),  # of another shape alone
    ],
)
def test_the_remedy_is_the_dtype_that_came_in(dtype, cast):
    def returns_another(params, carry, x):
        return jnp.zeros(3, jnp.float64), None

    start = jnp.zeros(2 if dtype == jnp.float64 else 3, dtype)
    with pytest.raises(TypeError, match=cast):
        jaxbptt.record(returns_another, window=2).init(None, start, None)


def test_a_complex_number_is_cast_by_its_real_part():
    recorder = jaxbptt.record(lambda p, c, x: (jax.lax.complex(c, c), None), window=2)
    with pytest.raises(TypeError, match=r"e\.g\. with h\.real\.astype\(jnp\.float64\)"):
        recorder.init(None, jnp.zeros(2, jnp.float64), None)


# --------------------------------------------------------------- cotangents


def test_none_will_do_for_what_has_no_gradient():
    """In y and in the carry, where float0 is still taken; for a float it is not."""

    def with_others(params, carry, x):
        carry, y = step(params, carry, X)
        return carry, {"a": y, "n": carry["n"], "none": None, "key": x["key"]}

    recorder, x = jaxbptt.record(with_others, window=3), {"key": jax.random.key(0)}
    tape = recorder.init(PARAMS, CARRY, x)
    for _ in range(2):
        tape, _ = recorder(PARAMS, tape, x)
    ct_ys = {"a": jnp.ones(2, F32), "n": None, "none": None, "key": None}
    by_hand = ct_ys | {"n": np.zeros(2, FLOAT0), "key": np.zeros(2, FLOAT0)}
    ct_carry = {"h": X, "n": None}
    want = recorder.pullback(PARAMS, tape, by_hand, {"h": X, "n": ZERO_N})
    got = recorder.pullback(PARAMS, tape, ct_ys, ct_carry)
    assert snapshot(got) == snapshot(want)
    lags = [
        jaxbptt.gradient_by_lag(recorder, PARAMS, tape, *cts)
        for cts in ((by_hand, {"h": X, "n": ZERO_N}), (ct_ys, ct_carry))
    ]
    assert snapshot(lags[0]) == snapshot(lags[1])
    with pytest.raises(ValueError, match=r"ct_ys\['a'\]: .*nothing got"):
        recorder.pullback(PARAMS, tape, ct_ys | {"a": None, "n": np.zeros(1, FLOAT0)})
    with pytest.raises(ValueError, match=r"(?s)ct_carry\['h'\]: .*nothing got"):
        recorder.pullback(PARAMS, tape, ct_ys, {"h": None, "n": None})


CT_YS = r"^ct_ys must have the structure, shapes and dtypes of y.*"
CT_CARRY = r"^ct_carry must have the structure, shapes and dtypes of the carry.*"
ROWS = r"^ct_ys must have a first axis over 1 to window=4 steps, oldest first, but got "
ZERO_N = np.zeros((), FLOAT0)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@table(
    ("too many", ValueError, ROWS + r"length 5\b.*longer window",
     lambda p, tape, x: rec.pullback(p, tape, jnp.ones(5, F32))),
    ("none", ValueError, ROWS,
     lambda p, tape, x: rec.pullback(p, tape, jnp.ones(0, F32))),
    ("no axis over steps", ValueError, ROWS + r".*ct\[None\]",
     lambda p, tape, x: rec.pullback(p, tape, jnp.ones((), F32))),
    ("a number", ValueError, ROWS + r".*ct\[None\]",
     lambda p, tape, x: rec.pullback(p, tape, 1.0)),
    ("a row more in one leaf", ValueError, r"same first axis.*ct_ys\[0\]: 1.*ct_ys\[1\]: 2",
     lambda p, tape, x: rec.pullback(p, tape, (jnp.ones(1, F32), jnp.ones(2, F32)))),
    ("dtype", ValueError, CT_YS + r"float32\[1\].*float16\[1\]",
     lambda p, tape, x: rec.pullback(p, tape, ONE.astype(jnp.float16))),
    ("shape", ValueError, CT_YS + r"float32\[1\].*float32\[1,3\]",
     lambda p, tape, x: rec.pullback(p, tape, x[None])),
    ("structure", ValueError, CT_YS + r"\['a'\].*nothing.*float32\[1\]|" + CT_YS + r"\['a'\]",
     lambda p, tape, x: rec.pullback(p, tape, {"a": ONE})),
    ("None", ValueError, CT_YS + r"float32\[1\].*nothing",
     lambda p, tape, x: rec.pullback(p, tape, None)),
    ("no array", ValueError, r"^ct_ys must be an array or a number.*'one'",
     lambda p, tape, x: rec.pullback(p, tape, "one")),
    ("carry's dtype", ValueError, CT_CARRY + r"\['h'\].*float32\[3\].*float16\[3\]",
     lambda p, tape, x: rec.pullback(p, tape, ONE, {"h": x.astype(jnp.float16), "n": ZERO_N})),
    ("carry's shape", ValueError, CT_CARRY + r"\['h'\].*float32\[3\].*float32\[1,3\]",
     lambda p, tape, x: rec.pullback(p, tape, ONE, {"h": x[None], "n": ZERO_N})),
    ("carry's structure", ValueError, CT_CARRY + r"\['n'\].*float0\[\].*nothing",
     lambda p, tape, x: rec.pullback(p, tape, ONE, {"h": x})),
    ("carry's integer", ValueError, CT_CARRY + r"float0\[\].*int32\[\].*numpy\.zeros",
     lambda p, tape, x: rec.pullback(p, tape, ONE, tape.carry)),
    ("params", ValueError, OTHER_PARAMS + r".*float32\[4,3\]",
     lambda p, tape, x: rec.pullback({"w": jnp.ones((4, 3), F32)}, tape, ONE)),
    ("a carry for the tape", ValueError, NO_TAPE + "a dict",
     lambda p, tape, x: rec.pullback(p, tape.carry, ONE)),
    ("another window", ValueError, MADE_BY + "window=5, but was made by one with window=4",
     lambda p, tape, x: jaxbptt.record(step, window=5).pullback(p, tape, ONE)),
    ("another step", ValueError, r"^tape .*recorded by another step",
     lambda p, tape, x: jaxbptt.record(elementwise_step, window=4).pullback(p, tape, ONE)),
)  # fmt: skip
def test_cotangents_that_do_not_fit(fault, jit):
    tape = recorded_tape()
    before = snapshot(tape)
    with pytest.raises(
        fault.error,
        match=f"(?s){fault.match}",
    ) as caught:
        (jax.jit(fault.call) if jit else fault.call)(PARAMS, tape, X)
    assert is_a_sentence(str(caught.value))
    assert snapshot(tape) == before


def test_as_many_cotangents_as_the_window_holds_are_fine():
    ct = rec.pullback(PARAMS, recorded_tape(), jnp.ones(4, F32))
    assert ct.xs.shape == (4, 3)


# ------------------------------------------------------------ groups of steps


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("bad_step", "came"),
    [
        (vector_step, r"float32\[3\]"),
        (silent_step, "nothing"),
        (lambda p, c, x: (step(p, c, x)[0], jnp.int32(3)), r"int32\[\]"),
        (lambda p, c, x: (step(p, c, x)[0], (c["h"][0], c["h"][1])), r"float32\[\], float32\[\]"),
    ],
    ids=["a vector", "None", "an integer", "two scalars"],
)
def test_a_group_of_steps_wants_a_scalar_loss(bad_step, came, jit):
    recorder = jaxbptt.record(bad_step, window=4, every=2)
    tape = recorded_tape(recorder)
    before = snapshot(tape)

    def loss(params):
        new_tape, y = recorder(params, tape, X)
        return new_tape.carry["h"].sum() + sum(jnp.sum(v).astype(F32) for v in jax.tree.leaves(y))

    grad = jax.grad(loss)
    with pytest.raises(
        TypeError,
        match=rf"^step must return its scalar loss as y.*every=2, but y is {came}\. Return",
    ):
        (jax.jit(grad) if jit else grad)(PARAMS)
    assert snapshot(tape) == before


def test_a_group_of_steps_is_only_refused_under_reverse_mode():
    recorder = jaxbptt.record(vector_step, window=4, every=2)
    assert recorder.pullback(PARAMS, recorded_tape(recorder), X[None]).params["w"].shape == (3, 3)


# ----------------------------------------------------- the user's own mistakes


class FuelError(Exception):
    """An error that only a user's step raises."""


def out_of_fuel(params, carry, x):
    raise FuelError("the tank is empty")


def does_not_multiply(params, carry, x):
    return carry, params["w"] @ jnp.ones(4, F32)


def through_init(step):
    return lambda p, tape, x: jaxbptt.record(step, window=4).init(p, tape.carry, x)


def through_call(step):
    return lambda p, tape, x: jaxbptt.record(step, window=4)(p, tape, x)


def through_grad(step):
    def loss(p, tape, x):
        return jaxbptt.record(step, window=4)(p, tape, x)[1]

    return jax.grad(loss)


def through_scan(step):
    def run(p, tape, x):
        return jax.lax.scan(lambda t, x: through_call(step)(p, t, x), tape, x[None])

    return jax.jit(run)


def through_pullback(step):
    return lambda p, tape, x: jaxbptt.record(step, window=4).pullback(p, tape, ONE)


THROUGH = [through_init, through_call, through_grad, through_scan, through_pullback]


@pytest.mark.parametrize("through", THROUGH, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("bad_step", "error", "match"),
    [
        (out_of_fuel, FuelError, r"^the tank is empty"),
        (does_not_multiply, TypeError, r"dot_general|matmul"),
    ],
    ids=["raises", "shapes"],
)
def test_a_steps_own_error_comes_through(bad_step, error, match, through):
    tape = recorded_tape()
    before = snapshot(tape)
    with pytest.raises(
        error,
        match=match,
    ) as caught:
        through(bad_step)(PARAMS, tape, X)
    assert type(caught.value) is error
    frames = traceback.extract_tb(caught.tb)
    users = [i for i, frame in enumerate(frames) if frame.name == bad_step.__name__]
    assert len(users) == 1
    if error is FuelError:
        assert str(caught.value) == "the tank is empty"
        assert users[0] == len(frames) - 1  # nothing is wrapped around it or re-raised below
    assert snapshot(tape) == before


def test_a_step_of_another_arity_is_told_by_python():
    with pytest.raises(
        TypeError,
        match=r"takes 2 positional arguments but 3 were given",
    ):
        jaxbptt.record(lambda params, carry: (carry, None), window=2).init(PARAMS, CARRY, X)


# ------------------------------------------------------------ arguments of another kind

SCALAR = jaxbptt.record(lambda w, c, x: (w * c + x, w * c + x), window=2)


def halved(w, c, x):
    c = w * c.astype(float) + x
    return c, c


def reach_of(key):
    tape, _ = SCALAR(0.5, SCALAR.init(0.5, 0.0, 0.0), 1.0)
    return SCALAR.pullback(0.5, tape, jnp.ones(1), reach=jaxbptt.random_reach(key, 3))


def advanced_by(loss):
    rec = jaxbptt.record(SCALAR.step, window=2, pace=1)
    return rec.advance(0.5, rec.init(0.5, 0.0, 0.0), 0.0, loss)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: reach_of(None), ValueError, "^key must be a key for jax.random, but got None"),
        (lambda: reach_of(0), ValueError, "^key must be a key for jax.random, but got 0"),
        (
            lambda: reach_of(jax.random.split(jax.random.key(0))),
            ValueError,
            "^reach must be drawn from one key for a run, but its key is an array",
        ),
        (lambda: advanced_by(None), ValueError, "^loss must be a function of y .* got None"),
        (
            lambda: jaxbptt.record(step, window=2, weights=np.ones(2)),
            ValueError,
            "^weights must be 'stored', 'current' or 'replayed'",
        ),
        (
            lambda: jaxbptt.record(step, window=2, has_aux=np.ones(2)),
            ValueError,
            r"^has_aux must be True or False, but got an array float64\[2\]",
        ),
        (
            lambda: jaxbptt.record(halved, window=2).init(0.5, 0, 0.0),
            TypeError,
            r"(?s)\[\] in, float64\[\] out.*begin with a carry of dtype float64, such as 0.0",
        ),
    ],
)
def test_an_argument_of_another_kind(call, error, said):
    if not jax.config.jax_enable_x64:
        said = said.replace("float64", "float32")
    with pytest.raises(error, match=said):
        call()


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="this JAX has no references")
def test_a_reference_where_an_array_belongs():
    ref, zero = jax.new_ref(jnp.zeros(2)), jnp.zeros(2)
    with pytest.raises(ValueError, match=r"^carry must be an array .* a mutable reference"):
        jaxbptt.record(lambda w, c, x: (c, x), window=2).init(0.5, ref, zero)
    with pytest.raises(ValueError, match=r"^params\['w'\] must be an array .* a mutable reference"):
        jaxbptt.record(lambda w, c, x: (c, x), window=2).init({"w": ref}, zero, zero)
    with pytest.raises(TypeError, match=r"y is a mutable reference .* Return its value"):
        jaxbptt.record(lambda w, c, x: (c, jax.new_ref(c)), window=2).init(0.5, zero, zero)
    with pytest.raises(ValueError, match=r"^init and xs must be arrays where a window cuts"):
        jaxbptt.scan(lambda c, x: (c + 1, x[...]), zero, jax.new_ref(jnp.ones((3, 2))), window=2)
