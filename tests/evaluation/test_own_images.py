"""Images of one's own: what stored scores are known by."""

from types import SimpleNamespace

from stl_offline.evaluation.images import OwnImages
from stl_offline.images.pack import pack
from tests.training.conftest import CLASSES, write_stripes


def fingerprint(data, names=CLASSES):
    return OwnImages(str(data), SimpleNamespace(name="model", class_names=names)).fingerprint


def test_scores_that_are_stored_are_of_the_same_pixels(tmp_path):
    """A .beton's own fingerprint is that of its source, however far its images were shrunk."""
    data, found = write_stripes(tmp_path / "images", 2, 1), set()
    for size in (None, 24, 16):
        pack(data, tmp_path / f"{size}.beton", max_size=size)
        found.add(fingerprint(tmp_path / f"{size}.beton"))
    pack(data, tmp_path / "again.beton", max_size=16)
    assert len(found) == 3 and fingerprint(tmp_path / "again.beton") in found
    assert fingerprint(tmp_path / "16.beton", CLASSES[::-1]) not in found
