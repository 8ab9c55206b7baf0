"""Pushes to the Hugging Face hub, where every file that is written alone would be a commit: at most five in all.

The hub limits how often a repository is committed to. Shards go in a few commits of many files, and the manifest with
the card in the last one. The client uploads the files of a commit first, so that an upload that is interrupted goes on
with those that are missing.
"""

import contextlib
import importlib
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from stl_offline.errors import FormatError, TargetError
from stl_offline.files import sha256_file
from stl_offline.labels.label_set import LabelSet
from stl_offline.labels.store import CARD, MANIFEST, ObjectStorage
from stl_offline.remote import TRIES, one_line

T = TypeVar("T")

_LOGGER = logging.getLogger(__name__)

# Commits of shards, unless they are so few; one more has the manifest.
_COMMITS, _LEAST_SHARDS = 4, 256
# Of a hub that sends no time with its answer that there were too many requests; and how long it is obeyed in all.
_WAIT_SECONDS, _MOST_WAIT_SECONDS = 60.0, 3600.0


def is_hub(place: str | Path) -> bool:
    """Whether a place is a repository of the Hugging Face hub."""
    return str(place).startswith("hf://")


class HubFolder:
    """A folder of a repository of the hub, written by commits of many files. ``storage``: the same place, to read."""

    def __init__(self, storage: ObjectStorage) -> None:
        self.storage = storage
        files, root = storage.filesystem
        self._api = files._api
        self._files, self._root = files, root
        where = files.resolve_path(root)
        self._repo = {"repo_id": where.repo_id, "repo_type": where.repo_type, "revision": where.revision}
        self._folder = where.path_in_repo

    def checksums(self) -> dict[str, str]:
        """SHA-256 of each large file of the folder, as the hub has it, from one listing."""
        self._files.invalidate_cache()
        try:
            listed = _obey(f"list {self.storage.place}", lambda: self._files.ls(self._root, detail=True, refresh=True))
        except FileNotFoundError:
            return {}
        return {each["name"].rpartition("/")[2]: each["lfs"]["sha256"] for each in listed if each.get("lfs")}

    def commit(self, files: dict[str, Path | bytes], message: str) -> None:
        """Store files, all or none of them. Raises TargetError."""
        add = importlib.import_module("huggingface_hub").CommitOperationAdd

        def send() -> Any:
            # Made anew for each try, as the client asks for; what is uploaded already is not sent again.
            operations = [
                add(f"{self._folder}/{name}".lstrip("/"), data if isinstance(data, bytes) else str(data))
                for name, data in files.items()
            ]
            return self._api.create_commit(operations=operations, commit_message=message, **self._repo)

        _obey(f"write {self.storage.place}", send)
        self._files.invalidate_cache()


def push_to_hub(label_set: LabelSet, hub: HubFolder, card: bytes, *, has_manifest: bool) -> list[int]:
    """Send the shards that the hub lacks, then the manifest. Gives each shard's bytes that were sent, 0 for the others.

    Raises:
        FormatError: a shard is damaged here.
        TargetError: the hub refuses, or holds other bytes afterwards.
    """
    there = hub.checksums()
    shards = label_set.shards
    todo = [index for index, shard in enumerate(shards) if there.get(shard.name) != shard.sha256]
    size = max(_LEAST_SHARDS, -(-len(todo) // _COMMITS))
    for first in range(0, len(todo), size):
        part = todo[first : first + size]
        paths: dict[str, Path | bytes] = {shards[index].name: _whole_file(label_set, index) for index in part}
        hub.commit(paths, f"Add shards {first + 1} to {first + len(part)} of {len(todo)}")
    if todo:
        there = hub.checksums()
        wrong = [shards[index].name for index in todo if there.get(shards[index].name) != shards[index].sha256]
        if wrong:
            raise TargetError(f"{hub.storage.place}/{wrong[0]} does not read back as it was written; push again")
    if not has_manifest:
        hub.commit({CARD: card, MANIFEST: label_set.manifest.to_bytes()}, "Add the manifest and the card")
    sent = set(todo)
    return [shard.bytes if index in sent else 0 for index, shard in enumerate(shards)]


def _whole_file(label_set: LabelSet, index: int) -> Path:
    """The path of a shard on this machine, compared with its checksum."""
    shard = label_set.shards[index]
    if label_set.storage.local is None:
        label_set.read_bytes(index)
        return label_set.kept(index)
    path = label_set.storage.path(shard.name)
    try:
        if path.is_file() and path.stat().st_size == shard.bytes and sha256_file(path) == shard.sha256:
            return path
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error
    raise FormatError(f"the shard {path} is missing or damaged; copy it again")


def _obey(what: str, action: Callable[[], T]) -> T:
    """Call it; again after a failure, and after as long as the hub asks for where there were too many requests."""
    waited, failures = 0.0, 0
    while True:
        try:
            return action()
        except FileNotFoundError:
            raise
        except Exception as error:
            # Of an upload, the client hides the answer behind an error of its own.
            response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
            status = getattr(response, "status_code", None)
            if status == 429 and waited < _MOST_WAIT_SECONDS:
                # Neither at once again, nor longer in all.
                seconds = min(max(1.0, _asked_for(response.headers)), _MOST_WAIT_SECONDS - waited)
                _LOGGER.warning("the hub asks to wait %.0f seconds", seconds)
                waited += seconds
                time.sleep(seconds)
                continue
            failures += 1
            # What the hub refuses (4xx) it refuses again.
            if failures == TRIES or (status is not None and 400 <= status < 500):
                advice = "; check the token (hf auth login)" if status in (401, 403) else ""
                raise TargetError(f"cannot {what}: {one_line(error)}{advice}") from error
            time.sleep(2.0**failures / 4)


def _asked_for(headers: Any) -> float:
    """For how many seconds an answer asks to wait."""
    limit = str(headers.get("RateLimit", ""))
    left = [part.strip()[2:] for part in limit.split(";") if part.strip().startswith("t=")]
    for text, more in ((headers.get("Retry-After"), 0.0), (left[0] if left else None, 1.0)):
        with contextlib.suppress(ValueError, TypeError):
            if math.isfinite(seconds := float(text) + more):
                return seconds
    return _WAIT_SECONDS
