"""Images in loops of one's own show the pixels that labels are made of, whatever their kind and their dataset."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder

from stl_offline.errors import InputError
from stl_offline.images.encode import decode
from stl_offline.loops import RandomResizedCrop, TokenLabelDataset
from stl_offline.targets import TokenLabels
from tests.loops.conftest import GRID


@pytest.fixture
def make(beton, whole):
    """make(dataset) → it with token labels, of the images of ``beton`` in their order."""
    labels, crop = TokenLabels.of(whole, GRID), RandomResizedCrop((24, 32))

    def make(dataset, **settings):
        given = {"keys": beton.keys, "class_names": beton.class_names} | settings
        return TokenLabelDataset(dataset, labels, crop, **given)

    return make


def of_kind(mode: str) -> Image.Image:
    """An image whose pixels look otherwise where a mode is resized or converted in another order."""
    numbers = np.random.default_rng(1)
    if mode == "I;16":
        return Image.fromarray(numbers.integers(0, 65_536, (36, 44), dtype=np.uint16))
    colours = Image.fromarray(numbers.integers(0, 256, (36, 44, 4), dtype=np.uint8), "RGBA")
    return colours if mode == "RGBA" else colours.convert("RGB").convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1", "I;16", "CMYK"])
def test_every_mode_is_shown_as_it_is_labelled(make, beton, mode):
    image, stream = of_kind(mode), io.BytesIO()
    image.save(stream, "TIFF")
    labelled = decode(stream.getvalue())
    found, expected = (make([(each, 0)] * len(beton))[3] for each in (image, labelled))
    assert torch.equal(found.pixels, expected.pixels) and found.pixels.shape == (3, 24, 32)


def test_floats_have_no_known_range(make, beton):
    image = Image.fromarray(np.zeros((36, 44), np.float32))
    with pytest.raises(InputError, match="pixels are floating-point numbers"):
        _ = make([(image, 0)] * len(beton))[0]


@pytest.fixture
def turned(folder, tmp_path):
    """The images with an EXIF orientation: the folder, and its files in order."""
    exif = Image.Exif()
    exif[274] = 6
    for path, _ in folder.samples:
        place = tmp_path / path.removeprefix(str(folder.root) + "/")
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("RGB").save(place.with_suffix(".jpg"), exif=exif)
    return ImageFolder(tmp_path)


@pytest.mark.parametrize("stored", ["paths", "bytes"])
@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_images_of_hugging_face_are_not_turned(make, turned, beton, stored, form):
    """Its datasets turn images as they decode them, and labels are made of images that are not turned."""
    images = [path for path, _ in turned.samples]
    if stored == "bytes":
        images = [{"bytes": Path(path).read_bytes(), "path": None} for path in images]
    classes = [class_id for _, class_id in turned.samples]
    table = datasets.Dataset.from_dict({"image": images, "label": classes})
    table = table.cast_column("image", datasets.Image())
    assert table[0]["image"].size == (36, 44) and turned[0][0].size == (44, 36)
    some, keys = [7, 2], [beton.keys[7], beton.keys[2]]
    for theirs, ours in (
        (make(table.with_format(form)), make(turned)),
        (make(Subset(table.with_format(form), some), keys=keys), make(Subset(turned, some), keys=keys)),
    ):
        for place in range(len(ours)):
            assert torch.equal(theirs[place].pixels, ours[place].pixels)
            assert theirs[place].class_id == ours[place].class_id


def test_a_transform_of_hugging_face_is_refused(make, turned):
    table = datasets.Dataset.from_dict({"image": [path for path, _ in turned.samples], "label": [0] * len(turned)})
    table = table.cast_column("image", datasets.Image()).with_transform(lambda batch: batch)
    with pytest.raises(InputError, match="this Dataset has a transform of its own"):
        make(table)
