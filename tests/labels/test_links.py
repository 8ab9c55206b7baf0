"""Symbolic links below a label set's folder are refused by name: nothing is read, written or deleted through them."""

import os
import re

import pytest

from stl_offline.errors import FormatError
from stl_offline.labels.convert import convert
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.merge import merge
from stl_offline.labels.store import FolderStorage
from stl_offline.labels.transfer import pull, push
from stl_offline.labels.verify import verify
from stl_offline.labels.writer import LabelSetWriter
from tests.labels.crash import files
from tests.labels.synthetic import make_spec, write_set

SPEC = make_spec(samples=6)
SHARD = "labels-00001-of-00002.zarr.zip"


@pytest.fixture
def labels(tmp_path):
    write_set(tmp_path / "labels", SPEC, 2)
    return tmp_path / "labels"


@pytest.fixture
def elsewhere(tmp_path):
    """A folder of somebody else's, named as a job's own files are."""
    (tmp_path / "elsewhere" / "records").mkdir(parents=True)
    for name in ("precious", ".x.1.tmp", "records/precious", "records/.x.1.tmp"):
        (tmp_path / "elsewhere" / name).write_bytes(b"precious")
    return tmp_path / "elsewhere"


def refused(path):
    return pytest.raises(FormatError, match=f"{re.escape(str(path))} is a symbolic link")


def write(out, labels, other):
    with LabelSetWriter(out, SPEC, 2):
        pass


JOBS = {
    "write": write,
    "pull": lambda out, labels, other: pull(open_label_set(labels), out),
    "convert": lambda out, labels, other: convert(open_label_set(labels), out, encoding="q8"),
    "merge": lambda out, labels, other: merge([open_label_set(labels), open_label_set(other)], out),
}


@pytest.mark.parametrize("link", [".partial", ".partial/records", ".partial/records/00000", ".partial/claims"])
@pytest.mark.parametrize("job", JOBS)
def test_jobs_do_not_follow_a_linked_working_folder(tmp_path, labels, elsewhere, job, link):
    if (job, link) == ("pull", ".partial/claims"):
        pytest.skip("a pull claims nothing")
    write_set(tmp_path / "other", make_spec(samples=4), 1)
    out = tmp_path / "out"
    (out / link).parent.mkdir(parents=True)
    (out / link).symlink_to(elsewhere)
    before = files(elsewhere)
    if job == "merge":
        # Another set of keys is not needed: the folder is looked at before keys are.
        (tmp_path / "other").rename(tmp_path / "unused")
        pull(open_label_set(labels), tmp_path / "other", shards="1")
        (tmp_path / "first").mkdir()
        pull(open_label_set(labels), tmp_path / "first", shards="0")
        labels = tmp_path / "first"
    with refused(out / link):
        JOBS[job](out, labels, tmp_path / "other")
    assert files(elsewhere) == before


def test_a_finished_set_with_a_linked_working_folder(labels, elsewhere):
    (labels / ".partial").symlink_to(elsewhere)
    before = files(elsewhere)
    with refused(labels / ".partial"), LabelSetWriter(labels, SPEC, 2):
        pass
    assert files(elsewhere) == before


@pytest.mark.parametrize("name", ["README.md", SHARD, "manifest.json", "partial.json"])
def test_linked_files_are_never_published(tmp_path, labels, name):
    secret = tmp_path / "secret"
    if (labels / name).exists():
        (labels / name).rename(secret)
    else:
        secret.write_text('{"shards": [0, 1]}')
    (labels / name).symlink_to(secret)
    with refused(labels / name):
        push(open_label_set(labels), tmp_path / "shared")
    shared = tmp_path / "shared"
    assert not (shared / name).exists() and not (shared / "manifest.json").exists()


def test_linked_shards_are_a_fault_and_not_read(tmp_path, labels):
    (labels / SHARD).rename(tmp_path / "shard")
    (labels / SHARD).symlink_to(tmp_path / "shard")
    (fault,) = verify(open_label_set(labels)).faults
    assert fault.startswith(SHARD) and "is a symbolic link" in fault
    with refused(labels / SHARD):
        open_label_set(labels).read_index(1)


def test_the_folder_itself_may_be_a_link(tmp_path, labels):
    (tmp_path / "link").symlink_to(labels)
    assert len(open_label_set(tmp_path / "link")) == 6
    assert pull(open_label_set(labels), tmp_path / "link").kept == 2


def test_no_method_of_a_folder_follows_links(tmp_path, elsewhere):
    storage = FolderStorage(tmp_path / "set")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link").symlink_to(elsewhere)
    before = files(elsewhere)
    for act in (
        lambda: storage.read("link/precious"),
        lambda: storage.size("link/precious"),
        lambda: storage.names("link"),
        lambda: storage.stamps("link"),
        lambda: storage.sizes("link"),
        lambda: storage.write("link/precious", b"x"),
        lambda: storage.create("link/new", b"x"),
        lambda: storage.replace("link/precious", b"x", (elsewhere / "precious").read_bytes()),
        lambda: storage.remove_file("link/precious"),
        lambda: storage.remove_file("link"),
        lambda: storage.remove("link/precious"),
        lambda: storage.remove("link"),
    ):
        with refused(tmp_path / "set" / "link"):
            act()
    assert files(elsewhere) == before


def test_named_pipes_do_not_stop_a_reader(tmp_path):
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(FormatError, match=r"manifest\.json is not a regular file"):
        open_label_set(tmp_path)
