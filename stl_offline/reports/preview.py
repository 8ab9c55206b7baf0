"""``stl-offline labels preview``: a page and images of some labels of a label set."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stl_offline.config import PreviewConfig
from stl_offline.errors import InputError, JoinError
from stl_offline.geometry import CropSettings
from stl_offline.labels.arrays import LabelMap, ShardArrays
from stl_offline.labels.join import check_class_names, join
from stl_offline.labels.label_set import LabelSet, open_label_set
from stl_offline.reports.choose import Choice, Place, choose_labels
from stl_offline.reports.colors import CONFIDENT, UNCONFIDENT, confidence_pixels, hex_color
from stl_offline.reports.facts import label_set_facts
from stl_offline.reports.find import FindImages, FoundImage
from stl_offline.reports.histogram import ConfidenceCounts, confidence_figure, histogram_bars
from stl_offline.reports.html import Article, page_data
from stl_offline.reports.label_page import scene_article, scene_marks
from stl_offline.reports.page import render_page, write_page
from stl_offline.reports.png import label_figure
from stl_offline.reports.scene import Scene, StudentSettings, make_scenes

ROWS = 8  # of one PNG


@dataclass(frozen=True)
class PreviewReport:
    """What was written. shown, asked: scenes on the page and those chosen; shards: how many were read."""

    page: Path
    figures: tuple[Path, ...]
    shown: int
    asked: int
    shards: int
    bytes: int
    warnings: tuple[str, ...]


def preview_labels(config: PreviewConfig, find_images: FindImages | None) -> PreviewReport:
    """Write ``labels.html``, ``labels.png`` (and more, for many images) and ``confidence.png`` into ``config.out``.

    Only the shards that hold the chosen labels are read, unless ``all_shards``.

    Args:
        find_images: `stl_offline.reports.find.find_images`, which needs FFCV; None for labels alone.

    Raises:
        StlError: a label set or images that cannot be used, keys without a label, images that are missing or have
            changed, a page that does not fit into its size.
    """
    label_set = open_label_set(config.path)
    _check_views(label_set, config.views)
    choice = choose_labels(label_set, config.keys, config.samples, config.seed)
    counts = ConfidenceCounts()
    maps = _read(label_set, choice, counts, config.all_shards)
    images = None
    if find_images is not None:
        images = _join(label_set, choice, maps, find_images, config)
    scenes = _scenes(label_set, choice, maps, images, config)
    out = Path(config.out)
    figures = []
    for number, first in enumerate(range(0, len(scenes), ROWS), 1):
        name = "labels.png" if number == 1 else f"labels-{number}.png"
        label_figure(scenes[first : first + ROWS], label_set.spec.class_names, out / name, config.threshold)
        figures.append(out / name)
    note = _histogram_note(label_set, counts)
    confidence_figure(counts, note, out / "confidence.png")
    page, shown, warnings = _fit(label_set, scenes, counts, note, choice, config)
    path = write_page(out / "labels.html", page)
    return PreviewReport(
        page=path,
        figures=(*figures, out / "confidence.png"),
        shown=shown,
        asked=len(scenes),
        shards=counts.shards,
        bytes=len(page),
        warnings=warnings,
    )


def _check_views(label_set: LabelSet, views: Sequence[int]) -> None:
    there = label_set.spec.views_per_image
    if max(views) >= there:
        raise InputError(f"{label_set.place} holds {there} maps of each image, 0 to {there - 1}; got {max(views)}")


def _read(label_set: LabelSet, choice: Choice, counts: ConfidenceCounts, all_shards: bool) -> dict[Place, LabelMap]:
    """The chosen label maps; every shard that is read is counted."""
    maps = {}
    for shard in label_set.present if all_shards else choice.shards:
        arrays = label_set.read_shard(shard)
        counts.add(arrays)
        for place in choice.places:
            if place.shard == shard:
                maps[place] = _label_map(arrays, place.row, label_set.spec.num_classes)
    return maps


def _label_map(arrays: ShardArrays, row: int, num_classes: int) -> LabelMap:
    # Copies: a view would keep the whole shard in memory.
    return LabelMap(
        key=arrays.keys[row],
        class_id=int(arrays.class_id[row]),
        content_hash=int(arrays.content_hash[row]),
        class_ids=arrays.class_ids[row].copy(),
        logits=arrays.logits[row].copy(),
        confidence=arrays.confidence[row].copy(),
        views=arrays.views[row].copy(),
        num_classes=num_classes,
    )


def _join(
    label_set: LabelSet,
    choice: Choice,
    maps: dict[Place, LabelMap],
    find_images: FindImages,
    config: PreviewConfig,
) -> dict[str, FoundImage]:
    """The chosen labels' images by key, joined as training joins them: by key, contents compared."""
    keys = [maps[place].key for place in choice.places]
    found = find_images(config.data, keys, label_set.spec.class_names)
    check_class_names(label_set.spec.class_names, found.class_names)
    missing = [key for key in keys if key not in found.by_key]
    if missing and (config.missing == "error" or len(missing) == len(keys)):
        raise JoinError(
            f"{len(missing):,} of the {len(keys):,} labels chosen have no image in {config.data}, for example "
            f"{missing[0]!r}; is it another data set or root folder? Without --data labels are shown alone, and "
            "--missing skip shows those of missing images so"
        )
    there = [key for key in keys if key in found.by_key]
    hashes = np.array([found.by_key[key].content_hash for key in there], dtype=np.uint64)
    # Of a part of the set: no other shard is looked into.
    part = LabelSet(label_set.storage, label_set.manifest, choice.shards)
    join(part, there, hashes, found.class_names, allow_changed=config.allow_changed)
    return found.by_key


def _scenes(
    label_set: LabelSet,
    choice: Choice,
    maps: dict[Place, LabelMap],
    images: dict[str, FoundImage] | None,
    config: PreviewConfig,
) -> list[Scene]:
    crops = CropSettings(scale=(config.scale_min, 1.0), flip=config.flip)
    student = StudentSettings(config.student_seed, config.epoch, crops)
    scenes: list[Scene] = []
    for place in choice.places:
        label_map = maps[place]
        image = images.get(label_map.key) if images else None
        first = sum(label_set.shards[index].samples for index in range(place.shard))
        sample_id = first + place.row if image is None else image.position
        pixels = None if image is None else image.load()
        scenes += make_scenes(label_set.spec, label_map, pixels, sample_id, student, config.views)
    return scenes


def _fit(
    label_set: LabelSet,
    scenes: Sequence[Scene],
    counts: ConfidenceCounts,
    note: str,
    choice: Choice,
    config: PreviewConfig,
) -> tuple[bytes, int, tuple[str, ...]]:
    """The page with as many scenes as its size allows, how many these are, and what to say about it."""
    names, marks = label_set.spec.class_names, scene_marks(scenes)
    articles = [scene_article(scene, names, config.threshold, marks) for scene in scenes]
    warnings: tuple[str, ...] = ()
    limit = config.max_mb * 1e6
    while True:
        page = _render(label_set, articles, counts, note, choice, config, warnings, marks)
        if len(page) <= limit:
            return page, len(articles), warnings
        if len(articles) == 1:
            raise InputError(f"one image alone makes a page of {len(page) / 1e6:.1f} MB; --max-mb allows more")
        # Parts differ little in size; one more round takes what is still too much.
        articles = articles[: max(1, min(len(articles) - 1, int(len(articles) * limit / len(page))))]
        warnings = (
            f"The page shows {len(articles)} of the {len(scenes)} chosen: more would not fit into "
            f"{config.max_mb:g} MB. --max-mb allows a larger page; the PNGs show all.",
        )


def _render(
    label_set: LabelSet,
    articles: Sequence[Article],
    counts: ConfidenceCounts,
    note: str,
    choice: Choice,
    config: PreviewConfig,
    warnings: tuple[str, ...],
    marks: dict[int, str],
) -> bytes:
    spec = label_set.spec
    shown = Counter(row.class_id for article in articles for row in article.rows)
    classes = sorted((spec.class_names[class_id].lower(), class_id) for class_id in shown if class_id >= 0)
    crop = "Students of this label set replay its crops, and get exactly these labels."
    if spec.views["kind"] == "whole":
        crop = (
            f"The student's crop is the one that a student with --seed {config.student_seed} gets in epoch "
            f"{config.epoch + 1}, and its labels are the label map seen through it."
        )
    return render_page(
        "labels.html",
        title=f"Label set {Path(config.path).name or config.path}",
        shown=_shown(label_set, articles, choice, config),
        warnings=warnings,
        articles=articles,
        classes=[(class_id, spec.class_names[class_id]) for _, class_id in classes],
        look={
            "confident": hex_color(CONFIDENT),
            "unconfident": hex_color(UNCONFIDENT),
            "threshold": f"{config.threshold:g}",
            "scale": ["rgb({}, {}, {})".format(*color) for color in confidence_pixels(np.linspace(0, 1, 9)).tolist()],
            "student": crop,
        },
        histogram=histogram_bars(counts, note),
        facts=label_set_facts(label_set),
        data=page_data(articles, spec.class_names, marks),
    )


def _shown(label_set: LabelSet, articles: Sequence[Article], choice: Choice, config: PreviewConfig) -> str:
    among = f"{choice.found:,} labels" + (" that the keys fit" if config.keys else "")
    how = f"drawn at random from {among} (seed {config.seed})" if choice.found > len(choice.places) else f"of {among}"
    alone = "" if config.data else "; no images were given, so labels stand alone"
    maps = "label map" if len(articles) == 1 else "label maps"
    return f"{len(articles)} {maps} {how}, from {label_set.place}{alone}."


def _histogram_note(label_set: LabelSet, counts: ConfidenceCounts) -> str:
    every = counts.shards == len(label_set.shards)
    shards = "all shards" if every else f"{counts.shards:,} of {len(label_set.shards):,} shards"
    return f"{counts.tokens:,} tokens of {counts.images:,} images, from {shards}"
