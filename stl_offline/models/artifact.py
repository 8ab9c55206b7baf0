"""A trained model as a file: safetensors weights with a description of the model in their header.

A run's folder holds ``weights.safetensors``; that file alone is enough to use the model anywhere.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from stl_offline.config import INTERPOLATIONS
from stl_offline.errors import FormatError, InputError, TargetError
from stl_offline.files import atomic_path, sha256_file
from stl_offline.models.build import build_model
from stl_offline.models.checkpoints import load_checkpoint
from stl_offline.settings import TOKEN_HEADS

WEIGHTS_NAME = "weights.safetensors"
_HEADER_KEY = "stl_offline"
_DIGEST_KEY = "stl_offline_sha256"


# Limits of what a description may ask for: it comes with the file, from whoever made that.
_LARGEST_SIDE, _MOST_CLASSES = 8192, 1 << 20
_STAGES = ("labeler", "student")


class Description(Protocol):
    """What stands in the header of a weights file: enough to build the model again."""

    def to_json(self) -> str:
        """The description as one JSON object."""
        ...


@dataclass(frozen=True)
class ModelDescription:
    """What is needed to build a trained model again.

    model: a name in timm's registry; class_names: K distinct names, in the order of the class ids; img_size: side of
    the images, in pixels; stage: "labeler" or "student"; interpolation: how images were resized; token_head_trained:
    False for a student trained without token labels, whose token head is random; token_head: "" for a model that timm
    builds with one, else the kind of token head of a `TokenModel`, "own" or "shared".

    Raises:
        InputError: a value that no model of this version has; the message names it.
    """

    model: str
    class_names: tuple[str, ...]
    img_size: int
    stage: str
    version: int = 1
    interpolation: str = "area"
    token_head_trained: bool = True
    token_head: str = ""

    def __post_init__(self) -> None:
        if type(self.version) is not int or self.version != 1:
            raise InputError(f"version must be 1, the only one that this release reads; got {self.version!r}")
        # No prefix such as hf-hub: or local-dir: may make timm fetch or read anything else.
        if not isinstance(self.model, str) or not re.fullmatch(r"[\w.]+", self.model) or not timm.is_model(self.model):
            raise InputError(f"model must be a name in timm's registry, got {_short(self.model)}")
        names = self.class_names
        if not isinstance(names, list | tuple) or not 1 <= len(names) <= _MOST_CLASSES:
            raise InputError(f"class_names must be a list of 1 to {_MOST_CLASSES:,} names, got {_short(names)}")
        if not all(isinstance(name, str) and name for name in names) or len(set(names)) != len(names):
            raise InputError(f"class_names must be distinct strings, none of them empty; got {_short(names)}")
        object.__setattr__(self, "class_names", tuple(names))
        if type(self.img_size) is not int or not 1 <= self.img_size <= _LARGEST_SIDE:
            raise InputError(f"img_size must be an integer from 1 to {_LARGEST_SIDE:,}, got {_short(self.img_size)}")
        if self.stage not in _STAGES:
            raise InputError(f"stage must be one of {', '.join(_STAGES)}; got {_short(self.stage)}")
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(
                f"interpolation must be one of {', '.join(INTERPOLATIONS)}; got {_short(self.interpolation)}"
            )
        if not isinstance(self.token_head_trained, bool):
            raise InputError(f"token_head_trained must be true or false, got {_short(self.token_head_trained)}")
        if self.token_head not in ("", *TOKEN_HEADS):
            raise InputError(
                f"token_head must be one of {', '.join(TOKEN_HEADS)} or empty, got {_short(self.token_head)}"
            )

    @property
    def has_trained_tokens(self) -> bool:
        """Whether token logits mean anything: their head was trained, or it is the class head, which always is."""
        return self.token_head_trained or self.token_head == "shared"

    def to_json(self) -> str:
        values = dataclasses.asdict(self)
        if not self.token_head:  # as releases wrote it that had no other models
            del values["token_head"]
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str, where: str) -> "ModelDescription":
        """The inverse of `to_json`; ``where`` is the file, for messages. Raises `FormatError`."""
        try:
            values: Any = json.loads(text)
            if not isinstance(values, dict):
                raise InputError(f"it must be a JSON object, got {_short(values)}")
            if values.get("kind") in ("segmenter", "detector"):
                raise FormatError(
                    f"{where} is a {values['kind']}, not a classifier; it is measured by: stl-offline transfer evaluate"
                )
            known = {field.name for field in dataclasses.fields(cls)}
            if unknown := sorted(values.keys() - known):
                raise InputError(f"unknown entries {_short(unknown)}; known: {', '.join(sorted(known))}")
            if values.get("version") is None:
                raise InputError("it has no version")
            return cls(**values)
        except FormatError:
            raise
        except (TypeError, ValueError, RecursionError) as error:
            raise FormatError(
                f"{where} has a model description that cannot be used ({error}); train or copy it again"
            ) from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def save_model(path: str | Path, weights: dict[str, Tensor], description: Description) -> None:
    """Write weights, description and a digest of both to ``path``, whole or not at all."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
    text = description.to_json()
    metadata = {_HEADER_KEY: text, _DIGEST_KEY: _digest(text, tensors)}
    with atomic_path(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata=metadata)
        except safetensors.SafetensorError as error:  # also raised for what the system refuses
            raise TargetError(f"cannot write {path}: {error}; nothing was changed there") from error
        _order_metadata(temporary)


def _order_metadata(path: Path) -> None:
    """Put a file's metadata in the order of their names. safetensors gives them a random one, but label sets and runs
    name models by their file's SHA-256: equal models are to be equal files."""
    with open(path, "r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:  # as it is, unless a release of safetensors writes shorter JSON
            stream.seek(8)
            stream.write(text.ljust(size))


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
    return ModelDescription.from_json(read_header(path), str(path))


def read_header(path: Path) -> str:
    """The description in the header of a weights file, as it was written (`Description.to_json`).

    Raises:
        FormatError: the file is no whole safetensors file, or was not written by this package.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise FormatError(
            f"{path} is not a whole safetensors file ({error}); other programs' weights, such as a .pth.tar, are given "
            "together with the name of their model"
        ) from error
    if _HEADER_KEY not in metadata:
        raise FormatError(f"{path} was not written by stl-offline: its header has no entry {_HEADER_KEY!r}")
    return metadata[_HEADER_KEY]


def load_model(run_or_file: str | Path) -> tuple[nn.Module, ModelDescription]:
    """Build the model that a run trained and load its weights.

    Args:
        run_or_file: a run's folder, or its ``weights.safetensors`` alone.

    Returns:
        The model, as timm builds it or as a `TokenModel`, and its description (class names, input size, …).

    Raises:
        InputError: nothing is there.
        FormatError: the file is damaged, or timm cannot build what it describes.
    """
    path = weights_path(run_or_file)
    description = read_description(path)
    classes, side = len(description.class_names), description.img_size
    try:
        model = build_model(description.model, classes, side, token_head=description.token_head)
    except Exception as error:  # each model checks its arguments in its own way
        raise FormatError(
            f"{path} describes a {description.model} of {classes:,} classes for images of {side} pixels, which timm "
            f"cannot build ({' '.join(str(error).split())[:200]})"
        ) from error
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
        raise FormatError(f"{path} is damaged ({error}); copy it again, or train again with `resume=False`") from error
    if found != stored:
        raise FormatError(
            f"{path} is damaged: its content has SHA-256 {found[:12]}…, its header records {stored[:12]}…; "
            "copy it again, or train again with `resume=False`"
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
