"""How many images per second the loader gives with token targets, against the same loader without.

    python tests/benchmarks/loader_speed.py IMAGES [--labels SET] [--workers 2] [--rounds 7]
    python tests/benchmarks/loader_speed.py IMAGES --repeats

IMAGES is anything that `stl-offline pack` takes, SET a label set of them. Beside it stand random labels of 1,000
classes, k = 5: neighbouring cells of a real map share classes, theirs do not, so they are the most work that a map of
that size can be. Rounds alternate, so that a machine that is busy with other things slows both sides; the table gives
medians of the rounds' ratios, with the smallest and the largest.
"""

import argparse
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from stl_offline.geometry import CropSettings, draw_views
from stl_offline.images.pack import ensure_beton
from stl_offline.labels.cache import build_token_cache
from stl_offline.labels.draws import pack_draws
from stl_offline.labels.label_set import open_label_set
from stl_offline.loader import ImageSettings, TokenLabels, TokenLoader
from stl_offline.targets import TokenTargets

CLASSES, STORED, STUDENT_GRID = 1000, 5, (14, 14)


def random_draws(samples: int, side: int, draws: int):
    """What a token cache of (side × side) maps with drawn classes alone holds, in memory."""
    drawn = np.random.default_rng(0).integers(0, CLASSES, (samples, side, side, draws)).astype(np.uint16)
    shape = (samples, 1, side, side, 0)
    return SimpleNamespace(
        class_ids=np.empty(shape, np.uint16),
        probabilities=np.empty(shape, np.float32),
        confidence=None,
        views=np.tile(np.array([1, 0, 0, 0, 1, 0], dtype=np.float32), (samples, 1, 1)),
        labelled=np.ones(samples, dtype=np.uint8),
        draws=pack_draws(drawn, CLASSES)[:, None],
        num_classes=CLASSES,
        grid=(side, side),
        top_k=0,
        spec=SimpleNamespace(has_confidence=False, draws=draws),
    )


def random_cache(samples: int, side: int):
    """What a token cache of (side × side) maps holds, in memory."""
    draw = np.random.default_rng(0)
    shape = (samples, 1, side, side, STORED)
    probabilities = -np.sort(-draw.dirichlet(np.full(STORED + 5, 0.3), size=shape[:-1])[..., :STORED], axis=-1)
    # No class twice in a cell: steps from one to the next are at least one, and never go around.
    steps = draw.integers(1, CLASSES // STORED, shape)
    class_ids = (draw.integers(0, CLASSES, (*shape[:-1], 1)) + steps.cumsum(axis=-1)) % CLASSES
    return SimpleNamespace(
        class_ids=class_ids.astype(np.uint16),
        probabilities=probabilities.astype(np.float32),
        confidence=probabilities[..., 0].astype(np.float32),
        views=np.tile(np.array([1, 0, 0, 0, 1, 0], dtype=np.float32), (samples, 1, 1)),
        labelled=np.ones(samples, dtype=np.uint8),
        draws=None,
        num_classes=CLASSES,
        spec=SimpleNamespace(has_confidence=True, draws=0),
    )


def run_epoch(loader: TokenLoader, beton, epoch: int, passes: int) -> tuple[float, float]:
    """Seconds of the clock and of the processor for one epoch of random crops, each image ``passes`` times in it."""
    settings = CropSettings(scale=(0.25, 1.0))
    views = draw_views(0, epoch, np.arange(len(beton)), beton.heights, beton.widths, settings)
    draw = np.random.default_rng(epoch)
    order = np.concatenate([draw.permutation(len(beton)) for _ in range(passes)])
    clock, processor = time.perf_counter(), time.process_time()
    count = sum(len(batch) for batch in loader.epoch(epoch, views, sample_ids=order))
    assert count == len(order)
    return time.perf_counter() - clock, time.process_time() - processor


def time_repeats(beton, arguments: argparse.Namespace) -> None:
    """Crops per second with several crops of each decode, against one; no targets. A round decodes every image once."""
    loaders, rates = {}, {}
    for repeats in (1, 2, 4, 8):
        size = arguments.batch_size // repeats * repeats
        loaders[repeats] = TokenLoader(
            beton, ImageSettings((224, 224)), size, workers=arguments.workers, repeats=repeats
        )
        rates[repeats] = []
    settings = CropSettings(scale=(0.25, 1.0))
    for round_ in range(arguments.rounds + 1):
        for repeats, loader in loaders.items():
            samples, epochs = np.arange(len(beton)), range(round_ * repeats, (round_ + 1) * repeats)
            views = np.concatenate(
                [draw_views(0, epoch, samples, beton.heights, beton.widths, settings) for epoch in epochs]
            )
            started = time.perf_counter(), time.process_time()
            crops = sum(len(batch) for epoch in epochs for batch in loader.epoch(epoch, views))
            seconds = time.perf_counter() - started[0], time.process_time() - started[1]
            if round_:  # the first compiles, and compares each image with its hash
                rates[repeats].append([crops / each for each in seconds])
    base = np.median(rates[1], axis=0)
    print("| crops per image | crops per second | of one crop's | per processor second | of one crop's |")
    print("|---|---|---|---|---|")
    for repeats, found in rates.items():
        clock, processor = np.median(found, axis=0)
        print(f"| {repeats} | {clock:.0f} | {clock / base[0]:.2f} | {processor:.0f} | {processor / base[1]:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--labels", help="a label set of the images")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--passes", type=int, default=4, help="over the images, in each timed epoch")
    parser.add_argument("--repeats", action="store_true", help="several crops of one decode, and nothing else")
    arguments = parser.parse_args()
    beton = ensure_beton(str(arguments.images))
    if arguments.repeats:
        return time_repeats(beton, arguments)

    def make(labels=None):
        settings = ImageSettings((224, 224))
        return TokenLoader(beton, settings, arguments.batch_size, labels=labels, workers=arguments.workers)

    plain = make()
    caches = {f"random, {side}×{side}": random_cache(len(beton), side) for side in (14, 28)}
    caches |= {f"{draws} draws, 14×14": random_draws(len(beton), 14, draws) for draws in (1, 16)}
    if arguments.labels:
        labels = open_label_set(arguments.labels)
        name = "real, {}×{}".format(*labels.spec.grid)
        # The images may be of some of the classes only: that makes no difference here.
        caches[name] = build_token_cache(labels, beton.keys, beton.content_hashes, labels.spec.class_names)
    others = {
        (kind, name): make(TokenLabels(TokenTargets(kind, STUDENT_GRID, m=5), cache))
        for name, cache in caches.items()
        for kind in ("gumbel", "soft")
    }
    for loader in (plain, *others.values()):
        run_epoch(loader, beton, 0, 1)
    rates, ratios = [], {name: [] for name in others}
    for round_ in range(arguments.rounds):
        for name, loader in others.items():
            # Which side goes first alternates too.
            order = (plain, loader) if round_ % 2 else (loader, plain)
            times = {id(side): run_epoch(side, beton, round_, arguments.passes) for side in order}
            without, with_labels = times[id(plain)], times[id(loader)]
            rates.append(arguments.passes * len(beton) / without[0])
            ratios[name].append((without[0] / with_labels[0], without[1] / with_labels[1]))
    print(f"without targets: {np.median(rates):.0f} images per second, {arguments.workers} workers")
    print("| targets | maps | images per second, of without | by processor time |")
    print("|---|---|---|---|")
    for (kind, name), pairs in ratios.items():
        clock, processor = np.transpose(pairs)
        scatter = f"{np.median(clock):.1%} ({clock.min():.1%} to {clock.max():.1%})"
        print(f"| {kind} | {name} | {scatter} | {np.median(processor):.1%} |")


if __name__ == "__main__":
    main()
