"""Images as a classifier's evaluation shows them, for suites and for data sets of one's own.

B: batch; K: classes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import timm.data
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from stl_offline.distributed import World
from stl_offline.errors import InputError, JoinError, StlError
from stl_offline.evaluation.corruptions import corrupt
from stl_offline.evaluation.suites import imagenet_wnids
from stl_offline.files import sha256_parts
from stl_offline.images.beton import open_beton
from stl_offline.images.encode import decode
from stl_offline.images.sources import listed, open_source, source_state
from stl_offline.models import Classifier

# What Pillow raises on files that it cannot decode.
_UNDECODABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, StlError)


@dataclass(frozen=True)
class Transform:
    """From an image to the model's input, before normalisation: what timm's validation does.

    side: (H, W); crop_pct, interpolation, crop_mode: timm's; as_is: the image is the input already. One of the input's
    size is not touched, others are resized to it without a margin to crop.
    """

    side: tuple[int, int]
    crop_pct: float
    interpolation: str
    crop_mode: str = "center"
    as_is: bool = False

    def __call__(self, image: Image.Image) -> np.ndarray:
        """RGB uint8 (H, W, 3)."""
        if self.as_is and image.size == self.side[::-1]:
            return np.asarray(image)
        return np.ascontiguousarray(np.asarray(self._steps(image)).transpose(1, 2, 0))

    def described(self) -> dict[str, Any]:
        """Its fields, as JSON holds them."""
        return asdict(self) | {"side": list(self.side)}

    @cached_property
    def _steps(self) -> Any:
        return timm.data.create_transform(
            (3, *self.side),
            use_prefetcher=True,  # pixels, not normalised
            crop_pct=1.0 if self.as_is else self.crop_pct,
            interpolation=self.interpolation,
            crop_mode=self.crop_mode,
        )


class Images(Protocol):
    """Images by number. names: (n,) unique; labels: int64 (n,)."""

    names: list[str]
    labels: np.ndarray

    def __len__(self) -> int: ...

    def load(self, index: int) -> Image.Image:
        """Image ``index``."""


class OwnImages:
    """Images of any source. labels: each image's column in the classifier's logits; columns: those of the data's
    classes, ascending; fingerprint: of the images and labels.

    Raises:
        InputError: a source that cannot be read, or a model without class names.
        JoinError: classes that are not the model's.
    """

    def __init__(self, place: str, classifier: Classifier) -> None:
        if Path(place).suffix == ".beton":
            beton = open_beton(place)
            self.names, class_ids, class_names = list(beton.keys), beton.class_ids, beton.class_names
            self._load = lambda index: Image.fromarray(beton.read_image(index))
            fingerprint = beton.fingerprint + ("" if beton.max_size is None else f" {beton.max_size}")
        else:
            source = open_source(place)
            images = listed(source)
            self.names, class_names = [image.key for image in images], source.class_names
            class_ids = np.array([image.class_id for image in images], dtype=np.int64)
            self._load = lambda index: decode(images[index].data)
            fingerprint = source_state(place)
        if classifier.class_names is None:
            raise InputError(f"{classifier.name} has classes without names; give `class_names`, one name per line")
        column = {name: number for number, name in enumerate(classifier.class_names)}
        unknown = [name for name in class_names if name not in column]
        if unknown:
            numbered = "; folders 0 to 999 are ImageNet-V2's, which is scored with `suite=v2`"
            raise JoinError(
                f"{len(unknown):,} of the {len(class_names):,} classes of {place} are not among the "
                f"{len(column):,} of {classifier.name} (such as {unknown[0]!r}); use data of the model's classes"
                + (numbered if all(name.isdecimal() for name in class_names) else "")
            )
        self.columns = sorted(column[name] for name in class_names)
        self.labels = np.array([column[name] for name in class_names], dtype=np.int64)[class_ids]
        # The labels come from the classifier's class names, too.
        self.fingerprint = sha256_parts(fingerprint.encode(), self.labels.tobytes())

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int) -> Image.Image:
        """Image ``index``."""
        return self._load(index)


@dataclass(frozen=True)
class Inputs:
    """What images become a model's inputs. images: called where they are needed; corruption: (kind, severity)."""

    images: Callable[[], Images]
    transform: Transform
    corruption: tuple[str, int] | None = None


class InputImages(Dataset):
    """Inputs by (number of the part, place in it): (uint8 (H, W, 3), label, place); a text for a broken image.

    Of the parts one at a time is listed. seed: of generated corruptions, with the image's name, the kind and the
    severity.
    """

    def __init__(self, parts: Sequence[Inputs], seed: int) -> None:
        self.parts, self.seed = parts, seed
        self._listed: tuple[int, Images] | None = None

    def __getitem__(self, index: tuple[int, int]) -> tuple[np.ndarray, int, int] | str:
        number, place = index
        part = self.parts[number]
        if self._listed is None or self._listed[0] != number:
            self._listed = number, part.images()
        images = self._listed[1]
        try:
            pixels = part.transform(images.load(place).convert("RGB"))
        except _UNDECODABLE as error:
            return f"{images.names[place]} cannot be decoded ({' '.join(str(error).split())[:120]})"
        if part.corruption is not None:
            kind, severity = part.corruption
            pixels = corrupt(pixels, kind, severity, seed=self.seed, key=images.names[place])
        return pixels, int(images.labels[place]), place


class Batches(Sampler[list[tuple[int, int]]]):
    """Batches of indices of `InputImages`, part after part, of which this process takes every ``world.size``-th image.

    sizes: (number of the part, its images) of each part that is to be scored.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], batch_size: int, world: World) -> None:
        self.sizes, self.batch_size, self.world = sizes, batch_size, world

    def places(self, size: int) -> range:
        """This process's images of a part."""
        return range(self.world.rank, size, self.world.size)

    def of_part(self, size: int) -> int:
        """Batches of a part of ``size`` images."""
        return math.ceil(len(self.places(size)) / self.batch_size)

    def __len__(self) -> int:
        return sum(self.of_part(size) for _, size in self.sizes)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number, size in self.sizes:
            places = self.places(size)
            for start in range(0, len(places), self.batch_size):
                yield [(number, place) for place in places[start : start + self.batch_size]]


def collate(items: Sequence[tuple[np.ndarray, int, int] | str]) -> tuple[Tensor, Tensor, list[int]] | str:
    """A batch of `InputImages`: uint8 (B, H, W, 3), int64 (B,), places; the text of the first broken image if any."""
    broken = next((item for item in items if isinstance(item, str)), None)
    if broken is not None:
        return broken
    pixels, labels, places = zip(*items, strict=True)
    return torch.from_numpy(np.stack(pixels)), torch.tensor(labels), list(places)


def start_loading(worker: int) -> None:
    """Set up a loading process: OpenCV, which generates corruptions, computes in it alone, as torch does."""
    cv2.setNumThreads(0)


def imagenet_columns(classifier: Classifier) -> list[int]:
    """Each ImageNet class's column in the model's logits, in whatever order the model lists its classes.

    Raises:
        JoinError: the model lacks some of them.
    """
    place = {name: column for column, name in enumerate(classifier.class_names or ())}
    missing = [wnid for wnid in imagenet_wnids() if wnid not in place]
    if missing:
        raise JoinError(
            f"{classifier.name} has {1000 - len(missing):,} of ImageNet's 1,000 classes under their WordNet ids "
            f"(missing: {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}); the suites need all of them"
        )
    return [place[wnid] for wnid in imagenet_wnids()]
