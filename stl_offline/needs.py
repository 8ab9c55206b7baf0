"""What some settings need in order to do something: other settings.

A setting that does something only beside another one names that as a `Need`, where it is declared. `check_needs`
refuses a value that would do nothing, so that no setting is ignored in silence. A setting at its default is no such
value. Nor is one of a recipe, which serves several commands and modes: `without_idle` leaves it out.

The conditions stand at the end of this module; each takes the settings, or anything with their names as attributes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from stl_offline.errors import InputError


@dataclass(frozen=True)
class Need:
    """What a setting needs in order to do something.

    what: the other settings, as a message names them, in backticks; is_met: given the settings, whether they hold.
    """

    what: str
    is_met: Callable[[Any], bool]


def unmet_needs(kind: type, values: Any) -> dict[str, str]:
    """The settings that would do nothing, each with what it needs.

    Args:
        kind: the settings class.
        values: an object with a value for every field of it. A field at its default is never among the result.
    """
    found = {}
    for field in dataclasses.fields(kind):
        if getattr(values, field.name) != field.default:
            unmet = (need.what for need in field.metadata.get("needs", ()) if not need.is_met(values))
            if (what := next(unmet, None)) is not None:
                found[field.name] = what
    return found


def check_needs(settings: Any) -> None:
    """Raise `InputError` for settings that would do nothing; the message names them and what they need."""
    names_by_need: dict[str, list[str]] = {}
    for name, what in unmet_needs(type(settings), settings).items():
        names_by_need.setdefault(what, []).append(f"`{name}`")
    parts = []
    for what, names in names_by_need.items():
        parts.append(f"{_listed(names)} {'needs' if len(names) == 1 else 'need'} {what}")
    if parts:
        count = sum(map(len, names_by_need.values()))
        end = "it does nothing; leave it out" if count == 1 else "they do nothing; leave them out"
        raise InputError(f"{_listed(parts)}, else {end}")


def _listed(parts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def without_idle(kind: type, chosen: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``chosen``, such as a recipe's settings, without those that would do nothing beside the settings ``given``."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    idle = unmet_needs(kind, SimpleNamespace(**defaults | chosen | given))
    return {name: value for name, value in chosen.items() if name in given or name not in idle}


def _label_sets(config: Any) -> int:
    """How many label sets a student has."""
    sets = (config.labels,) if isinstance(config.labels, str) else config.labels
    return sum(each not in ("none", "online") for each in sets)


def _is_online(config: Any) -> bool:
    return config.labels in ("online", ("online",))


VALIDATION = Need("`val`", lambda config: config.val is not None)
MIXING = Need("`mixup` or `cutmix` above 0", lambda config: config.mixup > 0 or config.cutmix > 0)
ERASING = Need("`random_erase` above 0", lambda config: config.random_erase > 0)
TOKEN_LOSS = Need("`token_weight` above 0", lambda config: config.token_weight > 0)
TOKEN_LABELS = Need(
    "token labels (a label set, or online, as `labels`)", lambda config: _is_online(config) or _label_sets(config) > 0
)
TARGETS = (TOKEN_LABELS, TOKEN_LOSS)  # what the settings of token targets need
LABEL_SET = Need("a label set in `labels`", lambda config: _label_sets(config) > 0)
SEVERAL_SETS = Need("several label sets in `labels`", lambda config: _label_sets(config) > 1)
ONLINE = Need('`labels="online"`', _is_online)
SOFT_TARGET = Need('`token_target="soft"`', lambda config: config.token_target == "soft")
LEFT_MASS = Need(  # a running labeler leaves nothing outside of its classes
    "`token_target` soft, or gumbel with a label set in `labels`",
    lambda config: config.token_target == "soft" or (config.token_target == "gumbel" and _label_sets(config) > 0),
)
SAMPLED_MAPS = Need(
    'a label set in `labels`, or `labels="online"` with `auto_augment`',
    lambda config: _label_sets(config) > 0 or config.auto_augment is not None,
)
CROPS = Need("`crops_per_image` of at least 1", lambda config: config.crops_per_image > 0)
ANY_DRAW = Need(
    "`crops_per_image`, `draws` or `class_draws` of at least 1",
    lambda config: max(config.crops_per_image, config.draws, config.class_draws) > 0,
)
UNFROZEN = Need("layers below the heads that are trained, without `freeze`", lambda config: not config.freeze)
CORRUPTIONS = Need("`corrupt`", lambda config: config.corrupt is not None)
PAGE = Need("`page`", lambda config: config.page is not None)
ANNOTATIONS = Need("a COCO JSON file as `annotations`", lambda config: config.annotations is not None)
IMAGES = Need("`data`", lambda config: config.data is not None)
RANDOM_CHOICE = Need(
    "a random choice: no `suspects`, and no `keys` or one that is a pattern",
    lambda config: not config.suspects and (not config.keys or any(set("*?[") & set(key) for key in config.keys)),
)
