"""``stl-offline train-student``."""

import click

from stl_offline.cli.options import NUMBERS, example, machine_options, option, said, training_options
from stl_offline.cli.stages import train_or_look
from stl_offline.config import ERASED_LABELS, LABEL_PICKS, RESIDUALS, TOKEN_TARGETS, VIEW_MODES, StudentConfig


@click.command(
    epilog=example(
        "stl-offline train-student --recipe fan-tiny --data images/train --val images/val \\",
        "    --labels labels --out runs/student",
        "stl-offline train-student --data images/train --val images/val --labels labels --labels labels-448 \\",
        "    --model fan_tiny_8_p4_hybrid --img-size 224 --epochs 350 --batch-size 128 --out runs/student",
        "",
        "Baselines: --labels none (no token labels), --labels online --labeler runs/labeler (it runs in every step)",
    )
)
@training_options
@option(
    "--labels",
    multiple=True,
    default=[StudentConfig.labels],
    metavar="SET|none|online",
    help="Where token labels come from; several sets: say it once for each.",
)
@option(
    "--labels-pick",
    default=StudentConfig.labels_pick,
    type=click.Choice(LABEL_PICKS),
    help="Of several sets: the one that fits a crop's zoom, or one drawn; auto: zoom for sizes of whole images.",
)
@option(
    "--labels-share",
    type=NUMBERS,
    metavar="X,Y",
    help="How often each set is drawn, in the order of --labels.  [default: equally]",
)
@option("--labeler", metavar="RUN|CKPT|timm:NAME", help="With --labels online: of the student's grid, classes.")
@option("--labeler-checkpoint", metavar="FILE", help="Weights for a labeler named timm:NAME.")
@option(
    "--token-target",
    default=StudentConfig.token_target,
    type=click.Choice(TOKEN_TARGETS),
    help="gumbel: one class drawn for each token; soft: the distribution; argmax: its best class.",
)
@option(
    "--residual",
    default=StudentConfig.residual,
    type=click.Choice(RESIDUALS),
    help="Mass outside the stored classes: no label, or spread over all classes (gumbel, soft).",
)
@option(
    "--views",
    default=StudentConfig.views,
    type=click.Choice(VIEW_MODES),
    help="auto: replay a set's crops, or draw new ones over whole images; random, replay: insist on one.",
)
@option("--columns", default=StudentConfig.columns, metavar="N", help="Classes kept for a token of a soft target.")
@option(
    "--sampling-ratio", default=StudentConfig.sampling_ratio, metavar="N", help="RoIAlign's points a cell and side."
)
@option("--min-confidence", default=StudentConfig.min_confidence, metavar="X", help="Leave tokens below it unlabelled.")
@option(
    "--erased-labels",
    default=StudentConfig.erased_labels,
    type=click.Choice(ERASED_LABELS),
    help="Labels of cells that --random-erase hides.",
)
@option(
    "--missing",
    default=StudentConfig.missing,
    type=click.Choice(["error", "skip"]),
    help="Images without labels: stop, or train them without.",
)
@option(
    "--key-prefix",
    default=StudentConfig.key_prefix,
    metavar="OLD=NEW",
    help="Look images up whose keys start with OLD under NEW: 'train/=' leaves train/ out, '=train/' adds it.",
)
@option(
    "--allow-changed/--no-allow-changed",
    default=StudentConfig.allow_changed,
    help="Use labels of images whose content has changed since.",
)
@machine_options
@click.pass_context
def train_student(ctx: click.Context, **_: object) -> None:
    """Stage 2: train a model from class labels and token labels.

    The labels are joined by key, follow every crop and flip, and mix as the pixels mix.
    Several processes: torchrun --nproc-per-node N -m stl_offline.cli train-student …
    """
    train_or_look("student", said(ctx))
