"""A trained model's classifier alone, for programs that know timm's models and nothing of tokens."""

from pathlib import Path

import safetensors.torch

from stl_offline.files import atomic_path
from stl_offline.models.artifact import load_model
from stl_offline.models.fan import Fan


def save_classifier(run_or_file: str | Path, path: str | Path) -> str:
    """Write the classifier of a run, without its token head, under timm's own names.

    ``timm.create_model(NAME, num_classes=K, checkpoint_path=path)`` loads it, as do timm's scripts; with ``img_size=``
    for models of fixed input size, and for a FAN after ``import stl_offline.models``.

    Args:
        run_or_file: a run's folder, or a weights file of one.
        path: the `.safetensors` file to write.

    Returns:
        NAME, of timm's registry.

    Raises:
        InputError, FormatError: as `load_model`.
    """
    model, description = load_model(run_or_file)
    name = description.model
    if isinstance(model, Fan):
        name = name.removesuffix("_token")
        weights = {key: value for key, value in model.state_dict().items() if not key.startswith("aux_head.")}
    else:
        weights = model.trunk.state_dict() if description.token_head else model.state_dict()
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(
            {key: value.contiguous() for key, value in weights.items()}, temporary, metadata={"format": "pt"}
        )
    return name
