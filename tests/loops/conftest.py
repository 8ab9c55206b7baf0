"""A folder of images, its label sets of whole images and of crops, and the same images packed."""

import dataclasses

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from stl_offline.geometry import CropSettings, draw_views
from stl_offline.images.beton import open_beton
from stl_offline.images.pack import pack
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.writer import LabelSetWriter
from tests.labels.synthetic import make_arrays, make_spec
from tests.training.conftest import write_stripes

GRID = (3, 4)
CROPS = CropSettings(scale=(0.2, 1.0))


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """The folder: 3 classes of 5 images each, 36×44 pixels."""
    return write_stripes(tmp_path_factory.mktemp("folder") / "train", 5, 7)


@pytest.fixture(scope="session")
def beton(images, tmp_path_factory):
    place = tmp_path_factory.mktemp("packed") / "train.beton"
    pack(str(images), place, workers=1)
    return open_beton(place)


@pytest.fixture(scope="session")
def folder(images):
    """The images as torchvision gives them."""
    return ImageFolder(images)


def write_labels(place, beton, leave_out=0, maps=1):
    """A label set of the images, in another order than theirs."""
    count = len(beton) - leave_out
    spec = make_spec(count, classes=3, top_k=2, view_count=maps, class_names=beton.class_names)
    order = np.random.default_rng(0).permutation(len(beton))[:count]
    everything = np.arange(len(beton))
    crops = np.stack([draw_views(5, view, everything, beton.heights, beton.widths, CROPS) for view in range(maps)], 1)
    with LabelSetWriter(place, spec, 2) as writer:
        for shard in writer.todo():
            mine = order[slice(*writer.shard_range(shard))]
            arrays = dataclasses.replace(
                make_arrays(spec, *writer.shard_range(shard)),
                keys=[beton.keys[sample] for sample in mine],
                content_hash=beton.content_hashes[mine],
            )
            if maps > 1:
                arrays = dataclasses.replace(arrays, views=crops[mine])
            writer.write_shard(shard, arrays)
        writer.finish()
    return open_label_set(place)


@pytest.fixture(scope="session")
def whole(beton, tmp_path_factory):
    return write_labels(tmp_path_factory.mktemp("labels") / "whole", beton)


@pytest.fixture(scope="session")
def some(beton, tmp_path_factory):
    """Two images have no label."""
    return write_labels(tmp_path_factory.mktemp("labels") / "some", beton, leave_out=2)


@pytest.fixture(scope="session")
def cropped(beton, tmp_path_factory):
    """Of crops, three of each image."""
    return write_labels(tmp_path_factory.mktemp("labels") / "cropped", beton, maps=3)
