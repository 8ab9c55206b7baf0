"""The public interface: complete, typed, documented, quick to import, and usable without the extras."""

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import stl_offline
from tests.source_tree import REPOSITORY, modules
from tests.test_layers import HEAVY

USER_CODE = REPOSITORY / "tests" / "user_code.py"
CORE = sorted(name for names in stl_offline._CORE.values() for name in names)
TORCH = sorted(name for names in stl_offline._TORCH.values() for name in names)
TRAIN = sorted(name for names in stl_offline._TRAIN.values() for name in names)
ERRORS = [name for name in stl_offline.__all__ if name.endswith("Error")]

MYPY_SETTINGS = """
[mypy]
strict = True
follow_imports = silent
[mypy-{heavy}]
follow_imports = skip
ignore_missing_imports = True
"""
# What takes long to read and is not this package's.
NOT_READ = (*HEAVY, "numba", "zarr", "numcodecs", "fsspec", "webdataset", "tqdm", "xxhash")


def run(code: str, *arguments: str) -> str:
    """Standard output of a Python program of its own."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_list_of_names():
    assert sorted(stl_offline.__all__) == sorted([*CORE, *TORCH, *TRAIN, *ERRORS, "__version__"])
    assert len(stl_offline.__all__) == len(set(stl_offline.__all__))
    imported = {
        item.target.removeprefix("stl_offline.")
        for item in modules()["stl_offline"].imports
        if item.target.startswith("stl_offline.") and not item.target.startswith("stl_offline.errors.")
    }
    tables = stl_offline._CORE | stl_offline._TORCH | stl_offline._TRAIN
    lazy = {f"{module}.{name}" for module, names in tables.items() for name in names}
    assert imported == lazy, "the imports for type checkers and the table of lazy names differ"


@pytest.mark.parametrize("name", sorted(set(stl_offline.__all__) - {"__version__"}))
def test_every_name_is_documented(name):
    value = getattr(stl_offline, name)
    # A dataclass without a docstring gets its signature for one.
    assert value.__doc__ and not value.__doc__.startswith(f"{name}("), name
    assert f"`{name}`" in stl_offline.__doc__ or name in ERRORS, f"{name} is not in the module's overview"
    if inspect.isfunction(value):
        hints = value.__annotations__
        assert hints.keys() == {*inspect.signature(value).parameters, "return"}, f"{name} lacks type hints"


def test_unknown_names_are_attribute_errors():
    assert not hasattr(stl_offline, "picture")
    assert set(stl_offline.__all__) <= set(dir(stl_offline))
    with pytest.raises(ImportError, match="cannot import name 'picture'"):
        exec("from stl_offline import picture")


def test_importing_loads_nothing_else_and_is_quick():
    code = """
import sys, time
before, started = set(sys.modules), time.process_time()
import stl_offline
seconds = time.process_time() - started
print(seconds, *{name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))
"""
    outputs = [run(code).split() for _ in range(3)]
    assert {name for output in outputs for name in output[1:]} == {"stl_offline"}
    assert min(float(output[0]) for output in outputs) < 0.02


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

HEAVY = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Blocker())
import stl_offline

for name in sys.argv[2].split(","):
    assert getattr(stl_offline, name) is getattr(stl_offline, name)
for name in sys.argv[3].split(","):
    try:
        getattr(stl_offline, name)
    except stl_offline.MissingExtraError as error:
        print(error)
    else:
        print(name, "needs no extra")
try:
    from stl_offline import TokenLoader
except ImportError as error:
    print(type(error).__name__, error.name)
"""


@pytest.mark.parametrize(
    ("blocked", "there", "missing"),
    [(HEAVY, CORE, [*TORCH, *TRAIN]), (["ffcv"], [*CORE, *TORCH], TRAIN)],
    ids=["no extra", "[torch]"],
)
def test_without_the_extras(blocked, there, missing):
    lines = run(BLOCKED, ",".join(blocked), ",".join([*there, *ERRORS]), ",".join(missing)).splitlines()
    for name, line in zip(missing, lines, strict=False):
        needed = "torch" if name in TORCH else "train"
        assert re.fullmatch(
            rf"stl_offline\.{name} needs the extra \[{needed}\]: pip install 'stl-offline\[{needed}\]' "
            r"\(No module named '[\w.]+'\)",
            line,
        ), line
    assert re.fullmatch(r"MissingExtraError (torch|ffcv)(\.\w+)*", lines[-1])
    assert len(lines) == len(missing) + 1


def check_types(folder: Path, code: str) -> str:
    """What mypy prints for a file of user code."""
    (folder / "mypy.ini").write_text(MYPY_SETTINGS.format(heavy=",".join(f"{name}.*" for name in NOT_READ)))
    (folder / "user_code.py").write_text(code)
    # The package as an installed one would be read, without the repository's other folders.
    if not (folder / "stl_offline").exists():
        shutil.copytree(
            REPOSITORY / "stl_offline", folder / "stl_offline", ignore=shutil.ignore_patterns("__pycache__")
        )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", ".cache", "user_code.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert not done.stderr, done.stderr
    return done.stdout


def test_user_code_passes_a_strict_type_check(tmp_path):
    code = USER_CODE.read_text()
    unused = [name for name in stl_offline.__all__ if f"stl.{name}" not in code and not re.search(rf"\b{name}\b", code)]
    assert not unused, f"not in {USER_CODE.name}: {unused}"
    assert check_types(tmp_path, code).startswith("Success")
    # Types are really seen: not everything is Any.
    wrong = code + (
        "\n\ndef mistakes(labels: stl.LabelSet) -> None:\n"
        "    labels[3]\n"
        "    stl.verify(labels, wrokers=2)\n"
        "    stl.DumpConfig(data=3, labeler='a', out='b')\n"
        "    stl.picture\n"
    )
    found = check_types(tmp_path, wrong)
    assert "Found 4 errors" in found, found
