"""What a checkpoint says of itself, and whether a state can go on from it."""

import contextlib
import dataclasses
import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax

from jaxbptt import _errors
from jaxbptt._arrays import structs_of
from jaxbptt._checkpoints.leaves import Leaf, State, checksum
from jaxbptt._closure.fingerprint import fingerprint
from jaxbptt._transforms.record import Recorder, slot_types, trace_recorder
from jaxbptt._transforms.tape import Settings, Tape, layout, settings_of
from jaxbptt._types import LeafType, TreeType
from jaxbptt._version import __version__

Manifest = dict[str, Any]  # as JSON holds it
Slot = tuple[LeafType, ...]

_FORMAT = 1
_OPTIONS = ("window", "every", "weights", "x")
_CLEAR = "restore(like, clear=True) gives all else back, with the tape empty."


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps that the tapes of a state are of, each fingerprinted once.

    Attributes:
        recorders: one for all tapes, or one for each.
        known: what was found of each, under the settings of its tape.
    """

    recorders: tuple[Recorder, ...]
    known: dict[tuple[int, Settings], tuple[Slot | None, Manifest]] = dataclasses.field(
        default_factory=dict
    )

    @classmethod
    def of(cls, given: Any) -> "Steps":
        """From a recorder, a learner, or a sequence of these.

        Raises:
            ValueError: it is something else.
        """
        given = given if isinstance(given, tuple | list) else (given,)
        recorders = tuple(getattr(each, "recorder", each) for each in given)
        for each in recorders:
            if not isinstance(each, Recorder):
                raise ValueError(
                    "recorder must be what jaxbptt.record or jaxbptt.learner returned, or a "
                    f"list of these, one for each tape, but got {_errors.describe(each)}. Wrap the "
                    "step: jaxbptt.record(step, window=...)."
                )
        return cls(recorders)

    def manifest(self, state: State, name: str) -> Manifest:
        """What a checkpoint of a state says of itself.

        Args:
            state: the state.
            name: what a message calls it.

        Raises:
            ValueError: a tape is not of its recorder, or there are not as many of either.
        """
        recorders = list(self.recorders) * (len(state.tapes) if len(self.recorders) == 1 else 1)
        if len(recorders) != len(state.tapes):
            raise ValueError(
                f"recorder must be the one that all tapes in {name} are of, or a list of one for "
                f"each tape, but got {len(recorders)} for {len(state.tapes)} tapes. Pass them in "
                "the order in which jax.tree.leaves comes to the tapes."
            )
        tapes = [
            {"path": path} | self._of_tape(min(i, len(self.recorders) - 1), tape)
            for i, (path, tape) in enumerate(state.tapes.items())
        ]
        leaves = [
            {"name": _name(i, leaf), "path": leaf.path, "type": leaf.kind, "past": leaf.past}
            for i, leaf in enumerate(state.leaves)
        ]
        return {"format": _FORMAT, **_versions(), "tapes": tapes, "leaves": leaves}

    def _of_tape(self, i: int, tape: Tape) -> Manifest:
        rec, made = self.recorders[i], settings_of(tape)
        for name in ("windows", "every", "weights"):
            if getattr(made, name) != getattr(rec, name):
                raise _errors.other_setting(name, getattr(rec, name), getattr(made, name))
        if (i, made) not in self.known:
            self.known[i, made] = _of_step(rec, made)
        slot, said = self.known[i, made]
        # Under vmap arrays have an axis more than the recorder knows of.
        if slot is not None and tape.length.ndim == 0 and slot != layout(tape):
            raise _errors.other_residuals(slot, layout(tape))
        return said


def refuse(theirs: Manifest, ours: Manifest, where: str, clear: bool) -> None:
    """Refuses a checkpoint that a state can't go on from, before anything of it is read.

    Args:
        theirs: what the checkpoint says of itself.
        ours: what one of the state that is asked for would say.
        where: what a message calls the checkpoint.
        clear: whether it is to go on without the recorded steps.

    Raises:
        ValueError: they differ in what counts.
    """
    if theirs.get("format") != _FORMAT:
        raise ValueError(
            f"{where} must be of format {_FORMAT}, but is of {theirs.get('format')!r}. Read it "
            f"with the jaxbptt that wrote it, {theirs.get('jaxbptt')}."
        )
    remedy = "Make like as the saved state was made, such as by the same init."
    _same_leaves(theirs, ours, where, False, remedy)
    if clear:
        return
    here = {tape["path"]: tape for tape in ours["tapes"]}
    for tape in theirs["tapes"]:
        if tape["path"] in here:
            unlike = _unlike(theirs, ours, tape, here[tape["path"]])
            if unlike:
                saved, asked = map(" and ".join, zip(*unlike, strict=True))
                raise ValueError(
                    f"like{tape['path']} must continue a tape of {asked}, but the one in {where} "
                    f"is of {saved}: {_CLEAR}"
                )
    _same_leaves(theirs, ours, where, True, _CLEAR)


def sealed(manifest: Manifest) -> Manifest:
    """The manifest with a checksum of itself."""
    return manifest | {"checksum": _seal(manifest)}


def check_seal(manifest: Manifest, where: str) -> None:
    """Refuses a manifest that is not as it was written; one of an older release has no checksum.

    Raises:
        ValueError: it isn't.
    """
    if manifest.get("checksum") not in (None, _seal(manifest)):
        raise _damaged(where, "its manifest")


def check_sums(manifest: Manifest, read: Mapping[str, Any], where: str) -> None:
    """Refuses arrays that do not have the checksums that they were saved with.

    Raises:
        ValueError: one has another.
    """
    for leaf in manifest["leaves"]:
        value, saved = read.get(leaf["name"]), leaf.get("checksum")
        if value is not None and saved is not None and checksum(value) not in (saved, None):
            raise _damaged(where, f"like{leaf['path']}")


def _damaged(where: str, what: str) -> ValueError:
    """The error for a checkpoint that changed on disk."""
    return ValueError(
        f"{where} must hold what was saved, but {what} does not match its checksum: the file was "
        "damaged. Take another checkpoint: restore(like, step=...)."
    )


def _seal(manifest: Manifest) -> str:
    said = {key: value for key, value in manifest.items() if key != "checksum"}
    return f"{zlib.crc32(json.dumps(said, sort_keys=True).encode()):08x}"


def names(manifest: Manifest) -> dict[str, str]:
    """The names that leaves are saved under, by path."""
    return {leaf["path"]: leaf["name"] for leaf in manifest["leaves"]}


def _name(i: int, leaf: Leaf) -> str:
    return f"{i:04d}" + re.sub(r"[^a-zA-Z0-9]+", "_", leaf.path).rstrip("_")


def _versions() -> Manifest:
    return {"jax": jax.__version__, "jaxbptt": __version__}


def _of_step(rec: Recorder, made: Settings) -> tuple[Slot | None, Manifest]:
    """The layout of a slot; and in words that, the recorder's options, and the fingerprint."""
    known = {"window": repr(rec.window), "every": rec.every, "weights": rec.weights}
    known["x"] = ", ".join(map(str, made.x.leaves))
    params, carry, x = (structs_of(_outside(kind)) for kind in (made.params, made.carry, made.x))
    try:
        with _off_any_mesh():
            closure = trace_recorder(rec, params, carry, x)
    except NameError as error:
        if "axis name" not in str(error):
            raise
        # A step with collectives has no meaning, and no trace, outside its mesh.
        return None, {**known, "slot": None, "step": None}
    slot = slot_types(rec, closure, carry, x)
    return slot, {**known, "slot": [*map(str, slot)], "step": fingerprint(closure)}


def _off_any_mesh() -> contextlib.AbstractContextManager:
    """Where a program has no trace of the mesh that the caller has entered."""
    use = getattr(jax.sharding, "use_abstract_mesh", None)  # JAX 0.7 has none
    return use(jax.sharding.AbstractMesh((), ())) if use else contextlib.nullcontext()


def _outside(kind: TreeType) -> TreeType:
    """A type as it is outside `shard_map` and off any mesh."""
    leaves = [dataclasses.replace(v, varying=frozenset(), sharding=None) for v in kind.leaves]
    return dataclasses.replace(kind, leaves=tuple(leaves))


def _same_leaves(theirs: Manifest, ours: Manifest, where: str, past: bool, remedy: str) -> None:
    """Refuses leaves, of the past or of the rest, that are not those that were saved."""
    saved, asked = (
        {leaf["path"]: leaf["type"] for leaf in manifest["leaves"] if leaf["past"] == past}
        for manifest in (theirs, ours)
    )
    rows = [
        f"like{path}: {saved.get(path, 'nothing')} saved, {asked.get(path, 'nothing')} in like"
        for path in {**asked, **saved}
        if saved.get(path) != asked.get(path)
    ]
    if not rows:
        return
    count = "the structure differs"
    if saved.keys() == asked.keys():
        count = f"{len(rows)} of {len(saved)} leaves differ{'s' if len(rows) == 1 else ''}"
    raise ValueError(
        f"like must be of the type of the state in {where}, but {count}:\n"
        f"{_errors.bullets(rows)}\n{remedy}"
    )


def _unlike(theirs: Manifest, ours: Manifest, saved: Manifest, asked: Manifest) -> list[tuple]:
    """In what a saved tape differs from the one asked for: in words, what each is of."""
    pairs = [(f"JAX {theirs['jax']}", f"JAX {ours['jax']}")]
    pairs += [(f"{key}={saved[key]}", f"{key}={asked[key]}") for key in _OPTIONS]
    differ = [pair for pair in pairs if pair[0] != pair[1]]
    if differ or saved["step"] == asked["step"]:
        return differ
    versions = f"jaxbptt {theirs['jaxbptt']}", f"jaxbptt {ours['jaxbptt']}"
    return [versions if versions[0] != versions[1] else ("another step", "this step")]
