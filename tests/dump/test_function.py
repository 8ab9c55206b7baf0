"""Label sets from any function of images."""

import hashlib
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stl_offline.config import DumpConfig
from stl_offline.device import Readback
from stl_offline.dump import drawing, label_with
from stl_offline.errors import InputError
from stl_offline.labels.label_set import open_label_set
from tests.training.conftest import write_stripes
from tests.training.test_waiting import OnDevice, found

GRID, SIDE = (3, 4), 24
# Of the images' three classes, and one more.
NAMES = ("vertical", "diagonal", "sky", "horizontal")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_stripes(tmp_path_factory.mktemp("images") / "train", 3, 5)


def segments(images):
    """Per-pixel classes averaged over the cells of tokens: here a class for each colour, and the brightness."""
    pixels = torch.cat([images, images.mean(dim=1, keepdim=True)], dim=1)
    return F.adaptive_avg_pool2d(pixels.softmax(dim=1), GRID).log().flatten(2).transpose(1, 2)


def settings(images, out, **options):
    given = {"labeler": "colours", "img_size": SIDE, "top_k": 4, "workers": 1, "device": "cpu"}
    return DumpConfig(**{"data": str(images), "out": str(out)} | given | options)


def test_what_a_function_gives_is_what_is_stored(images, tmp_path):
    seen = []

    def noted(batch):
        # A function may keep what it likes between two calls.
        assert threading.current_thread() is threading.main_thread()
        seen.append(batch.clone())
        return segments(batch)

    report = label_with(noted, settings(images, tmp_path / "set"), class_names=NAMES, grid=GRID, weights="v1")
    assert report.labelled == 9
    labels = open_label_set(tmp_path / "set")
    spec = labels.spec
    assert (spec.class_names, spec.grid, spec.labeler["architecture"]) == (NAMES, GRID, "colours")
    assert spec.labeler["weights_sha256"] == hashlib.sha256(b"v1").hexdigest()
    expected = segments(torch.cat(seen)).exp().numpy().reshape(9, *GRID, 4)
    found = np.stack([labels[key].dense()[0] for key in labels])
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert {label_map.class_id for label_map in labels.values()} == {0, 1, 3}
    assert (
        label_with(segments, settings(images, tmp_path / "set"), class_names=NAMES, grid=GRID, weights="v1").labelled
        == 0
    )


def test_what_does_not_fit(images, tmp_path):
    out = tmp_path / "set"
    with pytest.raises(InputError, match="gives .*12, 4.*expected .*B, N, K.*9, 12, 3.* 3 class names"):
        label_with(
            segments, settings(images, out, top_k=2), class_names=("vertical", "diagonal", "horizontal"), grid=GRID
        )
    with pytest.raises(InputError, match="give `img_size`"):
        label_with(segments, settings(images, out, img_size=0), class_names=NAMES, grid=GRID)
    with pytest.raises(InputError, match="`labeler_classes` does nothing"):
        label_with(segments, settings(images, out, labeler_classes="names.txt"), class_names=NAMES, grid=GRID)
    with pytest.raises(InputError, match="need a function that gives class logits"):
        label_with(segments, settings(images, out, class_top_k=2), class_names=NAMES, grid=GRID)


@pytest.mark.parametrize(
    "kind", [{}, {"top_k": 0, "draws": 2, "confidence": False}, {"top_k": 2, "class_top_k": 2, "draws": 1}]
)
def test_a_batch_is_read_once_the_next_is_started(images, tmp_path, monkeypatch, kind):
    """So that a GPU has work while the host waits for labels, and for nothing else (`tests.training.test_waiting`)."""
    events = []
    found.clear()
    read = Readback.array

    def array(self):
        if events[-1] != "read":
            events.append("read")
        return read(self)

    def noted(batch):
        events.append("label")
        logits = segments(batch).as_subclass(OnDevice)
        return logits.mean(dim=1), logits

    def draw_as_on_a_gpu(flat, key, drawn):
        for draw, rows, scores in drawing._noisy(flat, key, drawn):
            drawn.view(-1, drawn.shape[-1])[rows, draw] = scores.argmax(dim=-1)

    monkeypatch.setattr(Readback, "array", array)
    monkeypatch.setattr(drawing, "_draw_quickly", draw_as_on_a_gpu)
    config = settings(images, tmp_path / "set", batch_size=4, shards=1, **kind)
    label_with(noted, config, class_names=NAMES, grid=GRID)
    assert found == []
    # A function that gives class logits is called once before the job.
    assert events[-5:] == ["label", "label", "read", "label", "read"]
