"""``stl-offline transfer detect``: fine-tune a backbone on boxes of objects.

B: images of a step in this process; n: objects of an image.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from stl_offline.config_transfer import DetectConfig
from stl_offline.device import autocast, pick_amp, pick_device, pick_workers, upload
from stl_offline.distributed import join_world, leaving_world
from stl_offline.errors import InputError
from stl_offline.random import STREAM_DENSE, uniforms
from stl_offline.training.engine import run_training
from stl_offline.training.run_folder import RunFolder
from stl_offline.training.setup import TrainingRun, run_settings, seed_weights
from stl_offline.training.step_timer import DryRun
from stl_offline.training.steps import Share, StepRandom
from stl_offline.training.watch import summary_writer
from stl_offline.transfer.backbone import make_backbone, unfit_size
from stl_offline.transfer.boxes import BoxSet, open_boxes
from stl_offline.transfer.detect_scores import DetectValidation, as_tensor
from stl_offline.transfer.detector import Detector, DetectorDescription, padded_to
from stl_offline.transfer.dry_run import DenseTimer, measure_dense
from stl_offline.transfer.outlines import check_coco_can_run, masks_of
from stl_offline.transfer.pair_loader import ThreadedLoader
from stl_offline.transfer.pairs import class_list

STAGE = "detector"


def train_detector(config: DetectConfig) -> dict[str, Any]:
    """Fine-tune a backbone on boxes; gives back the summary that the run's folder holds. Under torchrun, as one process
    of it.

    Raises:
        StlError: bad input, or a loss that is not finite.
        MissingExtraError: there are validation images, and pycocotools is not installed.
    """
    with leaving_world():
        run = _prepare(config)
        return run_training(
            run, _folder(run), DetectObjective(run), lambda epoch: {}, lambda: (_loader(run), _scorer(run))
        )


def dry_run_detector(config: DetectConfig) -> DryRun:
    """Check settings, data and backbone as `train_detector` does, and take a few steps; nothing is written.

    Raises:
        StlError: what the run itself would raise before its first step.
        MissingExtraError: as `train_detector`.
    """
    with leaving_world():
        run = _prepare(config)
        timer = DenseTimer(run, _loader(run), DetectObjective, config.side * config.longest)
        return measure_dense(timer, _folder(run), run.model.backbone.backbone, len(run.val or ()))


@dataclass(kw_only=True)
class DetectRun(TrainingRun):
    """What training a detector works with."""

    config: DetectConfig
    model: Detector
    train: BoxSet
    val: BoxSet | None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The backbone's layers, whose rates fall towards the input, and everything behind them with its own."""
        config, pyramid = self.config, self.model.backbone
        heads = nn.ModuleList([pyramid.fpn, self.model.rpn, self.model.roi_heads])
        return [
            *pyramid.backbone.parameter_groups(config.weight_decay, config.layer_decay),
            *(
                group | {"lr_scale": config.head_lr_scale}
                for group in param_groups_weight_decay(heads, config.weight_decay)
            ),
        ]

    def identity(self) -> dict[str, Any]:
        """What the data and the backbone's weights are, by content."""
        return {
            "train": self.train.fingerprint,
            "val": None if self.val is None else self.val.fingerprint,
            "class_names": list(self.train.class_names),
            "processes": self.world.size,
            "backbone": self.model.backbone.backbone.identity(),
        }


@dataclass(frozen=True)
class DetectInputs:
    """images: B of (3, H, W) in [0, 1]; targets: B of ``boxes`` (n, 4) in pixels, ``labels`` (n,) from 1 and, for Mask
    R-CNN, ``masks`` uint8 (n, H, W); sample_ids: (B,), on the CPU."""

    images: list[Tensor]
    targets: list[dict[str, Tensor]]
    sample_ids: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def parts(self, count: int) -> Iterator["DetectInputs"]:
        """The same in ``count`` nearly equal parts; fewer where there are fewer images."""
        for places in np.array_split(np.arange(len(self.images)), count):
            if len(places):
                chosen = slice(int(places[0]), int(places[-1]) + 1)
                yield DetectInputs(self.images[chosen], self.targets[chosen], self.sample_ids[chosen])

    def first(self, count: int) -> "DetectInputs":
        """The first images alone."""
        return DetectInputs(self.images[:count], self.targets[:count], self.sample_ids[:count])

    @property
    def places(self) -> int:
        """1: losses count by images."""
        return 1

    def totals(self) -> Tensor:
        """(2,) float64: images, twice."""
        return torch.full((2,), float(len(self.images)), dtype=torch.float64, device=self.images[0].device)


class DetectObjective:
    """torchvision's losses: of the proposals (objectness, boxes) and of the detections (classes, boxes, masks)."""

    def __init__(self, run: DetectRun) -> None:
        self.run = run

    def inputs(self, batch: DetectInputs, random: StepRandom) -> DetectInputs:
        return batch

    def losses(self, model: nn.Module, inputs: DetectInputs, share: Share) -> dict[str, Tensor]:
        with autocast(self.run.device, self.run.amp):
            losses = model(inputs.images, inputs.targets)
        weighted = {name.removeprefix("loss_"): value.float() * share.images for name, value in losses.items()}
        return {"loss": torch.stack(list(weighted.values())).sum(), **weighted}

    @torch.no_grad()
    def image_rows(self, model: nn.Module, inputs: DetectInputs) -> dict[str, Tensor]:
        """The first image with the true boxes and the detections above a score of one half: uint8 (3, H, W) each."""
        was_training = model.training
        found = model.eval()(inputs.images[:1])[0]
        model.train(was_training)
        image = (inputs.images[0] * 255).round().byte().cpu()
        sure = found["scores"] > 0.5
        detections = {name: value[sure] for name, value in found.items()}
        if "masks" in detections:
            detections["masks"] = detections["masks"][:, 0] >= 0.5
        return {"boxes": _drawn(image, inputs.targets[0]), "detections": _drawn(image, detections)}


def _drawn(image: Tensor, objects: dict[str, Tensor]) -> Tensor:
    """An image (3, H, W) with boxes and, where there are any, masks."""
    if not len(objects["boxes"]):
        return image
    if "masks" in objects:
        image = draw_segmentation_masks(image, objects["masks"].bool().cpu(), alpha=0.5)
    return draw_bounding_boxes(image, objects["boxes"].cpu())


class BoxLoader(ThreadedLoader):
    """Loads images with boxes, flipped at random."""

    def __init__(self, images: BoxSet, batch_size: int, flip: float, **settings: Any) -> None:
        super().__init__(images.keys, batch_size, **settings)
        self.images, self.flip = images, flip

    def draw(self, epoch: int) -> list[bool]:
        """Whether each sample is flipped."""
        numbers = uniforms(self.seed, STREAM_DENSE, epoch, np.arange(len(self.images)), 1)
        return (numbers[:, 0] < self.flip).tolist()

    def load(self, number: int, drawn: bool) -> tuple[Tensor, dict[str, Tensor]]:
        image = self.images.images[number]
        pixels, boxes = np.array(image.read()), image.objects.boxes_n4
        masks = None if image.objects.masks is None else masks_of(image.objects.masks, *pixels.shape[:2])
        if drawn:
            masks = None if masks is None else np.ascontiguousarray(masks[:, :, ::-1])
            pixels = np.ascontiguousarray(pixels[:, ::-1])
            boxes = np.stack(
                [pixels.shape[1] - boxes[:, 2], boxes[:, 1], pixels.shape[1] - boxes[:, 0], boxes[:, 3]], 1
            )
        target = {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(image.objects.class_ids + 1)}
        if masks is not None:
            target["masks"] = torch.from_numpy(masks)
        return as_tensor(pixels), target

    def collate(self, ids: np.ndarray, loaded: list[Any], epoch: int) -> DetectInputs:
        return DetectInputs(
            [upload(pixels, self.device) for pixels, _ in loaded],
            [{name: upload(value, self.device) for name, value in target.items()} for _, target in loaded],
            torch.from_numpy(ids),
        )


def _prepare(config: DetectConfig) -> DetectRun:
    """Check the settings, build the model, find and check the images."""
    if config.tensorboard:
        summary_writer()
    if config.val or config.masks:
        check_coco_can_run()
    device = pick_device(config.device)
    amp = pick_amp(config.amp, device)
    RunFolder(config.out, STAGE, run_settings(config, amp), {}).look(config.resume)
    classes = class_list(config.classes)
    seed_weights(config.seed)
    backbone = make_backbone(config, (config.side, config.side))
    short, long = (side + -side % padded_to(backbone) for side in (config.side, config.longest))
    if (size := unfit_size(backbone, ((short, long), (long, short)))) is not None:
        raise InputError(
            f"{backbone.spec.model} cannot take images of {size[0]}×{size[1]} pixels (height × width): its input size "
            "is fixed, and images of a detector are of many sizes; choose another backbone"
        )
    sides = tuple(range(config.side_min, config.side, 32)) if config.side_min else ()
    model = Detector(backbone, len(classes), (*sides, config.side), config.longest, config.head_width, config.masks)
    world = join_world(device)
    train = open_boxes(config.data, classes, config.annotations, config.split, masks=config.masks)
    val = None
    if config.val:
        val = open_boxes(config.val, classes, config.val_annotations, config.val_split, masks=config.masks)
    spec = backbone.spec
    description = DetectorDescription(
        spec.model, spec.indices, classes, config.side, config.longest, config.head_width, config.masks
    )
    return DetectRun(
        config=config,
        device=device,
        amp=amp,
        world=world,
        model=model,
        description=description,
        train=train,
        val=val,
    )


def _folder(run: DetectRun) -> RunFolder:
    return RunFolder(run.config.out, STAGE, run_settings(run.config, run.amp), run.identity())


def _loader(run: DetectRun) -> BoxLoader:
    config = run.config
    return BoxLoader(
        run.train,
        config.batch_size * config.accumulate,
        config.flip,
        workers=pick_workers(config.workers),
        seed=config.seed,
        device=run.device,
        world=run.world,
    )


def _scorer(run: DetectRun) -> DetectValidation | None:
    workers = pick_workers(run.config.workers)
    return None if run.val is None else DetectValidation(run.val, run.device, run.amp, workers, run.config.masks)
