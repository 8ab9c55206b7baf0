"""Accuracy, likelihood and calibration of the class head, and top-1 accuracy of the mean over tokens.

`evaluate` is the ``stl-offline evaluate`` command; `Validation` scores a model between epochs; both call
`evaluate_model`. Suites and generated corruptions are scored by `stl_offline.evaluation.robust`.

B: batch, N: tokens, K: classes.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from stl_offline.config import EvaluateConfig
from stl_offline.device import autocast, pick_amp, pick_device, pick_workers
from stl_offline.distributed import World, sum_over_world
from stl_offline.errors import JoinError
from stl_offline.evaluation.measures import ClassView, Tally, check_finite, scores_of
from stl_offline.evaluation.robust import evaluate_suites
from stl_offline.geometry import center_views
from stl_offline.images.beton import Beton
from stl_offline.images.classes import UNLABELLED
from stl_offline.images.pack import ensure_beton
from stl_offline.loader import ImageSettings, TokenLoader
from stl_offline.models import ModelDescription, load_model
from stl_offline.progress import progress_bar


@dataclass(frozen=True)
class Scores:
    """Fractions of the samples, in [0, 1], but for nll.

    token_top1: None for a model without a trained token head; nll: mean of −log p(class), nats; ece: expected
    calibration error over 15 bins.
    """

    samples: int
    top1: float
    top5: float
    token_top1: float | None
    nll: float
    ece: float


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a trained model on a folder, tars or a .beton: the fields of `Scores`, and how many classes were compared.

    With ``suite``, ``corrupt`` or ``model`` in the settings it gives what `evaluate_suites` does.

    Raises:
        InputError: no such checkpoint, or an input size that the model does not take.
        FormatError: a damaged checkpoint.
        JoinError: the images have classes that the model was not trained on.
    """
    if not config.is_plain:
        return evaluate_suites(config)
    device = pick_device(config.device)
    model, description = load_model(config.checkpoint)
    side = config.img_size or description.img_size
    model.grid_size(side, side)  # checks the side before images are packed
    beton = ensure_beton(config.sources["data"], skip_broken=config.skip_broken)
    class_map = match_classes(beton, description.class_names, config.checkpoint)
    model = model.to(device).to(memory_format=torch.channels_last)
    loader = scoring_loader(
        model,
        description,
        beton,
        device=device,
        batch_size=config.batch_size,
        workers=pick_workers(config.workers),
        side=side,
    )
    views = center_views(beton.heights, beton.widths, config.crop_pct or 1.0)
    classes = len(description.class_names)
    view = ClassView.of(config.classes, range(classes), class_map.tolist() if config.classes == "subset" else None)
    scores = evaluate_model(
        model,
        loader,
        views,
        class_map,
        pick_amp(config.amp, device),
        compared=view,
        score_tokens=description.token_head_trained,
        is_told=True,
    )
    check_finite((scores.nll, scores.ece))
    compared = classes if view.columns is None else len(view.columns)
    return asdict(scores) | {"classes": config.classes, "classes_compared": compared, "classes_of_model": classes}


@dataclass
class Validation:
    """Scores a model on the validation images, each process on its part of them.

    views: (n, 6), class_map: as in `evaluate_model`; score_tokens: whether the token head is trained.
    names: of the scores; the first decides which weights are the best.
    """

    names: ClassVar[tuple[str, ...]] = ("top1", "top5", "token_top1")

    loader: TokenLoader
    views: np.ndarray
    class_map: np.ndarray
    amp: torch.dtype | None
    world: World
    score_tokens: bool = True

    def __call__(self, model: nn.Module, after_batch: Callable[[], None]) -> dict[str, float | None]:
        """Scores by name. ``after_batch`` is called after every batch; an exception that it raises ends the scoring."""
        scores = evaluate_model(
            model,
            self.loader,
            self.views,
            self.class_map,
            self.amp,
            self.world,
            score_tokens=self.score_tokens,
            after_batch=after_batch,
        )
        return {name: getattr(scores, name) for name in self.names}


def scoring_loader(
    model: nn.Module,
    description: ModelDescription,
    beton: Beton,
    *,
    device: torch.device,
    batch_size: int,
    workers: int,
    side: int = 0,
) -> TokenLoader:
    """Loader of all images in their order, with the model's normalisation; side 0 takes the side it was trained on."""
    side = side or description.img_size
    cfg = model.pretrained_cfg
    images = ImageSettings((side, side), cfg["mean"], cfg["std"], description.interpolation)
    return TokenLoader(beton, images, batch_size, workers=workers, device=device, shuffle=False)


@torch.inference_mode()
def evaluate_model(
    model: nn.Module,
    loader: TokenLoader,
    views: np.ndarray,
    class_map: np.ndarray,
    amp: torch.dtype | None = None,
    world: World | None = None,
    *,
    compared: ClassView | None = None,
    score_tokens: bool = True,
    after_batch: Callable[[], None] | None = None,
    is_told: bool = False,
) -> Scores:
    """Score a model on every sample of a loader.

    Args:
        model: gives class logits (B, K), or (class logits, token logits (B, N, K)).
        views: float32 (n, 6), the view of each sample.
        class_map: int64 (classes of the images,), each class's index in the model's class list.
        compared: the classes whose logits are compared; default: all of the model's.
        score_tokens: False leaves ``token_top1`` out, for a token head that was never trained.
        after_batch: called after every batch; an exception that it raises ends the scoring.
        is_told: whether progress is shown.
    """
    was_training = model.training
    model.eval()
    tally = Tally(loader.device)
    mapping = torch.from_numpy(class_map).to(loader.device)
    view = compared
    with progress_bar(len(views), "measuring", enabled=is_told) as bar:
        for batch in loader.epoch(0, views):
            with autocast(loader.device, amp):
                output = model(batch.images)
            logits, tokens = output if isinstance(output, tuple) else (output, None)
            view = view or ClassView.of("all", range(logits.shape[1]), None)
            tokens = tokens.float() if tokens is not None and score_tokens else None
            view.add(tally, logits.float(), mapping[batch.class_ids], tokens)
            bar.update(len(batch))
            if after_batch is not None:
                after_batch()
    model.train(was_training)
    found = scores_of(sum_over_world(tally.vector, world or World()).tolist())
    return Scores(**{"token_top1": None} | found)


def match_classes(beton: Beton, class_names: tuple[str, ...], whose: str) -> np.ndarray:
    """Index in ``class_names`` of each class of the images: int64 (classes of the images,).

    Args:
        whose: what the class list belongs to, for the error message.

    Raises:
        JoinError: the images have classes that are not in the list, or none at all.
    """
    if beton.class_names == (UNLABELLED,):
        raise JoinError(f"{beton.place} has no class folders: its images have no classes to compare {whose} with")
    numbers = {name: number for number, name in enumerate(class_names)}
    unknown = [name for name in beton.class_names if name not in numbers]
    if unknown:
        raise JoinError(
            f"{len(unknown)} of the {len(beton.class_names)} classes of {beton.place} are not among the "
            f"{len(class_names)} of {whose} (such as {', '.join(map(repr, unknown[:3]))}); use the same classes"
        )
    return np.array([numbers[name] for name in beton.class_names], dtype=np.int64)
