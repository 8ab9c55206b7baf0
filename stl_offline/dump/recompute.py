"""``stl-offline labels verify --recompute``: run a labeler again over some of a set's images and compare.

n: images of the sample; V: views of each; Gh, Gw: the token grid; k: classes kept for each cell.
"""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stl_offline.config import DumpConfig
from stl_offline.device import pick_device
from stl_offline.dump.drawing import DrawKey, draw_shortfall
from stl_offline.dump.labelling import Labelling, load_labeler
from stl_offline.errors import FormatError, InputError
from stl_offline.geometry import whole_views
from stl_offline.images.pack import ensure_beton
from stl_offline.labels.arrays import ShardArrays, concatenate, probabilities, select
from stl_offline.labels.join import join
from stl_offline.labels.keys import rename_keys
from stl_offline.labels.label_set import LabelSet
from stl_offline.labels.spec import ENCODINGS, differences
from stl_offline.progress import progress_bar
from stl_offline.random import STREAM_CLASS_DRAW, STREAM_DRAW
from stl_offline.settings import check_match

# Of a logit with its noise: what other hardware and precisions change stays below it.
NEAR_TIE = 0.05
# Entries that must be equal for the labels to be comparable; others (source, shards, encoding) may differ.
_DECIDING = ("class_names", "grid", "labeler", "preprocessing")


@dataclass(frozen=True)
class Recomputed:
    """Result of `recompute_labels`.

    images: how many were labelled again; tokens: how many were compared by their stored top-k classes; top1: share of
    them with the same best class (or one as probable, within the bounds); outputs, output_top1: the same of the class
    head's stored outputs; largest: largest difference of a probability, of tokens and outputs; beyond: largest excess
    of a difference over what the manifest's bounds allow. draws: drawn classes compared; same_draws: share of them that
    are drawn again; near_ties: share of them that are not, but within `NEAR_TIE` of the one that is.
    """

    images: int
    tokens: int
    top1: float
    largest: float
    beyond: float
    outputs: int = 0
    output_top1: float = 1.0
    draws: int = 0
    same_draws: float = 1.0
    near_ties: float = 0.0


def recompute_labels(
    label_set: LabelSet,
    data: str,
    labeler: str,
    *,
    images: int = 64,
    seed: int = 0,
    key_prefix: str = "",
    match: str = "key",
    skip_broken: bool = False,
    device: str = "auto",
    workers: int = 0,
    **labeler_options: object,
) -> Recomputed:
    """Label a random sample of the set's images again, under the views that the set holds, and compare.

    Args:
        data, labeler, labeler_options: as of `DumpConfig`; images: how many; seed: of the sample.
        key_prefix: as `stl_offline.labels.keys.rename_keys`; match: as `stl_offline.labels.join.join`;
            skip_broken: as `ensure_beton`.

    Raises:
        InputError: another labeler, grid, class list or input than the manifest names (each by name).
        JoinError: not one of the images is labelled, or they have changed.
        FormatError: the label set is damaged.
    """
    label_set.only_part()
    if images < 1:
        raise InputError(f"labels of at least 1 image must be recomputed, got {images}")
    check_match(match, key_prefix=key_prefix)
    config = _settings(label_set, data, labeler, device, workers, labeler_options)
    chosen = pick_device(device)
    model = load_labeler(config)
    beton = ensure_beton(data, skip_broken=skip_broken)
    labelling = Again(config, model, beton, chosen)
    found = [
        str(each)
        for each in differences(label_set.spec, labelling.spec)
        if each.entry in _DECIDING and each.name != "labeler.licence"
    ]
    if found:
        raise InputError(f"{label_set.place} was made with other settings (its and these): {'; '.join(found)}")
    report = join(
        label_set,
        rename_keys(beton.keys, key_prefix),
        beton.content_hashes,
        # The labeler's class list, in which the images' classes have been found.
        label_set.spec.class_names,
        match=match,
        missing="skip",
    )
    labelled = np.flatnonzero(report.shard >= 0)
    drawn = np.random.default_rng(seed).permutation(len(labelled))[:images]
    samples = np.sort(labelled[drawn])
    # By shard, so that each is read once.
    samples = samples[np.argsort(report.shard[samples], kind="stable")]
    stored = _read(label_set, report.shard[samples], report.row[samples])
    views = np.stack([whole_views(len(beton))] * stored.views.shape[1])
    views[:, samples] = stored.views.transpose(1, 0, 2)
    labelling.views = views
    labelling.expect(samples, stored)
    with progress_bar(len(samples) * len(views), "labelling again") as bar:
        again = labelling.label(samples, bar.update)
    return replace(compare(stored, again, label_set.spec.bounds), **labelling.draws_found())


def compare(stored: ShardArrays, again: ShardArrays, bounds: dict[str, float]) -> Recomputed:
    """Compare stored top-k labels, of tokens and of the class head, with recomputed ones (float32) of the same images
    and views."""
    old, new = _cells(stored), _cells(again)
    # The class head's outputs are in f16 in every set.
    allowed = {"tokens": bounds, "outputs": ENCODINGS["f16"] | bounds}
    found = {name: _compare(old[name], new[name], allowed[name]) for name in old}
    tokens, outputs = (found.get(name, _Compared(0, 1.0, 0.0, 0.0)) for name in ("tokens", "outputs"))
    return Recomputed(
        images=len(stored),
        tokens=tokens.count,
        top1=tokens.top1,
        largest=max(tokens.largest, outputs.largest),
        beyond=max(tokens.beyond, outputs.beyond),
        outputs=outputs.count,
        output_top1=outputs.top1,
    )


class _Cells(NamedTuple):
    """Stored or recomputed cells: ids (…, k), logits (…, k), confidence (…)."""

    class_ids: np.ndarray
    logits: np.ndarray
    confidence: np.ndarray


class _Compared(NamedTuple):
    """count: of cells; the others as in `Recomputed`."""

    count: int
    top1: float
    largest: float
    beyond: float


def _cells(arrays: ShardArrays) -> dict[str, _Cells]:
    """What has top-k classes; draws alone have none."""
    cells = {}
    if arrays.class_ids.shape[-1]:
        cells["tokens"] = _Cells(arrays.class_ids, arrays.logits, arrays.confidence)
    if arrays.head_ids is not None:
        cells["outputs"] = _Cells(arrays.head_ids, arrays.head_logits, arrays.head_confidence)
    return cells


def _compare(stored: _Cells, again: _Cells, bounds: dict[str, float]) -> _Compared:
    old = probabilities(stored.logits, stored.confidence).astype(np.float64)
    new = probabilities(again.logits, again.confidence).astype(np.float64)
    same = stored.class_ids[..., :, None] == again.class_ids[..., None, :]
    # A class that is no longer among the best k is at most as probable as the last of them.
    now = np.where(same.any(-1), (same * new[..., None, :]).sum(-1), np.minimum(old, new[..., -1:]))
    # A rounded logit and a rounded best logit both move a probability.
    relative = bounds.get("probability_relative", 0.0) + bounds.get("confidence_relative", 0.0)
    logits = np.abs(stored.logits.astype(np.float64))
    relative = relative + bounds.get("logit_relative", 0.0) * (logits + logits[..., :1])
    allowed = np.maximum(relative * np.maximum(old, now), bounds.get("probability_absolute", 0.0))
    difference = np.abs(old - now)
    best = now[..., 0] >= new[..., 0] - allowed[..., 0]
    beyond = np.maximum(0, difference - allowed)
    return _Compared(best.size, float(best.mean()), float(difference.max()), float(beyond.max()))


class Again(Labelling):
    """Labels again, and compares the draws of the labels that it expects instead of drawing."""

    def expect(self, samples: np.ndarray, stored: ShardArrays) -> None:
        """The stored labels of these samples (n,)."""
        self._rows = {int(sample): row for row, sample in enumerate(samples)}
        self._stored = {STREAM_DRAW: stored.draws, STREAM_CLASS_DRAW: stored.head_draws}
        self._short: list[np.ndarray] = []

    def draws_found(self) -> dict[str, float]:
        """The entries of `Recomputed` that are about draws."""
        if not self._short:
            return {}
        short = np.concatenate(self._short)
        near = (short > 0) & (short <= NEAR_TIE)
        return {"draws": len(short), "same_draws": float((short == 0).mean()), "near_ties": float(near.mean())}

    def _draw(self, logits: Tensor, draws: int, key: DrawKey, without: Tensor, samples: np.ndarray) -> Tensor:
        rows = [self._rows[int(sample)] for sample in samples]
        stored = self._stored[key.stream][rows, key.view - self.spec.first_view]
        drawn = torch.from_numpy(stored.reshape(*logits.shape[:2], draws).astype(np.int64)).to(logits.device)
        self._short.append(draw_shortfall(logits, drawn, key, without).cpu().numpy().ravel())
        return drawn


def _settings(
    label_set: LabelSet, data: str, labeler: str, device: str, workers: int, labeler_options: dict[str, object]
) -> DumpConfig:
    """The settings of the job that made the set, as far as the manifest records them."""
    spec = label_set.spec
    if (spec.draws or spec.class_draws) and spec.draw_seed is None:
        raise InputError(f"the draws of {label_set.place} were made by another generator, and cannot be repeated")
    if spec.preprocessing["height"] != spec.preprocessing["width"]:
        raise InputError(f"{label_set.place} was labelled on images that are not square; this labeler takes squares")
    kept = {field.name for field in fields(DumpConfig)} & {"interpolation", "amp", "batch_size"}
    known = {name: spec.creation[name] for name in kept if name in spec.creation}
    return DumpConfig(
        **{
            **known,
            "interpolation": spec.preprocessing["interpolation"],
            "data": data,
            "labeler": labeler,
            "out": "",
            "top_k": spec.top_k,
            "draws": spec.draws,
            "confidence": spec.has_confidence,
            "class_top_k": spec.class_top_k,
            "class_draws": spec.class_draws,
            "first_view": spec.first_view,
            "seed": spec.draw_seed or 0,
            "img_size": spec.preprocessing["height"],
            # How many, not which: these come from the set.
            "crops_per_image": 0 if spec.views["kind"] == "whole" else spec.views_per_image,
            "device": device,
            "workers": workers,
            **labeler_options,
        }
    )


def _read(label_set: LabelSet, shards: np.ndarray, rows: np.ndarray) -> ShardArrays:
    """The stored labels of some (shard, row) places, in their order."""
    parts = []
    for shard in np.unique(shards):
        arrays = label_set.read_shard(int(shard))
        parts += [select(arrays, slice(int(row), int(row) + 1)) for row in rows[shards == shard]]
    if not parts:
        raise FormatError(f"{label_set.place} holds no label of these images")
    return concatenate(parts)
