"""A server of the Hugging Face hub's endpoints for one data set, which counts commits and can ask to wait."""

import base64
import hashlib
import http.server
import json
import threading
from urllib.parse import unquote, urlsplit

import fsspec
import pytest

from tests.web_files import running


class FakeHub(http.server.ThreadingHTTPServer):
    """files: the repository; commits: the files of each; asked: (method, path) of every request; refusals: headers of
    answers 429 that the next commits get."""

    daemon_threads = True
    request_queue_size = 128  # connections beyond it wait for seconds

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {".gitattributes": b""}
        self.blobs: dict[str, bytes] = {}
        self.commits: list[list[str]] = []
        self.asked: list[tuple[str, str]] = []
        self.refusals: list[dict[str, str]] = []
        self.changing = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


def is_large(path: str) -> bool:
    return path.endswith((".zip", ".tar"))


def entry(path: str, data: bytes) -> dict:
    found = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if is_large(path):
        sha256 = hashlib.sha256(data).hexdigest()
        found["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(data), "pointerSize": 130}
    return found


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.note()
        if "/tree/" in path:
            folder = path.partition("/tree/main")[2].strip("/")
            inside = {name: data for name, data in self.server.files.items() if name.startswith(folder)}
            if folder and not inside:
                return self.answer(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})
            return self.answer(200, [entry(name, data) for name, data in inside.items()])
        if "/resolve/main/" in path:
            data = self.server.files.get(path.partition("/resolve/main/")[2])
            if data is None:
                return self.answer(404, {}, {"X-Error-Code": "EntryNotFound"})
            status, headers = 200, {"ETag": '"x"', "X-Repo-Commit": "0" * 40}
            if wanted := self.headers.get("Range"):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                status, data = 206, data[int(first) : int(last) + 1 if last else None]
            return self.answer(status, data, headers)
        return self.answer(200, {"id": "user/labels", "sha": "0" * 40, "siblings": [], "private": False})

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        path = self.note()
        self.server.blobs[path.rpartition("/")[2]] = self.body()
        self.answer(200, b"")

    def do_POST(self) -> None:
        path = self.note()
        body = self.body()
        if path.endswith("/validate-yaml"):
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in path:
            files = [one["path"] for one in json.loads(body)["files"]]
            modes = [{"path": one, "uploadMode": "lfs" if is_large(one) else "regular"} for one in files]
            return self.answer(200, {"files": [one | {"shouldIgnore": False} for one in modes]})
        if path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                if one["oid"] not in self.server.blobs:
                    one["actions"] = {"upload": {"href": f"{self.server.url}/blobs/{one['oid']}"}}
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if "/paths-info/" in path:
            files = self.server.files
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else [unquote(body.decode().split("=")[1])]
            return self.answer(200, [entry(one, files[one]) for one in wanted if one in files])
        if "/commit/" in path:
            return self.commit([json.loads(line) for line in body.splitlines()])
        return self.answer(404, {})

    def commit(self, lines: list[dict]) -> None:
        with self.server.changing:
            if self.server.refusals:
                return self.answer(429, {"error": "too many requests"}, self.server.refusals.pop(0))
            names = []
            for line in lines[1:]:
                value = line["value"]
                names.append(value["path"])
                if line["key"] == "lfsFile":
                    self.server.files[value["path"]] = self.server.blobs[value["oid"]]
                else:
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            self.server.commits.append(names)
        self.answer(200, {"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.server.url}/c/{'1' * 40}"})

    def note(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        return path

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running `FakeHub`, which the client takes for the hub."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setenv("STL_OFFLINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "test")
    # On a busy machine this server may take longer than the ten seconds that the client waits for an answer.
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        monkeypatch.setattr(constants, name, 600)
    # Large files go as in Git LFS, whose protocol this server has.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with running(FakeHub()) as server:
        template = server.url + constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        fsspec.get_filesystem_class("hf").clear_instance_cache()
        yield server
    fsspec.get_filesystem_class("hf").clear_instance_cache()
