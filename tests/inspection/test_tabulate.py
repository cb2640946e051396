"""The table of what the tape holds: bytes as on a tape, origins as in this file."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import grid
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback
from zoo import ZOO

import jaxbptt
from jaxbptt._inspection.tabulate import Policy, Table, _suggestion, tabulate

# Batch, input and state: all different, so that a shape tells what it is.
B, D, H, WINDOW = 3, 5, 7, 11
PLACES = ("ring", "parameters", "made again")


def array(*shape, dtype=jnp.float64):
    return jax.ShapeDtypeStruct(shape, dtype)


def ring_bytes(step, params, carry, x, **options):
    """What the recorder itself says."""
    recorder = jaxbptt.record(step, **options)
    return jax.eval_shape(recorder.init, params, carry, x).nbytes


def sum_of(table, *places):
    return sum(row.nbytes for row in table.rows if row.place in places)


def line_of(text):
    """The number of the one line in this file that ends with a mark."""
    with open(__file__, encoding="utf-8") as file:
        (number,) = [n for n, line in enumerate(file, 1) if line.rstrip().endswith(f"# {text}")]
    return number


def lstm(params, carry, x):
    gates = x @ params["wx"] + carry["h"] @ params["wh"] + params["b"][None]
    i, f, g, o = jnp.split(gates, 4, axis=1)
    forget = jax.nn.sigmoid(f)  # the forget gate
    c = forget * carry["c"] + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return {"h": h, "c": c}, h.sum()


LSTM = (
    lstm,
    {"wx": array(D, 4 * H), "wh": array(H, 4 * H), "b": array(4 * H)},
    {"h": array(B, H), "c": array(B, H)},
    array(B, D),
)


def head_and_embedding(params, carry, x):
    """Tokens in, a loss out, a counter beside the state."""
    h, count = carry
    h = jnp.tanh(params["table"][x["token"]] + h @ params["wh"])
    logits = h @ params["head"]
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), x["target"][:, None], axis=1).mean()
    return (h, count + 1), (loss, logits.argmax(1))


EMBEDDED = (
    head_and_embedding,
    {"table": array(13, H), "wh": array(H, H), "head": array(H, 13)},
    (array(B, H), array(dtype=jnp.int32)),
    {"token": array(B, dtype=jnp.int32), "target": array(B, dtype=jnp.int32)},
)


def deep(params, h, x):
    h = h + x
    for w in params:
        h = jnp.tanh(h @ w)  # one of the layers
    return h, h.sum()


def deep_of(layers):
    return deep, [array(H, H)] * layers, array(B, H), array(B, H)


# -------------------------------------------------------------------- bytes

KINDS = """tanh_rnn fused_gru bfloat16 complex_recurrence integer_leaves tokens no_params
no_residuals closed_over typed_key raw_key""".split()


@pytest.mark.parametrize(
    ("name", "weights"),
    grid(
        itertools.product(KINDS, ["stored", "current"]),
        always=[
            *((name, "current") for name in ("tanh_rnn", "bfloat16", "closed_over", "no_params")),
            *((name, "stored") for name in ("complex_recurrence", "typed_key", "no_residuals")),
        ],
    ),
)
def test_bytes_are_those_of_a_tape(name, weights):
    case = ZOO[name](jnp.float64)
    given = (case.step, case.params, case.carry, case.x())
    table = tabulate(*given, window=WINDOW, weights=weights)
    assert table.nbytes == ring_bytes(*given, window=WINDOW, weights=weights)
    assert table.nbytes == WINDOW * sum_of(table, "ring")
    assert {row.place for row in table.rows} <= set(PLACES)
    for row in table.rows:
        assert row.nbytes == np.prod(row.shape, dtype=int) * row.dtype.itemsize


def test_bytes_with_a_window_for_each_part():
    window = {"h": 4, "c": WINDOW}
    table = tabulate(*LSTM, window=window)
    assert table.nbytes == ring_bytes(*LSTM, window=window) == WINDOW * sum_of(table, "ring")


LARGER = {"LSTM": LSTM, "head and embedding": EMBEDDED, "deep": deep_of(4)}


@pytest.mark.parametrize(
    ("name", "weights"),
    grid(
        itertools.product(["LSTM", "head and embedding"], ["stored", "current"]),
        always=[("LSTM", "stored"), ("head and embedding", "current")],
    ),
)
def test_bytes_of_larger_steps(name, weights):
    given = LARGER[name]
    options = {"window": WINDOW, "weights": weights, "has_aux": given is EMBEDDED}
    assert tabulate(*given, **options).nbytes == ring_bytes(*given, **options) > 0


def test_bytes_with_a_key_and_an_integer_in_the_carry():
    def step(w, carry, x):
        key, count = jax.random.split(carry["key"])[0], carry["count"] + 1
        noise = jax.random.normal(key, (H,)) * count.astype(jnp.float64)
        h = jnp.tanh(w * carry["h"] * noise + x)
        return {"key": key, "count": count, "h": h}, h.sum()

    carry = {"key": jax.random.key(0), "count": jnp.int32(0), "h": jnp.ones(H)}
    for weights in ("stored", "current"):
        table = tabulate(step, array(H), carry, array(H), window=2, weights=weights)
        assert table.nbytes == ring_bytes(
            step, array(H), carry, array(H), window=2, weights=weights
        )


def test_nothing_is_tabulated_of_a_step_without_residuals():
    table = tabulate(lambda p, c, x: (c, ()), array(H), array(B), array(D), window=WINDOW)
    assert (table.rows, table.nbytes, table.suggestion) == ([], 0, None)
    assert "On the tape: 0." in str(table)


def test_parameters_are_on_the_ring_only_when_stored():
    stored, current = (tabulate(*LSTM, weights=w) for w in ("stored", "current"))
    place = {row.name: row.place for row in stored.rows}
    assert place["params['wh']"] == place["params['wx']"] == "ring"
    assert sum_of(stored, "parameters") == 0
    assert {r.name for r in current.rows if r.place == "parameters"} == {
        "params['wh']",
        "params['wx']",
    }
    assert stored.nbytes - current.nbytes == sum_of(current, "parameters") == 8 * (H + D) * 4 * H


def test_what_is_made_again_is_a_row_and_costs_nothing():
    """Of a tanh and its derivative one is on the ring, of a sigmoid and its derivative too."""
    table = tabulate(*LSTM, weights="current")
    again = [row for row in table.rows if row.place == "made again"]
    assert {row.primitive for row in again} <= {"mul", "sub", "one_minus_square", "add"}
    assert sum(row.nbytes for row in again) >= 5 * 8 * B * H
    assert table.nbytes == sum_of(table, "ring")  # window=1


def test_shapes_of_arrays_are_enough_and_nothing_is_computed():
    step, params, carry, x = LSTM
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), (params, carry, x))
    assert tabulate(step, *zeros) == tabulate(*LSTM)
    large = array(10**6, 10**6)  # 8 TB
    table = tabulate(lambda p, c, x: (jnp.tanh(p * c), x), large, large, array(), window=10**9)
    assert table.nbytes == 3 * 8 * 10**21


# ------------------------------------------------------------------ origins


def test_inputs_have_their_key_path():
    rows = tabulate(*LSTM).rows
    shapes = {row.name: row.shape for row in rows if not row.primitive}
    assert shapes == {
        "params['wh']": (H, 4 * H),
        "params['wx']": (D, 4 * H),
        "carry['h']": (B, H),
        "carry['c']": (B, H),
        "x": (B, D),
    }
    assert all(row.source == "" for row in rows if not row.primitive)


def test_a_value_has_the_line_where_the_user_made_it():
    rows = [row for row in tabulate(*LSTM).rows if row.primitive == "logistic"]
    where = f"test_tabulate.py:{line_of('the forget gate')}"
    (row,) = [row for row in rows if row.name == where]
    assert row.source == f"{__file__}:{line_of('the forget gate')}"
    assert len(rows) == 3
    assert len({row.name for row in rows}) == 3  # f, i and o stand on lines of their own


def test_every_value_of_a_step_has_a_line_in_it():
    for given in (LSTM, EMBEDDED, deep_of(2)):
        first = given[0].__code__.co_firstlineno
        lines = range(first, first + 8)
        made = [r for r in tabulate(*given, has_aux=given is EMBEDDED).rows if r.primitive]
        assert made
        assert [r for r in made if int(r.source.removeprefix(f"{__file__}:")) not in lines] == []


def inside(h):
    return jnp.sin(h)  # made inside


@pytest.mark.parametrize(
    "call",
    [inside, jax.jit(inside), jax.jit(jax.jit(inside)), jax.vmap(inside)],
    ids=["plain", "jit", "jit of jit", "vmap"],
)
def test_a_line_is_found_inside_calls(call):
    rows = tabulate(lambda p, h, x: (call(p * h), ()), array(H), array(H), ()).rows
    (row,) = [row for row in rows if row.primitive == "cos"]
    assert row.name == f"test_tabulate.py:{line_of('made inside')}"


def test_a_value_made_in_a_function_of_jax_has_the_line_that_calls_it():
    jax.clear_caches()  # JAX may keep such a function's trace, with the line that called it first

    def step(p, h, x):
        h = h * jnp.linalg.norm(p)  # the norm
        return h, ()

    rows = [row for row in tabulate(step, array(H), array(H), ()).rows if row.primitive]
    assert rows
    assert {row.name for row in rows} == {f"test_tabulate.py:{line_of('the norm')}"}


def test_a_scan_has_its_own_line():
    def step(p, h, x):
        h, _ = lax.scan(lambda h, w: (jnp.sin(w * h), None), h, p)  # the scan
        return h, ()

    rows = [r for r in tabulate(step, array(4, H), array(H), ()).rows if r.primitive == "scan"]
    assert rows
    assert {row.name for row in rows} == {f"test_tabulate.py:{line_of('the scan')}"}


def test_a_primitive_stands_where_no_line_is_known():
    code = "def step(p, h, x):\n    return jax.numpy.sin(p * h), ()\n"
    names = {}
    exec(compile(code, jax.__file__, "exec"), {"jax": jax}, names)  # frames that are skipped
    rows = tabulate(names["step"], array(H), array(H), ()).rows
    (row,) = [row for row in rows if row.primitive == "cos"]
    assert (row.name, row.source) == ("cos", "")


@pytest.mark.parametrize("policy", [None, "nothing_saveable", "save_only_these_names"])
def test_a_checkpoint_name_shows(policy):
    def step(p, h, x):
        h = checkpoint_name(jnp.tanh(h @ p["w"]), "state")  # named
        return jnp.sin(h @ p["v"]), ()

    if policy == "nothing_saveable":
        step = jax.checkpoint(step)
    elif policy:
        step = jax.checkpoint(step, policy=getattr(jax.checkpoint_policies, policy)("state"))
    rows = tabulate(step, {"w": array(H, H), "v": array(H, H)}, array(H), ()).rows
    named = [row for row in rows if row.name == "state"]
    assert bool(named) == (policy != "nothing_saveable")
    for row in named:
        assert (row.primitive, row.shape) == ("tanh", (H,))
        assert row.source == f"{__file__}:{line_of('named')}"


def test_a_name_given_inside_a_call_shows():
    call = jax.jit(lambda h: checkpoint_name(h, "state"))
    rows = tabulate(
        lambda p, h, x: (jnp.sin(call(jnp.exp(h)) * p), ()), array(H), array(H), ()
    ).rows
    named = [row for row in rows if row.name == "state"]
    assert named
    assert {row.primitive for row in named} == {"exp"}


def test_closed_over_arrays_are_rows():
    table = jnp.asarray(np.eye(H))
    rows = tabulate(lambda p, h, x: (jnp.sin(h @ table), ()), (), array(H), ()).rows
    assert ("closed over [0]", (H, H)) in [(row.name, row.shape) for row in rows]


# --------------------------------------------------- jax.checkpoint, measured


@pytest.mark.parametrize(
    ("name", "weights"),
    grid(
        itertools.product(["LSTM", "deep"], ["stored", "current"]),
        always=[("LSTM", "current"), ("deep", "stored")],
    ),
)
def test_bytes_under_a_policy_are_those_of_the_checkpointed_step(name, weights):
    given = step, *others = LARGER[name]
    policies = tabulate(*given, window=WINDOW, weights=weights).policies
    assert [p.name for p in policies] == [
        "everything_saveable",
        "dots_saveable",
        "dots_with_no_batch_dims_saveable",
        "nothing_saveable",
    ]
    for p in policies:
        policy = getattr(jax.checkpoint_policies, p.name)
        under = jax.checkpoint(step, policy=policy)
        assert p.nbytes == ring_bytes(under, *others, window=1, weights=weights)


def test_products_that_are_done_again():
    """Nothing saved: each layer's product once more. Products saved: none."""
    products = {p.name: p.products for p in tabulate(*deep_of(5)).policies}
    assert products["everything_saveable"] == products["dots_saveable"] == 0
    assert products["nothing_saveable"] == 5


def test_products_in_a_scan_count_at_every_trip():
    def step(p, h, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p)[0], ()

    products = {
        p.name: p.products for p in tabulate(step, array(6, H, H), array(B, H), ()).policies
    }
    assert products["nothing_saveable"] == 6


def test_a_batched_product_is_done_again_where_only_unbatched_ones_are_saved():
    def step(p, h, x):
        return jnp.tanh(jnp.einsum("bij,bj->bi", p, h)), ()

    products = {
        p.name: p.products for p in tabulate(step, array(B, H, H), array(B, H), ()).policies
    }
    assert products["dots_with_no_batch_dims_saveable"] == 1
    assert products["dots_saveable"] == 0


def test_a_deep_step_is_told_what_saves_memory():
    """State and input in place of their sum and six layers: 2/7 of the ring, six products."""
    table = tabulate(*deep_of(6), weights="current")
    assert [p for p in table.policies if p.name == "nothing_saveable"] == [
        Policy("nothing_saveable", 2 * 8 * B * H, 6)
    ]
    assert table.suggestion == (
        "Try jax.checkpoint(step, policy=jax.checkpoint_policies.nothing_saveable): "
        "336 bytes per step (-71%), 6 products again."
    )
    assert table.suggestion in str(table)


def test_what_costs_no_product_is_told_first():
    def step(p, h, x):
        h = h @ p
        for _ in range(4):
            h = jnp.sin(jnp.tanh(h))
        return h, ()

    table = tabulate(step, array(H, H), array(B, H), (), weights="current")
    nbytes = {p.name: p.nbytes for p in table.policies}
    assert nbytes["nothing_saveable"] < nbytes["dots_saveable"] < table.nbytes
    assert table.suggestion.startswith(
        "Try jax.checkpoint(step, policy=jax.checkpoint_policies.dots_saveable): "
    )


def test_nothing_is_suggested_where_nothing_is_gained():
    def step(p, h, x):
        return jnp.tanh(h * p + x), ()

    table = tabulate(step, array(H), array(H), array(H))
    assert table.suggestion is None
    assert "Try" not in str(table)
    # Already checkpointed: there is nothing left to gain.
    deep_step, *others = deep_of(6)
    assert tabulate(jax.checkpoint(deep_step), *others, weights="current").suggestion is None


def test_a_fifth_is_the_least_that_is_worth_a_suggestion():
    """With stored weights a wide parameter on the ring makes the same saving too small."""

    def step(p, h, x):
        return jnp.sin(jnp.sin(h)) * p, ()

    def saved(width):
        table = tabulate(lambda p, h, x: (step(p[:H], h, x)[0], (p * p).sum()), width, array(H), ())
        least = min(p.nbytes for p in table.policies)
        return least / table.nbytes, table.suggestion

    small, told = saved(array(H))
    assert small <= 0.8
    assert told is not None
    large, untold = saved(array(50 * H))
    assert 0.8 < large < 1
    assert untold is None
    assert "80 bytes per step (-20%)" in _suggestion(100, [Policy("nothing_saveable", 80, 0)])
    assert _suggestion(100, [Policy("nothing_saveable", 81, 0)]) is None


def test_a_policy_that_jax_refuses_is_left_out():
    case = ZOO["complex_recurrence"](jnp.float64)
    table = tabulate(case.step, case.params, case.carry, case.x())
    assert "nothing_saveable" in [p.name for p in table.policies]

    def calls_out(p, h, x):
        io_callback(lambda h: None, None, lax.stop_gradient(h), ordered=True)
        return h * p, ()

    assert tabulate(calls_out, array(H), array(H), ()).policies == []


# ------------------------------------------------------------------- printed


def test_the_table_is_aligned_and_the_largest_comes_first():
    table = tabulate(*LSTM, window=20, weights="current")
    nbytes = [row.nbytes for row in table.rows]
    assert nbytes == sorted(nbytes, reverse=True)
    head, *lines = str(table).splitlines()
    rows = lines[: len(nbytes)]
    for line, row in zip(rows, table.rows, strict=True):
        assert line[head.index("type") :].startswith(f"float64[{','.join(map(str, row.shape))}]")
        assert line[head.index("where") :].startswith(row.place)
        assert line[head.index("value") :].startswith(row.name)
        assert line[: head.index("type")].split() == [f"{row.nbytes:,}"]
        assert len(line[: head.index("type")].rstrip()) == head.index("bytes") + len("bytes")
    sums = [sum_of(table, place) for place in PLACES]
    assert lines[len(nbytes)] == (
        f"Bytes per step: ring {sums[0]:,}, parameters {sums[1]:,}, made again {sums[2]:,}. "
        f"On the tape: {20 * sums[0]:,}."
    )
    assert all(p.name in str(table) for p in table.policies)
    assert isinstance(table, Table)


# -------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"step": 3}, ValueError, r"step must be a function step\(params, carry, x\)"),
        ({"window": 0}, ValueError, "window must be an int of at least 1 .* but got 0"),
        ({"window": 1.5}, ValueError, "window must be an int of at least 1 .* but got 1.5"),
        (
            {"weights": "old"},
            ValueError,
            "weights must be 'stored', 'current' or 'replayed', but got 'old'",
        ),
        ({"weights": "replayed"}, ValueError, "weights must be 'stored' or 'current' for a table"),
        ({"x": "text"}, ValueError, "x must be an array or a number, but got 'text'"),
        ({"carry": {"h": "text"}}, ValueError, r"carry\['h'\] must be an array or a number"),
        ({"has_aux": True}, TypeError, r"step must return y as a pair \(y, aux\)"),
        ({"step": lambda p, c, x: c}, TypeError, r"step must return a pair \(carry, y\)"),
        (
            {"step": lambda p, c, x: (x, x)},
            TypeError,
            "step must return a carry of the type it was given",
        ),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_a_fault_is_said(change, error, match):
    given = {"step": lstm, "params": LSTM[1], "carry": LSTM[2], "x": LSTM[3]} | change
    with pytest.raises(
        error,
        match=match,
    ):
        tabulate(**given)


@pytest.mark.parametrize("name", ["params", "carry", "x"])
def test_a_tape_is_refused(name):
    recorder = jaxbptt.record(lambda p, c, x: (p * c, x), window=2)
    tape = recorder.init(1.0, 1.0, 1.0)
    given = {"params": 1.0, "carry": 1.0, "x": 1.0} | {name: tape}
    with pytest.raises(
        ValueError,
        match=f"{name} must be what the step takes as {name}",
    ):
        tabulate(recorder.step, **given)
