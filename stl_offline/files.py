"""Files that appear whole or not at all, and names made from content."""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stl_offline.errors import FormatError, TargetError

COPY_BYTES = 1 << 20
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def cache_dir() -> Path:
    """Where derived files (packed images, token caches) are kept: ``$STL_OFFLINE_CACHE``, else the user's cache."""
    chosen = os.environ.get("STL_OFFLINE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stl-offline"


def canonical_json(value: Any, *, compact: bool = False) -> bytes:
    """JSON with sorted keys, two-space indent (unless ``compact``) and a final newline: equal values, equal bytes."""
    form: dict[str, Any] = {"separators": (",", ":")} if compact else {"indent": 2}
    return (json.dumps(value, **form, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of ``data`` in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_parts(*parts: bytes | Sequence[bytes]) -> str:
    """SHA-256 over several texts in hex, each after its length (uint64), so that none can pass into the next.

    A text may come in pieces, which are never put together in memory.
    """
    digest = hashlib.sha256()
    for part in parts:
        pieces = (part,) if isinstance(part, bytes) else part
        digest.update(sum(map(len, pieces)).to_bytes(8, "little"))
        for piece in pieces:
            digest.update(piece)
    return digest.hexdigest()


def images_fingerprint(
    class_names: Sequence[str],
    keys_json: bytes | Sequence[bytes],
    class_ids: bytes | Sequence[bytes],
    content_hashes: bytes | Sequence[bytes],
) -> str:
    """SHA-256 that names a list of images: their class list, keys, class ids and content hashes, all in order.

    Args:
        keys_json: the keys as ``json.dumps`` of a list writes them; class_ids: (n,) int64 and content_hashes: (n,)
            uint64, little-endian; each as one text or in pieces.
    """
    return sha256_parts(json.dumps(list(class_names)).encode(), keys_json, class_ids, content_hashes)


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_file(path: str | Path, most: int = -1) -> bytes:
    """The bytes of a regular file, ``most`` of them at most unless that is -1.

    A named pipe is an OSError: opening one may wait for its other end for ever.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        return stream.read(most)


def read_json_object(path: Path, advice: str) -> dict[str, Any]:
    """The JSON object that a file holds. ``advice``: what a user can do where it is damaged.

    Raises:
        FormatError: the file is damaged, or holds something else.
    """
    try:
        found = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:  # broken JSON, or bytes that are no UTF-8
        raise FormatError(f"{path} is damaged ({error}); {advice}") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path} is damaged (it holds no JSON object); {advice}")
    return found


def read_numbers(path: Path, advice: str) -> dict[str, int | float | None]:
    """The JSON object of a file whose values are numbers, or null. Raises as `read_json_object`."""
    found = read_json_object(path, advice)
    wrong = first_not_number(found) or next((name for name, value in found.items() if abs(value or 0) > 1e300), None)
    if wrong is not None:
        raise FormatError(f"{path} is damaged ({wrong[:100]} is no number, or one beyond 1e300); {advice}")
    return found


def first_not_number(values: dict[str, Any]) -> str | None:
    """The name of the first value that is neither a number nor None; None where there is no such value."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            return name
    return None


def check_writable(path: str | Path) -> None:
    """Check that a folder can be made and written, without making it.

    Raises:
        TargetError: a file is in its place or above it, or the user may not write there.
    """
    path = Path(path).absolute()
    existing = next(each for each in (path, *path.parents) if os.path.lexists(each))
    if not existing.is_dir():
        raise TargetError(f"cannot make the folder {path}: {existing} is not a folder; choose another target")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise TargetError(f"cannot write {path}: no permission to write in {existing}; choose another target")


def check_place_of_file(path: str | Path) -> None:
    """Check that a file can be written, without doing so. Raises `TargetError` as `check_writable`, or for a folder."""
    if Path(path).is_dir():
        raise TargetError(f"cannot write {path}: it is a folder; choose another target")
    check_writable(Path(path).absolute().parent)


def make_folder(path: str | Path) -> Path:
    """Make a folder and its parents; raises `TargetError` in one line where that is not possible."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TargetError(f"cannot make the folder {path}: {error.strerror or error}; choose another target") from error
    return path


@contextlib.contextmanager
def atomic_path(path: str | Path, *, exclusive: bool = False) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success it is synced and renamed into place, else removed.

    The temporary name starts with a dot and ends in ``.tmp``, so readers that list a folder skip it. The file is locked
    while it is written, so that `remove_leftovers` can tell it from one that a killed process left.

    Args:
        exclusive: leave a file that is already there as it is, and raise FileExistsError.

    Raises:
        TargetError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    lock = None
    try:
        lock = _locked_file(temporary)
        yield temporary
        with open(temporary, "rb") as stream:
            # Some libraries make their files private; what is shared must be as readable as any new file.
            os.fchmod(stream.fileno(), 0o666 & ~_umask())
            os.fsync(stream.fileno())
        if exclusive:
            _link(temporary, path)
        else:
            os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if isinstance(error, TargetError | FileExistsError) or getattr(error, "filename", None) not in (
            None,
            str(temporary),
            str(path),
            str(path.parent),
        ):
            raise
        raise TargetError(f"cannot write {path}: {error.strerror or error}; nothing was changed there") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)


def atomic_write(path: str | Path, data: bytes, *, exclusive: bool = False) -> None:
    """Write ``data`` to ``path`` so that a reader sees either the old file or the whole new one; as `atomic_path`."""
    with atomic_path(path, exclusive=exclusive) as temporary, open(temporary, "wb") as stream:
        stream.write(data)


def _link(temporary: Path, path: Path) -> None:
    """Give the file its name unless another has it: FileExistsError."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # A file system without hard links: two processes that come at the same instant may both write.
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        os.replace(temporary, path)


def remove_leftovers(folder: str | Path, name: str = "*", *, seconds: float = 0.0) -> None:
    """Remove the temporary files that killed processes left in ``folder`` while they wrote ``name`` (a glob pattern),
    if they have not changed for so long.

    Those that a living process writes are locked, and stay: the kernel frees a lock when its process ends.
    """
    for path in Path(folder).glob(f".{name}.*.tmp"):
        with contextlib.suppress(OSError):  # held by another process, or removed by one
            # For writing, too: NFS has no exclusive lock of a file that is only read.
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not seconds or time.time() - os.fstat(descriptor).st_mtime >= seconds:
                    path.unlink()
            finally:
                os.close(descriptor)


def _locked_file(path: Path) -> int:
    """Make an empty file and lock it; gives its descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Between the two calls it may have been taken for a leftover.
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)


def _umask() -> int:
    # The mask can only be read by setting it; /proc tells it without that race between threads.
    with contextlib.suppress(OSError, ValueError), open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("Umask:")).split()[1], 8)
    return 0o022


def zstd_size(frame: bytes) -> float:
    """The size that a zstd frame says it unpacks to (RFC 8878, 3.1.1.1); infinite where it does not say."""
    if len(frame) < 6 or frame[:4] != b"\x28\xb5\x2f\xfd":
        return math.inf
    flag, is_single, dictionary = frame[4] >> 6, frame[4] >> 5 & 1, (0, 1, 2, 4)[frame[4] & 3]
    start = 5 + (0 if is_single else 1) + dictionary
    width = (1 if is_single else 0, 2, 4, 8)[flag]
    if not width:
        return math.inf
    return int.from_bytes(frame[start : start + width], "little") + (256 if width == 2 else 0)


def _sync_folder(folder: Path) -> None:
    # A rename is only safe against a power cut once the folder itself is on disk.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that does not sync folders
            raise
    finally:
        os.close(descriptor)
