"""A classifier on ImageNet's test sets and on generated corruptions, scored as papers do.

`evaluate_suites` is ``stl-offline evaluate`` with ``--suite``, ``--corrupt`` or ``--model``. Images are decoded and
resized by Pillow, as timm's validate.py does, since published figures were made so. A part that is done is stored at
once: the same command continues after it.

B: batch, K: the model's classes.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from stl_offline.config import EvaluateConfig
from stl_offline.device import amp_name, autocast, pick_amp, pick_device, pick_workers
from stl_offline.distributed import World, join_world, leaving_world, sum_over_world, told_by_first
from stl_offline.errors import InputError
from stl_offline.evaluation.corruptions import check_corruptions_can_run, parse_corruptions
from stl_offline.evaluation.figures import suite_figures, write_csv
from stl_offline.evaluation.images import Images, InputImages, OwnImages, Transform, collate, imagenet_columns
from stl_offline.evaluation.measures import ClassView, Tally, scores_of
from stl_offline.evaluation.suites import Suite, open_suite, subset_classes
from stl_offline.files import atomic_write, cache_dir, canonical_json, sha256_bytes, sha256_parts
from stl_offline.models import Classifier, load_classifier
from stl_offline.progress import progress_bar

RESULT_VERSION = 1
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One part to score.

    images, fingerprint: called where they are needed; views: the classes that are compared, the first for the headline;
    corruption: (kind, severity) to generate; transform: one of its own; real_labels: each image's right classes.
    """

    suite: str
    name: str
    images: Callable[[], Images]
    fingerprint: Callable[[], str]
    views: tuple[ClassView, ...]
    corruption: tuple[str, int] | None = None
    transform: Transform | None = None
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
            jobs = _own_jobs(config.sources["data"], kinds, classifier, config)
        runner = _Runner(config, classifier, transform, device, world)
        sums = runner.run(jobs)
    scores = [
        {view: scores_of(vector, job.real_labels is None) for view, vector in found.items() if vector[0]}
        for job, found in zip(jobs, sums, strict=True)
    ]
    settings = {
        "model": classifier.name,
        "weights_sha256": classifier.weights_sha256,
        "parameters": sum(parameter.numel() for parameter in classifier.model.parameters()),
        "classes": classifier.model.num_classes,
        "transform": asdict(transform) | {"mean": list(classifier.mean), "std": list(classifier.std)},
        "amp": amp_name(pick_amp(config.amp, device)),
        "partial": config.partial,
    }
    if kinds:
        settings["seed"] = config.seed
    found = suite_figures([(job.suite, job.name) for job in jobs], scores)
    for job in jobs:
        if job.transform is not None:
            found[job.suite]["transform"] = asdict(job.transform)
    result = {"version": RESULT_VERSION, **settings, "suites": found}
    if config.csv is not None and world.is_first:
        write_csv(result, config.csv)
    return result


class _Runner:
    """Runs jobs one after the other, each once: sums that are stored are taken from there."""

    def __init__(
        self,
        config: EvaluateConfig,
        classifier: Classifier,
        transform: Transform,
        device: torch.device,
        world: World,
    ) -> None:
        self.config, self.device, self.world = config, device, world
        self.transform, self.amp = transform, pick_amp(config.amp, device)
        self.model = classifier.model.to(device).eval().to(memory_format=torch.channels_last)
        self.scores_tokens = classifier.scores_tokens
        shape = (1, 3, 1, 1)
        self.mean = 255 * torch.tensor(classifier.mean, device=device).view(shape)
        self.std = 255 * torch.tensor(classifier.std, device=device).view(shape)
        self.identity = [classifier.name, classifier.weights_sha256, classifier.mean, classifier.std]

    def run(self, jobs: Sequence[Job]) -> list[dict[str, list[float]]]:
        """The sums of each job (`Tally.vector`), by the name of its class view."""
        # The first process alone looks at the files: ImageNet-C has millions of them.
        places = [self._place(job) for job in jobs] if self.world.is_first else []
        stored = told_by_first([self._stored(place) for place in places], self.world)
        done = sum(found is not None for found in stored)
        if done and self.world.is_first:
            _LOG.info("%d of %d parts were scored before, with the same weights, settings and files", done, len(jobs))
        for number, job in enumerate(jobs):
            if stored[number] is None:
                stored[number] = sums = self._score(job)
                if self.world.is_first:
                    atomic_write(
                        places[number], canonical_json({"sums": sums, "sha256": sha256_bytes(canonical_json(sums))})
                    )
            if not next(iter(stored[number].values()))[0]:
                raise InputError(f"{job.suite} {job.name}: none of its images has a class that is scored")
        return stored

    @torch.inference_mode()
    def _score(self, job: Job) -> dict[str, list[float]]:
        images = job.images()
        mine = range(self.world.rank, len(images), self.world.size)
        loader = DataLoader(
            InputImages(images, job.transform or self.transform, job.corruption, self.config.seed, mine),
            self.config.batch_size,
            num_workers=pick_workers(self.config.workers),
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
        )
        tallies = [Tally(self.device) for _ in job.views]
        with progress_bar(len(mine), f"{job.suite} {job.name}", enabled=self.world.is_first) as bar:
            for batch in loader:
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

    def _place(self, job: Job) -> Path:
        """Where a job's sums are stored: named by all that shapes them."""
        views = [
            [view.name, None if view.columns is None else view.columns.tolist(), view.right.tolist()]
            for view in job.views
        ]
        shaped_by = [
            RESULT_VERSION,
            *self.identity,
            amp_name(self.amp),
            asdict(job.transform or self.transform),
            [job.suite, job.name, job.fingerprint()],
            views,
            [*job.corruption, self.config.seed] if job.corruption else None,
            job.real_labels,
        ]
        return cache_dir() / "scores" / f"{sha256_parts(json.dumps(shaped_by).encode())}.json"

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
    cropped = None if config.crop_pct else replace(transform, side=classifier.trained_side, as_is=True)
    jobs = []
    for name, suite in suites.items():
        # Of ImageNet, also the accuracy on the classes of A and R: what theirs is compared with.
        views = (every, *cut.values()) if name == "imagenet" else (cut[name], every) if name in cut else (every,)
        jobs += [
            Job(
                name,
                part.name,
                part.files,
                part.fingerprint,
                views,
                transform=cropped if name == "c" else None,
                real_labels=part.real_labels,
            )
            for part in suite.parts
        ]
    return jobs


def _own_jobs(
    place: str, kinds: Sequence[tuple[str, int]], classifier: Classifier, config: EvaluateConfig
) -> list[Job]:
    """The clean images of a data set, and each corruption of them."""
    data = OwnImages(place, classifier)
    kept = data.columns if config.classes == "subset" else None
    view = ClassView.of(config.classes, range(classifier.model.num_classes), kept)
    clean = Job("data", "clean", lambda: data, lambda: data.fingerprint, (view,))
    return [
        clean,
        *(replace(clean, name=f"{kind}/{severity}", corruption=(kind, severity)) for kind, severity in kinds),
    ]
