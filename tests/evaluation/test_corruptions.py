"""Generated corruptions: those of the package, the same pixels whatever ran before, and nothing left behind."""

import imagecorruptions
import numpy as np
import pytest

from stl_offline.errors import InputError, MissingExtraError
from stl_offline.evaluation import corruptions
from stl_offline.evaluation.corruptions import GROUPS, corrupt, parse_corruptions

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", GROUPS["all"])
def test_a_pure_function_of_its_arguments(kind):
    np.random.seed(1)
    state = np.random.get_state()[1].copy()
    first = corrupt(IMAGE, kind, 4, seed=3, key="a/b.jpg")
    assert (np.random.get_state()[1] == state).all()
    np.random.seed(2)
    assert first.dtype == np.uint8 and first.shape == IMAGE.shape and first.flags.c_contiguous
    assert (first == corrupt(IMAGE, kind, 4, seed=3, key="a/b.jpg")).all()
    assert (first != IMAGE).any()
    assert (first != corrupt(IMAGE, kind, 1, seed=3, key="a/b.jpg")).any()


@pytest.mark.parametrize("kind", ["gaussian_noise", "impulse_noise", "glass_blur", "snow", "spatter"])
def test_draws_differ_between_images_and_seeds(kind):
    first = corrupt(IMAGE, kind, 3, seed=3, key="a")
    assert (first != corrupt(IMAGE, kind, 3, seed=3, key="b")).any()
    assert (first != corrupt(IMAGE, kind, 3, seed=4, key="a")).any()


@pytest.mark.parametrize("kind", ["contrast", "pixelate", "jpeg_compression", "defocus_blur", "brightness"])
def test_without_draws_it_is_the_package(kind):
    assert (corrupt(IMAGE, kind, 5, seed=0, key="x") == imagecorruptions.corrupt(IMAGE, 5, kind)).all()


def test_spatter_without_a_drop_leaves_the_image():
    """On small images it divides 0 by 0 for some draws, and casts the result to bytes."""
    image = np.full((32, 32, 3), 127, np.uint8)
    unchanged = [(corrupt(image, "spatter", 1, seed=0, key=str(number)) == image).all() for number in range(400)]
    assert 0 < sum(unchanged) < 40


def test_what_may_be_asked_for():
    assert len(parse_corruptions("all")) == 95
    assert len(parse_corruptions("benchmark")) == 75
    assert parse_corruptions("fog:2-3, noise:5,fog:3") == [
        ("fog", 2),
        ("fog", 3),
        ("gaussian_noise", 5),
        ("shot_noise", 5),
        ("impulse_noise", 5),
    ]


@pytest.mark.parametrize("text", ["rain", "", "fog:", "fog:0", "fog:6", "fog:3-2", "fog:1-9", "fog:x"])
def test_what_may_not(text):
    if text == "fog:":
        assert len(parse_corruptions(text)) == 5
        return
    with pytest.raises(InputError):
        parse_corruptions(text)


def test_without_the_package(monkeypatch):
    corruptions._package.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'stl-offline\[corrupt\]'"):
        corruptions.check_corruptions_can_run()


def test_small_images_are_refused():
    with pytest.raises(InputError, match=r"at least 32 pixels a side, got 31 × 64"):
        corrupt(IMAGE[:31], "fog", 1, seed=0, key="x")
