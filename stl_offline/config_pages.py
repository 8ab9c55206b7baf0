"""The settings of ``labels preview`` and ``report``, as `stl_offline.config` gives them."""

import dataclasses
from dataclasses import dataclass

from stl_offline import needs
from stl_offline.errors import InputError
from stl_offline.settings import (
    INPUT,
    JOB,
    MATCHES,
    MISSING,
    SKIP_BROKEN,
    Config,
    CropSettings,
    MachineConfig,
    check_match,
    setting,
)


@dataclass(frozen=True, kw_only=True)
class PreviewConfig(Config):
    """``stl-offline labels preview``."""

    path: str = setting(help="The label set.", affects=INPUT)
    data: str | None = setting(None, "Images of the labels.", affects=INPUT)
    out: str = setting("preview", "Folder for labels.html and the PNG files.", affects=JOB)
    keys: tuple[str, ...] = setting((), "Key to show, or a pattern with * and ?.")
    samples: int = setting(
        12,
        "Number of images to draw at random, from all keys or from those that match a pattern.",
        bounds="[1, inf)",
        needs=needs.RANDOM_CHOICE,
    )
    suspects: int = setting(
        0,
        "Show the N images whose tokens disagree most with their class, instead of random ones (0 disables it).",
        bounds="[0, inf)",
    )
    seed: int = setting(0, "Seed of the random choice.", bounds="[0, inf)", needs=needs.RANDOM_CHOICE)
    map_index: tuple[int, ...] = setting((0,), "Which of an image's stored crops to show, from 0.")
    threshold: float = setting(0.5, "Confidence from which a token counts as confident.", bounds="[0, 1]")
    student_seed: int = setting(
        0, "Seed of the student, on which its crops and drawn classes depend.", bounds="[0, inf)"
    )
    epoch: int = setting(
        0, "Epoch of the student, counted from 0 (its logs and the page count from 1).", bounds="[0, inf)"
    )
    scale_min: float = setting(0.25, "Smallest part of an image's area that the student's crop takes.")
    flip: float = setting(0.5, "Probability that the student's crop is flipped.")
    missing: str = setting(
        "error",
        "What to do with labels that have no image: stop, or show them alone (skip).",
        choices=MISSING,
        needs=needs.IMAGES,
    )
    allow_changed: bool = setting(
        False, "Show images whose content has changed since they were labelled.", needs=needs.IMAGES
    )
    match: str = setting(
        "key",
        "How images and labels are joined: by key, by stem (the key's base name up to its first dot), or by content.",
        choices=MATCHES,
        needs=needs.IMAGES,
    )
    all_shards: bool = setting(False, "Read all shards for the histogram, not only those shown.")
    max_mb: float = setting(5.0, "Maximum size of the page, in megabytes.", bounds="(0, inf)")

    def check_together(self) -> None:
        super().check_together()
        if not self.map_index or min(self.map_index) < 0:
            raise InputError(f"`map_index` must be one or more numbers from 0 on, got {self.map_index}")
        if self.suspects and self.keys:
            raise InputError("`suspects` and `keys` both choose the images; give one of them")
        check_match(self.match, allow_changed=self.allow_changed)
        self.crop_settings()

    def crop_settings(self) -> CropSettings:
        """How the student's random crops are drawn."""
        return CropSettings(scale=(self.scale_min, 1.0), flip=self.flip)


@dataclass(frozen=True, kw_only=True)
class ReportConfig(MachineConfig):
    """``stl-offline report``."""

    runs: tuple[str, ...] = setting(help="Folders of runs, or results of evaluate as JSON files.", affects=INPUT)
    data: str | None = setting(None, "Images to show examples of.", affects=INPUT)
    labels: tuple[str, ...] = setting((), "Label set that a run was trained with.", affects=INPUT)
    out: str = setting("report.html", "File to write the page to.", affects=JOB)
    examples: int = setting(
        4,
        "Correctly classified images to show, and as many wrongly classified ones.",
        bounds="[0, inf)",
        needs=needs.IMAGES,
    )
    predict: int = setting(256, "Images to choose examples from.", bounds="[1, inf)", needs=needs.IMAGES)
    skip_broken: bool = setting(False, SKIP_BROKEN, needs=needs.IMAGES)
    seed: int = setting(0, "Seed of the choice of examples.", bounds="[0, inf)", needs=needs.IMAGES)
    max_mb: float = setting(5.0, "Maximum size of the page, in megabytes.", bounds="(0, inf)")

    def check_together(self) -> None:
        super().check_together()
        if not self.runs:
            raise InputError("a report needs at least one run")
        files = [run for run in self.runs if run.endswith(".json")]
        if files and len(files) < len(self.runs):
            raise InputError(f"runs and results of evaluate go on pages of their own; got {', '.join(self.runs)}")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        unused = ("data", "labels", "examples", "predict", "skip_broken", "seed", "device", "workers")
        given = [f"`{name}`" for name in unused if getattr(self, name) != defaults[name]]
        if files and given:
            raise InputError(f"{', '.join(given)} cannot be used with results of evaluate; leave it out")

    @property
    def of_scores(self) -> bool:
        """Whether the page is of results of evaluate, instead of runs."""
        return self.runs[0].endswith(".json")
