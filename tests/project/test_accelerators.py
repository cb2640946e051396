"""XLA compiles the online loop and `scan` for a TPU and an H100 that are not there, and well.

Needs the compilers: `libtpu` for the one, `jax-cuda12-plugin` and `jax-cuda12-pjrt` of JAX's own
version for the other. `.ci/run accelerators` installs them where it can.
"""

import importlib.util
import json
import subprocess
import sys

import pytest
from harness import PATIENCE, ROOT, environment

pytestmark = pytest.mark.slow

COMPILERS = {"tpu": ("libtpu", "libtpu"), "h100": ("jax_cuda12_plugin", "jax-cuda12-plugin")}


@pytest.fixture(scope="module", params=COMPILERS)
def programs(request):
    """What the compiler says of each program, by name."""
    module, package = COMPILERS[request.param]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"needs {package}, which compiles for a {request.param} that is not there")
    script = ROOT / "benchmarks" / "accelerators.py"
    done = subprocess.run(
        # A process of its own: the compiler is chosen when JAX starts.
        [sys.executable, script, request.param, "--cells", "stack"],
        capture_output=True,
        text=True,
        # All of the compiler's passes, and a program that it makes now.
        env=environment(
            XLA_FLAGS="",
            JAX_DISABLE_MOST_OPTIMIZATIONS=None,
            JAX_ENABLE_COMPILATION_CACHE="false",
        ),
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {each["program"]: each for each in found}


OURS = ["current", "stored", "bfloat16 current"]
SCANS = ["jaxbptt.scan", "bfloat16 jaxbptt.scan"]
# Of three layers, whose stacks are all of one shape.
STACKS = ["stack current", "stack stored", "stack jaxbptt.scan"]


@pytest.mark.parametrize("name", [*OURS, *SCANS, *STACKS, "main job"])
def test_no_copy_of_a_ring_in_any_loop(name, programs):
    assert not [depth for depth in programs[name]["ring copies by depth"] if depth >= 1]


@pytest.mark.parametrize("name", [*OURS, *SCANS, *STACKS])
def test_each_weight_is_contracted_outside_the_loop_over_the_lags(name, programs):
    assert set(programs[name]["weight products by depth"]) == {1}


def test_that_is_where_differentiating_the_window_contracts_them(programs):
    assert 2 in programs["re-run"]["weight products by depth"]


PAIRS = [
    ("current", "re-run"),
    ("stored", "re-run"),
    ("bfloat16 current", "bfloat16 re-run"),
]
MORE_PAIRS = [
    ("jaxbptt.scan", "re-run"),
    ("bfloat16 jaxbptt.scan", "bfloat16 re-run"),
    *((name, "stack re-run") for name in STACKS),
]


@pytest.mark.parametrize(("ours", "theirs"), [*PAIRS, *MORE_PAIRS])
def test_scratch_memory_is_that_of_running_the_window_again_at_most(ours, theirs, programs):
    assert 0 < programs[ours]["scratch"] <= programs[theirs]["scratch"]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_an_update_moves_at_most_half_of_the_bytes_of_running_the_window_again(
    ours, theirs, programs
):
    mine, other = (programs[name].get("bytes moved by an update") for name in (ours, theirs))
    if mine is None:
        pytest.skip("only the TPU's compiler says how many bytes a program moves")
    assert 0 < 2 * mine <= other


def test_with_a_pace_of_1_an_update_launches_as_many_kernels_whatever_the_window():
    if importlib.util.find_spec(COMPILERS["h100"][0]) is None:
        pytest.skip("there is no compiler for an H100: pip install jax-cuda12-plugin")
    command = [sys.executable, "kernels.py", "--windows", "10", "60", "--batches", "1"]
    done = subprocess.run(
        command,
        cwd=ROOT / "benchmarks",
        env=environment(
            PYTHONPATH=str(ROOT),
            XLA_FLAGS="",
            JAX_DISABLE_MOST_OPTIMIZATIONS=None,
            JAX_ENABLE_COMPILATION_CACHE="false",
        ),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    rows = [list(map(int, line.strip("| ").split(" | "))) for line in done.stdout.splitlines()[2:]]
    (_, _, plain, paced, _), (_, _, longer, paced_longer, _) = rows
    assert paced_longer <= paced + 4 < plain
    assert longer > 3 * plain
