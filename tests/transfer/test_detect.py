"""Fine-tuning on boxes: reading, scores against torchmetrics, learning, and an interrupted run."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from stl_offline.cli.main import main
from stl_offline.config_transfer import DetectConfig, TransferEvaluateConfig
from stl_offline.errors import InputError
from stl_offline.training.engine import Trainer
from stl_offline.transfer import detect_scores, dry_run_detector, evaluate_transfer, load_detector, train_detector
from stl_offline.transfer.backbone import Backbone, BackboneSpec, level_indices, make_backbone
from stl_offline.transfer.boxes import open_boxes
from stl_offline.transfer.detect_scores import Boxes, average_precisions
from stl_offline.transfer.detector import DetectorDescription, Pyramid
from stl_offline.transfer.pair_loader import read_ahead
from tests.transfer.conftest import jpeg, scene

CLASSES = ("box", "disc")


def boxes_of(ids: np.ndarray) -> list[tuple[str, list[int]]]:
    """(class, [left, top, right, bottom)) of what `scene` drew."""
    found = []
    for number, name in enumerate(CLASSES, 1):
        rows, columns = np.nonzero(ids == number)
        found.append((name, [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]))
    return found


def voc(objects) -> bytes:
    parts = "".join(
        f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{left + 1}</xmin><ymin>{top + 1}</ymin>"
        f"<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
        for name, (left, top, right, bottom) in objects
    )
    return f"<annotation>{parts}</annotation>".encode()


@pytest.fixture(scope="module")
def boxed(tmp_path_factory):
    """(tar with VOC's XML beside the images, folder of its images, COCO JSON file)."""
    root = tmp_path_factory.mktemp("boxed")
    coco = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "disc"}, {"id": 3, "name": "box"}]}
    (root / "images").mkdir()
    with tarfile.open(root / "boxed.tar", "w") as tar:
        for seed in range(6):
            image, ids = scene(seed, 64, 96)
            objects = boxes_of(ids)
            split = "train" if seed < 4 else "val"
            for name, data in ((f"{split}/{seed}.jpg", jpeg(image)), (f"{split}/{seed}.xml", voc(objects))):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            (root / "images" / f"{seed}.jpg").write_bytes(jpeg(image))
            coco["images"].append({"id": 10 + seed, "file_name": f"{seed}.jpg"})
            for name, (left, top, right, bottom) in objects:
                category = {"disc": 7, "box": 3}[name]
                box = [int(left), int(top), int(right - left), int(bottom - top)]
                coco["annotations"].append({"image_id": 10 + seed, "category_id": category, "bbox": box})
            coco["annotations"].append({"image_id": 10 + seed, "category_id": 7, "bbox": [0, 0, 5, 5], "iscrowd": 1})
    (root / "coco.json").write_text(json.dumps(coco))
    return root / "boxed.tar", root / "images", root / "coco.json"


@pytest.fixture
def quick(boxed, tmp_path):
    return {
        "data": str(boxed[0]),
        "split": "train",
        "val": str(boxed[0]),
        "val_split": "val",
        "classes": ",".join(CLASSES),
        "backbone": "timm:resnet10t",
        "out": str(tmp_path / "run"),
        "side": 64,
        "longest": 96,
        "head_width": 16,
        "val_every": 2,
        "epochs": 2,
        "batch_size": 2,
        "device": "cpu",
        "workers": 1,
        "amp": "none",
    }


def test_voc_and_coco_give_the_same_boxes(boxed):
    tar, images, coco = boxed
    first = open_boxes(tar, CLASSES)
    second = open_boxes(images, CLASSES, str(coco))
    assert first.keys == ["train/0", "train/1", "train/2", "train/3", "val/4", "val/5"]
    for ours, theirs, seed in zip(first.images, second.images, range(6), strict=True):
        expected = boxes_of(scene(seed, 64, 96)[1])
        np.testing.assert_array_equal(ours.objects.boxes_n4, np.array([box for _, box in expected]))
        np.testing.assert_array_equal(ours.objects.boxes_n4, theirs.objects.boxes_n4)
        assert ours.objects.class_ids.tolist() == theirs.objects.class_ids.tolist() == [0, 1]
    assert len(open_boxes(tar, CLASSES, split="val")) == 2


SIZE = b"<size><width>28</width><height>20</height></size>"
# Entities of ten others each: 8 GB of text in the end.
TENFOLD = b"".join(b'<!ENTITY %c "%s">' % (98 + n, b"&%c;" % (97 + n) * 10) for n in range(9))
ENTITIES = b'<!DOCTYPE l [<!ENTITY a "aaaaaaaa">' + TENFOLD + b"]><annotation>&j;</annotation>"


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        (None, "1 of 1 images .* have no XML, for example a.jpg"),
        (voc([("cat", [0, 0, 3, 4])]), "the class 'cat' is not among `classes`: box, disc"),
        (voc([("box", [5, 0, 5, 4])]), "have no boxes"),
        (
            voc([("box", [5, 0, 3, 4])]),
            r"a.jpg has a box of the sides 5, 0, 3, 4 \(left, .* not within its 56×40",
        ),
        (voc([("box", [0, 0, 99, 4])]), "of the sides 0, 0, 99, 4 .* not within its 56×40 pixels"),
        (
            voc([("box", [0, 0, 9, 4])]).replace(
                b"<object>", b"<size><width>28</width><height>20</height></size><object>"
            ),
            "has 56×40 pixels, and its annotations are for 28×20",
        ),
        (
            ENTITIES,
            "annotations a.xml cannot be used: limit on input amplification",
        ),
        (b"<annotation>", "annotations a.xml cannot be used"),
        (voc([]), "have no boxes"),
    ],
)
def test_boxes_that_cannot_be_used(tmp_path, xml, message):
    (tmp_path / "a.jpg").write_bytes(jpeg(scene(1)[0]))
    if xml is not None:
        (tmp_path / "a.xml").write_bytes(xml)
    with pytest.raises(InputError, match=message):
        open_boxes(tmp_path, CLASSES)


def one_image(**parts) -> dict:
    """A COCO file of an image with a box, with other ``parts``."""
    box = {"image_id": 1, "category_id": 2, "bbox": [1, 2, 5, 6]}
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 56, "height": 40}],
        "categories": [{"id": 2, "name": "box"}],
        "annotations": [box | parts.pop("box", {})],
    } | parts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (one_image(box={"image_id": 7}), "an annotation has the image_id 7, which it does not list"),
        (one_image(box={"category_id": 7}), "an annotation has the category_id 7, which it does not list"),
        (one_image(box={"bbox": "1234"}), "a bbox must be a list of four numbers, got '1234'"),
        (one_image(box={"bbox": [1, 2, -5, 6]}), "a.jpg has a box of the sides 1, 2, -4, 8 .* not within its 56×40"),
        (one_image(box={"bbox": [1e300, 2, 1e300, 6]}), r"a.jpg has a box of the sides 1e\+300, 2, 2e\+300, 8"),
        (one_image(box={"bbox": [float("nan"), 2, 3, 6]}), "a.jpg has a box of the sides nan, 2, nan, 8"),
        (one_image(annotations=[None]), "cannot be used as COCO's: TypeError"),
        (one_image(images=[{"id": 1, "file_name": "a.jpg"}] * 2), "two of its images have the id 1"),
        (one_image(images=[{"id": n, "file_name": "a.jpg"} for n in (1, 2)]), "lists an image twice"),
        (one_image(images=[{"id": 1, "file_name": 5}]), "a file_name must be text, got 5"),
        (
            one_image(categories=[{"id": 2, "name": "box"}, {"id": 2, "name": "disc"}]),
            "two of its categories have the id",
        ),
        (one_image(images=[{"id": 1, "file_name": "a.jpg", "width": 40, "height": 56}]), "56×40 .* are for 40×56"),
    ],
)
def test_coco_files_that_cannot_be_used(tmp_path, content, message):
    (tmp_path / "a.jpg").write_bytes(jpeg(scene(1)[0]))
    file = tmp_path / "coco.json"
    file.write_text(json.dumps(one_image()))
    assert open_boxes(tmp_path, CLASSES, str(file)).images[0].objects.boxes_n4.tolist() == [[1, 2, 6, 8]]
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        open_boxes(tmp_path, CLASSES, str(file))


def test_a_name_that_two_images_have_and_one_cut_off(tmp_path):
    data = jpeg(scene(1)[0])
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jpg").write_bytes(data[:-400])
    (tmp_path / "coco.json").write_text(json.dumps(one_image()))
    with pytest.raises(InputError, match="a.jpg of .* may be x/a.jpg or y/a.jpg; choose with `split`"):
        open_boxes(tmp_path, CLASSES, str(tmp_path / "coco.json"))
    (image,) = open_boxes(tmp_path, CLASSES, str(tmp_path / "coco.json"), "y").images
    with pytest.raises(InputError, match="the image y/a: cannot be decoded"):
        image.read()


def test_a_frozen_backbone_keeps_everything(quick):
    settings = quick | {"freeze": True, "epochs": 1, "val": None, "val_split": None, "val_every": 1}
    train_detector(DetectConfig(**settings))
    trained = load_detector(quick["out"])[0].backbone.backbone.state_dict()
    torch.manual_seed(0)
    before = make_backbone(DetectConfig(**settings), (64, 64)).state_dict()
    assert all(torch.equal(trained[name], value) for name, value in before.items())


def test_scores_are_torchmetrics():
    generator = np.random.default_rng(5)
    oracle = MeanAveragePrecision(class_metrics=True)
    images = []
    for _ in range(12):
        corner = generator.uniform(0, 60, (5, 2))
        truth = np.concatenate([corner, corner + generator.uniform(8, 40, (5, 2))], axis=1).astype(np.float32)
        classes = generator.integers(0, 3, 5)
        guess = np.concatenate([truth[:4] + generator.normal(0, 2, (4, 4)), truth[:2] + 30]).astype(np.float32)
        labels = np.concatenate([classes[:4], [0, 3]])
        scores = generator.uniform(0, 1, 6)
        images.append((Boxes(truth, classes), Boxes(guess, labels, scores)))
        as_tensors = lambda boxes, ids: {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(ids)}  # noqa: E731
        oracle.update([as_tensors(guess, labels) | {"scores": torch.from_numpy(scores)}], [as_tensors(truth, classes)])
    expected = oracle.compute()
    ours = average_precisions(images, ("a", "b", "c", "d"))
    for name in ("map", "map_50", "map_75"):
        assert ours[name] == pytest.approx(float(expected[name]), abs=1e-6)
    assert [ours[f"ap/{name}"] for name in "abc"] == pytest.approx(expected["map_per_class"][:3].tolist(), abs=1e-6)
    assert ours["ap/d"] is None  # detected, and never there
    assert (
        average_precisions([(images[0][0], Boxes(np.zeros((0, 4)), np.zeros(0), np.zeros(0)))], ("a",) * 4)["map"] == 0
    )


def test_levels_of_one_stride_become_a_pyramid():
    backbone = Backbone(BackboneSpec("fan_micro_4_p8", (0, 1, 2, 3), (64, 64)))
    pyramid = Pyramid(backbone, 8).eval()
    maps = pyramid(torch.zeros(1, 3, 64, 128))
    assert [tuple(each.shape) for each in maps.values()] == [(1, 8, s, 2 * s) for s in (8, 4, 2, 1)] + [(1, 8, 1, 1)]


def test_the_command_trains_and_evaluates(quick, capsys, monkeypatch):
    words = [f"--{name.replace('_', '-')}={value}" for name, value in (quick | {"epochs": 1}).items()]
    assert main(["transfer", "detect", *words, "--tensorboard"]) == 0
    assert "detector: " in (out := capsys.readouterr().out) and "mAP at IoU 0.5" in out
    entry = json.loads(Path(quick["out"], "log.jsonl").read_text())
    config = TransferEvaluateConfig(data=quick["data"], split="val", checkpoint=quick["out"], device="cpu")
    scores = evaluate_transfer(config)
    assert {"map", "map_50", "map_75", "ap/disc"} <= scores.keys()
    assert scores == {"samples": 2} | {name: entry[name] for name in scores if name != "samples"}
    threads = []
    monkeypatch.setattr(detect_scores, "read_ahead", lambda *given: threads.append(given[2]) or read_ahead(*given))
    assert evaluate_transfer(replace(config, workers=3, corrupt="fog:3"))["map"] == scores["map"]
    assert threads == [3, 3]
    with pytest.raises(InputError, match="`sliding_window` is for segmenters"):
        evaluate_transfer(replace(config, sliding_window=True))


def test_a_dry_run_takes_steps_and_writes_nothing(quick, capsys):
    words = [f"--{name.replace('_', '-')}={value}" for name, value in quick.items()]
    assert main(["transfer", "detect", "--dry-run", *words]) == 0
    shown = {words[0]: " ".join(words[1:]) for line in capsys.readouterr().out.splitlines() if (words := line.split())}
    assert shown["data"] == "4 images to learn from, 2 to measure on"
    assert shown["steps"].startswith("4 (2 per epoch") and shown["step"].startswith("2 images")
    assert shown["model"].endswith("feature maps at strides 4, 8, 16, 32")
    assert not Path(quick["out"]).exists()
    with pytest.raises(InputError, match="the class 'disc' is not among `classes`"):
        dry_run_detector(DetectConfig(**quick | {"classes": "box,other"}))


@pytest.mark.slow
def test_an_interrupted_run_ends_as_one_that_was_not(quick, tmp_path, monkeypatch):
    quick |= {"val": None, "val_split": None, "val_every": 1}
    whole = train_detector(DetectConfig(**quick))
    original = Trainer._take_step

    def stop_in_the_second_epoch(self, batch, notes):
        if self.at.step == 3:
            self._save_state()
            raise KeyboardInterrupt
        return original(self, batch, notes)

    interrupted = DetectConfig(**quick | {"out": str(tmp_path / "interrupted")})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_take_step", stop_in_the_second_epoch)
        train_detector(interrupted)
    assert train_detector(interrupted)["loss"] == whole["loss"]
    first, second = (load_file(tmp_path / name / "weights.safetensors") for name in ("run", "interrupted"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_it_learns_where_boxes_and_discs_are(quick):
    config = DetectConfig(**quick | {"epochs": 60, "lr": 1e-3, "val_every": 60, "split": None, "val_split": None})
    assert train_detector(config)["map_50"] > 0.5


def build(backbone, classes=3, side=64, longest=96):
    """A detector with random weights that finds something."""
    torch.manual_seed(0)
    names = tuple(map(str, range(classes)))
    indices = level_indices(backbone, (side, side))
    model = DetectorDescription(backbone, indices, names, side, longest, 16).build()
    model.roi_heads.score_thresh = 0.0
    return model


def test_every_image_has_a_cell_of_the_coarsest_map(quick):
    """Of four maps with one stride, the last is pooled to eight times that: more than a small or flat image has."""
    dry_run_detector(DetectConfig(**quick | {"backbone": "timm:test_vit"}))
    model = build("test_vit").eval()
    assert model.backbone.strides == [16, 32, 64, 128]
    with torch.inference_mode():
        found = model([torch.rand(3, 10, 200)])[0]
    assert torch.isfinite(found["boxes"]).all() and len(found["boxes"])


def test_anchors_are_a_cell_apart():
    """Where the last cells of a map are cut off, too: 96 × 160 pixels have 1 × 2 cells of 128."""
    model = build("test_vit")
    image = torch.zeros(1, 3, 96, 160)
    maps = list(model.backbone(image).values())
    assert [tuple(each.shape[2:]) for each in maps] == [(6, 10), (3, 5), (2, 3), (1, 2), (1, 1)]
    anchors = model.rpn.anchor_generator(ImageList(image, [(96, 160)]), maps)[0]
    first = 0
    for stride, each in zip([16, 32, 64, 128, 256], maps, strict=True):
        height, width = each.shape[2:]
        boxes = anchors[first : (first := first + 3 * height * width)].view(height, width, 3, 4)
        centres = (boxes[..., :2] + boxes[..., 2:]) / 2
        assert centres[..., 0].eq(stride * torch.arange(width)[None, :, None]).all()
        assert centres[..., 1].eq(stride * torch.arange(height)[:, None, None]).all()
    assert first == len(anchors)


def test_patches_of_14_pixels(quick):
    dry_run_detector(DetectConfig(**quick | {"backbone": "timm:vit_small_patch14_dinov2"}))


def test_boxes_do_not_take_the_precision_of_the_layers():
    """Bfloat16 has steps of 2 pixels from 256 on. Suppression moves boxes of class c by c times an image's width."""
    model = build("resnet10t", classes=30, side=480, longest=640).eval()
    made = []
    model.rpn.anchor_generator.register_forward_hook(lambda *given: made.append(given[2][0].dtype))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = model([torch.rand(3, 480, 640)])[0]
    boxes, labels = found["boxes"], found["labels"]
    assert made == [torch.float32] and boxes.dtype == torch.float32 and len(boxes) == 100
    assert (boxes != boxes.bfloat16().float()).float().mean() > 0.5
    same = (labels[:, None] == labels[None]) & ~torch.eye(len(boxes), dtype=torch.bool)
    assert box_iou(boxes, boxes)[same].max() <= model.roi_heads.nms_thresh
