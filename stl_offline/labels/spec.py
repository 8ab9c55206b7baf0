"""The settings of a label set as `manifest.json`, version 1 (docs/format.md).

V: views of each image; Gh, Gw: the token grid; k: classes kept for each cell; K: all classes.
"""

import json
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np

from stl_offline.errors import FormatError, InputError

FORMAT = "stl-offline label set"
FORMAT_VERSION = 1
VALUE_KINDS = ("logits",)
# What an encoding may change, as the manifest states it: 2^-11 is float16's rounding; of a probability's two bounds
# the wider one holds.
ENCODINGS: dict[str, dict[str, float]] = {
    "f16": {"logit_relative": 2.0**-11, "confidence_relative": 2.0**-11},
    "q8": {"probability_relative": 0.02, "probability_absolute": 1e-4, "confidence_relative": 0.005},
}
# A container's file name suffix.
CONTAINERS = {"zarr": ".zarr.zip", "webdataset": ".tar"}

# Of nested settings: more than any command writes, and far from where Python stops.
_MOST_LEVELS = 16

_LABELER = ("architecture", "weights_sha256", "licence")
_PREPROCESSING = ("height", "width", "interpolation", "mean", "std", "decoder")
_SOURCE = ("samples", "fingerprint")
# Entry of the source, only where it is false: of images without classes.
OWN_CLASSES = "own_classes"
_VIEWS = {"whole": (), "random": ("seed", "scale", "ratio", "flip")}


@dataclass(frozen=True)
class LabelSpec:
    """The settings of a label set: all of the manifest but the shard table.

    class_names: (K,) names, in the order of the class ids; grid: (Gh, Gw); top_k: k; views_per_image: V; labeler:
    what made the labels (architecture, weights_sha256, licence, …); preprocessing: what it saw (height, width,
    interpolation, mean, std, decoder); source: the images (samples, fingerprint); views: kind "whole", or "random"
    with seed, scale, ratio and flip; creation: the settings of the command, without paths and dates; bounds: what
    the encodings that the labels went through may have changed (None: this encoding alone).

    Raises:
        InputError: a setting that no label set of this version can have.
    """

    class_names: tuple[str, ...]
    grid: tuple[int, int]
    top_k: int
    views_per_image: int
    labeler: dict[str, Any]
    preprocessing: dict[str, Any]
    source: dict[str, Any]
    views: dict[str, Any]
    creation: dict[str, Any] = field(default_factory=dict)
    encoding: str = "f16"
    container: str = "zarr"
    value_kind: str = "logits"
    format_version: int = FORMAT_VERSION
    bounds: dict[str, float] | None = None

    def __post_init__(self) -> None:
        # Kinds first: what the rest means depends on them.
        for what, value, known in (
            ("format version", self.format_version, (FORMAT_VERSION,)),
            ("value kind", self.value_kind, VALUE_KINDS),
            ("encoding", self.encoding, tuple(ENCODINGS)),
            ("container", self.container, tuple(CONTAINERS)),
        ):
            if value not in known:
                raise InputError(f"unknown {what} {value!r}; known here: {', '.join(map(str, known))}")
        object.__setattr__(self, "class_names", tuple(self.class_names))
        object.__setattr__(self, "grid", tuple(self.grid))
        if not self.class_names or not all(map(_is_text, self.class_names)):
            raise InputError("class names must be a list of names in Unicode, none of them empty")
        if len(set(self.class_names)) != len(self.class_names):
            raise InputError("class names must differ from each other")
        if len(self.grid) != 2 or not all(is_count(side) for side in self.grid):
            raise InputError(f"the token grid must be two positive integers (rows, columns), got {self.grid}")
        if not is_count(self.top_k) or self.top_k > len(self.class_names):
            raise InputError(f"top-k must lie between 1 and the {len(self.class_names)} classes, got {self.top_k}")
        if not is_count(self.views_per_image):
            raise InputError(f"views of each image must be a positive integer, got {self.views_per_image}")
        for name, needed in (
            ("labeler", _LABELER),
            ("preprocessing", _PREPROCESSING),
            ("source", _SOURCE),
            ("views", ("kind",)),
            ("creation", ()),
        ):
            object.__setattr__(self, name, _plain_json(name, getattr(self, name), needed))
        kind = self.views["kind"]
        if kind not in _VIEWS:
            raise InputError(f"unknown kind of views {kind!r}; known here: {', '.join(_VIEWS)}")
        _plain_json("views", self.views, _VIEWS[kind])
        if kind == "random":
            _check_random_views(self.views)
        if kind == "whole" and self.views_per_image != 1:
            raise InputError(f"whole-image labels have one view of each image, got {self.views_per_image}")
        object.__setattr__(
            self, "bounds", _check_bounds(ENCODINGS[self.encoding] if self.bounds is None else self.bounds)
        )
        if not is_count(self.source["samples"]):
            raise InputError(f"the source's sample count must be a positive integer, got {self.source['samples']!r}")
        if not isinstance(self.source.get(OWN_CLASSES, True), bool):
            raise InputError(
                f"the source's {OWN_CLASSES} must be true or false, got {_short(self.source[OWN_CLASSES])}"
            )

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def num_samples(self) -> int:
        """How many images the whole set labels."""
        return int(self.source["samples"])

    @property
    def has_own_classes(self) -> bool:
        """Whether the images have classes; without them, every stored class_id is 0 and means nothing."""
        return self.source.get(OWN_CLASSES, True)

    @property
    def id_dtype(self) -> np.dtype:
        """The dtype of stored class ids: uint16, or uint32 over 65,535 classes."""
        return np.dtype("<u2") if self.num_classes <= 65_535 else np.dtype("<u4")

    @property
    def map_shape(self) -> tuple[int, int, int, int]:
        """(V, Gh, Gw, k)."""
        return (self.views_per_image, *self.grid, self.top_k)

    def to_json(self) -> dict[str, Any]:
        """The manifest's entries, without the shard table."""
        return {
            "format": FORMAT,
            "format_version": self.format_version,
            "value_kind": self.value_kind,
            "encoding": self.encoding,
            "bounds": self.bounds,
            "container": self.container,
            "classes": self.num_classes,
            "class_names": list(self.class_names),
            "class_id_dtype": self.id_dtype.name,
            "grid": list(self.grid),
            "top_k": self.top_k,
            "views_per_image": self.views_per_image,
            "views": self.views,
            "labeler": self.labeler,
            "preprocessing": self.preprocessing,
            "source": self.source,
            "creation": self.creation,
        }

    @classmethod
    def from_json(cls, entries: dict[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            FormatError: not a label set, a version, kind, encoding or container that is unknown here (checked before
                anything else), or entries that are missing or contradict each other.
        """
        if not isinstance(entries, dict) or entries.get("format") != FORMAT:
            raise FormatError(f'this is not a label set: its manifest has no entry "format": "{FORMAT}"')
        version = entries.get("format_version")
        if version != FORMAT_VERSION:
            raise FormatError(
                f"label set format version {version!r} is unknown here (this program reads {FORMAT_VERSION}); "
                "update stl-offline"
            )
        try:
            spec = cls(
                format_version=version,
                value_kind=entries["value_kind"],
                encoding=entries["encoding"],
                container=entries["container"],
                class_names=tuple(entries["class_names"]),
                grid=tuple(entries["grid"]),
                top_k=entries["top_k"],
                views_per_image=entries["views_per_image"],
                views=entries["views"],
                labeler=entries["labeler"],
                preprocessing=entries["preprocessing"],
                source=entries["source"],
                creation=entries["creation"],
                bounds=entries["bounds"],
            )
            for name, derived in (("classes", spec.num_classes), ("class_id_dtype", spec.id_dtype.name)):
                if entries[name] != derived:
                    raise FormatError(f"the manifest says {name} {entries[name]!r}, its class list makes {derived!r}")
        except KeyError as error:
            raise FormatError(f"the manifest lacks the entry {error}") from error
        except TypeError as error:
            raise FormatError(f"the manifest has an entry of a wrong type: {error}") from error
        except InputError as error:
            raise FormatError(f"the manifest cannot be used: {error}") from error
        return spec


class Difference(NamedTuple):
    """A setting in which two specs differ: its dotted name in the manifest and both values."""

    name: str
    ours: Any
    theirs: Any

    @property
    def entry(self) -> str:
        """The manifest's entry that holds the setting: ``labeler`` of ``labeler.licence``."""
        return self.name.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.name} is {_short(self.ours)} and {_short(self.theirs)}"


def differences(ours: LabelSpec, theirs: LabelSpec) -> list[Difference]:
    """The settings in which two specs differ; empty where they are equal."""
    found: list[Difference] = []
    _compare("", ours.to_json(), theirs.to_json(), found)
    return found


def _compare(name: str, ours: Any, theirs: Any, found: list[Difference]) -> None:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            _compare(f"{name}.{key}" if name else key, ours.get(key), theirs.get(key), found)
    elif ours != theirs:
        found.append(Difference(name, ours, theirs))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _check_bounds(bounds: Any) -> dict[str, float]:
    known = {name for encoding in ENCODINGS.values() for name in encoding}
    if not isinstance(bounds, dict) or not bounds or not bounds.keys() <= known:
        raise InputError(f"the bounds must be some of {', '.join(sorted(known))}, got {_short(bounds)}")
    for name, value in bounds.items():
        if not isinstance(value, float) or not (math.isfinite(value) and 0 < value < 1):
            raise InputError(f"the bound {name} must lie between 0 and 1, got {value!r}")
    return dict(bounds)


def _check_random_views(views: dict[str, Any]) -> None:
    for name in ("scale", "ratio"):
        values = views[name]
        if not isinstance(values, list) or len(values) != 2 or not all(map(_is_number, values)):
            raise InputError(f"the {name} of random views must be two numbers, got {_short(values)}")
    if not _is_number(views["flip"]):
        raise InputError(f"the flip of random views must be a number, got {_short(views['flip'])}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1 << 53


def is_count(value: Any) -> bool:
    """Whether a JSON value is a positive integer that every JSON reader represents exactly (below 2^53)."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 53


def _is_deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return levels < 0 or any(_is_deeper(each, levels - 1) for each in inner)


def _is_text(name: Any) -> bool:
    try:
        return isinstance(name, str) and bool(name.encode())
    except UnicodeEncodeError:
        return False


def _plain_json(name: str, value: Any, needed: tuple[str, ...]) -> dict[str, Any]:
    """A copy of a settings dict as JSON gives it back, so that a spec equals its own round trip."""
    if not isinstance(value, dict):
        raise InputError(f"{name} must be a dict of settings, got {type(value).__name__}")
    missing = [key for key in needed if key not in value]
    if missing:
        raise InputError(f"{name} lacks {', '.join(missing)}")
    try:
        if _is_deeper(value, _MOST_LEVELS):
            raise ValueError(f"more than {_MOST_LEVELS} levels")
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        # Half of a surrogate pair (from a file name that is not UTF-8) is no text, and could not be written.
        text.encode()
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} cannot be written as JSON: {error}") from error
