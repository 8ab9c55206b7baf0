"""Any map-style dataset of images with keys, with token labels.

B: batch; N: tokens; T: targets per token.
"""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from stl_offline.errors import InputError
from stl_offline.geometry import View
from stl_offline.labels.join import check_class_names
from stl_offline.labels.keys import rename_keys
from stl_offline.loops.crop import RandomResizedCrop
from stl_offline.pixels import IMAGE_FORMATS, to_rgb
from stl_offline.targets import TokenLabels


class TokenBatch(NamedTuple):
    """images: (B, 3, H, W); class_ids: int64 (B,); token_ids: int64 and token_weights: float32, (B, N, T), as
    `token_cross_entropy` takes them; sample_ids: int64 (B,), indexes of the dataset; views: float32 (B, 6)."""

    images: Tensor
    class_ids: Tensor
    token_ids: Tensor
    token_weights: Tensor
    sample_ids: Tensor
    views: Tensor


class Item(NamedTuple):
    """One sample: pixels (3, H, W), class id, index in the dataset, and view, float32 (6,)."""

    pixels: Any
    class_id: int
    sample: int
    view: np.ndarray


class TokenLabelDataset(Dataset):
    """A map-style dataset whose images are cropped here, so that token labels follow them.

    Give its `collate` to the DataLoader: it makes the token targets of a whole batch in compiled code. Call `set_epoch`
    before each epoch; worker processes that persist see it, too.

    Args:
        dataset: gives (image, class id), or a dict with these under "image" and "label"; images are PIL images, made
            RGB as for labelling, or tensors, before any crop, and not turned by an EXIF orientation. torchvision's
            ImageFolder, timm's ImageDataset, a Hugging Face dataset (its images are decoded here), or a `Subset`.
        labels: `TokenLabels.of` a label set.
        crop: how images are cropped. A label set of crops gives its own instead; of ``crop`` the size counts then.
        transform: pixels → (3, H, W), without moving them: colours, conversion, normalisation; default: floats in
            [0, 1].
        keys: of the samples, in the dataset's order; found for ImageFolder and timm's ImageDataset.
        key_prefix: ``OLD=NEW`` replaces the start OLD of keys, as ``--key-prefix``.
        class_names: of the dataset's class ids, in their order; found for datasets with ``classes``.

    Raises:
        InputError: keys or class names that are not found or do not fit, or a dataset with a transform of its own.
        JoinError: samples without labels (unless the labels are to skip them), or other classes than the labels'.
    """

    def __init__(
        self,
        dataset: Any,
        labels: TokenLabels,
        crop: RandomResizedCrop,
        *,
        transform: Callable[[Any], Tensor] | None = None,
        keys: Sequence[str] | None = None,
        key_prefix: str = "",
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.dataset, self.labels, self.crop = _undecoded(dataset), labels, crop
        self.transform = to_floats if transform is None else transform
        for innermost in _innermost(dataset):
            if getattr(innermost, "transform", None) is not None or _format(innermost) == "custom":
                raise InputError(
                    f"this {type(innermost).__name__} has a transform of its own, which token labels cannot follow; "
                    "give it to TokenLabelDataset, without crops and flips"
                )
            if getattr(innermost, "target_transform", None) is not None:
                raise InputError(
                    f"this {type(innermost).__name__} has a target_transform, which token labels cannot follow; "
                    "number its classes as the label set does"
                )
        names = class_names_of(dataset) if class_names is None else tuple(class_names)
        check_class_names(
            tuple(labels.class_names),
            names,
            "number the dataset's classes as the label set does: with an ImageFolder that has a find_classes of its "
            "own, or timm's `class_map`",
        )
        keys = keys_of(dataset) if keys is None else keys
        if len(keys) != len(dataset):
            raise InputError(f"the dataset has {len(dataset):,} samples, but {len(keys):,} keys are given")
        self.rows = labels.rows(rename_keys(keys, key_prefix))
        # In shared memory, so that worker processes see what `set_epoch` writes.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch that crops and drawn targets are of."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Item:
        item = self.dataset[index]
        image, class_id = (item["image"], item["label"]) if isinstance(item, dict) else item[:2]
        if isinstance(image, dict):
            image = _stored_image(image)
        if isinstance(image, Image.Image):
            image = to_rgb(image)
        pixels, view = self.crop(image, index, self.epoch, view=self._stored_view(index))
        return Item(self.transform(pixels), int(class_id), index, view.matrix.ravel())

    def _stored_view(self, index: int) -> View | None:
        row = self.rows[index : index + 1]
        stored = self.labels.stored_views(row, self.epoch) if row[0] >= 0 else None
        return None if stored is None or np.isnan(stored).any() else View.from_array(stored[0])

    def collate(self, items: Sequence[Item]) -> TokenBatch:
        """Samples → a batch with token targets: the DataLoader's ``collate_fn``."""
        samples = np.array([item.sample for item in items])
        views = np.stack([item.view for item in items])
        classes = np.array([item.class_id for item in items])
        ids, weights = self.labels(self.rows[samples], views, self.epoch, seed=self.crop.seed, class_ids=classes)
        return TokenBatch(
            torch.stack([item.pixels for item in items]),
            torch.from_numpy(classes),
            torch.from_numpy(ids),
            torch.from_numpy(weights),
            torch.from_numpy(samples),
            torch.from_numpy(views),
        )


def _undecoded(dataset: Any) -> Any:
    """A Hugging Face dataset with its images as they are stored, any other as it is.

    Its own decoding turns images by their EXIF orientation. Labels are made of images that are not turned.
    """
    if isinstance(dataset, Subset):
        inner = _undecoded(dataset.dataset)
        return dataset if inner is dataset.dataset else Subset(inner, dataset.indices)
    kind = (getattr(dataset, "features", None) or {}).get("image")
    if not getattr(kind, "decode", False) or not hasattr(dataset, "cast_column"):
        return dataset
    plain = dataset if _format(dataset) == "custom" else dataset.with_format(None)
    return plain.cast_column("image", type(kind)(decode=False))


def _format(dataset: Any) -> str | None:
    """The name of a Hugging Face dataset's output format; "custom" is a transform of its user's."""
    found = getattr(dataset, "format", None)
    return found.get("type") if isinstance(found, dict) else None


def _stored_image(stored: dict[str, Any]) -> Image.Image:
    """An image that Hugging Face's datasets have not decoded: its file's bytes, or the path of a file."""
    data = stored.get("bytes")
    return Image.open(stored["path"] if data is None else io.BytesIO(data), formats=IMAGE_FORMATS)


def to_floats(image: Any) -> Tensor:
    """A PIL image or a uint8 tensor → float32 (3, H, W) in [0, 1]; tensors of floats as they are."""
    if isinstance(image, Tensor):
        return image if image.is_floating_point() else image.float() / 255
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels.permute(2, 0, 1).contiguous().float() / 255


def keys_of(dataset: Any) -> list[str]:
    """Keys of a dataset's samples, as label sets have them: paths below its root.

    Raises:
        InputError: nothing names its samples.
    """
    if isinstance(dataset, Subset):
        keys = keys_of(dataset.dataset)
        return [keys[index] for index in dataset.indices]
    if hasattr(dataset, "filenames"):  # timm
        return [str(name) for name in dataset.filenames(basename=False, absolute=False)]
    samples = getattr(dataset, "samples", None)
    if samples and hasattr(dataset, "root"):  # torchvision
        return [Path(os.path.relpath(path, dataset.root)).as_posix() for path, _ in samples]
    raise InputError(f"a {type(dataset).__name__} does not name its samples; give `keys`")


def _innermost(dataset: Any) -> Iterator[Any]:
    """The datasets that a Subset or ConcatDataset takes its samples from, or the dataset itself."""
    if isinstance(dataset, Subset):
        yield from _innermost(dataset.dataset)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _innermost(part)
    else:
        yield dataset


def class_names_of(dataset: Any) -> tuple[str, ...]:
    """The class list of a dataset, in the order of its class ids.

    Raises:
        InputError: it has none.
    """
    if isinstance(dataset, Subset):
        return class_names_of(dataset.dataset)
    found = getattr(dataset, "classes", None)
    if hasattr(dataset, "wnids"):  # torchvision's ImageNet, whose `classes` are tuples of words
        found = dataset.wnids
    numbers = getattr(getattr(dataset, "reader", None), "class_to_idx", None)  # timm
    if found is None and numbers:
        found = sorted(numbers, key=numbers.get)
        if [numbers[name] for name in found] != list(range(len(found))):
            raise InputError("the dataset's class ids have gaps; token labels need 0, 1, 2, …: change its `class_map`")
    if found is None:
        raise InputError(
            f"a {type(dataset).__name__} does not name its classes; give `class_names`, in the order of its class ids"
        )
    return tuple(found)
