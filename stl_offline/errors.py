"""The errors of this package: one family, so that a caller (and the command line) can tell them from mistakes.

Every message is one line that says what was given, where, and what to do about it. Each class is also the built-in
that a caller of a plain Python function would expect to catch.
"""


class StlError(Exception):
    """Base of every error that this package raises on purpose."""


class InputError(StlError, ValueError):
    """An argument, an image or a folder cannot be used."""


class FormatError(StlError, ValueError):
    """Stored bytes (label set, .beton, checkpoint) are not what they claim to be, or are of an unknown version."""


class JoinError(StlError, LookupError):
    """Labels and images do not belong together: missing keys, changed images, another class list."""


class TrainingError(StlError, RuntimeError):
    """A run cannot go on: the loss is not finite, a loading thread died."""


class MissingExtraError(StlError, ImportError):
    """A command needs packages of an extra that is not installed."""


class TargetError(StlError, OSError):
    """A result cannot be written: full disk, read-only folder, a folder that belongs to another job."""
