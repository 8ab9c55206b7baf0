"""The settings of a label set as `manifest.json`, versions 1 and 2 (docs/format.md).

V: views of each image; Gh, Gw: the token grid; k, S: classes kept and drawn for each cell; K: all classes.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import numpy as np

from stl_offline.errors import FormatError, InputError

FORMAT = "stl-offline label set"
FORMAT_VERSIONS = (1, 2)
# What version 2 adds to the manifest, and what version 1 means by leaving it out.
ADDED = {
    "draws": 0,
    "draw_seed": None,
    "has_confidence": True,
    "class_top_k": 0,
    "class_draws": 0,
    "has_augmentation": False,
}
VALUE_KINDS = ("logits",)
# What an encoding may change, as the manifest states it: 2^-11 is float16's rounding; of a probability's two bounds
# the wider one holds.
ENCODINGS: dict[str, dict[str, float]] = {
    "f16": {"logit_relative": 2.0**-11, "confidence_relative": 2.0**-11},
    "q8": {"probability_relative": 0.02, "probability_absolute": 1e-4, "confidence_relative": 0.005},
}
# What a webdataset member is called after its sample's name, by format version.
MEMBER_SUFFIX = {1: "labels.npy.gz", 2: "labels.npz"}
# A container's file name suffix.
CONTAINERS = {"zarr": ".zarr.zip", "webdataset": ".tar"}

# Of nested settings: more than any command writes, and far from where Python stops.
_MOST_LEVELS = 16
# Of each group of settings as JSON: a thousand times what a command writes.
_MOST_SETTINGS_BYTES = 1 << 20
# Of a class name, as of a file's.
_MOST_NAME_BYTES = 4096

# Draws of a token: far more than any use, and few enough for every array of them.
_MOST_DRAWS = 4096

_LABELER = ("architecture", "weights_sha256", "licence")
_PREPROCESSING = ("height", "width", "interpolation", "mean", "std", "decoder")
_SOURCE = ("samples", "fingerprint")
# Entry of the source, only where it is false: of images without classes.
OWN_CLASSES = "own_classes"
# Entry of random views, only where shards hold some of the views: how many each part of the set holds.
PARTS = "parts"
_TEXTS = (("labeler", "architecture"), ("labeler", "weights_sha256"), ("labeler", "licence"), ("source", "fingerprint"))
_VIEWS = {"whole": (), "random": ("seed", "scale", "ratio", "flip")}


@dataclass(frozen=True)
class LabelSpec:
    """The settings of a label set: all of the manifest but the shard table.

    class_names: (K,) names, in the order of the class ids; grid: (Gh, Gw); top_k: k, 0 for draws alone;
    views_per_image: V; labeler: what made the labels (architecture, weights_sha256, licence, …); preprocessing: what it
    saw (height, width, interpolation, mean, std, decoder); source: the images (samples, fingerprint); views: kind
    "whole", or "random" with seed, scale, ratio and flip, ``first``, the number of the first view where that is not 0,
    and ``parts``, how many views each part of the set holds where there are several; creation: the settings of the
    command, without paths and dates; format_version: None takes the lowest version that can hold the labels; bounds:
    what the encodings that the labels went through may have changed (None: this encoding alone).

    Of version 2: draws: S; draw_seed: the seed of the generator that drew them (None: another generator);
    has_confidence: whether the best class's probability is stored, as always where k > 0; class_top_k, class_draws: how
    many classes of the labeler's class head are stored for each view, its most probable ones and drawn ones;
    has_augmentation: whether each view has a record of how its pixels were augmented.

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
    format_version: int | None = None
    bounds: dict[str, float] | None = None
    draws: int = 0
    draw_seed: int | None = None
    has_confidence: bool = True
    class_top_k: int = 0
    class_draws: int = 0
    has_augmentation: bool = False

    def __post_init__(self) -> None:
        # Kinds first: what the rest means depends on them.
        for what, value, known in (
            ("format version", self.format_version, (None, *FORMAT_VERSIONS)),
            ("value kind", self.value_kind, VALUE_KINDS),
            ("encoding", self.encoding, tuple(ENCODINGS)),
            ("container", self.container, tuple(CONTAINERS)),
        ):
            if value not in known:
                raise InputError(f"unknown {what} {value!r}; known here: {', '.join(map(str, known))}")
        object.__setattr__(self, "class_names", tuple(self.class_names))
        object.__setattr__(self, "grid", tuple(self.grid))
        if not self.class_names or not all(map(_is_text, self.class_names)):
            raise InputError(
                f"class names must be a list of names in Unicode, each of 1 to {_MOST_NAME_BYTES:,} bytes in UTF-8"
            )
        if len(set(self.class_names)) != len(self.class_names):
            raise InputError("class names must differ from each other")
        if len(self.grid) != 2 or not all(is_count(side) for side in self.grid):
            raise InputError(f"the token grid must be two positive integers (rows, columns), got {self.grid}")
        self._check_counts()
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
        self._check_version()
        if kind == "random":
            _check_random_views(self.views)
        if kind == "whole" and self.views_per_image != 1:
            raise InputError(f"whole-image labels have one view of each image, got {self.views_per_image}")
        object.__setattr__(
            self, "bounds", _check_bounds(ENCODINGS[self.encoding] if self.bounds is None else self.bounds)
        )
        for name, entry in _TEXTS:
            if not isinstance(getattr(self, name)[entry], str):
                raise InputError(f"{name}.{entry} must be text, got {_short(getattr(self, name)[entry])}")
        if not is_count(self.source["samples"]):
            raise InputError(f"the source's sample count must be a positive integer, got {self.source['samples']!r}")
        if not isinstance(self.source.get(OWN_CLASSES, True), bool):
            raise InputError(
                f"the source's {OWN_CLASSES} must be true or false, got {_short(self.source[OWN_CLASSES])}"
            )

    def _check_counts(self) -> None:
        classes = len(self.class_names)
        if (
            not is_count(self.top_k + 1 if self.draws and type(self.top_k) is int else self.top_k)
            or self.top_k > classes
        ):
            raise InputError(f"top-k must lie between 1 and the {classes} classes (0 beside draws), got {self.top_k}")
        for name, most in (("draws", _MOST_DRAWS), ("class_top_k", classes), ("class_draws", _MOST_DRAWS)):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= most:
                raise InputError(f"{name} must lie between 0 and {most:,}, got {value!r}")
        if self.draws and self.top_k == classes:
            raise InputError(f"the top {self.top_k} are all classes: nothing is left to draw from")
        if self.class_draws and self.class_top_k == classes:
            raise InputError(
                f"the top {self.class_top_k} of the class head are all classes: nothing is left to draw from"
            )
        if self.draw_seed is not None and (type(self.draw_seed) is not int or not 0 <= self.draw_seed < 1 << 63):
            raise InputError(f"draw_seed must be a whole number from 0 on, got {self.draw_seed!r}")
        for name in ("has_confidence", "has_augmentation"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.top_k and not self.has_confidence:
            raise InputError("top-k labels have a confidence: their probabilities are computed from it")

    def _check_version(self) -> None:
        """Set the lowest version that can hold the labels, or refuse a lower one."""
        added = [name for name, value in ADDED.items() if getattr(self, name) != value]
        if "first" in self.views:
            added.append("views.first")
            if not is_count(self.views["first"]) or self.views["kind"] != "random":
                raise InputError(
                    f"the first view must be a positive number of random views, got {self.views['first']!r}"
                )
        if PARTS in self.views:
            added.append(f"views.{PARTS}")
            parts = self.views[PARTS]
            is_list = self.views["kind"] == "random" and isinstance(parts, list) and all(map(is_count, parts))
            if not (is_list and len(parts) > 1 and sum(parts) == self.views_per_image):
                raise InputError(
                    f"the parts of random views must be several positive numbers that sum to {self.views_per_image}, "
                    f"got {_short(parts)}"
                )
        if self.format_version == 1 and added:
            raise InputError(f"format version 1 has no {', '.join(added)}; version 2 has")
        if self.format_version is None:
            object.__setattr__(self, "format_version", 2 if added else 1)

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

    @property
    def classes_per_image(self) -> int:
        """Class ids that an image's cells name, V · Gh · Gw · (k + S): more than it can name different ones."""
        return math.prod(self.map_shape[:-1]) * (self.top_k + self.draws)

    @property
    def first_view(self) -> int:
        """The number of the first view among those of its random family."""
        return self.views.get("first", 0)

    @property
    def parts(self) -> tuple[range, ...]:
        """Which of the set's views (0 … V) lie together in shards: one range, unless sets of several were merged."""
        ends = itertools.accumulate(self.views.get(PARTS, [self.views_per_image]), initial=0)
        return tuple(range(*each) for each in itertools.pairwise(ends))

    def of_views(self, views: range) -> "LabelSpec":
        """The spec of some consecutive views, named by their places among the set's: range within 0 … V."""
        if views == range(self.views_per_image) and len(self.parts) == 1:
            return self
        family = {name: value for name, value in self.views.items() if name not in ("first", PARTS)}
        first = self.first_view + views.start
        version = None if self.format_version == 1 else self.format_version
        kind = family | ({"first": first} if first else {})
        return replace(self, views_per_image=len(views), views=kind, format_version=version)

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
            **({name: getattr(self, name) for name in ADDED} if self.format_version == 2 else {}),
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
        if type(version) is not int or version not in FORMAT_VERSIONS:
            raise FormatError(
                f"label set format version {version!r} is unknown here (this program reads "
                f"{' and '.join(map(str, FORMAT_VERSIONS))}); "
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
                **({name: entries[name] for name in ADDED} if version == 2 else {}),
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


def of_cell(spec: LabelSpec) -> str:
    """What is stored of each token, in words: "top 5", "4 draws", or "top 5 and 4 draws"."""
    parts = [(spec.top_k, f"top {spec.top_k}"), (spec.draws, f"{spec.draws} {'draw' if spec.draws == 1 else 'draws'}")]
    return " and ".join(text for number, text in parts if number)


def check_use(specs: Sequence[LabelSpec], residual: str, min_confidence: float) -> None:
    """Raise InputError where label sets cannot be used with these settings of `stl_offline.targets.TokenTargets`."""
    if min_confidence > 0 and not all(spec.has_confidence for spec in specs):
        raise InputError(
            "`min_confidence` needs labels with a confidence, and these are draws without one; dump them with "
            "`confidence=True`"
        )
    if residual != "ignore" and all(spec.draws for spec in specs):
        raise InputError("`residual` does nothing for labels with draws: these leave no probability over")


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


def q8_bounds(bounds: dict[str, float]) -> dict[str, float]:
    """The bounds of labels with these ``bounds`` after their conversion to q8. What came from q8 lies on its steps, and
    goes back to them unchanged."""
    q8 = ENCODINGS["q8"]
    if q8.keys() <= bounds.keys():
        return dict(bounds)
    return bounds | {name: bounds.get(name, 0.0) + value for name, value in q8.items()}


def widest_bounds(specs: Sequence[LabelSpec]) -> dict[str, float]:
    """The bounds that hold for the labels of all of these specs together: of each name the largest.

    Where some came from q8, all count as if they had: a later conversion to q8 takes the bounds of the whole for those
    of labels that lie on q8's steps.
    """
    each = [spec.bounds for spec in specs]
    if any(ENCODINGS["q8"].keys() <= bounds.keys() for bounds in each):
        each = [q8_bounds(bounds) for bounds in each]
    names = sorted({name for bounds in each for name in bounds})
    return {name: max(bounds.get(name, 0.0) for bounds in each) for name in names}


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
        return isinstance(name, str) and 0 < len(name.encode()) <= _MOST_NAME_BYTES
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
        if len(text.encode()) > _MOST_SETTINGS_BYTES:
            raise ValueError(f"more than {_MOST_SETTINGS_BYTES:,} bytes")
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} cannot be written as JSON: {error}") from error
