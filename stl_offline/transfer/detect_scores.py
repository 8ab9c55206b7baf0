"""COCO's mean average precision, by pycocotools.

n: detections or objects of an image.
"""

import contextlib
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from stl_offline.device import autocast
from stl_offline.progress import progress_bar
from stl_offline.transfer.boxes import BoxedImage, BoxSet
from stl_offline.transfer.outlines import RunLengths, coco_scores, encode_masks
from stl_offline.transfer.pair_loader import read_ahead


@dataclass(frozen=True)
class Boxes:
    """Boxes of an image. boxes_n4: (left, top, right, bottom) in pixels; class_ids: (n,); scores: (n,), or None for
    the truth; masks: n of them, or None; crowds: how many of the last ones are COCO's crowds, which are neither missed
    nor, for what lies in them, false detections."""

    boxes_n4: np.ndarray
    class_ids: np.ndarray
    scores: np.ndarray | None = None
    masks: Sequence[RunLengths] | None = None
    crowds: int = 0

    @classmethod
    def to_find(cls, image: BoxedImage) -> "Boxes":
        """The truth of an image."""
        parts = image.objects, image.ignored
        masks = None if image.objects.masks is None else [each for part in parts for each in part.masks]
        boxes_n4, class_ids = np.concatenate([each.boxes_n4 for each in parts]), [each.class_ids for each in parts]
        return cls(boxes_n4, np.concatenate(class_ids), masks=masks, crowds=len(image.ignored))


def average_precisions(
    images: Iterable[tuple[Boxes, Boxes]], class_names: tuple[str, ...], masks: bool = False
) -> dict[str, float | None]:
    """COCO's scores of (truth, detections) of every image, by the names of `score_names`.

    None for a class without objects. ``masks``: compare masks, too.
    """
    truth: list[dict] = []
    found: list[dict] = []
    count = 0
    for count, (objects, detections) in enumerate(images, 1):
        for target, boxes in ((truth, objects), (found, detections)):
            for row, (left, top, right, bottom) in enumerate(boxes.boxes_n4.astype(float).tolist()):
                entry = {
                    "id": len(target) + 1,
                    "image_id": count,
                    "category_id": int(boxes.class_ids[row]),
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": int(row >= len(boxes.class_ids) - boxes.crowds),
                }
                if boxes.scores is not None:
                    entry["score"] = float(boxes.scores[row])
                if masks:
                    entry["segmentation"] = boxes.masks[row]
                target.append(entry)
    names = score_names(class_names, masks)
    if not truth or not found:
        present = {entry["category_id"] for entry in truth if not entry["iscrowd"]}
        values = [0.0 if present else None] * 3
        values += [0.0 if number in present else None for number in range(len(class_names))]
        return dict(zip(names, values * (2 if masks else 1), strict=True))
    dataset = {
        # Masks have sizes of their own; pycocotools asks for these before it sees that.
        "images": [{"id": number + 1, "height": 0, "width": 0} for number in range(count)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(class_names)],
        "annotations": truth,
    }
    values = []
    for kind in ("bbox", "segm") if masks else ("bbox",):
        values += _means(dataset, found, kind, len(class_names))
    return dict(zip(names, values, strict=True))


def _means(dataset: dict, found: list[dict], kind: str, classes: int) -> list[float | None]:
    """Mean average precision, that at IoU 0.5 and at 0.75, and of each class."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints tables
        measured = coco_scores(dataset, found, kind)
    # precision: IoU thresholds × recalls × classes × object sizes × detections per image; −1 where there is no object.
    precision = measured.eval["precision"][:, :, :, 0, -1]
    thresholds = measured.params.iouThrs
    parts = [precision, *(precision[np.isclose(thresholds, level)] for level in (0.5, 0.75))]
    parts += [precision[:, :, number] for number in range(classes)]
    return [float(part[part > -1].mean()) if (part > -1).any() else None for part in parts]


def score_names(class_names: tuple[str, ...], masks: bool = False) -> tuple[str, ...]:
    """map (mean over IoU 0.50 to 0.95), map_50, map_75, and ap/NAME of every class; with masks, the same with mask_."""
    names = ("map", "map_50", "map_75", *(f"ap/{name}" for name in class_names))
    return (*names, *(f"mask_{name}" for name in names)) if masks else names


@dataclass
class DetectValidation:
    """Scores a detector. Every process scores all images.

    workers: threads that read images; masks: compare masks, too; change: what is done to an image's pixels before,
    uint8 (H, W, 3) → the same.
    """

    images: BoxSet
    device: torch.device
    amp: torch.dtype | None
    workers: int
    masks: bool = False
    change: Callable[[str, np.ndarray], np.ndarray] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the scores; the first decides which weights are the best."""
        return score_names(self.images.class_names, self.masks)

    def __call__(self, model: nn.Module, after_batch: Callable[[], None] = lambda: None) -> dict[str, float | None]:
        """Scores by name. ``after_batch`` is called after every image; an exception that it raises ends the scoring."""
        was_training = model.training
        model.eval()
        pairs = []
        with progress_bar(len(self.images), "measuring") as bar:
            read = read_ahead(self._read, range(len(self.images)), self.workers)
            for image, pixels in zip(self.images.images, read, strict=True):
                # Here, not in the threads that read: corruptions draw from a generator that all threads share.
                pixels = pixels if self.change is None else self.change(image.key, pixels)
                pairs.append((Boxes.to_find(image), self.detect(model, pixels)))
                bar.update()
                after_batch()
        model.train(was_training)
        return average_precisions(pairs, self.images.class_names, self.masks)

    def _read(self, number: int) -> np.ndarray:
        return np.array(self.images.images[number].read())

    @torch.inference_mode()
    def detect(self, model: nn.Module, pixels_HW3: np.ndarray) -> Boxes:
        """Detections in an RGB image."""
        with autocast(self.device, self.amp):
            found = model([as_tensor(pixels_HW3).to(self.device)])[0]
        boxes, labels, scores = (found[name].float().cpu().numpy() for name in ("boxes", "labels", "scores"))
        masks = encode_masks((found["masks"][:, 0] >= 0.5).cpu().numpy()) if self.masks else None
        return Boxes(boxes, labels.astype(np.int64) - 1, scores, masks)  # torchvision's class 0 is the background


def as_tensor(pixels_HW3: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) → float32 (3, H, W) in [0, 1]."""
    return torch.from_numpy(pixels_HW3).permute(2, 0, 1).float() / 255
