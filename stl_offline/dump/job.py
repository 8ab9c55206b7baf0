"""The dump job: each process is a worker that claims one shard after another until none is left.

Workers do not know of each other. They may run on any number of machines, start late and be killed: what they share is
the place where the label set lies. Each shard is encoded and written while the next one is labelled.
"""

import concurrent.futures
import contextlib
import logging
import os
import shutil
import time
from dataclasses import dataclass, replace
from typing import Any

import filelock

from stl_offline.config import DumpConfig
from stl_offline.device import pick_device
from stl_offline.dump.append import prepare_append
from stl_offline.dump.labelling import Labelling, load_labeler
from stl_offline.dump.tars import TarLabelling, prepare
from stl_offline.errors import InputError, TargetError
from stl_offline.files import cache_dir, sha256_bytes
from stl_offline.labels.append import remove_leftovers
from stl_offline.labels.hub import is_hub
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.store import JOB, MANIFEST, open_storage, read_manifest
from stl_offline.labels.tar_writer import TarLabelWriter
from stl_offline.labels.transfer import check_free, push
from stl_offline.labels.writer import LabelSetWriter, check_place
from stl_offline.progress import progress_bar

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class DumpReport:
    """Result of a worker: ``labelled`` images by this process, of ``samples`` in the set, which is complete now.

    ``is_first``: whether this is the process that reports, of those that torchrun started on one machine;
    ``was_complete``: whether there was nothing to do.
    """

    path: str
    samples: int
    labelled: int
    seconds: float
    bytes: int
    is_first: bool = True
    was_complete: bool = False


def dump_labels(config: DumpConfig, *, finish: bool = False, append: bool = False, labeler: Any = None) -> DumpReport:
    """Work on a label set until all its shards are written, alone or beside other processes that do the same.

    Args:
        labeler: this one in place of what the settings name.
        append: add the images that a complete set lacks, as further shards.
        finish: label nothing; write the manifest of a set whose shards are all there.

    Raises:
        StlError: bad input, a place that holds something else or a label set with other settings, or a shard that is
            there with other bytes; with ``finish``, shards that are missing.
    """
    device = pick_device(config.device)
    # What can be refused without the images is refused before they are packed, which may take hours.
    labeler = load_labeler(config) if labeler is None else labeler
    if is_hub(config.out):
        if append:
            raise InputError(f"append to a copy of {config.out} on this machine, and push it: only what is new is sent")
        return _dump_to_hub(config, labeler, finish)
    check_place(config.out)
    if finish and not append:
        _check_begun(config.out, append)
    started = time.perf_counter()
    is_first = os.environ.get("RANK", "0") == "0"
    if append:
        labelling = prepare_append(config, labeler, device)
        if not len(labelling.rows):
            _LOGGER.info("every image of %s is labelled", labelling.place)
            label_set = open_label_set(config.out)
            remove_leftovers(label_set)
            manifest = label_set.manifest
            size = sum(shard.bytes for shard in manifest.shards)
            return DumpReport(str(config.out), manifest.spec.num_samples, 0, 0.0, size, is_first, was_complete=True)
        if finish:
            _check_begun(config.out, append)
    else:
        labelling = prepare(config, labeler, device)
        started = time.perf_counter()
    with labelling.open_writer() as writer:
        was_complete = writer.complete
        if finish and (missing := writer.missing()):
            raise TargetError(
                f"{len(missing):,} of {writer.num_shards:,} shards of {writer.place} are not written yet, the first is "
                f"{missing[0]}; `finish` writes no shards: leave it out to go on"
            )
        labelled = 0 if finish else _write_shards(labelling, writer, is_first)
        manifest = writer.finish()
    seconds = time.perf_counter() - started
    size = sum(shard.bytes for shard in manifest.shards)
    return DumpReport(str(config.out), manifest.spec.num_samples, labelled, seconds, size, is_first, was_complete)


def _check_begun(out: str, append: bool) -> None:
    """Raise TargetError where there is nothing to finish."""
    storage = open_storage(out)
    if storage.size(JOB) is None and (append or storage.size(MANIFEST) is None):
        raise TargetError(f"no job has begun in {out}, so there is nothing to finish; leave out `finish` to begin one")


def _dump_to_hub(config: DumpConfig, labeler: Any, finish: bool) -> DumpReport:
    """A dump into a folder of this machine, its spool, which is pushed at the end and removed."""
    spool = cache_dir() / "spool" / sha256_bytes(config.out.encode())[:16]
    removed = spool.with_suffix(".removed")
    shutil.rmtree(removed, ignore_errors=True)
    target = open_storage(config.out)
    # Looked for in this order: whoever pushes removes the spool after the manifest is there.
    begun = spool.exists()
    if not begun and target.size(MANIFEST) is not None:
        manifest = read_manifest(target)
        device = pick_device(config.device)
        writer = prepare(config, labeler, device).open_writer()
        writer.check_manifest(manifest)
        if isinstance(writer, TarLabelWriter):
            writer.check_first()
        size = sum(shard.bytes for shard in manifest.shards)
        is_first = os.environ.get("RANK", "0") == "0"
        return DumpReport(config.out, manifest.spec.num_samples, 0, 0.0, size, is_first, was_complete=True)
    if not begun:
        check_free(config.out)
    report = dump_labels(replace(config, out=str(spool)), finish=finish, labeler=labeler)
    # One of the processes of this machine pushes; the others wait until it has.
    with filelock.FileLock(spool.with_suffix(".lock")):
        if spool.exists():
            push(open_label_set(spool), config.out)
            # Its name goes first: half of a spool would be taken for a folder of something else.
            spool.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)
    return replace(report, path=config.out, was_complete=False)  # it was pushed now


def _write_shards(labelling: Labelling | TarLabelling, writer: LabelSetWriter, is_first: bool) -> int:
    """Label, encode and write shards until all are done; gives the number of images that this process labelled."""
    views = len(labelling.views)
    shards = writer.unrecorded()
    left = labelling.images_of(writer, shards)
    total = None if left is None else left * views
    labelled = 0
    with (
        progress_bar(total, "labelling", "map" if views > 1 else "image", enabled=is_first) as bar,
        concurrent.futures.ThreadPoolExecutor(1) as background,
    ):
        size = _Size(writer.place, len(shards), bar) if left is None else _Size(writer.place, left, bar, per_image=True)
        written: concurrent.futures.Future[Any] | None = None
        with contextlib.closing(labelling.label_shards(writer, writer.claim_ahead(), bar.update)) as shards_with_labels:
            for found in shards_with_labels:
                # Never more than one waits to be written.
                if written is not None:
                    size.add(written.result())
                    written = None
                if found is not None:
                    labelled += len(found[1])
                    written = background.submit(writer.write_shard, *found)
                # Not kept beyond its writing.
                found = None
            if written is not None:
                size.add(written.result())
    return labelled


class _Size:
    """Bytes written so far, and the expected total, from the share of all images (or shards) that is done."""

    def __init__(self, place: str, total: int, bar: Any, *, per_image: bool = False) -> None:
        self._place, self._total, self._bar, self._per_image = place, total, bar, per_image
        self._done = self._bytes = 0

    def add(self, record: Any) -> None:
        first = not self._done
        self._done += record.samples if self._per_image else 1
        self._bytes += record.bytes
        expected = self._bytes * max(self._total, self._done) // self._done
        self._bar.set_postfix_str(f"{self._bytes / 1e6:,.1f} of {expected / 1e6:,.1f} MB", refresh=False)
        free = open_storage(self._place).free_bytes()
        if first and free is not None and free < expected - self._bytes:
            _LOGGER.warning(
                "the shards still to be written need %.2f GB, but %s has %.2f GB free",
                (expected - self._bytes) / 1e9,
                self._place,
                free / 1e9,
            )
