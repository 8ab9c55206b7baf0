"""The settings of ``stl-offline transfer``: fine-tuning a backbone on masks or boxes. As `stl_offline.config`."""

from dataclasses import dataclass

from stl_offline import needs
from stl_offline.config import AMP_MODES, MachineConfig, RunConfig
from stl_offline.errors import InputError
from stl_offline.settings import INPUT, JOB, SEEDS, SKIP_BROKEN, Config, setting

SCHEDULES = ("poly", "cosine")
# The models whose segmenters FAN's authors published.
PUBLISHED_SEGMENTERS = (
    "fan_tiny_8_p4_hybrid",
    "fan_small_12_p4_hybrid",
    "fan_base_16_p4_hybrid",
    "fan_large_16_p4_hybrid",
)

_SPLIT = "Use only what lies below a folder of this name, such as train in camvid/train/0.jpg."
_CLASSES = (
    "Names of the classes in the order of their ids: a text file with one per line, or comma-separated names (a single "
    "name needs a trailing comma)."
)
_IGNORE_ID = "Id of pixels without a class, which the loss and the scores ignore."
_WINDOW = "Predict windows of the training crop's size and average where they overlap, instead of whole images."


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(RunConfig):
    """What fine-tuning on masks and on boxes share."""

    split: str | None = setting(None, _SPLIT, affects=INPUT, in_recipes=False)
    val_split: str | None = setting(
        None, "The same for `val`.", affects=INPUT, in_recipes=False, needs=needs.VALIDATION
    )
    backbone: str = setting(
        help="Backbone to fine-tune: a run, one of its weights files, or timm:NAME.", affects=INPUT, in_recipes=False
    )
    backbone_checkpoint: str | None = setting(
        None,
        "Weights file for a backbone given as timm:NAME, such as a published .pth.tar.",
        affects=INPUT,
        in_recipes=False,
    )
    backbone_pretrained: bool = setting(
        False,
        "Take timm's own weights for a backbone given as timm:NAME, from the Hugging Face Hub or its local cache.",
        affects=INPUT,
        in_recipes=False,
    )
    freeze: bool = setting(False, "Train the head alone; the backbone keeps its weights and batch statistics.")
    epochs: int = setting(100, "Passes over the training data.", bounds="[1, inf)")
    batch_size: int = setting(8, "Images per batch and process.", bounds="[1, inf)")
    lr: float = setting(2e-4, "Peak learning rate of AdamW for the backbone.", bounds="(0, inf)")
    head_lr_scale: float = setting(10.0, "Learning rate of the head, as a multiple of `lr`.", bounds="(0, inf)")
    layer_decay: float = setting(
        1.0,
        "Learning rate of a layer, as a multiple of that of the next layer towards the head.",
        bounds="(0, 1]",
        needs=needs.UNFROZEN,
    )
    schedule: str = setting(
        "poly", "How the learning rate falls after the warm-up: in a straight line, or as a cosine.", choices=SCHEDULES
    )
    warmup_epochs: float = setting(1.0, "Epochs of linear warm-up, at most a fifth of the run.", bounds="[0, inf)")
    weight_decay: float = setting(0.01, "Weight decay of AdamW.", bounds="[0, inf)")
    drop_path: float = setting(
        0.1, "Rate of stochastic depth in the backbone (0 disables it).", bounds="[0, 1)", needs=needs.UNFROZEN
    )
    ema_decay: float = setting(
        0.0,
        "Decay of the moving average of the weights, reached by a warm-up (0 disables the average).",
        bounds="[0, 1)",
    )
    channels_last: bool = setting(False, "Keep the model's weights in the channels-last memory format.")
    classes: str = setting(help=_CLASSES, affects=INPUT, in_recipes=False)
    flip: float = setting(0.5, "Probability of a horizontal flip.", bounds="[0, 1]")

    @property
    def trains_all(self) -> bool:
        return False  # timm's backbones may have parameters that no feature map depends on

    def check_together(self) -> None:
        super().check_together()
        named = self.backbone.startswith("timm:")
        for name in ("backbone_checkpoint", "backbone_pretrained"):
            if getattr(self, name) and not named:
                raise InputError(f"`{name}` needs a backbone given as timm:NAME, got {self.backbone!r}")
        if self.backbone_checkpoint and self.backbone_pretrained:
            raise InputError("`backbone_checkpoint` and `backbone_pretrained` both give weights; give one of them")


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(BackboneConfig):
    """``stl-offline transfer segment``. The defaults suit a small model and a few hundred images."""

    data: str = setting(
        help="Training images with masks: a folder or a tar.",
        affects=INPUT,
        in_recipes=False,
    )
    ignore_id: int = setting(255, _IGNORE_ID, bounds="[0, 65535]", in_recipes=False)
    crop_height: int = setting(352, "Height of the training crops, in pixels.", bounds="[1, 8192]")
    crop_width: int = setting(480, "Width of the training crops, in pixels.", bounds="[1, 8192]")
    scale_min: float = setting(
        0.5, "Smallest factor by which an image is scaled before it is cropped.", bounds="(0, 8]"
    )
    scale_max: float = setting(
        2.0, "Largest factor by which images are scaled before they are cropped.", bounds="(0, 8]"
    )
    color_jitter: float = setting(0.4, "Strength of colour jitter (0 disables it).", bounds="[0, inf)")
    head_width: int = setting(256, "Channels of the head.", bounds="[1, 65536]")
    head_dropout: float = setting(0.1, "Dropout of whole channels in the head.", bounds="[0, 1)")
    sliding_window: bool = setting(False, _WINDOW, needs=needs.VALIDATION)

    def check_together(self) -> None:
        super().check_together()
        if self.scale_min > self.scale_max:
            raise InputError(f"`scale_min` {self.scale_min} is above `scale_max` {self.scale_max}")

    @property
    def crop(self) -> tuple[int, int]:
        """Height and width of a training crop."""
        return self.crop_height, self.crop_width


@dataclass(frozen=True, kw_only=True)
class DetectConfig(BackboneConfig):
    """``stl-offline transfer detect``."""

    data: str = setting(help="Training images with boxes: a folder or a tar.", affects=INPUT, in_recipes=False)
    annotations: str | None = setting(
        None, "COCO JSON file of the boxes. By default, Pascal VOC's XML files.", affects=INPUT, in_recipes=False
    )
    val_annotations: str | None = setting(
        None, "COCO JSON file of the boxes of `val`.", affects=INPUT, in_recipes=False
    )
    masks: bool = setting(
        False,
        "Predict a mask of each object, too (Mask R-CNN), from the masks of a COCO JSON file.",
        needs=needs.ANNOTATIONS,
    )
    batch_size: int = setting(4, "Images per batch and process.", bounds="[1, inf)")
    epochs: int = setting(24, "Passes over the training data.", bounds="[1, inf)")
    head_lr_scale: float = setting(1.0, "Learning rate of the head, as a multiple of `lr`.", bounds="(0, inf)")
    side: int = setting(480, "Shorter side that images are scaled to, in pixels.", bounds="[32, 8192]")
    side_min: int = setting(
        0,
        "Smallest shorter side drawn in training, in steps of 32 pixels up to `side` (0 draws none).",
        bounds="[0, 8192]",
    )
    longest: int = setting(800, "Longest side of a scaled image, in pixels.", bounds="[32, 8192]")
    head_width: int = setting(256, "Channels of the feature pyramid.", bounds="[1, 4096]")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile:
            raise InputError("`compile` would compile again for each of the many sizes of a detector's batches")
        if self.side_min > self.side or self.side > self.longest:
            raise InputError(
                f"`side_min` {self.side_min}, `side` {self.side} and `longest` {self.longest} must not fall"
            )
        if self.val_annotations and not self.val:
            raise InputError("`val_annotations` needs `val`")
        if self.masks and self.val and not self.val_annotations:
            raise InputError("`masks` needs `val_annotations` for `val`: a COCO JSON file with masks")


@dataclass(frozen=True, kw_only=True)
class ZeroTrainConfig(MachineConfig):
    """``stl-offline transfer zero-train``."""

    data: str = setting(help="Images with classes.", affects=INPUT)
    masks: str = setting(
        help="Their objects: a folder of masks or Pascal VOC boxes, an .npz file, or a .json file of boxes.",
        affects=INPUT,
    )
    checkpoint: str = setting(help="A run with a trained token head, or one of its weights files.", affects=INPUT)
    threshold: float = setting(
        0.5, "Probability of the image's class from which a pixel counts as foreground.", bounds="(0, 1)"
    )
    img_size: int = setting(0, "Height and width of the input (0 takes the size trained with).", bounds="[0, 8192]")
    batch_size: int = setting(128, "Images per batch.", bounds="[1, inf)")
    amp: str = setting("none", "Mixed precision of the model; auto chooses by device.", choices=AMP_MODES)
    skip_broken: bool = setting(False, SKIP_BROKEN)


@dataclass(frozen=True, kw_only=True)
class TransferEvaluateConfig(MachineConfig):
    """``stl-offline transfer evaluate``."""

    data: str = setting(help="Images with masks or boxes: a folder or a tar.", affects=INPUT)
    annotations: str | None = setting(
        None, "COCO JSON file of a detector's boxes. By default, Pascal VOC's XML files.", affects=INPUT
    )
    split: str | None = setting(None, _SPLIT, affects=INPUT)
    checkpoint: str = setting(help="A run of transfer segment or detect, or one of its weights files.", affects=INPUT)
    sliding_window: bool = setting(False, _WINDOW)
    corrupt: str | None = setting(
        None,
        "Corruptions of the images to score, too: all, benchmark, extra, noise, blur, weather, digital, or kinds such "
        "as fog:2-4, with severities after the colon.",
    )
    seed: int = setting(0, "Seed of the corruptions.", bounds=SEEDS, needs=needs.CORRUPTIONS)
    page: str | None = setting(
        None, "HTML page of a segmenter's scores, with images, masks and predictions side by side.", affects=JOB
    )
    examples: int = setting(8, "Images on the page.", affects=JOB, bounds="[1, inf)", needs=needs.PAGE)
    amp: str = setting("none", "Mixed precision of the model; auto chooses by device.", choices=AMP_MODES)
    out: str | None = setting(
        None, "Folder for predicted masks as PNG files; none are written by default.", affects=JOB
    )


@dataclass(frozen=True, kw_only=True)
class ImportConfig(Config):
    """``stl-offline transfer import``."""

    checkpoint: str = setting(help="Checkpoint of a segmenter from FAN's released code, such as a .pth.", affects=INPUT)
    model: str = setting(help="The FAN hybrid in it.", choices=PUBLISHED_SEGMENTERS, affects=INPUT)
    classes: str = setting(help=_CLASSES, affects=INPUT)
    ignore_id: int = setting(255, _IGNORE_ID, bounds="[0, 65535]")
    out: str = setting(help="Run folder to write.", affects=JOB)
