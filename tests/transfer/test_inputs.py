"""What a step of fine-tuning learns from: where crops lie, what is around them, colours of each epoch, the losses."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools.mask import area
from torchvision.transforms.v2.functional import horizontal_flip
from torchvision.tv_tensors import BoundingBoxes

from stl_offline.config_transfer import SegmentConfig
from stl_offline.transfer import detect, detect_scores, segment
from stl_offline.transfer.boxes import open_boxes
from stl_offline.transfer.crops import DenseCrops
from stl_offline.transfer.pairs import NO_CLASS
from tests.transfer.conftest import CLASSES, IGNORE
from tests.transfer.test_detect import boxed  # noqa: F401


def test_crops_lie_anywhere_in_both_directions():
    """The place is uniform: as often at one end as at the other, and of one direction it tells nothing of the other."""
    crops = DenseCrops((32, 48), scale=(1.0, 1.0), flip=0.0)
    views = crops.draw(5, 0, np.tile([100.0, 90.0], (2000, 1)))
    left, top = views[:, 2] / (1 - 48 / 90), views[:, 5] / (1 - 32 / 100)
    for place in (left, top):
        shares = np.histogram(place, bins=5, range=(0, 1))[0] / len(place)
        assert shares.sum() == pytest.approx(1) and abs(shares - 0.2).max() < 0.04
    assert abs(np.corrcoef(left, top)[0, 1]) < 0.1
    assert not np.array_equal(views, crops.draw(5, 1, np.tile([100.0, 90.0], (2000, 1))))


def test_around_an_image_lies_the_mean_colour_and_colours_change_with_the_epoch(scenes, tmp_path, monkeypatch):
    """Images at half their size in crops of twice their sides: three quarters and more of a crop lie outside."""
    seen, original = [], segment.SegmentObjective.inputs

    def inputs(self, batch, random):
        found = original(self, batch, random)
        again = self.augmentation(batch.images, None, batch.epoch, batch.sample_ids.numpy())
        seen.append((batch, found, again))
        return found

    monkeypatch.setattr(segment.SegmentObjective, "inputs", inputs)
    settings = {"data": str(scenes[0]), "classes": ",".join(CLASSES), "ignore_id": IGNORE, "out": str(tmp_path / "run")}
    settings |= {"crop_height": 64, "crop_width": 64, "scale_min": 0.5, "scale_max": 0.5, "head_width": 8}
    machine = {"backbone": "timm:fan_micro_4_p8", "epochs": 2, "workers": 1, "device": "cpu", "amp": "none"}
    segment.train_segmenter(SegmentConfig(**settings, **machine, batch_size=5))
    assert [batch.epoch for batch, _, _ in seen] == [0, 0, 1, 1]
    for batch, found, again in seen:
        assert torch.equal(found.images, again) and found.masks is batch.masks
        # Normalised, the mean colour is 0, but for its rounding to bytes.
        outside = (batch.images.abs() < 0.02).all(dim=1)
        assert outside.float().mean() > 0.7
        assert (batch.masks[outside] == NO_CLASS).float().mean() > 0.99


def of_run(kind):
    objective = object.__new__(kind)
    objective.run = SimpleNamespace(device=torch.device("cpu"), amp=None)
    return objective


def test_the_loss_of_pixels_is_torchs_mean_over_those_with_a_class():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 3, 5, 7, generator=generator)
    masks = torch.randint(0, 3, (2, 5, 7), generator=generator)
    masks[0, :4] = NO_CLASS
    inputs = segment.SegmentInputs(torch.zeros(2, 3, 5, 7), masks)
    found = of_run(segment.SegmentObjective).losses(lambda _: logits, inputs, SimpleNamespace(mass=0.25))
    expected = F.cross_entropy(logits, masks, ignore_index=NO_CLASS)
    assert found["loss"].item() == pytest.approx(0.25 * expected.item(), rel=1e-6)
    hits = (logits.argmax(dim=1) == masks)[masks != NO_CLASS].float().mean()
    assert found["accuracy"].item() == pytest.approx(0.25 * hits.item(), rel=1e-6)


def test_the_losses_of_boxes_count_by_a_steps_images():
    losses = {"loss_classifier": torch.tensor(2.0), "loss_box_reg": torch.tensor(3.0)}
    inputs = SimpleNamespace(images=[], targets=[])
    found = of_run(detect.DetectObjective).losses(lambda *_: losses, inputs, SimpleNamespace(images=0.5))
    assert {name: value.item() for name, value in found.items()} == {"loss": 2.5, "classifier": 1.0, "box_reg": 1.5}


def test_a_pixel_is_the_objects_from_a_probability_of_one_half():
    masks = torch.tensor([0.49, 0.5, 0.51])[:, None, None, None].expand(3, 1, 4, 6)
    found = {"boxes": torch.zeros(3, 4), "labels": torch.ones(3, dtype=torch.int64), "scores": torch.ones(3)}
    scores = detect_scores.DetectValidation(None, torch.device("cpu"), None, 1, masks=True)
    boxes = scores.detect(lambda _: [found | {"masks": masks}], np.zeros((4, 6, 3), np.uint8))
    assert [area(mask) for mask in boxes.masks] == [0, 24, 24]
    assert boxes.class_ids.tolist() == [0, 0, 0]


def test_boxes_are_flipped_with_their_image_and_classes_count_from_1(boxed):  # noqa: F811
    """torchvision's class 0 is the background, and its own flip is the oracle."""
    loader = object.__new__(detect.BoxLoader)
    loader.images = open_boxes(boxed[0], CLASSES)
    for number, image in enumerate(loader.images.images):
        (pixels, target), (mirrored, turned) = (loader.load(number, drawn) for drawn in (False, True))
        assert target["labels"].tolist() == (image.objects.class_ids + 1).tolist()
        boxes = BoundingBoxes(target["boxes"], format="XYXY", canvas_size=tuple(pixels.shape[1:]))
        assert torch.equal(mirrored, horizontal_flip(pixels))
        torch.testing.assert_close(turned["boxes"], horizontal_flip(boxes).as_subclass(torch.Tensor))
        assert target["labels"].tolist() == turned["labels"].tolist()
