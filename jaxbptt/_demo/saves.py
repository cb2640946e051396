"""The main job's checkpoints: what an interrupted job leaves in its folder and continues from."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jaxbptt
from jaxbptt._demo.text import Text, UsageError

Curve = list[tuple[int, float]]  # (steps done, bits per character)
_CURVES = ("curve", "held_out_curve")


@dataclasses.dataclass
class TrainingProgress:
    """How far a run has come, and what it has measured on the way.

    Attributes:
        state: what the next step continues from.
        curve: bits per character of each block of text, measured as it was read.
        held_out_curve: bits per character on held-out text, from before the first step on.
        seconds: the time spent on training, without compiling, measuring and saving.
    """

    state: jaxbptt.LearnerState
    curve: Curve = dataclasses.field(default_factory=list)
    held_out_curve: Curve = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        """How many steps are done."""
        return int(self.state.step)

    @property
    def speed(self) -> float:
        """Steps per second."""
        return self.steps / self.seconds if self.seconds else 0.0


def identity_of(options: dict[str, Any], text: Text) -> dict[str, Any]:
    """What must be the same for a job to continue: its options, and a hash of its text."""
    digest = hashlib.sha256(text.train.tobytes() + text.held_out.tobytes())
    named = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    return named | {"--text": digest.hexdigest()}


@dataclasses.dataclass(frozen=True)
class JobCheckpoints:
    """The folder with the checkpoints of a job's runs.

    `job.json` in it says whose they are. Of the rest only folders that it names were made by
    this program, and only these are ever deleted.

    Attributes:
        folder: where they are: one folder for each run.
        every: how many steps lie between two saves; 0 to save at the end of a run only.
        identity: what must be the same for the job to continue.
    """

    folder: Path
    every: int
    identity: dict[str, Any]

    def begin(self) -> None:
        """Makes the folder for a new job.

        Raises:
            UsageError: there is an interrupted job in it.
        """
        found = self._read()
        if _has_checkpoints(self.folder, found) and not found["finished"]:
            raise UsageError(
                f"{str(self.folder)!r} has an interrupted job. Add --resume to go on with it; to "
                "begin anew, delete that folder, or name another --out."
            )
        self._write(finished=False, runs=self._delete(found.get("runs", [])))

    def find(self) -> Literal["interrupted", "finished", "none"]:
        """What there is to resume; a finished job with other options is none.

        Raises:
            UsageError: there is an interrupted job with other options.
        """
        found = self._read()
        if not found:
            return "none"
        if found["finished"]:
            # A job that was killed while it deleted its checkpoints leaves some of them.
            self._delete(found["runs"])
            return "finished" if found["job"] == self.identity else "none"
        for option, now in self.identity.items():
            if found["job"].get(option) != now:
                raise _other_job(self.folder, option, found["job"].get(option), now)
        return "interrupted"

    def finish(self) -> None:
        """Deletes the checkpoints: the results are elsewhere."""
        runs = self._read().get("runs", [])
        # That the job is finished is written first. When killed in between, it then leaves
        # checkpoints that nobody needs, and not a job to resume that lacks some of them.
        self._write(finished=True, runs=runs)
        self._write(finished=True, runs=self._delete(runs))

    @contextlib.contextmanager
    def of_run(self, name: str, learner: jaxbptt.Learner) -> "Iterator[RunCheckpoints]":
        """The checkpoints of one run; on leaving it waits for what is being written.

        Raises:
            UsageError: there is a folder in their place that this program has not made.
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
        # Two, so that one is left if the newest turns out to be damaged.
        with jaxbptt.checkpoints(folder, learner, keep=2) as store:
            yield RunCheckpoints(store, self.every, store.latest or 0)

    def _read(self) -> dict[str, Any]:
        return _read_job(self.folder)

    def _write(self, finished: bool, runs: list[str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        job = {"job": self.identity, "finished": finished, "runs": runs}
        # Replaced in one go, since the process may be killed while it writes.
        new = self.folder / "job.json.new"
        new.write_text(json.dumps(job, indent=1) + "\n")
        os.replace(new, self.folder / "job.json")

    def _delete(self, runs: list[str]) -> list[str]:
        """Deletes the checkpoints of these runs; returns those whose folder has other files."""
        for run in runs:
            for step in (self.folder / run).glob("[0-9]*"):
                # orbax calls one that it is still writing 100.orbax-checkpoint-tmp.
                if step.is_dir() and step.name.split(".")[0].isdigit():
                    shutil.rmtree(step)
            with contextlib.suppress(OSError):
                (self.folder / run).rmdir()
        return [run for run in runs if (self.folder / run).exists()]


@dataclasses.dataclass
class RunCheckpoints:
    """The checkpoints of one run.

    Attributes:
        store: where they are.
        every: how many steps lie between two saves; 0 to save at the end only.
        last: the step of the newest one.
    """

    store: jaxbptt.Checkpoints
    every: int
    last: int

    def restored(self, start: TrainingProgress, say: Callable[[str], None]) -> TrainingProgress:
        """The newest progress, or `start` if nothing was saved.

        Recorded steps that can't be used, as those of another version of JAX, are left out;
        `say` is told so.
        """
        if self.store.latest is None:
            return start
        try:
            state, data = self.store.restore(start.state)
        except ValueError as refusal:
            say(f"{refusal}\nThe recorded steps are left behind, all else goes on.")
            try:
                state, data = self.store.restore(start.state, clear=True)
            except ValueError as fault:
                raise UsageError(f"{fault} Delete the checkpoints to begin anew.") from None
        # JSON gives tuples back as lists.
        curve, held_out = ([(steps, bits) for steps, bits in data[name]] for name in _CURVES)
        return TrainingProgress(state, curve, held_out, data["seconds"])

    def save(self, progress: TrainingProgress, *, last: bool) -> None:
        """Saves where a multiple of `every` was passed, and where the run ends."""
        steps, every = progress.steps, self.every
        due = last or (every and steps // every > self.last // every)
        if due and steps > self.last:
            data = {name: getattr(progress, name) for name in (*_CURVES, "seconds")}
            self.store.save(steps, progress.state, data)
            self.last = steps


def interrupted_job_in(folder: Path) -> bool:
    """Whether there is something to resume in a folder of checkpoints."""
    found = _read_job(folder)
    return _has_checkpoints(folder, found) and not found["finished"]


def _has_checkpoints(folder: Path, job: dict[str, Any]) -> bool:
    return any(any((folder / run).glob("[0-9]*")) for run in job.get("runs", []))


def _read_job(folder: Path) -> dict[str, Any]:
    """What `job.json` says; nothing where it is missing or another program's."""
    try:
        found = dict(json.loads((folder / "job.json").read_text()))
    except (FileNotFoundError, TypeError, ValueError):
        return {}
    return found if {"job", "finished", "runs"} <= found.keys() else {}


def _other_job(folder: Path, option: str, before: Any, now: Any) -> UsageError:
    if option == "--text":
        fault = f"{str(folder)!r} has a job with another text. Name that --text, or another --out."
    else:
        fault = (
            f"{option} must be {before} to go on with the job in {str(folder)!r}, but is {now}. "
            "Begin another job in another --out."
        )
    return UsageError(fault)
