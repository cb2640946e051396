"""Compiles the online loop and `scan` for a TPU v5e or an H100 that need not be there.

    python benchmarks/accelerators.py tpu                     # needs libtpu
    python benchmarks/accelerators.py h100                    # needs jax-cuda12-plugin, -pjrt

prints a line of JSON for each program: bytes of temporaries, and in how many loops its ring-shaped
copies and its weight-sized products are. All programs are a loop over updates; the loop over
the lags is inside it. For a TPU also the bytes that one update moves: the compiler's analysis
counts the body of a loop once, so this is of the same update with every loop unrolled. How fast it
would run, a compiler can't say.
"""

import argparse
import dataclasses
import json
import math
import os
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


def programs(shape, steps=STEPS):
    """Each program's (function, state), of so many steps, and of one chunk at least."""
    model, window = problem(shape, steps), shape.window
    whole = problem(shape, max(steps, window))
    narrow = in_bfloat16(model)
    return {
        "re-run": ways.rerun(model, window),
        "current": ways.recorded(model, window, "current"),
        "stored": ways.recorded(model, window, "stored"),
        "bfloat16 re-run": ways.rerun(narrow, window),
        "bfloat16 current": ways.recorded(narrow, window, "current"),
        "grad(lax.scan)": ways.chunks(whole, window),
        "jaxbptt.scan": ways.scanned_chunks(whole, window),
    }


def facts(compiled, shape):
    """What the compiled program says."""
    text = compiled.as_text()
    ring = f"[{shape.window},"
    # A copy-start moves between the memories of a TPU, and is no copy beside another.
    copies = collectives.instructions(text, "copy")
    products = collectives.instructions(text, PRODUCTS)
    weights = 4 * shape.hidden**2  # numbers, in whatever shape and however many pieces
    return {
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "ring copies by depth": sorted(depth for depth, _, s in copies if ring in s),
        "weight products by depth": sorted(d for d, _, s in products if numbers(s) >= weights),
    }


def moved(function, like):
    """Bytes that one call moves by the compiler's count, with every scan in it unrolled."""
    leaves = jax.tree.leaves(like)
    run = jax.extend.core.jaxpr_as_fun(unrolled(jax.make_jaxpr(function)(like)))
    donated = jax.jit(run, donate_argnums=range(len(leaves)))
    return int(donated.lower(*leaves).compile().cost_analysis()["bytes accessed"])


def unrolled(closed):
    """The same program, all trips of each of its scans one after the other."""

    def inner(value):
        return unrolled(value) if isinstance(value, jax.extend.core.ClosedJaxpr) else value

    eqns = []
    for eqn in closed.jaxpr.eqns:
        params = {k: inner(v) for k, v in eqn.params.items()}
        if eqn.primitive.name == "scan":
            params["unroll"] = params["length"]
        eqns.append(eqn.replace(params=params))
    return jax.extend.core.ClosedJaxpr(closed.jaxpr.replace(eqns=eqns), closed.consts)


def numbers(shape):
    """How many there are in an array, such as 12 in "f32[3,4]"."""
    return math.prod(int(n) for n in shape.split("[")[1].rstrip("]").split(",") if n)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=("tpu", "h100"))
    parser.add_argument("--text", type=Path, help="a folder for the programs' texts")
    args = parser.parse_args()
    where = SingleDeviceSharding(device(args.target))
    updates = programs(SHAPE, 1) if args.target == "tpu" else {}
    for name, (function, state) in programs(SHAPE).items():
        like = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=where), state)
        compiled = function.lower(like).compile()
        if args.text:
            args.text.mkdir(exist_ok=True, parents=True)
            (args.text / f"{name}.txt").write_text(compiled.as_text())
        found = {"program": name} | facts(compiled, SHAPE)
        if name in updates:
            found["bytes moved by an update"] = moved(updates[name][0], like)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
