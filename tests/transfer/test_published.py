"""Published segmenters of FAN: tensors with their names and shapes, against formulas written out."""

import pytest
import torch
import torch.nn.functional as F

from stl_offline.cli.main import main
from stl_offline.errors import InputError
from stl_offline.models import VARIANTS
from stl_offline.transfer import load_segmenter, read_segmenter
from stl_offline.transfer.backbone import Backbone, BackboneSpec
from stl_offline.transfer.class_maps import class_map_index, has_class_map
from tests.benchmarks.fan_reference import ReferenceFan, reference
from tests.models.test_fan_numbers import randomise

NAME, WIDTH, NAMES = "fan_tiny_8_p4_hybrid", 24, ("road", "sky", "car")


def published_head(channels: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The tensors of SegFormer's head in MMSegmentation 0.13, under ``decode_head.``, with random values."""
    shapes = {"linear_fuse.conv.weight": (WIDTH, 4 * WIDTH, 1, 1), "linear_pred.weight": (3, WIDTH, 1, 1)}
    shapes |= {"linear_pred.bias": (3,), "conv_seg.weight": (3, 256, 1, 1), "conv_seg.bias": (3,)}
    for level, count in enumerate(channels, 1):
        shapes |= {f"linear_c{level}.proj.weight": (WIDTH, count), f"linear_c{level}.proj.bias": (WIDTH,)}
    shapes |= {f"linear_fuse.bn.{name}": (WIDTH,) for name in ("weight", "bias", "running_mean", "running_var")}
    generator = torch.Generator().manual_seed(5)
    found = {name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    found["linear_fuse.bn.running_var"].abs_().add_(0.5)
    return found | {"linear_fuse.bn.num_batches_tracked": torch.tensor(7)}


def expected_logits(fan: ReferenceFan, head: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Their forward pass: maps of both stages, of the last block, and of the tokens behind the class attention."""
    stages, x = [], fan.patch_embed.backbone.stem(images)
    for stage in fan.patch_embed.backbone.stages:
        x = stage(x)
        stages.append(x)
    x = fan.patch_embed.proj(x)
    grid = x.shape[-2:]
    tokens = (x + fan.pos_embed(*grid)).flatten(2).transpose(1, 2)
    for block in fan.blocks:
        tokens = block(tokens, *grid)
    behind = torch.cat((fan.cls_token.expand(len(images), -1, -1), tokens), dim=1)
    for block in fan.cls_attn_blocks:
        behind = block(behind)
    maps = [*stages, *(each.transpose(1, 2).unflatten(2, grid) for each in (tokens, behind[:, 1:]))]
    projected = []
    for level, each in enumerate(maps, 1):
        linear = F.linear(
            each.flatten(2).transpose(1, 2), *(head[f"linear_c{level}.proj.{kind}"] for kind in ("weight", "bias"))
        )
        each = linear.transpose(1, 2).unflatten(2, each.shape[-2:])
        projected.append(F.interpolate(each, size=maps[0].shape[-2:], mode="bilinear", align_corners=False))
    fused = F.conv2d(torch.cat(projected[::-1], dim=1), head["linear_fuse.conv.weight"])
    norm = {name: head[f"linear_fuse.bn.{name}"] for name in ("running_mean", "running_var", "weight", "bias")}
    fused = F.relu(F.batch_norm(fused, **norm, eps=1e-5))
    logits = F.conv2d(fused, head["linear_pred.weight"], head["linear_pred.bias"])
    return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(file as MMSegmentation writes it, the model of the formulas, its head's tensors)."""
    fan = randomise(reference(NAME, num_classes=2), seed=6)
    head = published_head((128, 256, 192, 192))
    state = {
        f"backbone.{name}": value for name, value in fan.state_dict().items() if not name.startswith(("head.", "norm."))
    }
    state |= {f"decode_head.{name}": value for name, value in head.items()}
    path = tmp_path_factory.mktemp("published") / "iter_160000.pth"
    torch.save({"meta": {"epoch": 1, "iter": 160_000, "CLASSES": NAMES}, "state_dict": state, "optimizer": {}}, path)
    return path, fan, head


def test_published_weights_give_their_logits(published, tmp_path, capsys):
    path, fan, head = published
    out = tmp_path / "run"
    words = ["transfer", "import", "--checkpoint", str(path), "--model", NAME, "--classes", ",".join(NAMES)]
    assert main([*words, "--out", str(out)]) == 0
    assert "run: segmenter of fan_tiny_8_p4_hybrid, 3 classes" in capsys.readouterr().out
    model, description = load_segmenter(out)
    assert (description.class_names, description.crop, description.head_width) == (NAMES, (1024, 1024), WIDTH)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(model(images), expected_logits(fan, head, images), rtol=1e-4, atol=1e-4)
    assert main([*words, "--out", str(out)]) == 1
    assert "holds a run; choose another" in capsys.readouterr().err


def test_files_that_are_something_else(published, tmp_path):
    path = published[0]
    with pytest.raises(InputError, match="has 3 classes, and `classes` 2 names"):
        read_segmenter(path, NAME, ("a", "b"))
    with pytest.raises(InputError, match="does not fit fan_small_12_p4_hybrid: .* check `model`"):
        read_segmenter(path, "fan_small_12_p4_hybrid", NAMES)
    torch.save({"head.weight": torch.zeros(2, 2)}, tmp_path / "x.pth")
    with pytest.raises(InputError, match="has no backbone and decode_head.linear_pred"):
        read_segmenter(tmp_path / "x.pth", NAME, NAMES)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_the_map_behind_the_class_attention_comes_after_the_last_block(name):
    levels, depth = len(VARIANTS[name].get("hybrid_depths", ())), VARIANTS[name]["depth"]
    assert class_map_index(name) == levels + depth
    assert has_class_map(name, (0, levels + depth)) and not has_class_map(name, (0, levels + depth - 1))
    assert not has_class_map("resnet10t", (3, 4))
    with torch.device("meta"):
        backbone = Backbone(BackboneSpec(name, (0, 1, levels + depth - 1, levels + depth), (64, 64)))
        maps = backbone(torch.zeros(1, 3, 64, 96))
    assert [each.shape[1] for each in maps] == list(backbone.channels)
    assert [96 // each.shape[-1] for each in maps] == list(backbone.strides)
