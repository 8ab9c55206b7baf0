"""Transfers of label sets from a folder to an object store and back, whole or in part.

Each file is compared with the manifest after its transfer, and files that are already present are not sent again. The
manifest is written last, so an interrupted transfer leaves no label set, and the same command continues it.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock

from stl_offline.errors import FormatError, InputError, TargetError
from stl_offline.files import make_folder, remove_leftovers, sha256_bytes
from stl_offline.labels.card import make_card
from stl_offline.labels.hub import HubFolder, is_hub, push_to_hub
from stl_offline.labels.label_set import LabelSet, check_same_images
from stl_offline.labels.manifest import Manifest, ShardRecord
from stl_offline.labels.spec import differences
from stl_offline.labels.store import (
    CARD,
    JOB,
    MANIFEST,
    PARTIAL,
    PULL,
    SOME_SHARDS,
    FolderStorage,
    Storage,
    each_shard,
    format_ranges,
    open_storage,
    parse_ranges,
    present_bytes,
    read_manifest,
    read_present,
)

_TRIES = 3
_LARGEST_CARD = 1 << 20


@dataclass(frozen=True)
class Transfer:
    """Result of a transfer: ``sent`` shards of ``sent_bytes`` bytes were copied, ``kept`` were already present, and
    ``present`` are there now."""

    sent: int
    sent_bytes: int
    kept: int
    present: tuple[int, ...]
    shards: int


def push(label_set: LabelSet, place: str | Path, *, workers: int = 0, **options: object) -> Transfer:
    """Copy a whole label set to a URL that fsspec knows (``options`` go to it), or to a folder.

    If the set has grown since it was pushed, only its new shards are sent. On the Hugging Face hub this makes at most
    five commits.

    Raises:
        InputError: the set was pulled in part.
        FormatError: a shard is damaged here; the others are sent, the manifest is not.
        TargetError: another label set or something else lies there, or the store cannot be written.
    """
    if label_set.is_partial:
        raise InputError(f"only some shards of {label_set.place} are here; push a whole label set")
    target = open_storage(place, **options)
    if isinstance(target, FolderStorage):
        make_folder(target.local)
    is_there = _look(target, label_set.manifest, may_grow=True)
    if is_hub(target.place):
        sent = push_to_hub(label_set, HubFolder(target), _card(label_set), has_manifest=is_there)
        return _transfer(sent, label_set, label_set.present)

    def send(index: int) -> int | FormatError:
        return _copy_shard(label_set, index, target, lambda name, data: _write(target, name, data))

    sent = _collect(each_shard(send, range(len(label_set.shards)), f"→ {target.place}", workers=workers, transfer=True))
    if not is_there:
        _write(target, CARD, _card(label_set))
        _write(target, MANIFEST, label_set.manifest.to_bytes())
    if target.size(SOME_SHARDS) is not None:  # of a folder that was pulled in part, and is whole now
        target.remove_file(SOME_SHARDS)
    return _transfer(sent, label_set, label_set.present)


def check_free(place: str) -> None:
    """Raise TargetError where things lie that no `push` would put there. Hidden files and a card may lie there."""
    target = open_storage(place)
    _refuse_foreign(target, lambda name: name in (CARD, MANIFEST) or name.startswith("labels-"))


def pull(
    label_set: LabelSet,
    folder: str | Path,
    *,
    shards: str | None = None,
    views: str | None = None,
    workers: int = 0,
) -> Transfer:
    """Copy a label set into a folder of this machine; with ``shards`` (``0-3,7``) or ``views`` (``0-9``) only these.

    Views are numbered as in their random family. A part of the set that holds one of them is copied whole.

    A folder that holds some of the set's shards keeps them; those that are damaged are fetched again.

    Raises:
        InputError: shards or views that the set does not have, or both given; shards of several views that are of
            different images; a set whose shards hold all views.
        FormatError: a shard is damaged at the source; the others are pulled.
        TargetError: the folder holds another label set or something else, or cannot be written.
    """
    if "://" in str(folder):
        raise InputError(
            f"labels are pulled into a folder of this machine, not to {folder}; to send them there: "
            "stl-offline labels push"
        )
    manifest = label_set.manifest
    wanted = _wanted(label_set, shards, views)
    target = FolderStorage(Path(folder))
    # Before anything is made there: a folder that holds something else stays as it is.
    present = read_present(target, len(manifest.shards)) if _look(target, manifest) else ()
    check_same_images(label_set.place, manifest, wanted.union(present))
    make_folder(target.path(PARTIAL))
    with _alone(target.path(f"{PARTIAL}/pull.lock"), target.place):
        is_there = _look(target, manifest)
        here = set(read_present(target, len(manifest.shards))) if is_there else set()
        remove_leftovers(target.local)
        if not is_there:
            target.write(PULL, present_bytes(wanted))

        def fetch(index: int) -> int | FormatError:
            return _copy_shard(label_set, index, target, target.write)

        todo = sorted(wanted | here)
        sent = _collect(each_shard(fetch, todo, f"{label_set.place} → {folder}", workers=workers, transfer=True))
        if len(todo) == len(manifest.shards):
            target.remove(SOME_SHARDS)
        else:
            target.write(SOME_SHARDS, present_bytes(todo))
        if not is_there:
            target.write(CARD, _card(label_set))
            target.write(MANIFEST, manifest.to_bytes())
        target.remove(PARTIAL)
    return _transfer(sent, label_set, tuple(todo))


def _wanted(label_set: LabelSet, shards: str | None, views: str | None) -> set[int]:
    """The numbers of the shards to copy."""
    if shards is not None and views is not None:
        raise InputError("`shards` and `views` exclude each other")
    if shards is not None:
        wanted = set(parse_ranges(shards, range(len(label_set.shards))))
        if wanted.difference(label_set.present):
            raise InputError(f"of {label_set.place} only the shards {format_ranges(label_set.present)} are here")
        return wanted
    if views is None:
        return set(label_set.present)
    spec = label_set.spec
    known = range(spec.first_view, spec.first_view + spec.views_per_image)
    asked = set(parse_ranges(views, known, "views"))
    if len(label_set.parts) == 1 and asked != set(known):
        raise InputError(
            f"every shard of {label_set.place} holds all of its views ({known[0]}-{known[-1]}), so that some of them "
            "cannot be copied alone; divide it where it lies, with `convert(views_per_part=1)`"
        )
    own = (range(part.spec.first_view, part.spec.first_view + part.spec.views_per_image) for part in label_set.parts)
    mine = zip(label_set.parts, own, strict=True)
    return {index for part, numbers in mine if asked.intersection(numbers) for index in part.present}


def _look(target: Storage, manifest: Manifest, *, may_grow: bool = False) -> bool:
    """Whether this very label set lies there (True) or parts of it or nothing (False); raises TargetError otherwise.

    may_grow: a set whose shards are the first ones of this set, which has grown since, is a part of it. Nothing but its
    images may differ: class names and a licence, for instance, are in no shard.
    """
    if target.size(JOB) is not None:
        raise TargetError(f"{target.place} holds a label set that a job has not finished; choose another place")
    with contextlib.suppress(FileNotFoundError):
        theirs = read_manifest(target)
        if theirs == manifest:
            return True
        others = differences(manifest.spec, theirs.spec)
        first = manifest.shards[: len(theirs.shards)]
        if may_grow and theirs.shards == first and len(first) < len(manifest.shards):
            others = [each for each in others if each.entry != "source"]
            if not others:
                return False
        found = [str(each) for each in others] or ["the shards' checksums differ"]
        raise TargetError(
            f"{target.place} holds another label set (yours and its): {'; '.join(found)}; choose another place"
        )
    own = {shard.name for shard in manifest.shards} | {CARD, SOME_SHARDS}
    _refuse_foreign(target, own.__contains__)
    return False


def _refuse_foreign(target: Storage, is_own: Callable[[str], bool]) -> None:
    # A data set on a hub brings files of its own, all of them hidden.
    foreign = [name for name in target.names() if not is_own(name) and not name.startswith(".")]
    if foreign:
        raise TargetError(
            f"{target.place} is not empty and holds something else ({foreign[0]} lies there); choose another place"
        )


def _is_whole(storage: Storage, shard: ShardRecord) -> bool:
    """Whether a shard is present with the right checksum."""
    if storage.size(shard.name) != shard.bytes:
        return False
    try:
        return sha256_bytes(storage.read(shard.name, shard.bytes)) == shard.sha256
    except FileNotFoundError:
        return False


def _copy_shard(
    label_set: LabelSet, index: int, target: Storage, write: Callable[[str, bytes], None]
) -> int | FormatError:
    """Bytes that were copied, 0 where the shard lies there as it should; or what is wrong with it at its source."""
    shard = label_set.shards[index]
    if _is_whole(target, shard):
        return 0
    try:
        data = label_set.read_bytes(index, keep=False)
    except FormatError as error:
        return error
    write(shard.name, data)
    return len(data)


def _write(target: Storage, name: str, data: bytes) -> None:
    """Store a file and read it back, since the store may hold other bytes than were sent."""
    for _ in range(_TRIES):
        target.write(name, data)
        with contextlib.suppress(FileNotFoundError):
            if target.read(name, len(data)) == data:
                return
    raise TargetError(f"{target.place}/{name} does not read back as it was written ({_TRIES} tries)")


def _card(label_set: LabelSet) -> bytes:
    """The set's card, which its publisher may have edited, or a new one."""
    with contextlib.suppress(FileNotFoundError):
        if (label_set.storage.size(CARD) or 0) <= _LARGEST_CARD:
            return label_set.storage.read(CARD)
    return make_card(label_set.manifest)


def _collect(results: Iterable[int | FormatError]) -> list[int]:
    """Bytes sent of each shard; raises the first damage once all others are through."""
    done = list(results)
    damaged = [error for error in done if isinstance(error, FormatError)]
    if damaged:
        more = f"; {len(damaged) - 1} more shards are damaged" if len(damaged) > 1 else ""
        raise FormatError(f"{damaged[0]}{more}")
    return done


def _transfer(sent: Sequence[int], label_set: LabelSet, present: tuple[int, ...]) -> Transfer:
    moved = [size for size in sent if size]
    return Transfer(len(moved), sum(moved), len(sent) - len(moved), present, len(label_set.shards))


@contextlib.contextmanager
def _alone(path: Path, place: str) -> Iterator[None]:
    lock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        raise TargetError(f"another pull is writing into {place}; wait for it or stop it") from error
    try:
        yield
    finally:
        lock.release()
