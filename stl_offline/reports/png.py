"""Label maps as a PNG: the figures of STL (arXiv 2401.03844) for one's own images, one row for each.

Gh, Gw: a token grid.
"""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Polygon

from stl_offline.errors import InputError
from stl_offline.files import atomic_write
from stl_offline.reports.colors import (
    CONFIDENCE_COLORS,
    CONFIDENT,
    UNCONFIDENT,
    class_color,
    class_marks,
    class_pixels,
    ink_on,
)
from stl_offline.reports.encode import shrink
from stl_offline.reports.scene import Scene, TokenMap

CELL_INCHES = 1.7
DOTS_PER_INCH = 100
NAMED = 6  # classes named beside a row
OVERLAY = 0.75  # how strongly labels cover the image beneath
CONFIDENCE_SCALE = Normalize(0, 1)
LARGEST_LETTER, SMALLEST_LETTER = 7.0, 3.5  # points

IMAGE, LABELS, OWN, CONFIDENCE, DRAW = "image", "token labels", "own class", "confidence", "one draw"
CROP, CROP_LABELS, CROP_DRAW = "student's crop", "labels in the crop", "draw in the crop"


def label_figure(scenes: Sequence[Scene], class_names: Sequence[str], path: str | Path, threshold: float) -> None:
    """Write a PNG with one row for each scene; each row names the classes that its colours and letters stand for.

    Args:
        scenes: what to show.
        class_names: of the label set.
        path: of the PNG.
        threshold: confidence from which a token counts as confident.

    Raises:
        InputError: no scenes.
        TargetError: ``path`` cannot be written.
    """
    if not scenes:
        raise InputError("an image of labels needs at least one sample")
    heads = _heads(scenes)
    marks = class_marks(sum((scene.all_tokens() for scene in scenes), Counter()))
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
    for number, scene in enumerate(scenes, 1):
        for column, head in enumerate(heads):
            _draw_panel(_blank(figure.add_subplot(grid[number, column])), head, scene, marks, threshold)
        names = _blank(figure.add_subplot(grid[number, -1]))
        _draw_names(names, scene, class_names, marks)
        first = figure.axes[-1 - len(heads)]
        title = _short(scene.key, 34) if scene.whole else f"{_short(scene.key, 26)}, crop {scene.view_index}"
        first.text(0, 1.03, title, transform=first.transAxes, fontsize=7, parse_math=False, va="bottom")
    scale = ScalarMappable(CONFIDENCE_SCALE, CONFIDENCE_COLORS)
    bar = figure.add_subplot(grid[-1, heads.index(CONFIDENCE)])
    figure.colorbar(scale, cax=bar, orientation="horizontal", ticks=[0, 0.5, 1])
    bar.tick_params(labelsize=7)
    own = _blank(figure.add_subplot(grid[-1, heads.index(OWN)]))
    shades = [(CONFIDENT, f"from {threshold:g} on"), (UNCONFIDENT, "below")]
    handles = [Patch(color=color, label=label) for color, label in shades]
    own.legend(handles=handles, loc="center", fontsize=6, frameon=False, ncols=2, handlelength=1.0, columnspacing=0.8)
    save_figure(figure, path)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, whole or not at all; the same figure gives the same bytes. Raises TargetError."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    atomic_write(path, buffer.getvalue())


def _heads(scenes: Sequence[Scene]) -> list[str]:
    heads = [LABELS, OWN, CONFIDENCE, DRAW]
    images = any(scene.image is not None for scene in scenes)
    if images:
        heads.insert(0, IMAGE)
    if any(scene.student is not None for scene in scenes):
        heads += [CROP] * images + [CROP_LABELS, CROP_DRAW]
    return heads


def _draw_panel(axis: Axes, head: str, scene: Scene, marks: Mapping[int, str], threshold: float) -> None:
    tokens = scene.student if head in (CROP, CROP_LABELS, CROP_DRAW) else scene.tokens
    if tokens is None or (tokens.pixels is None and head in (IMAGE, CROP)):
        axis.text(0.5, 0.5, "not at hand", fontsize=7, color="0.4", ha="center", va="center")
        return
    if head == IMAGE:
        axis.imshow(shrink(scene.image, 2 * DOTS_PER_INCH), extent=_extent(scene.image.shape[1] / scene.image.shape[0]))
        _outline(axis, scene)
        return
    if head == CROP:
        axis.imshow(tokens.pixels, extent=_extent(1.0))
        if np.linalg.det(scene.student_view.matrix[:, :2]) < 0:
            axis.text(0.03, 0.97, "flipped", fontsize=6, color="white", va="top", bbox={"color": "black", "pad": 1.5})
        return
    if tokens.pixels is not None:
        grey = shrink(tokens.pixels, 2 * DOTS_PER_INCH).mean(axis=2)
        axis.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=_extent(tokens.aspect))
    if head in (LABELS, CROP_LABELS):
        _cells(axis, tokens, np.where(tokens.best >= 0, 255 * OVERLAY, 0), class_pixels(tokens.best))
        _letters(axis, tokens, tokens.best, marks)
        if head == LABELS and scene.student_view is not None:
            _outline(axis, scene)
    elif head == OWN:
        _cells(axis, tokens, *own_cells(tokens, scene.class_id, threshold))
    elif head == CONFIDENCE:
        look = {"cmap": CONFIDENCE_COLORS, "norm": CONFIDENCE_SCALE}
        axis.imshow(tokens.confidence, interpolation="nearest", extent=_extent(tokens.aspect), **look)
    else:
        _cells(axis, tokens, *draw_cells(tokens))
        _letters(axis, tokens, np.where(tokens.kept, tokens.drawn, -1), marks)


def own_cells(tokens: TokenMap, class_id: int, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The foreground: opacity (Gh, Gw) of 255 and colours (Gh, Gw, 3), confident and unconfident."""
    confident = tokens.confidence >= threshold
    colors = np.where(confident[..., None], CONFIDENT, UNCONFIDENT)
    return np.where(tokens.own(class_id), 255 * OVERLAY, 0), np.round(colors * 255).astype(np.uint8)


def draw_cells(tokens: TokenMap) -> tuple[np.ndarray, np.ndarray]:
    """A draw: opacity (Gh, Gw) of 255, faint where it gave another class than the token's best; colours (Gh, Gw, 3)."""
    opacity = np.where(tokens.kept, 255 * OVERLAY, 255 * 0.25)
    return np.where(tokens.drawn >= 0, opacity, 0), class_pixels(tokens.drawn)


def _cells(axis: Axes, tokens: TokenMap, opacity: np.ndarray, colors: np.ndarray) -> None:
    cells = np.dstack([colors, opacity.astype(np.uint8)])
    axis.imshow(cells, interpolation="nearest", extent=_extent(tokens.aspect))


def _letters(axis: Axes, tokens: TokenMap, class_ids: np.ndarray, marks: Mapping[int, str]) -> None:
    rows, columns = tokens.grid
    size = min(LARGEST_LETTER, 0.55 * 72 * CELL_INCHES / max(rows, columns))
    if size < SMALLEST_LETTER:
        return
    _, width, _, height = _extent(tokens.aspect)
    for (row, column), class_id in np.ndenumerate(class_ids):
        if class_id in marks:
            place = ((column + 0.5) / columns * width, height - (row + 0.5) / rows * height)
            ink = ink_on(class_color(int(class_id)))
            axis.text(*place, marks[class_id], fontsize=size, color=ink, ha="center", va="center_baseline", alpha=0.8)


def _outline(axis: Axes, scene: Scene) -> None:
    """The student's crop, or the labeler's where there is no student's, as seen on the image."""
    view = scene.student_view if scene.student_view is not None else scene.view
    corners = view(np.array([[0, 0], [1, 0], [1, 1], [0, 1]]))
    left, right, bottom, top = axis.images[-1].get_extent()
    corners = np.stack([left + corners[:, 0] * (right - left), top + corners[:, 1] * (bottom - top)], axis=1)
    for color, line in (("black", 2.6), ("white", 1.2)):
        axis.add_patch(Polygon(corners, closed=True, fill=False, edgecolor=color, linewidth=line, clip_on=False))


def _extent(aspect: float) -> tuple[float, float, float, float]:
    """(left, right, bottom, top) with a longer side of one."""
    return 0.0, min(1.0, aspect), 0.0, min(1.0, 1 / aspect)


def _blank(axis: Axes) -> Axes:
    axis.set_axis_off()
    return axis


def _draw_names(axis: Axes, scene: Scene, class_names: Sequence[str], marks: Mapping[int, str]) -> None:
    """The classes of a row, by how many tokens show them, with their shares of the label map."""
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


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"…{text[1 - most :]}"
