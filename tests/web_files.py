"""A web server for the files of a folder, with or without answers to requests for ranges, that breaks connections."""

import http.server
import threading
import time
from contextlib import contextmanager
from pathlib import Path


class WebFiles(http.server.ThreadingHTTPServer):
    """root: the folder; ranges: whether parts can be asked for; cuts: the next answers that end after so many bytes;
    fails: the status of the next answers; asked: (method, path, range) of every request."""

    daemon_threads = True
    request_queue_size = 128  # connections beyond it wait for seconds

    def __init__(self, root: Path, *, ranges: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.ranges = root, ranges
        self.cuts: list[int] = []
        self.fails: list[int] = []
        self.asked: list[tuple[str, str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: WebFiles

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append((self.command, self.path, wanted))
        path = self.server.root / self.path.partition("?")[0].lstrip("/")
        if self.server.fails:
            return self.send_error(self.server.fails.pop(0))
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        if wanted and self.server.ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            data = data[int(first) : int(last) + 1 if last else None]
        self.send_response(206 if wanted and self.server.ranges else 200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes" if self.server.ranges else "none")
        self.send_header("ETag", f'"{path.stat().st_mtime_ns:x}"')
        self.end_headers()
        if self.command == "GET":
            cut = self.server.cuts.pop(0) if self.server.cuts else len(data)
            self.wfile.write(data[:cut])
            if cut < len(data):
                time.sleep(0.1)  # so that what was sent is read before the break is seen

    do_HEAD = do_GET

    def log_message(self, *words: object) -> None:
        pass


@contextmanager
def running(server: http.server.HTTPServer):
    """The server, which answers in a thread until the end."""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
