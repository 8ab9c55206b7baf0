"""One job on one place in an object store, where there are no locks: a lease that its holders keep renewing.

An object holds the job's id and a beat that changes every few seconds. Who comes and finds another job's lease watches
it: a beat that changes means that the job lives, one that stands still for long enough that it was killed. No clocks
are compared. Two jobs that come in the same second may both get in; they have the same settings then, write the same
bytes, and only waste work.
"""

import json
import secrets
import threading
import time

from stl_offline.errors import FormatError, StlError, TargetError
from stl_offline.labels.store.layout import LOCK, RECORD_BYTES, read_object
from stl_offline.labels.store.storage import Storage

BEAT_SECONDS = 5.0
PATIENCE_BEATS = 6


class Lease:
    """The lease on ``storage`` for the job ``job`` (None: a job of this one process), renewed by a thread.

    Raises:
        TargetError: another job is at work there, or the store cannot be written.
    """

    def __init__(self, storage: Storage, job: str | None) -> None:
        self._storage = storage
        self._job = job if job is not None else f"alone {secrets.token_hex(8)}"
        self._ended = threading.Event()
        seen, still = _read(storage), 0
        while seen is not None and seen.get("job") != self._job:
            if still >= PATIENCE_BEATS:
                break
            time.sleep(BEAT_SECONDS)
            now = _read(storage)
            if now is not None and now != seen:
                raise TargetError(
                    f"another job is writing into {storage.place}; wait for it, stop it, or choose another place"
                )
            seen, still = now, still + 1
        self._beat()
        self._thread = threading.Thread(target=self._keep, name="label set lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise `TargetError` if another job has the place by now; to be called before something is written."""
        seen = _read(self._storage)
        if seen is not None and seen.get("job") != self._job:
            raise TargetError(f"another job has taken over {self._storage.place}; wait for it, or stop it")

    def release(self) -> None:
        """Stop renewing. The object goes with the job's other files, or with the patience of the next job."""
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        self._storage.write(LOCK, json.dumps({"job": self._job, "beat": secrets.token_hex(8)}).encode())

    def _keep(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                self._beat()
            except StlError:
                # The store does not answer now. The job itself will find out, if that lasts.
                continue


def _read(storage: Storage) -> dict | None:
    try:
        return read_object(storage, LOCK, RECORD_BYTES)
    except (FileNotFoundError, FormatError):
        return None
