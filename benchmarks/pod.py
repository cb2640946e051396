"""Online training of a billion recurrent parameters, compiled for a pod that is not there.

    python benchmarks/pod.py [--topology v5e:16x16] [--slices 1] [--layouts 256x1 64x4]
                             [--windows 8 32 128] [--batch 4096] [--optimizer adam]

One update at every step (`record`, weights="current", SGD or Adam) of a stack of LSTM cells over
symbols, scanned over a block of steps, data × model sharded. XLA compiles it for the topology ahead
of time; needs `pip install libtpu`, and no TPU. Printed for each layout and window: what a chip
holds, and each kind of collective, with how often it runs in one update and the bytes it makes on
one chip, apart for those inside the loop over the lags.

A layout is DATAxMODEL; "256x1+spread" also lays the master parameters and the optimiser's state
over the data axis. Parameters and activations are bfloat16, c of the cells, the master parameters
and the optimiser's state float32.
"""

import argparse
import collections
import dataclasses
import functools
import os
import re
import time

# libtpu would ask for the TPU's own machine, and refuse to be loaded by two processes.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
from collectives import Collective
from collectives import collectives as collectives_of
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbptt

WORDS = 256
STEPS = 100  # of the compiled block: no window's length, or loops could not be told apart
RATE = 1e-3
HALF, FULL = jnp.bfloat16, jnp.float32


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the chips are divided.

    Attributes:
        data: over how many the streams are laid.
        model: over how many the hidden units are laid.
        spread: whether what only the update needs is laid over the data axis too.
    """

    data: int
    model: int
    spread: bool

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """From "64x4" or "64x4+spread"."""
        data, model, spread = re.fullmatch(r"(\d+)x(\d+)(\+spread)?", text).groups()
        return cls(int(data), int(model), bool(spread))

    def __str__(self) -> str:
        """As `parse` takes it."""
        return f"{self.data}x{self.model}" + "+spread" * self.spread


@dataclasses.dataclass(frozen=True)
class Model:
    """A stack of LSTM cells of one width."""

    batch: int
    hidden: int
    layers: int
    optimizer: str

    def params(self, axes: tuple) -> dict:
        """Shapes of the parameters, and where `axes` lie: over the hidden units."""
        h = self.hidden
        cells = [
            {
                "wx": ((n, 4, h), P(None, None, axes)),
                "wh": ((h, 4, h), P(None, None, axes)),
                "b": ((4, h), P(None, axes)),
            }
            for n in [WORDS] + [h] * (self.layers - 1)
        ]
        return {"cells": cells, "head": ((h, WORDS), P(axes, None))}


def cell(params, carry, x, place):
    """An LSTM cell. The gates have their own axis: to cut up a sharded one would move data."""
    h, c = carry
    sums = jnp.einsum("bi,igh->bgh", x, params["wx"]) + jnp.einsum("bi,igh->bgh", h, params["wh"])
    i, f, g, o = jnp.unstack(sums + params["b"], axis=1)
    i, f, o = (jax.nn.sigmoid(v) for v in (i, f, o))
    c = f.astype(FULL) * c + (i * jnp.tanh(g)).astype(FULL)
    h = place(o * jnp.tanh(c.astype(HALF)))
    return (h, place(c)), h


def step_of(place):
    """One step of the stack; the last layer's h is the output, and the head is outside."""

    def step(params, carry, word):
        x, new = jax.nn.one_hot(word, WORDS, dtype=HALF), []
        for cell_params, cell_carry in zip(params, carry, strict=True):
            cell_carry, x = cell(cell_params, cell_carry, x, place)
            new.append(cell_carry)
        return new, x

    return step


def sgd(params, state, grads):
    return jax.tree.map(lambda p, g: p - RATE * g.astype(FULL), params, grads), state


def adam(params, state, grads):
    first, second, count = state
    count += 1
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g.astype(FULL), first, grads)
    second = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g.astype(FULL) ** 2, second, grads)
    size = RATE * jnp.sqrt(1 - 0.99**count) / (1 - 0.9**count)
    move = functools.partial(jax.tree.map, lambda p, m, v: p - size * m / (jnp.sqrt(v) + 1e-8))
    return move(params, first, second), (first, second, count)


OPTIMIZERS = {"sgd": sgd, "adam": adam}


def program(model: Model, layout: Layout, window: int, devices):
    """The block of updates, and the shapes and places of its arguments (state, rows)."""
    mesh = Mesh(np.array(devices).reshape(layout.data, layout.model), ("data", "model"))
    where = functools.partial(NamedSharding, mesh)
    place = functools.partial(lax.with_sharding_constraint, shardings=where(P("data", "model")))
    rec = jaxbptt.record(step_of(place), window=window, weights="current")
    working = jax.tree.map(
        lambda leaf: where(leaf[1]),
        model.params(("model",)),
        is_leaf=lambda v: isinstance(v, tuple),
    )

    def update(state, row):
        params, opt_state, tape = state
        word, target = row
        half = jax.tree.map(lambda v: v.astype(HALF), params)
        half = lax.with_sharding_constraint(half, working)

        def loss_fn(half):
            new_tape, h = rec(half["cells"], tape, word)
            scores = jax.nn.log_softmax((h @ half["head"]).astype(FULL))
            return -jnp.mean(jnp.take_along_axis(scores, target[:, None], 1)), new_tape

        (loss, tape), grads = jax.value_and_grad(loss_fn, has_aux=True)(half)
        grads = lax.with_sharding_constraint(grads, working)
        return (*OPTIMIZERS[model.optimizer](params, opt_state, grads), tape), loss

    def array(shape, spec, dtype=FULL):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where(spec))

    axes = ("model", "data") if layout.spread else ("model",)
    params = jax.tree.map(
        lambda leaf: array(*leaf), model.params(axes), is_leaf=lambda v: isinstance(v, tuple)
    )
    opt_state = (params, params, array((), P(), jnp.int32)) if model.optimizer == "adam" else ()
    shape = model.batch, model.hidden
    rows = P("data", "model")
    carry = [(array(shape, rows, HALF), array(shape, rows)) for _ in range(model.layers)]
    words = array((STEPS, model.batch), P(None, "data"), jnp.int32)
    half = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, HALF), params["cells"])
    tape = jax.eval_shape(rec.init, half, carry, jax.ShapeDtypeStruct((model.batch,), jnp.int32))
    tape = dataclasses.replace(tape, carry=carry)
    run = jax.jit(lambda state, rows: lax.scan(update, state, rows), donate_argnums=0)
    return run, ((params, opt_state, tape), (words, words))


def on_chip(shapes, shardings) -> int:
    """Bytes of one chip's part of some arrays."""
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return sum(
        int(np.prod(s.shard_shape(v.shape), dtype=np.int64)) * v.dtype.itemsize for v, s in pairs
    )


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiled program says of one chip, in bytes."""

    seconds: float  # to compile
    params: int
    opt_state: int
    ring: int
    temporary: int
    total: int
    collectives: list[Collective]

    def by_kind(self) -> dict:
        """(inside the loop over the lags, kind, group): how often in one update, and bytes."""
        found = collections.defaultdict(lambda: [0, 0])
        for c in self.collectives:
            if c.trips[:1] != (STEPS,):
                continue  # before the first update: part of it, where updates overlap
            times = c.passes * int(np.prod(c.trips[1:]))
            entry = found[c.depth > 1, c.kind, c.group]
            entry[0] += times
            entry[1] += times * c.bytes
        return dict(found)


def report(model: Model, layout: Layout, window: int, devices) -> Report | str:
    """What the compiled program says, or what the compiler says of why there is none."""
    run, args = program(model, layout, window, devices)
    begun = time.perf_counter()
    try:
        compiled = run.lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed, there = re.findall(r"\(?(\d+\.\d+G)\)?", str(error))[:2]
        return f"does not fit: temporaries of {needed} where a chip has {there}"
    seconds = time.perf_counter() - begun
    (params, opt_state, tape), _ = args
    places, _ = compiled.input_shardings[0]
    memory = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return Report(
        seconds,
        on_chip(params, places[0]),
        on_chip(opt_state, places[1]),
        on_chip(tape._ring, places[2]._ring),
        memory.temp_size_in_bytes,
        arguments - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
        collectives_of(compiled.as_text()),
    )


def lines(layout: Layout, window: int, made: Report | str):
    """The row of the first table, then those of the second."""
    if isinstance(made, str):
        yield [layout, window, made, *[""] * 5]
        return
    sizes = made.params, made.opt_state, made.ring, made.temporary, made.total
    memory = [layout, window, *(f"{v / 1e6:,.0f}" for v in sizes), f"{made.seconds:.0f}"]
    yield memory
    for (in_chain, kind, group), (times, size) in sorted(made.by_kind().items()):
        where = "each lag" if in_chain else "each update"
        yield [layout, window, where, kind, group or "", times, f"{size / 1e6:,.2f}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:16x16", help="of one slice")
    parser.add_argument("--slices", type=int, default=1, help="joined by the data centre's network")
    parser.add_argument("--layouts", nargs="+", default=["256x1", "256x1+spread", "64x4", "32x8"])
    parser.add_argument("--windows", nargs="+", type=int, default=[8, 32, 128])
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=9216)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adam")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # libtpu would look for a TPU
    several = {"num_slices": args.slices} if args.slices > 1 else {}
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=args.topology, **several
    ).devices
    model = Model(args.batch, args.hidden, args.layers, args.optimizer)
    shapes = jax.tree.leaves(model.params(()), is_leaf=lambda v: isinstance(v, tuple))
    count = sum(int(np.prod(shape)) for shape, _ in shapes)
    print(f"jax {jax.__version__}, {len(devices)} of {devices[0].device_kind}, {model}")
    print(f"{count / 1e9:.3f} billion parameters\n")
    tables = [], []
    for layout in map(Layout.parse, args.layouts):
        for window in args.windows:
            first, *others = lines(layout, window, report(model, layout, window, devices))
            tables[0].append(first)
            tables[1].extend(others)
    heads = (
        "layout|window|params|optimiser|ring|temporary|total MB|compiled in s",
        "layout|window|where|collective|chips|times an update|MB an update",
    )
    for head, rows in zip(heads, tables, strict=True):
        print("| " + head.replace("|", " | ") + " |")
        print("|---" * (head.count("|") + 1) + "|")
        for row in rows:
            print("| " + " | ".join(map(str, row)) + " |")
        print()


if __name__ == "__main__":
    main()
