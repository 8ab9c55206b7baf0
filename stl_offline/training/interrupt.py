"""Ctrl-C and SIGTERM as a request to stop after the step at hand, so that what is saved is whole."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

# One request may arrive twice: from the terminal, and from torchrun, which passes it on.
_ONE_REQUEST_SECONDS = 2.0


class StopRequest:
    """``asked``: the number of the signal that asks the run to stop; None before one arrives."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.asked: int | None = None

    def ask(self, *, sigint: bool, sigterm: bool) -> None:
        """Note that another process of the job was asked."""
        if self.asked is None and (sigint or sigterm):
            self.asked = signal.SIGINT if sigint else signal.SIGTERM

    def raise_if_asked(self) -> None:
        """End the program as the signal would have: KeyboardInterrupt, or exit code 143 for SIGTERM."""
        if self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        if self.asked is not None:
            raise SystemExit(128 + self.asked)


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM inside the block; a second signal, later than a moment, ends the program at once."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # signals reach the main thread only
        return
    handled = request.SIGNALS
    before = {number: signal.getsignal(number) for number in handled}
    first = 0.0

    def note(number: int, _frame: object) -> None:
        nonlocal first
        if request.asked is None:
            request.asked, first = number, time.monotonic()
        elif time.monotonic() - first > _ONE_REQUEST_SECONDS:
            for each in handled:
                signal.signal(each, before[each])
            signal.raise_signal(number)

    for number in handled:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number in handled:
            signal.signal(number, before[number])
