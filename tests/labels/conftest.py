"""What tests of shared label sets need: an S3 server that speaks the real protocol, and a way to it that fails."""

import contextlib
import functools
import os
import socket
import threading
import uuid

import fsspec
import pytest

from tests.fake_hub import hub  # noqa: F401


def alone(put_object):
    """moto's way to store an object, for one request at a time: it looks whether there is one, and stores it later."""
    one_at_a_time = threading.Lock()

    @functools.wraps(put_object)
    def put(self):
        with one_at_a_time:
            return put_object(self)

    return put


@pytest.fixture(scope="session")
def s3_server():
    """The address of an S3 server in this process."""
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    put_object = S3Response.put_object
    S3Response.put_object = alone(put_object)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()
    S3Response.put_object = put_object


@pytest.fixture
def s3(s3_server, monkeypatch):
    """A bucket of this test's own, as ``s3://…``, in an environment that leads to it."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_server,
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    files = fsspec.filesystem("s3")
    bucket = f"labels-{uuid.uuid4().hex[:12]}"
    files.mkdir(bucket)
    yield f"s3://{bucket}"
    fsspec.get_filesystem_class("s3").clear_instance_cache()


class FlakyWay:
    """A TCP proxy whose next connections break after so many bytes: ``breaks`` of answers, or of what is sent."""

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("http://").partition(":")
        self._target = (host, int(port))
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self.after: int | None = None
        self.left = 0
        self.broken = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def break_next(self, connections: int, after: int) -> None:
        """Cut the next ``connections`` once ``after`` bytes of an answer have passed."""
        self.left, self.after = connections, after

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1024):
                if is_answer and self.left and passed + len(data) > self.after:
                    self.left -= 1
                    self.broken += 1
                    sink.sendall(data[: max(0, self.after - passed)])
                    break
                passed += len(data)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.fixture
def flaky(s3, s3_server, monkeypatch):
    """The way to the same bucket over a `FlakyWay`."""
    way = FlakyWay(s3_server)
    monkeypatch.setitem(os.environ, "AWS_ENDPOINT_URL", way.address)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield way
    way.close()
