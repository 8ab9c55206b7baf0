"""A page of a segmenter's scores, with images, masks and predictions side by side, clean and corrupted.

H, W: pixels of an image.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stl_offline.config_transfer import TransferEvaluateConfig
from stl_offline.palette import class_color, class_pixels, hex_color
from stl_offline.reports.encode import cells_url, jpeg_url, shrink
from stl_offline.reports.html import IMAGE_PIXELS, render_page, write_page
from stl_offline.transfer import SegmentExample, segment_examples


def write_segment_page(config: TransferEvaluateConfig, result: Mapping[str, Any]) -> Path:
    """Write the page ``config.page`` of a result of `stl_offline.transfer.evaluate_transfer`; gives its path.

    Raises:
        InputError: the checkpoint is no segmenter, or the images cannot be used.
        TargetError: the page cannot be written.
    """
    class_names, examples = segment_examples(config)
    page = render_page(
        "segments.html",
        title="Segmentation",
        summary=_summary(config, result),
        scores=_rows(result, class_names),
        severities=_severities(result),
        corruptions=_corruptions(result),
        examples=[{"key": each.key, "rows": _figures(each)} for each in examples],
    )
    return write_page(str(config.page), page)


def _summary(config: TransferEvaluateConfig, result: Mapping[str, Any]) -> str:
    parts = [f"{config.checkpoint}: {result['samples']:,} images", f"mean IoU {_percent(result['miou'])}"]
    if "corrupted_miou" in result:
        parts.append(f"{_percent(result['corrupted_miou'])} on corrupted images")
        parts.append(f"retention {_percent(result['retention'])}")
    return ", ".join(parts)


def _rows(result: Mapping[str, Any], class_names: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """(colour, name, IoU) of every class."""
    return [
        (hex_color(class_color(number)), name, _percent(result[f"iou/{name}"]))
        for number, name in enumerate(class_names)
    ]


def _severities(result: Mapping[str, Any]) -> list[str]:
    """Those that were measured of any kind."""
    return sorted({severity for scores in result.get("corrupted", {}).values() for severity in scores}, key=int)


def _corruptions(result: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Kind of corruption, and its mIoU by severity; empty where it was not measured."""
    return [
        (kind, [_percent(scores[each]) if each in scores else "" for each in _severities(result)])
        for kind, scores in result.get("corrupted", {}).items()
    ]


def _figures(example: SegmentExample) -> list[list[tuple[str, str]]]:
    """Rows of (caption, data: URL): what was seen beside what was predicted, and the mask in the first row."""
    rows = [
        [(f"{title}: image", jpeg_url(shrink(pixels, IMAGE_PIXELS))), (f"{title}: prediction", _ids_url(ids))]
        for title, pixels, ids in example.views
    ]
    without = " (grey: no class)" if (example.mask < 0).any() else ""
    rows[0].append((f"mask{without}", _ids_url(example.mask)))
    return rows


def _ids_url(ids_HW: np.ndarray) -> str:
    """Class ids in their colours, at most as large as images are shown; nearest pixels, so that no colour is mixed."""
    step = max(1, -(-max(ids_HW.shape) // IMAGE_PIXELS))
    return cells_url(class_pixels(ids_HW[step // 2 :: step, step // 2 :: step]))


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f}\u00a0%"
