"""Suites through the whole command, against timm's own transform and labels, torchmetrics and arithmetic by hand."""

import csv
import io
import json
import os
import shutil
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from timm.data import RealLabelsImagenet
from torchmetrics.functional.classification import multiclass_calibration_error

from stl_offline.cli.main import main
from stl_offline.config import EvaluateConfig
from stl_offline.errors import InputError, JoinError
from stl_offline.evaluation import evaluate, suites
from stl_offline.evaluation.corruptions import corrupt
from stl_offline.evaluation.images import Transform
from stl_offline.evaluation.measures import ALEXNET_ERROR, BENCHMARK_CORRUPTIONS
from stl_offline.evaluation.suites import subset_classes
from stl_offline.models import ModelDescription, load_classifier, save_model
from tests.evaluation.trees import MODEL, WNIDS, Trees, as_timm, draw, encoded, logits_of, make_model
from tests.forks import COMMAND_LINE, Fork

ALL = ("all", "subset")
CSV = ["model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation"]
MACHINE = {"device": "cpu", "workers": 1}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tmp_path_factory.mktemp("weights") / "small.safetensors"


@pytest.fixture(scope="module")
def model(weights):
    return make_model(weights)


@pytest.fixture(scope="module")
def trees(model, tmp_path_factory):
    return Trees(tmp_path_factory.mktemp("suites"), model)


def score(trees, weights, *names, **settings):
    settings = {"model": MODEL, "checkpoint": str(weights), "partial": True, **MACHINE} | settings
    return evaluate(EvaluateConfig(suite=names, data=trees.data(*names), **settings))


@pytest.fixture(scope="module")
def result(trees, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("csv") / "scores.csv"
    return score(trees, weights, *suites.SUITES, csv=str(out)), out


def agrees(found, logits, labels):
    """Scores are those of logits by timm's transform and of metrics that nobody here wrote."""
    ranks = (logits > logits.gather(1, labels[:, None])).sum(dim=1)
    assert found["samples"] == len(labels)
    assert found["top1"] == pytest.approx(float((ranks == 0).double().mean()))
    assert found["top5"] == pytest.approx(float((ranks < 5).double().mean()))
    assert found["nll"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-4)
    expected = multiclass_calibration_error(logits.double().softmax(-1), labels, logits.shape[1], n_bins=15, norm="l1")
    assert found["ece"] == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("name", ["imagenet", "sketch", "v2"])
def test_whole_sets(result, trees, name):
    agrees(result[0]["suites"][name]["all"], *trees.truth(name))
    assert 0 < result[0]["suites"][name]["all"]["top1"] < result[0]["suites"][name]["all"]["top5"] < 1


@pytest.mark.parametrize("name", ["a", "r"])
def test_two_hundred_classes_have_three_figures(result, trees, name):
    """Over the classes of the set, as timm's validate.py cuts logits, and over all; and the clean images of those."""
    found = result[0]["suites"][name]
    logits, labels = trees.truth(name)
    columns = torch.tensor(subset_classes(name))
    agrees(found["subset"], logits[:, columns], torch.searchsorted(columns, labels))
    agrees(found["all"], logits, labels)
    logits, labels = trees.truth("imagenet")
    among = torch.isin(labels, columns)
    if among.any():
        agrees(found["clean"], logits[among][:, columns], torch.searchsorted(columns, labels[among]))


def test_real_labels_as_timm_evaluates_them(result, trees):
    names = {f"ILSVRC2012_val_{number + 1:08d}.JPEG": None for number in range(50_000)}
    oracle = RealLabelsImagenet(list(names))
    logits, _ = trees.truth("imagenet")
    chosen = [path.name for path, _, _ in trees.parts["imagenet"]]
    oracle.filenames = chosen
    oracle.add_result(logits)
    found = result[0]["suites"]["real"]["all"]
    assert found["samples"] == sum(bool(oracle.real_labels[name]) for name in chosen)
    assert 100 * found["top1"] == pytest.approx(oracle.get_accuracy(1))
    assert 100 * found["top5"] == pytest.approx(oracle.get_accuracy(5))
    assert "nll" not in found


def test_imagenet_c(result, trees):
    """Every severity's scores, errors by corruption, CE, mCE and retention."""
    found = result[0]["suites"]["c"]
    errors = {}
    for name, scores in found["parts"].items():
        logits, labels = trees.truth(f"c/{name}")
        agrees(scores, logits, labels)
        errors.setdefault(name.split("/")[0], []).append(1 - float((logits.argmax(1) == labels).double().mean()))
    assert len(found["parts"]) == 16 * 5
    assert set(found["error"]) == {*BENCHMARK_CORRUPTIONS, "saturate"}
    assert set(found["ce"]) == {*BENCHMARK_CORRUPTIONS}
    assert found["mce"] == pytest.approx(
        np.mean([np.mean(errors[k]) / ALEXNET_ERROR[k] for k in BENCHMARK_CORRUPTIONS])
    )
    top1 = 1 - np.mean([errors[kind] for kind in BENCHMARK_CORRUPTIONS])
    assert (found["top1"], found["retention"]) == (pytest.approx(top1), None)  # it has 2 of ImageNet's 8 images


def test_csv_has_timms_columns(result):
    rows = list(csv.DictReader(io.StringIO(result[1].read_text())))
    assert list(rows[0])[:9] == CSV
    own = {row["set"]: row for row in rows if row["classes"].startswith("all")}
    expected = result[0]["suites"]["v2"]["all"]
    assert float(own["imagenet-v2"]["top1"]) == pytest.approx(100 * expected["top1"], abs=1e-3)
    assert float(own["imagenet-v2"]["top5_err"]) == pytest.approx(100 - 100 * expected["top5"], abs=1e-3)
    assert own["imagenet-v2"]["img_size"] == "160" and own["imagenet-v2"]["param_count"] == "0.47"
    assert own["imagenet-c/fog/3"]["crop_pct"] == "1.0" and own["imagenet"]["crop_pct"] == "0.95"
    assert [row["classes"] for row in rows if row["set"] == "imagenet-a"] == ["200 of 1000", "all 1000"]


@pytest.mark.parametrize("size", [(230, 190), (64, 300), (160, 160)])
@pytest.mark.parametrize("changes", [{}, {"crop_pct": 1.0}, {"interpolation": "bilinear"}])
def test_the_transform_is_timms(model, size, changes):
    classifier = timm.data.resolve_model_data_config(model, use_test_size=True) | changes
    transform = Transform((160, 160), classifier["crop_pct"], classifier["interpolation"])
    pixels = torch.from_numpy(transform(draw(3, size))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(classifier[name])[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close((pixels - mean) / std, as_timm(model, **changes)(draw(3, size)))


def test_images_that_are_cropped_already_stay_as_they_are():
    transform = Transform((160, 128), 0.5, "bicubic", as_is=True)
    image = draw(1, (128, 160))
    assert (transform(image) == np.asarray(image)).all()
    # Others lose nothing at their borders.
    assert (transform(image.resize((256, 320), Image.NEAREST)) != 0).any()
    assert transform(draw(1, (224, 280))).shape == (160, 128, 3)


def test_published_fans_are_prepared_as_their_authors_do(tmp_path):
    fan = timm.create_model("fan_tiny_12_p16_224")
    save_file(fan.state_dict(), tmp_path / "fan.safetensors")
    found = load_classifier(tmp_path / "fan.safetensors", "timm:fan_tiny_12_p16_224")
    assert (found.side, found.crop_pct, found.interpolation) == ((224, 224), 1.0, "bicubic")
    assert (found.mean, found.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert found.class_names == WNIDS


def test_validation_takes_timms_test_size():
    """As timm's validate.py does; ImageNet-C keeps the size of training, since its images are of that size."""
    found = timm.create_model("convnext_atto.d2_in1k")
    assert found.pretrained_cfg["test_input_size"] == (3, 288, 288)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stl_offline.models.classifier.pretrained_model", lambda *_: found)
        classifier = load_classifier(None, "convnext_atto.d2_in1k")
    assert (classifier.side, classifier.trained_side, classifier.crop_pct) == ((288, 288), (224, 224), 0.95)


def test_another_order_of_the_model_s_classes(trees, weights, model, tmp_path, result):
    """Classes are found by name: a model that lists them in another order gets the same scores."""
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    state = dict(model.state_dict())
    state["fc.weight"], state["fc.bias"] = state["fc.weight"][order].contiguous(), state["fc.bias"][order].contiguous()
    save_file(state, tmp_path / "shuffled.safetensors")
    names = tmp_path / "names.txt"
    names.write_text("\n".join(WNIDS[number] for number in order))
    found = score(trees, tmp_path / "shuffled.safetensors", "a", "v2", class_names=str(names))
    for suite, view in (("a", "subset"), ("a", "all"), ("v2", "all")):
        assert found["suites"][suite][view] == pytest.approx(result[0]["suites"][suite][view], rel=1e-5)
    names.write_text("\n".join(f"class {number}" for number in range(1000)))
    with pytest.raises(JoinError, match="has 0 of ImageNet's 1,000 classes under their WordNet ids"):
        score(trees, weights, "v2", class_names=str(names))


def test_overrides_of_size_and_crop(trees, weights, model):
    found = score(trees, weights, "v2", "c", img_size=96, crop_pct=0.7)
    data = [path.read_bytes() for path, _, _ in trees.parts["v2"]]
    changes = {"input_size": (3, 96, 96), "crop_pct": 0.7}
    agrees(found["suites"]["v2"]["all"], logits_of(model, data, **changes), trees.truth("v2")[1])
    assert "transform" not in found["suites"]["c"]  # that of all suites: a crop was asked for


def test_a_broken_image_is_one_line(trees, weights, tmp_path):
    root = shutil.copytree(trees.root / "sketch", tmp_path / "sketch")
    victim = sorted(root.rglob("*.JPEG"))[3]
    victim.write_bytes(victim.read_bytes()[:300])
    with pytest.raises(InputError, match=rf"sketch sketch: the image {victim.parent.name}/{victim.name} cannot be dec"):
        evaluate(
            EvaluateConfig(
                suite=("sketch",),
                data=f"sketch={root}",
                model=MODEL,
                checkpoint=str(weights),
                partial=True,
                **MACHINE,
            )
        )


def test_an_image_too_few(trees, weights):
    with pytest.raises(InputError, match=r"has 8 of the 1,000 classes of the suite sketch"):
        score(trees, weights, "sketch", partial=False)


def test_a_count_that_is_not_the_authors(trees, weights, tmp_path, monkeypatch):
    root = tmp_path / "v2"
    for number in range(1000):
        (root / str(number)).mkdir(parents=True)
    (root / "7" / "x.jpeg").write_bytes(encoded(draw(0)))
    settings = {"model": MODEL, "checkpoint": str(weights), **MACHINE}
    with pytest.raises(InputError, match="v2 has 1 images, the suite v2 has 10,000; download it again, or score"):
        evaluate(EvaluateConfig(suite=("v2",), data=f"v2={root}", **settings))
    monkeypatch.setitem(suites._IMAGES, "v2", 1)
    assert evaluate(EvaluateConfig(suite=("v2",), data=f"v2={root}", **settings))["suites"]["v2"]["all"]["samples"] == 1


@pytest.fixture(scope="module")
def data(trees):
    """The images of ImageNet-A as a data set of one's own, whose classes are a part of the model's."""
    return str(trees.root / "a")


class TestOwnData:
    def run(self, data, weights, **settings):
        return evaluate(
            EvaluateConfig(data=data, model=f"timm:{MODEL}", checkpoint=str(weights), **MACHINE, **settings)
        )

    def test_all_classes_or_those_of_the_data(self, data, trees, weights):
        logits, labels = trees.truth("a")
        found = self.run(data, weights)["suites"]["data"]
        agrees(found["clean"], logits, labels)
        columns = labels.unique()
        found = self.run(data, weights, classes="subset")["suites"]["data"]
        agrees(found["clean"], logits[:, columns], torch.searchsorted(columns, labels))
        assert found["classes"] == "subset"

    def test_scores_that_are_stored_are_of_the_same_labels(self, data, trees, weights, tmp_path):
        """The class list that is given makes the labels of the images, so another one has other scores."""
        names = [f"class {number}" for number in range(1000)]
        own = sorted({path.parent.name for path, _, _ in trees.parts["a"]})
        found = []
        for first in (0, 500):
            listed = list(names)
            listed[first : first + len(own)] = own
            (tmp_path / "names.txt").write_text("\n".join(listed))
            given = {"class_names": str(tmp_path / "names.txt")}
            found.append(self.run(data, weights, **given)["suites"]["data"]["clean"])
            assert found[-1] == self.run(data, weights, resume=False, **given)["suites"]["data"]["clean"]
        assert found[0]["nll"] != found[1]["nll"]

    def test_images_of_16_bits_are_scaled_and_floats_refused(self, trees, weights, tmp_path):
        """As packing does it. Pillow would clip the first to white and read the second as black."""
        folder = tmp_path / "data" / trees.parts["a"][0][0].parent.name
        folder.mkdir(parents=True)
        grey = np.asarray(Image.open(trees.parts["a"][0][0]).convert("L"))
        found = {}
        for kind, pixels in (("8", grey), ("16", grey.astype(np.uint16) * 257)):
            Image.fromarray(pixels).save(folder / "x.png")
            found[kind] = self.run(str(tmp_path / "data"), weights, classes="subset")["suites"]["data"]["clean"]
        assert found["16"]["nll"] == found["8"]["nll"]
        Image.fromarray(grey / np.float32(255)).save(folder / "x.tiff")
        (folder / "x.png").unlink()
        with pytest.raises(InputError, match="x.tiff cannot be decoded .pixels are floating-point numbers"):
            self.run(str(tmp_path / "data"), weights)

    def test_generated_corruptions(self, data, trees, weights, model):
        """The clean images at the model's input size, corrupted by (seed, key, kind, severity)."""
        found = self.run(data, weights, corrupt="gaussian_noise:2-3,contrast:5", seed=7)["suites"]["data"]
        assert list(found["parts"]) == ["gaussian_noise/2", "gaussian_noise/3", "contrast/5"]
        transform = Transform((160, 160), 0.95, "bilinear")
        images = []
        for path, _, _ in trees.parts["a"]:
            key = f"{path.parent.name}/{path.name}"
            pixels = transform(Image.open(path).convert("RGB"))
            images.append(encoded(Image.fromarray(corrupt(pixels, "gaussian_noise", 3, seed=7, key=key)), "PNG"))
        agrees(found["parts"]["gaussian_noise/3"], logits_of(model, images, crop_pct=1.0), trees.truth("a")[1])
        assert found["mce"] is None and found["error"] == {}
        again = self.run(data, weights, corrupt="gaussian_noise:3", seed=8)["suites"]["data"]["parts"]
        assert again["gaussian_noise/3"] != found["parts"]["gaussian_noise/3"]

    def test_classes_that_the_model_lacks(self, data, weights, trees):
        with pytest.raises(
            JoinError, match=r"6 of the 6 classes of .*folders 0 to 999 are ImageNet-V2's.*`suite=v2`"
        ) as e:
            self.run(str(trees.root / "v2"), weights)
        assert "\n" not in str(e.value)


class TestRun:
    """A model that a run trained: its own classes, its own resizing, and its tokens."""

    @pytest.fixture
    def run(self, tmp_path):
        """FAN with three classes, of which it always prefers "other"; "dark" and "light" by the mean of the image."""
        torch.manual_seed(0)
        network = timm.create_model("fan_micro_4_p8_token", num_classes=3)
        with torch.no_grad():
            for head in (network.head, network.aux_head):
                head.bias.copy_(torch.tensor([0.0, 50.0, 0.0]))
        description = ModelDescription("fan_micro_4_p8_token", ("dark", "other", "light"), 64, "student")
        save_model(tmp_path / "weights.safetensors", network.state_dict(), description)
        for number in range(6):
            path = tmp_path / "val" / ("dark", "light")[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(number, (90, 70)).save(path)
        return network.eval(), str(tmp_path / "weights.safetensors"), str(tmp_path / "val")

    def truth(self, network, data):
        """Logits of class head and mean token, and columns, by Pillow's box filter and plain torch."""
        paths = sorted(path for path in Path(data).rglob("*.png"))
        mean, std = (torch.tensor(network.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
        found = []
        for path in paths:
            image = Image.open(path).convert("RGB").resize((82, 64), Image.BOX)
            pixels = torch.from_numpy(np.array(image.crop((9, 0, 73, 64)))).permute(2, 0, 1) / 255
            found.append((pixels - mean) / std)
        with torch.no_grad():
            logits, tokens = network(torch.stack(found))
        return logits, tokens.mean(dim=1), torch.tensor([0 if path.parent.name == "dark" else 2 for path in paths])

    def test_subset_and_all_without_suites(self, run, capsys):
        _, weights, data = run
        found = {name: evaluate(EvaluateConfig(data=data, checkpoint=weights, classes=name, **MACHINE)) for name in ALL}
        assert found["all"]["top1"] == found["all"]["token_top1"] == 0
        assert (found["all"]["classes"], found["all"]["classes_compared"]) == ("all", 3)
        assert found["subset"]["top1"] > 0 and found["subset"]["classes_compared"] == 2
        assert found["subset"]["nll"] < 5 < found["all"]["nll"]
        for name, words in (
            ("all", "over all 3 classes of the model"),
            ("subset", "over the 2 classes of the data, of 3"),
        ):
            arguments = ["--data", data, "--checkpoint", weights, "--classes", name, "--device", "cpu"]
            code, out, _ = call(capsys, "evaluate", *arguments)
            assert code == 0 and out.startswith("6 images: top-1 ") and out.endswith(f"{words}\n")

    def test_generated_corruptions_of_a_run(self, run):
        network, weights, data = run
        config = EvaluateConfig(data=data, checkpoint=weights, corrupt="pixelate:5", classes="subset", **MACHINE)
        found = evaluate(config)
        assert found["transform"]["interpolation"] == "box" and found["transform"]["crop_pct"] == 1.0
        logits, tokens, columns = self.truth(network, data)
        kept = torch.tensor([0, 2])
        agrees(found["suites"]["data"]["clean"], logits[:, kept], columns // 2)
        token_top1 = float((tokens[:, kept].argmax(dim=1) == columns // 2).double().mean())
        assert found["suites"]["data"]["clean"]["token_top1"] == pytest.approx(token_top1)
        assert found["suites"]["data"]["parts"]["pixelate/5"]["samples"] == 6

    def test_a_run_of_other_classes_has_no_suites(self, run, trees):
        with pytest.raises(
            JoinError, match="fan_micro_4_p8_token has 0 of ImageNet's 1,000 classes under their WordNet"
        ):
            config = EvaluateConfig(suite=("v2",), data=trees.data("v2"), checkpoint=run[1], partial=True, **MACHINE)
            evaluate(config)


WRONG = [
    ({"data": "x"}, "give a `checkpoint`"),
    ({"data": ("x", "y"), "model": "m"}, "without `suite` there is one `data`, got 2"),
    ({"data": "x", "model": "m", "suite": ("b",)}, "`suite` must be among imagenet, .* got 'b'"),
    ({"data": "x", "model": "m", "suite": ("a",)}, "with `suite`, `data` is NAME=SRC once for each of a; got x"),
    ({"data": ("a=x", "r=y"), "model": "m", "suite": ("a",)}, "NAME=SRC once for each of a"),
    ({"data": ("a=x", "a=y"), "model": "m", "suite": ("a", "a")}, "NAME=SRC once for each"),
    ({"data": "a=x", "model": "m", "suite": ("a",), "corrupt": "fog"}, "leave out `suite`"),
    ({"data": "a=x", "model": "m", "suite": ("a",), "classes": "subset"}, "`classes` goes without `suite`"),
    ({"data": "a=x", "model": "m", "suite": ("a",), "real_labels": "j"}, "goes with the suite real"),
    ({"data": "x", "checkpoint": "c", "partial": True}, "go with `suite`"),
    ({"data": "x", "checkpoint": "c", "mean": (0.5,) * 3}, "go with a timm `model`"),
    ({"data": "x", "model": "m", "mean": (0.5,) * 2}, "three finite numbers"),
    ({"data": "x", "model": "m", "std": (0.2, 0.2, 0.0)}, "`std` must be three numbers above 0"),
    ({"data": "x", "model": "m", "by_order": True}, "of a `checkpoint`; give one"),
    ({"data": "x", "checkpoint": "c", "seed": 1}, "give `corrupt`, too"),
    ({"data": "x", "checkpoint": "c", "csv": "f"}, "`csv` goes with"),
    ({"data": "x", "model": "m", "skip_broken": True}, "these score every image"),
    ({"data": "x", "model": "m", "crop_pct": 1.5}, "`crop_pct` must be in"),
]


@pytest.mark.parametrize(("settings", "words"), WRONG, ids=lambda value: None if isinstance(value, str) else str(value))
def test_settings_that_do_not_go_together(settings, words):
    with pytest.raises(InputError, match=words):
        EvaluateConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"corrupt": "rain"}, "there is no corruption 'rain'; groups: noise, "),
        ({"model": "resnet_of_nowhere"}, "is not timm:NAME with a name of timm's registry"),
        ({"checkpoint": "nowhere.pth"}, "there is no weights file at nowhere.pth"),
        ({"model": "test_vit", "checkpoint": None, "img_size": 97}, "cannot take images of 97×97 pixels"),
        ({"data": "nowhere"}, "there is nothing at nowhere"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
def test_what_is_not_there(settings, words, weights, model):
    with pytest.raises(InputError, match=words):
        evaluate(EvaluateConfig(**{"data": "x", "model": MODEL, "checkpoint": str(weights), **MACHINE} | settings))


def command(trees, weights, *names):
    data = [word for each in trees.data(*names) for word in ("--data", each)]
    machine = ["--device", "cpu", "--workers", "1", "--partial", "--json"]
    return ["evaluate", "--suite", ",".join(names), *data, "--model", MODEL, "--checkpoint", weights, *machine]


def call(capsys, *arguments):
    capsys.readouterr()
    code = main([str(each) for each in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_killed_it_goes_on_behind_what_is_done(trees, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STL_OFFLINE_CACHE", str(tmp_path))
    process = Fork(COMMAND_LINE, *command(trees, weights, "sketch", "c"))
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "scores").glob("*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    stored = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "scores").glob("*.json")}
    assert 3 <= len(stored) < 81
    # One of them damaged: it is scored again.
    first = sorted(stored)[0]
    (tmp_path / "scores" / first).write_text(
        (tmp_path / "scores" / first).read_text().replace('"sha256": "', '"sha256": "0')
    )
    monkeypatch.delenv("STL_OFFLINE_QUIET")
    code, out, error = call(capsys, *command(trees, weights, "sketch", "c"))
    assert code == 0
    assert f"{len(stored) - 1} of 81 parts were scored before, with the same weights" in error
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "scores").glob("*.json")}
    assert len(now) == 81 and all(now[name] == stored[name] for name in stored if name != first)
    monkeypatch.setenv("STL_OFFLINE_CACHE", str(tmp_path / "new"))
    assert json.loads(out) == score(trees, weights, "sketch", "c")


def test_processes_of_torchrun_share_the_images(trees, weights, tmp_path, monkeypatch, result):
    """Counts are the same, and sums beyond rounding; the first process alone prints."""
    monkeypatch.setenv("STL_OFFLINE_CACHE", str(tmp_path))
    out, _ = Fork(COMMAND_LINE, *command(trees, weights, "imagenet", "a", "v2"), processes=2).communicate()
    (line,) = [line for line in out.splitlines() if line.startswith("{")]
    found = json.loads(line)["suites"]
    for suite, views in found.items():
        for view, scores in views.items():
            expected = result[0]["suites"][suite][view]
            assert [scores[name] for name in ("samples", "top1", "top5")] == [
                expected[name] for name in ("samples", "top1", "top5")
            ]
            assert scores == pytest.approx(expected, rel=1e-4)


def test_the_printed_tables(trees, weights, capsys, result):
    code, out, _ = call(capsys, *[word for word in command(trees, weights, *suites.SUITES) if word != "--json"])
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("model: test_resnet, 0.47 M parameters, 1,000 classes, weights ")
    assert lines[1].startswith(
        "transform: 160×160 px, bilinear, center crop, crop_pct 0.95; mean 0.500 0.500 0.500, std"
    )
    assert lines[2].startswith("transform of c: 160×160 px, images of that size neither resized nor cropped")
    row = next(line for line in lines if line.startswith("imagenet-a") and "200 of 1,000" in line)
    assert f"{100 * result[0]['suites']['a']['subset']['top1']:.2f}" in row
    summary = f"mCE {100 * result[0]['suites']['c']['mce']:.2f} %"
    assert any(line.startswith(summary) for line in lines)
    assert any(line.startswith("extra: saturate") for line in lines)
    assert any(line.startswith("no retention: it takes the accuracy on the same images") for line in lines)
    assert any(line.startswith("partial: ") for line in lines)


def test_tars_of_a_suite_are_read_where_they_lie(trees, weights, tmp_path, result):
    folder = tmp_path / "tars"
    folder.mkdir()
    with tarfile.open(folder / "imagenet-a.tar", "w") as archive:
        archive.add(trees.root / "a", "imagenet-a")
    settings = {"model": MODEL, "checkpoint": str(weights), "partial": True, **MACHINE}
    for place in (folder, folder / "imagenet-a.tar"):
        found = evaluate(EvaluateConfig(suite=("a",), data=f"a={place}", **settings))["suites"]["a"]
        assert found["subset"] == pytest.approx(result[0]["suites"]["a"]["subset"], rel=1e-6)
