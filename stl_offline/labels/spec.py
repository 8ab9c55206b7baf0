"""What a label set says about itself: `manifest.json`, version 1 (docs/format.md).

V: views of each picture; Gh, Gw: the token grid; k: classes kept for each cell; K: all classes.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from stl_offline.errors import FormatError, InputError
from stl_offline.files import canonical_json

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

_LABELER = ("architecture", "weights_sha256", "licence")
_PREPROCESSING = ("height", "width", "interpolation", "mean", "std", "decoder")
_SOURCE = ("samples", "fingerprint")
_VIEWS = {"whole": (), "random": ("seed", "scale", "ratio", "flip")}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHARD_NAME = re.compile(r"labels-\d{5,}-of-\d{5,}(\.[a-z]+)+")


@dataclass(frozen=True)
class LabelSpec:
    """The settings of a label set: all of the manifest but the shard table.

    class_names: (K,) names, in the order of the class ids; grid: (Gh, Gw); top_k: k; views_per_image: V; labeler:
    what made the labels (architecture, weights_sha256, licence, …); preprocessing: what it saw (height, width,
    interpolation, mean, std, decoder); source: the pictures (samples, fingerprint); views: kind "whole", or "random"
    with seed, scale, ratio and flip; creation: the settings of the command, without paths and dates.

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
        if not self.class_names or not all(isinstance(name, str) and name for name in self.class_names):
            raise InputError("class names must be a list of names, none of them empty")
        if len(set(self.class_names)) != len(self.class_names):
            raise InputError("class names must differ from each other")
        if len(self.grid) != 2 or not all(_is_count(side) for side in self.grid):
            raise InputError(f"the token grid must be two positive integers (rows, columns), got {self.grid}")
        if not _is_count(self.top_k) or self.top_k > len(self.class_names):
            raise InputError(f"top-k must lie between 1 and the {len(self.class_names)} classes, got {self.top_k}")
        if not _is_count(self.views_per_image):
            raise InputError(f"views of each picture must be a positive integer, got {self.views_per_image}")
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
        if kind == "whole" and self.views_per_image != 1:
            raise InputError(f"whole-picture labels have one view of each picture, got {self.views_per_image}")
        if not _is_count(self.source["samples"]):
            raise InputError(f"the source's sample count must be a positive integer, got {self.source['samples']!r}")

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def num_samples(self) -> int:
        """How many pictures the whole set labels."""
        return int(self.source["samples"])

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
            "bounds": dict(ENCODINGS[self.encoding]),
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


@dataclass(frozen=True)
class ShardRecord:
    """One line of the shard table: file name, first sample's position, sample count, size and SHA-256 of the file."""

    name: str
    first: int
    samples: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _SHARD_NAME.fullmatch(self.name):
            raise FormatError(f"{self.name!r} is no shard's name (labels-00012-of-00064.zarr.zip); the file is refused")
        if not _is_count(self.samples) or not _is_count(self.bytes) or not _is_count(self.first + 1):
            raise FormatError(f"the record of {self.name} has an impossible position, count or size")
        if not isinstance(self.sha256, str) or not _SHA256.fullmatch(self.sha256):
            raise FormatError(f"the record of {self.name} has no SHA-256")

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object."""
        return {
            "name": self.name,
            "first": self.first,
            "samples": self.samples,
            "bytes": self.bytes,
            "sha256": self.sha256,
        }

    @classmethod
    def from_json(cls, entries: dict[str, Any]) -> Self:
        """The inverse of `to_json`; raises FormatError."""
        try:
            return cls(**{name: entries[name] for name in ("name", "first", "samples", "bytes", "sha256")})
        except (KeyError, TypeError) as error:
            raise FormatError(f"a shard's record lacks an entry or has one of a wrong type: {error}") from error


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`: the spec and the shard table, whose shards follow each other without gaps."""

    spec: LabelSpec
    shards: tuple[ShardRecord, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shards", tuple(self.shards))
        position = 0
        for index, shard in enumerate(self.shards):
            expected = shard_name(index, len(self.shards), self.spec.container)
            if shard.name != expected:
                raise FormatError(f"shard {index} is named {shard.name}, expected {expected}")
            if shard.first != position:
                raise FormatError(f"shard {shard.name} starts at sample {shard.first}, expected {position}")
            position += shard.samples
        if position != self.spec.num_samples:
            raise FormatError(f"the shards hold {position} samples, the source has {self.spec.num_samples}")

    def to_bytes(self) -> bytes:
        """The bytes of `manifest.json`."""
        return canonical_json({**self.spec.to_json(), "shards": [shard.to_json() for shard in self.shards]})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The inverse of `to_bytes`; raises FormatError."""
        try:
            entries = json.loads(data)
        except ValueError as error:
            raise FormatError(f"the manifest is no JSON ({error}): cut off or not a label set's") from error
        spec = LabelSpec.from_json(entries)
        if not isinstance(entries.get("shards"), list):
            raise FormatError("the manifest has no shard table")
        return cls(spec, tuple(ShardRecord.from_json(shard) for shard in entries["shards"]))


def shard_name(index: int, num_shards: int, container: str) -> str:
    """The file name of one shard."""
    return f"labels-{index:05d}-of-{num_shards:05d}{CONTAINERS[container]}"


def shard_range(index: int, num_shards: int, num_samples: int) -> tuple[int, int]:
    """The half-open range of samples of one shard: sizes differ by at most one."""
    return index * num_samples // num_shards, (index + 1) * num_samples // num_shards


def differences(ours: LabelSpec, theirs: LabelSpec) -> list[str]:
    """Which settings differ, by name and value; empty where the two specs are equal."""
    found: list[str] = []
    _compare("", ours.to_json(), theirs.to_json(), found)
    return found


def _compare(name: str, ours: Any, theirs: Any, found: list[str]) -> None:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            _compare(f"{name}.{key}" if name else key, ours.get(key), theirs.get(key), found)
    elif ours != theirs:
        found.append(f"{name} is {_short(ours)} and {_short(theirs)}")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _plain_json(name: str, value: Any, needed: tuple[str, ...]) -> dict[str, Any]:
    """A copy of a settings dict as JSON gives it back, so that a spec equals its own round trip."""
    if not isinstance(value, dict):
        raise InputError(f"{name} must be a dict of settings, got {type(value).__name__}")
    missing = [key for key in needed if key not in value]
    if missing:
        raise InputError(f"{name} lacks {', '.join(missing)}")
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} cannot be written as JSON: {error}") from error
