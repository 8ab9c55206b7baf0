"""A small .beton of images that differ in size and storage, its labels, and loaders for both."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from stl_offline.geometry import CropSettings, draw_views
from stl_offline.images.beton import BetonWriter, open_beton
from stl_offline.images.encode import encode_image
from stl_offline.labels.cache import build_token_cache
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.writer import LabelSetWriter
from stl_offline.loader import ImageSettings, TokenLabels, TokenLoader
from tests.labels.synthetic import make_arrays, make_spec

SAMPLES = 23
CLASS_NAMES = tuple(f"class {index}" for index in range(7))


def make_image(number: int) -> np.ndarray:
    """Smooth colours with edges, another size each time, height ≠ width: uint8 (H, W, 3)."""
    draw = np.random.default_rng(number)
    height, width = 24 + 7 * (number % 5), 33 + 11 * (number % 4)
    y, x = np.mgrid[:height, :width]
    colour = draw.uniform(40, 200, 3)
    waves = np.stack([np.sin(x / draw.uniform(3, 9) + y / draw.uniform(3, 9)) for _ in range(3)], axis=-1)
    image = colour + 45 * waves
    image[height // 3 : height // 2, width // 4 : width // 2] = draw.uniform(0, 255, 3)
    return image.clip(0, 255).astype(np.uint8)


def encode(number: int) -> bytes:
    """Every third image a PNG (stored as plain pixels), the others JPEGs of several kinds."""
    stream = io.BytesIO()
    image = Image.fromarray(make_image(number))
    if number % 3 == 0:
        image.save(stream, "PNG")
    else:
        image.save(stream, "JPEG", quality=90, subsampling=number % 3, progressive=number % 2 == 0)
    return stream.getvalue()


def write_beton(path, samples=SAMPLES):
    with open(path, "wb") as stream:
        writer = BetonWriter(stream, samples)
        for number in range(samples):
            writer.add(f"folder/image {number:03d}", number % len(CLASS_NAMES), encode_image(encode(number)))
        writer.finish(CLASS_NAMES, {"kind": "test"})
    return open_beton(path)


@pytest.fixture(scope="session")
def beton(tmp_path_factory):
    """23 packed images."""
    return write_beton(tmp_path_factory.mktemp("packed") / "images.beton")


@pytest.fixture(scope="session")
def make_beton():
    """`write_beton`, for tests that damage theirs."""
    return write_beton


@pytest.fixture(scope="session")
def decoded():
    """What Pillow makes of each image's bytes: uint8 (H, W, 3)."""
    return [np.asarray(Image.open(io.BytesIO(encode(number))).convert("RGB")) for number in range(SAMPLES)]


@pytest.fixture(scope="session")
def make_labels(beton, tmp_path_factory):
    """make_labels(leave_out=0, maps=1, **settings of the label set) → (label set, token cache) of the images."""

    def make(leave_out=0, maps=1, **settings):
        folder = tmp_path_factory.mktemp("labels")
        samples = SAMPLES - leave_out
        spec = make_spec(samples, classes=len(CLASS_NAMES), view_count=maps, class_names=CLASS_NAMES, **settings)
        # In another order than the images': what joins them is the key.
        order = np.random.default_rng(0).permutation(SAMPLES)[:samples]
        with LabelSetWriter(folder / "set", spec, 3) as writer:
            for shard in writer.todo():
                first, last = writer.shard_range(shard)
                mine = order[first:last]
                arrays = make_arrays(spec, first, last)
                keys, hashes = [beton.keys[sample] for sample in mine], beton.content_hashes[mine]
                arrays = replace(arrays, keys=keys, content_hash=hashes)
                if maps > 1:
                    crops = np.stack([random_views(beton, index) for index in range(maps)], axis=1)
                    arrays = replace(arrays, views=crops[mine])
                writer.write_shard(shard, arrays)
            writer.finish()
        label_set = open_label_set(folder / "set")
        missing = "skip" if leave_out else "error"
        cache = build_token_cache(
            label_set, beton.keys, beton.content_hashes, beton.class_names, folder=folder / "cache", missing=missing
        )
        return label_set, cache

    return make


@pytest.fixture
def load(beton):
    """load(…) → a `TokenLoader` of small images whose pixels are left in [0, 1]; closed when the test ends."""
    made = []

    def make(images=beton, image_size=(20, 28), batch_size=5, *, tokens=None, cache=None, **settings):
        see = {name: settings.pop(name) for name in ("mean", "std", "interpolation") if name in settings}
        labels = None if tokens is None and cache is None else TokenLabels(tokens, cache)
        shape = ImageSettings(image_size, **{"mean": (0, 0, 0), "std": (1, 1, 1)} | see)
        made.append(TokenLoader(images, shape, batch_size, labels=labels, **{"seed": 3} | settings))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


@pytest.fixture
def views(beton):
    """Random crops of the images, mirrored or not: (n, 6)."""
    return random_views(beton)


def random_views(beton, epoch=0):
    settings = CropSettings(scale=(0.2, 1.0))
    return draw_views(9, epoch, np.arange(len(beton)), beton.heights, beton.widths, settings)
