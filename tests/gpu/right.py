"""Is it right: numbers of the device against the same on the CPU, in float64 where that is possible."""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from stl_offline.augment import (
    Augmentation,
    MixSettings,
    RandAugment,
    RandomErase,
    draw_mix,
    mix_class_targets,
    mix_images,
    mix_token_targets,
)
from stl_offline.config import LabelerConfig, StudentConfig
from stl_offline.distributed import World
from stl_offline.evaluation import Validation
from stl_offline.losses import token_cross_entropy
from stl_offline.models import VARIANTS, inference_form
from stl_offline.training.engine import run_training
from stl_offline.training.label_sources import LabelSource, TokenSource
from stl_offline.training.online import online_targets
from stl_offline.training.optimization import TrainStep
from stl_offline.training.setup import make_run_folder
from stl_offline.training.train_labeler import LabelerObjective
from stl_offline.training.train_student import StudentObjective
from tests.gpu.memory import MemoryImages, MemoryLoader, make_stage, random_targets
from tests.gpu.report import SMALL, Bench

FORMS = {
    "float32": (None, False),
    "float32, channels last": (None, True),
    "bf16": (torch.bfloat16, True),
    "fp16": (torch.float16, True),
}


def outputs_and_gradient(model, images, amp=None):
    """A model's outputs, one after the other, and the gradient of a fixed sum of them; float64, on the CPU.

    The sum is scaled so that fp16 keeps its gradient: a mean's would be lost, as a loss without scaling is.
    """
    model.zero_grad()
    with torch.autocast(images.device.type, dtype=amp or torch.bfloat16, enabled=amp is not None):
        found = model(images)
    flat = torch.cat([each.flatten().double() for each in (found if isinstance(found, tuple) else (found,))])
    weights = torch.randn(len(flat), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ((flat * weights.to(flat.device)).sum() / len(flat) ** 0.5).backward()
    gradient = torch.cat([each.grad.flatten().double() for each in model.parameters() if each.grad is not None])
    return flat.detach().cpu(), gradient.cpu()


def fan_numbers(bench: Bench) -> None:
    """Every variant, forward and backward, against float64 on the CPU; ConvNeXt beside the half-precision ones."""
    small = bench.size is SMALL
    # Hybrids first; ConvNeXt early, since theirs are read beside it.
    names = ["fan_micro_4_p8_token"] if small else sorted((f"{name}_token" for name in VARIANTS), key=_comes_late)
    for name in names if small else [names[0], "convnext_small", *names[1:]]:
        if bench.over:
            bench.add("left out", model=name)
            continue
        model, images, expected, slope = _in_float64(bench, name)
        if name.startswith("fan"):
            with torch.inference_mode():
                found = inference_form(model)(images)
            flat = torch.cat([each.flatten().double().cpu() for each in found])
            _compare(bench, f"{name}, inference form", (flat, None), expected, slope)
        for form, (amp, last) in FORMS.items():
            own, inputs = model, images
            if last:
                own, inputs = (each.to(memory_format=torch.channels_last) for each in (own, inputs))
            _compare(bench, f"{name}, {form}", outputs_and_gradient(own, inputs, amp), expected, slope, half=bool(amp))


def compiled_numbers(bench: Bench) -> None:
    """FAN's numbers again, compiled."""
    for name in (f"{each}_token" for each in bench.size.models[:2]):
        if bench.over:
            bench.add("left out", model=name)
            continue
        model, images, expected, slope = _in_float64(bench, name)
        compiled = torch.compile(model, backend=bench.size.compiler, dynamic=False)
        try:
            _compare(bench, f"{name}, compiled", outputs_and_gradient(compiled, images), expected, slope)
        except Exception as error:  # of the compiler: the other model is still to be seen
            bench.add(f"{name}, compiled", FAILED=f"{type(error).__name__}: {error}"[:300])


def _comes_late(name: str) -> bool:
    return "hybrid" not in name


def _in_float64(bench: Bench, name: str):
    """A model on the device, two images, and the CPU's outputs and gradient in float64."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=bench.size.classes).eval()
    side = model.pretrained_cfg["input_size"][-1]
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    expected, slope = outputs_and_gradient(copy.deepcopy(model).double(), images.double())
    return model.to(bench.device), images.to(bench.device), expected, slope


def _compare(bench: Bench, row: str, found, expected, slope, *, half: bool = False) -> None:
    """Outputs and gradient against float64's: errors are shares of the largest output, and of the gradient's norm. In
    float32 both must be below 1e-4, in half precision below 5 % and 10 %."""
    outputs, gradient = found
    largest = expected.abs().max().item()
    error = (outputs - expected).abs().max().item()
    values = {"largest output error": error, "outputs up to": largest}
    passed = error < (0.05 if half else 1e-4) * largest
    if gradient is not None:
        values["gradient's error"] = difference = ((gradient - slope).norm() / slope.norm()).item()
        passed &= difference < (0.1 if half else 1e-4)
    bench.check(row, passed, **values)


def losses_and_targets(bench: Bench) -> None:
    """The token loss with every kind of list, and the labeler's targets, against the CPU."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 10, bench.size.classes, generator=generator)
    ids = torch.randint(-1, bench.size.classes, (3, 10, 4), generator=generator)
    weights = torch.rand(3, 10, 4, generator=generator) / 4
    ghost = ids.clone()
    ghost[..., -1] = -2

    def loss(device, listed, smoothing, ghosts):
        own = logits.clone().to(device).requires_grad_()
        given = weights[..., : listed.shape[-1]].to(device)
        value = token_cross_entropy(own, listed.to(device), given, smoothing, ghosts=ghosts)
        value.backward()
        return torch.cat([value.detach()[None].cpu(), own.grad.flatten().cpu()])

    for name, listed, ghosts in (("lists", ids, ()), ("with ghosts", ghost, (3,)), ("one class", ids[..., :1], ())):
        for smoothing in (0.0, 0.1):
            error = (loss("cpu", listed, smoothing, ghosts) - loss(bench.device, listed, smoothing, ghosts)).abs().max()
            bench.check(f"token loss, {name}, smoothing {smoothing}", error.item() < 1e-5, error=error.item())
    for kind in ("gumbel", "soft", "argmax"):
        for residual in ("ignore", "uniform", "ghost", "class"):
            if residual != "ignore" and kind != "soft":
                continue
            made = []
            for device in (torch.device("cpu"), bench.device):
                own, classes = logits.to(device), torch.arange(3, device=device)
                seeded = torch.Generator().manual_seed(4)
                found = online_targets(lambda _, own=own: (None, own), own, kind, 3, residual, seeded, 0.01, classes)
                made.append([each.cpu() for each in found])
            same = (made[0][0] == made[1][0]).float().mean().item()
            error = (made[0][1] - made[1][1]).abs().max().item()
            bench.check(f"online {kind}, {residual}", same > 0.99 and error < 1e-5, same_ids=same, error=error)


def augmentation(bench: Bench) -> None:
    """RandAugment, jitter, erasing and mixing: pixels and targets against the CPU's."""
    side, count = 64, 16
    images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    images = images.to(memory_format=torch.channels_last)
    ids = np.arange(count)
    for policy, jitter in (("rand-m9-n3-mstd0.5-inc1", 0.0), (None, 0.4)):
        augment = Augmentation(
            auto=RandAugment.parse(policy) if policy else None,
            jitter=jitter,
            erase=RandomErase(0.7, "pixel"),
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
            size=(side, side),
            seed=0,
        )
        warps = augment.warps(0, count)
        warps = None if warps is None else torch.from_numpy(warps)
        ours, theirs = (augment(images.to(each), warps, 0, ids).cpu() for each in ("cpu", bench.device))
        changed = ((ours - theirs).abs() > 1e-3).float().mean().item()
        bench.check(f"augmentation {policy or 'jitter'}", changed < 1e-3, pixels_that_differ=changed)
    mix = draw_mix(count, side, side, MixSettings(0.8, 1.0, 1.0, mode="elem"), np.random.default_rng(0))
    targets = random_targets(count, 16, 3, bench.size.classes, torch.device("cpu"))
    made = []
    for device in (torch.device("cpu"), bench.device):
        own = [each.to(device) for each in targets]
        classes = mix_class_targets(torch.arange(count, device=device) % 7, 7, 0.1, mix)
        mixed = (mix_images(images.to(device), mix), classes, *mix_token_targets(*own, (4, 4), mix))
        made.append(torch.cat([each.cpu().double().flatten() for each in mixed]))
    error = (made[0] - made[1]).abs().max().item()
    bench.check("mixing", error < 1e-5, error=error)


def labeler_config(bench: Bench, out: Path, **changes) -> LabelerConfig:
    settings = {"data": "memory", "out": str(out), "img_size": 32, "epochs": 2, "batch_size": 8, "mixup": 0.8}
    settings |= {"cutmix": 1.0, "random_erase": 0.5, "auto_augment": "rand-m9-mstd0.5-inc1", "checkpoint_steps": 2}
    return LabelerConfig(**settings | {"amp": "none", "log_every": 1} | changes)


def train(config: LabelerConfig, device: torch.device, world: World = World(), stop_at: int = 0):  # noqa: B008
    """A run of stage 1 on images in memory; ``stop_at``: the step before which it is interrupted, once."""
    stage = make_stage(config, "labeler", 44, 5, device, world)
    loader = MemoryLoader(stage.train, config.img_size, config.batch_size, device, world=world)
    if stop_at:
        whole = loader.epoch

        def epoch(*arguments, **plan):
            for number, batch in enumerate(whole(*arguments, **plan)):
                if number == stop_at:
                    raise KeyboardInterrupt
                yield batch

        loader.epoch = epoch
    folder = make_run_folder(stage, None)
    return run_training(stage, folder, LabelerObjective(stage), stage.random_plan, lambda: (loader, None))


def training(bench: Bench) -> None:
    """Runs in every precision; one that is interrupted ends as one that is not; what a step waits for."""
    for amp in ("fp16",) if bench.size is SMALL else ("none", "bf16", "fp16"):
        whole = train(labeler_config(bench, bench.folder / f"whole-{amp}", amp=amp), bench.device)
        cut = labeler_config(bench, bench.folder / f"cut-{amp}", amp=amp)
        try:
            train(cut, bench.device, stop_at=3)
        except KeyboardInterrupt:
            resumed = train(cut, bench.device)
        error = abs(resumed["loss"] - whole["loss"])
        bench.check(f"resumed, {amp}", error < (1e-6 if amp == "none" else 1e-2), loss=whole["loss"], error=error)
        if amp == "none":
            there = train(labeler_config(bench, bench.folder / "cpu"), torch.device("cpu"))
            error = abs(there["loss"] - whole["loss"])
            bench.check("the CPU's loss", error < 2e-2, loss=there["loss"], error=error)


class GivenLabels(TokenSource):
    """Token targets that a batch brings with it."""

    def targets(self, batch, random):
        return batch.token_ids, batch.token_weights


def student_step(bench: Bench, model: str, kind: str, **changes):
    """A student's step on images in memory: ``none``, ``soft`` (top 5) or ``draws``; gives step and loader."""
    size = bench.size
    config = StudentConfig(
        data="memory",
        out="unused",
        model=model,
        img_size=size.side,
        batch_size=size.batch,
        labels="none" if kind == "none" else "given",
        **changes,
    )
    stage = make_stage(config, "student", 2 * size.batch, size.classes, bench.device, World())
    targets = None
    source = LabelSource(stage)
    if kind != "none":
        source = GivenLabels(stage, config)
        tokens = source.grid[0] * source.grid[1]
        targets = random_targets(2 * size.batch, tokens, 5 if kind == "soft" else 1, size.classes, bench.device)
    loader = MemoryLoader(stage.train, size.side, size.batch, bench.device, shuffle=False, targets=targets)
    step = TrainStep(stage, StudentObjective(stage, source), 100)
    step.model.train()
    return step, loader


def synchronisations(bench: Bench) -> None:
    """What a step waits for, by CUDA's debug mode: nothing."""
    heavy = {"mixup": 0.8, "cutmix": 1.0, "mix_mode": "elem", "random_erase": 0.5, "amp": "bf16"}
    heavy |= {"auto_augment": "rand-m9-n3-mstd0.5-inc1", "color_jitter": 0.4, "clip_grad": 1.0}
    step, loader = student_step(bench, bench.size.models[0] + "_token", "soft", **heavy)
    plan = step.objective.stage.random_plan(0)
    for number, batch in enumerate(loader.epoch(0, **plan)):
        step(batch, number).numbers()
    bench.wait()
    on_gpu = bench.device.type == "cuda"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        if on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            for number, batch in enumerate(loader.epoch(1, **plan)):
                step(batch, number)
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
    waits = [
        f"{Path(each.filename).name}:{each.lineno}" for each in found if "called a synchronizing" in str(each.message)
    ]
    bench.check("synchronisations of two steps", not waits, count=len(waits), where=", ".join(sorted(set(waits))))


def processes(bench: Bench) -> None:
    """DistributedDataParallel: one process over nccl (gloo on a CPU), and two on one GPU over gloo."""
    backend = "nccl" if bench.device.type == "cuda" else "gloo"
    torch.manual_seed(0)
    model = timm.create_model("fan_micro_4_p8_token", num_classes=5, img_size=32).to(bench.device).eval()
    images = torch.randn(2, 3, 32, 32).to(bench.device)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        ways = [outputs_and_gradient(each, images)[1] for each in (model, DistributedDataParallel(model))]
    finally:
        dist.destroy_process_group()
    error = (ways[0] - ways[1]).abs().max().item()
    bench.check(f"a gradient of one process over {backend}", error < 1e-6, error=error)
    if bench.over or bench.size is SMALL:
        return bench.add("left out", processes=2)
    one = train(labeler_config(bench, bench.folder / "one"), bench.device)["loss"]
    words = ["--standalone", "--nproc-per-node", "2", "-m", "tests.gpu.process", str(bench.folder / "two"), "gloo"]
    command = [sys.executable, "-m", "torch.distributed.run", *words, str(bench.device), "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(30, bench.left))
    two = float(done.stdout.split()[-1]) if done.returncode == 0 else float("nan")
    # Batch norms see other batches, so the losses are only close.
    bench.check("two processes over gloo", abs(two - one) < 0.1, loss=two, alone=one, said=done.stderr[-200:])


def evaluating(bench: Bench) -> None:
    """Scores of one model on the device and on the CPU."""
    images = MemoryImages(50, 32, 5)
    model = timm.create_model("fan_micro_4_p8_token", num_classes=5, img_size=32)
    scores = []
    for device in (torch.device("cpu"), bench.device):
        loader = MemoryLoader(images, 32, 16, device, shuffle=False)
        validation = Validation(loader, np.zeros((50, 6)), np.arange(5), None, World(), True)
        scores.append(validation(model.to(device), lambda: None))
    error = max(abs(scores[0][name] - scores[1][name]) for name in scores[0] if scores[0][name] is not None)
    bench.check("scores", error < 1e-3, error=error, **{f"cpu {name}": value for name, value in scores[0].items()})
