"""What builds a trained model of dense prediction again, stored beside its weights."""

import dataclasses
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from torch import nn

from stl_offline.errors import FormatError, InputError
from stl_offline.models import check_digest, load_checkpoint, read_header, weights_path

_MOST_CLASSES, _MOST_LEVELS, _VERSION = 1 << 16, 64, 1
WIDEST, LARGEST_SIDE = 1 << 16, 1 << 16


@dataclass(frozen=True)
class Description(ABC):
    """What all of these models have: subclasses add fields, and ``build``.

    backbone: a name in timm's registry; indices: its feature maps; class_names: K.

    KIND: of the model, in its file; COMMAND: what trains it; BOUNDS: each number's least and greatest value, and of
    lists their length where it is fixed.

    Raises:
        InputError: a value that no such model has.
    """

    backbone: str
    indices: tuple[int, ...]
    class_names: tuple[str, ...]

    KIND: ClassVar[str]
    COMMAND: ClassVar[str]
    BOUNDS: ClassVar[dict[str, tuple[int, int, int | None]]]

    def __post_init__(self) -> None:
        lists = ("indices", "class_names", *(name for name, (*_, length) in self.BOUNDS.items() if length))
        for name in lists:
            if not isinstance(getattr(self, name), list | tuple):
                raise InputError(f"{name} must be a list")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.backbone, str):
            raise InputError(f"backbone must be a name in timm's registry, got {self.backbone!r:.40}")
        names = self.class_names
        if not (1 <= len(names) <= _MOST_CLASSES and all(isinstance(name, str) for name in names)):
            raise InputError(f"class_names must be 1 to {_MOST_CLASSES:,} names")
        if len(self.indices) > _MOST_LEVELS:
            raise InputError(f"indices must be at most {_MOST_LEVELS}")
        for name, (low, high, length) in {"indices": (0, WIDEST, None), **self.BOUNDS}.items():
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            if not values or any(type(each) is not int or not low <= each <= high for each in values):
                raise InputError(f"{name} must be whole numbers from {low} to {high:,}")
            if length is not None and len(values) != length:
                raise InputError(f"{name} must be {length} numbers")

    @abstractmethod
    def build(self) -> nn.Module:
        """The model with random weights."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self) | {"kind": self.KIND, "version": _VERSION})

    @classmethod
    def from_json(cls, text: str, where: str) -> Self:
        """The inverse of `to_json`; ``where`` is the file, for messages. Raises `FormatError`."""
        try:
            values: Any = json.loads(text)
            if not isinstance(values, dict) or values.pop("kind", None) != cls.KIND:
                raise InputError(f"it describes another kind of model; `{cls.COMMAND}` trains this one")
            version = values.pop("version", None)
            if version != _VERSION:
                raise InputError(f"it must be of version {_VERSION}, got {version!r:.40}")
            return cls(**values)
        except (TypeError, ValueError, RecursionError) as error:
            raise FormatError(f"{where} holds no {cls.KIND} that can be used ({error})") from error


D = TypeVar("D", bound=Description)


def load_trained(kind: type[D], run_or_file: str | Path) -> tuple[Any, D]:
    """Build the model that a run trained and load its weights: (model in evaluation mode, its description).

    Raises:
        InputError: nothing is there.
        FormatError: the file is damaged, or describes another kind of model.
    """
    path = weights_path(run_or_file)
    description = kind.from_json(read_header(path), str(path))
    model = description.build()
    check_digest(path)
    load_checkpoint(model, path)
    return model.eval(), description
