"""The command line as a user meets it: quick help, one line for every failure, exit codes that scripts can rely on."""

import dataclasses
import errno
import inspect
import os
import re
import resource
import signal
import subprocess
import sys
from operator import attrgetter

import click
import pytest

from stl_offline.cli.command import GROUPS
from stl_offline.cli.failures import Session, run
from stl_offline.cli.main import COMMANDS, group, main
from stl_offline.config import DumpConfig, EvaluateConfig, LabelerConfig, PreviewConfig, ReportConfig, StudentConfig
from stl_offline.config_transfer import (
    DetectConfig,
    ImportConfig,
    SegmentConfig,
    TransferEvaluateConfig,
    ZeroTrainConfig,
)
from stl_offline.errors import InputError, MissingExtraError, TargetError
from stl_offline.labels.convert import convert

HEAVY = "torch torchvision ffcv timm cv2 PIL safetensors matplotlib jinja2"
CALL = "import sys; from stl_offline.cli.main import main; sys.exit(main(sys.argv[1:]))"
WITHOUT_EXTRAS = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY.split()}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
""" + CALL.replace("import sys; ", "")


def call(*arguments: str, code: str = CALL, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, **options
    )


def leaves(command: click.Command = group, path: tuple[str, ...] = ()):
    """Every command with its path: ("labels", "show") and so on."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    ctx = click.Context(command)
    for name in command.list_commands(ctx):
        yield from leaves(command.get_command(ctx, name), (*path, name))


LEAVES = [pytest.param(" ".join(path), command, id=" ".join(path)) for path, command in leaves()]


def options_of(command: click.Command) -> list[click.Option]:
    """The options that a command shows, but for click's own --help."""
    return [each for each in command.params if isinstance(each, click.Option) and not each.hidden]


def test_help_is_quick_and_loads_no_heavy_package():
    look = f"main(['--help']); print(set('{HEAVY} numpy numba zarr'.split()) & set(sys.modules))"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = call(code=CALL.replace("sys.exit(main(sys.argv[1:]))", look))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\nset()\n")
    # The processor's time, not the clock's: other tests run beside this one.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_help_lists_every_command_with_its_line(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, (_, line) in COMMANDS.items():
        assert f"  {name} " in text
        assert line in text


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_loads_and_agrees_with_the_table(name):
    command = group.get_command(click.Context(group), name)
    assert command.name == name
    assert command.help


@pytest.mark.parametrize(("path", "command"), LEAVES)
def test_each_help_has_an_example_and_groups_of_full_phrases(path, command):
    text = command.get_help(click.Context(command, info_name=path))
    assert re.search(rf"Example:\n +stl-offline {path} ", text)
    for option in options_of(command):
        assert option.group in GROUPS, f"{option.name} is in no group"
        assert f"  {option.opts[0]}" in text.partition(f"\n{option.group.removesuffix('s').capitalize()} options:\n")[2]
        assert re.fullmatch(r"[A-Z].*\.", option.help, re.DOTALL), f"{option.opts[0]}: {option.help!r}"


@pytest.mark.parametrize(("path", "command"), LEAVES)
def test_every_option_reaches_the_command(path, command):
    """An option is a parameter of the command's function, or a field of the settings that it makes of the rest."""
    parameters = inspect.signature(command.callback).parameters
    names = {name for name, each in parameters.items() if each.kind != each.VAR_KEYWORD}
    if "settings" in parameters:
        settings = {
            "train-labeler": LabelerConfig,
            "train-student": StudentConfig,
            "dump-labels": DumpConfig,
            "evaluate": EvaluateConfig,
            "report": ReportConfig,
            "labels preview": PreviewConfig,
            "transfer segment": SegmentConfig,
            "transfer detect": DetectConfig,
            "transfer evaluate": TransferEvaluateConfig,
            "transfer zero-train": ZeroTrainConfig,
            "transfer import": ImportConfig,
        }[path]
        names |= {field.name for field in dataclasses.fields(settings)}
    elif path == "labels convert":
        names |= inspect.signature(convert).parameters.keys()
    elif "options" in parameters:
        assert path == "labels verify"
        names |= {"labeler", "data", "seed", "key_prefix", "match", "skip_broken", "device"}  # of recompute_labels
        names |= {field.name for field in dataclasses.fields(DumpConfig) if field.name.startswith("labeler_")}
    exposed = {each.name for each in command.params if each.expose_value}
    assert exposed <= names, f"dropped: {exposed - names}"


# Where nothing runs a model, or nothing is done by several threads.
WITHOUT = {
    "--device": {path for path, _ in map(attrgetter("values"), LEAVES) if path == "pack" or path.startswith("labels ")}
    - {"labels verify"},
    "--workers": {"labels inspect", "labels preview"},
}
NEVER_HAD = {"transfer import"}  # commands that came after these options were hidden


@pytest.mark.parametrize(("path", "command"), LEAVES)
@pytest.mark.parametrize("name", WITHOUT)
def test_an_option_that_was_never_used_is_hidden_and_warns(path, command, name, capsys):
    shown = {each.opts[0] for each in options_of(command)}
    assert (name in shown) is (path not in WITHOUT[name] and path not in NEVER_HAD)
    if name in shown or path in NEVER_HAD:
        return
    arguments = ["nowhere" for each in command.params if isinstance(each, click.Argument)]
    assert main([*path.split(), *arguments, name, "1"]) == 1
    warning, error = capsys.readouterr().err.splitlines()
    assert warning == f"warning: stl-offline {path} does not use {name}; the option will be removed in version 0.3"
    assert error.startswith("error: ") and "nowhere" in error


@pytest.mark.parametrize(("path", "command"), LEAVES)
def test_an_option_given_twice_is_refused(path, command, capsys):
    for option in options_of(command):
        for first in (option.opts[0], *option.secondary_opts[:1]):
            value = [] if option.is_flag else [option.type.choices[0] if hasattr(option.type, "choices") else "1"]
            code = main([*path.split(), first, *value, option.opts[0], *value])
            error = capsys.readouterr().err
            assert code in (1, 2) and ("is given 2 times" in error) is not option.multiple, option.name
            assert option.opts[0] in error or option.multiple


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("train-labeler", LabelerConfig),
        ("train-student", StudentConfig),
        ("dump-labels", DumpConfig),
        ("evaluate", EvaluateConfig),
    ],
)
def test_options_are_the_settings_with_their_defaults(name, config):
    command = group.get_command(click.Context(group), name)
    fields = dataclasses.fields(config)
    required = {field.name: "here" for field in fields if field.default is dataclasses.MISSING}
    required |= {"checkpoint": "here"} if name == "evaluate" else {}  # or a model
    arguments = [word for field in required for word in (f"--{field.replace('_', '-')}", "here")]
    values = command.make_context(name, arguments).params
    # Ways to call it, not settings of the result.
    for how in ("as_json", "recipe", "dry_run", "estimate", "finish", "append", "worker", "engine", "ray_address"):
        values.pop(how, None)
    assert values.keys() == {field.name for field in fields} - {"debug"}
    assert config(**values) == config(**required)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("train-labeler", LabelerConfig),
        ("train-student", StudentConfig),
        ("dump-labels", DumpConfig),
        ("evaluate", EvaluateConfig),
        ("report", ReportConfig),
        ("labels preview", PreviewConfig),
    ],
)
def test_options_show_the_help_of_their_settings(name, config):
    command = next(each for path, each in leaves() if " ".join(path) == name)
    helps = {field.name: field.metadata["help"].removesuffix(".") for field in dataclasses.fields(config)}
    for option in options_of(command):
        if option.name in helps:
            in_options = re.sub(r"`(\w+)(?:=(\w+))?`", _as_option, helps[option.name])
            assert option.help.startswith(in_options), option.name


def _as_option(match: re.Match) -> str:
    return " ".join(["--" + match[1].replace("_", "-"), *filter(None, [match[2]])])


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", "labels/shard")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("no images in x"), 1, "error: no images in x"),
        (TargetError("cannot write x"), 1, "error: cannot write x"),
        (MissingExtraError("needs [train]"), 1, "error: needs [train]"),
        (full_disk(), 1, "no space left to write labels/shard"),
        (PermissionError(errno.EACCES, "Permission denied", "labels"), 1, "no permission for labels"),
        (
            OSError(errno.EROFS, "Read-only file system", "labels"),
            1,
            "no permission for labels (Read-only",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), 1, "No such file or directory: x"),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, "out of memory"),
        (ImportError("libc10.so: failed to map segment from shared object"), 1, "out of memory"),
        (ModuleNotFoundError("No module named 'timm'", name="timm"), 1, "pip install 'stl-offline[train]'"),
        (
            ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib"),
            1,
            "pip install 'stl-offline[report]'",
        ),
        (ImportError("libopencv.so: cannot open", name="ffcv._libffcv"), 1, "ffcv is installed but does not load"),
        (ModuleNotFoundError("No module named 'nowhere'", name="nowhere"), 70, "unexpected ModuleNotFoundError"),
        (KeyError("left"), 70, "unexpected KeyError: 'left'; run with --debug for the traceback"),
        (OSError("no number"), 70, "unexpected OSError: no number"),
        (click.UsageError("No such option"), 2, "error: No such option (see 'stl-offline --help')"),
        (click.FileError("x", "gone"), 1, "gone"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to go on"),
        (click.Abort(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_a_failure_is_one_line_and_a_code(error, code, words, capsys):
    def fail():
        raise error

    assert run(fail, Session()) == code
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_message_of_many_lines_becomes_one(capsys):
    def fail():
        raise InputError("first\n   second")

    assert run(fail, Session()) == 1
    assert capsys.readouterr().err == "error: first second\n"


def test_debug_shows_the_traceback(capsys):
    assert main(["train-labeler", "--data", "x", "--out", "y", "--epochs", "0", "--debug"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("Traceback")
    assert captured.err.splitlines()[-1] == "error: --epochs must be at least 1, got 0"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["pac"], 2, "No such command 'pac'"),
        (["pack"], 2, "Missing argument 'SRC' (see 'stl-offline pack --help')"),
        (["pack", "a", "b", "--max-size", "0"], 2, "--max-size"),
        (["train-labeler", "--data", "x"], 2, "Missing option '--out'"),
        (["train-labeler", "--data", "x", "--out", "y", "--epochs", "many"], 2, "'many' is not a valid integer"),
        (["train-labeler", "--data", "x", "--out", "y", "--epochs", "0"], 1, "--epochs must be at least 1, got 0"),
        (["train-student", "--data", "x", "--out", "y", "--labels", "online"], 1, "--labels online needs --labeler"),
        (["train-student", "--data", "x", "--out", "y", "--token-target", "hard"], 2, "'hard' is not one of"),
        (["dump-labels", "--data", "x", "--labeler", "y", "--out", "z", "--shards", "-1"], 1, "shards"),
        (["evaluate", "--data", "x", "--checkpoint", "nowhere"], 1, "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_calls(arguments, code, words, capsys):
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


def test_no_arguments_show_the_help(capsys):
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err


def test_version(capsys):
    from stl_offline import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"stl-offline {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["train-labeler", "--data", "x", "--out", "y"],
        ["train-student", "--data", "x", "--out", "y"],
        ["dump-labels", "--data", "x", "--labeler", "y", "--out", "z"],
        ["evaluate", "--data", "x", "--checkpoint", "y"],
        ["pack", "x", "y.beton"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_command_without_its_extra_says_which_to_install(arguments):
    done = call(*arguments, code=WITHOUT_EXTRAS)
    assert done.returncode == 1
    assert done.stderr.startswith("error: this command needs the extra [train]: pip install 'stl-offline[train]'")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_help_works_without_any_extra(name):
    done = call(name, "--help", code=WITHOUT_EXTRAS)
    assert done.returncode == 0, done.stderr
    assert "Usage: stl-offline" in done.stdout


WAIT = """
import signal, sys, time
from stl_offline.cli.failures import Session, run

# A shell starts what it runs in the background with Ctrl-C ignored; these tests may run there.
signal.signal(signal.SIGINT, signal.default_int_handler)

def wait():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("tidied", flush=True)

sys.exit(run(wait, Session()))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_in_one_line_after_tidying_up(number, code):
    with subprocess.Popen(
        [sys.executable, "-c", WAIT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err) == (code, "tidied\n", "interrupted; run the same command again to go on\n")


def test_an_exit_code_of_an_interruption_gets_the_same_line(capsys):
    # Training loops end the step at hand and then exit by themselves.
    assert run(lambda: sys.exit(143), Session()) == 143
    assert capsys.readouterr().err == "interrupted; run the same command again to go on\n"


def test_an_interrupted_start_from_scratch_is_not_begun_again(capsys):
    """What was saved until then would be deleted. Before that, what was there is still there."""
    context = click.Context(click.Command("train-student"))
    context.params |= {"resume": False, "out": "runs/a"}
    assert run(lambda: sys.exit(143), Session(ctx=context)) == 143
    words = "interrupted; run the same command again, without --no-resume if it had begun to train\n"
    assert capsys.readouterr().err == words
    del context.params["out"]  # evaluate: old scores would come back
    assert run(lambda: sys.exit(143), Session(ctx=context)) == 143
    assert capsys.readouterr().err == "interrupted; run the same command again\n"


def test_a_forked_worker_dies_of_the_signal_in_silence():
    code = """
import os, signal, sys
from stl_offline.cli.failures import Session, run

def fork():
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) + 100

sys.exit(run(fork, Session()))
"""
    done = call(code=code)
    assert (done.returncode, done.stderr) == (100 - signal.SIGTERM, "")


def test_a_reader_that_leaves_is_no_failure():
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as closed:
        done = subprocess.run([sys.executable, "-c", CALL, "--help"], stdout=closed, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(
    "line",
    [
        "pack images out.beton --class-map pipe",
        "pack images out.beton --classes pipe",
        "pack pipe.tar out.beton",
        "evaluate --data pipe.beton --checkpoint run",
        "evaluate --suite real --data real=images --real-labels pipe --model resnet18",
        "report pipe.json --out page.html",
        "train-labeler --recipe pipe --data images --out run",
        "labels inspect pipe",
        "labels verify set",
    ],
)
def test_a_named_pipe_is_refused_and_not_waited_for(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "set").mkdir()
    for name in ("pipe", "pipe.tar", "pipe.beton", "pipe.json", "set/manifest.json"):
        os.mkfifo(tmp_path / name)

    def stop(*_):
        raise AssertionError("it waits for the pipe's other end")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    try:
        assert main(line.split()) == 1
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "unexpected" not in error
    assert not {"out.beton", "page.html", "run"} & {path.name for path in tmp_path.iterdir()}
