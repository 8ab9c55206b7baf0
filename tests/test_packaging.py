"""The package as it installs: from a wheel, editable, with pinned versions."""

import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import stl_offline
from tests.source_tree import REPOSITORY, modules

BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
WHERE = "import stl_offline.cli.main as main, stl_offline; print(stl_offline.__file__); print(main.__file__)"


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    return parser


def requirements(extras: list[str] | None = None) -> list[Requirement]:
    """Everything that setup.cfg asks for, with some extras or all."""
    parser = setup_cfg()
    offered = parser["options.extras_require"]
    blocks = [parser["options"]["install_requires"], *(offered[name] for name in extras or offered)]
    return [Requirement(line) for block in blocks for line in block.splitlines() if line.strip()]


def pins() -> dict[str, str]:
    """Name → version of .ci/constraints.txt."""
    lines = (REPOSITORY / ".ci" / "constraints.txt").read_text().splitlines()
    assert all("==" in line for line in lines), "a line that is no NAME==VERSION"
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def build(kind: str, source: Path, target: Path) -> Path:
    """Call setuptools' build backend in ``source``; ``kind`` is build_wheel or build_sdist."""
    target.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(target)], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy, since a build leaves folders in its source."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("stl_offline", "cli"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    return build("build_wheel", source, folder)


def test_setup_cfg_lists_every_package():
    listed = set(setup_cfg()["options"]["packages"].split())
    assert listed == {name for name, module in modules().items() if module.path.name == "__init__.py"}
    assert listed == {name.rpartition(".")[0] or name for name in modules()}, "a folder of modules without __init__.py"


def test_the_wheel_holds_every_module_and_no_other_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    python = {name for name in names if name.endswith(".py")}
    expected = {
        str(Path(*module.name.split(".")) / "__init__.py")
        if module.path.name == "__init__.py"
        else str(Path(*module.name.split(".")).with_suffix(".py"))
        for module in modules().values()
    }
    assert python == expected
    source = REPOSITORY / "stl_offline"
    files = [source / "py.typed", *source.rglob("*.yaml"), *(source / "reports" / "templates").iterdir()]
    assert {str(path.relative_to(REPOSITORY)) for path in files} <= names
    assert {name.split("/")[0] for name in names} == {"stl_offline", wheel.name.partition("-py3")[0] + ".dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_works_in_a_fresh_environment(wheel, tmp_path):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=60)
    python = venv / "bin" / "python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--python",
        python,
        "install",
        "-q",
        "--no-index",
    ]
    subprocess.run([*pip, "--no-deps", wheel], check=True, timeout=120, cwd=tmp_path)
    site = next((venv / "lib").glob("python3*")) / "site-packages"
    # The dependencies of this environment, without its own editable installation.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    places = subprocess.check_output([python, "-c", WHERE], text=True, cwd=tmp_path, timeout=60).splitlines()
    assert places == [str(site / "stl_offline" / "__init__.py"), str(site / "stl_offline" / "cli" / "main.py")]
    text = subprocess.check_output([venv / "bin" / "stl-offline", "--help"], text=True, cwd=tmp_path, timeout=60)
    assert "train-student" in text


def test_a_source_archive_builds_the_same_wheel(wheel, tmp_path):
    source = wheel.parent / "source"
    archive = build("build_sdist", source, tmp_path)
    shutil.unpack_archive(archive, tmp_path, filter="data")
    again = build("build_wheel", tmp_path / archive.name.removesuffix(".tar.gz"), tmp_path / "again")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as two:
        assert sorted(one.namelist()) == sorted(two.namelist())


def test_the_editable_installation_is_this_tree(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", WHERE]
    places = subprocess.check_output(command, text=True, cwd=tmp_path, env=environment, timeout=60).splitlines()
    assert places == [str(REPOSITORY / "stl_offline" / "__init__.py"), str(REPOSITORY / "cli" / "main.py")]
    script = Path(sys.executable).parent / "stl-offline"
    assert "train-student" in subprocess.check_output([script, "--help"], text=True, cwd=tmp_path, timeout=60)


def test_what_setup_cfg_asks_for_is_pinned_within_its_range():
    pinned = pins()
    for requirement in requirements():
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} has no pin in .ci/constraints.txt; run make constraints"
        assert requirement.specifier.contains(version), f"{requirement} excludes the pinned {version}"


def test_everything_that_these_bring_is_pinned():
    pinned = pins()
    # What the set-up installs: other extras are not here to be asked what they bring.
    installed = re.search(r"--editable '\.\[(.+)\]'", (REPOSITORY / ".ci" / "setup").read_text())[1].split(",")
    todo = {(canonicalize_name(item.name), tuple(item.extras)) for item in requirements(installed)} | {
        ("pip", ()),
        ("setuptools", ()),
    }
    seen = set()
    while todo:
        name, extras = item = todo.pop()
        seen.add(item)
        assert name in pinned, f"{name} has no pin in .ci/constraints.txt; run make constraints"
        for line in importlib.metadata.requires(name) or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                todo |= {(canonicalize_name(needed.name), tuple(needed.extras))} - seen
    assert len(seen) > 30


def test_the_citation_has_what_the_format_requires():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == stl_offline.__version__
    assert citation["license"] == setup_cfg()["metadata"]["license"]
    (paper,) = citation["references"]
    assert paper.keys() >= {"type", "title", "authors"}
    assert paper["identifiers"][0]["value"] == "arXiv:2401.03844"
    for author in (*citation["authors"], *paper["authors"]):
        assert author.keys() in ({"name"}, {"family-names", "given-names"})


def test_the_changelog_leads_from_modules_that_are_gone_to_modules_that_are_there():
    rows = re.findall(
        r"^\| (`.+`) \| `(.+)` \|$", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(rows) > 40
    assert {new for _, new in rows} <= modules().keys()
    # A file that became a folder keeps its name, for what the folder's door gives.
    folders = {name for name, module in modules().items() if module.path.name == "__init__.py"}
    old = {name for names, _ in rows for name in re.findall(r"`(.+?)`", names)}
    assert old & modules().keys() <= folders
