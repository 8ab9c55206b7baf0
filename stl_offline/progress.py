"""Progress on standard error: count, rate and time left. Nothing is shown unless it is switched on.

The command line switches it on. In Python::

    from stl_offline.progress import show_progress

    show_progress()
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol, Self

from tqdm import tqdm

# Without a terminal: seconds until the first line, and between two lines.
FIRST_LINE, NEXT_LINE = 1.0, 10.0

_shown = False


class Progress(Protocol):
    """What `progress_bar` gives: the part of tqdm's interface that this package uses."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> Any: ...

    def update(self, n: int = 1) -> Any:
        """Count ``n`` more as done."""

    def set_description(self, desc: str) -> Any:
        """Name what is going on from now on."""

    def set_postfix_str(self, s: str, refresh: bool = True) -> Any:
        """Add a remark, such as a size."""

    def set_postfix(self, *, refresh: bool = True, **values: Any) -> Any:
        """Add values by name, such as a loss."""


def show_progress(shown: bool = True) -> None:
    """Show (or hide) the progress of work that begins from now on, in this process."""
    global _shown
    _shown = shown


def progress_bar(
    total: int | None, description: str, unit: str = "image", *, enabled: bool = True, initial: int = 0
) -> Progress:
    """Progress of a piece of work. Use it as a context manager and call ``update(n)``.

    A bar on a terminal; elsewhere (a log file, a pipe) a line after a second, then every 10 seconds, and at the end.
    Work of less than a second gets no line.

    Args:
        total: units of work, None if unknown; initial: those that are done already.
        enabled: False shows nothing, such as in all processes of a job but the first.
    """
    if not (_shown and enabled):
        return tqdm(disable=True)
    if sys.stderr is None or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return _Lines(total, description, unit, initial)
    return tqdm(
        total=total,
        desc=description,
        unit=f" {unit}s",
        initial=initial,
        dynamic_ncols=True,
        mininterval=0.2,
        smoothing=0.1,
    )


@contextlib.contextmanager
def bars_hidden() -> Iterator[None]:
    """Clear bars from the terminal inside the block, so that lines can be printed above them."""
    with tqdm.external_write_mode(file=sys.stderr):
        yield


class _Lines:
    """Progress as plain lines, for output that is not a terminal."""

    def __init__(self, total: int | None, description: str, unit: str, initial: int) -> None:
        self._total, self._description, self._unit = total, description, unit
        self._done = self._first = self._shown_done = initial
        self._remark = ""
        self._started = self._shown_at = time.monotonic()
        self._due = self._started + FIRST_LINE

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        seconds = time.monotonic() - self._started
        if seconds < FIRST_LINE:
            return
        rate = (self._done - self._first) / seconds
        self._print(f"{rate:,.1f} {self._unit}s/s", f"{_clock(seconds)} in all")

    def update(self, n: int = 1) -> None:
        self._done += n
        now = time.monotonic()
        if now < self._due:
            return
        # Of the time since the last line: the first steps compile and fill caches.
        rate = (self._done - self._shown_done) / (now - self._shown_at)
        facts = [f"{rate:,.1f} {self._unit}s/s"]
        if self._total is not None and rate > 0:
            facts.append(f"{_clock((self._total - self._done) / rate)} left")
        self._print(*facts)
        self._shown_done, self._shown_at, self._due = self._done, now, now + NEXT_LINE

    def set_description(self, desc: str) -> None:
        self._description = desc

    def set_postfix_str(self, s: str, refresh: bool = True) -> None:
        self._remark = s

    def set_postfix(self, *, refresh: bool = True, **values: Any) -> None:
        self._remark = ", ".join(f"{name} {value}" for name, value in values.items())

    def _print(self, *facts: str) -> None:
        if sys.stderr is None:
            return
        count = f"{self._done:,}" if self._total is None else f"{self._done:,} of {self._total:,}"
        words = ", ".join([f"{count} {self._unit}s", *facts, *([self._remark] if self._remark else [])])
        # A reader that has gone away is no reason to stop the work.
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"{self._description}: {words}\n")
            sys.stderr.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
