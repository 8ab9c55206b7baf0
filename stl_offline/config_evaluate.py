"""The settings of ``stl-offline evaluate``, checked where they are built. `stl_offline.config` gives them, too."""

from dataclasses import dataclass

from stl_offline.errors import InputError
from stl_offline.settings import AMP_MODES, INPUT, JOB, SEEDS, SKIP_BROKEN, MachineConfig, check_three, setting

SUITES = ("imagenet", "a", "r", "c", "sketch", "v2", "real")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(MachineConfig):
    """``stl-offline evaluate``."""

    data: str | tuple[str, ...] = setting(help="Images to evaluate on.", affects=INPUT)
    checkpoint: str | None = setting(
        None, "A run's folder, or one of its checkpoints; with `model`, any weights file.", affects=INPUT
    )
    suite: tuple[str, ...] = setting(
        (), "ImageNet's test sets to score, separated by commas: imagenet, a, r, c, sketch, v2, real."
    )
    corrupt: str | None = setting(
        None,
        "Corruptions to generate from the images of `data`: all, benchmark, extra, noise, blur, weather, digital, or "
        "kinds such as fog:2-4, with severities after the colon.",
    )
    classes: str = setting(
        "all",
        "Classes whose logits are compared: all of the model's, or the subset that the data has.",
        choices=("all", "subset"),
    )
    partial: bool = setting(False, "Score suites that lack some of their classes or images.")
    real_labels: str | None = setting(None, "Labels of the suite real, as its authors' real.json.", affects=INPUT)
    model: str | None = setting(
        None, "A model of timm's registry, which holds FAN's variants, as NAME or timm:NAME; or hf-hub:ORG/NAME."
    )
    class_names: str | None = setting(
        None, "Class names of `model`: a text file with one per line, or a label set.", affects=INPUT
    )
    by_order: bool = setting(False, "Match the tensors of `checkpoint` by their order, not by their names.")
    mean: tuple[float, ...] | None = setting(None, "Mean of each channel, to normalise the input with.")
    std: tuple[float, ...] | None = setting(None, "Standard deviation of each channel, to normalise the input with.")
    skip_broken: bool = setting(False, SKIP_BROKEN)
    batch_size: int = setting(128, "Images per batch.", bounds="[1, inf)")
    img_size: int = setting(
        0, "Height and width of the model's input, in pixels (0 takes the model's own).", bounds="[0, 8192]"
    )
    crop_pct: float | None = setting(
        None, "Part of the image's shorter side that the central crop takes.", bounds="(0, 1]"
    )
    amp: str = setting("none", "Mixed precision of the model; auto chooses by device.", choices=AMP_MODES)
    seed: int = setting(0, "Seed of generated corruptions.", bounds=SEEDS)
    resume: bool = setting(
        True,
        "Take scores that were stored for the same weights, settings and files, such as by an interrupted command.",
        affects=JOB,
    )
    csv: str | None = setting(None, "File to write the scores to, in the columns of timm's results.", affects=JOB)

    def __post_init__(self) -> None:
        if isinstance(self.data, str):
            object.__setattr__(self, "data", (self.data,))
        super().__post_init__()

    def check_together(self) -> None:
        super().check_together()
        if self.checkpoint is None and self.model is None:
            raise InputError("give a `checkpoint` (a run, or weights), a timm `model`, or both")
        for name in ("mean", "std"):
            check_three(name, getattr(self, name))
        if self.model is None and (self.class_names or self.by_order or self.mean or self.std):
            raise InputError(
                "`class_names`, `by_order`, `mean` and `std` go with a timm `model`; a run has its own of each"
            )
        if self.by_order and self.checkpoint is None:
            raise InputError("`by_order` matches the tensors of a `checkpoint`; give one")
        if self.seed and self.corrupt is None:
            raise InputError("`seed` is that of generated corruptions; give `corrupt`, too")
        if self.is_plain and self.csv is not None:
            raise InputError("`csv` goes with `suite`, `corrupt` or a timm `model`")
        if not self.is_plain and self.skip_broken:
            raise InputError("`skip_broken` goes without `suite`, `corrupt` and `model`: these score every image")
        self._check_suites()

    @property
    def sources(self) -> dict[str, str]:
        """Where the images are: by suite, or as "data"."""
        if not self.suite:
            return {"data": self.data[0]}
        return dict(each.split("=", 1) for each in self.data)

    @property
    def is_plain(self) -> bool:
        """Whether this is a run's accuracy on a data set, with images decoded as in training."""
        return not (self.suite or self.corrupt is not None or self.model is not None)

    def _check_suites(self) -> None:
        if not self.suite:
            if len(self.data) != 1:
                raise InputError(f"without `suite` there is one `data`, got {len(self.data)}")
            if self.partial or self.real_labels is not None:
                raise InputError("`partial` and `real_labels` go with `suite`")
            return
        for name in self.suite:
            if name not in SUITES:
                raise InputError(f"`suite` must be among {', '.join(SUITES)}; got {name!r}")
        if self.corrupt is not None:
            raise InputError("`corrupt` takes a data set of one's own; leave out `suite`")
        if self.classes != "all":
            raise InputError("`classes` goes without `suite`: a and r are scored over their classes and over all")
        named = [each.partition("=")[0] for each in self.data if "=" in each]
        if sorted(named) != sorted(self.suite) or len(named) != len(self.data) or len(set(named)) != len(named):
            raise InputError(
                f"with `suite`, `data` is NAME=SRC once for each of {', '.join(self.suite)}; got {', '.join(self.data)}"
            )
        if self.real_labels is not None and "real" not in self.suite:
            raise InputError("`real_labels` goes with the suite real")
