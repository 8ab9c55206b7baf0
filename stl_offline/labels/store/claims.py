"""Claims: which worker writes which shard of a label set, without a lock, a server or a common clock.

A claim is a small file that a worker creates unless there is one, and writes again every `RENEW_SECONDS`. The file
``00012-0`` is the first claim on shard 12. A worker that finds it no longer renewed takes the shard over by creating
``00012-1``, so that of several workers one gets it. No clocks are compared: a claim is dead if it was the same in two
listings that are `LIFE_SECONDS` apart by the watching worker's own clock, or at once if its owner was a process of this
machine that has ended.

Claims only save double work. What keeps a label set whole is that every file of it is created by a condition
(`Storage.create`): a worker that was suspended for hours and then goes on finds its shard written, and changes nothing.
"""

import contextlib
import json
import math
import os
import re
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any, Self

from stl_offline.errors import FormatError, StlError
from stl_offline.labels.store.layout import CLAIMS, RECORD_BYTES, read_object
from stl_offline.labels.store.storage import Storage

RENEW_SECONDS = 30.0
LIFE_SECONDS = 120.0

_NAME = re.compile(r"(\d{5,9})-(\d{1,9})", re.ASCII)


class Claims:
    """The claims of one worker on the shards of a label set, renewed by a thread until they are released.

    Use it as a context manager; leaving it releases what is still claimed.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._held: dict[int, str] = {}
        # What is being created: an interrupt may come once it is there, before that is noted.
        self._trying: tuple[str, bytes] | None = None
        # For each claim that was seen: its stamp, and since when it has had it.
        self._seen: dict[str, tuple[str, float]] = {}
        # When the last listing was asked for. It shows the claims as they were then, or later.
        self._asked = -math.inf
        self._owners: dict[str, dict[str, Any]] = {}
        self._changing = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="label set claims", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()
        for shard in list(self._held):
            # Where the store does not answer, the claim dies by itself.
            with contextlib.suppress(StlError):
                self.release(shard)
        if self._trying is not None:
            path, data = self._trying
            with contextlib.suppress(StlError, FileNotFoundError):
                if self._storage.read(path) == data:
                    self._storage.remove_file(path)

    @property
    def held(self) -> set[int]:
        """The shards that this worker has claimed, or was about to when it was interrupted."""
        trying = self._trying
        return set(self._held) | ({_parse(trying[0].rpartition("/")[2])[0]} if trying else set())

    def others(self) -> dict[int, str]:
        """The shards that other workers have claimed, each with the name of its newest claim. One listing."""
        self._asked = time.monotonic()
        stamps = {name: stamp for name, stamp in self._storage.stamps(CLAIMS).items() if _NAME.fullmatch(name)}
        now = time.monotonic()
        before = self._seen
        self._seen = {
            name: before[name] if name in before and before[name][0] == stamp else (stamp, now)
            for name, stamp in stamps.items()
        }
        newest = dict(sorted(map(_parse, stamps)))
        return {shard: _name(shard, owner) for shard, owner in newest.items() if shard not in self._held}

    def is_dead(self, name: str) -> bool:
        """Whether nobody renewed this claim of `others` for `LIFE_SECONDS`, or its process has ended.

        The time is counted from listing to listing: after the last one, the claim may have been renewed while this
        worker was suspended.
        """
        if self._asked - self._seen[name][1] >= LIFE_SECONDS:
            return True
        if name not in self._owners:
            try:
                self._owners[name] = read_object(self._storage, f"{CLAIMS}/{name}", RECORD_BYTES)
            except (FileNotFoundError, FormatError):
                return False
        return _has_ended(self._owners[name])

    def take(self, shard: int, after: str | None = None) -> bool:
        """Claim a shard; ``after``: the dead claim on it. False where another worker was first."""
        name = _name(shard, 0 if after is None else _parse(after)[1] + 1)
        path, data = f"{CLAIMS}/{name}", _content()
        self._trying = (path, data)
        is_ours = self._storage.create(path, data) == data
        if is_ours:
            with self._changing:
                self._held[shard] = name
        self._trying = None
        return is_ours

    def release(self, shard: int) -> None:
        """Give a claim up, because the shard is written or will not be. Without a claim on it, do nothing."""
        with self._changing:
            name = self._held.get(shard)
            if name is None:
                return
            # Those that were taken over, too. An interrupt leaves the claim held, to be released at the end.
            for owner in range(_parse(name)[1] + 1):
                self._storage.remove_file(f"{CLAIMS}/{_name(shard, owner)}")
            del self._held[shard]

    def _renew(self) -> None:
        while not self._closed.wait(RENEW_SECONDS):
            for shard in list(self._held):
                # A store that does not answer now may do so the next time. The work itself will find out.
                with self._changing, contextlib.suppress(StlError, OSError):
                    if shard in self._held:
                        self._storage.write(f"{CLAIMS}/{self._held[shard]}", _content())


def _name(shard: int, owner: int) -> str:
    return f"{shard:05d}-{owner}"


def _parse(name: str) -> tuple[int, int]:
    """The shard and the number of the owner of a claim's name."""
    shard, _, owner = name.partition("-")
    return int(shard), int(owner)


def _content() -> bytes:
    """What a claim holds: the process that has it, and a word that makes each version of it another."""
    owner = {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}
    return json.dumps(owner | {"renewal": secrets.token_hex(8)}).encode()


def _has_ended(owner: dict[str, Any]) -> bool:
    """Whether a claim's owner was a process that this machine no longer has."""
    pid = owner.get("pid")
    if not isinstance(pid, int) or owner.get("machine") != _machine() or not owner.get("started"):
        return False
    return _started(pid) != owner["started"]


def _machine() -> str:
    """A name for this machine since it was started, and for this container of it: where process ids mean the same."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {secrets.token_hex(8)}"


def _started(pid: int) -> str:
    """When a process started, in ticks since the machine did; empty where there is none, or it has only to be buried.

    A number of a process can come again; with the time it does not.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]
