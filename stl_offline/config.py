"""The settings of each command, checked where they are built.

Each field stands here once: its default, its help text (metadata ``help``), what it affects and which values it takes.
Whatever needs these reads them from the field (`stl_offline.settings.setting`): what a run or a label set records, what
must be equal when a job is resumed, what a recipe may name. Settings that another part of the package owns, such as
random crops, are checked by building the owner's class.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from stl_offline import needs
from stl_offline.config_evaluate import EvaluateConfig as EvaluateConfig
from stl_offline.config_pages import PreviewConfig as PreviewConfig
from stl_offline.config_pages import ReportConfig as ReportConfig
from stl_offline.errors import InputError
from stl_offline.settings import (
    AMP_MODES,
    CLASS_MAP,
    INPUT,
    JOB,
    LOADER,
    LOADERS,
    MATCHES,
    MISSING,
    RESULT,
    SEEDS,
    SKIP_BROKEN,
    TOKEN_HEADS,
    Config,
    CropSettings,
    EraseSettings,
    MachineConfig,
    MixSettings,
    check_match,
    check_repeats,
    check_three,
    check_token_targets,
    recorded,
    setting,
)

TOKEN_NORMS = ("mass", "tokens")
TOKEN_POOLS = ("mean", "lme")
CROP_MODES = ("auto", "random", "replay")
ERASED_LABELS = ("drop", "keep")
LABEL_PICKS = ("auto", "zoom", "draw")
INTERPOLATIONS = ("area", "bilinear", "bicubic")


# Help texts of settings that several commands have.
_LABELER_CHECKPOINT = "Weights file for a labeler given as timm:NAME."
_LABELER_PRETRAINED = (
    "Take timm's own weights for a labeler given as timm:NAME, from the Hugging Face Hub or its local cache."
)
_LABELER_CLASSES = "Class names of a timm:NAME or hf-hub:NAME labeler: a text file with one per line, or a label set."


@dataclass(frozen=True, kw_only=True)
class RunConfig(MachineConfig):
    """What every training run has, whatever it trains: its data, its loop and its folder."""

    schedule: ClassVar[str] = "cosine"  # how the learning rate falls; a setting where there is a choice

    data: str = setting(help="Training images.", affects=INPUT, in_recipes=False)
    out: str = setting(help="Folder for checkpoints, settings and logs.", affects=JOB, in_recipes=False)
    val: str | None = setting(
        None, "Validation images, in any form that `data` takes.", affects=INPUT, in_recipes=False
    )
    epochs: int = setting(24, "Passes over the training data.", bounds="[1, inf)")
    batch_size: int = setting(100, "Images per batch and process.", bounds="[1, inf)")
    seed: int = setting(0, "Seed of the weights, the crops, the order of images and all random draws.", bounds=SEEDS)
    accumulate: int = setting(1, "Batches whose gradients are summed for one step.", bounds="[1, inf)")
    lr: float = setting(2e-3, "Peak learning rate of AdamW; a cosine takes it down to 1e-6.", bounds="(0, inf)")
    lr_batch: int = setting(
        0,
        "Images per step that `lr` is meant for; the rate is scaled to the real number (0 disables scaling).",
        bounds="[0, inf)",
    )
    warmup_epochs: float = setting(2.0, "Epochs of linear warm-up, at most a fifth of the run.", bounds="[0, inf)")
    weight_decay: float = setting(0.05, "Weight decay of AdamW.", bounds="[0, inf)")
    layer_decay: float = setting(
        1.0, "A layer's learning rate, relative to the next layer's (1: equal).", bounds="(0, 1]", needs=needs.UNFROZEN
    )
    clip_grad: float = setting(0.0, "Maximum norm of the gradient (0 disables clipping).", bounds="[0, inf)")
    ema_decay: float = setting(
        0.99992,
        "Decay of the moving average of the weights, reached by a warm-up (0 disables the average).",
        bounds="[0, 1)",
    )
    drop_path: float = setting(0.0, "Rate of stochastic depth (0 disables it).", bounds="[0, 1)")
    amp: str = setting("auto", "Mixed precision of the model; auto chooses by device.", choices=AMP_MODES)
    compile: bool = setting(False, "Compile the model with torch.compile.")
    channels_last: bool = setting(True, "Keep the model's weights in the channels-last memory format.")
    sync_bn: bool = setting(False, "Compute batch-norm statistics over all processes.")
    val_every: int = setting(
        1,
        "Epochs between two evaluations on the validation images.",
        affects=JOB,
        bounds="[1, inf)",
        needs=needs.VALIDATION,
    )
    checkpoint_every: float = setting(
        300.0, "Seconds between checkpoints within an epoch.", affects=JOB, bounds="[0, inf)"
    )
    checkpoint_steps: int = setting(
        0, "Steps between additional checkpoints within an epoch (0 disables them).", affects=JOB, bounds="[0, inf)"
    )
    log_every: int = setting(50, "Steps between two lines of steps.jsonl.", affects=JOB, bounds="[1, inf)")
    tensorboard: bool = setting(False, "Also write TensorBoard's files to RUN/tensorboard.", affects=JOB)
    resume: bool = setting(
        True,
        "Continue an interrupted run of the same settings. False starts the run again, over what its folder holds.",
        affects=JOB,
        in_recipes=False,
    )

    @property
    def trains_all(self) -> bool:
        """Whether every parameter of the model gets a gradient in every step."""
        return True


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """What both training stages share. The defaults suit a small model on 64-pixel images."""

    model: str = setting(
        "fan_micro_4_p8", "Model to train: a FAN variant such as fan_tiny_12_p16_224, or any classifier of timm."
    )
    token_head: str = setting(
        "own",
        "Token head of a timm classifier: one with weights of its own, or the class head at every position.",
        choices=TOKEN_HEADS,
    )
    init: str | None = setting(
        None,
        "Initial weights: a run, a weights file, or timm's pretrained weights (timm). Heads of other classes start "
        "untrained.",
        affects=INPUT,
    )
    freeze: bool = setting(False, "Train the class head and the token head alone.")
    grad_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass, which takes less memory and more time.", affects=JOB
    )
    img_size: int = setting(64, "Height and width of the model's input, in pixels.", bounds="[1, 8192]")
    smoothing: float = setting(0.1, "Label smoothing of class and token targets (0 disables it).", bounds="[0, 1)")
    mixup: float = setting(0.0, "Alpha of mixup's Beta distribution (0 disables mixup).")
    cutmix: float = setting(0.0, "Alpha of cutmix's Beta distribution (0 disables cutmix).")
    mix_prob: float = setting(1.0, "Probability that mixup or cutmix is applied.", needs=needs.MIXING)
    mix_mode: str = setting(
        "batch",
        "Whether mixup and cutmix are drawn once per batch, per pair of images, or per image (elem).",
        needs=needs.MIXING,
    )
    scale_min: float = setting(0.25, "Smallest part of an image's area that a random crop takes.")
    flip: float = setting(0.5, "Probability of a horizontal flip.")
    color_jitter: float | None = setting(
        None, "Strength of colour jitter (0 disables it). By default 0.4, or 0 with `auto_augment`.", bounds="[0, inf)"
    )
    auto_augment: str | None = setting(None, "RandAugment in timm's notation, such as rand-m9-mstd0.5-inc1.")
    random_erase: float = setting(0.0, "Probability that a box of an image is erased.")
    erase_mode: str = setting(
        "pixel",
        "What `random_erase` fills a box with: the mean colour (const), one random colour (rand), or random "
        "pixels (pixel).",
        needs=needs.ERASING,
    )
    interpolation: str = setting(
        "area",
        "How crops are resized, with antialiasing. A labeler and its students need the same.",
        choices=INTERPOLATIONS,
    )
    repeats: int = setting(
        1,
        "Crops of each image in a batch, from one decode (repeated augmentation). An epoch keeps its number of steps. "
        "If `epochs` is no multiple of it, the epochs that remain at the end show one crop of each image.",
        bounds="[1, inf)",
        recorded_by_default=False,
    )
    token_weight: float = setting(1.0, "Weight of the token loss (0 disables it).", bounds="[0, inf)")
    skip_broken: bool = setting(False, SKIP_BROKEN)
    loader: str = setting("ffcv", LOADER, choices=LOADERS, affects=JOB)

    def __post_init__(self) -> None:
        if self.auto_augment == "none":  # how a command turns a recipe's auto_augment off
            object.__setattr__(self, "auto_augment", None)
        super().__post_init__()

    def check_together(self) -> None:
        super().check_together()
        self.crop_settings()
        self.erase_settings()
        check_repeats(self.repeats, self.epochs, self.batch_size * self.accumulate, self.mix_settings())

    def shown_together(self, epoch: int) -> range:
        """The epochs whose crops of an image stand in one batch: an epoch alone, or `repeats` of them."""
        first = epoch - epoch % self.repeats
        if first + self.repeats > self.epochs:
            return range(epoch, epoch + 1)
        return range(first, first + self.repeats)

    @property
    def trains_tokens(self) -> bool:
        """Whether the token head gets a gradient."""
        return self.token_weight > 0

    @property
    def trains_all(self) -> bool:
        return self.trains_tokens

    def crop_settings(self) -> CropSettings:
        """How random crops are drawn."""
        return CropSettings(scale=(self.scale_min, 1.0), flip=self.flip)

    def mix_settings(self) -> MixSettings:
        """How images of a batch are mixed."""
        return MixSettings(self.mixup, self.cutmix, self.mix_prob, mode=self.mix_mode)

    def erase_settings(self) -> EraseSettings:
        """How boxes of images are erased."""
        return EraseSettings(self.random_erase, self.erase_mode)


@dataclass(frozen=True, kw_only=True)
class LabelerConfig(TrainConfig):
    """Stage 1: ``stl-offline train-labeler``."""

    token_pool: str = setting(
        "mean",
        "How token logits are pooled for the token loss: their mean (STL), or lme, the log of the mean of their "
        "exponentials, with which labels outline objects.",
        choices=TOKEN_POOLS,
        needs=needs.TOKEN_LOSS,
    )


@dataclass(frozen=True, kw_only=True)
class StudentConfig(TrainConfig):
    """Stage 2: ``stl-offline train-student``."""

    labels: str | tuple[str, ...] = setting(
        "none",
        "Source of token labels: one or more label sets, none, or online (a labeler runs in every step).",
        affects=INPUT,
    )
    token_weight: float = setting(
        1.0, "Weight of the token loss (0 disables it).", bounds="[0, inf)", needs=needs.TOKEN_LABELS
    )
    labels_pick: str = setting(
        "auto",
        "How one of several label sets is chosen for a sample: by its crop's scale (zoom), or at random (draw).",
        choices=LABEL_PICKS,
        needs=needs.SEVERAL_SETS,
    )
    labels_share: tuple[float, ...] | None = setting(
        None, "How often each label set is drawn, in the order of `labels`.", needs=needs.SEVERAL_SETS
    )
    labeler: str | None = setting(
        None,
        "Labeler to run during training (only with `labels=online`). Must have the student's token grid and "
        "class list.",
        affects=INPUT,
        needs=needs.ONLINE,
    )
    labeler_checkpoint: str | None = setting(None, _LABELER_CHECKPOINT, affects=INPUT, needs=needs.ONLINE)
    labeler_pretrained: bool = setting(False, _LABELER_PRETRAINED, affects=INPUT, needs=needs.ONLINE)
    labeler_classes: str | None = setting(None, _LABELER_CLASSES, affects=INPUT, needs=needs.ONLINE)
    token_target: str = setting(
        "gumbel",
        "Target of a token: one class drawn whenever the image is shown (gumbel), the distribution (soft), or the best "
        "class (argmax).",
        needs=needs.TARGETS,
    )
    residual: str = setting(
        "ignore",
        "What happens to probability outside the stored classes: left unlabelled (ignore), spread over all classes "
        "(uniform), given to the image's own class (class), or to an outcome of its own, none of these (ghost).",
        needs=(*needs.TARGETS, needs.LEFT_MASS),
    )
    token_norm: str = setting(
        "mass",
        "What the token loss is divided by: the labelled probability (mass), or the number of tokens (tokens), so that "
        "its weight does not grow where labels hold little of the probability.",
        choices=TOKEN_NORMS,
        needs=needs.TARGETS,
    )
    class_target: str = setting(
        "own",
        "Target of the class head: the image's own class (own), the labeler's stored class output for the view "
        "(labels), or both, that output with weight W (mix:W).",
    )
    crops: str = setting(
        "auto",
        "Crops to train on: new ones (random), those of the label set (replay), or what the set's kind needs (auto).",
        choices=CROP_MODES,
        recorded_as="views",
        needs=needs.LABEL_SET,
    )
    soft_classes: int = setting(
        8,
        "Classes kept per token of a soft target.",
        recorded_as="columns",
        needs=(*needs.TARGETS, needs.SOFT_TARGET),
    )
    sampling_ratio: int = setting(
        2, "RoIAlign's sampling points per cell, along each side.", needs=(*needs.TARGETS, needs.SAMPLED_MAPS)
    )
    min_confidence: float = setting(0.0, "Confidence below which a token is left unlabelled.", needs=needs.TARGETS)
    select: str = setting(
        "all",
        "Tokens to train on: all, those whose (best) target is the image's own class (own), or those with at least the "
        "confidence X (confident:X, the same as a minimum confidence of X).",
        needs=needs.TARGETS,
    )
    erased_labels: str = setting(
        "drop",
        "Whether labels of cells hidden by `random_erase` are weighted down (drop) or kept.",
        choices=ERASED_LABELS,
        needs=(*needs.TARGETS, needs.ERASING),
    )
    match: str = setting(
        "key",
        "How images and labels are joined: by key, by stem (the key's base name up to its first dot), or by content.",
        choices=MATCHES,
        needs=needs.LABEL_SET,
    )
    missing: str = setting(
        "error",
        "What to do with images that have no labels: stop, or train on them without token labels (skip).",
        choices=MISSING,
        needs=needs.LABEL_SET,
    )
    allow_changed: bool = setting(
        False, "Use labels of images whose content has changed since they were labelled.", needs=needs.LABEL_SET
    )
    key_prefix: str = setting(
        "",
        "Replace the start OLD of the images' keys by NEW before labels are looked up, such as train/=.",
        needs=needs.LABEL_SET,
    )

    @property
    def trains_tokens(self) -> bool:
        return super().trains_tokens and self.labels != ("none",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.select.startswith("confident:"):  # the minimum confidence by another name: one of them is recorded
            object.__setattr__(self, "min_confidence", float(self.select.partition(":")[2]))
            object.__setattr__(self, "select", "all")

    def check_together(self) -> None:
        super().check_together()
        self._check_select()
        check_token_targets(
            self.token_target, self.residual, self.soft_classes, self.sampling_ratio, self.min_confidence
        )
        if self.key_prefix and self.key_prefix.count("=") != 1:
            raise InputError(f"`key_prefix` must be OLD=NEW, such as train/=; got {self.key_prefix!r}")
        check_match(self.match, allow_changed=self.allow_changed, key_prefix=self.key_prefix)
        sets = (self.labels,) if isinstance(self.labels, str) else tuple(self.labels)
        object.__setattr__(self, "labels", sets)
        if not sets:
            raise InputError('`labels` must be at least one label set, "none" or "online"')
        if len(sets) > 1 and {"none", "online"} & set(sets):
            raise InputError(f"several `labels` must all be label sets, got {', '.join(sets)}")
        if self.labels_share is not None:
            if len(sets) == 1 or self.labels_pick == "zoom":
                raise InputError('`labels_share` needs several `labels` and a `labels_pick` other than "zoom"')
            fine = len(self.labels_share) == len(sets) and all(0 < share < math.inf for share in self.labels_share)
            if not fine:
                raise InputError(f"`labels_share` must be {len(sets)} positive numbers, got {self.labels_share}")
        if sets == ("online",):
            if self.labeler is None:
                raise InputError('`labels="online"` needs `labeler`: a run, a checkpoint, or timm:NAME')
            if self.crops == "replay":
                raise InputError('`crops="replay"` needs a label set of crops, and `labels="online"` has none')

    def _check_select(self) -> None:
        word, colon, number = self.select.partition(":")
        if word == "confident" and colon:
            try:
                least = float(number)
            except ValueError:
                least = math.nan
            if not 0 < least <= 1:
                raise InputError(f"`select` must be confident:X with X in (0, 1], got {self.select!r}")
            if self.min_confidence not in (0.0, least):
                raise InputError(
                    f"`select` is {self.select} and `min_confidence` {self.min_confidence}; give one of them"
                )
        elif self.select not in ("all", "own"):
            raise InputError(f'`select` must be "all", "own" or "confident:X", got {self.select!r}')


@dataclass(frozen=True, kw_only=True)
class DumpConfig(MachineConfig):
    """``stl-offline dump-labels``."""

    data: str = setting(help="Images to label.", affects=INPUT)
    labeler: str = setting(
        help="Model that labels: a run's folder, one of its checkpoints, or a timm model.", affects=INPUT
    )
    out: str = setting(help="Folder or address (s3://…) of the label set.", affects=JOB)
    labeler_checkpoint: str | None = setting(None, _LABELER_CHECKPOINT, affects=INPUT)
    labeler_pretrained: bool = setting(False, _LABELER_PRETRAINED, affects=INPUT)
    labeler_classes: str | None = setting(None, _LABELER_CLASSES, affects=INPUT)
    labeler_by_order: bool = setting(
        False, "Match the tensors of `labeler_checkpoint` by their order, not by their names."
    )
    labeler_mean: tuple[float, ...] | None = setting(
        None, "Mean of each channel, to normalise the labeler's input with."
    )
    labeler_std: tuple[float, ...] | None = setting(
        None, "Standard deviation of each channel, to normalise the labeler's input with."
    )
    # The manifest's table of shards tells their number.
    shards: int = setting(
        0,
        "Number of shards, each written by one process (0 chooses 512 to 4,096 images per shard, fewer for crops).",
        affects=JOB,
        bounds="[0, inf)",
    )
    top_k: int | None = setting(None, "Most probable classes stored per token.", bounds="[0, inf)")
    # The manifest has entries of its own for these five.
    draws: int = setting(
        0,
        "Classes drawn per token from the labeler's whole distribution, or from what `top_k` leaves of it (0: none).",
        affects=JOB,
        bounds="[0, 4096]",
    )
    confidence: bool = setting(
        False, "Store each token's confidence beside draws. Labels with `top_k` have it in any case.", affects=JOB
    )
    class_top_k: int = setting(
        0,
        "Most probable classes stored of the labeler's class head, per view (0: none).",
        affects=JOB,
        bounds="[0, inf)",
    )
    class_draws: int = setting(
        0, "Classes drawn from the labeler's class head, per view (0: none).", affects=JOB, bounds="[0, 4096]"
    )
    first_view: int = setting(
        0,
        "Number of the first random crop, counted from 0, to add crops to those of an earlier dump.",
        affects=JOB,
        bounds="[0, 16777215]",
    )
    crops_per_image: int = setting(
        0, "Random crops labelled per image (0 labels the whole image once).", bounds="[0, inf)", recorded_as="views"
    )
    img_size: int = setting(
        0,
        "Height and width of the labeler's input, in pixels (0 takes the size it was trained with).",
        bounds="[0, 8192]",
    )
    batch_size: int = setting(64, "Images per batch.", bounds="[1, inf)")
    seed: int = setting(0, "Seed of the random crops and of draws.", bounds=SEEDS, needs=needs.ANY_DRAW)
    scale_min: float = setting(0.25, "Smallest part of an image's area that a random crop takes.", needs=needs.CROPS)
    flip: float = setting(0.5, "Probability that a random crop is flipped.", needs=needs.CROPS)
    interpolation: str = setting(
        "auto",
        "How images are resized; auto does it as in the labeler's training, and takes area for timm:NAME.",
        choices=("auto", *INTERPOLATIONS),
    )
    format: str = setting("zarr", "Container.", choices=("zarr", "webdataset"))
    encoding: str = setting("f16", "Logits as they are (f16), or smaller with a bounded error.", choices=("f16", "q8"))
    amp: str = setting("none", "Mixed precision of the labeler's trunk; auto chooses by device.", choices=AMP_MODES)
    licence: str = setting("unstated", "Licence of the labeler's weights, stored in the manifest and the card.")
    skip_broken: bool = setting(False, SKIP_BROKEN)
    class_map: str | None = setting(None, CLASS_MAP, affects=INPUT)

    def check_together(self) -> None:
        super().check_together()
        for name in ("labeler_mean", "labeler_std"):
            check_three(name, getattr(self, name))
        if self.top_k is None and self.draws:
            object.__setattr__(self, "top_k", 0)
        if self.top_k == 0 and not self.draws:
            raise InputError("`top_k` is 0, which needs `draws`")
        if self.first_view and not self.crops_per_image:
            raise InputError(f"`first_view` is {self.first_view}, which needs `crops_per_image`")
        if self.first_view + self.crops_per_image > 1 << 24:  # what random draws are numbered by
            raise InputError(f"there are {1 << 24:,} random crops; `first_view` + `crops_per_image` is beyond")
        self.crop_settings()

    def crop_settings(self) -> CropSettings:
        """How random crops are drawn."""
        return CropSettings(scale=(self.scale_min, 1.0), flip=self.flip)


def result_settings(config: Config) -> dict[str, Any]:
    """The settings that shape the result, by the names that files use for them."""
    return recorded(config, RESULT)
