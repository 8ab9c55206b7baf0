"""``dump-labels`` of tars, streamed from this machine, web servers and object stores: as a dump of packed images."""

import gzip
import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from stl_offline import remote
from stl_offline.cli.main import main
from stl_offline.config import DumpConfig
from stl_offline.dump import Labelling, dump_labels, estimate_dump, load_labeler
from stl_offline.dump import tars as dump_tars
from stl_offline.errors import InputError, JoinError, TargetError
from stl_offline.images import tar_stream
from stl_offline.images.beton import open_beton
from stl_offline.images.pack import pack
from stl_offline.labels.format import decode_shard, encode_shard
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.transfer import push
from stl_offline.labels.verify import verify
from tests.dump.dumping import content
from tests.web_files import WebFiles, running


def write_tar(path: Path, members, *, cut: int | None = None) -> Path:
    """A tar of (name, bytes); with ``cut``, it ends so many bytes before the end of its last member."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        end = tar.offset
    path.write_bytes(stream.getvalue()[: None if cut is None else end - cut])
    return path


@pytest.fixture(scope="session")
def files(work):
    """The images of ``work``: (name, bytes), sorted."""
    root = Path(work["data"].removesuffix(".beton"))
    return [(str(path.relative_to(root)), path.read_bytes()) for path in sorted(root.rglob("*.*g"))]


@pytest.fixture(scope="session")
def tars(files, tmp_path_factory):
    """Three tars of 15 images each, and the settings of a dump of them."""
    folder = tmp_path_factory.mktemp("tars")
    assert len(files) == 45
    for number in range(3):
        write_tar(folder / f"train-{number:04d}.tar", files[15 * number : 15 * number + 15])
    return folder


@pytest.fixture(scope="session")
def settings(work):
    return {name: value for name, value in work.items() if name not in ("data", "shards")} | {"batch_size": 4}


@pytest.fixture(scope="session")
def streamed(tars, settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("streamed") / "set"
    dump_labels(DumpConfig(**settings, data=f"{tars}/train-{{0000..0002}}.tar", out=str(out)))
    return out


@pytest.fixture(scope="session")
def packed(tars, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "all.beton"
    pack(f"{tars}/train-{{0000..0002}}.tar", path)
    return path


def test_shards_are_those_of_the_packed_images(streamed, packed, settings, tmp_path):
    """Tars of equal size whose keys are in order are divided as three shards of the packed file are."""
    dump_labels(DumpConfig(**settings, data=str(packed), shards=3, out=str(tmp_path / "set")))
    ours, theirs = content(streamed), content(tmp_path / "set")
    assert {name: data for name, data in ours.items() if "labels" in name} == {
        name: data for name, data in theirs.items() if "labels" in name
    }
    assert len(ours) == 5
    entries, other = json.loads(ours["manifest.json"]), json.loads(theirs["manifest.json"])
    assert [shard.pop("images") for shard in entries["shards"]] == [f"train-{number:04d}.tar" for number in range(3)]
    assert entries["source"].pop("fingerprint") != other["source"].pop("fingerprint")
    assert entries == other


@pytest.mark.parametrize("ranges", [True, False])
def test_web_servers_and_connections_that_break(tars, streamed, settings, tmp_path, monkeypatch, ranges):
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    with running(WebFiles(tars, ranges=ranges)) as server:
        # The first answer is for the look at the first image; those of two tars break, one of them twice.
        server.cuts = [10**9, 700, 300, 10**9, 2000]
        config = DumpConfig(
            **settings, data=f"{server.url}/train-{{0000..0002}}.tar?key=secret", out=str(tmp_path / "set")
        )
        dump_labels(config)
    assert content(tmp_path / "set") == content(streamed)
    gets = [(path, part) for method, path, part in server.asked if method == "GET"]
    assert not server.cuts and len(gets) == 1 + 3 + 3
    assert sum(part is not None for _, part in gets) == 3


def test_an_s3_bucket(tars, streamed, settings, s3):
    files = fsspec.filesystem("s3")
    for path in tars.iterdir():
        files.put_file(str(path), f"{s3}/images/{path.name}")
    dump_labels(DumpConfig(**settings, data=f"{s3}/images/train-*.tar", out=f"{s3}/labels"))
    names = {name.rpartition("/")[2] for name in files.ls(f"{s3}/labels")}
    assert {name: files.cat_file(f"{s3}/labels/{name}") for name in names} == content(streamed)


# The client hands bytes to httpx in a way that httpx no longer wants.
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_repository_of_the_hub(tars, streamed, settings, hub, tmp_path):
    for path in tars.iterdir():
        hub.files[f"images/{path.name}"] = path.read_bytes()
    place = "hf://datasets/user/labels/images/train-{0000..0002}.tar"
    dump_labels(DumpConfig(**settings, data=place, out=str(tmp_path / "set")))
    assert content(tmp_path / "set") == content(streamed)


@pytest.mark.parametrize(("protocol", "package", "extra"), [("gs", "gcsfs", "gs"), ("hf", "huggingface_hub", "hf")])
def test_tars_of_a_store_whose_package_is_missing(settings, tmp_path, monkeypatch, capsys, protocol, package, extra):
    def refuse(*_, **__):
        raise ImportError(f"Install {package} to access this")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    line = ["dump-labels", *words, "--data", f"{protocol}://b/{{0..2}}.tar", "--out", str(tmp_path / "set")]
    assert main(line) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {protocol}://b/0.tar needs a package that is not installed")
    assert f"pip install 'stl-offline[{extra}]' (or {package})" in error


def test_compressed_tars(tars, streamed, settings, tmp_path):
    for path in sorted(tars.glob("*.tar")):
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    dump_labels(DumpConfig(**settings, data=f"{tmp_path}/*.tar.gz", out=str(tmp_path / "set")))
    ours, theirs = content(tmp_path / "set"), content(streamed)
    theirs["manifest.json"] = theirs["manifest.json"].replace(b'.tar"', b'.tar.gz"')
    assert ours == theirs


def test_order_and_keys_are_those_of_the_tar(files, packed, settings, tmp_path):
    """Records per key are those of the packed images, whatever the order and the sizes of the tars."""
    shuffled = [files[place] for place in np.random.default_rng(0).permutation(len(files))]
    for number, part in enumerate((shuffled[:7], shuffled[7:30], shuffled[30:])):
        write_tar(tmp_path / f"{number}.tar", part)
    one = settings | {"batch_size": 1}  # a batch of other images may round otherwise
    dump_labels(DumpConfig(**one, data=f"{tmp_path}/{{0..2}}.tar", out=str(tmp_path / "set")))
    dump_labels(DumpConfig(**one, data=str(packed), shards=4, out=str(tmp_path / "packed")))
    ours, theirs = open_label_set(tmp_path / "set"), open_label_set(tmp_path / "packed")
    assert list(ours) == [name.rpartition(".")[0] for name, _ in shuffled]
    assert [shard.samples for shard in ours.shards] == [7, 23, 15]
    assert len(theirs) == len(ours)
    for key, found in ours.items():
        assert_same(found, theirs[key])
    assert not verify(ours).faults


def assert_same(found, expected):
    for name in ("key", "content_hash", "class_id"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("views", "class_ids", "logits", "confidence"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


def test_crops_are_those_of_their_views_and_of_the_image(files, packed, settings, tmp_path):
    """The views of an image depend on its content alone, and a packed file gives the same labels under them."""
    crops = settings | {"crops_per_image": 3, "batch_size": 1, "draws": 2}
    for number, part in enumerate((files[:20], files[20:])):
        write_tar(tmp_path / f"{number}.tar", part)
        write_tar(tmp_path / f"other-{number}.tar", (files[:3] + files[20:], files[3:20])[number])
    for name in ("", "other-"):
        dump_labels(DumpConfig(**crops, data=f"{tmp_path}/{name}{{0..1}}.tar", out=str(tmp_path / f"{name}set")))
    ours, other = open_label_set(tmp_path / "set"), open_label_set(tmp_path / "other-set")
    config = DumpConfig(**crops, data=str(packed), out="")
    labelling = Labelling(config, load_labeler(config), open_beton(packed), torch.device("cpu"))
    views = np.stack([ours[key].views for key in labelling.beton.keys])
    assert len(np.unique(views.reshape(-1, 6), axis=0)) > 120
    labelling.views = np.ascontiguousarray(views.transpose(1, 0, 2))
    again = labelling.label(np.arange(45), lambda done: None)
    encoded = decode_shard(encode_shard(again, labelling.spec), labelling.spec)
    for row, key in enumerate(again.keys):
        assert_same(ours[key], encoded.label_map(row, labelling.spec))
        assert_same(ours[key], other[key])
        assert np.array_equal(ours[key].draws, other[key].draws)


class TestBrokenImages:
    @pytest.fixture
    def broken(self, files, tmp_path):
        members = files[:6] + [("diagonal/z.jpg", files[0][1][:-200]), ("note.txt", b"no image")]
        write_tar(tmp_path / "0.tar", members)
        write_tar(tmp_path / "1.tar", files[6:12])
        return f"{tmp_path}/{{0..1}}.tar"

    def test_they_end_the_dump(self, broken, settings, tmp_path):
        with pytest.raises(InputError, match=r"'diagonal/z' of .*0.tar is cut off .*`skip_broken`"):
            dump_labels(DumpConfig(**settings, data=broken, out=str(tmp_path / "set")))

    def test_they_are_left_out_and_named(self, broken, settings, tmp_path, caplog):
        dump_labels(DumpConfig(**settings, data=broken, out=str(tmp_path / "set"), skip_broken=True))
        assert len(open_label_set(tmp_path / "set")) == 12
        assert any("left out diagonal/z of" in text and "0.tar" in text for text in caplog.messages)
        assert any("passed over 1 file of" in text for text in caplog.messages)

    def test_nothing_but_broken_images(self, settings, tmp_path):
        for number in range(2):
            write_tar(tmp_path / f"{number}.tar", [(f"diagonal/{number}.jpg", b"\xff\xd8\xff")])
        with pytest.raises(InputError, match=r"0.tar has no image that can be used"):
            config = DumpConfig(**settings, data=f"{tmp_path}/{{0..1}}.tar", out=str(tmp_path / "set"))
            dump_labels(replace(config, skip_broken=True))


class TestClasses:
    def test_numbers_are_named_by_a_map(self, files, streamed, settings, tmp_path):
        labels = open_label_set(streamed)
        numbers = {name: str(number + 5) for number, name in enumerate(labels.spec.class_names)}
        (tmp_path / "names.txt").write_text("".join(f"{number} {name}\n" for name, number in numbers.items()))
        for part in range(3):
            members = []
            for name, data in files[15 * part : 15 * part + 15]:
                folder, _, base = name.partition("/")
                stem = f"flat/{folder}-{base.rpartition('.')[0]}"
                members += [(f"{stem}.cls", numbers[folder].encode()), (f"{stem}.{base.rpartition('.')[2]}", data)]
            write_tar(tmp_path / f"{part}.tar", members)
        config = DumpConfig(**settings, data=f"{tmp_path}/{{0..2}}.tar", out=str(tmp_path / "set"))
        with pytest.raises(
            JoinError, match=r"the class '5' of .*0.tar is not among the 3 of the labeler .*`class_map`"
        ):
            dump_labels(config)
        assert not (tmp_path / "set").exists()
        dump_labels(replace(config, class_map=str(tmp_path / "names.txt")))
        ours = open_label_set(tmp_path / "set")
        assert [one.class_id for one in ours.values()] == [one.class_id for one in labels.values()]

    def test_images_without_classes(self, files, settings, tmp_path):
        for part in range(2):
            write_tar(tmp_path / f"{part}.tar", [(f"train/{part}{i}.jpg", files[15 * part + i][1]) for i in range(4)])
        config = DumpConfig(**settings, data=f"{tmp_path}/{{0..1}}.tar", out=str(tmp_path / "set"))
        dump_labels(config)
        assert not open_label_set(tmp_path / "set").spec.has_own_classes
        write_tar(tmp_path / "1.tar", files[:3])
        with pytest.raises(JoinError, match=r"1.tar: '.*' has a class, other than the first image"):
            dump_labels(replace(config, out=str(tmp_path / "other")))


class TestHostile:
    def dump(self, settings, tmp_path, members, **more):
        write_tar(tmp_path / "1.tar", members, **more)
        dump_labels(DumpConfig(**settings, data=f"{tmp_path}/{{0..1}}.tar", out=str(tmp_path / "set")))

    @pytest.fixture(autouse=True)
    def first(self, files, tmp_path):
        write_tar(tmp_path / "0.tar", files[:4])

    def test_a_key_in_two_tars(self, files, settings, tmp_path):
        with pytest.raises(JoinError, match=r"1 key is in these tars twice \(.* in 0.tar and 1.tar\)"):
            self.dump(settings, tmp_path, files[3:6])
        assert not (tmp_path / "set" / "manifest.json").exists()

    def test_a_key_twice_in_one(self, files, settings, tmp_path):
        with pytest.raises(InputError, match=r"1.tar: the members of '.*' do not lie next to each other, or"):
            self.dump(settings, tmp_path, files[5:7] + files[5:6])

    @pytest.mark.parametrize("cut", [0, 1, 512, 900])
    def test_a_tar_that_is_cut_off(self, files, settings, tmp_path, cut):
        with pytest.raises(InputError, match=r"1.tar is (no whole tar|cut off)") as found:
            self.dump(settings, tmp_path, files[5:30], cut=cut)
        assert "\n" not in str(found.value)

    def test_names_that_lead_out(self, files, settings, tmp_path):
        with pytest.raises(InputError, match=r"1.tar: the member name '\.\./x.jpg' points out"):
            self.dump(settings, tmp_path, [("../x.jpg", files[0][1])])

    def test_two_tars_of_one_name(self, files, settings, tmp_path):
        (tmp_path / "a").mkdir()
        write_tar(tmp_path / "a" / "0.tar", files[5:7])
        with pytest.raises(InputError, match=r"2 of the tars are called '0.tar'"):
            dump_labels(DumpConfig(**settings, data=f"{tmp_path}/{{a/,}}0.tar", out=str(tmp_path / "set")))

    def test_an_image_that_is_far_too_large(self, settings, files, tmp_path, monkeypatch):
        monkeypatch.setattr(tar_stream, "_MOST_IMAGE_BYTES", 20_000)
        with pytest.raises(InputError, match=r"'diagonal/big' of .*1.tar has 30,000 bytes, over the 20,000"):
            self.dump(settings, tmp_path, [("diagonal/big.jpg", b"\xff\xd8\xff" + bytes(29_997))])

    def test_a_tar_of_too_many_images_for_a_shard(self, files, settings, tmp_path, monkeypatch):
        monkeypatch.setattr(dump_tars, "_MOST_MAPS", 10)
        with pytest.raises(InputError, match=r"1.tar holds more than 10 images, too many for one shard; give `shards`"):
            self.dump(settings, tmp_path, files[5:30])


def test_an_estimate_reads_the_first_images_and_writes_nothing(files, settings, tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", files[15 * number : 15 * number + 15])
    with running(WebFiles(tmp_path, ranges=True)) as server:
        found = estimate_dump(DumpConfig(**settings, data=f"{server.url}/{{0..2}}.tar", out="memory://none/set"))
    assert found.images == pytest.approx(45, rel=0.35) and found.shards == 3 and found.measured == 15
    assert found.read_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert found.requests == 30 + 3
    assert found.hours[8] == found.hours[64] == pytest.approx(found.hours[1] / 3)
    assert {path for method, path, _ in server.asked if method == "GET"} == {"/0.tar"}


class TestJobs:
    def test_several_workers_a_kill_and_other_tars(self, tars, streamed, settings, tmp_path, capsys):
        """What is done stays; other tars for the same place are refused by name."""
        config = DumpConfig(**settings, data=f"{tars}/train-{{0000..0002}}.tar", out=str(tmp_path / "set"))
        work = dump_tars.prepare(config, load_labeler(config), torch.device("cpu"))
        with work.open_writer() as writer:
            writer.write_shard(1, work.label_shard(writer, 1, lambda done: None))
            with pytest.raises(TargetError, match="2 of 3 shards"):
                dump_labels(config, finish=True)
            with pytest.raises(TargetError, match="data is 2 tars and 3"):
                dump_labels(replace(config, data=f"{tars}/train-{{0000..0001}}.tar"))
        with ThreadPoolExecutor(2) as pool:
            assert sum(report.labelled for report in pool.map(dump_labels, [config, config])) >= 30
        assert content(tmp_path / "set") == content(streamed)
        assert dump_labels(config).labelled == 0
        with pytest.raises(TargetError, match=r"data has the tar train-0001.tar and train-0000.tar"):
            dump_labels(replace(config, data=f"{tars}/train-000{{1,0,2}}.tar"))

    @pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # as above
    def test_other_tars_of_the_same_names(self, files, settings, hub, tmp_path):
        """Known by their first image, in a set that is complete, is being written, grows, or is on the hub."""
        for folder, start in (("ours", 0), ("theirs", 20)):
            (tmp_path / folder).mkdir()
            for number in range(2):
                first = start + 4 * number
                write_tar(tmp_path / folder / f"{number}.tar", files[first : first + 4])
        config = DumpConfig(**settings, data=f"{tmp_path}/ours/{{0..1}}.tar", out=str(tmp_path / "set"))
        other = replace(config, data=f"{tmp_path}/theirs/{{0..1}}.tar")
        work = dump_tars.prepare(config, load_labeler(config), torch.device("cpu"))
        with work.open_writer() as writer:
            writer.write_shard(0, work.label_shard(writer, 0, lambda done: None))
            with pytest.raises(TargetError, match=r"set holds the labels of another tar of the name 0.tar: the first"):
                dump_labels(other)
        dump_labels(config)
        before = content(tmp_path / "set")
        push(open_label_set(config.out), "hf://datasets/user/labels")
        assert dump_labels(replace(config, out="hf://datasets/user/labels")).labelled == 0
        with pytest.raises(TargetError, match=r"hf://datasets/user/labels holds the labels of another tar of the name"):
            dump_labels(replace(other, out="hf://datasets/user/labels"))
        for append in (False, True):
            with pytest.raises(TargetError, match=r"another tar of the name 0.tar: the first image of yours, '.*', is"):
                dump_labels(other, append=append)
        assert content(tmp_path / "set") == before and dump_labels(config).labelled == 0

    def test_another_class_map_is_refused(self, files, settings, tmp_path):
        """A tar is known by its name, so the map is what tells the classes of two jobs apart."""
        for number in range(2):
            write_tar(tmp_path / f"{number}.tar", files[20 * number : 20 * number + 4])
        names = sorted({name.partition("/")[0] for name, _ in files})
        (tmp_path / "other.json").write_text(json.dumps(dict(zip(names, names[1:] + names[:1], strict=True))))
        config = DumpConfig(**settings, data=f"{tmp_path}/{{0..1}}.tar", out=str(tmp_path / "set"))
        dump_labels(config)
        other = replace(config, class_map=str(tmp_path / "other.json"))
        for append in (False, True):
            with pytest.raises(TargetError, match=r"creation.class_map is .* and null"):
                dump_labels(other, append=append)

    def test_shards_pack_them_as_before(self, tars, packed, settings, tmp_path, monkeypatch):
        monkeypatch.setenv("STL_OFFLINE_CACHE", str(tmp_path / "cache"))
        more = settings | {"shards": 2}
        dump_labels(DumpConfig(**more, data=f"{tars}/train-*.tar", out=str(tmp_path / "set")))
        dump_labels(DumpConfig(**more, data=str(packed), out=str(tmp_path / "packed")))
        assert content(tmp_path / "set") == content(tmp_path / "packed")

    def test_a_tar_on_this_machine_alone_is_packed(self, tars, settings, tmp_path, monkeypatch):
        monkeypatch.setenv("STL_OFFLINE_CACHE", str(tmp_path / "cache"))
        dump_labels(DumpConfig(**settings, data=f"{tars}/train-0000.tar", out=str(tmp_path / "set")))
        assert len(list((tmp_path / "cache" / "betons").glob("*.beton"))) == 1
