"""How well masks are predicted at the images' full size: intersection over union, and accuracy.

K: classes.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from stl_offline.device import autocast
from stl_offline.distributed import World, sum_over_world
from stl_offline.errors import InputError
from stl_offline.evaluation import NOT_FINITE
from stl_offline.loader import ToDevice
from stl_offline.progress import progress_bar
from stl_offline.transfer.backbone import Backbone, unfit_size
from stl_offline.transfer.pair_loader import read_ahead
from stl_offline.transfer.pairs import NO_CLASS, PairSet
from stl_offline.transfer.segmenter import whole_logits, window_logits

_SIZES = 32  # different sizes of images that are tried at most


def confusion_matrix(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Pixels by true class (rows) and predicted class (columns), int64 (K, K); those of `NO_CLASS` are left out."""
    labelled = truth != NO_CLASS
    places = truth[labelled] * classes + predicted[labelled]
    return torch.bincount(places, minlength=classes * classes).view(classes, classes)


@dataclass(frozen=True)
class SegmentScores:
    """Scores of a confusion matrix, all in [0, 1].

    iou: by class, pixels that are and are predicted to be of it over those that are either; NaN where there are none.
    miou: mean of those; mean_accuracy: mean over the classes that occur of the share of their pixels that are
    predicted right; pixel_accuracy: that share of all pixels.
    """

    iou: np.ndarray
    miou: float
    mean_accuracy: float
    pixel_accuracy: float

    @classmethod
    def of(cls, matrix_KK: np.ndarray) -> "SegmentScores":
        hits, truth, predicted = np.diag(matrix_KK), matrix_KK.sum(axis=1), matrix_KK.sum(axis=0)
        with np.errstate(invalid="ignore"):
            iou, accuracy = hits / (truth + predicted - hits), hits / truth
            share = hits.sum() / truth.sum()
        return cls(iou, _mean(iou), _mean(accuracy), float(share))

    def by_name(self, class_names: tuple[str, ...]) -> dict[str, float | None]:
        """The scores by the names of `score_names`; None where nothing was there to measure."""
        values = (self.miou, self.mean_accuracy, self.pixel_accuracy, *self.iou.tolist())
        return {
            name: value if np.isfinite(value) else None
            for name, value in zip(score_names(class_names), values, strict=True)
        }


def score_names(class_names: tuple[str, ...]) -> tuple[str, ...]:
    """miou, mean_accuracy, pixel_accuracy, and iou/NAME of every class."""
    return ("miou", "mean_accuracy", "pixel_accuracy", *(f"iou/{name}" for name in class_names))


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


@dataclass
class SegmentValidation:
    """Scores a segmenter on whole images, each process on its part of them.

    mean, std: of the images' normalisation; multiple: what sides are padded to; window: (H, W) of a sliding window, or
    None; change: what is done to an image's pixels before, uint8 (H, W, 3) → the same; keep: takes an image's key and
    predicted ids (H, W); check_logits: refuse those that are not finite, whose argmax is class 0.
    """

    pairs: PairSet
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    multiple: int
    device: torch.device
    amp: torch.dtype | None
    workers: int
    world: World
    window: tuple[int, int] | None = None
    change: Callable[[str, np.ndarray], np.ndarray] | None = None
    keep: Callable[[str, np.ndarray], None] | None = None
    check_logits: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of the scores; the first decides which weights are the best."""
        return score_names(self.pairs.class_names)

    def __call__(self, model: nn.Module, after_batch: Callable[[], None]) -> dict[str, float | None]:
        """Scores by name. ``after_batch`` is called after every image; an exception that it raises ends the scoring."""
        return self.measure(model, after_batch).by_name(self.pairs.class_names)

    @torch.inference_mode()
    def measure(self, model: nn.Module, after_batch: Callable[[], None] = lambda: None) -> SegmentScores:
        """Scores of a model that gives logits (B, K, H, W)."""
        was_training, classes = model.training, len(self.pairs.class_names)
        model.eval()
        matrix = torch.zeros(classes, classes, dtype=torch.float64, device=self.device)
        for key, image, mask in self._images():
            # Here, not in the threads that read: corruptions draw from a generator that all threads share.
            predicted = self.predict(model, image if self.change is None else self.change(key, image))
            matrix += confusion_matrix(predicted, torch.from_numpy(mask).to(self.device, torch.int64), classes)
            if self.keep is not None:
                self.keep(key, predicted.cpu().numpy())
            after_batch()
        model.train(was_training)
        return SegmentScores.of(sum_over_world(matrix, self.world).cpu().numpy())

    def predict(self, model: nn.Module, image_HW3: np.ndarray) -> Tensor:
        """Class ids (H, W) of an RGB image."""
        images = ToDevice(self.device, image_HW3.shape[1], self.mean, self.std).images(image_HW3[None])
        with autocast(self.device, self.amp):
            if self.window is None:
                logits = whole_logits(model, images, self.multiple)
            else:
                logits = window_logits(model, images, self.window)
        if self.check_logits and not bool(logits.isfinite().all()):
            raise InputError(NOT_FINITE)
        return logits[0].argmax(dim=0)

    def _images(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """This process's images with their masks, in order, read ahead by threads."""
        numbers = range(self.world.rank, len(self.pairs), self.world.size)
        with progress_bar(len(numbers), "measuring", enabled=self.world.is_first) as bar:
            for each in read_ahead(self.read, numbers, self.workers):
                yield each
                bar.update()

    def read(self, number: int) -> tuple[str, np.ndarray, np.ndarray]:
        """Key, RGB pixels (H, W, 3) and mask (H, W) of an image."""
        image, mask = self.pairs.read(number)
        return self.pairs.pairs[number].key, np.array(image), mask


def check_sizes(backbone: Backbone, pairs: PairSet) -> None:
    """Raise `InputError` where images that are not cut into windows have a size that the backbone cannot take."""
    padded = {
        (pair.height + -pair.height % backbone.multiple, pair.width + -pair.width % backbone.multiple): pair.key
        for pair in pairs.pairs
    }
    if (size := unfit_size(backbone, itertools.islice(padded, _SIZES))) is not None:
        raise InputError(
            f"{backbone.spec.model} cannot take the whole image {padded[size]} ({size[0]}×{size[1]} pixels, height × "
            "width, with padding); measure in windows of the crop's size, with `sliding_window`"
        )


def save_ids(path: str, ids: np.ndarray) -> None:
    """Predicted class ids (H, W) as a PNG, 8 bits where that is enough."""
    Image.fromarray(ids.astype(np.uint8 if ids.max(initial=0) < 256 else np.uint16)).save(path, format="PNG")
