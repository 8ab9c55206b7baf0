"""Token targets of one label map: what is drawn, kept and left out.

Gh, Gw: the map's grid; K: classes; N: tokens of the student; m: targets per token.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stl_offline.errors import InputError
from stl_offline.geometry import View, relative_view_into
from stl_offline.targets import TokenTargets, roi_align_topk, token_targets
from tests.targets import by_hand

GRID, CLASSES, STORED = (3, 5), 11, 4
IDENTITY = np.eye(2, 3)


def make_map(seed=0, grid=GRID, stored=STORED, classes=CLASSES, share=0.7):
    """Sparse labels (Gh, Gw, k), best first, whose sums are near ``share``, and the best ones as confidence."""
    draw = np.random.default_rng(seed)
    ids = np.argsort(draw.random((*grid, classes)), axis=-1)[..., :stored].astype(np.uint16)
    probabilities = -np.sort(-draw.dirichlet(np.ones(stored), size=grid), axis=-1) * share
    return ids, probabilities.astype(np.float32), probabilities[..., 0].astype(np.float32)


def make(kind, view=IDENTITY, grid=GRID, labels=None, seed=1, epoch=2, sample_id=3, own=None, **settings):
    settings = TokenTargets(kind=kind, grid=grid, **settings)
    labels = make_map() if labels is None else labels
    return token_targets(settings, *labels, view, CLASSES, seed=seed, epoch=epoch, sample_id=sample_id, own_class=own)


def draw_often(times, **settings):
    """How often each id (−1 in the last place) was drawn for each token: (N, K + 1)."""
    grid = settings.get("grid", GRID)
    counts = np.zeros((grid[0] * grid[1], CLASSES + 1), dtype=np.int64)
    for epoch in range(times):
        ids, weights = make("gumbel", epoch=epoch, **settings)
        assert ((weights == 1) == (ids >= 0)).all()
        counts[np.arange(len(ids)), ids[:, 0]] += 1
    return counts


def mixture(labels, view, grid, ratio, residual):
    """The distribution that draws must follow, from the sparse RoIAlign: (N, K + 1), "no label" last."""
    ids, probabilities, covered = roi_align_topk(*labels[:2], view, grid, ratio, CLASSES)
    full = np.zeros((*grid, CLASSES + 1))
    np.put_along_axis(full, ids.astype(np.int64) % (CLASSES + 1), probabilities.astype(np.float64), axis=-1)
    if residual == "uniform":
        full[..., :CLASSES] += (covered - probabilities.sum(-1))[..., None] / CLASSES
    full[..., -1] = 1 - full[..., :CLASSES].sum(-1)
    return full.reshape(-1, CLASSES + 1)


@pytest.mark.parametrize("residual", ["ignore", "uniform"])
@pytest.mark.parametrize(
    ("view", "grid", "ratio"),
    [
        (View.identity(), GRID, 2),
        (View.crop(0.13, 0.05, 0.5, 0.77), (4, 2), 2),
        (View.crop(0.13, 0.05, 0.5, 0.77).flipped(), (4, 2), 3),
        (View.crop(-0.2, 0.4, 0.9, 0.9), (2, 3), 2),
        (View.identity(), (5, 3), 1),
    ],
    ids=["identity", "crop", "flip", "over-the-edge", "other-grid"],
)
def test_drawn_classes_follow_the_mixture(view, grid, ratio, residual):
    labels = make_map(share=0.6)
    times = 4000
    counts = draw_often(times, view=view.matrix, grid=grid, labels=labels, sampling_ratio=ratio, residual=residual)
    expected = mixture(labels, view, grid, ratio, residual) * times
    assert (counts[expected < 1e-3] == 0).all()
    statistic = freedom = 0
    for count, due in zip(counts, expected, strict=True):
        # Pearson's test wants at least about five expected in each bin; the rare ones share one.
        rare = due < 5
        bins = np.append(count[~rare], count[rare].sum()), np.append(due[~rare], due[rare].sum() + 1e-9)
        statistic += ((bins[0] - bins[1]) ** 2 / np.maximum(bins[1], 0.5)).sum()
        freedom += len(bins[0]) - 1 - (bins[1][-1] < 0.5)
    # A chi-square of f degrees of freedom has mean f and variance 2f; the sum over all tokens is nearly normal.
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("residual", ["ignore", "uniform"])
@pytest.mark.parametrize(
    "view", [View.identity(), View.crop(0.21, 0.3, 0.37, 0.55), View.crop(-0.3, 0.1, 0.8, 1.2).flipped()]
)
@pytest.mark.parametrize("grid", [GRID, (4, 7), (1, 1)])
def test_draws_equal_those_made_by_hand(view, grid, residual):
    ids, probabilities, confidence = make_map(4)
    drawn, weights = make(
        "gumbel",
        view.matrix,
        grid,
        (ids, probabilities, confidence),
        seed=7,
        epoch=5,
        sample_id=2**33 + 1,
        residual=residual,
    )
    expected = by_hand.drawn(ids, probabilities, view.matrix, grid, 2, residual, CLASSES, 7, 5, 2**33 + 1)
    np.testing.assert_array_equal(drawn[:, 0], expected[0])
    np.testing.assert_array_equal(weights[:, 0], expected[1])


@pytest.mark.parametrize("view", [View.identity(), View.crop(-0.3, 0.1, 0.8, 1.2).flipped()])
def test_draws_from_the_residual_are_the_own_class_or_outside_the_cells_classes(view):
    labels = make_map(4, share=0.5)
    ids, probabilities = labels[:2]
    settings = {"view": view.matrix, "grid": (4, 7), "labels": labels, "seed": 7, "epoch": 5, "sample_id": 2**33 + 1}
    by = (ids, probabilities, view.matrix, (4, 7), 2)
    expected = by_hand.drawn(*by, "class", CLASSES, 7, 5, 2**33 + 1, own=6)
    found = make("gumbel", residual="class", own=6, **settings)
    np.testing.assert_array_equal(found[0][:, 0], expected[0])
    np.testing.assert_array_equal(found[1][:, 0], expected[1])
    drawn, _, cells = by_hand.drawn(*by, "ghost", CLASSES, 7, 5, 2**33 + 1)
    found_ids, weights = make("gumbel", residual="ghost", **settings)
    assert found_ids.shape == (28, STORED + 2)
    assert 0 < (drawn == -2).sum() < 28
    for token, (row, weight) in enumerate(zip(found_ids, weights, strict=True)):
        outside = drawn[token] == -2
        assert row[0] == (-1 if outside else drawn[token])
        np.testing.assert_array_equal(row[1:-1], ids[tuple(cells[token])] if outside else -1)
        assert row[-1] == (-1 if cells[token, 0] < 0 else -2)  # it also ends the list of a drawn class
        assert weight.tolist() == [float(row[0] >= 0), *[0.0] * STORED, float(outside)]


@pytest.mark.parametrize("m", [2, CLASSES])
def test_the_residual_of_soft_targets_is_the_own_class_or_outside_those_listed(m):
    view = View.crop(-0.3, 0.1, 0.8, 0.7).matrix
    even, weights = make("soft", view, (4, 7), m=m, residual="uniform")
    for residual, last in (("class", 6), ("ghost", -2)):
        found = make("soft", view, (4, 7), m=m, residual=residual, own=6)
        np.testing.assert_array_equal(found[1], weights)
        np.testing.assert_array_equal(found[0][:, :-1], even[:, :-1])
        assert (found[0][:, -1] == last).all()


def test_the_own_class_must_be_given():
    for kind in ("gumbel", "soft"):
        with pytest.raises(InputError, match="needs the class of the image: give it as own_class"):
            make(kind, residual="class")


@given(
    left=st.floats(-0.3, 0.6), top=st.floats(-0.3, 0.6), width=st.floats(0.1, 1.2), height=st.floats(0.1, 1.2),
    flip=st.booleans(), grid=st.tuples(st.integers(1, 5), st.integers(1, 5)), seed=st.integers(0, 99),
)  # fmt: skip
def test_soft_targets_equal_dense_ones(left, top, width, height, flip, grid, seed):
    ids, probabilities, confidence = make_map(seed)
    view = View.crop(left, top, width, height)
    matrix = (view.flipped() if flip else view).matrix
    dense, covered = by_hand.aligned(by_hand.to_dense(ids, probabilities, CLASSES), matrix, grid, 2)
    kept, weights = make("soft", matrix, grid, (ids, probabilities, confidence), m=CLASSES, residual="uniform")
    full = np.zeros((len(kept), CLASSES + 1))
    np.add.at(full, (np.arange(len(kept))[:, None], kept), weights)
    np.testing.assert_allclose(full[:, :CLASSES], dense.reshape(-1, CLASSES), atol=2e-6)
    np.testing.assert_allclose(full[:, CLASSES], covered.ravel() - dense.sum(-1).ravel(), atol=2e-6)


def test_the_residual_of_soft_targets_takes_what_is_left_out():
    kept, weights = make("soft", m=2, residual="uniform")
    assert kept.shape == weights.shape == (15, 3)
    assert (kept[:, 2] == -1).all()
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    fewer, without = make("soft", m=2, residual="ignore")
    np.testing.assert_array_equal(fewer, kept[:, :2])
    np.testing.assert_array_equal(without, weights[:, :2])
    assert (without.sum(-1) < 0.75).all()


def test_the_identity_gives_stored_cells_and_no_neighbour():
    ids, probabilities, _ = make_map()
    kept, weights = make("soft", m=STORED)
    np.testing.assert_array_equal(kept, ids.reshape(15, STORED))
    np.testing.assert_array_equal(weights, probabilities.reshape(15, STORED))
    for epoch in range(20):
        drawn, _ = make("gumbel", epoch=epoch)
        assert all(token in (-1, *cell) for token, cell in zip(drawn[:, 0], ids.reshape(15, STORED), strict=True))
    best, weight = make("argmax")
    np.testing.assert_array_equal(best[:, 0], ids[..., 0].ravel())
    assert (weight == 1).all()


def test_argmax_takes_the_mixtures_best_and_weighs_it_by_what_is_covered():
    ids, probabilities, confidence = make_map(2)
    view = View.crop(-0.5, 0.1, 1.0, 0.6).matrix
    best, weights = make("argmax", view, (2, 4), (ids, probabilities, confidence))
    dense, covered = by_hand.aligned(by_hand.to_dense(ids, probabilities, CLASSES), view, (2, 4), 2)
    assert set(covered.ravel()) == {0.0, 1.0}
    np.testing.assert_array_equal(best[:, 0], np.where(covered > 0, dense.argmax(-1), -1).ravel())
    np.testing.assert_allclose(weights[:, 0], covered.ravel())
    half, half_weights = make("argmax", View.crop(-0.5, 0.0, 1.0, 1.0).matrix, (1, 1), (ids, probabilities, confidence))
    assert half_weights == 0.5
    assert half >= 0


@pytest.mark.parametrize("kind", ["gumbel", "soft", "argmax"])
def test_nothing_is_asked_off_the_map(kind):
    ids, weights = make(kind, View.crop(2, 0, 1, 1).matrix, residual="ignore" if kind == "argmax" else "uniform")
    assert (ids == -1).all()
    assert (weights == 0).all()


@pytest.mark.parametrize("kind", ["gumbel", "soft", "argmax"])
def test_unsure_tokens_get_no_target(kind):
    confidence = make_map()[2]
    limit = float(np.median(confidence))
    view = View.crop(0.1, 0.2, 0.8, 0.7)
    residual = "ignore" if kind == "argmax" else "uniform"
    everywhere = make(kind, view.matrix, (4, 6), residual=residual)
    kept = make(kind, view.matrix, (4, 6), residual=residual, min_confidence=limit)
    centres = view(np.stack(np.meshgrid((np.arange(6) + 0.5) / 6, (np.arange(4) + 0.5) / 4), axis=-1))
    sure = confidence[(centres[..., 1] * 3).astype(int), (centres[..., 0] * 5).astype(int)].ravel() >= np.float32(limit)
    assert 0 < sure.sum() < len(sure)
    for part, whole in zip(kept, everywhere, strict=True):
        np.testing.assert_array_equal(part[sure], whole[sure])
    assert (kept[0][~sure] == -1).all()
    assert (kept[1][~sure] == 0).all()


def test_draws_depend_on_seed_epoch_sample_and_token_and_on_nothing_else():
    first = make("gumbel", seed=1, epoch=1, sample_id=1)[0]
    np.testing.assert_array_equal(make("gumbel", seed=1, epoch=1, sample_id=1)[0], first)
    for changed in ({"seed": 2}, {"epoch": 2}, {"sample_id": 2}, {"sample_id": 1 + 2**32}, {"seed": 1 + 2**32}):
        assert (make("gumbel", **({"seed": 1, "epoch": 1, "sample_id": 1} | changed))[0] != first).any(), changed
    constant = tuple(np.broadcast_to(part[:1, :1], part.shape) for part in make_map(share=1.0))
    assert len(set(make("gumbel", labels=constant)[0][:, 0].tolist())) > 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class_ids": np.full((3, 5, STORED), CLASSES)}, "must be below num_classes"),
        ({"class_ids": np.full((3, 5, STORED), -1)}, "must not be negative"),
        ({"class_ids": np.zeros((3, 5, STORED))}, "must be integers"),
        ({"probabilities": np.zeros((3, 4, STORED))}, r"is \(Gh, Gw, k\) class ids and probabilities"),
        ({"confidence": np.zeros((5, 3))}, "confidence must be"),
        ({"relative_view": np.zeros(6)}, "2×3 matrix"),
    ],
)
def test_maps_that_do_not_fit_are_refused(change, words):
    """Compiled code would read and write outside of them."""
    ids = np.zeros((3, 5, STORED), np.uint16)
    given = {
        "class_ids": ids,
        "probabilities": np.full(ids.shape, 0.1, np.float32),
        "confidence": np.full((3, 5), 0.1, np.float32),
        "relative_view": IDENTITY,
    }
    settings = TokenTargets(kind="soft", grid=GRID)
    token_targets(settings, **given, num_classes=CLASSES, seed=0, epoch=0, sample_id=0)
    with pytest.raises(InputError, match=words):
        token_targets(settings, **given | change, num_classes=CLASSES, seed=0, epoch=0, sample_id=0)


def test_confidence_may_be_left_out_where_nothing_reads_it():
    ids, probabilities, confidence = make_map(share=0.1)
    rest = {"num_classes": CLASSES, "seed": 0, "epoch": 0, "sample_id": 0}
    plain = TokenTargets(kind="soft", grid=GRID)
    for ours, theirs in zip(
        token_targets(plain, ids, probabilities, None, IDENTITY, **rest),
        token_targets(plain, ids, probabilities, confidence, IDENTITY, **rest),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(InputError, match="confidence must be"):
        token_targets(
            TokenTargets(kind="soft", grid=GRID, min_confidence=0.5), ids, probabilities, None, IDENTITY, **rest
        )


def test_ids_above_16_bits_and_many_classes():
    ids, probabilities, confidence = make_map(share=0.001)
    wide = ids.astype(np.uint32) + 100_000
    settings = TokenTargets(kind="gumbel", grid=GRID, residual="uniform")
    drawn, weights = token_targets(
        settings, wide, probabilities, confidence, IDENTITY, 100_011, seed=0, epoch=0, sample_id=0
    )
    assert (weights == 1).all()
    assert drawn.min() >= 0
    assert drawn.max() < 100_011
    assert drawn.max() - drawn.min() > 50_000
    kept, _ = token_targets(
        TokenTargets(kind="soft", grid=GRID, m=2),
        wide, probabilities, confidence, IDENTITY, 100_011, seed=0, epoch=0, sample_id=0,
    )  # fmt: skip
    np.testing.assert_array_equal(kept, wide.reshape(15, STORED)[:, :2])


crop = st.builds(
    lambda left, top, width, height, flip: View.crop(left, top, width, height).flipped()
    if flip
    else View.crop(left, top, width, height),
    st.floats(0, 0.7), st.floats(0, 0.7), st.floats(0.05, 1), st.floats(0.05, 1), st.booleans(),
)  # fmt: skip


@given(map_view=crop, student_view=crop)
def test_compiled_relative_views_equal_those_of_geometry(map_view, student_view):
    relative = np.empty(6)
    relative_view_into(map_view.matrix.ravel(), student_view.matrix.ravel(), relative)
    expected = (View(map_view.matrix).inverse() @ View(student_view.matrix)).matrix.ravel()
    np.testing.assert_allclose(relative, expected, rtol=2e-7, atol=1e-7)
    relative_view_into(map_view.matrix.ravel(), map_view.matrix.ravel(), relative)
    np.testing.assert_array_equal(relative, [1, 0, 0, 0, 1, 0])


def test_a_turned_view_is_inverted_too():
    turned = np.array([0.5, -0.3, 0.4, 0.25, 0.6, 0.1], dtype=np.float32)
    student = np.array([0.2, 0.1, 0.3, -0.1, 0.4, 0.5], dtype=np.float32)
    relative = np.empty(6)
    relative_view_into(turned, student, relative)
    expected = (View.from_array(turned).inverse() @ View.from_array(student)).matrix.ravel()
    np.testing.assert_allclose(relative, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "hard"},
        {"residual": "drop"},
        {"kind": "argmax", "residual": "uniform"},
        {"kind": "argmax", "residual": "ghost"},
        {"grid": (0, 3)},
        {"grid": (3,)},
        {"m": 0},
        {"sampling_ratio": 0},
        {"min_confidence": 1.5},
        {"min_confidence": float("nan")},
    ],
)
def test_settings_that_cannot_be(settings):
    with pytest.raises(InputError):
        TokenTargets(**({"kind": "soft", "grid": (2, 2)} | settings))


def test_targets_per_token():
    assert TokenTargets("soft", (2, 3), m=4).targets_per_token(9) == 4
    for residual in ("uniform", "class", "ghost"):
        assert TokenTargets("soft", (2, 3), m=4, residual=residual).targets_per_token(9) == 5
    for residual in ("ignore", "uniform", "class"):
        assert TokenTargets("gumbel", (2, 3), m=4, residual=residual).targets_per_token(9) == 1
    assert TokenTargets("gumbel", (2, 3), m=4, residual="ghost").targets_per_token(9) == 11
    assert TokenTargets("argmax", (2, 3), m=4).tokens == 6
