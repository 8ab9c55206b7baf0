"""Names on pages: English words for synset ids, and any text that a data set's maker may choose."""

import dataclasses
import json

import pytest
from matplotlib.axes import Axes

from stl_offline.config import PreviewConfig
from stl_offline.labels.writer import LabelSetWriter
from stl_offline.reports import names as names_module
from stl_offline.reports.names import display_names
from stl_offline.reports.preview import preview_labels
from tests.labels.synthetic import make_arrays, make_spec

HOSTILE = (
    "turned \u202e around",
    "bell \x07 and line\nbreak",
    "x" * 300,
    "many words " * 30,
    "<img src=x onerror=alert(1)>",
    "عربي",
    "猫と犬",
)


def make_set(folder, class_names, **settings):
    """A label set of its own class names, without images."""
    spec = make_spec(6, classes=len(class_names), class_names=class_names, **settings)
    with LabelSetWriter(folder, spec, 2) as writer:
        for shard in writer.todo():
            arrays = make_arrays(spec, *writer.shard_range(shard))
            keys = [f"{key} </article> \u202e" for key in arrays.keys]
            writer.write_shard(shard, dataclasses.replace(arrays, keys=keys))
        writer.finish()
    return folder


def preview(labels, out):
    return preview_labels(PreviewConfig(path=str(labels), out=str(out), samples=6), None)


def test_synset_ids_get_their_first_english_name():
    assert display_names(("n01440764", "disc", "n02086240")) == ("n01440764 (tench)", "disc", "n02086240 (Shih-Tzu)")
    assert display_names(("n99999999", "n0144076", "x n01440764")) == ("n99999999", "n0144076", "x n01440764")


def test_ids_stay_as_they_are_without_timm(monkeypatch):
    monkeypatch.setattr(names_module, "find_spec", lambda name: None)
    names_module._lemmas.cache_clear()
    try:
        assert display_names(("n01440764",)) == ("n01440764",)
    finally:
        names_module._lemmas.cache_clear()


def test_characters_that_do_not_print_are_escaped():
    assert display_names(HOSTILE[:2]) == ("turned \\u202e around", "bell \\x07 and line\\nbreak")


def test_the_page_and_the_png_name_synsets(tmp_path, monkeypatch):
    found = []
    original = Axes.legend

    def noted(self, **options):
        found.extend(handle.get_label() for handle in options.get("handles", ()))
        return original(self, **options)

    monkeypatch.setattr(Axes, "legend", noted)
    labels = make_set(tmp_path / "set", ("n01440764", "n01443537"), top_k=2)
    page = preview(labels, tmp_path / "out").page.read_text()
    assert "<bdi>n01440764 (tench)</bdi>" in page
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert {name for name, *_ in data["classes"].values()} == {"n01440764 (tench)", "n01443537 (goldfish)"}
    assert any("n01440764 (tench)" in label for label in found)


@pytest.mark.parametrize("class_names", [HOSTILE, HOSTILE[:1], ("only",)], ids=["all", "one turned", "one"])
def test_any_class_names_make_a_whole_page(tmp_path, class_names):
    labels = make_set(tmp_path / "set", class_names, top_k=min(4, len(class_names)))
    report = preview(labels, tmp_path / "out")
    page = report.page.read_text()
    assert report.shown == 6 and page.count("<article ") == page.count("</article>") == 6
    assert "<img src=x" not in page and page.count("</script>") == 3
    assert not any(mark in page for mark in ("\u202e", "\x07"))
    assert all(figure.stat().st_size > 1000 for figure in report.figures)


def test_hostile_names_stay_within_the_page(browser, tmp_path):
    page = preview(make_set(tmp_path / "set", HOSTILE), tmp_path / "out").page
    for width, height in ((320, 640), (1280, 900)):
        browser.open(page, width, height, phone=width < 400)
        assert browser.run("document.documentElement.scrollWidth") <= width
    browser.run("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") <= 1280
    # Text that runs from right to left leaves the numbers after it in their places.
    assert browser.run("[...document.querySelectorAll('bdi')].some(each => each.textContent === 'عربي')")
