"""A classifier on ImageNet's test sets and on generated corruptions, scored as papers do.

`evaluate_suites` is ``stl-offline evaluate`` with ``--suite``, ``--corrupt`` or ``--model``. Images are decoded and
resized by Pillow, as timm's validate.py does, since published figures were made so. A part that is done is stored at
once: the same command continues after it.

B: batch, K: the model's classes.
"""

import itertools
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from stl_offline.config import EvaluateConfig
from stl_offline.device import amp_name, autocast, pick_amp, pick_device, pick_workers
from stl_offline.distributed import World, join_world, leaving_world, sum_over_world, told_by_first
from stl_offline.errors import InputError
from stl_offline.evaluation.corruptions import SMALLEST_SIDE, check_corruptions_can_run, parse_corruptions
from stl_offline.evaluation.figures import suite_figures, write_csv
from stl_offline.evaluation.images import (
    Batches,
    InputImages,
    Inputs,
    OwnImages,
    Transform,
    collate,
    imagenet_columns,
    start_loading,
)
from stl_offline.evaluation.measures import ClassView, Tally, check_finite, scores_of
from stl_offline.evaluation.suites import Suite, open_suite, subset_classes
from stl_offline.files import atomic_write, cache_dir, canonical_json, sha256_bytes, sha256_parts
from stl_offline.models import Classifier, load_classifier
from stl_offline.progress import progress_bar

RESULT_VERSION = 1
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One part to score.

    inputs: its images as the model sees them; fingerprint: gives what its scores are stored under, and the number of
    images; views: the classes that are compared, the first for the headline; real_labels: each image's right classes.
    """

    suite: str
    name: str
    inputs: Inputs
    fingerprint: Callable[[], tuple[str, int]]
    views: tuple[ClassView, ...]
    real_labels: tuple[tuple[int, ...], ...] | None = None


def evaluate_suites(config: EvaluateConfig) -> dict[str, Any]:
    """Score a classifier on test sets, or on a data set and generated corruptions of it; gives what ``--json`` prints.

    Under torchrun, as one process of it: images are shared out and counts are added up. The sums of every part are
    stored when it is done, under the model's weights, the transform and the files, and taken from there the next time.

    Raises:
        StlError: a test set that is incomplete, a model whose classes do not fit, an image that cannot be decoded.
    """
    kinds = parse_corruptions(config.corrupt) if config.corrupt is not None else []
    if kinds:
        check_corruptions_can_run()
    suites = _open_suites(config)
    with leaving_world():
        device = pick_device(config.device)
        world = join_world(device)
        classifier = load_classifier(
            config.checkpoint,
            config.model,
            class_names=config.class_names,
            by_order=config.by_order,
            mean=config.mean,
            std=config.std,
            img_size=config.img_size,
        )
        crop_pct = config.crop_pct or classifier.crop_pct
        transform = Transform(classifier.side, crop_pct, classifier.interpolation, classifier.crop_mode)
        if suites:
            jobs = _suite_jobs(suites, classifier, transform, config)
        else:
            jobs = _own_jobs(config, kinds, classifier, transform)
        sums = _Runner(config, classifier, device, world).run(jobs)
    scores = [
        {view: scores_of(vector, job.real_labels is None) for view, vector in found.items() if vector[0]}
        for job, found in zip(jobs, sums, strict=True)
    ]
    settings = {
        "model": classifier.name,
        "weights_sha256": classifier.weights_sha256,
        "parameters": sum(parameter.numel() for parameter in classifier.model.parameters()),
        "classes": classifier.model.num_classes,
        "transform": transform.described() | {"mean": list(classifier.mean), "std": list(classifier.std)},
        "amp": amp_name(pick_amp(config.amp, device)),
        "partial": config.partial,
    }
    if kinds:
        settings["seed"] = config.seed
    found = suite_figures([(job.suite, job.name) for job in jobs], scores)
    for job in jobs:
        if job.inputs.transform != transform:
            found[job.suite]["transform"] = job.inputs.transform.described()
    result = {"version": RESULT_VERSION, **settings, "suites": found}
    if config.csv is not None and world.is_first:
        write_csv(result, config.csv)
    return result


class _Runner:
    """Runs jobs one after the other, each once: sums that are stored are taken from there."""

    def __init__(self, config: EvaluateConfig, classifier: Classifier, device: torch.device, world: World) -> None:
        self.config, self.device, self.world = config, device, world
        self.amp = pick_amp(config.amp, device)
        self.model = classifier.model.to(device).eval().to(memory_format=torch.channels_last)
        self.scores_tokens = classifier.scores_tokens
        shape = (1, 3, 1, 1)
        self.mean = 255 * torch.tensor(classifier.mean, device=device).view(shape)
        self.std = 255 * torch.tensor(classifier.std, device=device).view(shape)
        self.identity = [classifier.name, classifier.weights_sha256, classifier.mean, classifier.std]

    def run(self, jobs: Sequence[Job]) -> list[dict[str, list[float]]]:
        """The sums of each job (`Tally.vector`), by the name of its class view."""
        # The first process alone looks at the files: ImageNet-C has millions of them.
        places, sizes = zip(*(self._place(job) for job in jobs), strict=True) if self.world.is_first else ((), ())
        sums, sizes = told_by_first([[self._stored(place) for place in places], sizes], self.world)
        pending = [number for number, found in enumerate(sums) if found is None]
        if len(pending) < len(jobs) and self.world.is_first:
            _LOG.info(
                "%d of %d parts were scored before, with the same weights, settings and files",
                len(jobs) - len(pending),
                len(jobs),
            )
        order = Batches([(number, sizes[number]) for number in pending], self.config.batch_size, self.world)
        # One loader for all parts: its processes live as long as there is work.
        with warnings.catch_warnings():
            # From Python 3.12 on: of processes that are forked where threads run. torch's loader always does.
            warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
            batches = iter(
                DataLoader(
                    InputImages([job.inputs for job in jobs], self.config.seed),
                    batch_sampler=order,
                    num_workers=pick_workers(self.config.workers),
                    collate_fn=collate,
                    pin_memory=self.device.type == "cuda",
                    worker_init_fn=start_loading,
                )
            )
        for number in pending:
            own = itertools.islice(batches, order.of_part(sizes[number]))
            sums[number] = found = self._score(jobs[number], own, len(order.places(sizes[number])))
            for vector in found.values():
                check_finite(vector)
            if self.world.is_first:
                content = {"sums": found, "sha256": sha256_bytes(canonical_json(found))}
                atomic_write(places[number], canonical_json(content))
        for job, found in zip(jobs, sums, strict=True):
            if not found[job.views[0].name][0]:
                raise InputError(f"{job.suite} {job.name}: none of its images has a class that is scored")
        return sums

    @torch.inference_mode()
    def _score(self, job: Job, batches: Iterator[Any], images: int) -> dict[str, list[float]]:
        tallies = [Tally(self.device) for _ in job.views]
        with progress_bar(images, f"{job.suite} {job.name}", enabled=self.world.is_first) as bar:
            for batch in batches:
                if isinstance(batch, str):
                    raise InputError(
                        f"{job.suite} {job.name}: the image {batch}; restore the file, or download it again"
                    )
                pixels, labels, places = batch
                self._add(job, tallies, pixels, labels.to(self.device), places)
                bar.update(len(places))
        vectors = sum_over_world(torch.stack([tally.vector for tally in tallies]), self.world)
        return dict(zip([view.name for view in job.views], vectors.tolist(), strict=True))

    def _add(
        self, job: Job, tallies: Sequence[Tally], pixels_BHWC: Tensor, labels_B: Tensor, places: Sequence[int]
    ) -> None:
        inputs = pixels_BHWC.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
        with autocast(self.device, self.amp):
            output = self.model((inputs - self.mean) / self.std)
        logits, tokens = output if isinstance(output, tuple) else (output, None)
        tokens = tokens.float() if tokens is not None and self.scores_tokens else None
        for view, tally in zip(job.views, tallies, strict=True):
            if job.real_labels is not None:
                right = [[int(view.right[number]) for number in job.real_labels[place]] for place in places]
                tally.add_multi_label(logits.float(), right)
            else:
                view.add(tally, logits.float(), labels_B, tokens)

    def _place(self, job: Job) -> tuple[Path, int]:
        """Where a job's sums are stored, named by all that shapes them; the number of its images."""
        fingerprint, size = job.fingerprint()
        views = [
            [view.name, None if view.columns is None else view.columns.tolist(), view.right.tolist()]
            for view in job.views
        ]
        shaped_by = [
            RESULT_VERSION,
            *self.identity,
            amp_name(self.amp),
            job.inputs.transform.described(),
            [job.suite, job.name, fingerprint],
            views,
            [*job.inputs.corruption, self.config.seed] if job.inputs.corruption else None,
            job.real_labels,
        ]
        return cache_dir() / "scores" / f"{sha256_parts(json.dumps(shaped_by).encode())}.json", size

    def _stored(self, place: Path) -> dict[str, list[float]] | None:
        if not self.config.resume:
            return None
        try:
            found = json.loads(place.read_bytes())
            return found["sums"] if found["sha256"] == sha256_bytes(canonical_json(found["sums"])) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _open_suites(config: EvaluateConfig) -> dict[str, Suite]:
    return {
        name: open_suite(
            name, config.sources[name], config.real_labels if name == "real" else None, partial=config.partial
        )
        for name in config.suite
    }


def _suite_jobs(
    suites: dict[str, Suite], classifier: Classifier, transform: Transform, config: EvaluateConfig
) -> list[Job]:
    columns = imagenet_columns(classifier)
    every = ClassView.of("all", columns, None)
    cut = {name: ClassView.of(name, columns, subset_classes(name)) for name in ("a", "r")}
    # ImageNet-C's images are 224 px and cropped already. To resize and crop them again changes rankings.
    cropped = transform if config.crop_pct else replace(transform, side=classifier.trained_side, as_is=True)
    jobs = []
    for name, suite in suites.items():
        # Of ImageNet, also the accuracy on the classes of A and R: what theirs is compared with.
        views = (every, *cut.values()) if name == "imagenet" else (cut[name], every) if name in cut else (every,)
        for part in suite.parts:
            inputs = Inputs(part.files, cropped if name == "c" else transform)
            jobs.append(Job(name, part.name, inputs, part.fingerprint, views, part.real_labels))
    return jobs


def _own_jobs(
    config: EvaluateConfig, kinds: Sequence[tuple[str, int]], classifier: Classifier, transform: Transform
) -> list[Job]:
    """The clean images of a data set, and each corruption of them."""
    if kinds and min(transform.side) < SMALLEST_SIDE:
        raise InputError(
            f"generated corruptions need inputs of at least {SMALLEST_SIDE} pixels a side, and those of "
            f"{classifier.name} have {transform.side[0]}×{transform.side[1]}; give a larger `img_size`"
        )
    data = OwnImages(config.sources["data"], classifier)
    kept = data.columns if config.classes == "subset" else None
    view = ClassView.of(config.classes, range(classifier.model.num_classes), kept)
    clean = Inputs(lambda: data, transform)
    parts = {"clean": clean} | {f"{kind}/{level}": replace(clean, corruption=(kind, level)) for kind, level in kinds}
    return [Job("data", name, inputs, lambda: (data.fingerprint, len(data)), (view,)) for name, inputs in parts.items()]
