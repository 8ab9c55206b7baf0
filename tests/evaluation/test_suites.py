"""ImageNet's test sets in their authors' layouts: folders and tars give the same images; wrong data, one clear line."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from stl_offline.errors import FormatError, InputError
from stl_offline.evaluation.measures import BENCHMARK_CORRUPTIONS
from stl_offline.evaluation.suites import imagenet_wnids, open_suite, subset_classes

WNIDS = imagenet_wnids()


def jpeg(number: int, size=(40, 30)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def write(root, names):
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    return root


def tar_of(folder, path, top=""):
    with tarfile.open(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.add(file, f"{top}{file.relative_to(folder)}")
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder for each of the 1,000 classes, one image in every seventh of them."""
    root = tmp_path_factory.mktemp("imagenet") / "val"
    for wnid in WNIDS:
        (root / wnid).mkdir(parents=True)
    return write(root, [f"{WNIDS[number]}/ILSVRC2012_val_{number + 1:08d}.JPEG" for number in range(0, 1000, 7)])


def test_imagenet(whole):
    suite = open_suite("imagenet", whole)
    (part,) = suite.parts
    assert suite.classes == tuple(range(1000))
    assert part.files().labels.tolist() == list(range(0, 1000, 7))
    assert part.files().load(2).size == (40, 30)


@pytest.mark.parametrize("name", ["a", "r"])
def test_two_hundred_classes(tmp_path, name):
    names = [f"{WNIDS[number]}/{number}.jpg" for number in subset_classes(name)]
    suite = open_suite(name, write(tmp_path / "set", names))
    assert len(suite.classes) == 200
    assert suite.parts[0].files().labels.tolist() == list(subset_classes(name))


def test_a_class_too_few_and_one_too_many(tmp_path):
    root = write(tmp_path / "set", [f"{WNIDS[number]}/x.jpg" for number in subset_classes("a")])
    (root / WNIDS[subset_classes("a")[5]] / "x.jpg").unlink()
    (root / WNIDS[subset_classes("a")[5]]).rmdir()
    with pytest.raises(InputError, match=f"199 of the 200 classes.*missing: {WNIDS[subset_classes('a')[5]]}"):
        open_suite("a", root)
    assert len(open_suite("a", root, partial=True).parts[0].files()) == 199
    (root / WNIDS[subset_classes("a")[5]]).mkdir()
    (root / WNIDS[0]).mkdir()
    with pytest.raises(InputError, match=f"1 folders that are no classes of the suite a: {WNIDS[0]}"):
        open_suite("a", root)


def test_a_thousand_classes_but_one(tmp_path):
    for wnid in WNIDS[:-1]:
        (tmp_path / "val" / wnid).mkdir(parents=True)
    with pytest.raises(
        InputError, match=f"val has 999 of the 1,000 classes of the suite imagenet; missing: {WNIDS[-1]}"
    ):
        open_suite("imagenet", tmp_path / "val")


def test_real_takes_a_folder_without_classes(tmp_path):
    root = write(tmp_path / "val", [f"ILSVRC2012_val_{number:08d}.JPEG" for number in (1, 30, 50_000)])
    for place in (root, tar_of(root, tmp_path / "val.tar")):
        (part,) = open_suite("real", place, partial=True).parts
        assert part.files().names == [f"ILSVRC2012_val_{number:08d}.JPEG" for number in (1, 30, 50_000)]
        assert len(part.real_labels) == 3 and part.files().load(1).size == (40, 30)
        assert part.fingerprint()[1] == 3


def test_v2_counts_its_folders_by_number(tmp_path):
    root = write(tmp_path / "v2", [f"{number}/{number % 3}.jpeg" for number in range(1000)])
    (part,) = open_suite("v2", root).parts
    files = part.files()
    assert [files.labels[place] for place, name in enumerate(files.names) if name.startswith("10/")] == [10]
    assert sorted(files.labels.tolist()) == list(range(1000))
    for number in (2, 10):
        (root / f"{number}" / f"{number % 3}.jpeg").unlink()
        (root / f"{number}").rmdir()
    with pytest.raises(InputError, match=r"998 of the folders 0 to 999 of ImageNet-V2; missing: 2, 10"):
        open_suite("v2", root)


def test_v2_is_not_named_by_wordnet_ids(whole):
    with pytest.raises(InputError, match="named by WordNet ids belong to the suites imagenet and sketch"):
        open_suite("v2", whole)


def test_real_labels_go_by_the_images_number(whole, tmp_path):
    labels = [[number % 1000, (number + 1) % 1000] if number % 2 else [] for number in range(50_000)]
    path = tmp_path / "real.json"
    path.write_text(json.dumps(labels))
    (part,) = open_suite("real", whole, path).parts
    for name, found in zip(part.files().names, part.real_labels, strict=True):
        number = int(name[-13:-5]) - 1
        assert list(found) == labels[number]
    (shipped,) = open_suite("real", whole).parts
    assert len(shipped.real_labels) == len(shipped.files())
    path.write_text(json.dumps([[0, 1000]]))
    with pytest.raises(FormatError, match="holds no ReaL labels"):
        open_suite("real", whole, path)
    path.write_text(json.dumps([[1]]))
    with pytest.raises(InputError, match="labels of 1 images; image 995 is not among them"):
        open_suite("real", whole, path)


def test_real_needs_imagenets_names(tmp_path):
    root = write(tmp_path / "set", [f"{WNIDS[0]}/cat.jpg"])
    with pytest.raises(InputError, match=f"{WNIDS[0]}/cat.jpg is not named as"):
        open_suite("real", root, partial=True)


@pytest.fixture(scope="module")
def corrupted(tmp_path_factory):
    """Two corruptions of ImageNet-C, three classes of each severity."""
    root = tmp_path_factory.mktemp("c") / "imagenet-c"
    names = [
        f"{kind}/{severity}/{WNIDS[number]}/{number}.JPEG"
        for kind in ("gaussian_noise", "fog")
        for severity in range(1, 6)
        for number in (999, 3, 500)
    ]
    return write(root, names)


def test_corruptions_as_folders_and_as_tars_are_the_same(corrupted, tmp_path):
    folders = open_suite("c", corrupted, partial=True)
    tars = tmp_path / "tars"
    tars.mkdir()
    for kind, name in (("gaussian_noise", "noise"), ("fog", "weather")):
        with tarfile.open(tars / f"{name}.tar", "w") as archive:
            archive.add(corrupted / kind, kind)
    packed = open_suite("c", tars, partial=True)
    one = open_suite("c", tar_of(corrupted, tmp_path / "all.tar", "./imagenet-c/"), partial=True)
    names = [f"{kind}/{severity}" for kind in ("gaussian_noise", "fog") for severity in range(1, 6)]
    for suite in (folders, packed, one):
        assert [part.name for part in suite.parts] == names
        for part, other in zip(suite.parts, folders.parts, strict=True):
            assert part.files().names == other.files().names
            assert part.files().labels.tolist() == other.files().labels.tolist() == [3, 500, 999]
            for place in range(3):
                assert (np.asarray(part.files().load(place)) == np.asarray(other.files().load(place))).all()


def test_a_severity_is_missing(corrupted, tmp_path):
    root = write(tmp_path / "c", [f"snow/{severity}/{WNIDS[0]}/x.jpg" for severity in (1, 2, 4, 5)])
    with pytest.raises(InputError, match="snow lacks severity 3; 1 to 5 are expected"):
        open_suite("c", root, partial=True)
    with pytest.raises(InputError, match=r"gaussian_noise/1 has 3 of the 1,000 classes"):
        open_suite("c", corrupted)


def test_no_corruptions_at_all(whole):
    with pytest.raises(InputError, match="is not ImageNet-C"):
        open_suite("c", whole)


def test_a_changed_file_is_another_part(corrupted, tmp_path):
    root = write(tmp_path / "c", [f"fog/{severity}/{WNIDS[0]}/x.jpg" for severity in range(1, 6)])
    before = [part.fingerprint()[0] for part in open_suite("c", root, partial=True).parts]
    (root / "fog/2" / WNIDS[0] / "x.jpg").write_bytes(jpeg(99))
    after = [part.fingerprint()[0] for part in open_suite("c", root, partial=True).parts]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True, True, True]


def test_tars_beside_folders_are_told_of_and_hidden_folders_are_none(corrupted, tmp_path, caplog):
    tars = tmp_path / "tars"
    tars.mkdir()
    tar_of(corrupted, tars / "all.tar")
    (tars / ".cache").mkdir()
    (tars / "lost+found").mkdir()
    found = [part.name for part in open_suite("c", tars, partial=True).parts]
    assert found == [part.name for part in open_suite("c", corrupted, partial=True).parts] and not caplog.text
    name = found[0].split("/")[0]
    shutil.copytree(corrupted / name, tars / name)
    assert {part.name.split("/")[0] for part in open_suite("c", tars, partial=True).parts} == {name}
    assert f"folders are read (such as {name}), and not the tars (such as all.tar)" in caplog.text


def test_a_tar_that_is_cut_off_or_packed(corrupted, tmp_path):
    path = tar_of(corrupted, tmp_path / "all.tar")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 + 77])
    with pytest.raises(InputError, match=r"is no whole tar .*; copy it again"):
        open_suite("c", path, partial=True)
    with tarfile.open(tmp_path / "packed.tar.gz", "w:gz") as archive:
        archive.add(corrupted, "")
    (part, *_) = open_suite("c", tmp_path / "packed.tar.gz", partial=True).parts
    assert [part.files().load(place).size for place in range(3)] == [(40, 30)] * 3


@pytest.mark.parametrize(("name", "words"), [("b", "there is no suite 'b'"), ("a", "no folder and no tar")])
def test_nothing_there(tmp_path, name, words):
    with pytest.raises(InputError, match=words):
        open_suite(name, tmp_path / "nowhere")


def test_the_benchmark_has_fifteen():
    assert len(BENCHMARK_CORRUPTIONS) == 15
