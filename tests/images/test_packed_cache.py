"""Images that a command is given are packed once, into the cache, and it says so."""

import io
import logging
import os
import shutil
import tarfile
import threading
import time

import pytest
from PIL import Image

from stl_offline.errors import FormatError, InputError, JoinError, TargetError
from stl_offline.evaluation import match_classes
from stl_offline.files import atomic_path, cache_dir
from stl_offline.images import pack as packing
from stl_offline.images import sources
from stl_offline.images.beton import open_beton
from stl_offline.images.pack import ensure_beton, pack


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of this test alone."""
    monkeypatch.setenv("STL_OFFLINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "betons"


@pytest.fixture
def said(caplog):
    """The log's lines since the last call."""
    caplog.set_level(logging.INFO, "stl_offline")

    def lines():
        messages = caplog.messages[:]
        caplog.clear()
        return messages

    return lines


def test_images_are_packed_once(cats_and_dogs, cache, said):
    first = ensure_beton(cats_and_dogs)
    assert first.path.parent == cache == cache_dir() / "betons"
    assert said() == [f"packed 6 images of 2 classes → {first.path}"]
    before = first.path.stat()
    again = ensure_beton(cats_and_dogs)
    assert again.path == first.path and again.keys == first.keys and again.fingerprint == first.fingerprint
    assert first.path.stat() == before
    assert said() == [f"using packed images {first.path}"]
    assert first.place == again.place == str(cats_and_dogs)


def test_other_images_and_other_settings_are_packed_apart(cats_and_dogs, cache):
    paths = {ensure_beton(cats_and_dogs).path, ensure_beton(cats_and_dogs, max_size=20).path}
    followed = ensure_beton(cats_and_dogs, class_names=["dog", "cat"])
    paths.add(followed.path)
    assert followed.class_ids.tolist() == [1, 1, 1, 0, 0, 0]
    shutil.copy(cats_and_dogs / "cat" / "cat-0.jpg", cats_and_dogs / "dog" / "dog-0.jpg")
    changed = ensure_beton(cats_and_dogs)
    assert changed.path not in paths and len(paths) == 3
    assert changed.content_hashes[0] == changed.content_hashes[3]


def test_a_damaged_cache_is_packed_again_and_leftovers_go(cats_and_dogs, cache, said):
    path = ensure_beton(cats_and_dogs).path
    path.write_bytes(path.read_bytes()[:-5])
    left = path.parent / f".{path.name}.123.abcd.tmp"
    left.write_bytes(b"of a killed process")
    with pytest.raises(FormatError):
        open_beton(path)
    assert len(ensure_beton(cats_and_dogs)) == 6
    assert any(line.startswith("packing again") for line in said()) and not left.exists()


def test_broken_images_in_the_cache_way(broken, cache, said):
    with pytest.raises(InputError, match="cat-1"):
        ensure_beton(broken)
    assert not list(cache.glob("*.beton"))
    assert len(ensure_beton(broken, skip_broken=True)) == 4
    assert any(line.startswith("left out cat/cat-1.jpg: is cut off") for line in said())


def test_a_beton_is_opened_as_it_is(cats_and_dogs, cache, tmp_path, said):
    path = pack(cats_and_dogs, tmp_path / "x.beton").path
    said()
    assert ensure_beton(path).path == path and ensure_beton(str(path), class_names=["cat", "dog"]).path == path
    assert said() == [] and not cache.exists()
    with pytest.raises(InputError, match=r"another class list \(2: 'cat', 'dog'\) .*\(2: 'dog', 'cat'\)"):
        ensure_beton(path, class_names=["dog", "cat"])
    with pytest.raises(InputError, match="there is no file"):
        ensure_beton(tmp_path / "none.beton")


def test_of_two_that_want_the_same_one_packs(cats_and_dogs, cache, monkeypatch):
    calls = []

    def slow_pack(*arguments, **options):
        calls.append(threading.get_ident())
        time.sleep(0.3)
        return pack(*arguments, **options)

    monkeypatch.setattr(packing, "pack", slow_pack)
    betons = []
    threads = [threading.Thread(target=lambda: betons.append(ensure_beton(cats_and_dogs))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len({beton.path for beton in betons}) == 1 and len(betons) == 3


def test_a_cache_that_cannot_be_written(cats_and_dogs, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STL_OFFLINE_CACHE", str(tmp_path / "file"))
    with pytest.raises(TargetError, match="cannot make the folder"):
        ensure_beton(cats_and_dogs)


def set_times(*roots):
    for root in roots:
        for path in [*root.rglob("*"), root]:
            os.utime(path, ns=(10**9, 10**9))


def grey(value, size=(8, 8)):
    stream = io.BytesIO()
    Image.new("RGB", size, (value,) * 3).save(stream, "BMP")
    return stream.getvalue()


@pytest.fixture
def twins(make_tree, tmp_path):
    """Two data sets of the same names, sizes and times, as folders and as tars; their images (BMP inside) differ."""
    for number, place in enumerate(("one", "two")):
        files = {f"{name}/{row}.png": grey(100 * number + row) for name in "ab" for row in range(2)}
        root = make_tree(tmp_path / place / "set", files)
        with tarfile.open(tmp_path / place / "set.tar", "w") as tar:
            tar.add(root, "set")
    set_times(tmp_path / "one", tmp_path / "two")
    return tmp_path


@pytest.mark.parametrize("name", ["set", "set.tar", "{set,set2}.tar"])
def test_two_data_sets_that_look_alike_are_packed_apart(name, twins, cache):
    for number, place in enumerate(("one", "two")):
        with tarfile.open(twins / place / "set2.tar", "w") as tar:
            for row in range(2):
                info = tarfile.TarInfo(f"set/{'ab'[row]}/{row + 7}.png")
                data = grey(100 * number + row)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    set_times(twins / "one", twins / "two")
    first, second = (ensure_beton(f"{twins / place}/{name}") for place in ("one", "two"))
    assert first.path != second.path and first.keys == second.keys
    assert int(first.read_image(1)[0, 0, 0]) == 1 and int(second.read_image(1)[0, 0, 0]) == 101
    assert ensure_beton(f"{twins / 'one'}/{name}").path == first.path


@pytest.mark.parametrize("name", ["set", "set.tar"])
def test_a_data_set_in_the_place_of_another_is_packed_again(name, twins, cache):
    first = ensure_beton(twins / "one" / name)
    (twins / "one").rename(twins / "old")
    (twins / "two").rename(twins / "one")
    second = ensure_beton(twins / "one" / name)
    assert int(first.read_image(1)[0, 0, 0]) == 1 and int(second.read_image(1)[0, 0, 0]) == 101


@pytest.mark.parametrize("name", ["set", "set.tar"])
def test_files_of_which_only_the_bytes_differ_are_told_apart(name, twins, cache, monkeypatch):
    # A container layer or a mounted image repeats even inodes and times of change.
    monkeypatch.setattr(sources, "_status", lambda path: ())
    first = ensure_beton(twins / "one" / name)
    (twins / "one").rename(twins / "old")
    (twins / "two").rename(twins / "one")
    assert ensure_beton(twins / "one" / name).path != first.path


def test_bytes_changed_in_place_are_seen(twins, cache):
    first = ensure_beton(twins / "one" / "set")
    (twins / "one" / "set" / "a" / "1.png").write_bytes(grey(77))
    set_times(twins / "one")
    second = ensure_beton(twins / "one" / "set")
    assert second.path != first.path and int(second.read_image(1)[0, 0, 0]) == 77


def test_a_timm_readers_data_are_looked_at(twins, cache, monkeypatch):
    words = [f"timm:folder?root={twins / place / 'set'}" for place in ("one", "two")]
    assert len({ensure_beton(word).path for word in words + words}) == 2
    words = [f"torch/image_folder?root={twins / place / 'set'}" for place in ("one", "two")]
    first, second = (ensure_beton(word) for word in words)
    assert first.path != second.path and ensure_beton(words[0]).path == first.path
    shutil.copy(twins / "two" / "set" / "a" / "1.png", twins / "one" / "set" / "a" / "1.png")
    changed = ensure_beton(words[0])
    assert changed.path != first.path and int(changed.read_image(1)[0, 0, 0]) == 101


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(cats_and_dogs, cache, tmp_path):
    target = tmp_path / "out" / "x.beton"
    target.parent.mkdir()
    dead, other = target.parent / ".x.beton.1.ab.tmp", target.parent / ".y.beton.1.ab.tmp"
    dead.write_bytes(b"")
    other.write_bytes(b"")
    cached = cache / ".other.beton.1.ab.tmp"
    cache.mkdir(parents=True)
    cached.write_bytes(b"")
    with atomic_path(target) as alive, atomic_path(cache / "z.beton") as alive_too:
        pack(cats_and_dogs, target)
        ensure_beton(cats_and_dogs)
        assert alive.exists() and alive_too.exists() and other.exists()
        assert not dead.exists() and not cached.exists()
        alive.write_bytes(b"1")
        alive_too.write_bytes(b"2")
    assert target.read_bytes() == b"1"


def test_errors_about_packed_images_name_what_the_user_named(cats_and_dogs, cache):
    beton = ensure_beton(cats_and_dogs)
    with pytest.raises(JoinError, match=f"classes of {cats_and_dogs} are not among"):
        match_classes(beton, ("wolf", "cat"), "the model")
