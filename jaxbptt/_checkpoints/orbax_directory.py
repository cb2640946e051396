"""A directory of checkpoints, written in the background: the only file that knows orbax."""

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxbptt import _errors
from jaxbptt._compat import savable_by_orbax

Item = Mapping[str, Any]  # arrays by name


class OrbaxDirectory:
    """A directory of checkpoints, each under its number.

    A checkpoint consists of a few items, which hold arrays by name, and of a manifest, which
    is JSON. It is written under another name and renamed when it is complete.
    """

    def __init__(self, directory: Any, keep: int | None):
        """Takes a path, which need not exist yet, and how many of the newest to keep."""
        load_orbax()
        if not isinstance(directory, str | os.PathLike):
            raise ValueError(
                "directory must be a path, a str or an os.PathLike such as pathlib.Path, but got "
                f"{_errors.describe(directory)}. Name a folder: checkpoints('run', recorder)."
            )
        # Orbax also takes addresses of object stores, such as gs://bucket/run.
        if "://" not in str(directory):
            directory = Path(directory).absolute()
            if directory.exists() and not directory.is_dir():
                raise NotADirectoryError(
                    f"directory must be a directory, but {directory} is a file. Name another one."
                )
        self.directory, self._keep = directory, keep
        self._writer: Any = None  # orbax's CheckpointManager, from the first write on
        self._newest: int | None = None  # the last number written here

    def steps(self) -> list[int]:
        """The numbers of the checkpoints that are complete, in order."""
        with self._reader() as reader:
            return sorted(reader.all_steps())

    def last(self) -> int | None:
        """The highest number that is there or is being written; None if there is none."""
        return self._open_writer().latest_step()

    def write(self, step: int, items: Mapping[str, Item], manifest: Item) -> None:
        """Copies the items and begins to write them; items without arrays are left out."""
        args = load_orbax().args
        saves = {
            name: args.StandardSave({key: savable_by_orbax(v) for key, v in arrays.items()})
            for name, arrays in items.items()
            if arrays
        }
        saves["manifest"] = args.JsonSave(manifest)
        self._newest = step
        self._open_writer().save(step, args=args.Composite(**saves))

    def read_manifest(self, step: int) -> dict[str, Any]:
        """Reads the manifest of a checkpoint.

        Raises:
            ValueError: there is none, or it can't be read.
        """
        return self._read(step, "manifest", load_orbax().args.JsonRestore())

    def read(self, step: int, item: str, wanted: Item) -> dict[str, Any]:
        """Reads all arrays of an item.

        Args:
            step: the number of the checkpoint.
            item: the name of the item.
            wanted: for each of its arrays, by name, a ShapeDtypeStruct with a sharding, or a
                NumPy array where a NumPy array is to be read.

        Raises:
            ValueError: they can't be read.
        """
        # An item without arrays was not written either.
        if not wanted:
            return {}
        return self._read(step, item, load_orbax().args.StandardRestore(wanted))

    def wait(self) -> None:
        """Waits until everything given to `write` is on disk.

        Raises:
            OSError: it could not be written.
        """
        if self._writer is None:
            return
        # Errors of the background thread come out here.
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
        except BaseException:
            # After a failed write orbax may fail once more, with an error that says less.
            with contextlib.suppress(Exception):
                self._close_writer()
            raise
        self._close_writer()

    def _close_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _open_writer(self) -> Any:
        if self._writer is None:
            orbax = load_orbax()
            # Only the writer removes what an interrupted write has left behind: a reader
            # might remove what another process is just writing.
            options = orbax.CheckpointManagerOptions(
                preservation_policy=orbax.checkpoint_managers.LatestN(self._keep),
                cleanup_tmp_directories=True,
            )
            self._writer = orbax.CheckpointManager(self.directory, options=options)
        return self._writer

    @contextlib.contextmanager
    def _reader(self) -> Iterator[Any]:
        # A new one each time: a manager lists the directory once, and another process may write.
        orbax = load_orbax()
        options = orbax.CheckpointManagerOptions(create=False)
        with orbax.CheckpointManager(self.directory, options=options) as reader:
            yield reader

    def _read(self, step: int, item: str, request: Any) -> Any:
        args = load_orbax().args.Composite(**{item: request})
        # Orbax raises errors of many kinds for a file that is missing or damaged.
        try:
            with self._reader() as reader:
                return reader.restore(step, args=args)[item]
        except Exception as cause:
            raise ValueError(
                f"checkpoint {step} in {self.directory} must be one that jaxbptt.checkpoints has "
                f"written, and whole, but of its {item} there is: {first_line(cause)}. Take "
                "another one: restore(like, step=...)."
            ) from cause


def load_orbax() -> Any:
    """Imports orbax.checkpoint, which is optional.

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


def first_line(error: Exception) -> str:
    """The first line of an error's message, without its full stop, to be quoted in a sentence."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
