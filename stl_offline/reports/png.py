"""Label maps as a PNG: the figures of STL (arXiv 2401.03844) for one's own images, one row per label map."""

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Polygon

from stl_offline.errors import InputError, printable
from stl_offline.files import atomic_write
from stl_offline.geometry import View
from stl_offline.palette import CONFIDENT, UNCONFIDENT, class_color, ink_on
from stl_offline.reports.encode import shrink
from stl_offline.reports.panels import CONFIDENCE, CONFIDENCE_COLORS, OWN, TITLES, Panel, scene_marks, scene_panels
from stl_offline.reports.scene import Scene

CELL_INCHES = 1.7
DOTS_PER_INCH = 100
NAMED = 6  # classes named beside a row
LARGEST_LETTER, SMALLEST_LETTER = 7.0, 3.5  # points
_CORNERS = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])


def label_figure(scenes: Sequence[Scene], class_names: Sequence[str], path: str | Path, threshold: float) -> None:
    """Write a PNG with one row per scene. Each row names the classes that its colours and letters stand for.

    Args:
        scenes: what to show.
        class_names: of the label set, as they are shown.
        path: of the PNG.
        threshold: confidence from which a token counts as confident.

    Raises:
        InputError: no scenes.
        TargetError: ``path`` cannot be written.
    """
    if not scenes:
        raise InputError("an image of labels needs at least one sample, got none")
    rows = [{panel.title: panel for panel in scene_panels(scene, class_names, threshold)} for scene in scenes]
    heads = [title for title in TITLES if any(title in row for row in rows)]
    marks = scene_marks(scenes)
    columns = len(heads)
    figure = Figure(figsize=((columns + 1.3) * CELL_INCHES, (len(scenes) + 0.6) * CELL_INCHES))
    # A row of heads above, a row for the colour scale below, a column of names at the right.
    grid = figure.add_gridspec(
        len(scenes) + 2,
        columns + 1,
        width_ratios=[1] * columns + [1.2],
        height_ratios=[0.14, *[1] * len(scenes), 0.08],
        left=0.01,
        right=0.99,
        bottom=0.35 / (len(scenes) + 0.6),
        top=0.995,
        wspace=0.06,
        hspace=0.16,
    )
    for column, head in enumerate(heads):
        _blank(figure.add_subplot(grid[0, column])).text(0.5, 0.5, head, fontsize=9, ha="center", va="center")
    for number, (scene, row) in enumerate(zip(scenes, rows, strict=True), 1):
        axes = [_blank(figure.add_subplot(grid[number, column])) for column in range(columns)]
        for axis, head in zip(axes, heads, strict=True):
            _draw_panel(axis, row.get(head), marks)
        _draw_names(_blank(figure.add_subplot(grid[number, -1])), scene, class_names, marks)
        key = printable(scene.key)
        title = _short(key, 34) if scene.whole else f"{_short(key, 26)}, crop {scene.view_index}"
        axes[0].text(0, 1.03, title, transform=axes[0].transAxes, fontsize=7, parse_math=False, va="bottom")
    bar = figure.add_subplot(grid[-1, heads.index(CONFIDENCE)])
    scale = ScalarMappable(Normalize(0, 1), CONFIDENCE_COLORS)
    figure.colorbar(scale, cax=bar, orientation="horizontal", ticks=[0, 0.5, 1])
    bar.tick_params(labelsize=7)
    if OWN in heads:
        own = _blank(figure.add_subplot(grid[-1, heads.index(OWN)]))
        shades = [(CONFIDENT, f"from {threshold:g} on"), (UNCONFIDENT, "below")]
        handles = [Patch(color=color, label=label) for color, label in shades]
        look = {"fontsize": 6, "frameon": False, "ncols": 2, "handlelength": 1.0, "columnspacing": 0.8}
        own.legend(handles=handles, loc="center", **look)
    save_figure(figure, path)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, whole or not at all; the same figure gives the same bytes. Raises TargetError."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Class names in scripts that matplotlib's font lacks appear as boxes; the page shows them.
        warnings.filterwarnings("ignore", r"(?s)Glyph .* missing|Matplotlib currently does not support")
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    atomic_write(path, buffer.getvalue())


def _draw_panel(axis: Axes, panel: Panel | None, marks: Mapping[int, str]) -> None:
    if panel is None:
        axis.text(0.5, 0.5, "not available", fontsize=7, color="0.4", ha="center", va="center")
        return
    width, height = min(1.0, panel.aspect), min(1.0, 1 / panel.aspect)  # the longer side is one
    place = {"extent": (0.0, width, 0.0, height)}
    if panel.pixels is not None:
        pixels = shrink(panel.pixels, 2 * DOTS_PER_INCH)
        if panel.grey:
            axis.imshow(pixels.mean(axis=2), cmap="gray", vmin=0, vmax=255, **place)
        else:
            axis.imshow(pixels, **place)
    if panel.cells is not None:
        axis.imshow(panel.cells, interpolation="nearest", **place)
        _draw_letters(axis, panel.lettered, (width, height), marks)
    if panel.outline is not None:
        _draw_outline(axis, panel.outline, (width, height))
    if panel.note:
        look = {"fontsize": 6, "color": "white", "va": "top", "bbox": {"color": "black", "pad": 1.5}}
        # In shares of the panel: the image may be narrower or lower.
        axis.text(0.03, 0.97, panel.note, transform=axis.transAxes, **look)


def _draw_letters(axis: Axes, class_ids: np.ndarray, size: tuple[float, float], marks: Mapping[int, str]) -> None:
    rows, columns = class_ids.shape
    points = min(LARGEST_LETTER, 0.55 * 72 * CELL_INCHES / max(rows, columns))
    if points < SMALLEST_LETTER:
        return
    width, height = size
    for (row, column), class_id in np.ndenumerate(class_ids):
        if class_id in marks:
            place = ((column + 0.5) / columns * width, height - (row + 0.5) / rows * height)
            ink = ink_on(class_color(int(class_id)))
            axis.text(*place, marks[class_id], fontsize=points, color=ink, ha="center", va="center_baseline", alpha=0.8)


def _draw_outline(axis: Axes, view: View, size: tuple[float, float]) -> None:
    width, height = size
    corners = view(_CORNERS) * [width, -height] + [0, height]  # v points down, the axis up
    for color, line in (("black", 2.6), ("white", 1.2)):
        axis.add_patch(Polygon(corners, closed=True, fill=False, edgecolor=color, linewidth=line, clip_on=False))


def _draw_names(axis: Axes, scene: Scene, class_names: Sequence[str], marks: Mapping[int, str]) -> None:
    """The classes of a row by number of tokens, with their shares of the label map."""
    shown = scene.all_tokens()
    ranked = sorted(shown, key=lambda class_id: (class_id != scene.class_id, -shown[class_id], class_id))
    handles = []
    for class_id in ranked[:NAMED]:
        share = scene.tokens.shares[class_id] / scene.tokens.best.size
        mark = f"{marks[class_id]}  " if class_id in marks else ""
        own = " (own)" if class_id == scene.class_id else ""
        name = "no label" if class_id < 0 else _short(class_names[class_id], 20)
        handles.append(Patch(color=class_color(class_id), label=f"{mark}{name}{own} {share:.0%}"))
    if len(ranked) > NAMED:
        handles.append(Patch(color="none", label=f"and {len(ranked) - NAMED} more"))
    legend = axis.legend(handles=handles, loc="center left", fontsize=7, frameon=False, handlelength=1.0, borderpad=0)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _blank(axis: Axes) -> Axes:
    axis.set_axis_off()
    return axis


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"…{text[1 - most :]}"
