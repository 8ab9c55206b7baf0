"""Where a run is, and the time it has taken."""

import time
from dataclasses import dataclass


@dataclass
class Progress:
    """Where a run is. ``batch`` steps of epoch ``epoch`` (from 0) are taken, ``step`` of the whole run."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0  # of this epoch so far
    cpu_seconds: float = 0.0
    waited: float = 0.0  # for batches
    best_top1: float = -1.0


class Clock:
    """Adds wall-clock, processor and waiting time to a run's progress."""

    def __init__(self, at: Progress) -> None:
        self.at = at
        self.wall = self.waiting = time.perf_counter()
        self.cpu = time.process_time()

    def tick(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.at.seconds += wall - self.wall
        self.at.cpu_seconds += cpu - self.cpu
        self.wall, self.cpu = wall, cpu

    def waits(self) -> None:
        self.waiting = time.perf_counter()

    def works(self) -> None:
        self.at.waited += time.perf_counter() - self.waiting
