"""Is it fast: medians side by side in one run, with the floors of the card beside them.

MFU: model FLOP utilisation, the model's own matrix products and convolutions over the measured rate of bf16 products.
"""

import copy
import itertools
import json
import time
from collections import defaultdict
from dataclasses import asdict, replace

import numpy as np
import timm
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from stl_offline.config import DumpConfig
from stl_offline.dump.labelling import Labelling
from stl_offline.dump.recompute import Again, compare
from stl_offline.models import TokenLabeler, inference_form
from tests.benchmarks.fan_reference import reference
from tests.gpu.memory import MemoryImages, MemoryLoader
from tests.gpu.report import SMALL, Bench
from tests.gpu.right import student_step

MATMUL = ("gemm", "matmul", "cutlass", "nvjet", "cublas", "flash", "fmha", "aten::mm", "aten::addmm", "aten::bmm")


def floors(bench: Bench) -> dict[str, float]:
    """The card's measured rates: bf16 products in FLOP/s, copies in bytes/s (each byte read and written)."""
    small = bench.size is SMALL
    side = 256 if small else 8192
    a, b = torch.randn(2, side, side, device=bench.device).bfloat16()
    source = torch.empty(1 << (16 if small else 30), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    found = {
        "bf16 FLOP/s": 2 * side**3 / bench.seconds(lambda: a @ b),
        "copied bytes/s": 2 * source.numel() / bench.seconds(lambda: target.copy_(source)),
    }
    bench.add("floors", **found)
    return found


def graphed(model, images):
    """A CUDA graph of one inference."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(images)
    return graph.replay


def operations(model, images) -> float:
    """Multiplications and additions of one image's products and convolutions, twice each."""
    with FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops()


def training_step(model, images, classes):
    """Forward, backward and AdamW in bf16 autocast; gives a function that takes one."""
    model = model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    targets = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def step():
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            found = model(images)
        found = found[0] if isinstance(found, tuple) else found
        torch.nn.functional.cross_entropy(found.float(), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def speed(bench: Bench) -> None:
    """Inference and training of each model; FAN against its formulas, and others beside it."""
    rate = floors(bench)["bf16 FLOP/s"]
    for name in _by_worth(bench):
        _speed_of(bench, name, "model", rate, compiled=False)
        if name in bench.size.models:
            _speed_of(bench, name, "formulas", rate, compiled=False)


def speed_compiled(bench: Bench) -> None:
    """Training and inference of each model, compiled. Compiling one takes a minute or more."""
    rate = floors(bench)["bf16 FLOP/s"]
    for name in _by_worth(bench):
        _speed_of(bench, name, "model", rate, compiled=True)


def _by_worth(bench: Bench) -> tuple[str, ...]:
    return (bench.size.models[0], *bench.size.others, *bench.size.models[1:])


def _speed_of(bench: Bench, name: str, kind: str, rate: float, *, compiled: bool) -> None:
    """Rows of one model; every way that fails is a row of its own. Where memory is short, fewer images are taken."""
    size, device = bench.size, bench.device
    if bench.over:
        return bench.add("left out", model=f"{name}, {kind}, {'compiled' if compiled else 'eager'}")
    torch.manual_seed(0)
    images = torch.randn(size.batch, 3, size.side, size.side, device=device).to(memory_format=torch.channels_last)
    model = (reference if kind == "formulas" else timm.create_model)(name, num_classes=size.classes)
    model = model.to(device, memory_format=torch.channels_last)
    work = operations(model.eval(), images[:1])

    def add(way, make, factor):
        values = {}
        for count in (size.batch, size.batch // 2, size.batch // 4):
            if bench.over or not count:
                values = values or {"left out": "time is up"}
                break
            try:
                run, start = make(count), time.perf_counter()
                run()
                bench.wait()
                first = time.perf_counter() - start  # which compiles
                each = bench.seconds(run) / count
                values = {"images/s": 1 / each, "MFU": factor * work / each / rate, "batch": count}
                values["seconds of the first call"] = first
            except torch.OutOfMemoryError:
                values = {"FAILED": "memory", "batch": count}
            except Exception as error:  # a compiler's
                values = {"FAILED": f"{type(error).__name__}: {error}"[:200]}
            if values.get("FAILED") != "memory":
                break
            torch.cuda.empty_cache()
        bench.add(f"{name}, {kind}, {way}", **values)

    def compile_it(what):
        return torch.compile(what, backend=size.compiler, dynamic=False)

    half_images = images.bfloat16()
    folded = kind == "model" and name in size.models
    half = inference_form(model, dtype=torch.bfloat16) if folded else copy.deepcopy(model).bfloat16()

    def infer():
        with torch.inference_mode():
            if compiled:
                made = compile_it(half)
                return add("inference, compiled", lambda count: lambda: made(half_images[:count]), 1)
            add("inference, eager", lambda count: lambda: half(half_images[:count]), 1)
            if kind == "model" and device.type == "cuda":
                add("inference, CUDA graph", lambda count: graphed(half, half_images[:count]), 1)

    def train():
        way = "training, compiled" if compiled else "training, eager"
        taught = compile_it(model) if compiled else model
        add(way, lambda count: training_step(taught, images[:count], size.classes), 3)

    for measure in (train, infer) if compiled else (infer, train):
        measure()


def profile_step(bench: Bench) -> None:
    """Where a student's step spends the device's time, what is largest beside products, and how long it is idle."""
    step, loader = student_step(bench, bench.size.models[0] + "_token", "soft", amp="bf16", mixup=0.8)
    batches = list(loader.epoch(0)) * (1 if bench.size is SMALL else 5)
    for number, batch in enumerate(batches):
        step(batch, number).numbers()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.device.type == "cuda" else [])]
    bench.wait()
    with profile(activities=activities) as found:
        for number, batch in enumerate(batches):
            step(batch, number)
        bench.wait()
    path = bench.folder / "trace.json"
    found.export_chrome_trace(str(path))
    kernels = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X" and "dur" in e]
    path.unlink()
    wanted = ("kernel", "gpu_memcpy", "gpu_memset") if bench.device.type == "cuda" else ("cpu_op",)
    kernels = [event for event in kernels if event.get("cat") in wanted]
    busy = covered(kernels)
    wall = max(e["ts"] + e["dur"] for e in kernels) - min(e["ts"] for e in kernels)
    bench.add("student's step", milliseconds=wall / 1000 / len(batches), idle_share=1 - busy / wall)
    by_name: dict[str, float] = defaultdict(float)
    for event in kernels:
        by_name[event["name"]] += event["dur"]
    total = sum(by_name.values())
    rest = {n: t for n, t in by_name.items() if not any(word in n.lower() for word in MATMUL)}
    bench.add("products", share=1 - sum(rest.values()) / total)
    for name, duration in sorted(rest.items(), key=lambda pair: -pair[1])[:12]:
        bench.add(name[:120], share=duration / total)


def covered(events) -> float:
    """Microseconds in which at least one of some events runs."""
    total, end = 0.0, -np.inf
    for event in sorted(events, key=lambda each: each["ts"]):
        start, stop = event["ts"], event["ts"] + event["dur"]
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def labels_for_free(bench: Bench) -> None:
    """A student's step without token labels, with dumped ones, and with the labeler in every step."""
    name = bench.size.models[0] + "_token"
    times = {}
    for kind in ("none", "soft", "draws"):
        step, loader = student_step(bench, name, kind, amp="bf16", mixup=0.8, cutmix=1.0)
        batches = list(loader.epoch(0))
        numbers = itertools.count()

        def take(step=step, batch=batches[0], numbers=numbers):
            return step(batch, next(numbers))

        times[kind] = bench.seconds(take)
        rate = bench.size.batch / times[kind]
        bench.add(f"step, {kind}", **{"images/s": rate, "of none": times["none"] / times[kind]})
    torch.manual_seed(0)
    labeler = timm.create_model(name, num_classes=bench.size.classes)
    labeler = TokenLabeler(labeler, img_size=bench.size.side).to(bench.device)
    pixels = batches[0].images

    def label():
        with torch.inference_mode(), torch.autocast(bench.device.type, dtype=torch.bfloat16):
            return labeler(pixels)

    both = times["draws"] + bench.seconds(label)
    bench.add("step, online (draws and the labeler's forward)", **{"of none": times["none"] / both})


def dumping(bench: Bench) -> None:
    """Images labelled per second, in memory already, against the forward pass alone, with the best classes and with
    draws; labels against the CPU's, by the measure and the bounds of ``labels verify --recompute``."""
    size = bench.size
    torch.manual_seed(0)
    count = 4 * size.batch
    images = MemoryImages(count, size.side, size.classes)
    name = size.models[0] + "_token"
    model = timm.create_model(name, num_classes=size.classes)
    stored = None
    for device, amp, number, kept in (
        (torch.device("cpu"), "none", 4, {"top_k": 5, "draws": 2}),
        (bench.device, "none", 4, {"top_k": 5, "draws": 2}),
        (bench.device, "bf16", count, {"top_k": 5}),
        (bench.device, "bf16", count, {"top_k": 0, "draws": 1}),
    ):
        labeler = TokenLabeler(model, img_size=size.side, class_names=images.class_names)
        config = DumpConfig(data="memory", out="unused", labeler="memory", batch_size=size.batch, amp=amp, **kept)
        labelling = (Labelling if stored is None or amp == "bf16" else Again)(config, labeler, images, device)
        labelling.__dict__["loader"] = MemoryLoader(images, size.side, size.batch, device, shuffle=False)
        samples = np.arange(number)
        if stored is None:
            stored = labelling.label(samples, lambda _: None)
            continue
        if amp == "none":
            labelling.expect(samples, stored)
            again = labelling.label(samples, lambda _: None)
            same = asdict(replace(compare(stored, again, labelling.spec.bounds), **labelling.draws_found()))
            agreement = min(same["top1"], same["same_draws"] + same["near_ties"])
            bench.check("labels against the CPU's", same["beyond"] <= 0.005 and agreement >= 0.99, **same)
            continue
        batch = next(iter(labelling.loader.epoch(0)))

        def forward(labeler=labelling.labeler, images=batch.images):
            with torch.inference_mode(), torch.autocast(bench.device.type, dtype=torch.bfloat16):
                return labeler(images)

        def whole(labelling=labelling, samples=samples):
            return labelling.label(samples, lambda _: None)

        alone, whole = size.batch / bench.seconds(forward), count / bench.seconds(whole, rounds=3)
        row = "dump, 5 best classes" if config.top_k else "dump, 1 draw"
        bench.add(row, **{"images/s": whole, "forward alone": alone, "share": whole / alone})
