"""The page of labels: everything in one file, joined by key and content, within its size, and safe with any name."""

import html.parser
import json
import re
import shutil
import sys
import tarfile

import pytest
from PIL import Image

from stl_offline.cli.main import main
from stl_offline.config import PreviewConfig
from stl_offline.errors import InputError, JoinError
from stl_offline.images.pack import pack
from stl_offline.labels.label_set import LabelSet, open_label_set
from stl_offline.reports.find import find_images
from stl_offline.reports.preview import preview_labels

VOID = {"meta", "link", "img", "input", "br"}


class Page(html.parser.HTMLParser):
    """A page taken apart: elements with their attributes, texts, and whether every element is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def data(self) -> dict:
        return json.loads(next(text for text in self.texts["script"] if text.startswith('{"classes"')))


def preview(labels, out, data=None, **settings):
    config = PreviewConfig(path=str(labels), data=None if data is None else str(data), out=str(out), **settings)
    return preview_labels(config, None if data is None else find_images)


@pytest.fixture
def no_figures(monkeypatch):
    """The page is written without its PNGs, which take most of the time."""
    monkeypatch.setattr("stl_offline.reports.preview.label_figure", lambda *_: None)


@pytest.fixture(scope="module")
def made(labels, images, tmp_path_factory):
    """(report, page) of five images."""
    out = tmp_path_factory.mktemp("preview")
    report = preview(labels, out, images, samples=5, seed=3)
    return report, Page(report.page.read_text())


def test_one_page_and_its_images(made):
    report, page = made
    assert report.shown == report.asked == len(page.all("article")) == 5
    assert report.bytes == report.page.stat().st_size < 5e6
    assert [figure.name for figure in report.figures] == ["labels.png", "confidence.png"]
    for figure in report.figures:
        with Image.open(figure) as image:
            image.verify()
    assert page.open == []


def test_the_page_asks_for_nothing(made):
    report, page = made
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), f"<{tag} {name}={value[:60]}>"
    text = report.page.read_text()
    assert not re.search(r"url\((?!data:|#)|@import|https?://(?!www\.w3\.org)", text)
    policy = next(each["content"] for each in page.all("meta") if each.get("http-equiv"))
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy


def test_every_image_says_in_words_what_it_shows(made):
    _, page = made
    assert all(image["alt"] for image in page.all("img"))
    named = [each for each in page.all("div") if each.get("role") == "img"]
    assert len(named) == 5 * 2 and all(each["aria-label"] for each in named)
    probes = [each for each in page.all("div") if each.get("role") == "application"]
    assert len(probes) == 5 * 2 and all(each["tabindex"] == "0" and each["aria-label"] for each in probes)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for each in page.all("article"):
        assert each["aria-labelledby"] in ids


def test_names_are_text_and_never_markup(made, label_set):
    report, page = made
    text = report.page.read_text()
    assert "<b>ring" not in text
    assert text.count("</script>") == 3  # theme, data, script
    names = {name for name, *_ in page.data["classes"].values()}
    assert names <= set(label_set.spec.class_names)
    assert {"<b>ring<-b>", "<-script>"} <= names


def test_tokens_are_the_label_sets(made, label_set):
    _, page = made
    for scene in page.data["scenes"]:
        label_map = label_set[scene["key"]]
        tokens = scene["tokens"]["map"]
        assert tokens["grid"] == list(label_set.spec.grid)
        assert tokens["ids"] == label_map.class_ids[0].ravel().tolist()
        assert tokens["p"] == pytest.approx((1000 * label_map.probabilities()[0]).ravel().tolist(), rel=0.006, abs=1e-5)
        assert scene["own"] == label_map.class_id
        assert len(scene["tokens"]["student"]["drawn"]) == 15


def test_only_the_shards_of_the_chosen_labels_are_read(labels, images, tmp_path, monkeypatch):
    touched = set()
    for name in ("read_bytes", "read_index"):
        original = getattr(LabelSet, name)

        def counted(self, index, *arguments, original=original, **options):
            touched.add(index)
            return original(self, index, *arguments, **options)

        monkeypatch.setattr(LabelSet, name, counted)
    report = preview(labels, tmp_path, images, samples=1, seed=1)
    assert len(touched) == report.shards == 1
    assert "from 1 of 6 shards" in report.page.read_text()
    report = preview(labels, tmp_path, images, samples=1, seed=1, all_shards=True)
    assert touched == set(range(6))
    assert "18 images, from all shards" in report.page.read_text()


def test_a_beton_gives_the_same_page_as_its_folder(labels, images, tmp_path):
    pack(str(images), tmp_path / "images.beton", workers=1)
    pages = [
        preview(labels, tmp_path / str(number), source, samples=2).page.read_bytes()
        for number, source in enumerate((images, tmp_path / "images.beton"))
    ]
    assert pages[0] == pages[1]


def test_labels_alone(labels, tmp_path):
    report = preview(labels, tmp_path, samples=3)
    page = Page(report.page.read_text())
    assert "labels are shown alone" in report.page.read_text()
    assert not [each for each in page.all("div") if each.get("role") == "img"]
    assert len(page.all("img")) == 3 * 6


@pytest.mark.parametrize("settings", [{"scale_min": 0.5}, {"flip": 0.0}])
def test_a_student_that_replays_crops_has_none_of_its_own(make_labels, tmp_path, settings):
    labels = make_labels(maps=3)
    with pytest.raises(InputError, match="set holds crops, which students replay: .* leave them out"):
        preview(labels, tmp_path, **settings)
    assert not list(tmp_path.iterdir())


def test_crops(make_labels, images, tmp_path):
    labels = make_labels(maps=3)
    report = preview(labels, tmp_path, images, samples=2, map_index=(0, 2))
    assert report.shown == 4
    text = report.page.read_text()
    assert "crop 2" in text and "replay" in text
    with pytest.raises(InputError, match="3 label maps per image, 0 to 2; got the view 3"):
        preview(labels, tmp_path, images, map_index=(3,))


def test_a_page_that_would_be_too_large_shows_less_and_says_so(labels, images, tmp_path, no_figures):
    full = preview(labels, tmp_path, images, samples=9)
    assert full.shown == 9 and len(full.figures) == 3  # eight rows per image
    limit = 0.6 * full.bytes / 1e6
    report = preview(labels, tmp_path, samples=9, data=images, max_mb=limit)
    assert 0 < report.shown < 9
    assert report.bytes <= limit * 1e6
    assert f"shows {report.shown} of the 9 label maps chosen" in report.warnings[0]
    assert report.warnings[0].split(":")[0] in report.page.read_text()
    with pytest.raises(InputError, match="increase `max_mb`"):
        preview(labels, tmp_path, images, samples=2, max_mb=0.01)


def test_images_that_changed_are_refused(labels, images, tmp_path, label_set):
    changed = tmp_path / "changed"
    shutil.copytree(images, changed)
    key = list(label_set)[2]
    Image.new("RGB", (30, 20), "red").save(changed / key)
    with pytest.raises(JoinError, match="1 image changed"):
        preview(labels, tmp_path / "out", changed, keys=(key,))
    assert not (tmp_path / "out").exists()
    assert preview(labels, tmp_path / "out", changed, keys=(key,), allow_changed=True).shown == 1


def test_images_that_are_missing(labels, images, tmp_path, label_set):
    fewer = tmp_path / "fewer"
    shutil.copytree(images, fewer)
    gone, kept, *_ = label_set
    (fewer / gone).unlink()
    with pytest.raises(JoinError, match="1 of the 2 labels chosen have no image"):
        preview(labels, tmp_path / "out", fewer, keys=(gone, kept))
    report = preview(labels, tmp_path / "out", fewer, keys=(gone, kept), missing="skip")
    assert report.shown == 2
    assert "not available" in report.page.read_text()


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_same_images_under_other_keys(labels, images, tmp_path, packed, capsys, no_figures):
    """A tar of the same files, in another folder: its keys have no file ending."""
    source = tmp_path / "team.tar"
    with tarfile.open(source, "w") as archive:
        archive.add(images, "mate")
    if packed:
        pack(str(source), tmp_path / "team.beton", workers=1)
        source = tmp_path / "team.beton"
    with pytest.raises(JoinError, match='18 of the 18 have an image by stem: pass `match="stem"`, or leave out `data`'):
        preview(labels, tmp_path / "out", source, samples=18)
    call = ["labels", "preview", str(labels), "--data", str(source), "--out", str(tmp_path / "out")]
    assert main(call) == 1
    assert "pass --match stem" in capsys.readouterr().err
    own = preview(labels, tmp_path / "own", images, samples=18)
    for match in ("stem", "content"):
        report = preview(labels, tmp_path / match, source, samples=18, match=match)
        assert report.shown == own.shown == 18 and "image is not available" not in report.page.read_text()


def test_another_data_set_is_refused(labels, tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / "other" / name).mkdir(parents=True)
        Image.new("RGB", (30, 20), "red").save(tmp_path / "other" / name / "1.png")
    with pytest.raises(InputError, match="cats"):
        preview(labels, tmp_path / "out", tmp_path / "other")


def test_the_command(labels, images, tmp_path, capsys):
    out = tmp_path / "out"
    key = list(open_label_set(labels))[7]
    call = ["labels", "preview", str(labels), "--data", str(images), "--out", str(out), "--key", key]
    assert main(call) == 0
    printed = capsys.readouterr().out
    assert str(out / "labels.html") in printed and str(out / "labels.png") in printed
    assert main(["labels", "preview", str(labels), "--key", "nowhere", "--out", str(out)]) == 1
    assert capsys.readouterr().err.startswith("error: 1 of the keys asked for fit no label")


def test_labels_alone_need_neither_torch_nor_ffcv(labels, tmp_path, monkeypatch):
    # Modules of the images' layer are dropped, so that they would have to be imported again.
    for name in [name for name in sys.modules if name.startswith(("stl_offline.images", "stl_offline.reports.find"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("torch", "ffcv"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["labels", "preview", str(labels), "--out", str(tmp_path / "out"), "--samples", "1"]) == 0
