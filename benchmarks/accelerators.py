"""Compiles the online loop and `scan` for a TPU v5e or an H100 that need not be there.

    python benchmarks/accelerators.py tpu                     # needs libtpu
    python benchmarks/accelerators.py h100 --cells stack LRU  # needs jax-cuda12-plugin, -pjrt

prints a line of JSON for each program: bytes of scratch, in all memories of the device; in how many
loops its ring-shaped copies and its weight-sized products are; and for a TPU the bytes that one
update moves. All programs are a loop over updates; the loop over the lags is inside it.

The compiler's count of bytes takes the body of a loop once, however often it runs: that is the
update with one lag. What another lag moves is what the count grows by for each when the loops
over the lags take four a trip and not two. How fast it would run, a compiler can't say.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import tempfile
from pathlib import Path

import collectives
import jax
import jax.extend
import jax.numpy as jnp
import ways
from cells import Shape, gated, problem
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

SHAPE = Shape("LSTM", 32, 128, 256, 20)
STEPS = 60
H100 = Path(__file__).parent / "h100.txtpb"
CELLS = ("GRU", "stack", "LRU", "LIF", "language")
PRODUCTS = "dot|convolution|custom-call"


def device(target):
    """A device of the target, for the compiler only."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    jax.config.update("jax_platforms", "cpu")  # or the plugin looks for a device
    if target == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    return topologies.get_topology_desc(
        "1x1x1", platform="cuda", target_config=H100.read_text(), topology="1x1x1"
    ).devices[0]


def in_bfloat16(model):
    """Products of bfloat16, added up in float32; parameters, gates and carry in float32."""

    def step(params, carry, x):
        (h, c), narrow = carry, jnp.bfloat16
        products = x.astype(narrow) @ params["wx"].astype(narrow)
        products += h.astype(narrow) @ params["wh"].astype(narrow)
        return gated(products.astype(jnp.float32) + params["b"], c)

    return dataclasses.replace(model, step=step)


def programs(shape):
    """Each program's (function, state)."""
    model, window = problem(shape, STEPS), shape.window
    narrow = in_bfloat16(model)
    return {
        "re-run": ways.rerun(model, window),
        "current": ways.recorded(model, window, "current"),
        "stored": ways.recorded(model, window, "stored"),
        "bfloat16 re-run": ways.rerun(narrow, window),
        "bfloat16 current": ways.recorded(narrow, window, "current"),
        "grad(lax.scan)": ways.chunks(model, window),
        "jaxbptt.scan": ways.scanned_chunks(model, window),
        "bfloat16 jaxbptt.scan": ways.scanned_chunks(narrow, window),
    }


def few_programs(shape):
    """Those of them that are looked at of every other cell."""
    model, window = problem(shape, STEPS), shape.window
    return {
        "re-run": ways.rerun(model, window),
        "current": ways.recorded(model, window, "current"),
        "stored": ways.recorded(model, window, "stored"),
        "jaxbptt.scan": ways.scanned_chunks(model, window),
    }


def main_job():
    """What `python -m jaxbptt` compiles, as it is without options."""
    from jaxbptt._demo import cli, job, model, train

    config = job.config_of(cli.parser().parse_args([]))
    cell = model.Model(config.cell, config.hidden, symbols=60)
    learner = train.make_learner(cell, config)
    row = jnp.zeros((train.BLOCK, config.batch), jnp.int32)
    return ways.block(learner.update, (row, row)), train.initial_state(learner, cell, config)


def facts(text, shape):
    """What the compiled program's text says."""
    ring = f"[{shape.window},"
    # A copy-start moves between the memories of a TPU, and is no copy beside another.
    copies = collectives.instructions(text, "copy")
    products = collectives.instructions(text, PRODUCTS)
    weights = 4 * shape.hidden**2  # numbers, in whatever shape and however many pieces
    return {
        "ring copies by depth": sorted(depth for depth, _, s in copies if ring in s),
        "weight products by depth": sorted(d for d, _, s in products if numbers(s) >= weights),
    }


def compiled_with_scratch(lowered):
    """The program, and how many bytes of all memories the compiler sets aside for it to work in.

    Not `memory_analysis`: on a TPU it leaves out the memory on the chip, where all arrays of
    a small program are, and counts the tables of the loops' tuples, 16 KiB for each.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        (text,) = (f.read_text() for f in Path(folder).glob("*-buffer-assignment.txt"))
    sizes = re.findall(r"^allocation \d+: size (\d+),.* preallocated-temp", text, re.MULTILINE)
    return compiled, sum(map(int, sizes))


def moved(function, like, window):
    """Bytes that one update moves, by the compiler's counts of a program that loops over them."""
    one, two, four = (_counted(function, like, lags) for lags in (1, 2, 4))
    return int(one + (window - 1) * (four - two) / 2)


def _counted(function, like, lags):
    """The compiler's count of a program whose inner loops take so many lags a trip."""
    leaves = jax.tree.leaves(like)
    run = jax.extend.core.jaxpr_as_fun(unrolled(jax.make_jaxpr(function)(like), lags))
    donated = jax.jit(run, donate_argnums=range(len(leaves)))
    return donated.lower(*leaves).compile().cost_analysis()["bytes accessed"]


def unrolled(closed, lags, outermost=True):
    """The same program, each scan inside of another taking so many of its trips at once."""

    def inner(value, scan):
        if not isinstance(value, jax.extend.core.ClosedJaxpr):
            return value
        return unrolled(value, lags, outermost and not scan)

    eqns = []
    for eqn in closed.jaxpr.eqns:
        scan = eqn.primitive.name == "scan"
        params = {k: inner(v, scan) for k, v in eqn.params.items()}
        if scan and not outermost:
            params["unroll"] = lags
        eqns.append(eqn.replace(params=params))
    return jax.extend.core.ClosedJaxpr(closed.jaxpr.replace(eqns=eqns), closed.consts)


def numbers(shape):
    """How many there are in an array, such as 12 in "f32[3,4]"."""
    return math.prod(int(n) for n in shape.split("[")[1].rstrip("]").split(",") if n)


def report(name, program, shape, where, counted, folder):
    """Prints the line of one program."""
    function, state = program
    like = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=where), state)
    compiled, scratch = compiled_with_scratch(function.lower(like))
    text = compiled.as_text()
    if folder:
        folder.mkdir(exist_ok=True, parents=True)
        (folder / f"{name}.txt").write_text(text)
    found = {"program": name, "scratch": scratch} | facts(text, shape)
    if counted:
        found["bytes moved by an update"] = moved(function, like, shape.window)
    print(json.dumps(found), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=("tpu", "h100"))
    parser.add_argument("--cells", nargs="*", default=[], choices=CELLS, help="beside the LSTM")
    parser.add_argument("--text", type=Path, help="a folder for the programs' texts")
    args = parser.parse_args()
    where = SingleDeviceSharding(device(args.target))
    for name, program in programs(SHAPE).items():
        report(name, program, SHAPE, where, args.target == "tpu", args.text)
    report("main job", main_job(), SHAPE, where, False, args.text)
    for cell in args.cells:
        shape = dataclasses.replace(SHAPE, cell=cell)
        for name, program in few_programs(shape).items():
            report(f"{cell} {name}", program, shape, where, False, args.text)


if __name__ == "__main__":
    main()
