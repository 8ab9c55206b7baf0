"""The set-up script on systems that lack something: what it installs, and the one line where it cannot.

Each test gives it a PATH of stand-ins, so nothing is installed and no system package matters.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.source_tree import REPOSITORY

ALL = "g++ pkg-config libopencv-dev libturbojpeg0-dev"


@pytest.fixture
def bin_folder(tmp_path) -> Path:
    """A PATH with the shell's basics and a supported Python, but no compiler and no libraries."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "cat", "dirname", "env", "mkdir", "tail", "touch"):
        (folder / name).symlink_to(shutil.which(name))
    stand_in(folder, "python3", f'exec {sys.executable} "$@"')
    return folder


def stand_in(folder: Path, name: str, *lines: str) -> None:
    path = folder / name
    path.write_text("\n".join(["#!" + shutil.which("bash"), *lines, ""]))
    path.chmod(0o755)


def as_user(folder: Path, number: int) -> None:
    stand_in(folder, "id", f"echo {number}")


def recording_apt(folder: Path, then: str = "") -> Path:
    record = folder.parent / "apt.txt"
    stand_in(folder, "apt-get", f'echo "$*" >> {record}', then)
    return record


def set_up(folder: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {"PATH": str(folder), "VENV": str(folder.parent / "venv"), "LANG": "C.UTF-8", **variables}
    return subprocess.run(
        [REPOSITORY / ".ci" / "setup"],
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )


def test_without_apt_the_line_names_what_to_install(bin_folder):
    done = set_up(bin_folder)
    assert done.returncode == 1
    assert (
        done.stderr
        == f"setup: this system has no apt-get; install what Debian calls: {ALL} (FFCV builds from source)\n"
    )


def test_without_root_and_sudo_the_line_names_the_command(bin_folder):
    as_user(bin_folder, 1000)
    record = recording_apt(bin_folder)
    done = set_up(bin_folder)
    assert done.returncode == 1
    assert done.stderr == f"setup: neither root nor sudo; ask someone who may to run: apt-get install {ALL}\n"
    assert not record.exists()


def test_root_installs_only_what_is_missing(bin_folder):
    as_user(bin_folder, 0)
    stand_in(bin_folder, "g++")
    stand_in(bin_folder, "pkg-config", '[ "$2" = opencv4 ]')
    record = recording_apt(bin_folder)
    done = set_up(bin_folder)
    update, install = record.read_text().splitlines()
    assert update.split()[-1] == "update"
    assert install.split()[-1:] == ["libturbojpeg0-dev"]
    assert "libopencv-dev" not in install
    # The stand-in installs nothing, and that is seen.
    assert done.returncode == 1
    assert "still missing after apt-get: libturbojpeg0-dev" in done.stderr


def test_others_install_through_sudo_without_waiting_for_a_password(bin_folder):
    as_user(bin_folder, 1000)
    recording_apt(bin_folder)
    record = bin_folder.parent / "sudo.txt"
    stand_in(bin_folder, "sudo", f'echo "$*" >> {record}', "exit 1")
    done = set_up(bin_folder)
    assert record.read_text().startswith("-n apt-get")
    assert done.returncode == 1
    assert f"run: apt-get install {ALL}" in done.stderr


def test_no_python_at_all_is_installed_too(bin_folder):
    as_user(bin_folder, 0)
    stand_in(bin_folder, "python3", "exit 1")
    record = recording_apt(bin_folder)
    done = set_up(bin_folder)
    assert record.read_text().splitlines()[1].endswith(f"{ALL} python3 python3-dev python3-venv")
    assert "no Python from 3.11 to 3.13" in done.stderr


def test_a_python_that_is_too_old_is_refused(bin_folder):
    stand_in(bin_folder, "old", "exit 1")
    done = set_up(bin_folder, PYTHON="old")
    assert done.returncode == 1
    assert "PYTHON=old is not a Python from 3.11 to 3.13" in done.stderr


@pytest.mark.parametrize(("wanted", "made"), [("3.12", True), ("3.11", False)])
def test_another_python_than_that_of_the_venv_makes_it_anew(bin_folder, tmp_path, wanted, made):
    for name in ("g++", "pkg-config"):
        stand_in(bin_folder, name)
    record = tmp_path / "calls.txt"
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    for path, version in ((tmp_path / "venv" / "bin" / "python", "3.11"), (bin_folder / "wanted", wanted)):
        # Answers as a Python of this version does, and makes nothing.
        stand_in(
            path.parent, path.name, f'case "$*" in -m*) echo "$*" >> {record}; exit 1;; *sep=*) echo {version};; esac'
        )
    done = set_up(bin_folder, PYTHON="wanted")
    assert done.returncode == 1
    assert ("-m venv --clear" in record.read_text()) == made
    assert (f"making {tmp_path / 'venv'} with" in done.stderr) == made


def bring_browser(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [REPOSITORY / ".ci" / "browser"],
        env={"PATH": str(folder), "LANG": "C.UTF-8"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )


def test_a_browser_that_is_there_is_left_alone(bin_folder):
    record = recording_apt(bin_folder)
    stand_in(bin_folder, "chromium")
    done = bring_browser(bin_folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert not record.exists()


def test_a_browser_is_installed_by_who_may(bin_folder):
    as_user(bin_folder, 0)
    record = recording_apt(bin_folder)
    assert bring_browser(bin_folder).returncode == 0
    assert record.read_text().splitlines()[1].split()[-1] == "chromium"


@pytest.mark.parametrize("apt", [None, "exit 100"], ids=["no apt-get", "a failure"])
def test_without_a_browser_the_tests_go_on(bin_folder, apt):
    as_user(bin_folder, 0)
    if apt is not None:
        recording_apt(bin_folder, apt)
    done = bring_browser(bin_folder)
    assert done.returncode == 0
    assert done.stderr.endswith("the tests that need a browser will be skipped\n")


def test_the_scripts_can_be_run():
    for name in ("setup", "run", "browser"):
        assert os.access(REPOSITORY / ".ci" / name, os.X_OK), f".ci/{name} is not executable"
