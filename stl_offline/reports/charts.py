"""Line charts as numbers that a template draws: scales, ticks, paths. Colours are the page's, for light and dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 74, 12, 12, 46
_DOTTED = 60  # series with more points have no dots


@dataclass(frozen=True)
class Series:
    """One line: (x, y) points in order; ``None`` as y leaves a gap. number: which of the page's line styles."""

    name: str
    number: int
    points: tuple[tuple[float, float | None], ...]


@dataclass(frozen=True)
class Tick:
    place: float
    text: str


@dataclass(frozen=True)
class Line:
    """name, number: the series'; path: SVG path data; dots: (x, y, text)."""

    name: str
    number: int
    path: str
    dots: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True)
class Chart:
    """A chart, laid out. table: rows of x and each series' y as text."""

    title: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    table: tuple[tuple[str, ...], ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def line_chart(title: str, x_label: str, y_label: str, series: Sequence[Series], form: str = ".3g") -> Chart | None:
    """Lay out a chart; None where no series has a finite point.

    Args:
        form: how a y value is written, as in ``format``.
    """
    known = [(x, y) for line in series for x, y in line.points if _finite(y)]
    if not known:
        return None
    x_ticks = _ticks([x for x, _ in known], whole=True)
    y_ticks = _ticks([y for _, y in known])
    x_scale = _Scale(
        min(x_ticks[0], *(x for x, _ in known)), max(x_ticks[-1], *(x for x, _ in known)), LEFT, WIDTH - RIGHT
    )
    y_scale = _Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    lines = []
    for line in series:
        path, dots, pen = [], [], "M"
        for x, y in line.points:
            if not _finite(y):
                pen = "M"
                continue
            place = (x_scale(x), y_scale(y))
            path.append(f"{pen}{place[0]:.1f} {place[1]:.1f}")
            dots.append((*place, f"{line.name}: {x_label} {x:g}, {y:{form}}"))
            pen = "L"
        shown = dots if len(dots) <= _DOTTED else []
        lines.append(Line(line.name, line.number, " ".join(path), tuple(shown)))
    return Chart(
        title,
        x_label,
        y_label,
        tuple(Tick(x_scale(value), f"{value:g}") for value in x_ticks),
        tuple(Tick(y_scale(value), _tick_text(value, form)) for value in y_ticks),
        tuple(lines),
        _table(series, form),
    )


class _Scale:
    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.start = low, start
        self.factor = (end - start) / ((high - low) or 1.0)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) * self.factor


def _ticks(values: Sequence[float], whole: bool = False) -> list[float]:
    low, high = min(values), max(values)
    if low == high:
        low, high = (low - 1, high + 1) if whole else (low - abs(low) * 0.1 - 1e-9, high + abs(high) * 0.1 + 1e-9)
    found = MaxNLocator(nbins=5, integer=whole, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high).tolist()
    return [value for value in found if low <= value <= high] or [low, high] if whole else found


def _tick_text(value: float, form: str) -> str:
    return f"{100 * value:g}%" if form.endswith("%") else f"{value:g}"


def _table(series: Sequence[Series], form: str) -> tuple[tuple[str, ...], ...]:
    columns = [dict(line.points) for line in series]
    places = sorted({x for column in columns for x in column})
    return tuple(
        (f"{x:g}", *(f"{column[x]:{form}}" if _finite(column.get(x)) else "–" for column in columns)) for x in places
    )


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
