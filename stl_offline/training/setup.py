"""What training needs before the first step.

`TrainingRun` is what the loop works with, whatever is trained. A `Stage` adds what the two stages share; functions make
it from settings.
"""

import copy
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from stl_offline.augment import Augmentation, Mix, RandAugment, RandomErase, draw_mix
from stl_offline.config import RunConfig, TrainConfig, result_settings
from stl_offline.device import amp_name, pick_amp, pick_device, pick_workers
from stl_offline.distributed import World, join_world
from stl_offline.errors import InputError
from stl_offline.evaluation import Validation, match_classes
from stl_offline.geometry import center_views, draw_views
from stl_offline.images.beton import Beton
from stl_offline.images.pack import check_place_of_images, ensure_beton
from stl_offline.images.unpacked import UnpackedImages, open_unpacked
from stl_offline.loader import Batch, ImageSettings, StreamLoader, TokenLabels, TokenLoader
from stl_offline.models import (
    Description,
    InitialWeights,
    ModelDescription,
    build_model,
    check_initial,
    check_model,
    freeze_trunk,
    load_initial,
    resolve_model,
)
from stl_offline.training.run_folder import RunFolder
from stl_offline.training.steps import StepRandom
from stl_offline.training.watch import summary_writer

_LOGGER = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TrainingRun:
    """What the training loop works with: a model, its settings, where it runs, and how its file describes it."""

    config: RunConfig
    device: torch.device
    amp: torch.dtype | None
    world: World
    model: nn.Module
    description: Description

    def parameter_groups(self) -> list[dict[str, Any]] | None:
        """Groups of parameters for the optimiser, with ``lr_scale`` and ``weight_decay`` of each; None for AdamW's
        usual two groups, with and without weight decay."""
        return None

    def crops_of(self, epoch: int) -> int:
        """Crops of each image in an epoch's batches."""
        return 1


@dataclass(kw_only=True)
class Stage(TrainingRun):
    """The objects that a stage works with, and what it draws with them."""

    config: TrainConfig
    description: ModelDescription
    train: Beton
    val: Beton | None
    augmentation: Augmentation
    initial: InitialWeights | None = None

    @property
    def mean(self) -> tuple[float, float, float]:
        return self.model.pretrained_cfg["mean"]

    @property
    def std(self) -> tuple[float, float, float]:
        return self.model.pretrained_cfg["std"]

    @property
    def images(self) -> ImageSettings:
        """How the model takes images."""
        side = self.config.img_size
        return ImageSettings((side, side), self.mean, self.std, self.config.interpolation)

    def augment(self, batch: Batch) -> torch.Tensor:
        """The batch's images as the model sees them, but for mixing: (B, 3, H, W)."""
        return self.augmentation(batch.images, batch.warps, batch.epochs.numpy(), batch.sample_ids.numpy())

    def crops_of(self, epoch: int) -> int:
        return len(self.config.shown_together(epoch))

    def random_plan(self, epoch: int) -> dict[str, Any]:
        """An epoch of fresh random crops: arguments of `TokenLoader.epoch`."""
        epochs = self.config.shown_together(epoch)
        warps = [self.augmentation.warps(each, len(self.train)) for each in epochs]
        return {
            "views": np.concatenate([self.random_views(each) for each in epochs]),
            "warps": None if warps[0] is None else np.concatenate(warps),
            "repeats": len(epochs),
        }

    def random_views(self, epoch: int) -> np.ndarray:
        """Fresh random crops of every image: (n, 6)."""
        samples, crops = np.arange(len(self.train)), self.config.crop_settings()
        return draw_views(self.config.seed, epoch, samples, self.train.heights, self.train.widths, crops)

    def draw_mix(self, images: torch.Tensor, random: StepRandom) -> Mix | None:
        """How this step's images are mixed; None where mixing is off."""
        mix = self.config.mix_settings()
        return draw_mix(len(images), *images.shape[2:], mix, random.numpy) if mix.enabled else None


def prepare(config: TrainConfig, stage: str) -> Stage:
    """Check the settings, open the images, build the model, pick the device.

    Raises:
        StlError: as `check_early`, or images that cannot be used.
    """
    check_early(config)
    device = pick_device(config.device)
    RunFolder(config.out, stage, run_settings(config, pick_amp(config.amp, device)), {}).look(config.resume)
    world = join_world(device)
    train = open_images(config.data, config)
    train.require_classes()
    val = open_images(config.val, config) if config.val else None
    found = build_stage(config, stage, train, val, device, world)
    check_single_images(found, len(train))
    return found


def check_single_images(stage: Stage, count: int) -> None:
    """Raise `InputError` where one of ``count`` images is a step, or a part of one, and the model's norms need more."""
    config, processes = stage.config, stage.world.size
    images = {config.repeats * share for share in (count // processes, -(-count // processes))}
    last = [each % (config.batch_size * config.accumulate) for each in images]
    if config.batch_size > 1 and all(each == 0 or each // config.accumulate > 1 for each in last):
        return
    if config.sync_bn and processes > 1:
        return
    # Without computing; a model whose shapes cannot be followed so is taken to fit.
    twin = copy.deepcopy(stage.model).to("meta").train()
    try:
        twin(torch.empty(1, 3, config.img_size, config.img_size, device="meta"))
    except Exception as error:
        if "more than 1 value per channel" in str(error):
            raise InputError(
                f"of {count:,} images, with `batch_size`={config.batch_size}, one is a step or a part of one of "
                f"its own, on which the batch norms of {stage.description.model} cannot be trained; choose another "
                "`batch_size`"
            ) from error


def open_images(spec: str, config: TrainConfig) -> Beton:
    """Images as the settings have them read; images that are packed already are read as they are."""
    if config.loader == "stream" and not spec.endswith(".beton"):
        return open_unpacked(spec, skip_broken=config.skip_broken)
    return ensure_beton(spec, skip_broken=config.skip_broken)


def _loader_of(images: Beton) -> type[TokenLoader]:
    return StreamLoader if isinstance(images, UnpackedImages) else TokenLoader


def validation_batch(config: TrainConfig) -> int:
    """Images that a process measures at a time: without gradients more of them fit than a small batch holds."""
    return max(config.batch_size, 128)


def check_early(config: TrainConfig) -> None:
    """Check what can be checked before images are packed.

    Raises:
        InputError: `loader` is stream for packed images, there is nothing at `val`, an unknown model, one that can have
            no token head, an input size that it does not take, initial weights that are not there, or another name than
            one of timm's strings for RandAugment.
        MissingExtraError: TensorBoard is asked for and not installed.
    """
    if config.loader == "stream" and config.data.endswith(".beton"):
        raise InputError(f"`loader` is stream, which is for images that are not packed, and {config.data} is packed")
    if config.auto_augment:
        RandAugment.parse(config.auto_augment)
    if config.tensorboard:
        summary_writer()
    if config.val:
        check_place_of_images(config.val)
    check_model(config.model, config.img_size, config.token_head, config.drop_path)
    if config.init:
        check_initial(config.init, _description(config, ("0", "1"), "student"))


def build_stage(
    config: TrainConfig, stage: str, train: Beton, val: Beton | None, device: torch.device, world: World
) -> Stage:
    """The stage for images that are opened already. Raises as `prepare`."""
    description = _description(config, train.class_names, stage)
    seed_weights(config.seed)
    model = build_model(
        description.model,
        len(train.class_names),
        config.img_size,
        token_head=description.token_head,
        drop_path=config.drop_path,
    )
    initial = load_initial(model, config.init, description) if config.init else None
    if initial is not None and world.is_first:
        _LOGGER.info("%s", initial)
    if config.freeze:
        freeze_trunk(model)
    if config.grad_checkpointing:
        model.set_grad_checkpointing()
    return Stage(
        config=config,
        device=device,
        amp=pick_amp(config.amp, device),
        world=world,
        model=model,
        description=description,
        train=train,
        val=val,
        augmentation=make_augmentation(config, model.pretrained_cfg),
        initial=initial,
    )


def _description(config: TrainConfig, class_names: tuple[str, ...], stage: str) -> ModelDescription:
    name, token_head = resolve_model(config.model, config.token_head)
    return ModelDescription(
        name,
        class_names,
        config.img_size,
        stage,
        interpolation=config.interpolation,
        token_head_trained=config.trains_tokens,
        token_head=token_head,
    )


def seed_weights(seed: int) -> None:
    """Let the first values of a model's weights come from the seed, whatever ran before."""
    torch.manual_seed(seed)


def make_augmentation(config: TrainConfig, normalisation: dict[str, Any]) -> Augmentation:
    """What the settings ask for; ``normalisation`` names mean and std.

    Raises:
        InputError: auto_augment is not one of timm's strings for RandAugment.
    """
    auto = RandAugment.parse(config.auto_augment) if config.auto_augment else None
    jitter = config.color_jitter
    if jitter is None:
        jitter = 0.0 if auto else 0.4
    return Augmentation(
        auto=auto,
        jitter=jitter,
        erase=RandomErase(config.random_erase, config.erase_mode) if config.random_erase else None,
        mean=normalisation["mean"],
        std=normalisation["std"],
        size=(config.img_size, config.img_size),
        seed=config.seed,
    )


def make_train_loader(stage: Stage, labels: TokenLabels | None) -> TokenLoader:
    """Loader of the training images; a batch is what one step takes in this process."""
    return _loader_of(stage.train)(
        stage.train,
        stage.images,
        stage.config.batch_size * stage.config.accumulate,
        labels=labels,
        workers=pick_workers(stage.config.workers),
        seed=stage.config.seed,
        device=stage.device,
        world=stage.world,
        repeats=stage.config.repeats,
    )


def make_validation(stage: Stage) -> Validation | None:
    """What scores a model on the validation images; None where there are none."""
    if stage.val is None:
        return None
    loader = _loader_of(stage.val)(
        stage.val,
        stage.images,
        validation_batch(stage.config),
        workers=pick_workers(stage.config.workers),
        device=stage.device,
        shuffle=False,
        world=stage.world,
    )
    views = center_views(stage.val.heights, stage.val.widths)
    class_map = match_classes(stage.val, stage.train.class_names, "the training images")
    return Validation(loader, views, class_map, stage.amp, stage.world, stage.config.trains_tokens)


def make_run_folder(stage: Stage, label_identity: dict[str, Any] | None) -> RunFolder:
    """The run's folder. ``label_identity``: what the token labels are, by content."""
    data = {
        "train": stage.train.state,
        "val": None if stage.val is None else stage.val.state,
        "class_names": list(stage.train.class_names),
        "processes": stage.world.size,
        "labels": label_identity,
    }
    if stage.initial is not None:
        data["init"] = {"sha256": stage.initial.sha256, "untrained": list(stage.initial.new_heads)}
    return RunFolder(stage.config.out, stage.description.stage, run_settings(stage.config, stage.amp), data)


def run_settings(config: RunConfig, amp: torch.dtype | None) -> dict[str, Any]:
    """What a run records and must be resumed with; "auto" precision by what it came to on this machine."""
    return result_settings(config) | {"amp": amp_name(amp)}
