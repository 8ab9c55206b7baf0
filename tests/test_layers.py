"""The layers: imports go down, never up or in circles, and what label sets need stays free of torch and FFCV."""

import configparser
import re
import subprocess
import sys

import pytest

from tests.source_tree import REPOSITORY, Module, modules, own_imports

# From the bottom up. A module may import from rows below its own, and from its own package.
LAYERS = (
    ("errors",),
    ("needs",),
    ("settings",),
    ("config_evaluate", "config_pages"),
    ("config", "ffcv_setup", "files", "palette", "pixels", "progress", "remote"),
    ("config_transfer",),
    ("compiled",),
    ("random",),
    ("geometry",),
    ("labels", "images"),
    ("device",),
    ("augment", "distributed", "losses", "models", "recipes", "targets"),
    ("loader", "loops", "webdataset"),
    ("evaluation",),
    ("dump", "training"),
    ("transfer",),
    ("reports",),
    ("demo",),
    ("cli",),
)
LAYER_OF = {name: number for number, row in enumerate(LAYERS) for name in row}

# Folders with a door: the rest of the package imports what the folder itself exports, never a module within it.
DOORS = (
    *(
        "geometry",
        "labels.format",
        "labels.store",
        "targets",
        "augment",
        "models",
        "recipes",
        "loader",
        "loader.decoder",
    ),
    *("loops", "evaluation", "dump", "transfer", "demo"),
)

# What a team with a training loop of its own uses: it must load where only the core is installed.
LIGHT = (
    *("errors", "needs", "settings", "config", "config_evaluate", "config_pages", "config_transfer", "files"),
    *("progress", "remote", "compiled"),
    *("geometry", "random", "labels", "targets", "webdataset", "cli"),
)
HEAVY = ("torch", "torchvision", "ffcv", "timm", "cv2", "PIL", "safetensors", "matplotlib", "jinja2")

# The name that is imported → the distribution that setup.cfg asks for, where they differ.
DISTRIBUTION_OF = {"PIL": "pillow", "yaml": "pyyaml", "cv2": "ffcv", "llvmlite": "numba"}


def part_of(name: str) -> str:
    """The entry of the table that a module belongs to: stl_offline.labels.spec → labels."""
    return (name.split(".") + [""])[1]


def inner_modules() -> list[Module]:
    return [module for name, module in modules().items() if name != "stl_offline"]


def test_every_part_has_a_layer():
    unplaced = sorted({part_of(module.name) for module in inner_modules()} - LAYER_OF.keys())
    assert not unplaced, f"not in this test's table of layers: {unplaced}"


def test_imports_go_down():
    wrong = []
    for module in inner_modules():
        part = part_of(module.name)
        for target in own_imports(module):
            other = part_of(target)
            if other != part and (other not in LAYER_OF or LAYER_OF[other] >= LAYER_OF.get(part, 0)):
                wrong.append(f"{module.place} imports {target}")
    assert not wrong, wrong


@pytest.mark.parametrize("door", DOORS)
def test_others_come_in_through_the_door(door):
    package = f"stl_offline.{door}"
    assert package in modules(), f"{door} is not a folder of the package"
    wrong = [
        f"{module.place} imports {target}"
        for module in modules().values()
        if module.name != package and not module.name.startswith(f"{package}.")
        for target in own_imports(module)
        if target.startswith(f"{package}.") and not any(target == f"stl_offline.{other}" for other in DOORS)
    ]
    assert not wrong, wrong


def test_no_module_imports_itself_through_others():
    graph = {module.name: own_imports(module) - {module.name} for module in inner_modules()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle of imports: {' → '.join([*way[way.index(name) :], name])}"
        if name not in done:
            for target in sorted(graph.get(name, ())):
                visit(target, (*way, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())
    assert done >= graph.keys()


def test_functions_import_only_in_the_command_line():
    wrong = [
        f"{module.place}:{item.line} imports {item.target}"
        for name, module in modules().items()
        for item in module.imports
        if item.in_function and part_of(name) != "cli"
    ]
    assert not wrong, wrong


def test_the_command_line_starts_light():
    allowed = {"stl_offline.__version__", "stl_offline.cli", "stl_offline.config", "stl_offline.errors"}
    allowed |= {"stl_offline.settings"}
    wrong = []
    for module in modules().values():
        if part_of(module.name) != "cli":
            continue
        for item in module.imports:
            root = item.target.split(".")[0]
            fine = root in sys.stdlib_module_names or root == "click"
            fine |= any(item.target.startswith(prefix) for prefix in allowed)
            if not (item.in_function or fine):
                wrong.append(f"{module.place}:{item.line} imports {item.target} before a command is called")
    assert not wrong, wrong


def declared(*extras: str) -> set[str]:
    """The distributions that setup.cfg names for the core and for the extras."""
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    blocks = [setup["options"]["install_requires"], *(setup["options.extras_require"][extra] for extra in extras)]
    return {re.match(r"[\w.-]+", line)[0].lower() for block in blocks for line in block.split("\n") if line.strip()}


@pytest.mark.parametrize(
    ("parts", "extras"),
    [
        (set(LIGHT) - {"cli"}, ()),
        (set(LAYER_OF) - set(LIGHT) - {"reports", "demo"}, ("train",)),
        ({"reports", "demo", "cli"}, ("train", "report")),
    ],
    ids=["core", "train", "report"],
)
def test_what_is_imported_is_declared(parts, extras):
    wrong = []
    for module in inner_modules():
        if part_of(module.name) not in parts:
            continue
        for item in module.imports:
            root = item.target.split(".")[0]
            if root in sys.stdlib_module_names or root == "stl_offline":
                continue
            if DISTRIBUTION_OF.get(root, root) not in declared(*extras):
                wrong.append(f"{module.place}:{item.line} imports {root}")
    assert not wrong, f"not in setup.cfg's requirements: {wrong}"


BLOCKER = """
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"{name} is not part of the core", name=name)

HEAVY = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Blocker())
for name in sys.argv[2].split(","):
    importlib.import_module(name)
print(len(sys.modules))
"""


def test_label_sets_load_without_torch_and_ffcv():
    light = [name for name in modules() if name == "stl_offline" or part_of(name) in LIGHT]
    assert "stl_offline.labels.spec" in light
    done = subprocess.run(
        [sys.executable, "-c", BLOCKER, ",".join(HEAVY), ",".join(light)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
