"""The main job's text: reads it, numbers its characters, and sets a tenth of it aside."""

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt

Symbols = npt.NDArray[np.int32]

_TENTH = 10


class UsageError(Exception):
    """A mistake in an option or in the text, told to the user in one sentence."""


@dataclasses.dataclass(frozen=True)
class Text:
    """A text whose characters are numbered.

    Attributes:
        name: where the text came from.
        characters: the different characters of the whole text, in the order of their numbers.
        train: int32 (n,), the part to train on.
        held_out: int32 (steps, streams), the last tenth of the text, cut into parallel streams.
    """

    name: str
    characters: str
    train: Symbols
    held_out: Symbols

    def decode(self, symbols: Symbols) -> str:
        """The text that these numbers stand for."""
        return "".join(self.characters[i] for i in symbols)


def read(path: str | None) -> tuple[str, str]:
    """Reads a file, or the documentation that comes with Python where path is None.

    Returns:
        The name of the text, and its content.

    Raises:
        UsageError: the file can't be read, or is not UTF-8.
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
    """Numbers the characters and sets the last tenth of the text aside.

    Args:
        name: where the text came from.
        content: the text.
        streams: into how many streams the held-out part is cut.
        window: how many steps each of these streams must have at least.

    Raises:
        UsageError: the text is empty, too short, or has one character only.
    """
    if not content:
        raise UsageError(f"the text of {name!r} is empty.")
    needed = _TENTH * streams * (window + 2)
    if len(content) < needed:
        raise UsageError(
            f"the text of {name!r} must have {needed:,} characters at least for {streams} streams "
            f"and a window of {window}, but has {len(content):,}. "
            "Lower --batch or --window, or give more text."
        )
    # Of the whole text, so that each character in the held-out part has a number too.
    characters = "".join(sorted(set(content)))
    if len(characters) == 1:
        raise UsageError(f"the text of {name!r} is the one character {characters!r} over and over.")
    number_of = {character: i for i, character in enumerate(characters)}
    symbols = np.fromiter((number_of[c] for c in content), np.int32, len(content))
    # Held out is the end and not lines at random, which would tell of their neighbours.
    train, held_out = np.split(symbols, [len(symbols) - len(symbols) // _TENTH])
    steps = len(held_out) // streams
    return Text(name, characters, train, held_out[: steps * streams].reshape(streams, steps).T)


def _pydoc_topics() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UsageError("this Python comes without pydoc_data.topics. Pass --text FILE.") from None
    return "\n\n\n".join(topics[name] for name in sorted(topics))
