"""One picture of label maps: what went in, what the labeler said of each token, how sure it was, what students get.

H, W: pixels of a picture; Gh, Gw: a label map's grid; h, w: a student's grid.
"""

import colorsys
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Polygon

from stl_offline.errors import InputError
from stl_offline.files import atomic_write
from stl_offline.geometry import View

CELL_INCHES = 1.9
DOTS_PER_INCH = 110
CROP_PIXELS = 256  # side of the student's crop as shown
NAMED = 6  # classes named beside a row
OVERLAY = 0.72  # how strongly labels cover the picture beneath
UNLABELLED = (0.55, 0.55, 0.55)
CONFIDENCE_COLORS = "viridis"
CONFIDENCE_SCALE = Normalize(0, 1)
FIRST_COLORS = (
    "#e6194b",  # red
    "#4363d8",  # blue
    "#3cb44b",  # green
    "#f58231",  # orange
    "#911eb4",  # purple
    "#42d4f4",  # cyan
    "#f032e6",  # magenta
    "#ffe119",  # yellow
    "#9a6324",  # brown
    "#bfef45",  # lime
)
GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class FigureSample:
    """One row. Leave ``view`` and ``drawn_ids`` out (in every row) to show label maps alone.

    Raises:
        InputError: shapes that do not fit each other.
    """

    image: np.ndarray  # uint8 (H, W, 3)
    class_ids: np.ndarray  # (Gh, Gw), each token's best class
    confidence: np.ndarray  # (Gh, Gw) in [0, 1]
    title: str
    view: View | None = None  # a student's crop of the picture
    drawn_ids: np.ndarray | None = None  # (h, w), the target drawn for each of the student's tokens; −1: none

    def __post_init__(self) -> None:
        if self.image.ndim != 3 or self.image.shape[2] != 3 or self.image.dtype != np.uint8:
            raise InputError(
                f"a picture is uint8 (H, W, 3), got {self.image.dtype} {self.image.shape} for {self.title!r}"
            )
        if self.class_ids.ndim != 2 or self.class_ids.shape != self.confidence.shape:
            raise InputError(
                f"class ids and confidence share one grid (Gh, Gw), got {self.class_ids.shape} and "
                f"{self.confidence.shape} for {self.title!r}"
            )
        if (self.view is None) != (self.drawn_ids is None):
            raise InputError(
                f"a student's view and the targets drawn under it go together; {self.title!r} has one of them"
            )
        if self.drawn_ids is not None and self.drawn_ids.ndim != 2:
            raise InputError(f"drawn targets have a grid (h, w), got {self.drawn_ids.shape} for {self.title!r}")


def label_figure(samples: Sequence[FigureSample], class_names: Sequence[str], path: str | Path) -> None:
    """Write a PNG with one row for each sample; each row names the classes that its colours stand for.

    Columns: the picture with the student's crop outlined, the label map, its confidence, and (where samples have a
    view) the crop as the student sees it and the targets drawn for its tokens.

    Raises:
        InputError: no samples, or only some with a view.
        TargetError: ``path`` cannot be written.
    """
    if not samples:
        raise InputError("a picture of labels needs at least one sample")
    with_student = samples[0].view is not None
    if any((sample.view is not None) != with_student for sample in samples):
        raise InputError("either every sample of a picture has a student's view, or none")
    heads = ["picture", "token labels", "confidence"] + ["student's crop", "drawn targets"] * with_student
    columns = len(heads)
    figure = Figure(figsize=((columns + 1.3) * CELL_INCHES, (len(samples) + 0.6) * CELL_INCHES))
    # A row of heads above, a row for the colour scale below, a column of names at the right.
    grid = figure.add_gridspec(
        len(samples) + 2,
        columns + 1,
        width_ratios=[1] * columns + [1.2],
        height_ratios=[0.14, *[1] * len(samples), 0.08],
        left=0.01,
        right=0.99,
        bottom=0.35 / (len(samples) + 0.6),
        top=0.995,
        wspace=0.06,
        hspace=0.16,
    )
    for column, head in enumerate(heads):
        axis = figure.add_subplot(grid[0, column])
        axis.set_axis_off()
        axis.text(0.5, 0.5, head, fontsize=10, ha="center", va="center")
    for number, sample in enumerate(samples, 1):
        axes = [figure.add_subplot(grid[number, column]) for column in range(columns + 1)]
        for axis in axes:
            axis.set_axis_off()
        _draw_row(axes, sample)
        _draw_names(axes[-1], sample, class_names)
    scale = ScalarMappable(CONFIDENCE_SCALE, CONFIDENCE_COLORS)
    figure.colorbar(scale, cax=figure.add_subplot(grid[-1, 2]), orientation="horizontal", ticks=[0, 0.5, 1])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    atomic_write(path, buffer.getvalue())


def class_color(class_id: int) -> tuple[float, float, float]:
    """The colour of a class: a function of its id alone, so that it is the same in every picture."""
    if class_id < 0:
        return UNLABELLED
    if class_id < len(FIRST_COLORS):
        return to_rgb(FIRST_COLORS[class_id])
    # Steps of the golden ratio around the hue circle keep neighbours apart; three shades keep close hues apart.
    saturation, value = ((0.85, 0.95), (0.6, 0.7), (0.45, 1.0))[class_id % 3]
    return colorsys.hsv_to_rgb(class_id * GOLDEN % 1.0, saturation, value)


def see_through(image: np.ndarray, view: View, side: int = CROP_PIXELS) -> np.ndarray:
    """A picture (H, W, 3) as a view shows it: (side, side, 3), nearest pixels, off the picture repeats its border."""
    height, width = image.shape[:2]
    centres = (np.arange(side) + 0.5) / side
    source = view(np.stack(np.meshgrid(centres, centres), axis=-1))
    x = np.clip((source[..., 0] * width).astype(int), 0, width - 1)
    y = np.clip((source[..., 1] * height).astype(int), 0, height - 1)
    return image[y, x]


def _draw_row(axes: list[Axes], sample: FigureSample) -> None:
    picture, labels, confidence = axes[:3]
    picture.imshow(sample.image)
    picture.text(0, 1.03, sample.title, transform=picture.transAxes, fontsize=8, parse_math=False, va="bottom")
    _overlay(labels, sample.image, sample.class_ids)
    _show_cells(confidence, sample.image, sample.confidence, cmap=CONFIDENCE_COLORS, norm=CONFIDENCE_SCALE)
    if sample.view is None:
        return
    height, width = sample.image.shape[:2]
    corners = sample.view(np.array([[0, 0], [1, 0], [1, 1], [0, 1]])) * (width, height) - 0.5
    for color, line in (("black", 3.0), ("white", 1.4)):
        picture.add_patch(Polygon(corners, closed=True, fill=False, edgecolor=color, linewidth=line, clip_on=False))
    crop = see_through(sample.image, sample.view)
    axes[3].imshow(crop)
    linear = sample.view.matrix[:, :2]
    if np.linalg.det(linear) < 0:
        axes[3].text(4, 4, "flipped", fontsize=7, color="white", va="top", bbox={"color": "black", "pad": 1.5})
    _overlay(axes[4], crop, sample.drawn_ids)


def _overlay(axis: Axes, image: np.ndarray, class_ids: np.ndarray) -> None:
    colors = np.array([[class_color(int(class_id)) for class_id in row] for row in class_ids])
    axis.imshow(image.mean(axis=2), cmap="gray", vmin=0, vmax=255)
    _show_cells(axis, image, colors, alpha=OVERLAY)


def _show_cells(axis: Axes, image: np.ndarray, cells: np.ndarray, **look: object) -> None:
    height, width = image.shape[:2]
    axis.imshow(cells, interpolation="nearest", extent=(-0.5, width - 0.5, height - 0.5, -0.5), **look)


def _draw_names(axis: Axes, sample: FigureSample, class_names: Sequence[str]) -> None:
    """The classes of a row, by how many tokens show them, with their shares of the label map."""
    in_map = Counter(sample.class_ids.ravel().tolist())
    shown = in_map + Counter([] if sample.drawn_ids is None else sample.drawn_ids.ravel().tolist())
    ranked = sorted(shown, key=lambda class_id: (-shown[class_id], class_id))
    handles = []
    for class_id in ranked[:NAMED]:
        share = f" {in_map[class_id] / sample.class_ids.size:.0%}" if in_map[class_id] else ""
        handles.append(Patch(color=class_color(class_id), label=_name(class_id, class_names) + share))
    if len(ranked) > NAMED:
        handles.append(Patch(color="none", label=f"and {len(ranked) - NAMED} more"))
    legend = axis.legend(handles=handles, loc="center left", fontsize=7, frameon=False, handlelength=1.0, borderpad=0)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _name(class_id: int, class_names: Sequence[str]) -> str:
    if class_id < 0:
        return "no label"
    name = class_names[class_id]
    return name if len(name) <= 22 else f"{name[:21]}…"
