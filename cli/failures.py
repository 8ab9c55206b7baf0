"""From an exception to one line on standard error and an exit code."""

import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

import click

from stl_offline.cli.advice import memory_advice, translate
from stl_offline.cli.terminal import (
    complain,
    drop_output,
    flush_output,
    hide_warnings,
    library_shown,
    output_has_no_reader,
    show_everything,
    show_progress,
)
from stl_offline.cli.watcher import Watcher
from stl_offline.errors import StlError

FAILED, WRONG_USAGE, MISTAKE, INTERRUPTED, TERMINATED = 1, 2, 70, 130, 143

# Which extra brings a package, by the name that is imported.
EXTRA_OF = {
    "torch": "train",
    "torchvision": "train",
    "timm": "train",
    "ffcv": "train",
    "cv2": "train",
    "PIL": "train",
    "safetensors": "train",
    "yaml": "train",
    "matplotlib": "report",
    "jinja2": "report",
}


@dataclass
class Session:
    """What one run of the command line knows beside its options.

    own_process: whether the process is the command line's own, so that its streams, warnings and crashes are, too.
    """

    debug: bool = False
    own_process: bool = False
    ctx: click.Context | None = None
    watcher: Watcher | None = None

    def begin(self, ctx: click.Context) -> None:
        """A command is about to run; nothing heavy is loaded yet."""
        self.ctx = ctx
        if self.own_process:
            self.watcher = Watcher(memory_advice(ctx), self.debug)
            if not self.debug:
                hide_warnings()
        show_progress()
        if self.debug:
            show_everything()

    def end(self) -> None:
        """The command is done, well or not."""
        if self.watcher is not None:
            self.watcher.end()

    def translate(self, text: str) -> str:
        """A message of the library in terms of the running command's options."""
        return text if self.ctx is None else translate(text, self.ctx)


class Terminated(KeyboardInterrupt):
    """SIGTERM: unwinds like Ctrl-C, so that locks are freed and temporary files removed."""


def run(command: Callable[[], Any], session: Session) -> int:
    """Call ``command``; give its exit code. A failure is reported in one line, after a traceback with ``--debug``."""
    with library_shown(session.translate):
        try:
            with _termination_raises():
                result = command()
                flush_output()
            return result if isinstance(result, int) else 0
        except click.exceptions.Exit as error:  # of --help and --version
            return error.exit_code
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.ctx.get_help(), err=True)
            return WRONG_USAGE
        except SystemExit as error:
            if error.code not in (INTERRUPTED, TERMINATED):
                raise
            complain(_interruption(session.ctx))
            return error.code
        except (Exception, KeyboardInterrupt) as error:
            return _report(error, session)


def _report(error: BaseException, session: Session) -> int:
    if isinstance(error, BrokenPipeError) and output_has_no_reader():
        # The reader (head, less) has seen enough. What is still buffered must not fail again at exit.
        drop_output()
        return FAILED
    if session.debug:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            traceback.print_exc()
    line, code = describe(error, session)
    if code == MISTAKE and not session.debug:
        line += "; run with --debug for the traceback"
    complain(" ".join(line.split()))
    try:
        flush_output()
    except OSError:  # a full disk: it must not fail again at exit, with another exit code
        drop_output()
    return code


def end_process(code: int) -> NoReturn:
    """End the process with a command's exit code; at once where threads of a group that it could not leave hold it."""
    group = sys.modules.get("stl_offline.distributed")
    if group is not None and group.must_end_hard():
        with contextlib.suppress(OSError):
            flush_output()
        os._exit(code)
    sys.exit(code)


def _interruption(ctx: click.Context | None) -> str:
    """What an interrupted command says. With --no-resume it would begin again; without it, what it was to discard may
    still be there."""
    if ctx is None or ctx.params.get("resume") is not False:
        return "interrupted; run the same command again to go on"
    if "out" not in ctx.params:
        return "interrupted; run the same command again"
    return "interrupted; run the same command again, without --no-resume if it had begun to train"


def describe(error: BaseException, session: Session) -> tuple[str, int]:
    """The line and the exit code for an exception."""
    if isinstance(error, Terminated):
        return _interruption(session.ctx), TERMINATED
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return _interruption(session.ctx), INTERRUPTED
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx else "stl-offline"
        return f"error: {error.format_message().rstrip('.')} (see '{where} --help')", error.exit_code
    if isinstance(error, click.ClickException):
        return f"error: {error.format_message()}", error.exit_code
    if isinstance(error, StlError):
        return f"error: {session.translate(str(error))}", FAILED
    if isinstance(error, ImportError) and "failed to map segment" not in str(error):
        return _describe_import(error)
    if isinstance(error, MemoryError | ImportError) or _is_allocation_failure(error):
        return f"error: out of memory; {memory_advice(session.ctx)}", FAILED
    if isinstance(error, OSError) and error.errno is not None:
        return f"error: {_describe_os_error(error)}", FAILED
    return _unexpected(error)


def _unexpected(error: BaseException) -> tuple[str, int]:
    return f"error: unexpected {type(error).__name__}: {error}", MISTAKE


def _describe_import(error: ImportError) -> tuple[str, int]:
    package = (error.name or "").partition(".")[0]
    extra = EXTRA_OF.get(package)
    if extra is None:
        return _unexpected(error)
    advice = f"this command needs the extra [{extra}]: pip install 'stl-offline[{extra}]'"
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        return f"error: {advice} ({package} is not installed)", FAILED
    return f"error: {package} is installed but does not load ({error}); {advice}", FAILED


def _describe_os_error(error: OSError) -> str:
    where = f" {error.filename}" if error.filename is not None else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left to write{where}; free some and run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission for{where or ' a file'} ({os.strerror(error.errno)}); choose another place"
    return f"{os.strerror(error.errno)}:{where or ' (no file named)'}"


def _is_allocation_failure(error: BaseException) -> bool:
    # torch's own classes, told by name: this module must not import torch. Ray wraps them.
    cause = getattr(error, "cause", None) or error
    name, text = type(cause).__name__, str(cause)
    return (
        name == "OutOfMemoryError"
        or (name == "AcceleratorError" and "out of memory" in text)
        or (isinstance(cause, RuntimeError) and "can't allocate memory" in text)
    )


@contextlib.contextmanager
def _termination_raises() -> Iterator[None]:
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked worker: it has nothing to tidy up, and nothing to say
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # not the main thread, where no handler can be set
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
