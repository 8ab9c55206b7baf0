"""The page of evaluate's results: figures, charts and their bars, foreign names, wrong files, a real browser."""

import json
import re
from xml.etree import ElementTree

import pytest

from stl_offline.cli.main import main
from stl_offline.config import ReportConfig
from stl_offline.errors import FormatError, InputError
from stl_offline.evaluation.figures import suite_figures
from stl_offline.evaluation.measures import BENCHMARK_CORRUPTIONS
from stl_offline.reports.charts import Bars, bar_chart
from stl_offline.reports.scores import report_scores
from tests.reports.test_browser import CONTRAST, DESKTOP, PHONE

KINDS = (*BENCHMARK_CORRUPTIONS, "saturate")


def scores(top1: float) -> dict:
    return {"samples": 40, "top1": top1, "top5": min(1.0, top1 + 0.1), "nll": 2 - top1, "ece": 0.07}


def result(base: float, suite: str = "c", kinds=KINDS, **more) -> dict:
    """A result of ImageNet, A, and corruptions whose accuracy falls by 0.05 a severity."""
    parts = [("imagenet", "imagenet"), ("a", "a")] if suite == "c" else [("data", "clean")]
    views = [{"all": scores(base), "a": scores(base + 0.1)}, {"a": scores(0.4), "all": scores(0.2)}]
    views = views if suite == "c" else [{"all": scores(base)}]
    for number, kind in enumerate(kinds):
        for severity in range(1, 6):
            parts.append((suite, f"{kind}/{severity}"))
            views.append({"all": scores(base - 0.05 * severity - 0.01 * (number % 2))})
    transform = {"side": [224, 224], "crop_pct": 0.875, "interpolation": "bicubic", "crop_mode": "center"}
    return {
        "version": 1,
        "model": "fan_tiny_8_p4_hybrid",
        "weights_sha256": "ab" * 32,
        "parameters": 7_250_000,
        "classes": 1000,
        "transform": transform | {"as_is": False, "mean": [0.5] * 3, "std": [0.5] * 3},
        "amp": "none",
        "partial": False,
        "suites": suite_figures(parts, views),
    } | more


@pytest.fixture
def files(tmp_path):
    def write(*results, names=("one", "two", "three")):
        paths = [tmp_path / f"{name}.json" for name, _ in zip(names, results, strict=False)]
        for path, each in zip(paths, results, strict=True):
            path.write_text(json.dumps(each, sort_keys=True))
        return tuple(map(str, paths))

    return write


def page_of(files, tmp_path, **settings) -> str:
    out = tmp_path / "page.html"
    report_scores(ReportConfig(runs=files, out=str(out), **settings))
    return out.read_text()


def test_models_side_by_side(files, tmp_path):
    first = result(0.8)
    page = page_of(files(first, result(0.7)), tmp_path)
    c = first["suites"]["c"]
    rows = re.search(r"<tbody><tr><th scope=\"row\">one.*?</tbody>", page, re.S)[0]
    for value in (0.8, 0.4, 0.2, c["mce"], c["top1"], c["retention"]):
        assert f"{value:.2%}" in rows
    assert f'class="number best">{c["mce"]:.2%}' in rows  # the lower one
    assert page.count("(best)") == 4  # A is the same for both
    assert "ImageNet-C: weather" in page and "Generated corruptions" not in page
    # In the benchmark's order, whatever the file's.
    order = [page.index(f"imagenet-c/{kind}/3") for kind in KINDS]
    assert order == sorted(order)


def test_generated_corruptions_are_named_so(files, tmp_path):
    page = page_of(files(result(0.8, "data", seed=3)), tmp_path)
    assert "Generated corruptions are not ImageNet-C" in page and "mCE<" not in page
    assert "seed of generated corruptions" in page


def test_a_part_of_the_corruptions(files, tmp_path):
    page = page_of(files(result(0.8, kinds=("fog", "saturate"), partial=True), result(0.7)), tmp_path)
    assert "ImageNet-C: extra kinds" in page and "scored on a part of the suites" in page
    assert "–" in page


def test_bars_stand_where_their_values_are():
    bars = [Bars("a", 0, ((0.5, 0.25), (None, 1.0))), Bars("b", 1, ((0.75, 0.1), (0.2, 0.3)))]
    chart = bar_chart("t", "top-1", ["snow", "fog"], ["severity 1", "severity 2"], bars)
    svg = ElementTree.fromstring(chart.svg)
    found = {}
    for path in svg.iter("path"):
        if path.get("data-tip"):
            numbers = list(map(float, re.findall(r"-?\d+\.\d+", path.get("d"))))
            xs, ys = numbers[::2], numbers[1::2]
            found[path.get("data-tip")] = (min(xs), max(ys) - min(ys))
    assert len(found) == 7
    unit = found["a: fog, severity 2, 100.0%"][1]
    assert found["b: snow, severity 1, 75.0%"][1] / unit == pytest.approx(0.75, abs=0.01)
    order = ["a: snow, severity 1, 50.0%", "a: snow, severity 2, 25.0%", "b: snow, severity 1, 75.0%"]
    places = [found[tip][0] for tip in (*order, "a: fog, severity 2, 100.0%", "b: fog, severity 1, 20.0%")]
    assert places == sorted(places)
    assert chart.table[2] == ("fog, severity 1", "–", "20.0%")


def test_foreign_names_are_text(files, tmp_path):
    page = page_of(files(result(0.8, model="<b>x</b>"), names=("<script>",)), tmp_path)
    assert "<b>x" not in page and "&lt;b&gt;x" in page and page.count("<script") == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is no JSON"),
        ("[]", "holds no suites"),
        ('{"suites": {}, "version": 2}', "is of version 2; this release reads 1"),
        ('{"suites": {"c": 3}, "version": 1}', "holds no whole result"),
        ('{"suites": {}, "version": 1}', "holds no whole result"),
        ('{"samples": 3, "top1": 0.5}', "holds no suites"),
    ],
)
def test_wrong_files(content, words, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(FormatError, match=words) as caught:
        report_scores(ReportConfig(runs=(str(path),), out=str(tmp_path / "page.html")))
    assert "\n" not in str(caught.value)


def test_wrong_calls(files, tmp_path, capsys):
    paths = files(result(0.8), result(0.7))
    for settings, words in (
        ({"runs": (*paths, "runs/student")}, "on pages of their own"),
        ({"runs": paths, "data": "x"}, "`data` cannot be used with results of evaluate"),
        ({"runs": paths, "seed": 1, "examples": 2}, "`examples`, `seed` cannot be used"),
        ({"runs": (paths[0], paths[0])}, "given twice"),
        ({"runs": ("nowhere.json",)}, "cannot read nowhere.json"),
        ({"runs": paths, "max_mb": 0.001}, "raise `max_mb`"),
    ):
        with pytest.raises(InputError, match=words):
            report_scores(ReportConfig(**settings))
    assert main(["report", *paths, "--out", str(tmp_path / "p.html")]) == 0
    assert capsys.readouterr().out.startswith(f"page: {tmp_path}/p.html (2 models, ")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_in_a_browser(browser, files, tmp_path, size, dark):
    browser.complaints.clear()
    page_of(files(result(0.8), result(0.7)), tmp_path)
    browser.open(tmp_path / "page.html", *size, dark=dark, phone=size != DESKTOP)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.run(CONTRAST) == []
    assert browser.run("document.querySelectorAll('[data-tip]').length") >= 16 * 5 * 2
    assert browser.complaints == []
