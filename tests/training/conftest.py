"""A small data set of coloured stripes, and the settings to learn it in seconds."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from stl_offline.images.pack import ensure_beton
from stl_offline.labels.writer import LabelSetWriter
from tests.labels.synthetic import make_arrays, make_spec

SIZE = 32
CLASSES = ("diagonal", "horizontal", "vertical")


def striped(kind: str, seed: int) -> np.ndarray:
    """Stripes of a class's direction, in random colours: (H, W, 3) uint8 with H ≠ W."""
    generator = np.random.default_rng(seed)
    height, width = 36, 44
    y, x = np.mgrid[:height, :width]
    position = {"horizontal": y, "vertical": x, "diagonal": x + y}[kind]
    wave = (np.sin(position * generator.uniform(0.7, 1.1) + generator.uniform(0, 6)) > 0)[..., None]
    first, second = generator.integers(0, 256, (2, 3))
    image = np.where(wave, first, second) + generator.normal(0, 8, (height, width, 3))
    return image.clip(0, 255).astype(np.uint8)


def write_stripes(folder, count: int, seed: int, classes=CLASSES):
    for number, kind in enumerate(classes):
        (folder / kind).mkdir(parents=True)
        for index in range(count):
            image = Image.fromarray(striped(kind, seed * 1000 + number * 100 + index))
            image.save(folder / kind / f"{index:03d}.jpg", quality=95)
    return folder


@pytest.fixture(scope="session")
def make_stripes():
    """`write_stripes`, for tests that need other images."""
    return write_stripes


@pytest.fixture(scope="session")
def stripes(tmp_path_factory):
    """(train folder, validation folder): 3 classes, 15 and 6 images each."""
    folder = tmp_path_factory.mktemp("stripes")
    return write_stripes(folder / "train", 15, 1), write_stripes(folder / "val", 6, 2)


def quick_settings(stripes, out):
    """Settings of a run that takes a second; in float32, whatever the hardware is quick at."""
    return {
        "data": str(stripes[0]),
        "val": str(stripes[1]),
        "out": str(out),
        "img_size": SIZE,
        "epochs": 2,
        "batch_size": 20,
        "seed": 3,
        "workers": 1,
        "device": "cpu",
        "amp": "none",
    }


@pytest.fixture
def quick(stripes, tmp_path):
    """`quick_settings` of a run in a folder of the test's own."""
    return quick_settings(stripes, tmp_path / "run")


@pytest.fixture(scope="module")
def make_set(stripes, tmp_path_factory):
    """make_set(**settings) → a label set of numbers for the striped images."""
    beton = ensure_beton(str(stripes[0]))

    def make(leave_out=0, **settings):
        path = tmp_path_factory.mktemp("sets") / "set"
        names = tuple(beton.class_names)
        samples = len(beton) - leave_out
        spec = make_spec(samples, len(names), class_names=names, **{"grid": (4, 4), "top_k": 1} | settings)
        arrays = make_arrays(spec)
        # Synthetic crops may leave the image.
        inside = np.float32(0.8 if spec.views_per_image > 1 else 1)
        arrays = dataclasses.replace(
            arrays,
            views=arrays.views * inside,
            keys=list(beton.keys[:samples]),
            content_hash=np.array(beton.content_hashes[:samples]),
            class_id=np.array(beton.class_ids[:samples], dtype=np.uint32),
        )
        with LabelSetWriter(path, spec, 1) as writer:
            writer.write_shard(0, arrays)
            writer.finish()
        return str(path), arrays

    return make
