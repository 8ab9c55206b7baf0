"""Small images with masks: a class is a colour, so that a few steps learn it."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

CLASSES = ("ground", "box", "disc")
IGNORE = 9
COLOURS = np.array([[40, 90, 40], [200, 60, 60], [70, 80, 220]])


def scene(seed: int, height: int = 40, width: int = 56) -> tuple[np.ndarray, np.ndarray]:
    """RGB image (H, W, 3) and mask of ids (H, W) of a box and a disc on the ground; the border has no class."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    ids = np.zeros((height, width), np.uint8)
    top, left = generator.integers(2, 12), generator.integers(2, 18)
    ids[top : top + 16, left : left + 14] = 1
    centre_y, centre_x = generator.integers(16, height - 8), generator.integers(30, width - 8)
    ids[(y - centre_y) ** 2 + (x - centre_x) ** 2 < 64] = 2
    image = COLOURS[ids] + generator.normal(0, 12, (height, width, 3))
    ids[0], ids[-1] = IGNORE, IGNORE
    return image.clip(0, 255).astype(np.uint8), ids


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def jpeg(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="JPEG", quality=95)
    return stream.getvalue()


def write_folders(root, seeds):
    """images/ and masks/ below ``root``; sizes differ between images."""
    for name in ("images", "masks"):
        (root / name / "a").mkdir(parents=True)
    for seed in seeds:
        image, ids = scene(seed, 40 + 3 * (seed % 2), 56 - 5 * (seed % 3))
        (root / "images" / "a" / f"{seed}.jpg").write_bytes(jpeg(image))
        (root / "masks" / "a" / f"{seed}.png").write_bytes(png(ids))
    return root


def write_tar(path, splits, size=(40, 56)):
    """SPLIT/NAME.jpg beside SPLIT/NAME.png of ``size`` (H, W) in a tar, as CamVid's are often given."""
    with tarfile.open(path, "w") as tar:
        for split, seeds in splits.items():
            for seed in seeds:
                image, ids = scene(seed, *size)
                for name, data in ((f"set/{split}/{seed}.jpg", jpeg(image)), (f"set/{split}/{seed}.png", png(ids))):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """(folder with 10 training pairs, tar with the splits train and val of 6 and 3 pairs)."""
    folder = tmp_path_factory.mktemp("scenes")
    return write_folders(folder / "train", range(10)), write_tar(
        folder / "scenes.tar", {"train": range(20, 26), "val": range(30, 33)}
    )
