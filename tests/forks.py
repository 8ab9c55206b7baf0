"""Commands as processes of their own that start at once: forks of a process that has imported what they use.

A new interpreter needs 5 seconds of processor time for its imports, which is most of what a small command costs. Files,
signals, exit codes and what a command prints are the same in a fork. Not the same are imports, the streams that a
process is born with, and the end of the interpreter: tests of these start one. Forks also share the order of sets of
strings, so what they are compared with is made by the process of the tests.
"""

import atexit
import functools
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from tests.source_tree import REPOSITORY

COMMAND_LINE = REPOSITORY / "cli" / "__main__.py"
SERVER = """
import stl_offline.cli.dump_labels, stl_offline.dump, stl_offline.evaluation
import stl_offline.cli.train_student, stl_offline.training.train_labeler, stl_offline.training.train_student
import torch._dynamo, torch.distributed.run
from tests import forks
forks.serve()
"""


class Fork:
    """A Python file that runs as ``python FILE WORDS…`` runs it; used as a `subprocess.Popen` is.

    Args:
        file: what to run; `COMMAND_LINE` is ``stl-offline``.
        words: its arguments.
        folder: its working directory; this process's by default.
        env: more environment variables.
        processes: above 1, ``torchrun --run-path --start-method fork`` starts so many.
        merge: standard error goes where standard output goes.
    """

    def __init__(
        self,
        file: str | Path,
        *words: object,
        folder: Path | None = None,
        env: Mapping[str, str] | None = None,
        processes: int = 1,
        merge: bool = False,
    ) -> None:
        self.returncode: int | None = None
        self._folder = tempfile.TemporaryDirectory()
        output, error = (Path(self._folder.name) / name for name in ("output", "error"))
        self._streams = [output, output if merge else error]
        self.pid = _ask(
            {
                "file": str(file),
                "words": [*map(str, words)],
                "folder": str(folder or Path.cwd()),
                "environment": os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
                "streams": [*map(str, self._streams)],
                "processes": processes,
            }
        )

    def poll(self) -> int | None:
        """The exit code, the negative of the signal that ended it, or None while it runs."""
        if self.returncode is None:
            self.returncode = _ask(self.pid)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float = 280) -> tuple[str, str]:
        """Wait for the end. What was written to standard output, and to standard error."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(f"not done within {timeout} seconds: {self._streams[1].read_text()}")
            time.sleep(0.01)
        with self._folder:
            output, error = (stream.read_text() for stream in self._streams)
        return output, "" if self._streams[0] == self._streams[1] else error


@functools.cache
def _server() -> subprocess.Popen:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=REPOSITORY,
        # Libraries read the number of threads when they are loaded.
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)
    return server


def _ask(request: dict | int) -> int | None:
    server = _server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "the process that makes forks has ended"
    return json.loads(answer)


def serve() -> None:
    """Read a request per line: for a dictionary make a fork and answer its process id; for a process id answer its exit
    code, or null while it runs."""
    gc.freeze()  # forks need not go through what is loaded
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, dict):
            answer = os.fork()
            if answer == 0:
                _end_with(_run, request)
        else:
            done, status = os.waitpid(request, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if done else None
        os.write(1, json.dumps(answer).encode() + b"\n")


def _end_with(work: Callable[..., None], arguments: dict) -> NoReturn:
    """Do the work and end this process with its exit code, without taking down all modules, which takes seconds."""
    code = 0
    try:
        work(**arguments)
    except SystemExit as ending:
        code = ending.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        os._exit(code)


def _run(
    file: str, words: list[str], folder: str, environment: dict[str, str], streams: list[str], processes: int
) -> None:
    os.setsid()  # signals of torchrun to its group must not reach the server
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, name in enumerate([os.devnull, *streams]):
        stream = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT if descriptor else os.O_RDONLY)
        os.dup2(stream, descriptor)
        os.close(stream)
    sys.argv = [file, *words]
    if processes == 1:
        runpy.run_path(file, run_name="__main__")
    else:
        start = ["--standalone", "--nproc-per-node", str(processes), "--run-path", "--start-method", "fork"]
        sys.modules["torch.distributed.run"].main([*start, file, *words])
