"""How settings are declared and checked, and the settings that several parts of the package share.

A settings class is a frozen dataclass whose fields are made by `setting`: default, help text, what the setting affects
and which values it takes stand in one place. `check_settings` compares an object with these declarations.

This module imports no other packages, so that the command line shows defaults and help texts at once.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stl_offline.errors import InputError
from stl_offline.needs import Need, check_needs

# What a setting affects.
RESULT = "result"  # it shapes the result: recorded with it, and the same when a job is resumed
INPUT = "input"  # it names an input, whose content is compared by fingerprint instead of its place
JOB = "job"  # where, how fast and how observably a job runs: neither recorded nor compared

TOKEN_TARGETS = ("gumbel", "soft", "argmax")
RESIDUALS = ("ignore", "uniform", "class", "ghost")
# Ids in token targets that are no class.
EVEN, OUTSIDE = -1, -2
TOKEN_HEADS = ("own", "shared")
MIX_MODES = ("batch", "pair", "elem")
ERASE_MODES = ("const", "rand", "pixel")
AMP_MODES = ("auto", "none", "bf16", "fp16")

SEEDS = f"[0, {1 << 63})"
CLASS_MAP = (
    "File of new names of the classes found in the images, as for tars whose .cls members are numbers: lines 'NUMBER "
    "NAME', or a JSON list or object."
)
SKIP_BROKEN = "Leave out images that cannot be decoded, and list them, instead of stopping."
LOADERS = ("ffcv", "stream")
LOADER = (
    "How images are read: packed once into a .beton, which FFCV reads (ffcv), or where they lie, in tars or a folder "
    "(stream). stream is slower and needs no second copy of the images; results are the same."
)
MISSING = ("error", "skip")
MATCHES = ("key", "stem", "content")


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    affects: str = RESULT,
    in_recipes: bool = True,
    recorded_as: str | None = None,
    choices: tuple[str, ...] | None = None,
    bounds: str | None = None,
    needs: Need | tuple[Need, ...] = (),
    recorded_by_default: bool = True,
) -> Any:
    """A dataclass field with what is known about it as metadata.

    Args:
        help: one or two phrases for a user; the command line shows them. Other settings stand in backticks.
        affects: `RESULT`, `INPUT` or `JOB`.
        in_recipes: whether a recipe may name it; False for what belongs to one place, such as an output folder.
        recorded_as: its name in files, where that differs from the field's; recipes may use it, too.
        choices: the strings it takes.
        bounds: the interval of its values, such as "[0, 1)" or "(0, inf)"; None takes any finite number. A None value
            passes.
        needs: the conditions under which another value than the default does something.
        recorded_by_default: whether its default is recorded. False for a setting that came later and whose default does
            what was done before: what earlier releases began can go on, and what they made has the same bytes.
    """
    metadata = {"help": help, "affects": affects, "in_recipes": in_recipes, "recorded_as": recorded_as}
    metadata |= {"choices": choices, "bounds": bounds, "needs": (needs,) if isinstance(needs, Need) else needs}
    metadata |= {"recorded_by_default": recorded_by_default}
    return dataclasses.field(default=default, metadata=metadata)


# Integers of any length come from recipes; above this no float holds them.
_TOO_LARGE = 1 << 1000


def check_settings(settings: Any) -> None:
    """Compare each field that `setting` made with its choices and bounds.

    Raises:
        InputError: a value outside of them; the message names the field in backticks.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        choices, bounds = field.metadata.get("choices"), field.metadata.get("bounds")
        if choices is not None and value not in choices:
            raise InputError(f"`{field.name}` must be one of {', '.join(choices)}; got {value!r}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not abs(value) < _TOO_LARGE:  # NaN, too
            raise InputError(f"`{field.name}` must be a finite number, got {str(value)[:40]}")
        if bounds is not None and not is_within(value, bounds):
            raise InputError(f"`{field.name}` must be {_in_words(bounds)}, got {value}")


def recorded(settings: Any, *affects: str) -> dict[str, Any]:
    """The values of the fields that affect any of ``affects``, by the names that files use."""
    return {
        field.metadata.get("recorded_as") or field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if field.metadata.get("affects") in affects
        and (field.metadata["recorded_by_default"] or getattr(settings, field.name) != field.default)
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two dicts of settings, as ``name: old → new`` lines; of a dict in both, its entries."""
    found: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += [f"{name}.{each}" for each in differences(before, after)]
        elif before != after:
            found.append(f"{name}: {_change(before, after)}")
    return found


def _change(old: Any, new: Any) -> str:
    """Two values, in a line's part: of long lists how they differ, of other long values their beginnings."""
    if isinstance(old, list) and isinstance(new, list) and max(len(old), len(new)) > 4:
        if len(old) != len(new):
            return f"{len(old):,} → {len(new):,} of them"
        old, new = next(pair for pair in zip(old, new, strict=True) if pair[0] != pair[1])
    return " → ".join(text if len(text) <= 100 else f"{text[:99]}…" for text in (repr(old), repr(new)))


def is_within(value: float, bounds: str) -> bool:
    """Whether a number lies in an interval such as "[0, 1)"; NaN lies in none."""
    low, high = (float(end) for end in bounds[1:-1].split(","))
    return (low < value or (bounds[0] == "[" and low == value)) and (
        value < high or (bounds[-1] == "]" and value == high)
    )


def _in_words(bounds: str) -> str:
    low, high = bounds[1:-1].split(", ")
    if high != "inf":
        return f"in {bounds}"
    return f"at least {low}" if bounds[0] == "[" else f"greater than {low}"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a command. Raises `InputError` for a value that the command does not take, or has no use for."""

    def __post_init__(self) -> None:
        check_settings(self)
        self.check_together()
        check_needs(self)

    def check_together(self) -> None:
        """Compare the settings with each other. A subclass calls its parent's method first."""


@dataclass(frozen=True, kw_only=True)
class MachineConfig(Config):
    """Where a command runs. Results do not depend on it, beyond rounding."""

    device: str = setting(
        "auto",
        "Device that models run on: auto (a GPU if torch finds one, else the CPU), cpu, cuda, or cuda:N.",
        affects=JOB,
        in_recipes=False,
    )
    workers: int = setting(
        0,
        "Threads per process that load, read or send (0 chooses a number).",
        affects=JOB,
        in_recipes=False,
        bounds="[0, inf)",
    )


@dataclass(frozen=True)
class CropSettings:
    """How random views are drawn.

    scale: range of the crop's part of the image's area; ratio: range of width/height; flip: probability of a
    left-to-right flip.

    Raises:
        InputError: a value out of its range.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise InputError(f"the scale of crops must be an ascending pair within (0, 1], got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise InputError(
                f"the aspect ratio of crops must be an ascending pair of positive numbers, got {self.ratio}"
            )
        if not 0 <= self.flip <= 1:
            raise InputError(f"the probability of a flip must be in [0, 1], got {self.flip}")


@dataclass(frozen=True)
class MixSettings:
    """How images of a batch are mixed.

    mixup, cutmix: alphas of their Beta distributions (0 disables them); prob: probability that anything is mixed;
    switch: probability of cutmix where both are enabled; mode: what is drawn once: a "batch", a "pair", or an image
    ("elem").

    Raises:
        InputError: a value out of its range.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0
    switch: float = 0.5
    mode: str = "batch"

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"the alpha of {name} must be at least 0 and finite, got {getattr(self, name)}")
        for name in ("prob", "switch"):
            if not 0 <= getattr(self, name) <= 1:
                what = "mixing" if name == "prob" else "cutmix instead of mixup"
                raise InputError(f"the probability of {what} must be in [0, 1], got {getattr(self, name)}")
        if self.mode not in MIX_MODES:
            raise InputError(f"the mode of mixing must be one of {', '.join(MIX_MODES)}; got {self.mode!r}")

    @property
    def enabled(self) -> bool:
        return self.prob > 0 and (self.mixup > 0 or self.cutmix > 0)


@dataclass(frozen=True)
class EraseSettings:
    """How a box of an image is erased.

    prob: probability of a box; mode: what fills it, "const" (the mean colour), "rand" (one normal colour) or "pixel"
    (normal noise per pixel); area: range of its part of the image's area; ratio: range of its aspect ratio.

    Raises:
        InputError: a value out of its range.
    """

    prob: float
    mode: str = "pixel"
    area: tuple[float, float] = (0.02, 1 / 3)
    ratio: tuple[float, float] = (0.3, 1 / 0.3)

    def __post_init__(self) -> None:
        if not 0 <= self.prob <= 1:
            raise InputError(f"the probability of erasing must be in [0, 1], got {self.prob}")
        if self.mode not in ERASE_MODES:
            raise InputError(f"the mode of erasing must be one of {', '.join(ERASE_MODES)}; got {self.mode!r}")
        if not (0 < self.area[0] <= self.area[1] <= 1 and 0 < self.ratio[0] <= self.ratio[1]):
            raise InputError(f"area and aspect ratio of erased boxes must be ascending pairs, got {self}")


def check_token_targets(kind: str, residual: str, m: int, sampling_ratio: int, min_confidence: float) -> None:
    """Check what `stl_offline.targets.TokenTargets` is made of, but for the grid, which depends on the model.

    Raises:
        InputError: a value out of its range.
    """
    if kind not in TOKEN_TARGETS:
        raise InputError(f"the kind of token targets must be one of {', '.join(TOKEN_TARGETS)}; got {kind!r}")
    if residual not in RESIDUALS:
        raise InputError(f"`residual` must be one of {', '.join(RESIDUALS)}; got {residual!r}")
    if m < 1:
        raise InputError(f"a soft target needs at least 1 class, got {m}")
    if sampling_ratio < 1:
        raise InputError(f"`sampling_ratio` must be at least 1, got {sampling_ratio}")
    if not 0 <= min_confidence <= 1:
        raise InputError(f"`min_confidence` must be in [0, 1], got {min_confidence}")


def check_three(name: str, values: Sequence[float] | None) -> None:
    """Raise InputError where a mean or standard deviation of red, green and blue cannot be one."""
    if values is None:
        return
    if len(values) != 3 or not all(map(math.isfinite, values)):
        raise InputError(f"`{name}` must be three finite numbers, got {values}")
    if name.endswith("std") and min(values) <= 0:
        raise InputError(f"`{name}` must be three numbers above 0, got {values}")


def check_match(match: str, *, allow_changed: bool = False, key_prefix: str = "") -> None:
    """Raise `InputError` for another value than `MATCHES`, and for settings that would do nothing."""
    if match not in MATCHES:
        raise InputError(f"`match` must be one of {', '.join(MATCHES)}; got {match!r}")
    if match == "content" and allow_changed:
        raise InputError('`allow_changed` does nothing where images are found by their content; use `match="stem"`')
    if match != "key" and key_prefix:
        raise InputError(f'`key_prefix` changes keys, and `match="{match}"` does not compare them; give one of the two')


def check_repeats(repeats: int, epochs: int, step: int, mix: MixSettings) -> None:
    """Whether ``step`` images of a process's step can be ``repeats`` crops of each, in some of ``epochs``.

    Raises:
        InputError: they cannot.
    """
    if repeats > epochs:
        raise InputError(f"`repeats` must be at most `epochs`, {epochs}; got {repeats}")
    if step % repeats:
        raise InputError(f"`repeats` must divide `batch_size` × `accumulate`, {step}; got {repeats}")
    if step == repeats > 1 and (mix.mixup > 0 or mix.cutmix > 0):
        raise InputError(
            "`mixup` and `cutmix` mix different images: `batch_size` × `accumulate` must be more than `repeats`; "
            f"got {step} and {repeats}"
        )
