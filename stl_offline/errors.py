"""The errors of this package: one family, so that a caller (and the command line) can tell them from mistakes.

Every message is one line that says what was given, where, and what to do about it. Each class is also the built-in
that a caller of a plain Python function would expect to catch.
"""

import re

# Of a message. Names from damaged or hostile files may be of any length.
_MOST_CHARACTERS = 4000

# Control characters (Unicode's Cc), and halves of surrogate pairs, which are no text: in no key and no class name.
NO_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: object) -> str:
    """``str(text)`` with every character that does not print replaced by its Python escape.

    Keys, class names and licences come from whoever made a data set. Escape codes, line breaks and marks that turn the
    direction of writing would let them change what a terminal shows: they appear as ``\\x1b``, ``\\n`` and ``\\u202e``.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def counted(count: int, noun: str) -> str:
    """A count with its noun: 1 shard, 2 shards, 1,000 classes."""
    plural = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{plural}"


class StlError(Exception):
    """Base of every error that this package raises on purpose. Its text is one line that can be printed safely."""

    def __str__(self) -> str:
        # Exception's own text: KeyError, a base of one subclass, would give it in quotes.
        text = Exception.__str__(self)
        return _cut(printable(re.sub(r"\s*[\r\n]+\s*", " ", _cut(text))))


def _cut(text: str) -> str:
    """A long text without its middle."""
    half = (_MOST_CHARACTERS - len(" … ")) // 2
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:half]} … {text[-half:]}"


class InputError(StlError, ValueError):
    """An argument, an image or a folder cannot be used."""


class FormatError(StlError, ValueError):
    """Stored bytes (label set, .beton, checkpoint) are not what they claim to be, or are of an unknown version."""


class JoinError(StlError, LookupError):
    """Labels and images do not belong together: missing keys, changed images, another class list."""


class UnknownKeyError(JoinError, KeyError):
    """A label set has no label for this key. Also a KeyError, so that ``labels.get(key)`` works as on any mapping."""


class TrainingError(StlError, RuntimeError):
    """A run cannot go on: the loss is not finite, a loading thread died."""


class MissingExtraError(StlError, ImportError):
    """A command needs packages of an extra that is not installed."""


class TargetError(StlError, OSError):
    """A result cannot be written: full disk, read-only folder, a folder that belongs to another job."""
