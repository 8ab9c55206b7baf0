"""Folder trees, and the words that name a source."""

import os
import re
import shutil

import pytest

from stl_offline.errors import InputError
from stl_offline.images.sources import open_source, source_state

DATA = b"not looked at here"


def tree(make_tree, root, *names):
    return make_tree(root, {name: None if name.endswith("/") else DATA for name in names})


def listed(source):
    return [(image.key, source.class_names[image.class_id]) for image in source]


def test_a_tree_is_read_in_sorted_order_with_the_first_folder_as_class(make_tree, tmp_path):
    root = tree(
        make_tree,
        tmp_path / "pets",
        "dog/z.jpg",
        "dog/a/b/c.PNG",
        "dog/a.JPEG",
        "cat/2.webp",
        "cat/10.jpg",
        "cat/README.md",
        "cat/.DS_Store",
        "cat/._2.jpg",
        "cat/.hidden/1.jpg",
        ".git/x/1.jpg",
        "notes.txt",
    )
    source = open_source(root)
    assert source.class_names == ("cat", "dog") and len(source) == 5
    assert listed(source) == [
        ("cat/10.jpg", "cat"),
        ("cat/2.webp", "cat"),
        ("dog/a.JPEG", "dog"),
        ("dog/a/b/c.PNG", "dog"),
        ("dog/z.jpg", "dog"),
    ]
    assert [image.data for image in source] == [DATA] * 5
    assert listed(open_source(str(root) + "/")) == listed(source)


def test_links_to_files_and_folders_are_followed(make_tree, tmp_path):
    tree(make_tree, tmp_path / "elsewhere", "x.jpg", "deep/y.jpg")
    root = tree(make_tree, tmp_path / "pets", "cat/1.jpg", "dog/")
    (root / "dog" / "link.jpg").symlink_to(tmp_path / "elsewhere" / "x.jpg")
    (root / "wolf").symlink_to(tmp_path / "elsewhere")
    assert [key for key, _ in listed(open_source(root))] == [
        "cat/1.jpg",
        "dog/link.jpg",
        "wolf/deep/y.jpg",
        "wolf/x.jpg",
    ]


def test_a_link_to_where_it_lies_ends_in_an_error(make_tree, tmp_path):
    root = tree(make_tree, tmp_path / "pets", "cat/1.jpg", "dog/1.jpg", "dog/in/2.jpg")
    (root / "dog" / "in" / "again").symlink_to(root / "dog")
    with pytest.raises(InputError, match="again is a link to a folder that it lies in"):
        open_source(root)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ((), "holds no images; give a folder"),
        (("README.md",), "holds no images"),
        (("train-0.tar", "train-1.tar"), "holds tars: name them as a brace pattern"),
        (("cat/", "dog/"), "holds no images"),
        (("cat/readme.txt", "dog/"), "holds no images"),
        (("cat/1.jpg", "dog/"), "1 class folder of .* without images, for example 'dog'"),
        (("cat/1.jpg", "dog/1.jpg", "3.jpg"), "3.jpg lies beside the class folders"),
    ],
)
def test_trees_that_cannot_be_used(names, reason, make_tree, tmp_path):
    with pytest.raises(InputError, match=reason) as caught:
        open_source(tree(make_tree, tmp_path / "pets", *names))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (b"\xff.jpg", r"the file name 'cat/\udcff.jpg' is not UTF-8; rename it"),
        (b"a\x1b[2J.jpg", r"the file name 'cat/a\x1b[2J.jpg' holds a control character; rename it"),
        (b"a\n.jpg", r"the file name 'cat/a\n.jpg' holds a control character; rename it"),
        ("a\x9b.jpg".encode(), r"the file name 'cat/a\x9b.jpg' holds a control character; rename it"),
    ],
)
def test_names_that_no_label_set_can_hold_are_refused(name, reason, make_tree, tmp_path):
    """Before anything is packed, with their number, and so that they can be printed."""
    root = tree(make_tree, tmp_path / "pets", "cat/1.jpg", "dog/1.jpg", "dog/größe\u202e.jpg")
    open_source(root)
    (root / "cat" / os.fsdecode(name)).write_bytes(DATA)
    with pytest.raises(InputError, match=re.escape(reason) + "$"):
        open_source(root)
    (root / "dog" / os.fsdecode(name)).write_bytes(DATA)
    (root / "dog" / "\x7f").mkdir()
    (root / "dog" / "\x7f" / "2.jpg").write_bytes(DATA)
    for read in (open_source, source_state):
        with pytest.raises(InputError, match=re.escape(reason) + "; 2 more file names cannot be used either$"):
            read(root)


def test_an_image_that_vanishes_is_an_error_of_that_image(make_tree, tmp_path):
    source = open_source(tree(make_tree, tmp_path / "pets", "cat/1.jpg", "dog/1.jpg"))
    (tmp_path / "pets" / "cat" / "1.jpg").unlink()
    first, second = source
    with pytest.raises(InputError, match="cannot be read: No such file"):
        _ = first.data
    assert second.data == DATA


def test_class_folders_with_numbers_are_in_number_order(make_tree, tmp_path):
    root = tree(make_tree, tmp_path / "digits", "10/a.jpg", "9/a.jpg", "100/a.jpg")
    source = open_source(root)
    assert source.class_names == ("9", "10", "100")
    assert [name for _, name in listed(source)] == ["10", "100", "9"]


def test_a_validation_set_follows_the_list_of_the_training_set(make_tree, tmp_path):
    root = tree(make_tree, tmp_path / "val", "dog/1.jpg", "wolf/1.jpg")
    source = open_source(root, ["wolf", "cat", "dog"])
    assert source.class_names == ("wolf", "cat", "dog")
    assert [image.class_id for image in source] == [2, 0]
    only = tree(make_tree, tmp_path / "one", "dog/1.jpg")
    assert [image.class_id for image in open_source(only, ["cat", "dog"])] == [1]


@pytest.mark.parametrize(
    ("class_names", "reason"),
    [
        (["cat", "dog"], "has 1 classes that the given list of 2 lacks, for example 'wolf'"),
        (["dog", "wolf", "dog"], "names 'dog' twice"),
        (["dog"], "at least two names"),
        ([], "at least two names"),
    ],
)
def test_class_lists_that_cannot_be_used(class_names, reason, make_tree, tmp_path):
    root = tree(make_tree, tmp_path / "val", "dog/1.jpg", "wolf/1.jpg")
    with pytest.raises(InputError, match=reason):
        open_source(root, class_names)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("nothing/here", "there is nothing at nothing/here; give a folder"),
        ("nothing.tar", "there is no tar nothing.tar"),
        ("a-{0..3}.tar", "4 of the 4 tars of .* are missing, for example a-0.tar"),
        ("a-{0..3}", "4 of the 4 tars"),
        ("a-{0..3.tar", "cannot be expanded: Unbalanced braces"),
        ("*.tar", "there is nothing at"),
        ("https://example.org/a.tar", "is not on this machine, and here its images are needed in any order; pack"),
        ("https://example.org/a.zip?key=secret", "example.org/a.zip is not the address of a tar"),
        ("pipe:cat a.tar", "is a command, which is not run"),
    ],
)
def test_words_that_name_nothing(words, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=reason):
        open_source(words)


def test_files_that_are_no_source(tmp_path):
    for name, reason in (("x.beton", "is packed already"), ("x.jpg", "is neither a folder nor a tar")):
        (tmp_path / name).write_bytes(DATA)
        with pytest.raises(InputError, match=reason):
            open_source(tmp_path / name)


def test_the_state_follows_the_place_and_names_sizes_and_times(make_tree, tmp_path):
    root = tree(make_tree, tmp_path / "pets", "cat/1.jpg", "dog/1.jpg")
    state = source_state(root)
    shutil.copytree(root, tmp_path / "copy")
    assert source_state(tmp_path / "copy") != state
    (tmp_path / "link").symlink_to(root)
    assert source_state(tmp_path / "link") == source_state(f"{root}/") == state
    seen = {state}
    (root / "cat" / "1.jpg").rename(root / "cat" / "2.jpg")
    seen.add(source_state(root))
    os.utime(root / "dog" / "1.jpg", ns=(0, 5))
    seen.add(source_state(root))
    (root / "dog" / "1.jpg").write_bytes(DATA + b"!")
    os.utime(root / "dog" / "1.jpg", ns=(0, 5))
    seen.add(source_state(root))
    tree(make_tree, root, "dog/2.jpg")
    seen.add(source_state(root))
    assert len(seen) == 5
