"""Images in tars: webdataset's samples, or a class-per-folder tree that was put into a tar.

Names follow webdataset's grammar. A member's key is its path up to the first dot of its base name; the rest, in lower
case, is its extension. ``__NAME__`` at the top is no part of a sample. So ``a/x0.jpg``, ``a/x0.CLS`` and
``a/x0.mask.png`` are the members ``jpg``, ``cls`` and ``mask.png`` of the sample ``a/x0``.

The image of a sample is the member whose whole extension is an image format's (``jpg``), else its only member that ends
in one (``v2.jpg``). The image ``v2.jpg`` has its class in ``v2.cls``, else in ``cls``, else in the ``class_name`` or
``label`` of ``v2.json`` or ``json``. Where no sample has a class of its own, folders are classes
(`stl_offline.images.classes`). Two images, or a ``.cls`` that belongs to another name, are errors.
"""

import json
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from stl_offline.errors import InputError
from stl_offline.images.archive import Member, StreamedMember, tar_members
from stl_offline.images.classes import ClassChoice, folder_classes
from stl_offline.images.common import PassedOver, SourceImage, check_keys, check_text, is_image_name, may_hold_image
from stl_offline.images.encode import IMAGE_HEAD, is_image_head

_LABEL_KINDS = ("cls", "json")
_MAX_LABEL_BYTES = 1 << 20
# As in webdataset: names of its own, which are no samples.
_META = re.compile(r"__[^/]*__($|/)")


class AnyMember(Protocol):
    """A member whose bytes can be read at any time. path: the tar; name: in it; size: bytes."""

    @property
    def path(self) -> Path | str: ...

    name: str
    size: int

    def read(self, size: int | None = None) -> bytes:
        """Its bytes, or the first ``size``; raises `ImageError`."""
        ...


class Place(NamedTuple):
    """What a file of a tar is: ``kind`` is a field of `Sample`."""

    key: str
    kind: str
    extension: str


@dataclass(slots=True)
class Sample:
    """One sample, members by extension. images: by name; guesses: by their first bytes; labels: cls and json."""

    images: dict[str, AnyMember] = field(default_factory=dict)
    guesses: dict[str, AnyMember] = field(default_factory=dict)
    labels: dict[str, AnyMember] = field(default_factory=dict)

    @property
    def has_image(self) -> bool:
        """Whether it is more than labels."""
        return bool(self.images or self.guesses)

    def add(self, place: Place, member: AnyMember) -> None:
        """Add a member; raises `InputError` where there is one of this name."""
        members = getattr(self, place.kind)
        if place.extension in members:
            first = members[place.extension].name
            names = f"{member.name} twice" if first == member.name else f"{first} and {member.name}"
            raise InputError(
                f"{member.path} holds {names}, which are one name in webdataset; make the tar again with each member "
                "once"
            )
        members[place.extension] = member


class TarSource:
    """One or more tars. Keys are member paths without their extensions, in sorted order over all tars."""

    kind = "tar"

    def __init__(self, paths: Sequence[Path], choice: ClassChoice) -> None:
        self.passed_over = PassedOver()
        samples: dict[str, Sample] = {}
        for path in paths:
            mine = _with_images(_read_samples(path, self.passed_over), self.passed_over)
            double = samples.keys() & mine.keys()
            if double:
                raise InputError(
                    f"{len(double):,} keys of {path} are in an earlier tar too, for example {min(double)!r}; "
                    "every sample needs a name of its own"
                )
            samples |= mine
        where = str(paths[0]) if len(paths) == 1 else f"{paths[0]} … {paths[-1]}"
        if not samples:
            passed = f" (passed over: {self.passed_over})" if self.passed_over else ""
            raise InputError(f"{where} holds no images{passed}")
        check_keys(samples, "member name")
        self._keys = sorted(samples)
        chosen = {key: one_image(key, samples[key]) for key in self._keys}
        self._members = [member for _, member in chosen.values()]
        found = classes_of({key: own_class(key, samples[key], chosen[key][0]) for key in self._keys}, choice, where)
        renamed = {name: choice.rename(name, where) for name in sorted(set(found))}
        self.class_names = choice.class_list(renamed.values(), where)
        class_ids = {name: number for number, name in enumerate(self.class_names)}
        self._class_ids = [class_ids[renamed[name]] for name in found]

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[SourceImage]:
        for key, class_id, member in zip(self._keys, self._class_ids, self._members, strict=True):
            yield SourceImage(key, class_id, partial(member.read))


def _read_samples(path: Path, passed_over: PassedOver) -> dict[str, Sample]:
    samples: dict[str, Sample] = {}
    for member in tar_members(path):
        place = find_place(member, passed_over)
        if place is not None:
            samples.setdefault(place.key, Sample()).add(place, member)
    return samples


def _with_images(samples: dict[str, Sample], passed_over: PassedOver) -> dict[str, Sample]:
    """The samples that hold an image; the labels of others are counted as passed over."""
    for sample in samples.values():
        if not sample.has_image:
            for member in sample.labels.values():
                passed_over.add(member.name)
    return {key: sample for key, sample in samples.items() if sample.has_image}


def find_place(member: Member | StreamedMember, passed_over: PassedOver) -> Place | None:
    """Which member of which sample a file of a tar is; None, and counted, where it is none."""
    folder, base = posixpath.split(member.name)
    stem, dot, extension = base.partition(".")
    extension = extension.lower()
    if _META.match(member.name):
        return None
    if dot and is_image_name(base):
        kind = "images"
    elif dot and extension.rpartition(".")[2] in _LABEL_KINDS:
        kind = "labels"
    elif may_hold_image(base) and is_image_head(member.read(IMAGE_HEAD)):
        kind = "guesses"
    else:
        passed_over.add(member.name)
        return None
    return Place(posixpath.join(folder, stem), kind, extension)


def one_image(key: str, sample: Sample) -> tuple[str, AnyMember]:
    """The extension and the member of a sample's image."""
    images = sample.images or sample.guesses
    # "a.jpg" is the image of "a"; "a.mask.png" is something else about it, unless "a" has no other image.
    plain = {extension: member for extension, member in images.items() if "." not in extension} or images
    if len(plain) > 1:
        names = ", ".join(member.name for member in list(plain.values())[:3])
        raise InputError(
            f"the sample {key!r} has {len(plain)} images ({names}): webdataset takes names that differ only after "
            "their first dot as one sample; keep one of these images, or rename the members (x.left.jpg → x_left.jpg)"
        )
    return next(iter(plain.items()))


def own_class(key: str, sample: Sample, extension: str) -> str | None:
    """The class of a sample's own cls or json member, by the image's extension; None where it has none."""
    prefix = extension.rpartition(".")[0]
    for kind in _LABEL_KINDS:
        for name in (f"{prefix}.{kind}", kind):
            if name in sample.labels and (label := _read_class(sample.labels[name], kind)) is not None:
                return label
    strays = [member.name for name, member in sample.labels.items() if name.endswith(".cls")]
    if strays:
        raise InputError(
            f"{strays[0]} is no class of the image {key}.{extension}: their names differ after the first dot; name it "
            f"{posixpath.basename(key)}.{prefix + '.' if prefix else ''}cls"
        )
    return None


def _read_class(member: AnyMember, kind: str) -> str | None:
    where = f"{member.path}: {member.name}"
    if member.size > _MAX_LABEL_BYTES:
        raise InputError(f"{where} has {member.size:,} bytes, too many for a class")
    try:
        text = member.read().decode("utf-8-sig")
        value = json.loads(text) if kind == "json" else text.strip()
        if kind == "json":
            value = value if isinstance(value, dict) else {}
            value = value.get("class_name", value.get("label"))
        name = str(value)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} cannot be read as a class: {error}") from error
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str) or not name or re.fullmatch(r"-\d+", name):
        raise InputError(f"{where} has the class {value!r}; a class is a name or a whole number from 0")
    return check_text(name, "class name")


def classes_of(own: dict[str, str | None], choice: ClassChoice, where: str) -> list[str]:
    """The class of every key, by its own members or by folders."""
    without = sorted(key for key, name in own.items() if name is None)
    if not without:
        return [str(name) for name in own.values()]
    if len(without) < len(own):
        raise InputError(
            f"{where}: {len(without):,} of {len(own):,} samples have no class, for example {without[0]!r}; "
            "give each a .cls member"
        )
    return folder_classes(list(own), choice, where)
