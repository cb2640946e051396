"""How many kernels an update launches on an H100 that need not be there, from the compiled program.

    python benchmarks/kernels.py [--windows 20 200]   # needs jax-cuda12-plugin, -pjrt

Every instruction of the compiled loop's body that is more than a name for something (a fusion, a
library call, a copy) is a kernel, and counts as often as the loops around it run within one
update. A small model's update takes as long as its launches, however fast the chip is.
"""

import argparse
import re

import collectives
import jax
import jax.numpy as jnp
import ways
from accelerators import device
from cells import Shape, problem
from jax.sharding import SingleDeviceSharding

STEPS = 60
# What is no work of its own on the device.
NO_KERNEL = set(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all "
    "opt-barrier copy-done async-done partition-id replica-id".split()
)


def kernels(text: str, updates: int) -> float:
    """Kernels per update of a program whose outermost loop is over so many updates."""
    computations = collectives._computations(text)
    around = collectives._loops_around(computations)
    bodies = {name for text in computations.values() for line in text for name in _run_by(line)}
    count = 0
    for name in bodies & computations.keys():
        trips, _ = around(name)
        if trips[:1] != (updates,):
            continue
        times = 1
        for each in trips[1:]:
            times *= each
        for line in computations[name]:
            match = re.match(r"^\s+(?:ROOT )?%?[\w.\-]+ = .*? ([a-z][\w\-]*)\(", line)
            if match and match[1] not in NO_KERNEL:
                count += times
    return count


def _run_by(line: str) -> list[str]:
    """The computations that an instruction runs as they are, kernel by kernel."""
    names = re.findall(r"\bbody=%?([\w.\-]+)", line)
    for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
        names += [name.strip().lstrip("%") for name in branches.split(",")]
    names += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
    if re.search(r" call\(", line):
        names += re.findall(r"to_apply=%?([\w.\-]+)", line)
    return names


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", nargs="*", type=int, default=[20, 200])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 32])
    args = parser.parse_args()
    where = SingleDeviceSharding(device("h100"))
    print("| B | window | current | pace 1 | pace 4 |\n|---|---|---|---|---|")
    for batch in args.batches:
        for window in args.windows:
            model = problem(Shape("LSTM", batch, 128, 256, window), STEPS)
            programs = [ways.recorded(model, window, "current")]
            programs += [ways.paced(model, window, pace) for pace in (1, 4)]
            found = []
            for function, state in programs:
                like = jax.tree.map(
                    lambda v: jax.ShapeDtypeStruct(jnp.shape(v), v.dtype, sharding=where), state
                )
                found.append(kernels(function.lower(like).compile().as_text(), STEPS))
            print(f"| {batch} | {window} | {' | '.join(map(str, found))} |", flush=True)


if __name__ == "__main__":
    main()
