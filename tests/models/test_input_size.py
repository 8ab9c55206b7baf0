"""A labeler sees all of its input: sizes at which the token grid leaves pixels out are refused, others are not."""

import functools

import pytest
import timm
import torch
from safetensors.torch import save_file

from stl_offline.errors import InputError
from stl_offline.models import TokenLabeler, create_labeler
from stl_offline.models.input_size import unseen_sides

SMALL_SWIN = {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 4, 8)}
SHALLOW = {"layers": (1, 1, 1, 1)}
# name → arguments, a size that the model sees whole, and one of which it drops pixels (None: it pads).
MODELS = {
    "test_vit": ({}, 64, None),
    "vit_tiny_patch16_224": ({"depth": 2}, 240, 239),
    "vit_small_patch14_dinov2": ({"depth": 1, "embed_dim": 64, "num_heads": 2}, 238, 237),
    "deit3_small_patch16_224": ({"depth": 1}, 64, 72),
    "beit_base_patch16_224": ({"depth": 1, "embed_dim": 64, "num_heads": 2}, 64, 79),
    "eva02_tiny_patch14_224": ({"depth": 1}, 56, 64),
    "vit_relpos_small_patch16_224": ({"depth": 1}, 64, 65),
    "vit_tiny_r_s16_p8_224": ({"depth": 1}, 64, None),
    "cait_xxs24_224": ({"depth": 1, "depth_token_only": 1}, 64, 70),
    "xcit_nano_12_p16_224": ({"depth": 1}, 64, None),
    "mixer_s32_224": ({}, 64, 90),
    "swin_tiny_patch4_window7_224": (SMALL_SWIN, 64, 67),
    "convnext_atto": ({"depths": (1, 1, 1, 1)}, 256, 255),
    "test_convnext": ({}, 160, 159),
    "densenet121": ({"block_config": (1, 1, 1, 1)}, 96, 111),
    "resnet18": (SHALLOW, 100, None),
    "resnet50": ({**SHALLOW, "output_stride": 8}, 72, None),
    "resnetv2_50": (SHALLOW, 100, None),
    "mobilenetv2_050": ({}, 100, None),
    "tf_efficientnet_lite0": ({}, 300, None),
    "test_efficientnet": ({}, 70, None),
    "regnetx_002": ({}, 64, None),
    "poolformer_s12": ({}, 64, None),
    "pvt_v2_b0": ({}, 64, None),
    "fan_micro_4_p8": ({}, 32, None),
    "fan_micro_4_p8_token": ({}, 32, None),
}


def labeler(name, size, arguments):
    torch.manual_seed(0)
    fixed = timm.get_pretrained_cfg(name).fixed_input_size or name.startswith("fan")
    return TokenLabeler(
        timm.create_model(name, num_classes=5, **arguments, **({"img_size": size} if fixed else {})), img_size=size
    )


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_border_is_seen(name):
    arguments, whole, cut = MODELS[name]
    labeler(name, whole, arguments)
    if cut is not None:
        with pytest.raises(InputError, match=f"{name} does not see all of an image of {cut}×{cut} pixels"):
            labeler(name, cut, arguments)


def test_each_side_is_looked_at():
    image = torch.randn(1, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    cells = torch.nn.AvgPool2d(4)

    def tokens(images, rows=slice(0), columns=slice(0)):
        images = images.clone()
        images[:, :, rows] = 0
        images[:, :, :, columns] = 0
        return cells(images).flatten(2).transpose(1, 2)

    assert unseen_sides(tokens, image) == []
    for side, hidden in {
        "top": {"rows": slice(1)},
        "bottom": {"rows": slice(-1, None)},
        "left": {"columns": slice(1)},
        "right": {"columns": slice(-1, None)},
    }.items():
        assert unseen_sides(functools.partial(tokens, **hidden), image) == [side]
    assert unseen_sides(lambda images: torch.ones(len(images), 3, 2), image) == ["top", "bottom", "left", "right"]


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vit") / "w.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=5).state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("size", "nearest"),
    [(239, "224 and 240"), ((224, 239), "224×224 and 240×240"), (8, "16 and 32"), ((250, 100), "240×96 and 256×112")],
)
def test_the_nearest_sizes_are_named(vit_file, size, nearest):
    with pytest.raises(InputError, match=rf"; the nearest sizes that work: {nearest}$"):
        create_labeler("timm:vit_tiny_patch16_224", labeler_checkpoint=vit_file, img_size=size)


def test_the_nearest_sizes_work(vit_file):
    for size in (224, 240, (240, 96)):
        height, width = (size, size) if isinstance(size, int) else size
        found = create_labeler("timm:vit_tiny_patch16_224", labeler_checkpoint=vit_file, img_size=size)
        assert found.grid_size(height, width) == (height // 16, width // 16)


def test_what_a_labeler_maps_is_what_it_sees(vit_file):
    # The fault as a user meets it: at 239 pixels, the last 15 columns changed no logit.
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=239).eval()
    images = torch.randn(1, 3, 239, 239, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    images[1, :, :, 224:] += 1
    with torch.inference_mode():
        features = model.forward_features(images)
    assert torch.equal(features[0], features[1])
