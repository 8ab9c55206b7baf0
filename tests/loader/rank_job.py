"""A student's training whose every batch is written down: run alone, or by torchrun as one of several processes.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.loader.rank_job IMAGES LABELS FOLDER
"""

import hashlib
import json
import os
import sys
from pathlib import Path

from stl_offline.config import StudentConfig
from stl_offline.loader import TokenLoader
from stl_offline.training import setup
from stl_offline.training.train_student import train_student

EPOCHS = 5


class NotedLoader(TokenLoader):
    """Lists for each epoch its batches, each a list of (sample id, digest of the sample's pixels and targets)."""

    epochs: list[list]

    def epoch(self, epoch, *arguments, **settings):
        self.epochs.append([])
        return super().epoch(epoch, *arguments, **settings)

    def _make_batch(self, item):
        batch = super()._make_batch(item)
        rows = zip(batch.sample_ids.tolist(), batch.images, batch.token_ids, batch.token_weights, strict=True)
        self.epochs[-1].append([(sample, digest(*tensors)) for sample, *tensors in rows])
        return batch


def digest(*tensors) -> str:
    return hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()


def train(images: str, labels: str, out: str, batch_size: int) -> list[list]:
    """Train for a moment, with `NotedLoader` in the loader's place; gives what its batches held."""
    NotedLoader.epochs = []
    settings = {"data": images, "labels": labels, "out": out, "batch_size": batch_size, "epochs": EPOCHS}
    small = {"img_size": 32, "seed": 5, "workers": 1, "device": "cpu", "color_jitter": 0.0, "token_target": "soft"}
    train_student(StudentConfig(**settings, **small))
    return NotedLoader.epochs


def main() -> None:
    images, labels, folder = sys.argv[1:]
    # For good: this process does nothing else.
    setup.TokenLoader = NotedLoader
    epochs = train(images, labels, str(Path(folder) / "run"), 4)
    (Path(folder) / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(epochs))


if __name__ == "__main__":
    main()
