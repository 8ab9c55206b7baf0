"""The FAN family in timm's registry: each variant plain and as `NAME_token` (class and token logits)."""

import dataclasses

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from stl_offline.models.checkpoints import adapt_names
from stl_offline.models.fan import Fan, FanConfig

_ARCHITECTURE = tuple(field.name for field in dataclasses.fields(FanConfig))
_CONV = {"patch_size": 16}
_HYBRID = {"hybrid_depths": (3, 3)}

# name → fields of `FanConfig` and arguments of `Fan`. The released variants are those of the FAN and STL papers;
# fan_micro is for CPUs and tests.
VARIANTS: dict[str, dict] = {
    "fan_micro_4_p8": {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4, "img_size": 64},
    "fan_tiny_12_p16_224": {**_CONV, "embed_dim": 192, "depth": 12, "num_heads": 4},
    "fan_small_12_p16_224": {**_CONV, "embed_dim": 384, "depth": 12, "num_heads": 8},
    "fan_base_18_p16_224": {**_CONV, "embed_dim": 448, "depth": 18, "num_heads": 8},
    "fan_large_24_p16_224": {**_CONV, "embed_dim": 480, "depth": 24, "num_heads": 10},
    "fan_tiny_8_p4_hybrid": {**_HYBRID, "embed_dim": 192, "depth": 8, "num_heads": 8},
    "fan_small_12_p4_hybrid": {**_HYBRID, "embed_dim": 384, "depth": 10, "num_heads": 8},
    "fan_base_16_p4_hybrid": {**_HYBRID, "embed_dim": 448, "depth": 16, "num_heads": 8},
    "fan_large_16_p4_hybrid": {
        "hybrid_depths": (3, 5),
        "embed_dim": 480,
        "depth": 22,
        "num_heads": 10,
        "head_init_scale": 0.001,
    },
}

__all__ = ["VARIANTS", "default_cfgs"]  # timm adds the entry functions' names


def _pretrained_cfg(name: str, arguments: dict, token_head: bool) -> dict:
    side = arguments.get("img_size", 224)
    return {
        "architecture": name,
        "num_classes": 1000,
        "input_size": (3, side, side),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.backbone.stem.0" if "hybrid_depths" in arguments else "patch_embed.proj.0.0",
        "classifier": ("head", "aux_head") if token_head else "head",
    }


def _default_out_indices(arguments: dict) -> tuple[int, ...]:
    """Four maps for dense prediction: a hybrid's stages (strides 4, 8), middle and last block; else quarters."""
    depth = arguments["depth"]
    if "hybrid_depths" in arguments:
        return 0, 1, 2 + depth // 2 - 1, 2 + depth - 1
    return tuple(depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4))


def _entry(name: str, arguments: dict):
    """The function that timm calls to build variant `name`."""

    def build(pretrained: bool = False, **kwargs) -> Fan:
        img_size = kwargs.get("img_size")
        if img_size is not None:
            height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
            overlay = {"input_size": (3, height, width), **(kwargs.pop("pretrained_cfg_overlay", None) or {})}
            kwargs["pretrained_cfg_overlay"] = overlay
        # `timm.create_model` takes fields of the architecture as keyword arguments, too.
        options = {**arguments, **kwargs}
        cfg = FanConfig(**{name: options.pop(name) for name in _ARCHITECTURE if name in options})
        feature_cfg = {
            "out_indices": options.pop("out_indices", _default_out_indices(arguments)),
            "feature_cls": "getter",
        }
        return build_model_with_cfg(
            Fan,
            name,
            pretrained,
            model_cfg=cfg,
            pretrained_filter_fn=adapt_names,
            feature_cfg=feature_cfg,
            **options,
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"Build {name}."
    return build


_ALL = {
    name + suffix: {**arguments, "token_head": bool(suffix)}
    for name, arguments in VARIANTS.items()
    for suffix in ("", "_token")
}
default_cfgs = generate_default_cfgs(
    {name: _pretrained_cfg(name, arguments, arguments["token_head"]) for name, arguments in _ALL.items()}
)
for _name, _arguments in _ALL.items():
    globals()[_name] = register_model(_entry(_name, _arguments))
