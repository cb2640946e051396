"""The version, of which checkpoints keep a note."""

__version__ = "0.1.0"
