"""`checkpoints`: states with tapes on disk, saved in the background, restored to the last bit."""

import json
import operator
from typing import Any

from jaxbptt import _errors
from jaxbptt._checkpoints.leaves import State, checksum
from jaxbptt._checkpoints.manifest import Steps, check_seal, check_sums, names, refuse, sealed
from jaxbptt._checkpoints.orbax_directory import Disk, first_line
from jaxbptt._types import PyTree


class Checkpoints:
    """The checkpoints in a directory; made by `checkpoints`.

    Leaving its `with` block waits for what is being written.
    """

    def __init__(self, disk: Disk, steps: Steps):
        self._disk, self._of = disk, steps

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def steps(self) -> list[int]:
        """The steps that there is a complete checkpoint of, in order."""
        return self._disk.steps()

    @property
    def latest(self) -> int | None:
        """The last step that there is a complete checkpoint of; None if there is none."""
        return max(self.steps, default=None)

    def save(self, step: int, state: PyTree, data: Any = None) -> None:
        """Saves a state in the background.

        It returns when the state has been copied, so the state may be donated at once. A
        save that is still being written is waited for.

        Args:
            step: its number, above those of the checkpoints that are there.
            state: arrays and numbers in any containers, with tapes among them: a
                `LearnerState`, or `(params, opt_state, tape)`. Keys of `jax.random` may be
                anywhere in it.
            data: what else is to be kept, such as the position in the data: what JSON
                holds. It comes back as JSON has it, tuples as lists.

        Raises:
            ValueError: `step` is not above the last one; `state` holds something else than
                arrays and numbers, is donated or traced, or has a tape that is not the
                recorder's; or `data` is nothing for JSON.
            OSError: the directory can't be written. Of what goes wrong in the background the
                next `save` or `wait` tells, or the end of the `with` block.

        Cost:
            The time to copy the state to the host; at the first save also one trace of the step.
        """
        self.wait()
        parts = State.of(state, "state")
        manifest = self._of.manifest(parts, "state") | {"data": _json(data)}
        items: dict[str, dict[str, Any]] = {"state": {}, "past": {}}
        for leaf, said in zip(parts.leaves, manifest["leaves"], strict=True):
            if not leaf.empty:
                value = items["past" if leaf.past else "state"][said["name"]] = leaf.saved()
                said["checksum"] = checksum(value)
        self._disk.write(self._next(step), items, sealed(manifest))

    def restore(
        self, like: PyTree, *, step: int | None = None, clear: bool = False
    ) -> tuple[PyTree, Any]:
        """Reads a state back, to the last bit.

        Args:
            like: a state of the same structure, shapes and dtypes: one to start from, or
                `jax.eval_shape` of what makes it. Where its leaves lie on chosen devices, or
                have a sharding, there the new ones are put.
            step: which checkpoint; None for the latest.
            clear: whether to leave the recorded steps out: parameters, optimiser, keys and
                carries come back, and tapes are empty, as after `Recorder.clear`. That works
                under another JAX, and with another step or other options of the recorder.

        Returns:
            The state, and the data that was saved with it.

        Raises:
            FileNotFoundError: there is no such checkpoint, or none at all.
            ValueError: the state, or without `clear` a tape, can't go on from there; or the
                checkpoint can't be read, or holds other bits than were saved.

        Cost:
            One read of the state, and one trace of the step.
        """
        self.wait()
        asked = State.of(like, "like")
        ours = self._of.manifest(asked, "like")
        step = self._chosen(step)
        where = f"checkpoint {step} in {self._disk.directory}"
        theirs = self._disk.read_manifest(step)
        check_seal(theirs, where)
        refuse(theirs, ours, where, clear)
        name, read = names(theirs), dict[str, Any]()
        for item, past in (("state", False), ("past", True)):
            leaves = [v for v in asked.leaves if v.past == past and not v.empty]
            if not (past and clear):
                wanted = {name[leaf.path]: leaf.wanted() for leaf in leaves}
                read |= self._disk.read(step, item, wanted)
        check_sums(theirs, read, where)
        found = [read.get(name.get(leaf.path, "")) for leaf in asked.leaves]
        restored = [
            leaf.restored(leaf.blank() if value is None else value)
            for leaf, value in zip(asked.leaves, found, strict=True)
        ]
        return asked.treedef.unflatten(restored), theirs["data"]

    def wait(self) -> None:
        """Waits until all that was saved is on disk.

        Raises:
            OSError: it could not be written.
        """
        self._disk.wait()

    def close(self) -> None:
        """Waits as `wait` does, and ends the threads that write."""
        self._disk.close()

    def _next(self, step: Any) -> int:
        """The number to save under, held against the last one."""
        try:
            step = operator.index(step)
        except TypeError:
            raise ValueError(
                f"step must be an int, but got {_errors.describe(step)}. Of a LearnerState it is "
                "int(state.step)."
            ) from None
        last = self._disk.last()
        least = 0 if last is None else last + 1
        if step < least:
            there = "" if last is None else f", after the checkpoint in {self._disk.directory}"
            raise ValueError(
                f"step must be at least {least}{there}, but got {step}. Go on from the latest "
                "checkpoint, or save in another directory."
            )
        return step

    def _chosen(self, step: int | None) -> int:
        """The number asked for, or the latest."""
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

    A saved state that another process restores goes on as if it had never stopped:
    parameters, optimiser, carry, the recorded steps, the place in a group of `every`, and
    random keys. Each checkpoint also says what wrote it: the version of JAX, window, every
    and weights, the layout of a slot, and a fingerprint of the step. What is on a tape means
    nothing to another step, nor to another JAX, whose residuals may be others. Such a tape
    is refused, and `restore(like, clear=True)` gives back all but the recorded steps.

    Args:
        directory: where they are, or will be; the first save makes it.
        recorder: what `record` or `learner` returned; for a state with the tapes of several
            recorders a list of these, in the order in which `jax.tree.leaves` comes to them.
        keep: how many to keep, the newest; None for all.

    Returns:
        A `Checkpoints`, for a `with` statement.

    Raises:
        ValueError: `recorder` or `keep` is something else.
        NotADirectoryError: `directory` is a file.
        ImportError: orbax-checkpoint is not installed.

    Note:
        Whenever the process is killed, a checkpoint is complete or not there. One process
        writes to a directory; others may read.

    Example:
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
    return Checkpoints(Disk(directory, keep), Steps.of(recorder))


def _json(data: Any) -> Any:
    try:
        return json.loads(json.dumps(data))
    except (TypeError, ValueError) as cause:
        raise ValueError(
            f"data must be what JSON holds, but {first_line(cause)}. Convert it, as with "
            "int(position); what is an array goes into the state."
        ) from cause
