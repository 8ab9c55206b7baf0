"""Fine-tuning on masks: what is learned and measured, and that an interrupted run ends as one that was not."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from stl_offline import recipes
from stl_offline.cli.main import main
from stl_offline.config import ReportConfig
from stl_offline.config_transfer import SegmentConfig, TransferEvaluateConfig
from stl_offline.errors import InputError
from stl_offline.loader.order import check_shares
from stl_offline.models import ModelDescription, save_model
from stl_offline.recipes import recipe_names, resolve
from stl_offline.reports.report import report_runs
from stl_offline.training.engine import Trainer
from stl_offline.transfer import dry_run_segmenter, evaluate_transfer, load_segmenter, segment, train_segmenter
from stl_offline.transfer.backbone import Backbone, BackboneSpec, level_indices, make_backbone
from stl_offline.transfer.evaluate import _prepare_segmenter
from stl_offline.transfer.pairs import NO_CLASS, open_pairs
from stl_offline.transfer.segment_scores import SegmentScores, confusion_matrix
from stl_offline.transfer.segmenter import MlpHead, Segmenter, _starts, whole_logits, window_logits
from tests.training.torchrun import torchrun
from tests.transfer.conftest import CLASSES, IGNORE


@pytest.fixture
def quick(scenes, tmp_path):
    """Settings of a run that takes a second."""
    return {
        "data": str(scenes[0]),
        "val": str(scenes[1]),
        "val_split": "val",
        "classes": ",".join(CLASSES),
        "ignore_id": IGNORE,
        "backbone": "timm:fan_micro_4_p8",
        "out": str(tmp_path / "run"),
        "crop_height": 32,
        "crop_width": 48,
        "head_width": 16,
        "epochs": 2,
        "batch_size": 4,
        "lr": 1e-3,
        "color_jitter": 0.1,
        "seed": 3,
        "workers": 1,
        "device": "cpu",
        "amp": "none",
    }


def test_windows_are_three_quarters_of_one_apart():
    assert _starts(100, 40) == [0, 30, 60] and _starts(40, 40) == [0] and _starts(41, 40) == [0, 1]


def test_the_head_learns_faster_than_the_backbone(quick):
    run = segment._prepare(SegmentConfig(**quick | {"head_lr_scale": 7.0}))
    head = {id(parameter) for parameter in run.model.head.parameters()}
    groups = [(group.get("lr_scale", 1.0), group["params"]) for group in run.parameter_groups()]
    scales = {(id(parameter) in head, scale) for scale, parameters in groups for parameter in parameters}
    assert {scale for of_head, scale in scales if of_head} == {7.0}
    assert max(scale for of_head, scale in scales if not of_head) <= 1


@pytest.mark.parametrize("options", [{}, {"sliding_window": True}])
def test_logits_that_are_not_finite_are_no_scores(quick, scenes, options):
    """Their argmax is class 0, which some masks have everywhere."""
    train_segmenter(SegmentConfig(**quick | {"epochs": 1}))
    place = Path(quick["out"]) / "weights.safetensors"
    model, description = load_segmenter(place)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    save_model(place, model.state_dict(), description)
    config = TransferEvaluateConfig(data=str(scenes[1]), split="val", checkpoint=str(place), device="cpu", **options)
    with pytest.raises(InputError, match="gives logits that are not finite; check its weights"):
        evaluate_transfer(config)


def test_a_few_epochs_learn_it_and_evaluate_says_the_same(quick, scenes, tmp_path, capsys):
    summary = train_segmenter(SegmentConfig(**quick | {"epochs": 8, "layer_decay": 0.8, "val_every": 8}))
    assert summary["miou"] > 0.6 and summary["best_miou"] == summary["miou"]
    config = TransferEvaluateConfig(data=str(scenes[1]), split="val", checkpoint=quick["out"], device="cpu")
    scores = evaluate_transfer(config)
    assert scores.pop("samples") == 3
    assert {name: pytest.approx(value) for name, value in scores.items()} == {name: summary[name] for name in scores}
    words = ["transfer", "evaluate", "--data", str(scenes[1]), "--split", "val", "--checkpoint", quick["out"]]
    assert main([*words, "--device", "cpu", "--out", str(tmp_path / "masks")]) == 0
    assert f"mean IoU {100 * scores['miou']:.2f} %" in capsys.readouterr().out
    right = labelled = 0
    pairs = open_pairs(scenes[1], CLASSES, IGNORE, "val")
    for number, key in enumerate(pairs.keys):
        predicted, mask = np.asarray(Image.open(tmp_path / "masks" / f"{key}.png")), pairs.read(number)[1]
        right, labelled = right + (predicted == mask)[mask != NO_CLASS].sum(), labelled + (mask != NO_CLASS).sum()
    assert right / labelled == pytest.approx(scores["pixel_accuracy"])
    assert train_segmenter(SegmentConfig(**quick | {"epochs": 8, "layer_decay": 0.8}))["already_complete"]
    page = tmp_path / "report.html"
    report = report_runs(ReportConfig(runs=(quick["out"],), data=str(scenes[0]), out=str(page)))
    assert report.examples == 0 and "is a segmenter and is left out of the examples" in report.warnings[0]
    text = re.sub(r"<[^>]*>", " ", page.read_text())
    assert "segmenter, fan_micro_4_p8, finished" in text and "warnings at the top" in text
    for name in ("miou", "mean_accuracy", "pixel_accuracy"):
        assert f" {summary[name]:.2%} " in text
    assert "mIoU" in re.findall(r"<h3>(.*?)</h3>", page.read_text())


def test_an_interrupted_run_ends_as_one_that_was_not(quick, tmp_path, monkeypatch):
    settings = quick | {"schedule": "cosine", "ema_decay": 0.9, "head_dropout": 0.3, "drop_path": 0.2, "val": None}
    settings["val_split"] = None
    whole = train_segmenter(SegmentConfig(**settings))
    original = Trainer._take_step

    def stop_in_the_second_epoch(self, batch, notes):
        if self.at.step == 4:
            self._save_state()
            raise KeyboardInterrupt
        return original(self, batch, notes)

    settings["out"] = str(tmp_path / "interrupted")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_take_step", stop_in_the_second_epoch)
        train_segmenter(SegmentConfig(**settings))
    assert train_segmenter(SegmentConfig(**settings))["loss"] == whole["loss"]
    first, second = (load_file(tmp_path / name / "weights.safetensors") for name in ("run", "interrupted"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(InputError, match="other settings .lr: 0.001 → 0.002"):
        train_segmenter(SegmentConfig(**settings | {"lr": 2e-3}))


@pytest.mark.slow
def test_two_processes_with_mixed_precision_score_as_one(quick, scenes, tmp_path):
    """torchrun with two processes and bf16: the run is whole, and one process measures what both measured together."""
    out = tmp_path / "two"
    settings = quick | {"amp": "bf16", "epochs": 1, "out": str(out)}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    job = torchrun("transfer", "segment", *options, "--sync-bn", "--no-tensorboard")
    printed, _ = job.communicate(timeout=300)
    assert job.returncode == 0, printed
    entry = json.loads((out / "log.jsonl").read_text())
    assert entry["step"] == 2 and np.isfinite(entry["loss"])  # 10 images, 2 processes, 4 per batch and process
    config = TransferEvaluateConfig(data=str(scenes[1]), split="val", checkpoint=str(out), device="cpu", amp="bf16")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun's processes: with more, sums in bf16 are rounded otherwise
    try:
        assert evaluate_transfer(config)["miou"] == pytest.approx(entry["miou"])
    finally:
        torch.set_num_threads(threads)


def test_a_frozen_backbone_keeps_everything(quick):
    settings = quick | {"freeze": True, "backbone": "timm:resnet10t", "epochs": 1, "crop_width": 64}
    train_segmenter(SegmentConfig(**settings))
    model, description = load_segmenter(quick["out"])
    torch.manual_seed(3)
    before = make_backbone(SegmentConfig(**settings), (32, 64))
    assert description.class_names == CLASSES
    for name, value in before.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value), name


def test_backbones_without_stochastic_depth(quick):
    settings = quick | {"backbone": "timm:densenet121", "crop_width": 64, "val": None, "val_split": None}
    with pytest.raises(InputError, match="densenet121 has no stochastic depth; set `drop_path` to 0, not 0.1"):
        dry_run_segmenter(SegmentConfig(**settings))
    assert dry_run_segmenter(SegmentConfig(**settings | {"freeze": True}))


def test_a_run_of_the_package_is_a_backbone(tmp_path, quick):
    full = timm.create_model("fan_micro_4_p8_token", num_classes=3, img_size=32)
    description = ModelDescription("fan_micro_4_p8_token", ("a", "b", "c"), 32, "student")
    save_model(tmp_path / "weights.safetensors", full.state_dict(), description)
    backbone = make_backbone(SegmentConfig(**quick | {"backbone": str(tmp_path), "drop_path": 0.0}), (32, 48))
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    expected = full.eval().forward_intermediates(images, indices=[0, 1, 2, 3], intermediates_only=True)
    for ours, theirs in zip(backbone.eval()(images), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(InputError, match="backbone_pretrained` needs a backbone given as timm:NAME"):
        SegmentConfig(**quick | {"backbone": str(tmp_path), "backbone_pretrained": True})


def test_published_pickles_are_backbones(tmp_path, quick):
    """As the released files are: a state dict of names with a prefix, the moving average beside it, other classes."""
    full = timm.create_model("fan_micro_4_p8_token", num_classes=7, img_size=32)
    averaged = {f"module.{name}": value + 1 for name, value in full.state_dict().items()}
    content = {"state_dict": {f"module.{name}": value for name, value in full.state_dict().items()}}
    torch.save(content | {"state_dict_ema": averaged, "epoch": 300}, tmp_path / "fan.pth.tar")
    named = {"backbone": "timm:fan_micro_4_p8_token", "backbone_checkpoint": str(tmp_path / "fan.pth.tar")}
    backbone = make_backbone(SegmentConfig(**quick | named), (32, 48))
    for name, value in backbone.net.model.state_dict().items():
        assert torch.equal(value, averaged[f"module.{name}"]), name
    with pytest.raises(InputError, match="does not fit"):
        make_backbone(SegmentConfig(**quick | named | {"backbone": "timm:fan_tiny_8_p4_hybrid"}), (32, 48))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "indices", "multiple"), [("resnet10t", (1, 2, 3, 4), 32), ("fan_micro_4_p8", (0, 1, 2, 3), 8)]
)
@pytest.mark.filterwarnings("ignore")
def test_onnx_with_free_sizes(name, indices, multiple, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Segmenter(Backbone(BackboneSpec(name, indices, (64, 96))), 8, 3).eval()
    generator = torch.Generator().manual_seed(1)
    height, width = (torch.export.Dim(side, min=2, max=64) for side in ("h", "w"))
    shapes = ({0: "batch", 2: multiple * height, 3: multiple * width},)
    images = torch.randn(2, 3, 64, 96, generator=generator)
    torch.onnx.export(model, (images,), tmp_path / "x.onnx", dynamo=True, verbose=False, dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    for shape in ((2, 3, 64, 96), (1, 3, 128, 64)):
        images = torch.randn(*shape, generator=generator)
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        np.testing.assert_allclose(found, model(images).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "indices", "channels", "strides"),
    [
        ("fan_tiny_8_p4_hybrid", (0, 1, 5, 9), (128, 256, 192, 192), (4, 8, 16, 16)),
        ("fan_micro_4_p8", (0, 1, 2, 3), (96,) * 4, (8,) * 4),
        ("resnet10t", (1, 2, 3, 4), (64, 128, 256, 512), (4, 8, 16, 32)),
        ("vit_tiny_patch16_224", (2, 5, 8, 11), (192,) * 4, (16,) * 4),
    ],
)
def test_four_maps_of_any_backbone(name, indices, channels, strides):
    assert level_indices(name, (64, 96)) == indices
    with torch.device("meta"):
        backbone = Backbone(BackboneSpec(name, indices, (64, 96)))
        shapes = [tuple(each.shape) for each in backbone(torch.zeros(1, 3, 64, 96))]
    assert (backbone.channels, backbone.strides) == (channels, strides)
    assert shapes == [(1, c, 64 // s, 96 // s) for c, s in zip(channels, strides, strict=True)]


def test_scores_are_torchmetrics():
    generator = torch.Generator().manual_seed(2)
    truth = torch.randint(-1, 5, (3, 17, 23), generator=generator)
    truth[truth == 3] = 2  # a class that does not occur
    predicted = torch.randint(0, 5, truth.shape, generator=generator)
    predicted[predicted == 3] = 0
    scores = SegmentScores.of(confusion_matrix(predicted, truth, 5).numpy().astype(float))
    oracle = {"num_classes": 5, "ignore_index": NO_CLASS}
    mean = MulticlassJaccardIndex(**oracle, average="macro")(predicted, truth)
    each = MulticlassJaccardIndex(**oracle, average="none")(predicted, truth)
    assert scores.miou == pytest.approx(float(mean), abs=1e-6)
    np.testing.assert_allclose(scores.iou[[0, 1, 2, 4]], each[[0, 1, 2, 4]], atol=1e-6)
    assert np.isnan(scores.iou[3])
    assert scores.pixel_accuracy == pytest.approx(
        float(MulticlassAccuracy(**oracle, average="micro")(predicted, truth))
    )
    assert scores.mean_accuracy == pytest.approx(
        float(MulticlassAccuracy(**oracle, average="none")(predicted, truth)[[0, 1, 2, 4]].mean())
    )
    assert scores.by_name(("a", "b", "c", "d", "e"))["iou/d"] is None


def test_whole_images_of_any_size_and_windows():
    torch.manual_seed(0)
    backbone = Backbone(BackboneSpec("fan_micro_4_p8", (0, 1, 2, 3), (32, 48)))
    model = Segmenter(backbone, 8, 3).eval()
    images = torch.randn(2, 3, 43, 61, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = whole_logits(model, images, 8)
        assert whole.shape == (2, 3, 43, 61)
        torch.testing.assert_close(whole_logits(model, images[..., :40, :56], 8), model(images[..., :40, :56]))
        torch.testing.assert_close(window_logits(model, images[..., :32, :48], (32, 48)), model(images[..., :32, :48]))
        # Where the model sees single pixels alone, windows change nothing.
        pixels = window_logits(lambda part: part * 2, images, (16, 24))
    torch.testing.assert_close(pixels, images * 2)


def test_the_head_is_segformers():
    """Against the sum over levels that its linear layers come to."""
    head = MlpHead((5, 7), width=6, classes=4).double().eval()
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(2, c, s, s + 2, generator=generator, dtype=torch.float64) for c, s in ((5, 8), (7, 4))]
    deep = torch.nn.functional.interpolate(head.levels[1](maps[1]), size=(8, 10), mode="bilinear")
    fused = torch.cat([deep, head.levels[0](maps[0])], dim=1)
    torch.testing.assert_close(head(maps), head.classify(head.fuse(fused)))
    assert sum(each.numel() for each in head.parameters()) == 6 * 6 + 8 * 6 + 12 * 6 + 12 + 7 * 4


def test_predictions_never_replace_masks(scenes):
    for out in (scenes[0], scenes[0] / "masks"):
        config = TransferEvaluateConfig(data=str(scenes[0]), checkpoint="run", out=str(out), device="cpu")
        with pytest.raises(InputError, match="`out` .* lies within the data, whose masks it would replace"):
            _prepare_segmenter(config, torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_width": 50}, "must be positive multiples of 8"),
        ({"crop_width": 50, "backbone": "timm:resnet10t"}, "multiples of 32 for resnet10t.*`crop_width`=50"),
        ({"ignore_id": 2}, "`ignore_id`=2 is the id of the class 'disc'"),
        ({"backbone": "timm:no_such"}, "timm has no model 'no_such'"),
        ({"scale_min": 3.0}, "`scale_min` 3.0 is above"),
        ({"val": None}, "`val_split` needs `val`"),
        ({"backbone": "nowhere"}, "no run and no checkpoint at nowhere"),
    ],
)
def test_settings_that_do_not_fit(quick, change, message):
    with pytest.raises(InputError, match=message):
        train_segmenter(SegmentConfig(**quick | change))


def test_recipes_are_the_released_settings():
    names = recipe_names(SegmentConfig)
    assert names == ("segment-fan-base", "segment-fan-large", "segment-fan-small", "segment-fan-tiny")
    for name in names:
        config = resolve(
            SegmentConfig, name, {"data": "x", "val": "z", "classes": "a,b", "backbone": "run", "out": "y"}
        )
        assert (config.crop, config.lr, config.head_lr_scale, config.weight_decay) == ((1024, 1024), 6e-5, 10, 0.01)
        assert (config.schedule, config.sliding_window, config.head_width) == ("poly", True, 768)
        assert round(config.epochs * 2975 / 8, -3) == 160_000
        # The command at its head, on Cityscapes' training images.
        head = (Path(recipes.__file__).parent / f"{name}.yaml").read_text()
        processes = int(re.search(r"--nproc-per-node (\d+)", head)[1])
        assert processes * config.batch_size * config.accumulate == config.lr_batch == 8
        check_shares(2975, config.batch_size * config.accumulate, processes)


def test_the_command(quick, capsys):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in (quick | {"epochs": 1}).items()]
    assert main(["transfer", "segment", *options, "--tensorboard"]) == 0
    assert re.search(r"segmenter: .*, mean IoU ", capsys.readouterr().out)
    entry = json.loads(Path(quick["out"], "log.jsonl").read_text())
    assert {"miou", "iou/disc", "loss", "accuracy"} <= entry.keys()


def test_a_dry_run_takes_steps_and_writes_nothing(quick, scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = quick | {"accumulate": 2, "lr_batch": 16, "freeze": True}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if name != "freeze"]
    assert main(["transfer", "segment", "--dry-run", "--freeze", *options]) == 0
    shown = {words[0]: " ".join(words[1:]) for line in capsys.readouterr().out.splitlines() if (words := line.split())}
    assert shown["data"] == "10 images to learn from, 3 to measure on"
    assert shown["step"] == "8 images, learning rate up to 0.0005"
    assert shown["steps"].startswith("4 (2 per epoch, the first 0 of them warm-up)")
    assert shown["model"].endswith("feature maps at strides 8, 8, 8, 8")
    assert shown["freeze"] == "yes" and "of training steps" in shown["time"]
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="must be positive multiples of 8"):
        dry_run_segmenter(SegmentConfig(**settings | {"crop_width": 50}))
    found = dry_run_segmenter(SegmentConfig(**settings))
    assert (found.steps, found.step_images) == (train_segmenter(SegmentConfig(**settings))["steps"], 8)
    with pytest.raises(InputError, match="other settings .epochs: 2 → 3"):
        dry_run_segmenter(SegmentConfig(**settings | {"epochs": 3}))
