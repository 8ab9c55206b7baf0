"""Masks of objects: read as by pycocotools, learned by torchvision's Mask R-CNN, scored as by torchmetrics."""

import json
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import MaskRCNN

from stl_offline.cli.main import main
from stl_offline.config_transfer import DetectConfig, TransferEvaluateConfig
from stl_offline.distributed import World
from stl_offline.errors import InputError
from stl_offline.transfer import evaluate_transfer, load_detector, train_detector
from stl_offline.transfer.backbone import Backbone, BackboneSpec
from stl_offline.transfer.boxes import open_boxes
from stl_offline.transfer.detect import BoxLoader
from stl_offline.transfer.detect_scores import Boxes, average_precisions
from stl_offline.transfer.detector import Detector, Pyramid
from stl_offline.transfer.outlines import encode_masks, masks_of, run_lengths
from tests.transfer.conftest import jpeg, scene

CLASSES = ("box", "disc")


def compressed(mask: np.ndarray) -> dict:
    """COCO's run lengths of a mask (H, W), as JSON has them."""
    found = pycocotools.mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return found | {"counts": found["counts"].decode()}


def counts(mask: np.ndarray) -> dict:
    """The same as a list of numbers."""
    column = mask.T.ravel().astype(int)
    ends = np.flatnonzero(np.diff(np.concatenate([[0], column]))).tolist()
    return {"size": list(mask.shape), "counts": np.diff([0, *ends, column.size]).tolist()}


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """(folder of images, COCO JSON file whose boxes are polygons and whose discs are run lengths)."""
    root = tmp_path_factory.mktemp("masked")
    coco = {"images": [], "annotations": [], "categories": [{"id": 4, "name": "box"}, {"id": 5, "name": "disc"}]}
    for seed in range(4):
        image, ids = scene(seed, 64, 96)
        (root / f"{seed}.jpg").write_bytes(jpeg(image))
        coco["images"].append({"id": seed, "file_name": f"{seed}.jpg", "height": 64, "width": 96})
        for number in range(2):
            mask = ids == number + 1
            rows, columns = np.nonzero(mask)
            top, left, bottom, right = (int(e) for e in (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1))
            # The box as an L of two polygons that overlap, so that their union matters.
            polygons = [
                [left, top, right, top, right, top + 4, left, top + 4],
                [left, top, left + 5.5, top, left + 5.5, bottom, left, bottom],
            ]
            runs = compressed(mask) if seed % 2 else counts(mask)
            more = {"area": 1, "iscrowd": 0, "id": len(coco["annotations"]) + 1}
            box = [left, top, right - left, bottom - top]
            shape = {"bbox": box, "segmentation": runs if number else polygons}
            coco["annotations"].append(more | shape | {"image_id": seed, "category_id": 4 + number})
    (root / "coco.json").write_text(json.dumps(coco))
    return root, root / "coco.json"


@pytest.fixture
def quick(masked, tmp_path):
    data, file = map(str, masked)
    names = {"data": data, "annotations": file, "val": data, "val_annotations": file, "masks": True}
    sizes = {"side": 64, "longest": 96, "head_width": 16, "epochs": 1, "batch_size": 2}
    machine = {"device": "cpu", "workers": 1, "amp": "none", "out": str(tmp_path / "run")}
    return names | sizes | machine | {"classes": ",".join(CLASSES), "backbone": "timm:resnet10t"}


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools
def test_masks_are_read_as_pycocotools_reads_them(masked):
    images = open_boxes(masked[0], CLASSES, str(masked[1]), masks=True).images
    theirs = COCO(str(masked[1]))
    for number, image in enumerate(images):
        expected = [theirs.annToMask(each) for each in theirs.loadAnns(theirs.getAnnIds(imgIds=[number]))]
        assert expected[0].any() and expected[1].any()
        np.testing.assert_array_equal(masks_of(image.objects.masks, 64, 96), expected)
    plain = open_boxes(masked[0], CLASSES, str(masked[1]))
    assert plain.images[0].objects.masks is None
    assert plain.fingerprint != open_boxes(masked[0], CLASSES, str(masked[1]), masks=True).fingerprint


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 60), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_run_lengths_of_any_mask(height, width, seed, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    for given_as in (compressed(mask), counts(mask)):
        found = run_lengths(given_as, height, width)
        assert found["counts"].decode() == compressed(mask)["counts"]
        np.testing.assert_array_equal(masks_of([found], height, width)[0], mask)
    assert encode_masks(mask[None])[0]["counts"] == found["counts"]


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "no mask"),
        ([], "no mask"),
        ("05", "no mask"),
        ([[1, 1, 3, 1]], "3 to 65,536 points"),
        ([[1, 1, 3, 1, 3, 3, 1]], "3 to 65,536 points"),
        ([1, 1, 3, 1, 3, 3], "3 to 65,536 points"),
        ([[1, 1, 3, 1, 3, float("nan")]], "must be numbers"),
        ([[1, 1, 3, 1, 3, "3"]], "must be numbers"),
        ([[1, 1, 1e12, 1, 3, 3]], "leaves the 5×4 pixels"),
        ({"size": [5, 4], "counts": [20]}, r"size \[5, 4\] \(height, width\) in an image of \[4, 5\]"),
        ({"size": [4, 5], "counts": [5, 5]}, "cover 10 of 20 pixels"),
        ({"size": [4, 5], "counts": [25, -5]}, "list of whole numbers"),
        ({"size": [4, 5], "counts": ""}, "cover 0 of 20 pixels"),
        ({"size": [4, 5], "counts": "zz"}, "damaged"),
        ({"size": [4, 5], "counts": "oooooooooooooooooo"}, "damaged"),
        ({"size": [4, 5], "counts": "5o"}, "end within a number"),
    ],
)
def test_masks_that_cannot_be_used(segmentation, message):
    with pytest.raises(ValueError, match=message):
        run_lengths(segmentation, 4, 5)


def test_objects_without_masks_are_named(masked, tmp_path):
    content = json.loads(masked[1].read_text())
    del content["annotations"][3]["segmentation"]
    (tmp_path / "coco.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="masks of 1.jpg cannot be used: an object has no mask"):
        open_boxes(masked[0], CLASSES, str(tmp_path / "coco.json"), masks=True)
    open_boxes(masked[0], CLASSES, str(tmp_path / "coco.json"))


def test_a_flip_moves_masks_with_their_boxes(masked):
    images = open_boxes(masked[0], CLASSES, str(masked[1]), masks=True)
    loader = BoxLoader(images, 2, 0.5, workers=1, seed=1, device=torch.device("cpu"), world=World())
    pixels, plain = loader.load(1, False)
    mirrored, flipped = loader.load(1, True)
    assert torch.equal(mirrored, pixels.flip(-1)) and torch.equal(flipped["masks"], plain["masks"].flip(-1))
    for (left, top, right, bottom), mask in zip(flipped["boxes"].int().tolist(), flipped["masks"], strict=True):
        outside = mask.clone()
        outside[top:bottom, left:right] = 0
        assert mask.any() and not outside.any()


def test_losses_and_masks_are_torchvisions():
    backbone = Backbone(BackboneSpec("resnet10t", (1, 2, 3, 4), (64, 64)))
    ours = Detector(backbone, 2, (64,), 96, 16, masks=True)
    theirs = MaskRCNN(
        Pyramid(backbone, 16),
        num_classes=3,
        min_size=64,
        max_size=96,
        image_mean=list(backbone.mean),
        image_std=list(backbone.std),
        rpn_anchor_generator=ours.rpn.anchor_generator,
        size_divisible=32,
    )
    theirs.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 70, 90, generator=generator), torch.rand(3, 64, 50, generator=generator)]
    masks = torch.zeros(2, 70, 90, dtype=torch.uint8)
    masks[0, 5:40, 10:30], masks[1, 30:60, 40:80] = 1, 1
    boxes = torch.tensor([[10.0, 5, 30, 40], [40, 30, 80, 60]])
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    targets = [
        {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks},
        none | {"masks": torch.zeros(0, 64, 50, dtype=torch.uint8)},
    ]
    found = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(5)  # which proposals are taken
        found.append(model(images, targets))
    assert found[0].keys() == found[1].keys() and found[0]["loss_mask"] > 0
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name])
    with torch.inference_mode():
        first, second = (model.eval()(images) for model in (ours, theirs))
    assert first[0]["masks"].shape == (len(first[0]["boxes"]), 1, 70, 90)
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("boxes", "labels", "scores", "masks"))


def test_scores_of_masks_are_torchmetrics():
    generator = np.random.default_rng(3)
    # COCO's own thresholds: torchmetrics' are of 32 bits, and recalls such as 3/5 lie on the other side of them.
    thresholds = {
        "iou_thresholds": np.linspace(0.5, 0.95, 10).tolist(),
        "rec_thresholds": np.linspace(0, 1, 101).tolist(),
    }
    oracle = MeanAveragePrecision(iou_type=("bbox", "segm"), class_metrics=True, **thresholds)
    images = []
    for _ in range(10):
        height, width = 40, 60
        truth = np.zeros((4, height, width), np.uint8)
        for mask in truth:
            top, left = generator.integers(0, 25), generator.integers(0, 40)
            mask[top : top + generator.integers(5, 15), left : left + generator.integers(5, 20)] = 1
        guess = truth[:3].copy()
        guess &= generator.random(guess.shape) < generator.uniform(0.4, 1, (3, 1, 1))
        boxes = np.array([pycocotools.mask.toBbox(each) for each in encode_masks(truth)]).astype(np.float32)
        boxes[:, 2:] += boxes[:, :2]
        classes = generator.integers(0, 3, 4)
        scores = generator.uniform(0, 1, 3)
        images.append(
            (
                Boxes(boxes, classes, masks=encode_masks(truth)),
                Boxes(boxes[:3] + 1, classes[:3], scores, encode_masks(guess)),
            )
        )
        target = {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(classes)}
        found = {"boxes": torch.from_numpy(boxes[:3] + 1), "labels": torch.from_numpy(classes[:3])}
        oracle.update(
            [found | {"scores": torch.from_numpy(scores), "masks": torch.from_numpy(guess).bool()}],
            [target | {"masks": torch.from_numpy(truth).bool()}],
        )
    expected, ours = oracle.compute(), average_precisions(images, ("a", "b", "c"), masks=True)
    for kind, prefix in (("bbox", ""), ("segm", "mask_")):
        for name in ("map", "map_50", "map_75"):
            assert ours[f"{prefix}{name}"] == pytest.approx(float(expected[f"{kind}_{name}"]), abs=1e-6)
        each = [ours[f"{prefix}ap/{name}"] for name in "abc"]
        assert each == pytest.approx(expected[f"{kind}_map_per_class"].tolist(), abs=1e-6)
    assert 0.1 < ours["mask_map"] < 0.9 and ours["mask_map"] != ours["map"]


def test_the_command_trains_and_evaluates_masks(quick, masked, capsys):
    words = [f"--{name.replace('_', '-')}={value}" for name, value in quick.items() if name != "masks"]
    assert main(["transfer", "detect", "--masks", *words, "--tensorboard"]) == 0
    assert "mask mAP at IoU 0.5" in capsys.readouterr().out
    entry = json.loads(Path(quick["out"], "log.jsonl").read_text())
    assert entry["mask"] > 0 and {"mask_map", "mask_ap/disc", "map"} <= entry.keys()
    assert load_detector(quick["out"])[1].masks
    evaluate = ["transfer", "evaluate", "--data", quick["data"], "--checkpoint", quick["out"], "--device", "cpu"]
    assert main([*evaluate, "--annotations", quick["annotations"]]) == 0
    assert "disc  AP " in (out := capsys.readouterr().out) and "mask AP " in out
    config = TransferEvaluateConfig(data=quick["data"], checkpoint=quick["out"], device="cpu")
    with pytest.raises(InputError, match="predicts masks; give a COCO JSON file with masks as `annotations`"):
        evaluate_transfer(config)
    with pytest.raises(InputError, match="`masks` needs `val_annotations`"):
        DetectConfig(**quick | {"val_annotations": None})
    with pytest.raises(InputError, match="`masks` needs a COCO JSON file as `annotations`"):
        DetectConfig(**quick | {"annotations": None, "val": None, "val_annotations": None})


@pytest.mark.slow
def test_it_learns_the_masks(quick):
    more = {"epochs": 10, "lr": 1e-3, "flip": 0.0, "val": None, "val_annotations": None}
    train_detector(DetectConfig(**quick | more))
    lines = Path(quick["out"], "log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["mask"] < 0.45  # 0.69 where every pixel is as likely in as out
