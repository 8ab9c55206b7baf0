"""Class lists as editors of other systems write them, and images with fewer classes than the model or labeler."""

import numpy as np
import pytest
from PIL import Image

from stl_offline.errors import InputError, JoinError
from stl_offline.evaluation import match_classes
from stl_offline.images.classes import read_class_map
from stl_offline.images.pack import ensure_beton
from stl_offline.labels.class_names import read_class_names

NAMES = ("ant", "bée", "水", "two words")
ENCODINGS = [
    pytest.param(lambda text: text.encode(), id="plain"),
    pytest.param(lambda text: text.encode("utf-8-sig"), id="byte-order mark"),
    pytest.param(lambda text: text.replace("\n", "\r\n").encode(), id="Windows"),
    pytest.param(lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"), id="both"),
    pytest.param(lambda text: (text + "\n\n").encode(), id="empty lines"),
    pytest.param(lambda text: text.rstrip("\n").encode(), id="no last line end"),
]


@pytest.mark.parametrize("encode", ENCODINGS)
def test_class_lists_and_maps_of_all_editors(tmp_path, encode):
    (tmp_path / "list.txt").write_bytes(encode("".join(f"{name}\n" for name in NAMES)))
    assert read_class_names(tmp_path / "list.txt", "`class_names`") == NAMES
    (tmp_path / "map.txt").write_bytes(encode("".join(f"{number} {name}\n" for number, name in enumerate(NAMES))))
    assert tuple(read_class_map(tmp_path / "map.txt").items()) == tuple(
        (str(number), name) for number, name in enumerate(NAMES)
    )


def test_utf_16_is_refused_by_the_users_name(tmp_path):
    (tmp_path / "list.txt").write_bytes("ant\nbee\n".encode("utf-16"))
    with pytest.raises(InputError, match=r"list.txt is not UTF-8 text"):
        read_class_names(tmp_path / "list.txt", "`class_names`")


@pytest.fixture
def one_class(tmp_path):
    """A folder with a single class, bee."""
    (tmp_path / "val" / "bee").mkdir(parents=True)
    for number in range(3):
        pixels = np.full((9, 7 + number, 3), number, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "val" / "bee" / f"{number}.png")
    return tmp_path / "val"


def test_images_of_one_class_keep_their_place_in_the_models_list(one_class):
    beton = ensure_beton(one_class)
    assert match_classes(beton, ("ant", "bee", "cat"), "the model").tolist() == [1]
    assert ensure_beton(one_class, class_names=("ant", "bee", "cat")).class_ids.tolist() == [1, 1, 1]


def test_errors_name_the_users_folder(one_class):
    beton = ensure_beton(one_class)
    with pytest.raises(JoinError) as caught:
        match_classes(beton, ("ant", "cat"), "the model")
    assert f"of {one_class} are not among the 2 of the model (such as 'bee')" in str(caught.value)
    with pytest.raises(InputError) as caught:
        ensure_beton(one_class, class_names=("ant", "cat"))
    for text in (str(caught.value), str(beton.place)):
        assert str(one_class) in text and ".beton" not in text
