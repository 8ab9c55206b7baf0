"""``stl-offline train-student``."""

import click

from stl_offline.cli.command import NUMBERS, command, example, option
from stl_offline.cli.options import timm_labeler_options, training_options
from stl_offline.cli.stages import print_dry_run, print_run, settings_of_run
from stl_offline.config import CROP_MODES, ERASED_LABELS, LABEL_PICKS, StudentConfig
from stl_offline.settings import RESIDUALS, TOKEN_TARGETS


@command(
    epilog=example(
        "stl-offline train-student --recipe fan-tiny --data images/train --val images/val \\",
        "    --labels labels --out runs/student",
        "stl-offline train-student --data images/train --val images/val --labels labels --labels labels-448 \\",
        "    --model fan_tiny_8_p4_hybrid --img-size 224 --epochs 350 --batch-size 128 --out runs/student",
        "",
        "Baselines: --labels none (no token labels), --labels online --labeler runs/labeler (labels every batch)",
    )
)
@training_options
@option(
    "--labels",
    group="labels",
    multiple=True,
    default=[StudentConfig.labels],
    metavar="SET|none|online",
    help="Source of token labels. May be given several times to train from several label sets.",
)
@option(
    "--labeler",
    group="labels",
    metavar="RUN|CKPT|timm:NAME|hf-hub:NAME",
    help="Labeler to run during training (only with --labels online). Must have the student's token grid and class "
    "list.",
)
@timm_labeler_options
@option(
    "--token-target",
    group="labels",
    default=StudentConfig.token_target,
    type=click.Choice(TOKEN_TARGETS),
    help="Target of a token: one class drawn in each step (gumbel), the distribution (soft), or the best class "
    "(argmax).",
)
@option(
    "--residual",
    group="labels",
    default=StudentConfig.residual,
    type=click.Choice(RESIDUALS),
    help="What happens to probability outside the stored classes: left unlabelled (ignore), or spread over all "
    "classes (uniform).",
)
@option(
    "--views",
    "crops",
    group="labels",
    default=StudentConfig.crops,
    type=click.Choice(CROP_MODES),
    help="Crops to train on: new ones (random), those of the label set (replay), or whichever the set allows (auto).",
)
@option(
    "--missing",
    group="labels",
    default=StudentConfig.missing,
    type=click.Choice(["error", "skip"]),
    help="What to do with images that have no labels: stop, or train on them without token labels.",
)
@option(
    "--min-confidence",
    group="labels",
    default=StudentConfig.min_confidence,
    metavar="X",
    help="Confidence below which a token is left unlabelled.",
)
@option(
    "--labels-pick",
    group="advanced",
    default=StudentConfig.labels_pick,
    type=click.Choice(LABEL_PICKS),
    help="How one of several label sets is chosen for a sample: by its crop's scale (zoom), or at random (draw).",
)
@option(
    "--labels-share",
    group="advanced",
    type=NUMBERS,
    metavar="X,Y",
    show_default="equal",
    help="How often each label set is drawn, in the order of --labels.",
)
@option(
    "--columns",
    "soft_classes",
    group="advanced",
    default=StudentConfig.soft_classes,
    metavar="N",
    help="Classes kept per token of a soft target.",
)
@option(
    "--sampling-ratio",
    group="advanced",
    default=StudentConfig.sampling_ratio,
    metavar="N",
    help="RoIAlign's sampling points per cell, along each side.",
)
@option(
    "--erased-labels",
    group="advanced",
    default=StudentConfig.erased_labels,
    type=click.Choice(ERASED_LABELS),
    help="Whether labels of cells hidden by --random-erase are weighted down or kept.",
)
@option(
    "--key-prefix",
    group="advanced",
    default=StudentConfig.key_prefix,
    metavar="OLD=NEW",
    help="Replace the start OLD of the images' keys by NEW before labels are looked up, such as 'train/='.",
)
@option(
    "--allow-changed/--no-allow-changed",
    group="advanced",
    default=StudentConfig.allow_changed,
    help="Use labels of images whose content has changed since they were labelled.",
)
@click.pass_context
def train_student(ctx: click.Context, recipe: str | None, dry_run: bool, **settings: object) -> None:
    """Stage 2: train a model from class labels and token labels.

    Labels are joined by key, follow every crop and flip, and are mixed as the pixels are mixed.
    For several processes: torchrun --nproc-per-node N -m stl_offline.cli train-student …
    """
    config = settings_of_run(StudentConfig, ctx, recipe, settings)
    if dry_run:
        print_dry_run("student", config)
        return
    from stl_offline.training.train_student import train_student as train

    print_run("student", config.out, train(config))
