"""Images that stay where they are: everything that a .beton holds of them but their bytes.

n: images.
"""

import io
import json
import logging
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from stl_offline.errors import FormatError, InputError, counted
from stl_offline.files import atomic_write, cache_dir, canonical_json, images_fingerprint, make_folder
from stl_offline.images.beton import INDEX_VERSION, Beton
from stl_offline.images.common import Source, SourceImage
from stl_offline.images.encode import encode_image, key_hash
from stl_offline.images.pack import broken_image, encode_all, locked, tell_of_source
from stl_offline.images.sources import listed, open_source, source_state
from stl_offline.pixels import ImageError
from stl_offline.progress import progress_bar

_log = logging.getLogger(__name__)

# The columns of an index, (n,) each. rows: which of the source's images these are.
_COLUMNS = {
    "rows": np.int64,
    "content_hashes": np.uint64,
    "stored_hashes": np.uint64,
    "heights": np.int64,
    "widths": np.int64,
    "sizes": np.int64,
    "raw": np.bool_,
}


@dataclass(frozen=True, eq=False)
class UnpackedImages(Beton):
    """Images of a source that are read from it whenever they are needed, as packing would have stored them.

    Everything but ``path`` (of the index) and ``pointers`` (zeros) equals that of the packed images, so that runs on
    either are the same run. images: n, whose bytes are read when asked for.
    """

    images: tuple[SourceImage, ...]

    def stored_bytes(self, index: int) -> bytes:
        """What packing would store of an image.

        Raises:
            FormatError: the image cannot be read any more, or is no longer what it was.
        """
        try:
            data = self.images[index].data
            if self.stored_hashes[index] != self.content_hashes[index]:
                data = encode_image(data).data
        except ImageError as error:
            raise self.damaged(index, str(error)) from error
        if len(data) != self.sizes[index]:
            raise self.damaged(index, "it has another size")
        return data

    def damaged(self, index: int, reason: str) -> FormatError:
        return FormatError(
            f"{self.place}: the image {self.keys[index]!r} is not as it was when it was indexed: {reason}; images must "
            "not change while they are read"
        )


def open_unpacked(spec: str | Path, *, skip_broken: bool = False) -> UnpackedImages:
    """Open images without packing them. The first time each image is read and checked, for an index in the cache.

    The index's name comes from the images' state (`stl_offline.images.sources.source_state`), so changed images are
    indexed again. Of several processes that want the same images, one indexes and the others wait.

    Args:
        spec: what `open_source` takes.
        skip_broken: leave out (and log) images that cannot be decoded, instead of stopping.

    Raises:
        InputError: the source cannot be used, or an image is broken (the error names the first).
        TargetError: the index cannot be written.
    """
    source = open_source(spec)
    settings = [INDEX_VERSION, source_state(spec), skip_broken]
    path = cache_dir() / "indexes" / f"{xxhash.xxh3_128_hexdigest(canonical_json(settings))}.npz"
    make_folder(path.parent)
    every = listed(source)  # refused before images are read
    with locked(path.with_suffix(".lock")):
        index = _read(path, len(source))
        if index is None:
            tell_of_source(source, spec)
            index = _make(source, spec, skip_broken)
            stream = io.BytesIO()
            np.savez(stream, **index)
            atomic_write(path, stream.getvalue())
            _log.info("indexed %s where they are", counted(len(index["rows"]), "image"))
    images = tuple(every[row] for row in index.pop("rows").tolist())
    keys = [image.key for image in images]
    if len(set(keys)) != len(keys):
        raise InputError(f"{spec} gives a key twice; every image needs its own")
    class_ids = np.array([image.class_id for image in images], dtype=np.int64)
    return UnpackedImages(
        path=path,
        keys=keys,
        class_names=source.class_names,
        class_ids=class_ids,
        key_hashes=np.array(list(map(key_hash, keys)), dtype=np.uint64),
        pointers=np.zeros(len(keys), dtype=np.int64),
        source={"kind": source.kind, "max_size": None},
        fingerprint=images_fingerprint(
            source.class_names, json.dumps(keys).encode(), class_ids.tobytes(), index["content_hashes"].tobytes()
        ),
        place=str(spec),
        images=images,
        **index,
    )


def _make(source: Source, spec: str | Path, skip_broken: bool) -> dict[str, np.ndarray]:
    found: list[tuple] = []
    with progress_bar(len(source), "indexing") as bar:
        for row, result in enumerate(encode_all(source, None, len(os.sched_getaffinity(0)))):
            bar.update()
            image = result.image
            if image is None:
                if not skip_broken:
                    raise broken_image(result.key, spec, result.error)
                _log.warning("left out %s: %s", result.key, result.error)
                continue
            stored = image.content_hash if image.as_is else xxhash.xxh3_64_intdigest(image.data)
            size = (image.height, image.width, len(image.data))
            found.append((row, image.content_hash, stored, *size, image.mode == "raw"))
    if not found:
        raise InputError(f"{spec} has no image that can be used")
    columns = zip(_COLUMNS.items(), zip(*found, strict=True), strict=True)
    return {name: np.array(values, dtype=kind) for (name, kind), values in columns}


def _read(path: Path, images: int) -> dict[str, np.ndarray] | None:
    """A stored index; None where there is none, or none that can be read."""
    try:
        # Opened here, as numpy leaves a file open that it cannot read.
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as stored:
            index = {name: stored[name] for name in _COLUMNS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    rows = index["rows"]
    sound = all(
        column.dtype == kind and column.shape == rows.shape and rows.ndim == 1
        for column, kind in zip(index.values(), _COLUMNS.values(), strict=True)
    )
    return index if sound and len(rows) and rows.min() >= 0 and rows.max() < images else None
