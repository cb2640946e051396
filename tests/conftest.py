"""Settings for all tests: eight host devices, float64, strict promotion, no silent ranks."""

import collections
import os

# Read once, when JAX starts: it must stand before the first import of jax.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# An accelerator would otherwise multiply float32 matrices in fewer bits.
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_addoption(parser):
    parser.addoption(
        "--worst-errors", action="store_true", help="list the worst error against each oracle"
    )
    parser.addoption(
        "--at-most", type=int, metavar="N", help="of each test function, so many of its cases"
    )


def pytest_collection_modifyitems(config, items):
    most = config.getoption("--at-most")
    if not most:
        return
    cases = collections.defaultdict(list)
    for item in items:
        cases[item.nodeid.split("[")[0]].append(item)
    kept = {
        id(some[i * (len(some) - 1) // max(1, most - 1)])  # the first, the last, some between
        for some in cases.values()
        for i in range(most)
    }
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--worst-errors"):
        return
    import oracles

    terminalreporter.section("worst relative errors")
    for label, error in sorted(oracles.WORST.items()):
        terminalreporter.write_line(f"{label:60s} {error:.1e}")
