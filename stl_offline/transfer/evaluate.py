"""``stl-offline transfer evaluate``: scores of segmenters and detectors, on images as they are and corrupted."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stl_offline.config_transfer import TransferEvaluateConfig
from stl_offline.device import pick_amp, pick_device, pick_workers
from stl_offline.distributed import World
from stl_offline.errors import InputError
from stl_offline.evaluation import check_corruptions_can_run, corrupt, parse_corruptions
from stl_offline.files import make_folder
from stl_offline.models import read_header, weights_path
from stl_offline.transfer import detector
from stl_offline.transfer.boxes import open_boxes
from stl_offline.transfer.detect_scores import DetectValidation
from stl_offline.transfer.outlines import check_coco_can_run
from stl_offline.transfer.pairs import open_pairs
from stl_offline.transfer.segment import make_validation
from stl_offline.transfer.segment_scores import SegmentValidation, check_sizes, save_ids
from stl_offline.transfer.segmenter import load_segmenter


def evaluate_transfer(config: TransferEvaluateConfig) -> dict[str, Any]:
    """Score a run of ``transfer segment`` or ``transfer detect``.

    Returns:
        ``samples``, and the scores by name. With ``config.corrupt``, ``corrupted``: the first score by kind and
        severity; ``corrupted_miou`` or ``corrupted_map``: mean over kinds of the mean over severities; ``retention``:
        that over the score of the images as they are.

    Raises:
        InputError: no such run, or images that cannot be used.
        FormatError: a damaged checkpoint.
        MissingExtraError: a package that corrupts images or measures mAP is not installed.
    """
    corruptions = [] if config.corrupt is None else parse_corruptions(config.corrupt)
    if corruptions:
        check_corruptions_can_run()
    path = weights_path(config.checkpoint)
    try:
        kind = json.loads(read_header(path)).get("kind")
    except (ValueError, AttributeError):
        kind = None
    device = pick_device(config.device)
    prepare = _prepare_detector if kind == detector.DetectorDescription.KIND else _prepare_segmenter
    model, validation, samples = prepare(config, device)
    scores = validation(model, lambda: None)
    main = validation.names[0]
    result: dict[str, Any] = {"samples": samples} | scores
    if not corruptions:
        return result
    if isinstance(validation, SegmentValidation):
        validation.keep = None
    found: dict[str, dict[str, float]] = {}
    for name, severity in corruptions:
        validation.change = partial(_corrupt, kind=name, severity=severity, seed=config.seed)
        found.setdefault(name, {})[str(severity)] = validation(model, lambda: None)[main] or 0.0
    mean = float(np.mean([np.mean(list(each.values())) for each in found.values()]))
    clean = scores[main]
    return result | {"corrupted": found, f"corrupted_{main}": mean, "retention": mean / clean if clean else None}


@dataclass(frozen=True)
class SegmentExample:
    """An image with its mask and what a segmenter predicts, as it is and corrupted.

    key: of the image; mask: int32 (H, W), −1 where there is no class; views: title, uint8 (H, W, 3) pixels that the
    model saw, and predicted ids (H, W).
    """

    key: str
    mask: np.ndarray
    views: tuple[tuple[str, np.ndarray, np.ndarray], ...]


def segment_examples(config: TransferEvaluateConfig) -> tuple[tuple[str, ...], list[SegmentExample]]:
    """The class names, and the first ``config.examples`` images with what a segmenter predicts: as they are, and under
    each kind of ``config.corrupt`` at the highest of its severities.

    Raises:
        InputError: as `evaluate_transfer`, or the checkpoint is a detector.
    """
    severities = {} if config.corrupt is None else dict(sorted(parse_corruptions(config.corrupt), key=lambda e: e[1]))
    model, validation, _ = _prepare_segmenter(config, pick_device(config.device))
    found = []
    with torch.inference_mode():
        for number in range(min(config.examples, len(validation.pairs))):
            key, pixels, mask = validation.read(number)
            seen = {"clean": pixels}
            for kind, severity in severities.items():
                seen[f"{kind} {severity}"] = _corrupt(key, pixels, kind=kind, severity=severity, seed=config.seed)
            views = [(name, each, validation.predict(model, each).cpu().numpy()) for name, each in seen.items()]
            found.append(SegmentExample(key, mask, tuple(views)))
    return validation.pairs.class_names, found


def _corrupt(key: str, pixels: np.ndarray, *, kind: str, severity: int, seed: int) -> np.ndarray:
    return corrupt(pixels, kind, severity, seed=seed, key=key)


def _prepare_segmenter(
    config: TransferEvaluateConfig, device: torch.device
) -> tuple[torch.nn.Module, SegmentValidation, int]:
    if config.annotations is not None:
        raise InputError(f"`annotations` are for detectors; {config.checkpoint} is a segmenter")
    if config.out is not None and Path(config.out).resolve().is_relative_to(Path(config.data).resolve()):
        raise InputError(f"`out` {config.out} lies within the data, whose masks it would replace; give another folder")
    model, description = load_segmenter(config.checkpoint)
    pairs = open_pairs(config.data, description.class_names, description.ignore_id, config.split)
    window = description.crop if config.sliding_window else None
    if window is None:
        check_sizes(model.backbone, pairs)
    amp, workers = pick_amp(config.amp, device), pick_workers(config.workers)
    validation = make_validation(model, pairs, device, amp, workers, World(), window)
    validation.check_logits = True
    if config.out is not None:
        folder = Path(config.out)

        def keep(key: str, ids: np.ndarray) -> None:
            place = folder / f"{key}.png"
            make_folder(place.parent)
            save_ids(str(place), ids)

        validation.keep = keep
    return model.to(device), validation, len(pairs)


def _prepare_detector(
    config: TransferEvaluateConfig, device: torch.device
) -> tuple[torch.nn.Module, DetectValidation, int]:
    given = {"sliding_window": config.sliding_window, "out": config.out, "page": config.page}
    if name := next((name for name, value in given.items() if value), None):
        raise InputError(f"`{name}` is for segmenters; {config.checkpoint} is a detector")
    check_coco_can_run()
    model, description = detector.load_detector(config.checkpoint)
    masks = description.masks
    if masks and config.annotations is None:
        raise InputError(f"{config.checkpoint} predicts masks; give a COCO JSON file with masks as `annotations`")
    images = open_boxes(config.data, description.class_names, config.annotations, config.split, masks=masks)
    amp, workers = pick_amp(config.amp, device), pick_workers(config.workers)
    return model.to(device), DetectValidation(images, device, amp, workers, masks), len(images)
