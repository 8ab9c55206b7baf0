"""Losses against torch's and timm's own, and against finite differences."""

import pytest
import timm.loss
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from stl_offline import losses
from stl_offline.losses import pool_tokens, soft_cross_entropy, token_cross_entropy


def dense_targets(ids, weights, classes):
    dense = torch.zeros(*ids.shape[:2], classes, dtype=torch.float64)
    for column in range(ids.shape[2]):
        listed = ids[..., column] >= 0
        weight = weights[..., column].double()
        dense.scatter_add_(2, ids[..., column : column + 1].clamp(min=0), (weight * listed)[..., None])
        dense += ((weight * ~listed) / classes)[..., None]
    return dense


def plain_ghost_loss(logits, ids, weights, smoothing, row):
    """The definition in float64: −Σ a_i log p_i − r · log(1 − Σ p), with Σ p over the classes of each ``row`` ids."""
    p = F.softmax(logits.double(), dim=-1)
    listed, total = weights.double() * (ids >= 0), 0
    total = total - (listed * p.gather(2, ids.clamp(min=0)).log()).sum() * (1 - smoothing)
    total = total - ((weights * (ids == -1)).sum(-1) * p.log().mean(-1)).sum() * (1 - smoothing)
    total = total - smoothing * (weights.double().sum(-1) * p.log().mean(-1)).sum()
    for start in range(0, ids.shape[2], row):
        known = (
            torch.zeros_like(p)
            .scatter_add(2, ids[..., start : start + row].clamp(min=0), (ids[..., start : start + row] >= 0).double())
            .clamp(max=1)
        )
        r = weights[..., start + row - 1].double() * (ids[..., start + row - 1] == -2)
        total = total - (1 - smoothing) * (r * (1 - (p * known).sum(-1)).log()).sum()
    return total / weights.double().sum()


def dense_loss(logits, ids, weights, smoothing):
    """The definition, written with a dense target: torch's cross-entropy of every token, summed over its mass."""
    classes = logits.shape[-1]
    dense = dense_targets(ids, weights, classes)
    mass = dense.sum(dim=-1, keepdim=True)
    dense = dense * (1 - smoothing) + mass * smoothing / classes
    log_probabilities = F.log_softmax(logits.double(), dim=-1)
    return -(dense * log_probabilities).sum() / mass.sum()


@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 5),
    classes=st.integers(2, 7),
    columns=st.integers(1, 4),
    smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=50)
def test_sparse_loss_and_gradient_equal_the_dense_definition(batch, tokens, classes, columns, smoothing, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, tokens, classes, generator=generator, requires_grad=True)
    ids = torch.randint(-1, classes, (batch, tokens, columns), generator=generator)
    weights = torch.rand(batch, tokens, columns, generator=generator) / columns
    sparse = token_cross_entropy(logits, ids, weights, smoothing)
    (gradient,) = torch.autograd.grad(sparse, logits)
    expected = dense_loss(logits, ids, weights, smoothing)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(sparse.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient.double(), rtol=1e-4, atol=1e-6)


def ghost_targets(generator, batch, tokens, classes, known, groups):
    """Rows of ``groups`` lists of distinct classes, each closed by −2; some ids are −1, and weights are any."""
    ids = [torch.rand(batch, tokens, classes, generator=generator).argsort(-1)[..., :known] for _ in range(groups)]
    end = torch.full((batch, tokens, 1), -2)
    ids = torch.cat([torch.cat([each, end], dim=-1) for each in ids], dim=-1)
    gone = (torch.rand(ids.shape, generator=generator) < 0.2) & (ids >= 0)
    weights = torch.rand(ids.shape, generator=generator) * (torch.rand(ids.shape, generator=generator) < 0.8)
    return ids.masked_fill(gone, -1), weights


@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 4),
    classes=st.integers(3, 9),
    known=st.integers(1, 2),
    groups=st.integers(1, 3),
    smoothing=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=40)
def test_ghost_loss_and_gradient_equal_the_plain_formula(batch, tokens, classes, known, groups, smoothing, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, tokens, classes, generator=generator, requires_grad=True)
    ids, weights = ghost_targets(generator, batch, tokens, classes, known, groups)
    weights[0, 0, 0] = 0.5  # some mass
    expected = plain_ghost_loss(logits, ids, weights, smoothing, known + 1)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    for ghosts in (range(known, groups * (known + 1), known + 1), None):
        found = token_cross_entropy(logits, ids, weights, smoothing, ghosts=ghosts)
        (gradient,) = torch.autograd.grad(found, logits)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient.double(), expected_gradient.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("height", [12.0, 40.0, 200.0])
def test_ghost_loss_of_a_student_that_is_sure_of_the_stored_classes(dtype, height):
    """1 − Σ p is 1e-4 to 1e-86; float32 rounds it to 0 from 1e-8 on. The expected numbers are float64's."""
    logits = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    logits[..., 2:4] += height
    logits.requires_grad_()
    ids, weights = torch.tensor([[[2, 3, -2], [3, 2, -2]]]), torch.tensor([[[0.1, 0.0, 0.9], [0.0, 0.0, 1.0]]])
    found = token_cross_entropy(logits, ids, weights)
    found.backward()
    exact = logits.detach().double().requires_grad_()
    log_p = exact.log_softmax(-1)
    rest = [0, 1, 4, 5, 6, 7]
    expected = -(weights[..., 0] * log_p[0, 0, 2]).sum() - (weights[..., 2] * log_p[..., rest].logsumexp(-1)).sum()
    (expected / 2).backward()
    torch.testing.assert_close(found.double(), (expected / 2).detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        logits.grad.double(), exact.grad, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-6
    )


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 4),
    columns=st.integers(1, 6),
    smoothing=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**31),
)
def test_ghosts_stand_anywhere_in_a_row(tokens, columns, smoothing, seed):
    """In each row elsewhere, several of them, first in a row, or alone in it: by the formula, token by token."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, tokens, 9, generator=generator, requires_grad=True)
    ids = torch.rand(2, tokens, 9, generator=generator).argsort(dim=2)[..., :columns]
    kinds = torch.rand(ids.shape, generator=generator)
    ids = ids.masked_fill(kinds < 0.35, -2).masked_fill(kinds > 0.9, -1)
    weights = torch.rand(ids.shape, generator=generator)
    p, expected = F.softmax(logits.double(), dim=-1), 0
    for image, token in [(image, token) for image in range(2) for token in range(tokens)]:
        listed, mean = [], p[image, token].log().mean()
        for index, weight in zip(ids[image, token].tolist(), weights[image, token].double(), strict=True):
            if index == -2:
                one = (1 - p[image, token, listed].sum()).log()
                listed = []
            else:
                one = mean if index == -1 else p[image, token, index].log()
                listed += [index] * (index >= 0)
            expected = expected - weight * ((1 - smoothing) * one + smoothing * mean)
    expected = expected / weights.double().sum()
    (wanted,) = torch.autograd.grad(expected, logits)
    loss = token_cross_entropy(logits, ids, weights, smoothing)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-4, atol=1e-5)
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_a_ghost_beside_all_classes_asks_for_nothing():
    logits = torch.randn(1, 1, 3, requires_grad=True)
    loss = token_cross_entropy(logits, torch.tensor([[[2, 0, 1, -2]]]), torch.tensor([[[0.0, 0.0, 0.0, 1.0]]]))
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(0.0))
    torch.testing.assert_close(logits.grad, torch.zeros(1, 1, 3))


@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_the_gradient_carries_the_factor_before_the_loss(factor):
    logits = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(1), requires_grad=True)
    ids, weights = torch.arange(20).view(2, 5, 2) % 9, torch.full((2, 5, 2), 0.4)
    (factor * token_cross_entropy(logits, ids, weights)).backward()
    (expected,) = torch.autograd.grad(factor * dense_loss(logits, ids, weights, 0.0), logits)
    torch.testing.assert_close(logits.grad, expected)


def test_one_hot_tokens_equal_torchs_cross_entropy():
    logits = torch.randn(3, 4, 11)
    ids = torch.randint(0, 11, (3, 4, 1))
    ours = token_cross_entropy(logits, ids, torch.ones(3, 4, 1), smoothing=0.1)
    theirs = F.cross_entropy(logits.reshape(-1, 11), ids.reshape(-1), label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs)


def test_unlabelled_tokens_count_for_nothing():
    logits = torch.randn(2, 3, 5)
    ids = torch.tensor([[[1], [-1], [2]], [[-1], [-1], [4]]])
    weights = (ids >= 0).float()
    kept = token_cross_entropy(logits, ids, weights)
    rows = weights[..., 0] > 0
    torch.testing.assert_close(kept, F.cross_entropy(logits[rows], ids[rows][:, 0]))
    nothing = token_cross_entropy(logits.requires_grad_(), ids, torch.zeros_like(weights))
    nothing.backward()
    assert nothing.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("elements", [1, 30, 150])
def test_chunks_change_nothing(monkeypatch, elements):
    generator = torch.Generator().manual_seed(2)
    # Without the first token, as of a model that has one for the class: not contiguous.
    logits = torch.randn(3, 10, 13, generator=generator, requires_grad=True)
    ids = torch.randint(-1, 13, (3, 9, 3), generator=generator)
    weights = torch.rand(3, 9, 3, generator=generator)
    whole = token_cross_entropy(logits[:, 1:].contiguous(), ids, weights, 0.1)
    (whole_gradient,) = torch.autograd.grad(whole, logits)
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", elements)
    parts = token_cross_entropy(logits[:, 1:], ids, weights, 0.1)
    (parts_gradient,) = torch.autograd.grad(parts, logits)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(parts_gradient, whole_gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_worked_on_in_float32(dtype):
    logits = torch.randn(2, 4, 50).to(dtype).requires_grad_()
    ids, weights = torch.randint(0, 50, (2, 4, 2)), torch.full((2, 4, 2), 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = token_cross_entropy(logits, ids, weights)
    loss.backward()
    assert loss.dtype == torch.float32
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(loss, token_cross_entropy(logits.detach().float(), ids, weights))


def test_gradients_too_small_for_half_precision_come_through_the_loss_scale():
    """Of 1,000 classes and 1,568 tokens: a probability of 1e-4 over these is less than float16 holds."""
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(8, 196, 1000, generator=generator)).half().requires_grad_()
    ids, weights = torch.randint(0, 1000, (8, 196, 1), generator=generator), torch.ones(8, 196, 1)
    scale = 65536.0
    (token_cross_entropy(logits, ids, weights) * scale).backward()
    exact = logits.detach().float().requires_grad_()
    token_cross_entropy(exact, ids, weights).backward()
    assert torch.isfinite(logits.grad).all()
    assert float((logits.grad.float() / scale - exact.grad).norm() / exact.grad.norm()) < 1e-3
    others = exact.grad > 0  # all but the labels' own, which are large
    lost = (logits.grad[others] == 0).float().mean()
    assert float(lost) < 0.01


def test_many_classes_take_no_memory_of_their_size():
    # 21,841 classes: beside logits and gradient nothing may grow with tokens · classes.
    logits = torch.randn(2, 96, 21_841, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ids, weights = torch.randint(0, 21_841, (2, 96, 5)), torch.full((2, 96, 5), 0.2)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        token_cross_entropy(logits, ids, weights).backward()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    size = logits.numel() * 4
    assert held >= size  # the gradient, which stays
    assert most < 1.25 * size
    expected = logits.detach().softmax(dim=-1).scatter_add(2, ids, -weights) / 192
    torch.testing.assert_close(logits.grad, expected, atol=1e-8, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooled_tokens(dtype):
    logits = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(pool_tokens(logits, "mean"), logits.float().mean(dim=1))
    expected = logits.float().exp().mean(dim=1).log()
    torch.testing.assert_close(pool_tokens(logits, "lme"), expected)
    # One token that is sure of a class decides; the mean would need all of them.
    one = torch.zeros(1, 100, 2)
    one[0, 3, 1] = 20
    assert pool_tokens(one, "lme")[0, 1] > 15 > 1 > pool_tokens(one, "mean")[0, 1]
    assert pool_tokens(torch.full((1, 4, 2), 1e4), "lme").isfinite().all()


def test_class_loss_equals_timms():
    logits, targets = torch.randn(5, 7), torch.rand(5, 7).softmax(dim=1)
    torch.testing.assert_close(soft_cross_entropy(logits, targets), timm.loss.SoftTargetCrossEntropy()(logits, targets))
