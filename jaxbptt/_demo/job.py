"""The main job from start to end: trains, compares with other truncations, writes the results."""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from jaxbptt._demo import results
from jaxbptt._demo.model import Model
from jaxbptt._demo.saves import JobCheckpoints, identity_of, interrupted_job_in
from jaxbptt._demo.text import Text, UsageError, prepare, read
from jaxbptt._demo.train import TrainingConfig, tape_bytes, train

_PROMPT, _SAMPLE = 100, 400  # characters
_FILES = ("parameters.npz", "results.json", "curves.png")


def run_job(options: argparse.Namespace) -> int:
    """Runs the job that the options describe.

    Returns:
        0 when the job is finished, 130 when it was interrupted and can be resumed.

    Raises:
        UsageError: there is a mistake in an option or in the text.
    """
    try:
        return _run(options)
    except KeyboardInterrupt:
        # The second Ctrl-C, or one before training began. Checkpoints may be there all the same:
        # of this job, or of the one that it resumes.
        if not interrupted_job_in(options.out / "checkpoints"):
            raise
        told = "run the same command with --resume to continue from the last checkpoint"
        print(f"jaxbptt: interrupted; {told}", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    if options.every > options.steps:
        raise UsageError("--every must be at most --steps, or there is never a gradient.")
    text = prepare(*read(options.text), streams=options.batch, window=options.window)
    config = config_of(options)
    with _writing_to(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
        # Found out now, not after the training.
        tempfile.TemporaryFile(dir=options.out).close()
    model = Model(config.cell, config.hidden, len(text.characters))
    _say(_description(text, model, config))
    identity = identity_of(dataclasses.asdict(config), text)
    folder = options.out / "checkpoints"
    checkpoints = JobCheckpoints(folder, options.save_every, identity)
    with _writing_to(options.out):
        if not _begin_or_resume(options, checkpoints):
            return 0
    # The run that was asked for comes first, so that an interrupted job has its results.
    configs = [config] if options.no_baseline else [config, *_baselines(config)]
    runs: list[results.RunResult] = []
    with _interrupts() as stop_asked:
        for each in configs:
            if runs and stop_asked():
                break
            progress = train(
                model, text, each, stop_asked=stop_asked, checkpoints=checkpoints, say=_say
            )
            _say(f"{each.label}: measuring the gradient by lag")
            # Twice as far as it was trained to look, to show what the window leaves out.
            params, lags = progress.state.params, 2 * config.window
            norms = results.mean_norms_by_lag(model, params, text.held_out, lags)
            runs.append(results.RunResult(each, progress, norms))
        last = runs[-1]
        interrupted = len(runs) < len(configs) or last.progress.steps < last.config.steps
        _write_results(options.out, text, model, runs, interrupted)
    if interrupted:
        _say(
            f"interrupted after {last.progress.steps} of {last.config.steps} steps of "
            f"{last.config.label}; run the same command with --resume to continue"
        )
        return 130
    # Only now, when the results are written: until then the checkpoints are all there is.
    with _writing_to(options.out):
        checkpoints.finish()
    return 0


def config_of(options: argparse.Namespace) -> TrainingConfig:
    """The options that decide what the first run computes."""
    names = [field.name for field in dataclasses.fields(TrainingConfig)]
    return TrainingConfig(**{name: getattr(options, name) for name in names})


def _baselines(config: TrainingConfig) -> list[TrainingConfig]:
    """What the first run is compared with: chunks of the same window, and a window of 1.

    Chunks are what most people train with: one update for each `window` characters.
    """
    window = config.window
    # With fewer updates, each from more losses, Adam bears a larger rate: by a usual rule of
    # thumb larger by the root of their number. With the same rate it would learn too slowly.
    rate = config.learning_rate * (window / config.every) ** 0.5
    chunks = dataclasses.replace(config, every=window, learning_rate=rate)
    single = dataclasses.replace(config, window=1, every=1)
    baselines = [chunks, single] if 1 < window <= config.steps else [single]
    return [each for each in baselines if each.label != config.label]


def _description(text: Text, model: Model, config: TrainingConfig) -> str:
    lines = [
        f"text   {text.name}: {len(text.train):,} characters to train on, "
        f"{text.held_out.size:,} held out, {model.symbols} different",
        f"model  {model.cell}, hidden {model.hidden}, {config.batch} streams",
        f"tape   {config.label}, weights {config.weights}: {tape_bytes(model, config):,} bytes",
    ]
    unused = config.every - config.window
    if unused > 0:
        lines.append(
            f"note   --every {config.every} is more than --window {config.window}: no gradient "
            f"comes from {unused} of each {config.every} characters"
        )
    return "\n".join(lines)


def _begin_or_resume(options: argparse.Namespace, checkpoints: JobCheckpoints) -> bool:
    """Makes the folder ready; False if there is nothing left to do."""
    found = checkpoints.find() if options.resume else "none"
    if found == "interrupted":
        return True
    if found == "finished":
        _say(f"the job in {options.out} is finished: there is nothing to go on with")
        return False
    if options.resume:
        _say(f"there is no interrupted job in {options.out}: beginning one")
    checkpoints.begin()
    _set_earlier_results_aside(options.out)
    return True


def _set_earlier_results_aside(out: Path) -> None:
    """Moves the results of an earlier job to a folder of their own, which nothing overwrites."""
    earlier = [out / name for name in _FILES if (out / name).is_file()]
    if not earlier:
        return
    folders = (out / f"earlier-{number}" for number in itertools.count(1))
    folder = next(folder for folder in folders if not folder.exists())
    folder.mkdir()
    for file in earlier:
        file.rename(folder / file.name)
    _say(f"{out} has the results of an earlier job: they are in {folder} now")


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a question that training asks; the second one ends the job."""
    asked = threading.Event()
    # Python lets the main thread alone handle signals.
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(_number: int, _frame: FrameType | None) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not printed: the signal may have come in the middle of another print.
        with contextlib.suppress(OSError):
            os.write(2, _STOPPING.encode())

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)


_STOPPING = (
    "\njaxbptt: stopping; what there is will be saved, measured and drawn, which takes some "
    "seconds. Press Ctrl-C again to end at once\n"
)


def _write_results(
    out: Path, text: Text, model: Model, runs: list[results.RunResult], interrupted: bool
) -> None:
    """Writes and shows the parameters, the results, a sample of the first run, and the picture."""
    first, params = runs[0].config, runs[0].progress.state.params
    # From text that it was not trained on, so that what follows can't be known by heart.
    prompt = text.held_out[:_PROMPT, -1]
    sample = text.decode(results.sample(model, params, prompt, _SAMPLE, first.seed))
    as_json = {
        "text": text.name,
        "characters": text.characters,
        "settings": dataclasses.asdict(first),
        "interrupted": interrupted,
        "runs": [run.as_json() for run in runs],
        "sample": sample,
    }
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in params.items()}
    parameters, results_json, curves = (out / name for name in _FILES)
    with _writing_to(out):
        np.savez(parameters, **arrays)
        results_json.write_text(json.dumps(as_json, indent=1, allow_nan=False) + "\n")
        results.picture(runs).savefig(curves, dpi=120)
    _say(f"\n{results.table(runs)}\n\na sample after {first.label}:\n{sample}\n")
    _say(f"saved in {out}: {', '.join(_FILES)}")


def _say(message: str) -> None:
    """Prints, whatever the terminal's encoding, and without a text's control characters."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in message)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(shown.encode(encoding, "backslashreplace").decode(encoding), flush=True)


@contextlib.contextmanager
def _writing_to(out: Path) -> Iterator[None]:
    """Tells in a sentence why the results can't be written."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"--out {str(out)!r} cannot be written: {error.strerror or error}."
        ) from None
