"""FAN models in timm's registry, safe checkpoint loading, and any timm classifier as a token labeler.

Importing this package is what registers the models: `timm.create_model("fan_tiny_8_p4_hybrid_token")` works afterwards.
"""

from stl_offline.models.checkpoints import LoadReport, load_checkpoint
from stl_offline.models.fan import Fan
from stl_offline.models.inference import InferenceFan, inference_form
from stl_offline.models.labeler import TokenLabeler, create_labeler
from stl_offline.models.variants import VARIANTS

__all__ = [
    "VARIANTS",
    "Fan",
    "InferenceFan",
    "LoadReport",
    "TokenLabeler",
    "create_labeler",
    "inference_form",
    "load_checkpoint",
]
