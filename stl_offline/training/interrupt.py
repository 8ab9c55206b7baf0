"""Ctrl-C and SIGTERM as a request to stop after the step at hand, so that what is saved is whole."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class StopRequest:
    """``asked`` turns to the signal's number once somebody wants the run to stop."""

    def __init__(self) -> None:
        self.asked: int | None = None

    def raise_if_asked(self) -> None:
        """End the program as the signal would have: KeyboardInterrupt, or exit code 143 for SIGTERM."""
        if self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        if self.asked is not None:
            raise SystemExit(128 + self.asked)


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM inside the block; a second signal ends the program at once."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # signals reach the main thread only
        return
    handled = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in handled}

    def note(number: int, _frame: object) -> None:
        request.asked = number
        for each in handled:
            signal.signal(each, before[each])

    for number in handled:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number in handled:
            signal.signal(number, before[number])
