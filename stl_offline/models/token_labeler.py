"""Any classifier as a token labeler: images → (class logits, token logits on its grid).

Shape letters: B batch, N = Gh·Gw positions of the token grid, K classes.
"""

from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from stl_offline.errors import InputError
from stl_offline.models.checkpoints import load_checkpoint, read_state_dict
from stl_offline.models.fan import Fan
from stl_offline.models.inference import inference_form
from stl_offline.models.positions import PositionHead

TIMM_SPEC = "timm:"


class TokenLabeler(nn.Module):
    """Frozen labeler: normalised images → class logits (B, K) and token logits (B, N, K), both float32.

    A FAN with a token head gives its own token logits, through a copy in inference form (load its weights first). Of
    any other timm classifier the head is applied at every position of the last feature map; `PositionHead` says
    for which models that is possible, and checks it.
    The heads and everything after them run in float32, under autocast too.

    Args:
        model: a FAN `_token` model, or a timm classifier, which is frozen and whose head is put into float32.
        name: how label sets call it; default: the model's architecture.
        mean, std: of the images' normalisation, three numbers each, for values in [0, 1]; default: the model's.
        img_size: side or (height, width) of the images for the check; default: the model's own input size.

    Attributes:
        num_classes, name, mean, std: as above.
        pooling: where token logits come from: "token head"; else what the class head sees: "mean", "mean with prefix"
            (of all tokens) or "class token".

    Raises:
        InputError: the model's head cannot be applied per position; the message says why.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        img_size: int | tuple[int, int] | None = None,
    ):
        super().__init__()
        cfg = getattr(model, "pretrained_cfg", None) or {}
        self.name = name or cfg.get("architecture") or type(model).__name__
        self.mean = tuple(mean or cfg.get("mean") or IMAGENET_DEFAULT_MEAN)
        self.std = tuple(std or cfg.get("std") or IMAGENET_DEFAULT_STD)
        self.num_classes = int(getattr(model, "num_classes", 0))
        if self.num_classes < 1:
            raise InputError(f"{self.name} has no classifier (num_classes is {self.num_classes}): it cannot label")
        self.positions = None
        if isinstance(model, Fan) and model.token_head:
            self.model = inference_form(model)
        else:
            self.model = model.requires_grad_(False).eval()
            size = img_size or tuple(cfg.get("input_size") or (3, 224, 224))[-2:]
            self.positions = PositionHead(model, (size, size) if isinstance(size, int) else tuple(size), self.name)
        self.pooling = "token head" if self.positions is None else self.positions.pooling
        self.eval()

    def train(self, mode: bool = True) -> "TokenLabeler":
        """A labeler stays in evaluation mode, also inside a model that is trained."""
        return super().train(False)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Token grid (Gh, Gw) for images of height × width pixels; `InputError` where the model can't take them."""
        return (self.positions or self.model).grid_size(height, width)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised images (B, 3, height, width) → class logits (B, K), token logits (B, N, K), float32."""
        if self.positions is None:
            return self.model(images)
        features = self.model.forward_features(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.positions(features.float())


def create_labeler(
    spec: str,
    *,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    device: str | torch.device = "cpu",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    by_order: bool = False,
    pretrained: bool = False,
) -> TokenLabeler:
    """Build a labeler from "timm:NAME" and a weights file.

    Args:
        spec: "timm:" and any name of timm's registry, e.g. "timm:tf_efficientnet_lite0".
        checkpoint: weights, `.safetensors` or a pickle of `torch.save` (loaded with weights only).
        num_classes: K; default: that of the checkpoint's classifier.
        img_size: side or (height, width) of the images; models of fixed size are built for it.
        device: where the labeler runs.
        mean, std: normalisation, where the weights were trained with another one than timm notes for the name.
        by_order: the checkpoint has other names but the same tensors in the same order.
        pretrained: let timm download the weights instead of giving `checkpoint`.

    Raises:
        InputError: unknown name, no weights, weights that don't fit, a head that cannot be applied per position.
    """
    if not spec.startswith(TIMM_SPEC) or not timm.is_model(spec.removeprefix(TIMM_SPEC)):
        raise InputError(f"labeler {spec!r} is not {TIMM_SPEC}NAME with a name of timm's registry (timm.list_models())")
    name = spec.removeprefix(TIMM_SPEC)
    if checkpoint is None and not pretrained:
        raise InputError(f"{spec} needs weights: give a checkpoint file, untrained labels mean nothing")
    arguments = {} if num_classes is None else {"num_classes": num_classes}
    if img_size is not None and _takes_img_size(name):
        arguments["img_size"] = img_size
    if checkpoint is None:
        try:
            model = timm.create_model(name, pretrained=True, **arguments)
        except Exception as error:  # timm, its hub client and the network raise many kinds
            raise InputError(f"timm could not get weights for {name} ({error}); give a checkpoint file") from error
    elif by_order:
        model = timm.create_model(name, **arguments)
        load_checkpoint(model, checkpoint, by_order=True)
    else:
        model = _with_checkpoint(name, checkpoint, arguments)
    return TokenLabeler(model.to(device), mean=mean, std=std, img_size=img_size)


def _takes_img_size(name: str) -> bool:
    cfg = timm.get_pretrained_cfg(name)
    return bool(cfg and cfg.fixed_input_size) or name.startswith("fan_")


def _with_checkpoint(name: str, checkpoint: str | Path, arguments: dict) -> nn.Module:
    """Build and load through timm, so that its per-model filters (names, position embeddings) apply."""
    state_dict, _ = read_state_dict(checkpoint)
    cfg = timm.get_pretrained_cfg(name)
    classifier = cfg.classifier if cfg else None
    classifier = classifier[0] if isinstance(classifier, list | tuple) else classifier
    weight = state_dict.get(f"{classifier}.weight")
    if weight is not None:
        given = arguments.setdefault("num_classes", weight.shape[0])
        if given != weight.shape[0]:
            raise InputError(
                f"{checkpoint} has {weight.shape[0]} classes, {given} were asked for; a labeler keeps its own"
            )
    overlay = {"state_dict": state_dict, "num_classes": arguments.get("num_classes", 1000)}
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    except (RuntimeError, KeyError) as error:
        first = " ".join(str(error).split())[:400]
        raise InputError(
            f"{checkpoint} does not fit {name} ({first}); if only its names differ, match the tensors by order"
        ) from error
