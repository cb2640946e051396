"""`check_step`: a good step gives no finding, and each planted fault is found and named."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from harness import grid
from jax import lax
from oracles import moving

from jaxbptt import Recorder, check_step

XS = jnp.asarray([0.3, -0.7, 0.5, 0.9, -0.2])
PARAMS = {"u": jnp.asarray(0.8), "w": jnp.asarray([0.6, -0.4])}
CARRY = {"h": jnp.asarray([0.1, 0.2])}


def rnn(params, carry, x, *, through=lambda v: v, on_carry=lambda v: v):
    """tanh(w h + u x), with a function on u x and one on h."""
    h = jnp.tanh(params["w"] * on_carry(carry["h"]) + through(params["u"] * x))
    return {"h": h}, jnp.sum(h**2)


def places(report, kind):
    return {(f.path, f.lag) for f in report.findings if f.kind == kind}


def only(report):
    (finding,) = report.findings
    assert not report.ok
    assert finding.sentence in str(report)
    return finding


def without_x64():
    """The setting that users have."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(False)
    return getattr(jax.experimental, "enable_x64")(False)  # noqa: B009  its place before JAX 0.8


# ------------------------------------------------------------------ good steps


@pytest.mark.parametrize("name", grid(["tanh_rnn", "lstm", "no_params"], always=["no_params"]))
def test_a_good_step_gives_no_finding(name):
    case = zoo.ZOO[name](jnp.float32)
    report = check_step(case.step, case.params, case.carry, case.xs(3), window=2)
    assert report.ok, str(report)
    assert report.findings == []
    leaves = moving((case.params, case.carry, case.x()))
    assert report.compared == 3 * 2 * len(leaves)  # directions, lags
    assert (report.disregarded, report.precision) == (0, "float64")
    assert str(report).startswith("check_step: ok\n")


def test_integer_key_complex_and_missing_leaves_give_no_finding():
    def step(params, carry, x):
        key, draw = jax.random.split(carry["key"])
        noise = jax.random.uniform(draw, (), jnp.float64)
        z = params["z"] * carry["z"] + lax.complex(x * noise, jnp.cos(carry["z"].real))
        carry = {"key": key, "n": carry["n"] + params["n"], "none": None, "z": z}
        return carry, None

    params = {"n": jnp.asarray(2), "z": jnp.asarray([0.3 + 0.4j, -0.5j])}
    carry = {"key": jax.random.key(0), "n": jnp.asarray(0), "none": None, "z": params["z"]}
    xs = jnp.stack([XS, -XS], 1)
    report = check_step(step, params, carry, xs, window=2)
    assert report.ok, str(report)
    assert report.compared == 3 * 2 * 3  # z of params and of carry, x


@pytest.mark.exhaustive
def test_an_lstm_with_a_bfloat16_carry_gives_no_finding():
    case = zoo.ZOO["lstm"](jnp.float32)
    narrow, wide = jnp.bfloat16, jnp.float32

    def step(params, carry, x):
        carry, y = case.step(params, jax.tree.map(lambda v: v.astype(wide), carry), x)
        return jax.tree.map(lambda v: v.astype(narrow), carry), y

    carry = jax.tree.map(lambda v: v.astype(narrow), case.carry)
    report = check_step(step, case.params, carry, case.xs(3), window=2)
    assert report.ok, str(report)
    assert report.precision == "bfloat16"


def test_a_cast_to_bfloat16_in_between_is_allowed_for():
    def narrow(v):
        return v.astype(jnp.bfloat16).astype(v.dtype)

    report = check_step(lambda *a: rnn(*a, on_carry=narrow), PARAMS, CARRY, XS, window=2)
    assert report.ok, str(report)
    assert report.precision == "bfloat16"


@pytest.mark.parametrize("weights", grid(["stored", "current"], always=["current"]))
def test_aux_and_windows_longer_than_the_run(weights):
    def step(params, carry, x):
        carry, y = rnn(params, carry, x)
        return carry, (y, {"count": jnp.asarray(3)})

    report = check_step(step, PARAMS, CARRY, XS[:2], window=4, weights=weights, has_aux=True)
    assert report.ok, str(report)
    assert report.compared == 3 * 2 * 4


def test_a_kink_is_disregarded_and_counted():
    def step(params, h, x):
        h = jax.nn.relu(params * x) + jnp.where(h > 0, 0.5 * h, 0.2 * h)
        return h, h

    params = jnp.asarray([0.7, 0.0, -0.3])  # relu(0): any slope from 0 to 1 is right
    report = check_step(step, params, jnp.ones(3), XS, window=2)
    assert report.ok, str(report)
    assert report.disregarded == 3 * 2  # of params, at both lags; 0 · x is flat
    assert "6 disregarded: a kink" in str(report)
    away = check_step(step, params + 0.1, jnp.ones(3), XS, window=2)
    assert (away.ok, away.disregarded) == (True, 0)


def test_without_leaves_in_xs_the_window_is_run():
    report = check_step(lambda w, c, x: (w * c, c), 0.5, 1.0, None, window=3)
    assert report.ok
    assert report.compared == 3 * 3 * 2


# ------------------------------------------------------------ wrong derivatives


@jax.custom_vjp
def doubled(v):
    return jnp.sin(v)


doubled.defvjp(lambda v: (jnp.sin(v), v), lambda v, ct: (2 * ct * jnp.cos(v),))


@pytest.mark.parametrize("dtype", grid([jnp.float64, jnp.float32], always=[jnp.float64]))
def test_a_wrong_custom_vjp_is_named_with_leaf_lag_and_both_numbers(dtype):
    args = jax.tree.map(lambda v: v.astype(dtype), (PARAMS, CARRY, XS))
    report = check_step(lambda *a: rnn(*a, through=doubled), *args, window=3)
    wrong = {(path, lag) for path in ("params['u']", "x") for lag in range(3)}
    assert places(report, "gradient") == wrong
    assert len(report.findings) == len(wrong)
    for f in report.findings:
        assert f.got == pytest.approx(2 * f.expected, rel=1e-3)
        assert f"The gradient of {f.path} at lag {f.lag} is wrong" in f.sentence
        assert "Check step's custom derivative rules (a surrogate differs on purpose)" in f.sentence
        assert f"{f.expected:.6g}" in f.sentence
        assert f"{f.got:.6g}" in f.sentence


def test_the_expected_number_is_the_true_derivative():
    w, x = 0.8, jnp.asarray([0.5])
    report = check_step(lambda w, c, x: (None, doubled(w * x)), w, None, x, window=1)
    at_w, at_x = report.findings
    assert abs(at_w.expected / at_x.expected) == pytest.approx(0.5 / 0.8, rel=1e-8)
    ct = np.random.default_rng(0).normal()
    assert abs(at_w.expected) == pytest.approx(abs(ct) * 0.5 * np.cos(0.4), rel=1e-8)


def test_a_rule_that_is_wrong_at_one_step_only_is_found_at_that_lag_only():
    @jax.custom_vjp
    def f(v, bad):
        return jnp.sin(v)

    f.defvjp(
        lambda v, bad: (jnp.sin(v), (v, bad)),
        lambda kept, ct: (ct * jnp.cos(kept[0]) * jnp.where(kept[1], 1 + 1e-6, 1.0), None),
    )

    def step(params, carry, x):
        return rnn(params, carry, x["v"], through=lambda v: f(v, x["bad"]))

    xs = {"v": XS, "bad": jnp.asarray([False, True, False, True, False])}
    report = check_step(step, PARAMS, CARRY, xs, window=3)
    assert places(report, "gradient") == {("params['u']", 1), ("x['v']", 1)}
    assert check_step(step, PARAMS, CARRY, xs, window=3, tolerance=1e-4).ok


def test_a_gradient_wrong_only_over_the_whole_window_is_found(monkeypatch):
    pullback = Recorder.pullback

    def one_percent_more(self, *args, **kwargs):
        ct = pullback(self, *args, **kwargs)
        return ct._replace(params=jax.tree.map(lambda v: 1.01 * v, ct.params))

    monkeypatch.setattr(Recorder, "pullback", one_percent_more)
    report = check_step(rnn, PARAMS, CARRY, XS, window=3)
    assert places(report, "gradient") == {("params['u']", None), ("params['w']", None)}
    for f in report.findings:
        assert f.got == pytest.approx(1.01 * f.expected, rel=1e-6)
        assert "right at each lag, but over the whole window" in f.sentence


# ---------------------------------------------------------------- cut gradients


def test_a_stop_gradient_on_the_carry_is_found_at_each_lag():
    report = check_step(lambda *a: rnn(*a, on_carry=lax.stop_gradient), PARAMS, CARRY, XS, window=3)
    behind = {(path, lag) for path in ("params['u']", "params['w']", "x") for lag in (1, 2)}
    assert places(report, "cut") == behind | {("carry['h']", lag) for lag in range(3)}
    assert len(report.findings) == 9
    for f in report.findings:
        assert abs(f.expected) > 1e-3
        assert f.got == 0.0
        assert f"The gradient of {f.path} at lag {f.lag} is cut" in f.sentence
        assert "exactly zero. Check step for stop_gradient" in f.sentence


def test_a_rule_that_returns_zeros_is_found():
    @jax.custom_vjp
    def forgotten(v):
        return 2 * v

    forgotten.defvjp(lambda v: (2 * v, None), lambda _, ct: (jnp.zeros_like(ct),))
    report = check_step(lambda *a: rnn(*a, through=forgotten), PARAMS, CARRY, XS, window=1)
    assert places(report, "cut") == {("params['u']", 0), ("x", 0)}
    assert "custom derivative rules that return zeros" in report.findings[0].sentence


def test_a_stop_gradient_on_one_of_two_ways_is_found():
    def half(v):
        return v * lax.stop_gradient(v)

    report = check_step(lambda *a: rnn(*a, through=half), PARAMS, CARRY, XS, window=1)
    assert places(report, "gradient") == {("params['u']", 0), ("x", 0)}
    for f in report.findings:  # v² has twice the derivative of v times a constant
        assert f.got == pytest.approx(f.expected / 2, rel=1e-6)


FLAT = {
    "round": lambda v: jnp.round(8 * v) / 8,
    "a cast to int32": lambda v: (8 * v).astype(jnp.int32).astype(v.dtype) / 8,
    "gt": lambda v: (v > 0.05).astype(v.dtype),
    "argmax": lambda v: jax.nn.one_hot(jnp.argmax(v), 2, dtype=v.dtype),
    "floor": lambda v: lax.scan(lambda c, _: (jnp.floor(c), None), v, length=2)[0],
}


@pytest.mark.parametrize("name", grid(FLAT, always=["a cast to int32", "floor"]))
def test_a_carry_that_passes_what_is_piecewise_constant_is_named(name):
    report = check_step(lambda *a: rnn(*a, on_carry=FLAT[name]), PARAMS, CARRY, XS, window=2)
    finding = only(report)
    assert (finding.kind, finding.path, finding.lag) == ("flat", "carry['h']", 0)
    assert "From lag 0 on, carry['h'] reaches the outputs in jumps only" in finding.sentence


def test_a_carry_rounded_on_its_way_to_the_next_step_is_named_from_the_lag_on():
    def step(w, h, x):
        smooth = jnp.tanh(w * h + x)
        return jnp.floor(4 * smooth), smooth

    finding = only(check_step(step, 0.5, 0.3, XS, window=3))
    assert (finding.kind, finding.path, finding.lag) == ("flat", "carry", 1)
    assert "From lag 1 on" in finding.sentence


NO_FAULT = {
    "relu": lambda v: jax.nn.relu(v - 0.3),  # nothing passes, but more would
    "clip": lambda v: jnp.clip(v, -0.05, 0.05),
    "not read": lambda v: 0.0 * v,
    "cut, not read": lambda v: lax.stop_gradient(0.0 * v),
}


@pytest.mark.parametrize("name", grid(NO_FAULT, always=["clip", "cut, not read"]))
def test_a_carry_that_is_saturated_or_not_read_is_no_fault(name):
    report = check_step(
        lambda *a: rnn(*a, on_carry=NO_FAULT[name]), PARAMS, CARRY, XS[:1], window=1
    )
    assert report.ok, str(report)


def test_a_small_carry_that_is_rounded_to_integers_is_named():
    carry = {"h": jnp.asarray([1e-3, -1e-3])}
    finding = only(
        check_step(lambda *a: rnn(*a, on_carry=jnp.round), PARAMS, carry, XS[:1], window=1)
    )
    assert (finding.kind, finding.path, finding.lag) == ("flat", "carry['h']", 0)


def test_integers_beside_a_smooth_way_are_no_fault():
    def step(w, carry, x):
        h = jnp.tanh(w * carry["h"] + x)
        return {"h": h, "n": carry["n"] + (h > 0).astype(jnp.int32)}, h * (carry["n"] % 2 + 1.0)

    carry = {"h": jnp.asarray(0.1), "n": jnp.asarray(0, jnp.int32)}
    with jax.numpy_dtype_promotion("standard"):
        assert check_step(step, 0.5, carry, XS, window=2).ok


# -------------------------------------------------------- state and randomness


def test_a_step_that_depends_on_a_python_counter_is_named():
    calls = []

    def step(params, carry, x):
        calls.append(None)
        carry, y = rnn(params, carry, x)
        return carry, y * len(calls)

    report = check_step(step, PARAMS, CARRY, XS, window=2)
    finding = only(report)
    assert (finding.kind, finding.path, finding.lag) == ("state", "y", None)
    assert "step returns another y each time it is traced" in finding.sentence
    assert "a Python counter" in finding.sentence
    assert report.compared == 0
    assert "The gradient was not compared." in str(report)
    assert only(check_step(jax.jit(step), PARAMS, CARRY, XS, window=2)).kind == "state"


def test_a_step_that_draws_from_numpy_is_named_and_the_generator_put_back():
    def step(params, carry, x):
        return rnn(params, carry, x + np.random.normal())

    np.random.seed(3)
    finding = only(check_step(step, PARAMS, CARRY, XS, window=2))
    assert (finding.kind, finding.path) == ("random", "carry['h']")
    assert "each time it is traced" in finding.sentence
    assert "np.random" in finding.sentence
    drawn = np.random.normal()
    np.random.seed(3)
    np.random.normal()  # by the trace in init, before the step is looked at
    assert drawn == np.random.normal()


def test_a_step_that_is_not_deterministic_is_named():
    rng = np.random.default_rng(0)

    def step(params, carry, x):
        noise = jax.pure_callback(
            lambda: np.float64(rng.normal()), jax.ShapeDtypeStruct((), jnp.float64)
        )
        carry, y = rnn(params, carry, x)
        return carry, (y, lax.stop_gradient(noise))

    finding = only(check_step(step, PARAMS, CARRY, XS, window=2))
    assert (finding.kind, finding.path) == ("random", "y[1]")
    assert "each time it runs" in finding.sentence


# --------------------------------------------------------------- NaN and inf


def test_the_first_output_that_is_not_finite_is_named():
    def step(w, h, x):
        return h + x, {"good": h, "log": jnp.log(w + x)}

    finding = only(check_step(step, 0.75, 0.0, XS.at[1].set(-2.0), window=2))
    assert (finding.kind, finding.path, finding.lag) == ("not finite", "y['log']", 3)
    assert finding.sentence.startswith("The output y['log'] holds NaN or inf at lag 3, and nothing")


def test_a_gradient_that_is_not_finite_is_named_at_its_first_lag():
    def step(w, h, x):
        safe = jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, w, 0.0 * w)), 0.0)  # 0·inf behind
        return 0.5 * h + safe, h

    report = check_step(step, 0.7, 0.3, jnp.asarray([1.0, 1.0, -1.0, 1.0]), window=3)
    finding = only(report)
    assert (finding.kind, finding.path, finding.lag) == ("not finite", "params", 1)
    assert "The gradient of params holds NaN or inf at lag 1" in finding.sentence


def test_what_was_given_must_be_finite():
    params = {**PARAMS, "u": jnp.asarray(jnp.inf)}
    finding = only(check_step(rnn, params, CARRY, XS, window=2))
    assert (finding.kind, finding.path, finding.lag) == ("not finite", "params['u']", None)
    assert "What was given as params['u'] holds NaN or inf." in finding.sentence


# ----------------------------------------------------------------- precision


def test_with_float32_as_the_default_the_reference_is_float64_all_the_same():
    with without_x64():
        args = jax.tree.map(lambda v: jnp.asarray(np.asarray(v, np.float32)), (PARAMS, CARRY, XS))
        report = check_step(lambda *a: rnn(*a, through=doubled), *args, window=1)
        assert report.precision == "float64"
        assert report.notes == ()
        assert {f.path for f in report.findings} == {"params['u']", "x"}
        assert not jax.config.jax_enable_x64
        assert jnp.zeros(1).dtype == jnp.float32


@pytest.mark.exhaustive
def test_random_numbers_that_differ_in_float64_are_noticed():
    def step(params, carry, x):
        carry, y = rnn(params, carry, x["v"])
        mask = jax.random.bernoulli(x["key"], 0.5, (2,))
        return {"h": jnp.where(mask, carry["h"], 0.3)}, y

    with without_x64():
        args = jax.tree.map(lambda v: jnp.asarray(np.asarray(v, np.float32)), (PARAMS, CARRY, XS))
        xs = {"v": args[2], "key": jax.random.split(jax.random.key(1), 5)}
        report = check_step(step, *args[:2], xs, window=3)
    assert report.ok, str(report)
    assert report.precision == "float32"
    assert report.notes == ("step is another function in float64: its own dtypes were used.",)


def test_a_step_that_does_not_run_in_float64_is_compared_in_its_own_dtype():
    def step(params, carry, x):  # strict promotion refuses float64 here
        return rnn(params, carry, x * jnp.asarray(1.5, jnp.float32), through=doubled)

    args = jax.tree.map(lambda v: v.astype(jnp.float32), (PARAMS, CARRY, XS))
    report = check_step(step, *args, window=2)
    wrong = {(path, lag) for path in ("params['u']", "x") for lag in range(2)}
    assert places(report, "gradient") == wrong
    assert report.precision == "float32"
    assert "step does not run in float64 (TypePromotionError)" in str(report)


# ------------------------------------------------------------ report, arguments


def test_a_report_is_readable_and_raises_on_demand():
    report = check_step(lambda *a: rnn(*a, through=doubled), PARAMS, CARRY, XS, window=3)
    lines = str(report).splitlines()
    assert lines[0] == "check_step: 6 findings"
    assert re.fullmatch(r"kind +where +lag +expected +got", lines[1])
    assert re.fullmatch(r"gradient +params\['u'\] +0 +-?[\d.e-]+ +-?[\d.e-]+", lines[2])
    assert sum(line.startswith("* ") for line in lines) == 2  # one for each leaf
    assert lines[-1] == "36 directional derivatives compared in float64."
    with pytest.raises(
        ValueError,
        match=r"(?s)6 findings.*The gradient of x at lag 0 is wrong",
    ):
        report.raise_if_bad()
    assert check_step(rnn, PARAMS, CARRY, XS, window=1).raise_if_bad() is None


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"window": 0}, ValueError, "window must be an int of at least 1"),
        ({"window": 2.5}, ValueError, "window must be an int"),
        ({"xs": jnp.asarray(1.0)}, ValueError, "first axis over .* but got xs: no axis. Stack"),
        ({"xs": (XS, XS[1:])}, ValueError, r"but got xs\[0\]: 5, xs\[1\]: 4"),
        ({"xs": XS[:0]}, ValueError, "at least 1, in every leaf, but got xs: 0"),
        ({"xs": "text"}, ValueError, "xs must be an array"),
        ({"tolerance": 0.0}, ValueError, "tolerance must be a positive number or None"),
        ({"weights": "old"}, ValueError, "weights must be"),
        ({"step": 3}, ValueError, "step must be a function"),
        ({"step": lambda p, c, x: c}, TypeError, "step must return a pair"),
    ],
)
def test_arguments_that_cannot_be_are_refused(change, error, match):
    given = {"step": rnn, "params": PARAMS, "carry": CARRY, "xs": XS, "window": 2} | change
    with pytest.raises(
        error,
        match=match,
    ):
        check_step(**given)


def test_traced_arguments_are_refused():
    def inside(params):
        check_step(rnn, params, CARRY, XS, window=2)

    with pytest.raises(
        ValueError,
        match="call it outside jit",
    ):
        jax.jit(inside)(PARAMS)


def test_a_rule_of_the_wrong_sign_is_found():
    """As large as the right one: only the sign tells them apart."""

    @jax.custom_vjp
    def turned(v):
        return jnp.sin(v)

    turned.defvjp(lambda v: (jnp.sin(v), v), lambda v, ct: (-ct * jnp.cos(v),))
    report = check_step(lambda *a: rnn(*a, through=turned), PARAMS, CARRY, XS, window=2)
    assert places(report, "gradient") == {(p, lag) for p in ("params['u']", "x") for lag in (0, 1)}
    for f in report.findings:
        assert f.got == pytest.approx(-f.expected, rel=1e-6)


@pytest.mark.parametrize("weights", ["stored", "current", "replayed"])
def test_a_large_part_that_nothing_drives_is_left_out(weights):
    def step(params, carry, x):
        sim = carry["sim"] + 0.1 * jnp.sin(carry["sim"]) * jnp.cos(carry["sim"])
        h = jnp.tanh(params["w"] * carry["h"] + params["u"] * x + sim[:2])
        return {"h": h, "sim": sim}, jnp.sum(h**2)

    carry = {"h": CARRY["h"], "sim": jnp.linspace(0.0, 1.0, 20_000)}
    report = check_step(step, PARAMS, carry, XS, window=3, weights=weights)
    assert report.ok
    assert not report.findings
