"""What the command line shows, on streams of every kind; and what it shows when its process dies."""

import logging
import os
import re
import signal
import subprocess
import sys
import time

import click
import pytest

from stl_offline.cli.advice import memory_advice, translate
from stl_offline.cli.failures import Session, run
from stl_offline.cli.main import group, main
from stl_offline.cli.output import counted
from stl_offline.errors import InputError
from stl_offline.progress import progress_bar
from tests.labels.synthetic import make_spec, write_set

COMMAND = "import sys; from stl_offline.cli.main import command_line; command_line()"
# A command of the given lines, called as a process of its own.
STUB = """
import os, signal, sys, time
from stl_offline.cli.command import command
from stl_offline.cli.main import command_line, group
from stl_offline.cli.options import debug_option, workers_option

@command()
@workers_option
@debug_option
def stub(workers):
{lines}

group.commands_table = {{"stub": ("__main__:stub", "")}}
command_line()
"""


@pytest.fixture
def labels(tmp_path):
    write_set(tmp_path / "labels", make_spec(samples=12), 4)
    return tmp_path / "labels"


def call(*arguments, code=COMMAND, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], timeout=120, text=True, **options)


def stub(*lines: str, arguments: tuple[str, ...] = (), **options):
    code = STUB.format(lines="\n".join(f"    {line}" for line in lines))
    return call("stub", *arguments, code=code, **options)


class TestStreams:
    @pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
    @pytest.mark.parametrize(("place", "code"), [("labels", 0), ("nowhere", 1)])
    def test_closed_ones_change_no_exit_code(self, labels, closed, place, code):
        words = f'"$0" -c "$1" labels verify {place} {closed}'
        done = subprocess.run(
            ["sh", "-c", words, sys.executable, COMMAND], cwd=labels.parent, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code
        if ">&-" not in closed.replace("2>&-", ""):
            assert ("all 4 shards are whole" in done.stdout) is (code == 0)
        if "2>&-" not in closed:
            assert done.stderr.count("\n") == code

    def test_a_file_is_not_opened_in_the_place_of_a_closed_one(self, tmp_path):
        file = tmp_path / "file"
        lines = f"stream = open({str(file)!r}, 'w')", "assert stream.fileno() > 2, stream.fileno()"
        code = STUB.format(lines="\n".join(f"    {line}" for line in lines))
        words = '"$0" -c "$1" stub <&- >&-'
        done = subprocess.run(["sh", "-c", words, sys.executable, code], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
    def test_characters_that_a_terminal_lacks_end_nothing(self, labels, encoding):
        done = call("labels", "stats", labels, env=os.environ | {"PYTHONIOENCODING": encoding}, encoding=encoding)
        assert (done.returncode, done.stderr) == (0, "")
        assert "0.9–1.0:" in done.stdout or r"0.9\u20131.0:" in done.stdout

    def test_a_reader_of_standard_error_that_leaves_does_not_end_the_work(self):
        read, write = os.pipe()
        os.close(read)
        env = {name: value for name, value in os.environ.items() if name != "STL_OFFLINE_QUIET"}
        lines = (
            "import logging, warnings",
            "from stl_offline.progress import progress_bar",
            "with progress_bar(2, 'work') as bar: time.sleep(1.1); bar.update(2)",
            "logging.getLogger('stl_offline.x').warning('unheard')",
            "sys.stderr.write('unheard')",
            "print('done')",
        )
        done = stub(*lines, stderr=write, env=env)
        os.close(write)
        assert (done.returncode, done.stdout) == (0, "done\n")

    def test_a_reader_of_standard_output_that_leaves_is_not_reported(self, labels):
        read, write = os.pipe()
        os.close(read)
        done = call("labels", "inspect", labels, stdout=write)
        os.close(write)
        assert (done.returncode, done.stderr) == (1, "")

    def test_another_pipe_that_breaks_is(self):
        done = stub("raise BrokenPipeError(32, 'of a store')")
        assert (done.returncode, done.stderr) == (1, "error: Broken pipe: (no file named)\n")

    def test_a_full_disk_gives_one_line(self, labels):
        with open("/dev/full", "w") as full:
            done = call("labels", "inspect", labels, stdout=full)
        assert done.returncode == 1
        assert done.stderr == "error: no space left to write; free some and run the same command again\n"


class TestForeignText:
    FORGED = "x\nlabels: all 9 shards are whole\x1b[2J\u202e"

    def test_a_name_in_data_forges_no_line(self, tmp_path, capsys):
        labeler = {"architecture": self.FORGED, "weights_sha256": "0" * 64, "licence": self.FORGED}
        write_set(tmp_path / "labels", make_spec(samples=3, labeler=labeler), 1)
        assert main(["labels", "inspect", str(tmp_path / "labels")]) == 0
        out = capsys.readouterr().out
        assert r"x\nlabels: all 9 shards are whole\x1b[2J\u202e" in out
        assert not [line for line in out.splitlines() if line.startswith("labels: all 9")]
        assert "\x1b" not in out and "\u202e" not in out

    @pytest.mark.parametrize("error", [OSError(2, "not there", FORGED), KeyError(FORGED), click.UsageError(FORGED)])
    def test_nor_does_one_in_an_error(self, error, capsys):
        def fail():
            raise error

        run(fail, Session())
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert captured.err.startswith("error: ") and captured.err[:-1].isprintable()

    def test_nor_one_in_a_log_message(self, capsys):
        run(lambda: logging.getLogger("stl_offline.x").warning("%s", self.FORGED), Session())
        assert capsys.readouterr().err == "warning: x labels: all 9 shards are whole\\x1b[2J\\u202e\n"


class TestAdvice:
    @pytest.mark.parametrize(
        ("command", "text", "expected"),
        [
            ("evaluate", "leave them out with `skip_broken`", "leave them out with --skip-broken"),
            ("train-student", "give `skip_broken=True`", "give --skip-broken"),
            ("train-student", "give `resume=False`", "give --no-resume"),
            ("train-student", "give `missing='skip'`", "give --missing skip"),
            ("dump-labels", "give `max_size`", "give 'stl-offline pack --max-size'"),
            ("train-student", "with `class_names`", "with 'stl-offline pack --classes'"),
            ("labels inspect", "give `shards=3`", "give 'stl-offline dump-labels --shards 3'"),
            ("labels verify", 'with `pull(shards="3")`', "with 'stl-offline labels pull --shards 3'"),
            ("train-student", 'with `fly(labels="3")`', 'with `fly(labels="3")`'),
            ("pack", "`device` and `no_option`", "'stl-offline train-labeler --device' and `no_option`"),
        ],
    )
    def test_a_parameter_becomes_an_option(self, command, text, expected):
        ctx = click.Context(group, info_name="stl-offline")
        for name in command.split():
            ctx = click.Context(ctx.command.get_command(ctx, name), parent=ctx, info_name=name)
        assert translate(text, ctx) == expected

    def test_it_does_so_in_errors_of_a_command(self, capsys, monkeypatch):
        def fail(*_, **__):
            raise InputError("too large; give `max_size`, or leave it out with `skip_broken`")

        monkeypatch.setattr("stl_offline.images.pack.pack", fail)
        assert main(["pack", "a", "b.beton"]) == 1
        assert capsys.readouterr().err == "error: too large; give --max-size, or leave it out with --skip-broken\n"

    @pytest.mark.parametrize(
        ("command", "expected"),
        [
            ("evaluate", "try a smaller --batch-size or fewer --workers"),
            ("pack", "try fewer --workers"),
            ("labels", "free some memory and try again"),
        ],
    )
    def test_memory(self, command, expected):
        ctx = click.Context(group)
        assert memory_advice(click.Context(group.get_command(ctx, command))) == expected


def test_counts():
    assert [counted(*each) for each in [(0, "shard"), (1, "shard"), (1000, "class")]] == [
        "0 shards",
        "1 shard",
        "1,000 classes",
    ]


class TestLogsAndProgress:
    LINES = (
        "import logging, warnings",
        "from stl_offline.progress import progress_bar",
        "logger = logging.getLogger('stl_offline.images.x')",
        "logger.debug('a detail')",
        "logger.info('packed 3 images')",
        "logger.warning('no colour')",
        "warnings.warn('of another library')",
        "with progress_bar(100, 'work') as bar:",
        "    for _ in range(24): time.sleep(0.05); bar.update(4); bar.set_postfix(loss='2.000', refresh=False)",
    )

    @pytest.fixture
    def loud(self):
        return {name: value for name, value in os.environ.items() if name != "STL_OFFLINE_QUIET"}

    def test_in_a_file_progress_is_plain_lines(self, loud, tmp_path):
        with open(tmp_path / "log", "w") as log:
            assert stub(*self.LINES, stderr=log, env=loud).returncode == 0
        lines = (tmp_path / "log").read_text().splitlines()
        assert lines[:2] == ["packed 3 images", "warning: no colour"]
        assert re.fullmatch(r"work: \d+ of 100 images, \d+\.\d images/s, 0:0\d left, loss 2\.000", lines[2])
        assert re.fullmatch(r"work: 96 of 100 images, \d+\.\d images/s, 0:0\d in all, loss 2\.000", lines[3])
        assert len(lines) == 4

    def test_quiet_shows_warnings_alone(self, loud):
        done = stub(*self.LINES, env=loud | {"STL_OFFLINE_QUIET": "1"})
        assert done.stderr == "warning: no colour\n"

    def test_debug_shows_all(self, loud):
        done = stub(*self.LINES, arguments=("--debug",), env=loud)
        assert done.stderr.startswith("debug: a detail\npacked 3 images\n")
        assert "UserWarning: of another library" in done.stderr

    def test_a_user_of_python_sees_nothing(self, capsys):
        with progress_bar(3, "work") as bar:
            bar.update(3)
        assert capsys.readouterr() == ("", "")

    def test_the_library_prints_nothing_after_a_command(self, labels, capsys, monkeypatch):
        monkeypatch.delenv("STL_OFFLINE_QUIET")
        assert main(["labels", "verify", str(labels)]) == 0
        capsys.readouterr()
        logging.getLogger("stl_offline.x").info("unasked")
        self.test_a_user_of_python_sees_nothing(capsys)


class TestDeath:
    @pytest.mark.parametrize(
        ("number", "words"),
        [
            (signal.SIGBUS, "SIGBUS: a file that it was reading became shorter"),
            (signal.SIGSEGV, "SIGSEGV: a fault in a library"),
            (signal.SIGABRT, "SIGABRT: a library gave up, in most cases for lack of memory; try fewer --workers"),
            (signal.SIGFPE, "SIGFPE: "),
            (signal.SIGILL, "SIGILL: "),
            (signal.SIGKILL, "SIGKILL, which the system sends when memory runs out; try fewer --workers"),
        ],
        ids=lambda value: value.name if isinstance(value, signal.Signals) else None,
    )
    def test_is_one_line_and_the_signal_stays(self, number, words):
        done = stub("print('working', flush=True)", f"os.kill(os.getpid(), {int(number)})", "time.sleep(9)")
        assert (done.returncode, done.stdout) == (-number, "working\n")
        assert done.stderr.startswith("error: the command was ended by ") and words in done.stderr
        assert done.stderr.count("\n") == 1

    def test_below_a_function_whose_name_ends_as_the_last_word_once_did(self):
        """The crash's text comes in pieces; one that ended in "end" was taken for the command's orderly end."""
        lines = "def send(): os.kill(os.getpid(), signal.SIGSEGV)", "send()"
        for _ in range(5):
            assert stub(*lines).stderr.startswith("error: the command was ended by ")

    def test_a_mapped_file_that_is_cut_off(self, tmp_path):
        (tmp_path / "file").write_bytes(bytes(1 << 16))
        lines = (
            f"import mmap; stream = open({str(tmp_path / 'file')!r}, 'r+b'); data = mmap.mmap(stream.fileno(), 0)",
            "stream.truncate(0)",
            "data[1 << 15]",
        )
        done = stub(*lines)
        assert done.returncode == -signal.SIGBUS and "SIGBUS: a file" in done.stderr

    def test_debug_shows_where(self):
        done = stub("os.kill(os.getpid(), signal.SIGSEGV)", arguments=("--debug",))
        assert "Fatal Python error: Segmentation fault" in done.stderr and "in stub" in done.stderr

    @pytest.mark.parametrize(
        ("line", "code"),
        [
            ("pass", 0),
            ("sys.exit(5)", 5),
            ("raise KeyboardInterrupt", 130),
            ("raise SystemExit(143)", 143),
            ("os.fork() or os._exit(7)", 0),
            ("os.fork() or os.kill(os.getpid(), signal.SIGSEGV); os.wait()", 0),
            ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", 143),
        ],
    )
    def test_other_ends_are_not_mistaken_for_it(self, line, code):
        done = stub(line)
        assert done.returncode == code
        assert done.stderr == ("interrupted; run the same command again to go on\n" if code > 128 else "")

    def test_a_signal_to_the_whole_group_comes_once(self):
        lines = "try: print('ready', flush=True); time.sleep(30)", "finally: print('tidied', flush=True)"
        code = STUB.format(lines="\n".join(f"    {line}" for line in lines))
        with subprocess.Popen(
            [sys.executable, "-c", code, "stub"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as child:
            assert child.stdout.readline() == "ready\n"
            os.killpg(child.pid, signal.SIGTERM)
            out, err = child.communicate(timeout=30)
        assert (child.returncode, out) == (143, "tidied\n")
        assert err == "interrupted; run the same command again to go on\n"

    def test_the_watcher_goes_with_the_command_and_is_no_child_of_it(self):
        started = time.monotonic()
        done = stub("try: os.wait()", "except ChildProcessError: print('none')")
        assert done.stdout == "none\n" and time.monotonic() - started < 30
