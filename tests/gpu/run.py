"""All that is to be known of a GPU, in one call of some minutes: is it right, is it fast, what does the study give.

    python -m tests.gpu.run --minutes 10 --out results

Sections stand in the order of their worth, each with a limit of its own. Every result is written at once to
``results.jsonl`` and ``results.md``, so a run that is killed keeps what it has; a section that fails is a row, and the
next one follows. Images are made up and lie on the device, so that neither decoding nor FFCV is needed. Where FFCV is
not installed, names of it stand for nothing (`tests.gpu.absent`). ``--study TRAIN VAL`` adds the study of real images
(`tests.gpu.study`), for the time that is left.

``--small`` runs every line on a CPU in seconds, with tiny models; so does `tests/gpu/test_run.py`.

On a machine that has torch for CUDA, torchvision, numba, fsspec and OpenCV's Python package (for masks scipy and
scikit-image, too), but no package index, the rest travels as wheels:

    python -m tests.gpu.run --pack wheels --python 3.12        # here
    pip install --no-index --no-deps --target site wheels/*    # there
    PYTHONPATH=site python -m tests.gpu.run --minutes 10 --out results
"""

import argparse
import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from pathlib import Path

import torch

from tests.gpu.absent import stand_in_for_ffcv
from tests.gpu.report import FULL, SMALL, Bench

# What the package needs beside torch, torchvision, numpy, pillow, numba, fsspec and OpenCV's Python package, and its
# corruptions beside scipy and scikit-image; none of it is compiled against CUDA.
WHEELS = (
    "timm",
    "zarr",
    "numcodecs",
    "google-crc32c",
    "donfig",
    "webdataset",
    "braceexpand",
    "xxhash",
    "imagecorruptions-imaug",
)
MODULES = {"imagecorruptions-imaug": "imagecorruptions"}
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def pack(folder: Path, python: str) -> None:
    """Collect wheels of the versions that are installed here, for another Python."""
    missing = [name for name in WHEELS if importlib.util.find_spec(MODULES.get(name, name.replace("-", "_"))) is None]
    if missing:
        raise SystemExit(f"not installed here: {', '.join(missing)}; run this in the environment of the tests")
    versions = [f"{name}=={importlib.metadata.version(name)}" for name in WHEELS]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--python-version", python]
    for name in PLATFORMS:
        command += ["--platform", name]
    subprocess.run([*command, "-d", str(folder), *versions], check=True)
    total = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{total / 1e6:.0f} MB of wheels in {folder}")


def sections(tars: list[str] | None) -> list[tuple[str, object, float]]:
    """(name, function, seconds at most) in the order of their worth."""
    from tests.gpu import fast, right
    from tests.gpu.study import Study

    def study(bench: Bench) -> None:
        if not tars:
            return bench.add("left out", reason="--study names no images")
        small = (
            {"epochs": 2, "larger_epochs": 2, "seeds": 2, "batch_size": 8, "student_batch": 8, "views": 1, "jobs": 0}
            if bench.size is SMALL
            else {}
        )
        found = Study(*tars, str(bench.folder / "study"), device=str(bench.device), minutes=bench.left / 60, **small)
        found.run_all()
        for row in found.rows():
            bench.add(**row)

    return [
        ("FAN's numbers", right.fan_numbers, 120),
        ("What a step waits for", right.synchronisations, 40),
        ("Speed of models", fast.speed, 110),
        ("Profile of a student's step", fast.profile_step, 30),
        ("Labels for free", fast.labels_for_free, 40),
        ("Dump", fast.dumping, 40),
        ("Training", right.training, 40),
        ("Losses and targets", right.losses_and_targets, 15),
        ("Augmentation", right.augmentation, 15),
        ("Evaluation", right.evaluating, 10),
        ("Processes", right.processes, 90),
        ("Speed of compiled models", fast.speed_compiled, 240),
        ("Compiled numbers", right.compiled_numbers, 120),
        ("Study", study, float("inf")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for all sections together")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--small", action="store_true", help="every line in a small form, on the CPU")
    parser.add_argument("--study", nargs=2, metavar=("TRAIN", "VAL"), help="tars of images, all of one size")
    # torch's compiler writes what follows a word "--only" of any command line into its code, so that is not the name.
    parser.add_argument("--sections", nargs="*", help="words of the names of the sections to run")
    parser.add_argument("--pack", type=Path, help="collect wheels in this folder, and do nothing else")
    parser.add_argument("--python", default="3.12", help="version of Python that --pack collects for")
    options = parser.parse_args()
    if options.pack:
        return pack(options.pack, options.python)
    if not (options.small or torch.cuda.is_available()):
        parser.error("torch finds no GPU here; --small runs every line on the CPU")
    has_ffcv = stand_in_for_ffcv()
    device = torch.device("cpu" if options.small else "cuda:0")
    todo = sections(options.study)
    names = [name.lower() for name, _, _ in todo]
    unknown = [word for word in options.sections or () if not any(word.lower() in name for name in names)]
    if unknown:
        parser.error(f"--sections {' '.join(unknown)}: no section has such a name; there are: {', '.join(names)}")
    bench = Bench(options.out, device, SMALL if options.small else FULL, 60 * options.minutes)
    # Numbers are compared in float32 proper.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    card = "CPU" if options.small else torch.cuda.get_device_name(device)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm", "numpy")}
    versions |= {"python": platform.python_version(), "cuda": torch.version.cuda}
    bench.add("machine", card=card, ffcv=has_ffcv, **versions)
    for name, section, seconds in todo:
        if not options.sections or any(word.lower() in name.lower() for word in options.sections):
            bench.run(name, section, seconds)
    print((options.out / "results.md").read_text())


if __name__ == "__main__":
    main()
