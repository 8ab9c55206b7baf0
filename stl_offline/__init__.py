"""Token labels made once, shared like data, and students trained from them at the speed of plain training.

The public interface is what this module lists in ``__all__``; every other module may change between releases. Names are
loaded on first use, so ``import stl_offline`` is quick. Those that need an extra raise `MissingExtraError` where
``pip install 'stl-offline[train]'`` has not been run; ``[torch]``, without FFCV, is enough where that is named.

- Label sets: `open_label_set`, `LabelSet`, `LabelMap`; `verify`, `merge`, `convert`, `push`, `pull`.
- Writing a label set from any model: `LabelSetWriter` with a `LabelSpec` and one `ShardArrays` per shard.
- Labels in a training loop: `join`, `build_token_cache`, `TokenCache`, `TokenTargets`, `TokenLabels`,
  `token_targets`, `MixSettings`; beside webdataset streams `join_labels` (`JoinedLabels`).
- Geometry: `View`, `CropSettings`, `draw_views`, `whole_views`, `center_views`, `relative_view`.
- Packed images and their loader (needs the extra [train]): `pack`, `open_beton`, `Beton`, `TokenLoader`,
  `ImageSettings`, `Batch`.
- Models and the token loss (needs the extra [torch]): `create_labeler`, `TokenLabeler`, `TokenModel`, `load_model`,
  `save_classifier`, `token_cross_entropy`.
- Your own PyTorch loop (needs the extra [torch]): `TokenLabelDataset`, `TokenBatch`, `RandomResizedCrop`, `mix_batch`,
  `MixedBatch`; for timm's train.py `TimmTokenDataset`, `TokenLoss`.
- The commands, each a function of its settings (needs the extra [train]): `train_labeler` (`LabelerConfig`),
  `dump_labels` (`DumpConfig`; `label_with` labels with any function), `train_student` (`StudentConfig`),
  `evaluate` (`EvaluateConfig`).
- Dense prediction (needs the extra [train]): `load_backbone`, `load_segmenter`, `load_detector`; `PyramidEncoder` for
  segmentation_models_pytorch.
- Errors: all derive from `StlError`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from stl_offline.errors import (
    FormatError,
    InputError,
    JoinError,
    MissingExtraError,
    StlError,
    TargetError,
    TrainingError,
)

if TYPE_CHECKING:
    from stl_offline.config import DumpConfig, EvaluateConfig, LabelerConfig, StudentConfig
    from stl_offline.dump import dump_labels, label_with
    from stl_offline.evaluation import evaluate
    from stl_offline.geometry import CropSettings, View, center_views, draw_views, relative_view, whole_views
    from stl_offline.images.beton import Beton, open_beton
    from stl_offline.images.pack import pack
    from stl_offline.labels.arrays import LabelMap, ShardArrays
    from stl_offline.labels.cache import build_token_cache
    from stl_offline.labels.cache_file import TokenCache
    from stl_offline.labels.convert import convert
    from stl_offline.labels.join import join
    from stl_offline.labels.label_set import LabelSet, open_label_set
    from stl_offline.labels.merge import merge
    from stl_offline.labels.spec import LabelSpec
    from stl_offline.labels.transfer import pull, push
    from stl_offline.labels.verify import verify
    from stl_offline.labels.writer import LabelSetWriter
    from stl_offline.loader import Batch, ImageSettings, TokenLoader
    from stl_offline.loops import (
        MixedBatch,
        RandomResizedCrop,
        TimmTokenDataset,
        TokenBatch,
        TokenLabelDataset,
        TokenLoss,
        mix_batch,
    )
    from stl_offline.losses import token_cross_entropy
    from stl_offline.models import TokenLabeler, TokenModel, create_labeler, load_model, save_classifier
    from stl_offline.settings import MixSettings
    from stl_offline.targets import TokenLabels, TokenTargets, token_targets
    from stl_offline.training.train_labeler import train_labeler
    from stl_offline.training.train_student import train_student
    from stl_offline.transfer import PyramidEncoder, load_backbone, load_detector, load_segmenter
    from stl_offline.webdataset import JoinedLabels, join_labels

__version__ = "0.2.0.dev0"
__all__ = [
    "Batch",
    "Beton",
    "CropSettings",
    "DumpConfig",
    "EvaluateConfig",
    "FormatError",
    "ImageSettings",
    "InputError",
    "JoinError",
    "JoinedLabels",
    "LabelMap",
    "LabelSet",
    "LabelSetWriter",
    "LabelSpec",
    "LabelerConfig",
    "MissingExtraError",
    "MixSettings",
    "MixedBatch",
    "PyramidEncoder",
    "RandomResizedCrop",
    "ShardArrays",
    "StlError",
    "StudentConfig",
    "TargetError",
    "TimmTokenDataset",
    "TokenBatch",
    "TokenCache",
    "TokenLabelDataset",
    "TokenLabeler",
    "TokenLabels",
    "TokenLoader",
    "TokenLoss",
    "TokenModel",
    "TokenTargets",
    "TrainingError",
    "View",
    "__version__",
    "build_token_cache",
    "center_views",
    "convert",
    "create_labeler",
    "draw_views",
    "dump_labels",
    "evaluate",
    "join",
    "join_labels",
    "label_with",
    "load_backbone",
    "load_detector",
    "load_model",
    "load_segmenter",
    "merge",
    "mix_batch",
    "open_beton",
    "open_label_set",
    "pack",
    "pull",
    "push",
    "relative_view",
    "save_classifier",
    "token_cross_entropy",
    "token_targets",
    "train_labeler",
    "train_student",
    "verify",
    "whole_views",
]

# module → names that it gives; the same as the imports above, which type checkers read.
_CORE = {
    "config": ("DumpConfig", "EvaluateConfig", "LabelerConfig", "StudentConfig"),
    "geometry": ("CropSettings", "View", "center_views", "draw_views", "relative_view", "whole_views"),
    "labels.arrays": ("LabelMap", "ShardArrays"),
    "labels.cache": ("build_token_cache",),
    "labels.cache_file": ("TokenCache",),
    "labels.convert": ("convert",),
    "labels.join": ("join",),
    "labels.label_set": ("LabelSet", "open_label_set"),
    "labels.merge": ("merge",),
    "labels.spec": ("LabelSpec",),
    "labels.transfer": ("pull", "push"),
    "labels.verify": ("verify",),
    "labels.writer": ("LabelSetWriter",),
    "settings": ("MixSettings",),
    "targets": ("TokenLabels", "TokenTargets", "token_targets"),
    "webdataset": ("JoinedLabels", "join_labels"),
}
_TORCH = {
    "loops": (
        "MixedBatch",
        "RandomResizedCrop",
        "TimmTokenDataset",
        "TokenBatch",
        "TokenLabelDataset",
        "TokenLoss",
        "mix_batch",
    ),
    "losses": ("token_cross_entropy",),
    "models": ("TokenLabeler", "TokenModel", "create_labeler", "load_model", "save_classifier"),
}
_TRAIN = {
    "dump": ("dump_labels", "label_with"),
    "evaluation": ("evaluate",),
    "images.beton": ("Beton", "open_beton"),
    "images.pack": ("pack",),
    "loader": ("Batch", "ImageSettings", "TokenLoader"),
    "training.train_labeler": ("train_labeler",),
    "training.train_student": ("train_student",),
    "transfer": ("PyramidEncoder", "load_backbone", "load_detector", "load_segmenter"),
}
_MODULE_OF = {name: module for module, names in (_CORE | _TORCH | _TRAIN).items() for name in names}


if not TYPE_CHECKING:  # or type checkers would take any name to be there

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = _MODULE_OF[name]
        try:
            value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        except ImportError as error:
            if module in _CORE or (error.name or "").partition(".")[0] == __name__:
                raise
            extra = "torch" if module in _TORCH else "train"
            raise MissingExtraError(
                f"{__name__}.{name} needs the extra [{extra}]: pip install 'stl-offline[{extra}]' ({error})",
                name=error.name,
            ) from error
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
