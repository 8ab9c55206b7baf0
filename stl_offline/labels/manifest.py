"""The shard table of a label set, and `manifest.json` as a whole (docs/format.md)."""

import itertools
import json
import re
from dataclasses import dataclass
from typing import Any, Self

from stl_offline.errors import NO_TEXT, FormatError
from stl_offline.files import canonical_json
from stl_offline.labels.spec import CONTAINERS, LabelSpec, is_count

_SHA256 = re.compile(r"[0-9a-f]{64}")
# 300,000 shards' records and a million class names; and a record's size without line breaks.
_MOST_VALUES = 1 << 22
_MOST_NESTED = 1000
_LEAST_RECORD_BYTES = 100
_MOST_TAR_NAME = 255
SHARD_NAME = re.compile(r"labels-[0-9]{5,9}-of-[0-9]{5,9}(\.[a-z]+)+")


@dataclass(frozen=True)
class ShardRecord:
    """One line of the shard table: file name, first sample's position, sample count, size and SHA-256 of the file.

    images: base name of the tar that holds the shard's images, where one shard was made of each tar.
    """

    name: str
    first: int
    samples: int
    bytes: int
    sha256: str
    images: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not SHARD_NAME.fullmatch(self.name):
            raise FormatError(f"{self.name!r} is no shard's name (labels-00012-of-00064.zarr.zip); the file is refused")
        if not is_count(self.samples) or not is_count(self.bytes) or not is_count(self.first + 1):
            raise FormatError(f"the record of {self.name} has an impossible position, count or size")
        if not isinstance(self.sha256, str) or not _SHA256.fullmatch(self.sha256):
            raise FormatError(f"the record of {self.name} has no SHA-256")
        if self.images is not None and (
            not isinstance(self.images, str)
            or not 0 < len(self.images) <= _MOST_TAR_NAME
            or "/" in self.images
            or NO_TEXT.search(self.images)
        ):
            raise FormatError(f"the record of {self.name} names no tar of its images")

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object."""
        return {
            "name": self.name,
            "first": self.first,
            "samples": self.samples,
            "bytes": self.bytes,
            "sha256": self.sha256,
        } | ({} if self.images is None else {"images": self.images})

    @classmethod
    def from_json(cls, entries: dict[str, Any]) -> Self:
        """The inverse of `to_json`; raises FormatError."""
        try:
            known = {name: entries[name] for name in ("name", "first", "samples", "bytes", "sha256")}
            return cls(**known, images=entries.get("images"))
        except (KeyError, TypeError) as error:
            raise FormatError(f"a shard's record lacks an entry or has one of a wrong type: {error}") from error


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`: the spec and the shard table. Shards follow each other without gaps, once for each part."""

    spec: LabelSpec
    shards: tuple[ShardRecord, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shards", tuple(self.shards))
        position = self.spec.num_samples
        parts, of = 0, 1
        for index, shard in enumerate(self.shards):
            before, of = of, int(shard.name.split("-")[3].partition(".")[0])
            # Shards that were added later count all that there were then.
            least, most = max(index + 1, before), len(self.shards)
            if index == most - 1:
                least = most
            if shard.name != shard_name(index, of, self.spec.container) or not least <= of <= most:
                expected = shard_name(index, most, self.spec.container)
                raise FormatError(f"shard {index} is named {shard.name}, expected {expected}")
            if position == self.spec.num_samples and parts < len(self.spec.parts):
                position, parts = 0, parts + 1
            if shard.first != position:
                raise FormatError(f"shard {shard.name} starts at sample {shard.first}, expected {position}")
            position += shard.samples
        if position != self.spec.num_samples or parts < len(self.spec.parts):
            raise FormatError(
                f"the shards hold {position if parts else 0} samples, the source has {self.spec.num_samples}"
                + (f" in each of {len(self.spec.parts)} parts" if len(self.spec.parts) > 1 else "")
            )

    def part_of_shards(self) -> list[int]:
        """The part that each shard belongs to, by its number among `LabelSpec.parts`."""
        return [number - 1 for number in itertools.accumulate(shard.first == 0 for shard in self.shards)]

    def to_bytes(self) -> bytes:
        """The bytes of `manifest.json`: version 1 is indented, version 2 has no space that JSON does not need."""
        content = {**self.spec.to_json(), "shards": [shard.to_json() for shard in self.shards]}
        return canonical_json(content, compact=self.spec.format_version > 1)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The inverse of `to_bytes`; raises FormatError."""
        entries = parse_object(data)
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


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object that a label set's file holds.

    The separators are counted before anything is built: a small file can name millions of objects, each of which
    takes far more memory than its text.

    Raises:
        FormatError: no JSON, nothing but an object's, or too many values for any label set.
    """
    values = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    nested = data.count(b"{") + data.count(b"[")
    if values > _MOST_VALUES or nested > _MOST_NESTED + len(data) // _LEAST_RECORD_BYTES:
        raise FormatError(f"it holds {values:,} values in {len(data):,} bytes, which no label set needs")
    try:
        # As text: of bytes, json would also take UTF-16 and halves of surrogate pairs.
        entries = json.loads(data.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"it is no JSON ({error}): cut off, or not a label set's") from error
    if not isinstance(entries, dict):
        raise FormatError("it is not a label set's: no JSON object")
    return entries


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON number")
