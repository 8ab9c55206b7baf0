"""How much memory of its own (not mapped files) a piece of work takes at most."""

import threading
from types import TracebackType
from typing import Self

_POLL_SECONDS = 0.005


class PeakMemory:
    """``with PeakMemory() as peak: …`` then ``peak.mib``: the most beyond what was there before."""

    def __enter__(self) -> Self:
        self._over = threading.Event()
        self._before = self._most = _anonymous()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self.mib = (max(self._most, _anonymous()) - self._before) / 2**20

    def _watch(self) -> None:
        while not self._over.wait(_POLL_SECONDS):
            self._most = max(self._most, _anonymous())


def _anonymous() -> int:
    with open("/proc/self/status") as status:
        return 1024 * int(next(line for line in status if line.startswith("RssAnon:")).split()[1])
