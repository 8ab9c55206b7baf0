"""Images and trees that these tests make for themselves."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Photo = Callable[..., Image.Image]


def _photo(height: int = 48, width: int = 72, seed: int = 0) -> Image.Image:
    """An RGB image with soft areas, edges and a little noise, as photographs have."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = random.integers(0, 256, 3)
    return Image.fromarray(np.clip(pixels + random.integers(-6, 7, pixels.shape), 0, 255).astype(np.uint8))


def _file_bytes(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="session")
def photo() -> Photo:
    return _photo


@pytest.fixture(scope="session")
def file_bytes() -> Callable[..., bytes]:
    return _file_bytes


@pytest.fixture(scope="session")
def make_tree() -> Callable[..., Path]:
    """Writes {relative path: bytes} below a folder; None makes a folder."""

    def make(root: Path, files: dict[str, bytes | None]) -> Path:
        root.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            path = root / name
            (path if data is None else path.parent).mkdir(parents=True, exist_ok=True)
            if data is not None:
                path.write_bytes(data)
                os.utime(path, ns=(10**18, 10**18))
        return root

    return make


@pytest.fixture
def cats_and_dogs(tmp_path, make_tree, photo, file_bytes) -> Path:
    """Two classes of three JPEGs each; every image has another size."""
    files = {
        f"{name}/{name}-{number}.jpg": file_bytes(photo(40 + 4 * number, 60 - 6 * number, seed=number + 10 * label))
        for label, name in enumerate(("cat", "dog"))
        for number in range(3)
    }
    return make_tree(tmp_path / "pets", files)


@pytest.fixture
def broken(cats_and_dogs):
    """The pets, two of them broken: one cut off, one a text."""
    cut = cats_and_dogs / "cat" / "cat-1.jpg"
    cut.write_bytes(cut.read_bytes()[:-40])
    (cats_and_dogs / "dog" / "dog-0.jpg").write_text("404 not found")
    return cats_and_dogs
