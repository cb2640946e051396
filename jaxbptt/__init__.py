"""Truncated backpropagation through time as one function transformation."""

from jaxbptt._record import Cotangents, Recorder, record
from jaxbptt._tape import Tape

__all__ = ["Cotangents", "Recorder", "Tape", "record"]
__version__ = "0.1.0"
