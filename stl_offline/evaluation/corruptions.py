"""Corruptions generated from clean images: 19 kinds at 5 severities, the same pixels on any process.

The arithmetic is the package imagecorruptions-imaug's, after Hendrycks and Dietterich (arXiv 1903.12261). Scores on
generated corruptions are no scores on ImageNet-C, whose files were made once, with other versions and other draws.
"""

import contextlib
import importlib
import importlib.util
import inspect
import io
import warnings
from functools import cache
from types import ModuleType

import numpy as np

from stl_offline.errors import InputError, MissingExtraError
from stl_offline.evaluation.measures import BENCHMARK_CORRUPTIONS, EXTRA_CORRUPTIONS, SEVERITIES
from stl_offline.files import sha256_parts

GROUPS = {
    "noise": BENCHMARK_CORRUPTIONS[:3],
    "blur": BENCHMARK_CORRUPTIONS[3:7],
    "weather": BENCHMARK_CORRUPTIONS[7:11],
    "digital": BENCHMARK_CORRUPTIONS[11:],
    "extra": EXTRA_CORRUPTIONS,
    "benchmark": BENCHMARK_CORRUPTIONS,
    "all": (*BENCHMARK_CORRUPTIONS, *EXTRA_CORRUPTIONS),
}
SMALLEST_SIDE = 32  # pixels; the package refuses less
_STRICT = {"spatter": {"invalid": "raise"}}


def parse_corruptions(text: str) -> list[tuple[str, int]]:
    """(kind, severity) of a text such as ``all``, ``noise,fog`` or ``blur:3,contrast:1-5``; each once, in order.

    Raises:
        InputError: an unknown kind or group, or a severity outside 1 to 5.
    """
    found: dict[tuple[str, int], None] = {}
    for part in text.split(","):
        name, _, severities = part.strip().partition(":")
        kinds = GROUPS.get(name, (name,) if name in GROUPS["all"] else ())
        if not kinds:
            raise InputError(
                f"there is no corruption {name!r}; groups: {', '.join(GROUPS)}; kinds: {', '.join(GROUPS['all'])}"
            )
        first, _, last = severities.partition("-")
        wanted = range(int(first), int(last or first) + 1) if first.isdecimal() and (last or first).isdecimal() else ()
        if severities and (not wanted or not set(wanted) <= set(SEVERITIES)):
            raise InputError(
                f"severities are numbers from 1 to 5, such as {name}:3 or {name}:1-5; got {part.strip()!r}"
            )
        found |= dict.fromkeys((kind, severity) for kind in kinds for severity in (wanted or SEVERITIES))
    return list(found)


def check_corruptions_can_run() -> None:
    """Load the package that corrupts images, for this process and those that it forks.

    Raises:
        MissingExtraError: the package is not installed.
    """
    _package()


def corrupt(image: np.ndarray, kind: str, severity: int, *, seed: int, key: str) -> np.ndarray:
    """An image as a corruption leaves it: a pure function of its arguments.

    Args:
        image: uint8 (H, W, 3), no side under 32 pixels.
        kind, severity: one of `GROUPS`' kinds; 1 to 5.
        seed, key: of the draws, with kind and severity.

    Returns:
        uint8 (H, W, 3).

    Raises:
        InputError: the image is too small.
        MissingExtraError: the package is not installed.
    """
    if min(image.shape[:2]) < SMALLEST_SIDE:
        raise InputError(
            f"generated corruptions need images of at least {SMALLEST_SIDE} pixels a side, got "
            f"{image.shape[0]} × {image.shape[1]}; choose a larger img_size"
        )
    package = _package()
    number = int(sha256_parts(str(seed).encode(), key.encode(), kind.encode(), str(severity).encode())[:8], 16)
    # The package draws from numpy's global generator, which is given back as it was. It prints for odd sizes of images.
    before = np.random.get_state()
    np.random.seed(number)
    try:
        with contextlib.redirect_stdout(io.StringIO()), np.errstate(**_STRICT.get(kind, {})):
            found = package.corrupt(image, severity, kind, **({"seed": number} if _takes_seed(kind) else {}))
            # Defocus blur gives an array in another order of memory.
            return np.ascontiguousarray(found)
    except FloatingPointError:  # 0 / 0: on a small image no drop fell, and the pixels would be undefined
        return image.copy()
    finally:
        np.random.set_state(before)


@cache
def _package() -> ModuleType:
    if importlib.util.find_spec("imagecorruptions") is None:
        raise MissingExtraError(
            "generated corruptions need a package that is not installed: pip install 'stl-offline[corrupt]'"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("imagecorruptions")


@cache
def _takes_seed(kind: str) -> bool:
    """Whether a kind draws from a generator of its own, which is seeded by an argument."""
    return "seed" in inspect.signature(_package().corruption_dict[kind]).parameters
