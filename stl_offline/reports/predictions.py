"""Predictions of trained models for some images and each of their tokens.

B: batch; K: classes; N: tokens on the grid (h, w); k: classes kept per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stl_offline.device import pick_device, pick_workers
from stl_offline.errors import InputError
from stl_offline.evaluation import match_classes, scoring_loader
from stl_offline.geometry import View, center_views
from stl_offline.images.beton import Beton
from stl_offline.images.pack import ensure_beton
from stl_offline.models import load_model
from stl_offline.reports.encode import see_through
from stl_offline.reports.runs import Run
from stl_offline.reports.scene import TokenMap

TOP_K = 5
PIXELS = 256  # side of an image on the page
BATCH = 64


@dataclass(frozen=True, eq=False)
class Predictions:
    """One run on some images.

    class_ids: (n,) predicted classes; confidence: (n,) their probabilities; token_ids, token_probabilities:
    (n, h, w, k), best first, None for a model without a token head; class_names: of the run; truth: (n,) in these.
    """

    class_ids: np.ndarray
    confidence: np.ndarray
    token_ids: np.ndarray | None
    token_probabilities: np.ndarray | None
    class_names: tuple[str, ...]
    truth: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """bool (n,)."""
        return self.class_ids == self.truth


@dataclass(frozen=True, eq=False)
class Predicted:
    """Several runs on the same images. sample_ids: (n,) positions in ``beton``; views: (n, 6), the models' input."""

    beton: Beton
    sample_ids: np.ndarray
    views: np.ndarray
    runs: tuple[Predictions, ...]

    def pixels(self, place: int) -> np.ndarray:
        """The image number ``place`` as the models saw it, uint8 (H, W, 3)."""
        image = self.beton.read_image(int(self.sample_ids[place]))
        return see_through(image, View.from_array(self.views[place]), (PIXELS, PIXELS))

    def tokens(self, run: int, place: int) -> TokenMap | None:
        """One run's tokens of the image number ``place``; None without a token head."""
        predictions = self.runs[run]
        if predictions.token_ids is None:
            return None
        return TokenMap(predictions.token_ids[place], predictions.token_probabilities[place], None, None, 1.0)


def predict(
    runs: Sequence[Run], data: str, count: int, *, skip_broken: bool = False, device: str = "auto", workers: int = 0
) -> Predicted:
    """Classify ``count`` images, spread evenly over a data set, with several runs.

    Args:
        skip_broken: as of `ensure_beton`.

    Raises:
        InputError: a run has no weights, or runs have different class lists.
        JoinError: images have classes that a run lacks.
    """
    beton = ensure_beton(data, skip_broken=skip_broken)
    sample_ids = np.unique(np.linspace(0, len(beton) - 1, min(count, len(beton))).astype(np.int64))
    views = center_views(beton.heights, beton.widths)
    found = tuple(_predict_one(run, beton, sample_ids, views, device, workers) for run in runs)
    if len({each.class_names for each in found}) > 1:
        raise InputError(
            "the runs have different class lists, so their examples cannot be compared; write one report per class list"
        )
    return Predicted(beton, sample_ids, views[sample_ids], found)


def choose_examples(predictions: Predictions, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Places of images that a run gets right (drawn at random) and wrong (most confident first), at most ``count`` of
    each."""
    right = np.flatnonzero(predictions.right)
    drawn = np.random.default_rng(seed).choice(right, min(count, len(right)), replace=False)
    wrong = np.flatnonzero(~predictions.right)
    surest = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:count]
    return sorted(drawn.tolist()), surest.tolist()


@torch.inference_mode()
def _predict_one(
    run: Run, beton: Beton, sample_ids: np.ndarray, views: np.ndarray, device_name: str, workers: int
) -> Predictions:
    device = pick_device(device_name)
    model, description = load_model(run.path)
    class_map = match_classes(beton, description.class_names, str(run.path))
    model = model.to(device).to(memory_format=torch.channels_last).eval()
    side = description.img_size
    loader = scoring_loader(model, description, beton, device=device, batch_size=BATCH, workers=pick_workers(workers))
    k = min(TOP_K, len(description.class_names))
    classes, confidences, token_ids, token_probabilities = [], [], [], []
    grid = None
    for batch in loader.epoch(0, views, sample_ids=sample_ids):
        output = model(batch.images)
        class_logits, token_logits = output if isinstance(output, tuple) else (output, None)
        best = class_logits.float().softmax(dim=-1).max(dim=-1)
        classes.append(best.indices.cpu().numpy())
        confidences.append(best.values.cpu().numpy())
        if token_logits is not None:
            grid = tuple(model.grid_size(side, side))
            top = token_logits.float().softmax(dim=-1).topk(k, dim=-1)
            token_ids.append(top.indices.to(torch.int32).cpu().numpy())
            token_probabilities.append(top.values.cpu().numpy())
    loader.close()
    count = len(sample_ids)
    return Predictions(
        class_ids=np.concatenate(classes),
        confidence=np.concatenate(confidences),
        token_ids=np.concatenate(token_ids).reshape(count, *grid, k) if grid else None,
        token_probabilities=np.concatenate(token_probabilities).reshape(count, *grid, k) if grid else None,
        class_names=tuple(description.class_names),
        truth=class_map[beton.class_ids[sample_ids]],
    )
