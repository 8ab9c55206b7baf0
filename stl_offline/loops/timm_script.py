"""timm's train.py with token labels: a dataset that packs them into its targets, and the loss that takes them apart.

timm's loaders carry one target per sample. Here it is a row of floats: K smoothed (and mixed) class targets, N·T token
ids and N·T weights. float32 holds ids up to 2²⁴ exactly.

B: batch; K: classes; N: tokens; T: targets per token.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor, nn
from torchvision import transforms

from stl_offline.augment import MixSettings
from stl_offline.errors import InputError
from stl_offline.geometry import CropSettings
from stl_offline.labels.label_set import LabelSet
from stl_offline.loops.crop import RandomResizedCrop
from stl_offline.loops.dataset import Item, TokenBatch, TokenLabelDataset
from stl_offline.loops.mixing import mix_batch
from stl_offline.losses import soft_cross_entropy, token_cross_entropy
from stl_offline.models import TokenModel
from stl_offline.random import step_generator
from stl_offline.targets import TokenLabels

_MIX_INSTEAD = "leave it off, and give TimmTokenDataset mixing of its own: MixSettings(mixup=0.8, cutmix=1.0)"
# Options of timm's script that act in what is replaced here, and what to do instead.
_WITHOUT_EFFECT = {
    "mixup": _MIX_INSTEAD,
    "cutmix": _MIX_INSTEAD,
    "cutmix_minmax": _MIX_INSTEAD,
    "mixup_off_epoch": "leave it off: TimmTokenDataset mixes in every epoch",
    "aug_repeats": "leave it off: an image has one crop in an epoch, so its repeats would be the same",
    "bce_loss": "leave it off: the classes' loss is cross-entropy",
    "jsd_loss": "leave it off: the classes' loss is cross-entropy",
}

# What timm's training transform may hold behind its crop and flip: nothing of these moves pixels.
_STILL = (
    transforms.ColorJitter,
    transforms.RandomGrayscale,
    transforms.GaussianBlur,
    transforms.RandomApply,
    transforms.Normalize,
)
_STILL_NAMES = ("ToNumpy", "ToTensor", "MaybeToTensor", "PILToTensor", "MaybePILToTensor")


class TimmTokenDataset(TokenLabelDataset):
    """timm's ImageDataset with token labels, for timm's ``create_loader``.

    ``create_loader`` gives the dataset its training transform. Its random crop and flip are replaced by those that
    token labels follow, with the same settings; transforms that move pixels otherwise are refused.

    Args:
        dataset: of ``timm.data.create_dataset``, without a transform.
        labels: the label set, or its place.
        model: the student, for its token grid.
        img_size: side or (height, width) of the images, in pixels; default: the model's.
        kind: of targets, as of `TokenTargets`; smoothing: label smoothing of the classes.
        mix: mixup and cutmix, in place of timm's.
        seed: of crops, mixing and drawn targets.
        key_prefix, missing: as of `TokenLabelDataset` and `TokenLabels`.
    """

    def __init__(
        self,
        dataset: Any,
        labels: LabelSet | str | Path,
        model: TokenModel,
        *,
        img_size: int | tuple[int, int] | None = None,
        kind: str = "gumbel",
        smoothing: float = 0.0,
        mix: MixSettings = MixSettings(),  # noqa: B008
        seed: int = 0,
        key_prefix: str = "",
        missing: str = "error",
    ) -> None:
        size = img_size or tuple(model.pretrained_cfg["input_size"][-2:])
        size = (size, size) if isinstance(size, int) else size
        self.smoothing, self.mix = smoothing, mix
        self._timm_transform: Any = None
        self._sampler: Any = None
        found = TokenLabels.of(labels, model.grid_size(*size), kind, missing=missing)
        super().__init__(dataset, found, RandomResizedCrop(size, seed=seed), key_prefix=key_prefix)

    @property
    def transform(self) -> Any:
        """What ``create_loader`` set, without its crop and flip."""
        return self._timm_transform

    @transform.setter
    def transform(self, value: Any) -> None:
        if not isinstance(value, transforms.Compose):  # what the base class sets
            self._timm_transform = value
            return
        crop, flip, rest = _taken_apart(value)
        if tuple(crop.size) != self.crop.size:
            raise InputError(
                f"timm's loader makes images of {tuple(crop.size)} pixels, the token labels are for {self.crop.size}; "
                "give both the same `img_size`"
            )
        settings = CropSettings(tuple(crop.scale), tuple(crop.ratio), flip)
        interpolation = getattr(crop.interpolation, "value", "random")
        if interpolation not in ("bilinear", "bicubic"):
            raise InputError(
                f"token labels need one interpolation, bilinear or bicubic; timm's is {interpolation!r} "
                "(--train-interpolation)"
            )
        self.crop = RandomResizedCrop(self.crop.size, settings, interpolation=interpolation, seed=self.crop.seed)
        self._timm_transform = transforms.Compose(rest)

    def collate(self, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        """Samples → images, uint8 with timm's prefetcher and normalised floats without, and packed targets (B, …)."""
        pixels = [torch.as_tensor(item.pixels) for item in items]
        batch = super().collate([item._replace(pixels=each) for item, each in zip(items, pixels, strict=True)])
        images = batch.images
        if self.mix.enabled:
            batch = batch._replace(images=images.float())
        random = step_generator(self.crop.seed, self.epoch, int(batch.sample_ids[0]))
        mixed = mix_batch(
            batch,
            self.mix,
            random,
            grid=self.labels.targets.grid,
            num_classes=self.labels.num_classes,
            smoothing=self.smoothing,
        )
        if self.mix.enabled and not images.is_floating_point():
            images = mixed.images.round_().to(images.dtype)
        elif self.mix.enabled:
            images = mixed.images
        return images, torch.cat([mixed.class_targets, mixed.token_ids.flatten(1), mixed.token_weights.flatten(1)], 1)

    def loss(self, loader: Any, args: argparse.Namespace | None = None, weight: float = 1.0) -> "TokenLoss":
        """The loss for batches of a loader; checks that the loader changes no pixels that the labels are for.

        Args:
            args: the script's options, of which those are refused that this dataset and loss take the place of.
            weight: of the token loss.

        Raises:
            InputError: the loader erases boxes, or mixes images itself; or an option would have no effect.
        """
        for name, instead in _WITHOUT_EFFECT.items():
            value = getattr(args, name, None)
            if value:
                option = "--" + name.replace("_", "-") + ("" if value is True else f" {value}")
                raise InputError(f"{option} of timm's script does not go with token labels; {instead}")
        if getattr(loader, "random_erasing", None) is not None:
            raise InputError("timm's loader erases boxes of images, which token labels do not follow; use --reprob 0")
        inner = getattr(loader, "loader", loader)
        if getattr(inner.collate_fn, "__self__", None) is not self:
            raise InputError("timm's loader has another collate function; pass it the dataset's collate method")
        self._sampler = getattr(inner, "sampler", None)
        return TokenLoss(self.labels.num_classes, self.labels.targets.tokens, weight)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0. A script that finds this leaves out the sampler's, so both are told."""
        super().set_epoch(epoch)
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)


class TokenLoss(nn.Module):
    """Class loss and weighted token loss, from a `TokenModel`'s output and packed targets."""

    def __init__(self, num_classes: int, tokens: int, weight: float = 1.0) -> None:
        super().__init__()
        self.num_classes, self.tokens, self.weight = num_classes, tokens, weight

    def forward(self, output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        """(class logits (B, K), token logits (B, N, K)) and packed targets → a float32 scalar."""
        class_logits, token_logits = output
        classes, ids, weights = target.split(
            [self.num_classes, *[(target.shape[1] - self.num_classes) // 2] * 2], dim=1
        )
        shape = (len(target), self.tokens, -1)
        # Its targets have no ghosts. Looking for them would wait for the GPU.
        token_loss = token_cross_entropy(token_logits, ids.reshape(shape).long(), weights.reshape(shape), ghosts=())
        return soft_cross_entropy(class_logits, classes) + self.weight * token_loss


def _taken_apart(transform: transforms.Compose) -> tuple[Any, float, list[Any]]:
    """timm's training transform → its random crop, the probability of a flip, and what stays."""
    crop, flip, rest = None, 0.0, []
    for each in transform.transforms:
        if isinstance(each, RandomResizedCropAndInterpolation):
            crop = each
        elif isinstance(each, transforms.RandomHorizontalFlip):
            flip = float(each.p)
        elif isinstance(each, _STILL) or type(each).__name__ in _STILL_NAMES:
            rest.append(each)
        else:
            raise InputError(
                f"timm's transform {type(each).__name__} moves or hides pixels, which token labels do not follow; turn "
                "it off (--aa, --vflip, --reprob, --train-crop-mode)"
            )
    if crop is None:
        raise InputError("timm's loader has no RandomResizedCrop to replace; use its training transform")
    return crop, flip, rest


__all__ = ["TimmTokenDataset", "TokenBatch", "TokenLoss"]
