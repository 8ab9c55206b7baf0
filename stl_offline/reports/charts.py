"""Charts: matplotlib draws them, as SVG for pages and as PNG.

A chart on a page follows the page's theme. It is drawn in placeholder colours, which are replaced by the CSS variables
of ``page.css``; its texts stay texts, in the page's font.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from stl_offline.labels.arrays import ShardArrays
from stl_offline.palette import CONFIDENT, UNCONFIDENT
from stl_offline.reports.png import save_figure

# The dashes of the first, second, … run, in points; a run has the same dashes and colour in all charts.
DASHES = ((), (7, 3), (2, 3), (10, 3, 2, 3), (4, 2), (12, 4))
HATCHES = ("", "///", "...", "xxx", "---", "+++")
BINS = 20
WIDTH, HEIGHT = 440, 270  # points of 1/72 inch, and units of the SVG
_DOTTED = 60  # series with more points have no dots
_INK, _FAINT, _LINE = "#010000", "#010001", "#010002"
_SERIES = tuple(f"#0200{number:02x}" for number in range(len(DASHES)))
_THEME = {_INK: "--ink", _FAINT: "--faint", _LINE: "--line"} | {
    color: f"--s{number}" for number, color in enumerate(_SERIES)
}
_STYLE = {
    "axes.autolimit_mode": "round_numbers",  # from tick to tick
    "axes.edgecolor": _FAINT,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelcolor": _INK,
    "axes.labelsize": 13,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.xmargin": 0,
    "axes.ymargin": 0,
    "figure.facecolor": "none",
    "grid.color": _LINE,
    "hatch.linewidth": 2,
    "lines.linewidth": 2.2,
    "lines.markersize": 8,
    "lines.scale_dashes": False,
    "path.simplify": False,
    "svg.fonttype": "none",
    "xtick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "xtick.labelsize": 13,
    "ytick.labelcolor": _INK,
    "ytick.labelsize": 13,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Series:
    """One line: (x, y) points in order; ``None`` as y leaves a gap. number: which of the page's line styles."""

    name: str
    number: int
    points: tuple[tuple[float, float | None], ...]


@dataclass(frozen=True)
class Chart:
    """A chart for a page. svg: markup, with all foreign text escaped; caption, heads, table: its numbers as text."""

    title: str
    svg: str
    note: str
    caption: str
    heads: tuple[str, ...]
    table: tuple[tuple[str, ...], ...]


@dataclass(eq=False)
class ConfidenceCounts:
    """Tokens by confidence, over the shards that were read.

    own, others: (BINS,) tokens whose most probable class is their image's class, and the rest; images, shards: how
    many were counted; own_classes: whether images have classes, else all tokens count as others.
    """

    own: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    others: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    images: int = 0
    shards: int = 0
    own_classes: bool = True

    def add(self, arrays: ShardArrays) -> None:
        """Count a shard."""
        arrays = arrays.listed()
        own = (arrays.class_ids[..., 0] == arrays.class_id[:, None, None, None]) & self.own_classes
        edges = np.linspace(0, 1, BINS + 1)
        # Shares of draws sum to a little more than 1, which no bin would take.
        confidence = np.clip(arrays.confidence.astype(np.float64), 0, 1)
        self.own += np.histogram(confidence[own], edges)[0]
        self.others += np.histogram(confidence[~own], edges)[0]
        self.images += len(arrays)
        self.shards += 1

    @property
    def tokens(self) -> int:
        return int(self.own.sum() + self.others.sum())


def line_chart(title: str, x_label: str, y_label: str, series: Sequence[Series], form: str = ".3g") -> Chart | None:
    """A chart of lines; None where no series has a finite point.

    Args:
        form: how a y value is written, as in ``format``.
    """
    if not any(_finite(y) for line in series for _, y in line.points):
        return None
    tips: dict[str, list[str]] = {}
    with rc_context(_STYLE):
        figure, axis = _new_figure(x_label, y_label)
        for position, line in enumerate(series):
            finite = [(x, y) for x, y in line.points if _finite(y)]
            gid = f"line-{position}"
            tips[gid] = [f"{line.name}: {x_label} {x:g}, {y:{form}}" for x, y in finite]
            axis.plot(
                [x for x, _ in line.points],
                [y if _finite(y) else math.nan for _, y in line.points],
                color=_SERIES[line.number],
                linestyle=(0, DASHES[line.number]) if DASHES[line.number] else "-",
                marker="o" if len(finite) <= _DOTTED else "",
                markeredgewidth=0,
                gid=gid,
            )
        axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 2.5, 5, 10]))
        axis.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        percent = form.endswith("%")
        axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%" if percent else f"{value:g}")
        axis.autoscale_view()
        low, high = min(epochs := [x for line in series for x, _ in line.points]), max(epochs)
        if low == high:
            axis.set_xlim(low - 1, high + 1)
        svg = _svg(figure, title, f"{y_label} over {x_label}", tips)
    heads = (x_label, *(line.name for line in series))
    return Chart(title, svg, note="", caption=y_label, heads=heads, table=_table(series, form))


@dataclass(frozen=True)
class Bars:
    """The bars of one model: for each group of the chart, values by place within the group; None for one that lacks.

    number: which of the page's series.
    """

    name: str
    number: int
    values: tuple[tuple[float | None, ...], ...]


def bar_chart(
    title: str, y_label: str, groups: Sequence[str], places: Sequence[str], bars: Sequence[Bars], form: str = ".1%"
) -> Chart:
    """Bars of shares in [0, 1], in groups: in each those of the first model at all places, then those of the next.

    Args:
        groups: what stands below each group; places: the name of each place within a group, "" for a single one.
    """
    per_group = len(bars) * len(places)
    width = 0.86 / per_group
    tips: dict[str, list[str]] = {}
    rows: list[tuple[str, ...]] = []
    with rc_context(_STYLE):
        figure, axis = _new_figure("", y_label)
        for position, each in enumerate(bars):
            color = _SERIES[each.number]
            # From the second series on hatched, so that they are told apart without colour.
            look = {"facecolor": "none", "edgecolor": color, "hatch": HATCHES[each.number], "linewidth": 1}
            for group, values in enumerate(each.values):
                for place, value in enumerate(values):
                    if not _finite(value):
                        continue
                    left = group + 0.07 + (position * len(places) + place) * width
                    gid = f"bar-{position}-{group}-{place}"
                    what = ", ".join(part for part in (groups[group], places[place]) if part)
                    tips[gid] = [f"{each.name}: {what}, {value:{form}}"]
                    kind = look if HATCHES[each.number] else {"color": color}
                    axis.bar(left, value, 0.88 * width, align="edge", gid=gid, **kind)[0].set_gid(gid)
        axis.set_xlim(0, len(groups))
        axis.set_xticks(np.arange(len(groups)) + 0.5, [group.replace(" ", "\n", 1) for group in groups])
        axis.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.set_ylim(0, 1)
        svg = _svg(figure, title, f"{y_label} in groups of bars", tips)
    for group, name in enumerate(groups):
        for place, part in enumerate(places):
            values = [each.values[group][place] for each in bars]
            label = ", ".join(each for each in (name, part) if each)
            rows.append((label, *(f"{value:{form}}" if _finite(value) else "–" for value in values)))
    return Chart(title, svg, "", y_label, ("", *(each.name for each in bars)), tuple(rows))


def confidence_chart(counts: ConfidenceCounts, note: str) -> Chart:
    """The histogram of confidence for a page."""
    tips = {}
    groups = [(0, "own class", counts.own), (1, "other classes", counts.others)]
    if not counts.own_classes:
        groups = [(1, "all classes", counts.others)]
    for number in range(BINS):
        for part, what, values in groups:
            share = values[number] / max(counts.tokens, 1)
            tips[f"bar-{part}-{number}"] = [f"{_bin(number)}: {share:.1%} of tokens, {what}"]
    title = f"Histogram of the confidence of {counts.tokens:,} tokens"
    with rc_context(_STYLE):
        figure, axis = _new_figure()
        _draw_bars(axis, counts, _SERIES[0], _SERIES[1])
        svg = _svg(figure, title, note, tips)
    rows = tuple((_bin(number), *(f"{values[number]:,}" for _, _, values in groups)) for number in range(BINS))
    heads = ("confidence", *(what for _, what, _ in groups))
    return Chart(title, svg, note, "Tokens by confidence", heads, rows)


def confidence_figure(counts: ConfidenceCounts, note: str, path: str | Path) -> None:
    """Write the histogram of confidence as PNG. Raises TargetError."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.add_subplot()
    _draw_bars(axis, counts, CONFIDENT, UNCONFIDENT)
    axis.set_title(note, fontsize=9)
    # Not of the bars, of which the first ones are hidden where they are empty.
    looks = [Patch(facecolor=CONFIDENT, label="the image's own class")] if counts.own_classes else []
    looks.append(Patch(label="other classes" if counts.own_classes else "all classes", **_hatched(UNCONFIDENT)))
    axis.legend(handles=looks, fontsize=8)
    save_figure(figure, path)


def _draw_bars(axis: Axes, counts: ConfidenceCounts, own_color: object, other_color: object) -> None:
    left = np.arange(BINS) / BINS
    own, others = (values / max(counts.tokens, 1) for values in (counts.own, counts.others))
    solid = axis.bar(left, own, 1 / BINS, align="edge", color=own_color)
    hatched = axis.bar(left, others, 1 / BINS, bottom=own, align="edge", **_hatched(other_color))
    for part, bars in enumerate((solid, hatched)):
        for number, bar in enumerate(bars):
            bar.set_gid(f"bar-{part}-{number}")
            bar.set_visible(bar.get_height() > 0)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, None)
    axis.set_xlabel("confidence: probability of a token's best class")
    axis.set_ylabel("share of tokens")
    axis.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")


def _hatched(color: object) -> dict[str, object]:
    """A look that is told apart from a solid one without colour."""
    return {"facecolor": "none", "edgecolor": color, "hatch": "///", "linewidth": 1}


def _new_figure(x_label: str = "", y_label: str = "") -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
    axis = figure.add_subplot()
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    return figure, axis


def _svg(figure: Figure, title: str, description: str, tips: dict[str, list[str]]) -> str:
    """A figure as an SVG element of a page.

    Args:
        title, description: read out by screen readers.
        tips: gid of an artist → a text for each of its marks, shown when a mark is pointed at.
    """
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": title}):  # ids of definitions differ from chart to chart, not from call to call
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawn = ElementTree.fromstring(buffer.getvalue())
    for element in drawn.iter():
        element.tag = element.tag.rpartition("}")[2]  # without namespaces, which HTML does not have
        element.text, element.tail = (element.text or "").strip(), None
        attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items() if name != "clip-path"}
        element.attrib = {name: _rewritten(name, value) for name, value in attributes.items()}
        if element.tag == "g":  # before its children, which still have their namespace
            _add_tips(element, tips.get(element.attrib.pop("id", ""), []))
    svg = ElementTree.Element("svg", {"viewBox": drawn.get("viewBox"), "role": "img"})
    for name, text in (("title", title), ("desc", f"{description}; the table below holds its numbers")):
        ElementTree.SubElement(svg, name).text = text
    # Of the definitions, which matplotlib keeps apart, only patterns: its style sheet would apply to the whole page.
    svg.extend(element for element in drawn if element.tag == "g" or element.find("pattern") is not None)
    return ElementTree.tostring(svg, encoding="unicode")


def _add_tips(group: ElementTree.Element, tips: list[str]) -> None:
    """Tips for a group's markers, or for its shape where it has no markers."""
    elements = [element for element in group.iter() if element.tag.endswith("}use")]
    elements = elements or [element for element in group.iter() if element.tag.endswith("}path")]
    if len(elements) == len(tips):
        for element, tip in zip(elements, tips, strict=True):
            element.set("data-tip", tip)


def _rewritten(name: str, value: str) -> str:
    """An attribute as a page needs it: the theme's colours, the page's font, coordinates to a tenth."""
    if name == "style":
        value = re.sub(r"font-family: [^;]*;? ?|(?<=px) '[^;]*", "", value).replace("font: ", "font-size: ")
        return re.sub(r"#[0-9a-f]{6}", lambda color: f"var({_THEME.get(color[0], '--ink')})", value)
    if name in ("d", "x", "y", "transform"):
        return re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.1f}", value)
    return value


def _table(series: Sequence[Series], form: str) -> tuple[tuple[str, ...], ...]:
    columns = [dict(line.points) for line in series]
    places = sorted({x for column in columns for x in column})
    return tuple(
        (f"{x:g}", *(f"{column[x]:{form}}" if _finite(column.get(x)) else "–" for column in columns)) for x in places
    )


def _bin(number: int) -> str:
    return f"{number / BINS:.2f}–{(number + 1) / BINS:.2f}"


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
