"""Classes drawn by a dump: distributed as the labeler's softmax, and the same whatever made them."""

import dataclasses

import numpy as np
import pytest
import torch

from stl_offline.cli.main import main
from stl_offline.config import DumpConfig
from stl_offline.dump import dump_labels
from stl_offline.dump.drawing import DrawKey, draw_classes, draw_shortfall
from stl_offline.dump.recompute import recompute_labels
from stl_offline.errors import InputError
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.writer import LabelSetWriter
from stl_offline.random import STREAM_DRAW

# χ² with 6 degrees of freedom exceeds this once in 10,000 times; the draws are the same each time.
LIMIT_OF_6 = 27.9
HYBRID = {"top_k": 1, "draws": 3, "class_top_k": 1, "class_draws": 4}


def key(images: int = 1, view: int = 0, seed: int = 5) -> DrawKey:
    hashes = np.random.default_rng(1).integers(2**64, size=images, dtype=np.uint64)
    return DrawKey(seed, STREAM_DRAW, hashes, view)


@pytest.mark.parametrize("kept", [0, 2])
def test_draws_follow_the_softmax(kept):
    classes, tokens, draws = 7, 2000, 20
    logits = torch.tensor([2.0, 0.5, -1.0, 3.0, -4.0, 0.0, 1.0]).expand(2, tokens, classes).contiguous()
    without = logits.topk(kept, dim=-1).indices
    drawn = draw_classes(logits, draws, key(2), without).numpy()
    p = torch.softmax(logits[0, 0].double(), -1).numpy()
    p[without[0, 0].numpy()] = 0
    p /= p.sum()
    for image in drawn.reshape(2, -1):
        counts, expected = np.bincount(image, minlength=classes), tokens * draws * p
        assert (counts[p == 0] == 0).all()
        assert ((counts - expected)[p > 0] ** 2 / expected[p > 0]).sum() < LIMIT_OF_6
    # Images, tokens and draws are independent: the share of equal draws is Σ p².
    for other in (drawn[::-1], np.roll(drawn, 1, axis=1), np.roll(drawn, 1, axis=2)):
        assert abs((drawn == other).mean() - (p**2).sum()) < 0.01


def test_draws_depend_on_seed_view_token_and_content_alone():
    logits = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(1))
    drawn = draw_classes(logits, 4, key(3))
    for row in range(3):
        one = dataclasses.replace(key(3), hashes=key(3).hashes[row : row + 1])
        assert (draw_classes(logits[row : row + 1], 4, one) == drawn[row]).all()
    assert (draw_classes(logits, 2, key(3)) == drawn[..., :2]).all()
    for other in (key(3, view=1), key(3, seed=6), dataclasses.replace(key(3), hashes=key(3).hashes + np.uint64(1))):
        assert (draw_classes(logits, 4, other) != drawn).any()


@pytest.mark.parametrize("scale", [0.0, 1e-3, 3.0, 100.0, 1e5])
@pytest.mark.parametrize("kept", [0, 3])
def test_draws_on_cpus_are_those_of_the_definition(scale, kept):
    """Compiled code gives the argmax of torch's noisy logits, bit for bit, also of equal and of very large logits."""
    logits = scale * torch.randn(3, 40, 37, generator=torch.Generator().manual_seed(2))
    logits[0, :3, :30] = -torch.inf
    without = logits.topk(kept, dim=-1).indices
    drawn = draw_classes(logits, 3, key(3, view=2), without)
    assert (draw_shortfall(logits, drawn, key(3, view=2), without) == 0).all()


def test_a_near_tie_falls_short_by_little():
    logits = torch.randn(2, 5, 50, generator=torch.Generator().manual_seed(1))
    drawn = draw_classes(logits, 6, key(2))
    assert (draw_shortfall(logits, drawn, key(2)) == 0).all()
    moved = draw_shortfall(logits + 0.01 * torch.rand(logits.shape), drawn, key(2))
    assert (moved >= 0).all() and (moved <= 0.01).all()
    assert (draw_shortfall(logits, (drawn + 1) % 50, key(2)) > 0).all()


@pytest.mark.parametrize("changes", [{"top_k": 0, "draws": 2}, HYBRID | {"crops_per_image": 2, "first_view": 3}])
def test_a_dump_gives_the_same_draws_whatever_the_batches(work, tmp_path, changes):
    base = work | changes | {"encoding": "q8", "shards": 2}
    dump_labels(DumpConfig(**base, out=str(tmp_path / "a")))
    dump_labels(DumpConfig(**base | {"batch_size": 2, "shards": 3}, out=str(tmp_path / "b")))
    first, second = (open_label_set(tmp_path / name) for name in "ab")
    assert first.spec.format_version == 2 and first.spec.has_confidence == (changes["top_k"] > 0)
    for one, other in zip(first.values(), second.values(), strict=True):
        assert (one.key == other.key) and (one.draws == other.draws).all() and (one.views == other.views).all()
    found = recompute_labels(first, work["data"], work["labeler"], device="cpu", workers=1, images=9, seed=3)
    tokens = 9 * first.spec.views_per_image * 16
    assert found.draws == tokens * changes["draws"] + changes.get("class_draws", 0) * 9 * first.spec.views_per_image
    assert found.same_draws + found.near_ties == 1 and found.same_draws > 0.999


def test_draws_of_another_generator_are_found(work, tmp_path, capsys):
    arguments = ["--recompute", "9", "--labeler", work["labeler"], "--data", work["data"], "--device", "cpu"]
    honest = DumpConfig(**work | {"top_k": 1, "draws": 4, "shards": 1}, out=str(tmp_path / "honest"))
    dump_labels(honest)
    label_set = open_label_set(honest.out)
    arrays = label_set.read_shard(0)
    for name, seed, words in (("other", 0, "are not those of this labeler"), ("foreign", None, "another generator")):
        spec = dataclasses.replace(label_set.spec, draw_seed=seed)
        with LabelSetWriter(tmp_path / name, spec, 1) as writer:
            writer.write_shard(0, dataclasses.replace(arrays, draws=arrays.draws[..., ::-1].copy()))
            writer.finish()
        assert main(["labels", "verify", str(tmp_path / name), *arguments]) == 1
        assert words in capsys.readouterr().err
    assert main(["labels", "verify", honest.out, *arguments]) == 0
    assert "100.00% of 576 draws are the same" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 0}, "`top_k` is 0, which needs `draws`"),
        ({"draws": -1}, "`draws` must be in"),
        ({"first_view": 2}, "which needs `crops_per_image`"),
    ],
)
def test_settings_that_make_no_labels(changes, words):
    with pytest.raises(InputError, match=words):
        DumpConfig(data="a", labeler="b", out="c", **changes)


def test_draws_alone_store_no_top_k_unless_asked():
    needed = {"data": "a", "labeler": "b", "out": "c"}
    assert [DumpConfig(**needed, **more).top_k for more in ({}, {"draws": 2}, {"draws": 2, "top_k": 3})] == [None, 0, 3]
