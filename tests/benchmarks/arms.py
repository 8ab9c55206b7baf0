"""One student, four kinds of labels: none, online, dumped whole-picture maps, dumped views; same epochs, same seed.

    python tests/benchmarks/arms.py --train tiny20-train.tar --val tiny20-val.tar --out runs/arms

Every part is one of the package's own commands and goes on where it stopped. ``--arm`` runs one part only (so that two
cores can do two of them side by side, each with OMP_NUM_THREADS=1); without it all parts run and the table is printed.
"""

import argparse
import json
import time
from pathlib import Path

from stl_offline.config import DumpConfig, LabelerConfig, StudentConfig
from stl_offline.dump import dump_labels
from stl_offline.training.labeler import train_labeler
from stl_offline.training.student import train_student

ARMS = ("labeler", "none", "dump-whole", "dump-views", "online", "whole", "views")


def run_arm(name: str, options: argparse.Namespace) -> dict:
    """Run one part and give back what it says of itself."""
    out = Path(options.out)
    machine = {"workers": options.workers, "device": "cpu"}
    shared = {"data": options.train, "val": options.val, "epochs": options.epochs, "seed": options.seed, **machine}
    labeler = str(out / "labeler")
    if name == "labeler":
        return train_labeler(LabelerConfig(out=labeler, **shared))
    if name.startswith("dump-"):
        kind = name.removeprefix("dump-")
        views = options.epochs if kind == "views" else 0
        target = out / f"labels-{kind}"
        config = DumpConfig(
            data=options.train, labeler=labeler, out=str(target), views=views, seed=options.seed, **machine
        )
        report = dump_labels(config)
        note = out / f"{name}.json"
        if report.labelled:
            note.write_text(json.dumps({"seconds": report.seconds, "bytes": report.bytes, "samples": report.samples}))
        return json.loads(note.read_text())
    labels = {
        "none": {"labels": "none"},
        "online": {"labels": "online", "labeler": labeler},
        "whole": {"labels": str(out / "labels-whole")},
        "views": {"labels": str(out / "labels-views")},
    }[name]
    return train_student(StudentConfig(out=str(out / name), **shared, **labels))


def print_table(results: dict[str, dict]) -> None:
    """A markdown table of all parts."""
    print("| | top-1 | top-5 | mean token's top-1 | seconds | bytes a picture |")
    print("|---|---|---|---|---|---|")
    for name, result in results.items():
        scores = [f"{100 * result[key]:.1f} %" if key in result else "" for key in ("top1", "top5", "token_top1")]
        seconds = result.get("train_seconds", result.get("seconds", 0.0))
        size = f"{result['bytes'] / result['samples']:,.0f}" if "bytes" in result else ""
        print(f"| {name} | {' | '.join(scores)} | {seconds:,.0f} | {size} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--arm", choices=ARMS)
    options = parser.parse_args()
    Path(options.out).mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    results = {name: run_arm(name, options) for name in ([options.arm] if options.arm else ARMS)}
    print_table(results)
    print(f"{time.perf_counter() - started:,.0f} s")


if __name__ == "__main__":
    main()
