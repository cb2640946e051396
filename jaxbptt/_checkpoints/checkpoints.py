"""`checkpoints`: states with tapes on disk, saved in the background, restored to the last bit."""

import json
import operator
from typing import Any

from jaxbptt import _errors
from jaxbptt._checkpoints.leaves import FlatState, checksum
from jaxbptt._checkpoints.manifest import (
    TapeRecorders,
    check_compatible,
    check_form,
    check_seal,
    check_sums,
    names,
    sealed,
)
from jaxbptt._checkpoints.orbax_directory import OrbaxDirectory, first_line
from jaxbptt._types import PyTree


class Checkpoints:
    """The checkpoints in a directory; made by `checkpoints`.

    Leaving its `with` block waits for what is being written.
    """

    def __init__(self, disk: OrbaxDirectory, recorders: TapeRecorders):
        self._disk, self._recorders = disk, recorders

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def steps(self) -> list[int]:
        """The numbers of the complete checkpoints, in ascending order."""
        return self._disk.steps()

    @property
    def latest(self) -> int | None:
        """The number of the newest complete checkpoint; None if there is none."""
        return max(self.steps, default=None)

    def save(self, step: int, state: PyTree, data: Any = None) -> None:
        """Saves a state in the background.

        It first waits for a save that is still being written, and returns when the state has
        been copied: the state may be donated at once.

        Args:
            step: the checkpoint's number, above those that are there; of a `LearnerState`
                `int(state.step)`.
            state: arrays and numbers in any containers, with tapes among them: a
                `LearnerState`, or `(params, opt_state, tape)`. Keys of `jax.random` may be
                anywhere in it.
            data: anything else to keep that JSON can hold, such as the position in the data.
                It comes back as JSON has it, with tuples as lists.

        Raises:
            ValueError: `step` is not above the last number; `state` holds something that is
                no array or number, is donated or traced, or has a tape of another recorder;
                or JSON can't hold `data`.
            OSError: the directory can't be written. What goes wrong in the background is
                raised by the next `save` or `wait`, or at the end of the `with` block.

        Cost:
            The time to copy the state to the host; at the first save also one trace of the step.
        """
        # One save at a time: what went wrong in the last one is raised here.
        self.wait()
        flat = FlatState.of(state, "state")
        manifest = self._recorders.manifest(flat, "state") | {"data": _as_json(data)}
        # Recorded steps are an item of their own, so that `clear` need not read them.
        items: dict[str, dict[str, Any]] = {"state": {}, "past": {}}
        for leaf, entry in zip(flat.leaves, manifest["leaves"], strict=True):
            if not leaf.empty:
                array = leaf.saved()
                items["past" if leaf.on_tape else "state"][entry["name"]] = array
                entry["checksum"] = checksum(array)
        self._disk.write(self._next_step(step), items, sealed(manifest))

    def restore(
        self, like: PyTree, *, step: int | None = None, clear: bool = False
    ) -> tuple[PyTree, Any]:
        """Reads a state back, to the last bit.

        Args:
            like: a state of the same structure, shapes and dtypes: one to start from, or
                `jax.eval_shape` of what makes it. Leaves that are committed to devices, or
                structs with a sharding, say where the restored leaves are put.
            step: the number of the checkpoint; None for the latest.
            clear: whether to leave the recorded steps out: parameters, optimiser, keys and
                carries are restored, and tapes are empty, as after `Recorder.clear`. That
                works under another JAX, and with another step or other options of the recorder.

        Returns:
            The state, and the data that was saved with it.

        Raises:
            FileNotFoundError: there is no such checkpoint, or none at all.
            ValueError: the saved state is of another type than `like`, or, without `clear`,
                a tape is of another step, recorder or JAX; or the checkpoint can't be read,
                or holds other bits than were saved.

        Cost:
            One read of the state, and one trace of the step.
        """
        self.wait()
        flat = FlatState.of(like, "like")
        ours = self._recorders.manifest(flat, "like")
        step = self._existing(step)
        # Everything that can be refused by the manifest alone is refused before arrays are read.
        where = f"checkpoint {step} in {self._disk.directory}"
        theirs = self._disk.read_manifest(step)
        check_form(theirs, where)
        check_seal(theirs, where)
        check_compatible(theirs, ours, where, clear)

        # A name has a leaf's number in it, which may be another in the saved state.
        name, read = names(theirs), dict[str, Any]()
        for item, on_tape in (("state", False), ("past", True)):
            leaves = [v for v in flat.leaves if v.on_tape == on_tape and not v.empty]
            if not (on_tape and clear):
                wanted = {name[leaf.path]: leaf.wanted() for leaf in leaves}
                read |= self._disk.read(step, item, wanted)
        check_sums(theirs, read, where)

        # What was not saved, or is cleared, begins as zeros.
        arrays = [read.get(name.get(leaf.path, "")) for leaf in flat.leaves]
        restored = [
            leaf.restored(leaf.blank() if array is None else array)
            for leaf, array in zip(flat.leaves, arrays, strict=True)
        ]
        return flat.treedef.unflatten(restored), theirs["data"]

    def wait(self) -> None:
        """Waits until everything saved is on disk.

        Raises:
            OSError: it could not be written.
        """
        self._disk.wait()

    def close(self) -> None:
        """Waits as `wait` does, and ends the threads that write."""
        self._disk.close()

    def _next_step(self, step: Any) -> int:
        """Checks the number to save under, which must be above the last one."""
        try:
            step = operator.index(step)
        except TypeError:
            raise ValueError(
                f"step must be an int, but got {_errors.describe(step)}. Of a LearnerState it is "
                "int(state.step)."
            ) from None
        # Orbax would leave out a save that is not above the last, without a word.
        last = self._disk.last()
        least = 0 if last is None else last + 1
        if step < least:
            there = "" if last is None else f", after the checkpoint in {self._disk.directory}"
            raise ValueError(
                f"step must be at least {least}{there}, but got {step}. Go on from the latest "
                "checkpoint, or save in another directory."
            )
        return step

    def _existing(self, step: int | None) -> int:
        """Checks that there is a checkpoint of this number; None stands for the latest."""
        there, where = self.steps, self._disk.directory
        if not there:
            raise FileNotFoundError(
                f"directory must hold a complete checkpoint, but there is none in {where}. Where "
                "store.latest is None, start anew."
            )
        if step is not None and step not in there:
            raise FileNotFoundError(
                f"step must be that of a checkpoint in {where}, one of {there}, but got {step!r}. "
                "Leave it out for the latest."
            )
        return there[-1] if step is None else step


def checkpoints(directory: Any, recorder: Any, *, keep: int | None = 3) -> Checkpoints:
    """Opens a directory of checkpoints, to stop a run and to resume it bit for bit.

    A run that another process restores goes on as if it had never stopped: parameters,
    optimiser, carry, recorded steps, the place in a group of `every`, and random keys are
    all saved. Each checkpoint also says what wrote it: the version of JAX, window, every and
    weights, the layout of a slot, and a fingerprint of the step. A tape of another step means
    nothing, nor does one of another JAX, whose residuals may differ. Such a tape is refused,
    and `restore(like, clear=True)` restores everything but the recorded steps.

    Args:
        directory: the path of the directory; the first save makes it.
        recorder: what `record` or `learner` returned; for a state with the tapes of several
            recorders a list of these, in the order in which `jax.tree.leaves` comes to them.
        keep: how many of the newest checkpoints to keep; None for all.

    Returns:
        A `Checkpoints`, for a `with` statement.

    Raises:
        ValueError: `directory` is no path, `recorder` is none, or `keep` is not an int of at
            least 1.
        NotADirectoryError: `directory` is a file.
        ImportError: orbax-checkpoint is not installed.

    Note:
        A checkpoint is complete or not there, whenever the process is killed. One process at a
        time may write to a directory; others may read.

    Examples:
        >>> import jax.numpy as jnp, jaxbptt, tempfile
        >>> rec = jaxbptt.record(lambda w, c, x: (w * c + x, w * c + x), window=3)
        >>> params, tape = jnp.ones(()) / 2, rec.init(0.5, 0.0, 0.0)
        >>> directory = tempfile.mkdtemp()
        >>> with jaxbptt.checkpoints(directory, rec) as store:
        ...     for x in (1.0, 2.0, 3.0):
        ...         tape, y = rec(params, tape, x)
        ...     store.save(3, (params, tape), data={"position": 3})
        >>> like = jnp.zeros(()), rec.init(0.5, 0.0, 0.0)  # later, in another process
        >>> (params, tape), data = jaxbptt.checkpoints(directory, rec).restore(like)
        >>> float(tape.carry), int(tape.length), data
        (4.25, 3, {'position': 3})
    """
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise ValueError(f"keep must be an int of at least 1, or None for all, but got {keep!r}.")
    return Checkpoints(OrbaxDirectory(directory, keep), TapeRecorders.of(recorder))


def _as_json(data: Any) -> Any:
    """Returns the data as JSON will give it back."""
    # It is written much later, in the background, where an error would come too late.
    try:
        return json.loads(json.dumps(data))
    except (TypeError, ValueError) as cause:
        raise ValueError(
            f"data must be what JSON holds, but {first_line(cause)}. Convert it, as with "
            "int(position); what is an array goes into the state."
        ) from cause
