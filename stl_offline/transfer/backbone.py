"""Any timm model, a FAN trained here among them, as feature maps for dense prediction.

Four maps where the model has four or more: a hybrid FAN's stages and blocks (strides 4, 8, 16, 16), the last four
stages of a network with stages, four blocks evenly spread over a plain transformer.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from stl_offline.config_transfer import BackboneConfig
from stl_offline.errors import InputError
from stl_offline.files import sha256_file
from stl_offline.models import Fan, TokenModel, load_checkpoint, load_model, read_description, weights_sha256
from stl_offline.transfer.class_maps import ClassAttentionMaps, has_class_map

_LEVELS = 4


@dataclass(frozen=True)
class BackboneSpec:
    """What builds a backbone without its weights.

    model: a name in timm's registry; indices: of its feature maps; img_size: (H, W) that a model of fixed size is
    built for, and others are meant for.
    """

    model: str
    indices: tuple[int, ...]
    img_size: tuple[int, int]


class Backbone(nn.Module):
    """Feature maps of a timm model.

    channels, strides: of each map; multiple: what both sides of an input must be divisible by; mean, std: of the
    images' normalisation; weights: SHA-256 of the file that they come from, "timm" for timm's own, None for random
    ones.
    """

    def __init__(self, spec: BackboneSpec, drop_path: float = 0.0) -> None:
        super().__init__()
        self.spec = spec
        if has_class_map(spec.model, spec.indices):
            full = _create(spec.model, spec.img_size, drop_path=drop_path, num_classes=0)
            self.net: nn.Module = ClassAttentionMaps(full, spec.indices)
        else:
            self.net = _create(
                spec.model,
                spec.img_size,
                drop_path=drop_path,
                features_only=True,
                feature_cls="getter",
                out_indices=spec.indices,
            )
        info = self.net.feature_info
        self.channels, self.strides = tuple(info.channels()), tuple(info.reduction())
        self.multiple = max(self.strides)
        config = self.net.model.pretrained_cfg
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        self.frozen = False
        self.weights: str | None = None

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Normalised images (B, 3, H, W) → maps (B, C_i, H / stride_i, W / stride_i)."""
        return self.net(images)

    def identity(self) -> dict[str, Any]:
        """What a run records of its backbone, and must be resumed with."""
        return {"model": self.spec.model, "indices": list(self.spec.indices), "weights": self.weights}

    def freeze(self) -> None:
        """Keep the weights, and the statistics of batch norms, as they are from now on."""
        self.frozen = True
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Backbone":
        return super().train(mode and not self.frozen)

    def parameter_groups(self, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
        """timm's groups: no decay for biases, norms and what the model names; rates that fall towards the input."""
        model = self.net.model
        exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
        if layer_decay == 1.0:
            return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt)
        return param_groups_layer_decay(model, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)


def make_backbone(config: BackboneConfig, img_size: tuple[int, int]) -> Backbone:
    """The backbone that the settings name, with its weights.

    Raises:
        InputError: nothing is there, timm has no such model, or one without feature maps.
        FormatError: a damaged checkpoint.
    """
    backbone = load_backbone(
        config.backbone,
        img_size,
        checkpoint=config.backbone_checkpoint,
        pretrained=config.backbone_pretrained,
        drop_path=0.0 if config.freeze else config.drop_path,
    )
    if config.freeze:
        backbone.freeze()
    return backbone


def load_backbone(
    source: str | Path,
    img_size: tuple[int, int] = (224, 224),
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    drop_path: float = 0.0,
) -> Backbone:
    """A trained model as feature maps, in training mode.

    Args:
        source: a run of this package, one of its weights files, or "timm:NAME".
        img_size: (H, W) in pixels; matters only for models of a fixed input size.
        checkpoint: weights for "timm:NAME", such as a published ``.pth.tar``; random ones by default.
        pretrained: take timm's own weights for "timm:NAME".
        drop_path: rate of stochastic depth.

    Raises:
        InputError: nothing is there, timm has no such model, or one without feature maps.
        FormatError: a damaged checkpoint.
    """
    source = str(source)
    if source.startswith("timm:"):
        name = source.removeprefix("timm:")
        backbone = Backbone(BackboneSpec(name, level_indices(name, img_size), img_size), drop_path)
        if pretrained:
            _copy_weights(_create(name, img_size, pretrained=True), backbone, source)
            backbone.weights = "timm"
        elif checkpoint is not None:
            # At the model's own size where it can change: that is the file's.
            resizes = hasattr(backbone.net.model, "set_input_size")
            full = timm.create_model(name) if resizes else _create(name, img_size)
            load_checkpoint(full, checkpoint, adapt_head=True)
            _copy_weights(full, backbone, str(checkpoint))
            backbone.weights = sha256_file(checkpoint)
        return backbone
    name = read_description(source).model
    full, _ = load_model(source)
    full = full.trunk if isinstance(full, TokenModel) else full
    backbone = Backbone(BackboneSpec(name, level_indices(name, img_size), img_size), drop_path)
    _copy_weights(full, backbone, source)
    backbone.weights = weights_sha256(source)
    return backbone


def unfit_size(backbone: Backbone, sizes: Iterable[tuple[int, int]]) -> tuple[int, int] | None:
    """The first of some sizes (H, W) that the backbone cannot take; models of a fixed input size take one alone.

    Found without computing. A model whose shapes cannot be followed so is taken to fit.
    """
    with torch.device("meta"):
        twin = Backbone(backbone.spec).eval()

    @torch.no_grad()
    def takes(size: tuple[int, int]) -> bool:
        try:
            twin(torch.empty(1, 3, *size, device="meta"))
        except Exception:  # each model checks its input in its own way
            return False
        return True

    if not takes(tuple(side + -side % backbone.multiple for side in backbone.spec.img_size)):
        return None
    return next((size for size in sizes if not takes(size)), None)


def level_indices(name: str, img_size: tuple[int, int]) -> tuple[int, ...]:
    """Which of a model's feature maps are used.

    Raises:
        InputError: timm has no such model, or one without feature maps.
    """
    with torch.device("meta"):  # without memory for weights
        model = _create(name, img_size)
        if isinstance(model, Fan):
            return tuple(timm.create_model(name, features_only=True).out_indices)
    strides = [info["reduction"] for info in getattr(model, "feature_info", ())]
    if not strides or not hasattr(model, "forward_intermediates"):
        raise InputError(f"{name} gives no feature maps (timm's forward_intermediates); choose another backbone")
    if len(set(strides)) == 1 and len(strides) > _LEVELS:
        return tuple(len(strides) * quarter // _LEVELS - 1 for quarter in range(1, _LEVELS + 1))
    return tuple(range(max(0, len(strides) - _LEVELS), len(strides)))


def _create(name: str, img_size: tuple[int, int], *, drop_path: float = 0.0, **more: Any) -> nn.Module:
    """timm's model for images of ``img_size`` and, where it can, of any other size.

    Raises:
        InputError: timm has no such model, or cannot build it so.
    """
    if not timm.is_model(name):
        raise InputError(f"timm has no model {name!r}; timm.list_models() lists them")
    options = {"drop_path_rate": drop_path} if drop_path else {}
    error: Exception | None = None
    for sized in (
        {"img_size": img_size, "dynamic_img_size": True},
        {"img_size": img_size, "strict_img_size": False},
        {"img_size": img_size},
        {},
    ):
        try:
            return timm.create_model(name, **options, **sized, **more)
        except TypeError as found:  # the model takes no such argument
            error = found
        except Exception as found:  # each model checks its arguments in its own way
            error = found
            break
    if drop_path and "drop_path_rate" in str(error):
        raise InputError(f"{name} has no stochastic depth; set `drop_path` to 0, not {drop_path}") from error
    reason = " ".join(str(error).split())[:200]
    raise InputError(f"timm cannot build {name} for images of {img_size[0]}×{img_size[1]} pixels ({reason})") from error


def _copy_weights(full: nn.Module, backbone: Backbone, source: str) -> None:
    """The weights of a whole model for the part of it that the backbone keeps; those of positions are resampled."""
    if hasattr(full, "set_input_size"):
        full.set_input_size(img_size=backbone.spec.img_size)
    own, weights = backbone.net.model.state_dict(), full.state_dict()
    wrong = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    if wrong:
        raise InputError(
            f"{source} does not fit {backbone.spec.model} at {backbone.spec.img_size}: {len(wrong)} tensors are "
            f"missing or have another shape, for example {wrong[0]}"
        )
    backbone.net.model.load_state_dict({name: weights[name] for name in own})
