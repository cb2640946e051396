"""The main job's checkpoints: what an interrupted job leaves in its folder and goes on from."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxbptt._checkpoints.checkpoints import Checkpoints, checkpoints
from jaxbptt._demo.text import Text, UsageError
from jaxbptt._training.learner import Learner
from jaxbptt._training.state import LearnerState


@dataclasses.dataclass
class Progress:
    """How far a run has come.

    Attributes:
        state: what the next step goes on from.
        curve: (steps done, bits per character of the block before).
        seconds: of training, without the time to compile.
    """

    state: LearnerState
    curve: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        """Steps done."""
        return int(self.state.step)


@dataclasses.dataclass(frozen=True)
class Saves:
    """Where a job's runs are saved, and how often.

    Attributes:
        folder: one folder for each run, and `job.json`, which says whose they are.
        every: save after so many steps; 0 for the end only.
        job: what must be the same when the job goes on.
        say: tells the user what could not be gone on with.
    """

    folder: Path
    every: int
    job: dict[str, Any]
    say: Callable[[str], None]

    @classmethod
    def of(
        cls,
        out: Path,
        every: int,
        settings: dict[str, Any],
        text: Text,
        say: Callable[[str], None],
    ) -> "Saves":
        """Those of a job with these settings, beside its results."""
        digest = hashlib.sha256(text.train.tobytes() + text.held_out.tobytes())
        options = {f"--{name.replace('_', '-')}": value for name, value in settings.items()}
        return cls(out / "checkpoints", every, options | {"--text": digest.hexdigest()}, say)

    def begin(self) -> None:
        """Makes the folder for a new job.

        Raises:
            UsageError: there is an interrupted one in it.
        """
        before = self._read()
        runs = before.get("runs", [])
        interrupted = [run for run in runs if any((self.folder / run).glob("[0-9]*"))]
        if interrupted and not before["finished"]:
            raise UsageError(
                f"{str(self.folder)!r} has an interrupted job. Add --resume to go on with it; to "
                "begin anew, delete that folder, or name another --out."
            )
        self._write(finished=False, runs=self._deleted(runs))

    def resume(self) -> bool | None:
        """True to go on with an interrupted job; None if this one is finished, False without any.

        Raises:
            UsageError: the interrupted job is another one.
        """
        before = self._read()
        if not before or before["finished"]:
            self._deleted(before.get("runs", []))  # what a job left that was killed at its end
            return None if before.get("job") == self.job else False
        for option, now in self.job.items():
            if before["job"].get(option) != now:
                raise UsageError(_other_job(self.folder, option, before["job"].get(option), now))
        return True

    def finish(self) -> None:
        """Deletes the checkpoints: the results are kept elsewhere.

        That the job is finished is written first. Killed in between, it leaves checkpoints that
        nobody needs, and not a job to go on with that lacks some.
        """
        runs = self._read().get("runs", [])
        self._write(finished=True, runs=runs)
        self._write(finished=True, runs=self._deleted(runs))

    @contextlib.contextmanager
    def of_run(self, name: str, online: Learner) -> "Iterator[RunSaves]":
        """Those of one run; at its end waits for what is being written.

        Raises:
            UsageError: there is a folder in its place that no job has made.
        """
        run = name.replace(", ", "-").replace(" ", "-")
        folder, runs = self.folder / run, self._read().get("runs", [])
        if run not in runs:
            if folder.exists():
                raise UsageError(
                    f"{str(folder)!r} is there already, and was not made by this program. Name "
                    "another --out."
                )
            self._write(finished=False, runs=[*runs, run])
        with checkpoints(folder, online, keep=2) as store:
            yield RunSaves(store, self.every, store.latest or 0, self.say)

    def _read(self) -> dict[str, Any]:
        try:
            found = dict(json.loads((self.folder / "job.json").read_text()))
        except (FileNotFoundError, TypeError, ValueError):
            return {}
        return found if {"job", "finished", "runs"} <= found.keys() else {}

    def _deleted(self, runs: list[str]) -> list[str]:
        """Deletes the checkpoints of these runs; those of which something else is left stay.

        Only folders that `job.json` names were made here, and in them only what orbax names.
        """
        for run in runs:
            for step in (self.folder / run).glob("[0-9]*"):
                if step.is_dir() and step.name.split(".")[0].isdigit():
                    shutil.rmtree(step)
            with contextlib.suppress(OSError):
                (self.folder / run).rmdir()
        return [run for run in runs if (self.folder / run).exists()]

    def _write(self, finished: bool, runs: list[str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        written = self.folder / "job.json.new"
        written.write_text(
            json.dumps({"job": self.job, "finished": finished, "runs": runs}, indent=1) + "\n"
        )
        os.replace(written, self.folder / "job.json")


@dataclasses.dataclass
class RunSaves:
    """The checkpoints of one run."""

    store: Checkpoints
    every: int
    last: int
    say: Callable[[str], None]

    def restored(self, start: Progress) -> Progress:
        """The newest progress, or `start` if there is none.

        Recorded steps that mean nothing here, as those of another JAX, are left behind.
        """
        if self.store.latest is None:
            return start
        try:
            state, data = self.store.restore(start.state)
        except ValueError as refusal:
            self.say(f"{refusal}\nThe recorded steps are left behind, all else goes on.")
            state, data = self._without_the_past(start)
        curve = [(int(steps), float(bits)) for steps, bits in data["curve"]]
        return Progress(state, curve, float(data["seconds"]))

    def _without_the_past(self, start: Progress) -> tuple[LearnerState, Any]:
        try:
            return self.store.restore(start.state, clear=True)
        except ValueError as fault:
            raise UsageError(f"{fault} Delete the checkpoints to begin anew.") from None

    def save(self, now: Progress, *, last: bool) -> None:
        """Saves when it is time, or for the last time."""
        steps, every = now.steps, self.every
        due = last or (every and steps // every > self.last // every)
        if due and steps > self.last:
            self.store.save(steps, now.state, {"curve": now.curve, "seconds": now.seconds})
            self.last = steps


def _other_job(folder: Path, option: str, before: Any, now: Any) -> str:
    if option == "--text":
        return f"{str(folder)!r} has a job with another text. Name that --text, or another --out."
    return (
        f"{option} must be {before} to go on with the job in {str(folder)!r}, but is {now}. "
        "Begin another job in another --out."
    )
