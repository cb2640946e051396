"""A directory of checkpoints, written in the background: the only file that knows orbax."""

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

Item = Mapping[str, Any]  # arrays by name


class Disk:
    """The checkpoints in a directory, each under its number.

    A checkpoint is a few items of arrays, by name, and a manifest, which is JSON. It is
    written beside the others and renamed when it is complete.
    """

    def __init__(self, directory: Any, keep: int | None):
        """Takes where they are, or will be, and how many of the newest to keep."""
        load()
        if "://" not in str(directory):
            directory = Path(directory).absolute()
            if directory.exists() and not directory.is_dir():
                raise NotADirectoryError(
                    f"directory must be a directory, but {directory} is a file. Name another one."
                )
        self.directory, self._keep = directory, keep
        self._writer: Any = None  # orbax's manager, from the first write on
        self._newest: int | None = None  # of those written here

    def steps(self) -> list[int]:
        """The numbers of the checkpoints that are complete, in order."""
        with self._reader() as reader:
            return sorted(reader.all_steps())

    def last(self) -> int | None:
        """The highest number there is, or is being written."""
        return self._open_writer().latest_step()

    def write(self, step: int, items: Mapping[str, Item], manifest: Item) -> None:
        """Copies the items and starts to write; of items without arrays there is nothing."""
        args = load().args
        saves = {
            name: args.StandardSave({key: _given(array) for key, array in tree.items()})
            for name, tree in items.items()
            if tree
        }
        saves["manifest"] = args.JsonSave(manifest)
        self._newest = step
        self._open_writer().save(step, args=args.Composite(**saves))

    def read_manifest(self, step: int) -> dict[str, Any]:
        """The manifest of a checkpoint.

        Raises:
            ValueError: there is none, or it can't be read.
        """
        return self._read(step, "manifest", load().args.JsonRestore())

    def read(self, step: int, item: str, wanted: Item) -> dict[str, Any]:
        """Arrays of an item.

        Args:
            step: the number of the checkpoint.
            item: the name of the item.
            wanted: for all of its arrays something like it: ShapeDtypeStructs with a
                sharding, or arrays of numpy for those that are to be arrays of numpy.

        Raises:
            ValueError: they can't be read.
        """
        return self._read(step, item, load().args.StandardRestore(wanted)) if wanted else {}

    def wait(self) -> None:
        """Waits until all that was given to `write` is on disk.

        Raises:
            OSError: it could not be written.
        """
        if self._writer is None:
            return
        try:
            self._writer.wait_until_finished()
        except Exception as cause:
            raise OSError(
                f"directory must take what is saved, but in {self.directory} the state of step "
                f"{self._newest} could not be written: {first_line(cause)}. The checkpoints "
                "before it are still there."
            ) from cause

    def close(self) -> None:
        """Waits as `wait` does, and ends the threads that write."""
        try:
            self.wait()
        finally:
            writer, self._writer = self._writer, None
            if writer is not None:
                writer.close()

    def _open_writer(self) -> Any:
        if self._writer is None:
            orbax = load()
            # What an interrupted write has left is removed: here and not by those that
            # read, who would remove what another process is writing.
            options = orbax.CheckpointManagerOptions(
                preservation_policy=orbax.checkpoint_managers.LatestN(self._keep),
                cleanup_tmp_directories=True,
            )
            self._writer = orbax.CheckpointManager(self.directory, options=options)
        return self._writer

    @contextlib.contextmanager
    def _reader(self) -> Iterator[Any]:
        orbax = load()
        options = orbax.CheckpointManagerOptions(create=False)
        with orbax.CheckpointManager(self.directory, options=options) as reader:
            yield reader

    def _read(self, step: int, item: str, request: Any) -> Any:
        what = load().args.Composite(**{item: request})
        try:
            with self._reader() as reader:
                return reader.restore(step, args=what)[item]
        except Exception as cause:
            raise ValueError(
                f"checkpoint {step} in {self.directory} must be one that jaxbptt.checkpoints has "
                f"written, and whole, but of its {item} there is: {first_line(cause)}. Take "
                "another one: restore(like, step=...)."
            ) from cause


def load() -> Any:
    """The module orbax.checkpoint.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("orbax.checkpoint")
    except ImportError as cause:
        raise ImportError(
            "checkpoints need orbax-checkpoint, which is not there. "
            "pip install 'jaxbptt[checkpoint]'"
        ) from cause


def _given(array: Any) -> Any:
    """An array as orbax takes it."""
    if hasattr(jax, "set_mesh") or not getattr(array, "is_fully_addressable", False):
        return array
    # What lies on several devices orbax divides between them, under a mesh that it sets
    # by a function that JAX 0.7.0 does not have yet.
    return array if len(array.sharding.device_set) == 1 else np.asarray(array)


def first_line(error: Exception) -> str:
    """The first line of an error's message, to go into a sentence."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
