"""Panels of tokens for a page: small images that need no script, and the numbers that hovering shows.

Gh, Gw: a token grid; k: classes of a token.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stl_offline.geometry import View
from stl_offline.reports.colors import class_color, class_pixels, hex_color, ink_on
from stl_offline.reports.encode import cells_url
from stl_offline.reports.scene import TokenMap

NAMED = 8  # classes in an article's legend
OVERLAY = 190  # of 255: how strongly labels cover the image beneath
_CORNERS = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])


@dataclass(frozen=True)
class Panel:
    """One square of an article.

    title; alt: what a reader who does not see it should know; pixels: name of the article's pixels beneath, or None;
    grey: whether these are shown without colour; cells: data: URL of one pixel for each token, or None; tokens: name
    of the article's tokens that hovering looks up, or None; letters: which of these are lettered, "best" or "kept";
    outline: corners of a crop as SVG points in percent; aspect: width / height; reach: whether the Tab key stops here.
    """

    title: str
    alt: str
    aspect: float
    pixels: str | None = None
    grey: bool = True
    cells: str | None = None
    tokens: str | None = None
    letters: str = ""
    outline: str | None = None
    reach: bool = False


@dataclass(frozen=True)
class ClassRow:
    """A class of an article: its look, its share of the tokens, their mean confidence; own: it is the image's."""

    class_id: int
    name: str
    color: str
    ink: str
    mark: str
    tokens: int
    share: float
    confidence: float
    own: bool


@dataclass(frozen=True)
class Article:
    """One image's part of a page.

    key, title, note, caption: text; pixels: name → data: URL; panels; rows: its classes by tokens, of which the
    legend shows the first ``shown``; tokens: name → what scripts need of a `TokenMap` (`token_data`); own: the
    image's class; tables: which tokens have a table, name → title; tags: (text, CSS class) beside the title.
    """

    key: str
    title: str
    note: str
    pixels: dict[str, str]
    panels: tuple[Panel, ...]
    rows: tuple[ClassRow, ...]
    tokens: dict[str, dict[str, Any]]
    own: int
    tables: dict[str, str]
    caption: str = ""
    tags: tuple[tuple[str, str], ...] = ()
    shown: int = NAMED

    @property
    def class_ids(self) -> set[int]:
        """Every class that its tokens can name."""
        ids = {class_id for data in self.tokens.values() for class_id in data["ids"]}
        return (ids | {class_id for data in self.tokens.values() for class_id in data.get("drawn", [])}) - {-1}


def token_data(tokens: TokenMap, view: View | None = None) -> dict[str, Any]:
    """What scripts need of tokens: grid, class ids and probabilities (per mille), the draw, the view on the image."""
    data: dict[str, Any] = {
        "grid": list(tokens.grid),
        "k": tokens.class_ids.shape[2],
        "ids": tokens.class_ids.ravel().tolist(),
        "p": [float(f"{value:.3g}") for value in (1000 * tokens.probabilities).ravel().tolist()],
    }
    if tokens.drawn is not None:
        data["drawn"] = tokens.drawn.ravel().tolist()
    if view is not None:
        data["view"] = [round(number, 6) for number in view.matrix.ravel().tolist()]
    return data


def page_data(articles: Sequence[Article], class_names: Sequence[str], marks: Mapping[int, str]) -> str:
    """All articles' tokens and the classes they name, as JSON that may stand inside a script element."""
    used = sorted(set().union(*(article.class_ids for article in articles)) | {article.own for article in articles})
    classes = {
        class_id: [class_names[class_id], hex_color(class_color(class_id)), marks.get(class_id, ""), ink(class_id)]
        for class_id in used
    }
    scenes = [{"key": article.key, "own": article.own, "tokens": article.tokens} for article in articles]
    text = json.dumps({"classes": classes, "scenes": scenes}, ensure_ascii=False, separators=(",", ":"))
    # Keys and class names come from others: nothing in them may end the element.
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def ink(class_id: int) -> str:
    """Black or white, to write on a class's colour."""
    return ink_on(class_color(class_id))


def class_rows(
    maps: Sequence[TokenMap], own: int, class_names: Sequence[str], marks: Mapping[int, str]
) -> tuple[ClassRow, ...]:
    """The classes that the tokens of some maps say, the image's own first, then by tokens."""
    best = np.concatenate([tokens.best.ravel() for tokens in maps])
    confidence = np.concatenate([tokens.confidence.ravel() for tokens in maps])
    counts = Counter(best.tolist())
    counts.setdefault(own, 0)
    rows = []
    for class_id in sorted(counts, key=lambda each: (each != own, -counts[each], each)):
        rows.append(
            ClassRow(
                class_id,
                class_names[class_id] if class_id >= 0 else "no label",
                hex_color(class_color(class_id)),
                ink(class_id),
                marks.get(class_id, ""),
                counts[class_id],
                counts[class_id] / best.size,
                float(confidence[best == class_id].mean()) if counts[class_id] else 0.0,
                class_id == own,
            )
        )
    return tuple(rows)


def label_cells(tokens: TokenMap) -> str:
    """Each token in the colour of its most probable class."""
    return _cells(class_pixels(tokens.best), np.where(tokens.best >= 0, OVERLAY, 0))


def opaque_cells(colors: np.ndarray) -> str:
    """Colours (Gh, Gw, 3) that cover what is beneath."""
    return _cells(colors, np.full(colors.shape[:2], 255))


def tinted_cells(opacity: np.ndarray, colors: np.ndarray) -> str:
    """Colours (Gh, Gw, 3) with an opacity of 255 for each."""
    return _cells(colors, opacity)


def outline_points(view: View) -> str:
    """A crop's corners on its image, as SVG points in percent."""
    return " ".join(f"{100 * u:.2f},{100 * v:.2f}" for u, v in view(_CORNERS).tolist())


def say_shares(tokens: TokenMap, class_names: Sequence[str], most: int = 4) -> str:
    """The classes that most tokens say, in words."""
    counts = tokens.shares.most_common(most)
    named = [
        f"{class_names[each] if each >= 0 else 'no label'} {count / tokens.best.size:.0%}" for each, count in counts
    ]
    rest = len(tokens.shares) - len(named)
    return ", ".join(named) + (f" and {rest} more classes" if rest else "")


def _cells(colors: np.ndarray, opacity: np.ndarray) -> str:
    return cells_url(np.dstack([colors, opacity.astype(np.uint8)]))
