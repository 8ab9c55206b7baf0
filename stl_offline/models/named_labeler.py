"""Find the labeler that a command names: a run, a checkpoint file, or a timm model with its weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import timm
import timm.data

from stl_offline.errors import InputError
from stl_offline.files import sha256_file
from stl_offline.models.artifact import load_model, weights_sha256
from stl_offline.models.token_labeler import TokenLabeler, create_labeler


@dataclass(frozen=True)
class NamedLabeler:
    """A labeler with what a manifest says of it."""

    model: TokenLabeler
    architecture: str
    weights_sha256: str
    class_names: tuple[str, ...]
    img_size: int
    interpolation: str = "area"  # how its run resized images


def find_labeler(
    spec: str,
    checkpoint: str | None = None,
    img_size: int = 0,
    *,
    by_order: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> NamedLabeler:
    """Load the labeler ``RUN``, ``CKPT`` or ``timm:NAME``.

    Args:
        checkpoint: the weights of a timm model; by_order: they have other names; mean, std: its normalisation.
        img_size: the input side in pixels; 0 takes the model's own.

    Raises:
        InputError: nothing there, a model that labels no tokens, or classes without names.
    """
    if spec.startswith("timm:"):
        if checkpoint is None:
            raise InputError(f"{spec} needs its weights: --labeler-checkpoint FILE (.safetensors, .pth or .bin)")
        side = img_size or _timm_side(spec.removeprefix("timm:"))
        model = create_labeler(spec, checkpoint=checkpoint, img_size=side, by_order=by_order, mean=mean, std=std)
        return NamedLabeler(model, model.name, sha256_file(checkpoint), _imagenet_names(model, spec), side)
    if checkpoint is not None or by_order or mean or std:
        raise InputError("--labeler-checkpoint and its kin go with --labeler timm:NAME; a run brings its own weights")
    model, description = load_model(spec)
    side = img_size or description.img_size
    labeler = TokenLabeler(model, name=description.model, img_size=side)
    weights, seen = weights_sha256(spec), description.interpolation
    return NamedLabeler(labeler, description.model, weights, description.class_names, side, seen)


def _timm_side(name: str) -> int:
    cfg = timm.get_pretrained_cfg(name)
    return cfg.input_size[-1] if cfg is not None else 224


def _imagenet_names(model: TokenLabeler, spec: str) -> tuple[str, ...]:
    subset = timm.data.infer_imagenet_subset(model.model)
    if subset is None:
        raise InputError(f"{spec} has {model.num_classes} classes and timm does not name them; it names ImageNet's")
    return tuple(timm.data.ImageNetInfo(subset).label_names())
