"""What annotations hold beside plain objects: crowds, difficult objects, boxes without an area; and VOC's folders."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from stl_offline.errors import InputError
from stl_offline.transfer.boxes import open_boxes
from stl_offline.transfer.detect_scores import Boxes, average_precisions
from stl_offline.transfer.outlines import encode_masks, masks_of
from tests.transfer.conftest import jpeg

CLASSES = ("box", "disc")
SIZE = (60, 100)  # height, width


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(np.full((*SIZE, 3), 90, np.uint8)))


def write_voc(path, *objects):
    """objects: class, box in pixels from 0, whether it is difficult."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = "".join(
        f"<object><name>{name}</name><difficult>{int(difficult)}</difficult><bndbox><xmin>{left + 1}</xmin>"
        f"<ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
        for name, (left, top, right, bottom), difficult in objects
    )
    path.write_text(f"<annotation>{parts}</annotation>")


@pytest.fixture
def crowded(tmp_path):
    """A COCO file of two images: two objects and a crowd, with masks; one box of no height."""
    for number in (1, 2):
        write_image(tmp_path / f"{number}.jpg")
    crowd = np.zeros(SIZE, bool)
    crowd[20:50, 40:90] = True
    runs = np.diff(np.flatnonzero(np.diff(crowd.T.ravel(), prepend=0, append=0)), prepend=0).tolist()
    runs.append(crowd.size - sum(runs))
    polygon = lambda left, top, right, bottom: [[left, top, right, top, right, bottom, left, bottom]]  # noqa: E731
    objects = [
        (1, 3, [5, 5, 20, 10], polygon(5, 5, 25, 15), 0),
        (1, 4, [60, 2, 30, 12], polygon(60, 2, 90, 14), 0),
        (1, 3, [40, 20, 50, 30], {"size": list(SIZE), "counts": runs}, 1),
        (2, 3, [10, 10, 20, 20], polygon(10, 10, 30, 30), 0),
        (2, 4, [5, 5, 1.03, 0.0], polygon(5, 5, 6, 5), 0),
    ]
    content = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": SIZE[0], "width": SIZE[1]} for n in (1, 2)],
        "categories": [{"id": 3, "name": "box"}, {"id": 4, "name": "disc"}],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "area": box[2] * box[3],
                "segmentation": segmentation,
                "iscrowd": is_crowd,
            }
            for number, (image, category, box, segmentation, is_crowd) in enumerate(objects, 1)
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    return tmp_path


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_what_lies_in_a_crowd_is_not_a_false_detection(crowded, kind, capsys):
    file = crowded / "coco.json"
    images = open_boxes(crowded, CLASSES, str(file), masks=True)
    boxes = np.array([[5, 5, 25, 15], [60, 2, 90, 14], [42, 22, 60, 40], [60, 30, 85, 48], [3, 40, 9, 55]], np.float32)
    masks = np.zeros((len(boxes), *SIZE), np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int), strict=True):
        mask[top:bottom, left:right] = 1
    class_ids, scores = np.array([0, 1, 0, 0, 0]), np.array([0.5, 0.6, 0.9, 0.8, 0.4])
    found = [Boxes(boxes, class_ids, scores, encode_masks(masks))]
    none = Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0), [])
    truth = [Boxes.to_find(image) for image in images.images]
    ours = average_precisions(zip(truth, [*found, none], strict=True), CLASSES, masks=True)

    theirs = COCO(str(file))
    results = [
        {
            "image_id": 1,
            "category_id": int(class_id) + 3,
            "score": float(score),
            "bbox": [float(each) for each in (left, top, right - left, bottom - top)],
            "segmentation": mask,
        }
        for (left, top, right, bottom), class_id, score, mask in zip(
            boxes, class_ids, scores, found[0].masks, strict=True
        )
    ]
    # The box without an area stays out of their file, too.
    theirs.dataset["annotations"].pop()
    theirs.createIndex()
    if kind == "bbox":
        for each in results:
            del each["segmentation"]
    measured = COCOeval(theirs, theirs.loadRes(results), kind)
    measured.evaluate()
    measured.accumulate()
    measured.summarize()
    capsys.readouterr()
    prefix = "mask_" if kind == "segm" else ""
    assert [ours[f"{prefix}{name}"] for name in ("map", "map_50", "map_75")] == pytest.approx(measured.stats[:3])
    assert 0.5 < ours[f"{prefix}map_50"] < 1  # of two boxes one is found, and the crowd's two cost nothing


def test_crowds_and_boxes_without_an_area_are_not_trained_on(crowded, caplog):
    images = open_boxes(crowded, CLASSES, str(crowded / "coco.json"), masks=True).images
    assert [image.objects.class_ids.tolist() for image in images] == [[0, 1], [0]]
    assert [image.ignored.boxes_n4.tolist() for image in images] == [[[40, 20, 90, 50]], []]
    assert masks_of(images[0].ignored.masks, *SIZE).sum() == 50 * 30
    assert "without an area are left out: 1, for example in 2.jpg" in caplog.text


def test_only_crowds_score_nothing(crowded):
    (first, _) = open_boxes(crowded, CLASSES, str(crowded / "coco.json")).images
    crowd = Boxes(first.ignored.boxes_n4, first.ignored.class_ids, crowds=1)
    inside = Boxes(np.array([[42, 22, 60, 40]], np.float32), np.array([0]), np.array([0.9]))
    for found in (inside, Boxes(np.zeros((0, 4)), np.zeros(0), np.zeros(0))):
        assert average_precisions([(crowd, found)], CLASSES)["map"] is None


def test_difficult_objects_are_neither_missed_nor_false(tmp_path):
    write_image(tmp_path / "1.jpg")
    write_voc(tmp_path / "1.xml", ("box", (5, 5, 25, 15), False), ("box", (40, 20, 90, 50), True))
    (image,) = open_boxes(tmp_path, CLASSES).images
    assert image.objects.boxes_n4.tolist() == [[5, 5, 25, 15]]
    assert image.ignored.boxes_n4.tolist() == [[40, 20, 90, 50]]
    for rows, expected in (([0], 1.0), ([0, 1], 1.0), ([1], 0.0)):
        boxes = np.array([[5, 5, 25, 15], [40, 20, 90, 50]], np.float32)[rows]
        found = Boxes(boxes, np.zeros(len(rows), np.int64), np.linspace(0.5, 0.9, len(rows)))
        assert average_precisions([(Boxes.to_find(image), found)], CLASSES)["map"] == pytest.approx(expected)
    # One of a class that is not asked for is nothing to find, either.
    write_voc(tmp_path / "1.xml", ("box", (5, 5, 25, 15), False), ("cat", (40, 20, 90, 50), True))
    assert len(open_boxes(tmp_path, CLASSES).images[0].ignored) == 0


def test_vocs_folders_of_masks_hold_no_images(tmp_path):
    write_image(tmp_path / "VOC2012" / "JPEGImages" / "1.jpg")
    write_voc(tmp_path / "VOC2012" / "Annotations" / "1.xml", ("disc", (5, 5, 25, 15), False))
    masks = tmp_path / "VOC2012" / "SegmentationClass"
    masks.mkdir()
    stream = io.BytesIO()
    Image.new("L", SIZE[::-1]).save(stream, format="PNG")
    (masks / "1.png").write_bytes(stream.getvalue())
    for split in (None, "JPEGImages", "VOC2012"):
        assert open_boxes(tmp_path, CLASSES, split=split).keys == ["VOC2012/JPEGImages/1"]


def test_two_xml_files_for_one_image(tmp_path):
    """labelImg writes beside the image, where Pascal VOC has a folder; one of them would be ignored."""
    write_image(tmp_path / "JPEGImages/1.jpg")
    for folder in ("JPEGImages", "Annotations"):
        write_voc(tmp_path / folder / "1.xml", ("box", (5, 5, 25, 15), False))
    with pytest.raises(InputError, match="two XML files for one image: Annotations/1.xml and JPEGImages/1.xml; keep"):
        open_boxes(tmp_path, CLASSES)


def test_an_image_and_its_mask_side_by_side_are_two_images_for_one_xml(tmp_path):
    write_image(tmp_path / "1.jpg")
    write_voc(tmp_path / "1.xml", ("box", (5, 5, 25, 15), False))
    Image.new("L", SIZE[::-1]).save(tmp_path / "1.png")
    with pytest.raises(InputError, match=r"two images for one XML: 1.jpg and 1.png; keep one"):
        open_boxes(tmp_path, CLASSES)
