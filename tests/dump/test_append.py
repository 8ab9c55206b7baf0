"""``dump-labels --append``: further shards for further images; what is there stays, byte for byte."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stl_offline.cli.main import main
from stl_offline.config import DumpConfig
from stl_offline.dump import dump_labels, load_labeler
from stl_offline.dump.append import prepare_append
from stl_offline.errors import InputError, JoinError, TargetError
from stl_offline.files import canonical_json
from stl_offline.images.pack import pack
from stl_offline.labels import append
from stl_offline.labels.append import remove_leftovers
from stl_offline.labels.convert import convert
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.store import open_storage, records
from stl_offline.labels.verify import verify
from tests.dump.dumping import command, content
from tests.dump.test_tars import assert_same, files, settings, write_tar  # noqa: F401


@pytest.fixture(scope="module")
def data(files, tmp_path_factory):  # noqa: F811
    """Folders: ``some`` of the images (20) and ``all`` of them (45), whose new ones lie before, between and behind."""
    folder = tmp_path_factory.mktemp("data")
    for number, (name, image) in enumerate(files):
        for root in ["all"] + ["some"] * (number % 9 in (1, 2, 4, 7)):
            path = folder / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
    for root in ("some", "all"):
        pack(folder / root, folder / f"{root}.beton")
    return folder


@pytest.fixture
def started(data, settings, tmp_path):  # noqa: F811
    """A label set of 20 images in 3 shards, and the settings with which 25 are added in 2."""
    config = DumpConfig(**settings | {"batch_size": 1}, data=f"{data}/some.beton", shards=3, out=str(tmp_path / "set"))
    dump_labels(config)
    return replace(config, data=f"{data}/all.beton", shards=2)


def test_only_new_images_are_labelled_and_old_files_stay(started, data, tmp_path):
    before = content(tmp_path / "set")
    report = dump_labels(started, append=True)
    assert (report.samples, report.labelled) == (45, 25)
    after = content(tmp_path / "set")
    old = {name for name in before if name.startswith("labels-")}
    assert {name: after[name] for name in old} == {name: before[name] for name in old}
    assert sorted(after.keys() - before.keys()) == [f"labels-0000{n}-of-00005.zarr.zip" for n in (3, 4)]
    assert json.loads(after["manifest.json"])["shards"][:3] == json.loads(before["manifest.json"])["shards"]
    dump_labels(replace(started, out=str(tmp_path / "whole")))
    whole, ours = open_label_set(tmp_path / "whole"), open_label_set(tmp_path / "set")
    assert set(whole) == set(ours) and len(ours) == 45
    for key, found in ours.items():
        assert_same(found, whole[key])
    assert not verify(ours).faults
    # Nothing is left to do, and nothing changes.
    assert dump_labels(started, append=True).labelled == 0
    assert content(tmp_path / "set") == after
    # A copy in other shards is an ordinary set.
    convert(ours, tmp_path / "copy", shards=4)
    assert len(open_label_set(tmp_path / "copy")) == 45


def test_data_that_lack_old_images_keep_their_labels(started, data, files, tmp_path, caplog):  # noqa: F811
    folder = tmp_path / "new"
    for name, image in files[:6]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image)
    pack(folder, tmp_path / "new.beton", class_names=open_label_set(tmp_path / "set").spec.class_names)
    with caplog.at_level("INFO"):
        report = dump_labels(replace(started, data=str(tmp_path / "new.beton"), shards=1), append=True)
    assert (report.samples, report.labelled) == (23, 3)
    assert "17 images that the label set holds are not in" in caplog.text


def test_changed_images_are_refused(started, data, files, tmp_path):  # noqa: F811
    before = content(tmp_path / "set")
    folder = tmp_path / "changed"
    for name, _ in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(files[1][1] if name == files[2][0] else (data / "all" / name).read_bytes())
    pack(folder, tmp_path / "changed.beton")
    with pytest.raises(JoinError, match="1 image of .*changed.beton has changed since they were labelled") as found:
        dump_labels(replace(started, data=str(tmp_path / "changed.beton")), append=True)
    assert files[2][0] in str(found.value)
    assert content(tmp_path / "set") == before


def test_images_with_other_classes_are_refused(started, data, tmp_path):
    """The folders are named anew, so that the same images have the classes in another order."""
    before = content(tmp_path / "set")
    flat, names = tmp_path / "flat", sorted(path.name for path in (data / "all").iterdir())
    rotated = dict(zip(names, names[1:] + names[:1], strict=True))
    for path in (data / "all").rglob("*.*g"):
        name = path.relative_to(data / "all")
        (flat / name).parent.mkdir(parents=True, exist_ok=True)
        (flat / name).write_bytes(path.read_bytes())
    (tmp_path / "map.json").write_text(json.dumps(rotated))
    changed = replace(started, data=str(flat), class_map=str(tmp_path / "map.json"))
    with pytest.raises(JoinError, match="20 images of .*flat have got other classes since they were labelled"):
        dump_labels(changed, append=True)
    assert content(tmp_path / "set") == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"top_k": 1}, "top_k is 1 and 2"), ({"batch_size": 2}, "creation.batch_size is 2 and 1"), ({"shards": 26}, "26")],
)
def test_other_settings_are_refused(started, changes, words):
    with pytest.raises((TargetError, InputError), match=words):
        dump_labels(replace(started, **changes), append=True)


def test_there_must_be_a_set(started, tmp_path, capsys):
    work = {"data": started.data, "labeler": started.labeler, "top_k": 2}
    assert main(command(work, tmp_path / "none", 1, "--append")[3:]) == 1
    assert "no complete label set at" in capsys.readouterr().err
    assert main(command(work, tmp_path / "none", 1, "--append", "--estimate")[3:]) == 2


def test_a_kill_and_several_workers(started, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "BLOCK_SHARDS", 2)  # the old shards are 0, 1 and 2
    undisturbed = tmp_path / "undisturbed"
    for name, data in content(tmp_path / "set").items():
        (undisturbed / name).parent.mkdir(exist_ok=True)
        (undisturbed / name).write_bytes(data)
    dump_labels(replace(started, out=str(undisturbed)), append=True)
    work = prepare_append(started, load_labeler(started), torch.device("cpu"))
    with work.open_writer() as writer:
        assert writer.unrecorded() == [3, 4]
        writer.write_shard(4, work.label_shard(writer, 4, lambda done: None))
    # What a late worker of the job before wrote is not taken over.
    open_storage(tmp_path / "set").write(".partial/claims/00001-0", b"")
    # The set is whole for readers all the time; others cannot begin to add other images.
    assert len(open_label_set(tmp_path / "set")) == 20
    with pytest.raises(TargetError, match="shards is 4 and 5"):
        dump_labels(replace(started, shards=1), append=True)
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda _: dump_labels(started, append=True), range(2)))
    assert {report.samples for report in reports} == {45} and 12 <= sum(each.labelled for each in reports) <= 26
    assert content(tmp_path / "set") == content(undisturbed)


def test_an_append_that_was_begun_can_be_given_up(started, tmp_path):
    """By what the message says, from which the same images in other shards are added as by a first append."""
    work = prepare_append(started, load_labeler(started), torch.device("cpu"))
    with work.open_writer() as writer:
        writer.write_shard(4, work.label_shard(writer, 4, lambda done: None))
    other = replace(started, shards=1)
    with pytest.raises(TargetError) as raised:
        dump_labels(other, append=True)
    place = tmp_path / "set"
    assert str(raised.value).startswith(f"an append to {place} has begun and not ended, of other images or settings")
    assert str(raised.value).endswith(
        "shards is 4 and 5; go on with the same ones, or give that append up: remove .partial and "
        "labels-00004-of-00005.zarr.zip, which manifest.json does not name"
    )
    for name in (".partial", "labels-00004-of-00005.zarr.zip"):
        open_storage(place).remove(name)
    assert dump_labels(other, append=True).labelled == 25
    assert not verify(open_label_set(place)).faults and len(open_label_set(place)) == 45


def test_a_worker_that_was_suspended_changes_nothing(started, tmp_path):
    """Its late manifest meets another one than that with which it began."""
    late = prepare_append(replace(started, shards=1), load_labeler(started), torch.device("cpu"))
    with late.open_writer() as writer:
        arrays = late.label_shard(writer, 3, lambda done: None)
        writer.write_shard(3, arrays)
        manifest = writer._manifest(writer._read_records())
        open_storage(tmp_path / "set").remove(".partial")
        dump_labels(started, append=True)
        after = content(tmp_path / "set")
        with pytest.raises(TargetError, match="has changed since this began to append"):
            writer._store(manifest)
    now = content(tmp_path / "set")
    assert {name: now.get(name) for name in after} == after


def test_what_a_finished_append_left_is_removed(started, tmp_path):
    """A process that was killed after it had replaced the manifest leaves its job."""
    job = tmp_path / "set" / ".partial" / "job.json"
    work = prepare_append(started, load_labeler(started), torch.device("cpu"))
    with work.open_writer():
        text = job.read_bytes()
    dump_labels(started, append=True)
    job.parent.mkdir()
    job.write_bytes(text)
    new = Path(started.data).parent / "some.beton"
    assert dump_labels(replace(started, data=str(new)), append=True).labelled == 0
    assert len(open_label_set(tmp_path / "set")) == 45 and not job.parent.exists()
    assert dump_labels(replace(started, data=str(new)), append=True, finish=True).was_complete
    # Also where the kill came while they were removed.
    (job.parent / "records").mkdir(parents=True)
    assert dump_labels(started, append=True).labelled == 0 and not job.parent.exists()


@pytest.mark.parametrize("edited", [False, True])
def test_a_kill_between_manifest_and_card(started, data, tmp_path, monkeypatch, edited):
    card = tmp_path / "set" / "README.md"
    if edited:
        card.write_text("by its publisher")
    else:
        dump_labels(replace(started, out=str(tmp_path / "other"), data=f"{data}/some.beton", shards=3))
        dump_labels(replace(started, out=str(tmp_path / "other")), append=True)
    with monkeypatch.context() as patch:
        patch.setattr(append, "_write_card", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            dump_labels(started, append=True)
    assert len(open_label_set(tmp_path / "set")) == 45
    assert dump_labels(started, append=True).labelled == 0
    if edited:
        assert card.read_text() == "by its publisher"
    else:
        assert content(tmp_path / "set") == content(tmp_path / "other")
    assert not (tmp_path / "set" / ".partial").exists()


def test_a_job_that_begins_meanwhile_is_no_leftover(started, tmp_path, monkeypatch):
    """Between the look for a job's settings and the look for other files, another worker writes both."""
    base = open_label_set(tmp_path / "set")
    work, names = prepare_append(started, load_labeler(started), torch.device("cpu")), type(base.storage).names
    began = []

    def begin(self, folder=""):
        if folder == ".partial" and not began:
            began.append(folder)
            work.open_writer().__enter__()
        return names(self, folder)

    monkeypatch.setattr(type(base.storage), "names", begin)
    remove_leftovers(base)
    assert began and (tmp_path / "set" / ".partial" / "job.json").exists()


def test_a_job_that_goes_on_is_no_leftover(started, tmp_path):
    work = prepare_append(started, load_labeler(started), torch.device("cpu"))
    with work.open_writer() as writer:
        writer.write_shard(4, work.label_shard(writer, 4, lambda done: None))
        some = Path(started.data).parent / "some.beton"
        assert dump_labels(replace(started, data=str(some)), append=True).labelled == 0
        assert writer.unrecorded() == [3]


def test_a_worker_that_ends_late_leaves_the_next_job_alone(started, tmp_path):
    """It finds its own append complete when the next one has begun, whose files have the same names."""
    late = prepare_append(started, load_labeler(started), torch.device("cpu"))
    with late.open_writer() as writer:
        dump_labels(started, append=True)
        assert not writer.complete
        base = open_label_set(tmp_path / "set")
        job = tmp_path / "set" / ".partial" / "job.json"
        job.parent.mkdir()
        job.write_bytes(canonical_json({"after": base.fingerprint}))
        assert writer._is_finished()
    assert json.loads(job.read_bytes()) == {"after": base.fingerprint}


def test_a_worker_that_read_the_old_manifest_leaves_no_job_behind(started, tmp_path, monkeypatch):
    """Another one finishes the append between its look at the manifest and its look at the job."""
    late = prepare_append(started, load_labeler(started), torch.device("cpu"))
    with late.open_writer() as writer:
        read = append.read_manifest

        def read_and_finish(storage):
            found = read(storage)
            monkeypatch.undo()
            dump_labels(started, append=True)
            return found

        monkeypatch.setattr(append, "read_manifest", read_and_finish)
        assert list(writer.claim_shards()) == [] and writer.complete
    assert len(open_label_set(tmp_path / "set")) == 45 and not (tmp_path / "set" / ".partial").exists()


def test_the_first_job_again_leaves_an_append_alone(started, tmp_path):
    """The set is complete for it, and what lies in `.partial/` is another's."""
    work = prepare_append(started, load_labeler(started), torch.device("cpu"))
    some = Path(started.data).parent / "some.beton"
    with work.open_writer() as writer:
        writer.write_shard(4, work.label_shard(writer, 4, lambda done: None))
        assert dump_labels(replace(started, data=str(some), shards=3)).labelled == 0
        assert writer.unrecorded() == [3]


def test_an_append_whose_job_is_gone_goes_on(started, tmp_path):
    """Removed as a leftover in the moment in which it was written: it is written again, and nothing twice."""
    work = prepare_append(started, load_labeler(started), torch.device("cpu"))
    job = tmp_path / "set" / ".partial" / "job.json"
    labelled = []
    with work.open_writer() as writer:
        text = job.read_bytes()
        for shard in writer.claim_shards():
            if not labelled:
                job.unlink()
                assert not writer._is_finished() and job.read_bytes() == text
            labelled.append(shard)
            writer.write_shard(shard, work.label_shard(writer, shard, lambda done: None))
        writer.finish()
    assert sorted(labelled) == [3, 4] and not job.parent.exists()


def test_tars_that_are_new(files, settings, tmp_path, caplog):  # noqa: F811
    for number, part in enumerate((files[:10], files[10:13], files[13:30], files[30:])):
        write_tar(tmp_path / f"{number}.tar", part)
    config = DumpConfig(**settings, data=f"{tmp_path}/{{0..1}}.tar", out=str(tmp_path / "set"))
    dump_labels(config)
    before = content(tmp_path / "set")
    report = dump_labels(replace(config, data=f"{tmp_path}/{{0..3}}.tar"), append=True)
    assert (report.samples, report.labelled) == (45, 32)
    after, ours = content(tmp_path / "set"), open_label_set(tmp_path / "set")
    assert all(after[name] == data for name, data in before.items() if name.startswith("labels-"))
    assert [shard.images for shard in ours.shards] == [f"{number}.tar" for number in range(4)]
    assert [shard.name[7:21] for shard in ours.shards] == [
        *("00000-of-00002", "00001-of-00002", "00002-of-00004", "00003-of-00004")
    ]
    # The same images have the same labels and the same fingerprint as in a set that was made at once.
    dump_labels(replace(config, data=f"{tmp_path}/{{0..3}}.tar", out=str(tmp_path / "whole")))
    whole = open_label_set(tmp_path / "whole")
    assert whole.spec == ours.spec
    assert [shard.sha256 for shard in whole.shards] == [shard.sha256 for shard in ours.shards]
    assert dump_labels(replace(config, data=f"{tmp_path}/{{2..3}}.tar"), append=True).labelled == 0
    # A key that the set holds already.
    write_tar(tmp_path / "4.tar", files[12:13])
    with pytest.raises(JoinError, match="1 key is in these tars twice .* in 1.tar and 4.tar"):
        dump_labels(replace(config, data=f"{tmp_path}/{{3..4}}.tar"), append=True)
    assert len(open_label_set(tmp_path / "set")) == 45
    # Further tars: refused as long as what that append wrote is there.
    for number in (5, 6):
        write_tar(tmp_path / f"{number}.tar", [(f"vertical/new{number}.jpg", files[12][1])])
    further = replace(config, data=f"{tmp_path}/{{5..6}}.tar")
    with pytest.raises(TargetError, match="data is 6 tars and 5; .* and labels-00004-of-00005.zarr.zip, which"):
        dump_labels(further, append=True)
    for name in (".partial", "labels-00004-of-00005.zarr.zip"):
        open_storage(tmp_path / "set").remove(name)
    assert dump_labels(further, append=True).labelled == 2


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_file_is_replaced_only_in_place_of_the_expected_one(kind, tmp_path, request):
    place = tmp_path if kind == "folder" else request.getfixturevalue("s3")
    storage = open_storage(f"{place}/set")
    with pytest.raises(FileNotFoundError):
        storage.replace("x.json", b"new", b"old")
    storage.write("x.json", b"0")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda word: storage.replace("x.json", word, b"0"), [b"%d" % n for n in range(1, 9)]))
    assert set(found) == {storage.read("x.json")} and storage.read("x.json") != b"0"
    assert storage.replace("x.json", b"9", b"0") == found[0]
