"""The settings of each command, validated where they are built.

A field's meaning, unit and default stand here once; the command line shows the same defaults.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from stl_offline.errors import InputError

TOKEN_TARGETS = ("gumbel", "soft", "argmax")
RESIDUALS = ("ignore", "uniform")
TOKEN_POOLS = ("mean", "lme")
VIEW_MODES = ("auto", "random", "replay")
MIX_MODES = ("batch", "pair", "elem")
ERASE_MODES = ("const", "rand", "pixel")
ERASED_LABELS = ("drop", "keep")
LABEL_PICKS = ("auto", "zoom", "draw")
INTERPOLATIONS = ("area", "bilinear", "bicubic")
AMP_MODES = ("auto", "none", "bf16", "fp16")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _require_seed(seed: int) -> None:
    _require(0 <= seed < 1 << 63, f"seed lies in [0, 2^63), got {seed}")


def _require_finite(config: "MachineConfig") -> None:
    for name, value in dataclasses.asdict(config).items():
        fine = not isinstance(value, float) or math.isfinite(value)
        _require(fine, f"{name.replace('_', '-')} takes a finite number, got {value}")


def _choose(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{name} is one of {', '.join(choices)}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """Where a command runs. None of it changes what comes out, beyond rounding."""

    device: str = "auto"  # "auto" takes a GPU where there is one
    workers: int = 0  # loading threads of a process; 0: one for each core, shared by a machine's processes
    debug: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainConfig(MachineConfig):
    """What both training stages share. The defaults suit a small model on 64-pixel images."""

    data: str
    out: str
    val: str | None = None
    model: str = "fan_micro_4_p8"
    img_size: int = 64
    epochs: int = 24
    batch_size: int = 100
    seed: int = 0
    accumulate: int = 1  # batches that make one step
    lr: float = 2e-3
    lr_batch: int = 0  # images of a step that lr is for: it grows and shrinks with them; 0: lr as it is
    warmup_epochs: float = 2.0
    weight_decay: float = 0.05
    clip_grad: float = 0.0  # largest gradient norm; 0: no clipping
    ema_decay: float = 0.99992  # reached by a warm-up; 0: no averaged weights
    smoothing: float = 0.1
    drop_path: float = 0.0
    mixup: float = 0.0  # alpha of the Beta distribution; 0: off
    cutmix: float = 0.0
    mix_prob: float = 1.0
    mix_mode: str = "batch"
    scale_min: float = 0.25  # smallest share of an image's area that a random crop takes
    flip: float = 0.5
    color_jitter: float | None = None  # strength; None: 0.4, or 0 with auto_augment
    auto_augment: str | None = None  # timm's string for RandAugment, such as rand-m9-mstd0.5-inc1
    random_erase: float = 0.0  # chance that a box of an image is erased
    erase_mode: str = "pixel"
    interpolation: str = "area"  # how crops are resized, antialiased in any case
    amp: str = "auto"
    compile: bool = False
    channels_last: bool = True  # memory layout of the model's weights
    sync_bn: bool = False  # batch norms look at the images of all processes
    token_weight: float = 1.0  # weight of the token loss beside the class loss
    val_every: int = 1  # epochs from one measurement on the validation images to the next
    checkpoint_every: float = 300.0  # seconds between stored states within an epoch
    checkpoint_steps: int = 0  # steps between them, beside the seconds; 0: seconds alone
    log_every: int = 50  # steps from one line of steps.jsonl to the next
    tensorboard: bool = False
    resume: bool = True  # go on where the same command stopped; else start anew
    skip_broken: bool = False

    @property
    def trains_tokens(self) -> bool:
        """Whether the token head gets a gradient."""
        return self.token_weight > 0

    def __post_init__(self) -> None:
        _require(self.img_size > 0, f"img-size must be positive, got {self.img_size}")
        _require(self.epochs > 0, f"epochs must be at least 1, got {self.epochs}")
        _require(self.batch_size > 0, f"batch-size must be at least 1, got {self.batch_size}")
        _require(self.accumulate > 0, f"accumulate must be at least 1, got {self.accumulate}")
        if self.auto_augment == "none":  # what a command says to leave out a recipe's
            object.__setattr__(self, "auto_augment", None)
        _require_finite(self)
        _require(self.lr_batch >= 0, f"lr-batch must not be negative, got {self.lr_batch}")
        _require(self.checkpoint_every >= 0, f"checkpoint-every must not be negative, got {self.checkpoint_every}")
        _require(self.checkpoint_steps >= 0, f"checkpoint-steps must not be negative, got {self.checkpoint_steps}")
        _require(self.log_every > 0, f"log-every must be at least 1, got {self.log_every}")
        _require_seed(self.seed)
        _require(self.lr > 0, f"lr must be positive, got {self.lr}")
        _require(self.warmup_epochs >= 0, f"warmup-epochs must not be negative, got {self.warmup_epochs}")
        _require(self.weight_decay >= 0, f"weight-decay must not be negative, got {self.weight_decay}")
        _require(self.clip_grad >= 0, f"clip-grad must not be negative, got {self.clip_grad}")
        _require(0 <= self.ema_decay < 1, f"ema-decay lies in [0, 1), got {self.ema_decay}")
        _require(0 <= self.smoothing < 1, f"smoothing lies in [0, 1), got {self.smoothing}")
        _require(0 <= self.drop_path < 1, f"drop-path lies in [0, 1), got {self.drop_path}")
        _require(self.mixup >= 0 and self.cutmix >= 0, "mixup and cutmix must not be negative")
        _require(0 <= self.mix_prob <= 1, f"mix-prob lies in [0, 1], got {self.mix_prob}")
        _choose("mix-mode", self.mix_mode, MIX_MODES)
        _require(0 < self.scale_min <= 1, f"scale-min lies in (0, 1], got {self.scale_min}")
        _require(0 <= self.flip <= 1, f"flip lies in [0, 1], got {self.flip}")
        jitter = self.color_jitter
        _require(jitter is None or jitter >= 0, f"color-jitter must not be negative, got {jitter}")
        _require(0 <= self.random_erase <= 1, f"random-erase lies in [0, 1], got {self.random_erase}")
        _choose("erase-mode", self.erase_mode, ERASE_MODES)
        _choose("interpolation", self.interpolation, INTERPOLATIONS)
        _choose("amp", self.amp, AMP_MODES)
        _require(self.val_every > 0, f"val-every must be at least 1, got {self.val_every}")
        _require(self.token_weight >= 0, f"token-weight must not be negative, got {self.token_weight}")


@dataclass(frozen=True, kw_only=True)
class LabelerConfig(TrainConfig):
    """Stage 1: ``stl-offline train-labeler``."""

    token_pool: str = "mean"  # how an image's token logits become the logits of the token loss

    def __post_init__(self) -> None:
        super().__post_init__()
        _choose("token-pool", self.token_pool, TOKEN_POOLS)


@dataclass(frozen=True, kw_only=True)
class StudentConfig(TrainConfig):
    """Stage 2: ``stl-offline train-student``."""

    labels: str | tuple[str, ...] = "none"  # label sets, "none" or "online"
    labels_pick: str = "auto"  # which of several sets a sample reads: by its crop's zoom, or drawn
    labels_share: tuple[float, ...] | None = None  # how often each of several sets is drawn; None: equally often
    labeler: str | None = None  # the labeler's run or checkpoint, for labels = "online"
    labeler_checkpoint: str | None = None  # weights for a labeler named timm:NAME
    labeler_pretrained: bool = False  # take timm's own weights for it
    labeler_classes: str | None = None  # its class names: a text file with one per line, or a label set
    token_target: str = "gumbel"
    residual: str = "ignore"
    views: str = "auto"  # replay the label set's crops where it has them, else draw new ones
    columns: int = 8  # classes kept for each token of a soft target
    sampling_ratio: int = 2
    min_confidence: float = 0.0
    erased_labels: str = "drop"  # of erased cells: they weigh what is left to see of them, or stay
    missing: str = "error"
    allow_changed: bool = False
    key_prefix: str = ""  # OLD=NEW: what the images' keys start with, and what the labels' have there

    @property
    def trains_tokens(self) -> bool:
        return super().trains_tokens and self.labels != ("none",)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(not self.key_prefix or self.key_prefix.count("=") == 1, "key-prefix is OLD=NEW, such as train/=")
        sets = (self.labels,) if isinstance(self.labels, str) else tuple(self.labels)
        object.__setattr__(self, "labels", sets)
        _require(len(sets) > 0, "labels takes at least one label set, none or online")
        _require(len(sets) == 1 or not {"none", "online"} & set(sets), "several --labels must all be label sets")
        _choose("labels-pick", self.labels_pick, LABEL_PICKS)
        if self.labels_share is not None:
            _require(len(sets) > 1 and self.labels_pick != "zoom", "labels-share goes with several sets that are drawn")
            fine = len(self.labels_share) == len(sets) and all(0 < share < math.inf for share in self.labels_share)
            _require(fine, f"labels-share takes {len(sets)} positive numbers, got {self.labels_share}")
        _choose("erased-labels", self.erased_labels, ERASED_LABELS)
        _choose("token-target", self.token_target, TOKEN_TARGETS)
        _choose("residual", self.residual, RESIDUALS)
        _choose("views", self.views, VIEW_MODES)
        _choose("missing", self.missing, ("error", "skip"))
        _require(self.columns > 0, f"columns must be at least 1, got {self.columns}")
        _require(self.sampling_ratio > 0, f"sampling-ratio must be at least 1, got {self.sampling_ratio}")
        _require(0 <= self.min_confidence < 1, f"min-confidence lies in [0, 1), got {self.min_confidence}")
        if sets == ("online",):
            _require(self.labeler is not None, "labels online need --labeler RUN|CKPT|timm:NAME")
            _require(self.views != "replay", "labels online have no stored views to replay; leave --views out")
        else:
            _require(self.labeler is None, "--labeler goes with --labels online; a label set names its own labeler")


@dataclass(frozen=True, kw_only=True)
class DumpConfig(MachineConfig):
    """``stl-offline dump-labels``."""

    data: str
    labeler: str  # a run, a checkpoint, or timm:NAME
    out: str
    labeler_checkpoint: str | None = None  # weights for a labeler named timm:NAME
    labeler_pretrained: bool = False  # take timm's own weights for it
    labeler_classes: str | None = None  # its class names: a text file with one per line, or a label set
    labeler_by_order: bool = False  # its weights have other names, but the same tensors in the same order
    labeler_mean: tuple[float, ...] | None = None  # normalisation, where timm notes another one than its weights had
    labeler_std: tuple[float, ...] | None = None
    shards: int = 0  # 0: of some 4,000 images each; fewer, smaller ones for small data
    top_k: int = 5
    views: int = 0  # random crops for each image; 0: one map of the whole image
    img_size: int = 0  # the labeler's input side in pixels; 0: what it was trained with
    batch_size: int = 64
    seed: int = 0
    scale_min: float = 0.25
    flip: float = 0.5
    interpolation: str = "auto"  # as the labeler's run resized its images; area for timm:NAME
    format: str = "zarr"
    encoding: str = "f16"
    amp: str = "none"
    licence: str = "unstated"  # of the labeler's weights, for those who get the labels
    skip_broken: bool = False

    def __post_init__(self) -> None:
        for name in ("labeler_mean", "labeler_std"):
            values = getattr(self, name)
            _require(values is None or len(values) == 3, f"{name} takes three numbers, got {values}")
        _require(self.shards >= 0, f"shards must not be negative, got {self.shards}; 0 picks a number")
        _require(self.top_k > 0, f"top-k must be at least 1, got {self.top_k}")
        _require(self.views >= 0, f"views must not be negative, got {self.views}")
        _require(self.img_size >= 0, f"img-size must not be negative, got {self.img_size}")
        _require(self.batch_size > 0, f"batch-size must be at least 1, got {self.batch_size}")
        _require_seed(self.seed)
        _require(0 < self.scale_min <= 1, f"scale-min lies in (0, 1], got {self.scale_min}")
        _require(0 <= self.flip <= 1, f"flip lies in [0, 1], got {self.flip}")
        _choose("interpolation", self.interpolation, ("auto", *INTERPOLATIONS))
        _choose("amp", self.amp, AMP_MODES)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(MachineConfig):
    """``stl-offline evaluate``."""

    data: str
    checkpoint: str  # a run or a .safetensors file written by one
    skip_broken: bool = False
    batch_size: int = 128
    img_size: int = 0  # 0: what the model was trained with
    crop_pct: float = 1.0
    amp: str = "none"

    def __post_init__(self) -> None:
        _require(self.batch_size > 0, f"batch-size must be at least 1, got {self.batch_size}")
        _require(0 < self.crop_pct <= 1, f"crop-pct lies in (0, 1], got {self.crop_pct}")
        _require(self.img_size >= 0, f"img-size must not be negative, got {self.img_size}")
        _choose("amp", self.amp, AMP_MODES)


@dataclass(frozen=True, kw_only=True)
class PreviewConfig(MachineConfig):
    """``stl-offline labels preview``."""

    path: str  # the label set
    data: str | None = None  # the images; None: label maps alone
    out: str = "preview"
    keys: tuple[str, ...] = ()  # keys, or patterns with * and ?
    samples: int = 12  # images to draw at random where no keys are named
    seed: int = 0  # of the samples
    views: tuple[int, ...] = (0,)  # which maps of each image, where a set holds crops
    threshold: float = 0.5  # confidence from which a token counts as confident
    student_seed: int = 0
    epoch: int = 0  # of the student's crop and draws, counted from 0
    scale_min: float = 0.25
    flip: float = 0.5
    missing: str = "error"
    allow_changed: bool = False
    all_shards: bool = False  # read the whole set for the histogram
    max_mb: float = 5.0  # largest page

    def __post_init__(self) -> None:
        _require(self.samples > 0, f"samples must be at least 1, got {self.samples}")
        _require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        _require(self.student_seed >= 0, f"student-seed must not be negative, got {self.student_seed}")
        _require(self.epoch >= 0, f"epoch must not be negative, got {self.epoch}")
        _require(bool(self.views) and min(self.views) >= 0, f"views are numbers from 0 on, got {self.views}")
        _require(0 <= self.threshold <= 1, f"threshold lies in [0, 1], got {self.threshold}")
        _require(0 < self.scale_min <= 1, f"scale-min lies in (0, 1], got {self.scale_min}")
        _require(0 <= self.flip <= 1, f"flip lies in [0, 1], got {self.flip}")
        _require(self.max_mb > 0, f"max-mb must be positive, got {self.max_mb}")
        _choose("missing", self.missing, ("error", "skip"))


@dataclass(frozen=True, kw_only=True)
class ReportConfig(MachineConfig):
    """``stl-offline report``."""

    runs: tuple[str, ...]
    data: str | None = None  # images to show examples of, such as the validation images
    labels: tuple[str, ...] = ()  # label sets that the runs may have learned from, to say more of them
    out: str = "report.html"
    examples: int = 4  # images that the first run gets right, and as many that it gets wrong
    predict: int = 256  # images that examples are chosen from
    skip_broken: bool = False
    seed: int = 0
    max_mb: float = 5.0

    def __post_init__(self) -> None:
        _require(len(self.runs) > 0, "a report needs at least one run")
        _require(self.examples >= 0, f"examples must not be negative, got {self.examples}")
        _require(self.predict > 0, f"predict must be at least 1, got {self.predict}")
        _require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        _require(self.max_mb > 0, f"max-mb must be positive, got {self.max_mb}")


# What may differ between a command and the one that it continues.
_FREE_ON_RESUME = {
    *("device", "workers", "debug", "out", "resume"),
    *("val_every", "checkpoint_every", "checkpoint_steps", "log_every", "tensorboard"),
}


def settings(config: MachineConfig) -> dict[str, Any]:
    """The settings that shape the result: all but the machine's and where it is written."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE_ON_RESUME}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two dicts of settings, as ``name: old → new`` lines."""
    names = sorted(old.keys() | new.keys())
    return [f"{name}: {_change(old.get(name), new.get(name))}" for name in names if old.get(name) != new.get(name)]


def _change(old: Any, new: Any) -> str:
    """Two values, in a line's part: of long lists how they differ, of other long values their beginnings."""
    if isinstance(old, list) and isinstance(new, list) and max(len(old), len(new)) > 4:
        if len(old) != len(new):
            return f"{len(old):,} → {len(new):,} of them"
        old, new = next(pair for pair in zip(old, new, strict=True) if pair[0] != pair[1])
    return " → ".join(text if len(text) <= 100 else f"{text[:99]}…" for text in (repr(old), repr(new)))
