"""Files at addresses that fsspec supports: which client reads them, and streams that survive broken connections."""

import contextlib
import importlib
import io
import time
import urllib.parse
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec

from stl_offline.errors import InputError, MissingExtraError, StlError

T = TypeVar("T")

# Stores of buckets: protocol → the package that knows it, and the extra that brings that.
PACKAGES = {
    "s3": ("s3fs", "s3"),
    "s3a": ("s3fs", "s3"),
    "gs": ("gcsfs", "gs"),
    "gcs": ("gcsfs", "gs"),
    "hf": ("huggingface_hub", "hf"),
}
_WEB = {"http": ("aiohttp", "http"), "https": ("aiohttp", "http")}

# A store that answers nothing for so many tries, with longer waits between them, is taken for gone.
TRIES = 4
FIRST_WAIT_SECONDS = 0.5
# Another try would end as the first: what a store's client does not offer (NotImplementedError) or cannot load
# (ImportError), and mistakes, here or in the client.
_HOPELESS = (TypeError, AttributeError, NotImplementedError, ImportError)

BLOCK_BYTES = 8 << 20
# A server that sends nothing for so long is taken for gone. There is no limit on the whole of a file.
_SILENCE_SECONDS = 60.0


def is_address(place: str) -> bool:
    """Whether a place is an address of another machine, not a path (``file://`` and ``local://`` are paths)."""
    return "://" in place and not place.startswith(("file://", "local://"))


def is_web(place: str) -> bool:
    """Whether an address is one of a web server, which gets one request for a whole file."""
    return protocol_of(place) in _WEB


def protocol_of(url: str) -> str:
    """``s3`` of ``s3://bucket/labels``."""
    return url.partition("://")[0]


def shown(url: str) -> str:
    """An address for messages and files: without a password and the query, which may hold a signature."""
    scheme, _, rest = url.partition("://")
    if scheme not in _WEB:
        return url
    parts = urllib.parse.urlsplit(url)
    return f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}" if rest else url


def open_filesystem(url: str, what: str, **options: object) -> tuple[Any, str]:
    """The fsspec filesystem of an address, and the path in it. ``what``: "a label set", for messages.

    Raises:
        MissingExtraError: the package for this kind of address is not installed.
        InputError: the address cannot be used.
    """
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package, extra = (PACKAGES | _WEB).get(protocol_of(url), (None, None))
        advice = f"pip install 'stl-offline[{extra}]' (or {package})" if package else one_line(error)
        raise MissingExtraError(f"{shown(url)} needs a package that is not installed: {advice}") from error
    except Exception as error:
        # What a store's client says of an address (or of credentials) that it cannot use is its own affair.
        raise InputError(f"{shown(url)} is no address of {what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """An error's kind and text in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def is_refusal(error: BaseException | None) -> bool:
    """Whether a store or a web server refuses to let this user read."""
    return isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403)


def persist(what: str, kind: type[StlError], action: Callable[[], T], failed: Callable[[Exception], object]) -> T:
    """Call ``action``, and again after a wait if the store or the network fails.

    FileNotFoundError, FileExistsError and NotADirectoryError pass through.

    Args:
        what: for messages, such as "read s3://bucket/labels"; kind: of the error in the end.
        failed: is given each failure before it is judged, and may raise in its place.
    """
    wait = FIRST_WAIT_SECONDS
    for attempt in range(1, TRIES + 1):
        try:
            return action()
        except (FileNotFoundError, FileExistsError, NotADirectoryError):
            raise
        except Exception as error:
            failed(error)
            # Each store's client has errors of its own, so that no narrower list would be complete.
            if is_refusal(error) or "Credential" in type(error).__name__:
                raise kind(f"cannot {what}: {one_line(error)}; check the credentials") from error
            if isinstance(error, _HOPELESS):
                raise kind(f"cannot {what}: {one_line(error)}") from error
            if attempt == TRIES:
                raise kind(f"cannot {what} ({TRIES} tries): {one_line(error)}; try again later") from error
            time.sleep(wait)
            wait *= 2
    raise AssertionError("unreachable")


class RemoteStream(io.RawIOBase):
    """The bytes at an address from first to last, read once. A connection that breaks is opened again where it broke.

    A web server gets one request for the whole file, and another for the rest after a break (it may send all of it
    again). Object stores get a request for every 8 MiB.

    Raises:
        InputError: there is no such file, or the server does not answer (`TRIES` times in a row).
    """

    def __init__(self, url: str) -> None:
        self._place = shown(url)
        self._is_web = is_web(url)
        self._files, self._path = open_filesystem(url, "a file")
        self._file: Any = None
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        def read() -> bytes:
            if self._file is None:
                self._open()
            return self._file.read(len(buffer))

        try:
            data = persist(f"read {self._place}", InputError, read, lambda _: self._drop())
        except FileNotFoundError as error:
            raise InputError(f"there is no file {self._place}") from error
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    def _open(self) -> None:
        """Open the file at the place that is read next."""
        if not self._is_web:
            self._file = self._files.open(self._path, "rb", block_size=BLOCK_BYTES, cache_type="readahead")
            self._file.seek(self._at)
            return
        timeout = importlib.import_module("aiohttp").ClientTimeout(
            total=None, sock_connect=_SILENCE_SECONDS, sock_read=_SILENCE_SECONDS
        )
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={self._at}-"} if self._at else {})
        # A block size of 0 asks for a stream; a size spares the question for it.
        self._file = self._files.open(self._path, "rb", block_size=0, size=1, headers=headers, timeout=timeout)
        left = 0 if self._file.r.status == 206 else self._at
        while left:
            data = self._file.read(min(left, BLOCK_BYTES))
            if not data:
                raise EOFError("it is shorter than before")
            left -= len(data)

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(Exception):  # of a connection that is broken in any case
                file.close()


def open_stream(url: str) -> io.BufferedReader:
    """`RemoteStream` for any size of reads."""
    return io.BufferedReader(RemoteStream(url), BLOCK_BYTES // 8)


def remote_state(url: str) -> list[str]:
    """What tells a file at an address from a changed one, without reading it: its size and its store's own marks.

    Raises:
        InputError: there is no such file, or it cannot be reached.
    """
    found = _look(url)
    marks = ("size", "ETag", "etag", "mtime", "md5Hash", "LastModified", "Last-Modified", "created", "blob_id")
    return [f"{name} {found[name]}" for name in marks if found.get(name) is not None]


def remote_size(url: str) -> int:
    """The bytes of a file at an address, without reading it. Raises as `remote_state`, or where they are not known."""
    size = _look(url).get("size")
    if size is None:
        raise InputError(f"the server gives no size of {shown(url)}; download the file")
    return int(size)


def _look(url: str) -> dict[str, Any]:
    files, path = open_filesystem(url, "a file")

    def info() -> dict[str, Any]:
        try:
            return files.info(path)
        except FileNotFoundError as error:
            # fsspec gives this for every failure of a web server; aiohttp's error has the status.
            cause = error.__cause__
            if not is_web(url) or cause is None:
                raise
            status = getattr(cause, "status", None)
            if status is None or status == 429 or status >= 500 or is_refusal(cause):
                raise cause from error
            raise

    try:
        return persist(f"look at {shown(url)}", InputError, info, lambda error: None)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"there is no file {shown(url)}") from error


def expand_remote(url: str) -> list[str]:
    """The files that an address with * matches, sorted; the address itself where it has none. "?" is a query's mark.

    Raises:
        InputError: nothing matches, or the store cannot list.
    """
    if "*" not in url:
        return [url]
    files, path = open_filesystem(url, "tars")
    try:
        found = sorted(files.glob(path))
    except Exception as error:
        raise InputError(f"cannot list {shown(url)}: {one_line(error)}; write the names with braces") from error
    if not found:
        raise InputError(f"nothing matches {shown(url)}")
    return [files.unstrip_protocol(name) for name in found]
