"""From a sample's bytes to its crop: FFCV's image operation, which takes the crop from a table of views.

H, W: the output's size; n: samples of the .beton; B: batch. One decoding buffer per worker, not one per batch slot as
in FFCV's own decoders: a batch of 256 large images would need gigabytes there.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import xxhash
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State

from stl_offline.compiled import next_item, njit, read_only
from stl_offline.config import INTERPOLATIONS
from stl_offline.errors import InputError
from stl_offline.images.beton import Beton
from stl_offline.loader.decoder.native import Decompressors
from stl_offline.loader.decoder.planes import NOTES_INTS, read_planes, read_rgb, scratch_bytes
from stl_offline.loader.decoder.resample import BILINEAR
from stl_offline.loader.decoder.resize import line_floats, make_filters, resize_pixels, resize_planes
from stl_offline.loader.threads import Workers

# For the manifests of label sets: other decoders, or whole decodes, give slightly other pixels.
DECODER = "libjpeg-turbo at a DCT scale"
# What is known of each image, int64: where its bytes are, how many, its size, whether they are plain pixels, and
# whether they were found to be those of the source.
_POINTER, _SIZE, _HEIGHT, _WIDTH, _RAW, _SOUND = range(6)
_PAGE_BYTES = 4096
# What planes save grows with the image, what they cost with the output; below so many times its pixels they lose.
_FEW_TIMES = 3


class ViewCrop(Operation):
    """FFCV operation for the image field: decode, cut the sample's view out, resize it to (H, W), mirror it.

    Output: uint8 (B, H, W, 3). Views must be axis-aligned crops (`stl_offline.loader.loader.check_views`);
    interpolation: one of `stl_offline.loader.decoder.resample`. An image that cannot be decoded gives zeros, and
    `take_damaged` then names its sample: compiled code must not raise. It runs once a batch, and what it calls is
    compiled by this module, so FFCV need not compile it.

    With views (m · n, 6) a batch holds m crops of each image, one after the other, and decodes the image once for those
    crops that need it at the same DCT scale. Its ids are then ``sample + n · r`` for the crop with number r.

    repeats: m.

    Raises:
        InputError: an unknown interpolation.
    """

    def __init__(
        self, image_size: tuple[int, int], workers: Workers, beton: Beton, interpolation: str = "area"
    ) -> None:
        super().__init__()
        if interpolation not in INTERPOLATIONS:
            raise InputError(f"the interpolation is one of {', '.join(INTERPOLATIONS)}; got {interpolation!r}")
        self.image_size, self.repeats = image_size, 1
        self._workers = workers
        self._filters = make_filters(INTERPOLATIONS.index(interpolation), *image_size)
        columns = (beton.pointers, beton.sizes, beton.heights, beton.widths, beton.raw, np.zeros(len(beton)))
        self._table = np.stack([np.asarray(column, dtype=np.int64) for column in columns], axis=1)
        needed = max(scratch_bytes(*numbers) for numbers in self._table[:, [_HEIGHT, _WIDTH, _SIZE]].tolist())
        # Whole pages, so that workers never share a cache line. Only what images touch becomes real memory.
        self._scratch = np.empty((len(workers), -(-needed // _PAGE_BYTES) * _PAGE_BYTES), dtype=np.uint8)
        # Zeros, because weights of zero are multiplied with whatever lies behind a line's end.
        widest = int(self._table[:, _WIDTH].max(initial=1))
        self._lines = np.zeros((len(workers), line_floats(widest, image_size[1])), dtype=np.float32)
        self._decompressors = Decompressors(len(workers))
        self._notes = np.zeros((len(workers), NOTES_INTS), dtype=np.int64)
        self._broken = np.zeros(1, dtype=np.int64)
        self._hashes, self._keeps_hashes = beton.content_hashes, beton.stored_hashes is not None
        if self._keeps_hashes:
            self._hashes = beton.stored_hashes
        self._read_before = np.zeros(len(beton), dtype=bool) if self._keeps_hashes else beton.raw.copy()
        self._unread = int(np.count_nonzero(~self._read_before))
        self._changed: int | None = None
        self._views: np.ndarray | None = None

    def set_views(self, views: np.ndarray) -> None:
        """Use these views, float32 (n · repeats, 6), from now on. No batch may be under way."""
        self._views, self.repeats = views, len(views) // max(1, len(self._table))
        self._broken[0] = 0
        self._changed = None

    def set_pointers(self, ids: np.ndarray, pointers: np.ndarray) -> None:
        """Where the bytes of some samples lie from now on, int64 of one length."""
        self._table[ids, _POINTER] = pointers

    def take_damaged(self) -> tuple[int, str] | None:
        """A sample of the last batch whose stored bytes cannot be used, and why; or None."""
        broken, changed = int(self._broken[0]), self._changed
        self._broken[0], self._changed = 0, None
        if changed is not None:
            return changed, "its bytes changed since packing"
        return (broken - 1, "it cannot be decoded") if broken else None

    def _check_bytes(self, ids: np.ndarray, storage: np.ndarray) -> None:
        """Compare stored bytes with their hash, once per sample. Of sound JPEGs later readings decode only a part.

        After a batch, when the bytes are in memory. Files of earlier releases keep the hash of the source alone, so
        images that packing converted cannot be compared: they are always decoded whole, since a warning of the decoder
        is the only sign of damage there.
        """
        if not self._unread:
            return
        for sample in np.unique(ids[~self._read_before[ids]]).tolist():
            start = self._table[sample, _POINTER]
            data = storage[start : start + self._table[sample, _SIZE]]
            sound = xxhash.xxh3_64_intdigest(data) == self._hashes[sample]
            if self._keeps_hashes and not sound:
                self._changed = sample
                continue
            self._table[sample, _SOUND] = sound
            self._read_before[sample] = True
            self._unread -= 1

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        query = AllocationQuery((*self.image_size, 3), np.dtype("u1"))
        return replace(previous_state, jit_mode=True, shape=query.shape, dtype=query.dtype), query

    def generate_code(self) -> Callable:
        # What was decoded is read under the type of stored pixels, so that resizing is compiled once for both.
        decoded = [read_only(scratch) for scratch in self._scratch]
        own = list(zip(self._scratch, decoded, self._lines, self._notes, self._decompressors.handles, strict=True))

        def view_crop(batch_indices, destination, _metadata, storage_state):
            counter = np.zeros(1, dtype=np.int64)
            # Without its class, np.memmap, which numba takes long to recognise.
            storage = np.asarray(storage_state[0])
            common = (
                batch_indices,
                self.repeats,
                destination.reshape((*destination.shape[:2], -1)),  # a view: FFCV's buffers are contiguous
                storage,
                self._table,
                self._views,
                self._filters,
                self._broken,
                counter,
            )
            self._workers.run(_decode_items, [(*common, *memory) for memory in own])
            self._check_bytes(batch_indices[:: self.repeats] % len(self._table), storage)
            return destination

        return view_crop


@njit(inline=True)
def pixel_box(view, height, width):
    """The pixels (top, bottom, left, right, flipped) of an axis-aligned view (six numbers), at least one each way."""
    start_u = np.float64(view[2])
    end_u = start_u + np.float64(view[0])
    start_v = np.float64(view[5])
    end_v = start_v + np.float64(view[4])
    flipped = end_u < start_u
    if flipped:
        start_u, end_u = end_u, start_u
    left = min(max(int(np.floor(start_u * width + 0.5)), 0), width - 1)
    right = min(max(int(np.floor(end_u * width + 0.5)), left + 1), width)
    top = min(max(int(np.floor(start_v * height + 0.5)), 0), height - 1)
    bottom = min(max(int(np.floor(end_v * height + 0.5)), top + 1), height)
    return top, bottom, left, right, flipped


@njit(inline=True)
def choose_shrink(kind, box_height, box_width, height, width):
    """At which 1/n of its size to decode a JPEG, of whose box an output of height × width is made; 0: no resizing."""
    if box_height == height and box_width == width:
        return 0
    # Chosen by the sharpness that is left (docs/benchmarks.md). The triangle is the softest filter, so it loses least.
    ratio = min(box_height / height, box_width / width)
    if ratio >= 12:
        return 8
    if ratio >= 6:
        return 4
    return 2 if ratio >= (2.0 if kind == BILINEAR else 2.5) else 1


@njit(inline=True)
def _planes_shrink(image, view, kind, rows, columns):
    """At which 1/n of its size an image is decoded to planes for a crop; 0: it is decoded whole, or is plain pixels.
    Then the row where the crop ends."""
    height, width = image[_HEIGHT], image[_WIDTH]
    top, bottom, left, right, _ = pixel_box(view, height, width)
    if image[_RAW] or height * width < _FEW_TIMES * rows * columns:
        return 0, bottom
    return choose_shrink(kind, bottom - top, right - left, rows, columns), bottom


@njit(inline=True)
def _decode_crops(data, image, views, filters, targets, scratch, decoded, lines, handle, notes):
    """The crops (m) of one image, views (m, 6), into targets (m, H, W · 3); those of one shrink share a decode."""
    height, width = image[_HEIGHT], image[_WIDTH]
    rows, columns = targets.shape[1], targets.shape[2] // 3
    kind = filters[0]
    pixels = decoded
    if image[_RAW]:
        if data.size < 3 * height * width:
            return False
        pixels = data
    for crop in range(len(views)):
        shrink, end = _planes_shrink(image, views[crop], kind, rows, columns)
        first = crop
        for other in range(len(views)):
            its_shrink, its_end = _planes_shrink(image, views[other], kind, rows, columns)
            if its_shrink == shrink:
                first = min(first, other)
                end = max(end, its_end)
        if first < crop:
            continue
        whole = True
        if shrink > 0:
            sound = image[_SOUND] != 0
            status, planes = read_planes(handle, data, height, width, end, shrink, sound, scratch, notes)
            if status < 0:
                return False
            whole = status > 0
            if not whole:
                for other in range(crop, len(views)):
                    if _planes_shrink(image, views[other], kind, rows, columns)[0] == shrink:
                        top, bottom, left, right, mirrored = pixel_box(views[other], height, width)
                        box = (np.float64(top), np.float64(left), np.float64(bottom - top), np.float64(right - left))
                        target = targets[other]
                        resize_planes(decoded, planes, box, (height, width), shrink, mirrored, kind, lines, target)
        if whole:
            if not image[_RAW] and not read_rgb(handle, data, height, width, scratch, notes):
                return False
            for other in range(crop, len(views)):
                if _planes_shrink(image, views[other], kind, rows, columns)[0] == shrink:
                    top, bottom, left, right, mirrored = pixel_box(views[other], height, width)
                    target = targets[other]
                    resize_pixels(pixels, 3 * width, (top, bottom, left, right), mirrored, filters, lines, target)
    return True


@njit
def _decode_items(
    ids, repeats, destination, storage, table, views, filters, broken, counter, scratch, decoded, lines, notes, handle
):
    """Decode images of a batch until none is left; run by every worker, with memory of its own.

    destination: uint8 (B, H, W · 3); decoded: the memory of ``scratch``, not writable.
    """
    own = np.empty((repeats, 6), dtype=np.float32)
    while True:
        # Images differ in size by a hundred times, so each worker takes the next one when it is free.
        first = next_item(counter) * repeats
        if first >= len(ids):
            break
        sample = ids[first] % len(table)
        image = table[sample]
        # A slice never reaches past the file's end, whatever the table says.
        data = storage[image[_POINTER] : image[_POINTER] + image[_SIZE]]
        for crop in range(repeats):
            for number in range(6):
                own[crop, number] = views[ids[first + crop], number]
        targets = destination[first : first + repeats]
        if not _decode_crops(data, image, own, filters, targets, scratch, decoded, lines, handle, notes):
            targets[:] = 0
            broken[0] = sample + 1
