"""Reading recipes: YAML files of training settings, those of this package (beside this module) or anybody's.

A recipe names settings of `stl_offline.config.TrainConfig` and its kin; what stands under ``labeler`` or ``student`` is
for that stage alone. Settings given beside the recipe win, the recipe wins over the defaults. A recipe serves several
arms: of its settings, those that do nothing beside the ones given are left out, such as token targets without labels.
"""

import dataclasses
import difflib
import logging
import re
import reprlib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from stl_offline.config import LabelerConfig, RunConfig, StudentConfig, TrainConfig
from stl_offline.config_transfer import DetectConfig, SegmentConfig
from stl_offline.errors import InputError
from stl_offline.needs import without_idle

FOLDER = Path(__file__).parent
SUFFIX = ".yaml"

_LOGGER = logging.getLogger(__name__)

C = TypeVar("C", bound=RunConfig)

_STAGES: dict[str, type[TrainConfig]] = {"labeler": LabelerConfig, "student": StudentConfig}
# The YAML parser takes some 30 µs per byte.
_MOST_BYTES = 1 << 15
# What the names of the package's recipes for other commands than the two stages' begin with.
_PREFIXES: dict[type[RunConfig], str] = {SegmentConfig: "segment-", DetectConfig: "detect-"}


def recipe_names(kind: type[RunConfig] = TrainConfig) -> tuple[str, ...]:
    """The package's own recipes for a command's settings; by default for the two stages."""
    names = sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}"))
    if kind in _PREFIXES:
        return tuple(name for name in names if name.startswith(_PREFIXES[kind]))
    return tuple(name for name in names if not name.startswith(tuple(_PREFIXES.values())))


def resolve(kind: type[C], recipe: str | None, given: dict[str, Any]) -> C:
    """The settings of a run: ``given``, else the recipe's, else the defaults.

    Args:
        kind: `LabelerConfig`, `StudentConfig` or `SegmentConfig`.
        recipe: a name of the package's own, a path of a YAML file, or None.
        given: settings that the user gives beside the recipe, by field. An ``lr`` alone is taken as it is, not for the
            recipe's ``lr_batch``.

    Raises:
        InputError: no such recipe, a key that is no setting, a value of another type or out of its range.
    """
    settings = read_recipe(kind, recipe) if recipe is not None else {}
    if "lr" in given and "lr_batch" not in given:
        settings.pop("lr_batch", None)
    used = without_idle(kind, settings, given)
    if idle := [name for name in settings if name not in used]:
        _LOGGER.info("the recipe %s is used without its %s, which would do nothing here", recipe, ", ".join(idle))
    return kind(**used | given)


def read_recipe(kind: type[RunConfig], recipe: str) -> dict[str, Any]:
    """A recipe's settings for one command, checked.

    Raises:
        InputError: as `resolve`.
    """
    path = _find(kind, recipe)
    with open(path, "rb") as stream:
        data = stream.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise InputError(f"the recipe {path} has more than {_MOST_BYTES:,} bytes, which no list of settings needs")
    try:
        content = yaml.load(data.decode(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"the recipe {path} is not YAML ({' '.join(str(error).split())[:400]})") from error
    except RecursionError as error:
        raise InputError(f"the recipe {path} nests lists or settings too deeply") from error
    except (ValueError, AttributeError, TypeError, OverflowError) as error:
        # What the parser raises of a tag such as !!int or !!timestamp before a word, and of thousands of digits.
        raise InputError(f"the recipe {path} holds a value that cannot be read ({str(error)[:200]})") from error
    if not isinstance(content, dict):
        raise InputError(f"the recipe {path} is no list of settings, such as 'epochs: 100'")
    if kind in _PREFIXES:
        fields = _fields(kind)
        return {name: _check(name, value, fields, str(path), kind) for name, value in content.items()}
    # Both stages' parts are checked: a mistake is found by whichever stage comes first.
    parts = {stage: content.pop(stage, None) for stage in _STAGES}
    checked = {}
    for stage, part in parts.items():
        part = {} if part is None else part
        if not isinstance(part, dict):
            raise InputError(f"the recipe {path}: {stage} holds settings of that stage, got {_shown(part)}")
        fields = _fields(_STAGES[stage])
        part = _renamed(part, _STAGES[stage], path)
        checked[stage] = {
            name: _check(name, value, fields, f"{path}, {stage}", _STAGES[stage]) for name, value in part.items()
        }
    shared = _fields(TrainConfig)
    common = {name: _check(name, value, shared, str(path), TrainConfig) for name, value in content.items()}
    return common | next(checked[stage] for stage, each in _STAGES.items() if issubclass(kind, each))


class _Loader(yaml.SafeLoader):
    """YAML whose keys come once, and whose numbers are those of YAML 1.2.

    The plain loader takes the last of two equal keys in silence. It follows YAML 1.1, where 1e-3 is a word, 1:30 is 90,
    010 is 8, 1_000 is a number, and yes, no, on and off are booleans.
    """

    yaml_implicit_resolvers: typing.ClassVar = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if names.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands there twice", key.start_mark)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Merges of merges take ten times the memory with every line of a hostile recipe.
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, "a recipe has no << merges; write the settings out", key.start_mark
                )


_EXPONENT = r"[eE][-+]?[0-9]+"
for _tag, _pattern, _starts in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", rf"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)({_EXPONENT})?|[-+]?[0-9]+{_EXPONENT}", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_starts))


def _find(kind: type[RunConfig], recipe: str) -> Path:
    names = recipe_names(kind)
    if recipe in names:
        return FOLDER / f"{recipe}{SUFFIX}"
    path = Path(recipe)
    if path.is_file():
        return path
    close = difflib.get_close_matches(recipe, names, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    there = (
        f"there are {', '.join(names)}, and files by their path" if names else "recipes here are files, by their path"
    )
    raise InputError(f"there is no recipe {recipe!r}{hint} ({there})")


def _fields(kind: type[RunConfig]) -> dict[str, Any]:
    """Settings that a recipe may name, with their types."""
    hints = typing.get_type_hints(kind)
    return {each.name: hints[each.name] for each in dataclasses.fields(kind) if each.metadata["in_recipes"]}


def _renamed(part: dict[Any, Any], kind: type[TrainConfig], path: Path) -> dict[Any, Any]:
    """A part of a recipe with the current names of settings, where it uses the earlier ones that files keep."""
    current = {each.metadata["recorded_as"]: each.name for each in dataclasses.fields(kind)}
    current.pop(None, None)
    renamed = {}
    for name, value in part.items():
        if isinstance(name, str) and name in current:
            _LOGGER.warning("the recipe %s: %r is now called %r", path, name, current[name])
            if current[name] in part:
                raise InputError(f"the recipe {path}: {name} and {current[name]} are names of one setting; give one")
            name = current[name]
        renamed[name] = value
    return renamed


def _check(name: Any, value: Any, fields: dict[str, Any], where: str, command: type[RunConfig]) -> Any:
    """The value as its field's type; raises `InputError` where that cannot be. ``fields``: those of ``command``."""
    if name not in fields:
        if name in {each.name for each in dataclasses.fields(command) if not each.metadata["in_recipes"]}:
            raise InputError(f"{where}: {name!r} is not for recipes; give `{name}` beside the recipe")
        near = [*fields, *_STAGES] if command is TrainConfig else list(fields)
        close = difflib.get_close_matches(str(name), near, 1, cutoff=0.0)
        raise InputError(f"{where}: there is no setting {_shown(name)}; the nearest is {close[0]!r}")
    hint = fields[name]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        if kind is types.NoneType and value is None:
            return None
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if kind is float and (number := _number(value)) is not None:
            return number
        if kind is str and isinstance(value, str):
            return value
        if typing.get_origin(kind) is tuple and isinstance(value, list):
            numbers = typing.get_args(kind)[0] is float
            each = [_number(part) if numbers else part for part in value]
            if all(isinstance(part, float if numbers else str) for part in each):
                return tuple(each)
    wanted = " or ".join(_WORDS.get(kind, "a list") for kind in kinds if kind is not types.NoneType)
    raise InputError(f"{where}: {name} takes {wanted}, got {_shown(value)}")


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


def _number(value: Any) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None


def _shown(value: Any) -> str:
    """A value as it is shown in a message: its beginning, since a few aliases make lists of any length."""
    short = reprlib.Repr()
    short.maxlevel = 2
    return short.repr(value)
