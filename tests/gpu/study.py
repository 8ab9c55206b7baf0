"""Do offline labels give what online ones give, on a GPU? The study of drawn labels with images from memory.

    python -m tests.gpu.process study --train tiny180-train.tar --val tiny180-val.tar --out gpu-study

Images are decoded once and lie on the device, and crops are taken there (bilinear, without antialiasing), so that no
FFCV is needed. All else is the package's own: views, labels, token caches, targets, losses, the loop. A labeler is
trained, and its labels are dumped once for each epoch of a student. Students are trained without labels, with the
labeler in every step, with one drawn class per token and with the 5 most probable classes, ``--jobs`` processes side by
side. A larger student and labeler are trained for fewer epochs, without the arm of 5 classes. With ``--masks``, every
student and random weights are fine-tuned on masks, too, as `tests.benchmarks.transfer_study` does. Every task's result
is kept: the same command goes on where it was stopped.

Processes share a GPU best with NVIDIA's MPS: ``nvidia-cuda-mps-control -d`` beforehand. Otherwise they take turns.
"""

import argparse
import io
import json
import math
import multiprocessing
import os
import statistics
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from PIL import Image
from torch.nn import functional

from stl_offline.config import DumpConfig, LabelerConfig, StudentConfig
from stl_offline.distributed import World
from stl_offline.dump.labelling import Labelling, load_labeler
from stl_offline.evaluation import Validation, evaluate_model
from stl_offline.files import atomic_write, canonical_json, images_fingerprint
from stl_offline.geometry import center_views
from stl_offline.models import load_model
from stl_offline.targets import TokenLabels
from stl_offline.training.engine import run_training
from stl_offline.training.label_sources import open_labels
from stl_offline.training.setup import build_stage, make_run_folder
from stl_offline.training.train_labeler import LabelerObjective
from stl_offline.training.train_student import StudentObjective
from tests.benchmarks import transfer_study
from tests.gpu.memory import MemoryImages, MemoryLoader

KEPT = {"draws": {"top_k": 0, "draws": 1}, "top5": {"top_k": 5}}
ARMS = ("none", "online", *KEPT)
LARGER = "larger-"  # begins the names of what has the larger model
MASKS = "masks-"  # begins the names of fine-tunings
OF_A_CALL = ("out", "names", "jobs", "minutes", "seeds", "device")  # what the same study may be continued with
OF_MASKS = ("masks", "masks_epochs")  # what fine-tunings alone belong to
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
SCORED = {"clean": "miou", "corrupted": "corrupted_miou", "retention": "retention"}
LARGER_ARMS = tuple(LARGER + arm for arm in ("none", "online", "draws"))


class TarImages(MemoryImages):
    """Images of a tar, all of one size, decoded: uint8 ``pixels`` (n, 3, S, S). The folder of an image is its class."""

    def __init__(self, path: str, folder: Path) -> None:
        """``folder`` keeps what is decoded for other processes."""
        kept = folder / f"{transfer_study.mark(path)}.npz"
        if not kept.is_file():
            stream = io.BytesIO()
            np.savez(stream, **_decode(path))
            atomic_write(kept, stream.getvalue())
        with np.load(kept) as found:
            self.pixels, hashes, names = found["pixels"], found["hashes"], found["names"].tolist()
        folders = [name.split("/")[-2] for name in names]
        classes = sorted(set(folders))
        super().__init__(len(names), self.pixels.shape[-1], len(classes))
        self.place = self.path = path
        self.keys, self.content_hashes, self.class_names = names, hashes, tuple(classes)
        self.class_ids = np.array([classes.index(name) for name in folders])
        self.fingerprint = images_fingerprint(
            self.class_names, json.dumps(names).encode(), self.class_ids.tobytes(), hashes.tobytes()
        )


def _decode(path: str) -> dict[str, np.ndarray]:
    with tarfile.open(path) as archive:
        files = [(member.name, archive.extractfile(member).read()) for member in archive if member.isfile()]

    def decode(file: tuple[str, bytes]) -> np.ndarray:
        with Image.open(io.BytesIO(file[1])) as image:
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        pixels = np.stack(list(pool.map(decode, files)))
    hashes = np.array([xxhash.xxh3_64_intdigest(data) for _, data in files], dtype=np.uint64)
    return {"pixels": pixels, "hashes": hashes, "names": np.array([name for name, _ in files])}


class DecodedLoader(MemoryLoader):
    """Batches of images that lie decoded on the device, cropped there as `TokenLoader`'s views say.

    side: of the crops; normalisation: mean and standard deviation; labels: as `TokenLoader`'s.
    """

    def __init__(
        self,
        images: "TarImages",
        side: int,
        batch_size: int,
        device: torch.device,
        normalisation: tuple[tuple[float, ...], tuple[float, ...]],
        *,
        shuffle: bool = True,
        labels: TokenLabels | None = None,
        seed: int = 0,
    ) -> None:
        self.images, self.batch_size, self.device, self.shuffle = images, batch_size, device, shuffle
        self.seed = seed
        self.world, self.targets = World(), None
        self.pixels = torch.from_numpy(images.pixels).to(device)
        self.class_ids = torch.from_numpy(images.class_ids).to(device)
        self.labels, self._side = labels, side
        self._mean, self._std = (torch.tensor(each, device=device)[:, None, None] for each in normalisation)
        self._views, self._places = np.zeros((0, 6), np.float32), {}

    def epoch(self, epoch, views, *, start_batch=0, sample_ids=None, warps=None, repeats=1, labels=None, **places):
        if labels is not None:
            self.labels = labels
        self._views, self._places = views, places
        return super().epoch(epoch, start_batch=start_batch, sample_ids=sample_ids, warps=warps)

    def _batch(self, epoch, ids, warps):
        batch = super()._batch(epoch, ids, warps)
        views = self._views[ids]
        batch.views = torch.from_numpy(views)
        batch.images = self._crop(batch.images, torch.from_numpy(views).to(self.device, torch.float32))
        if self.labels is not None:
            places = {name: values[ids] for name, values in self._places.items()}
            tokens = self.labels(ids, views, epoch, seed=self.seed, **places)
            batch.token_ids, batch.token_weights = (torch.from_numpy(each).to(self.device) for each in tokens)
        return batch

    def _crop(self, pixels: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, S, S) → normalised crops (B, 3, side, side). Views (B, 6) map the unit square, the sampling grid
        maps [−1, 1]²."""
        matrix = views.view(-1, 2, 3).clone()
        matrix[:, :, 2] = matrix[:, :, 0] + matrix[:, :, 1] + 2 * matrix[:, :, 2] - 1
        grid = functional.affine_grid(matrix, (len(views), 3, self._side, self._side), align_corners=False)
        crops = functional.grid_sample(pixels.float() / 255, grid, padding_mode="border", align_corners=False)
        return ((crops - self._mean) / self._std).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Study:
    """What is compared; its fields are the options of the command line.

    model: the small student, and its labeler; batch_size, lr: of that labeler; student_batch, student_lr: of that
    student; views: crops of an image in a label set, at most one for each epoch.
    larger: a second student, also as a labeler, since the labeler of every step must have the student's grid; "": none.
    larger_epochs, larger_batch, larger_lr: of both.
    names: parts of tasks' names, between commas: tasks that have one of them are run, and what these need; "": all.
    ValueError where no task has such a name.
    masks: images with masks, on which every student and random weights are fine-tuned for masks_epochs; "": none.
    minutes: after which no task is begun; jobs: processes side by side, 0: everything in this one.
    """

    train: str
    val: str
    out: str
    model: str = "fan_micro_4_p8"
    side: int = 64
    epochs: int = 60
    batch_size: int = 256
    lr: float = 1e-3
    student_batch: int = 512
    student_lr: float = 2e-3
    views: int = 60
    larger: str = "fan_tiny_8_p4_hybrid"
    larger_epochs: int = 20
    larger_batch: int = 256
    larger_lr: float = 5e-4
    masks: str = ""
    masks_epochs: int = 18
    seeds: int = 3
    names: str = ""
    jobs: int = 4
    minutes: float = 60.0
    device: str = "cuda"

    @property
    def tasks(self) -> dict[str, tuple[str, ...]]:
        """Names of tasks, and of those that each needs."""
        arms = {"none": (), "online": ("labeler",)} | {kind: (f"labels-{kind}",) for kind in KEPT}
        tasks: dict[str, tuple[str, ...]] = {}
        for begin in ("", LARGER) if self.larger else ("",):
            tasks[f"{begin}labeler"] = ()
            tasks |= {f"{begin}labels-{kind}": (f"{begin}labeler",) for kind in KEPT if begin + kind in self.arms}
        for seed in range(self.seeds):
            for arm in self.arms:
                begin = LARGER if arm.startswith(LARGER) else ""
                tasks[f"{arm}-seed{seed}"] = tuple(begin + need for need in arms[arm.removeprefix(begin)])
        if self.masks:
            tasks["halves"] = ()
            for seed in range(self.seeds):
                for arm in self.arms:
                    tasks[f"{MASKS}{arm}-seed{seed}"] = ("halves", f"{arm}-seed{seed}")
                for begin in (LARGER, "") if self.larger else ("",):
                    tasks[f"{MASKS}{begin}random-seed{seed}"] = ("halves",)
        return tasks

    @property
    def wanted(self) -> dict[str, tuple[str, ...]]:
        """The tasks that are to be run."""
        names = self.names.split(",") if self.names else [""]
        unknown = [name for name in names if (not name and self.names) or not any(name in task for task in self.tasks)]
        if unknown:
            raise ValueError(f"no task has a name with {unknown}; there are: {', '.join(self.tasks)}")
        todo = [task for task in self.tasks if any(name in task for name in names)]
        found: set[str] = set()
        while todo:
            found.add(task := todo.pop())
            todo += self.tasks[task]
        return {task: needs for task, needs in self.tasks.items() if task in found}

    @property
    def arms(self) -> tuple[str, ...]:
        return (LARGER_ARMS if self.larger else ()) + ARMS

    def result(self, task: str) -> dict[str, Any] | None:
        path = Path(self.out) / "results" / f"{task}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def run(self, task: str) -> None:
        """Do one task, and keep its result."""
        if self.result(task) is not None:
            return
        start = time.monotonic()
        arm, _, seed = task.removeprefix(MASKS).partition("-seed")
        begin = LARGER if arm.startswith(LARGER) else ""
        kind = arm.removeprefix(begin)
        if task == "halves":
            found = {}
            transfer_study.make_halves(self._transfer)
        elif task.startswith(MASKS):
            run = self._place(f"run-{arm}-seed{seed}")
            backbone = run if kind != "random" else f"timm:{self.larger if begin else self.model}"
            found = transfer_study.score_of_run(self._transfer, (arm, backbone, int(seed)))
        elif kind.startswith("labels-"):
            found = self._dump(begin, kind.removeprefix("labels-"))
        else:
            found = self._train(begin, kind, int(seed or 0))
        path = Path(self.out) / "results" / f"{task}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, canonical_json(found | {"seconds": time.monotonic() - start}))

    @property
    def _transfer(self) -> argparse.Namespace:
        words = ["--masks", self.masks, "--epochs", str(self.masks_epochs), "--out", self._place("transfer")]
        return transfer_study.parse([*words, "--device", self.device])

    def _images(self, path: str) -> TarImages:
        return TarImages(path, Path(self.out))

    def _place(self, name: str) -> str:
        return str(Path(self.out) / name)

    def _loader(self, images: TarImages, batch_size: int, of: Any, **options: Any) -> DecodedLoader:
        device = torch.device(self.device)
        return DecodedLoader(images, self.side, batch_size, device, (of.mean, of.std), **options)

    def _train(self, begin: str, arm: str, seed: int) -> dict[str, Any]:
        """``begin``: `LARGER` or nothing; ``arm``: labeler, or one of `ARMS`."""
        settings = {
            "data": self.train,
            "val": self.val,
            "out": self._place(f"run-{begin}{arm}-seed{seed}"),
            "seed": seed,
            "img_size": self.side,
            "device": self.device,
        }
        model, epochs = (self.larger, self.larger_epochs) if begin else (self.model, self.epochs)
        if begin:
            lr, batch_size = self.larger_lr, self.larger_batch
        elif arm == "labeler":
            lr, batch_size = self.lr, self.batch_size
        else:
            lr, batch_size = self.student_lr, self.student_batch
        settings |= {"lr": lr, "batch_size": batch_size, "epochs": epochs, "val_every": math.ceil(epochs / 6)}
        if arm == "labeler":
            config = LabelerConfig(**settings, model=f"{model}_token")
        else:
            labels = {"none": "none", "online": "online"}.get(arm) or (self._place(f"{begin}labels-{arm}"),)
            labeler = {"labeler": self._place(f"run-{begin}labeler-seed0")} if arm == "online" else {}
            config = StudentConfig(**settings, model=model, labels=labels, **labeler)
        train, val = self._images(self.train), self._images(self.val)
        stage_name = "labeler" if arm == "labeler" else "student"
        stage = build_stage(config, stage_name, train, val, torch.device(self.device), World())
        views, classes = center_views(val.heights, val.widths), np.arange(len(val.class_names))
        scored = self._loader(val, 500, stage, shuffle=False)
        validation = Validation(scored, views, classes, stage.amp, World(), config.trains_tokens)
        with ExitStack() as stack:
            if arm == "labeler":
                objective, plan, identity, labels = LabelerObjective(stage), stage.random_plan, None, None
            else:
                source = stack.enter_context(closing(open_labels(config, stage)))
                objective, plan, identity = StudentObjective(stage, source), source.plan, source.identity()
                labels = source.loader_labels()
            loader = self._loader(train, config.batch_size, stage, labels=labels, seed=seed)
            run_training(stage, make_run_folder(stage, identity), objective, plan, lambda: (loader, validation))
        model, _ = load_model(config.out)
        scores = evaluate_model(
            model.to(stage.device).eval(), scored, views, classes, stage.amp, score_tokens=config.trains_tokens
        )
        log = (Path(config.out) / "log.jsonl").read_text().splitlines()
        curve = {row["epoch"]: row["top1"] for row in map(json.loads, log) if row.get("top1") is not None}
        return asdict(scores) | {"curve": curve}

    def _dump(self, begin: str, kind: str) -> dict[str, Any]:
        images, device = self._images(self.train), torch.device(self.device)
        config = DumpConfig(
            data=self.train,
            out=self._place(f"{begin}labels-{kind}"),
            labeler=self._place(f"run-{begin}labeler-seed0"),
            batch_size=4 * self.batch_size,
            crops_per_image=min(self.views, self.larger_epochs if begin else self.epochs),
            device=self.device,
            **KEPT[kind],
        )
        labelling = Labelling(config, load_labeler(config), images, device)
        labelling.__dict__["loader"] = self._loader(images, config.batch_size, labelling.labeler, shuffle=False)
        with labelling.open_writer() as writer:
            for shard in writer.claim_shards():
                writer.write_shard(shard, labelling.label_shard(writer, shard, lambda _: None))
            manifest = writer.finish()
        return {"bytes": sum(shard.bytes for shard in manifest.shards)}

    def keep_settings(self) -> None:
        """Write what the results belong to. ValueError: the folder has results of other settings."""
        own = {name: value for name, value in asdict(self).items() if name not in OF_A_CALL}
        own |= {name: os.path.abspath(own[name]) for name in ("train", "val", "masks") if own[name]}
        of_masks = {name: own.pop(name) for name in OF_MASKS}
        for file, settings in (("study.json", own), ("masks.json", of_masks if self.masks else None)):
            path = Path(self.out) / file
            if settings is None:
                continue
            if path.is_file() and (kept := json.loads(path.read_text())) != settings:
                different = ", ".join(
                    f"{name} {kept.get(name)}" for name in settings if kept.get(name) != settings[name]
                )
                raise ValueError(f"{self.out} holds a study with other settings: {different}; choose another --out")
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, canonical_json(settings))

    def run_all(self) -> None:
        """Every task as soon as what it needs is done, until the time is up. ValueError: settings are wrong."""
        todo = dict(self.wanted)
        self.keep_settings()
        for path in (self.train, self.val):
            self._images(path)  # decoded before several processes want them
        if self.jobs:
            os.environ |= {name: os.environ.get(name, "1") for name in THREAD_VARIABLES}
        # Processes that begin with all that is imported, and without this one's use of the GPU.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.gpu.process", "tests.gpu.study"])
        end, running = time.monotonic() + 60 * self.minutes, {}
        while (todo and time.monotonic() < end) or running:
            for task, needs in list(todo.items()):
                if len(running) >= max(1, self.jobs) or time.monotonic() > end:
                    break
                if all(self.result(need) for need in needs):
                    del todo[task]
                    if self.jobs:
                        running[task] = context.Process(target=self.run, args=(task,))
                        running[task].start()
                    else:
                        self.run(task)
            if not running and not any(all(map(self.result, needs)) for needs in todo.values()):
                break  # what is left needs something that failed
            time.sleep(0.2 if running else 0)
            for task, process in list(running.items()):
                if not process.is_alive():
                    del running[task]
                    if self.result(task) is None:
                        print(f"{task} FAILED ({process.exitcode})", file=sys.stderr)

    def rows(self) -> list[dict[str, Any]]:
        """Scores of each arm, and differences of arms by seed, each with its standard error."""
        found = {arm: [self.result(f"{arm}-seed{seed}") for seed in range(self.seeds)] for arm in self.arms}
        rows = []
        for task in self.tasks:
            result = self.result(task)
            if result and task.endswith("labeler"):
                rows.append({"row": task, "top1": result["top1"], "seconds": result["seconds"]})
            elif result and "labels-" in task:
                rows.append({"row": task, "bytes": result["bytes"], "seconds": result["seconds"]})
        for arm, results in found.items():
            results = [result for result in results if result]
            if results:
                curves = [" ".join(f"{100 * top1:.0f}" for top1 in result["curve"].values()) for result in results]
                rows.append({"row": arm, "seeds": len(results)} | _means(results) | {"curve": curves[0]})
        pairs = [("online", "none"), ("draws", "none"), ("top5", "none"), ("draws", "online"), ("top5", "online")]
        pairs += [(LARGER + one, LARGER + other) for one, other in pairs if self.larger and one != "top5"]
        for one, other in pairs:
            both = [(a, b) for a, b in zip(found[one], found[other], strict=True) if a and b]
            differences = [{name: a[name] - b[name] for name in ("top1", "ece")} for a, b in both]
            if differences:
                rows.append({"row": f"{one} − {other}", "seeds": len(differences)} | _means(differences))
        return rows

    def tables(self) -> list[str]:
        """Markdown: scores of fine-tuned models, of the arms that have all seeds, for each size of student."""
        lines = []
        for begin in ("", LARGER) if self.larger else ("",):
            arms = [f"{begin}random", *(arm for arm in self.arms if arm.startswith(LARGER) == bool(begin))]
            found = {arm: [self.result(f"{MASKS}{arm}-seed{seed}") for seed in range(self.seeds)] for arm in arms}
            values = {
                arm: {name: [result[key] or 0.0 for result in results] for name, key in SCORED.items()}
                for arm, results in found.items()
                if all(results)
            }
            lines += transfer_study.table(values, "miou", f"{begin}none") if values else []
        return lines


def _means(results: list[dict[str, Any]]) -> dict[str, str]:
    """Means of top-1 and calibration error, with the standard error where there are several seeds."""
    shown = {}
    for name in ("top1", "ece"):
        values = [result[name] for result in results]
        error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
        shown[name] = f"{statistics.mean(values):.4f}{error}"
    return shown


def main(words: list[str]) -> None:
    """The command line; ``words``: its arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for each in fields(Study):
        is_needed = each.default is MISSING
        option = {"required": True} if is_needed else {"default": each.default, "type": type(each.default)}
        parser.add_argument(f"--{each.name.replace('_', '-')}", **option)
    study = Study(**vars(parser.parse_args(words)))
    try:
        study.run_all()
    except ValueError as error:
        parser.error(str(error))
    for row in study.rows():
        print("; ".join(f"{name} {value}" if name != "row" else value for name, value in row.items()))
    print("\n".join(study.tables()))
