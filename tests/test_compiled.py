"""Compiled code: what a first use shows, what is kept, and machines where nothing can be kept."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

from stl_offline import compiled
from tests.source_tree import modules

# The cheapest compiled function with an answer that is known without it; then the command line's help.
CHILD = """
import sys
if sys.argv[1] == "homeless":
    import pwd
    def no_entry(uid):
        raise KeyError(uid)
    pwd.getpwuid = no_entry
import numpy as np
import stl_offline
from stl_offline.cli.main import main
from stl_offline.cli.terminal import library_shown
from stl_offline.random import uniforms
assert main(["--help"]) == 0
with library_shown(str):
    first = uniforms(0, 1, 0, np.arange(1), 4)
    again = uniforms(0, 1, 0, np.arange(1), 4)
assert (first == again).all() and 0 <= first.min() and first.max() < 1
"""
VARIABLES = ("HOME", "TMPDIR", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "STL_OFFLINE_CACHE", "STL_OFFLINE_QUIET")


def run(home: str, **variables: str) -> str:
    """What a process of its own writes to stderr."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | variables
    done = subprocess.run(
        [sys.executable, "-c", CHILD, home], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: stl-offline" in done.stdout
    return done.stderr


def test_the_first_use_announces_that_it_compiles_and_the_second_one_finds_the_code(tmp_path):
    own = {"STL_OFFLINE_CACHE": str(tmp_path / "cache")}
    assert run("", **own).count("compiling for this machine") == 1
    assert any((tmp_path / "cache" / "compiled").rglob("*.nbc"))
    assert run("", **own) == ""
    # What numba keeps is pickled, and names classes that another release may not have.
    for index in (tmp_path / "cache" / "compiled").rglob("*.nbi"):
        index.write_bytes(pickle.dumps(compiled.numba.__version__) + b"ca_module_of_another_release\nGone\n.")
    assert run("", **own).count("compiling for this machine") == 1


def test_states_of_the_sources_do_not_share_a_folder(tmp_path, monkeypatch):
    """And only the newest few are kept."""
    monkeypatch.setenv("STL_OFFLINE_CACHE", str(tmp_path))
    monkeypatch.setattr(compiled.numba.config, "CACHE_DIR", "")
    folders = []
    for number in range(8):
        monkeypatch.setattr(compiled, "_digest", lambda number=number: f"state {number}")
        folder = Path(compiled._folder.__wrapped__())
        os.utime(folder, (number, number))
        folders.append(folder)
    (tmp_path / "compiled" / "something of the user's").mkdir()
    assert len(set(folders)) == 8
    assert [folder.is_dir() for folder in folders] == [False] * 3 + [True] * 5
    assert (tmp_path / "compiled" / "something of the user's").is_dir()


def test_without_any_home_compiled_functions_work_and_the_variable_to_set_is_named():
    written = run("homeless")
    assert written.count("set STL_OFFLINE_CACHE to a folder that can be written") == 1


def test_where_no_folder_can_be_written_the_variable_to_set_is_named(tmp_path):
    # Below a file nobody can make a folder, not even root.
    (tmp_path / "file").touch()
    blocked = {name: str(tmp_path / "file" / name) for name in VARIABLES[:4]}
    written = run("", **blocked)
    assert written.count("set NUMBA_CACHE_DIR to a folder that can be written") == 1
    assert written.count("compiling for this machine") == 1
    assert "Traceback" not in written


def test_all_compiled_functions_share_one_decorator():
    """So every command that compiles announces it, and keeps the code."""
    for module in modules().values():
        users = {line.target for line in module.imports} & {"numba.njit", "numba.jit", "numba.vectorize"}
        assert not users, module.place
        text = module.path.read_text(encoding="utf-8")
        assert module.name == "stl_offline.compiled" or "numba.njit(" not in text, module.place
