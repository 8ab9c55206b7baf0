"""A trained model as a file: safetensors weights with a description of the model in their header.

A run's folder holds ``weights.safetensors``; that file alone is enough to use the model anywhere.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from stl_offline.errors import FormatError, InputError, TargetError
from stl_offline.files import atomic_path, sha256_file
from stl_offline.models.checkpoints import load_checkpoint

WEIGHTS_NAME = "weights.safetensors"
_HEADER_KEY = "stl_offline"
_DIGEST_KEY = "stl_offline_sha256"


@dataclass(frozen=True)
class ModelDescription:
    """What is needed to build the model again: timm's name, the class list, the input."""

    model: str
    class_names: tuple[str, ...]
    img_size: int
    stage: str  # "labeler" or "student"
    version: int = 1
    interpolation: str = "area"
    token_head_trained: bool = True  # False for a student trained without token labels: its token head is random

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str, where: str) -> "ModelDescription":
        try:
            values: dict[str, Any] = json.loads(text)
            if values.get("version") != 1:
                raise FormatError(
                    f"{where} has a model description of version {values.get('version')!r}; this release reads 1"
                )
            values["class_names"] = tuple(values["class_names"])
            return cls(**values)
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise FormatError(f"{where} has a damaged model description ({error}); train or copy it again") from error


def save_model(path: str | Path, weights: dict[str, Tensor], description: ModelDescription) -> None:
    """Write weights, description and a digest of both to ``path``, whole or not at all."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
    text = description.to_json()
    metadata = {_HEADER_KEY: text, _DIGEST_KEY: _digest(text, tensors)}
    with atomic_path(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata=metadata)
        except safetensors.SafetensorError as error:  # what the system says of a write, too
            raise TargetError(f"cannot write {path}: {error}; nothing was changed there") from error


def weights_path(run_or_file: str | Path) -> Path:
    """The weights of a run's folder, or the file itself.

    Raises:
        InputError: nothing is there, or the run has not finished an epoch yet.
    """
    path = Path(run_or_file)
    if path.is_dir():
        if not (path / WEIGHTS_NAME).is_file():
            raise InputError(f"{path} holds no {WEIGHTS_NAME}: is it a run, and has its first epoch ended?")
        return path / WEIGHTS_NAME
    if not path.is_file():
        raise InputError(f"there is no run and no checkpoint at {path}")
    return path


def read_description(run_or_file: str | Path) -> ModelDescription:
    """The description in the header of a weights file."""
    path = weights_path(run_or_file)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise FormatError(
            f"{path} is not a whole safetensors file ({error}); published .pth.tar files go with --labeler timm:NAME "
            "--labeler-checkpoint FILE"
        ) from error
    if _HEADER_KEY not in metadata:
        raise FormatError(f"{path} was not written by stl-offline: it does not say which model it holds")
    return ModelDescription.from_json(metadata[_HEADER_KEY], str(path))


def load_model(run_or_file: str | Path) -> tuple[nn.Module, ModelDescription]:
    """Build the model that a run trained and load its weights."""
    path = weights_path(run_or_file)
    description = read_description(path)
    model = timm.create_model(
        description.model, num_classes=len(description.class_names), img_size=description.img_size
    )
    check_digest(path)
    load_checkpoint(model, path)
    return model, description


def check_digest(path: Path) -> None:
    """Compare a weights file with the digest in its header. Files of releases that wrote no digest pass.

    Raises:
        FormatError: the file is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        stored = metadata.get(_DIGEST_KEY)
        found = stored and _digest(metadata.get(_HEADER_KEY, ""), safetensors.torch.load_file(path))
    except (safetensors.SafetensorError, OSError, KeyError) as error:  # KeyError: a type that torch does not have
        raise FormatError(f"{path} is damaged ({error}); copy it again, or train again") from error
    if found != stored:
        raise FormatError(
            f"{path} is damaged: its content has SHA-256 {found[:12]}…, its header records {stored[:12]}…; "
            "copy it again, or train again"
        )


def _digest(description: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the description and, in the order of their names, of each tensor's name, type, shape and values."""
    digest = hashlib.sha256(description.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def weights_sha256(run_or_file: str | Path) -> str:
    """SHA-256 of the weights file: a label set's manifest names its labeler by it."""
    return sha256_file(weights_path(run_or_file))
