"""Class targets from a label set, and what the token loss is divided by.

B: batch; K: classes.
"""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stl_offline.augment import Mix, mix_class_targets
from stl_offline.config import StudentConfig
from stl_offline.errors import InputError
from stl_offline.losses import soft_cross_entropy
from stl_offline.training.class_labels import class_share
from stl_offline.training.label_sources import check_labels, open_labels
from stl_offline.training.setup import make_train_loader, prepare
from stl_offline.training.steps import Share, StepInputs
from stl_offline.training.train_student import StudentObjective


def answers(quick, labels, epoch=0, **changes):
    """{sample: (distribution, part)} of an epoch's batches, and the objective."""
    config = StudentConfig(**quick | {"val": None, "labels": labels} | changes)
    stage = prepare(config, "student")
    source = open_labels(config, stage)
    plan, found = source.plan(epoch), {}
    for batch in make_train_loader(stage, source.loader_labels()).epoch(epoch, **plan):
        dense, parts = source.class_answers(batch)
        assert torch.allclose(dense.sum(1), torch.ones(len(dense)), atol=1e-6)
        found |= dict(
            zip(batch.sample_ids.tolist(), zip(dense.numpy(), parts[:, 0].tolist(), strict=True), strict=True)
        )
    return found, StudentObjective(stage, source)


@pytest.mark.parametrize("stored", [{"class_top_k": 2}, {"class_draws": 4}, {"class_top_k": 1, "class_draws": 3}])
def test_answers_are_those_of_the_replayed_view(quick, make_set, stored):
    place, arrays = make_set(view_count=2, leave_out=4, **stored)
    for epoch in (0, 1, 2):
        found, _ = answers(quick, place, epoch, class_target="mix:0.25", missing="skip")
        for sample, (dense, part) in found.items():
            if sample >= len(arrays):
                assert part == 0
                continue
            expected = np.zeros(len(dense))
            if arrays.head_ids is not None:
                logits = arrays.head_logits[sample, epoch % 2].astype(np.float64)
                best = float(arrays.head_confidence[sample, epoch % 2]) * np.exp(logits - logits[0])
                expected[arrays.head_ids[sample, epoch % 2]] = best
            left = 1 - expected.sum()
            if arrays.head_draws is None:
                expected += left / len(expected)
            else:
                np.add.at(expected, arrays.head_draws[sample, epoch % 2], left / arrays.head_draws.shape[-1])
            np.testing.assert_allclose(dense, expected, atol=1e-5)
            assert part == 0.25


def test_a_grid_of_one_token_is_an_answer(quick, make_set):
    place, arrays = make_set(grid=(1, 1), top_k=0, draws=6, has_confidence=False)
    found, _ = answers(quick, place, class_target="labels", token_weight=0.0)
    for sample, (dense, part) in found.items():
        counts = np.bincount(arrays.draws[sample].ravel(), minlength=len(dense))
        np.testing.assert_allclose(dense, counts / 6, atol=1e-5)
        assert part == 1


def test_the_loss_is_torchs_kl_of_dense_distributions(quick, make_set):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 5, generator=generator, requires_grad=True)
    dense = torch.softmax(torch.randn(6, 5, generator=generator), dim=1)
    targets = mix_class_targets(torch.arange(6) % 5, 5, 0.1, None, (dense, torch.ones(6, 1)))
    (ours,) = torch.autograd.grad(soft_cross_entropy(logits, targets), logits)
    divergence = F.kl_div(F.log_softmax(logits, dim=1), dense, reduction="batchmean")
    (theirs,) = torch.autograd.grad(divergence, logits)
    torch.testing.assert_close(ours, theirs)


def test_answers_are_mixed_as_classes_are():
    dense = torch.softmax(torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), dim=1)
    keep = np.array([0.75, 0.5, 0.25, 1.0], dtype=np.float32)
    mix = Mix(keep, np.zeros((4, 4), np.int64), np.zeros(4, bool), 8, 8)
    keep = torch.from_numpy(mix.keep)[:, None]
    own = F.one_hot(torch.tensor([0, 1, 2, 1]), 3).float()
    parts = torch.tensor([[0.5], [0.0], [1.0], [0.5]])
    whole = (1 - parts) * own + parts * dense
    found = mix_class_targets(torch.tensor([0, 1, 2, 1]), 3, 0.0, mix, (dense, parts))
    torch.testing.assert_close(found, keep * whole + (1 - keep) * whole.flip(0))


def test_the_step_uses_answers_and_the_norm(quick, make_set):
    place, _ = make_set(class_top_k=2, view_count=2)
    _, objective = answers(quick, place, class_target="labels")
    weights = torch.full((3, 16, 1), 0.25)
    inputs = StepInputs(torch.zeros(3, 3, 32, 32), torch.full((3, 3), 1 / 3), torch.zeros(3, 16, 1).long(), weights)
    share = Share.of(inputs, inputs.totals(), 1)
    assert float(share.labelled) == pytest.approx(0.25)
    losses = {}
    for norm in ("mass", "tokens"):
        objective.stage.config = dataclasses.replace(objective.stage.config, token_norm=norm)
        torch.manual_seed(1)
        found = objective.losses(objective.stage.model.eval(), inputs, share)
        losses[norm] = float(found["token_loss"].detach())
    assert losses["tokens"] == pytest.approx(0.25 * losses["mass"], rel=1e-5)


@pytest.mark.parametrize(("text", "share"), [("own", 0), ("labels", 1), ("mix:0", 0), ("mix:0.3", 0.3), ("mix:1", 1)])
def test_class_targets_that_are_known(text, share):
    assert class_share(text) == share


@pytest.mark.parametrize("text", ["mix", "mix:", "mix:2", "mix:nan", "both", "labels:1"])
def test_class_targets_that_are_not(text):
    with pytest.raises(InputError, match="`class_target` must be own, labels, or mix:W"):
        class_share(text)


def test_labels_without_answers_are_refused_before_anything_is_packed(quick, make_set):
    place, _ = make_set()
    for labels, words in (
        (place, "needs label sets with the labeler's class answers"),
        ("none", "needs label sets as"),
    ):
        with pytest.raises(InputError, match=words):
            check_labels(StudentConfig(**quick | {"labels": labels, "class_target": "labels"}))
