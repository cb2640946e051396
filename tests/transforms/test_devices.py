"""Many devices and processes: the same results, and only the communication there has to be."""

import contextlib
import functools
import importlib.util
import itertools
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import one_process
import oracles
import pytest
from harness import PATIENCE, drawer, grid
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import entered, laid, mesh_of

import jaxbptt

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight devices (the CPU has them under conftest.py)"
)


def from_file(path):
    """A module that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hlo = from_file(ROOT / "benchmarks" / "collectives.py")

# The batch's size is no other's, so that an array of the whole batch can be told by its shape.
BATCH, INPUTS, HIDDEN, OUTPUTS, T, WINDOW = 40, 3, 96, 80, 6, 4
WEIGHTS = ["stored", "current", "replayed"]
KINDS = ["Auto", "Explicit"]
draw = drawer()


PARAMS = {
    "wx": draw(INPUTS, HIDDEN),
    "wh": draw(HIDDEN, HIDDEN) / HIDDEN**0.5,
    "b": draw(HIDDEN),
    "wy": draw(HIDDEN, OUTPUTS),
}
ARGS = PARAMS, draw(BATCH, HIDDEN), draw(T, BATCH, INPUTS), draw(T, BATCH, OUTPUTS)


def cell(params, h, x):
    h = jnp.tanh(x @ params["wx"] + h @ params["wh"] + params["b"][None])
    return h, h


def with_head(params, h, x):
    h, _ = cell(params, h, x)
    return h, h @ params["wy"]


def with_loss(params, h, row):
    x, target = row
    h, y = with_head(params, h, x)
    return h, jnp.mean((y - target) ** 2)


def as_it_is(value):
    return value


def online(
    params, carry, xs, targets, *, step=cell, mean=jnp.mean, lay=as_it_is, use=as_it_is,
    reduce=as_it_is, **settings,
):  # fmt: skip
    """SGD at every step; head and loss are in the loop, as far as the step leaves them out."""
    rec = jaxbptt.record(step, window=WINDOW, **settings)

    def update(state, row):
        params, tape = state

        def loss_fn(params):
            new_tape, y = rec(params, tape, row if step is with_loss else row[0])
            y = y @ params["wy"] if y.shape[-1:] == (HIDDEN,) else y
            return y if step is with_loss else mean((y - row[1]) ** 2), lay(new_tape)

        (loss, tape), grads = jax.value_and_grad(loss_fn, has_aux=True)(use(params))
        grads = reduce(grads)
        return (jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), tape), reduce(loss)

    first = (xs[0], targets[0]) if step is with_loss else xs[0]
    state = params, rec.init(params, carry, first)
    (params, tape), losses = lax.scan(update, state, (xs, targets))
    return params, losses, tape.carry, tape.length


def by_scan(params, carry, xs, targets, *, window, step=with_head, mean=jnp.mean):
    """Loss and gradient of a whole run."""

    def loss_fn(params, carry):
        _, ys = jaxbptt.scan(lambda h, x: step(params, h, x), carry, xs, window=window)
        return mean((ys - targets) ** 2)

    return jax.value_and_grad(loss_fn, argnums=(0, 1))(params, carry)


BY_BATCH = P(), P("data"), P(None, "data"), P(None, "data")


def nbytes(tree):
    return sum(v.nbytes for v in jax.tree.leaves(tree))


def whole_batches(text):
    """The arrays in a program, as one device holds them, that have a row of all the batch."""
    return [s for s in hlo.arrays(text) if str(BATCH) in re.findall(r"\d+", s.split("[")[1])]


def reduced(text, depth):
    """Bytes that a program reduces at this depth of loops; nothing else may be communicated."""
    found = hlo.collectives(text)
    assert {c.kind for c in found} <= {"all-reduce"}, found
    return sum(c.bytes for c in found if c.depth == depth)


def ran(run, mesh, specs=BY_BATCH, args=ARGS):
    """What a function gives of arguments laid over a mesh, and the text of its program."""
    kinds = set(mesh.axis_types)
    with entered(mesh) if AxisType.Explicit in kinds else contextlib.nullcontext():
        args = laid(mesh, specs, args)
        compiled = run.lower(*args).compile()
        return compiled(*args), compiled.as_text()


@functools.cache
def on_one_device(weights):
    """What the loop gives of all the batch on one device."""
    return jax.device_get(jax.jit(functools.partial(online, weights=weights))(*ARGS))


# ------------------------------------------------------------- the batch laid over devices

LOOPS = list(itertools.product(WEIGHTS, KINDS))


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("weights", "kind"),
    grid(LOOPS, always=[("stored", "Auto"), ("current", "Explicit")]),
)
def test_a_batch_over_devices_reduces_each_weight_once_an_update_and_no_more(weights, kind):
    run = jax.jit(functools.partial(online, weights=weights))
    got, text = ran(run, mesh_of(kind, data=8))
    oracles.check("a batch over devices", jax.device_get(got), on_one_device(weights), 1e-12)
    assert not whole_batches(text)
    loops = {c.trips for c in hlo.collectives(text)}
    assert loops == {(T,)}, "in the loop over the updates, and in no loop inside"
    assert reduced(text, depth=1) == nbytes(PARAMS) + 8  # and the loss


HEADS = {
    "head": (with_head, {"weights": "current"}),
    "loss": (with_loss, {"weights": "stored", "every": 3}),
}


@pytest.mark.exhaustive
@pytest.mark.compiled
@pytest.mark.parametrize("name", HEADS)
def test_with_a_head_in_the_step_the_newest_step_is_reduced_apart(name):
    step, settings = HEADS[name]
    # Two programs then pull back the window, one with the head and one without.
    run = jax.jit(functools.partial(online, step=step, **settings))
    got, text = ran(run, mesh_of(data=8))
    oracles.check("a head in the step", got, run(*ARGS), 1e-12)
    assert not whole_batches(text)
    head = PARAMS["wy"].nbytes
    assert nbytes(PARAMS) < reduced(text, depth=1) <= 2 * (nbytes(PARAMS) - head) + head + 8
    assert reduced(text, depth=2) == 0


@pytest.mark.exhaustive
@pytest.mark.compiled
def test_another_layout_of_the_ring_is_seen():
    # What the test before last reads from the program does change where the ring lies otherwise.
    mesh = mesh_of(data=8)
    everywhere = NamedSharding(mesh, P())

    def lay(tape):
        return jax.tree.map(lambda v: lax.with_sharding_constraint(v, everywhere), tape)

    run = jax.jit(functools.partial(online, weights="current", lay=lay))
    _, text = ran(run, mesh)
    assert whole_batches(text)
    assert "all-gather" in {c.kind for c in hlo.collectives(text)}


SCANS = list(itertools.product([WINDOW, None], KINDS))


@pytest.mark.compiled
@pytest.mark.parametrize(("window", "kind"), grid(SCANS, always=[(WINDOW, "Explicit")]))
def test_scan_over_devices_reduces_each_weight_once_for_the_whole_run(window, kind):
    run = jax.jit(functools.partial(by_scan, window=window))
    got, text = ran(run, mesh_of(kind, data=8))
    oracles.check("scan over devices", jax.device_get(got), run(*ARGS), 1e-12)
    assert not whole_batches(text)
    assert reduced(text, depth=0) == nbytes(PARAMS) + 8
    assert reduced(text, depth=1) == 0


# -------------------------------------------------------- hidden units laid over devices

BY_COLUMNS = {"wx": P(None, "model"), "wh": P(None, "model"), "b": P("model")}
BY_COLUMNS |= {"wy": P("model", None)}


@pytest.mark.compiled
@pytest.mark.parametrize("weights", grid(WEIGHTS, always=["replayed"]))
def test_hidden_units_over_devices(weights):
    data, model = 2, 4
    run = jax.jit(functools.partial(online, weights=weights))
    specs = BY_COLUMNS, P("data", "model"), *BY_BATCH[2:]
    got, text = ran(run, mesh_of(data=data, model=model), specs)
    oracles.check("hidden units over devices", got, on_one_device(weights), 1e-12)
    assert not whole_batches(text)
    found = hlo.collectives(text)
    assert {c.kind for c in found} <= {"all-reduce", "all-gather"}
    over_data = [c for c in found if c.group == data]
    assert {(c.kind, c.depth) for c in over_data} == {("all-reduce", 1)}
    assert sum(c.bytes for c in over_data) == nbytes(PARAMS) // model + 8
    # At each lag λ, and where the window is run again h: of one step, all its hidden units.
    in_chain = [c for c in found if c.depth == 2]
    again = weights == "replayed"
    assert sorted(c.kind for c in in_chain) == ["all-gather"] * again + ["all-reduce"]
    assert {c.bytes for c in in_chain} == {8 * BATCH // data * HIDDEN}


# --------------------------------------------------------------------- shard_map


def mean_of_all(values):
    return lax.pmean(jnp.mean(values), "data")


def vary(tree):
    """The same values, held apart on each device, so that no gradient is reduced unasked."""
    if hasattr(lax, "pcast"):
        return jax.tree.map(lambda v: lax.pcast(v, "data", to="varying"), tree)
    return jax.tree.map(lambda v: lax.pvary(v, "data"), tree)


def mapped(function, out_specs, in_specs=BY_BATCH):
    return jax.jit(
        jax.shard_map(
            function, mesh=mesh_of(data=8), in_specs=in_specs, out_specs=out_specs, check_vma=True
        )
    )


def centred(mean, step=with_head):
    """A step that takes from its state the mean over the batch, all of it."""

    def centred_step(params, h, x):
        h, y = step(params, h, x)
        return h - mean(h), y

    return centred_step


def rows_mean(h):
    return jnp.mean(h, axis=0, keepdims=True)


def rows_mean_of_all(h):
    return lax.pmean(rows_mean(h), "data")


@pytest.mark.parametrize("weights", grid(WEIGHTS, always=["replayed"]))
def test_shard_map_of_a_loop_whose_step_reduces(weights):
    run = functools.partial(online, weights=weights)
    want = jax.jit(functools.partial(run, step=centred(rows_mean)))(*ARGS)
    inside = functools.partial(run, step=centred(rows_mean_of_all), mean=mean_of_all)
    got = mapped(inside, (P(), P(), P("data"), P()))(*ARGS)
    oracles.check("a step that reduces, in shard_map", got, want, 1e-12)


@pytest.mark.parametrize("window", grid([WINDOW, None], always=[WINDOW]))
def test_shard_map_of_a_scan_whose_step_reduces(window):
    run = functools.partial(by_scan, window=window)
    want = jax.jit(functools.partial(run, step=centred(rows_mean)))(*ARGS)
    inside = functools.partial(run, step=centred(rows_mean_of_all), mean=mean_of_all)
    got = mapped(inside, (P(), (P(), P("data"))))(*ARGS)
    oracles.check("scan of a step that reduces, in shard_map", got, want, 1e-12)


SUMMED = [*((cell, w) for w in WEIGHTS), (with_head, "current")]


@pytest.mark.compiled
@pytest.mark.parametrize(("step", "weights"), grid(SUMMED, always=[(with_head, "current")]))
def test_shard_map_reduces_outside_the_loop_over_the_lags_whatever_the_sizes(step, weights):
    # With this batch a product is smaller than its operands, and summed inside the loop.
    params, carry, xs, targets = ARGS
    args = params, *(np.concatenate([v] * 64, axis) for v, axis in ((carry, 0), (xs, 1)))
    args = *args, np.concatenate([targets] * 64, 1)
    run = mapped(
        functools.partial(online, step=step, weights=weights, mean=mean_of_all),
        (P(), P(), P("data"), P()),
    )
    text = run.lower(*args).compile().as_text()
    assert reduced(text, depth=1) >= nbytes(PARAMS) + 8
    assert reduced(text, depth=2) == 0


@pytest.mark.compiled
def test_shard_map_reduces_once_what_the_caller_reduces():
    # A head in the step has its window pulled back in two parts; these are added before.
    def once(tree):
        return jax.tree.map(lambda v: lax.pmean(v, "data"), tree)

    run = functools.partial(online, step=with_head, weights="current")
    program = mapped(functools.partial(run, use=vary, reduce=once), (P(), P(), P("data"), P()))
    compiled = program.lower(*ARGS).compile()
    oracles.check("reduced by the caller", compiled(*ARGS), jax.jit(run)(*ARGS), 1e-12)
    text = compiled.as_text()
    assert {c.trips for c in hlo.collectives(text)} == {(T,)}
    assert reduced(text, depth=1) == nbytes(PARAMS) + 8


# --------------------------------------------------------------------- processes


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def all_said(running):
    """What each of some processes printed; when one fails, the others wait for it no longer."""
    with ThreadPoolExecutor(len(running)) as pool:
        ends = [pool.submit(process.communicate, timeout=PATIENCE) for process in running]
        try:
            for end in as_completed(ends):
                end.result()
                if any(process.returncode for process in running):
                    break
        finally:
            for process in running:
                process.kill()
    return [end.result() for end in ends]


def trained_in(tmp_path, processes, devices):
    """What `one_process.py` writes, run by so many processes that have so many devices each."""
    out, port = tmp_path / f"{processes}.npz", str(free_port())
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, one_process.__file__, port, str(processes)]
    running = [
        subprocess.Popen(
            [*command, str(i), str(out)],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(processes)
    ]
    said = all_said(running)
    assert not any(process.returncode for process in running), said
    assert all(f"{processes} processes, {processes * devices} devices" in o for o, _ in said)
    with np.load(out) as found:
        return dict(found)


def test_when_a_process_fails_the_others_end():
    codes = "import threading; threading.Event().wait()", "raise SystemExit(3)"
    running = [subprocess.Popen([sys.executable, "-c", code]) for code in codes]
    assert len(all_said(running)) == 2
    assert running[0].returncode != 0
    assert running[1].returncode == 3


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (4, 1)])
def test_processes_train_as_one_does(processes, devices, tmp_path):
    got = trained_in(tmp_path, processes, devices)
    one = jax.devices()[:1]
    want = one_process.results(one)
    assert got.keys() == want.keys()
    for name, value in want.items():
        oracles.check(f"{processes} processes, {name}", got[name], value, 1e-12)


# -------------------------------------------------------------------------- a pod


@pytest.mark.slow
def test_a_pod_of_tpus_reduces_once_an_update_and_sends_one_step_at_each_lag():
    pytest.importorskip("libtpu", reason="needs libtpu, which compiles for a TPU that is not there")
    sizes = "--topology v5e:4x4 --layouts 16x1 8x2 --windows 4 --hidden 512 --batch 64".split()
    program = ROOT / "benchmarks" / "pod.py"
    done = subprocess.run(
        [sys.executable, program, *sizes],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "each" in line]
    weights = 2 * (256 * 4 * 512 + 3 * 512 * 4 * 512 + 2 * 4 * 512 + 512 * 256)  # bfloat16
    batch_only = [row for row in rows if row[0] == "16x1"]
    assert {row[2] for row in batch_only} == {"each update"}
    assert sum(float(row[6]) for row in batch_only) == pytest.approx(weights / 1e6, abs=0.01)
    both = [row for row in rows if row[0] == "8x2"]
    over_data = [row for row in both if row[4] == "8"]
    assert {(row[2], row[3]) for row in over_data} == {("each update", "all-reduce")}
    assert sum(float(row[6]) for row in over_data) == pytest.approx(weights / 2e6, abs=0.01)
    at_each_lag = [row for row in both if row[2] == "each lag"]
    assert at_each_lag
    assert {row[4] for row in at_each_lag} <= {"2", ""}
