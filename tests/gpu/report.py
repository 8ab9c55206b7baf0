"""Results as they come: a line of JSON and a row of a table each, so that a run that is killed keeps what it has."""

import json
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Section = Callable[["Bench"], None]


@dataclass(frozen=True)
class Size:
    """How large the work is: on a GPU as the tables want it, on a CPU just enough to run every line."""

    models: tuple[str, ...]
    others: tuple[str, ...]
    side: int
    batch: int
    classes: int
    rounds: int
    compiler: str


FULL = Size(
    models=("fan_small_12_p4_hybrid", "fan_tiny_8_p4_hybrid", "fan_base_16_p4_hybrid", "fan_large_16_p4_hybrid"),
    others=("vit_small_patch16_224", "convnext_small", "swin_small_patch4_window7_224"),
    side=224,
    batch=256,
    classes=1000,
    rounds=10,
    compiler="inductor",
)
SMALL = Size(("fan_micro_4_p8",), ("resnet10t",), side=32, batch=2, classes=7, rounds=1, compiler="eager")


class Bench:
    """A run of the sections: where it runs, how large, until when, and what was found.

    Args:
        folder: gets ``results.jsonl`` and ``results.md``.
        seconds: of the whole run.
    """

    def __init__(self, folder: Path, device: torch.device, size: Size, seconds: float) -> None:
        self.folder, self.device, self.size = folder, device, size
        self.rows: list[dict[str, object]] = []
        self._end = self._section_end = time.monotonic() + seconds
        self._section = "Machine"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.jsonl").unlink(missing_ok=True)

    def run(self, name: str, section: Section, seconds: float) -> None:
        """One section, for so long at most; a failure is a row, and the next section follows."""
        if self.left <= 0:
            return self.add("left out", section=name)
        self._section, start = name, time.monotonic()
        self._section_end = min(self._end, start + seconds)
        try:
            section(self)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.add("FAILED", error=f"{type(error).__name__}: {error}"[:300], place=f"{place.filename}:{place.lineno}")
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.add("took", seconds=time.monotonic() - start)

    @property
    def left(self) -> float:
        """Seconds left for the whole run."""
        return self._end - time.monotonic()

    @property
    def over(self) -> bool:
        """Whether the section's time is up: it begins nothing more."""
        return time.monotonic() > self._section_end

    def add(self, row: str, **values: object) -> None:
        """A result, written at once."""
        found = {"section": self._section, "row": row} | {
            name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in values.items()
        }
        self.rows.append(found)
        with open(self.folder / "results.jsonl", "a") as stream:
            stream.write(json.dumps(found) + "\n")
        self._write_table()

    def check(self, row: str, passed: bool, **values: object) -> None:
        """A result that is right or wrong."""
        self.add(row, **values, right="yes" if passed else "NO")

    def _write_table(self) -> None:
        lines, before = [], None
        for row in self.rows:
            if row["section"] != before:
                before = row["section"]
                lines += [f"\n## {before}\n", "| what | found |", "|---|---|"]
            found = "; ".join(f"{name} {value}" for name, value in row.items() if name not in ("section", "row"))
            cells = (" ".join(str(cell).replace("|", "/").split()) for cell in (row["row"], found))
            lines.append("| " + " | ".join(cells) + " |")
        (self.folder / "results.md").write_text("\n".join(lines) + "\n")

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], rounds: int | None = None) -> float:
        """Median time of a call, after two that warm up."""
        times = []
        warm_up = 0 if self.size is SMALL else 2
        for _ in range((rounds or self.size.rounds) + warm_up):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[warm_up:])
