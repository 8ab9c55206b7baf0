"""What commands print when they are done."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from stl_offline.errors import counted as counted

ALREADY_COMPLETE = "already complete, nothing was done"

_SCORES = (
    *(("top1", "top-1"), ("top5", "top-5"), ("token_top1", "token top-1")),
    *(("miou", "mean IoU"), ("mean_accuracy", "mean accuracy"), ("pixel_accuracy", "pixel accuracy")),
    *(("map", "mAP"), ("map_50", "mAP at IoU 0.5"), ("map_75", "mAP at IoU 0.75")),
    *(("mask_map", "mask mAP"), ("mask_map_50", "mask mAP at IoU 0.5"), ("mask_map_75", "mask mAP at IoU 0.75")),
)


def percent(share: float | None) -> str:
    """A share in [0, 1] as per cent; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.2f} %"


def scores_line(result: Mapping[str, Any]) -> str:
    """The accuracies that a result holds, in one line; empty where it holds none."""
    return ", ".join(f"{label} {percent(result[name])}" for name, label in _SCORES if result.get(name) is not None)


def run_line(stage: str, out: str, summary: Mapping[str, Any]) -> str:
    """Where a training run lies, how long it took and how accurate the model is."""
    epochs = counted(summary["epochs"], "epoch")
    facts = [f"{epochs} in {summary['train_seconds']:,.0f} s", f"loss {summary['loss']:.3f}"]
    scores = scores_line(summary)
    line = f"{stage}: {out} ({', '.join([*facts, scores] if scores else facts)})"
    return f"{line}; {ALREADY_COMPLETE}" if summary.get("already_complete") else line


def result_json(result: Any) -> list[str]:
    """The lines of a result (a dataclass) as JSON, with its properties."""
    fields = {name: value for name, value in dataclasses.asdict(result).items() if name != "is_first"}
    return json.dumps(fields | ({"fits": result.fits} if hasattr(result, "fits") else {}), indent=2).split("\n")


def dump_line(report: Any) -> str:
    """What a dump did."""
    line = (
        f"label set: {report.path} ({counted(report.samples, 'image')}, {report.labelled:,} of them labelled now, "
        f"{counted(report.bytes, 'byte')}, {report.seconds:,.0f} s)"
    )
    return f"{line}; {ALREADY_COMPLETE}" if report.was_complete else line


def estimate_lines(estimate: Any) -> list[str]:
    """The cost of a dump."""
    views = f" × {estimate.views} views" if estimate.views > 1 else ""
    processes = f" by {estimate.processes} processes" if estimate.processes > 1 else ""
    images, shards = counted(estimate.images, "image"), counted(estimate.shards, "shard")
    lines = [
        f"estimate: {images}{views}, measured on {estimate.measured:,} of them; nothing written",
        f"size:     {_size(estimate.bytes)} in {shards}, {estimate.bytes_per_image:,.0f} bytes per image",
        f"cache:    {_size(estimate.cache_bytes)} at most, on each machine that trains from these labels",
        f"speed:    {estimate.images_per_second:,.1f} images per second{processes}",
        f"time:     {_duration(estimate.seconds)}",
    ]
    if estimate.pack_seconds:
        lines[-1] += f", plus about {_duration(estimate.pack_seconds)} to pack the images"
    hours = ", ".join(f"{_duration(3600 * each)} by {workers}" for workers, each in estimate.hours.items())
    lines.append(f"workers:  {hours}")
    if estimate.read_bytes:
        lines.append(f"reads:    {_size(estimate.read_bytes)} of tars")
    if estimate.requests:
        lines.append(f"requests: about {estimate.requests:,} to object stores and web servers")
    if estimate.free_bytes is not None:
        lines.append(f"disk:     {_size(estimate.free_bytes)} free, {'enough' if estimate.fits else 'NOT ENOUGH'}")
    return lines


def _size(count: int) -> str:
    power = min((len(str(count)) - 1) // 3, 4)
    return f"{count / 1000**power:,.2f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}" if power else f"{count} bytes"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:,.0f} s" if seconds < 120 else f"{minutes:,.0f} min" if minutes < 120 else f"{hours:,.1f} h"
