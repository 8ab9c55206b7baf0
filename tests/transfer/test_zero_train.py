"""A token head as a segmenter without training, and corrupted scores."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.classification import BinaryAUROC, BinaryJaccardIndex

from stl_offline.cli.main import main
from stl_offline.config_transfer import TransferEvaluateConfig, ZeroTrainConfig
from stl_offline.errors import InputError
from stl_offline.models import ModelDescription, save_model
from stl_offline.transfer import evaluate_transfer, score_token_head
from stl_offline.transfer import zero_train as module
from stl_offline.transfer.backbone import Backbone, BackboneSpec
from stl_offline.transfer.segmenter import Segmenter, SegmenterDescription
from stl_offline.transfer.zero_train import log_odds, resize
from tests.transfer.conftest import CLASSES, IGNORE

GRID = (4, 6)


class Painted(torch.nn.Module):
    """Token logits that are high for class 1 where an image is bright: (class logits, token logits)."""

    def __init__(self):
        super().__init__()
        self.pretrained_cfg = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}

    def grid_size(self, height, width):
        return height // 8, width // 8

    def forward(self, images):
        bright = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 8).flatten(1)
        tokens = torch.stack([-bright, 8 * bright - 4, torch.zeros_like(bright)], dim=-1)
        return tokens.mean(1), tokens


@pytest.fixture
def painted(tmp_path, monkeypatch):
    """Images of the class b whose upper left is bright, a box for each, and a model that sees brightness."""
    boxes = {}
    for number in range(3):
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[: 8 + 8 * number, :16] = 255
        for name in "abc":
            (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
        boxes[f"b/{number}.png"] = [0, 0, 0.5, (8 + 8 * number) / 32]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    description = ModelDescription("fan_micro_4_p8_token", ("a", "b", "c"), 32, "labeler", interpolation="bilinear")
    monkeypatch.setattr(module, "load_model", lambda _: (Painted(), description))
    return {"data": str(tmp_path / "images"), "masks": str(tmp_path / "boxes.json"), "checkpoint": "x", "device": "cpu"}


def test_masks_of_other_images_are_refused(painted, tmp_path):
    """The same names do not make them theirs: at the image's scale or another, a mask has the image's shape."""
    (tmp_path / "masks" / "b").mkdir(parents=True)
    given = painted | {"masks": str(tmp_path / "masks")}
    for size, fits in (((64, 64), True), ((32, 32), True), ((40, 32), False)):
        Image.fromarray(np.eye(*size, dtype=np.uint8)).save(tmp_path / "masks" / "b" / "1.png")
        if fits:
            assert score_token_head(ZeroTrainConfig(**given))["samples"] == 1
        else:
            with pytest.raises(InputError, match="mask of b/1.png has 32 × 40 pixels, its image 32 × 32"):
                score_token_head(ZeroTrainConfig(**given))


def test_what_is_bright_is_the_object(painted, capsys):
    result = score_token_head(ZeroTrainConfig(**painted))
    assert (result["images"], result["samples"]) == (9, 3)
    assert result["auroc"] == 1.0
    assert result["all_foreground"] == pytest.approx(np.mean([1 / 8, 2 / 8, 3 / 8]))
    assert 0.8 < result["iou/foreground"] < result["iou/background"] < 1
    assert main(["transfer", "zero-train", *(f"--{name}={value}" for name, value in painted.items())]) == 0
    assert "masks       3 of 9 images have one\n" in (out := capsys.readouterr().out)
    assert f"mean IoU    {100 * result['miou']:.2f} %" in out
    low = score_token_head(ZeroTrainConfig(**painted, threshold=0.001))
    assert low["iou/foreground"] == pytest.approx(low["all_foreground"])


def test_masks_of_other_images_and_an_untrained_head(painted, tmp_path, monkeypatch):
    (tmp_path / "other.json").write_text('{"z/9": [0, 0, 1, 1]}')
    with pytest.raises(InputError, match="none of the 9 images has a mask"):
        score_token_head(ZeroTrainConfig(**painted | {"masks": str(tmp_path / "other.json")}))
    description = ModelDescription("fan_micro_4_p8_token", ("a",), 32, "student", token_head_trained=False)
    monkeypatch.setattr(module, "load_model", lambda _: (Painted(), description))
    with pytest.raises(InputError, match="token head of x was not trained"):
        score_token_head(ZeroTrainConfig(**painted))


def test_log_odds_and_resizing():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 24, 5, generator=generator, dtype=torch.float64)
    odds = log_odds(logits, torch.tensor([4, 1]))
    own = logits.softmax(-1)[torch.arange(2), :, [4, 1]]
    torch.testing.assert_close(odds, own.log() - (1 - own).log())
    mapped = odds[0].unflatten(0, GRID)
    torch.testing.assert_close(resize(mapped, GRID), mapped)
    assert resize(mapped, (17, 50)).shape == (17, 50)
    # A probability of one half is where the odds are even, as in torchmetrics' threshold.
    truth = torch.randint(0, 2, GRID, generator=generator)
    iou = BinaryJaccardIndex(threshold=0.5)(own[0].unflatten(0, GRID), truth)
    predicted = mapped >= 0
    assert float(iou) == pytest.approx(float((predicted & truth.bool()).sum() / (predicted | truth.bool()).sum()))
    area = module.auroc(mapped.numpy().ravel(), truth.numpy().ravel(), 1 - truth.numpy().ravel())
    assert area == pytest.approx(float(BinaryAUROC()(own[0].unflatten(0, GRID).float(), truth)))


def test_corrupted_images_and_the_masks_that_stay(scenes, tmp_path, capsys, monkeypatch):
    torch.manual_seed(1)
    model = Segmenter(Backbone(BackboneSpec("resnet10t", (1, 2, 3, 4), (32, 64))), 8, 3)
    description = SegmenterDescription("resnet10t", (1, 2, 3, 4), CLASSES, (32, 64), 8, IGNORE)
    save_model(tmp_path / "weights.safetensors", model.state_dict(), description)
    settings = {"data": str(scenes[1]), "split": "val", "checkpoint": str(tmp_path), "device": "cpu"}
    clean = evaluate_transfer(TransferEvaluateConfig(**settings))
    result = evaluate_transfer(TransferEvaluateConfig(**settings, corrupt="gaussian_noise:1-2,fog:3"))
    assert {name: result[name] for name in clean} == clean
    assert {kind: list(each) for kind, each in result["corrupted"].items()} == {
        "gaussian_noise": ["1", "2"],
        "fog": ["3"],
    }
    noise, fog = (np.mean(list(each.values())) for each in result["corrupted"].values())
    assert result["corrupted_miou"] == pytest.approx((noise + fog) / 2)
    assert result["retention"] == pytest.approx(result["corrupted_miou"] / clean["miou"])
    again = evaluate_transfer(TransferEvaluateConfig(**settings, corrupt="gaussian_noise:2", workers=3))
    assert again["corrupted"]["gaussian_noise"]["2"] == result["corrupted"]["gaussian_noise"]["2"]
    other = evaluate_transfer(TransferEvaluateConfig(**settings, corrupt="gaussian_noise:2", seed=1))
    assert other["corrupted"] != again["corrupted"]
    words = ["transfer", "evaluate", *(f"--{name}={value}" for name, value in settings.items()), "--corrupt", "fog:3"]
    with monkeypatch.context() as patch:
        patch.setattr("stl_offline.transfer.evaluate._prepare_segmenter", None)  # refused before any work
        assert main([*words, "--page", str(tmp_path)]) == 1
        assert "it is a folder; choose another target" in capsys.readouterr().err
    assert main([*words, "--page", str(tmp_path / "page.html"), "--examples", "2"]) == 0
    assert "corrupted: mean IoU" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert page.count("<figcaption>") == 2 * 5 and "fog 3: prediction" in page
    assert page.count("data:image/jpeg") == 2 * 2 and page.count("data:image/png") == 2 * 3
    with pytest.raises(InputError, match="there is no corruption 'mist'"):
        evaluate_transfer(TransferEvaluateConfig(**settings, corrupt="mist"))
