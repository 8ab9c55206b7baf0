"""Images with their coordinates painted in, labels that name the place: after every move both still agree.

Red is u, green is v, blue is full, and each cell of a label map has a class of its own. So the mean of a token's pixels
says where in the image it came from, and so do its classes; where there is no blue, nothing was shown.
"""

import io
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from stl_offline.augment import Augmentation, RandAugment, warp_images
from stl_offline.augment.policy import MOVES
from stl_offline.augment.warp import move_views, visible_share
from stl_offline.errors import InputError
from stl_offline.geometry import CropSettings, draw_views, whole_views
from stl_offline.images.beton import BetonWriter, open_beton
from stl_offline.images.encode import encode_image
from stl_offline.targets import TokenTargets
from tests.labels.synthetic import make_spec

SAMPLES, SIZE, GRID = 12, (48, 72), (8, 12)
MAP_GRID = (16, 20)
CELL = np.array([1 / MAP_GRID[1], 1 / MAP_GRID[0]])
RATIO = 4


def painted(height: int, width: int) -> bytes:
    u = (np.arange(width) + 0.5) / width * 255
    v = (np.arange(height) + 0.5) / height * 255
    image = np.stack([*np.meshgrid(u, v), np.full((height, width), 255.0)], axis=-1)
    stream = io.BytesIO()
    Image.fromarray(image.round().astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def coordinates(tmp_path_factory):
    """A .beton of packed of several shapes with their coordinates painted in."""
    path = tmp_path_factory.mktemp("painted") / "painted.beton"
    with open(path, "wb") as stream:
        writer = BetonWriter(stream, SAMPLES)
        for number in range(SAMPLES):
            writer.add(f"painted {number}", 0, encode_image(painted(150 + 20 * (number % 3), 260 - 30 * (number % 4))))
        writer.finish(("painted",), {"kind": "test"})
    return open_beton(path)


@dataclass
class Places:
    """A token cache whose class ids are the map's cells, made under ``views`` (n, 6)."""

    map_views: np.ndarray
    num_classes: int = MAP_GRID[0] * MAP_GRID[1]

    def __post_init__(self):
        shape = (len(self.map_views), 1, *MAP_GRID, 1)
        cells = np.arange(self.num_classes, dtype=np.uint16).reshape(1, 1, *MAP_GRID, 1)
        self.class_ids = np.ascontiguousarray(np.broadcast_to(cells, shape))
        self.probabilities = np.ones(shape, dtype=np.float32)
        self.confidence = np.ones(shape[:-1], dtype=np.float32)
        self.views = self.map_views[:, None].astype(np.float32)
        self.labelled = np.ones(len(self.map_views), dtype=np.uint8)
        self.spec, self.draws = make_spec(grid=MAP_GRID, top_k=1), None

    def read(self, samples, ids, weights):
        """Where the labels say that tokens come from: (B, N, 2) in the image, and their weight (B, N)."""
        total = weights.sum(-1)
        row, column = np.divmod(np.maximum(ids, 0), MAP_GRID[1])
        at = [((part + 0.5) / cells * weights).sum(-1) for part, cells in ((column, MAP_GRID[1]), (row, MAP_GRID[0]))]
        points = np.stack([*at, total], axis=-1) / np.maximum(total, 1e-9)[..., None]
        return np.einsum("bnk,bjk->bnj", points, self.map_views[samples].reshape(-1, 2, 3)), total


def compare(load, packed, crops, warps, cache, kind="soft"):
    """Every sample's tokens by their pixels and by their labels; gives back the weights (n, N) by sample."""
    loader = load(packed, SIZE, 5, tokens=TokenTargets(kind, GRID, m=64, sampling_ratio=RATIO), cache=cache)
    cell = (SIZE[0] // GRID[0], SIZE[1] // GRID[1])
    shares = np.zeros((len(packed), GRID[0] * GRID[1]))
    compared = 0
    for batch in loader.epoch(0, crops, warps=warps):
        samples = batch.sample_ids.numpy()
        images = warp_images(batch.images, batch.warps)
        seen = images[:, 2] > 0.5
        shown = F.avg_pool2d(torch.cat([images[:, :2] * seen[:, None], seen[:, None].float()], 1), cell)
        shown = shown.flatten(2).permute(0, 2, 1).numpy()
        by_label, weights = cache.read(samples, batch.token_ids.numpy(), batch.token_weights.numpy())
        shares[samples] = weights
        # Of tokens that are partly off, pixels and sample points differ in what they average.
        whole = shown[..., 2] > 0.999
        if kind == "soft":
            np.testing.assert_allclose(weights[whole], 1, atol=1e-5)
            assert np.abs(weights - shown[..., 2]).max() < 0.5
            assert np.abs(weights - shown[..., 2]).mean() < 0.04
            assert (weights[shown[..., 2] == 0] <= 1 / RATIO).all()
        whole &= weights > 0.999
        apart = np.abs(by_label - shown[..., :2])[whole]
        pixel = np.abs(crops[samples][:, [0, 4]]) / np.array(SIZE[::-1])
        allowed = 1.5 * pixel.max(axis=0) + 1 / 255
        extent = np.abs(cache.map_views[samples][:, [0, 4]]).max(axis=0)
        if kind == "gumbel":
            # One cell is drawn: at most half a token (turned by any angle), half a cell and its neighbour away.
            assert (apart <= allowed + 1.5 * CELL * extent + 0.75 / np.array(GRID[::-1])).all()
        else:
            # Bilinear reading is exact within, and clamped within half a cell of the map's border.
            assert (apart <= allowed + 0.5 * CELL * extent).all()
            assert np.median(apart, axis=0).max() < allowed.max()
        compared += whole.sum()
    assert compared > 100
    return shares


def crops_of(packed, epoch=0, **settings):
    return draw_views(
        2, epoch, np.arange(len(packed)), packed.heights, packed.widths, CropSettings(scale=(0.4, 1), **settings)
    )


@pytest.mark.parametrize("name", list(MOVES))
@pytest.mark.parametrize("sign", [-1, 1])
def test_each_move_takes_its_labels_along(load, coordinates, name, sign):
    arguments = sign * MOVES[name] * np.linspace(0.2, 1, SAMPLES)
    warps = move_views(name, arguments, SIZE).astype(np.float32)
    shares = compare(load, coordinates, crops_of(coordinates), warps, Places(whole_views(SAMPLES)))
    assert (shares[-1] < 0.5).any()


@pytest.mark.parametrize("kind", ["soft", "gumbel"])
@pytest.mark.parametrize("text", ["rand-m9-mstd0.5-inc1", "rand-m10-n4-p1"])
def test_drawn_moves_of_crops_and_flips_take_their_labels_along(load, coordinates, text, kind):
    augmentation = Augmentation(RandAugment.parse(text), 0.0, None, (0,) * 3, (1,) * 3, SIZE, seed=8)
    warps = augmentation.warps(4, SAMPLES)
    assert (warps != [1, 0, 0, 0, 1, 0]).any()
    compare(load, coordinates, crops_of(coordinates, flip=0.5), warps, Places(whole_views(SAMPLES)), kind)


def test_labels_of_replayed_crops_move_along(load, coordinates):
    crops = crops_of(coordinates, 5)
    warps = Augmentation(RandAugment.parse("rand-m9-n3-p1"), 0.0, None, (0,) * 3, (1,) * 3, SIZE, 1).warps(0, SAMPLES)
    compare(load, coordinates, crops, warps, Places(crops))


def test_maps_of_larger_crops_say_nothing_of_what_was_not_decoded(load, coordinates):
    """A whole image's map has labels beyond the crop; its pixels are not there, so its labels are not either."""
    small = np.tile(np.array([0.5, 0, 0.25, 0, 0.5, 0.25], dtype=np.float32), (SAMPLES, 1))
    moved = move_views("TranslateXRel", np.full(SAMPLES, 0.375), SIZE).astype(np.float32)
    shares = compare(load, coordinates, small, moved, Places(whole_views(SAMPLES))).reshape(SAMPLES, *GRID)
    shown = np.arange(GRID[1]) < GRID[1] * (1 - 0.375)
    np.testing.assert_allclose(shares[:, :, :7], 1, atol=1e-5)
    np.testing.assert_array_equal(shares[:, :, 8:], 0)
    np.testing.assert_allclose(shares[:, :, 7], 0.5, atol=1e-5)
    assert shown.sum() == 8
    shares = visible_share(torch.from_numpy(moved), GRID, RATIO).view(SAMPLES, *GRID)
    np.testing.assert_allclose(shares[:, :, 6:9], np.broadcast_to([1, 0.5, 0], (SAMPLES, GRID[0], 3)), atol=1e-6)


def test_no_move_changes_nothing(load, coordinates):
    crops, cache = crops_of(coordinates), Places(whole_views(SAMPLES))
    targets = TokenTargets("gumbel", GRID)
    plain = list(load(coordinates, SIZE, 5, tokens=targets, cache=cache).epoch(3, crops))
    still = list(load(coordinates, SIZE, 5, tokens=targets, cache=cache).epoch(3, crops, warps=whole_views(SAMPLES)))
    for a, b in zip(plain, still, strict=True):
        assert torch.equal(a.token_ids, b.token_ids)
        assert torch.equal(a.views, b.views)
        assert a.warps is None
        assert b.epochs.tolist() == [3] * len(b)
        assert warp_images(b.images, b.warps) is b.images


def test_warps_that_cannot_be(load, coordinates):
    loader = load(coordinates, SIZE, 5)
    for warps in (np.zeros((SAMPLES - 1, 6)), np.full((SAMPLES, 6), np.nan)):
        with pytest.raises(InputError, match="warps"):
            loader.epoch(0, crops_of(coordinates), warps=warps)
