"""Several crops of one decode: each is, bit for bit, what a loader without repeats gives of its own epoch."""

import numpy as np
import pytest
import torch

from stl_offline.distributed import World
from stl_offline.errors import InputError
from stl_offline.images.unpacked import open_unpacked
from stl_offline.loader import ImageSettings, StreamLoader, shuffled
from stl_offline.targets import TokenTargets
from tests.loader.conftest import SAMPLES, random_views
from tests.loader.test_stream import tars  # noqa: F401

REPEATS, EPOCH = 3, 2


def of_repeats(make):
    """What ``make`` gives for the epochs that the crops of one epoch stand for, one after the other."""
    return np.concatenate([make(EPOCH * REPEATS + number) for number in range(REPEATS)])


@pytest.fixture
def repeated_views(beton):
    return of_repeats(lambda epoch: random_views(beton, epoch))


# Whole decodes, planes at one scale for all crops, and at several: the images have 24 to 52 rows.
@pytest.mark.parametrize("size", [(20, 28), (9, 11), (4, 5)])
@pytest.mark.parametrize("kind", ["gumbel", "soft"])
def test_each_crop_is_that_of_its_own_epoch(beton, load, make_labels, repeated_views, size, kind):
    _, cache = make_labels(grid=(4, 6), maps=2)
    given = {"tokens": TokenTargets(kind, (2, 3), m=3), "cache": cache, "image_size": size}
    maps = of_repeats(lambda epoch: (np.arange(SAMPLES) + epoch) % 2)
    plain = {}
    for number in range(REPEATS):
        part = slice(number * SAMPLES, (number + 1) * SAMPLES)
        batches = load(**given).epoch(EPOCH * REPEATS + number, repeated_views[part], map_index=maps[part])
        for batch in batches:
            for place, sample in enumerate(batch.sample_ids.tolist()):
                plain[sample, number] = [
                    each[place] for each in (batch.images, batch.token_ids, batch.token_weights, batch.views)
                ]
    loader = load(**given, batch_size=6, repeats=REPEATS, workers=2)
    samples = []
    for batch in loader.epoch(EPOCH, repeated_views, map_index=maps):
        for place, sample in enumerate(batch.sample_ids.tolist()):
            found = (batch.images, batch.token_ids, batch.token_weights, batch.views)
            for ours, theirs in zip(found, plain.pop((sample, place % REPEATS)), strict=True):
                assert torch.equal(ours[place], theirs)
            assert batch.class_ids[place] == beton.class_ids[sample]
        samples += batch.sample_ids[::REPEATS].tolist()
    assert plain == {}
    assert samples == shuffled(3, EPOCH, SAMPLES).tolist()
    assert len(loader) == 12


def test_processes_share_images_and_an_epoch_goes_on_in_the_middle(load, repeated_views):
    def ids(**settings):
        start = settings.pop("start_batch", 0)
        loader = load(batch_size=6, repeats=REPEATS, **settings)
        return [batch.sample_ids.tolist() for batch in loader.epoch(EPOCH, repeated_views, start_batch=start)]

    whole = ids()
    assert ids(start_batch=5) == whole[5:]
    ranks = [ids(world=World(rank, 2)) for rank in range(2)]
    for number, pair in enumerate(zip(*ranks, strict=True)):
        together = whole[2 * number] + (whole[2 * number + 1] if 2 * number + 1 < len(whole) else [])
        assert sorted([*pair[0], *pair[1]]) == sorted(together)


def test_images_that_are_not_packed(load, repeated_views, tars):  # noqa: F811
    unpacked = open_unpacked(tars)
    views = of_repeats(lambda epoch: random_views(unpacked, epoch))
    size = ImageSettings((20, 28), (0, 0, 0), (1, 1, 1))
    plain = {}
    for number in range(REPEATS):
        part = views[number * SAMPLES : (number + 1) * SAMPLES]
        for batch in StreamLoader(unpacked, size, 5).epoch(0, part):
            plain |= {
                (sample, number): image for sample, image in zip(batch.sample_ids.tolist(), batch.images, strict=True)
            }
    for batch in StreamLoader(unpacked, size, 6, repeats=REPEATS).epoch(0, views):
        for place, sample in enumerate(batch.sample_ids.tolist()):
            assert torch.equal(batch.images[place], plain.pop((sample, place % REPEATS)))
    assert plain == {}


def test_what_does_not_fit(load, views):
    with pytest.raises(InputError, match="repeats must divide the batch size, 5; got 2"):
        load(repeats=2)
    with pytest.raises(InputError, match=r"\(46, 6\); got \(23, 6\)"):
        load(batch_size=6, repeats=2).epoch(0, views)
