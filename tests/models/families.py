"""One small model of every family of timm, as a token model: what works, and why the others cannot.

`python -m tests.models.families` prints the table of docs/your-model.md. It builds some 95 models, one after the other,
which takes ten minutes on one core; names of families as arguments try these alone.
"""

import sys
import warnings
from collections.abc import Iterable

import torch

from stl_offline.errors import InputError
from stl_offline.models import TokenModel, build_model
from stl_offline.models.input_size import with_open_branches

# timm's module → (model, side in pixels). Test models of a few layers where timm has them.
FAMILIES = {
    "beit": ("beit_base_patch16_224", 224),
    "byoanet": ("halonet_h1", 256),
    "byobnet": ("test_byobnet", 128),
    "cait": ("cait_xxs24_224", 224),
    "coat": ("coat_tiny", 224),
    "convit": ("convit_tiny", 224),
    "convmixer": ("convmixer_768_32", 224),
    "convnext": ("test_convnext", 128),
    "cpubone": ("cpubone_nano", 128),
    "crossvit": ("crossvit_tiny_240", 240),
    "csatv2": ("csatv2", 256),
    "cspnet": ("cs3darknet_focus_s", 128),
    "cspnext": ("cspnext_tiny", 128),
    "davit": ("davit_tiny", 128),
    "deit": ("deit_tiny_patch16_224", 224),
    "densenet": ("densenet121", 128),
    "dla": ("dla46x_c", 128),
    "dpn": ("dpn48b", 128),
    "edgenext": ("edgenext_xx_small", 128),
    "efficientformer": ("efficientformer_l1", 224),
    "efficientformer_v2": ("efficientformerv2_s0", 224),
    "efficientnet": ("test_efficientnet", 128),
    "efficientvim": ("efficientvim_m1", 128),
    "efficientvit_mit": ("efficientvit_b0", 128),
    "efficientvit_msra": ("efficientvit_m0", 224),
    "eva": ("eva02_tiny_patch14_336", 336),
    "fasternet": ("fasternet_t0", 128),
    "fastvit": ("fastvit_t8", 128),
    "focalnet": ("focalnet_tiny_srf", 128),
    "gcvit": ("gcvit_xxtiny", 224),
    "ghostnet": ("ghostnet_050", 128),
    "hardcorenas": ("hardcorenas_b", 128),
    "hgnet": ("hgnetv2_b0", 128),
    "hiera": ("hiera_tiny_224", 224),
    "hieradet_sam2": ("hieradet_small", 128),
    "hrnet": ("hrnet_w18_small", 128),
    "iformer": ("iformer_t", 128),
    "inception_next": ("inception_next_atto", 128),
    "inception_resnet_v2": ("inception_resnet_v2", 299),
    "inception_v3": ("inception_v3", 299),
    "inception_v4": ("inception_v4", 299),
    "lcnetv2": ("lcnetv2_small", 128),
    "levit": ("levit_128s", 224),
    "lowformer": ("lowformer_b0", 128),
    "mambaout": ("test_mambaout", 128),
    "maxxvit": ("test_coatnet", 160),
    "metaformer": ("poolformerv2_s12", 128),
    "mlp_mixer": ("gmlp_ti16_224", 224),
    "mobilenetv3": ("mobilenetv3_small_050", 128),
    "mobilenetv5": ("mobilenetv5_base", 128),
    "mobilevit": ("mobilevit_xxs", 128),
    "mvitv2": ("mvitv2_tiny", 224),
    "naflexvit": ("naflexvit_base_patch16_parfac_gap", 128),
    "nasnet": ("nasnetalarge", 331),
    "nest": ("nest_tiny", 224),
    "nextvit": ("nextvit_small", 128),
    "nfnet": ("test_nfnet", 128),
    "pit": ("pit_ti_224", 224),
    "pnasnet": ("pnasnet5large", 331),
    "pvt_v2": ("pvt_v2_b0", 128),
    "rdnet": ("rdnet_tiny", 128),
    "regnet": ("regnetx_002", 128),
    "repghost": ("repghostnet_050", 128),
    "repvit": ("repvit_m1", 128),
    "res2net": ("res2next50", 128),
    "resnest": ("resnest14d", 128),
    "resnet": ("test_resnet", 128),
    "resnetv2": ("resnetv2_18", 128),
    "rexnet": ("rexnet_100", 128),
    "selecsls": ("selecsls42", 256),
    "senet": ("legacy_seresnet18", 128),
    "sequencer": ("sequencer2d_s", 224),
    "shvit": ("shvit_s1", 256),
    "sknet": ("skresnet18", 128),
    "starnet": ("starnet_s050", 128),
    "swiftformer": ("swiftformer_xs", 224),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 224),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", 256),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 224),
    "tiny_vit": ("tiny_vit_5m_224", 128),
    "tnt": ("tnt_s_legacy_patch16_224", 224),
    "tresnet": ("tresnet_m", 128),
    "twins": ("twins_svt_small", 224),
    "vgg": ("vgg11", 128),
    "visformer": ("visformer_tiny", 224),
    "vision_transformer": ("test_vit", 160),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 224),
    "vision_transformer_relpos": ("test_vit_relpos", 160),
    "vision_transformer_sam": ("samvit_base_patch16_224", 224),
    "vitamin": ("vitamin_small_224", 224),
    "volo": ("volo_d1_224", 224),
    "vovnet": ("ese_vovnet19b_slim_dw", 128),
    "xception": ("legacy_xception", 299),
    "xception_aligned": ("xception41p", 128),
    "xcit": ("xcit_nano_12_p8_224", 224),
}


def try_family(family: str, token_head: str = "own") -> tuple[str, str]:
    """(grid, "") of a family's model with such a token head; or ("", the reason why it cannot have one).

    Raises:
        AssertionError: what the model gives is not what a token model promises.
    """
    name, side = FAMILIES[family]
    torch.manual_seed(0)
    try:
        model = build_model(name, 3, side, token_head=token_head).eval()
        model.check_view(side, side)
    except InputError as error:
        return "", str(error).removeprefix(name).strip()
    rows, columns = model.grid_size(side, side)
    with torch.no_grad():
        images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
        class_logits, token_logits = model(images)
        torch.testing.assert_close(class_logits, model.trunk(images), rtol=1e-4, atol=1e-5)
        assert token_logits.shape == (1, rows * columns, 3)
        if token_head == "own":
            check_places(model, images, (rows, columns))
    return f"{rows}×{columns}", ""


def check_places(model: TokenModel, images: torch.Tensor, grid: tuple[int, int]) -> None:
    """Tokens are in row order: a change in a corner of the image changes the tokens there more than elsewhere.

    Attention of untrained models spreads every change over all tokens, so it is the difference between the corners'
    changes that is looked at. Where they differ by less than five thousandths (LeViT, Visformer), nothing is checked.
    """
    rows, columns = grid
    trunk, side = with_open_branches(model.trunk).eval(), images.shape[-1]
    down, right = side // rows, side // columns
    corners = [(0, 0), (0, columns - 1), (rows - 1, 0), (rows - 1, columns - 1)]
    plain = model._layout.vectors(trunk.forward_features(images))
    changes = []
    for row, column in corners:
        changed = images.clone()
        part = changed[..., row * down : (row + 1) * down, column * right : (column + 1) * right]
        part.copy_(part.flip(-1) * -1.5)
        change = (model._layout.vectors(trunk.forward_features(changed)) - plain).abs().sum(-1)[0]
        changes.append(change / change.sum())
    beyond = torch.stack(changes) - torch.stack(changes).mean(dim=0)
    for (row, column), own in zip(corners, beyond, strict=True):
        by_place = own.unflatten(0, grid)
        quarters = {
            (r, c): float(by_place[r : r + (rows + 1) // 2, c : c + (columns + 1) // 2].mean())
            for r in (0, rows // 2)
            for c in (0, columns // 2)
        }
        if max(quarters.values()) < 5e-3:
            continue
        nearest = (0 if row == 0 else rows // 2, 0 if column == 0 else columns // 2)
        assert max(quarters, key=quarters.get) == nearest, f"a change at {row, column} shows at {quarters}"


def table(families: Iterable[str]) -> list[str]:
    """Rows of the table in the documentation."""
    lines = ["| timm's module | tried | tokens | shared head |", "|---|---|---|---|"]
    for family in families:
        name, side = FAMILIES[family]
        grid, reason = try_family(family)
        shared = _short(try_family(family, "shared")[1]) or "yes" if grid else "–"
        lines.append(f"| `{family}` | `{name}`, {side} px | {grid or _short(reason)} | {shared} |")
    return lines


def _short(reason: str) -> str:
    """A refusal without its advice."""
    return reason.partition(": ")[2].rpartition("; ")[0] or reason


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print("\n".join(table(sys.argv[1:] or FAMILIES)))
