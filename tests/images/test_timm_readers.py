"""timm's readers: its folders and tars, torchvision's, and fakes of those that would need a network."""

import gc
import io
import multiprocessing
import tarfile

import numpy as np
import pytest
from PIL import Image

from stl_offline.errors import InputError
from stl_offline.images import timm_readers
from stl_offline.images.encode import encode_image
from stl_offline.images.sources import listed as every
from stl_offline.images.sources import open_source
from stl_offline.pixels import ImageError


def listed(source):
    return [(image.key, source.class_names[image.class_id]) for image in source]


def test_timms_folder_reader(cats_and_dogs):
    source = open_source(f"timm:folder?root={cats_and_dogs}")
    assert source.class_names == ("cat", "dog") and len(source) == 6
    assert listed(source)[0] == ("cat/cat-0.jpg", "cat") and listed(source)[5] == ("dog/dog-2.jpg", "dog")
    assert next(iter(source)).data == (cats_and_dogs / "cat/cat-0.jpg").read_bytes()
    assert [image.data for image in source] == [image.data for image in open_source(cats_and_dogs)]


@pytest.mark.filterwarnings("ignore:.*x.tar:pytest.PytestUnraisableExceptionWarning")  # timm leaves its tar open
def test_timms_tar_reader(cats_and_dogs, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(cats_and_dogs, "pets")
    source = open_source(f"timm:tar?root={tmp_path / 'x.tar'}")
    assert listed(source)[:1] == [("pets/cat/cat-0.jpg", "cat")]
    assert next(iter(source)).data == (cats_and_dogs / "cat/cat-0.jpg").read_bytes()


def test_torchvisions_images_keep_their_pixels(cats_and_dogs):
    source = open_source(f"torch/image_folder?root={cats_and_dogs}")
    assert source.class_names == ("cat", "dog")
    assert [key for key, _ in listed(source)] == [f"{number:08d}" for number in range(6)]
    for image, path in zip(source, sorted(cats_and_dogs.rglob("*.jpg")), strict=True):
        encoded = encode_image(image.data)
        with Image.open(path) as opened:
            expected = np.asarray(opened.convert("RGB"))
        pixels = np.frombuffer(encoded.data, np.uint8).reshape(encoded.height, encoded.width, 3)
        assert (pixels == expected).all()


class FakeReader:
    """As timm's readers of remote data are: random access or not, names or not."""

    def __init__(self, items, names=None, class_to_idx=None):
        self.items, self.names = items, names
        self.class_to_idx = class_to_idx or {}

    def __len__(self):
        return len(self.items)

    def __iter__(self):
        return iter(self.items)

    def filenames(self, basename=False, absolute=False):
        if self.names is None:
            raise NotImplementedError("no names here")
        return self.names


@pytest.fixture
def fake(monkeypatch, photo, file_bytes):
    """Opens a source on a fake reader of as many images as there are targets."""
    asked = []

    def make(targets, class_names=None, **settings):
        items = [(io.BytesIO(file_bytes(photo(seed=number))), target) for number, target in enumerate(targets)]
        reader = FakeReader(items, **settings)
        monkeypatch.setattr(timm_readers, "create_reader", lambda *words, **options: asked.append(options) or reader)
        return open_source("hfds/some/set?split=val&input_key=img&download=no", class_names)

    make.asked = asked
    return make


@pytest.fixture
def samples(photo, file_bytes):
    """Members of a webdataset tar of four images, from a number on."""
    return lambda first: [
        member
        for number in range(first, first + 4)
        for member in ((f"{number}.cls", b"%d" % (number % 2)), (f"{number}.jpg", file_bytes(photo(seed=number))))
    ]


@pytest.fixture
def write_tars(tmp_path, samples):
    """write_tars(change) → words for a reader of two such tars, of which the second has ``change(bytes)``."""

    def write(change=lambda data: data):
        for number in range(2):
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode="w") as tar:
                for name, data in samples(4 * number):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
            data = stream.getvalue()
            (tmp_path / f"{number}.tar").write_bytes(change(data) if number else data)
        return f"wds/x?root={tmp_path}&split={{0..1}}.tar"

    return write


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its tars open
class TestWebdatasets:
    def test_all_images_whatever_process_asks(self, write_tars, monkeypatch):
        """timm's reader gives each process of a job a part; here every process packs all of them."""
        words = write_tars() + "|8"
        alone = listed(open_source(words))
        assert [int(key.partition(".")[0]) for key, _ in alone] == list(range(8))
        for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_rank", 1)):
            monkeypatch.setattr(f"torch.distributed.{name}", lambda value=value: value)
        assert listed(open_source(words)) == alone

    @pytest.mark.parametrize(("count", "given"), [(5, 8), (9, 8), (1, 8)])
    def test_another_number_than_announced(self, write_tars, count, given):
        with pytest.raises(InputError, match=rf"announces {count} images and gives {given}: timm leaves out"):
            list(open_source(f"{write_tars()}|{count}"))

    @pytest.mark.parametrize(
        "change", [lambda data: data[: len(data) // 2], lambda data: data.replace(b"\xff\xd8\xff", b"no image")]
    )
    def test_damage_that_timm_passes_over(self, write_tars, change):
        with pytest.raises(InputError, match=r"announces 8 images and gives [4-7]: .*; give tars themselves"):
            list(open_source(f"{write_tars(change)}|8"))


def test_options_are_handed_on(fake):
    fake([0, 1], class_to_idx={"a": 0, "b": 1})
    assert fake.asked == [{"split": "val", "input_key": "img"}]


def test_a_reader_without_names_and_index(fake):
    source = fake([np.int64(1), 0, 1], class_to_idx={"zebra": 0, "ant": 1})
    # The reader's own numbering stays: models that were trained elsewhere count so.
    assert source.class_names == ("zebra", "ant")
    assert listed(source) == [("00000000", "ant"), ("00000001", "zebra"), ("00000002", "ant")]


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["x/1.jpg", "y/1.jpg"], ["x/1.jpg", "y/1.jpg"]),
        (["/cache/1.jpg", "/cache/2.jpg"], ["1.jpg", "2.jpg"]),
        (["../1.jpg", "2.jpg"], ["1.jpg", "2.jpg"]),
        (["/cache/a/1.jpg", "/cache/b/1.jpg"], ["00000000", "00000001"]),
        (["1.jpg", None], ["00000000", "00000001"]),
        (["1.jpg", "1.jpg"], ["00000000", "00000001"]),
    ],
)
def test_keys_are_file_names_where_they_tell_images_apart(names, keys, fake):
    source = fake([0, 1], names=names, class_to_idx={"a": 0, "b": 1})
    assert [key for key, _ in listed(source)] == keys


@pytest.mark.parametrize("name", ["a\udcff.jpg", "a\x1b[2J.jpg", "a\n.jpg", "k" * 5000])
def test_file_names_that_cannot_be_keys(name, fake):
    with pytest.raises(InputError, match=r"the file name .*(rename|shorten) it; 1 more file names cannot") as caught:
        fake([0, 1, 1], names=[name, "1.jpg", name + "1"], class_to_idx={"a": 0, "b": 1})
    assert str(caught.value).isprintable()


def test_a_validation_set_follows_a_class_list(fake):
    source = fake([0, 1], ["b", "c", "a"], class_to_idx={"a": 0, "b": 1})
    assert source.class_names == ("b", "c", "a")
    assert [image.class_id for image in source] == [2, 0]
    with pytest.raises(InputError, match="has 1 classes that the given list of 2 lacks, for example 'b'"):
        fake([0, 1], ["a", "c"], class_to_idx={"a": 0, "b": 1})


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        ([0, 2], "has the class 2, but the reader names 2 classes"),
        ([0, -1], "has the class -1"),
        ([0, np.array([0, 1])], "not one whole number"),
        ([0, None], "not one whole number"),
    ],
)
def test_targets_that_are_no_class(targets, reason, fake):
    with pytest.raises(InputError, match=reason):
        list(fake(targets, class_to_idx={"a": 0, "b": 1}))


def test_a_reader_without_class_names_counts(monkeypatch):
    class Counting(FakeReader):
        def iter_targets(self):
            return iter([3, 0])

    reader = Counting([(io.BytesIO(b"x"), 3), (io.BytesIO(b"y"), 0)])
    monkeypatch.setattr(timm_readers, "create_reader", lambda *words, **options: reader)
    source = open_source("wds/x")
    assert source.class_names == ("0", "1", "2", "3")
    assert [image.class_id for image in source] == [3, 0]


@pytest.mark.parametrize("words", ["timm:folder?root=/nowhere", "timm:nothing", "torch/no_such_set?root=x"])
def test_what_timm_cannot_open_is_one_line(words):
    with pytest.raises(InputError, match="timm cannot open") as caught:
        open_source(words)
    assert "\n" not in str(caught.value)


def test_a_reader_whose_library_is_missing(monkeypatch):
    def missing(*words, **options):
        raise ImportError("No module named 'datasets'")

    monkeypatch.setattr(timm_readers, "create_reader", missing)
    with pytest.raises(InputError, match="timm cannot open 'hfds/x': No module named 'datasets'"):
        open_source("hfds/x")


@pytest.mark.filterwarnings("ignore:.*x.tar", "ignore:.*x.tar:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # from Python 3.12 on
@pytest.mark.parametrize("kind", ["folder", "tar", "torch"])
def test_listed_images_are_read_when_asked_for(kind, cats_and_dogs, tmp_path):
    """In any order, also in a process that was forked; a data set would not fit into memory."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(cats_and_dogs, "pets")
    spec = {"folder": f"timm:folder?root={cats_and_dogs}", "tar": f"timm:tar?root={tmp_path / 'x.tar'}"}
    source = open_source(spec.get(kind, f"torch/image_folder?root={cats_and_dogs}"))
    expected = [(image.key, image.class_id, image.data) for image in source]
    images = every(source)
    assert [(image.key, image.class_id) for image in images] == [(key, number) for key, number, _ in expected]
    for image, (_, _, data) in reversed(list(zip(images, expected, strict=True))):
        assert image.data == data
    _FORKED[:] = images
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_data, range(len(images))) == [data for _, _, data in expected]
    if kind == "folder":
        (cats_and_dogs / expected[2][0]).unlink()
        with pytest.raises(ImageError, match="cannot be read: No such file"):
            images[2].load()
    _FORKED.clear()
    del source, images, image
    gc.collect()  # here, where timm's warnings are ignored


_FORKED = []


def _data(number):
    return _FORKED[number].data


def test_readers_of_one_order_are_not_listed(fake):
    source = fake([0, 1], class_to_idx={"a": 0, "b": 1})
    with pytest.raises(InputError, match="can only be read from first to last.*pack them first: stl-offline pack"):
        every(source)
