"""One sample of a version 2 tar: a .npz file of plain arrays, which numpy, webdataset and Hugging Face datasets read.

Every entry is a .npy file (version 1.0, no pickles), deflated, dated 1980-01-01, in the order of the layout.
Scalars are arrays of shape (), but for the content hash, an array of one number: as a scalar, readers that turn it into
a signed integer fail on half of all hashes.
"""

import io
import math
import zipfile
from functools import lru_cache

import numpy as np

from stl_offline.errors import FormatError
from stl_offline.labels.format.layout import MOST_KEY_BYTES, StoredArray

_DATE = (1980, 1, 1, 0, 0, 0)
_LEVEL = 6
_UTF8_NAME = 0x800
# What stands before an array in its .npy file: version 1.0 fills up to a multiple of 64 bytes.
_HEADER = 128
_ONE_NUMBER = "content_hash"


def pack_member(values: dict[str, np.ndarray]) -> bytes:
    """The bytes of a sample's .npz; the same arrays give the same bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, value in values.items():
            array = np.asarray(value)
            info = zipfile.ZipInfo(f"{name}.npy", _DATE)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.create_system = 3
            info.external_attr = 0o100644 << 16
            content = _header(array.dtype.str, array.shape) + np.ascontiguousarray(array).tobytes()
            archive.writestr(info, content, compresslevel=_LEVEL)
    return stream.getvalue()


def sample_values(planes: dict[str, StoredArray], stored: dict[str, np.ndarray], sample: int) -> dict[str, np.ndarray]:
    """One sample's part of every array but the palette's."""
    values = {}
    for name, plane in planes.items():
        if plane.dtype is None:
            values["key" if name == "keys" else name] = np.array(str(stored[name][sample]))
        elif plane.is_sized:
            part = stored[name][sample]
            values[name] = part.reshape(1) if name == _ONE_NUMBER else part
    return values


def unpack_member(data: bytes, planes: dict[str, StoredArray], most_palette: int) -> dict[str, np.ndarray]:
    """The inverse of `pack_member` for the arrays of ``planes``; ``most_palette``: entries that a palette may have.

    Raises:
        FormatError: other entries, sizes, dtypes or shapes than these; nothing is unpacked before they are compared.
        zipfile.BadZipFile, zlib.error: bytes that are damaged.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        names = ["key" if name == "keys" else name for name in planes]
        if [info.filename for info in infos] != [f"{name}.npy" for name in names]:
            raise FormatError(f"the shard holds a label with other arrays than {', '.join(names)}")
        values = {}
        for info, name, plane in zip(infos, names, planes.values(), strict=True):
            dtype, shape = _expected(name, plane, info.file_size, most_palette)
            header = _header(dtype.str, shape)
            if info.flag_bits & ~_UTF8_NAME or info.compress_type != zipfile.ZIP_DEFLATED:
                raise FormatError(f"the shard holds a label whose array {name} is encrypted or packed in another way")
            if info.file_size != len(header) + dtype.itemsize * math.prod(shape):
                raise FormatError("the shard holds a label of another shape, or of another label set")
            content = archive.read(info)
            if not content.startswith(header):
                raise FormatError("the shard holds a label of another shape, or of another label set")
            values[name] = np.frombuffer(content, dtype, offset=len(header)).reshape(shape)
    return values


def _expected(name: str, plane: StoredArray, size: int, most_palette: int) -> tuple[np.dtype, tuple[int, ...]]:
    """What an array must be, by the size of its file where only that tells its length."""
    if plane.is_sized:
        return plane.dtype, (1,) if name == _ONE_NUMBER else plane.shape[1:]
    item = 4 if plane.dtype is None else plane.dtype.itemsize
    length = (size - _HEADER) // item
    if not 0 < length <= (MOST_KEY_BYTES if plane.dtype is None else most_palette):
        raise FormatError(f"the shard holds a label whose array {name} claims {length:,} entries")
    return (np.dtype(f"<U{length}"), ()) if plane.dtype is None else (plane.dtype, (length,))


@lru_cache(maxsize=1 << 12)
def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    described = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, described)
    return stream.getvalue()
