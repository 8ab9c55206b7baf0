"""What can be seen of a run while it trains: a line of JSON every few steps, TensorBoard's scalars and images.

B: images; N: tokens on a grid (h, w); K: classes.
"""

import importlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stl_offline.config import RunConfig
from stl_offline.errors import MissingExtraError
from stl_offline.files import atomic_write
from stl_offline.palette import class_pixels
from stl_offline.training.run_folder import Progress
from stl_offline.training.steps import StepInputs

STEPS_NAME = "steps.jsonl"
BOARD_NAME = "tensorboard"


class Means:
    """Running means, weighted by images."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}
        self.images = 0

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Means":
        means = cls()
        means.sums = {str(name): [float(total), float(weight)] for name, (total, weight) in state["sums"].items()}
        means.images = int(state["images"])
        return means

    def state(self) -> dict[str, Any]:
        return {"sums": self.sums, "images": self.images}

    def add(self, values: dict[str, float], images: int) -> None:
        self.images += images
        for name, value in values.items():
            if math.isfinite(value):  # a gradient that fp16 could not hold is scaled anew, and no mean's business
                total = self.sums.setdefault(name, [0.0, 0.0])
                total[0] += value * images
                total[1] += images

    def all(self) -> dict[str, float]:
        """Every name's mean so far."""
        return {name: value / weight for name, (value, weight) in self.sums.items()}


class RunWatch:
    """Writes ``steps.jsonl`` every ``log_every`` steps, and TensorBoard's files where these are asked for.

    A run that goes on from an earlier step leaves out what was written after it.

    Raises:
        MissingExtraError: TensorBoard is asked for and not installed.
    """

    IMAGES = 8  # shown of an epoch

    def __init__(self, folder: Path, config: RunConfig, at: Progress, *, enabled: bool) -> None:
        self.config, self.enabled = config, enabled
        self.path = folder / STEPS_NAME
        self.board = None
        self.starts_epoch(at)
        if enabled:
            _cut_after(self.path, at.step)
            if config.tensorboard:
                self.board = summary_writer()(str(folder / BOARD_NAME), purge_step=at.step + 1)

    def __enter__(self) -> "RunWatch":
        return self

    def __exit__(self, *_: object) -> None:
        if self.board is not None:
            self.board.close()

    def starts_epoch(self, at: Progress) -> None:
        """Count from here: neither what lies between two epochs nor what an earlier process did is a step's."""
        self.since, self.images, self.waited = time.perf_counter(), 0, at.waited

    def step(self, at: Progress, lr: float, values: dict[str, float], images: int) -> None:
        """Called after every step; writes after every ``log_every``-th."""
        self.images += images
        if not self.enabled or at.step % self.config.log_every:
            return
        now = time.perf_counter()
        shown = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = {"epoch": at.epoch + 1, "step": at.step, "lr": lr} | shown
        line |= {
            "images_per_second": self.images / (now - self.since),
            "data_wait_seconds": at.waited - self.waited,
        }
        self.since, self.images, self.waited = now, 0, at.waited
        with open(self.path, "a") as stream:
            stream.write(json.dumps(line, sort_keys=True) + "\n")
        self._scalars("step", line, at.step)

    def epoch(self, entry: dict[str, Any], rows: Callable[[], dict[str, Tensor]] | None) -> None:
        """Called at an epoch's end with its line of the log, and what makes images of its last step."""
        if self.board is None:
            return
        self._scalars("epoch", entry, entry["epoch"])
        if rows is not None:
            for name, image in rows().items():
                self.board.add_image(name, image, entry["epoch"])
        self.board.flush()

    def _scalars(self, group: str, line: dict[str, Any], step: int) -> None:
        if self.board is not None:
            for name, value in line.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{group}/{name}", value, step)


def summary_writer() -> type:
    """TensorBoard's writer; `MissingExtraError` where it is not installed."""
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError as error:
        raise MissingExtraError(
            "`tensorboard` needs the extra [report]: pip install 'stl-offline[report]'; or `tensorboard=False`"
        ) from error


def _cut_after(path: Path, step: int) -> None:
    """Leave out the lines of steps that will be taken again, and a last line that was cut off."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            fine = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            fine = False
        if fine:
            kept.append(line + "\n")
    atomic_write(path, "".join(kept).encode())


@torch.no_grad()
def image_rows(model: nn.Module, inputs: StepInputs) -> dict[str, Tensor]:
    """Images side by side, their label maps, what the model's tokens say of them: uint8 (3, H, B·W) each.

    A class has one colour everywhere. Labels are as bright as their weight, predictions as their probability.
    """
    images = inputs.images
    mean, std = (
        torch.tensor(model.pretrained_cfg[name], device=images.device)[:, None, None] for name in ("mean", "std")
    )
    was_training = model.training
    logits = model.eval()(images)[1].float()
    model.train(was_training)
    sure, predicted = logits.softmax(dim=-1).max(dim=-1)
    size = images.shape[2:]
    grid = model.grid_size(*size)
    rows = {"images": (images.float() * std + mean).clamp(0, 1)}
    if inputs.token_ids is not None:
        weights, best = inputs.token_weights.max(dim=-1)
        ids = inputs.token_ids.gather(-1, best[..., None])[..., 0]
        rows["labels"] = _map_image(ids, weights * (ids >= 0), grid, size)
    rows["predictions"] = _map_image(predicted, sure, grid, size)
    return {name: (torch.cat(list(row), dim=2) * 255).round().byte().cpu() for name, row in rows.items()}


def _map_image(ids_BN: Tensor, brightness_BN: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Class maps in the palette's colours: (B, 3, H, W) in [0, 1]."""
    colours_BN3 = torch.from_numpy(class_pixels(ids_BN.cpu().numpy())).to(ids_BN.device) / 255
    colours = colours_BN3.mT * brightness_BN[:, None].float().clamp(0, 1)
    return F.interpolate(colours.unflatten(2, grid), size=size, mode="nearest")
