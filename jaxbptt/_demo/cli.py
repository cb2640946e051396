"""The main job at the command line: its options, and what can go wrong, in one line each."""

import argparse
import contextlib
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

from jaxbptt._demo.text import UsageError

_LARGEST = 2**31 - 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the main job and returns its exit code.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        0 when the job is finished; 2 after a mistake in the text or an option, told in one
        line on stderr; 130 when it was interrupted.
    """
    try:
        options = parser().parse_args(argv)
        for package in ("optax", "matplotlib", "tqdm", "orbax.checkpoint"):
            _check_installed(package)
        # Imported here, since it needs these packages, which are not installed with jaxbptt.
        from jaxbptt._demo.job import run_job

        return run_job(options)
    except UsageError as fault:
        return _refuse(str(fault))
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        # XLA has no exception of its own for this.
        message = str(error).lower()
        if isinstance(error, MemoryError) or "out of memory" in message or "exhausted" in message:
            return _refuse("the model is too large. Lower --hidden, --batch or --window.")
        raise
    except KeyboardInterrupt:
        print("jaxbptt: interrupted before anything was saved", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The parser of the options."""
    parser = _Parser(
        prog="jaxbptt",
        description="Trains a character-level recurrent language model online on real text, "
        "compares truncations, and writes the results to a folder.",
        allow_abbrev=False,
    )

    # Each default is told, those that argparse would call None or False in words.
    def add(option: str, meaning: str, without_it: str = "%(default)s", **how: Any) -> None:
        parser.add_argument(option, help=f"{meaning} (default: {without_it})", **how)

    count = _whole_number(1)
    add("--text", "a UTF-8 text", "Python's own documentation", metavar="FILE")
    add("--window", "how many steps the gradient reaches back", type=count, default=20)
    add("--every", "update the parameters every so many steps", type=count, default=1)
    weights = (
        "the parameters at which past steps are differentiated: stored, their own; current, the "
        "newest; replayed, the newest, and the window is run again with them"
    )
    add("--weights", weights, choices=("stored", "current", "replayed"), default="current")
    add("--cell", "the recurrent cell", choices=("rnn", "gru", "lstm"), default="gru")
    add("--hidden", "the size of the cell", type=count, default=128)
    add("--batch", "how many streams of text are read in parallel", type=count, default=32)
    add("--steps", "how many characters of each stream are read", type=count, default=8000)
    add("--seed", "of the random numbers", type=_whole_number(0), default=0)
    rate = "Adam's learning rate at the start; it falls to 0 along a cosine"
    add("--learning-rate", rate, type=_positive_number, default=0.005)
    add("--out", "the folder for the results", type=_folder, default="runs/text", metavar="DIR")
    no_baseline = "leave out the runs with other windows that the results are compared with"
    add("--no-baseline", no_baseline, "include them", action="store_true")
    save = "save a checkpoint every so many steps; 0 to save at an interrupt only"
    add("--save-every", save, type=_whole_number(0), default=1000, metavar="STEPS")
    resume = "continue the interrupted job in --out, if there is one"
    add("--resume", resume, "begin a new job", action="store_true")
    return parser


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _whole_number(least: int) -> Callable[[str], int]:
    def convert(given: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= int(given) <= _LARGEST:
                return int(given)
        raise argparse.ArgumentTypeError(
            f"must be a whole number from {least} to {_LARGEST}, but got {given!r}"
        )

    return convert


def _positive_number(given: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(given) < math.inf:
            return float(given)
    raise argparse.ArgumentTypeError(f"must be a positive number, but got {given!r}")


def _folder(given: str) -> Path:
    if not given:
        raise argparse.ArgumentTypeError("must name a folder, but got ''")
    return Path(given)


def _check_installed(package: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError:
        raise UsageError(
            f"the main job needs {package}, which is not there. pip install 'jaxbptt[demo]'"
        ) from None


def _refuse(fault: str) -> int:
    print(f"jaxbptt: error: {' '.join(fault.split())}", file=sys.stderr)
    return 2
