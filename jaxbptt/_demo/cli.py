"""The main job at the command line: a character model trained online on real text."""

import argparse
import contextlib
import dataclasses
import importlib
import json
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxbptt._demo.options import parser
from jaxbptt._demo.text import Text, UsageError, prepare, read

if TYPE_CHECKING:
    from jaxbptt._demo.results import Seen
    from jaxbptt._demo.saves import Saves
    from jaxbptt._demo.train import Model, Run, Settings

_PROMPT, _SAMPLE = 100, 400  # characters


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the main job and returns its exit code.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        0; 2 for a fault in the text or an option, said in one line on stderr; 130 if
        interrupted, after what there is has been kept.
    """
    try:
        options = parser().parse_args(argv)
        for package in ("optax", "matplotlib", "tqdm", "orbax.checkpoint"):
            _need(package)
        return _job(options)
    except UsageError as fault:
        return _refuse(str(fault))
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        said = str(error).lower()
        if isinstance(error, MemoryError) or "out of memory" in said or "exhausted" in said:
            return _refuse("the model is too large. Lower --hidden, --batch or --window.")
        raise
    except KeyboardInterrupt:
        print("jaxbptt: interrupted before there was anything to keep", file=sys.stderr)
        return 130


def _refuse(fault: str) -> int:
    print(f"jaxbptt: error: {' '.join(fault.split())}", file=sys.stderr)
    return 2


def _job(options: argparse.Namespace) -> int:
    """Trains, with a baseline beside it, looks at the held-out part, and keeps the results."""
    from jaxbptt._demo.results import look, sample
    from jaxbptt._demo.train import Model, Settings, tape_bytes

    if options.every > options.steps:
        raise UsageError("--every must be at most --steps, or there is never a gradient.")
    text = prepare(*read(options.text), streams=options.batch, window=options.window)
    with _writing(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.out).close()
    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(options, name) for name in names})
    baseline = dataclasses.replace(settings, window=1, every=1)
    plans = [settings] if options.no_baseline or settings == baseline else [settings, baseline]
    model = Model(settings.cell, settings.hidden, len(text.characters))
    _say(
        f"text   {text.name}: {len(text.train):,} characters to train on, "
        f"{text.held_out.size:,} held out, {model.symbols} different\n"
        f"model  {model.cell}, hidden {model.hidden}, {settings.batch} streams\n"
        f"tape   {settings.label}, weights {settings.weights}: "
        f"{tape_bytes(model, settings):,} bytes"
    )
    saves = _saves(options, dataclasses.asdict(settings), text)
    if saves is None:
        return 0
    done: list[Seen] = []
    with _interrupts() as stopped:
        for plan in plans:
            if not (done and stopped()):
                run = _train(model, text, plan, stopped, saves)
                done.append(look(model, run, text.held_out, 2 * settings.window))
        prompt = text.held_out[:_PROMPT, -1]
        said = text.decode(sample(model, done[0].run.params, prompt, _SAMPLE, settings.seed))
        _keep(options.out, text, done, said, stopped())
    _tell(done, said, options.out)
    if stopped():
        last = done[-1].run
        _say(
            f"interrupted after {last.steps} of {settings.steps} steps of {last.settings.label}; "
            "--resume goes on from there"
        )
        return 130
    with _writing(options.out):
        saves.finish()
    return 0


def _saves(options: argparse.Namespace, settings: dict[str, Any], text: Text) -> "Saves | None":
    """Where the job is saved, made ready; None if there is nothing left to do."""
    from jaxbptt._demo.saves import Saves

    saves = Saves.of(options.out, options.save_every, settings, text, _say)
    with _writing(options.out):
        going_on = saves.resume() if options.resume else False
        if going_on is None:
            _say(f"the job in {options.out} is finished: there is nothing to go on with")
            return None
        if not going_on:
            if options.resume:
                _say(f"there is no interrupted job in {options.out}: beginning one")
            saves.begin()
    return saves


def _train(
    model: "Model",
    text: Text,
    settings: "Settings",
    stopped: Callable[[], bool],
    saves: "Saves",
) -> "Run":
    """Trains under a progress bar."""
    from tqdm import tqdm

    from jaxbptt._demo.train import train

    with tqdm(total=settings.steps, desc=settings.label, unit=" steps", dynamic_ncols=True) as bar:

        def report(steps: int, bits: float) -> None:
            bar.set_postfix_str(f"{bits:.3f} bits per character", refresh=False)
            bar.update(steps)

        return train(model, text.train, settings, report=report, stopped=stopped, saves=saves)


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGINT into a question that the loop asks; a second one ends the job."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(_number: int, _frame: FrameType | None) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)


def _keep(out: Path, text: Text, done: "list[Seen]", said: str, interrupted: bool) -> None:
    """Writes the parameters, the results and the picture."""
    from jaxbptt._demo.picture import picture

    facts = {
        "text": text.name,
        "characters": text.characters,
        "settings": dataclasses.asdict(done[0].run.settings),
        "interrupted": interrupted,
        "runs": [seen.facts() for seen in done],
        "sample": said,
    }
    params: dict[str, Any] = {k: np.asarray(v) for k, v in done[0].run.params.items()}
    with _writing(out):
        np.savez(out / "parameters.npz", **params)
        (out / "results.json").write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n")
        picture(done).savefig(out / "curves.png", dpi=120)


def _tell(done: "list[Seen]", said: str, out: Path) -> None:
    """The results side by side, and the sample."""
    rows: list[tuple[str, Callable[[Seen], str]]] = [
        ("", lambda seen: seen.run.settings.label),
        ("held-out bits per character, before", lambda seen: f"{seen.before:.3f}"),
        ("held-out bits per character, after", lambda seen: f"{seen.after:.3f}"),
        ("steps", lambda seen: f"{seen.run.steps:,}"),
        ("steps per second", lambda seen: f"{seen.run.speed:.0f}"),
        ("bytes of the tape", lambda seen: f"{seen.run.nbytes:,}"),
    ]
    table = [f"{name:36}" + "".join(f"{show(seen):>20}" for seen in done) for name, show in rows]
    _say("\n".join(["", *table, "", f"a sample after {done[0].run.settings.label}:", said, ""]))
    _say(f"kept in {out}: parameters.npz, results.json, curves.png")


def _say(words: str) -> None:
    """Prints, whatever the terminal's encoding; a text's control characters are escaped."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in words)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(shown.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _need(package: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError:
        raise UsageError(
            f"the main job needs {package}, which is not there. pip install 'jaxbptt[demo]'"
        ) from None


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Says in a sentence what keeps the results from being written."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"--out {str(out)!r} cannot be written: {error.strerror or error}."
        ) from None
