"""The synthetic data set on disk: images in class folders, and the masks of their objects.

    FOLDER/train/CLASS/NUMBER.jpg   FOLDER/val/CLASS/NUMBER.jpg   FOLDER/masks-train.npz   FOLDER/masks-val.npz

Keys, as packing makes them from ``FOLDER/train`` or ``FOLDER/val``, are ``CLASS/NUMBER.jpg``.
"""

import json
import os
import secrets
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from stl_offline.demo.drawing import draw_shape
from stl_offline.demo.outlines import OUTLINES
from stl_offline.errors import InputError, TargetError
from stl_offline.files import canonical_json, make_folder

CLASS_NAMES = tuple(sorted(OUTLINES))
SPLITS = ("train", "val")
_VERSION = 2
_JPEG_QUALITY = 95
_RECORD = "shapes.json"


def write_shapes(folder: str | Path, *, train: int = 2400, val: int = 600, seed: int = 0, size: int = 64) -> Path:
    """Draw the data set into a new folder, complete or not at all. The same arguments give the same files.

    A folder that already holds it, made with the same arguments, is left as it is.

    Args:
        folder: must not exist, be empty, or already hold this data set.
        train, val: images per split; multiples of the number of classes, since all classes have the same number.
        seed: from 0, below 2**63.
        size: pixels on each side, at least 16.

    Returns:
        ``folder``.

    Raises:
        InputError: a number is out of range.
        TargetError: the folder holds other files, or cannot be written.
    """
    folder = Path(folder)
    counts = {"train": train, "val": val}
    for split, count in counts.items():
        if count < len(CLASS_NAMES) or count % len(CLASS_NAMES):
            raise InputError(f"{split} must be a multiple of the {len(CLASS_NAMES)} classes, got {count}")
    if not 0 <= seed < 1 << 63 or size < 16:
        raise InputError(f"the seed must be at least 0 and the size at least 16 pixels, got {seed} and {size}")
    record = canonical_json({"version": _VERSION, "seed": seed, "size": size, **counts})
    if folder.exists() and any(folder.iterdir()):
        if (folder / _RECORD).is_file() and (folder / _RECORD).read_bytes() == record:
            return folder
        raise TargetError(f"{folder} already holds other files; choose an empty or a new folder")
    make_folder(folder.parent)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        for number, split in enumerate(SPLITS):
            _write_split(temporary, split, number, counts[split], seed, size)
        (temporary / _RECORD).write_bytes(record)
        os.replace(temporary, folder)
    except OSError as error:
        raise TargetError(f"cannot write {folder}: {error.strerror or error}; choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_split(folder: Path, split: str, split_number: int, count: int, seed: int, size: int) -> None:
    for name in CLASS_NAMES:
        (folder / split / name).mkdir(parents=True)
    masks: dict[str, np.ndarray] = {}
    for number in range(count):
        name = CLASS_NAMES[number % len(CLASS_NAMES)]
        key = f"{name}/{number:05d}.jpg"
        drawing = draw_shape(name, seed, split_number, number, size)
        Image.fromarray(drawing.pixels).save(folder / split / key, quality=_JPEG_QUALITY, subsampling=0)
        masks[key] = drawing.mask
    keys = sorted(masks)
    np.savez_compressed(
        folder / f"masks-{split}.npz",
        keys=np.frombuffer(json.dumps(keys).encode(), np.uint8),
        masks=np.stack([masks[key] for key in keys]),
    )
