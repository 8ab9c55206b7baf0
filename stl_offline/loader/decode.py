"""From a sample's bytes to its crop: FFCV's image operation, which takes the crop from a table of views.

H, W: the output's size; n: samples of the .beton; B: batch. One decoding buffer a worker, not one a batch slot as in
FFCV's own decoders: a batch of 256 large pictures would need gigabytes there.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from numba import njit, prange

from stl_offline.images.beton import Beton
from stl_offline.loader.native import (
    TJFLAG_ACCURATEDCT,
    TJPF_RGB,
    Decompressors,
    next_item,
    resize_area,
    tj_decompress,
    tj_header,
)

# What is known of each picture, int64: where its bytes are, how many, its size, and whether they are plain pixels.
_POINTER, _SIZE, _HEIGHT, _WIDTH, _RAW = range(5)
_HEADER_INTS = 16  # one cache line of int32 for each worker
_PAGE_BYTES = 4096


class ViewCrop(Operation):
    """FFCV operation for the image field: decode, cut the sample's view out, resize it to (H, W), mirror it.

    Output: uint8 (B, H, W, 3). Views must be axis-aligned crops (`stl_offline.loader.loader.check_views`). JPEGs are
    decoded exactly as Pillow and torchvision decode them (accurate integer DCT); the resizing is OpenCV's area
    interpolation. A picture that cannot be decoded gives zeros, and `take_broken` then names its sample: compiled code
    must not raise. It runs once a batch, and what it calls is compiled by this module, so FFCV need not compile it.
    """

    def __init__(self, image_size: tuple[int, int], workers: int, beton: Beton) -> None:
        super().__init__()
        self.image_size = image_size
        columns = (beton.pointers, beton.sizes, beton.heights, beton.widths, beton.raw)
        self._table = np.stack([np.asarray(column, dtype=np.int64) for column in columns], axis=1)
        decoded_bytes = (self._table[:, _HEIGHT] * self._table[:, _WIDTH] * 3)[self._table[:, _RAW] == 0]
        # Whole pages, so that workers never share a cache line. Only what pictures touch becomes real memory.
        scratch_bytes = -(-int(decoded_bytes.max(initial=1)) // _PAGE_BYTES) * _PAGE_BYTES
        self._scratch = np.empty((workers, scratch_bytes), dtype=np.uint8)
        self._decompressors = Decompressors(workers)
        self._headers = np.zeros((workers, _HEADER_INTS), dtype=np.int32)
        self._broken = np.zeros(1, dtype=np.int64)
        self._views: np.ndarray | None = None

    def set_views(self, views: np.ndarray) -> None:
        """Use these views, float32 (n, 6), from now on. No batch may be under way."""
        self._views = views
        self._broken[0] = 0

    def take_broken(self) -> int | None:
        """The id of a sample of the last batch that could not be decoded, or None."""
        broken = int(self._broken[0])
        self._broken[0] = 0
        return broken - 1 if broken else None

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        query = AllocationQuery((*self.image_size, 3), np.dtype("u1"))
        return replace(previous_state, jit_mode=True, shape=query.shape, dtype=query.dtype), query

    def generate_code(self) -> Callable:
        handles = self._decompressors.handles
        decode_batch = _decode_batch_parallel if len(handles) > 1 else _decode_batch

        def view_crop(batch_indices, destination, _metadata, storage_state):
            counter = np.zeros(1, dtype=np.int64)
            decode_batch(
                batch_indices,
                destination,
                storage_state[0],
                self._table,
                self._views,
                self._scratch,
                handles,
                self._headers,
                self._broken,
                counter,
            )
            return destination

        return view_crop


@njit(cache=True, nogil=True)
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


@njit(cache=True, nogil=True)
def resize_into(source, top, bottom, left, right, target):
    """Resize rows top:bottom and columns left:right of ``source`` (h, w, 3) to fill ``target`` (H, W, 3); uint8."""
    resize_area(
        0,
        source.ctypes.data,
        source.shape[0],
        source.shape[1],
        top,
        bottom,
        left,
        right,
        target.ctypes.data,
        target.shape[0],
        target.shape[1],
    )


@njit(cache=True, nogil=True)
def mirror(picture):
    """Swap left and right of (H, W, 3) in place."""
    width = picture.shape[1]
    for row in range(picture.shape[0]):
        for column in range(width // 2):
            for channel in range(3):
                kept = picture[row, column, channel]
                picture[row, column, channel] = picture[row, width - 1 - column, channel]
                picture[row, width - 1 - column, channel] = kept


@njit(cache=True, nogil=True)
def decode_jpeg(handle, data, pixels, header):
    """Decode a JPEG into ``pixels`` (h, w, 3); False if it is damaged or has another size. ``header``: scratch."""
    place = header.ctypes.data
    if tj_header(handle, data.ctypes.data, data.size, place, place + 4, place + 8, place + 12) != 0:
        return False
    height, width = pixels.shape[0], pixels.shape[1]
    if header[0] != width or header[1] != height:
        return False
    # −1 also for mere warnings, after which libjpeg has painted something over the damage. Packed JPEGs have none.
    failed = tj_decompress(
        handle,
        data.ctypes.data,
        data.size,
        pixels.ctypes.data,
        width,
        3 * width,
        height,
        TJPF_RGB,
        TJFLAG_ACCURATEDCT,
    )
    return failed == 0


@njit(cache=True, nogil=True)
def _decode_sample(data, is_raw, height, width, view, target, scratch, handle, header):
    size = height * width * 3
    if is_raw:
        if data.size < size:
            return False
        pixels = data[:size].reshape((height, width, 3))
    else:
        pixels = scratch[:size].reshape((height, width, 3))
        if not decode_jpeg(handle, data, pixels, header):
            return False
    top, bottom, left, right, flipped = pixel_box(view, height, width)
    resize_into(pixels, top, bottom, left, right, target)
    if flipped:
        mirror(target)
    return True


@njit(cache=True, nogil=True)
def _work(batch_indices, destination, storage, table, views, scratch, handle, header, broken, counter):
    # Pictures differ in size by a hundred times, so each worker takes the next one when it is free.
    while True:
        place = next_item(counter)
        if place >= len(batch_indices):
            break
        sample = batch_indices[place]
        picture = table[sample]
        # A slice never reaches past the file's end, whatever the table says.
        data = storage[picture[_POINTER] : picture[_POINTER] + picture[_SIZE]]
        target = destination[place]
        if not _decode_sample(
            data, picture[_RAW] != 0, picture[_HEIGHT], picture[_WIDTH], views[sample], target, scratch, handle, header
        ):
            target[:] = 0
            broken[0] = sample + 1


@njit(cache=True, nogil=True)
def _decode_batch(ids, destination, storage, table, views, scratch, handles, headers, broken, counter):
    _work(ids, destination, storage, table, views, scratch[0], handles[0], headers[0], broken, counter)


@njit(cache=True, nogil=True, parallel=True)
def _decode_batch_parallel(ids, destination, storage, table, views, scratch, handles, headers, broken, counter):
    for worker in prange(len(handles)):
        _work(
            ids, destination, storage, table, views, scratch[worker], handles[worker], headers[worker], broken, counter
        )
