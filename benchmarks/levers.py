"""The levers that are not in the library, each against the same program without it.

    python benchmarks/levers.py [--repeats 5] [--only NAME ...]

prints for each shape the time of an update (1 is without) and the bytes of the tape. What no
caller could write is put in by patching the library's insides: this goes with the commit that it
is in. The first of them is one taken out: each weight contracted at each lag. Then the levers
that are no part of an update's loop: a step donated, a diagonal chain as an associative scan,
and an LSTM's chain by hand, with its carry shared between slots, with operands read from the
ring once more, and with what depends on parameters alone made at each lag.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import measure
import ways
from all import GRID, prepared
from cells import lstm, problem
from jax import lax

import jaxbptt
from jaxbptt._closure import contraction as _split
from jaxbptt._jaxprs import stacks as _stacks
from jaxbptt._transforms import tape as _tape

SHAPES = [GRID[i] for i in (8, 0, 1, 2, 15, 11, 14, 10)]
NARROW = jnp.bfloat16


# ------------------------------------------------------------ in the online loop


@dataclasses.dataclass(frozen=True)
class Unrolling:
    """`jax.lax`, whose `scan` takes so many trips at once."""

    trips: int

    def __getattr__(self, name):
        """All else is as it is."""
        return getattr(lax, name)

    def scan(self, body, init, xs, reverse, unroll):
        return lax.scan(body, init, xs, reverse=reverse, unroll=unroll * self.trips)


def stored_as(slot, to, back):
    """Patches what the ring keeps of a step: `to` of its residuals, and `back` from there."""
    blank, push, reader = _tape.blank, _tape.push, _tape.reader

    def another_blank(*args):
        tape = blank(*args)
        return dataclasses.replace(tape, _ring=jax.vmap(to)(tape._ring))

    def another_push(tape, carry, residuals):
        return push(tape, carry, to(residuals))

    def another_reader(*args):
        read = reader(*args)
        return lambda lag: back(read(lag))

    return mock.patch.multiple(
        _tape,
        blank=another_blank,
        push=another_push,
        reader=another_reader,
        layout=lambda tape: slot,
    )


def narrow(slot):
    """The ring in bfloat16."""

    def to(residuals):
        return [v.astype(NARROW) if v.dtype == jnp.float32 else v for v in residuals]

    def back(read):
        return [v.astype(kind.dtype) for v, kind in zip(read, slot, strict=True)]

    return stored_as(slot, to, back)


def packed(slot):
    """All leaves in one array."""
    ends = [0]
    for kind in slot:
        ends.append(ends[-1] + math.prod(kind.shape))

    def to(residuals):
        return [jnp.concatenate([jnp.ravel(v) for v in residuals])]

    def back(read):
        pieces = [read[0][a:b] for a, b in itertools.pairwise(ends)]
        return [v.reshape(kind.shape) for v, kind in zip(pieces, slot, strict=True)]

    return stored_as(slot, to, back)


def online(shape, repeats):
    """A line for each lever: the time and the tape's bytes, over those without it."""
    model, steps = prepared(shape)
    rec = jaxbptt.record(model.step, window=shape.window, weights="current")
    x = ways.first(model.xs)
    slot = _tape.layout(jax.eval_shape(rec.init, model.params, model.carry, x))
    policy = jax.checkpoint_policies.dots_saveable
    checked = dataclasses.replace(model, step=jax.checkpoint(model.step, policy=policy))
    unrollings = {f"unrolled by {n}": n for n in (2, 4, shape.window)}
    levers = {"": (model, contextlib.nullcontext())}
    levers |= {
        k: (model, mock.patch.object(_stacks, "lax", Unrolling(n))) for k, n in unrollings.items()
    }
    levers |= {
        "contracted at each lag": (model, mock.patch.object(_split, "_WORTH", 0)),
        "ring in bfloat16": (model, narrow(slot)),
        "ring packed": (model, packed(slot)),
        "jax.checkpoint, dots_saveable": (checked, contextlib.nullcontext()),
    }
    contestants, size = {}, {}
    for name, (problem_, patch) in levers.items():
        with patch:
            function, state = ways.recorded(problem_, shape.window, "current")
            contestants[name] = function.lower(state).compile(), state
            size[name] = state[1].nbytes
    took = measure.medians(contestants, repeats)
    print(f"{shape}: {1e6 * took[''] / steps:.0f} µs")
    for name in filter(None, took):
        print(
            f"  {name}: {took[name] / took['']:.2f}, bytes {size[name] / size['']:.2f}", flush=True
        )


# ------------------------------------------------------------- and beside it


def donation(repeats):
    """A single jitted step with its state donated, and without."""
    for shape in SHAPES[1], SHAPES[3]:
        model = problem(shape, shape.window)
        rec = jaxbptt.record(model.step, window=shape.window, weights="current")
        x = ways.first(model.xs)

        update = functools.partial(ways.updating(model, rec), x=x)
        state = model.params, rec.init(model.params, model.carry, x)
        both = {
            "kept": (jax.jit(update), state),
            "donated": (jax.jit(update, donate_argnums=0), state),
        }
        took = measure.medians(both, 40 * repeats)
        print(f"{shape}: donated {took['donated'] / took['kept']:.2f}", flush=True)


def normalised(wh):
    """A weight whose columns are of length one: what depends on parameters alone."""
    return wh / jnp.linalg.norm(wh, axis=0)


def lstm_by_hand(shape, how):
    """The online loop of an LSTM, its recurrent weight normalised.

    `how` says in what it differs from the library's way:

    * shared: h is made again from the step before, o · tanh(c).
    * gathered: h and x are not emitted by the loop over the lags, but read from the ring anew.
    * in place: nor are they gathered. The gates' cotangents go to their slots' places instead.
    * at each lag: the weight is normalised at each lag.
    """
    model, window, shared = problem(shape, shape.window), shape.window, how == "shared"

    def slot_of(params, carry, x):
        params = params | {"wh": normalised(params["wh"])}
        (h, c), _ = lstm(params, carry, x)
        gates = x @ params["wx"] + carry[0] @ params["wh"] + params["b"]
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        i, f, o, g = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jax.nn.sigmoid(o), jnp.tanh(g)
        slot = {"i": i, "f": f, "g": g, "o": o, "tanh": jnp.tanh(c), "c": carry[1], "x": x}
        return (h, c), slot if shared else slot | {"h": carry[0]}

    def update(state, x):
        params, carry, ring, t = state
        carry, slot = slot_of(params, carry, x)
        # One slot more, for the oldest step's h.
        ring = {k: ways.put(r, slot[k], t % len(r)) for k, r in ring.items()}
        loss, ct_h = jax.value_and_grad(model.loss)(carry[0], x)
        wh, pull = jax.vjp(normalised, params["wh"])

        def at(name, lag):
            leaf = ring[name]
            place = (t - lag) % len(leaf)
            return lax.dynamic_index_in_dim(leaf, place, 0, keepdims=False)

        def trip(state, lag):
            (ct_h, ct_c), places = state
            i, f, g, o, tanh, c = (at(k, lag) for k in ("i", "f", "g", "o", "tanh", "c"))
            ct_c = ct_c + ct_h * o * (1 - tanh**2)
            parts = (
                ct_c * g * i * (1 - i),
                ct_c * c * f * (1 - f),
                ct_c * i * (1 - g**2),
                ct_h * tanh * o * (1 - o),
            )
            ct_gates = jnp.concatenate(parts, axis=1)
            weight = wh
            if how == "at each lag":
                weight = normalised(lax.optimization_barrier((params["wh"], lag))[0])
            lam = ct_gates @ weight.T, ct_c * f
            if how == "in place":
                return (lam, ways.put(places, ct_gates, (t - lag) % window)), ()
            if how == "gathered":
                return (lam, places), (ct_gates,)
            h = at("o", lag + 1) * at("tanh", lag + 1) if shared else at("h", lag)
            return (lam, places), (ct_gates, h, at("x", lag))

        lags = jnp.arange(window)
        places = jnp.zeros((window, *slot["i"].shape[:-1], 4 * slot["i"].shape[-1]))
        begin = (ct_h, jnp.zeros_like(ct_h)), places if how == "in place" else ()
        (_, places), outs = lax.scan(trip, begin, lags)
        if how == "in place":
            outs = places, ring["h"], ring["x"]
        elif how == "gathered":
            outs = *outs, *(ring[k][(t - lags) % window] for k in ("h", "x"))
        ct_gates, hs, xs = outs
        grads = {
            "wh": pull(jnp.einsum("lbh,lbk->hk", hs, ct_gates))[0],
            "wx": jnp.einsum("lbd,lbk->dk", xs, ct_gates),
            "b": jnp.sum(ct_gates, (0, 1)),
        }
        return (ways.sgd(params, grads), carry, ring, t + 1), loss

    like = jax.eval_shape(slot_of, model.params, model.carry, ways.first(model.xs))[1]
    more = ("o", "tanh") if shared else ()
    ring = {k: ways.ring(v, window + (k in more)) for k, v in like.items()}
    return ways.block(update, model.xs), (model.params, model.carry, ring, jnp.int32(0))


def by_hand(repeats):
    """An LSTM's chain by hand, each way against the library's."""
    for shape in SHAPES[:4]:
        ways_ = ("", "shared", "gathered", "in place", "at each lag")
        contestants = {how: lstm_by_hand(shape, how) for how in ways_}
        took = measure.medians(contestants, 4 * repeats)
        size = {
            how: sum(v.nbytes for v in jax.tree.leaves(state[2]))
            for how, (_, state) in contestants.items()
        }
        for how in ways_[1:]:
            ratio, bytes_ = took[how] / took[""], size[how] / size[""]
            print(f"{shape}, by hand: {how} {ratio:.2f}, bytes {bytes_:.2f}", flush=True)


def associative(repeats):
    """λ of a diagonal recurrence over all lags: one after the other, and as an associative scan."""
    for window, batch, hidden in (20, 1, 64), (50, 8, 256), (50, 32, 256), (200, 8, 256):
        phases = jax.random.normal(jax.random.key(0), (window, batch, hidden))
        decays = 0.9 * jnp.exp(1j * phases).astype(jnp.complex64)

        def loop(state):
            decays, lam = state
            body = lambda lam, decay: (decay * lam,) * 2  # noqa: E731
            return state, lax.scan(body, lam, decays)[1]

        def scanned(state):
            decays, lam = state
            return state, lax.associative_scan(jnp.multiply, decays) * lam

        state = decays, jnp.ones((batch, hidden), jnp.complex64)
        both = {"loop": (jax.jit(loop), state), "associative": (jax.jit(scanned), state)}
        # The state comes out as it went in: what is measured is the second output.
        took = measure.medians(both, 10 * repeats)
        shape = f"{window}, {batch}, {hidden}"
        print(f"LRU {shape}: associative {took['associative'] / took['loop']:.2f}", flush=True)


BESIDE = {"donation": donation, "by hand": by_hand, "associative": associative}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=("online", *BESIDE), metavar="NAME")
    args = parser.parse_args()
    chosen = args.only or ["online", *BESIDE]
    if "online" in chosen:
        for shape in SHAPES:
            online(shape, args.repeats)
    for name in BESIDE:
        if name in chosen:
            BESIDE[name](args.repeats)


if __name__ == "__main__":
    main()
