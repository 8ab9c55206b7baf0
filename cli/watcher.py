"""A line on standard error for a process that dies of a signal it cannot answer: a bus error, an abort, a kill.

A small process beside the command reads a pipe that only the command writes to: Python's faulthandler in a crash, and a
last word at every orderly end. When the pipe closes without that word, the command is dead, and the watcher prints why.
The command's process id, process group, signals and exit status stay as they are.
"""

import contextlib
import faulthandler
import os
import signal
import sys
from typing import NoReturn

from stl_offline.cli.terminal import complain

_LAST_WORD = b"\0end"  # faulthandler writes no zero byte; a function may be named "send"
_MOST_BYTES = 1 << 20

# What faulthandler calls a signal → what most often raises it, and what to do.
_CAUSES = {
    "Bus error": "SIGBUS: a file that it was reading became shorter, or a disk or /dev/shm is full; check the .beton "
    "files, label sets and cached files, and run the same command again",
    "Segmentation fault": "SIGSEGV: a fault in a library or in this program; run with --debug to see where",
    "Aborted": "SIGABRT: a library gave up, in most cases for lack of memory; {memory}",
    "Illegal instruction": "SIGILL: a library was built for another kind of processor",
    "Floating": "SIGFPE: a fault in a library or in this program; run with --debug to see where",
}
_KILLED = "a signal from outside, such as SIGKILL, which the system sends when memory runs out; {memory}"


class Watcher:
    """Watches this process from now until `end`. Must be made before the process has other threads.

    Args:
        memory_advice: what to do where memory runs out; debug: also print faulthandler's stack traces.
    """

    def __init__(self, memory_advice: str, debug: bool) -> None:
        self._owner = os.getpid()
        self._write: int | None = None
        if faulthandler.is_enabled():  # by PYTHONFAULTHANDLER or -X faulthandler: the user has other plans
            return
        with contextlib.suppress(OSError):  # no process or pipe to be had: then without
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                # A child of the command would be met by its os.wait(); this one's parent is init.
                if os.fork() == 0:
                    os.close(write)
                    _watch(read, memory_advice, debug)
                os._exit(0)
            os.waitpid(child, 0)
            os.close(read)
            faulthandler.enable(write, all_threads=debug)
            self._write = write

    def end(self) -> None:
        """The process is about to end in an orderly way."""
        if self._write is not None and os.getpid() == self._owner:
            faulthandler.disable()
            with contextlib.suppress(OSError):
                os.write(self._write, _LAST_WORD)
            os.close(self._write)
            self._write = None


def _watch(read: int, memory_advice: str, debug: bool) -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):  # whoever reads the command's output must see its end
        os.dup2(null, standard)
    heard = b""
    while not heard.endswith(_LAST_WORD) and (part := os.read(read, 1 << 16)):
        heard = (heard + part)[-_MOST_BYTES:]
    if not heard.endswith(_LAST_WORD):
        text = heard.decode(errors="replace")
        if debug:
            sys.stderr.write(text)
        cause = next((cause for name, cause in _CAUSES.items() if name in text), _KILLED)
        complain(f"error: the command was ended by {cause.format(memory=memory_advice)}")
    os._exit(0)
