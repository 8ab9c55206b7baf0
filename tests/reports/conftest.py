"""Labels of small images, runs made of numbers, and a browser."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from stl_offline.images.encode import content_hash
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.writer import LabelSetWriter
from tests.labels.synthetic import make_arrays, make_spec
from tests.reports.browser import Browser, find_chromium

SAMPLES = 18
# Names that a page must not take for markup.
CLASS_NAMES = ("disc", "<b>ring</b>", "heart & star", "a $name^ that is long", "cross", "drop", "</script>")


def key_of(number: int) -> str:
    return f"{CLASS_NAMES[number % len(CLASS_NAMES)].replace('/', '-')}/image {number:02d}"


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A tree of 18 images of 7 classes, each of another size, H ≠ W."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(SAMPLES):
        draw = np.random.default_rng(number)
        height, width = 40 + 3 * (number % 4), 61 + 5 * (number % 3)
        y, x = np.mgrid[:height, :width]
        waves = np.stack([np.sin(x / draw.uniform(4, 9) + y / draw.uniform(4, 9)) for _ in range(3)], axis=-1)
        path = folder / f"{key_of(number)}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((127 + 90 * waves).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session")
def make_labels(images, tmp_path_factory):
    """make_labels(**settings) → the folder of a label set of these images, in six shards."""

    def make(maps=1, shards=6, **settings):
        paths = sorted(images.rglob("*.png"))
        names = tuple(sorted({path.parent.name for path in paths}))
        spec = make_spec(len(paths), classes=len(names), view_count=maps, class_names=names, **settings)
        folder = tmp_path_factory.mktemp("labels") / "set"
        with LabelSetWriter(folder, spec, shards) as writer:
            for shard in writer.todo():
                mine = slice(*writer.shard_range(shard))
                arrays = make_arrays(spec, mine.start, mine.stop)
                arrays = dataclasses.replace(
                    arrays,
                    keys=[str(path.relative_to(images)) for path in paths[mine]],
                    content_hash=np.array([content_hash(path.read_bytes()) for path in paths[mine]], dtype=np.uint64),
                    class_id=np.array([names.index(path.parent.name) for path in paths[mine]], dtype=np.uint32),
                )
                writer.write_shard(shard, arrays)
            writer.finish()
        return folder

    return make


@pytest.fixture(scope="session")
def labels(make_labels):
    """A label set of whole images."""
    return make_labels()


@pytest.fixture(scope="session")
def label_set(labels):
    return open_label_set(labels)


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, epochs=3, done=True, **settings) → the folder of a run, with a log but without weights."""

    def make(name, epochs=3, done=True, data=None, stage="student", **settings):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = {
            "stage": stage,
            "settings": {"epochs": 3, "lr": 0.001, "model": "fan_micro_4_p8", "token_weight": 1.0} | settings,
            "data": {"labels": {"kind": "none"}, "train": {"samples": 20}, "class_names": ["a", "b"]} | (data or {}),
            "versions": {"torch": "2.9"},
        }
        (folder / "config.json").write_text(json.dumps(config))
        entries = [
            {
                "epoch": epoch,
                "loss": 3.0 - 0.5 * epoch,
                "lr": 0.001 / epoch,
                "top1": 0.2 * epoch,
                "images_per_second": 10.0 * epoch,
                "seconds": 12.0 / epoch,
                "data_wait_seconds": 0.3,
            }
            for epoch in range(1, epochs + 1)
        ]
        (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        if done:
            summary = {"epochs": epochs, "loss": 1.5, "top1": 0.6, "train_seconds": 22.0}
            (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    return make


@pytest.fixture(scope="session")
def browser():
    """A Chromium; tests that need one are skipped where there is none."""
    command = find_chromium()
    if command is None:
        pytest.skip("no Chromium here; on Debian: apt-get install chromium")
    with Browser(command) as started:
        yield started
