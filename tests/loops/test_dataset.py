"""Crops with their views, datasets with token labels, and mixing, in plain PyTorch."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional

from stl_offline.augment import MixSettings, draw_mix, mix_images, mix_token_targets
from stl_offline.errors import InputError, JoinError
from stl_offline.geometry import View, draw_views
from stl_offline.loops import RandomResizedCrop, TokenLabelDataset, mix_batch
from stl_offline.loops.dataset import class_names_of
from stl_offline.targets import TokenLabels
from tests.loops.conftest import CROPS, GRID

MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


@pytest.mark.parametrize("kind", ["pil", "uint8", "float"])
@pytest.mark.parametrize("interpolation", MODES)
def test_pixels_are_torchvisions_for_the_view(kind, interpolation):
    array = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    image = Image.fromarray(array)
    if kind != "pil":
        image = functional.pil_to_tensor(image)
        image = image if kind == "uint8" else image.float() / 255
    crop = RandomResizedCrop((20, 28), CROPS, interpolation=interpolation, seed=4)
    flips = set()
    for sample in range(8):
        pixels, view = crop(image, sample, epoch=2)
        ids, heights, widths = (np.array([each]) for each in (sample, 37, 53))
        assert view == View.from_array(draw_views(4, 2, ids, heights, widths, CROPS)[0])
        left, top, width, height, flipped = view.box()
        box = [round(top * 37), round(left * 53), round(height * 37), round(width * 53)]
        # In floats: torchvision's own way for uint8 rounds and clamps rows before it resizes columns.
        source = image.float() if kind == "uint8" else image
        expected = functional.resized_crop(source, *box, [20, 28], MODES[interpolation], antialias=True)
        expected = expected.round().clamp(0, 255).byte() if kind == "uint8" else expected
        expected = functional.hflip(expected) if flipped else expected
        flips.add(flipped)
        assert type(pixels) is type(expected)
        if kind == "pil":
            pixels, expected = functional.pil_to_tensor(pixels), functional.pil_to_tensor(expected)
        torch.testing.assert_close(pixels, expected, rtol=0, atol={"pil": 0, "uint8": 0, "float": 1e-5}[kind])
    assert flips == {True, False}


def test_crops_that_are_wrong():
    with pytest.raises(InputError, match="interpolation must be one of"):
        RandomResizedCrop(8, interpolation="lanczos")
    with pytest.raises(InputError, match="must be positive"):
        RandomResizedCrop((8, 0))
    with pytest.raises(InputError, match="shows no pixel"):
        RandomResizedCrop(8).show(torch.zeros(3, 4, 4), View.crop(0.1, 0.1, 0.01, 0.5))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_have_the_targets_of_their_views(workers, folder, beton, whole):
    labels = TokenLabels.of(whole, GRID)
    dataset = TokenLabelDataset(folder, labels, RandomResizedCrop((24, 32), CROPS, seed=3))
    loader = DataLoader(
        dataset, 4, num_workers=workers, persistent_workers=workers > 0, collate_fn=dataset.collate, pin_memory=False
    )
    seen = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        views = draw_views(3, epoch, np.arange(15), beton.heights, beton.widths, CROPS)
        for batch in loader:
            samples = batch.sample_ids.numpy()
            np.testing.assert_array_equal(batch.views.numpy(), views[samples])
            keys = [beton.keys[sample] for sample in samples]
            ids, weights = labels(keys, views[samples], epoch, seed=3)
            np.testing.assert_array_equal(batch.token_ids.numpy(), ids)
            np.testing.assert_array_equal(batch.token_weights.numpy(), weights)
            assert batch.class_ids.tolist() == beton.class_ids[samples].tolist()
            assert batch.images.shape == (len(samples), 3, 24, 32) and batch.images.dtype == torch.float32
            seen.append(batch.images)
    assert not torch.equal(seen[0], seen[4])


def test_crops_of_a_label_set_are_replayed(folder, beton, cropped):
    grid = cropped.spec.grid
    dataset = TokenLabelDataset(folder, TokenLabels.of(cropped, grid, "soft", m=2), RandomResizedCrop(32))
    dataset.set_epoch(4)
    batch = dataset.collate([dataset[2], dataset[9]])
    for place, sample in enumerate((2, 9)):
        stored = cropped[beton.keys[sample]]
        np.testing.assert_array_equal(batch.views[place].numpy(), stored.views[1])
        np.testing.assert_array_equal(batch.token_ids[place].numpy(), stored.class_ids[1].reshape(-1, 2))


def test_subsets_dicts_and_missing_labels(images, folder, beton, whole, some):
    crop = RandomResizedCrop(16)
    part = TokenLabelDataset(Subset(folder, [11, 3]), TokenLabels.of(whole, GRID, "soft"), crop)
    whole_one = TokenLabelDataset(folder, part.labels, crop)
    assert part.rows.tolist() == whole_one.rows[[11, 3]].tolist()

    class Records(list):
        pass

    records = Records({"image": folder[place][0], "label": folder[place][1]} for place in range(15))
    with pytest.raises(InputError, match="Records does not name its classes; give `class_names`"):
        TokenLabelDataset(records, part.labels, crop)
    with pytest.raises(InputError, match="Records does not name its samples; give `keys`"):
        TokenLabelDataset(records, part.labels, crop, class_names=beton.class_names)
    keys = [f"x/{key}" for key in beton.keys]
    named = TokenLabelDataset(records, part.labels, crop, class_names=beton.class_names, keys=keys, key_prefix="x/=")
    for found, expected in zip(named.collate([named[4]]), whole_one.collate([whole_one[4]]), strict=True):
        assert torch.equal(found, expected)

    with pytest.raises(JoinError, match="2 of 15 samples have no label"):
        TokenLabelDataset(folder, TokenLabels.of(some, GRID), crop)
    skipping = TokenLabelDataset(folder, TokenLabels.of(some, GRID, missing="skip"), crop)
    batch = skipping.collate([skipping[place] for place in range(15)])
    assert (batch.token_weights.sum(dim=(1, 2)) == 0).sum() == 2


def test_datasets_that_do_not_fit(images, folder, whole):
    labels, crop = TokenLabels.of(whole, GRID), RandomResizedCrop(16)
    with pytest.raises(InputError, match="ImageFolder has a transform of its own"):
        TokenLabelDataset(ImageFolder(images, transform=transforms.PILToTensor()), labels, crop)
    # Within a subset, too, where its crop would move pixels from under their labels.
    cropped = ImageFolder(images, transform=transforms.RandomResizedCrop(16))
    with pytest.raises(InputError, match="ImageFolder has a transform of its own"):
        TokenLabelDataset(Subset(Subset(cropped, range(9)), range(4)), labels, crop)
    with pytest.raises(InputError, match="ImageFolder has a transform of its own"):
        TokenLabelDataset(ConcatDataset([folder, cropped]), labels, crop, keys=[], class_names=folder.classes)
    with pytest.raises(InputError, match="ImageFolder has a target_transform"):
        TokenLabelDataset(ImageFolder(images, target_transform=lambda number: 2 - number), labels, crop)
    with pytest.raises(JoinError, match="the order differs: .*; number the dataset's classes as the label set does"):
        TokenLabelDataset(folder, labels, crop, class_names=("vertical", "horizontal", "diagonal"))
    folder = ImageFolder(images)
    folder.wnids, folder.classes = folder.classes, [("tench", "Tinca tinca"), ("goldfish",), ("shark",)]
    assert class_names_of(folder) == tuple(folder.wnids)  # torchvision's ImageNet
    gaps = SimpleNamespace(reader=SimpleNamespace(class_to_idx={"a": 0, "b": 1, "c": 3}))
    with pytest.raises(InputError, match="class ids have gaps"):
        class_names_of(gaps)
    with pytest.raises(InputError, match="15 samples, but 2 keys"):
        TokenLabelDataset(folder, labels, crop, keys=["a", "b"])


def test_mixing_moves_pixels_classes_and_tokens_together(folder, whole):
    dataset = TokenLabelDataset(folder, TokenLabels.of(whole, GRID, "soft", m=2), RandomResizedCrop((24, 32)))
    batch = dataset.collate([dataset[place] for place in range(5)])
    for settings in (MixSettings(cutmix=1.0), MixSettings(mixup=0.8, mode="elem"), MixSettings()):
        generator = np.random.default_rng(1)
        found = mix_batch(batch, settings, generator, grid=GRID, num_classes=3, smoothing=0.1)
        torch.testing.assert_close(found.class_targets.sum(dim=1), torch.ones(5))
        if not settings.enabled:
            assert torch.equal(found.images, batch.images) and torch.equal(found.token_ids, batch.token_ids)
            continue
        mix = draw_mix(5, 24, 32, settings, np.random.default_rng(1))
        assert torch.equal(found.images, mix_images(batch.images, mix))
        expected = mix_token_targets(batch.token_ids, batch.token_weights, GRID, mix)
        assert torch.equal(found.token_ids, expected[0]) and torch.equal(found.token_weights, expected[1])
        assert not torch.equal(found.images, batch.images)


BLOCKED = """
import sys
sys.modules["ffcv"] = None
import stl_offline
stl_offline.TokenLabelDataset, stl_offline.RandomResizedCrop, stl_offline.mix_batch, stl_offline.TimmTokenDataset
assert not any(name.startswith("stl_offline.loader") for name in sys.modules)
"""


def test_a_loop_of_ones_own_needs_no_ffcv():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
