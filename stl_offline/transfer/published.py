"""``stl-offline transfer import``: the segmenters that FAN's authors published, with the names of their code, as a run.

Their code (github.com/NVlabs/FAN, folder segmentation) is MMSegmentation 0.13 with FAN hybrids and SegFormer's head.
Its checkpoints have the backbone under ``backbone.`` and the head under ``decode_head.``.

K: classes; C: width of the head.
"""

import re
from pathlib import Path
from typing import Any

import torch

from stl_offline.config_transfer import PUBLISHED_SEGMENTERS, ImportConfig
from stl_offline.errors import InputError
from stl_offline.files import make_folder
from stl_offline.models import WEIGHTS_NAME, adapt_names, read_state_dict, save_model
from stl_offline.transfer.class_maps import class_map_index
from stl_offline.transfer.pairs import check_ignore_id, class_list
from stl_offline.transfer.segmenter import Segmenter, SegmenterDescription

# Which block their third map is taken from. The first two are the ConvNeXt stages, the fourth lies behind the class
# attention. In the large model it is not the last block.
_BLOCKS = dict(zip(PUBLISHED_SEGMENTERS, (7, 9, 15, 18), strict=True))
_WINDOW = (1024, 1024)  # trained on, and of the sliding windows of their evaluation
_HEAD = (
    (r"linear_fuse\.conv\.", "fuse.0."),
    (r"linear_fuse\.bn\.", "fuse.1."),
    (r"linear_pred\.", "classify."),
)
_UNUSED = "decode_head.conv_seg."  # a layer of MMSegmentation's base class that their head never calls


def import_segmenter(config: ImportConfig) -> dict[str, Any]:
    """Write a published segmenter as a run that `transfer evaluate` takes; gives back what was written.

    Raises:
        InputError: no such file, other tensors than the model has, or a run in the way.
        FormatError: the file is no checkpoint, or not a safe one.
    """
    place = Path(config.out) / WEIGHTS_NAME
    if place.exists():
        raise InputError(f"{config.out} holds a run; choose another `out`")
    class_names = class_list(config.classes)
    check_ignore_id(config.ignore_id, class_names)
    model, description = read_segmenter(config.checkpoint, config.model, class_names, config.ignore_id)
    make_folder(place.parent)
    save_model(place, model.state_dict(), description)
    return {"out": config.out, "model": config.model, "classes": len(class_names), "head_width": description.head_width}


def read_segmenter(
    path: str | Path, name: str, class_names: tuple[str, ...], ignore_id: int = 255
) -> tuple[Segmenter, SegmenterDescription]:
    """A published segmenter in evaluation mode, and its description.

    Args:
        path: their checkpoint; a pickle is read without running what it holds.
        name: of the FAN hybrid.
        class_names: in the order of the ids that it was trained with.
        ignore_id: of pixels without a class in masks to compare it with.

    Raises:
        InputError, FormatError: as `import_segmenter`.
    """
    published, _ = read_state_dict(path, use_ema=False)
    classify = published.get("decode_head.linear_pred.weight")
    if classify is None or classify.ndim != 4 or not any(key.startswith("backbone.") for key in published):
        raise InputError(
            f"{path} has no backbone and decode_head.linear_pred: it is no segmenter of FAN's released code"
        )
    weights = segmenter_names(published)
    if len(classify) != len(class_names):
        raise InputError(f"{path} has {len(classify)} classes, and `classes` {len(class_names)} names")
    indices = (0, 1, 2 + _BLOCKS[name], class_map_index(name))
    description = SegmenterDescription(name, indices, class_names, _WINDOW, classify.shape[1], ignore_id)
    model = description.build()
    own = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    missing = [key for key in own if key not in weights]
    unexpected = [key for key in weights if key not in model.state_dict()]
    wrong = [key for key, value in own.items() if key in weights and weights[key].shape != value.shape]
    if missing or unexpected or wrong:
        first = (missing or unexpected or wrong)[0]
        raise InputError(
            f"{path} does not fit {name}: {len(missing)} tensors are missing, {len(unexpected)} unexpected, and "
            f"{len(wrong)} have another shape, for example {first}; check `model`"
        )
    model.load_state_dict(weights, strict=False)  # all but the counters of batch norms, which nothing computes with
    return model.eval(), description


def segmenter_names(published: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the names of `Segmenter`, from those of the released code.

    Its linear layers over pixels, (C, C_i), become 1×1 convolutions, (C, C_i, 1, 1).
    """
    found = {}
    trunk = {key.removeprefix("backbone."): value for key, value in published.items() if key.startswith("backbone.")}
    for key, value in adapt_names(trunk, torch.nn.Identity()).items():
        found[f"backbone.net.model.{key}"] = value
    for key, value in published.items():
        if key.startswith("backbone.") or key.startswith(_UNUSED):
            continue
        name = key.removeprefix("decode_head.")
        if level := re.fullmatch(r"linear_c(\d)\.proj\.(weight|bias)", name):
            number, kind = int(level[1]) - 1, level[2]
            found[f"head.levels.{number}.{kind}"] = value[..., None, None] if kind == "weight" else value
            continue
        for pattern, ours in _HEAD:
            name = re.sub(f"^{pattern}", ours, name)
        found[f"head.{name}"] = value
    return found
