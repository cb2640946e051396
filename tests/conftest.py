"""Settings for all tests: eight host devices, float64, strict promotion, and few compilations.

Three tiers, by markers: what has none runs by default; `exhaustive` marks the rest of a grid of
which the default has a sample, `slow` whole jobs (notebooks, pages of the documentation, main
jobs). `python -m pytest -m ""` runs all three.

Nearly all of a test's time is XLA compiling. So what was compiled is kept in a folder that all
workers and later runs share, and XLA's costlier passes are off, except for tests marked
`compiled`, which look at the programs that XLA makes.
"""

import gc
import getpass
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(
    os.environ.get("JAX_COMPILATION_CACHE_DIR")
    or Path(tempfile.gettempdir())
    / f"jaxbptt-tests-{getpass.getuser()}-jax-{version('jax')}-jaxlib-{version('jaxlib')}"
)
LARGEST_CACHE = 2**30  # bytes

# Read once, when JAX starts, by this process and by those that tests start.
FLAGS = ["--xla_force_host_platform_device_count=8"]
if (0, 7) <= tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    # Half the time of compiling; later versions have no other way, and refuse the flag.
    FLAGS += ["--xla_cpu_use_fusion_emitters=false"]
FLAGS += ["--xla_cpu_parallel_codegen_split_count=1"]
asked_for = os.environ.get("XLA_FLAGS", "")
FLAGS = [flag for flag in FLAGS if flag.split("=")[0] not in asked_for]
os.environ["XLA_FLAGS"] = " ".join([asked_for, *FLAGS]).strip()
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

# Tracing makes many objects that stay; to look through all of them takes a tenth of a run.
gc.set_threshold(100_000, 50, 100)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# An accelerator would otherwise multiply float32 matrices in fewer bits.
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # once, before the workers start
        forget_oldest(CACHE, LARGEST_CACHE)


def forget_oldest(folder, most):
    """Deletes the files that were not used for longest until the folder has `most` bytes."""
    files = [(file.stat(), file) for file in folder.glob("*")] if folder.exists() else []
    total = sum(stat.st_size for stat, _ in files)
    for stat, file in sorted(files, key=lambda pair: pair[0].st_mtime):
        if total <= most:
            break
        file.unlink(missing_ok=True)
        total -= stat.st_size


@pytest.fixture(autouse=True)
def costly_passes(request):
    """All of XLA's passes for a test marked `compiled`, only the cheap ones for the others."""
    if request.node.get_closest_marker("compiled") is None:
        yield
        return
    # A function that was compiled the other way would be used again.
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def free_programs():
    """Lets go of compiled programs after a file, once there are many: a worker would grow by GB."""
    yield
    if resident_bytes() > 600e6:
        jax.clear_caches()


def resident_bytes():
    """The memory of this process, where the system says so; else infinite."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return float("inf")


def pytest_addoption(parser):
    parser.addoption(
        "--worst-errors", action="store_true", help="list the worst error against each oracle"
    )


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--worst-errors"):
        return
    import oracles

    terminalreporter.section("worst relative errors")
    for label, error in sorted(oracles.WORST.items()):
        terminalreporter.write_line(f"{label:60s} {error:.1e}")
