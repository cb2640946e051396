"""The main job at the command line: it learns, keeps its results, and says its faults."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import PATIENCE, ROOT, environment, grid

import jaxbptt
from jaxbptt._demo import job as demo_job
from jaxbptt._demo import train as demo_train
from jaxbptt._demo.cli import main, parser
from jaxbptt._demo.model import GATES, Model, bits_per_character, cross_entropy
from jaxbptt._demo.results import RunResult, mean_norms_by_lag, picture, table
from jaxbptt._demo.saves import TrainingProgress
from jaxbptt._demo.text import Text, UsageError, prepare
from jaxbptt._demo.train import (
    Stream,
    TrainingConfig,
    initial_state,
    make_learner,
    tape_bytes,
    train,
)

PHRASE = "the cat sat on the mat, and "
SMALL = ["--hidden", "16", "--batch", "4", "--window", "4", "--learning-rate", "0.02"]
CONFIG = TrainingConfig("gru", 5, 3, 4, 1, "stored", 6, 0.01, 0)
SQUARES = np.arange(31, dtype=np.int32) ** 2 % 7
TEXT = Text("squares", "abcdefg", SQUARES, SQUARES[:12].reshape(6, 2))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "periodic.txt"
    path.write_text(PHRASE * 80)
    return path


class Kept(NamedTuple):
    """What a run left behind."""

    out: Path
    facts: dict
    said: str
    progress: str


@pytest.fixture(scope="module")
def kept(text, tmp_path_factory):
    """A job with the runs that it is compared with."""
    out = tmp_path_factory.mktemp("out") / "new" / "folder"
    said, progress = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(progress):
        assert main(["--text", str(text), *SMALL, "--steps", "400", "--out", str(out)]) == 0
    facts = json.loads((out / "results.json").read_text())
    return Kept(out, facts, said.getvalue(), progress.getvalue())


def run(text, out, *more):
    """One run without a baseline: its results."""
    arguments = ["--text", str(text), *SMALL, "--out", str(out), "--no-baseline", *more]
    assert main(arguments) == 0
    return json.loads((out / "results.json").read_text())


def model_of(facts):
    settings = facts["settings"]
    return Model(settings["cell"], settings["hidden"], len(facts["characters"]))


def numbers_in(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, float | int)]


def test_learns_a_periodic_text(kept):
    # 12 characters; all that the last one alone tells of the next leaves 1.09 bits.
    facts = kept.facts
    main_run = facts["runs"][0]
    assert main_run["held_out_bits_before"] == pytest.approx(math.log2(12), abs=0.5)
    assert main_run["held_out_bits_after"] < 0.6
    assert "the cat sat on the " in facts["sample"]


def test_results_are_finite_and_complete(kept):
    facts = kept.facts
    assert facts["interrupted"] is False
    assert facts["characters"] == "".join(sorted(set(PHRASE)))
    assert [(run["window"], run["every"], run["steps"]) for run in facts["runs"]] == [
        (4, 1, 400),
        (4, 4, 400),
        (1, 1, 400),
    ]
    assert all(math.isfinite(number) for number in numbers_in(facts))
    for each in facts["runs"]:
        assert [at for at, _ in each["curve"]] == [*range(50, 401, 50)]
        assert [at for at, _ in each["held_out_curve"]] == [0, *range(50, 401, 50)]
        ends = each["held_out_curve"][0][1], each["held_out_curve"][-1][1]
        assert ends == (each["held_out_bits_before"], each["held_out_bits_after"])
        assert len(each["gradient_norm_by_lag"]) == 8
        assert each["steps_per_second"] > 0


def test_saved_parameters_give_the_reported_bits(kept, text):
    out, facts = kept.out, kept.facts
    saved = np.load(out / "parameters.npz")
    params = {name: jnp.asarray(saved[name]) for name in saved.files}
    assert all(leaf.dtype == np.float32 for leaf in params.values())
    held_out = prepare("", text.read_text(), streams=4, window=4).held_out
    bits = bits_per_character(model_of(facts), params, held_out)
    assert bits == pytest.approx(facts["runs"][0]["held_out_bits_after"], rel=1e-6)


def test_picture_is_a_png_of_readable_size(kept):
    content = (kept.out / "curves.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width >= 1000
    assert height >= 400
    assert len(content) > 20_000


def test_reported_tape_is_that_of_init(kept):
    facts = kept.facts
    config = TrainingConfig(**facts["settings"])
    for each in facts["runs"]:
        plan = dataclasses.replace(config, window=each["window"])
        assert each["tape_bytes"] == tape_bytes(model_of(facts), plan)
    assert facts["runs"][0]["tape_bytes"] == 4 * facts["runs"][2]["tape_bytes"]


def test_the_runs_compared_with_are_the_same_model(kept, text):
    of_text = prepare("", text.read_text(), streams=4, window=4)
    main_run, chunks, single = kept.facts["runs"]
    config = TrainingConfig(**kept.facts["settings"])
    for each, changes in (
        (chunks, {"every": 4, "learning_rate": 2 * config.learning_rate}),
        (single, {"window": 1}),
    ):
        plan = dataclasses.replace(config, **changes)
        alone = train(model_of(kept.facts), of_text, plan)
        assert [list(point) for point in alone.curve] == each["curve"] != main_run["curve"]
        assert each["learning_rate"] == plan.learning_rate


def compared_with(**changes):
    config = dataclasses.replace(CONFIG, steps=100, **changes)
    return [(each.window, each.every, each.learning_rate) for each in demo_job._baselines(config)]


def test_what_a_job_is_compared_with():
    rate = CONFIG.learning_rate
    # Chunks have the root of as many times the rate as they have fewer updates.
    assert compared_with(window=9) == [(9, 9, 3 * rate), (1, 1, rate)]
    assert compared_with(window=12, every=3) == [(12, 12, 2 * rate), (1, 1, rate)]
    # Not with itself, nor with chunks that are longer than the run.
    assert compared_with(window=4, every=4) == [(1, 1, rate)]
    assert compared_with(window=101) == [(1, 1, rate)]
    assert compared_with(window=1, every=3) == [(1, 1, rate)]
    assert compared_with(window=1) == []


OPTIONS = [
    ["--cell", "rnn", "--every", "3", "--window", "5", "--weights", "stored"],
    ["--cell", "lstm", "--every", "4", "--weights", "current"],
    ["--cell", "gru", "--weights", "replayed"],
]


@pytest.mark.parametrize("options", grid(OPTIONS, always=OPTIONS[1:2]), ids=" ".join)
def test_options_run_and_learn(options, text, tmp_path):
    facts = run(text, tmp_path, "--seed", "3", "--steps", "150", *options)
    asked = dict(zip(options[::2], options[1::2], strict=True))
    for name, value in asked.items():
        assert str(facts["settings"][name[2:]]) == value
    each = facts["runs"][0]
    assert each["held_out_bits_after"] < each["held_out_bits_before"] - 0.5


def test_says_the_results_side_by_side(kept):
    rows = kept.said.splitlines()
    for name in ("before", "after"):
        shown = [f"{each[f'held_out_bits_{name}']:.3f}" for each in kept.facts["runs"]]
        (row,) = [row for row in rows if row.startswith(f"held-out bits per character, {name}")]
        assert row.split()[-3:] == shown
    assert f"current: {kept.facts['runs'][0]['tape_bytes']:,} bytes" in kept.said
    assert kept.facts["sample"] in kept.said
    for part in ("window 4: ", "window 4, every 4: ", "bits per character", "steps/s"):
        assert part in kept.progress
    told = kept.said.index("window 4: compiling"), kept.said.index("window 4: measuring")
    assert kept.said.index("tape ") < told[0] < told[1] < kept.said.index("window 1: compiling")


@pytest.mark.exhaustive
def test_other_alphabets_and_threads(tmp_path, monkeypatch):
    # The held-out part alone has an "ω", and only the main thread may handle signals.
    path = tmp_path / "ελληνικά.txt"
    path.write_text("γνῶθι σεαυτόν — " * 100 + "ω" * 20, encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    codes = []
    arguments = ["--text", str(path), *SMALL, "--steps", "55", "--out", str(tmp_path)]
    thread = threading.Thread(target=lambda: codes.append(main([*arguments, "--no-baseline"])))
    thread.start()
    thread.join()
    assert codes == [0]
    facts = json.loads((tmp_path / "results.json").read_text())
    assert [at for at, _ in facts["runs"][0]["curve"]] == [50, 55]
    assert "ω" in facts["characters"]
    assert set(facts["sample"]) <= set(facts["characters"])


def test_control_characters_reach_no_terminal(capsys):
    demo_job._say("a\x1b[31mb\tc\n")
    assert capsys.readouterr().out == "a\\x1b[31mb\tc\n\n"


def test_trains_as_a_plain_loop_does():
    # At window 1 the gradient inside the loop is that of the newest step alone.
    model, symbols = Model("gru", 5, 7), TEXT.train
    got = train(model, TEXT, dataclasses.replace(CONFIG, window=1))

    rate = optax.cosine_decay_schedule(0.01, 6)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    @jax.jit
    def one(params, state, carry, now, following):
        def loss_fn(params):
            new, logits = model.step(params, carry, now)
            return -jax.nn.log_softmax(logits)[jnp.arange(3), following].mean() / math.log(2), new

        (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, new, loss

    params, carry, bits = model.init(0), model.initial_carry(3), []
    state = optimizer.init(params)
    for time in range(6):
        place = np.array([0, 10, 20]) + time
        params, state, carry, loss = one(params, state, carry, symbols[place], symbols[place + 1])
        bits.append(float(loss))
    for name, leaf in params.items():
        np.testing.assert_allclose(got.state.params[name], leaf, rtol=1e-4, atol=1e-6)
    assert got.curve == [(6, pytest.approx(np.mean(bits), rel=1e-5))]


def test_a_stream_goes_on_at_the_beginning_of_the_text():
    stream = Stream(np.arange(7), 2, 2, 9)  # from step 2 to before step 9
    got = np.array(list(stream))
    assert len(stream) == len(got)
    first, second = [2, 3, 4, 5, 6, 0, 1], [5, 6, 0, 1, 2, 3, 4]
    np.testing.assert_array_equal(got[:, 0].T, [first, second])
    np.testing.assert_array_equal(got[:, 1].T, [[*first[1:], 2], [*second[1:], 5]])


def test_it_is_measured_more_often_while_it_learns_fast():
    config = dataclasses.replace(CONFIG, steps=810)
    run = demo_train._Run(None, TEXT, config, None, None, None)
    ends = [end for end in range(50, 801, 50) if run._is_due(end - 50, end)]
    assert ends == [50, 100, 150, 250, 350, 450, 550, 650, 750]
    assert run._is_due(800, 810)


def test_the_loss_is_the_mean_over_streams_in_bits():
    logits = np.array([[0.5, -1.0, 2.0], [0.0, 0.25, -0.5]], np.float32)
    target = np.array([1, 2], np.int32)
    bits = np.mean(np.log2(np.exp(logits).sum(1)) - logits[[0, 1], target] / np.log(2))
    np.testing.assert_allclose(cross_entropy(logits, target), bits, rtol=1e-6)


def test_the_gradient_of_a_group_is_the_mean_of_its_steps():
    learner = make_learner(Model("rnn", 5, 3), dataclasses.replace(CONFIG, every=4, steps=400))
    params = {"w": jnp.zeros(2, jnp.float32)}
    # Adam forgets the scale, so look at what it has gathered: a tenth of the gradient.
    gradient = {"w": jnp.array([0.4, -0.8], jnp.float32)}
    with jax.numpy_dtype_promotion("standard"):
        start = learner.optimizer.init(params)
        _, (_, _, (adam, _)) = learner.optimizer.update(gradient, start, params)
    np.testing.assert_allclose(adam.mu["w"], [0.01, -0.02], rtol=1e-5)


def logistic(v):
    return 1 / (1 + np.exp(-v))


def rnn_by_hand(h, wx, wh):
    return (np.tanh(wx + wh),)


def gru_by_hand(h, wx, wh):
    r, z = logistic(wx[:, :5] + wh[:, :5]), logistic(wx[:, 5:10] + wh[:, 5:10])
    return ((1 - z) * np.tanh(wx[:, 10:] + r * wh[:, 10:]) + z * h[0],)


def lstm_by_hand(h, wx, wh):
    i, f, g, o = np.split(wx + wh, 4, axis=1)
    c = logistic(f) * h[1] + logistic(i) * np.tanh(g)
    return logistic(o) * np.tanh(c), c


@pytest.mark.parametrize("by_hand", [rnn_by_hand, gru_by_hand, lstm_by_hand])
def test_a_step_of_each_cell(by_hand):
    model, rng = Model(by_hand.__name__.split("_")[0], 5, 7), np.random.default_rng(0)
    params = {k: rng.normal(size=v.shape).astype("f") for k, v in model.init(0).items()}
    carry = tuple(rng.normal(size=v.shape).astype("f") for v in model.initial_carry(3))
    now = np.array([6, 0, 3], np.int32)
    got, logits = jax.jit(model.step)(params, carry, now)
    want = by_hand(carry, params["Wx"][now] + params["b"], carry[0] @ params["Wh"])
    want = (*want, want[0] @ params["Wy"] + params["by"])
    for one, other in zip((*got, logits), want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_only_the_forget_gate_begins_open():
    biases = {cell: np.asarray(Model(cell, 2, 3).init(0)["b"]) for cell in GATES}
    np.testing.assert_array_equal(biases["lstm"], [0, 0, 1, 1, 0, 0, 0, 0])
    assert not np.any(biases["rnn"])
    assert not np.any(biases["gru"])


def test_updates_where_a_group_is_due():
    model = Model("rnn", 5, 7)
    config = dataclasses.replace(CONFIG, cell="rnn", every=4, steps=80)
    learner = make_learner(model, config)
    state, update, changed = initial_state(learner, model, config), jax.jit(learner.update), []
    for x in Stream(TEXT.train, config.batch, 0, 8):
        new, _ = update(state, x)
        changed.append(bool((new.params["Wh"] != state.params["Wh"]).any()))
        state = new
    assert changed == [False, False, False, True] * 2


def test_gradient_by_lag_is_that_of_the_unrolled_graph():
    model, lags = Model("lstm", 5, 7), 6
    params = model.init(1)
    held_out = (np.arange(24, dtype=np.int32) ** 2 % 7).reshape(12, 2)
    got = mean_norms_by_lag(model, params, held_out, lags).carry

    def losses(nudges):  # to the carry before each step
        def one(carry, x):
            nudge, now, following = x
            carry, logits = model.step(params, jax.tree.map(jnp.add, carry, nudge), now)
            hit = jax.nn.log_softmax(logits)[jnp.arange(2), following]
            return carry, -hit.mean() / math.log(2)

        xs = (nudges, held_out[:-1], held_out[1:])
        return jax.lax.scan(one, model.initial_carry(2), xs)[1]

    nudges = tuple(np.zeros((11, 2, 5), np.float32) for _ in range(2))
    of_h, of_c = jax.jit(jax.jacrev(losses))(nudges)
    norms = np.sqrt(np.sum(of_h**2 + of_c**2, axis=(2, 3)))
    by_lag = [[norms[t, t - k] for k in range(lags)] for t in range(lags - 1, 11)]
    np.testing.assert_allclose(got, np.mean(by_lag, axis=0), rtol=1e-4)


def test_diverging_is_said():
    # The loss is finite before the first update and infinite after it.
    config = dataclasses.replace(CONFIG, cell="rnn", window=1, learning_rate=1e38)
    with pytest.raises(UsageError, match="the loss is not finite after 6 steps of window 1"):
        train(Model("rnn", 5, 7), TEXT, config)


def run_result(window, rate, *, every=1, steps=100, seconds=1.0, held_out=((0, 4.0), (100, 2.0))):
    """A run whose gradient shrinks by a rate from lag to lag."""
    config = dataclasses.replace(CONFIG, window=window, every=every, steps=steps)
    state = types.SimpleNamespace(step=steps, tape=types.SimpleNamespace(nbytes=8))
    curve = [(steps // 2, 3.5), (steps, 2.5)]
    progress = TrainingProgress(state, curve, list(held_out), seconds)
    norms = jnp.asarray(rate ** np.arange(24), jnp.float32)
    return RunResult(config, progress, jaxbptt.ByLag({"w": norms}, norms, {"w": norms}))


def test_by_the_second_a_run_is_measured_when_the_quickest_ends():
    slow = run_result(12, 0.7, seconds=10.0, held_out=[(0, 4.0), (40, 3.0), (100, 2.0)])
    fast = run_result(12, 0.7, every=12, seconds=2.0)
    (row,) = [row for row in table([slow, fast]).splitlines() if "each after 2.00 s" in row]
    assert row.split()[-2:] == ["3.500", "2.000"]  # the slow one has done 20 steps by then
    assert "each after" not in table([slow])


def line_labelled(ax, pattern):
    (line,) = [line for line in ax.lines if re.fullmatch(pattern, str(line.get_label()))]
    return line


def test_the_picture_has_the_curves_by_step_and_second_and_the_gradient_by_lag():
    runs = [
        run_result(12, 0.75, seconds=10.0, held_out=[(0, 6.0), (50, 3.0), (100, 2.0)]),
        run_result(1, 0.6, seconds=2.0),
    ]
    by_step, by_second, by_lag = picture(runs).axes
    for each, colour in zip(runs, ("#0072B2", "#D55E00"), strict=True):
        progress, label = each.progress, each.config.label
        curve = line_labelled(by_step, f"{label}: 2.00")
        np.testing.assert_array_equal(np.column_stack(curve.get_data()), progress.held_out_curve)
        steps, bits = np.transpose(progress.held_out_curve)
        curve_by_second = line_labelled(by_second, label)
        np.testing.assert_allclose(curve_by_second.get_xdata(), steps * progress.seconds / 100)
        np.testing.assert_array_equal(curve_by_second.get_ydata(), bits)
        norms = line_labelled(by_lag, rf"{label}  0\.\d+ per step")
        np.testing.assert_array_equal(norms.get_ydata(), each.norms.carry)
        assert {curve.get_color(), curve_by_second.get_color()} == {colour}
        assert norms.get_markeredgecolor() == colour
    assert list(line_labelled(by_lag, "end of the window").get_xdata()) == [11.5] * 2
    assert by_lag.get_xlim() == (-0.5, 23.5)
    assert 3.0 < by_step.get_ylim()[1] < 6.0  # there is room for what is learned


def undecodable(folder):
    path = folder / "latin.txt"
    path.write_bytes("né".encode("latin-1") * 4000)
    return path


def written(folder, content):
    path = folder / "content.txt"
    path.write_text(content)
    return path


TEXT_FAULTS = {
    "missing": (lambda folder: folder / "none.txt", "none.txt' cannot be read: No such file"),
    "directory": (lambda folder: folder, "cannot be read: Is a directory"),
    "empty": (lambda folder: written(folder, ""), "is empty"),
    "short": (lambda folder: written(folder, "ab" * 100), "must have 240 characters at least"),
    "one letter": (lambda folder: written(folder, "a" * 5000), "one character 'a' over and over"),
    "undecodable": (undecodable, "must be UTF-8 text, but byte 1 is not"),
}

OPTION_FAULTS = [
    (["--window", "0"], "--window: must be a whole number from 1 to 2147483647, but got '0'"),
    (["--window", "2.5"], "--window: must be a whole number from 1"),
    (["--every", "0"], "--every: must be a whole number from 1"),
    (["--every", "9", "--steps", "8"], "--every must be at most --steps"),
    (["--hidden", "-3"], "--hidden: must be a whole number from 1"),
    (["--batch", "-1"], "--batch: must be a whole number from 1"),
    (["--steps", "9" * 5000], "--steps: must be a whole number from 1"),
    (["--seed", "-1"], "--seed: must be a whole number from 0"),
    (["--learning-rate", "nan"], "--learning-rate: must be a positive number"),
    (["--learning-rate", "0"], "--learning-rate: must be a positive number"),
    (["--out", ""], "--out: must name a folder, but got ''"),
    (["--weights", "old"], "--weights: invalid choice: 'old'"),
    (["--cell", "mlp"], "--cell: invalid choice: 'mlp'"),
    (["--bananas"], "unrecognized arguments: --bananas"),
    (["--text"], "--text: expected one argument"),
]


def assert_one_line(capsys, code, part):
    said, fault = capsys.readouterr()
    assert code == 2
    assert said == ""
    assert fault.count("\n") == 1
    assert fault.startswith("jaxbptt: error: ")
    assert part in fault


@pytest.mark.parametrize("kind", TEXT_FAULTS)
def test_fault_in_the_text(kind, tmp_path, capsys):
    make, part = TEXT_FAULTS[kind]
    arguments = ["--text", str(make(tmp_path)), *SMALL, "--out", str(tmp_path / "out")]
    assert_one_line(capsys, main(arguments), part)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "part"), OPTION_FAULTS, ids=lambda value: str(value)[:30])
def test_fault_in_an_option(options, part, text, tmp_path, capsys):
    arguments = ["--text", str(text), *SMALL, "--out", str(tmp_path / "out"), *options]
    assert_one_line(capsys, main(arguments), part)
    assert not (tmp_path / "out").exists()


def test_out_that_is_no_folder(text, capsys):
    for out in (text, text / "below"):
        code = main(["--text", str(text), *SMALL, "--out", str(out)])
        assert_one_line(capsys, code, "cannot be written: ")


def test_results_that_cannot_be_written(text, tmp_path, capsys):
    (tmp_path / "results.json").mkdir()
    arguments = ["--text", str(text), *SMALL, "--steps", "20", "--no-baseline"]
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    assert "cannot be written: Is a directory" in capsys.readouterr().err
    assert (tmp_path / "parameters.npz").exists()


def test_earlier_results_are_kept(text, tmp_path, capsys):
    arguments = ["--text", str(text), *SMALL, "--no-baseline", "--out", str(tmp_path)]
    assert main([*arguments, "--steps", "20"]) == 0
    assert "an earlier job" not in capsys.readouterr().out
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert set(first) == {"curves.png", "parameters.npz", "results.json"}
    for number, steps in enumerate((30, 20), 1):
        assert main([*arguments, "--steps", str(steps)]) == 0
        told = capsys.readouterr().out
        assert f"has the results of an earlier job: they are in {tmp_path}/earlier-{number}" in told
    moved = {path.name: path.read_bytes() for path in (tmp_path / "earlier-1").iterdir()}
    assert moved == first
    assert json.loads((tmp_path / "earlier-2/results.json").read_text())["settings"]["steps"] == 30


def test_a_group_longer_than_the_window_is_remarked_upon(text, tmp_path, capsys):
    run(text, tmp_path, "--steps", "20", "--every", "7", "--window", "5")
    told = capsys.readouterr().out
    assert "--every 7 is more than --window 5: no gradient comes from 2 of each 7 char" in told
    run(text, tmp_path, "--steps", "20", "--every", "5", "--window", "5")
    assert "note" not in capsys.readouterr().out


def test_model_too_large(text, tmp_path, capsys, monkeypatch):
    def train(*arguments, **options):
        raise jax.errors.JaxRuntimeError("INTERNAL: Out of memory allocating 12000000000000 bytes.")

    monkeypatch.setattr(demo_job, "train", train)
    assert main(["--text", str(text), *SMALL, "--out", str(tmp_path)]) == 2
    fault = capsys.readouterr().err.splitlines()[-1]
    assert fault.startswith("jaxbptt: error: the model is too large. Lower --hidden")


@pytest.mark.parametrize("package", ["optax", "matplotlib", "tqdm"])
def test_missing_package(package, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    code = main(["--text", str(text), "--out", str(tmp_path)])
    assert_one_line(
        capsys, code, f"needs {package}, which is not there. pip install 'jaxbptt[demo]'"
    )


@pytest.mark.parametrize(
    ("module", "unneeded"),
    [("jaxbptt", "optax matplotlib tqdm"), ("jaxbptt._demo.job", "matplotlib")],
)
def test_an_import_needs_no_more_than_it_must(module, unneeded):
    code = f"import {module}, sys; print(*set('{unneeded}'.split()) & set(sys.modules))"
    got = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert got.stdout == "\n"


@pytest.mark.slow
def test_interrupted_it_keeps_what_it_has(text, tmp_path):
    arguments = ["--text", str(text), *SMALL, "--steps", "100000000", "--out", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-m", "jaxbptt", *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        alarm = threading.Timer(PATIENCE, process.kill)
        alarm.start()
        progress = b""
        while b"bits per character" not in progress:
            came = os.read(process.stderr.fileno(), 4096)
            assert came, progress
            progress += came
        process.send_signal(signal.SIGINT)
        said, trouble = process.communicate()
        alarm.cancel()
    assert process.returncode == 130
    assert b"Traceback" not in progress + trouble
    assert b"of 100000000 steps of window 4" in said.splitlines()[-1]
    facts = json.loads((tmp_path / "results.json").read_text())
    (only,) = facts["runs"]
    assert facts["interrupted"] is True
    assert 0 < only["steps"] < 100_000_000
    assert only["curve"][-1][0] == only["steps"]
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    saved = np.load(tmp_path / "parameters.npz")
    params = {name: jnp.asarray(saved[name]) for name in saved.files}
    held_out = prepare("", text.read_text(), streams=4, window=4).held_out
    bits = bits_per_character(model_of(facts), params, held_out)
    assert bits == pytest.approx(only["held_out_bits_after"], rel=1e-5)


def impatient(*arguments, stop_asked, **options):
    """Training during which Ctrl-C is pressed twice."""
    signal.raise_signal(signal.SIGINT)
    assert stop_asked()
    signal.raise_signal(signal.SIGINT)


def test_a_second_interrupt_does_not_wait(text, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(demo_job, "train", impatient)
    before = signal.getsignal(signal.SIGINT)
    assert main(["--text", str(text), *SMALL, "--steps", "60", "--out", str(tmp_path)]) == 130
    told = capfd.readouterr().err
    assert "jaxbptt: stopping; what there is will be saved" in told
    assert "Press Ctrl-C again to end at once" in told
    assert told.endswith("jaxbptt: interrupted before anything was saved\n")
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["job.json"]


def test_a_second_interrupt_tells_of_what_was_saved(text, tmp_path, monkeypatch, capfd):
    def measure(*arguments):  # after training and the last save
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_job.results, "mean_norms_by_lag", measure)
    arguments = ["--text", str(text), *SMALL, "--steps", "60", "--out", str(tmp_path)]
    assert main(arguments) == 130
    told = capfd.readouterr().err.splitlines()[-1]
    assert told.startswith("jaxbptt: interrupted; run the same command with --resume")


def test_the_least_numbers_that_options_take():
    least = "--window 1 --every 1 --hidden 1 --batch 1 --steps 1 --seed 0 --save-every 0".split()
    options = vars(parser().parse_args(least))
    names = ("window", "every", "hidden", "batch", "steps", "seed", "save_every")
    assert [options[name] for name in names] == [1, 1, 1, 1, 1, 0, 0]


def test_help_tells_the_default_of_each_option():
    actions = [action for action in parser()._actions if action.dest != "help"]
    assert len(actions) == 14
    for action in actions:
        assert action.help.endswith(")")
        assert "(default: " in action.help
    told = " ".join(parser().format_help().split())
    assert "(default: 8000)" in told
    assert "None" not in told
    assert "False" not in told
