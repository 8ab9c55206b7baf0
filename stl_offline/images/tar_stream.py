"""Images of tars that are read once, from first to last, on this machine or another: nothing but a sample is held.

The grammar is that of `stl_offline.images.tars`. Since nothing is read twice, the members of a sample have to lie next
to each other, as webdataset's do, and images come in the order of the tars.
"""

import posixpath
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from stl_offline.errors import InputError, JoinError
from stl_offline.images.archive import StreamedMember, faults_of, stream_members
from stl_offline.images.classes import ClassChoice, is_split_name
from stl_offline.images.common import PassedOver, SourceImage, check_text
from stl_offline.images.tars import Place, Sample, classes_of, find_place, one_image, own_class
from stl_offline.pixels import ImageError
from stl_offline.remote import is_address, open_stream, shown

# What is held of a sample: far more than any image that can be packed, and little beside a machine's memory.
_MOST_IMAGE_BYTES = 64 << 20
_MOST_SAMPLE_BYTES, _MOST_MEMBERS = 256 << 20, 1000


@dataclass(slots=True)
class _Held:
    """A member's bytes in memory; of one that is too large, none."""

    path: str
    name: str
    size: int
    data: bytes

    @classmethod
    def of(cls, member: StreamedMember) -> "_Held":
        data = member.read() if member.size <= _MOST_IMAGE_BYTES else b""
        return cls(member.path, member.name, member.size, data)

    def read(self, size: int | None = None) -> bytes:
        if len(self.data) < self.size:
            raise ImageError(f"has {self.size:,} bytes, over the {_MOST_IMAGE_BYTES:,} that an image may have")
        return self.data[:size]


@dataclass(frozen=True, slots=True)
class StreamedSample:
    """An image of a tar, and its class where it has a member that names it. image: its bytes can be read later."""

    key: str
    own_class: str | None
    image: _Held


def tar_name(place: str) -> str:
    """A tar's base name, without its folder and an address's query."""
    return posixpath.basename(shown(place))


def read_samples(place: str, passed_over: PassedOver) -> Iterator[StreamedSample]:
    """The samples with an image of a tar, in its order.

    Args:
        place: a path or an address.
        passed_over: counts the files that are no images.

    Raises:
        InputError: what `stl_offline.images.tars.TarSource` raises; or members of a sample that do not lie next to
            each other, or a sample that is too large. Each names the tar.
    """
    where = shown(place)
    seen: set[str] = set()
    key, sample = "", Sample()
    with faults_of(where), open_stream(place) if is_address(place) else open(place, "rb") as stream:
        for member in stream_members(stream, where):
            found = find_place(member, passed_over)
            if found is None:
                continue
            if found.key != key:
                yield from _whole(key, sample, passed_over)
                key, sample = found.key, Sample()
                if key in seen:
                    raise InputError(
                        f"{where}: the members of {key!r} do not lie next to each other, or it is there twice; make "
                        "the tar again with its files in the order of their names (tar --sort=name)"
                    )
                seen.add(key)
                check_text(key, f"member name of {where}")
            _add(sample, found, _Held.of(member), where)
        yield from _whole(key, sample, passed_over)


def _add(sample: Sample, place: Place, member: _Held, where: str) -> None:
    sample.add(place, member)
    held = [*sample.images.values(), *sample.guesses.values(), *sample.labels.values()]
    if len(held) > _MOST_MEMBERS or sum(len(each.data) for each in held) > _MOST_SAMPLE_BYTES:
        raise InputError(f"{where}: the sample {place.key!r} has too many members, or too large ones, for an image")


def _whole(key: str, sample: Sample, passed_over: PassedOver) -> Iterator[StreamedSample]:
    if sample.has_image:
        extension, member = one_image(key, sample)
        yield StreamedSample(key, own_class(key, sample, extension), member)
    for member in sample.labels.values() if not sample.has_image else ():
        passed_over.add(member.name)


class TarStreams:
    """A source whose classes are known only once all of its images were given: see `finish`.

    Images come in the order of the tars. The ``class_id`` of an image is 0 until then.
    """

    kind = "tar"

    def __init__(self, places: Sequence[str], choice: ClassChoice) -> None:
        self.passed_over = PassedOver()
        self._places, self._choice = list(places), choice
        first, last = shown(places[0]), shown(places[-1])
        self._where = first if len(places) == 1 else f"{first} … {last}"
        self._own: dict[str, str | None] = {}

    def __iter__(self) -> Iterator[SourceImage]:
        self._own.clear()
        for place in self._places:
            with closing(read_samples(place, self.passed_over)) as samples:
                for sample in samples:
                    if sample.key in self._own:
                        raise InputError(
                            f"the key {sample.key!r} of {shown(place)} is in an earlier tar too; every sample needs a "
                            "name of its own"
                        )
                    self._own[sample.key] = sample.own_class
                    yield SourceImage(sample.key, 0, sample.image.read, sample.image.size)
        if not self._own:
            passed = f" (passed over: {self.passed_over})" if self.passed_over else ""
            raise InputError(f"{self._where} holds no images{passed}")

    def finish(self) -> tuple[tuple[str, ...], dict[str, int]]:
        """The class list, and each key's class in it. Raises as `stl_offline.images.tars.TarSource`."""
        found = classes_of(self._own, self._choice, self._where)
        renamed = {name: self._choice.rename(name, self._where) for name in sorted(set(found))}
        names = self._choice.class_list(renamed.values(), self._where)
        numbers = {name: number for number, name in enumerate(names)}
        return names, {key: numbers[renamed[name]] for key, name in zip(self._own, found, strict=True)}


class StreamedClasses:
    """The classes of images that come one after another, by a class list that is known before.

    An image's class is the content of its ``.cls`` or ``.json`` member, else the first folder on its path that is a
    class of the list. The first image decides whether the images have classes: those of a folder that is called as
    splits are, or of none, have no classes.

    Args:
        names: the class list, of what ``whose`` names in messages.
        renamed: found name → name, for classes that are numbers.
    """

    def __init__(self, names: Sequence[str], whose: str, renamed: dict[str, str] | None = None) -> None:
        self.names, self._whose = tuple(names), whose
        self._numbers = {name: number for number, name in enumerate(names)}
        self._renamed = renamed

    def of_first(self, place: str) -> tuple[StreamedSample, bool]:
        """The first image of a tar, and whether it, and so all, has a class.

        Raises:
            InputError: the tar cannot be read, or holds no image.
            JoinError: the image's class is not in the list.
        """
        with closing(read_samples(place, PassedOver())) as samples:
            for sample in samples:
                return sample, self._find(sample, shown(place)) is not None
        raise InputError(f"{shown(place)} holds no images")

    def number(self, sample: StreamedSample, has_classes: bool) -> int:
        """A sample's class; 0 where the images have none. Raises JoinError where that is not so for this one."""
        found = self._find(sample, sample.image.path)
        if (found is not None) != has_classes:
            raise JoinError(
                f"{sample.image.path}: {sample.key!r} has {'no' if has_classes else 'a'} class, other than the first "
                "image of the first tar; give every sample a .cls member, or none"
            )
        return found or 0

    def _find(self, sample: StreamedSample, where: str) -> int | None:
        if sample.own_class is not None:
            name = self._rename(sample.own_class)
            if name not in self._numbers:
                raise self._unknown(where, sample.own_class)
            return self._numbers[name]
        folders = sample.key.split("/")[:-1]
        number = next((self._numbers[name] for name in map(self._rename, folders) if name in self._numbers), None)
        if number is None and not all(map(is_split_name, folders)):
            raise self._unknown(where, folders[-1])
        return number

    def _rename(self, name: str) -> str:
        return name if self._renamed is None else self._renamed.get(name, name)

    def _unknown(self, where: str, name: str) -> JoinError:
        return JoinError(
            f"the class {name!r} of {where} is not among the {len(self.names)} of {self._whose}; use the same classes, "
            "or name them with `class_map`"
        )
