"""ImageNet's test sets in their authors' layouts, with a few drawn images each, and a small classifier for them.

Each image's class is chosen by the rank that the classifier gives it, so that accuracies are neither 0 nor 1.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import timm.data
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from stl_offline.evaluation.measures import BENCHMARK_CORRUPTIONS
from stl_offline.evaluation.suites import imagenet_wnids, subset_classes

MODEL = "test_resnet"  # timm's smallest: 160 px, 1,000 classes
RANKS = (0, 3, 0, 9, 1, 0)
WNIDS = imagenet_wnids()


def make_model(path: Path) -> nn.Module:
    """A classifier whose predictions differ from image to image; its weights go to ``path``."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL).eval()
    pixels = torch.stack([as_timm(model)(draw(number)) for number in range(8)])
    with torch.no_grad():
        features = model.forward_head(model.forward_features(pixels), pre_logits=True)
        model.fc.weight.copy_(torch.randn_like(model.fc.weight) / features.std(dim=0).mean() / 8)
        model.fc.bias.copy_(-model.fc.weight @ features.mean(dim=0))
    save_file(model.state_dict(), path)
    return model


def as_timm(model: nn.Module, **changes):
    """The transform of timm's validate.py: PIL image → normalised (3, H, W)."""
    cfg = timm.data.resolve_model_data_config(model, use_test_size=True)
    return timm.data.create_transform(**(cfg | changes))


def draw(number: int, size: tuple[int, int] = (230, 190)) -> Image.Image:
    """A coloured pattern of ``size`` (width, height)."""
    coarse = np.random.default_rng(number).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


@torch.no_grad()
def logits_of(model: nn.Module, images: Sequence[bytes], **changes) -> Tensor:
    """(n, 1000) as timm's own transform and the model give them."""
    transform = as_timm(model, **changes)
    return model(torch.stack([transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in images]))


class Trees:
    """Folders of every suite below ``root``, and for each part its images' logits, classes and place."""

    def __init__(self, root: Path, model: nn.Module) -> None:
        self.root, self.model = root, model
        self.parts: dict[str, list[tuple[Path, Tensor, int]]] = {}
        every = range(1000)
        for number in range(8):
            self._add("imagenet", f"{{wnid}}/ILSVRC2012_val_{number * 6000 + 1:08d}.JPEG", number, every)
            self._add("v2", f"{{number}}/{number:x}.jpeg", 20 + number, every)
            self._add("sketch", f"{{wnid}}/sketch_{number}.JPEG", 30 + number, every)
            self._add("a", f"{{wnid}}/0.{number}_thing _ thing_0.9.jpg", 40 + number, subset_classes("a"))
            self._add("r", f"{{wnid}}/art_{number}.jpg", 50 + number, subset_classes("r"))
        for kind in (*BENCHMARK_CORRUPTIONS, "saturate"):
            for severity in range(1, 6):
                name = f"c/{kind}/{severity}"
                for number in range(2):
                    file = f"{{wnid}}/ILSVRC2012_val_{number * 9000 + 1:08d}.JPEG"
                    self._add(name, file, 10 * len(self.parts) + number, every, size=(160, 160))

    def _add(self, part: str, name: str, seed: int, allowed: Sequence[int], size: tuple[int, int] = (230, 190)) -> None:
        data = encoded(draw(seed, size))
        changes = {"crop_pct": 1.0} if part.startswith("c/") else {}
        logits = logits_of(self.model, [data], **changes)[0]
        found = self.parts.setdefault(part, [])
        order = torch.tensor(allowed)[logits[torch.tensor(allowed)].argsort(descending=True)]
        number = int(order[RANKS[len(found) % len(RANKS)]])
        path = self.root / part / name.format(wnid=WNIDS[number], number=number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        found.append((path, logits, number))

    def truth(self, part: str) -> tuple[Tensor, Tensor]:
        """Logits (n, 1000) and classes (n,) of a part."""
        _, logits, numbers = zip(*self.parts[part], strict=True)
        return torch.stack(logits), torch.tensor(numbers)

    def data(self, *suites: str) -> tuple[str, ...]:
        """``NAME=SRC`` of suites."""
        return tuple(f"{name}={self.root / ('imagenet' if name == 'real' else name)}" for name in suites)
