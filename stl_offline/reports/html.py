"""HTML pages: one file with its styles, scripts, images and numbers, which fetches nothing.

A page is made of articles, one per image. An article's panels need no script; hovering over a token reads the numbers
in `token_data`.

Gh, Gw: a token grid; k: classes of a token.
"""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from stl_offline.files import atomic_write
from stl_offline.geometry import View
from stl_offline.palette import class_color, hex_color, ink_on
from stl_offline.reports.encode import cells_url, jpeg_url, shrink
from stl_offline.reports.panels import Panel
from stl_offline.reports.scene import TokenMap

NAMED = 8  # classes in an article's legend
IMAGE_PIXELS = 320  # longer side of an image on a page
_CORNERS = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
_STYLE, _THEME = "page.css", "theme.js"
_SCRIPTS = ("page.js", "tokens.js", "filters.js")  # one script on the page, in this order
_LOADER = PackageLoader("stl_offline.reports", "templates")


def outline_points(view: View) -> str:
    """The corners of a view's frame as SVG points in percent."""
    return " ".join(f"{100 * u:.2f},{100 * v:.2f}" for u, v in view(_CORNERS).tolist())


_ENVIRONMENT = Environment(
    loader=_LOADER, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_ENVIRONMENT.filters |= {"cells_url": cells_url, "outline_points": outline_points}


@dataclass(frozen=True)
class ClassRow:
    """A class of an article: its look, its share of the tokens, their mean confidence; own: the image's class."""

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

    Attributes:
        key, title, note, caption: text.
        panels: what is painted, in this order.
        rows: its classes by tokens. The legend shows the first ``shown``.
        tokens: name → numbers of a `TokenMap` for scripts (`token_data`).
        own: the image's class.
        tables: name of tokens that have a table → its title.
        tags: (text, CSS class) beside the title.
    """

    key: str
    title: str
    panels: tuple[Panel, ...]
    rows: tuple[ClassRow, ...]
    tokens: dict[str, dict[str, Any]]
    own: int
    tables: dict[str, str]
    note: str = ""
    caption: str = ""
    tags: tuple[tuple[str, str], ...] = ()
    shown: int = NAMED

    @cached_property
    def pixels(self) -> dict[str, str]:
        """Source → data: URL of its pixels, once for all panels that show them."""
        sources = {panel.source: panel.pixels for panel in self.panels if panel.pixels is not None}
        return {source: jpeg_url(shrink(pixels, IMAGE_PIXELS)) for source, pixels in sources.items()}

    @property
    def class_ids(self) -> set[int]:
        """Every class that its tokens can name."""
        ids = {class_id for data in self.tokens.values() for class_id in data["ids"]}
        return (ids | {class_id for data in self.tokens.values() for class_id in data.get("drawn", [])}) - {-1}


def render_page(template: str, **values: Any) -> bytes:
    """A page from a template. Every value is escaped where it is written."""
    scripts = {"script": "\n".join(map(_source, _SCRIPTS)), "theme": _source(_THEME)}
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src "
        f"{' '.join(_digest(text) for text in scripts.values())}; base-uri 'none'; form-action 'none'"
    )
    page = _ENVIRONMENT.get_template(template).render(style=_source(_STYLE), policy=policy, **scripts, **values)
    return page.encode("utf-8", "backslashreplace")  # paths need not be UTF-8


def write_page(path: str | Path, page: bytes) -> Path:
    """Write a page, whole or not at all. Raises TargetError."""
    atomic_write(path, page)
    return Path(path)


def token_data(tokens: TokenMap, view: View | None = None) -> dict[str, Any]:
    """Tokens for scripts: grid, class ids, probabilities (per mille), the draw, and the view on the image."""
    # Entries without a probability fill rows up, behind the others. The first one is the token's class nevertheless.
    known = tokens.probabilities > 0
    known[..., 0] = True
    k = int(known.sum(axis=-1).max())
    ids, probabilities = np.where(known, tokens.class_ids, -1)[..., :k], tokens.probabilities[..., :k]
    data: dict[str, Any] = {
        "grid": list(tokens.grid),
        "k": k,
        "ids": ids.ravel().tolist(),
        "p": [float(f"{value:.3g}") for value in (1000 * probabilities).ravel().tolist()],
    }
    if tokens.drawn is not None:
        data["drawn"] = tokens.drawn.ravel().tolist()
    if view is not None:
        data["view"] = [round(number, 6) for number in view.matrix.ravel().tolist()]
    return data


def page_data(articles: Sequence[Article], class_names: Sequence[str], marks: Mapping[int, str]) -> str:
    """All articles' tokens and the classes they name, as JSON that may stand inside a script element."""
    own = {article.own for article in articles} - {None}
    used = sorted(own.union(*(article.class_ids for article in articles)))
    classes = {
        class_id: [
            class_names[class_id],
            hex_color(class_color(class_id)),
            marks.get(class_id, ""),
            ink_on(class_color(class_id)),
        ]
        for class_id in used
    }
    scenes = [{"key": article.key, "own": article.own, "tokens": article.tokens} for article in articles]
    text = json.dumps({"classes": classes, "scenes": scenes}, ensure_ascii=False, separators=(",", ":"))
    # Keys and class names are foreign text: nothing in them may end the element.
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def class_rows(
    maps: Sequence[TokenMap], own: int | None, class_names: Sequence[str], marks: Mapping[int, str]
) -> tuple[ClassRow, ...]:
    """The most probable classes of the tokens of some maps: the image's own first, then by number of tokens."""
    best = np.concatenate([tokens.best.ravel() for tokens in maps])
    confidence = np.concatenate([tokens.confidence.ravel() for tokens in maps])
    counts = Counter(best.tolist())
    if own is not None:
        counts.setdefault(own, 0)
    return tuple(
        ClassRow(
            class_id,
            class_names[class_id] if class_id >= 0 else "no label",
            hex_color(class_color(class_id)),
            ink_on(class_color(class_id)),
            marks.get(class_id, ""),
            counts[class_id],
            counts[class_id] / best.size,
            float(confidence[best == class_id].mean()) if counts[class_id] else 0.0,
            class_id == own,
        )
        for class_id in sorted(counts, key=lambda each: (each != own, -counts[each], each))
    )


def _source(name: str) -> str:
    text, _, _ = _LOADER.get_source(_ENVIRONMENT, name)
    return text


def _digest(text: str) -> str:
    """A script's hash in a content security policy: the browser runs scripts with these hashes and no others."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
