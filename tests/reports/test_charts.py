"""Charts as SVG: points in their places, gaps and ticks, the theme's colours, texts that stay texts; safe on a page."""

import dataclasses
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from stl_offline.reports.charts import BINS, ConfidenceCounts, Series, confidence_chart, line_chart
from tests.labels.synthetic import make_arrays, make_spec


def parse(chart) -> ElementTree.Element:
    return ElementTree.fromstring(chart.svg)


def texts(chart) -> list[str]:
    return [element.text for element in parse(chart).iter("text")]


def dots(chart) -> dict[str, tuple[float, float]]:
    """Tip → place of each marker."""
    found = [element for element in parse(chart).iter("use") if element.get("data-tip")]
    return {element.get("data-tip"): (float(element.get("x")), float(element.get("y"))) for element in found}


def lines(chart) -> list[str]:
    """Path data of each series."""
    return [path.get("d") for path in parse(chart).iter("path") if "var(--s" in path.get("style", "")]


def test_a_chart_has_ticks_around_its_points_and_gaps_where_values_lack():
    series = [Series("a", 0, ((1.0, 0.5), (2.0, None), (3.0, 0.75), (4.0, 0.71))), Series("b", 1, ((2.0, 0.6),))]
    chart = line_chart("Top-1", "epoch", "accuracy", series, ".1%")
    assert [line.count("M") for line in lines(chart)] == [2, 1]
    assert [line.count("L") for line in lines(chart)] == [1, 0]
    places = dots(chart)
    assert places.keys() == {"a: epoch 1, 50.0%", "a: epoch 3, 75.0%", "a: epoch 4, 71.0%", "b: epoch 2, 60.0%"}
    _, _, width, height = map(float, parse(chart).get("viewBox").split())
    assert all(0 < x < width and 0 < y < height for x, y in places.values())
    # Up is more, in proportion.
    low, middle, high = (places[f"a: epoch {epoch}"][1] for epoch in ("1, 50.0%", "4, 71.0%", "3, 75.0%"))
    assert (low - middle) / (low - high) == pytest.approx(0.21 / 0.25, abs=0.01)
    assert chart.heads == ("epoch", "a", "b") and chart.table[1] == ("2", "–", "60.0%")
    shown = texts(chart)
    assert {"1", "2", "3", "4", "50%", "80%", "epoch", "accuracy"} <= set(shown)


@pytest.mark.parametrize("points", [((1.0, 2.0),), ((1.0, 0.0), (2.0, 0.0)), ((1.0, 1e-9), (2.0, 2e-9))])
def test_charts_of_little(points):
    chart = line_chart("x", "epoch", "loss", [Series("a", 0, points)])
    assert len(dots(chart)) == len(points)
    shown = texts(chart)
    # Whole epochs below, and at least two values at the side.
    x_ticks, y_ticks = shown[: shown.index("epoch")], shown[shown.index("epoch") + 1 : -1]
    assert x_ticks and all(text.isdigit() for text in x_ticks)
    assert len(y_ticks) >= 2


def test_no_chart_of_nothing():
    assert line_chart("x", "epoch", "loss", [Series("a", 0, ((1.0, None), (2.0, float("nan"))))]) is None


def test_charts_follow_the_theme_and_leave_the_page_alone():
    series = [Series(f"run {number}", number, ((1.0, 1.0), (2.0, 2.0 + number))) for number in range(6)]
    charts = [line_chart(title, "epoch", "loss", series) for title in ("Loss", "Top-1")]
    charts.append(confidence_chart(ConfidenceCounts(np.arange(BINS), np.arange(BINS)[::-1].copy(), 3, 1), "note"))
    for chart in charts:
        # No colour, font, style sheet, script or address of its own.
        assert not re.search(r"#[0-9a-f]{6}\b|font-family|<style|<script|https?:|clip-path", chart.svg)
        used = set(re.findall(r"(?:href=\"|url\()#(\w+)", chart.svg))
        defined = re.findall(r'id="(\w+)"', chart.svg)
        assert used and used <= set(defined)
        names = {element.tag: element.text for element in parse(chart) if element.tag in ("title", "desc")}
        assert names["title"] == chart.title and "table below" in names["desc"]
    ids = [name for chart in charts for name in re.findall(r'id="(\w+)"', chart.svg)]
    assert len(ids) == len(set(ids)), "two charts of a page share an id"
    assert set(re.findall(r"var\((--s\d)\)", charts[0].svg)) == {f"--s{number}" for number in range(6)}
    styles = [path.get("style", "") for path in parse(charts[0]).iter("path")]
    dashes = {re.sub(r".*stroke-dasharray: ([^;]*).*|.*", r"\1", style) for style in styles if "var(--s" in style}
    assert len(dashes) == 6  # runs differ without colour, too
    assert charts[0].svg == line_chart("Loss", "epoch", "loss", series).svg


def test_names_of_runs_are_text():
    name = '</svg><script>alert("1")</script>'
    chart = line_chart("Loss", "epoch", "loss", [Series(name, 0, ((1.0, 1.0), (2.0, 3.0)))])
    assert "<script" not in chart.svg
    assert f"{name}: epoch 1, 1" in dots(chart)


def test_the_histogram_has_a_bar_per_count():
    own, others = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    own[3], own[19], others[3] = 10, 30, 60
    chart = confidence_chart(ConfidenceCounts(own, others, 5, 1), "100 tokens of 5 images")
    tips = [element.get("data-tip") for element in parse(chart).iter("path") if element.get("data-tip")]
    assert tips == [
        "0.15–0.20: 10.0% of tokens, own class",
        "0.95–1.00: 30.0% of tokens, own class",
        "0.15–0.20: 60.0% of tokens, other classes",
    ]
    assert chart.table[3] == ("0.15–0.20", "10", "60")
    assert chart.title == "Histogram of the confidence of 100 tokens" and chart.note == "100 tokens of 5 images"
    assert confidence_chart(ConfidenceCounts(), "nothing").table[0] == ("0.00–0.05", "0", "0")


@pytest.mark.parametrize("draws", [4, 10, 20])
def test_tokens_whose_draws_agree_are_counted(draws):
    """Their shares sum to a little more than 1."""
    spec = make_spec(samples=3, top_k=0, draws=draws, has_confidence=False)
    arrays = make_arrays(spec)
    arrays = dataclasses.replace(arrays, draws=np.zeros_like(arrays.draws))
    counts = ConfidenceCounts()
    counts.add(arrays)
    assert counts.tokens == arrays.draws[..., 0].size and (counts.own + counts.others)[-1] == counts.tokens
