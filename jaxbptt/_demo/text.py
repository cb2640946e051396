"""The main job's text: read, given numbers, cut into streams; faults in one line each."""

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt

Symbols = npt.NDArray[np.int32]

_HELD_OUT = 10  # the last tenth


class UsageError(Exception):
    """Something given at the command line that cannot be used, in one sentence."""


@dataclasses.dataclass(frozen=True)
class Text:
    """A text as numbers.

    Attributes:
        name: where it came from.
        characters: the different characters in order of their numbers. They are those of the
            whole text, so that each one in the held-out part has a number.
        train: int32 (n,), the part to train on.
        held_out: int32 (steps, streams), the last tenth as parallel streams.
    """

    name: str
    characters: str
    train: Symbols
    held_out: Symbols

    def decode(self, symbols: Symbols) -> str:
        """The characters with these numbers."""
        return "".join(self.characters[i] for i in symbols)


def read(path: str | None) -> tuple[str, str]:
    """Name and content of the file, or of the documentation that comes with Python.

    Raises:
        UsageError: there is no such text, or it is not UTF-8.
    """
    if path is None:
        return "pydoc_data.topics", _pydoc_topics()
    try:
        return path, Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--text {path!r} must be UTF-8 text, but byte {error.start} is not. "
            "Convert it, e.g. with iconv."
        ) from None
    except OSError as error:
        raise UsageError(f"--text {path!r} cannot be read: {error.strerror}.") from None


def prepare(name: str, content: str, *, streams: int, window: int) -> Text:
    """Gives each character its number and cuts the text in two.

    Args:
        name: where the text came from.
        content: the text.
        streams: how many streams run in parallel.
        window: each held-out stream must be longer than this many steps.

    Raises:
        UsageError: the text is empty, too short, or all of one character.
    """
    if not content:
        raise UsageError(f"the text of {name!r} is empty.")
    needed = _HELD_OUT * streams * (window + 2)
    if len(content) < needed:
        raise UsageError(
            f"the text of {name!r} must have {needed:,} characters at least for {streams} streams "
            f"and a window of {window}, but has {len(content):,}. "
            "Lower --batch or --window, or give more text."
        )
    characters = "".join(sorted(set(content)))
    if len(characters) == 1:
        raise UsageError(f"the text of {name!r} is the one character {characters!r} over and over.")
    number = {character: i for i, character in enumerate(characters)}
    symbols = np.fromiter((number[c] for c in content), np.int32, len(content))
    train, held_out = np.split(symbols, [len(symbols) - len(symbols) // _HELD_OUT])
    steps = len(held_out) // streams
    return Text(name, characters, train, held_out[: steps * streams].reshape(streams, steps).T)


def _pydoc_topics() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UsageError("this Python comes without pydoc_data.topics. Pass --text FILE.") from None
    return "\n\n\n".join(topics[name] for name in sorted(topics))
