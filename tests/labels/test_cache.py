"""The token cache: equal to the label set for every image, built once, never half."""

import errno
import os
import signal
from functools import partial

import numpy as np
import pytest
import xxhash

from stl_offline.errors import FormatError, InputError, JoinError, TargetError
from stl_offline.files import canonical_json
from stl_offline.labels import cache as cache_module
from stl_offline.labels.cache import build_token_cache
from stl_offline.labels.cache_file import open_token_cache
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.spec import CONTAINERS
from tests.labels.crash import fork, kill_at_step, run, wait
from tests.labels.synthetic import make_arrays, make_key, make_spec, write_set


@pytest.fixture(scope="module", params=CONTAINERS)
def label_set(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("labels")
    write_set(path, make_spec(samples=23, view_count=2, container=request.param), 4)
    return open_label_set(path)


@pytest.fixture(scope="module")
def hashes(label_set):
    return make_arrays(label_set.spec).content_hash


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A set of eight images, and their content hashes."""
    path = tmp_path_factory.mktemp("small")
    write_set(path, make_spec(samples=8), 2)
    return open_label_set(path), make_arrays(make_spec(samples=8)).content_hash


def build(label_set, hashes, order, folder, **options):
    keys = [make_key(position) for position in order]
    return build_token_cache(label_set, keys, hashes[order], label_set.spec.class_names, folder=folder, **options)


@pytest.mark.parametrize("count", [23, 1, 9])
def test_every_image_has_its_labels(label_set, hashes, tmp_path, count):
    order = np.random.default_rng(count).permutation(23)[:count]
    cache = build(label_set, hashes, order, tmp_path)
    assert len(cache) == count
    assert (cache.num_classes, cache.grid, cache.top_k, cache.spec) == (7, (3, 5), 4, label_set.spec)
    assert (cache.class_ids.dtype, cache.probabilities.dtype, cache.confidence.dtype) == (
        np.uint16,
        np.float32,
        np.float32,
    )
    assert (cache.views.dtype, cache.labelled.dtype) == (np.float32, np.uint8)
    assert cache.labelled.all()
    for sample, position in enumerate(order):
        labels = label_set[make_key(position)]
        np.testing.assert_array_equal(cache.class_ids[sample], labels.class_ids)
        assert cache.probabilities[sample].tobytes() == labels.probabilities().tobytes()
        assert cache.confidence[sample].tobytes() == labels.confidence.astype(np.float32).tobytes()
        assert cache.views[sample].tobytes() == labels.views.tobytes()
    assert isinstance(cache.class_ids, np.memmap) and not cache.class_ids.flags.writeable


def test_images_without_labels(label_set, hashes, tmp_path):
    keys = ["new/a.png", make_key(20), "new/b.png"]
    theirs = np.array([5, hashes[20], 6], dtype=np.uint64)
    names = label_set.spec.class_names
    with pytest.raises(JoinError, match="2 images without labels"):
        build_token_cache(label_set, keys, theirs, names, folder=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    cache = build_token_cache(label_set, keys, theirs, names, folder=tmp_path, missing="skip")
    assert cache.labelled.tolist() == [0, 1, 0]
    assert "1 of 3 images have labels" in cache.report
    assert not cache.probabilities[[0, 2]].any() and not cache.confidence[[0, 2]].any()
    np.testing.assert_array_equal(cache.class_ids[1], label_set[make_key(20)].class_ids)


def test_built_once_and_named_by_content(label_set, hashes, tmp_path, monkeypatch):
    first = build(label_set, hashes, np.arange(23), tmp_path)
    inode = (first.path / "class_ids.npy").stat().st_ino
    real = cache_module._fill
    monkeypatch.setattr(cache_module, "_fill", None)
    again = build(label_set, hashes, np.arange(23), tmp_path)
    assert again.path == first.path and (again.path / "class_ids.npy").stat().st_ino == inode
    monkeypatch.setattr(cache_module, "_fill", real)
    others = {
        build(label_set, hashes, np.arange(22), tmp_path).path,
        build(label_set, hashes, np.arange(23)[::-1], tmp_path).path,
        build(label_set, hashes, np.arange(23), tmp_path, missing="skip").path,
        build(label_set, hashes + np.uint64(1), np.arange(23), tmp_path, allow_changed=True).path,
    }
    assert len(others | {first.path}) == 5


def test_the_default_folder(label_set, hashes, tmp_path, monkeypatch):
    monkeypatch.setenv("STL_OFFLINE_CACHE", str(tmp_path / "cache"))
    assert build(label_set, hashes, np.arange(3), None).path.parent == tmp_path / "cache" / "tokens"


@pytest.mark.parametrize("file", ["class_ids", "probabilities", "confidence", "views", "labelled"])
def test_a_cut_off_cache_is_refused_and_built_anew(label_set, hashes, tmp_path, file):
    cache = build(label_set, hashes, np.arange(23), tmp_path)
    expected = np.array(cache.class_ids)
    path = cache.path
    del cache
    os.truncate(path / f"{file}.npy", (path / f"{file}.npy").stat().st_size - 1)
    with pytest.raises(FormatError, match=f"{file}.npy is missing or cut off"):
        open_token_cache(path)
    again = build(label_set, hashes, np.arange(23), tmp_path)
    assert again.path == path
    np.testing.assert_array_equal(again.class_ids, expected)
    (path / f"{file}.npy").unlink()
    with pytest.raises(FormatError, match="missing"):
        open_token_cache(path)


def test_damaged_caches_are_refused(label_set, hashes, tmp_path):
    path = build(label_set, hashes, np.arange(4), tmp_path).path
    np.save(path / "labelled.npy", np.ones(5, np.uint8))
    with pytest.raises(FormatError, match=r"labelled.npy is missing or cut off: it must have 132 bytes"):
        open_token_cache(path)
    np.save(path / "labelled.npy", np.ones(4, np.int8))
    with pytest.raises(FormatError, match=r"labelled.npy is damaged"):
        open_token_cache(path)
    assert len(build(label_set, hashes, np.arange(4), tmp_path)) == 4
    with pytest.raises(FileNotFoundError):
        open_token_cache(tmp_path / "none")


def signed(info):
    """A cache.json whose own checksum is right."""
    info |= {"version": 3}
    return canonical_json(info | {"own_xxh3": xxhash.xxh3_64_hexdigest(canonical_json(info))})


SPEC = make_spec(samples=8)
# What stands in cache.json, and the words of the refusal.
INFOS = {
    "other version": (b'{"version": 1}', "is of version 1, not 3"),
    "no JSON": (b"{", r"cache\.json"),
    "no object": (b"[]", r"cache\.json"),
    "no text": (b"\xff", r"cache\.json"),
    "nothing in it": (b'{"version": 3}', r"cache\.json is damaged"),
    "half of a pair": (b'{"version": 3, "report": "\\ud800"}', r"cache\.json"),
    "infinite": (b'{"version": 3, "own_xxh3": "", "report": 1e999}', r"cache\.json is damaged"),
    "no spec": (signed({"images": 4, "report": "", "xxh3": {}, "spec": 3}), r"cache\.json cannot be used"),
    "no checksums": (signed({"images": 4, "report": "", "spec": SPEC.to_json()}), r"cache\.json cannot be used"),
    "no count": (signed({"images": 0, "report": "", "xxh3": {}, "spec": SPEC.to_json()}), r"cache\.json cannot be"),
    "deep": (b'{"version": 3, "spec": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", r"cache\.json"),
    "many values": (b'{"version": 3, "spec": [' + b"{}," * 3_000_000 + b"{}]}", r"cache\.json: it holds .* values"),
    "large": (1 << 40, "1,099,511,627,776 bytes"),
    "none": (None, r"lacks its cache\.json"),
}


@pytest.mark.parametrize("name", INFOS)
def test_the_description_of_a_cache_is_checked(tmp_path, caplog, small, name):
    data, words = INFOS[name]
    path = build(*small, np.arange(4), tmp_path).path
    info = path / "cache.json"
    if isinstance(data, bytes):
        info.write_bytes(data)
    elif data is None:
        info.unlink()
    else:
        os.truncate(info, data)
    with pytest.raises(FormatError, match=f"{words}.*; remove {path}"):
        open_token_cache(path)
    assert len(build(*small, np.arange(4), tmp_path)) == 4
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.getMessage().endswith(": it is built again")
    assert len(open_token_cache(path)) == 4


@pytest.mark.parametrize("file", ["class_ids", "probabilities", "confidence", "views", "labelled"])
def test_a_flipped_byte_is_seen_when_a_cache_is_opened(tmp_path, caplog, small, file):
    """One bit anywhere in an array's file: refused, and built again with one line that names the file."""
    path = build(*small, np.arange(8), tmp_path).path
    array = path / f"{file}.npy"
    data = array.read_bytes()
    for place in (len(data) - 1, (len(data) + 128) // 2, 128, 20):
        array.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        with pytest.raises(FormatError, match=f"{file}.npy is damaged .its checksum differs.; remove {path}"):
            open_token_cache(path)
    build(*small, np.arange(8), tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"the token cache's file {array} is damaged (its checksum differs): it is built again"
    ]
    assert array.read_bytes() == data


def test_any_change_of_the_description_is_seen(tmp_path, small):
    """Another number of rows and columns has the same bytes; other class names have no array at all."""
    path = build(*small, np.arange(8), tmp_path).path
    data = (path / "cache.json").read_bytes()
    for old, new in ((b'"class 3"', b'"class x"'), (b"3,\n      5", b"5,\n      3"), (b"8 of 8", b"7 of 8")):
        assert data.count(old) == 1
        (path / "cache.json").write_bytes(data.replace(old, new))
        with pytest.raises(FormatError, match=r"cache\.json is damaged .its checksum differs"):
            open_token_cache(path)


def test_links_and_pipes_in_a_cache_are_not_opened(tmp_path, small):
    path = build(*small, np.arange(8), tmp_path).path
    (path / "views.npy").rename(tmp_path / "elsewhere.npy")
    (path / "views.npy").symlink_to(tmp_path / "elsewhere.npy")
    with pytest.raises(FormatError, match=r"views\.npy is a symbolic link"):
        open_token_cache(path)
    (path / "views.npy").unlink()
    os.mkfifo(path / "views.npy")
    with pytest.raises(FormatError, match=r"views\.npy is missing"):
        open_token_cache(path)
    assert len(build(*small, np.arange(8), tmp_path)) == 8
    (path / "cache.json").unlink()
    os.mkfifo(path / "cache.json")
    with pytest.raises(FormatError, match=r"cache\.json is not a regular file"):
        open_token_cache(path)


def test_a_cache_that_is_whole_or_new_gives_no_warning(tmp_path, caplog, small):
    for _ in range(2):
        build(*small, np.arange(8), tmp_path)
    assert not caplog.records


def test_a_damaged_shard_leaves_no_cache(tmp_path, label_set, hashes):
    write_set(tmp_path / "set", label_set.spec, 4)
    damaged = open_label_set(tmp_path / "set")
    file = tmp_path / "set" / damaged.shards[2].name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(FormatError, match=file.name):
        build(damaged, hashes, np.arange(23), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_several_processes_build_it_once(label_set, hashes, tmp_path):
    def work():
        real = cache_module._fill

        def fill(folder, *arguments):
            (tmp_path / f"filled by {os.getpid()}").touch()
            real(folder, *arguments)

        cache_module._fill = fill
        assert len(build(label_set, hashes, np.arange(23), tmp_path / "cache")) == 23

    children = [fork(work) for _ in range(4)]
    assert [wait(child) for child in children] == [0] * 4
    assert len(list(tmp_path.glob("filled by *"))) == 1


def test_killed_while_it_is_built(label_set, hashes, tmp_path):
    expected = np.array(build(label_set, hashes, np.arange(23), tmp_path / "undisturbed").probabilities)
    work = partial(build, label_set, hashes, np.arange(23))
    for step in range(0, 1000, 2):
        folder = tmp_path / str(step)
        code = kill_at_step(step, partial(work, folder))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert run(partial(work, folder)) == 0
        cache = work(folder)
        np.testing.assert_array_equal(cache.probabilities, expected)
        assert {path.name for path in folder.iterdir()} == {cache.path.name, f"{cache.path.name}.lock"}
    assert 4 < step < 1000


def test_a_full_disk_says_what_is_needed(label_set, hashes, tmp_path, monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        TargetError, match=r"cannot write the token cache .*No space left.*needs 0.00 GB.*STL_OFFLINE_CACHE"
    ):
        build(label_set, hashes, np.arange(23), tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_targets_that_cannot_be_written(label_set, hashes, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "cache", "/proc/cache"):
        with pytest.raises(TargetError, match="cannot make the folder"):
            build(label_set, hashes, np.arange(3), folder)


def test_wrong_images_are_refused_before_anything_is_written(label_set, hashes, tmp_path):
    keys = [make_key(position) for position in range(3)]
    with pytest.raises(JoinError, match="class list"):
        build_token_cache(label_set, keys, hashes[:3], ("cat", "dog"), folder=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    with pytest.raises(InputError, match="`missing` must be"):
        build(label_set, hashes, np.arange(3), tmp_path, missing="drop")
