"""The most memory that torch holds at a time."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def torch_peak_mib(run: Callable[[], object]) -> float:
    """MiB that ``run`` takes at most beyond what was held before, by torch's own count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20
