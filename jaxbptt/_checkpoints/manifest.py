"""What a checkpoint says of itself, and whether a state can be restored from it."""

import dataclasses
import json
import re
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jaxbptt import _errors
from jaxbptt._arrays import structs_of
from jaxbptt._checkpoints.leaves import FlatState, SavedLeaf, checksum
from jaxbptt._closure.fingerprint import fingerprint
from jaxbptt._compat import without_mesh
from jaxbptt._transforms.record import Recorder, slot_types, trace_recorder
from jaxbptt._transforms.tape import Settings, Tape, layout, settings_of
from jaxbptt._types import LeafType, TreeType
from jaxbptt._version import __version__

# As JSON holds it. Its keys are part of the format on disk:
#   format, jax, jaxbptt, data, and the checksum of all the rest
#   tapes: for each tape its path, window, every, weights, x, slot and step, the fingerprint
#   leaves: for each leaf its name, path, type, checksum, and past: whether it is on a tape
Manifest = dict[str, Any]

_FORMAT = 1
_KEYS = {"format": int, "jax": str, "jaxbptt": str, "tapes": list, "leaves": list}
_OPTIONS = ("window", "every", "weights", "pace", "x")
# Manifests of tapes without a pace do not speak of it.
_KEYS_OF_TAPE = ("path", "window", "every", "weights", "x", "slot", "step")
_KEYS_OF_LEAF = ("name", "path", "type", "past")
_CLEAR = "restore(like, clear=True) gives all else back, with the tape empty."


class TapeEntry(NamedTuple):
    """What a manifest says of a tape.

    Attributes:
        slot: the types of the residuals in one slot; None where they can't be known.
        entry: the recorder's options, the slot in words, and the fingerprint of the step.
    """

    slot: tuple[LeafType, ...] | None
    entry: Manifest


@dataclasses.dataclass(frozen=True)
class TapeRecorders:
    """The recorders of the tapes of a state; each step is traced and fingerprinted once.

    Attributes:
        recorders: one for all tapes, or one for each.
        described: for the number of a recorder and the settings of a tape, its entry.
    """

    recorders: tuple[Recorder, ...]
    described: dict[tuple[int, Settings], TapeEntry] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, given: Any) -> "TapeRecorders":
        """Takes a recorder, a learner, or a sequence of these.

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

    def manifest(self, state: FlatState, name: str) -> Manifest:
        """Describes a state, as a checkpoint of it does.

        Args:
            state: the state.
            name: what a message calls it.

        Raises:
            ValueError: a tape was made by another recorder, or the numbers of tapes and of
                recorders differ.
        """
        # One recorder may have made many tapes: those of several copies of a model, say.
        one_for_all = len(self.recorders) == 1
        if not one_for_all and len(self.recorders) != len(state.tapes):
            raise ValueError(
                f"recorder must be the one that all tapes in {name} are of, or a list of one for "
                f"each tape, but got {len(self.recorders)} for {len(state.tapes)} tapes. Pass "
                "them in the order in which jax.tree.leaves comes to the tapes."
            )
        tapes = [
            {"path": path} | self._entry_of_tape(0 if one_for_all else i, tape)
            for i, (path, tape) in enumerate(state.tapes.items())
        ]
        leaves = [
            {"name": _name(i, leaf), "path": leaf.path, "type": leaf.kind, "past": leaf.on_tape}
            for i, leaf in enumerate(state.leaves)
        ]
        return {"format": _FORMAT, **_versions(), "tapes": tapes, "leaves": leaves}

    def _entry_of_tape(self, i: int, tape: Tape) -> Manifest:
        """Describes a tape of the recorder number i, and checks that it is of that recorder."""
        rec, settings = self.recorders[i], settings_of(tape)
        for name in ("windows", "every", "weights", "pace"):
            if getattr(settings, name) != getattr(rec, name):
                raise _errors.other_setting(name, getattr(rec, name), getattr(settings, name))
        # Tracing is slow next to a save, and a run saves the same tape again and again.
        if (i, settings) not in self.described:
            self.described[i, settings] = _describe(rec, settings)
        slot, entry = self.described[i, settings]
        # Arrays of a tape made under vmap have an axis that the recorder doesn't know of.
        if slot is not None and tape.length.ndim == 0 and slot != layout(tape):
            raise _errors.other_residuals(slot, layout(tape))
        return entry


def check_form(manifest: Any, where: str) -> None:
    """Refuses what JSON gave but `TapeRecorders.manifest` can't have made.

    Of a manifest of another format only that is known; `check_compatible` says what to do.

    Raises:
        ValueError: something that each manifest has is missing.
    """
    if isinstance(manifest, Mapping) and manifest.get("format", _FORMAT) != _FORMAT:
        return
    # A damaged file may still be JSON, of another shape than any manifest has.
    missing = _missing(manifest)
    if missing:
        raise ValueError(
            f"{where} must be one that jaxbptt.checkpoints has written, and whole, but its "
            f"manifest has no {missing}. Take another one: restore(like, step=...)."
        )


def _missing(manifest: Any) -> str:
    """The first key that should be in a manifest and isn't, with its place; empty if none."""
    if not isinstance(manifest, Mapping):
        return "keys"
    for key, kind in _KEYS.items():
        if not isinstance(manifest.get(key), kind):
            return repr(key) if key not in manifest else f"{key!r} of the right type"
    for table, keys in (("tapes", _KEYS_OF_TAPE), ("leaves", _KEYS_OF_LEAF)):
        for i, entry in enumerate(manifest[table]):
            here = entry if isinstance(entry, Mapping) else {}
            for key in keys:
                if key not in here:
                    return f"{key!r} in entry {i} of {table!r}"
    return "" if "data" in manifest else "'data'"


def check_compatible(theirs: Manifest, ours: Manifest, where: str, clear: bool) -> None:
    """Refuses a checkpoint that doesn't fit a state, before any array of it is read.

    Args:
        theirs: the checkpoint's manifest.
        ours: the manifest of the state to restore.
        where: what a message calls the checkpoint.
        clear: whether the recorded steps are left out, so that tapes need not fit.

    Raises:
        ValueError: leaves have other paths or types; or, without `clear`, a tape is of another
            version of JAX, of other options of the recorder, or of another step.
    """
    if theirs.get("format") != _FORMAT:
        raise ValueError(
            f"{where} must be of format {_FORMAT}, but is of {theirs.get('format')!r}. Read it "
            f"with the jaxbptt that wrote it, {theirs.get('jaxbptt')}."
        )
    remedy = "Make like as the saved state was made, such as by the same init."
    _check_leaves(theirs, ours, where, on_tape=False, remedy=remedy)
    if clear:
        return
    # A tape that only one of the two has is found by its leaves, above and below.
    here = {tape["path"]: tape for tape in ours["tapes"]}
    for tape in theirs["tapes"]:
        if tape["path"] in here:
            differences = _differences(theirs, ours, tape, here[tape["path"]])
            if differences:
                saved, asked = map(" and ".join, zip(*differences, strict=True))
                raise ValueError(
                    f"like{tape['path']} must continue a tape of {asked}, but the one in {where} "
                    f"is of {saved}: {_CLEAR}"
                )
    # Last, for a ring of other arrays is what the differences above lead to.
    _check_leaves(theirs, ours, where, on_tape=True, remedy=_CLEAR)


def sealed(manifest: Manifest) -> Manifest:
    """Returns the manifest with a checksum of itself."""
    return manifest | {"checksum": _seal(manifest)}


def check_seal(manifest: Manifest, where: str) -> None:
    """Refuses a manifest that changed on disk.

    Raises:
        ValueError: it doesn't match its checksum.
    """
    # Older releases wrote no checksum.
    if manifest.get("checksum") not in (None, _seal(manifest)):
        raise _damaged(where, "its manifest")


def check_sums(manifest: Manifest, read: Mapping[str, Any], where: str) -> None:
    """Refuses arrays that changed on disk.

    Args:
        manifest: what the checkpoint says of itself.
        read: the arrays that were read, by name.
        where: what a message calls the checkpoint.

    Raises:
        ValueError: an array doesn't match its checksum.
    """
    for leaf in manifest["leaves"]:
        value, saved = read.get(leaf["name"]), leaf.get("checksum")
        if value is not None and saved is not None and checksum(value) not in (saved, None):
            raise _damaged(where, f"like{leaf['path']}")


def _damaged(where: str, what: str) -> ValueError:
    """The error for a checkpoint in which `what` changed on disk."""
    return ValueError(
        f"{where} must hold what was saved, but {what} does not match its checksum: the file was "
        "damaged. Take another checkpoint: restore(like, step=...)."
    )


def _seal(manifest: Manifest) -> str:
    # With sorted keys, so that the order in which JSON gives them back does not count.
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"


def names(manifest: Manifest) -> dict[str, str]:
    """The names that leaves are saved under, by path."""
    return {leaf["path"]: leaf["name"] for leaf in manifest["leaves"]}


def _name(i: int, leaf: SavedLeaf) -> str:
    # Becomes the name of a file: the number makes it unique, the path makes it readable.
    return f"{i:04d}" + re.sub(r"[^a-zA-Z0-9]+", "_", leaf.path).rstrip("_")


def _versions() -> Manifest:
    return {"jax": jax.__version__, "jaxbptt": __version__}


def _describe(rec: Recorder, settings: Settings) -> TapeEntry:
    """Describes the tapes of a recorder that have these settings. Traces the step once."""
    options = {"window": repr(rec.window), "every": rec.every, "weights": rec.weights}
    if rec.pace is not None:  # manifests without one are older than the option
        options["pace"] = rec.pace
    options["x"] = ", ".join(map(str, settings.x.leaves))
    types = (_off_mesh(kind) for kind in (settings.params, settings.carry, settings.x))
    params, carry, x = map(structs_of, types)
    try:
        with without_mesh():
            closure = trace_recorder(rec, params, carry, x, settings.sources)
    except NameError as error:
        if "axis name" not in str(error):
            raise
        # A step with collectives can't be traced outside its mesh.
        return TapeEntry(None, {**options, "slot": None, "step": None})
    slot = slot_types(rec, closure, carry, x)
    described = {"slot": [*map(str, slot)], "step": fingerprint(closure)}
    return TapeEntry(slot, options | described)


def _off_mesh(kind: TreeType) -> TreeType:
    """Returns a type as it is outside `shard_map` and off any mesh."""
    # A checkpoint may be restored on another mesh: its fingerprint must not depend on it.
    leaves = [dataclasses.replace(v, varying=frozenset(), sharding=None) for v in kind.leaves]
    return dataclasses.replace(kind, leaves=tuple(leaves))


def _check_leaves(
    theirs: Manifest, ours: Manifest, where: str, *, on_tape: bool, remedy: str
) -> None:
    """Refuses leaves of another path or type than was saved, of the tapes or of all else."""
    saved, asked = (
        {leaf["path"]: leaf["type"] for leaf in manifest["leaves"] if leaf["past"] == on_tape}
        for manifest in (theirs, ours)
    )
    rows = [
        f"like{path}: {saved.get(path, 'nothing')} saved, {asked.get(path, 'nothing')} in like"
        for path in {**asked, **saved}
        if saved.get(path) != asked.get(path)
    ]
    if not rows:
        return
    # Paths that only one side has make a count of differing leaves meaningless.
    count = "the structure differs"
    if saved.keys() == asked.keys():
        count = f"{len(rows)} of {len(saved)} leaves differ{'s' if len(rows) == 1 else ''}"
    raise ValueError(
        f"like must be of the type of the state in {where}, but {count}:\n"
        f"{_errors.bullets(rows)}\n{remedy}"
    )


def _differences(
    theirs: Manifest, ours: Manifest, saved: Manifest, asked: Manifest
) -> list[tuple[str, str]]:
    """How the entry of a saved tape differs from the one asked for, as pairs of words.

    Args:
        theirs: the checkpoint's manifest.
        ours: the manifest of the state to restore.
        saved: the entry of a tape in `theirs`.
        asked: the entry of the tape at the same path in `ours`.
    """
    pairs = [(f"JAX {theirs['jax']}", f"JAX {ours['jax']}")]
    pairs += [(f"{key}={saved.get(key)}", f"{key}={asked.get(key)}") for key in _OPTIONS]
    differ = [pair for pair in pairs if pair[0] != pair[1]]
    # With other options, or under another JAX, a step has another fingerprint in any case.
    if differ or saved["step"] == asked["step"]:
        return differ
    # The same options and the same JAX: then it is the step, or a jaxbptt that traces it otherwise.
    versions = f"jaxbptt {theirs['jaxbptt']}", f"jaxbptt {ours['jaxbptt']}"
    return [versions if versions[0] != versions[1] else ("another step", "this step")]
