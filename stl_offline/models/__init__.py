"""FAN models in timm's registry, safe checkpoint loading, and any timm classifier as a token labeler.

Importing this package is what registers the models: `timm.create_model("fan_tiny_8_p4_hybrid_token")` works afterwards.
"""

from stl_offline.models.artifact import (
    WEIGHTS_NAME,
    Description,
    ModelDescription,
    check_digest,
    load_model,
    read_description,
    read_header,
    save_model,
    weights_path,
    weights_sha256,
)
from stl_offline.models.build import build_model, check_model, resolve_model
from stl_offline.models.checkpoints import LoadReport, adapt_names, load_checkpoint, read_state_dict
from stl_offline.models.classifier import Classifier, load_classifier
from stl_offline.models.export import save_classifier
from stl_offline.models.fan import Fan
from stl_offline.models.inference import InferenceFan, inference_form
from stl_offline.models.initial import InitialWeights, check_initial, freeze_trunk, load_initial
from stl_offline.models.labeler_by_name import check_labeler, create_labeler
from stl_offline.models.token_labeler import TokenLabeler
from stl_offline.models.token_model import TokenModel
from stl_offline.models.variants import VARIANTS

__all__ = [
    "VARIANTS",
    "WEIGHTS_NAME",
    "Classifier",
    "Description",
    "Fan",
    "InferenceFan",
    "InitialWeights",
    "LoadReport",
    "ModelDescription",
    "TokenLabeler",
    "TokenModel",
    "adapt_names",
    "build_model",
    "check_digest",
    "check_initial",
    "check_labeler",
    "check_model",
    "create_labeler",
    "freeze_trunk",
    "inference_form",
    "load_checkpoint",
    "load_classifier",
    "load_initial",
    "load_model",
    "read_description",
    "read_header",
    "read_state_dict",
    "resolve_model",
    "save_classifier",
    "save_model",
    "weights_path",
    "weights_sha256",
]
