"""``stl-offline labels preview``: a page and PNGs of some label maps of a label set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stl_offline.config import PreviewConfig
from stl_offline.errors import InputError, JoinError, counted, printable
from stl_offline.labels.arrays import LabelMap
from stl_offline.labels.card import summary
from stl_offline.labels.join import check_class_names, join
from stl_offline.labels.label_set import LabelSet, open_label_set
from stl_offline.palette import CONFIDENT, UNCONFIDENT, hex_color
from stl_offline.reports.charts import Chart, ConfidenceCounts, confidence_chart, confidence_figure
from stl_offline.reports.choose import Choice, Place, choose_labels, choose_suspects
from stl_offline.reports.html import Article, class_rows, page_data, render_page, token_data, write_page
from stl_offline.reports.names import display_names
from stl_offline.reports.panels import confidence_pixels, scene_marks, scene_panels
from stl_offline.reports.png import label_figure
from stl_offline.reports.scene import Scene, StudentSettings, make_scenes
from stl_offline.reports.wanted import FindImages, FoundImage, Wanted

ROWS = 8  # label maps per PNG


@dataclass(frozen=True)
class PreviewReport:
    """What was written. shown, asked: label maps on the page and those chosen; shards: number of shards read."""

    page: Path
    figures: tuple[Path, ...]
    shown: int
    asked: int
    shards: int
    bytes: int
    warnings: tuple[str, ...]


def preview_labels(config: PreviewConfig, find_images: FindImages | None) -> PreviewReport:
    """Write ``labels.html``, ``labels.png`` (and ``labels-2.png``, …) and ``confidence.png`` into ``config.out``.

    Reads only the shards that hold the chosen labels, unless ``config.all_shards``.

    Args:
        find_images: `stl_offline.reports.find.find_images`, which needs FFCV; None shows labels without images.

    Raises:
        StlError: the label set or the images cannot be used, keys have no label, images are missing or have changed,
            or a page of one image exceeds ``config.max_mb``.
    """
    label_set = open_label_set(config.path).only_part()
    _check_views(label_set, config.map_index)
    _check_student_crop(label_set, config)
    if config.suspects:
        choice = choose_suspects(label_set, config.suspects)
    else:
        choice = choose_labels(label_set, config.keys, config.samples, config.seed)
    counts = ConfidenceCounts(own_classes=label_set.spec.has_own_classes)
    maps = _read(label_set, choice, counts, config.all_shards)
    images = None
    if find_images is not None:
        images = _join(label_set, choice, maps, find_images, config)
    scenes = _scenes(label_set, choice, maps, images, config)
    names = display_names(label_set.spec.class_names)
    out = Path(config.out)
    figures = []
    for number, first in enumerate(range(0, len(scenes), ROWS), 1):
        name = "labels.png" if number == 1 else f"labels-{number}.png"
        label_figure(scenes[first : first + ROWS], names, out / name, config.threshold)
        figures.append(out / name)
    note = _histogram_note(label_set, counts)
    confidence_figure(counts, note, out / "confidence.png")
    histogram = confidence_chart(counts, note)
    page, shown, warnings = _fit(label_set, scenes, names, histogram, choice, config)
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
        raise InputError(
            f"{label_set.place} holds {there} label maps per image, 0 to {there - 1}; got the view {max(views)}"
        )


def _check_student_crop(label_set: LabelSet, config: PreviewConfig) -> None:
    """Raise `InputError` for settings of a student's crop where students replay the set's own crops."""
    if label_set.spec.views["kind"] == "whole" or config.crop_settings() == PreviewConfig(path="").crop_settings():
        return
    raise InputError(
        f"{label_set.place} holds crops, which students replay: `scale_min` and `flip` do nothing; leave them out"
    )


def _read(label_set: LabelSet, choice: Choice, counts: ConfidenceCounts, all_shards: bool) -> dict[Place, LabelMap]:
    """The chosen label maps. Adds every shard that is read to ``counts``."""
    maps = {}
    for shard in label_set.present if all_shards else choice.shards:
        arrays = label_set.read_shard(shard)
        counts.add(arrays)
        for place in choice.places:
            if place.shard == shard:
                maps[place] = arrays.label_map(place.row, label_set.spec)
    label_set.check_unique()
    return maps


def _join(
    label_set: LabelSet,
    choice: Choice,
    maps: dict[Place, LabelMap],
    find_images: FindImages,
    config: PreviewConfig,
) -> dict[str, FoundImage]:
    """The images of the chosen labels by their label's key, joined as in training, with content hashes compared."""
    chosen = [maps[place] for place in choice.places]
    keys, contents = [each.key for each in chosen], [each.content_hash for each in chosen]
    # Images without classes are read without a class list.
    class_names = label_set.spec.class_names if label_set.spec.has_own_classes else None
    found = find_images(config.data, Wanted(keys, config.match, contents), class_names)
    if class_names is not None:
        check_class_names(class_names, found.class_names)
    missing = [key for key in keys if key not in found.by_key]
    if missing and (config.missing == "error" or len(missing) == len(keys)):
        advice = ["check that it is the labels' data set with the same root folder"]
        if config.match == "key" and (offer := _other_match(find_images, chosen, class_names, config)):
            advice = [offer]
        if len(missing) < len(keys):
            advice.append('pass `missing="skip"` to show these labels without images')
        raise JoinError(
            f"{len(missing):,} of the {len(keys):,} labels chosen have no image in {config.data}, for example "
            f"{missing[0]!r}; {', '.join(advice)}, or leave out `data` to show all labels without images"
        )
    there = [key for key in keys if key in found.by_key]
    hashes = np.array([found.by_key[key].content_hash for key in there], dtype=np.uint64)
    # A partial set, so that no other shard is opened.
    part = LabelSet(label_set.storage, label_set.manifest, choice.shards)
    join(part, there, hashes, label_set.spec.class_names, allow_changed=config.allow_changed)
    return found.by_key


def _other_match(
    find_images: FindImages, chosen: Sequence[LabelMap], class_names: tuple[str, ...] | None, config: PreviewConfig
) -> str:
    """What is found by stems, which costs little; "" where that is no way to join."""
    keys = [each.key for each in chosen]
    try:
        found = find_images(config.data, Wanted(keys, "stem"), class_names).by_key
    except InputError:  # images or labels of the same stem
        return ""
    if not found:
        return ""
    same = sum(each.key in found and found[each.key].content_hash == each.content_hash for each in chosen)
    changed = "" if same == len(found) else " (some of them changed: also needs `allow_changed=True`)"
    return f'{len(found):,} of the {len(keys):,} have an image by stem: pass `match="stem"`{changed}'


def _scenes(
    label_set: LabelSet,
    choice: Choice,
    maps: dict[Place, LabelMap],
    images: dict[str, FoundImage] | None,
    config: PreviewConfig,
) -> list[Scene]:
    crops = config.crop_settings()
    student = StudentSettings(config.student_seed, config.epoch, crops)
    scenes: list[Scene] = []
    for place in choice.places:
        label_map = maps[place]
        image = images.get(label_map.key) if images else None
        first = sum(label_set.shards[index].samples for index in range(place.shard))
        sample_id = first + place.row if image is None else image.position
        pixels = None if image is None else image.load()
        scenes += make_scenes(label_set.spec, label_map, pixels, sample_id, student, config.map_index)
    return scenes


def scene_article(scene: Scene, class_names: Sequence[str], threshold: float, marks: Mapping[int, str]) -> Article:
    """One label map as a part of the page."""
    key = printable(scene.key)
    tokens, tables = {"map": token_data(scene.tokens, scene.view)}, {"map": "label map"}
    if scene.student is not None:
        tokens["student"] = token_data(scene.student, scene.student_view)
        tables["student"] = "student's crop"
    return Article(
        key=key,
        title=key if scene.whole else f"{key}, crop {scene.view_index}",
        note="" if scene.image is not None else "The image is not available. Only its labels are shown.",
        panels=tuple(scene_panels(scene, class_names, threshold)),
        rows=class_rows([scene.tokens], scene.class_id, class_names, marks),
        tokens=tokens,
        own=scene.class_id,
        tables=tables,
        caption=_caption(scene, threshold),
    )


def _caption(scene: Scene, threshold: float) -> str:
    tokens = scene.tokens
    text = f"The draw keeps the most probable class of {tokens.kept.sum()} tokens"
    if scene.class_id is not None:
        own = tokens.own(scene.class_id)
        confident = own & (tokens.confidence >= threshold)
        text = (
            f"{own.sum()} of {own.size} tokens have the image's class as their most probable one, "
            f"{confident.sum()} of them confidently. {text}"
        )
    if scene.student is not None:
        return f"{text}, and of {scene.student.kept.sum()} under the student's crop."
    return f"{text}. Students replay this crop and get these labels bit for bit."


def _fit(
    label_set: LabelSet,
    scenes: Sequence[Scene],
    names: Sequence[str],
    histogram: Chart,
    choice: Choice,
    config: PreviewConfig,
) -> tuple[bytes, int, tuple[str, ...]]:
    """(page, label maps on it, warnings): the page with as many label maps as its size allows."""
    marks = scene_marks(scenes)
    articles = [scene_article(scene, names, config.threshold, marks) for scene in scenes]
    warnings: tuple[str, ...] = ()
    limit = config.max_mb * 1e6
    while True:
        values = _page_values(label_set, articles, names, choice, config)
        data = page_data(articles, names, marks)
        page = render_page("labels.html", warnings=warnings, histogram=histogram, data=data, **values)
        if len(page) <= limit:
            return page, len(articles), warnings
        if len(articles) == 1:
            raise InputError(
                f"a page of one image takes {len(page) / 1e6:.1f} MB, more than the {config.max_mb:g} MB allowed; "
                "increase `max_mb`"
            )
        # Articles differ little in size; another round removes what is still too much.
        articles = articles[: max(1, min(len(articles) - 1, int(len(articles) * limit / len(page))))]
        warnings = (
            f"The page shows {len(articles)} of the {len(scenes)} label maps chosen: more would exceed "
            f"the page's maximum size, {config.max_mb:g} MB. The PNG files show all.",
        )


def _page_values(
    label_set: LabelSet, articles: Sequence[Article], names: Sequence[str], choice: Choice, config: PreviewConfig
) -> dict[str, Any]:
    """What the template ``labels.html`` shows, besides the histogram and the tokens."""
    shown = {row.class_id for article in articles for row in article.rows if row.class_id >= 0}
    crop = "Students of this label set replay its crops and get exactly these labels."
    if label_set.spec.views["kind"] == "whole" and config.data is None:
        crop = (
            "The student's crop is drawn for images of the labeler's sides; with the images (`data`), it is the one "
            "that a student gets. Its labels are the label map sampled under that crop."
        )
    elif label_set.spec.views["kind"] == "whole":
        crop = (
            f"The student's crop is the one that a student with the seed {config.student_seed} gets in epoch "
            f"{config.epoch + 1}. Its labels are the label map sampled under that crop."
        )
    return {
        "title": f"Label set {printable(Path(config.path).name or config.path)}",
        "shown": _shown(label_set, articles, choice, config),
        "articles": articles,
        "classes": sorted(((class_id, names[class_id]) for class_id in shown), key=lambda each: each[1].lower()),
        "look": {
            "own": label_set.spec.has_own_classes,
            "confident": hex_color(CONFIDENT),
            "unconfident": hex_color(UNCONFIDENT),
            "threshold": f"{config.threshold:g}",
            "scale": ["rgb({}, {}, {})".format(*color) for color in confidence_pixels(np.linspace(0, 1, 9)).tolist()],
            "student": crop,
        },
        "facts": summary(label_set),
    }


def _shown(label_set: LabelSet, articles: Sequence[Article], choice: Choice, config: PreviewConfig) -> str:
    among = counted(choice.found, "label") + (" that match the keys" if config.keys else "")
    if config.suspects:
        among += ", those whose tokens disagree most with their class first"
    drawn = choice.found > len(choice.places) and not config.suspects
    how = f"drawn at random from {among} (seed {config.seed})" if drawn else f"of {among}"
    alone = "" if config.data else " No images were given: labels are shown alone."
    return f"{counted(len(articles), 'label map')} {how}, from {label_set.place}.{alone}"


def _histogram_note(label_set: LabelSet, counts: ConfidenceCounts) -> str:
    every = counts.shards == len(label_set.shards)
    shards = "all shards" if every else f"{counts.shards:,} of {counted(len(label_set.shards), 'shard')}"
    return f"{counted(counts.tokens, 'token')} of {counted(counts.images, 'image')}, from {shards}"
