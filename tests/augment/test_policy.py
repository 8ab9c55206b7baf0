"""RandAugment's strings and draws against timm's: lists, chances, magnitudes, signs; and each operation's pixels."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_augment

from stl_offline.augment.colour import change_colour, change_colours
from stl_offline.augment.policy import MOVES, OPERATIONS, Operations, RandAugment
from stl_offline.augment.warp import move_views, warp_images
from stl_offline.errors import InputError

STRINGS = ["rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.8-inc1", "rand-m10-mstd101", "rand-mstd2-m6-mmax12-n1-p1"]
SAMPLES = 6000


def timms_name(name: str, increasing: bool) -> str:
    grows = name in ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
    return f"{name}Increasing" if grows and increasing else name


@pytest.fixture
def timms_draws(monkeypatch):
    """timms_draws(string) → {operation: arguments that timm drew} over as many images as ours."""

    def draw(text):
        transform = timm_augment.rand_augment_transform(text)
        found = {op.name: [] for op in transform.ops}
        for op in transform.ops:
            op.aug_fn = lambda _, *arguments, name=op.name, **__: found[name].append(arguments[0] if arguments else 0.0)
        with monkeypatch.context() as patch:
            # timm reads the global generators: these stand in for them.
            patch.setattr(timm_augment, "random", random.Random(5))
            patch.setattr(timm_augment.np, "random", np.random.RandomState(5))
            for _ in range(SAMPLES):
                transform(None)
        return found

    return draw


@pytest.mark.parametrize("text", ["rand-m25-mmax30", "rand-m25-mmax30-inc1"])
def test_levels_beyond_timms_scale(text):
    """timm leaves an image alone of which more than all eight bits are to stay."""
    drawn = RandAugment.parse(text).draw(0, 0, np.arange(400))
    bits = drawn.arguments[drawn.kinds == OPERATIONS.index("Posterize")]
    assert bits.min() >= 1 and bits.max() <= 8 and len(bits) > 20
    pixels = torch.randint(0, 256, (len(bits), 3, 5, 7), dtype=torch.uint8)
    found = change_colour("Posterize", pixels, torch.from_numpy(bits).float())
    for image, number, ours in zip(pixels, bits, found, strict=True):
        pil = Image.fromarray(image.permute(1, 2, 0).numpy())
        theirs = torch.from_numpy(np.array(timm_augment.posterize(pil, int(number)))).permute(2, 0, 1)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("text", STRINGS)
def test_settings_and_draws_are_timms(text, timms_draws):
    ours = RandAugment.parse(text)
    theirs = timm_augment.rand_augment_transform(text)
    assert [timms_name(name, ours.increasing) for name in OPERATIONS] == [op.name for op in theirs.ops]
    assert theirs.num_layers == ours.layers
    assert (theirs.ops[0].prob, theirs.ops[0].magnitude) == (ours.prob, ours.magnitude)
    drawn = ours.draw(3, 1, np.arange(SAMPLES))
    assert drawn.kinds.shape == (SAMPLES, ours.layers)
    for name, expected in timms_draws(text).items():
        kind = OPERATIONS.index(name.removesuffix("Increasing"))
        found = drawn.arguments[drawn.kinds == kind]
        chance = ours.prob / len(OPERATIONS)
        spread = 5 * math.sqrt(SAMPLES * ours.layers * chance)
        assert abs(len(found) - SAMPLES * ours.layers * chance) < spread
        assert abs(len(expected) - len(found)) < 2 * spread
        # Pillow refuses what timm asks for now and then: a posterized image without any bit.
        expected = np.maximum(expected, 1) if kind == OPERATIONS.index("Posterize") else np.array(expected)
        span = np.abs(expected).max() + 1e-9
        # A few hundred draws each: the sizes' mean, spread and ends, and how many are negative.
        for statistic in (np.mean, np.std):
            sizes = [statistic(np.abs(values)) / span for values in (found, expected)]
            assert abs(sizes[0] - sizes[1]) < 0.08
        ends = [np.quantile(np.abs(values), [0.05, 0.95]) for values in (found, expected)]
        np.testing.assert_allclose(*ends, atol=0.15 * span)
        assert abs((found < 0).mean() - (expected < 0).mean()) < 0.2


def test_draws_are_functions_of_seed_epoch_and_sample():
    policy = RandAugment.parse("rand-m9-mstd0.5-inc1")
    whole = policy.draw(7, 3, np.arange(100))
    part = policy.draw(7, 3, np.array([41, 2, 99]))
    np.testing.assert_array_equal(part.kinds, whole.kinds[[41, 2, 99]])
    np.testing.assert_array_equal(part.arguments, whole.arguments[[41, 2, 99]])
    for other in (policy.draw(8, 3, np.arange(100)), policy.draw(7, 4, np.arange(100))):
        assert (other.kinds != whole.kinds).mean() > 0.3


@pytest.mark.parametrize(
    "text", ["", "augmix-m3", "rand-m9-x2", "rand-m", "rand-m9-m8", "rand-n1.5", "rand-p2", "rand-n0", "rand-tweights"]
)
def test_other_strings_are_refused(text):
    with pytest.raises(InputError):
        RandAugment.parse(text)


def random_images(count: int, height: int = 23, width: int = 37) -> np.ndarray:
    """Smooth colours with edges and noise, of differing ranges: uint8 (count, H, W, 3)."""
    draw = np.random.default_rng(4)
    y, x = np.mgrid[:height, :width]
    waves = np.sin(x[..., None] / draw.uniform(3, 9, (count, 1, 1, 3)) + y[..., None] / 5)
    level = draw.uniform(60, 180, (count, 1, 1, 3))
    result = level + draw.uniform(20, 90, (count, 1, 1, 1)) * waves + draw.normal(0, 4, waves.shape)
    result[:, 5:9, 3:20] = draw.uniform(0, 255, (count, 1, 1, 3))
    return result.clip(0, 255).astype(np.uint8)


ARGUMENTS = {
    "Posterize": [1, 2, 3, 4],
    "Solarize": [0, 100, 201, 256],
    "SolarizeAdd": [0, 30, 77, 110],
    "Color": [0.1, 0.6, 1.4, 1.9],
    "Contrast": [0.1, 0.6, 1.4, 1.9],
    "Brightness": [0.1, 0.6, 1.4, 1.9],
    "Sharpness": [0.1, 0.6, 1.4, 1.9],
    "Rotate": [-30, -7, 11, 27],
    "ShearX": [-0.3, -0.1, 0.2, 0.3],
    "ShearY": [-0.3, -0.1, 0.2, 0.3],
    "TranslateXRel": [-0.45, -0.1, 0.2, 0.4],
    "TranslateYRel": [-0.45, -0.1, 0.2, 0.4],
}


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in MOVES])
def test_colours_are_timms(name):
    sources = random_images(4)
    arguments = ARGUMENTS.get(name, [0, 0, 0, 0])
    pixels = torch.from_numpy(sources).permute(0, 3, 1, 2)
    changed = change_colour(name, pixels, torch.tensor(arguments, dtype=torch.float32))
    assert changed.dtype == torch.uint8
    for source, argument, found in zip(sources, arguments, changed, strict=True):
        given = () if name not in ARGUMENTS else (argument,)
        expected = np.asarray(timm_augment.NAME_TO_OP[name](Image.fromarray(source), *given))
        difference = np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected)
        # Contrast's grey and sharpness's smoothing are rounded before they are blended: a level more or less.
        assert difference.max() <= (2 if name in ("Contrast", "Sharpness", "AutoContrast") else 1)
        assert difference.mean() < 1


@pytest.mark.parametrize("name", list(MOVES))
def test_moves_are_timms(name):
    sources = random_images(4)
    arguments = ARGUMENTS[name]
    size = sources.shape[1:3]
    warps = torch.from_numpy(move_views(name, np.array(arguments, dtype=np.float64), size).astype(np.float32))
    moved = warp_images(torch.from_numpy(sources).permute(0, 3, 1, 2).float(), warps, fill=128)
    for source, argument, found in zip(sources, arguments, moved, strict=True):
        move = timm_augment.NAME_TO_OP[name]
        image = Image.fromarray(source)
        expected = np.asarray(move(image, argument, resample=Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)))
        difference = np.abs(found.permute(1, 2, 0).numpy() - expected).max(axis=-1)
        # PIL counts in 1/65536 of a pixel, so pixels on the very edge may fall to the other side of it.
        assert (difference > 1.5).mean() < 0.01
        assert np.median(difference) < 1


def test_each_image_gets_its_own_colours_in_its_own_order():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    bytes_BCHW = torch.from_numpy(random_images(4)).permute(0, 3, 1, 2)
    scale, shift = torch.tensor(std)[:, None, None], torch.tensor(mean)[:, None, None]
    images = (bytes_BCHW / 255 - shift) / scale
    number = OPERATIONS.index
    kinds = np.array(
        [[-1, -1], [number("Invert"), number("Posterize")], [number("Posterize"), number("Invert")], [4, 3]]
    )
    drawn = Operations(kinds, np.array([[0, 0], [0, 2.0], [2.0, 0], [3.0, 30]]))
    restored = (change_colours(images, drawn, mean, std) * scale + shift) * 255
    four, three = torch.tensor([2.0]), torch.tensor([3.0])
    expected = bytes_BCHW.clone()
    expected[1] = change_colour("Posterize", 255 - bytes_BCHW[1:2], four)[0]
    expected[2] = 255 - change_colour("Posterize", bytes_BCHW[2:3], four)[0]
    expected[3] = change_colour("Posterize", bytes_BCHW[3:], three)[0]
    torch.testing.assert_close(restored, expected.float(), atol=1e-3, rtol=0)
    assert torch.equal(change_colours(images, Operations(kinds[:1].repeat(4, 0), np.zeros((4, 2))), mean, std), images)
