"""What the command line shows, and the streams that it shows it on.

A closed stream, a reader that goes away, or a terminal that lacks a character never ends a command's work.
"""

import contextlib
import io
import logging
import os
import select
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from stl_offline.errors import printable


def echo(*lines: str, err: bool = False) -> None:
    """Print lines. Text from data sets stays within its line: characters that do not print are escaped."""
    for line in lines:
        if err:
            complain(line)
        else:
            print(printable(line), flush=True)


def complain(line: str) -> None:
    """Print a line on standard error, if there is one that takes it."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"{printable(line)}\n")
        sys.stderr.flush()


def flush_output() -> None:
    """Write out what standard output still buffers."""
    if sys.stdout is not None:
        sys.stdout.flush()


def output_has_no_reader() -> bool:
    """Whether whoever read standard output has gone away."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):
        return False


def drop_output() -> None:
    """Send what is left of standard output nowhere: its reader is gone, or its disk is full."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Lossy(io.FileIO):
    """A file descriptor that drops what cannot be written."""

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        with contextlib.suppress(OSError):
            while rest and (written := super().write(rest)):
                rest = rest[written:]
        return len(data)


def prepare_streams() -> None:
    """Make this process's standard streams safe to write to. Only for a process that is the command line's own."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Else the next file that is opened gets this number, and with it what is printed.
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (for the process's life)
    sys.stdout.reconfigure(errors="backslashreplace")
    encoding = "utf-8" if sys.stderr is None else sys.stderr.encoding
    sys.stderr = io.TextIOWrapper(
        _Lossy(2, "w", closefd=False), encoding=encoding, errors="backslashreplace", write_through=True
    )


class _Lines(logging.Handler):
    """Log messages as plain lines on standard error, above a progress bar."""

    def __init__(self, translate: Callable[[str], str]) -> None:
        super().__init__()
        self.translate = translate

    def emit(self, record: logging.LogRecord) -> None:
        progress = sys.modules.get("stl_offline.progress")
        line = " ".join(self.translate(record.getMessage()).split())
        line = f"{record.levelname.lower()}: {line}" if record.levelno != logging.INFO else line
        with progress.bars_hidden() if progress else contextlib.nullcontext():
            complain(line)


@contextlib.contextmanager
def library_shown(translate: Callable[[str], str]) -> Iterator[None]:
    """Show the library's log messages and progress inside the block; with STL_OFFLINE_QUIET only warnings.

    translate: from a message of the library to one for users of a command.
    """
    quiet = bool(os.environ.get("STL_OFFLINE_QUIET"))
    logger, handler = logging.getLogger("stl_offline"), _Lines(translate)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        if (progress := sys.modules.get("stl_offline.progress")) is not None:
            progress.show_progress(False)


def show_progress() -> None:
    """Let the library show its progress from here on, unless STL_OFFLINE_QUIET is set."""
    if not os.environ.get("STL_OFFLINE_QUIET"):
        from stl_offline.progress import show_progress as show

        show(True)


def show_everything() -> None:
    """For --debug: the library's debug messages, too."""
    logging.getLogger("stl_offline").setLevel(logging.DEBUG)


def hide_warnings() -> None:
    """Keep other libraries' Python warnings off the screen, unless the user asked for them (PYTHONWARNINGS)."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
