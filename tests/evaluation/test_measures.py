"""Scores against arithmetic that nobody here wrote: torchmetrics, torch's losses, timm's ReaL evaluator."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
import torch.nn.functional as F
from timm.data import RealLabelsImagenet
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from stl_offline.errors import InputError
from stl_offline.evaluation.figures import suite_figures
from stl_offline.evaluation.measures import (
    ALEXNET_ERROR,
    BENCHMARK_CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    SEVERITIES,
    ClassView,
    Tally,
    check_finite,
    corruption_scores,
    scores_of,
)
from stl_offline.evaluation.suites import imagenet_wnids, subset_classes


def draw(samples: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(samples, classes, generator=generator)
    labels = torch.randint(classes, (samples,), generator=generator)
    logits[torch.arange(samples), labels] += 2
    return logits, labels


@pytest.mark.parametrize(("samples", "classes"), [(1, 2), (97, 7), (400, 1000), (33, 3)])
def test_scores_are_those_of_torchmetrics_and_torch(samples, classes):
    logits, labels = draw(samples, classes)
    tally = Tally()
    for part in torch.arange(samples).split(13):
        tally.add(logits[part], labels[part])
    found = tally.scores()
    assert found["samples"] == samples
    for name, k in (("top1", 1), ("top5", min(5, classes))):
        expected = multiclass_accuracy(logits, labels, classes, average="micro", top_k=k)
        assert found[name] == pytest.approx(float(expected), abs=1e-6)
    assert found["nll"] == pytest.approx(float(F.cross_entropy(logits.double(), labels)), rel=1e-9)
    expected = multiclass_calibration_error(logits.double().softmax(-1), labels, classes, n_bins=15, norm="l1")
    assert found["ece"] == pytest.approx(float(expected), abs=1e-6)
    assert "token_top1" not in found


def test_processes_add_up_to_one():
    logits, labels = draw(101, 9)
    whole, halves = Tally(), [Tally(), Tally()]
    whole.add(logits, labels)
    for rank, half in enumerate(halves):
        half.add(logits[rank::2], labels[rank::2])
    counts = [0, 1, 2, *range(6, 21), *range(36, 51)]
    summed = halves[0].vector + halves[1].vector
    assert torch.equal(summed[counts], whole.vector[counts])
    torch.testing.assert_close(summed, whole.vector, rtol=1e-12, atol=0)


def test_real_labels_as_timm_counts_them(tmp_path):
    random = np.random.default_rng(3)
    logits, _ = draw(60, 1000, seed=4)
    best = logits.topk(8).indices.numpy()
    labels = [random.choice(best[row], random.integers(0, 4), replace=False).tolist() for row in range(60)]
    path = tmp_path / "real.json"
    path.write_text(json.dumps(labels))
    oracle = RealLabelsImagenet([f"val/n0/ILSVRC2012_val_{row + 1:08d}.JPEG" for row in range(60)], str(path))
    oracle.add_result(logits)
    tally = Tally()
    for part in torch.arange(60).split(7):
        tally.add_multi_label(logits[part], [labels[row] for row in part.tolist()])
    found = scores_of(tally.vector.tolist(), likelihood=False)
    assert found["samples"] == sum(map(bool, labels)) < 60
    assert 100 * found["top1"] == pytest.approx(oracle.get_accuracy(1))
    assert 100 * found["top5"] == pytest.approx(oracle.get_accuracy(5))
    assert "nll" not in found


def test_only_images_without_a_right_class():
    tally = Tally()
    tally.add_multi_label(torch.randn(3, 10), [[], [], []])
    assert not tally.vector.any()


def test_tokens_count_by_their_mean():
    tokens = torch.tensor([[[3.0, 0, 0], [0, 2, 0]], [[0, 0, 1], [5, 0, 0]], [[0, 1, 0], [0, 0, 3]]])
    tally = Tally()
    tally.add(torch.zeros(3, 3), torch.tensor([0, 0, 0]))
    tally.add_tokens(tokens, torch.tensor([0, 2, 2]))
    assert tally.scores()["token_top1"] == pytest.approx(2 / 3)


def test_mce_and_retention_by_hand():
    random = np.random.default_rng(0)
    names = (*BENCHMARK_CORRUPTIONS, *EXTRA_CORRUPTIONS)
    top1 = {name: {severity: float(random.uniform(0.2, 0.9)) for severity in SEVERITIES} for name in names}
    found = corruption_scores(top1, clean=0.8)
    ces = []
    for name in BENCHMARK_CORRUPTIONS:
        error = np.mean([1 - value for value in top1[name].values()])
        assert found.error[name] == pytest.approx(error)
        ces.append(error / ALEXNET_ERROR[name])
    assert found.mce == pytest.approx(np.mean(ces))
    accuracy = np.mean([value for name in BENCHMARK_CORRUPTIONS for value in top1[name].values()])
    assert found.top1 == pytest.approx(accuracy)
    assert found.retention == pytest.approx(accuracy / 0.8)
    assert set(found.ce) == set(BENCHMARK_CORRUPTIONS)
    assert set(found.error) == set(names)


def test_the_benchmarks_mean_takes_all_of_it():
    top1 = {name: dict.fromkeys(SEVERITIES, 0.5) for name in BENCHMARK_CORRUPTIONS}
    assert corruption_scores(top1).mce is not None and corruption_scores(top1).retention is None
    generated = corruption_scores(top1, generated=True)
    assert generated.top1 == pytest.approx(0.5) and generated.mce is None and generated.ce == {}
    del top1["fog"][3]
    found = corruption_scores(top1)
    assert found.mce is None and found.top1 is None and "fog" not in found.error


def test_alexnets_errors():
    """In %, rounded, as the benchmark's paper and its readers quote them."""
    quoted = "88.6 89.4 92.3 82.0 82.6 78.6 79.8 86.7 82.7 81.9 56.5 85.3 64.6 71.8 60.7"
    assert " ".join(f"{100 * error + 1e-9:.1f}" for error in ALEXNET_ERROR.values()) == quoted


def test_a_subset_is_cut_as_timm_cuts_it():
    """Logits of ImageNet-A's classes, in ascending order, as timm's validation script selects them."""
    info = Path(timm.data.__file__).parent / "_info"
    indices = [int(line) for line in (info / "imagenet_a_indices.txt").read_text().split()]
    synsets = (info / "imagenet_a_synsets.txt").read_text().split()
    assert [imagenet_wnids()[number] for number in indices] == synsets
    logits, _ = draw(50, 1000, seed=9)
    labels = torch.tensor(indices)[torch.arange(50) * 4]
    expected = Tally()
    expected.add(logits[:, indices], torch.arange(50) * 4)
    tally = Tally()
    ClassView.of("a", range(1000), subset_classes("a")).add(tally, logits, labels)
    assert torch.equal(tally.vector, expected.vector)
    # A model that lists the classes in another order gets the same score.
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    columns = order.argsort().tolist()
    shuffled = Tally()
    ClassView.of("a", columns, subset_classes("a")).add(shuffled, logits[:, order], labels)
    torch.testing.assert_close(shuffled.vector, expected.vector)


def test_retention_takes_the_same_images_without_corruption():
    """Where a part of them is there, the classes may differ."""

    def figures(clean, own):
        kinds = [f"{kind}/{level}" for kind in BENCHMARK_CORRUPTIONS for level in SEVERITIES]
        scores = [{"samples": clean, "top1": 0.8}, *({"samples": own, "top1": 0.6} for _ in kinds)]
        parts = [("imagenet", "imagenet"), *(("c", kind) for kind in kinds)]
        return suite_figures(parts, [{"all": each} for each in scores])["c"]

    assert figures(50, 50)["retention"] == pytest.approx(0.75)
    assert figures(50, 2)["retention"] is None and figures(50, 2)["top1"] == pytest.approx(0.6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_no_scores(bad):
    logits = torch.zeros(4, 5)
    tally = Tally()
    tally.add(logits, torch.arange(4))
    check_finite(tally.vector.tolist())
    logits[2, 1] = bad
    for name, classes in (("add", torch.arange(4)), ("add_multi_label", [[1], [0, 2], [3], [4]])):
        tally = Tally()
        getattr(tally, name)(logits, classes)
        with pytest.raises(InputError, match="gives logits that are not finite; check its weights"):
            check_finite(tally.vector.tolist())
