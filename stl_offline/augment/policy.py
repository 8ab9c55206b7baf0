"""RandAugment as timm names it, drawn as a pure function of (seed, epoch, sample).

RandAugment (Cubuk et al., arXiv 1909.13719) applies ``layers`` operations, each drawn from one list and left out with
chance 1 − p. timm's strings say how: ``rand-m9-mstd0.5-inc1`` is magnitude 9 with normal noise of 0.5, operations that
grow stronger with it, and timm's defaults p = 0.5, two layers, magnitudes of at most 10.

n: samples; L: layers.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from stl_offline.errors import InputError
from stl_offline.random import STREAM_AUGMENT, uniforms

# Both of timm's lists in its order, so that an operation's number means the same there.
OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)
# What moves pixels, and the argument at full magnitude: degrees, or shares of a side. The sign is drawn.
MOVES = {"Rotate": 30.0, "ShearX": 0.3, "ShearY": 0.3, "TranslateXRel": 0.45, "TranslateYRel": 0.45}

_FULL = 10.0  # timm's scale of magnitudes
_UNIFORMS = 8  # numbers kept for each layer, of which five are used


@dataclass(frozen=True)
class RandAugment:
    """The settings that a string of timm's names.

    magnitude: mean strength, 10 is full; magnitude_std: its normal noise, inf draws it evenly from [0, magnitude];
    magnitude_max: its upper bound; layers: operations per image; prob: chance that a drawn one is applied; increasing:
    whether Posterize, Solarize and the enhancements grow stronger with the magnitude.

    Raises:
        InputError: a value out of its range.
    """

    magnitude: float = _FULL
    layers: int = 2
    prob: float = 0.5
    magnitude_std: float = 0.0
    magnitude_max: float = _FULL
    increasing: bool = False

    def __post_init__(self) -> None:
        if not (self.magnitude >= 0 and self.magnitude_std >= 0 and self.magnitude_max > 0 and self.layers >= 1):
            raise InputError(f"RandAugment takes magnitudes from 0 on and at least one layer, got {self}")
        if not 0 <= self.prob <= 1:
            raise InputError(f"RandAugment's p lies in [0, 1], got {self.prob}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """The settings of ``rand-m9-mstd0.5-inc1`` and its like: parts m, n, p, mstd, mmax and inc in any order.

        Raises:
            InputError: another policy, or a part that is unknown or not a number.
        """
        name, *parts = text.split("-")
        if name != "rand":
            raise InputError(f"auto-augment knows timm's RandAugment, such as rand-m9-mstd0.5-inc1; got {text!r}")
        values: dict[str, float] = {}
        for part in parts:
            match = re.fullmatch(r"(mstd|mmax|inc|m|n|p)(\d+(?:\.\d+)?|inf)", part)
            if match is None or match[1] in values:
                raise InputError(
                    f"auto-augment {text!r}: {part!r} is no part of its own; there are m (magnitude), n (layers), "
                    "p (chance of each), mstd (noise), mmax (largest) and inc (0 or 1), each with a number"
                )
            values[match[1]] = float(match[2])
        whole = {key: values.get(key, default) for key, default in (("n", 2), ("inc", 0))}
        if not all(math.isfinite(value) and value == int(value) for value in whole.values()):
            raise InputError(f"auto-augment {text!r}: n and inc take whole numbers")
        noise = values.get("mstd", 0.0)
        return cls(
            magnitude=values.get("m", _FULL),
            layers=int(whole["n"]),
            prob=values.get("p", 0.5),
            magnitude_std=math.inf if noise > 100 else noise,
            magnitude_max=values.get("mmax", _FULL),
            increasing=bool(whole["inc"]),
        )

    def draw(self, seed: int, epoch: int | np.ndarray, sample_ids: np.ndarray) -> "Operations":
        """What is done to some samples: the same whatever the batch, the worker and what came before.

        epoch: one for all, or int64 (n,).
        """
        numbers = uniforms(seed, STREAM_AUGMENT, epoch, sample_ids, self.layers * _UNIFORMS)
        pick, apply, first, second, sign = np.moveaxis(numbers.reshape(len(sample_ids), self.layers, -1), 2, 0)[:5]
        if math.isinf(self.magnitude_std):
            level = self.magnitude * first
        else:
            # Box and Muller's normal numbers; 1 − u lies in (0, 1].
            normal = np.sqrt(-2 * np.log(1 - first)) * np.cos(2 * np.pi * second)
            level = self.magnitude + self.magnitude_std * normal
        level = np.clip(level, 0, self.magnitude_max) / _FULL
        kinds = np.where(apply < self.prob, (pick * len(OPERATIONS)).astype(np.int64), -1)
        signed = np.where(sign < 0.5, level, -level)
        arguments = np.zeros_like(level)
        for kind, name in enumerate(OPERATIONS):
            chosen = kinds == kind
            arguments[chosen] = self.argument(name, level[chosen], signed[chosen])
        return Operations(kinds, arguments)

    def argument(self, name: str, level: np.ndarray, signed: np.ndarray) -> np.ndarray:
        """An operation's argument from the level in [0, 1] (more where mmax is), with and without its drawn sign."""
        if name in MOVES:
            return MOVES[name] * signed
        if name in ("Color", "Contrast", "Brightness", "Sharpness"):
            return np.maximum(0.1, 1 + 0.9 * signed) if self.increasing else 0.1 + 1.8 * level
        if name == "Posterize":
            # timm's scale ends at no bits at all, a black image, which Pillow refuses: one stays. Of more than all
            # bits, as with mmax beyond 20, timm leaves the image alone.
            bits = np.floor(4 * level)
            return np.clip(4 - bits if self.increasing else bits, 1, 8)
        if name == "Solarize":
            threshold = np.minimum(np.floor(256 * level), 256)
            return 256 - threshold if self.increasing else threshold
        if name == "SolarizeAdd":
            return np.minimum(np.floor(110 * level), 128)
        return np.zeros_like(level)


@dataclass(frozen=True)
class Operations:
    """Drawn operations: kinds (n, L), numbers in `OPERATIONS` or −1 for none, and their arguments (n, L)."""

    kinds: np.ndarray
    arguments: np.ndarray = field(repr=False)
