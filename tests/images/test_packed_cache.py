"""Images that a command is given are packed once, into the cache, and that is logged."""

import shutil
import threading
import time

import pytest

from stl_offline.errors import FormatError, InputError, TargetError
from stl_offline.files import cache_dir
from stl_offline.images import pack as packing
from stl_offline.images.beton import open_beton
from stl_offline.images.pack import ensure_beton, pack


@pytest.fixture
def cache(tmp_path, monkeypatch, caplog):
    """A cache of this test alone; messages are recorded."""
    monkeypatch.setenv("STL_OFFLINE_CACHE", str(tmp_path / "cache"))
    caplog.set_level("INFO", "stl_offline")
    return tmp_path / "cache" / "betons"


def test_images_are_packed_once(cats_and_dogs, cache, caplog):
    first = ensure_beton(cats_and_dogs)
    assert first.path.parent == cache == cache_dir() / "betons"
    assert f"packed 6 images of 2 classes → {first.path}" in caplog.text
    before = first.path.stat()
    again = ensure_beton(cats_and_dogs)
    assert again.path == first.path and again.keys == first.keys and again.fingerprint == first.fingerprint
    assert first.path.stat() == before
    assert caplog.messages[-1] == f"using packed images {first.path}"


def test_other_images_and_other_settings_are_packed_apart(cats_and_dogs, cache):
    paths = {ensure_beton(cats_and_dogs).path, ensure_beton(cats_and_dogs, max_size=20).path}
    followed = ensure_beton(cats_and_dogs, class_names=["dog", "cat"])
    paths.add(followed.path)
    assert followed.class_ids.tolist() == [1, 1, 1, 0, 0, 0]
    shutil.copy(cats_and_dogs / "cat" / "cat-0.jpg", cats_and_dogs / "dog" / "dog-0.jpg")
    changed = ensure_beton(cats_and_dogs)
    assert changed.path not in paths and len(paths) == 3
    assert changed.content_hashes[0] == changed.content_hashes[3]


def test_a_damaged_cache_is_packed_again_and_leftovers_go(cats_and_dogs, cache, caplog):
    path = ensure_beton(cats_and_dogs).path
    path.write_bytes(path.read_bytes()[:-5])
    left = path.parent / f".{path.name}.123.abcd.tmp"
    left.write_bytes(b"of a killed process")
    with pytest.raises(FormatError):
        open_beton(path)
    assert len(ensure_beton(cats_and_dogs)) == 6
    assert "packing again" in caplog.text and not left.exists()


def test_broken_images_in_the_cache_way(broken, cache, caplog):
    with pytest.raises(InputError, match="cat-1"):
        ensure_beton(broken)
    assert not list(cache.glob("*.beton"))
    assert len(ensure_beton(broken, skip_broken=True)) == 4
    assert "left out cat/cat-1.jpg: is cut off" in caplog.text


def test_a_beton_is_opened_as_it_is(cats_and_dogs, cache, tmp_path, caplog):
    path = pack(cats_and_dogs, tmp_path / "x.beton").path
    caplog.clear()
    assert ensure_beton(path).path == path and ensure_beton(str(path), class_names=["cat", "dog"]).path == path
    assert not caplog.messages and not cache.exists()
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
