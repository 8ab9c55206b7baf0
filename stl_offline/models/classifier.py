"""A classifier to score: a run's model, or any of timm's with its weights, and how images are prepared for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import timm.data
import torch
from torch import nn

from stl_offline.errors import InputError
from stl_offline.files import sha256_file
from stl_offline.labels.class_names import read_class_names
from stl_offline.models.artifact import load_model, weights_sha256
from stl_offline.models.build import size_argument
from stl_offline.models.checkpoints import load_checkpoint
from stl_offline.models.labeler_by_name import (
    SIZE_ERRORS,
    imagenet_names,
    pretrained_model,
    state_sha256,
    timm_name,
    with_checkpoint,
)

# What a run's interpolation is called by Pillow.
_PILLOW = {"area": "box", "bilinear": "bilinear", "bicubic": "bicubic"}


@dataclass(frozen=True)
class Classifier:
    """A model with class logits (B, K), or (class logits, token logits), and its evaluation transform.

    name: its architecture; class_names: (K,), or None where nobody names them; weights_sha256: of the weights file, or
    over the tensors; side: (H, W) of its input as timm's validation takes it; trained_side: as in training, which is
    smaller for some models; crop_pct, interpolation, crop_mode, mean, std: timm's; scores_tokens: whether a token head
    was trained.
    """

    model: nn.Module
    name: str
    class_names: tuple[str, ...] | None
    weights_sha256: str
    side: tuple[int, int]
    trained_side: tuple[int, int]
    crop_pct: float
    interpolation: str
    crop_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scores_tokens: bool


def load_classifier(
    checkpoint: str | Path | None,
    model: str | None = None,
    *,
    class_names: str | Path | Sequence[str] | None = None,
    by_order: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    img_size: int = 0,
) -> Classifier:
    """Load a classifier.

    Args:
        checkpoint: a run or a file that one wrote; or, with ``model``, any weights file.
        model: a name of timm's registry, in which FAN's variants are, with or without ``timm:``; or
            ``hf-hub:ORG/NAME``. Without a checkpoint the weights come from the Hugging Face Hub or its cache.
        class_names: of a timm model: names, a text file with one per line, or a label set. Default: ImageNet's, where
            timm knows the model's classes.
        by_order: the checkpoint has other names but the same tensors in the same order.
        mean, std: of the normalisation, where the weights were trained with another one than timm notes.
        img_size: height and width of the input; 0: the model's own.

    Raises:
        InputError: no such model, no weights, weights that do not fit, a size that the model cannot take.
        FormatError: a damaged file.
    """
    if model is None:
        if checkpoint is None:
            raise InputError("give a `checkpoint`: a run, a file that one wrote, or weights of a timm `model`")
        return _of_run(checkpoint, img_size)
    name, architecture = timm_name(model)
    if img_size:
        _check_size(architecture, img_size)
    arguments = size_argument(architecture, img_size) if img_size else {}
    names = class_names
    if isinstance(names, str | Path):
        names = read_class_names(names, "`class_names`")
    if checkpoint is None:
        network = pretrained_model(name, arguments, "checkpoint")
        sha256 = state_sha256(network)
    else:
        if not Path(checkpoint).is_file():
            raise InputError(f"there is no weights file at {checkpoint} (`checkpoint` of a timm `model`)")
        if by_order:
            network = timm.create_model(name, **arguments, **({} if names is None else {"num_classes": len(names)}))
            load_checkpoint(network, checkpoint, by_order=True)
        else:
            network = with_checkpoint(name, checkpoint, arguments, "by_order")
        sha256 = sha256_file(checkpoint)
    if names is None:
        names = imagenet_names(network)
    elif len(names) != network.num_classes:
        raise InputError(f"{model} has {network.num_classes:,} classes, `class_names` lists {len(names):,}")
    trained = timm.data.resolve_model_data_config(network)
    cfg = timm.data.resolve_model_data_config(network, use_test_size=True)  # as timm's validate.py takes it
    own = (img_size, img_size) if img_size else None
    return Classifier(
        network,
        architecture,
        None if names is None else tuple(names),
        sha256,
        side=own or tuple(cfg["input_size"][-2:]),
        trained_side=own or tuple(trained["input_size"][-2:]),
        crop_pct=cfg["crop_pct"],
        interpolation=cfg["interpolation"],
        crop_mode=cfg["crop_mode"],
        mean=tuple(mean or cfg["mean"]),
        std=tuple(std or cfg["std"]),
        scores_tokens=getattr(network, "token_head", False),
    )


@torch.inference_mode()
def _check_size(architecture: str, img_size: int) -> None:
    """Run an untrained copy once; raises `InputError` for a size that the model cannot take."""
    try:
        model = timm.create_model(architecture, num_classes=2, **size_argument(architecture, img_size)).eval()
        model(torch.zeros(1, 3, img_size, img_size))
    except SIZE_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{architecture} cannot take images of {img_size}×{img_size} pixels ({reason}); change `img_size`"
        ) from error


def _of_run(checkpoint: str | Path, img_size: int) -> Classifier:
    network, description = load_model(checkpoint)
    side = img_size or description.img_size
    if side != description.img_size:
        network.set_input_size(img_size=side)
    network.grid_size(side, side)  # raises for a size that the model does not take
    cfg = network.pretrained_cfg
    return Classifier(
        network,
        description.model,
        description.class_names,
        weights_sha256(checkpoint),
        side=(side, side),
        trained_side=(side, side),
        crop_pct=1.0,
        interpolation=_PILLOW[description.interpolation],
        crop_mode="center",
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        scores_tokens=description.token_head_trained,
    )
