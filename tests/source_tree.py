"""The package's modules and what each imports, read from the source without running it."""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Import:
    """One name that a module imports, fully qualified, and whether that stands inside a function."""

    target: str
    line: int
    in_function: bool


@dataclass(frozen=True)
class Module:
    name: str  # as installed: cli/pack.py is stl_offline.cli.pack
    path: Path
    tree: ast.Module
    imports: tuple[Import, ...]

    @property
    def place(self) -> str:
        return str(self.path.relative_to(REPOSITORY))


@cache
def modules() -> dict[str, Module]:
    """Every module of the package by its installed name."""
    found = {}
    for folder, package in (("stl_offline", "stl_offline"), ("cli", "stl_offline.cli")):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            parts = path.relative_to(REPOSITORY / folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
            found[name] = Module(name, path, tree, tuple(_imports(tree, name, path.name == "__init__.py")))
    return found


def own_imports(module: Module) -> set[str]:
    """The modules of this package that a module imports: ``from package import module`` names the module."""
    known = modules()
    targets = set()
    for item in module.imports:
        if not item.target.startswith("stl_offline") or item.target == "stl_offline.__version__":  # a constant
            continue
        target = item.target
        while target not in known and "." in target:
            target = target.rpartition(".")[0]
        targets.add(target)
    return targets


def _imports(tree: ast.Module, name: str, is_package: bool) -> list[Import]:
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.walk(node)
    }
    package = name if is_package else name.rpartition(".")[0]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [Import(target, node.lineno, id(node) in inside) for target in targets]
    return found
