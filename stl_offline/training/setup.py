"""What both stages need before the first step: images, model, loaders, checks."""

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from stl_offline.augment import Augmentation, Mix, MixSettings, RandAugment, RandomErase, draw_mix
from stl_offline.config import TrainConfig, result_settings
from stl_offline.device import amp_name, pick_amp, pick_device, pick_workers
from stl_offline.distributed import World, failure_of_another, join_world, meet
from stl_offline.errors import InputError
from stl_offline.evaluation import Validation, match_classes
from stl_offline.geometry import CropSettings, center_views, draw_views
from stl_offline.images.beton import Beton
from stl_offline.images.pack import ensure_beton
from stl_offline.loader import Batch, ImageSettings, TokenLabels, TokenLoader
from stl_offline.models import Fan, ModelDescription
from stl_offline.training.engine import EpochPlan, Trainer
from stl_offline.training.run_folder import RunFolder, check_same_run
from stl_offline.training.steps import Objective, StepRandom
from stl_offline.training.watch import summary_writer


@dataclass
class Stage:
    """The things that a stage works with."""

    config: TrainConfig
    device: torch.device
    amp: torch.dtype | None
    world: World
    train: Beton
    val: Beton | None
    model: nn.Module
    description: ModelDescription
    augmentation: Augmentation

    @property
    def mean(self) -> tuple[float, float, float]:
        return self.model.pretrained_cfg["mean"]

    @property
    def std(self) -> tuple[float, float, float]:
        return self.model.pretrained_cfg["std"]

    @property
    def mix(self) -> MixSettings:
        config = self.config
        return MixSettings(config.mixup, config.cutmix, config.mix_prob, mode=config.mix_mode)

    def augment(self, batch: Batch) -> torch.Tensor:
        """The batch's images as the model sees them, but for mixing: (B, 3, H, W)."""
        return self.augmentation(batch.images, batch.warps, batch.epoch, batch.sample_ids.cpu().numpy())

    def random_plan(self, epoch: int) -> dict[str, Any]:
        """An epoch of fresh random crops: arguments of `TokenLoader.epoch`."""
        return {"views": self.random_views(epoch), "warps": self.augmentation.warps(epoch, len(self.train))}

    def random_views(self, epoch: int) -> np.ndarray:
        """Fresh random crops of every image: (n, 6)."""
        crops = CropSettings(scale=(self.config.scale_min, 1.0), flip=self.config.flip)
        samples = np.arange(len(self.train))
        return draw_views(self.config.seed, epoch, samples, self.train.heights, self.train.widths, crops)

    def draw_mix(self, images: torch.Tensor, random: StepRandom) -> Mix | None:
        """How this step's images are mixed; None where mixing is off."""
        return draw_mix(len(images), *images.shape[2:], self.mix, random.numpy) if self.mix.enabled else None

    def run(
        self,
        objective: Objective,
        plan: EpochPlan,
        labels: dict[str, Any] | None = None,
        tokens: TokenLabels | None = None,
    ) -> dict[str, Any]:
        """Train, or go on, or find that all is done; gives the summary.

        Args:
            objective, plan: the stage's.
            labels: what the labels are, by content; tokens: what the loader makes token targets from.
        """
        folder = self.run_folder(**labels or {})
        complete = folder.summary() if self.config.resume else None
        if complete is not None:
            return complete | {"already_complete": True}
        loader = self.train_loader(tokens)
        validation = self.validation()
        with folder.held() if self.world.is_first else contextlib.nullcontext(), failure_of_another(self.world):
            meet(self.world)
            check_same_run(folder, self.config, self.device, self.world)
            state = folder.open(resume=self.config.resume, write=self.world.is_first)
            trainer = Trainer(
                self.config,
                folder,
                self.model,
                loader,
                objective,
                plan,
                validation,
                self.description,
                self.device,
                self.world,
                self.amp,
                unused_parameters=labels is not None and labels["kind"] == "none",
            )
            if state is not None:
                trainer.restore(state)
            del state  # as large as the model, its average and the optimiser
            return trainer.fit()

    @property
    def images(self) -> ImageSettings:
        """How the model takes images."""
        side = self.config.img_size
        return ImageSettings((side, side), self.mean, self.std, self.config.interpolation)

    def train_loader(self, labels: TokenLabels | None) -> TokenLoader:
        """Batches of a whole step's images of this process."""
        return TokenLoader(
            self.train,
            self.images,
            self.config.batch_size * self.config.accumulate,
            labels=labels,
            workers=pick_workers(self.config.workers),
            seed=self.config.seed,
            device=self.device,
            world=self.world,
        )

    def validation(self) -> Validation | None:
        """Scores on the validation images, or None where there are none."""
        if self.val is None:
            return None
        loader = TokenLoader(
            self.val,
            self.images,
            validation_batch(self.config),
            workers=pick_workers(self.config.workers),
            device=self.device,
            shuffle=False,
            world=self.world,
        )
        views = center_views(self.val.heights, self.val.widths)
        class_map = match_classes(self.val, self.train.class_names, "the training images")
        return Validation(loader, views, class_map, self.amp, self.world, self.config.trains_tokens)

    def run_folder(self, **labels: Any) -> RunFolder:
        """The run's folder. ``labels`` says by content what the labels are."""
        shaped = result_settings(self.config) | {"amp": amp_name(self.amp)}  # "auto" differs between machines
        data = {
            "train": {"fingerprint": self.train.fingerprint, "samples": len(self.train)},
            "val": None if self.val is None else {"fingerprint": self.val.fingerprint, "samples": len(self.val)},
            "class_names": list(self.train.class_names),
            "processes": self.world.size,
            "labels": labels or None,
        }
        return RunFolder(self.config.out, self.description.stage, shaped, data)


def prepare(config: TrainConfig, stage: str) -> Stage:
    """Open the images, build the model, pick the device.

    Raises:
        InputError: a model that is no FAN, or an input size that its stem does not divide.
    """
    check_early(config)
    device = pick_device(config.device)
    world = join_world(device)
    train = ensure_beton(config.data, skip_broken=config.skip_broken)
    train.require_classes()
    val = ensure_beton(config.val, skip_broken=config.skip_broken) if config.val else None
    return build_stage(config, stage, train, val, device, world)


def validation_batch(config: TrainConfig) -> int:
    """Images that a process measures at a time: without gradients more of them fit than a small batch holds."""
    return max(config.batch_size, 128)


def check_early(config: TrainConfig) -> None:
    """What can be known before images are packed. Raises as `prepare`, and `MissingExtraError`."""
    if config.auto_augment:
        RandAugment.parse(config.auto_augment)
    if config.tensorboard:
        summary_writer()
    token_model_name(config.model)


def build_stage(
    config: TrainConfig, stage: str, train: Beton, val: Beton | None, device: torch.device, world: World
) -> Stage:
    """The stage for images that are opened already. Raises as `prepare`."""
    description = ModelDescription(
        token_model_name(config.model),
        train.class_names,
        config.img_size,
        stage,
        interpolation=config.interpolation,
        token_head_trained=config.trains_tokens,
    )
    # The weights' first values come from the seed, whatever ran before.
    torch.manual_seed(config.seed)
    model = timm.create_model(
        description.model,
        num_classes=len(train.class_names),
        img_size=config.img_size,
        drop_path_rate=config.drop_path,
    )
    augmentation = make_augmentation(config, model.pretrained_cfg)
    return Stage(config, device, pick_amp(config.amp, device), world, train, val, model, description, augmentation)


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


def token_model_name(name: str) -> str:
    """The variant with a token head: ``fan_micro_4_p8`` → ``fan_micro_4_p8_token``.

    Raises:
        InputError: no such FAN.
    """
    name = name if name.endswith("_token") else f"{name}_token"
    known = timm.list_models("fan_*_token")
    if name not in known:
        plain = ", ".join(each.removesuffix("_token") for each in known)
        raise InputError(f"there is no model {name.removesuffix('_token')!r}; there are {plain}")
    return name


def model_grid(model: Fan, side: int) -> tuple[int, int]:
    """The token grid (h, w) of a model for square inputs."""
    return model.grid_size(side, side)
