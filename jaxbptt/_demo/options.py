"""The main job's options at the command line."""

import argparse
import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from jaxbptt._demo.text import UsageError

_LARGEST = 2**31 - 1


class Parser(argparse.ArgumentParser):
    """Says a fault in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parser() -> argparse.ArgumentParser:
    """What reads the options."""
    parser = Parser(
        prog="jaxbptt",
        description="Trains a character-level recurrent language model online on real text.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add, count = parser.add_argument, _whole(1)
    add("--text", metavar="FILE", help="UTF-8 text; without it the documentation inside Python")
    add("--window", type=count, default=20, help="how many steps the gradient reaches back")
    add("--every", type=count, default=1, help="after how many steps there is a gradient")
    add(
        "--weights", choices=("stored", "current"), default="current", help="each step's or today's"
    )
    add("--cell", choices=("rnn", "gru", "lstm"), default="gru")
    add("--hidden", type=count, default=128, help="size of the cell")
    add("--batch", type=count, default=32, help="streams in parallel")
    add("--steps", type=count, default=8000)
    add("--seed", type=_whole(0), default=0)
    add("--learning-rate", type=_positive, default=0.005, help="of Adam; it falls to 0")
    add("--out", type=Path, default=Path("runs/text"), metavar="DIR", help="for the results")
    add("--no-baseline", action="store_true", help="leave out the run with --window 1")
    saved = "save after so many steps, to --resume from; 0 for at an interrupt only"
    add("--save-every", type=_whole(0), default=1000, metavar="STEPS", help=saved)
    add("--resume", action="store_true", help="go on with the interrupted job in --out")
    return parser


def _whole(least: int) -> Callable[[str], int]:
    def convert(given: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= int(given) <= _LARGEST:
                return int(given)
        raise argparse.ArgumentTypeError(
            f"must be a whole number from {least} to {_LARGEST}, but got {given!r}"
        )

    return convert


def _positive(given: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(given) < math.inf:
            return float(given)
    raise argparse.ArgumentTypeError(f"must be a positive number, but got {given!r}")
