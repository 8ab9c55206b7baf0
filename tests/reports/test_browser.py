"""Both pages in a real browser: no complaints, nothing fetched; tokens by mouse, keys and finger; filters, themes."""

import json

import pytest

from stl_offline.config import PreviewConfig, ReportConfig
from stl_offline.reports.find import find_images
from stl_offline.reports.preview import preview_labels
from stl_offline.reports.report import report_runs

DESKTOP, PHONE = (1280, 900), (390, 844)
TIP = "document.getElementById('tip')"
SHOWN = "[...document.querySelectorAll('article')].filter(a => a.getClientRects().length).length"

# WCAG 2.2's contrast of every visible text with the nearest opaque background behind it; pairs below 4.5 (3 for large).
CONTRAST = """
(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const faint = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    const style = getComputedStyle(element);
    if (!own || !element.getClientRects().length || element.closest(".unseen, .skip, option, script, style")) continue;
    let behind = element;
    let back = [0, 0, 0, 0];
    while (behind && (back.length === 4 && back[3] === 0)) {
      back = parse(getComputedStyle(behind).backgroundColor);
      behind = behind.parentElement;
    }
    const color = parse(element.closest("svg") ? style.fill : style.color);
    const [a, b] = [light(color), light(back)].sort((x, y) => y - x);
    const large = parseFloat(style.fontSize) >= 24;
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < (large ? 3 : 4.5)) faint.push([element.tagName, element.textContent.slice(0, 30), ratio]);
  }
  return faint;
})()
"""


@pytest.fixture(scope="module")
def labels_page(labels, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    config = PreviewConfig(path=str(labels), data=str(images), out=str(out), samples=6, seed=2)
    return preview_labels(config, find_images).page


@pytest.fixture
def seen(browser):
    """The browser; the test fails where its page complained or asked for anything."""
    browser.complaints.clear()
    browser.requests.clear()
    yield browser
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []


@pytest.fixture(scope="module")
def data(labels_page):
    text = labels_page.read_text()
    start = text.index('id="data">') + len('id="data">')
    return json.loads(text[start : text.index("</script>", start)])


def token_words(data, scene, name, token):
    tokens = data["scenes"][scene]["tokens"][name]
    best = tokens["ids"][token * tokens["k"]]
    return data["classes"][str(best)][0], f"{tokens['p'][token * tokens['k']] / 10:.1f} %"


def test_the_mouse_shows_a_token(seen, labels_page, data):
    seen.open(labels_page, *DESKTOP)
    assert seen.run(f"{TIP}.hidden")
    left, top, width, height = seen.box("article[data-scene='1'] [data-tokens=map] .probe")
    seen.point(left + 3.5 / 5 * width, top + 1.5 / 3 * height)  # the grid is 3 × 5: row 2, column 4
    text = seen.run(f"{TIP}.innerText")
    assert "Row 2, column 4" in text
    for word in token_words(data, 1, "map", 1 * 5 + 3):
        assert word in text
    assert text.count("%") >= 4
    box = seen.run(f"(b => [b.left, b.top, b.right, b.bottom])({TIP}.getBoundingClientRect())")
    assert 0 <= box[0] < box[2] <= DESKTOP[0] and 0 <= box[1] < box[3] <= DESKTOP[1]
    seen.point(2, 2)
    assert seen.run(f"{TIP}.hidden")


def test_a_token_is_framed_in_the_other_images(seen, labels_page):
    seen.open(labels_page, *DESKTOP)
    drawn = "[...document.querySelectorAll(\"article[data-scene='0'] canvas\")].map(c => c.toDataURL())"
    left, top, width, height = seen.box("article[data-scene='0'] [data-tokens=student] .probe")
    before = seen.run(drawn)
    seen.point(left + width / 2, top + height / 2)
    after = seen.run(drawn)
    # The image, and the two maps of the crop; the label map's own four stay as they are.
    assert [a != b for a, b in zip(before, after, strict=True)] == [True] + [False] * 4 + [True] * 2


def test_the_keys_show_tokens_and_say_them(seen, labels_page, data):
    seen.open(labels_page, *DESKTOP)
    for _ in range(40):
        seen.press("Tab")
        if seen.run("document.activeElement.className === 'probe'"):
            break
    said = "document.getElementById('said').textContent"
    assert seen.run(said).startswith("Row 1, column 1: ")
    seen.press("ArrowRight")
    seen.press("ArrowDown")
    seen.press("ArrowDown")
    seen.press("ArrowDown")  # there are three rows only
    assert seen.run(said).startswith("Row 3, column 2: ")
    assert token_words(data, 0, "map", 2 * 5 + 1)[0] in seen.run(said)
    assert not seen.run(f"{TIP}.hidden")
    seen.press("Escape")
    assert seen.run(f"{TIP}.hidden")


def test_a_finger_shows_a_token_until_the_next(seen, labels_page):
    seen.open(labels_page, *PHONE, phone=True)
    left, top, width, height = seen.box("[data-tokens=map] .probe")
    seen.tap(left + 4.5 / 5 * width, top + 2.5 / 3 * height)
    assert "Row 3, column 5" in seen.run(f"{TIP}.innerText")
    right = seen.run(f"{TIP}.getBoundingClientRect().right")
    assert right <= PHONE[0]
    seen.tap(3, 3)
    assert seen.run(f"{TIP}.hidden")


def test_filters(seen, labels_page, data):
    seen.open(labels_page, *DESKTOP)
    scenes = data["scenes"]
    assert seen.run(SHOWN) == len(scenes) == 6
    count = "document.getElementById('count').textContent"

    key = scenes[2]["key"]
    put = "(i, v) => { const e = document.getElementById(i); e.value = v; e.dispatchEvent(new Event('input')); }"
    seen.run(f"({put})('by-key', {json.dumps(key.upper())})")
    assert (seen.run(SHOWN), seen.run(count)) == (1, "1 of 6 shown")

    seen.click("#clear")
    assert seen.run(SHOWN) == 6

    def best(scene):
        tokens = scene["tokens"]["map"]
        return list(zip(tokens["ids"][:: tokens["k"]], tokens["p"][:: tokens["k"]], strict=True))

    classes = {class_id for scene in scenes for class_id, _ in best(scene)}
    some = min(classes, key=lambda each: sum(each in dict(best(scene)) or scene["own"] == each for scene in scenes))
    with_it = [scene for scene in scenes if scene["own"] == some or some in dict(best(scene))]
    seen.run(
        f"(e => {{ e.value = '{some}'; e.dispatchEvent(new Event('change')); }})(document.getElementById('by-class'))"
    )
    assert seen.run(SHOWN) == len(with_it)
    assert seen.run(f"document.querySelectorAll('[data-class=\"{some}\"][aria-pressed=true]').length") > 0

    seen.run(f"({put})('by-confidence', 90)")
    sure = [scene for scene in scenes if any(each == some and p >= 900 for each, p in best(scene))]
    assert seen.run(SHOWN) == len(sure)
    seen.click("#clear")
    seen.run(f"({put})('by-confidence', 100)")
    assert seen.run(SHOWN) == sum(any(p >= 1000 for _, p in best(scene)) for scene in scenes)


def test_a_class_of_the_legend_is_a_filter(seen, labels_page):
    seen.open(labels_page, *DESKTOP)
    button = "article[data-scene='0'] .legend button"
    seen.click(button)
    pressed = f"document.querySelector(\"{button}\").getAttribute('aria-pressed')"
    assert seen.run(pressed) == "true"
    assert seen.run("document.getElementById('by-class').value") == seen.run(
        f'document.querySelector("{button}").dataset.class'
    )
    seen.click(button)
    assert seen.run(pressed) == "false"
    assert seen.run(SHOWN) == 6


def test_every_token_as_a_table(seen, labels_page, data):
    seen.open(labels_page, *DESKTOP)
    seen.click("article[data-scene='0'] details[data-table=map] summary")
    rows = seen.run(
        "[...document.querySelectorAll(\"article[data-scene='0'] [data-table=map] tbody tr\")].map(r => r.innerText)"
    )
    assert len(rows) == 15
    assert token_words(data, 0, "map", 7)[0] in rows[7] and rows[7].startswith("2\t3\t")


@pytest.mark.parametrize("size", [PHONE, DESKTOP, (320, 640)], ids=["phone", "desktop", "narrow"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_overflows_and_texts_have_contrast(seen, labels_page, size, dark):
    seen.open(labels_page, *size, dark=dark, phone=size != DESKTOP)
    assert seen.run("document.documentElement.scrollWidth") <= size[0]
    assert seen.run(CONTRAST) == []


def test_the_theme_button_goes_round(seen, labels_page):
    seen.open(labels_page, *DESKTOP, dark=True)
    page = "getComputedStyle(document.body).backgroundColor"
    system = seen.run(page)
    seen.click("#theme")
    light = seen.run(page)
    assert light == "rgb(255, 255, 255)" != system
    seen.click("#theme")
    assert seen.run(page) == system
    assert seen.run("document.documentElement.dataset.theme") == "dark"
    seen.click("#theme")
    assert seen.run("document.getElementById('theme').textContent") == "Theme: system"


def test_what_a_screen_reader_finds(seen, labels_page):
    seen.open(labels_page, *DESKTOP)
    names = seen.names()
    assert ("combobox", "class") in names and ("searchbox", "key contains") in names
    images = [name for role, name in names if role in ("image", "img")]
    assert len(images) >= 6 * 8 and all(images)
    assert sum("Token labels of" in name for name in images) == 6
    nameless = [role for role, name in names if role in ("button", "application", "link", "slider") and not name]
    assert nameless == []
    seen.run("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    assert {"main", "banner", "heading", "form", "table", "region"} <= {role for role, _ in seen.names()}


def test_the_page_of_a_report(seen, make_run, tmp_path):
    runs = (make_run("one"), make_run("two", epochs=2, done=False, lr=0.5))
    page = report_runs(ReportConfig(runs=tuple(map(str, runs)), out=str(tmp_path / "report.html"))).page
    for size in (DESKTOP, PHONE):
        for dark in (False, True):
            seen.open(page, *size, dark=dark, phone=size == PHONE)
            assert seen.run("document.documentElement.scrollWidth") <= size[0]
            assert seen.run(CONTRAST) == []
    seen.open(page, *DESKTOP)
    left, top, width, height = seen.box(".chart use[data-tip]")
    seen.point(left + width / 2, top + height / 2)
    assert seen.run(f"{TIP}.innerText") == "one: epoch 1, 2.500\ntwo: epoch 1, 2.500"  # one lies on the other
    assert "table" in {role for role, _ in seen.names()}
