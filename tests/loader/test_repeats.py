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

REPEATS = 3
EPOCHS = range(6, 9)  # shown together


def of_repeats(make):
    """What ``make`` gives for the epochs that are shown together, one after the other."""
    return np.concatenate([make(epoch) for epoch in EPOCHS])


def part_of(array, epoch):
    start = (epoch - EPOCHS.start) * SAMPLES
    return array[start : start + SAMPLES]


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
    for epoch in EPOCHS:
        for batch in load(**given).epoch(epoch, part_of(repeated_views, epoch), map_index=part_of(maps, epoch)):
            for place, sample in enumerate(batch.sample_ids.tolist()):
                plain[sample, epoch] = [
                    each[place] for each in (batch.images, batch.token_ids, batch.token_weights, batch.views)
                ]
    loader = load(**given, batch_size=6, repeats=REPEATS, workers=2)
    samples = []
    for epoch in EPOCHS:
        batches = list(loader.epoch(epoch, repeated_views, map_index=maps))
        assert len(batches) == len(loader) == len(load(**given, batch_size=6))
        for batch in batches:
            assert batch.epochs.tolist() == [*EPOCHS] * (len(batch) // REPEATS)
            for place, key in enumerate(zip(batch.sample_ids.tolist(), batch.epochs.tolist(), strict=True)):
                found = (batch.images, batch.token_ids, batch.token_weights, batch.views)
                for ours, theirs in zip(found, plain.pop(key), strict=True):
                    assert torch.equal(ours[place], theirs)
                assert batch.class_ids[place] == beton.class_ids[key[0]]
            samples += batch.sample_ids[::REPEATS].tolist()
    assert plain == {}
    assert samples == shuffled(3, EPOCHS.start, SAMPLES).tolist()


def test_an_epoch_of_one_crop_is_that_of_a_loader_without_repeats(load, repeated_views):
    views = part_of(repeated_views, 8)
    loader = load(batch_size=6, repeats=REPEATS)
    list(loader.epoch(7, repeated_views))
    pairs = zip(loader.epoch(8, views, repeats=1), load(batch_size=6).epoch(8, views), strict=True)
    for ours, theirs in pairs:
        for name in ("images", "sample_ids", "epochs", "views"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_processes_share_images_and_an_epoch_goes_on_in_the_middle(load, repeated_views):
    def ids(epoch, start_batch=0, **settings):
        loader = load(batch_size=6, repeats=REPEATS, **settings)
        return [batch.sample_ids.tolist() for batch in loader.epoch(epoch, repeated_views, start_batch=start_batch)]

    for epoch in EPOCHS:
        whole = ids(epoch)
        assert ids(epoch, start_batch=2) == whole[2:]
        ranks = [ids(epoch, world=World(rank, 2)) for rank in range(2)]
        assert {len(each) for each in ranks} == {2}
        for number, pair in enumerate(zip(*ranks, strict=True)):
            together = whole[2 * number] + (whole[2 * number + 1] if 2 * number + 1 < len(whole) else [])
            assert sorted([*pair[0], *pair[1]]) == sorted(together)


def test_images_that_are_not_packed(load, repeated_views, tars):  # noqa: F811
    unpacked = open_unpacked(tars)
    views = of_repeats(lambda epoch: random_views(unpacked, epoch))
    size = ImageSettings((20, 28), (0, 0, 0), (1, 1, 1))
    plain = {}
    for epoch in EPOCHS:
        for batch in StreamLoader(unpacked, size, 5).epoch(epoch, part_of(views, epoch)):
            plain |= {
                (sample, epoch): image for sample, image in zip(batch.sample_ids.tolist(), batch.images, strict=True)
            }
    loader = StreamLoader(unpacked, size, 6, repeats=REPEATS)
    for epoch in EPOCHS:
        for batch in loader.epoch(epoch, views):
            for place, key in enumerate(zip(batch.sample_ids.tolist(), batch.epochs.tolist(), strict=True)):
                assert torch.equal(batch.images[place], plain.pop(key))
    assert plain == {}


def test_what_does_not_fit(load, views):
    with pytest.raises(InputError, match="repeats must divide the batch size, 5; got 2"):
        load(repeats=2)
    with pytest.raises(InputError, match=r"\(46, 6\); got \(23, 6\)"):
        load(batch_size=6, repeats=2).epoch(0, views)
    with pytest.raises(InputError, match="an epoch has the 3 repeats of its loader, or 1; got 2"):
        load(batch_size=6, repeats=3).epoch(0, views, repeats=2)
    with pytest.raises(InputError, match="23 images .* 6 batches of up to 4 with 4 crops of an image"):
        load(batch_size=4, repeats=4)
