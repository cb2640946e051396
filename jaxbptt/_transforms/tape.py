"""The tape: the live carry beside a ring of residuals, a pytree of fixed size.

A ring is a list of arrays with one slot for each of the last `window` steps. All
counters stay below `window` or `every`, so nothing overflows however long the loop.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from jaxbptt import _errors
from jaxbptt._arrays import Packing, as_strong_arrays, size_in_bytes, structs_of, zeros
from jaxbptt._closure.closure import Sources
from jaxbptt._jaxprs.loops import put, rows
from jaxbptt._serialization import tell_flax
from jaxbptt._types import LeafType, PyTree, TreeType, in_words, leaf_type, type_of
from jaxbptt._windows import Windows


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a tape is for: static, hashable, equal by value."""

    window: int  # slots of the ring: the longest of a part that gradients flow through
    windows: Windows
    every: int
    weights: str
    pace: int | None  # how many lags each call takes every cotangent in flight further
    params: TreeType
    carry: TreeType
    x: TreeType
    step: str  # a hash of what the step computes
    sources: Sources  # what gradients flow to beside params
    packing: Packing  # in which array of the ring each residual lies

    @property
    def slots(self) -> tuple[int, ...]:
        """How the ring's slots are laid out: one after another, or in rows and columns.

        With a pace p the chains in flight are p + 1 steps apart. In p + 1 rows, step τ in the
        row τ mod (p + 1), what they read at once is one row.
        """
        if self.pace is None:
            return (self.window,)
        return (self.pace + 1, -(-self.window // self.pace))

    @property
    def lags_per_call(self) -> int:
        """How many lags a call takes each cotangent further."""
        return self.window if self.pace is None else self.pace


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InFlight:
    """The cotangents that are on their way back, of a recorder with a pace.

    Attributes:
        lam: λ of each chain, leaves (columns, *shape) in the order of the ring's columns.
        count: int32 scalar, how many steps are recorded, at most as many as there are slots.
    """

    lam: list[jax.Array]
    count: jax.Array


@dataclasses.dataclass(frozen=True)
class Tape:
    """The carry of a recorded loop and the residuals of its last steps: a pytree.

    Made by `Recorder.init` and returned by every call of the recorder; carry it through
    `lax.scan`, donate it to `jit`, `vmap` over it. Its size is fixed.

    Attributes:
        carry: the live carry, as the step returned it last.
        length: int32 scalar, how many steps are recorded, at most the window.
        nbytes: int, the bytes of the ring (known under `jax.eval_shape` too).
    """

    carry: PyTree
    length: jax.Array
    # Each (*slots, *residual.shape), or (*slots, n, *residual.shape) where n small ones lie in one;
    # written at slots 0, 1, ... in turn.
    _ring: list[jax.Array]
    _head: jax.Array  # int32, the slot of the newest step
    # int32, steps in the current group of `every`, the newest included; None where that is one.
    _phase: jax.Array | None
    _in_flight: InFlight | None
    # With "replayed", for each slot whether the carry that its step was given had been put in by
    # `replace`: a window that is run again goes on from there.
    _put_in: jax.Array | None
    _settings: Settings

    def __post_init__(self) -> None:
        tell_flax()

    def __repr__(self) -> str:
        made, window = self._settings, self._settings.windows.tree()
        options = f"window={window!r}, every={made.every}, weights={made.weights!r}"
        options += "" if made.pace is None else f", pace={made.pace}"
        return f"Tape({options}, carry={in_words(self.carry)}, ring {_size(self._ring)})"

    @property
    def nbytes(self) -> int:
        """Bytes of the ring."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in self._ring)

    def replace(self, *, carry: PyTree) -> "Tape":
        """The same tape with another live carry, of the same structure, shapes and dtypes.

        The recorded steps stay: a later cotangent flows from the new carry into the
        step that was recorded last, as if that step had returned it.

        Args:
            carry: the new carry.

        Raises:
            ValueError: `carry` is not of the type of the carry on the tape.
        """
        _errors.no_tape("carry", carry, Tape)
        carry = as_strong_arrays(carry, "carry")
        _errors.same_type(
            "carry must be of the type of the carry on the tape",
            "carry",
            type_of(self.carry),
            type_of(carry),
            "Cast or reshape it, or make a new tape with init.",
        )
        put_in = self._put_in
        if put_in is not None:
            # The next step is given it. Until then the slot holds the oldest step, from which a
            # window is run again in any case.
            put_in = put_in.at[(self._head + 1) % put_in.shape[0]].set(True)
        return dataclasses.replace(self, carry=carry, _put_in=put_in)


def _size(ring: Sequence[Any]) -> str:
    """The bytes of a ring in words; of leaves that are no arrays nothing is known."""
    if not all(hasattr(leaf, "size") and hasattr(leaf, "dtype") for leaf in ring):
        return "of unknown size"
    size, units = size_in_bytes(ring), ("KiB", "MiB", "GiB", "TiB")
    power = min((max(size, 1).bit_length() - 1) // 10, len(units))
    return f"{size / 1024**power:.1f} {units[power - 1]}" if power else f"{size} B"


jax.tree_util.register_dataclass(
    Tape,
    data_fields=["carry", "length", "_ring", "_head", "_phase", "_in_flight", "_put_in"],
    meta_fields=["_settings"],
)


def blank(
    carry: PyTree, slot: Sequence[LeafType], lam: Sequence[LeafType], settings: Settings
) -> Tape:
    """A tape with nothing recorded: its slots are zeros that no result ever depends on.

    Args:
        carry: the live carry.
        slot: the types of what one step leaves on the ring.
        lam: the types of λ, of which there is one for each chain where there is a pace.
        settings: what the tape is for.
    """
    kinds = settings.packing.types(slot)
    ring = [zeros(_laid_out(kind, settings.slots)) for kind in kinds]
    in_flight = None
    if settings.pace is not None:
        # One λ for each column of the ring: a chain starts in the column of its step.
        chains = [zeros(leaf.stacked(settings.slots[1])) for leaf in lam]
        in_flight = InFlight(chains, jnp.zeros((), jnp.int32))
    # An array for each counter rather than one for all: a buffer can be donated only once.
    length, head = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    phase = None if settings.every == 1 else jnp.zeros((), jnp.int32)
    put_in = jnp.zeros(settings.window, bool) if settings.weights == "replayed" else None
    return Tape(carry, length, ring, head, phase, in_flight, put_in, settings)


def _laid_out(leaf: LeafType, slots: tuple[int, ...]) -> LeafType:
    """The type of a ring of such leaves."""
    for count in reversed(slots):
        leaf = leaf.stacked(count)
    return leaf


def is_blank(tape: Tape) -> bool:
    """Whether nothing is recorded, as far as that is known while tracing."""
    length = tape.length
    # An array that a jitted function closes over is no tracer, but what is computed of it is.
    here = not isinstance(length, jax.core.Tracer) and getattr(length, "is_fully_addressable", True)
    return here and not np.asarray(length).any()


def cleared(tape: Tape) -> Tape:
    """Nothing recorded, the carry kept. The ring is zeroed: residuals may hold a NaN."""
    return dataclasses.replace(
        tape,
        length=jnp.zeros_like(tape.length),
        _ring=[jnp.zeros_like(leaf) for leaf in tape._ring],
        _head=jnp.zeros_like(tape._head),
        _phase=jax.tree.map(jnp.zeros_like, tape._phase),
        _in_flight=jax.tree.map(jnp.zeros_like, tape._in_flight),
        _put_in=jax.tree.map(jnp.zeros_like, tape._put_in),
    )


def push(tape: Tape, carry: PyTree, residuals: Sequence[jax.Array]) -> Tape:
    """Writes one step over the oldest slot and makes `carry` the live one."""
    settings = tape._settings
    # The first step is written to slot 1: counters that begin at zero wrap without a special case.
    # With a pace there are more slots than the window has steps.
    window, every, slots = settings.window, settings.every, settings.slots
    # No counter is ever negative: `lax.rem` needs no case for that, as `%` does.
    head = lax.rem(tape._head + 1, jnp.int32(math.prod(slots)))
    place = (head,) if len(slots) == 1 else row_and_column(head, settings)
    values = settings.packing.pack(residuals)
    _same_sharding(tape._ring, values, slots)
    ring = [_write(leaf, value, place) for leaf, value in zip(tape._ring, values, strict=True)]
    in_flight, put_in = tape._in_flight, tape._put_in
    if put_in is not None:
        # What `replace` has said of this slot stays; of the next one nothing is said yet.
        put_in = put_in.at[(head + 1) % window].set(False)
    if in_flight is not None:
        count = jnp.minimum(in_flight.count + 1, math.prod(slots))
        in_flight = dataclasses.replace(in_flight, count=count)
    return dataclasses.replace(
        tape,
        carry=carry,
        length=jnp.minimum(tape.length, window - 1) + 1,
        _ring=ring,
        _head=head,
        _phase=None if tape._phase is None else lax.rem(tape._phase, jnp.int32(every)) + 1,
        _in_flight=in_flight,
        _put_in=put_in,
    )


def row_and_column(place: Any, settings: Settings) -> tuple[Any, Any]:
    """Where a slot lies on a ring of rows and columns, of the number it has in time."""
    rows = settings.slots[0]
    return place % rows, place // rows


def _write(leaf: jax.Array, value: jax.Array, place: Sequence[Any]) -> jax.Array:
    """A ring's leaf with one slot written over."""
    if len(place) == 1:
        return put(leaf, value, place[0])
    starts = [*place, *(jnp.int32(0),) * value.ndim]
    return lax.dynamic_update_slice(leaf, value[None, None], starts)


def _same_sharding(
    ring: Sequence[jax.Array], residuals: Sequence[jax.Array], slots: tuple[int, ...]
) -> None:
    """Says which types differ where JAX would speak of the ring's write."""
    for leaf, value in zip(map(leaf_type, ring), map(leaf_type, residuals), strict=True):
        # On a mesh with Explicit axes JAX would speak of the operands of an update of a slice.
        slot = _laid_out(value, slots).sharding
        # What lies on no mesh, such as a number that is made inside of jit, JAX takes for the same
        # on all devices.
        whole = slot is None and not any(getattr(leaf.sharding, "spec", ()))
        if leaf.sharding != slot and not whole:
            raise ValueError(
                "params, carry and x must lie over the Explicit axes of the mesh as those that "
                f"init was given, but a residual {value} was of {_spec(leaf.sharding)} then and "
                f"is of {_spec(slot)} now, time in front. Call init with arrays (or structs) of "
                "the shardings that the loop has."
            )


def _spec(sharding: Any) -> str:
    return "no sharding" if sharding is None else f"sharding {sharding.spec}"


@dataclasses.dataclass(frozen=True)
class RecordedSteps:
    """The residuals of a window's steps, by the lag behind the newest step, which is lag 0.

    Attributes:
        read: from a lag to that step's residuals. Beyond what is recorded it gives some step again,
            and an unwritten slot only where nothing is recorded at all. What is made of such a step
            is masked afterwards (`live` in `window_vjp`); but a mask can't undo a NaN in a
            derivative, which zeros in a slot may give.
        slots: how many there are; 0 where the residuals are read one step at a time alone.
        slot: from a lag to the slot of that step, and from a slot to the lag of what lies there.
        all_slots: from the number of a residual to those of all steps as they lie, (slots, ...);
            None where it can't be had without a copy.
    """

    read: Callable[[Any], list[jax.Array]]
    slots: int = 0
    slot: Callable[[Any], Any] = lambda lag: lag
    all_slots: Callable[[int], jax.Array | None] = lambda residual: None


def recorded_steps(tape: Tape) -> RecordedSteps:
    """The steps on a tape."""
    settings = tape._settings

    def slot_of(lag: Any) -> Any:
        # A comparison and no remainder: XLA makes it anew wherever a slot is read, in passing, and
        # needs no operation of its own for it.
        slot = tape._head - lag
        return jnp.where(slot < 0, slot + settings.window, slot)

    def read(lag: Any) -> list[jax.Array]:
        slot = slot_of(jnp.where(lag < tape.length, lag, 0))
        return _exactly([_at(tape._ring[i], slot, row) for i, row in settings.packing.places])

    def all_slots(residual: int) -> jax.Array | None:
        place, row = settings.packing.places[residual]
        leaf = jnp.asarray(tape._ring[place])
        if row is not None or leaf_type(leaf).sharding is not None:
            return None
        return leaf

    return RecordedSteps(read, settings.window, slot_of, all_slots)


def _at(leaf: jax.Array, slot: Any, row: int | None) -> jax.Array:
    """What lies in one slot of a ring's leaf, or in one row of that slot."""
    if row is None:
        return rows([leaf], slot)[0]
    # In one slice: what reads another row of the slot would otherwise wait for a copy of it.
    shape = leaf.shape[2:]
    starts = [slot, *map(jnp.int32, (row, *(0,) * len(shape)))]
    there = lax.dynamic_slice(leaf, starts, (1, 1, *shape), allow_negative_indices=False)
    return there.reshape(shape)


def put_in_at(tape: Tape) -> Callable[[Any], jax.Array]:
    """A function from lag to whether the carry of that step was put in, of a "replayed" tape."""
    flags = jnp.asarray(tape._put_in)

    def at(lag: Any) -> jax.Array:
        return flags[(tape._head - lag) % flags.shape[0]]

    return at


def _exactly(leaves: list[jax.Array]) -> list[jax.Array]:
    """What was read from a ring, in such a way that a TPU's compiler reads one slot at a time.

    Products take float32 in bfloat16 there, by default, and the compiler would round the whole
    ring before the loop over the lags: half a ring of scratch, written and read at each update.
    It can't move the rounding over a multiplication, and so there is one, by one.
    """

    # Behind a barrier the compiler can't see that the factor is one.
    def times_one(*leaves: jax.Array) -> list[jax.Array]:
        one = lax.optimization_barrier(jnp.ones((), jnp.float32))
        return [v * one if v.dtype == jnp.float32 else v for v in leaves]

    return lax.platform_dependent(*leaves, tpu=times_one, default=lambda *leaves: list(leaves))


def x_struct(tape: Tape) -> PyTree:
    """Something of x's type to trace with.

    It lies over the Explicit axes that the tape lies over now: a tape may have been brought
    to another mesh, or off it, since it was made.
    """
    check_counters(tape)
    kinds = map(leaf_type, [*tape._ring, *jax.tree.leaves(tape.carry)])
    # Of what the tape was made with only the axes' names count: the mesh may be another now.
    mesh = next((kind.sharding.mesh for kind in kinds if kind.sharding), None)

    def laid(kind: LeafType) -> LeafType:
        if kind.sharding is None or mesh is None:
            return dataclasses.replace(kind, sharding=None)
        return dataclasses.replace(kind, sharding=NamedSharding(mesh, kind.sharding.spec))

    x = tape._settings.x
    return structs_of(dataclasses.replace(x, leaves=tuple(map(laid, x.leaves))))


def check_counters(tape: Tape) -> None:
    """Refuses a tape whose counters are not what every tape has: something computed with them.

    Raises:
        ValueError: a counter is no int32 scalar, or the ring has not as many slots as it was made
            with.
    """
    counter = LeafType((), jnp.dtype(jnp.int32))
    slots = tape._settings.slots
    expected: dict[str, LeafType | None] = {}
    got: dict[str, LeafType | None] = {}
    # All that is compared here is known while tracing: under vmap too, where each tape is one of
    # many.
    for name in ("length", "_head", *(("_phase",) if tape._settings.every > 1 else ())):
        expected[name] = counter
        got[name] = _type_or_none(getattr(tape, name))
    if tape._in_flight is not None:
        expected["_in_flight.count"] = counter
        got["_in_flight.count"] = _type_or_none(tape._in_flight.count)
    for i, leaf in enumerate(tape._ring):
        kind = got[f"_ring[{i}]"] = _type_or_none(leaf)
        # Only the axes of the slots are known here; what lies in a slot is compared with the
        # step's.
        shape = (*slots, *kind.shape[len(slots) :]) if kind else slots
        expected[f"_ring[{i}]"] = LeafType(shape, kind.dtype) if kind else kind
    _errors.same_leaves_as_made(expected, got)


def _type_or_none(leaf: Any) -> LeafType | None:
    return leaf_type(leaf) if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else None


def layout(tape: Tape) -> tuple[LeafType, ...]:
    """The types of the residuals in one slot."""
    n, ring = len(tape._settings.slots), list(map(leaf_type, tape._ring))
    return tuple(
        dataclasses.replace(ring[i], shape=ring[i].shape[n + (row is not None) :])
        for i, row in tape._settings.packing.places
    )


def settings_of(tape: Tape) -> Settings:
    """What a tape is for."""
    return tape._settings


def phase_of(tape: Tape) -> jax.Array:
    """How many steps of the current group of `every` are recorded, the newest included."""
    return jnp.minimum(tape.length, 1) if tape._phase is None else tape._phase


def keep_or_roll_back(keep: Any, tape: Tape, before: Tape) -> Tape:
    """The tape where `keep` holds, else the carry of the tape before it, with nothing recorded.

    Only the counters are put back. Zeroing the ring as `clear` does would copy it at every
    step; what is in its slots is overwritten before it is read, pending cotangents too.
    """

    def kept(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(keep, new, old)

    def kept_or_zero(new: jax.Array) -> jax.Array:
        return kept(new, jnp.zeros_like(new))

    return dataclasses.replace(
        tape,
        carry=jax.tree.map(kept, tape.carry, before.carry),
        length=kept_or_zero(tape.length),
        _head=kept_or_zero(tape._head),
        _phase=jax.tree.map(kept_or_zero, tape._phase),
        _in_flight=jax.tree.map(kept_or_zero, tape._in_flight),
    )


@dataclasses.dataclass(frozen=True)
class Columns:
    """A ring of rows and columns at the newest step: what the chains in flight read of it.

    Attributes:
        read: from a lag behind each chain's own place to that row, leaves (columns, ...).
        row: from such a lag to the row's number.
        quotient: from such a lag to the column of the newest chain.
        in_flight: λ of the chains, and how many steps are recorded.
    """

    read: Callable[[Any], list[jax.Array]]
    row: Callable[[Any], Any]
    quotient: Callable[[Any], Any]
    in_flight: InFlight


def columns_of(tape: Tape) -> Columns:
    """What the chains in flight read of a tape with a pace."""
    settings = tape._settings
    # Only a recorder with a pace comes here, and the tapes that it makes have chains.
    in_flight = cast(InFlight, tape._in_flight)

    def place(lag: Any) -> tuple[Any, Any]:
        return row_and_column((tape._head - lag) % math.prod(settings.slots), settings)

    def read(lag: Any) -> list[jax.Array]:
        # All columns of one row, which lie one after the other: nothing is gathered.
        row = place(lag)[0]
        return _exactly([lax.dynamic_index_in_dim(v, row, 0, keepdims=False) for v in tape._ring])

    return Columns(read, lambda lag: place(lag)[0], lambda lag: place(lag)[1], in_flight)


def in_flight_of(tape: Tape) -> InFlight | None:
    """The cotangents that are on their way back, None without a pace."""
    return tape._in_flight


def with_chains(tape: Tape, in_flight: InFlight) -> Tape:
    """The tape with its chains moved on."""
    return dataclasses.replace(tape, _in_flight=in_flight)


def with_group_ended(tape: Tape, ends: jax.Array) -> Tape:
    """The tape with its group ended at the newest step where `ends` holds."""
    if tape._phase is None:
        return tape  # each step is a group
    every = jnp.asarray(tape._settings.every, jnp.int32)
    return dataclasses.replace(tape, _phase=jnp.where(ends, every, tape._phase))


def is_due(tape: Tape) -> jax.Array:
    """Whether the newest step ends a group of `every`."""
    return phase_of(tape) == tape._settings.every
