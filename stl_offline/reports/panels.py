"""The panels of an image: what the PNG and the page show of it, decided once. `png` and `html` only paint them.

Gh, Gw: a token grid; H, W: pixels.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib import colormaps

from stl_offline.errors import counted, printable
from stl_offline.geometry import View, relative_view
from stl_offline.palette import CONFIDENT, UNCONFIDENT, class_marks, class_pixels
from stl_offline.reports.scene import Scene, TokenMap

OVERLAY = 0.75  # opacity of labels over the image
FAINT = 0.25  # opacity of draws that differ from the token's most probable class
CONFIDENCE_COLORS = "viridis"

IMAGE, LABELER_CROP = "image", "labeler's crop"
LABELS, OWN, CONFIDENCE, DRAW = "token labels", "own class", "confidence", "one draw"
CROP, CROP_LABELS, CROP_DRAW = "student's crop", "labels in the crop", "draw in the crop"
TITLES = (IMAGE, LABELER_CROP, LABELS, OWN, CONFIDENCE, DRAW, CROP, CROP_LABELS, CROP_DRAW)  # in the order shown


@dataclass(frozen=True, eq=False)
class Panel:
    """One square.

    Attributes:
        title: short name, unique among the panels of an image.
        alt: what it shows, in words.
        aspect: width / height.
        pixels: uint8 (H, W, 3), the image beneath; None where no image is available.
        source: name of these pixels. Panels of one image with the same source share them.
        grey: whether the pixels are shown without colour.
        tokens: the tokens that the cells belong to; None for a plain image.
        name: name of these tokens. Panels of one image with the same name share them.
        cells: uint8 (Gh, Gw, 4), red, green, blue and opacity of each token; None for a plain image.
        letters: which tokens get their class's letter: all of them ("best") or those that a draw kept ("kept").
        outline: view whose frame is drawn, in the panel's unit coordinates.
        note: shown beside the title, such as "flipped".
    """

    title: str
    alt: str
    aspect: float
    pixels: np.ndarray | None = None
    source: str = ""
    grey: bool = True
    tokens: TokenMap | None = None
    name: str = ""
    cells: np.ndarray | None = None
    letters: Literal["", "best", "kept"] = ""
    outline: View | None = None
    note: str = ""

    @property
    def lettered(self) -> np.ndarray:
        """(Gh, Gw): the class whose letter each token shows, −1 for none."""
        if not self.letters:
            return np.full(self.tokens.grid, -1)
        return self.tokens.best if self.letters == "best" else np.where(self.tokens.kept, self.tokens.best, -1)


def scene_panels(scene: Scene, class_names: Sequence[str], threshold: float) -> list[Panel]:
    """All panels of one label map, in the order of `TITLES`.

    Args:
        threshold: confidence from which a token counts as confident.
    """
    key = printable(scene.key)
    panels = []
    if scene.image is not None:
        name = None if scene.class_id is None else class_names[scene.class_id]
        panels.append(_image_panel(scene, key, name))
        if not scene.whole:
            alt = f"The crop of {key} that the labeler saw"
            pixels = scene.tokens.pixels
            panels.append(Panel(LABELER_CROP, alt, scene.tokens.aspect, pixels, source="crop", grey=False))
    panels += _map_panels(scene, key, class_names, threshold)
    if scene.student is not None:
        panels += _student_panels(scene, key, class_names)
    return panels


def label_panel(title: str, alt: str, tokens: TokenMap, name: str, source: str, outline: View | None = None) -> Panel:
    """Each token in the colour of its most probable class, with its letter."""
    cells = _cells(class_pixels(tokens.best), np.where(tokens.best >= 0, OVERLAY, 0))
    return Panel(title, alt, tokens.aspect, tokens.pixels, source, True, tokens, name, cells, "best", outline)


def scene_marks(scenes: Sequence[Scene]) -> dict[int, str]:
    """The letters of the classes of some scenes."""
    return class_marks(sum((scene.all_tokens() for scene in scenes), Counter()))


def confidence_pixels(confidence: np.ndarray) -> np.ndarray:
    """Confidence (…) in [0, 1] → uint8 (…, 3)."""
    return colormaps[CONFIDENCE_COLORS](np.asarray(confidence, dtype=np.float64), bytes=True)[..., :3]


def own_cells(tokens: TokenMap, class_id: int, threshold: float) -> np.ndarray:
    """uint8 (Gh, Gw, 4): the foreground in two colours, confident and less confident; the rest is clear."""
    confident = tokens.confidence >= threshold
    colors = np.round(255 * np.where(confident[..., None], CONFIDENT, UNCONFIDENT))
    return _cells(colors, np.where(tokens.own(class_id), OVERLAY, 0))


def draw_cells(tokens: TokenMap) -> np.ndarray:
    """uint8 (Gh, Gw, 4): a draw's classes, faint where they are not the token's best, clear where there is none."""
    opacity = np.where(tokens.kept, OVERLAY, FAINT)
    return _cells(class_pixels(tokens.drawn), np.where(tokens.drawn >= 0, opacity, 0))


def describe_shares(tokens: TokenMap, class_names: Sequence[str], most: int = 4) -> str:
    """The most frequent classes with their shares of the tokens, as text."""
    counts = tokens.shares.most_common(most)
    named = [
        f"{class_names[each] if each >= 0 else 'no label'} {count / tokens.best.size:.0%}" for each, count in counts
    ]
    rest = len(tokens.shares) - len(named)
    return ", ".join(named) + (f" and {rest} more classes" if rest else "")


def _image_panel(scene: Scene, key: str, class_name: str | None) -> Panel:
    if scene.student_view is not None:
        outline, outlined = scene.student_view, "; the student's crop is outlined"
    elif not scene.whole:
        outline, outlined = scene.view, "; the labeler's crop is outlined"
    else:
        outline, outlined = None, ""
    aspect = scene.image.shape[1] / scene.image.shape[0]
    of_class = "" if class_name is None else f" of the class {class_name}"
    alt = f"The image {key}{of_class}{outlined}"
    return Panel(IMAGE, alt, aspect, scene.image, source="image", grey=False, outline=outline)


def _map_panels(scene: Scene, key: str, class_names: Sequence[str], threshold: float) -> list[Panel]:
    tokens = scene.tokens
    source = "image" if scene.whole else "crop"
    base = {"aspect": tokens.aspect, "pixels": tokens.pixels, "source": source, "tokens": tokens, "name": "map"}
    outline = None if scene.student_view is None else relative_view(scene.view, scene.student_view)
    # Without a top k, all that is known of a class is how often it was drawn.
    sure = (
        f"Share of a token's {counted(scene.draws, 'draw')} that its most frequent class has"
        if scene.draws
        else "Confidence"
    )
    own_panels = []
    if scene.class_id is not None:
        own = tokens.own(scene.class_id)
        confident = int((own & (tokens.confidence >= threshold)).sum())
        own_panels = [
            Panel(
                OWN,
                f"Foreground of {key}: {own.sum()} of {own.size} tokens have the class {class_names[scene.class_id]}, "
                f"{confident} of them with a confidence of at least {threshold:g}",
                cells=own_cells(tokens, scene.class_id, threshold),
                **base,
            )
        ]
    return [
        label_panel(
            LABELS, f"Token labels of {key}: {describe_shares(tokens, class_names)}", tokens, "map", source, outline
        ),
        *own_panels,
        Panel(
            CONFIDENCE,
            f"{sure} of {key}: {tokens.confidence.min():.0%} to {tokens.confidence.max():.0%}, "
            f"mean {tokens.confidence.mean():.0%}",
            cells=_cells(confidence_pixels(tokens.confidence), np.ones(tokens.grid)),
            note=f"share of {counted(scene.draws, 'draw')}" if scene.draws else "",
            **base,
        ),
        Panel(
            DRAW,
            f"One Gumbel draw of {key}: {tokens.kept.sum()} of {tokens.best.size} tokens keep their most probable "
            "class",
            cells=draw_cells(tokens),
            letters="kept",
            **base,
        ),
    ]


def _student_panels(scene: Scene, key: str, class_names: Sequence[str]) -> list[Panel]:
    student, panels = scene.student, []
    if student.pixels is not None:
        note = "flipped" if np.linalg.det(scene.student_view.matrix[:, :2]) < 0 else ""
        alt = f"The student's random crop of {key}" + (", flipped" if note else "")
        panels.append(Panel(CROP, alt, student.aspect, student.pixels, source="student", grey=False, note=note))
    shares = describe_shares(student, class_names)
    panels.append(
        label_panel(
            CROP_LABELS, f"Token labels under the student's crop of {key}: {shares}", student, "student", "student"
        )
    )
    panels.append(
        Panel(
            CROP_DRAW,
            f"One Gumbel draw under the student's crop of {key}: {student.kept.sum()} of {student.best.size} tokens "
            "keep their most probable class",
            student.aspect,
            student.pixels,
            source="student",
            tokens=student,
            name="student",
            cells=draw_cells(student),
            letters="kept",
        )
    )
    return panels


def _cells(colors: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Colours (Gh, Gw, 3) of 255 and opacities (Gh, Gw) of 1 → uint8 (Gh, Gw, 4)."""
    return np.dstack([colors, np.round(255 * opacity)]).astype(np.uint8)
