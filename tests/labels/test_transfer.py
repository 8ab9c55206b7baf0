"""Sharing label sets: pushed and pulled over a real protocol, with damage, failing connections and interruptions."""

import json
import re
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from stl_offline import remote
from stl_offline.errors import FormatError, InputError, JoinError, MissingExtraError, TargetError
from stl_offline.labels import transfer
from stl_offline.labels.cache import build_token_cache
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.store import storage
from stl_offline.labels.transfer import pull, push
from stl_offline.labels.verify import verify
from tests.labels.crash import files
from tests.labels.synthetic import make_arrays, make_key, make_spec, write_set

SPEC = make_spec(samples=19, grid=(8, 6))
SHARDS = 5


@pytest.fixture(autouse=True)
def _fast(monkeypatch, tmp_path):
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setenv("STL_OFFLINE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    path = tmp_path_factory.mktemp("local") / "labels"
    write_set(path, SPEC, SHARDS)
    return path


@pytest.fixture(params=["s3", "memory", "folder"])
def place(request, tmp_path):
    if request.param == "s3":
        return request.getfixturevalue("s3") + "/team/labels"
    return f"memory://{tmp_path.name}/labels" if request.param == "memory" else str(tmp_path / "shared" / "labels")


def stored(place):
    """The files of a store by name, read without this package."""
    filesystem, root = fsspec.core.url_to_fs(place, use_listings_cache=False)
    return {path.rpartition("/")[2]: filesystem.cat_file(path) for path in filesystem.find(root)}


def overwrite(place, name, data):
    filesystem, root = fsspec.core.url_to_fs(place, use_listings_cache=False)
    filesystem.pipe_file(f"{root}/{name}", data)


def shard_names(path):
    return [shard["name"] for shard in json.loads((path / "manifest.json").read_bytes())["shards"]]


def test_there_and_back_again(local, place, tmp_path):
    done = push(open_label_set(local), place)
    assert (done.sent, done.kept, done.present) == (SHARDS, 0, tuple(range(SHARDS)))
    assert stored(place) == files(local)
    again = push(open_label_set(local), place)
    assert (again.sent, again.sent_bytes, again.kept) == (0, 0, SHARDS)
    got = pull(open_label_set(place), tmp_path / "copy")
    assert (got.sent, got.kept) == (SHARDS, 0)
    assert files(tmp_path / "copy") == files(local)
    assert pull(open_label_set(place), tmp_path / "copy").kept == SHARDS


def test_a_set_in_a_store_is_used_where_it_lies(local, place, tmp_path):
    push(open_label_set(local), place)
    labels, expected = open_label_set(place), open_label_set(local)
    assert list(labels) == list(expected) and labels.fingerprint == expected.fingerprint
    assert labels[make_key(7)].logits.tobytes() == expected[make_key(7)].logits.tobytes()
    whole = make_arrays(SPEC)
    order = np.random.default_rng(0).permutation(19)
    keys = [whole.keys[position] for position in order]
    cache = build_token_cache(labels, keys, whole.content_hash[order], SPEC.class_names, folder=tmp_path / "tokens")
    np.testing.assert_array_equal(cache.class_ids, whole.class_ids[order])


def test_shards_of_a_store_are_fetched_once(local, s3, tmp_path):
    place = s3 + "/labels"
    push(open_label_set(local), place)
    _ = list(open_label_set(place))
    kept = sorted((tmp_path / "cache" / "shards").iterdir())
    assert len(kept) == SHARDS
    filesystem, root = fsspec.core.url_to_fs(place, use_listings_cache=False)
    for name in shard_names(local):
        filesystem.rm(f"{root}/{name}")
    labels = open_label_set(place)
    assert labels.read_shard(3).equals(open_label_set(local).read_shard(3))
    assert [line.count("missing") for line in verify(labels).faults] == [1] * SHARDS  # it asks the store
    kept[0].write_bytes(b"rotten")  # what is kept is compared each time, too
    with pytest.raises(FormatError, match="missing"):
        for index in range(SHARDS):
            labels.read_shard(index)


def test_an_append_that_is_under_way_keeps_its_place(local, place, tmp_path):
    """Its records lie beside the very set that would be pulled or pushed there."""
    push(open_label_set(local), place)
    target = tmp_path / "grows"
    pull(open_label_set(place), target)
    (target / ".partial").mkdir()
    (target / ".partial/job.json").write_text("{}")
    before = files(target)
    for copy in (lambda: pull(open_label_set(place), target), lambda: push(open_label_set(local), target)):
        with pytest.raises(TargetError, match="holds a label set that a job has not finished"):
            copy()
    assert files(target) == before and (target / ".partial/job.json").is_file()


def test_a_bucket_that_may_be_read_but_not_listed(local, tmp_path, monkeypatch):
    """S3 says "forbidden" of a file that is not there."""
    place = f"memory://{tmp_path.name}/public"
    push(open_label_set(local), place)
    real = MemoryFileSystem.info

    def info(self, path, **options):
        if self._strip_protocol(path) not in self.store:
            raise PermissionError("Forbidden")
        return real(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "info", info)
    assert len(open_label_set(place)) == len(open_label_set(local))
    assert pull(open_label_set(place), tmp_path / "copy").sent == 5


def test_some_shards(local, place, tmp_path):
    push(open_label_set(local), place)
    got = pull(open_label_set(place), tmp_path / "some", shards="0,3-4")
    assert (got.sent, got.present) == (3, (0, 3, 4))
    names = shard_names(local)
    assert set(files(tmp_path / "some")) == {"README.md", "manifest.json", "partial.json", names[0], *names[3:]}
    some, whole = open_label_set(tmp_path / "some"), open_label_set(local)
    assert some.present == (0, 3, 4) and some.is_partial
    expected = [key for index in (0, 3, 4) for key in whole.read_index(index).keys]
    assert list(some) == expected and len(some) == len(expected)
    assert "shards 0,3-4 of 5" in repr(some)
    assert some.fingerprint != whole.fingerprint
    assert some[expected[-1]].logits.tobytes() == whole[expected[-1]].logits.tobytes()
    absent = whole.read_index(1).keys[0]
    with pytest.raises(JoinError, match="only the shards 0,3-4 are here"):
        some[absent]
    with pytest.raises(FormatError, match=r"shard 1 of .* was not pulled .*`pull\(shards=\"1\"\)`"):
        some.read_shard(1)
    arrays = make_arrays(SPEC)
    with pytest.raises(JoinError, match="only the shards 0,3-4 of 5 were pulled"):
        build_token_cache(some, arrays.keys, arrays.content_hash, SPEC.class_names, folder=tmp_path / "tokens")
    # More of it, and then all of it.
    more = pull(open_label_set(place), tmp_path / "some", shards="1")
    assert (more.sent, more.kept, more.present) == (1, 3, (0, 1, 3, 4))
    assert open_label_set(tmp_path / "some").present == (0, 1, 3, 4)
    assert pull(open_label_set(place), tmp_path / "some").sent == 1
    assert files(tmp_path / "some") == files(local)


@pytest.mark.parametrize(
    ("text", "words"),
    [("5", "there are no shards 5: the label set has 0 to 4"), ("3-1", "no shards 3-1"), ("all", "write them as 0-3,7"),
     ("", "write them"), ("0-99999999999", "write them"), ("-1", "write them"), ("٣", "write them")],
)  # fmt: skip
def test_shards_that_there_are_not(local, tmp_path, text, words):
    with pytest.raises(InputError, match=words):
        pull(open_label_set(local), tmp_path / "copy", shards=text)
    assert not (tmp_path / "copy").exists()


def test_shards_that_were_not_pulled_cannot_be_pulled_on(local, tmp_path):
    pull(open_label_set(local), tmp_path / "some", shards="0-1")
    with pytest.raises(InputError, match="of .*some only the shards 0-1 are here"):
        pull(open_label_set(tmp_path / "some"), tmp_path / "copy", shards="1-2")
    assert not (tmp_path / "copy").exists()


def test_an_object_that_was_cut_off_on_the_server(local, s3, tmp_path):
    place, name = s3 + "/labels", shard_names(local)[2]
    push(open_label_set(local), place)
    whole = stored(place)[name]
    overwrite(place, name, whole[:-7])
    words = f"{name} has {len(whole) - 7} bytes, the manifest says {len(whole)}"
    with pytest.raises(FormatError, match=words):
        open_label_set(place).read_shard(2)
    with pytest.raises(FormatError, match=words):
        pull(open_label_set(place), tmp_path / "copy")
    # All that is whole was pulled, but it is no label set yet.
    with pytest.raises(FormatError, match="was not pulled completely; run the same"):
        open_label_set(tmp_path / "copy")
    assert push(open_label_set(local), place).sent == 1  # a push repairs it
    done = pull(open_label_set(place), tmp_path / "copy")
    assert (done.sent, done.kept) == (1, SHARDS - 1)
    assert files(tmp_path / "copy") == files(local)


def test_a_flipped_byte_on_the_server(local, s3, tmp_path):
    place, name = s3 + "/labels", shard_names(local)[1]
    push(open_label_set(local), place)
    data = bytearray(stored(place)[name])
    data[len(data) // 2] ^= 4
    overwrite(place, name, bytes(data))
    for read in (
        lambda: open_label_set(place).read_index(1),
        lambda: list(open_label_set(place)),
        lambda: pull(open_label_set(place), tmp_path / "copy"),
    ):
        with pytest.raises(FormatError, match=f"{name} is damaged .its SHA-256 differs"):
            read()
    assert push(open_label_set(local), place).sent == 1
    assert stored(place) == files(local)


def test_a_damaged_copy_is_repaired(local, tmp_path):
    pull(open_label_set(local), tmp_path / "copy")
    names = shard_names(local)
    (tmp_path / "copy" / names[0]).write_bytes(b"short")
    (tmp_path / "copy" / names[3]).unlink()
    assert pull(open_label_set(local), tmp_path / "copy").sent == 2
    assert files(tmp_path / "copy") == files(local)


@pytest.mark.parametrize("after", [0, 100, 900, 3000])
def test_connections_that_break_in_the_middle(local, s3, flaky, tmp_path, after):
    place = s3 + "/labels"
    flaky.break_next(3, after)
    push(open_label_set(local), place, workers=2)
    assert stored(place) == files(local)
    flaky.break_next(3, after)
    pull(open_label_set(place), tmp_path / "copy", workers=2)
    assert files(tmp_path / "copy") == files(local)
    assert flaky.broken >= 3


def test_a_store_that_is_gone_is_one_line(local, s3, flaky, monkeypatch):
    monkeypatch.setattr(remote, "TRIES", 2)
    push(open_label_set(local), s3 + "/labels")
    flaky.break_next(10**9, 0)
    # The client's own tries, with their longer and longer waits, are not what is tested.
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)
    with pytest.raises(
        InputError, match=rf"cannot look at {s3}/labels/manifest.json \(2 tries\): .*try again later"
    ) as caught:
        open_label_set(s3 + "/labels")
    assert "\n" not in str(caught.value)


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, count):
    """The network cable is pulled (or the process killed) when ``count`` shards have been written."""
    written = []
    for kind in (storage.FolderStorage, storage.ObjectStorage):
        real = kind.write

        def write(self, name, data, real=real):
            if name.startswith("labels-"):
                if len(written) >= count:
                    raise Interrupted
                written.append(name)
            real(self, name, data)

        monkeypatch.setattr(kind, "write", write)
    return written


def test_an_interrupted_push_goes_on_and_sends_nothing_twice(local, place, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 2)
        push(open_label_set(local), place, workers=1)
    assert "manifest.json" not in stored(place)
    with pytest.raises(FormatError, match="holds no label set"):
        open_label_set(place)
    with monkeypatch.context() as patch:
        written = interrupt_after(patch, 100)
        done = push(open_label_set(local), place)
    assert (done.sent, done.kept) == (SHARDS - 2, 2) and len(written) == SHARDS - 2
    assert stored(place) == files(local)


def test_an_interrupted_pull_goes_on_and_fetches_nothing_twice(local, place, tmp_path, monkeypatch):
    push(open_label_set(local), place)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 3)
        pull(open_label_set(place), tmp_path / "copy", workers=1)
    with pytest.raises(FormatError, match="not pulled completely"):
        open_label_set(tmp_path / "copy")
    done = pull(open_label_set(place), tmp_path / "copy")
    assert (done.sent, done.kept) == (SHARDS - 3, 3)
    assert files(tmp_path / "copy") == files(local)


def test_other_content_is_never_overwritten(local, place, tmp_path):
    write_set(tmp_path / "other", make_spec(samples=19, grid=(8, 6), top_k=3), SHARDS)
    push(open_label_set(local), place)
    with pytest.raises(TargetError, match=r"holds another label set \(yours and its\): .*top_k is 3 and 4"):
        push(open_label_set(tmp_path / "other"), place)
    with pytest.raises(TargetError, match="holds another label set.*top_k is 4 and 3"):
        pull(open_label_set(place), tmp_path / "other")
    assert stored(place) == files(local)
    # The same shards under other class names, and with another licence: neither stands in them.
    names = [f"other{number}" for number in range(len(SPEC.class_names))]
    for number, changed in enumerate(
        ({"class_names": names}, {"labeler": SPEC.labeler | {"licence": "CC-BY-NC-4.0"}, "class_names": None})
    ):
        copy = tmp_path / f"changed{number}"
        pull(open_label_set(local), copy)
        text = json.loads((copy / "manifest.json").read_bytes())
        text |= {name: value for name, value in changed.items() if value}
        (copy / "manifest.json").write_text(json.dumps(text))
        with pytest.raises(
            TargetError, match="holds another label set.*(class_names|labeler.licence) is .*; choose an"
        ):
            push(open_label_set(copy), place)
    assert stored(place) == files(local)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    for copy in (pull, push):
        with pytest.raises(TargetError, match="not empty and holds something else .cat.jpg lies there"):
            copy(open_label_set(local), tmp_path / "photos")
    assert files(tmp_path / "photos") == {"cat.jpg": b"cat"}
    assert list((tmp_path / "photos").iterdir()) == [tmp_path / "photos" / "cat.jpg"]


def test_a_partial_set_is_not_pushed_and_a_store_not_pulled_into(local, tmp_path):
    pull(open_label_set(local), tmp_path / "some", shards="2")
    with pytest.raises(InputError, match="only some shards of .* are here; push a whole label set"):
        push(open_label_set(tmp_path / "some"), tmp_path / "there")
    with pytest.raises(InputError, match="into a folder of this machine, not to s3://x/y"):
        pull(open_label_set(local), "s3://x/y")


def test_an_edited_card_travels(local, tmp_path):
    pull(open_label_set(local), tmp_path / "edited")
    (tmp_path / "edited" / "README.md").write_text("Ours.")
    push(open_label_set(tmp_path / "edited"), "memory://edited/labels")
    pull(open_label_set("memory://edited/labels"), tmp_path / "copy")
    assert (tmp_path / "copy" / "README.md").read_text() == "Ours."


def test_two_pulls_into_one_folder(local, tmp_path):
    (tmp_path / "copy" / ".partial").mkdir(parents=True)
    with (
        transfer._alone(tmp_path / "copy" / ".partial" / "pull.lock", "x"),
        pytest.raises(TargetError, match="another pull is writing into"),
    ):
        pull(open_label_set(local), tmp_path / "copy")
    assert pull(open_label_set(local), tmp_path / "copy").sent == SHARDS


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [("s3://b/x", "s3fs", "s3"), ("gs://b/x", "gcsfs", "gs"), ("hf://datasets/u/x", "huggingface_hub", "hf")],
)
def test_a_missing_package_is_named(monkeypatch, url, package, extra):
    def refuse(*_, **__):
        raise ImportError(f"Install {package} to access this")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    with pytest.raises(MissingExtraError, match=re.escape(f"pip install 'stl-offline[{extra}]' (or {package})")):
        open_label_set(url)


@pytest.mark.parametrize("place", ["s3://", "s3:///", "memory://", "file://", "hf://"])
def test_addresses_without_a_path(local, tmp_path, monkeypatch, place):
    """As of an empty variable. fsspec would take ``s3:`` for a folder."""
    monkeypatch.chdir(tmp_path)
    for work in (open_label_set, lambda place: push(open_label_set(local), place)):
        with pytest.raises(InputError, match=f"^{place} names no place"):
            work(place)
    assert not list(tmp_path.iterdir())


def test_addresses_that_lead_nowhere(s3, tmp_path):
    with pytest.raises(InputError, match="nowhere://x is no address of a label set"):
        open_label_set("nowhere://x")
    with pytest.raises(FormatError, match="holds no label set"):
        open_label_set(s3 + "/nothing")
    with pytest.raises(FormatError, match="holds no label set"):
        open_label_set("s3://no-such-bucket-here/labels")
    write_set(tmp_path, SPEC, 2)
    with pytest.raises(TargetError, match="no-such-bucket-here.*is there such a bucket"):
        push(open_label_set(tmp_path), "s3://no-such-bucket-here/labels")
    assert "no-such-bucket-here" not in fsspec.filesystem("s3").ls("")


def test_large_shards_come_in_parts(local, s3, monkeypatch):
    push(open_label_set(local), s3 + "/labels")
    monkeypatch.setattr(storage, "PART_BYTES", 1000)
    labels = open_label_set(s3 + "/labels")
    assert all(labels.read_bytes(index) == open_label_set(local).read_bytes(index) for index in range(SHARDS))
    assert Path(local).is_dir()


def test_a_folder_that_was_pulled_in_part_is_whole_after_a_push(local, tmp_path):
    pull(open_label_set(local), tmp_path / "some", shards="0")
    assert open_label_set(tmp_path / "some").is_partial
    push(open_label_set(local), tmp_path / "some")
    assert not open_label_set(tmp_path / "some").is_partial and len(open_label_set(tmp_path / "some")) == 19
    assert files(tmp_path / "some") == files(local)
