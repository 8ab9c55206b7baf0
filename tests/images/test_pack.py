"""Packing: order, bytes, broken images, faults."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stl_offline.errors import InputError, TargetError
from stl_offline.images import pack as packing
from stl_offline.images.beton import MIN_PAGE_SIZE, open_beton
from stl_offline.images.common import PassedOver, SourceImage
from stl_offline.images.encode import content_hash
from stl_offline.images.pack import pack


def test_a_tree_becomes_a_beton(cats_and_dogs, tmp_path, photo, file_bytes):
    (cats_and_dogs / "cat" / "small.png").write_bytes(file_bytes(photo(9, 13), "PNG"))
    report = pack(cats_and_dogs, tmp_path / "new" / "pets.beton")
    assert (report.samples, report.classes, report.stored_as_is, report.converted) == (7, 2, 6, 1)
    assert report.skipped == () and report.bytes == report.path.stat().st_size
    beton = open_beton(report.path)
    dogs = [f"dog/dog-{number}.jpg" for number in range(3)]
    assert beton.keys == [*(f"cat/cat-{number}.jpg" for number in range(3)), "cat/small.png", *dogs]
    assert beton.class_names == ("cat", "dog") and beton.class_ids.tolist() == [0] * 4 + [1] * 3
    assert beton.source == {"kind": "folder", "max_size": None}
    for row, key in enumerate(beton.keys):
        data = (cats_and_dogs / key).read_bytes()
        assert beton.content_hashes[row] == content_hash(data)
        assert beton.raw[row] == key.endswith(".png")
        if not beton.raw[row]:
            assert beton.stored_bytes(row) == data
    assert (beton.heights[3], beton.widths[3]) == (9, 13)
    assert (beton.read_image(3) == np.asarray(photo(9, 13))).all()


def test_bytes_do_not_depend_on_the_number_of_workers(make_tree, photo, file_bytes, tmp_path):
    files = {
        f"{name}/{number:02d}.{kind}": file_bytes(photo(20 + number, 90 - number, seed=number), kind)
        for name in ("a", "b", "c")
        for number in range(15)
        for kind in ("PNG", "JPEG")
    }
    root = make_tree(tmp_path / "x", files)
    whole = [pack(root, tmp_path / f"{workers}.beton", workers=workers).path.read_bytes() for workers in (1, 2, 7)]
    assert whole[0] == whole[1] == whole[2]


names = st.text("abcXYZ019 -_é", min_size=1, max_size=6).map(lambda name: name.strip() or "x")


@settings(deadline=None, max_examples=15)
@given(
    tree=st.dictionaries(names, st.sets(names, min_size=1, max_size=4), min_size=2, max_size=4),
    workers=st.integers(1, 3),
)
def test_any_small_tree(tree, workers, make_tree, file_bytes, photo):
    with tempfile.TemporaryDirectory() as folder:
        root = make_tree(
            Path(folder) / "x",
            {
                f"{name}/{stem}.png": file_bytes(photo(3 + label, 5 + number), "PNG")
                for label, (name, stems) in enumerate(tree.items())
                for number, stem in enumerate(stems)
            },
        )
        beton = open_beton(pack(root, Path(folder) / "x.beton", workers=workers).path)
        expected = sorted(f"{name}/{stem}.png" for name, stems in tree.items() for stem in stems)
        assert beton.keys == expected
        assert set(beton.class_names) == set(tree)
        for row, key in enumerate(beton.keys):
            assert beton.class_names[beton.class_ids[row]] == key.partition("/")[0]
            assert beton.content_hashes[row] == content_hash((root / key).read_bytes())


def test_the_first_broken_image_is_named(broken, tmp_path):
    with pytest.raises(InputError, match=r"the image 'cat/cat-1.jpg' of .*pets is cut off .*`skip_broken`") as caught:
        pack(broken, tmp_path / "x.beton", workers=2)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*x.beton*"))


def test_broken_images_are_left_out_and_listed(broken, tmp_path):
    report = pack(broken, tmp_path / "x.beton", skip_broken=True)
    assert report.samples == 4
    assert [key for key, _ in report.skipped] == ["cat/cat-1.jpg", "dog/dog-0.jpg"]
    assert "Premature end" in report.skipped[0][1] and "not an image" in report.skipped[1][1]
    beton = open_beton(report.path)
    assert beton.keys == ["cat/cat-0.jpg", "cat/cat-2.jpg", "dog/dog-1.jpg", "dog/dog-2.jpg"]
    assert beton.class_ids.tolist() == [0, 0, 1, 1]
    for row in range(4):
        assert beton.read_image(row).shape == (beton.heights[row], beton.widths[row], 3)


def test_nothing_but_broken_images(make_tree, tmp_path):
    root = make_tree(tmp_path / "x", {"a/1.jpg": b"", "b/1.jpg": b"?"})
    with pytest.raises(InputError, match="no image that can be used; 2 are broken"):
        pack(root, tmp_path / "x.beton", skip_broken=True)
    assert not (tmp_path / "x.beton").exists()


def test_a_file_that_cannot_be_read_is_a_broken_image(cats_and_dogs, tmp_path):
    (cats_and_dogs / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(
        InputError, match=r"'cat/gone.jpg' .*is a link to .*nowhere.jpg, which does not exist .*`skip_broken`"
    ):
        pack(cats_and_dogs, tmp_path / "x.beton")
    assert pack(cats_and_dogs, tmp_path / "x.beton", skip_broken=True).samples == 6


def test_images_bigger_than_a_page(make_tree, file_bytes, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1100, 1400, 3), dtype=np.uint8))
    data = file_bytes(noise, quality=100, subsampling=0)
    assert len(data) > MIN_PAGE_SIZE
    root = make_tree(tmp_path / "x", {"a/1.jpg": data, "b/1.jpg": file_bytes(noise.crop((0, 0, 9, 9)))})
    with pytest.raises(InputError, match=r"a/1.jpg: .* bytes are more than a page .*`max_size`"):
        pack(root, tmp_path / "x.beton", page_size=MIN_PAGE_SIZE)
    report = pack(root, tmp_path / "x.beton", page_size=MIN_PAGE_SIZE, max_size=400)
    beton = open_beton(report.path)
    assert beton.widths.tolist() == [400, 9] and beton.heights.tolist() == [314, 9]
    assert (report.stored_as_is, report.converted, beton.source["max_size"]) == (1, 1, 400)
    assert open_beton(pack(root, tmp_path / "y.beton").path).stored_bytes(0) == data


def test_a_validation_set_follows_the_class_list(cats_and_dogs, tmp_path):
    beton = open_beton(pack(cats_and_dogs, tmp_path / "x.beton", class_names=["dog", "wolf", "cat"]).path)
    assert beton.class_names == ("dog", "wolf", "cat") and beton.class_ids.tolist() == [2, 2, 2, 0, 0, 0]
    with pytest.raises(InputError, match="lacks, for example 'cat'"):
        pack(cats_and_dogs, tmp_path / "y.beton", class_names=["dog", "wolf"])


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ({"destination": "x.ffcv"}, InputError, r"ends in \.beton"),
        ({"destination": "folder.beton"}, TargetError, "is a folder"),
        ({"destination": "file/x.beton"}, TargetError, "cannot make the folder"),
        ({"max_size": 0}, InputError, "at least 1 pixel"),
        ({"workers": 0}, InputError, "at least one worker"),
        ({"page_size": 5}, InputError, "power of two"),
    ],
)
def test_arguments_that_cannot_be_used(arguments, error, reason, cats_and_dogs, tmp_path):
    (tmp_path / "folder.beton").mkdir()
    (tmp_path / "file").write_text("")
    destination = tmp_path / arguments.pop("destination", "x.beton")
    with pytest.raises(error, match=reason):
        pack(cats_and_dogs, destination, **arguments)
    assert not destination.is_file()


def test_a_full_disk_leaves_what_was_there(make_tree, tmp_path, file_bytes, photo):
    data = file_bytes(photo(1000, 1500, seed=1), quality=95)
    root = make_tree(tmp_path / "x", {f"{name}/1.jpg": data for name in "ab"})
    target = tmp_path / "out" / "x.beton"
    target.parent.mkdir()
    target.write_bytes(b"older")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel refuses to let a file grow beyond this, as a full disk would.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(TargetError, match=r"cannot write .*x\.beton: File too large"):
            pack(root, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in target.parent.iterdir()] == ["x.beton"] and target.read_bytes() == b"older"
    pack(root, target)
    assert len(open_beton(target)) == 2


def test_a_disk_that_fills_up_at_the_very_end(cats_and_dogs, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(packing.BetonWriter, "finish", full)
    with pytest.raises(TargetError, match="No space left on device; nothing was changed"):
        pack(cats_and_dogs, tmp_path / "out" / "x.beton")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("error", [MemoryError, RuntimeError("a bug"), KeyboardInterrupt])
def test_a_worker_that_fails_otherwise_does_not_hang(error, cats_and_dogs, tmp_path, monkeypatch):
    def fail(data, max_size=None):
        raise error

    monkeypatch.setattr(packing, "encode_image", fail)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        pack(cats_and_dogs, tmp_path / "out" / "x.beton", workers=2)
    assert list((tmp_path / "out").iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("packing")]


class Counted:
    """A source of many images that counts how many are open at once."""

    kind = "test"
    class_names = ("a", "b")
    passed_over = PassedOver()

    def __init__(self, data, count=600):
        self.data, self.count, self.given = data, count, 0

    def __len__(self):
        return self.count

    def __iter__(self):
        for number in range(self.count):
            self.given += 1
            yield SourceImage(f"{number:05d}", number % 2, lambda: self.data)


def test_few_images_are_on_the_way_at_once(monkeypatch, file_bytes, photo, tmp_path):
    source = Counted(file_bytes(photo(8, 8)))
    most, written = 0, 0
    add = packing.BetonWriter.add

    def counting_add(writer, *arguments):
        nonlocal most, written
        most, written = max(most, source.given - written), written + 1
        add(writer, *arguments)

    monkeypatch.setattr(packing, "open_any", lambda *arguments: source)
    monkeypatch.setattr(packing.BetonWriter, "add", counting_add)
    assert pack("anything", tmp_path / "x.beton", workers=2).samples == written == 600
    assert most <= 16 * (2 * 2 + 3)


def test_a_source_that_gives_a_key_twice(monkeypatch, file_bytes, photo, tmp_path):
    data = file_bytes(photo(8, 8))
    doubled = [SourceImage("same", number, lambda: data) for number in range(2)]
    source = Counted(data, 2)
    monkeypatch.setattr(Counted, "__iter__", lambda self: iter(doubled))
    monkeypatch.setattr(packing, "open_any", lambda *arguments: source)
    with pytest.raises(InputError, match="gives the key 'same' twice"):
        pack("anything", tmp_path / "x.beton")


SLOW_PACK = """
import sys, time
from stl_offline.images import pack as packing
encode = packing.encode_image
def slowly(data, max_size=None):
    time.sleep(0.3)
    return encode(data, max_size=max_size)
packing.encode_image = slowly
packing._CHUNK = 1
packing.pack(sys.argv[1], sys.argv[2], workers=1)
"""


def test_killed_in_the_middle(cats_and_dogs, tmp_path):
    for copy in range(20):
        shutil.copy(cats_and_dogs / "cat" / "cat-0.jpg", cats_and_dogs / "cat" / f"{copy}.jpg")
    target = tmp_path / "out" / "x.beton"
    process = subprocess.Popen([sys.executable, "-c", SLOW_PACK, str(cats_and_dogs), str(target)])
    try:
        deadline = time.monotonic() + 400
        while not (target.parent.is_dir() and list(target.parent.iterdir())):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not target.exists() and len(list(target.parent.iterdir())) == 1
    pack(cats_and_dogs, target)
    assert len(open_beton(target)) == 26 and list(target.parent.iterdir()) == [target]
