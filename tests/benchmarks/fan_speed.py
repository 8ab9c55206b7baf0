"""FAN here against its formulas written out (fan_reference.py), side by side in one process: time, memory, parts.

    python -m tests.benchmarks.fan_speed --what eager --model fan_tiny_8_p4_hybrid_token

``--what``: eager, compiled, bf16 (float32 forms against bf16 ones), training (a whole AdamW step),
amp (that step in float32, in bf16, and in bf16 with torch's fused attention), parts (each kind of
work's share of the time), memory (held beside the logits, for two numbers of classes).
All ways take turns, so that whatever else slows the machine slows all of them. The C library's memory settings are its
own for everybody; with ``--kept`` everybody keeps freed memory, as the package's commands do.
"""

import argparse
import copy
import resource
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from stl_offline.device import autocast, avoid_slow_attention, keep_freed_memory
from stl_offline.models import inference_form
from tests.benchmarks.fan_reference import reference

Ways = dict[str, Callable[[], object]]
FORMULAS = "formulas"
PARTS = {  # how an operator's name begins → the part that it counts for; the rest are copies, sums, products
    "matrix products, dense convolutions": ("aten::addmm", "aten::mm", "dense convolution"),
    "depthwise convolutions": ("depthwise convolution",),
    "attention's products (fused or not)": ("aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product"),
    "GELU": ("aten::gelu",),
    "norms": ("aten::native_layer_norm", "aten::native_batch_norm", "aten::var_mean"),
    "softmax": ("aten::_softmax",),
}
REST = "copies, sums, products by element"


def models(options: argparse.Namespace) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The formulas and the model with the same weights."""
    torch.manual_seed(0)
    model = timm.create_model(options.model, num_classes=options.classes).eval()
    formulas = reference(options.model, num_classes=options.classes).eval()
    formulas.load_state_dict(model.state_dict())
    return formulas, model


def random_images(options: argparse.Namespace) -> torch.Tensor:
    return torch.randn(options.batch, 3, options.size, options.size, generator=torch.Generator().manual_seed(0))


def in_turn(ways: Ways, rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each way in each round, and page faults of its last."""
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    faults = {}
    for _ in range(rounds):
        for name, way in ways.items():
            before, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
            faults[name] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return seconds, faults


def matmul_rate(dtype: torch.dtype, side: int, repeats: int = 5) -> float:
    """Billions of operations per second of the best of some square matrix products."""
    a, b = torch.randn(2, side, side).to(dtype)
    best = min(in_turn({"": lambda: a @ b}, repeats)[0][""])
    return 2 * side**3 / best / 1e9


def operations(run: Callable[[], object]) -> float:
    """Multiplications and additions of the matrix products and convolutions of one call."""
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops()


def difference(outputs, expected) -> float:
    return max((one.float() - other).abs().max().item() for one, other in zip(outputs, expected, strict=True))


def print_table(ways: Ways, base: str, options: argparse.Namespace, work: float | None, expected=None) -> None:
    """Time every way in turn; print medians, ratios to `base` round by round, and the share of the matmul peak.

    `work`: what `operations` counts, or None where it cannot (it overrates the gradients of depthwise convolutions).
    """
    peaks = [matmul_rate(torch.float32, 2048)]
    seconds, faults = in_turn(ways, options.rounds)
    peaks.append(matmul_rate(torch.float32, 2048))
    if work is not None:
        print(f"{work / 1e9:,.0f} GFLOP in the formulas' products and convolutions;", end=" ")
    print("float32 matmul peak before and after: " + ", ".join(f"{peak:,.0f} GFLOP/s" for peak in peaks))
    print(f"| way | s | {base} / way (min to max) | GFLOP/s | of peak | page faults | outputs differ by |")
    print("|---|---|---|---|---|---|---|")
    for name, times in seconds.items():
        ratios = [one / other for one, other in zip(seconds[base], times, strict=True)]
        rate = None if work is None else work / statistics.median(times) / 1e9
        speed = "| | " if rate is None else f"| {rate:,.0f} | {rate / max(peaks):.0%} "
        agreement = "" if expected is None or name == base else f"{difference(ways[name](), expected):.1e}"
        print(
            f"| {name} | {statistics.median(times):.2f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"{speed}| {faults[name]:,} | {agreement} |"
        )


def eager(options: argparse.Namespace) -> None:
    formulas, model = models(options)
    form, images = inference_form(model), random_images(options)
    ways = {
        FORMULAS: lambda: formulas(images),
        "model": lambda: model(images),
        "inference form": lambda: form(images),
    }
    with torch.inference_mode():
        print_table(ways, FORMULAS, options, operations(ways[FORMULAS]), formulas(images))


def compiled(options: argparse.Namespace) -> None:
    formulas, model = models(options)
    form, images = inference_form(model), random_images(options)
    quick = torch.compile(form)
    ways = {
        FORMULAS: lambda: formulas(images),
        "inference form, eager": lambda: form(images),
        "inference form, compiled": lambda: quick(images),
    }
    if options.also_formulas:
        quick_formulas = torch.compile(formulas)
        ways["formulas, compiled"] = lambda: quick_formulas(images)
    with torch.inference_mode():
        print_table(ways, FORMULAS, options, operations(ways[FORMULAS]), formulas(images))


def bf16(options: argparse.Namespace) -> None:
    formulas, model = models(options)
    forms = {dtype: inference_form(model, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    images = random_images(options)
    ways = {f"inference form, {dtype}": (lambda form=form: form(images)) for dtype, form in forms.items()}
    with torch.inference_mode():
        print_table(ways, next(iter(ways)), options, operations(lambda: formulas(images)), formulas(images))
        rates = {dtype: matmul_rate(dtype, 1024, 2) for dtype in forms}
    print("matmul of 1024 x 1024: " + ", ".join(f"{dtype} {rate:,.0f} GFLOP/s" for dtype, rate in rates.items()))
    print(f"bf16 / float32: {rates[torch.bfloat16] / rates[torch.float32]:.2f}")


def steps(network: torch.nn.Module, options: argparse.Namespace, amp: torch.dtype | None = None) -> Callable:
    """AdamW steps of a network on one batch of noise. Each returns its loss."""
    images = random_images(options)
    generator = torch.Generator().manual_seed(1)
    class_ids = torch.randint(options.classes, (options.batch,), generator=generator)
    optimizer = torch.optim.AdamW(network.train().parameters(), lr=1e-6)

    def step():
        with autocast(images.device, amp):
            class_logits, token_logits = network(images)
        token_ids = class_ids[:, None].expand(-1, token_logits.shape[1]).flatten()
        loss = F.cross_entropy(class_logits, class_ids) + F.cross_entropy(token_logits.flatten(0, 1), token_ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return [loss.detach()]

    return step


def training(options: argparse.Namespace) -> None:
    formulas, model = models(options)
    first = [steps(copy.deepcopy(network), options)()[0].item() for network in (formulas, model)]
    print("loss of the first step: " + ", ".join(f"{loss:.6f}" for loss in first))
    ways = {FORMULAS: steps(formulas, options), "model": steps(model, options)}
    print_table(ways, FORMULAS, options, None)


def amp(options: argparse.Namespace) -> None:
    _, model = models(options)
    fused, apart = copy.deepcopy(model), copy.deepcopy(model)
    ways = {
        "float32": steps(model, options),
        "bf16": steps(apart, options, torch.bfloat16),
        "bf16, fused attention": steps(fused, options, torch.bfloat16),
    }
    with avoid_slow_attention(apart, torch.device("cpu"), torch.bfloat16):
        print_table(ways, "float32", options, None)


def part_of(event) -> str:
    """The part that a profiled operator's own time belongs to."""
    name = event.key
    if name == "aten::mkldnn_convolution":
        weight = event.input_shapes[1]
        name = "depthwise convolution" if weight[1] == 1 else "dense convolution"
    return next((part for part, begins in PARTS.items() if name.startswith(begins)), REST)


def parts(options: argparse.Namespace) -> None:
    formulas, model = models(options)
    networks = {FORMULAS: formulas, "model": model, "inference form": inference_form(model)}
    images = random_images(options)
    table: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for name, network in networks.items():
            network(images)
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
                for _ in range(options.rounds):
                    network(images)
            spent = dict.fromkeys([*PARTS, REST], 0.0)
            for event in profiler.key_averages(group_by_input_shape=True):
                spent[part_of(event)] += event.self_cpu_time_total / 1000 / options.rounds
            table[name] = spent
    print("| part | " + " | ".join(f"{name}, ms" for name in networks) + " |")
    print("|---|" + "---|" * len(networks))
    for part in [*PARTS, REST]:
        cells = [f"{spent[part]:,.0f} ({spent[part] / sum(spent.values()):.0%})" for spent in table.values()]
        print(f"| {part} | " + " | ".join(cells) + " |")
    print("| all | " + " | ".join(f"{sum(spent.values()):,.0f}" for spent in table.values()) + " |")


def held_beside(run: Callable[[], tuple[torch.Tensor, ...]]) -> float:
    """MiB held at most during one call, less its outputs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        outputs = run()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return (most - sum(output.nbytes for output in outputs)) / 2**20


def memory(options: argparse.Namespace) -> None:
    images = random_images(options)
    print("| classes | logits, MiB | model holds beside them | inference form |\n|---|---|---|---|")
    for classes in (options.classes, 10 * options.classes):
        model = timm.create_model(options.model, num_classes=classes).eval()
        form = inference_form(model)
        with torch.inference_mode():
            logits = sum(output.nbytes for output in form(images)) / 2**20
            held = [held_beside(lambda network=network: network(images)) for network in (model, form)]
        print(f"| {classes:,} | {logits:,.0f} | {held[0]:,.0f} | {held[1]:,.0f} |")


WHAT = {function.__name__: function for function in (eager, compiled, bf16, training, amp, parts, memory)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", nargs="+", choices=WHAT, default=["eager", "training"])
    parser.add_argument("--model", default="fan_tiny_8_p4_hybrid_token")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kept", action="store_true", help="everybody keeps freed memory")
    parser.add_argument("--also-formulas", action="store_true", help="compile the formulas, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.kept:
        keep_freed_memory()
    for name in options.what:
        print(f"\n{name}: {options.model}, {options.size} px, batch {options.batch}, {options.threads} threads")
        WHAT[name](options)


if __name__ == "__main__":
    main()
